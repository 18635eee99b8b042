//! `DaemonSet`: one pod on every node that fits.

use apimachinery::status::FieldError;
use jiff::Timestamp;
use serde_json::Value;

use crate::registry::common::{self, StatusOf};
use crate::registry::object::ObjectExt;
use crate::registry::strategy::{Column, Cx, Strategy, Subresource};
use crate::registry::tables::{age, containers, labels, name, number, selector};
use crate::registry::{defaults, validation};

pub struct DaemonSet;

const COLUMNS: &[Column] = &[
    Column::name(),
    Column::new("Desired", "integer"),
    Column::new("Current", "integer"),
    Column::new("Ready", "integer"),
    Column::new("Up-to-date", "integer"),
    Column::new("Available", "integer"),
    Column::new("Node Selector", "string"),
    Column::age(),
    Column::new("Containers", "string").wide(),
    Column::new("Images", "string").wide(),
    Column::new("Selector", "string").wide(),
];

/// Counts that the status always carries, even as zero.
const COUNTS: [&str; 4] = ["currentNumberScheduled", "numberMisscheduled", "desiredNumberScheduled", "numberReady"];

/// Counts templates; only the oldest clients look at it, under this annotation.
const TEMPLATE_GENERATION: &str = "deprecated.daemonset.template.generation";

static STATUS: StatusOf = StatusOf::new();

fn set_template_generation(obj: &mut Value, generation: i64) {
    obj.ensure_object(&["metadata", "annotations"]).insert(TEMPLATE_GENERATION.into(), generation.to_string().into());
}

impl Strategy for DaemonSet {
    fn default(&self, obj: &mut Value) {
        defaults::apps::daemon_set(obj);
    }

    fn prepare_for_create(&self, _cx: &Cx<'_>, obj: &mut Value) {
        common::create(obj);
        for count in COUNTS {
            obj["status"][count] = 0.into();
        }
        let given = obj.annotation(TEMPLATE_GENERATION).and_then(|text| text.parse().ok()).unwrap_or(0);
        set_template_generation(obj, i64::max(given, 1));
    }

    fn prepare_for_update(&self, _cx: &Cx<'_>, obj: &mut Value, old: &Value) {
        let changed = !common::same(&obj["spec"]["template"], &old["spec"]["template"]);
        let stored: i64 = old.annotation(TEMPLATE_GENERATION).and_then(|text| text.parse().ok()).unwrap_or(0);
        if stored + i64::from(changed) > 0 {
            set_template_generation(obj, stored + i64::from(changed));
        }
        common::update(obj, old);
    }

    fn validate_create(&self, _cx: &Cx<'_>, obj: &Value) -> Vec<FieldError> {
        validation::apps::daemon_set(obj)
    }

    fn validate_update(&self, _cx: &Cx<'_>, obj: &Value, old: &Value) -> Vec<FieldError> {
        validation::apps::daemon_set_update(obj, old)
    }

    fn warnings(&self, _cx: &Cx<'_>, obj: &Value, old: Option<&Value>) -> Vec<String> {
        validation::warnings::workload(obj, old, &["spec", "template"], false)
    }

    fn columns(&self) -> &'static [Column] {
        COLUMNS
    }

    fn row(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        let [names, images] = containers(&obj["spec"]["template"]["spec"]);
        vec![
            name(obj),
            number(obj, &["status", "desiredNumberScheduled"]),
            number(obj, &["status", "currentNumberScheduled"]),
            number(obj, &["status", "numberReady"]),
            number(obj, &["status", "updatedNumberScheduled"]),
            number(obj, &["status", "numberAvailable"]),
            labels(&obj["spec"]["template"]["spec"]["nodeSelector"]),
            age(obj, now),
            names,
            images,
            selector(&obj["spec"]["selector"]),
        ]
    }

    fn subresource(&self, name: &str) -> Option<Subresource> {
        (name == "status").then_some(Subresource::Update(&STATUS))
    }
}
