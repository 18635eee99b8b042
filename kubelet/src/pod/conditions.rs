//! The conditions of a pod's status: the kubelet's own, computed, and those of others, kept. Pure.

use k8s_openapi::api::core::v1::{Container as Spec, ContainerStatus, Pod, PodCondition, PodStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::observed::RuntimePod;
use super::plan;
use super::status::{Context, is_running, last_exit, whole_seconds};

/// Conditions that the kubelet owns; all others belong to someone else and are kept.
const OWN_CONDITIONS: [&str; 5] =
    ["PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady", "PodScheduled"];

/// The kubelet's as well, but there only while it is true.
pub(super) const RESIZING: &str = "PodResizeInProgress";

/// Anybody's; the kubelet's own when it evicted the pod.
const DISRUPTION: &str = "DisruptionTarget";
pub(super) const BY_KUBELET: &str = "TerminationByKubelet";

pub(super) fn conditions(
    pod: &Pod,
    observed: &RuntimePod,
    cx: &Context<'_>,
    init: &[Spec],
    status: &PodStatus,
) -> Vec<PodCondition> {
    let phase = status.phase.as_deref().unwrap_or_default();
    let foreign = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
    let mut list: Vec<PodCondition> = foreign.filter(|condition| !is_own(&condition.type_)).cloned().collect();
    let init_statuses = status.init_container_statuses.as_deref().unwrap_or_default();
    let statuses = status.container_statuses.as_deref().unwrap_or_default();

    let sandbox = plan::sandbox_is_usable(pod, observed);
    let initialized = initialized_condition(init, init_statuses, statuses, phase);
    let containers_ready = containers_ready(init, init_statuses, statuses, phase);
    let ready = match &containers_ready {
        Verdict { status: true, .. } => readiness_gates(pod, &list),
        unready => unready.clone(),
    };
    for (type_, verdict) in [
        ("PodReadyToStartContainers", Verdict { status: sandbox, ..Verdict::default() }),
        ("Initialized", initialized),
        ("Ready", ready),
        ("ContainersReady", containers_ready),
        ("PodScheduled", Verdict::yes()),
    ] {
        list.push(condition(type_, verdict, pod, cx));
    }
    if plan::is_resizing(pod, observed, cx.facts) {
        let reason = cx.facts.resize_retry.map(|_| "Error");
        list.push(condition(RESIZING, Verdict { reason, ..Verdict::yes() }, pod, cx));
    }
    if let Some(why) = cx.facts.verdict.as_ref().filter(|verdict| verdict.is_disruption) {
        list.retain(|condition| condition.type_ != DISRUPTION);
        let verdict = Verdict { reason: Some(BY_KUBELET), message: Some(why.message.clone()), ..Verdict::yes() };
        list.push(condition(DISRUPTION, verdict, pod, cx));
    }
    list
}

pub(super) fn is_own(type_: &str) -> bool {
    OWN_CONDITIONS.contains(&type_) || type_ == RESIZING
}

/// One condition's answer before it gets its times.
#[derive(Clone, Debug, Default)]
struct Verdict {
    status: bool,
    reason: Option<&'static str>,
    message: Option<String>,
}

impl Verdict {
    fn yes() -> Self {
        Self { status: true, ..Self::default() }
    }

    fn no(reason: &'static str, message: Option<String>) -> Self {
        Self { status: false, reason: Some(reason), message }
    }
}

fn condition(type_: &str, verdict: Verdict, pod: &Pod, cx: &Context<'_>) -> PodCondition {
    let value = if verdict.status { "True" } else { "False" };
    let old = cx.previous.conditions.iter().flatten().find(|condition| condition.type_ == type_);
    let unchanged = old.filter(|old| old.status == value).and_then(|old| old.last_transition_time.clone());
    PodCondition {
        type_: type_.to_owned(),
        status: value.to_owned(),
        reason: verdict.reason.map(str::to_owned),
        message: verdict.message,
        last_transition_time: Some(unchanged.unwrap_or_else(|| Time(whole_seconds(cx.now)))),
        last_probe_time: None,
        observed_generation: pod.metadata.generation,
    }
}

fn list(names: &[&str]) -> String {
    format!("[{}]", names.join(" "))
}

fn containers_ready(
    init: &[Spec],
    init_statuses: &[ContainerStatus],
    statuses: &[ContainerStatus],
    phase: &str,
) -> Verdict {
    match phase {
        "Succeeded" => return Verdict::no("PodCompleted", None),
        "Failed" => return Verdict::no("PodFailed", None),
        _ => {}
    }
    let sidecars = init.iter().zip(init_statuses).filter(|(spec, _)| plan::is_sidecar(spec)).map(|(_, status)| status);
    let unready: Vec<&str> =
        sidecars.chain(statuses).filter(|status| !status.ready).map(|status| status.name.as_str()).collect();
    if unready.is_empty() {
        return Verdict::yes();
    }
    Verdict::no("ContainersNotReady", Some(format!("containers with unready status: {}", list(&unready))))
}

fn initialized_condition(
    init: &[Spec],
    init_statuses: &[ContainerStatus],
    statuses: &[ContainerStatus],
    phase: &str,
) -> Verdict {
    if phase == "Succeeded" {
        return Verdict { status: true, reason: Some("PodCompleted"), message: None };
    }
    if statuses.iter().any(|status| is_running(status) || last_exit(status).is_some()) {
        return Verdict::yes();
    }
    let incomplete: Vec<&str> = init
        .iter()
        .zip(init_statuses)
        .filter(|(spec, status)| if plan::is_sidecar(spec) { status.started != Some(true) } else { !status.ready })
        .map(|(spec, _)| spec.name.as_str())
        .collect();
    if incomplete.is_empty() {
        return Verdict::yes();
    }
    Verdict::no("ContainersNotInitialized", Some(format!("containers with incomplete status: {}", list(&incomplete))))
}

fn readiness_gates(pod: &Pod, conditions: &[PodCondition]) -> Verdict {
    let gates = pod.spec.iter().flat_map(|spec| spec.readiness_gates.iter().flatten());
    let missing: Vec<String> = gates
        .filter_map(|gate| {
            let name = &gate.condition_type;
            match conditions.iter().find(|condition| condition.type_ == *name) {
                None => Some(format!("corresponding condition of pod readiness gate {name:?} does not exist.")),
                Some(condition) if condition.status != "True" => {
                    let status = &condition.status;
                    Some(format!("the status of pod readiness gate {name:?} is not \"True\", but {status}"))
                }
                Some(_) => None,
            }
        })
        .collect();
    if missing.is_empty() {
        return Verdict::yes();
    }
    Verdict::no("ReadinessGatesNotReady", Some(missing.join(", ")))
}
