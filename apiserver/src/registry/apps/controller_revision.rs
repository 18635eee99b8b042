//! `ControllerRevision`: an old template of a daemon set or stateful set, which never changes.

use apimachinery::meta::GroupVersion;
use apimachinery::status::FieldError;
use jiff::Timestamp;
use serde_json::Value;

use crate::registry::object::ObjectExt;
use crate::registry::strategy::{Column, Cx, Strategy};
use crate::registry::tables::{NONE, age, name, number};
use crate::registry::validation;

pub struct ControllerRevision;

const COLUMNS: &[Column] =
    &[Column::name(), Column::new("Controller", "string"), Column::new("Revision", "string"), Column::age()];

fn controller(obj: &Value) -> String {
    let owner = obj.list_at(&["metadata", "ownerReferences"]).iter().find(|owner| owner["controller"] == true);
    let Some(owner) = owner else { return NONE.into() };
    let group = GroupVersion::parse(owner.str_at(&["apiVersion"])).unwrap_or_default().group;
    let kind = owner.str_at(&["kind"]).to_lowercase();
    let name = owner.str_at(&["name"]);
    if group.is_empty() { format!("{kind}/{name}") } else { format!("{kind}.{group}/{name}") }
}

impl Strategy for ControllerRevision {
    fn prepare_for_create(&self, _cx: &Cx<'_>, _obj: &mut Value) {}

    fn prepare_for_update(&self, _cx: &Cx<'_>, _obj: &mut Value, _old: &Value) {}

    fn validate_create(&self, _cx: &Cx<'_>, obj: &Value) -> Vec<FieldError> {
        validation::apps::controller_revision(obj)
    }

    fn validate_update(&self, _cx: &Cx<'_>, obj: &Value, old: &Value) -> Vec<FieldError> {
        validation::apps::controller_revision_update(obj, old)
    }

    fn columns(&self) -> &'static [Column] {
        COLUMNS
    }

    fn row(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        vec![name(obj), controller(obj).into(), number(obj, &["revision"]), age(obj, now)]
    }

    fn reset_fields(&self) -> &'static [&'static [&'static str]] {
        &[]
    }
}
