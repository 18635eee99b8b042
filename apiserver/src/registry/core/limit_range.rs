//! `LimitRange`: what resources pods of a namespace may ask for, enforced by admission.

use apimachinery::status::FieldError;
use jiff::Timestamp;
use serde_json::Value;

use crate::registry::object::ObjectExt;
use crate::registry::strategy::{Column, Cx, Strategy};
use crate::registry::{defaults, validation};

pub struct LimitRange;

const COLUMNS: &[Column] = &[Column::name(), Column::new("Created At", "date")];

impl Strategy for LimitRange {
    fn default(&self, obj: &mut Value) {
        defaults::core::limit_range(obj);
    }

    fn prepare_for_create(&self, _cx: &Cx<'_>, obj: &mut Value) {
        if obj.name().is_empty() {
            obj.set(&["metadata", "name"], uuid::Uuid::new_v4().to_string());
        }
    }

    fn allow_create_on_update(&self) -> bool {
        true
    }

    fn prepare_for_update(&self, _cx: &Cx<'_>, _obj: &mut Value, _old: &Value) {}

    fn validate_create(&self, _cx: &Cx<'_>, obj: &Value) -> Vec<FieldError> {
        validation::core::limit_range(obj)
    }

    fn validate_update(&self, _cx: &Cx<'_>, obj: &Value, _old: &Value) -> Vec<FieldError> {
        validation::core::limit_range(obj)
    }

    fn columns(&self) -> &'static [Column] {
        COLUMNS
    }

    fn row(&self, obj: &Value, _now: Timestamp) -> Vec<Value> {
        vec![obj.name().into(), obj["metadata"]["creationTimestamp"].clone()]
    }

    fn reset_fields(&self) -> &'static [&'static [&'static str]] {
        &[]
    }
}
