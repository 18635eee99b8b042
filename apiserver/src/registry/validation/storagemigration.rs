//! Rules for migrations of stored objects.

use apimachinery::meta::validation::{is_dns1035_label, is_dns1123_subdomain};
use apimachinery::status::FieldError;
use serde_json::Value;

use super::{Errors, IMMUTABLE, Path, conditions, immutable};
use crate::registry::object::ObjectExt;

pub fn migration(obj: &Value) -> Errors {
    let mut errors = Errors::new();
    let path = Path::SPEC.field("resource");
    let text = |field: &str| obj.str_at(&["spec", "resource", field]);
    let mut joined = |field: &str, messages: Vec<String>| {
        if !messages.is_empty() {
            errors.push(FieldError::invalid(path.field(field), text(field), messages.join(",")));
        }
    };
    if !text("group").is_empty() {
        joined("group", is_dns1123_subdomain(text("group")));
    }
    if text("resource").is_empty() {
        errors.push(FieldError::required(path.field("resource"), "resource is required to be set"));
    } else {
        joined("resource", is_dns1035_label(text("resource")));
    }
    errors
}

pub fn migration_update(obj: &Value, old: &Value) -> Errors {
    let mut errors = Errors::new();
    if !crate::registry::common::same(&obj["spec"], &old["spec"]) {
        errors.push(FieldError::invalid("spec", obj["spec"].clone(), IMMUTABLE));
    }
    errors
}

/// A migration ends once: what is true stays true, and only one of its ends is.
pub fn status_update(obj: &Value, old: &Value) -> Errors {
    let mut errors = Errors::new();
    let (status, path) = (&obj["status"], Path::STATUS);
    let revision = status.str_at(&["resourceVersion"]);
    if let Some(problem) = revision_problem(revision) {
        errors.push(FieldError::invalid(path.field("resourceVersion"), revision, problem));
    }
    conditions::conditions(status, path, &mut errors);
    if !old["status"].str_at(&["resourceVersion"]).is_empty() {
        immutable(status, &old["status"], "resourceVersion", path, &mut errors);
    }
    let mut invalid = |detail: &str| {
        errors.push(FieldError::invalid(path.field("conditions"), status["conditions"].clone(), detail));
    };
    if is_true(obj, "Succeeded") && is_true(obj, "Failed") {
        invalid("Both success and failed conditions cannot be true at the same time");
    }
    for (kind, name) in [("Succeeded", "Success"), ("Failed", "Failed")] {
        if is_true(old, kind) && !is_true(obj, kind) {
            invalid(&format!("{name} condition cannot be set to false once it is true"));
        }
    }
    errors
}

fn is_true(obj: &Value, kind: &str) -> bool {
    let conditions = obj.list_at(&["status", "conditions"]);
    conditions.iter().find(|condition| condition["type"] == kind).is_some_and(|condition| condition["status"] == "True")
}

/// Revisions are numbers of any length, without a zero before them; none is no mistake.
fn revision_problem(text: &str) -> Option<String> {
    let well_formed = !text.starts_with('0') && text.bytes().all(|b| b.is_ascii_digit());
    (!well_formed).then(|| format!("resource version is not well formed: {text}"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::tests::texts;
    use super::*;

    #[test]
    fn migrations_end_once() {
        let with = |kinds: &[&str]| {
            let conditions: Vec<Value> = kinds
                .iter()
                .map(|kind| json!({"type": kind, "status": "True", "reason": "R", "lastTransitionTime": "2020-01-01T00:00:00Z"}))
                .collect();
            json!({"status": {"conditions": conditions}})
        };
        let first = |errors: Errors| texts(&errors).first().map(|text| text.rsplit(": ").next().unwrap().to_owned());
        assert_eq!(first(status_update(&with(&["Succeeded"]), &with(&["Running"]))), None);
        let both = first(status_update(&with(&["Succeeded", "Failed"]), &with(&[])));
        assert_eq!(both.unwrap(), "Both success and failed conditions cannot be true at the same time");
        let undone = first(status_update(&with(&[]), &with(&["Failed"])));
        assert_eq!(undone.unwrap(), "Failed condition cannot be set to false once it is true");
    }
}
