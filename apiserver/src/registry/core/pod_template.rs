//! `PodTemplate`: a template on its own; no controller of ours reads it.

use apimachinery::status::FieldError;
use jiff::Timestamp;
use serde_json::Value;

use crate::registry::common;
use crate::registry::strategy::{Column, Cx, Strategy};
use crate::registry::tables::{containers, labels, name};
use crate::registry::{defaults, validation};

pub struct PodTemplate;

const COLUMNS: &[Column] = &[
    Column::name(),
    Column::new("Containers", "string"),
    Column::new("Images", "string"),
    Column::new("Pod Labels", "string"),
];

impl Strategy for PodTemplate {
    fn default(&self, obj: &mut Value) {
        defaults::pod::template_of(obj);
    }

    fn prepare_for_create(&self, _cx: &Cx<'_>, obj: &mut Value) {
        common::create_without_status(obj);
    }

    fn prepare_for_update(&self, _cx: &Cx<'_>, obj: &mut Value, old: &Value) {
        common::count_change(obj, old, common::same(&obj["template"], &old["template"]));
    }

    fn validate_create(&self, _cx: &Cx<'_>, obj: &Value) -> Vec<FieldError> {
        validation::pod::template(&obj["template"], "template")
    }

    fn validate_update(&self, _cx: &Cx<'_>, obj: &Value, _old: &Value) -> Vec<FieldError> {
        validation::pod::template(&obj["template"], "template")
    }

    fn warnings(&self, _cx: &Cx<'_>, obj: &Value, old: Option<&Value>) -> Vec<String> {
        validation::warnings::workload(obj, old, &["template"], false)
    }

    fn columns(&self) -> &'static [Column] {
        COLUMNS
    }

    fn row(&self, obj: &Value, _now: Timestamp) -> Vec<Value> {
        let [names, images] = containers(&obj["template"]["spec"]);
        vec![name(obj), names, images, labels(&obj["template"]["metadata"]["labels"])]
    }

    fn reset_fields(&self) -> &'static [&'static [&'static str]] {
        &[]
    }
}
