//! `Deployment`: rolls replica sets forward and back.

use apimachinery::status::FieldError;
use jiff::Timestamp;
use serde_json::Value;

use crate::registry::common::{self, StatusOf};
use crate::registry::object::ObjectExt;
use crate::registry::strategy::{Column, Cx, ScalePaths, ScaleSelector, Strategy, Subresource, keep};
use crate::registry::tables::{age, containers, name, number, selector_text};
use crate::registry::{defaults, validation};

pub struct Deployment;

const COLUMNS: &[Column] = &[
    Column::name(),
    Column::new("Ready", "string"),
    Column::new("Up-to-date", "string"),
    Column::new("Available", "string"),
    Column::age(),
    Column::new("Containers", "string").wide(),
    Column::new("Images", "string").wide(),
    Column::new("Selector", "string").wide(),
];

/// What deployments, replica sets and stateful sets have in common.
pub const SCALE: ScalePaths = ScalePaths {
    spec_replicas: &["spec", "replicas"],
    status_replicas: &["status", "replicas"],
    selector: ScaleSelector::Selector(&["spec", "selector"]),
};

static STATUS: StatusOf = StatusOf::new()
    .keeping(&["generation", "deletionTimestamp", "labels"])
    .resetting(&[&["spec"], &["metadata", "labels"]])
    .validated(validation::apps::deployment_status);

/// `3/5`: ready and desired replicas.
pub fn ready_of_desired(obj: &Value) -> Value {
    let count = |path: &[&str]| obj.i64_at(path).unwrap_or(0);
    format!("{}/{}", count(&["status", "readyReplicas"]), count(&["spec", "replicas"])).into()
}

impl Strategy for Deployment {
    fn default(&self, obj: &mut Value) {
        defaults::apps::deployment(obj);
    }

    fn prepare_for_create(&self, _cx: &Cx<'_>, obj: &mut Value) {
        common::create(obj);
    }

    /// A change of the annotations counts too: it reaches the replica set.
    fn prepare_for_update(&self, _cx: &Cx<'_>, obj: &mut Value, old: &Value) {
        keep(obj, old, "status");
        let unchanged = common::same(&obj["spec"], &old["spec"])
            && common::same(&obj["metadata"]["annotations"], &old["metadata"]["annotations"]);
        common::count_change(obj, old, unchanged);
    }

    fn validate_create(&self, _cx: &Cx<'_>, obj: &Value) -> Vec<FieldError> {
        validation::apps::deployment(obj)
    }

    fn validate_update(&self, _cx: &Cx<'_>, obj: &Value, old: &Value) -> Vec<FieldError> {
        validation::apps::deployment_update(obj, old)
    }

    fn warnings(&self, _cx: &Cx<'_>, obj: &Value, old: Option<&Value>) -> Vec<String> {
        validation::warnings::workload(obj, old, &["spec", "template"], true)
    }

    fn columns(&self) -> &'static [Column] {
        COLUMNS
    }

    fn row(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        let [names, images] = containers(&obj["spec"]["template"]["spec"]);
        vec![
            name(obj),
            ready_of_desired(obj),
            number(obj, &["status", "updatedReplicas"]),
            number(obj, &["status", "availableReplicas"]),
            age(obj, now),
            names,
            images,
            selector_text(&obj["spec"]["selector"]).into(),
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_row_of_a_rolling_deployment() {
        let obj = json!({"metadata": {"name": "web"}, "spec": {"replicas": 3, "selector": {"matchLabels": {"app": "web"}},
            "template": {"spec": {"containers": [{"name": "a", "image": "x"}, {"name": "b", "image": "y"}]}}},
            "status": {"readyReplicas": 2, "updatedReplicas": 1, "availableReplicas": 2}});
        let expected = json!(["web", "2/3", 1, 2, "<unknown>", "a,b", "x,y", "app=web"]);
        assert_eq!(json!(Deployment.row(&obj, Timestamp::UNIX_EPOCH)), expected);
    }
}
