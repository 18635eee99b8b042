//! Rules for horizontal pod autoscalers, and for `Scale`.

use apimachinery::meta::validation::{is_dns1123_label, is_path_segment};
use apimachinery::status::FieldError;
use serde_json::Value;

use super::{Errors, Path, complain, each, required};
use crate::registry::core::pod_prepare::quantity;
use crate::registry::object::ObjectExt;

const LONGEST_WINDOW: i64 = 3600;
const LONGEST_PERIOD: i64 = 1800;

pub fn horizontal_pod_autoscaler(obj: &Value) -> Errors {
    let mut errors = Errors::new();
    let spec = &obj["spec"];
    let least = spec["minReplicas"].as_i64();
    super::non_negative(spec, "minReplicas", Path::SPEC, &mut errors);
    let most = spec["maxReplicas"].as_i64().unwrap_or(0);
    if most == 0 {
        errors.push(FieldError::required("spec.maxReplicas", ""));
    } else if most < 0 {
        errors.push(FieldError::invalid("spec.maxReplicas", most, "must be greater than or equal to 1"));
    }
    if least.is_some_and(|least| most < least) {
        errors.push(FieldError::invalid("spec.maxReplicas", most, "must be greater than or equal to `minReplicas`"));
    }
    reference(&spec["scaleTargetRef"], Path::SPEC.field("scaleTargetRef"), false, &mut errors);
    each(spec, "metrics", Path::SPEC, &mut errors, metric);
    // Nothing that runs in pods can be measured when there are none.
    let outside = |metric: &Value| metric["type"] == "Object" || metric["type"] == "External";
    if least == Some(0) && !spec.list_at(&["metrics"]).iter().any(outside) {
        let detail = "must specify at least one Object or External metric to support scaling to zero replicas";
        errors.push(FieldError::forbidden("spec.metrics", detail));
    }
    for direction in ["scaleUp", "scaleDown"] {
        let path = Path::SPEC.field("behavior");
        rules(&spec["behavior"][direction], path.field(direction), &mut errors);
    }
    errors
}

pub fn status(obj: &Value) -> Errors {
    let mut errors = Errors::new();
    for field in ["currentReplicas", "desiredReplicas"] {
        super::non_negative(&obj["status"], field, Path::STATUS, &mut errors);
    }
    errors
}

fn reference(reference: &Value, path: Path<'_>, any_group: bool, errors: &mut Errors) {
    for field in ["kind", "name"] {
        if let Some(text) = required(reference, field, path, errors) {
            complain(is_path_segment(text), text, path.field(field), errors);
        }
    }
    let version = reference.str_at(&["apiVersion"]);
    let problem = match version.split('/').count() {
        3.. => format!("unexpected GroupVersion string: {version}"),
        2 => return,
        _ if any_group => return,
        _ => "apiVersion must specify API group".to_owned(),
    };
    errors.push(FieldError::invalid(path.field("apiVersion"), version, problem));
}

/// The sources of a metric: type, field, and what checks it; in the order in which upstream looks for them.
type Source = (&'static str, &'static str, fn(&Value, Path<'_>, &mut Errors));
const SOURCES: [Source; 5] = [
    ("Object", "object", object_source),
    ("External", "external", external_source),
    ("Pods", "pods", pods_source),
    ("Resource", "resource", resource_source),
    ("ContainerResource", "containerResource", container_source),
];

fn metric(metric: &Value, path: Path<'_>, errors: &mut Errors) {
    const TYPES: [&str; 5] = ["ContainerResource", "External", "Object", "Pods", "Resource"];
    let kind = metric.str_at(&["type"]);
    if kind.is_empty() {
        errors.push(FieldError::required(path.field("type"), "must specify a metric source type"));
    }
    let expected = SOURCES.iter().find(|(name, ..)| *name == kind).map(|(_, field, _)| *field);
    if expected.is_none() {
        errors.push(FieldError::not_supported(path.field("type"), kind, &TYPES));
    }
    let given: Vec<&Source> = SOURCES.iter().filter(|(_, field, _)| !metric[*field].is_null()).collect();
    if let Some((_, field, check)) = given.first() {
        check(&metric[*field], path.field(field), errors);
    }
    match expected {
        Some(field) if metric[field].is_null() => {
            let detail = "must populate information for the given metric source";
            errors.push(FieldError::required(path.field(field), detail));
        }
        _ => {}
    }
    if given.len() != 1 {
        for (_, field, _) in given.iter().filter(|(_, field, _)| Some(*field) != expected) {
            errors.push(FieldError::forbidden(path.field(field), "must populate the given metric source only"));
        }
    }
}

fn object_source(source: &Value, path: Path<'_>, errors: &mut Errors) {
    reference(&source["describedObject"], path.field("describedObject"), true, errors);
    identifier(&source["metric"], path.field("metric"), errors);
    let target = path.field("target");
    self::target(&source["target"], target, errors);
    if !has(source, "value") && !has(source, "averageValue") {
        let detail = "must set either a target value or averageValue";
        errors.push(FieldError::required(target.field("averageValue"), detail));
    }
}

fn external_source(source: &Value, path: Path<'_>, errors: &mut Errors) {
    identifier(&source["metric"], path.field("metric"), errors);
    let target = path.field("target");
    self::target(&source["target"], target, errors);
    match (has(source, "value"), has(source, "averageValue")) {
        (false, false) => {
            let detail = "must set either a target value for metric or a per-pod target";
            errors.push(FieldError::required(target.field("averageValue"), detail));
        }
        (true, true) => {
            let detail = "may not set both a target value for metric and a per-pod target";
            errors.push(FieldError::forbidden(target.field("value"), detail));
        }
        _ => {}
    }
}

fn pods_source(source: &Value, path: Path<'_>, errors: &mut Errors) {
    identifier(&source["metric"], path.field("metric"), errors);
    let target = path.field("target");
    self::target(&source["target"], target, errors);
    if !has(source, "averageValue") {
        let detail = "must specify a positive target averageValue";
        errors.push(FieldError::required(target.field("averageValue"), detail));
    }
}

fn resource_source(source: &Value, path: Path<'_>, errors: &mut Errors) {
    if source.str_at(&["name"]).is_empty() {
        errors.push(FieldError::required(path.field("name"), "must specify a resource name"));
    }
    resource_target(source, path, errors);
}

fn container_source(source: &Value, path: Path<'_>, errors: &mut Errors) {
    match source.str_at(&["name"]) {
        "" => errors.push(FieldError::required(path.field("name"), "must specify a resource name")),
        name => super::requirements::resource_name(name, path.field("name"), errors),
    }
    match source.str_at(&["container"]) {
        "" => errors.push(FieldError::required(path.field("container"), "must specify a container")),
        name => complain(is_dns1123_label(name), name, path.field("container"), errors),
    }
    resource_target(source, path, errors);
}

fn resource_target(source: &Value, path: Path<'_>, errors: &mut Errors) {
    let target = path.field("target");
    self::target(&source["target"], target, errors);
    match (has(source, "averageUtilization"), has(source, "averageValue")) {
        (false, false) => {
            let detail = "must set either a target raw value or a target utilization";
            errors.push(FieldError::required(target.field("averageUtilization"), detail));
        }
        (true, true) => {
            let detail = "may not set both a target raw value and a target utilization";
            errors.push(FieldError::forbidden(target.field("averageValue"), detail));
        }
        _ => {}
    }
}

fn has(source: &Value, field: &str) -> bool {
    !source["target"][field].is_null()
}

fn identifier(metric: &Value, path: Path<'_>, errors: &mut Errors) {
    match metric.str_at(&["name"]) {
        "" => errors.push(FieldError::required(path.field("name"), "must specify a metric name")),
        name => complain(is_path_segment(name), name, path.field("name"), errors),
    }
}

fn target(target: &Value, path: Path<'_>, errors: &mut Errors) {
    let kind = target.str_at(&["type"]);
    if kind.is_empty() {
        errors.push(FieldError::required(path.field("type"), "must specify a metric target type"));
    }
    if !matches!(kind, "Utilization" | "Value" | "AverageValue") {
        let detail = "must be either Utilization, Value, or AverageValue";
        errors.push(FieldError::invalid(path.field("type"), kind, detail));
    }
    for field in ["value", "averageValue"] {
        if quantity(&target[field]).is_some_and(|amount| amount.signum() <= 0) {
            errors.push(FieldError::invalid(path.field(field), target[field].clone(), "must be positive"));
        }
    }
    if let Some(percent) = target["averageUtilization"].as_i64().filter(|percent| *percent < 1) {
        errors.push(FieldError::invalid(path.field("averageUtilization"), percent, "must be greater than 0"));
    }
}

fn rules(rules: &Value, path: Path<'_>, errors: &mut Errors) {
    if rules.is_null() {
        return;
    }
    if let Some(seconds) = rules["stabilizationWindowSeconds"].as_i64() {
        let path = path.field("stabilizationWindowSeconds");
        if seconds < 0 {
            errors.push(FieldError::invalid(path, seconds, "must be greater than or equal to zero"));
        } else if seconds > LONGEST_WINDOW {
            errors.push(FieldError::invalid(path, seconds, format!("must be less than or equal to {LONGEST_WINDOW}")));
        }
    }
    if let Some(policy) = rules["selectPolicy"].as_str() {
        const POLICIES: [&str; 3] = ["Disabled", "Max", "Min"];
        if !POLICIES.contains(&policy) {
            errors.push(FieldError::not_supported(path.field("selectPolicy"), policy, &POLICIES));
        }
    }
    if rules.list_at(&["policies"]).is_empty() {
        errors.push(FieldError::required(path.field("policies"), "must specify at least one Policy"));
    }
    each(rules, "policies", path, errors, policy);
    if quantity(&rules["tolerance"]).is_some_and(|amount| amount.signum() < 0) {
        errors.push(FieldError::invalid(path.field("tolerance"), rules["tolerance"].clone(), super::IS_NEGATIVE));
    }
}

fn policy(policy: &Value, path: Path<'_>, errors: &mut Errors) {
    let kind = policy.str_at(&["type"]);
    if !matches!(kind, "Pods" | "Percent") {
        errors.push(FieldError::not_supported(path.field("type"), kind, &["Percent", "Pods"]));
    }
    for field in ["value", "periodSeconds"] {
        let number = policy[field].as_i64().unwrap_or(0);
        if number <= 0 {
            errors.push(FieldError::invalid(path.field(field), number, "must be greater than zero"));
        }
    }
    if let Some(seconds) = policy["periodSeconds"].as_i64().filter(|seconds| *seconds > LONGEST_PERIOD) {
        let detail = format!("must be less than or equal to {LONGEST_PERIOD}");
        errors.push(FieldError::invalid(path.field("periodSeconds"), seconds, detail));
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::tests::texts;
    use super::*;

    #[test]
    fn metrics_have_one_source_with_one_target() {
        let complaints = |metric: Value| {
            let mut errors = Errors::new();
            super::metric(&metric, Path::Root("m"), &mut errors);
            texts(&errors)
        };
        let cpu = json!({"type": "Resource", "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 50}}});
        assert!(complaints(cpu).is_empty());
        let both = json!({"type": "Resource", "resource": {"name": "cpu",
            "target": {"type": "Utilization", "averageUtilization": 50, "averageValue": "1"}}});
        let expected =
            "m.resource.target.averageValue: Forbidden: may not set both a target raw value and a target utilization";
        assert_eq!(complaints(both), [expected]);
        let missing = "m.pods: Required value: must populate information for the given metric source";
        assert_eq!(complaints(json!({"type": "Pods"})), [missing]);
    }
}
