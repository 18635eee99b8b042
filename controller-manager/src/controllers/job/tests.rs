//! Jobs played through: plans are carried out on a small world of one job and its pods.

use std::time::Duration;

use apimachinery::controller::Verb;
use serde_json::{Value, json};

use super::*;
use crate::common::name;

struct World {
    job: Value,
    pods: Vec<Value>,
    made: usize,
    last: Option<Duration>,
}

impl World {
    fn new(extra: Value) -> Self {
        let mut spec = json!({"parallelism": 2, "completions": 3, "backoffLimit": 6, "selector": {"matchLabels": {"job": "j"}},
            "template": {"metadata": {"labels": {"job": "j"}}, "spec": {"restartPolicy": "Never", "containers": [{"name": "c"}]}}});
        for (key, value) in extra.as_object().unwrap() {
            spec[key] = value.clone();
        }
        Self {
            job: json!({"metadata": {"name": "j", "namespace": "ns", "uid": "j"}, "spec": spec}),
            pods: Vec::new(),
            made: 0,
            last: None,
        }
    }

    fn step(&mut self, second: i64) {
        let controller = JobController {
            jobs: Informer::fixed([serde_json::from_value::<Job>(self.job.clone()).unwrap()]),
            pods: Informer::fixed(self.pods.iter().map(|pod| serde_json::from_value::<Pod>(pod.clone()).unwrap())),
        };
        let plan = controller.reconcile(&ObjectKey::new("ns", "j"), Timestamp::from_second(second).unwrap());
        self.last = plan.again_after;
        for write in plan.writes {
            let position = self.pods.iter().position(|pod| pod["metadata"]["name"] == json!(write.name));
            match (write.verb, write.resource.kind.as_ref()) {
                (Verb::Create, _) => {
                    let mut pod = write.body;
                    let name = format!("p{}", self.made);
                    self.made += 1;
                    pod["metadata"]["name"] = json!(name);
                    pod["metadata"]["uid"] = json!(name);
                    self.pods.push(pod);
                }
                (Verb::Delete, _) => match position {
                    Some(i) if self.pods[i]["metadata"]["finalizers"].as_array().is_some_and(|f| !f.is_empty()) => {
                        self.pods[i]["metadata"]["deletionTimestamp"] = json!("1970-01-01T00:00:00Z");
                    }
                    Some(i) => drop(self.pods.remove(i)),
                    None => {}
                },
                (_, "Job") => merge(&mut self.job, &write.body),
                _ => {
                    let i = position.unwrap();
                    merge(&mut self.pods[i], &write.body);
                    if self.pods[i]["metadata"]["deletionTimestamp"].is_string() {
                        self.pods.remove(i);
                    }
                }
            }
        }
    }

    /// Lets all running pods end.
    fn end(&mut self, phase: &str, code: i32, second: i64) {
        for pod in &mut self.pods {
            if pod["status"]["phase"].is_null() {
                let time = Timestamp::from_second(second).unwrap().to_string();
                pod["status"] = json!({"phase": phase, "containerStatuses": [{"name": "c", "image": "", "imageID": "", "ready": false,
                    "restartCount": 0, "state": {"terminated": {"exitCode": code, "finishedAt": time}}}]});
            }
        }
    }

    fn running(&self) -> usize {
        self.pods.iter().filter(|pod| pod["status"]["phase"].is_null()).count()
    }

    fn has(&self, type_: &str) -> Option<String> {
        let conditions = self.job["status"]["conditions"].as_array()?;
        let found = conditions.iter().find(|c| c["type"] == type_ && c["status"] == "True")?;
        found["reason"].as_str().map(str::to_owned)
    }
}

fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(fields) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    for (key, value) in fields {
        if value.is_null() {
            target.as_object_mut().unwrap().remove(key);
        } else {
            merge(&mut target[key], value);
        }
    }
}

#[test]
fn a_job_runs_to_its_number_of_completions() {
    let mut world = World::new(json!({}));
    world.step(0);
    assert_eq!(world.running(), 2);
    world.end("Succeeded", 0, 1);
    for second in 1..4 {
        world.step(second);
    }
    assert_eq!(world.running(), 1, "only one is missing");
    world.end("Succeeded", 0, 5);
    for second in 5..9 {
        world.step(second);
    }
    assert_eq!(world.has("Complete").as_deref(), Some("CompletionsReached"));
    assert_eq!(world.job["status"]["succeeded"], 3);
    assert!(world.pods.iter().all(|pod| pod["metadata"]["finalizers"] == json!([])));
}

#[test]
fn failures_are_retried_later_each_time_and_end_the_job_at_the_limit() {
    let mut world = World::new(json!({"parallelism": 1, "completions": 1, "backoffLimit": 1}));
    world.step(0);
    world.end("Failed", 1, 100);
    world.step(101);
    assert_eq!((world.running(), world.last), (0, Some(Duration::from_secs(9))));
    world.step(110);
    assert_eq!(world.running(), 1);
    world.end("Failed", 1, 120);
    for second in 121..125 {
        world.step(second);
    }
    assert_eq!(world.has("Failed").as_deref(), Some("BackoffLimitExceeded"));
    assert_eq!(world.job["status"]["failed"], 2);
}

#[test]
fn every_pod_is_counted_once_even_when_it_is_gone() {
    let mut world = World::new(json!({}));
    world.step(0);
    world.end("Succeeded", 0, 1);
    world.step(1);
    world.pods.retain(|pod| pod["status"]["phase"].is_null());
    world.step(2);
    world.step(3);
    assert_eq!(world.job["status"]["succeeded"], 2);
    assert_eq!(world.job["status"]["uncountedTerminatedPods"], json!({}));
}

#[test]
fn a_pod_that_counts_as_failed_does_not_succeed_later() {
    let mut world = World::new(json!({"parallelism": 1, "completions": 1}));
    world.step(0);
    world.pods[0]["metadata"]["deletionTimestamp"] = json!("1970-01-01T00:00:01Z");
    world.job["status"]["uncountedTerminatedPods"] = json!({"failed": ["p0"]});
    world.end("Succeeded", 0, 1);
    for second in 1..4 {
        world.step(second);
        let uncounted = &world.job["status"]["uncountedTerminatedPods"];
        assert!(uncounted["succeeded"].is_null(), "{uncounted}");
    }
    assert_eq!((&world.job["status"]["failed"], &world.job["status"]["succeeded"]), (&json!(1), &Value::Null));
}

#[test]
fn indexed_jobs_complete_each_index_once() {
    let mut world = World::new(json!({"completionMode": "Indexed", "parallelism": 3}));
    world.step(0);
    let names: Vec<_> =
        world.pods.iter().map(|pod| pod["metadata"]["generateName"].as_str().unwrap().to_owned()).collect();
    assert_eq!(names, ["j-0-", "j-1-", "j-2-"]);
    assert_eq!(world.pods[1]["spec"]["hostname"], "j-1");
    assert_eq!(world.pods[1]["spec"]["containers"][0]["env"][0]["name"], "JOB_COMPLETION_INDEX");
    world.end("Succeeded", 0, 1);
    for second in 1..5 {
        world.step(second);
    }
    assert_eq!(world.job["status"]["completedIndexes"], "0-2");
    assert!(world.has("Complete").is_some());
}

#[test]
fn an_index_fails_by_its_own_limit() {
    let mut world = World::new(
        json!({"completionMode": "Indexed", "completions": 1, "parallelism": 1, "backoffLimitPerIndex": 1, "backoffLimit": null}),
    );
    world.step(0);
    world.end("Failed", 1, 1);
    for second in [2, 20, 21] {
        world.step(second);
    }
    assert_eq!(
        world.pods.last().unwrap()["metadata"]["annotations"]["batch.kubernetes.io/job-index-failure-count"],
        "1"
    );
    world.end("Failed", 1, 30);
    for second in 31..35 {
        world.step(second);
    }
    assert_eq!(
        (world.has("Failed").as_deref(), &world.job["status"]["failedIndexes"]),
        (Some("FailedIndexes"), &json!("0"))
    );
}

#[test]
fn suspending_stops_pods_without_counting_them_and_resuming_starts_anew() {
    let mut world = World::new(json!({}));
    world.step(0);
    world.job["spec"]["suspend"] = json!(true);
    world.step(1);
    world.step(2);
    assert_eq!((world.running(), world.has("Suspended").is_some()), (0, true));
    assert_eq!(world.job["status"]["failed"], Value::Null);
    world.job["spec"]["suspend"] = json!(false);
    world.step(3);
    assert_eq!((world.running(), world.has("Suspended").is_some()), (2, false));
    assert_eq!(world.job["status"]["startTime"], "1970-01-01T00:00:03Z");
}

#[test]
fn time_is_limited() {
    let mut world = World::new(json!({"activeDeadlineSeconds": 10}));
    world.step(0);
    world.step(4);
    assert_eq!(world.last, Some(Duration::from_secs(6)));
    for second in 10..14 {
        world.step(second);
    }
    assert_eq!(world.has("Failed").as_deref(), Some("DeadlineExceeded"));
    assert!(name(&serde_json::from_value::<Job>(world.job.clone()).unwrap().metadata).starts_with('j'));
}
