//! `autoscaling/v1` to `v2` and back. The older form has one metric, the use of processors; everything else that the
//! newer form knows travels as JSON in annotations, so that nothing is lost on the way.

use serde_json::{Map, Value, json};

use super::metrics;
use crate::registry::common::is_nothing;
use crate::registry::object::ObjectExt;

const METRICS: &str = "autoscaling.alpha.kubernetes.io/metrics";
const CURRENT_METRICS: &str = "autoscaling.alpha.kubernetes.io/current-metrics";
const CONDITIONS: &str = "autoscaling.alpha.kubernetes.io/conditions";
const BEHAVIOR: &str = "autoscaling.alpha.kubernetes.io/behavior";

/// From `v1` to `v2`.
pub fn from_v1(mut obj: Value) -> Value {
    let utilization = take(&mut obj, &["spec", "targetCPUUtilizationPercentage"]);
    let current = take(&mut obj, &["status", "currentCPUUtilizationPercentage"]);
    let mut metrics = take_list(&mut obj, METRICS, |metric| metrics::from_old(metric, "target")).unwrap_or_default();
    if let Some(percent) = utilization {
        let target = json!({"type": "Utilization", "averageUtilization": percent});
        metrics.push(json!({"type": "Resource", "resource": {"name": "cpu", "target": target}}));
    }
    if !metrics.is_empty() {
        obj.set(&["spec", "metrics"], metrics);
    }
    if let Some(behavior) = take_annotation(&mut obj, BEHAVIOR) {
        obj.set(&["spec", "behavior"], behavior);
    }
    // The annotation knows more than the field, and wins.
    let of_field = current.map(|percent| {
        let value = json!({"averageUtilization": percent, "averageValue": "0"});
        vec![json!({"type": "Resource", "resource": {"name": "cpu", "current": value}})]
    });
    let current = take_list(&mut obj, CURRENT_METRICS, |metric| metrics::from_old(metric, "current")).or(of_field);
    if let Some(current) = current.filter(|current| !current.is_empty()) {
        obj.set(&["status", "currentMetrics"], current);
    }
    if let Some(conditions) = take_annotation(&mut obj, CONDITIONS) {
        obj.set(&["status", "conditions"], conditions);
    }
    drop_empty_annotations(&mut obj);
    obj
}

/// From `v2` to `v1`.
pub fn to_v1(mut obj: Value) -> Value {
    for name in [METRICS, CURRENT_METRICS, CONDITIONS, BEHAVIOR] {
        obj.remove_at(&["metadata", "annotations", name]);
    }
    drop_empty_annotations(&mut obj);
    let mut metrics = take(&mut obj, &["spec", "metrics"]).and_then(list).unwrap_or_default();
    metrics.retain(|metric| {
        let percent = utilization(metric, "target");
        let has_field = is_cpu(metric) && !percent.is_null();
        if has_field {
            obj.set(&["spec", "targetCPUUtilizationPercentage"], percent);
        }
        !has_field
    });
    annotate(&mut obj, METRICS, metrics.iter().map(|metric| metrics::to_old(metric, "target")));
    // The use of processors has a field of its own and stays here all the same, for its amount.
    let current = take(&mut obj, &["status", "currentMetrics"]).and_then(list).unwrap_or_default();
    for metric in current.iter().filter(|metric| is_cpu(metric) && !utilization(metric, "current").is_null()) {
        obj.set(&["status", "currentCPUUtilizationPercentage"], utilization(metric, "current"));
    }
    annotate(&mut obj, CURRENT_METRICS, current.iter().map(|metric| metrics::to_old(metric, "current")));
    if obj["status"].is_object() {
        obj.set_default(&["status", "currentReplicas"], 0);
    }
    if let Some(behavior) = take(&mut obj, &["spec", "behavior"]).filter(|behavior| !is_nothing(behavior)) {
        obj.set(&["metadata", "annotations", BEHAVIOR], behavior.to_string());
    }
    let conditions = take(&mut obj, &["status", "conditions"]).and_then(list).unwrap_or_default();
    annotate(&mut obj, CONDITIONS, conditions.iter().map(metrics::condition));
    obj
}

fn is_cpu(metric: &Value) -> bool {
    metric["type"] == "Resource" && metric["resource"]["name"] == "cpu"
}

fn utilization(metric: &Value, side: &str) -> Value {
    metric["resource"][side]["averageUtilization"].clone()
}

fn take(obj: &mut Value, path: &[&str]) -> Option<Value> {
    obj.remove_at(path).filter(|value| !value.is_null())
}

fn list(value: Value) -> Option<Vec<Value>> {
    match value {
        Value::Array(items) => Some(items),
        _ => None,
    }
}

/// What is no JSON stays an annotation like any other.
fn take_annotation(obj: &mut Value, name: &str) -> Option<Value> {
    let parsed = serde_json::from_str(obj.annotation(name)?).ok()?;
    obj.remove_at(&["metadata", "annotations", name]);
    Some(parsed)
}

/// What an annotation lists, each item converted.
fn take_list(obj: &mut Value, name: &str, convert: impl Fn(&Value) -> Value) -> Option<Vec<Value>> {
    Some(list(take_annotation(obj, name)?)?.iter().map(convert).collect())
}

/// A list of texts that are JSON, unless it is empty.
fn annotate(obj: &mut Value, name: &str, items: impl Iterator<Item = String>) {
    let items: Vec<String> = items.collect();
    if !items.is_empty() {
        obj.set(&["metadata", "annotations", name], format!("[{}]", items.join(",")));
    }
}

fn drop_empty_annotations(obj: &mut Value) {
    if obj.annotations().is_some_and(Map::is_empty) {
        obj.remove_at(&["metadata", "annotations"]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processor_use_has_a_field_of_its_own_in_v1() {
        let older =
            json!({"metadata": {"name": "a"}, "spec": {"maxReplicas": 3, "targetCPUUtilizationPercentage": 60}});
        let newer = json!({"metadata": {"name": "a"}, "spec": {"maxReplicas": 3, "metrics": [
            {"type": "Resource", "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 60}}}]}});
        assert_eq!(from_v1(older.clone()), newer);
        assert_eq!(to_v1(newer), older);
    }

    #[test]
    fn nothing_is_lost_on_the_way() {
        let newer = json!({"metadata": {"name": "a"}, "spec": {"behavior": {"scaleUp": {"selectPolicy": "Max"}},
            "metrics": [{"type": "Pods", "pods": {"metric": {"name": "m"}, "target": {"type": "AverageValue", "averageValue": "1"}}}]},
            "status": {"currentReplicas": 0, "conditions": [{"type": "AbleToScale", "status": "True"}]}});
        assert_eq!(from_v1(to_v1(newer.clone())), newer);
    }
}
