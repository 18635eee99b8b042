//! Defaults of jobs and cron jobs.

use serde_json::Value;

use super::{apps, default, default_zero, each, existing, pod, within};

pub fn job(obj: &mut Value) {
    within(obj, "spec", job_spec);
    let labels = obj["spec"]["template"]["metadata"]["labels"].clone();
    apps::labels_from_template(obj, labels);
}

fn job_spec(spec: &mut Value) {
    if spec["completions"].is_null() && spec["parallelism"].is_null() {
        default(spec, "completions", 1);
    }
    default(spec, "parallelism", 1);
    default(spec, "backoffLimit", if spec["backoffLimitPerIndex"].is_null() { 6 } else { i32::MAX });
    default(spec, "completionMode", "NonIndexed");
    default(spec, "suspend", false);
    let replacement = if spec["podFailurePolicy"].is_null() { "TerminatingOrFailed" } else { "Failed" };
    default(spec, "podReplacementPolicy", replacement);
    default(spec, "manualSelector", false);
    nested_job_spec(spec);
}

/// What a job template inside a cron job gets too.
fn nested_job_spec(spec: &mut Value) {
    existing(spec, "podFailurePolicy", |policy| {
        each(policy, "rules", |rule| each(rule, "onPodConditions", |pattern| default_zero(pattern, "status", "True")));
    });
    pod::template_of(spec);
}

pub fn cron_job(obj: &mut Value) {
    within(obj, "spec", |spec| {
        default_zero(spec, "concurrencyPolicy", "Allow");
        default(spec, "suspend", false);
        default(spec, "successfulJobsHistoryLimit", 3);
        default(spec, "failedJobsHistoryLimit", 1);
        within(spec, "jobTemplate", |template| {
            within(template, "metadata", |_| {});
            within(template, "spec", nested_job_spec);
        });
    });
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn jobs_complete_once_unless_told_otherwise() {
        let mut plain = json!({"spec": {}});
        job(&mut plain);
        let expected = json!({"completions": 1, "parallelism": 1, "backoffLimit": 6, "completionMode": "NonIndexed",
            "suspend": false, "podReplacementPolicy": "TerminatingOrFailed", "manualSelector": false});
        assert_eq!(plain["spec"], expected);
        let mut queue =
            json!({"spec": {"parallelism": 3, "podFailurePolicy": {"rules": [{"onPodConditions": [{"type": "X"}]}]}}});
        job(&mut queue);
        assert!(queue["spec"].get("completions").is_none());
        assert_eq!(queue["spec"]["podReplacementPolicy"], "Failed");
        assert_eq!(queue["spec"]["podFailurePolicy"]["rules"][0]["onPodConditions"][0]["status"], "True");
    }

    #[test]
    fn cron_jobs_keep_a_short_history() {
        let mut obj = json!({"spec": {"schedule": "* * * * *"}});
        cron_job(&mut obj);
        assert_eq!(obj["spec"]["successfulJobsHistoryLimit"], 3);
        assert_eq!(obj["spec"]["failedJobsHistoryLimit"], 1);
        assert_eq!(obj["spec"]["concurrencyPolicy"], "Allow");
    }
}
