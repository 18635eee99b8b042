//! Rules for webhook configurations, and for what they share with admission policies and conversions: rules about
//! resources, match conditions, addresses of webhooks.

use apimachinery::meta::validation::{is_dns1035_label, is_dns1123_subdomain, is_qualified_name, is_valid_port_number};
use apimachinery::status::FieldError;
use serde_json::Value;

use super::{Errors, Path, complain, label_selector, one_of_given, required};
use crate::cel::check::Variables;
use crate::cel::verify::{Wanted, verify};
use crate::registry::common::same;
use crate::registry::object::ObjectExt;

pub const FAILURE_POLICIES: [&str; 2] = ["Fail", "Ignore"];
pub const MATCH_POLICIES: [&str; 2] = ["Equivalent", "Exact"];
pub const REINVOCATION_POLICIES: [&str; 2] = ["IfNeeded", "Never"];
const REVIEW_VERSIONS: [&str; 2] = ["v1", "v1beta1"];
const NO_SIDE_EFFECTS: [&str; 2] = ["None", "NoneOnDryRun"];
const MOST_CONDITIONS: usize = 64;

/// What is not looked at again in an update, since it was wrong before.
#[derive(Clone, Copy, Default)]
struct Leniency {
    conditions: bool,
    side_effects: bool,
    review_versions: bool,
    names: bool,
    label_values: bool,
}

pub fn configuration(obj: &Value) -> Errors {
    hooks(obj, Leniency::default())
}

pub fn configuration_update(obj: &Value, old: &Value) -> Errors {
    let (new_hooks, hooks_before) = (obj.list_at(&["webhooks"]), old.list_at(&["webhooks"]));
    let any = |wrong: fn(&Value) -> bool| hooks_before.iter().any(wrong);
    let mut names: Vec<&str> = hooks_before.iter().map(|hook| hook.str_at(&["name"])).collect();
    names.sort_unstable();
    let pairs = new_hooks.iter().zip(hooks_before);
    let leniency = Leniency {
        conditions: new_hooks.len() == hooks_before.len()
            && pairs.into_iter().all(|(hook, before)| same(&hook["matchConditions"], &before["matchConditions"])),
        side_effects: any(|hook| !NO_SIDE_EFFECTS.contains(&hook.str_at(&["sideEffects"]))),
        review_versions: any(|hook| {
            let versions = hook.list_at(&["admissionReviewVersions"]);
            !versions.is_empty() && !versions.iter().any(is_review_version)
        }),
        names: names.windows(2).any(|pair| pair[0] == pair[1]),
        label_values: any(|hook| {
            let mut errors = Errors::new();
            selectors(hook, Path::Root(""), Leniency::default(), &mut errors);
            !errors.is_empty()
        }),
    };
    hooks(obj, leniency)
}

fn hooks(obj: &Value, leniency: Leniency) -> Errors {
    let mut errors = Errors::new();
    let list = Path::Root("webhooks");
    let mut names = Vec::new();
    for (index, hook) in obj.list_at(&["webhooks"]).iter().enumerate() {
        let path = list.index(index);
        let name = hook.str_at(&["name"]);
        qualified_domain(hook, path, &mut errors);
        webhook(hook, path, leniency, &mut errors);
        let accepted = (!leniency.review_versions).then_some(&REVIEW_VERSIONS[..]);
        let missing = "must specify one of v1, v1beta1";
        review_versions(hook, "admissionReviewVersions", missing, accepted, path, &mut errors);
        if !leniency.names {
            super::unique(&mut names, name, path.field("name"), &mut errors);
        }
    }
    errors
}

/// The name of a webhook: a domain of at least three parts.
fn qualified_domain(hook: &Value, path: Path<'_>, errors: &mut Errors) {
    let Some(name) = required(hook, "name", path, errors) else { return };
    let problems = is_dns1123_subdomain(name);
    if !problems.is_empty() {
        errors.push(FieldError::invalid(path.field("name"), name, problems.join(",")));
    } else if name.split('.').count() < 3 {
        let detail = "should be a domain with at least three segments separated by dots";
        errors.push(FieldError::invalid(path.field("name"), name, detail));
    }
}

fn webhook(hook: &Value, path: Path<'_>, leniency: Leniency, errors: &mut Errors) {
    super::each(hook, "rules", path, errors, rule);
    one_of_given(hook, "failurePolicy", &FAILURE_POLICIES, path, errors);
    one_of_given(hook, "matchPolicy", &MATCH_POLICIES, path, errors);
    let side_effects: &[&str] =
        if leniency.side_effects { &["None", "NoneOnDryRun", "Some", "Unknown"] } else { &NO_SIDE_EFFECTS };
    if hook["sideEffects"].is_null() {
        let detail = format!("must specify one of {}", side_effects.join(", "));
        errors.push(FieldError::required(path.field("sideEffects"), detail));
    }
    one_of_given(hook, "sideEffects", side_effects, path, errors);
    if let Some(seconds) = hook["timeoutSeconds"].as_i64().filter(|s| !(1..=30).contains(s)) {
        let detail = "the timeout value must be between 1 and 30 seconds";
        errors.push(FieldError::invalid(path.field("timeoutSeconds"), seconds, detail));
    }
    selectors(hook, path, leniency, errors);
    one_of_given(hook, "reinvocationPolicy", &REINVOCATION_POLICIES, path, errors);
    client_config(&hook["clientConfig"], path.field("clientConfig"), errors);
    if !leniency.conditions {
        match_conditions(hook, &super::admission::variables(false, true), path, errors);
    }
}

fn selectors(hook: &Value, path: Path<'_>, leniency: Leniency, errors: &mut Errors) {
    for selector in ["namespaceSelector", "objectSelector"] {
        let mut found = Errors::new();
        label_selector(&hook[selector], path.field(selector), &mut found);
        found.retain(|error| !(leniency.label_values && error.field.contains(".values[")));
        errors.append(&mut found);
    }
}

/// `*` stands alone.
fn alone(rule: &Value, field: &str, others: &str, path: Path<'_>, errors: &mut Errors) {
    let items = rule.list_at(&[field]);
    if items.is_empty() {
        errors.push(FieldError::required(path.field(field), ""));
    }
    if items.len() > 1 && items.iter().any(|item| item == "*") {
        let detail = format!("if '*' is present, must not specify other {others}");
        errors.push(FieldError::invalid(path.field(field), rule[field].clone(), detail));
    }
}

/// What requests a webhook or policy is about.
pub fn rule(rule: &Value, path: Path<'_>, errors: &mut Errors) {
    const OPERATIONS: [&str; 5] = ["*", "CONNECT", "CREATE", "DELETE", "UPDATE"];
    alone(rule, "operations", "operations", path, errors);
    let operations = path.field("operations");
    for (index, operation) in rule.list_at(&["operations"]).iter().enumerate() {
        let text = operation.as_str().unwrap_or_default();
        if !OPERATIONS.contains(&text) {
            errors.push(FieldError::not_supported(operations.index(index), text, &OPERATIONS));
        }
    }
    alone(rule, "apiGroups", "API groups", path, errors);
    alone(rule, "apiVersions", "API versions", path, errors);
    let versions = path.field("apiVersions");
    for (index, _) in rule.list_at(&["apiVersions"]).iter().enumerate().filter(|(_, version)| *version == "") {
        errors.push(FieldError::required(versions.index(index), ""));
    }
    resources(rule, path.field("resources"), errors);
    one_of_given(rule, "scope", &["*", "Cluster", "Namespaced"], path, errors);
}

/// Resources and subresources; one that another covers is a mistake.
fn resources(rule: &Value, path: Path<'_>, errors: &mut Errors) {
    let items: Vec<&str> = rule.list_at(&["resources"]).iter().filter_map(Value::as_str).collect();
    if items.is_empty() {
        errors.push(FieldError::required(path, ""));
    }
    let (mut whole, mut everywhere) = (Vec::new(), Vec::new());
    let mut last_is_plain = false;
    for (index, item) in items.iter().enumerate() {
        if item.is_empty() {
            errors.push(FieldError::required(path.index(index), ""));
            continue;
        }
        let Some((resource, sub)) = item.split_once('/') else {
            last_is_plain = *item != "*";
            continue;
        };
        if whole.contains(&resource) {
            let detail = format!("if '{resource}/*' is present, must not specify {item}");
            errors.push(FieldError::invalid(path.index(index), *item, detail));
        }
        if everywhere.contains(&sub) {
            let detail = format!("if '*/{sub}' is present, must not specify {item}");
            errors.push(FieldError::invalid(path.index(index), *item, detail));
        }
        if sub == "*" {
            whole.push(resource);
        }
        if resource == "*" {
            everywhere.push(sub);
        }
    }
    if items.len() > 1 && items.contains(&"*/*") {
        let detail = "if '*/*' is present, must not specify other resources";
        errors.push(FieldError::invalid(path, rule["resources"].clone(), detail));
    }
    if items.contains(&"*") && last_is_plain {
        let detail = "if '*' is present, must not specify other resources without subresources";
        errors.push(FieldError::invalid(path, rule["resources"].clone(), detail));
    }
}

fn is_review_version(version: &Value) -> bool {
    version.as_str().is_some_and(|version| REVIEW_VERSIONS.contains(&version))
}

/// The versions of reviews that a webhook understands; `accepted`: one of these must be among them.
pub fn review_versions(
    owner: &Value,
    field: &str,
    missing: &str,
    accepted: Option<&[&str]>,
    path: Path<'_>,
    errors: &mut Errors,
) {
    let path = path.field(field);
    let versions = owner.list_at(&[field]);
    if versions.is_empty() {
        return errors.push(FieldError::required(path, missing));
    }
    for (index, version) in versions.iter().enumerate() {
        let text = version.as_str().unwrap_or_default();
        if versions[..index].contains(version) {
            errors.push(FieldError::invalid(path.index(index), text, "duplicate version"));
        } else {
            complain(is_dns1035_label(text), text, path.index(index), errors);
        }
    }
    if let Some(accepted) = accepted
        && !versions.iter().any(is_review_version)
    {
        let detail = format!("must include at least one of {}", accepted.join(", "));
        errors.push(FieldError::invalid(path, owner[field].clone(), detail));
    }
}

/// A service or a URL, not both.
pub fn client_config(config: &Value, path: Path<'_>, errors: &mut Errors) {
    match (config["url"].as_str(), config["service"].is_null()) {
        (None, true) | (Some(_), false) => {
            errors.push(FieldError::required(path, "exactly one of url or service is required"));
        }
        (Some(text), true) => url(text, path.field("url"), errors),
        (None, false) => service(&config["service"], path.field("service"), errors),
    }
}

fn url(text: &str, path: Path<'_>, errors: &mut Errors) {
    const FORM: &str = "; desired format: https://host[/path]";
    let (scheme, rest) = text.split_once(':').unwrap_or(("", text));
    let (rest, fragment) = rest.split_once('#').unwrap_or((rest, ""));
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    let authority = rest.strip_prefix("//").map_or("", |rest| rest.split('/').next().unwrap_or_default());
    let (user, host) = authority.rsplit_once('@').map_or((None, authority), |(user, host)| (Some(user), host));
    let mut wrong = |value: &str, detail: String| errors.push(FieldError::invalid(path, value, detail));
    if scheme != "https" {
        wrong(scheme, format!("'https' is the only allowed URL scheme{FORM}"));
    }
    if host.is_empty() {
        wrong(host, format!("host must be specified{FORM}"));
    }
    if let Some(user) = user {
        wrong(user, "user information is not permitted in the URL".into());
    }
    if !fragment.is_empty() {
        wrong(fragment, "fragments are not permitted in the URL".into());
    }
    if !query.is_empty() {
        wrong(query, "query parameters are not permitted in the URL".into());
    }
}

fn service(service: &Value, path: Path<'_>, errors: &mut Errors) {
    // Upstream confuses the two: what it says of one is about the other.
    for (field, named) in [("namespace", "name"), ("name", "namespace")] {
        if service.str_at(&[field]).is_empty() {
            errors.push(FieldError::required(path.field(named), ""));
        }
    }
    port(service, path, errors);
    let text = service.str_at(&["path"]);
    let path = path.field("path");
    if text.is_empty() || text == "/" {
        return;
    }
    if text == "//" {
        return errors.push(FieldError::invalid(path, text, "segment[0] may not be empty"));
    }
    if !text.starts_with('/') {
        errors.push(FieldError::invalid(path, text, "must start with a '/'"));
    }
    // Whatever the first letter is, it is not looked at.
    let rest = text.chars().next().map_or("", |first| &text[first.len_utf8()..]);
    for (index, segment) in rest.strip_suffix('/').unwrap_or(rest).split('/').enumerate() {
        if segment.is_empty() {
            errors.push(FieldError::invalid(path, text, format!("segment[{index}] may not be empty")));
            continue;
        }
        for message in is_dns1123_subdomain(segment) {
            errors.push(FieldError::invalid(path, text, format!("segment[{index}]: {message}")));
        }
    }
}

/// The port of a service that is called.
pub fn port(service: &Value, path: Path<'_>, errors: &mut Errors) {
    let number = service["port"].as_i64().unwrap_or(0);
    let problems = is_valid_port_number(number);
    if !problems.is_empty() {
        let detail = format!("port is not valid: {}", problems.join(", "));
        errors.push(FieldError::invalid(path.field("port"), number, detail));
    }
}

/// Conditions of a webhook or a policy, which see these variables.
pub fn match_conditions(owner: &Value, variables: &Variables<'_>, path: Path<'_>, errors: &mut Errors) {
    let list = path.field("matchConditions");
    let conditions = owner.list_at(&["matchConditions"]);
    if conditions.len() > MOST_CONDITIONS {
        errors.push(FieldError::too_many(list, conditions.len(), MOST_CONDITIONS));
    }
    let mut names = Vec::new();
    for (index, condition) in conditions.iter().enumerate() {
        let path = list.index(index);
        let source = condition.str_at(&["expression"]).trim();
        if source.is_empty() {
            errors.push(FieldError::required(path.field("expression"), ""));
        } else if let Err(detail) = verify(source, variables, Wanted::Bool) {
            errors.push(FieldError::invalid(path.field("expression"), source, detail));
        }
        if let Some(name) = required(condition, "name", path, errors) {
            complain(is_qualified_name(name), name, path.field("name"), errors);
            super::unique(&mut names, name, path.field("name"), errors);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::tests::texts;
    use super::*;

    fn hook(change: impl FnOnce(&mut Value)) -> Value {
        let mut hook = json!({
            "name": "a.example.com", "sideEffects": "None", "admissionReviewVersions": ["v1"],
            "clientConfig": {"service": {"name": "s", "namespace": "n", "port": 443}},
            "rules": [{"operations": ["CREATE"], "apiGroups": [""], "apiVersions": ["v1"], "resources": ["pods"]}],
        });
        change(&mut hook);
        json!({"webhooks": [hook]})
    }

    #[test]
    fn webhooks_are_checked() {
        type Change = fn(&mut Value);
        let cases: [(Change, &str); 8] = [
            (|_| {}, ""),
            (
                |hook| hook["clientConfig"]["service"]["name"] = "".into(),
                "webhooks[0].clientConfig.service.namespace: Required value",
            ),
            (
                |hook| hook["clientConfig"] = json!({"url": "http://a.b/c"}),
                r#"webhooks[0].clientConfig.url: Invalid value: "http": 'https' is the only allowed URL scheme; desired format: https://host[/path]"#,
            ),
            (
                |hook| hook["clientConfig"]["service"]["path"] = "/A".into(),
                r#"webhooks[0].clientConfig.service.path: Invalid value: "/A": segment[0]: a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and end with an alphanumeric character (e.g. 'example.com', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')"#,
            ),
            (
                |hook| hook["admissionReviewVersions"] = json!(["v1", "v1"]),
                r#"webhooks[0].admissionReviewVersions[1]: Invalid value: "v1": duplicate version"#,
            ),
            (
                |hook| hook["rules"][0]["resources"] = json!(["*", "*/*"]),
                r#"webhooks[0].rules[0].resources: Invalid value: ["*","*/*"]: if '*/*' is present, must not specify other resources"#,
            ),
            (
                |hook| hook["sideEffects"] = "".into(),
                r#"webhooks[0].sideEffects: Unsupported value: "": supported values: "None", "NoneOnDryRun""#,
            ),
            (
                |hook| hook["matchConditions"] = json!([{"name": "c", "expression": " "}]),
                "webhooks[0].matchConditions[0].expression: Required value",
            ),
        ];
        for (change, expected) in cases {
            assert_eq!(texts(&configuration(&hook(change))).join("; "), expected);
        }
    }

    #[test]
    fn what_was_wrong_before_may_stay() {
        let old = hook(|hook| hook["sideEffects"] = "Some".into());
        assert_eq!(texts(&configuration_update(&old, &old)), Vec::<String>::new());
        assert_eq!(configuration_update(&old, &hook(|_| {})).len(), 1);
    }
}
