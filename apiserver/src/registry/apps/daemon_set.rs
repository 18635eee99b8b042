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

/// Counts templates; only the oldest clients look at it, under this annotation. Upstream keeps it in a field of its
/// own, which every object has when it becomes JSON.
pub const TEMPLATE_GENERATION: &str = "deprecated.daemonset.template.generation";

static PLAIN_STATUS: StatusOf = StatusOf::new().validated(validation::apps::daemon_set_status);
static STATUS: Status = Status;

/// Writes of the status leave the count of templates alone, although it is among the annotations.
struct Status;

impl Strategy for Status {
    fn prepare_for_update(&self, cx: &Cx<'_>, obj: &mut Value, old: &Value) {
        PLAIN_STATUS.prepare_for_update(cx, obj, old);
        set_template_generation(obj, template_generation(old));
    }

    fn validate_update(&self, cx: &Cx<'_>, obj: &Value, old: &Value) -> Vec<FieldError> {
        PLAIN_STATUS.validate_update(cx, obj, old)
    }

    fn reset_fields(&self) -> &'static [&'static [&'static str]] {
        PLAIN_STATUS.reset_fields()
    }
}

fn template_generation(obj: &Value) -> i64 {
    obj.annotation(TEMPLATE_GENERATION).and_then(|text| text.parse().ok()).unwrap_or(0)
}

fn set_template_generation(obj: &mut Value, generation: i64) {
    obj.ensure_object(&["metadata", "annotations"]).insert(TEMPLATE_GENERATION.into(), generation.to_string().into());
}

impl Strategy for DaemonSet {
    fn default(&self, obj: &mut Value) {
        defaults::apps::daemon_set(obj);
        set_template_generation(obj, template_generation(obj));
    }

    fn prepare_for_create(&self, _cx: &Cx<'_>, obj: &mut Value) {
        common::create(obj);
        for count in COUNTS {
            obj["status"][count] = 0.into();
        }
        set_template_generation(obj, i64::max(template_generation(obj), 1));
    }

    fn prepare_for_update(&self, _cx: &Cx<'_>, obj: &mut Value, old: &Value) {
        let changed = !common::same(&obj["spec"]["template"], &old["spec"]["template"]);
        set_template_generation(obj, template_generation(old) + i64::from(changed));
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
