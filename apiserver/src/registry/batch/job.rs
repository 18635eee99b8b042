//! `Job`: pods that run to completion. Unless told otherwise it selects its pods by its own uid.

use apimachinery::status::FieldError;
use jiff::Timestamp;
use serde_json::Value;

use crate::registry::common::{self, StatusOf};
use crate::registry::object::ObjectExt;
use crate::registry::strategy::{Column, Cx, DeleteOptions, Propagation, Strategy, Subresource};
use crate::registry::tables::{age, containers, has_condition, human_duration, name, selector, timestamp};
use crate::registry::{defaults, validation};

pub struct Job;

const COLUMNS: &[Column] = &[
    Column::name(),
    Column::new("Status", "string"),
    Column::new("Completions", "string"),
    Column::new("Duration", "string"),
    Column::age(),
    Column::new("Containers", "string").wide(),
    Column::new("Images", "string").wide(),
    Column::new("Selector", "string").wide(),
];

/// The labels that tie pods to their job, in their old and new spelling.
const UID_LABELS: [&str; 2] = ["batch.kubernetes.io/controller-uid", "controller-uid"];
const NAME_LABELS: [&str; 2] = ["batch.kubernetes.io/job-name", "job-name"];

static STATUS: StatusOf = StatusOf::new().validated(validation::job_status::job_status_update);

/// Labels the template with the job's uid and name and selects by the uid, unless the user does that himself.
pub fn generate_selector(obj: &mut Value) {
    if obj["spec"]["manualSelector"] == true {
        return;
    }
    let (uid, name) = (obj.uid().to_owned(), obj.name().to_owned());
    let labels = obj.ensure_object(&["spec", "template", "metadata", "labels"]);
    for label in NAME_LABELS {
        labels.entry(label).or_insert_with(|| name.clone().into());
    }
    for label in UID_LABELS {
        labels.entry(label).or_insert_with(|| uid.clone().into());
    }
    let selector = obj.ensure_object(&["spec", "selector", "matchLabels"]);
    selector.entry(UID_LABELS[0]).or_insert_with(|| uid.into());
}

fn completions(obj: &Value) -> String {
    let succeeded = obj.i64_at(&["status", "succeeded"]).unwrap_or(0);
    match (obj.i64_at(&["spec", "completions"]), obj.i64_at(&["spec", "parallelism"]).unwrap_or(0)) {
        (Some(wanted), _) => format!("{succeeded}/{wanted}"),
        (None, parallelism) if parallelism > 1 => format!("{succeeded}/1 of {parallelism}"),
        (None, _) => format!("{succeeded}/1"),
    }
}

fn duration(obj: &Value, now: Timestamp) -> String {
    let Some(start) = timestamp(&obj["status"]["startTime"]) else { return String::new() };
    let end = timestamp(&obj["status"]["completionTime"]).unwrap_or(now);
    human_duration(end.as_second() - start.as_second())
}

fn state(obj: &Value) -> &'static str {
    let conditions = [
        ("Complete", "Complete"),
        ("Failed", "Failed"),
        ("", "Terminating"),
        ("Suspended", "Suspended"),
        ("FailureTarget", "FailureTarget"),
        ("SuccessCriteriaMet", "SuccessCriteriaMet"),
    ];
    let holds =
        |condition: &str| if condition.is_empty() { obj.is_being_deleted() } else { has_condition(obj, condition) };
    conditions.iter().find(|(condition, _)| holds(condition)).map_or("Running", |(_, word)| word)
}

impl Strategy for Job {
    fn default(&self, obj: &mut Value) {
        defaults::batch::job(obj);
    }

    fn prepare_for_create(&self, _cx: &Cx<'_>, obj: &mut Value) {
        generate_selector(obj);
        let labels = obj["spec"]["template"]["metadata"]["labels"].clone();
        defaults::apps::labels_from_template(obj, labels);
        common::create(obj);
    }

    fn prepare_for_update(&self, _cx: &Cx<'_>, obj: &mut Value, old: &Value) {
        common::update(obj, old);
    }

    fn validate_create(&self, _cx: &Cx<'_>, obj: &Value) -> Vec<FieldError> {
        validation::batch::job(obj)
    }

    fn validate_update(&self, _cx: &Cx<'_>, obj: &Value, old: &Value) -> Vec<FieldError> {
        validation::batch::job_update(obj, old)
    }

    fn warnings(&self, _cx: &Cx<'_>, obj: &Value, old: Option<&Value>) -> Vec<String> {
        validation::warnings::workload(obj, old, &["spec", "template"], true)
    }

    fn default_propagation(&self) -> Propagation {
        Propagation::Orphan
    }

    fn delete_warnings(&self, options: &DeleteOptions) -> Vec<String> {
        const TEXT: &str = "child pods are preserved by default when jobs are deleted; set propagationPolicy=Background to remove them or set propagationPolicy=Orphan to suppress this warning";
        if options.propagation.is_none() { vec![TEXT.into()] } else { vec![] }
    }

    fn selectable_fields(&self) -> &'static [&'static str] {
        &["status.successful"]
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
            state(obj).into(),
            completions(obj).into(),
            duration(obj, now).into(),
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn jobs_select_their_pods_by_uid() {
        let mut obj = json!({"metadata": {"name": "pi", "uid": "u1"}, "spec": {"template": {"spec": {}}}});
        generate_selector(&mut obj);
        assert_eq!(obj["spec"]["selector"], json!({"matchLabels": {"batch.kubernetes.io/controller-uid": "u1"}}));
        let labels = json!({"batch.kubernetes.io/job-name": "pi", "job-name": "pi",
            "batch.kubernetes.io/controller-uid": "u1", "controller-uid": "u1"});
        assert_eq!(obj["spec"]["template"]["metadata"]["labels"], labels);
    }

    #[test]
    fn progress_is_shown() {
        let obj = json!({"spec": {"parallelism": 2}, "status": {"succeeded": 1, "startTime": "2026-01-01T00:00:00Z",
            "completionTime": "2026-01-01T00:00:10Z", "conditions": [{"type": "Complete", "status": "True"}]}});
        assert_eq!(completions(&obj), "1/1 of 2");
        assert_eq!(duration(&obj, Timestamp::UNIX_EPOCH), "10s");
        assert_eq!(state(&obj), "Complete");
        assert_eq!(state(&json!({})), "Running");
    }
}
