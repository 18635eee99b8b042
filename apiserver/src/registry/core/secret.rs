//! `Secret`: data for pods that not everybody may read. `stringData` is write-only and merged into `data`.

use apimachinery::status::FieldError;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;
use serde_json::Value;

use crate::registry::object::ObjectExt;
use crate::registry::strategy::{Column, Cx, Strategy};
use crate::registry::tables::{age, count, name, text};
use crate::registry::{defaults, validation};

pub struct Secret;

const COLUMNS: &[Column] =
    &[Column::name(), Column::new("Type", "string"), Column::new("Data", "string"), Column::age()];

/// Moves `stringData`, which is write-only, into `data`.
fn merge_string_data(obj: &mut Value) {
    let Some(Value::Object(strings)) = obj.remove_at(&["stringData"]) else { return };
    for (key, value) in strings {
        if let Some(text) = value.as_str() {
            obj.ensure_object(&["data"]).insert(key, STANDARD.encode(text).into());
        }
    }
}

impl Strategy for Secret {
    fn default(&self, obj: &mut Value) {
        merge_string_data(obj);
        defaults::core::secret(obj);
    }

    fn prepare_for_create(&self, _cx: &Cx<'_>, _obj: &mut Value) {}

    fn prepare_for_update(&self, _cx: &Cx<'_>, _obj: &mut Value, _old: &Value) {}

    fn validate_create(&self, _cx: &Cx<'_>, obj: &Value) -> Vec<FieldError> {
        validation::core::secret(obj)
    }

    fn validate_update(&self, _cx: &Cx<'_>, obj: &Value, old: &Value) -> Vec<FieldError> {
        validation::core::secret_update(obj, old)
    }

    fn selectable_fields(&self) -> &'static [&'static str] {
        &["type"]
    }

    fn columns(&self) -> &'static [Column] {
        COLUMNS
    }

    fn row(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        vec![name(obj), text(obj, &["type"]), count(&obj["data"]).into(), age(obj, now)]
    }

    fn reset_fields(&self) -> &'static [&'static [&'static str]] {
        &[]
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn plain_strings_become_data() {
        let mut obj = json!({"stringData": {"a": "hi"}, "data": {"a": "eA==", "b": "eA=="}});
        Secret.default(&mut obj);
        assert_eq!(obj, json!({"data": {"a": "aGk=", "b": "eA=="}, "type": "Opaque"}));
    }
}
