//! Status tables: phases and conditions of pods in typical situations, and patches that say no more than needed.

use std::time::Duration;

use k8s_openapi::api::core::v1::PodCondition;
use serde_json::{Value, json};

use super::*;
use crate::pod::observed::Sandbox;
use crate::pod::plan::Problem;
use crate::pod::status_patch::patch;

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_second(1_800_000_000 + seconds).unwrap()
}

fn pod(spec: &str) -> Pod {
    let text = format!("metadata: {{name: p, namespace: d, uid: u, generation: 2}}\nspec: {spec}\n");
    serde_json::from_value(serde_saphyr::from_str(&text).unwrap()).unwrap()
}

fn container(name: &str, state: RunState, exit_code: i32) -> Container {
    Container {
        id: format!("{name}0"),
        name: name.into(),
        sandbox_id: "s".into(),
        restart_count: 0,
        state,
        created_at: at(0),
        started_at: Some(at(1)),
        finished_at: (state == RunState::Exited).then(|| at(2)),
        exit_code,
        reason: if exit_code == 0 { "Completed" } else { "Error" }.into(),
        message: String::new(),
        image: "registry/i:1".into(),
        image_id: "registry/i@sha256:1".into(),
        hash: String::new(),
        log_path: String::new(),
        termination_message_host_path: None,
        termination_message_policy: String::new(),
        user: None,
    }
}

fn observed(containers: Vec<Container>) -> RuntimePod {
    let sandbox = Sandbox { id: "s".into(), ready: true, attempt: 0, created_at: at(0), ips: vec!["10.0.0.2".into()] };
    RuntimePod { sandboxes: vec![sandbox], containers }
}

fn compute(pod: &Pod, observed: &RuntimePod, facts: &Facts) -> PodStatus {
    let previous = PodStatus::default();
    let cx = Context { facts, host_ips: &["192.0.2.1".into()], now: at(5), previous: &previous };
    status(pod, observed, &cx)
}

fn conditions(status: &PodStatus) -> String {
    let one = |condition: &PodCondition| format!("{}={}", condition.type_, condition.status);
    status.conditions.iter().flatten().map(one).collect::<Vec<_>>().join(" ")
}

const NEVER: &str = "{restartPolicy: Never, containers: [{name: a}, {name: b}]}";

#[test]
fn phases() {
    use RunState::{Exited, Running};
    let init = "{initContainers: [{name: i}], containers: [{name: a}]}";
    let init_never = "{restartPolicy: Never, initContainers: [{name: i}], containers: [{name: a}]}";
    for (spec, containers, want) in [
        (NEVER, vec![], "Pending"),
        (NEVER, vec![("a", Running, 0)], "Pending"),
        (NEVER, vec![("a", Running, 0), ("b", Exited, 1)], "Running"),
        (NEVER, vec![("a", Exited, 0), ("b", Exited, 0)], "Succeeded"),
        (NEVER, vec![("a", Exited, 0), ("b", Exited, 1)], "Failed"),
        ("{containers: [{name: a}]}", vec![("a", Exited, 1)], "Running"),
        (init, vec![("i", Running, 0)], "Pending"),
        (init, vec![("i", Exited, 1)], "Pending"),
        (init, vec![("i", Exited, 0), ("a", Running, 0)], "Running"),
        (init_never, vec![("i", Exited, 1)], "Failed"),
    ] {
        let containers = containers.into_iter().map(|(name, state, code)| container(name, state, code)).collect();
        let status = compute(&pod(spec), &observed(containers), &Facts::default());
        assert_eq!(status.phase.as_deref(), Some(want), "{spec}");
    }
}

#[test]
fn a_running_pod_is_ready() {
    let status = compute(
        &pod("{containers: [{name: a}]}"),
        &observed(vec![container("a", RunState::Running, 0)]),
        &Facts { start_time: Some(at(0)), ..Facts::default() },
    );
    assert_eq!(
        conditions(&status),
        "PodReadyToStartContainers=True Initialized=True Ready=True ContainersReady=True PodScheduled=True"
    );
    assert_eq!((status.pod_ip.as_deref(), status.host_ip.as_deref()), (Some("10.0.0.2"), Some("192.0.2.1")));
    assert_eq!(status.observed_generation, Some(2));
    let container = &status.container_statuses.unwrap()[0];
    assert!(container.ready && container.started == Some(true));
    assert_eq!(container.container_id.as_deref(), Some("containerd://a0"));
}

#[test]
fn a_crash_loop_waits_and_keeps_the_end() {
    let facts = Facts { backoff: [("a".to_owned(), Duration::from_secs(80))].into(), ..Facts::default() };
    let pod = pod("{containers: [{name: a}]}");
    let status = compute(&pod, &observed(vec![container("a", RunState::Exited, 3)]), &facts);
    let container = &status.container_statuses.as_ref().unwrap()[0];
    let waiting = container.state.as_ref().unwrap().waiting.as_ref().unwrap();
    assert_eq!(waiting.reason.as_deref(), Some("CrashLoopBackOff"));
    assert_eq!(waiting.message.as_deref(), Some("back-off 1m20s restarting failed container=a pod=p_d(u)"));
    assert_eq!(container.last_state.as_ref().unwrap().terminated.as_ref().unwrap().exit_code, 3);
    assert_eq!(status.phase.as_deref(), Some("Running"));
}

#[test]
fn a_failed_pull_is_the_waiting_reason() {
    let problem = Problem { reason: "ErrImagePull", message: "no such host".into(), retry_at: at(9) };
    let facts = Facts { problems: [("a".to_owned(), problem)].into(), ..Facts::default() };
    let status = compute(&pod("{containers: [{name: a}]}"), &observed(vec![]), &facts);
    let state = status.container_statuses.unwrap().remove(0).state.unwrap();
    assert_eq!(state.waiting.unwrap().reason.as_deref(), Some("ErrImagePull"));
    assert_eq!(status.phase.as_deref(), Some("Pending"));
}

#[test]
fn an_ended_pod_is_final_whatever_its_policy() {
    let facts = Facts { ending_since: Some(at(4)), ..Facts::default() };
    let status =
        compute(&pod("{containers: [{name: a}]}"), &observed(vec![container("a", RunState::Exited, 0)]), &facts);
    assert_eq!(status.phase.as_deref(), Some("Succeeded"));
    assert!(conditions(&status).contains("Ready=False ContainersReady=False"));
}

#[test]
fn a_refused_pod_shows_the_reason_and_no_containers() {
    let verdict = plan::Verdict { reason: "OutOfcpu", message: "Pod was rejected: x".into(), ..Default::default() };
    let facts = Facts { verdict: Some(verdict), ..Facts::default() };
    let status = compute(&pod("{containers: [{name: a}]}"), &RuntimePod::default(), &facts);
    assert_eq!((status.phase.as_deref(), status.reason.as_deref()), (Some("Failed"), Some("OutOfcpu")));
    assert_eq!(status.container_statuses, None);
}

#[test]
fn an_evicted_pod_says_that_it_had_to_make_room() {
    let pod = pod("{containers: [{name: a}]}");
    let running = observed(vec![container("a", RunState::Running, 0)]);
    let before = compute(&pod, &running, &Facts::default());
    let verdict =
        plan::Verdict { reason: "Evicted", message: "low on memory".into(), is_disruption: true, ..Default::default() };
    let after = compute(&pod, &running, &Facts { verdict: Some(verdict), ..Facts::default() });
    assert_eq!((after.phase.as_deref(), after.reason.as_deref()), (Some("Failed"), Some("Evicted")));
    let patch = patch("u", &before, &after).unwrap().unwrap();
    let all = patch["status"]["conditions"].as_array().unwrap();
    let disruption = all.iter().find(|condition| condition["type"] == "DisruptionTarget").unwrap();
    assert_eq!(
        (&disruption["reason"], &disruption["message"]),
        (&json!("TerminationByKubelet"), &json!("low on memory"))
    );
}

#[test]
fn a_patch_names_only_changes_and_own_conditions() {
    let pod = pod("{containers: [{name: a}]}");
    let running = observed(vec![container("a", RunState::Running, 0)]);
    let old = compute(&pod, &observed(vec![]), &Facts::default());
    assert_eq!(patch("u", &old, &old).unwrap(), None);
    let mut new = compute(&pod, &running, &Facts::default());
    let foreign = PodCondition { type_: "gate".into(), status: "True".into(), ..PodCondition::default() };
    new.conditions.as_mut().unwrap().push(foreign);
    let patch = patch("u", &old, &new).unwrap().unwrap();
    assert_eq!(patch["metadata"]["uid"], "u");
    let status = &patch["status"];
    assert_eq!(status["phase"], "Running");
    assert!(status.get("podIP").is_none() && status.get("qosClass").is_none());
    let types: Vec<_> = status["conditions"].as_array().unwrap().iter().map(|c| c["type"].as_str().unwrap()).collect();
    assert_eq!(types, ["Ready", "ContainersReady"]);
    assert_eq!(status["conditions"][0]["reason"], Value::Null);
}

#[test]
fn a_resize_shows_until_it_is_done() {
    let pod = pod("{containers: [{name: a, resources: {limits: {cpu: 35m}}}]}");
    let running = observed(vec![container("a", RunState::Running, 0)]);
    let with = |cpu_limit| {
        let applied = crate::pod::qos::Resources { cpu_limit, ..Default::default() };
        compute(&pod, &running, &Facts { applied: [("a0".to_owned(), applied)].into(), ..Facts::default() })
    };
    let (during, after) = (with(None), with(Some(35)));
    assert!(conditions(&during).ends_with("PodResizeInProgress=True"));
    assert!(!conditions(&after).contains("PodResizeInProgress"));
    let patch = patch("u", &during, &after).unwrap().unwrap();
    assert_eq!(patch["status"]["conditions"], json!([{"$patch": "delete", "type": "PodResizeInProgress"}]));
}
