//! Rules for conditions of the newer form, whose type, status, reason and time are all needed.

use apimachinery::meta::validation::is_qualified_name;
use apimachinery::status::FieldError;
use serde_json::Value;

use super::{Errors, Path, complain, each, required_one_of};
use crate::registry::object::ObjectExt;

const STATUSES: [&str; 3] = ["False", "True", "Unknown"];
const REASON_MAX: usize = 1024;
const MESSAGE_MAX: usize = 32 * 1024;
const REASON_SHAPE: &str = "a condition reason must start with alphabetic character, optionally followed by a string of \
     alphanumeric characters or '_,:', and must end with an alphanumeric character or '_' (e.g. 'my_name',  or 'MY_NAME',  \
     or 'MyName',  or 'ReasonA,ReasonB',  or 'ReasonA:ReasonB', regex used for validation is '[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?')";

/// The conditions in the status at `path`.
pub fn conditions(status: &Value, path: Path<'_>, errors: &mut Errors) {
    let mut seen: Vec<String> = Vec::new();
    each(status, "conditions", path, errors, |condition, path, errors| {
        let kind = condition.str_at(&["type"]);
        if seen.iter().any(|known| known == kind) {
            errors.push(FieldError::duplicate(path, kind));
        }
        seen.push(kind.to_owned());
        check(condition, path, errors);
    });
}

fn check(condition: &Value, path: Path<'_>, errors: &mut Errors) {
    let kind = condition.str_at(&["type"]);
    if kind.is_empty() {
        errors.push(FieldError::required(path.field("type"), "is required"));
    } else {
        complain(is_qualified_name(kind), kind, path.field("type"), errors);
    }
    required_one_of(condition, "status", &STATUSES, path, errors);
    if let Some(generation) = condition["observedGeneration"].as_i64().filter(|generation| *generation < 0) {
        let detail = "must be greater than or equal to zero";
        errors.push(FieldError::invalid(path.field("observedGeneration"), generation, detail));
    }
    if condition["lastTransitionTime"].is_null() {
        errors.push(FieldError::required(path.field("lastTransitionTime"), ""));
    }
    let reason = condition.str_at(&["reason"]);
    if reason.is_empty() {
        errors.push(FieldError::required(path.field("reason"), ""));
    } else if !is_reason(reason) {
        errors.push(FieldError::invalid(path.field("reason"), reason, REASON_SHAPE));
    }
    for (field, max) in [("reason", REASON_MAX), ("message", MESSAGE_MAX)] {
        if condition.str_at(&[field]).len() > max {
            errors.push(FieldError::too_long(path.field(field), max));
        }
    }
}

fn is_reason(text: &str) -> bool {
    let inner = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | ',' | ':');
    text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text.ends_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
        && text.chars().all(inner)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::tests::texts;
    use super::*;

    #[test]
    fn conditions_are_complete() {
        let good = json!({"type": "Ready", "status": "True", "reason": "All_good", "lastTransitionTime": "2020-01-01T00:00:00Z"});
        let with = |field: &str, value: Value| {
            let mut condition = good.clone();
            condition[field] = value;
            condition
        };
        let cases = [
            (vec![good.clone()], vec![]),
            (vec![good.clone(), good.clone()], vec![r#"status.conditions[1]: Duplicate value: "Ready""#]),
            (vec![with("type", json!(""))], vec!["status.conditions[0].type: Required value: is required"]),
            (
                vec![with("status", json!("Maybe"))],
                vec![
                    r#"status.conditions[0].status: Unsupported value: "Maybe": supported values: "False", "True", "Unknown""#,
                ],
            ),
            (
                vec![with("lastTransitionTime", Value::Null)],
                vec!["status.conditions[0].lastTransitionTime: Required value"],
            ),
        ];
        for (conditions_of_case, expected) in cases {
            let mut errors = Errors::new();
            conditions(&json!({"conditions": conditions_of_case}), Path::STATUS, &mut errors);
            assert_eq!(texts(&errors), expected);
        }
        assert!(!is_reason("1a") && !is_reason("a:") && is_reason("ReasonA:ReasonB"));
    }
}
