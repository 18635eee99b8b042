//! Rules for priority classes and runtime classes.

use apimachinery::meta::validation::is_dns1123_label;
use apimachinery::status::FieldError;
use serde_json::Value;

use super::{Errors, IMMUTABLE, Path, complain, placement, requirements};
use crate::registry::common::same;
use crate::registry::object::ObjectExt;

/// What users may define; above are the system's own classes.
const HIGHEST_USER_PRIORITY: i64 = 1_000_000_000;
const SYSTEM_PREFIX: &str = "system-";
const SYSTEM_CLASSES: [(&str, i64); 2] =
    [("system-cluster-critical", 2_000_000_000), ("system-node-critical", 2_000_001_000)];

pub fn priority_class(obj: &Value) -> Errors {
    let mut errors = Errors::new();
    let value = obj.i64_at(&["value"]).unwrap_or(0);
    let name = obj.name();
    if name.starts_with(SYSTEM_PREFIX) {
        let problem = match SYSTEM_CLASSES.iter().find(|(known, _)| *known == name) {
            None => Some(format!("{name} is not a known system priority class")),
            Some((_, wanted)) if *wanted != value => Some(format!("value of {name} PriorityClass must be {wanted}")),
            Some(_) if obj["globalDefault"] == true => {
                Some(format!("globalDefault of {name} PriorityClass must be false"))
            }
            Some(_) => None,
        };
        if let Some(problem) = problem {
            let detail = format!(
                "priority class names with '{SYSTEM_PREFIX}' prefix are reserved for system use only. error: {problem}"
            );
            errors.push(FieldError::forbidden("metadata.name", detail));
        }
    } else if value > HIGHEST_USER_PRIORITY {
        let detail = format!("maximum allowed value of a user defined priority is {HIGHEST_USER_PRIORITY}");
        errors.push(FieldError::forbidden("value", detail));
    }
    match obj["preemptionPolicy"].as_str() {
        None | Some("PreemptLowerPriority" | "Never") => {}
        Some("") => errors.push(FieldError::required("preemptionPolicy", "")),
        Some(other) => {
            errors.push(FieldError::not_supported("preemptionPolicy", other, &["PreemptLowerPriority", "Never"]));
        }
    }
    errors
}

pub fn priority_class_update(obj: &Value, old: &Value) -> Errors {
    let mut errors = Errors::new();
    if obj.i64_at(&["value"]) != old.i64_at(&["value"]) {
        errors.push(FieldError::forbidden("value", "may not be changed in an update."));
    }
    if obj["preemptionPolicy"] != old["preemptionPolicy"] {
        errors.push(FieldError::invalid("preemptionPolicy", obj["preemptionPolicy"].clone(), IMMUTABLE));
    }
    errors
}

fn handler<'v>(obj: &'v Value, errors: &mut Errors) -> Option<&'v str> {
    let handler = obj.str_at(&["handler"]);
    if handler.is_empty() {
        errors.push(FieldError::required("handler", ""));
        return None;
    }
    Some(handler)
}

pub fn runtime_class(obj: &Value) -> Errors {
    let mut errors = Errors::new();
    if let Some(handler) = handler(obj, &mut errors) {
        complain(is_dns1123_label(handler), handler, Path::Root("handler"), &mut errors);
    }
    let limits = serde_json::json!({"limits": obj["overhead"]["podFixed"]});
    requirements::resources(&limits, &[], Path::Root("overhead"), &mut errors);
    let path = Path::Root("scheduling");
    super::labels(&obj["scheduling"]["nodeSelector"], path.field("nodeSelector"), &mut errors);
    let mut seen: Vec<Value> = Vec::new();
    super::each(&obj["scheduling"], "tolerations", path, &mut errors, |toleration, path, errors| {
        placement::toleration(toleration, path, errors);
        let mut key = toleration.clone();
        key.remove_at(&["tolerationSeconds"]);
        if seen.iter().any(|known| same(known, &key)) {
            errors.push(FieldError::duplicate(path, toleration.clone()));
        }
        seen.push(key);
    });
    errors
}

pub fn runtime_class_update(obj: &Value, old: &Value) -> Errors {
    let mut errors = Errors::new();
    if obj["handler"] != old["handler"] {
        // The declared rule does not show the value.
        errors.push(FieldError::invalid_null("handler", IMMUTABLE));
    }
    errors
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::tests::texts;
    use super::*;

    #[test]
    fn the_systems_names_and_values_are_its_own() {
        let class =
            |name: &str, value: i64| texts(&priority_class(&json!({"metadata": {"name": name}, "value": value})));
        assert!(class("high", 1000).is_empty() && class("system-node-critical", 2_000_001_000).is_empty());
        assert_eq!(
            class("high", 2_000_000_000),
            ["value: Forbidden: maximum allowed value of a user defined priority is 1000000000"]
        );
        let reserved = "metadata.name: Forbidden: priority class names with 'system-' prefix are reserved for system use only. error: system-x is not a known system priority class";
        assert_eq!(class("system-x", 1), [reserved]);
    }
}
