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

static STATUS: StatusOf = StatusOf::new().validated(validation::storage::claim_status);

/// What can fill a new volume for clients that know only the older field; anything else they name is ignored, as it
/// always was. A source in another namespace belongs to a feature that is off.
fn drop_sources(obj: &mut Value, old: Option<&Value>) {
    let in_use = |field: &str| old.is_some_and(|old| !old["spec"][field].is_null());
    if !obj.str_at(&["spec", "dataSourceRef", "namespace"]).is_empty() && !in_use("dataSourceRef") {
        obj.remove_at(&["spec", "dataSourceRef"]);
    }
    if in_use("dataSource") || in_use("dataSourceRef") || !obj["spec"]["dataSourceRef"].is_null() {
        return;
    }
    let source = |field: &str| obj.str_at(&["spec", "dataSource", field]);
    let known = [("", "PersistentVolumeClaim"), ("snapshot.storage.k8s.io", "VolumeSnapshot")];
    if !known.contains(&(source("apiGroup"), source("kind"))) {
        obj.remove_at(&["spec", "dataSource"]);
    }
}

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
        drop_sources(obj, None);
        normalize_sources(obj);
    }

    fn prepare_for_update(&self, _cx: &Cx<'_>, obj: &mut Value, old: &Value) {
        common::update_uncounted(obj, old);
        drop_sources(obj, Some(old));
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_known_sources_are_taken_from_the_older_field() {
        let after = |spec: Value, old: Option<Value>| {
            let mut obj = json!({"spec": spec});
            drop_sources(&mut obj, old.as_ref());
            obj["spec"].take()
        };
        let snapshot =
            json!({"dataSource": {"apiGroup": "snapshot.storage.k8s.io", "kind": "VolumeSnapshot", "name": "s"}});
        assert_eq!(after(snapshot.clone(), None), snapshot);
        let other = json!({"dataSource": {"kind": "Zzz", "name": "s"}});
        assert_eq!(after(other.clone(), None), json!({}));
        assert_eq!(after(other.clone(), Some(json!({"spec": other}))), other);
        assert_eq!(after(json!({"dataSourceRef": {"kind": "X", "name": "t", "namespace": "n"}}), None), json!({}));
    }
}
