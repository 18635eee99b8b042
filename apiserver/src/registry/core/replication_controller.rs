//! `ReplicationController`: the tutorial's first workload; a replica set with a plain map as selector.

use apimachinery::status::FieldError;
use jiff::Timestamp;
use serde_json::Value;

use crate::registry::common::{self, StatusOf};
use crate::registry::strategy::{Column, Cx, Propagation, ScalePaths, ScaleSelector, Strategy, Subresource};
use crate::registry::tables::{age, containers, labels, name, number};
use crate::registry::{defaults, validation};

pub struct ReplicationController;

const COLUMNS: &[Column] = &[
    Column::name(),
    Column::new("Desired", "integer"),
    Column::new("Current", "integer"),
    Column::new("Ready", "integer"),
    Column::age(),
    Column::new("Containers", "string").wide(),
    Column::new("Images", "string").wide(),
    Column::new("Selector", "string").wide(),
];

const SCALE: ScalePaths = ScalePaths {
    spec_replicas: &["spec", "replicas"],
    status_replicas: &["status", "replicas"],
    selector: ScaleSelector::Labels(&["spec", "selector"]),
};

static STATUS: StatusOf = StatusOf::new().validated(validation::apps::replica_set_status);

impl Strategy for ReplicationController {
    fn default(&self, obj: &mut Value) {
        defaults::apps::replication_controller(obj);
    }

    fn prepare_for_create(&self, _cx: &Cx<'_>, obj: &mut Value) {
        common::create(obj);
        obj["status"]["replicas"] = 0.into();
    }

    fn prepare_for_update(&self, _cx: &Cx<'_>, obj: &mut Value, old: &Value) {
        common::update(obj, old);
    }

    fn validate_create(&self, _cx: &Cx<'_>, obj: &Value) -> Vec<FieldError> {
        validation::apps::replication_controller(obj)
    }

    fn validate_update(&self, _cx: &Cx<'_>, obj: &Value, _old: &Value) -> Vec<FieldError> {
        validation::apps::replication_controller(obj)
    }

    fn warnings(&self, _cx: &Cx<'_>, obj: &Value, old: Option<&Value>) -> Vec<String> {
        validation::warnings::workload(obj, old, &["spec", "template"], true)
    }

    fn default_propagation(&self) -> Propagation {
        Propagation::Orphan
    }

    fn selectable_fields(&self) -> &'static [&'static str] {
        &["status.replicas"]
    }

    fn selectable_default(&self, _field: &str) -> &'static str {
        "0"
    }

    fn columns(&self) -> &'static [Column] {
        COLUMNS
    }

    fn row(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        let [names, images] = containers(&obj["spec"]["template"]["spec"]);
        vec![
            name(obj),
            number(obj, &["spec", "replicas"]),
            number(obj, &["status", "replicas"]),
            number(obj, &["status", "readyReplicas"]),
            age(obj, now),
            names,
            images,
            labels(&obj["spec"]["selector"]),
        ]
    }

    fn subresource(&self, name: &str) -> Option<Subresource> {
        match name {
            "status" => Some(Subresource::Update(&STATUS)),
            "scale" => Some(Subresource::Scale(SCALE)),
            _ => None,
        }
    }
}
