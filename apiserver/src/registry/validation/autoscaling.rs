//! Rules for horizontal pod autoscalers, and for `Scale`.

use apimachinery::meta::validation::is_path_segment;
use apimachinery::status::FieldError;
use serde_json::Value;

use super::{Errors, Path, complain, each, required, required_one_of};
use crate::registry::object::ObjectExt;

pub fn horizontal_pod_autoscaler(obj: &Value) -> Errors {
    let mut errors = Errors::new();
    let spec = &obj["spec"];
    let least = spec["minReplicas"].as_i64();
    if let Some(least) = least.filter(|n| *n < 1) {
        errors.push(FieldError::invalid("spec.minReplicas", least, "must be greater than or equal to 1"));
    }
    let most = spec["maxReplicas"].as_i64().unwrap_or(0);
    if most == 0 {
        errors.push(FieldError::required("spec.maxReplicas", ""));
    } else if most < 0 {
        errors.push(FieldError::invalid("spec.maxReplicas", most, "must be greater than 0"));
    }
    if least.is_some_and(|least| most < least) {
        errors.push(FieldError::invalid("spec.maxReplicas", most, "must be greater than or equal to `minReplicas`"));
    }
    let path = Path::SPEC.field("scaleTargetRef");
    for field in ["kind", "name"] {
        if let Some(text) = required(&spec["scaleTargetRef"], field, path, &mut errors) {
            complain(is_path_segment(text), text, path.field(field), &mut errors);
        }
    }
    if !spec["scaleTargetRef"].str_at(&["apiVersion"]).contains('/') {
        let value = spec["scaleTargetRef"].str_at(&["apiVersion"]);
        if value != "v1" {
            errors.push(FieldError::invalid(path.field("apiVersion"), value, "apiVersion must specify API group"));
        }
    }
    each(spec, "metrics", Path::SPEC, &mut errors, metric);
    for direction in ["scaleUp", "scaleDown"] {
        let path = Path::SPEC.field("behavior");
        rules(&spec["behavior"][direction], path.field(direction), &mut errors);
    }
    errors
}

fn metric(metric: &Value, path: Path<'_>, errors: &mut Errors) {
    let fields = [
        ("ContainerResource", "containerResource"),
        ("External", "external"),
        ("Object", "object"),
        ("Pods", "pods"),
        ("Resource", "resource"),
    ];
    let kinds: Vec<&str> = fields.iter().map(|(kind, _)| *kind).collect();
    required_one_of(metric, "type", &kinds, path, errors);
    let Some((_, field)) = fields.iter().find(|(kind, _)| metric["type"] == *kind) else { return };
    let source = &metric[*field];
    if source.is_null() {
        errors.push(FieldError::required(path.field(field), "must populate information for the given metric source"));
        return;
    }
    let target_path = path.field(field);
    let target_path = target_path.field("target");
    required_one_of(&source["target"], "type", &["Utilization", "Value", "AverageValue"], target_path, errors);
    if let Some(percent) = source["target"]["averageUtilization"].as_i64().filter(|p| *p < 1) {
        errors.push(FieldError::invalid(target_path.field("averageUtilization"), percent, "must be greater than 0"));
    }
}

fn rules(rules: &Value, path: Path<'_>, errors: &mut Errors) {
    const LONGEST: i64 = 3600;
    if rules.is_null() {
        return;
    }
    if let Some(seconds) = rules["stabilizationWindowSeconds"].as_i64() {
        let path = path.field("stabilizationWindowSeconds");
        if seconds < 0 {
            errors.push(FieldError::invalid(path, seconds, "must be greater than or equal to zero"));
        } else if seconds > LONGEST {
            errors.push(FieldError::invalid(path, seconds, format!("must be less than or equal to {LONGEST}")));
        }
    }
    if rules.list_at(&["policies"]).is_empty() {
        errors.push(FieldError::required(path.field("policies"), "must specify at least one Policy"));
    }
    each(rules, "policies", path, errors, |policy, path, errors| {
        required_one_of(policy, "type", &["Pods", "Percent"], path, errors);
        for field in ["value", "periodSeconds"] {
            let number = policy[field].as_i64().unwrap_or(0);
            if number <= 0 {
                errors.push(FieldError::invalid(path.field(field), number, "must be greater than zero"));
            }
        }
    });
}
