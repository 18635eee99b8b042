//! Rules for flow schemas and priority levels.

use apimachinery::status::FieldError;
use serde_json::Value;

use super::{Errors, Path, required, required_one_of};

pub fn flow_schema(obj: &Value) -> Errors {
    const MOST: i64 = 10_000;
    let mut errors = Errors::new();
    let spec = &obj["spec"];
    let precedence = spec["matchingPrecedence"].as_i64().unwrap_or(0);
    if precedence <= 0 {
        errors.push(FieldError::invalid("spec.matchingPrecedence", precedence, "must be a positive value"));
    }
    if precedence > MOST {
        let detail = format!("must not be greater than {MOST}");
        errors.push(FieldError::invalid("spec.matchingPrecedence", precedence, detail));
    }
    let path = Path::SPEC.field("priorityLevelConfiguration");
    required(&spec["priorityLevelConfiguration"], "name", path, &mut errors);
    if spec["distinguisherMethod"].is_object() {
        let path = Path::SPEC.field("distinguisherMethod");
        required_one_of(&spec["distinguisherMethod"], "type", &["ByNamespace", "ByUser"], path, &mut errors);
    }
    errors
}

pub fn priority_level(obj: &Value) -> Errors {
    let mut errors = Errors::new();
    let spec = &obj["spec"];
    required_one_of(spec, "type", &["Exempt", "Limited"], Path::SPEC, &mut errors);
    if spec["type"] == "Limited" {
        if spec["limited"].is_null() {
            errors.push(FieldError::required("spec.limited", "must not be empty when type is Limited"));
        }
        let path = Path::SPEC.field("limited");
        let path = path.field("limitResponse");
        required_one_of(&spec["limited"]["limitResponse"], "type", &["Queue", "Reject"], path, &mut errors);
    } else if !spec["limited"].is_null() {
        let detail = "must be nil if the type is not Limited";
        errors.push(FieldError::forbidden("spec.limited", detail));
    }
    errors
}
