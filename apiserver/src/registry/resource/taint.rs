//! `DeviceTaintRule`: taints devices of any slice, as an administrator wants it.

use apimachinery::status::FieldError;
use jiff::Timestamp;
use serde_json::Value;

use crate::registry::common::{self, ALL_METADATA, StatusOf};
use crate::registry::object::ObjectExt;
use crate::registry::strategy::{Column, Cx, Strategy, Subresource};
use crate::registry::tables::{age, name, since, text};
use crate::registry::{defaults, validation};
use crate::verbs::timestamp;

pub struct DeviceTaintRule;

static STATUS: StatusOf = StatusOf::new()
    .keeping(ALL_METADATA)
    .resetting(&[&["metadata"], &["spec"]])
    .validated(validation::resource::rule_status);

impl Strategy for DeviceTaintRule {
    fn default(&self, obj: &mut Value) {
        defaults::resource::stamp_taints(obj, &timestamp(Timestamp::now()));
    }

    fn prepare_for_create(&self, _cx: &Cx<'_>, obj: &mut Value) {
        common::create(obj);
    }

    /// Another effect is a new taint, whose time is that of the change.
    fn prepare_for_update(&self, cx: &Cx<'_>, obj: &mut Value, old: &Value) {
        const TIME: [&str; 3] = ["spec", "taint", "timeAdded"];
        let effect = |obj: &Value| obj.str_at(&["spec", "taint", "effect"]).to_owned();
        if effect(obj) != effect(old) && obj.at(&TIME) == old.at(&TIME) {
            obj.set(&TIME, timestamp(cx.now));
        }
        common::update(obj, old);
    }

    fn validate_create(&self, _cx: &Cx<'_>, obj: &Value) -> Vec<FieldError> {
        validation::resource::rule(obj, None)
    }

    fn validate_update(&self, _cx: &Cx<'_>, obj: &Value, old: &Value) -> Vec<FieldError> {
        validation::resource::rule(obj, Some(old))
    }

    fn allow_unconditional_update(&self) -> bool {
        false
    }

    fn columns(&self) -> &'static [Column] {
        const COLUMNS: &[Column] = &[
            Column::name(),
            Column::new("Key", "string"),
            Column::new("Value", "string"),
            Column::new("Effect", "string"),
            Column::new("TimeAdded", "string"),
            Column::age(),
        ];
        COLUMNS
    }

    fn row(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        let part = |field| text(obj, &["spec", "taint", field]);
        let added = &obj["spec"]["taint"]["timeAdded"];
        let added = if added.is_null() { String::new() } else { since(added, now) };
        vec![name(obj), part("key"), part("value"), part("effect"), added.into(), age(obj, now)]
    }

    fn subresource(&self, name: &str) -> Option<Subresource> {
        (name == "status").then_some(Subresource::Update(&STATUS))
    }
}
