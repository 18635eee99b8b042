//! `autoscaling/v1` to `v2` and back. The older form has one metric, the use of processors; everything else that the
//! newer form knows travels as JSON in annotations, so that nothing is lost on the way.

use serde_json::{Map, Value, json};

use crate::registry::object::ObjectExt;

const METRICS: &str = "autoscaling.alpha.kubernetes.io/metrics";
const CURRENT_METRICS: &str = "autoscaling.alpha.kubernetes.io/current-metrics";
const CONDITIONS: &str = "autoscaling.alpha.kubernetes.io/conditions";
const BEHAVIOR: &str = "autoscaling.alpha.kubernetes.io/behavior";

/// From `v1` to `v2`.
pub fn from_v1(mut obj: Value) -> Value {
    let utilization = take(&mut obj, &["spec", "targetCPUUtilizationPercentage"]);
    let current = take(&mut obj, &["status", "currentCPUUtilizationPercentage"]);
    let mut metrics = take_annotation(&mut obj, METRICS).and_then(list).unwrap_or_default();
    if let Some(percent) = utilization {
        let target = json!({"type": "Utilization", "averageUtilization": percent});
        metrics.insert(0, json!({"type": "Resource", "resource": {"name": "cpu", "target": target}}));
    }
    if !metrics.is_empty() {
        obj.set(&["spec", "metrics"], metrics);
    }
    if let Some(behavior) = take_annotation(&mut obj, BEHAVIOR) {
        obj.set(&["spec", "behavior"], behavior);
    }
    let mut current_metrics = take_annotation(&mut obj, CURRENT_METRICS).and_then(list).unwrap_or_default();
    if let Some(percent) = current {
        let value = json!({"averageUtilization": percent, "averageValue": "0"});
        current_metrics.insert(0, json!({"type": "Resource", "resource": {"name": "cpu", "current": value}}));
    }
    if !current_metrics.is_empty() {
        obj.set(&["status", "currentMetrics"], current_metrics);
    }
    if let Some(conditions) = take_annotation(&mut obj, CONDITIONS) {
        obj.set(&["status", "conditions"], conditions);
    }
    drop_empty_annotations(&mut obj);
    obj
}

/// From `v2` to `v1`.
pub fn to_v1(mut obj: Value) -> Value {
    let mut metrics = take(&mut obj, &["spec", "metrics"]).and_then(list).unwrap_or_default();
    if let Some(index) = metrics.iter().position(|m| is_cpu(m) && !utilization(m, "target").is_null()) {
        let percent = utilization(&metrics.remove(index), "target");
        obj.set(&["spec", "targetCPUUtilizationPercentage"], percent);
    }
    annotate(&mut obj, METRICS, &metrics.into());
    let mut current = take(&mut obj, &["status", "currentMetrics"]).and_then(list).unwrap_or_default();
    if let Some(index) = current.iter().position(|m| is_cpu(m) && !utilization(m, "current").is_null()) {
        let percent = utilization(&current.remove(index), "current");
        obj.set(&["status", "currentCPUUtilizationPercentage"], percent);
    }
    annotate(&mut obj, CURRENT_METRICS, &current.into());
    if obj["status"].is_object() {
        obj.set_default(&["status", "currentReplicas"], 0);
    }
    for (path, annotation) in [(["spec", "behavior"], BEHAVIOR), (["status", "conditions"], CONDITIONS)] {
        if let Some(value) = take(&mut obj, &path) {
            annotate(&mut obj, annotation, &value);
        }
    }
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

fn annotate(obj: &mut Value, name: &str, value: &Value) {
    if !super::super::common::is_nothing(value) {
        obj.set(&["metadata", "annotations", name], value.to_string());
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
            "metrics": [{"type": "Pods", "pods": {"target": {"averageValue": "1"}}}]},
            "status": {"currentReplicas": 0, "conditions": [{"type": "AbleToScale", "status": "True"}]}});
        assert_eq!(from_v1(to_v1(newer.clone())), newer);
    }
}
