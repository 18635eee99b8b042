//! Rules for leases.

use apimachinery::status::FieldError;
use serde_json::Value;

use super::{Errors, Path, non_negative, positive};
use crate::registry::object::ObjectExt;

pub fn lease(obj: &Value) -> Errors {
    let mut errors = Errors::new();
    let spec = &obj["spec"];
    positive(spec, "leaseDurationSeconds", Path::SPEC, &mut errors);
    non_negative(spec, "leaseTransitions", Path::SPEC, &mut errors);
    if !spec.str_at(&["preferredHolder"]).is_empty() && spec.str_at(&["strategy"]).is_empty() {
        let detail = "may only be specified if `strategy` is defined";
        errors.push(FieldError::forbidden("spec.preferredHolder", detail));
    }
    errors
}
