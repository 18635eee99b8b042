//! `ConfigMap`: data for pods.

use apimachinery::status::FieldError;
use jiff::Timestamp;
use serde_json::Value;

use crate::registry::strategy::{Column, Cx, Strategy};
use crate::registry::tables::{age, count, name};
use crate::registry::validation;

pub struct ConfigMap;

const COLUMNS: &[Column] = &[Column::name(), Column::new("Data", "string"), Column::age()];

impl Strategy for ConfigMap {
    fn prepare_for_create(&self, _cx: &Cx<'_>, _obj: &mut Value) {}

    fn prepare_for_update(&self, _cx: &Cx<'_>, _obj: &mut Value, _old: &Value) {}

    fn validate_create(&self, _cx: &Cx<'_>, obj: &Value) -> Vec<FieldError> {
        validation::core::config_map(obj)
    }

    fn validate_update(&self, _cx: &Cx<'_>, obj: &Value, old: &Value) -> Vec<FieldError> {
        validation::core::config_map_update(obj, old)
    }

    fn columns(&self) -> &'static [Column] {
        COLUMNS
    }

    fn row(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        vec![name(obj), (count(&obj["data"]) + count(&obj["binaryData"])).into(), age(obj, now)]
    }

    fn reset_fields(&self) -> &'static [&'static [&'static str]] {
        &[]
    }
}
