//! Rules for disruption budgets.

use apimachinery::status::FieldError;
use serde_json::Value;

use super::{Errors, Path, at_most_all, conditions, int_or_percent, label_selector, non_negative, one_of_given};

pub fn pod_disruption_budget(obj: &Value) -> Errors {
    let mut errors = Errors::new();
    let spec = &obj["spec"];
    if !spec["minAvailable"].is_null() && !spec["maxUnavailable"].is_null() {
        let detail = "minAvailable and maxUnavailable cannot be both set";
        errors.push(FieldError::invalid(Path::SPEC, spec.clone(), detail));
    }
    for field in ["minAvailable", "maxUnavailable"] {
        int_or_percent(&spec[field], Path::SPEC.field(field), &mut errors);
        at_most_all(&spec[field], Path::SPEC.field(field), &mut errors);
    }
    label_selector(&spec["selector"], Path::SPEC.field("selector"), &mut errors);
    one_of_given(spec, "unhealthyPodEvictionPolicy", &["AlwaysAllow", "IfHealthyBudget"], Path::SPEC, &mut errors);
    errors
}

pub fn pod_disruption_budget_status(obj: &Value, _old: &Value) -> Errors {
    let mut errors = Errors::new();
    let status = &obj["status"];
    conditions::conditions(status, Path::STATUS, &mut errors);
    for field in ["disruptionsAllowed", "currentHealthy", "desiredHealthy", "expectedPods"] {
        non_negative(status, field, Path::STATUS, &mut errors);
    }
    errors
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::tests::texts;
    use super::*;

    #[test]
    fn statuses_count_pods() {
        let expected = ["status.currentHealthy: Invalid value: -1: must be greater than or equal to 0"];
        let obj = json!({"status": {"currentHealthy": -1, "expectedPods": 2}});
        assert_eq!(texts(&pod_disruption_budget_status(&obj, &json!({}))), expected);
    }
}
