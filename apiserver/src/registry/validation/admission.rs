//! Rules for admission policies and their bindings. Expressions are compiled with the variables that they will see.

use apimachinery::meta::validation::{is_dns1035_label, is_dns1123_subdomain, is_path_segment, is_qualified_name};
use apimachinery::status::FieldError;
use serde_json::Value;

use super::webhooks::{FAILURE_POLICIES, MATCH_POLICIES, REINVOCATION_POLICIES, match_conditions, rule};
use super::{Errors, Path, complain, label_selector, one_of_given, required, required_one_of};
use crate::cel::check::{Type, Variables};
use crate::cel::verify::{Wanted, verify};
use crate::registry::common::same;
use crate::registry::object::ObjectExt;

const MOST_ANNOTATIONS: usize = 20;
const LONGEST_ANNOTATION: usize = 5 * 1024;

/// What every expression about a request sees.
pub fn variables(params: bool, authorizer: bool) -> Variables<'static> {
    let text = |name: &str| (name.to_owned(), Type::String);
    let record = |fields: Vec<(String, Type<'static>)>| Type::Record(fields.into_iter().collect());
    let kind = record(vec![text("group"), text("version"), text("kind")]);
    let resource = record(vec![text("group"), text("version"), text("resource")]);
    let list = Type::List(Box::new(Type::String));
    let user = record(vec![
        text("username"),
        text("uid"),
        ("groups".into(), list.clone()),
        ("extra".into(), Type::Map(Box::new(list))),
    ]);
    let request = record(vec![
        ("kind".into(), kind.clone()),
        ("resource".into(), resource.clone()),
        text("subResource"),
        ("requestKind".into(), kind),
        ("requestResource".into(), resource),
        text("requestSubResource"),
        text("name"),
        text("namespace"),
        text("operation"),
        ("userInfo".into(), user),
        ("dryRun".into(), Type::Bool),
        ("options".into(), Type::Dyn),
    ]);
    let mut all: Variables<'static> =
        ["object", "oldObject", "namespaceObject"].into_iter().map(|name| (name.to_owned(), Type::Dyn)).collect();
    all.insert("request".into(), request);
    for (name, _) in [("params", params), ("authorizer", authorizer)].into_iter().filter(|(_, seen)| *seen) {
        all.insert(name.into(), Type::Dyn);
    }
    all
}

pub fn validating_policy(obj: &Value) -> Errors {
    validating(obj, false)
}

pub fn validating_policy_update(obj: &Value, old: &Value) -> Errors {
    validating(obj, same_conditions(obj, old))
}

/// Conditions that did not change are not compiled again.
fn same_conditions(obj: &Value, old: &Value) -> bool {
    ["paramKind", "matchConditions"].into_iter().all(|field| same(&obj["spec"][field], &old["spec"][field]))
}

fn validating(obj: &Value, skip_conditions: bool) -> Errors {
    let mut errors = Errors::new();
    let spec = &obj["spec"];
    common_policy(spec, skip_conditions, &mut errors);
    let has_params = !spec["paramKind"].is_null();
    let (mut seen, mut in_messages) = (variables(has_params, true), variables(has_params, false));
    if !spec.list_at(&["variables"]).is_empty() {
        let fields = policy_variables(spec, &mut seen, &mut errors);
        in_messages.insert("variables".into(), fields);
    }
    if spec.list_at(&["validations"]).is_empty() && spec.list_at(&["auditAnnotations"]).is_empty() {
        let detail = "validations or auditAnnotations must contain at least one item";
        errors.push(FieldError::required("spec.validations", detail));
        errors.push(FieldError::required("spec.auditAnnotations", detail));
    }
    super::each(spec, "validations", Path::SPEC, &mut errors, |item, path, errors| {
        validation(item, &seen, &in_messages, path, errors);
    });
    audit_annotations(obj, &seen, &mut errors);
    errors
}

fn validation(item: &Value, seen: &Variables<'_>, in_messages: &Variables<'_>, path: Path<'_>, errors: &mut Errors) {
    expression(item, "expression", "expression is not specified", seen, Wanted::Bool, path, errors);
    let message_expression = item.str_at(&["messageExpression"]);
    if !message_expression.is_empty() && message_expression.trim().is_empty() {
        let field = path.field("messageExpression");
        errors.push(FieldError::invalid(field, message_expression, "must be non-empty if specified"));
    } else if !message_expression.is_empty()
        && let Err(detail) = verify(message_expression, in_messages, Wanted::Text)
    {
        errors.push(FieldError::invalid(path.field("messageExpression"), message_expression, detail));
    }
    let message = item.str_at(&["message"]);
    if !message.is_empty() && message.trim().is_empty() {
        errors.push(FieldError::invalid(path.field("message"), message, "must be non-empty if specified"));
    } else if message.trim().contains(['\n', '\r']) {
        errors.push(FieldError::invalid(path.field("message"), message, "must not contain line breaks"));
    }
    one_of_given(item, "reason", &["Forbidden", "Invalid", "RequestEntityTooLarge"], path, errors);
}

fn audit_annotations(obj: &Value, seen: &Variables<'_>, errors: &mut Errors) {
    let annotations = obj.list_at(&["spec", "auditAnnotations"]);
    let list = Path::SPEC.field("auditAnnotations");
    if annotations.len() > MOST_ANNOTATIONS {
        let detail = format!("must not have more than {MOST_ANNOTATIONS} auditAnnotations");
        errors.push(FieldError::invalid(list, annotations.to_vec(), detail));
    }
    for (index, annotation) in annotations.iter().enumerate() {
        let path = list.index(index);
        let key = annotation.str_at(&["key"]);
        if obj.name().is_empty() {
            errors.push(FieldError::invalid(path.field("key"), key, "requires metadata.name be non-empty"));
        } else {
            let full = format!("{}/{key}", obj.name());
            complain(is_qualified_name(&full), &full, path.field("key"), errors);
        }
        let field = path.field("valueExpression");
        let source = annotation.str_at(&["valueExpression"]);
        if source.trim().is_empty() {
            errors.push(FieldError::required(field, "valueExpression is not specified"));
        } else if source.trim().len() > LONGEST_ANNOTATION {
            let detail = format!("must not exceed {LONGEST_ANNOTATION} bytes in length");
            errors.push(FieldError::required(field, detail));
        } else if let Err(detail) = verify(source.trim(), seen, Wanted::TextOrNull) {
            errors.push(FieldError::invalid(field, source, detail));
        }
        if annotations[..index].iter().any(|earlier| earlier.str_at(&["key"]) == key) {
            errors.push(FieldError::duplicate(path.field("key"), key));
        }
    }
}

/// An expression that must be there, told about untrimmed so that places in it are right.
fn expression(
    owner: &Value,
    field: &str,
    missing: &str,
    seen: &Variables<'_>,
    wanted: Wanted,
    path: Path<'_>,
    errors: &mut Errors,
) {
    let source = owner.str_at(&[field]);
    if source.trim().is_empty() {
        errors.push(FieldError::required(path.field(field), missing));
    } else if let Err(detail) = verify(source, seen, wanted) {
        errors.push(FieldError::invalid(path.field(field), source, detail));
    }
}

/// Checks the variables of a policy one after the other, each seeing those before it; adds them to what is seen.
fn policy_variables(spec: &Value, seen: &mut Variables<'static>, errors: &mut Errors) -> Type<'static> {
    let mut fields = Variables::new();
    seen.insert("variables".into(), Type::Record(fields.clone()));
    super::each(spec, "variables", Path::SPEC, errors, |variable, path, errors| {
        let name = variable.str_at(&["name"]);
        if name.trim().is_empty() {
            errors.push(FieldError::required(path.field("name"), "name is not specified"));
        } else if !is_identifier(name) {
            errors.push(FieldError::invalid(path.field("name"), name, "must be a valid CEL identifier"));
        }
        let source = variable.str_at(&["expression"]);
        if source.trim().is_empty() {
            return errors.push(FieldError::required(path.field("expression"), "expression is not specified"));
        }
        let found = verify(source, seen, Wanted::Anything).unwrap_or_else(|detail| {
            errors.push(FieldError::invalid(path.field("expression"), source, detail));
            Type::Dyn
        });
        fields.insert(name.to_owned(), found);
        seen.insert("variables".into(), Type::Record(fields.clone()));
    });
    Type::Record(fields)
}

fn is_identifier(name: &str) -> bool {
    const RESERVED: [&str; 21] = [
        "true",
        "false",
        "null",
        "in",
        "as",
        "break",
        "const",
        "continue",
        "else",
        "for",
        "function",
        "if",
        "import",
        "let",
        "loop",
        "package",
        "namespace",
        "return",
        "var",
        "void",
        "while",
    ];
    let shape = |letter: char| letter == '_' || letter.is_ascii_alphanumeric();
    name.chars().all(shape) && !name.starts_with(|c: char| c.is_ascii_digit()) && !RESERVED.contains(&name)
}

/// What both sorts of policies begin with.
fn common_policy(spec: &Value, skip_conditions: bool, errors: &mut Errors) {
    one_of_given(spec, "failurePolicy", &FAILURE_POLICIES, Path::SPEC, errors);
    if spec["failurePolicy"].is_null() {
        errors.push(FieldError::required("spec.failurePolicy", ""));
    }
    param_kind(&spec["paramKind"], errors);
    if spec["matchConstraints"].is_null() {
        errors.push(FieldError::required("spec.matchConstraints", ""));
    } else {
        match_resources(&spec["matchConstraints"], Path::SPEC.field("matchConstraints"), errors);
        if spec["matchConstraints"].list_at(&["resourceRules"]).is_empty() {
            errors.push(FieldError::required("spec.matchConstraints.resourceRules", ""));
        }
    }
    if !skip_conditions {
        let seen = variables(!spec["paramKind"].is_null(), true);
        match_conditions(spec, &seen, Path::SPEC, errors);
    }
}

fn param_kind(kind: &Value, errors: &mut Errors) {
    if kind.is_null() {
        return;
    }
    let path = Path::SPEC.field("paramKind");
    if let Some(version) = required(kind, "apiVersion", path, errors) {
        api_version(version, path.field("apiVersion"), errors);
    }
    if let Some(name) = required(kind, "kind", path, errors) {
        mixed_case_label(name, path.field("kind"), errors);
    }
}

/// The name of a kind, which is a label but for its capital letters.
pub fn mixed_case_label(name: &str, path: Path<'_>, errors: &mut Errors) {
    let problems = is_dns1035_label(&name.to_lowercase());
    if !problems.is_empty() {
        let detail = format!("may have mixed case, but should otherwise match: {}", problems.join(","));
        errors.push(FieldError::invalid(path, name, detail));
    }
}

fn api_version(text: &str, path: Path<'_>, errors: &mut Errors) {
    let (group, version) = match text.split_once('/') {
        Some((_, rest)) if rest.contains('/') => {
            let detail = format!("unexpected GroupVersion string: {text}");
            return errors.push(FieldError::invalid(path, text, detail));
        }
        Some(both) => both,
        None => ("", text),
    };
    let mut joined = |value: &str, problems: Vec<String>| {
        if !problems.is_empty() {
            errors.push(FieldError::invalid(path, value, problems.join(",")));
        }
    };
    if !group.is_empty() {
        joined(group, is_dns1123_subdomain(group));
    }
    match version {
        "" => joined(text, vec!["version must be specified".into()]),
        version => joined(version, is_dns1035_label(version)),
    }
}

fn match_resources(resources: &Value, path: Path<'_>, errors: &mut Errors) {
    one_of_given(resources, "matchPolicy", &MATCH_POLICIES, path, errors);
    for selector in ["namespaceSelector", "objectSelector"] {
        label_selector(&resources[selector], path.field(selector), errors);
    }
    for field in ["resourceRules", "excludeResourceRules"] {
        super::each(resources, field, path, errors, named_rule);
    }
}

fn named_rule(named: &Value, path: Path<'_>, errors: &mut Errors) {
    let list = path.field("resourceNames");
    let mut names = Vec::new();
    for (index, name) in named.list_at(&["resourceNames"]).iter().enumerate() {
        let text = name.as_str().unwrap_or_default();
        complain(is_path_segment(text), text, list.index(index), errors);
        super::unique(&mut names, text, list.index(index), errors);
    }
    rule(named, path, errors);
}

/// Deletions cannot be changed.
fn mutable_operations(resources: &Value, path: Path<'_>, errors: &mut Errors) {
    const OPERATIONS: [&str; 4] = ["*", "CONNECT", "CREATE", "UPDATE"];
    let path = path.field("resourceRules");
    let rules = resources.list_at(&["resourceRules"]).iter();
    for operation in rules.flat_map(|rule| rule.list_at(&["operations"])).filter_map(Value::as_str) {
        if !OPERATIONS.contains(&operation) {
            errors.push(FieldError::not_supported(path.field("operations"), operation, &OPERATIONS));
        }
    }
}

pub fn mutating_policy(obj: &Value) -> Errors {
    mutating(obj, false)
}

pub fn mutating_policy_update(obj: &Value, old: &Value) -> Errors {
    mutating(obj, same_conditions(obj, old))
}

fn mutating(obj: &Value, skip_conditions: bool) -> Errors {
    let mut errors = Errors::new();
    let spec = &obj["spec"];
    common_policy(spec, skip_conditions, &mut errors);
    mutable_operations(&spec["matchConstraints"], Path::SPEC.field("matchConstraints"), &mut errors);
    let mut seen = variables(!spec["paramKind"].is_null(), true);
    policy_variables(spec, &mut seen, &mut errors);
    if spec.list_at(&["mutations"]).is_empty() {
        errors.push(FieldError::required("spec.mutations", "mutations must contain at least one item"));
    }
    super::each(spec, "mutations", Path::SPEC, &mut errors, |item, path, errors| mutation(item, &seen, path, errors));
    required_one_of(spec, "reinvocationPolicy", &REINVOCATION_POLICIES, Path::SPEC, &mut errors);
    errors
}

fn mutation(item: &Value, seen: &Variables<'_>, path: Path<'_>, errors: &mut Errors) {
    required_one_of(item, "patchType", &["ApplyConfiguration", "JSONPatch"], path, errors);
    let kind = item.str_at(&["patchType"]);
    let (own, other, wanted) = match kind {
        "ApplyConfiguration" => ("applyConfiguration", "jsonPatch", Wanted::Object),
        "JSONPatch" => ("jsonPatch", "applyConfiguration", Wanted::ListOfPatches),
        _ => return,
    };
    if item[own].is_null() {
        errors.push(FieldError::required(path.field(own), format!("must be specified when patchType is {kind}")));
    } else {
        let path = path.field(own);
        let source = item.str_at(&[own, "expression"]).trim();
        if source.is_empty() {
            errors.push(FieldError::required(path.field("expression"), ""));
        } else if let Err(detail) = verify(source, seen, wanted) {
            errors.push(FieldError::invalid(path.field("expression"), source, detail));
        }
    }
    if !item[other].is_null() {
        let detail = format!("must not be specified when patchType is {kind}");
        errors.push(FieldError::invalid(path.field(other), format!("{{{other}}}"), detail));
    }
}

pub fn validating_binding(obj: &Value) -> Errors {
    let mut errors = binding(obj);
    let actions = obj.list_at(&["spec", "validationActions"]);
    let list = Path::SPEC.field("validationActions");
    for (index, action) in actions.iter().enumerate() {
        let text = action.as_str().unwrap_or_default();
        let supported = ["Audit", "Deny", "Warn"];
        if !supported.contains(&text) {
            errors.push(FieldError::not_supported(list.index(index), text, &supported));
        }
        if actions[..index].contains(action) {
            errors.push(FieldError::duplicate(list.index(index), text));
        }
    }
    let has = |name: &str| actions.iter().any(|action| action == name);
    if has("Deny") && has("Warn") {
        let detail = "must not contain both Deny and Warn (repeating the same validation failure information in the API response and headers serves no purpose)";
        errors.push(FieldError::invalid(list, actions.to_vec(), detail));
    }
    if actions.is_empty() {
        errors.push(FieldError::required(list, ""));
    }
    errors
}

pub fn mutating_binding(obj: &Value) -> Errors {
    let mut errors = binding(obj);
    mutable_operations(&obj["spec"]["matchResources"], Path::SPEC.field("matchResources"), &mut errors);
    errors
}

fn binding(obj: &Value) -> Errors {
    let mut errors = Errors::new();
    let spec = &obj["spec"];
    if let Some(name) = required(spec, "policyName", Path::SPEC, &mut errors) {
        complain(is_dns1123_subdomain(name), name, Path::SPEC.field("policyName"), &mut errors);
    }
    if !spec["paramRef"].is_null() {
        param_ref(&spec["paramRef"], Path::SPEC.field("paramRef"), &mut errors);
    }
    if !spec["matchResources"].is_null() {
        match_resources(&spec["matchResources"], Path::SPEC.field("matchResources"), &mut errors);
    }
    errors
}

fn param_ref(reference: &Value, path: Path<'_>, errors: &mut Errors) {
    let name = reference.str_at(&["name"]);
    let has_selector = !reference["selector"].is_null();
    complain(is_path_segment(name), name, path.field("name"), errors);
    label_selector(&reference["selector"], path.field("selector"), errors);
    match (name.is_empty(), has_selector) {
        (true, false) => errors.push(FieldError::required(path, "one of name or selector must be specified")),
        (false, true) => {
            for field in ["name", "selector"] {
                errors.push(FieldError::forbidden(path.field(field), "name and selector are mutually exclusive"));
            }
        }
        _ => {}
    }
    required_one_of(reference, "parameterNotFoundAction", &["Deny", "Allow"], path, errors);
}

/// The status of a validating policy: what checking its types found, and conditions.
pub fn policy_status(obj: &Value, _old: &Value) -> Errors {
    let mut errors = Errors::new();
    let path = Path::STATUS.field("typeChecking");
    super::each(&obj["status"]["typeChecking"], "expressionWarnings", path, &mut errors, |warning, path, errors| {
        required(warning, "warning", path, errors);
        if warning.str_at(&["fieldRef"]).trim().is_empty() {
            errors.push(FieldError::required(path.field("fieldRef"), ""));
        }
    });
    super::conditions::conditions(&obj["status"], Path::STATUS, &mut errors);
    errors
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::tests::texts;
    use super::*;

    fn policy() -> Value {
        json!({"metadata": {"name": "p"}, "spec": {
            "failurePolicy": "Fail",
            "matchConstraints": {"resourceRules": [
                {"operations": ["CREATE"], "apiGroups": [""], "apiVersions": ["v1"], "resources": ["pods"]}]},
            "variables": [{"name": "v", "expression": "1 + 1"}],
            "validations": [{"expression": "variables.v == 2 && request.name != ''", "messageExpression": "'a'"}],
            "auditAnnotations": [{"key": "k", "valueExpression": "'v'"}],
        }})
    }

    #[test]
    fn expressions_see_what_is_declared() {
        assert_eq!(texts(&validating_policy(&policy())), Vec::<String>::new());
        let mut renamed = policy();
        renamed["spec"]["variables"][0]["name"] = "w".into();
        let problems = texts(&validating_policy(&renamed));
        assert_eq!(problems.len(), 1);
        assert!(problems[0].contains("ERROR: <input>:1:10: undefined field 'v'"), "{problems:?}");
        // What did not change is not compiled again, unless what it sees did.
        let mut conditional = policy();
        conditional["spec"]["matchConditions"] = json!([{"name": "c", "expression": "nothing"}]);
        assert_eq!(validating_policy(&conditional).len(), 1);
        assert_eq!(texts(&validating_policy_update(&conditional, &conditional)), Vec::<String>::new());
        assert_eq!(validating_policy_update(&conditional, &policy()).len(), 1);
    }

    #[test]
    fn mutations_have_one_patch() {
        let mut mutating = policy();
        mutating["spec"]["reinvocationPolicy"] = "Never".into();
        mutating["spec"]["mutations"] =
            json!([{"patchType": "JSONPatch", "applyConfiguration": {"expression": "Object{}"}}]);
        let expected = [
            "spec.mutations[0].jsonPatch: Required value: must be specified when patchType is JSONPatch",
            r#"spec.mutations[0].applyConfiguration: Invalid value: "{applyConfiguration}": must not be specified when patchType is JSONPatch"#,
        ];
        assert_eq!(texts(&mutating_policy(&mutating)), expected);
    }

    #[test]
    fn bindings_say_what_to_do() {
        let binding = |actions: Value| json!({"spec": {"policyName": "p", "validationActions": actions}});
        for (actions, expected) in [
            (json!(["Deny"]), ""),
            (json!([]), "spec.validationActions: Required value"),
            (json!(["Warn", "Warn"]), r#"spec.validationActions[1]: Duplicate value: "Warn""#),
            (
                json!(["x"]),
                r#"spec.validationActions[0]: Unsupported value: "x": supported values: "Audit", "Deny", "Warn""#,
            ),
        ] {
            assert_eq!(texts(&validating_binding(&binding(actions))).join("; "), expected);
        }
    }
}
