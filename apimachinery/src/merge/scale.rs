//! Who owns the replica count of an object, as its `scale` shows it. A scale has one field that somebody can own; whoever
//! owns it owns the count in the object, and the other way round.

use serde_json::{Value, json};

use super::fields::{FieldSet, FieldsError};
use super::managed::{self, Entry};

const SCALE_VERSION: &str = "autoscaling/v1";
const IN_SCALE: [&str; 2] = ["spec", "replicas"];

fn set_of(path: &[&str]) -> FieldSet {
    let mut set = FieldSet::default();
    set.insert_fields(path);
    set
}

/// The managed fields of the scale of an object with these, whose count is at `path`.
pub fn to_scale(managed_fields: &Value, path: &[&str]) -> Result<Value, FieldsError> {
    let count = set_of(path);
    let owners = managed::read(managed_fields.clone())?.into_iter().filter(|entry| count.is_subset(&entry.fields));
    let entries =
        owners.map(|entry| Entry { api_version: SCALE_VERSION.into(), fields: set_of(&IN_SCALE), ..entry }).collect();
    Ok(written(entries))
}

/// The managed fields of the object after its scale, which has these now, was changed.
pub fn to_object(
    managed_fields: &Value,
    of_scale: &Value,
    path: &[&str],
    api_version: &str,
) -> Result<Value, FieldsError> {
    let count = set_of(path);
    let mut owners = managed::read(of_scale.clone())?;
    let mut entries = Vec::new();
    for mut entry in managed::read(managed_fields.clone())? {
        if count.is_subset(&entry.fields) {
            match owners.iter().position(|owner| owner.is_same_manager(&entry)) {
                Some(index) => drop(owners.remove(index)),
                // Somebody else has the count now.
                None => entry.fields.subtract(&count),
            }
        }
        if !entry.fields.is_empty() {
            entries.push(entry);
        }
    }
    let new = owners.into_iter();
    entries.extend(new.map(|owner| Entry { api_version: api_version.into(), fields: set_of(path), ..owner }));
    Ok(written(entries))
}

fn written(entries: Vec<Entry>) -> Value {
    let mut holder = json!({"metadata": {}});
    managed::write(&mut holder, entries);
    managed::take(&mut holder)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_count_changes_hands_through_the_scale() {
        let entry = |manager: &str, operation: &str, fields: Value| json!({"manager": manager, "operation": operation, "apiVersion": "apps/v1", "fieldsType": "FieldsV1", "fieldsV1": fields});
        let object = json!([
            entry("a", "Apply", json!({"f:spec": {"f:replicas": {}, "f:paused": {}}})),
            entry("b", "Update", json!({"f:spec": {"f:paused": {}}})),
        ]);
        let scale = to_scale(&object, &["spec", "replicas"]).expect("well formed");
        assert_eq!(scale[0]["apiVersion"], "autoscaling/v1");
        assert_eq!(scale.as_array().map(Vec::len), Some(1));
        // Nothing happened.
        assert_eq!(to_object(&object, &scale, &["spec", "replicas"], "apps/v1").expect("well formed"), object);
        // Another took it.
        let mut taken = scale;
        taken[0]["manager"] = "c".into();
        taken[0]["subresource"] = "scale".into();
        let after = to_object(&object, &taken, &["spec", "replicas"], "apps/v1").expect("well formed");
        assert_eq!(after[0]["fieldsV1"], json!({"f:spec": {"f:paused": {}}}));
        assert_eq!((&after[1]["manager"], &after[1]["apiVersion"]), (&json!("c"), &json!("apps/v1")));
        assert_eq!(after[1]["fieldsV1"], json!({"f:spec": {"f:replicas": {}}}));
    }
}
