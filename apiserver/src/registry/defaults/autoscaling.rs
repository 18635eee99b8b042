//! Defaults of horizontal pod autoscalers, in their storage version `autoscaling/v2`.

use serde_json::{Value, json};

use super::{default, default_zero, existing, within};

pub fn horizontal_pod_autoscaler(obj: &mut Value) {
    within(obj, "spec", |spec| {
        default(spec, "minReplicas", 1);
        default_zero(
            spec,
            "metrics",
            json!([{"type": "Resource", "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 80}}}]),
        );
        existing(spec, "behavior", |behavior| {
            within(behavior, "scaleUp", |rules| {
                default(rules, "stabilizationWindowSeconds", 0);
                default(rules, "selectPolicy", "Max");
                let policies = json!([
                    {"type": "Pods", "value": 4, "periodSeconds": 15},
                    {"type": "Percent", "value": 100, "periodSeconds": 15},
                ]);
                default(rules, "policies", policies);
            });
            within(behavior, "scaleDown", |rules| {
                default(rules, "selectPolicy", "Max");
                default(rules, "policies", json!([{"type": "Percent", "value": 100, "periodSeconds": 15}]));
            });
        });
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processor_use_is_the_metric_unless_another_is_named() {
        let mut obj = json!({"spec": {"maxReplicas": 3}});
        horizontal_pod_autoscaler(&mut obj);
        assert_eq!(obj["spec"]["minReplicas"], 1);
        assert_eq!(obj["spec"]["metrics"][0]["resource"]["target"]["averageUtilization"], 80);
        assert!(obj["spec"].get("behavior").is_none());
    }

    #[test]
    fn a_given_behavior_is_completed() {
        let mut obj = json!({"spec": {"behavior": {"scaleDown": {"stabilizationWindowSeconds": 5}}}});
        horizontal_pod_autoscaler(&mut obj);
        let behavior = &obj["spec"]["behavior"];
        assert_eq!(behavior["scaleUp"]["stabilizationWindowSeconds"], 0);
        assert_eq!(behavior["scaleUp"]["policies"].as_array().map(Vec::len), Some(2));
        let policy = json!([{"type": "Percent", "value": 100, "periodSeconds": 15}]);
        let expected = json!({"stabilizationWindowSeconds": 5, "selectPolicy": "Max", "policies": policy});
        assert_eq!(behavior["scaleDown"], expected);
    }
}
