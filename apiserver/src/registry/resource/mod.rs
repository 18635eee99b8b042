//! The `resource.k8s.io` group: devices that pods claim.

use apimachinery::status::FieldError;
use jiff::Timestamp;
use serde_json::Value;

use super::common::{self, ALL_METADATA, StatusOf};
use super::declared::{Declared, Shape};
use super::object::ObjectExt;
use super::strategy::{Column, Cx, Strategy};
use super::tables::{age, name, text};
use super::{defaults, validation};

static CLAIM_STATUS: StatusOf = StatusOf::new().keeping(ALL_METADATA);

pub static RESOURCE_CLAIM: Declared = Declared::new(Shape::WithStatus)
    .defaults(defaults::resource::claim)
    .status(&CLAIM_STATUS)
    .update_rules(validation::scheduling::resource_claim_update)
    .table(&[Column::name(), Column::new("State", "string"), Column::age()], |obj, now| {
        vec![name(obj), claim_state(obj).into(), age(obj, now)]
    });

fn claim_state(obj: &Value) -> String {
    let allocated = obj["status"]["allocation"].is_object();
    let mut states = Vec::new();
    if obj.is_being_deleted() {
        states.push("deleted");
    } else if !allocated {
        states.push("pending");
    }
    if allocated {
        states.push("allocated");
        if !obj.list_at(&["status", "reservedFor"]).is_empty() {
            states.push("reserved");
        }
    }
    states.join(",")
}

pub static RESOURCE_CLAIM_TEMPLATE: Declared = Declared::new(Shape::Plain)
    .defaults(defaults::resource::claim_template)
    .update_rules(validation::scheduling::spec_immutable);

pub static DEVICE_CLASS: Declared = Declared::new(Shape::Counted);

/// Taints of devices carry the time they were added.
pub struct ResourceSlice;

const SLICE_COLUMNS: &[Column] = &[
    Column::name(),
    Column::new("Node", "string"),
    Column::new("Driver", "string"),
    Column::new("Pool", "string"),
    Column::age(),
];

fn stamp(cx: &Cx<'_>, obj: &mut Value) {
    defaults::resource::stamp_taints(obj, &cx.now.strftime("%Y-%m-%dT%H:%M:%SZ").to_string());
}

impl Strategy for ResourceSlice {
    fn prepare_for_create(&self, cx: &Cx<'_>, obj: &mut Value) {
        stamp(cx, obj);
        common::create_without_status(obj);
    }

    fn prepare_for_update(&self, cx: &Cx<'_>, obj: &mut Value, old: &Value) {
        stamp(cx, obj);
        common::count_change(obj, old, common::same(&obj["spec"], &old["spec"]));
    }

    fn validate_update(&self, _cx: &Cx<'_>, obj: &Value, old: &Value) -> Vec<FieldError> {
        validation::scheduling::resource_slice_update(obj, old)
    }

    fn selectable_fields(&self) -> &'static [&'static str] {
        &["spec.nodeName", "spec.driver"]
    }

    fn columns(&self) -> &'static [Column] {
        SLICE_COLUMNS
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
