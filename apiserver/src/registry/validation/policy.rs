//! Rules for disruption budgets.

use apimachinery::status::FieldError;
use serde_json::Value;

use super::{Errors, Path, at_most_all, int_or_percent, label_selector, one_of};

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
    one_of(spec, "unhealthyPodEvictionPolicy", &["AlwaysAllow", "IfHealthyBudget"], Path::SPEC, &mut errors);
    errors
}
