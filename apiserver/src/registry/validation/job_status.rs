//! Rules for the status of jobs. Since other controllers may manage jobs, what they report must make sense. A rule
//! about fields that an update leaves as they are is not applied, so that a spec that changed under a status does not
//! block the controller that is about to mend it.

use apimachinery::status::FieldError;
use serde_json::Value;

use super::job_policies::{count_indexes, overlap};
use super::{Errors, IMMUTABLE, Path, non_negative};
use crate::registry::common::same;
use crate::registry::object::ObjectExt;
use crate::registry::tables::{has_condition, timestamp};

/// The new and the stored status, and what of it changed.
struct Change<'a> {
    obj: &'a Value,
    old: &'a Value,
}

impl Change<'_> {
    fn holds(&self, kind: &str) -> bool {
        has_condition(self.obj, kind)
    }

    fn is_finished(&self) -> bool {
        self.holds("Complete") || self.holds("Failed")
    }

    fn flipped(&self, kind: &str) -> bool {
        self.holds(kind) != has_condition(self.old, kind)
    }

    fn finish_flipped(&self) -> bool {
        self.is_finished() != (has_condition(self.old, "Complete") || has_condition(self.old, "Failed"))
    }

    fn changed(&self, field: &str) -> bool {
        !same(&self.obj["status"][field], &self.old["status"][field])
    }

    fn number(&self, field: &str) -> i64 {
        self.obj["status"][field].as_i64().unwrap_or(0)
    }
}

pub fn job_status_update(obj: &Value, old: &Value) -> Errors {
    let mut errors = Errors::new();
    let change = Change { obj, old };
    for field in ["active", "succeeded", "failed", "ready", "terminating"] {
        non_negative(&obj["status"], field, Path::STATUS, &mut errors);
    }
    uncounted_pods(&obj["status"]["uncountedTerminatedPods"], &mut errors);
    conditions(&change, &mut errors);
    times(&change, &mut errors);
    counts(&change, &mut errors);
    indexes(&change, &mut errors);
    transitions(&change, &mut errors);
    errors
}

fn uncounted_pods(pods: &Value, errors: &mut Errors) {
    let path = Path::STATUS.field("uncountedTerminatedPods");
    let mut seen = Vec::new();
    for list in ["succeeded", "failed"] {
        let path = path.field(list);
        for (index, uid) in pods.list_at(&[list]).iter().enumerate() {
            let uid = uid.as_str().unwrap_or_default();
            if uid.is_empty() {
                errors.push(FieldError::invalid(path.index(index), "", "must not be empty"));
            } else if seen.contains(&uid) {
                errors.push(FieldError::duplicate(path.index(index), uid));
            } else {
                seen.push(uid);
            }
        }
    }
}

/// Conditions that exclude or need each other.
fn conditions(change: &Change<'_>, errors: &mut Errors) {
    let [complete, failed, target, met] =
        ["Complete", "Failed", "FailureTarget", "SuccessCriteriaMet"].map(|kind| change.holds(kind));
    let [complete_flipped, failed_flipped, target_flipped, met_flipped] =
        ["Complete", "Failed", "FailureTarget", "SuccessCriteriaMet"].map(|kind| change.flipped(kind));
    let with_policy = !change.obj["spec"]["successPolicy"].is_null();
    let rules = [
        (
            (complete_flipped || failed_flipped) && complete && failed,
            "cannot set Complete=True and Failed=true conditions",
        ),
        (
            (complete_flipped || target_flipped) && complete && target,
            "cannot set Complete=True and FailureTarget=true conditions",
        ),
        (
            (failed_flipped || change.changed("failedIndexes")) && failed && !target,
            "cannot set Failed=True condition without the FailureTarget=true condition",
        ),
        (
            (complete_flipped || met_flipped) && complete && !met,
            "cannot set Complete=True condition without the SuccessCriteriaMet=true condition",
        ),
        (met && failed, "cannot set SuccessCriteriaMet=True and Failed=true conditions"),
        (met && target, "cannot set SuccessCriteriaMet=True and FailureTarget=true conditions"),
        (
            with_policy && !met && complete,
            "cannot set Complete=True for Job with SuccessPolicy unless SuccessCriteriaMet=True",
        ),
    ];
    let broken = rules.iter().filter(|(broken, _)| *broken);
    errors.extend(broken.map(|(_, detail)| FieldError::invalid_omitted("status.conditions", *detail)));
}

fn times(change: &Change<'_>, errors: &mut Errors) {
    let status = &change.obj["status"];
    let (start, end) = (&status["startTime"], &status["completionTime"]);
    let (start_changed, end_changed) = (change.changed("startTime"), change.changed("completionTime"));
    let complete = change.holds("Complete");
    if (change.flipped("Complete") || end_changed) && complete == end.is_null() {
        errors.push(if complete {
            FieldError::required("status.completionTime", "completionTime is required for Complete jobs")
        } else {
            let detail = "cannot set completionTime when there is no Complete=True condition";
            FieldError::invalid("status.completionTime", end.clone(), detail)
        });
    }
    let before = timestamp(end).zip(timestamp(start)).is_some_and(|(end, start)| end < start);
    if (start_changed || end_changed) && before {
        errors.push(FieldError::invalid("status.completionTime", end.clone(), "must be equal to or after `startTime`"));
    }
    let spec = &change.obj["spec"];
    let never_runs = spec["suspend"] == true && spec["completions"] == 0;
    if (change.finish_flipped() || start_changed) && !never_runs && start.is_null() && change.is_finished() {
        errors.push(FieldError::required("status.startTime", "startTime is required for finished job"));
    }
}

fn counts(change: &Change<'_>, errors: &mut Errors) {
    let status = &change.obj["status"];
    let finished = change.is_finished();
    for field in ["active", "terminating"] {
        if (change.finish_flipped() || change.changed(field)) && finished && change.number(field) > 0 {
            let detail = format!("{field}>0 is invalid for finished job");
            errors.push(FieldError::invalid(Path::STATUS.field(field), change.number(field), detail));
        }
    }
    let uncounted = &status["uncountedTerminatedPods"];
    let left = !uncounted.list_at(&["failed"]).is_empty() || !uncounted.list_at(&["succeeded"]).is_empty();
    if (change.finish_flipped() || change.changed("uncountedTerminatedPods")) && finished && left {
        let detail = "must be empty for finished job";
        errors.push(FieldError::invalid("status.uncountedTerminatedPods", uncounted.clone(), detail));
    }
    let ready = change.number("ready");
    if (change.changed("ready") || change.changed("active")) && ready > change.number("active") {
        errors.push(FieldError::invalid("status.ready", ready, "cannot set more ready pods than active"));
    }
}

fn indexes(change: &Change<'_>, errors: &mut Errors) {
    let (spec, status) = (&change.obj["spec"], &change.obj["status"]);
    let completed = status.str_at(&["completedIndexes"]);
    let failed = status["failedIndexes"].as_str();
    let completions = spec["completions"].as_i64();
    let per_index = !spec["backoffLimitPerIndex"].is_null();
    let completed_changed = change.changed("completedIndexes");
    let failed_changed = change.obj["status"]["failedIndexes"] != change.old["status"]["failedIndexes"];
    let parse = |field: &str, text: &str, errors: &mut Errors| {
        if let Some(Err(problem)) = completions.map(|completions| count_indexes(text, completions)) {
            let detail = format!("error parsing {field}: {problem}");
            errors.push(FieldError::invalid(Path::STATUS.field(field), text, detail));
        }
    };
    if completed_changed {
        parse("completedIndexes", completed, errors);
        if !completed.is_empty() && spec["completionMode"] != "Indexed" {
            let detail = "cannot set non-empty completedIndexes when non-indexed completion mode";
            errors.push(FieldError::invalid("status.completedIndexes", completed, detail));
        }
    }
    let Some(failed) = failed else { return };
    if failed_changed && per_index {
        parse("failedIndexes", failed, errors);
    } else if failed_changed {
        let detail = "cannot set non-null failedIndexes when backoffLimitPerIndex is null";
        errors.push(FieldError::invalid("status.failedIndexes", failed, detail));
    }
    let both = completions.and_then(|completions| overlap(completed, failed, completions));
    if let Some(index) = both.filter(|_| completed_changed || failed_changed) {
        let detail = format!("failedIndexes and completedIndexes overlap at index: {index}");
        errors.push(FieldError::invalid("status.failedIndexes", failed, detail));
    }
}

/// What may not be taken back.
fn transitions(change: &Change<'_>, errors: &mut Errors) {
    let (spec, status, stored) = (&change.obj["spec"], &change.obj["status"], &change.old["status"]);
    for kind in ["Failed", "Complete", "FailureTarget"] {
        if has_condition(change.old, kind) && !change.holds(kind) {
            let detail = format!("cannot disable the terminal {kind}=True condition");
            errors.push(FieldError::invalid_omitted("status.conditions", detail));
        }
    }
    let elastic = spec["completionMode"] == "Indexed" && spec["completions"] == spec["parallelism"];
    for field in ["failed", "succeeded"] {
        let decreased = change.number(field) < stored[field].as_i64().unwrap_or(0);
        if decreased && !(field == "succeeded" && elastic) {
            let detail = format!("cannot decrease the {field} counter");
            errors.push(FieldError::invalid(Path::STATUS.field(field), change.number(field), detail));
        }
    }
    let end = &status["completionTime"];
    if !end.is_null() && !stored["completionTime"].is_null() && change.changed("completionTime") {
        errors.push(FieldError::invalid("status.completionTime", end.clone(), IMMUTABLE));
    }
    let suspended = |status: &str, obj: &Value| {
        let conditions = obj.list_at(&["status", "conditions"]);
        conditions.iter().any(|condition| condition["type"] == "Suspended" && condition["status"] == status)
    };
    let resumes = suspended("True", change.old) && suspended("False", change.obj);
    if !stored["startTime"].is_null() && change.changed("startTime") && !resumes && spec["suspend"] != true {
        let detail = "field is immutable for unsuspended job once set";
        errors.push(FieldError::invalid("status.startTime", status["startTime"].clone(), detail));
    }
    let (was_met, met) = (has_condition(change.old, "SuccessCriteriaMet"), change.holds("SuccessCriteriaMet"));
    if was_met && !met {
        let detail = "cannot disable the SuccessCriteriaMet=True condition";
        errors.push(FieldError::invalid_omitted("status.conditions", detail));
    }
    if has_condition(change.old, "Complete") && !was_met && met {
        let detail = "cannot set SuccessCriteriaMet=True for Job already has Complete=true conditions";
        errors.push(FieldError::invalid_omitted("status.conditions", detail));
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::tests::texts;
    use super::*;

    #[test]
    fn statuses_make_sense() {
        let stored = json!({"active": 1, "ready": 1, "succeeded": 2, "startTime": "2020-01-01T00:00:00Z"});
        let condition = |kind: &str| json!({"type": kind, "status": "True"});
        let cases = [
            (json!({"ready": 1, "active": 1, "succeeded": 2, "startTime": "2020-01-01T00:00:00Z"}), vec![]),
            (
                json!({"ready": 2, "active": 1, "succeeded": 1, "startTime": "2020-01-01T00:00:00Z"}),
                vec![
                    "status.ready: Invalid value: 2: cannot set more ready pods than active",
                    "status.succeeded: Invalid value: 1: cannot decrease the succeeded counter",
                ],
            ),
            (
                json!({"succeeded": 2, "startTime": "2020-01-01T00:00:00Z", "conditions": [condition("Complete"), condition("SuccessCriteriaMet")]}),
                vec!["status.completionTime: Required value: completionTime is required for Complete jobs"],
            ),
            (
                json!({"succeeded": 2, "startTime": "2020-01-01T00:00:00Z", "conditions": [condition("Failed")]}),
                vec![
                    "status.conditions: Invalid value: cannot set Failed=True condition without the FailureTarget=true condition",
                ],
            ),
            (
                json!({"succeeded": 2, "startTime": "2020-01-01T00:00:00Z", "completedIndexes": "0"}),
                vec![
                    r#"status.completedIndexes: Invalid value: "0": cannot set non-empty completedIndexes when non-indexed completion mode"#,
                ],
            ),
        ];
        for (status, expected) in cases {
            let job = |status: &Value| json!({"spec": {"completions": 3, "parallelism": 1}, "status": status});
            assert_eq!(texts(&job_status_update(&job(&status), &job(&stored))), expected, "{status}");
        }
    }
}
