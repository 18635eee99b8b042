//! What the server fills into an object that a user left out: upstream's defaults, kind by kind, written on the tree.
//! Defaulting is idempotent, never removes what a user wrote, never looks at other objects and never fails: a tree of
//! an unexpected shape is left alone, validation will name what is wrong with it.

pub mod admission;
pub mod apps;
pub mod autoscaling;
pub mod batch;
pub mod core;
pub mod flowcontrol;
pub mod networking;
pub mod pod;
pub mod resource;
pub mod service;
pub mod storage;
pub mod volume;

use serde_json::{Map, Value};

/// Sets a field that is absent or null.
pub fn default(obj: &mut Value, key: &str, value: impl Into<Value>) {
    let Some(map) = obj.as_object_mut() else { return };
    match map.get(key) {
        None | Some(Value::Null) => {
            map.insert(key.to_owned(), value.into());
        }
        Some(_) => {}
    }
}

/// Sets a field that is absent, null or its type's zero (`""`, `0`, `[]`): for fields where upstream cannot tell them apart.
pub fn default_zero(obj: &mut Value, key: &str, value: impl Into<Value>) {
    if is_zero(&obj[key])
        && let Some(map) = obj.as_object_mut()
    {
        map.insert(key.to_owned(), value.into());
    }
}

/// Whether upstream's types could not tell this value from one that was never given.
pub fn is_zero(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(s) => s.is_empty(),
        Value::Number(n) => n.as_f64() == Some(0.0),
        Value::Array(a) => a.is_empty(),
        Value::Object(o) => o.is_empty(),
        Value::Bool(b) => !b,
    }
}

/// Runs `f` on the object under `key`, which is created when it is absent or null.
pub fn within(obj: &mut Value, key: &str, f: impl FnOnce(&mut Value)) {
    let Some(map) = obj.as_object_mut() else { return };
    let child = map.entry(key).or_insert(Value::Null);
    if child.is_null() {
        *child = Value::Object(Map::new());
    }
    if child.is_object() {
        f(child);
    }
}

/// Runs `f` on the object under `key` when there is one.
pub fn existing(obj: &mut Value, key: &str, f: impl FnOnce(&mut Value)) {
    if let Some(child) = obj.get_mut(key).filter(|c| c.is_object()) {
        f(child);
    }
}

/// Runs `f` on every object in the list under `key`.
pub fn each(obj: &mut Value, key: &str, f: impl FnMut(&mut Value)) {
    if let Some(items) = obj.get_mut(key).and_then(Value::as_array_mut) {
        items.iter_mut().filter(|i| i.is_object()).for_each(f);
    }
}

/// Copies into the map under `to` every entry of the map under `from` whose key is missing there.
pub fn default_entries(obj: &mut Value, to: &str, from: &str) {
    let Some(source) = obj.get(from).and_then(Value::as_object).filter(|m| !m.is_empty()).cloned() else { return };
    within(obj, to, |target| {
        for (key, value) in source {
            default(target, &key, value);
        }
    });
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_what_is_missing_is_filled_in() {
        let mut obj = json!({"a": 1, "b": null, "c": "", "l": {"cpu": "1"}, "r": {"memory": "2"}});
        default(&mut obj, "a", 2);
        default(&mut obj, "b", 2);
        default(&mut obj, "c", "x");
        default_zero(&mut obj, "c", "y");
        default_entries(&mut obj, "r", "l");
        within(&mut obj, "d", |d| default(d, "e", true));
        existing(&mut obj, "none", |n| default(n, "e", true));
        assert_eq!(
            obj,
            json!({"a": 1, "b": 2, "c": "y", "l": {"cpu": "1"}, "r": {"memory": "2", "cpu": "1"}, "d": {"e": true}})
        );
    }

    #[test]
    fn trees_of_an_unexpected_shape_are_left_alone() {
        for shape in [json!(null), json!("text"), json!([1]), json!({"spec": 3, "list": "x"})] {
            let mut obj = shape.clone();
            within(&mut obj, "spec", |s| default(s, "a", 1));
            each(&mut obj, "list", |s| default(s, "a", 1));
            assert_eq!(obj, shape);
        }
    }
}
