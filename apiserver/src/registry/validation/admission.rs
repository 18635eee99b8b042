//! Rules for webhooks and admission policies.

use apimachinery::meta::validation::is_dns1123_subdomain;
use apimachinery::status::FieldError;
use serde_json::Value;

use super::{Errors, Path, complain, label_selector, one_of, required};
use crate::registry::object::ObjectExt;

pub fn webhooks(obj: &Value) -> Errors {
    let mut errors = Errors::new();
    let list = Path::Root("webhooks");
    let mut names = Vec::new();
    for (index, hook) in obj.list_at(&["webhooks"]).iter().enumerate() {
        let path = list.index(index);
        let name = hook.str_at(&["name"]);
        if required(hook, "name", path, &mut errors).is_some() {
            complain(is_dns1123_subdomain(name), name, path.field("name"), &mut errors);
            if name.split('.').count() < 3 {
                let detail = "should be a domain with at least three segments separated by dots";
                errors.push(FieldError::invalid(path.field("name"), name, detail));
            }
        }
        super::unique(&mut names, name, path.field("name"), &mut errors);
        webhook(hook, path, &mut errors);
    }
    errors
}

fn webhook(hook: &Value, path: Path<'_>, errors: &mut Errors) {
    let versions = hook.list_at(&["admissionReviewVersions"]);
    if versions.is_empty() {
        let detail = "must specify one of v1, v1beta1";
        errors.push(FieldError::required(path.field("admissionReviewVersions"), detail));
    } else if !versions.iter().any(|version| version == "v1" || version == "v1beta1") {
        let detail = "must include at least one of v1, v1beta1";
        let value = hook["admissionReviewVersions"].clone();
        errors.push(FieldError::invalid(path.field("admissionReviewVersions"), value, detail));
    }
    one_of(hook, "failurePolicy", &["Fail", "Ignore"], path, errors);
    one_of(hook, "matchPolicy", &["Equivalent", "Exact"], path, errors);
    one_of(hook, "reinvocationPolicy", &["IfNeeded", "Never"], path, errors);
    match hook.str_at(&["sideEffects"]) {
        "" => {
            let detail = "must specify one of None, NoneOnDryRun";
            errors.push(FieldError::required(path.field("sideEffects"), detail));
        }
        "None" | "NoneOnDryRun" => {}
        other => errors.push(FieldError::not_supported(path.field("sideEffects"), other, &["None", "NoneOnDryRun"])),
    }
    if let Some(seconds) = hook["timeoutSeconds"].as_i64().filter(|s| !(1..=30).contains(s)) {
        let detail = "the timeout value must be between 1 and 30 seconds";
        errors.push(FieldError::invalid(path.field("timeoutSeconds"), seconds, detail));
    }
    for selector in ["namespaceSelector", "objectSelector"] {
        label_selector(&hook[selector], path.field(selector), errors);
    }
    super::each(hook, "rules", path, errors, rule);
    match_conditions(hook, path, errors);
    client_config(&hook["clientConfig"], path.field("clientConfig"), errors);
}

fn rule(rule: &Value, path: Path<'_>, errors: &mut Errors) {
    for field in ["operations", "apiGroups", "apiVersions", "resources"] {
        let items = rule.list_at(&[field]);
        if items.is_empty() {
            errors.push(FieldError::required(path.field(field), ""));
        }
        if items.len() > 1 && items.iter().any(|item| item == "*") {
            let detail = "if '*' is present, must not specify other ";
            let value = rule[field].clone();
            errors.push(FieldError::invalid(path.field(field), value, format!("{detail}{field}")));
        }
    }
    let operations = path.field("operations");
    for (index, operation) in rule.list_at(&["operations"]).iter().enumerate() {
        let allowed = ["*", "CONNECT", "CREATE", "DELETE", "UPDATE"];
        let text = operation.as_str().unwrap_or_default();
        if !allowed.contains(&text) {
            errors.push(FieldError::not_supported(operations.index(index), text, &allowed));
        }
    }
    one_of(rule, "scope", &["*", "Cluster", "Namespaced"], path, errors);
}

/// A service or a URL, not both.
pub fn client_config(config: &Value, path: Path<'_>, errors: &mut Errors) {
    match (config["url"].as_str(), config["service"].is_null()) {
        (None, true) | (Some(_), false) => {
            errors.push(FieldError::required(path, "exactly one of url or service is required"));
        }
        (Some(url), true) => {
            if !url.starts_with("https://") {
                let detail = "'https' is the only allowed URL scheme; desired format: https://host[/path]";
                errors.push(FieldError::invalid(path.field("url"), url, detail));
            }
        }
        (None, false) => {
            let path = path.field("service");
            required(&config["service"], "name", path, errors);
            required(&config["service"], "namespace", path, errors);
        }
    }
}

pub fn validating_policy(obj: &Value) -> Errors {
    let mut errors = Errors::new();
    let spec = &obj["spec"];
    one_of(spec, "failurePolicy", &["Fail", "Ignore"], Path::SPEC, &mut errors);
    if spec["matchConstraints"].is_null() {
        errors.push(FieldError::required("spec.matchConstraints", ""));
    } else if spec["matchConstraints"].list_at(&["resourceRules"]).is_empty() {
        errors.push(FieldError::required("spec.matchConstraints.resourceRules", ""));
    }
    if spec.list_at(&["validations"]).is_empty() && spec.list_at(&["auditAnnotations"]).is_empty() {
        let detail = "validations or auditAnnotations must contain at least one item";
        errors.push(FieldError::required("spec.validations", detail));
    }
    super::each(spec, "validations", Path::SPEC, &mut errors, |validation, path, errors| {
        expression(validation, "expression", path, errors);
        if !validation.str_at(&["messageExpression"]).is_empty() {
            expression(validation, "messageExpression", path, errors);
        }
    });
    common_policy(spec, &mut errors);
    errors
}

pub fn mutating_policy(obj: &Value) -> Errors {
    let mut errors = Errors::new();
    let spec = &obj["spec"];
    one_of(spec, "failurePolicy", &["Fail", "Ignore"], Path::SPEC, &mut errors);
    if spec["matchConstraints"].is_null() {
        errors.push(FieldError::required("spec.matchConstraints", ""));
    }
    super::each(spec, "mutations", Path::SPEC, &mut errors, |mutation, path, errors| {
        let field = match mutation.str_at(&["patchType"]) {
            "ApplyConfiguration" => "applyConfiguration",
            "JSONPatch" => "jsonPatch",
            "" => return errors.push(FieldError::required(path.field("patchType"), "")),
            other => {
                let supported = ["ApplyConfiguration", "JSONPatch"];
                return errors.push(FieldError::not_supported(path.field("patchType"), other, &supported));
            }
        };
        expression(&mutation[field], "expression", path.field(field), errors);
    });
    common_policy(spec, &mut errors);
    errors
}

/// Variables and match conditions.
fn common_policy(spec: &Value, errors: &mut Errors) {
    super::each(spec, "variables", Path::SPEC, errors, |variable, path, errors| {
        required(variable, "name", path, errors);
        expression(variable, "expression", path, errors);
    });
    match_conditions(spec, Path::SPEC, errors);
}

fn match_conditions(owner: &Value, path: Path<'_>, errors: &mut Errors) {
    super::each(owner, "matchConditions", path, errors, |condition, path, errors| {
        required(condition, "name", path, errors);
        expression(condition, "expression", path, errors);
    });
}

/// An expression must be there and compile.
fn expression(owner: &Value, field: &str, path: Path<'_>, errors: &mut Errors) {
    let source = owner.str_at(&[field]);
    if source.trim().is_empty() {
        return errors.push(FieldError::required(path.field(field), "expression is not specified"));
    }
    if let Err(error) = crate::cel::Expression::compile(source) {
        errors.push(FieldError::invalid(path.field(field), source, error.to_string()));
    }
}

pub fn policy_binding(obj: &Value) -> Errors {
    let mut errors = Errors::new();
    let spec = &obj["spec"];
    required(spec, "policyName", Path::SPEC, &mut errors);
    if obj["kind"] == "ValidatingAdmissionPolicyBinding" && spec.list_at(&["validationActions"]).is_empty() {
        errors.push(FieldError::required("spec.validationActions", "at least one validation action is required"));
    }
    errors
}
