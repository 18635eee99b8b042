//! How objects are prepared for writing, for the many kinds that do it alike: status belongs to controllers, the
//! generation counts changes of the spec, the status subresource leaves the spec alone.

use apimachinery::status::FieldError;
use serde_json::{Map, Value};

use super::object::ObjectExt;
use super::strategy::{Cx, Strategy, keep};

/// Whether two values mean the same: absent, null, `""`, `[]` and `{}` do not differ.
pub fn same(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Object(a), Value::Object(b)) => {
            a.iter().all(|(key, value)| b.get(key).map_or_else(|| is_nothing(value), |other| same(value, other)))
                && b.iter().all(|(key, value)| a.contains_key(key) || is_nothing(value))
        }
        (Value::Array(a), Value::Array(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same(a, b)),
        _ => a == b || is_nothing(a) && is_nothing(b),
    }
}

/// Whether a value says nothing, all the way down. A field that is `false` or 0 says something.
pub fn is_nothing(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(map) => map.values().all(is_nothing),
        Value::Bool(_) | Value::Number(_) => false,
    }
}

/// A new object of a kind with status and generation.
pub fn create(obj: &mut Value) {
    empty_status(obj);
    set_generation(obj, 1);
}

/// A new object of a kind with a status but no generation.
pub fn create_uncounted(obj: &mut Value) {
    empty_status(obj);
}

/// A new object of a kind with a generation but no status.
pub fn create_without_status(obj: &mut Value) {
    set_generation(obj, 1);
}

/// An update of a kind with status and generation.
pub fn update(obj: &mut Value, old: &Value) {
    keep(obj, old, "status");
    count_change(obj, old, same(&obj["spec"], &old["spec"]));
}

/// An update of a kind with a status but no generation.
pub fn update_uncounted(obj: &mut Value, old: &Value) {
    keep(obj, old, "status");
}

/// The generation of `old`, plus one unless nothing changed that counts.
pub fn count_change(obj: &mut Value, old: &Value, unchanged: bool) {
    let generation = old.i64_at(&["metadata", "generation"]).unwrap_or(0);
    if generation != 0 || !unchanged {
        set_generation(obj, generation + i64::from(!unchanged));
    }
}

pub fn set_generation(obj: &mut Value, generation: i64) {
    obj.metadata_mut().insert("generation".into(), generation.into());
}

/// `status: {}`, which upstream's types always write.
pub fn empty_status(obj: &mut Value) {
    obj.set(&["status"], Value::Object(Map::new()));
}

/// Takes a field of `metadata` from the stored object.
pub fn keep_metadata(obj: &mut Value, old: &Value, fields: &[&str]) {
    for field in fields {
        match old.at(&["metadata", field]) {
            Some(value) => obj.metadata_mut().insert((*field).to_owned(), value.clone()),
            None => obj.metadata_mut().remove(*field),
        };
    }
}

/// The `status` subresource of a kind. Unlike the generic one it lets clients change labels and annotations with the
/// status, as upstream does for the kinds that are older than the stricter rule.
pub struct StatusOf {
    pub validate: fn(&Value, &Value) -> Vec<FieldError>,
    /// Fields of `metadata` that this way of writing leaves alone.
    pub kept: &'static [&'static str],
    /// What writers of the status never own.
    pub reset: &'static [&'static [&'static str]],
}

impl Default for StatusOf {
    fn default() -> Self {
        Self::new()
    }
}

impl StatusOf {
    pub const fn new() -> Self {
        Self { validate: |_, _| Vec::new(), kept: &["generation", "deletionTimestamp"], reset: &[&["spec"]] }
    }

    pub const fn keeping(mut self, metadata: &'static [&'static str]) -> Self {
        self.kept = metadata;
        self
    }

    pub const fn resetting(mut self, fields: &'static [&'static [&'static str]]) -> Self {
        self.reset = fields;
        self
    }

    pub const fn validated(mut self, rules: fn(&Value, &Value) -> Vec<FieldError>) -> Self {
        self.validate = rules;
        self
    }
}

/// What newer kinds keep of `metadata` when only the status may change.
pub const ALL_METADATA: &[&str] =
    &["generation", "deletionTimestamp", "labels", "annotations", "finalizers", "ownerReferences"];

impl Strategy for StatusOf {
    fn prepare_for_update(&self, _cx: &Cx<'_>, obj: &mut Value, old: &Value) {
        keep(obj, old, "spec");
        keep_metadata(obj, old, self.kept);
    }

    fn validate_update(&self, _cx: &Cx<'_>, obj: &Value, old: &Value) -> Vec<FieldError> {
        (self.validate)(obj, old)
    }

    fn reset_fields(&self) -> &'static [&'static [&'static str]] {
        self.reset
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn sameness_ignores_what_says_nothing() {
        let cases = [
            (json!({"a": 1, "labels": {}}), json!({"a": 1}), true),
            (json!({"a": null, "b": {"c": []}}), json!({}), true),
            (json!({"a": 0}), json!({}), false),
            (json!({"a": [1]}), json!({"a": [1, 2]}), false),
            (json!(null), json!({}), true),
        ];
        for (a, b, expected) in cases {
            assert_eq!(same(&a, &b), expected, "{a} {b}");
            assert_eq!(same(&b, &a), expected, "{b} {a}");
        }
    }

    #[test]
    fn the_generation_counts_changes_of_the_spec() {
        let old = json!({"metadata": {"generation": 4}, "spec": {"a": 1}, "status": {"b": 2}});
        let mut unchanged = json!({"metadata": {"generation": 9}, "spec": {"a": 1}, "status": {"b": 3}});
        update(&mut unchanged, &old);
        assert_eq!(unchanged, old);
        let mut changed = json!({"spec": {"a": 2}});
        update(&mut changed, &old);
        assert_eq!(changed, json!({"metadata": {"generation": 5}, "spec": {"a": 2}, "status": {"b": 2}}));
    }
}
