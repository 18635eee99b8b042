//! `PersistentVolumeClaim`: what a pod asks for; a volume is bound to it.

use apimachinery::status::FieldError;
use jiff::Timestamp;
use serde_json::{Value, json};

use super::persistent_volume::{phase, storage_class};
use crate::registry::common::{self, StatusOf};
use crate::registry::object::ObjectExt;
use crate::registry::strategy::{Column, Cx, Strategy, Subresource};
use crate::registry::tables::{UNSET, access_modes, age, name, text, text_or};
use crate::registry::{defaults, validation};

pub struct PersistentVolumeClaim;

const COLUMNS: &[Column] = &[
    Column::name(),
    Column::new("Status", "string"),
    Column::new("Volume", "string"),
    Column::new("Capacity", "string"),
    Column::new("Access Modes", "string"),
    Column::new("StorageClass", "string"),
    Column::new("VolumeAttributesClass", "string"),
    Column::age(),
    Column::new("VolumeMode", "string").wide(),
];

static STATUS: StatusOf = StatusOf::new();

/// `dataSource` and `dataSourceRef` say the same where either can.
fn normalize_sources(obj: &mut Value) {
    let Some(spec) = obj.get_mut("spec").filter(|spec| spec.is_object()) else { return };
    let (old, new) = (spec["dataSource"].clone(), spec["dataSourceRef"].clone());
    if !old.is_null() && new.is_null() {
        spec["dataSourceRef"] = old;
    } else if old.is_null() && !new.is_null() && new["namespace"].as_str().unwrap_or_default().is_empty() {
        spec["dataSource"] = new;
    }
}

impl Strategy for PersistentVolumeClaim {
    fn default(&self, obj: &mut Value) {
        defaults::core::claim(obj);
    }

    fn prepare_for_create(&self, _cx: &Cx<'_>, obj: &mut Value) {
        obj.set(&["status"], json!({"phase": "Pending"}));
        normalize_sources(obj);
    }

    fn prepare_for_update(&self, _cx: &Cx<'_>, obj: &mut Value, old: &Value) {
        common::update_uncounted(obj, old);
        normalize_sources(obj);
    }

    fn validate_create(&self, _cx: &Cx<'_>, obj: &Value) -> Vec<FieldError> {
        validation::storage::claim(obj)
    }

    fn validate_update(&self, _cx: &Cx<'_>, obj: &Value, old: &Value) -> Vec<FieldError> {
        validation::storage::claim_update(obj, old)
    }

    fn warnings(&self, _cx: &Cx<'_>, obj: &Value, _old: Option<&Value>) -> Vec<String> {
        validation::warnings::claim(obj)
    }

    fn columns(&self) -> &'static [Column] {
        COLUMNS
    }

    fn row(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        let bound = !obj.str_at(&["spec", "volumeName"]).is_empty();
        vec![
            name(obj),
            phase(obj),
            text(obj, &["spec", "volumeName"]),
            if bound { text_or(obj, &["status", "capacity", "storage"], "0") } else { "".into() },
            if bound { access_modes(&obj["status"]["accessModes"]).into() } else { "".into() },
            storage_class(obj),
            text_or(obj, &["spec", "volumeAttributesClassName"], UNSET),
            age(obj, now),
            text_or(obj, &["spec", "volumeMode"], UNSET),
        ]
    }

    fn subresource(&self, name: &str) -> Option<Subresource> {
        (name == "status").then_some(Subresource::Update(&STATUS))
    }
}
