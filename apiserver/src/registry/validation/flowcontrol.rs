//! Rules for flow schemas and priority levels.

use apimachinery::meta::validation::{is_dns1123_label, is_dns1123_subdomain};
use apimachinery::status::FieldError;
use serde_json::{Value, json};

use super::{Errors, Path, complain, required};
use crate::registry::common::same;
use crate::registry::flowcontrol::presets;
use crate::registry::object::ObjectExt;

const VERBS: [&str; 9] = ["create", "delete", "deletecollection", "get", "list", "patch", "proxy", "update", "watch"];
const MOST_QUEUES: i64 = 10_000_000;
/// The bits of the hash that hands of queues are dealt by.
const HASH_BITS: u32 = 60;

pub fn flow_schema(obj: &Value) -> Errors {
    const MOST: i64 = 10_000;
    let mut errors = Errors::new();
    let spec = &obj["spec"];
    let precedence = spec["matchingPrecedence"].as_i64().unwrap_or(0);
    let mut complain_of_precedence = |detail: &str| {
        errors.push(FieldError::invalid("spec.matchingPrecedence", precedence, detail));
    };
    match precedence {
        ..=0 => complain_of_precedence("must be a positive value"),
        1 if obj.name() != presets::EXEMPT => {
            complain_of_precedence("only the schema named 'exempt' may have matchingPrecedence 1");
        }
        1..=MOST => {}
        _ => complain_of_precedence(&format!("must not be greater than {MOST}")),
    }
    let supported = ["ByNamespace", "ByUser"];
    let distinguisher = spec.str_at(&["distinguisherMethod", "type"]);
    if spec["distinguisherMethod"].is_object() && !supported.contains(&distinguisher) {
        // Upstream prints the object around the type.
        let shown = json!({"Type": distinguisher});
        errors.push(FieldError::not_supported("spec.distinguisherMethod.type", shown, &supported));
    }
    let level = spec.str_at(&["priorityLevelConfiguration", "name"]);
    let path = Path::SPEC.field("priorityLevelConfiguration");
    if level.is_empty() {
        errors.push(FieldError::required(path.field("name"), "must reference a priority level"));
    } else {
        complain(is_dns1123_subdomain(level), level, path.field("name"), &mut errors);
    }
    super::each(spec, "rules", Path::SPEC, &mut errors, policy_rules);
    if let Some(fixed) = presets::mandatory_flow_schema(obj.name())
        && !same(spec, &fixed)
    {
        let detail = format!("spec of '{}' must equal the fixed value", obj.name());
        errors.push(FieldError::invalid("spec", spec.clone(), detail));
    }
    errors
}

fn policy_rules(rules: &Value, path: Path<'_>, errors: &mut Errors) {
    if rules.list_at(&["subjects"]).is_empty() {
        errors.push(FieldError::required(path.field("subjects"), "subjects must contain at least one value"));
    }
    super::each(rules, "subjects", path, errors, subject);
    if rules.list_at(&["resourceRules"]).is_empty() && rules.list_at(&["nonResourceRules"]).is_empty() {
        let detail = "at least one of resourceRules and nonResourceRules has to be non-empty";
        errors.push(FieldError::required(path, detail));
    }
    super::each(rules, "resourceRules", path, errors, resource_rule);
    super::each(rules, "nonResourceRules", path, errors, non_resource_rule);
}

fn subject(subject: &Value, path: Path<'_>, errors: &mut Errors) {
    const KINDS: [(&str, &str); 3] = [("ServiceAccount", "serviceAccount"), ("User", "user"), ("Group", "group")];
    let kind = subject.str_at(&["kind"]);
    let Some((_, own)) = KINDS.iter().find(|(known, _)| *known == kind) else {
        return errors.push(FieldError::not_supported(path.field("kind"), kind, &["Group", "ServiceAccount", "User"]));
    };
    if subject[*own].is_null() {
        let detail = format!("{own} is required when subject kind is '{kind}'");
        errors.push(FieldError::required(path.field(own), detail));
    } else {
        let path = path.field(own);
        let name = required(&subject[*own], "name", path, errors);
        if kind == "ServiceAccount" {
            if let Some(name) = name.filter(|name| *name != "*") {
                complain(is_dns1123_subdomain(name), name, path.field("name"), errors);
            }
            match subject[*own].str_at(&["namespace"]) {
                "" => {
                    let detail = "must specify namespace for service account";
                    errors.push(FieldError::required(path.field("namespace"), detail));
                }
                namespace => complain(is_dns1123_label(namespace), namespace, path.field("namespace"), errors),
            }
        }
    }
    for (other, field) in KINDS.iter().filter(|(other, field)| *other != kind && !subject[*field].is_null()) {
        let detail = format!("{field} is forbidden when subject kind is not '{other}'");
        errors.push(FieldError::forbidden(path.field(field), detail));
    }
}

/// A list that must not be empty, and holds nothing else beside `*`; whether its items are still to be looked at.
fn listed(rule: &Value, field: &str, missing: &str, others: &str, path: Path<'_>, errors: &mut Errors) -> bool {
    let items = rule.list_at(&[field]);
    let has_wildcard = items.iter().any(|item| item == "*");
    if items.is_empty() {
        errors.push(FieldError::required(path.field(field), missing));
    } else if items.len() > 1 && has_wildcard {
        let detail = format!("if '*' is present, must not specify other {others}");
        errors.push(FieldError::invalid(path.field(field), rule[field].clone(), detail));
    }
    !items.is_empty() && !has_wildcard
}

fn verbs(rule: &Value, path: Path<'_>, errors: &mut Errors) {
    if listed(rule, "verbs", "verbs must contain at least one value", "verbs", path, errors) {
        let known = |verb: &Value| verb.as_str().is_some_and(|verb| VERBS.contains(&verb));
        if !rule.list_at(&["verbs"]).iter().all(known) {
            errors.push(FieldError::not_supported(path.field("verbs"), rule["verbs"].clone(), &VERBS));
        }
    }
}

fn resource_rule(rule: &Value, path: Path<'_>, errors: &mut Errors) {
    verbs(rule, path, errors);
    listed(rule, "apiGroups", "resource rules must supply at least one api group", "api groups", path, errors);
    listed(rule, "resources", "resource rules must supply at least one resource", "resources", path, errors);
    if rule.list_at(&["namespaces"]).is_empty() && rule["clusterScope"] == true {
        return;
    }
    let missing = "resource rules that are not cluster scoped must supply at least one namespace";
    if listed(rule, "namespaces", missing, "namespaces", path, errors) {
        let list = path.field("namespaces");
        for (index, namespace) in rule.list_at(&["namespaces"]).iter().enumerate() {
            let text = namespace.as_str().unwrap_or_default();
            for message in is_dns1123_label(text) {
                let detail = format!("each member of this list must be '*' or a DNS-1123 label; {message}");
                errors.push(FieldError::invalid(list.index(index), text, detail));
            }
        }
    }
}

fn non_resource_rule(rule: &Value, path: Path<'_>, errors: &mut Errors) {
    verbs(rule, path, errors);
    let missing = "nonResourceURLs must contain at least one value";
    if listed(rule, "nonResourceURLs", missing, "non-resource URLs", path, errors) {
        let list = path.field("nonResourceURLs");
        for (index, url) in rule.list_at(&["nonResourceURLs"]).iter().enumerate() {
            let text = url.as_str().unwrap_or_default();
            if let Some(detail) = url_problem(text) {
                errors.push(FieldError::invalid(list.index(index), text, detail));
            }
        }
    }
}

fn url_problem(url: &str) -> Option<&'static str> {
    let misplaced = match url.matches('*').count() {
        0 => false,
        1 => !url.ends_with("/*"),
        _ => true,
    };
    match url {
        "" => Some("must not be empty"),
        "/" => None,
        _ if !url.starts_with('/') => Some("must start with slash"),
        _ if url.contains(' ') => Some("must not contain white-space"),
        _ if url.contains("//") => Some("must not contain double slash"),
        _ if misplaced => Some("wildcard can only do suffix matching"),
        _ => None,
    }
}

pub fn priority_level(obj: &Value) -> Errors {
    let mut errors = Errors::new();
    let spec = &obj["spec"];
    let kind = spec.str_at(&["type"]);
    if (obj.name() == presets::EXEMPT) != (kind == "Exempt") {
        let detail = "must be 'Exempt' if and only if `name` is 'exempt'";
        errors.push(FieldError::invalid("spec.type", kind, detail));
    }
    match kind {
        "Exempt" | "Limited" => {}
        "" => errors.push(FieldError::required("spec.type", "")),
        other => errors.push(FieldError::not_supported("spec.type", other, &["Exempt", "Limited"])),
    }
    for (own, field) in [("Limited", "limited"), ("Exempt", "exempt")] {
        if kind != own && !spec[field].is_null() {
            errors.push(FieldError::forbidden(Path::SPEC.field(field), ""));
        }
    }
    match kind {
        "Exempt" if !spec["exempt"].is_null() => shares(&spec["exempt"], Path::SPEC.field("exempt"), &mut errors),
        "Limited" if spec["limited"].is_null() => errors.push(FieldError::required("spec.limited", "")),
        "Limited" => limited(&spec["limited"], Path::SPEC.field("limited"), &mut errors),
        _ => {}
    }
    mandatory_level(obj, &mut errors);
    errors
}

fn mandatory_level(obj: &Value, errors: &mut Errors) {
    let name = obj.name();
    let Some(fixed) = presets::mandatory_priority_level(name) else { return };
    let (mut given, mut except) = (obj["spec"].clone(), "");
    if name == presets::EXEMPT {
        given["exempt"] = fixed["exempt"].clone();
        except = " except the 'spec.exempt' field";
    }
    if !same(&given, &fixed) {
        let detail = format!("spec of '{name}'{except} must equal the fixed value");
        errors.push(FieldError::invalid("spec", obj["spec"].clone(), detail));
    }
}

fn shares(level: &Value, path: Path<'_>, errors: &mut Errors) {
    if let Some(number) = level["nominalConcurrencyShares"].as_i64().filter(|n| *n < 0) {
        errors.push(FieldError::invalid(
            path.field("nominalConcurrencyShares"),
            number,
            "must be a non-negative integer",
        ));
    }
    if let Some(percent) = level["lendablePercent"].as_i64().filter(|n| !(0..=100).contains(n)) {
        let detail = "must be between 0 and 100, inclusive";
        errors.push(FieldError::invalid(path.field("lendablePercent"), percent, detail));
    }
}

fn limited(level: &Value, path: Path<'_>, errors: &mut Errors) {
    shares(level, path, errors);
    limit_response(&level["limitResponse"], path.field("limitResponse"), errors);
    if let Some(percent) = level["borrowingLimitPercent"].as_i64().filter(|n| *n < 0) {
        let detail = "if specified, must be a non-negative integer";
        errors.push(FieldError::invalid(path.field("borrowingLimitPercent"), percent, detail));
    }
}

fn limit_response(response: &Value, path: Path<'_>, errors: &mut Errors) {
    let has_queuing = !response["queuing"].is_null();
    match response.str_at(&["type"]) {
        "Queue" if has_queuing => return queuing(&response["queuing"], path.field("queuing"), errors),
        "Queue" => return errors.push(FieldError::required(path.field("queuing"), "")),
        "Reject" => {}
        "" => errors.push(FieldError::required(path.field("type"), "")),
        other => errors.push(FieldError::not_supported(path.field("type"), other, &["Queue", "Reject"])),
    }
    if has_queuing {
        errors.push(FieldError::forbidden(path.field("queuing"), ""));
    }
}

fn queuing(queuing: &Value, path: Path<'_>, errors: &mut Errors) {
    let number = |field: &str| queuing[field].as_i64().unwrap_or(0);
    let (length, queues, hand) = (number("queueLengthLimit"), number("queues"), number("handSize"));
    let mut wrong = |field: &str, number: i64, detail: String| {
        errors.push(FieldError::invalid(path.field(field), number, detail));
    };
    let positive = || "must be positive".to_owned();
    if length <= 0 {
        wrong("queueLengthLimit", length, positive());
    }
    if queues <= 0 {
        wrong("queues", queues, positive());
    } else if queues > MOST_QUEUES {
        wrong("queues", queues, format!("must not be greater than {MOST_QUEUES}"));
    }
    if hand <= 0 {
        wrong("handSize", hand, positive());
    } else if hand > queues {
        wrong("handSize", hand, format!("should not be greater than queues ({queues})"));
    } else if entropy_bits(queues, hand) > HASH_BITS {
        let detail = format!(
            "required entropy bits of deckSize {queues} and handSize {hand} should not be greater than {HASH_BITS}"
        );
        wrong("handSize", hand, detail);
    }
}

/// The bits of a hash that dealing `hand` of `deck` queues takes at most.
fn entropy_bits(deck: i64, hand: i64) -> u32 {
    #[allow(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "numbers of queues are small and positive"
    )]
    let bits = ((deck as f64).log2() * hand as f64).ceil() as u32;
    bits
}

/// Conditions of both kinds have a type, each its own.
pub fn status(obj: &Value, _old: &Value) -> Errors {
    let mut errors = Errors::new();
    let mut seen = Vec::new();
    super::each(&obj["status"], "conditions", Path::STATUS, &mut errors, |condition, path, errors| {
        let kind = condition.str_at(&["type"]).to_owned();
        required(condition, "type", path, errors);
        if seen.contains(&kind) {
            errors.push(FieldError::duplicate(path.field("type"), kind));
        } else {
            seen.push(kind);
        }
    });
    errors
}

#[cfg(test)]
mod tests {
    use super::super::tests::texts;
    use super::*;

    #[test]
    fn hands_must_fit_the_hash() {
        assert!(entropy_bits(16, 4) <= HASH_BITS && entropy_bits(128, 6) <= HASH_BITS);
        assert!(entropy_bits(100_000, 4) > HASH_BITS);
    }

    #[test]
    fn mandatory_objects_are_as_they_are() {
        let mut catch_all =
            json!({"metadata": {"name": "catch-all"}, "spec": presets::mandatory_priority_level("catch-all")});
        assert_eq!(texts(&priority_level(&catch_all)), Vec::<String>::new());
        catch_all["spec"]["limited"]["lendablePercent"] = 7.into();
        assert!(texts(&priority_level(&catch_all))[0].ends_with("spec of 'catch-all' must equal the fixed value"));
        let mut exempt = json!({"metadata": {"name": "exempt"}, "spec": presets::mandatory_priority_level("exempt")});
        exempt["spec"]["exempt"]["lendablePercent"] = 7.into();
        assert_eq!(texts(&priority_level(&exempt)), Vec::<String>::new());
    }

    #[test]
    fn rules_name_who_and_what() {
        let schema = |rules: Value| {
            json!({"metadata": {"name": "a"}, "spec": {"matchingPrecedence": 9, "rules": [rules],
                "priorityLevelConfiguration": {"name": "b"}}})
        };
        let cases = [
            (
                json!({}),
                vec![
                    "spec.rules[0].subjects: Required value: subjects must contain at least one value",
                    "spec.rules[0]: Required value: at least one of resourceRules and nonResourceRules has to be non-empty",
                ],
            ),
            (
                json!({"subjects": [{"kind": "User", "user": {"name": "u"}, "group": {"name": "g"}}],
                    "nonResourceRules": [{"verbs": ["get", "eat"], "nonResourceURLs": ["a"]}]}),
                vec![
                    "spec.rules[0].subjects[0].group: Forbidden: group is forbidden when subject kind is not 'Group'",
                    r#"spec.rules[0].nonResourceRules[0].verbs: Unsupported value: ["get","eat"]: supported values: "create", "delete", "deletecollection", "get", "list", "patch", "proxy", "update", "watch""#,
                    r#"spec.rules[0].nonResourceRules[0].nonResourceURLs[0]: Invalid value: "a": must start with slash"#,
                ],
            ),
        ];
        for (rules, expected) in cases {
            assert_eq!(texts(&flow_schema(&schema(rules))), expected);
        }
    }
}
