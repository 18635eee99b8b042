//! `CronJob`: starts jobs by the clock.

use apimachinery::status::FieldError;
use jiff::Timestamp;
use serde_json::Value;

use crate::registry::common::{self, StatusOf};
use crate::registry::object::ObjectExt;
use crate::registry::strategy::{Column, Cx, Strategy, Subresource};
use crate::registry::tables::{NONE, UNSET, age, containers, count, name, selector, since, text, text_or};
use crate::registry::{defaults, validation};

pub struct CronJob;

const COLUMNS: &[Column] = &[
    Column::name(),
    Column::new("Schedule", "string"),
    Column::new("Timezone", "string"),
    Column::new("Suspend", "boolean"),
    Column::new("Active", "integer"),
    Column::new("Last Schedule", "string"),
    Column::age(),
    Column::new("Containers", "string").wide(),
    Column::new("Images", "string").wide(),
    Column::new("Selector", "string").wide(),
];

static STATUS: StatusOf = StatusOf::new();

impl Strategy for CronJob {
    fn default(&self, obj: &mut Value) {
        defaults::batch::cron_job(obj);
    }

    fn prepare_for_create(&self, _cx: &Cx<'_>, obj: &mut Value) {
        common::create(obj);
    }

    fn prepare_for_update(&self, _cx: &Cx<'_>, obj: &mut Value, old: &Value) {
        common::update(obj, old);
    }

    fn validate_create(&self, _cx: &Cx<'_>, obj: &Value) -> Vec<FieldError> {
        validation::batch::cron_job(obj)
    }

    fn validate_update(&self, _cx: &Cx<'_>, obj: &Value, _old: &Value) -> Vec<FieldError> {
        validation::batch::cron_job(obj)
    }

    fn warnings(&self, _cx: &Cx<'_>, obj: &Value, old: Option<&Value>) -> Vec<String> {
        validation::warnings::workload(obj, old, &["spec", "jobTemplate", "spec", "template"], true)
    }

    fn columns(&self) -> &'static [Column] {
        COLUMNS
    }

    fn row(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        let job = &obj["spec"]["jobTemplate"]["spec"];
        let [names, images] = containers(&job["template"]["spec"]);
        let suspended = match obj.bool_at(&["spec", "suspend"]) {
            Some(true) => "True",
            Some(false) => "False",
            None => UNSET,
        };
        let last = &obj["status"]["lastScheduleTime"];
        vec![
            name(obj),
            text(obj, &["spec", "schedule"]),
            text_or(obj, &["spec", "timeZone"], NONE),
            suspended.into(),
            count(&obj["status"]["active"]).into(),
            if last.is_null() { NONE.into() } else { since(last, now).into() },
            age(obj, now),
            names,
            images,
            selector(&job["selector"]),
        ]
    }

    fn subresource(&self, name: &str) -> Option<Subresource> {
        (name == "status").then_some(Subresource::Update(&STATUS))
    }
}
