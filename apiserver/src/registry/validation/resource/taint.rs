//! Rules that taint devices of any slice.

use apimachinery::status::FieldError;
use serde_json::Value;

use super::super::conditions;
use super::{Errors, Path, driver_name, label, pool_name, taint};
use crate::registry::object::ObjectExt;

const CONDITIONS_MAX: usize = 8;

/// A rule, and the one that is stored.
pub fn rule(obj: &Value, old: Option<&Value>) -> Errors {
    let mut errors = Errors::new();
    let (selector, path) = (&obj["spec"]["deviceSelector"], Path::SPEC.field("deviceSelector"));
    let given = |field: &str| selector[field].as_str();
    if let Some(name) = given("driver") {
        driver_name(name, path.field("driver"), &mut errors);
    }
    if let Some(name) = given("pool") {
        pool_name(name, path.field("pool"), &mut errors);
    }
    if let Some(name) = given("device") {
        label(name, path.field("device"), &mut errors);
    }
    taint(&obj["spec"]["taint"], old.map(|old| &old["spec"]["taint"]), Path::SPEC.field("taint"), &mut errors);
    errors
}

pub fn rule_status(obj: &Value, _old: &Value) -> Errors {
    let mut errors = Errors::new();
    conditions::conditions(&obj["status"], Path::STATUS, &mut errors);
    let given = obj.list_at(&["status", "conditions"]).len();
    if given > CONDITIONS_MAX {
        errors.push(FieldError::too_many(Path::STATUS.field("conditions"), given, CONDITIONS_MAX));
    }
    errors
}
