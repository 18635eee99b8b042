//! `ResourceSlice`: the devices that a driver has in one place.

use apimachinery::status::FieldError;
use jiff::Timestamp;
use serde_json::Value;

use super::drop_unused;
use crate::registry::common;
use crate::registry::object::ObjectExt;
use crate::registry::strategy::{Column, Cx, Strategy};
use crate::registry::tables::{age, name, text};
use crate::registry::{defaults, validation};
use crate::verbs::timestamp;

/// Taints of devices carry the time they were added.
pub struct ResourceSlice;

const COLUMNS: &[Column] = &[
    Column::name(),
    Column::new("Node", "string"),
    Column::new("Driver", "string"),
    Column::new("Pool", "string"),
    Column::age(),
];

/// Fields of features that are off.
const DISABLED: [&[&str]; 8] = [
    &["spec", "partitionTypeAttribute"],
    &["spec", "skipNodeOperations"],
    &["spec", "devices", "*", "consumesCounters", "*", "compatibilityGroups"],
    &["spec", "devices", "*", "nodeAllocatableResources"],
    &["spec", "devices", "*", "attributes", "*", "ints"],
    &["spec", "devices", "*", "attributes", "*", "bools"],
    &["spec", "devices", "*", "attributes", "*", "strings"],
    &["spec", "devices", "*", "attributes", "*", "versions"],
];

fn prepare(obj: &mut Value, old: Option<&Value>) {
    DISABLED.iter().for_each(|path| drop_unused(obj, old, path));
}

impl Strategy for ResourceSlice {
    fn default(&self, obj: &mut Value) {
        defaults::resource::stamp_taints(obj, &timestamp(Timestamp::now()));
    }

    fn prepare_for_create(&self, _cx: &Cx<'_>, obj: &mut Value) {
        prepare(obj, None);
        common::create_without_status(obj);
    }

    fn prepare_for_update(&self, _cx: &Cx<'_>, obj: &mut Value, old: &Value) {
        prepare(obj, Some(old));
        common::count_change(obj, old, common::same(&obj["spec"], &old["spec"]));
    }

    fn validate_create(&self, _cx: &Cx<'_>, obj: &Value) -> Vec<FieldError> {
        validation::resource::slice(obj)
    }

    fn validate_update(&self, _cx: &Cx<'_>, obj: &Value, old: &Value) -> Vec<FieldError> {
        validation::resource::slice_update(obj, old)
    }

    fn warnings(&self, _cx: &Cx<'_>, obj: &Value, _old: Option<&Value>) -> Vec<String> {
        let driver = obj.str_at(&["spec", "driver"]);
        let text = format!("spec.driver: driver names should be lowercase; {driver:?} contains uppercase characters");
        Vec::from_iter((driver != driver.to_lowercase()).then_some(text))
    }

    fn selectable_fields(&self) -> &'static [&'static str] {
        &["spec.nodeName", "spec.driver", "spec.pool.name"]
    }

    fn columns(&self) -> &'static [Column] {
        COLUMNS
    }

    fn row(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        vec![
            name(obj),
            text(obj, &["spec", "nodeName"]),
            text(obj, &["spec", "driver"]),
            text(obj, &["spec", "pool", "name"]),
            age(obj, now),
        ]
    }

    fn reset_fields(&self) -> &'static [&'static [&'static str]] {
        &[]
    }
}
