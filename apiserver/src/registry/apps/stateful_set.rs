//! `StatefulSet`: pods with names and volumes of their own.

use apimachinery::status::FieldError;
use jiff::Timestamp;
use serde_json::Value;

use super::deployment::{SCALE, ready_of_desired};
use crate::registry::common::{self, StatusOf};
use crate::registry::object::ObjectExt;
use crate::registry::strategy::{Column, Cx, NameRule, Strategy, Subresource};
use crate::registry::tables::{age, containers, name};
use crate::registry::{defaults, validation};

pub struct StatefulSet;

const COLUMNS: &[Column] = &[
    Column::name(),
    Column::new("Ready", "string"),
    Column::age(),
    Column::new("Containers", "string").wide(),
    Column::new("Images", "string").wide(),
];

static STATUS: StatusOf = StatusOf::new().validated(validation::apps::stateful_set_status);

impl Strategy for StatefulSet {
    fn default(&self, obj: &mut Value) {
        defaults::apps::stateful_set(obj);
    }

    fn prepare_for_create(&self, _cx: &Cx<'_>, obj: &mut Value) {
        common::create(obj);
        obj["status"]["replicas"] = 0.into();
        obj["status"]["availableReplicas"] = 0.into();
    }

    fn prepare_for_update(&self, _cx: &Cx<'_>, obj: &mut Value, old: &Value) {
        common::update(obj, old);
    }

    fn validate_create(&self, _cx: &Cx<'_>, obj: &Value) -> Vec<FieldError> {
        validation::apps::stateful_set(obj)
    }

    fn validate_update(&self, _cx: &Cx<'_>, obj: &Value, old: &Value) -> Vec<FieldError> {
        validation::apps::stateful_set_update(obj, old)
    }

    fn warnings(&self, _cx: &Cx<'_>, obj: &Value, old: Option<&Value>) -> Vec<String> {
        let mut warnings = validation::warnings::workload(obj, old, &["spec", "template"], false);
        if obj.i64_at(&["spec", "revisionHistoryLimit"]).is_some_and(|limit| limit < 0) {
            let text = "spec.revisionHistoryLimit: a negative value retains all historical revisions; a value >= 0 is recommended";
            warnings.push(text.into());
        }
        warnings
    }

    /// Pods are named after their set, which must leave a DNS label.
    fn name_rule(&self) -> NameRule {
        NameRule::Dns1123Label
    }

    fn columns(&self) -> &'static [Column] {
        COLUMNS
    }

    fn row(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        let [names, images] = containers(&obj["spec"]["template"]["spec"]);
        vec![name(obj), ready_of_desired(obj), age(obj, now), names, images]
    }

    fn subresource(&self, name: &str) -> Option<Subresource> {
        match name {
            "status" => Some(Subresource::Update(&STATUS)),
            "scale" => Some(Subresource::Scale(SCALE)),
            _ => None,
        }
    }
}
