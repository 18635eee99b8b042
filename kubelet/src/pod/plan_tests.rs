//! Tables for the planner: a pod in YAML, what the runtime holds in a few words, and the actions expected.

use super::*;
use crate::pod::observed::Sandbox;

const T0: i64 = 1_800_000_000;

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_second(T0 + seconds).unwrap()
}

fn pod(spec: &str) -> Pod {
    let text = format!("metadata: {{name: p, namespace: d, uid: u}}\nspec: {spec}\n");
    serde_json::from_value(serde_saphyr::from_str(&text).unwrap()).unwrap()
}

fn sandbox(ready: bool) -> Sandbox {
    Sandbox { id: "s0".into(), ready, attempt: 0, created_at: at(0), ips: vec!["10.0.0.2".into()] }
}

/// `name` running (`None`) or ended with a code, started at 1 and ended at 2.
fn container(name: &str, exit: Option<i32>, count: i32) -> Container {
    Container {
        id: format!("{name}{count}"),
        name: name.into(),
        sandbox_id: "s0".into(),
        restart_count: count,
        state: if exit.is_some() { RunState::Exited } else { RunState::Running },
        created_at: at(i64::from(count)),
        started_at: Some(at(1)),
        finished_at: exit.map(|_| at(2)),
        exit_code: exit.unwrap_or(0),
        reason: String::new(),
        message: String::new(),
        image: "i".into(),
        image_id: "sha".into(),
        hash: String::new(),
        log_path: String::new(),
        termination_message_host_path: None,
        termination_message_policy: String::new(),
        user: None,
    }
}

fn show(plan: &Plan) -> Vec<String> {
    plan.actions
        .iter()
        .map(|action| match action {
            Action::CreateSandbox { attempt } => format!("sandbox {attempt}"),
            Action::StopSandbox { id } => format!("stop {id}"),
            Action::RemoveSandbox { id } => format!("rm-sandbox {id}"),
            Action::Start { name, restart_count } => format!("start {name} {restart_count}"),
            Action::Kill { id, grace, .. } => format!("kill {id} {grace}"),
            Action::Resize { id, .. } => format!("resize {id}"),
            Action::Remove { id } => format!("rm {id}"),
            Action::Release => "release".into(),
            Action::Delete => "delete".into(),
            Action::Forget => "forget".into(),
        })
        .collect()
}

#[track_caller]
fn check(spec: &str, sandboxes: &[Sandbox], containers: &[Container], want: &[&str]) {
    let observed = RuntimePod { sandboxes: sandboxes.to_vec(), containers: containers.to_vec() };
    let plan = plan(&pod(spec), &observed, &Facts::default(), at(10));
    assert_eq!(show(&plan), want, "{spec}");
}

const ONE: &str = "{containers: [{name: a, image: i}]}";
const TWO_NEVER: &str = "{restartPolicy: Never, containers: [{name: a}, {name: b}]}";
const INIT: &str = "{initContainers: [{name: i}, {name: s, restartPolicy: Always}], containers: [{name: a}]}";

#[test]
fn a_pod_comes_up_in_order() {
    check(ONE, &[], &[], &["sandbox 0"]);
    check(ONE, &[sandbox(true)], &[], &["start a 0"]);
    check(ONE, &[sandbox(true)], &[container("a", None, 0)], &[]);
    check(INIT, &[sandbox(true)], &[], &["start i 0"]);
    check(INIT, &[sandbox(true)], &[container("i", None, 0)], &[]);
    check(INIT, &[sandbox(true)], &[container("i", Some(0), 0)], &["start s 0"]);
    check(INIT, &[sandbox(true)], &[container("i", Some(0), 0), container("s", None, 0)], &["start a 0"]);
}

#[test]
fn restart_policies() {
    check(ONE, &[sandbox(true)], &[container("a", Some(0), 3)], &["start a 4"]);
    check(TWO_NEVER, &[sandbox(true)], &[container("a", Some(1), 0)], &["start b 0"]);
    check(TWO_NEVER, &[sandbox(true)], &[container("a", Some(1), 0), container("b", None, 0)], &[]);
    check(TWO_NEVER, &[sandbox(true)], &[container("a", Some(1), 0), container("b", Some(0), 0)], &["stop s0"]);
    check(TWO_NEVER, &[sandbox(false)], &[container("a", Some(1), 0), container("b", Some(0), 0)], &["release"]);
    let on_failure = "{restartPolicy: OnFailure, containers: [{name: a}]}";
    check(on_failure, &[sandbox(true)], &[container("a", Some(1), 0)], &["start a 1"]);
    check(on_failure, &[sandbox(true)], &[container("a", Some(0), 0)], &["stop s0"]);
    let rules = "{restartPolicy: Never, containers: [{name: a, restartPolicy: Never, restartPolicyRules: \
        [{action: Restart, exitCodes: {operator: In, values: [42]}}]}]}";
    check(rules, &[sandbox(true)], &[container("a", Some(42), 0)], &["start a 1"]);
    check(rules, &[sandbox(true)], &[container("a", Some(1), 0)], &["stop s0"]);
}

#[test]
fn init_failures_follow_the_policy() {
    check(INIT, &[sandbox(true)], &[container("i", Some(1), 0)], &["start i 1"]);
    let never = "{restartPolicy: Never, initContainers: [{name: i}], containers: [{name: a}]}";
    check(never, &[sandbox(true)], &[container("i", Some(1), 0)], &["stop s0"]);
    // Once an application container has run, only sidecars are looked after.
    check(INIT, &[sandbox(true)], &[container("a", None, 0), container("s", Some(1), 0)], &["start s 1"]);
}

#[test]
fn a_lost_sandbox_is_replaced() {
    check(ONE, &[sandbox(false)], &[container("a", None, 0)], &["kill a0 30"]);
    check(ONE, &[sandbox(false)], &[container("a", Some(137), 0)], &["sandbox 1"]);
    let no_address = Sandbox { ips: vec![], ..sandbox(true) };
    check(ONE, std::slice::from_ref(&no_address), &[], &["stop s0"]);
    check("{hostNetwork: true, containers: [{name: a}]}", &[no_address], &[], &["start a 0"]);
}

#[test]
fn back_off_delays_a_restart() {
    let pod = pod(ONE);
    let observed = RuntimePod { sandboxes: vec![sandbox(true)], containers: vec![container("a", Some(1), 0)] };
    let facts = Facts { backoff: [("a".to_owned(), Duration::from_secs(20))].into(), ..Facts::default() };
    let early = plan(&pod, &observed, &facts, at(10));
    assert_eq!((show(&early), early.look_at), (vec![], Some(at(22))));
    assert_eq!(show(&plan(&pod, &observed, &facts, at(22))), ["start a 1"]);
    let mut delay = None;
    let mut delays = vec![];
    for _ in 0..7 {
        delay = Some(next_backoff(delay, &observed.containers[0]));
        delays.extend(delay.map(|delay| delay.as_secs()));
    }
    assert_eq!(delays, [10, 20, 40, 80, 160, 300, 300]);
    let mut long = container("a", Some(1), 0);
    long.finished_at = Some(at(601));
    assert_eq!(next_backoff(Some(BACKOFF_MAX), &long), BACKOFF_START);
}

#[test]
fn a_failed_probe_kills() {
    let spec = "{terminationGracePeriodSeconds: 5, containers: [{name: a, livenessProbe: \
        {terminationGracePeriodSeconds: 2}}]}";
    let observed = RuntimePod { sandboxes: vec![sandbox(true)], containers: vec![container("a", None, 0)] };
    let sick = Health { started: true, alive: false, ready: true };
    let facts = Facts { health: [("a0".to_owned(), sick)].into(), ..Facts::default() };
    let plan = plan(&pod(spec), &observed, &facts, at(10));
    let Action::Kill { grace, message, .. } = &plan.actions[0] else { panic!("{plan:?}") };
    assert_eq!((*grace, message.as_str()), (2, "Container a failed liveness probe, will be restarted"));
}

#[test]
fn changed_resources_are_applied() {
    let spec = |policy: &str| {
        format!("{{containers: [{{name: a, resizePolicy: [{policy}], resources: {{limits: {{cpu: 2}}}}}}]}}")
    };
    let observed = RuntimePod { sandboxes: vec![sandbox(true)], containers: vec![container("a", None, 0)] };
    let applied = Resources { cpu_limit: Some(1000), ..Resources::default() };
    let mut facts = Facts { applied: [("a0".to_owned(), applied)].into(), ..Facts::default() };
    let next = |policy: &str, facts: &Facts| show(&plan(&pod(&spec(policy)), &observed, facts, at(10)));
    assert_eq!(next("", &facts), ["resize a0"]);
    assert_eq!(next("{resourceName: cpu, restartPolicy: RestartContainer}", &facts), ["kill a0 30"]);
    assert_eq!(next("{resourceName: memory, restartPolicy: RestartContainer}", &facts), ["resize a0"]);
    facts.resize_retry = Some(at(11));
    assert_eq!(next("", &facts), Vec::<String>::new());
}

#[test]
fn a_changed_image_replaces_the_container() {
    let mut running = container("a", None, 0);
    running.hash = "old".into();
    check(ONE, &[sandbox(true)], &[running], &["kill a0 30"]);
}

#[test]
fn deletion_goes_from_the_containers_to_the_object() {
    let mut pod = pod(INIT);
    pod.metadata.deletion_timestamp = Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(at(5)));
    pod.metadata.deletion_grace_period_seconds = Some(7);
    let mut facts = Facts { ending_since: Some(at(8)), ..Facts::default() };
    let mut observed = RuntimePod {
        sandboxes: vec![sandbox(true)],
        containers: vec![container("a", None, 0), container("s", None, 0), container("i", Some(0), 0)],
    };
    let next = |observed: &RuntimePod, facts: &Facts| show(&plan(&pod, observed, facts, at(10)));
    assert_eq!(next(&observed, &facts), ["kill a0 5"]);
    observed.containers[0].state = RunState::Exited;
    assert_eq!(next(&observed, &facts), ["kill s0 5"]);
    observed.containers[1].state = RunState::Exited;
    assert_eq!(next(&observed, &facts), ["stop s0"]);
    observed.sandboxes[0].ready = false;
    assert_eq!(next(&observed, &facts), ["release"]);
    facts.released = true;
    assert_eq!(next(&observed, &facts), ["delete"]);
    facts.removed = true;
    assert_eq!(next(&observed, &facts), ["rm a0", "rm s0", "rm i0"]);
    observed.containers.clear();
    assert_eq!(next(&observed, &facts), ["rm-sandbox s0"]);
    assert_eq!(next(&RuntimePod::default(), &facts), ["forget"]);
}

#[test]
fn a_deadline_ends_the_pod() {
    let pod = pod("{activeDeadlineSeconds: 5, containers: [{name: a}]}");
    let observed = RuntimePod { sandboxes: vec![sandbox(true)], containers: vec![container("a", None, 0)] };
    let facts = Facts { start_time: Some(at(0)), ..Facts::default() };
    assert_eq!(plan(&pod, &observed, &facts, at(4)).look_at, Some(at(5)));
    assert_eq!(show(&plan(&pod, &observed, &facts, at(5))), ["kill a0 30"]);
}

#[test]
fn old_containers_are_pruned() {
    let containers =
        [container("a", None, 3), container("a", Some(1), 2), container("a", Some(1), 1), container("a", Some(1), 0)];
    check(ONE, &[sandbox(true)], &containers, &["rm a1", "rm a0"]);
}
