//! The `resource.k8s.io` group: devices that pods claim.

mod claim;
mod slice;
mod taint;

pub use claim::{ResourceClaim, ResourceClaimTemplate};
use serde_json::Value;
pub use slice::ResourceSlice;
pub use taint::DeviceTaintRule;

use super::declared::{Declared, Shape};
use super::object::ObjectExt;
use super::validation;

pub static DEVICE_CLASS: Declared = Declared::new(Shape::Counted)
    .create_rules(validation::resource::class)
    .rules_of_updates(validation::resource::class_update);

/// Takes out what belongs to features that are off, unless the stored object has it. A step `*` stands for every item
/// of a list and every entry of a map.
fn drop_unused(obj: &mut Value, old: Option<&Value>, path: &[&str]) {
    if old.is_none_or(|old| !is_used(old, path)) {
        drop_all(obj, path);
    }
}

fn is_used(value: &Value, path: &[&str]) -> bool {
    match (path, value) {
        ([], value) => !value.is_null(),
        (["*", rest @ ..], Value::Array(items)) => items.iter().any(|item| is_used(item, rest)),
        (["*", rest @ ..], Value::Object(entries)) => entries.values().any(|entry| is_used(entry, rest)),
        ([field, rest @ ..], value) => value.at(&[field]).is_some_and(|value| is_used(value, rest)),
    }
}

fn drop_all(value: &mut Value, path: &[&str]) {
    match (path, value) {
        ([field], value) => {
            value.remove_at(&[field]);
        }
        (["*", rest @ ..], Value::Array(items)) => items.iter_mut().for_each(|item| drop_all(item, rest)),
        (["*", rest @ ..], Value::Object(entries)) => entries.values_mut().for_each(|entry| drop_all(entry, rest)),
        ([field, rest @ ..], value) => {
            if let Some(value) = value.at_mut(&[field]) {
                drop_all(value, rest);
            }
        }
        ([], _) => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn fields_of_features_that_are_off_go_unless_they_are_stored() {
        let path = ["devices", "*", "attributes", "*", "ints"];
        let given = || json!({"devices": [{"attributes": {"a": {"ints": [1]}, "b": {"int": 1}}}]});
        let mut fresh = given();
        drop_unused(&mut fresh, None, &path);
        assert_eq!(fresh, json!({"devices": [{"attributes": {"a": {}, "b": {"int": 1}}}]}));
        let mut changed = given();
        drop_unused(&mut changed, Some(&given()), &path);
        assert_eq!(changed, given());
    }
}
