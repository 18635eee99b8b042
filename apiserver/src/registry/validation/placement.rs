//! Rules for everything that decides where a pod goes: affinity, tolerations, gates, spreading.

use apimachinery::meta::validation::{is_dns1123_label, is_dns1123_subdomain, is_qualified_name, is_valid_label_value};
use apimachinery::status::FieldError;
use serde_json::Value;

use super::{Errors, Path, complain, each, label_selector, one_of, one_of_given};
use crate::registry::object::ObjectExt;

const REQUIRED: &str = "requiredDuringSchedulingIgnoredDuringExecution";
const PREFERRED: &str = "preferredDuringSchedulingIgnoredDuringExecution";

pub fn placement(spec: &Value, path: Path<'_>, errors: &mut Errors) {
    affinity(&spec["affinity"], path.field("affinity"), errors);
    each(spec, "readinessGates", path, errors, |gate, path, errors| {
        let kind = gate.str_at(&["conditionType"]);
        complain(is_qualified_name(kind), kind, path.field("conditionType"), errors);
    });
    let gates = path.field("schedulingGates");
    let mut seen = Vec::new();
    for (index, gate) in spec.list_at(&["schedulingGates"]).iter().enumerate() {
        let name = gate.str_at(&["name"]);
        complain(is_qualified_name(name), name, gates.index(index), errors);
        super::unique(&mut seen, name, gates.index(index), errors);
    }
    let constraints = spec.list_at(&["topologySpreadConstraints"]);
    let list = path.field("topologySpreadConstraints");
    for (index, constraint) in constraints.iter().enumerate() {
        spread(constraint, &constraints[index + 1..], list.index(index), errors);
    }
    each(spec, "tolerations", path, errors, toleration);
}

/// One rule of how evenly pods are spread; `others` come after it.
fn spread(constraint: &Value, others: &[Value], path: Path<'_>, errors: &mut Errors) {
    const CHOICES: [&str; 2] = ["DoNotSchedule", "ScheduleAnyway"];
    let key =
        |constraint: &Value| ["topologyKey", "whenUnsatisfiable"].map(|field| constraint.str_at(&[field]).to_owned());
    let skew = constraint["maxSkew"].as_i64().unwrap_or(0);
    if skew <= 0 {
        errors.push(FieldError::invalid(path.field("maxSkew"), skew, "must be greater than zero"));
    }
    let [topology, choice] = key(constraint);
    if topology.is_empty() {
        errors.push(FieldError::required(path.field("topologyKey"), "can not be empty"));
    }
    if !CHOICES.contains(&choice.as_str()) {
        errors.push(FieldError::not_supported(path.field("whenUnsatisfiable"), choice.as_str(), &CHOICES));
    }
    if others.iter().any(|other| key(other) == key(constraint)) {
        let value = format!("{{{topology}, {choice}}}");
        errors.push(FieldError::duplicate(path.field("{topologyKey, whenUnsatisfiable}"), value));
    }
    if let Some(domains) = constraint["minDomains"].as_i64() {
        let path = path.field("minDomains");
        if domains <= 0 {
            errors.push(FieldError::invalid(path, domains, "must be greater than zero"));
        }
        if choice != "DoNotSchedule" {
            let detail = format!("can only use minDomains if whenUnsatisfiable=DoNotSchedule, not {choice}");
            errors.push(FieldError::invalid(path, domains, detail));
        }
    }
    for field in ["nodeAffinityPolicy", "nodeTaintsPolicy"] {
        one_of_given(constraint, field, &["Honor", "Ignore"], path, errors);
    }
    label_keys(constraint, path, errors);
    label_selector(&constraint["labelSelector"], path.field("labelSelector"), errors);
}

/// Labels whose values are the pod's own: only beside a selector, and not of labels that it names already. That a
/// selector names one is seen from the term that the server adds for it, which is the second then.
fn label_keys(holder: &Value, path: Path<'_>, errors: &mut Errors) {
    let selector = &holder["labelSelector"];
    for field in ["matchLabelKeys", "mismatchLabelKeys"] {
        let list = path.field(field);
        if !holder.list_at(&[field]).is_empty() && selector.is_null() {
            errors.push(FieldError::forbidden(list, "must not be specified when labelSelector is not set"));
            continue;
        }
        each(holder, field, path, errors, |key, path, errors| {
            let key = key.as_str().unwrap_or_default();
            complain(is_qualified_name(key), key, path, errors);
        });
    }
    let matched = holder.list_at(&["matchLabelKeys"]);
    let labels = selector["matchLabels"].as_object().into_iter().flatten();
    let mut named: Vec<&str> = labels.map(|(key, _)| key.as_str()).collect();
    for expression in selector.list_at(&["matchExpressions"]) {
        let key = expression.str_at(&["key"]);
        if let Some(index) = matched.iter().rposition(|matched| matched == key).filter(|_| named.contains(&key)) {
            errors.push(FieldError::invalid(path.index(index), key, "exists in both matchLabelKeys and labelSelector"));
        }
        named.push(key);
    }
    let list = path.field("matchLabelKeys");
    let mismatched = holder.list_at(&["mismatchLabelKeys"]);
    for (index, key) in matched.iter().enumerate().filter(|(_, key)| mismatched.contains(key)) {
        let detail = "exists in both matchLabelKeys and mismatchLabelKeys";
        errors.push(FieldError::invalid(list.index(index), key.clone(), detail));
    }
}

pub fn toleration(toleration: &Value, path: Path<'_>, errors: &mut Errors) {
    let (key, operator, value) =
        (toleration.str_at(&["key"]), toleration.str_at(&["operator"]), toleration.str_at(&["value"]));
    if !key.is_empty() {
        complain(is_qualified_name(key), key, path.field("key"), errors);
    } else if operator != "Exists" {
        let detail = "operator must be Exists when `key` is empty, which means \"match all values and all keys\"";
        errors.push(FieldError::invalid(path.field("operator"), operator, detail));
    }
    if !toleration["tolerationSeconds"].is_null() && toleration["effect"] != "NoExecute" {
        let detail = "effect must be 'NoExecute' when `tolerationSeconds` is set";
        errors.push(FieldError::invalid(path.field("effect"), toleration.str_at(&["effect"]), detail));
    }
    match operator {
        "Equal" | "" => {
            let messages = is_valid_label_value(value);
            if !messages.is_empty() {
                errors.push(FieldError::invalid(path.field("operator"), value, messages.join(";")));
            }
        }
        "Exists" if !value.is_empty() => {
            let detail = "value must be empty when `operator` is 'Exists'";
            errors.push(FieldError::invalid(path.field("operator"), value, detail));
        }
        "Exists" => {}
        other => errors.push(FieldError::not_supported(path.field("operator"), other, &["Equal", "Exists"])),
    }
    one_of(toleration, "effect", &["NoSchedule", "PreferNoSchedule", "NoExecute"], path, errors);
}

fn affinity(affinity: &Value, path: Path<'_>, errors: &mut Errors) {
    let node = &affinity["nodeAffinity"];
    let node_path = path.field("nodeAffinity");
    if node[REQUIRED].is_object() {
        node_selector(&node[REQUIRED], node_path.field(REQUIRED), errors);
    }
    each(node, PREFERRED, node_path, errors, |preferred, path, errors| {
        weight(preferred, path, errors);
        // What can only be preferred may ask for labels that no node can have.
        node_selector_term(&preferred["preference"], false, path.field("preference"), errors);
    });
    for side in ["podAffinity", "podAntiAffinity"] {
        let (value, path) = (&affinity[side], path.field(side));
        each(value, REQUIRED, path, errors, pod_affinity_term);
        each(value, PREFERRED, path, errors, |preferred, path, errors| {
            weight(preferred, path, errors);
            pod_affinity_term(&preferred["podAffinityTerm"], path.field("podAffinityTerm"), errors);
        });
    }
}

fn weight(preferred: &Value, path: Path<'_>, errors: &mut Errors) {
    let weight = preferred["weight"].as_i64().unwrap_or(0);
    if !(1..=100).contains(&weight) {
        errors.push(FieldError::invalid(path.field("weight"), weight, "must be in the range 1-100"));
    }
}

fn pod_affinity_term(term: &Value, path: Path<'_>, errors: &mut Errors) {
    label_selector(&term["labelSelector"], path.field("labelSelector"), errors);
    label_selector(&term["namespaceSelector"], path.field("namespaceSelector"), errors);
    // The path without its last letter is upstream's.
    let list = path.field("namespace");
    for name in term.list_at(&["namespaces"]) {
        let text = name.as_str().unwrap_or_default();
        complain(is_dns1123_label(text), text, list, errors);
    }
    label_keys(term, path, errors);
    let key = term.str_at(&["topologyKey"]);
    if key.is_empty() {
        errors.push(FieldError::required(path.field("topologyKey"), "can not be empty"));
    }
    complain(is_qualified_name(key), key, path.field("topologyKey"), errors);
}

/// A `NodeSelector` object.
pub fn node_selector(selector: &Value, path: Path<'_>, errors: &mut Errors) {
    let terms = path.field("nodeSelectorTerms");
    if selector.list_at(&["nodeSelectorTerms"]).is_empty() {
        errors.push(FieldError::required(terms, "must have at least one node selector term"));
    }
    each(selector, "nodeSelectorTerms", path, errors, |term, path, errors| {
        node_selector_term(term, true, path, errors);
    });
}

fn node_selector_term(term: &Value, check_values: bool, path: Path<'_>, errors: &mut Errors) {
    each(term, "matchExpressions", path, errors, |requirement, path, errors| {
        label_requirement(requirement, check_values, path, errors);
    });
    each(term, "matchFields", path, errors, field_requirement);
}

fn label_requirement(requirement: &Value, check_values: bool, path: Path<'_>, errors: &mut Errors) {
    let values = requirement.list_at(&["values"]);
    let operator = requirement.str_at(&["operator"]);
    match operator {
        "In" | "NotIn" if values.is_empty() => {
            let detail = "must be specified when `operator` is 'In' or 'NotIn'";
            errors.push(FieldError::required(path.field("values"), detail));
        }
        "Exists" | "DoesNotExist" if !values.is_empty() => {
            let detail = "may not be specified when `operator` is 'Exists' or 'DoesNotExist'";
            errors.push(FieldError::forbidden(path.field("values"), detail));
        }
        "Gt" | "Lt" if values.len() != 1 => {
            let detail = "must be specified single value when `operator` is 'Lt' or 'Gt'";
            errors.push(FieldError::required(path.field("values"), detail));
        }
        "In" | "NotIn" | "Exists" | "DoesNotExist" | "Gt" | "Lt" => {}
        other => errors.push(FieldError::invalid(path.field("operator"), other, "not a valid selector operator")),
    }
    let key = requirement.str_at(&["key"]);
    complain(is_qualified_name(key), key, path.field("key"), errors);
    let list = path.field("values");
    for (index, value) in values.iter().enumerate().filter(|_| check_values) {
        let text = value.as_str().unwrap_or_default();
        complain(is_valid_label_value(text), text, list.index(index), errors);
    }
}

/// Of the fields of a node only its name can be asked for.
fn field_requirement(requirement: &Value, path: Path<'_>, errors: &mut Errors) {
    let (key, operator) = (requirement.str_at(&["key"]), requirement.str_at(&["operator"]));
    let values = requirement.list_at(&["values"]);
    if !matches!(operator, "In" | "NotIn") {
        errors.push(FieldError::invalid(path.field("operator"), operator, "not a valid selector operator"));
    } else if values.len() != 1 {
        let detail = "must be only one value when `operator` is 'In' or 'NotIn' for node field selector";
        errors.push(FieldError::required(path.field("values"), detail));
    }
    if key != "metadata.name" {
        errors.push(FieldError::invalid(path.field("key"), key, "not a valid field selector key"));
        return;
    }
    let list = path.field("values");
    for (index, value) in values.iter().enumerate() {
        let text = value.as_str().unwrap_or_default();
        complain(is_dns1123_subdomain(text), text, list.index(index), errors);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::tests::texts;
    use super::*;

    fn told(spec: Value) -> Vec<String> {
        let mut errors = Errors::new();
        placement(&spec, Path::SPEC, &mut errors);
        texts(&errors)
    }

    #[test]
    fn constraints_of_one_kind_are_given_once() {
        let constraint = json!({"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway"});
        let expected = [
            r#"spec.topologySpreadConstraints[0].{topologyKey, whenUnsatisfiable}: Duplicate value: "{zone, ScheduleAnyway}""#,
        ];
        assert_eq!(told(json!({"topologySpreadConstraints": [constraint, constraint]})), expected);
    }

    #[test]
    fn keys_that_a_selector_names_are_found_by_the_term_that_was_added() {
        let selector =
            json!({"matchLabels": {"a": "b"}, "matchExpressions": [{"key": "a", "operator": "In", "values": ["b"]}]});
        let constraint = json!({"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule",
            "matchLabelKeys": ["a"], "labelSelector": selector});
        let expected = [
            r#"spec.topologySpreadConstraints[0][0]: Invalid value: "a": exists in both matchLabelKeys and labelSelector"#,
        ];
        assert_eq!(told(json!({"topologySpreadConstraints": [constraint]})), expected);
    }

    #[test]
    fn preferences_may_name_labels_that_cannot_be() {
        let term = json!({"matchExpressions": [{"key": "a", "operator": "In", "values": ["-"]}]});
        let preferred = json!({PREFERRED: [{"weight": 1, "preference": term}]});
        assert!(told(json!({"affinity": {"nodeAffinity": preferred}})).is_empty());
        let required = json!({REQUIRED: {"nodeSelectorTerms": [term]}});
        assert_eq!(told(json!({"affinity": {"nodeAffinity": required}})).len(), 1);
    }
}
