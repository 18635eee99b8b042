//! The status of a pod for the API, computed from the spec, what the runtime reports and what the worker remembers.
//! Pure: the same inputs give the same status, which is why "write only on change" is a comparison.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{
    Container as Spec, ContainerState, ContainerStateRunning, ContainerStateTerminated, ContainerStateWaiting,
    ContainerStatus, ContainerUser, HostIP, LinuxContainerUser, Pod, PodCondition, PodIP, PodStatus, VolumeMountStatus,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use serde_json::{Map, Value, json};

use super::observed::{Container, RunState, RuntimePod};
use super::plan::{self, Facts};

/// Conditions that the kubelet owns; all others belong to someone else and are kept.
const OWN_CONDITIONS: [&str; 5] =
    ["PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady", "PodScheduled"];

/// The kubelet's as well, but there only while it is true.
const RESIZING: &str = "PodResizeInProgress";

/// What the status depends on beside the pod and the runtime.
pub struct Context<'a> {
    pub facts: &'a Facts,
    pub host_ips: &'a [String],
    pub now: Timestamp,
    /// The last status that this kubelet computed, or else the API's.
    pub previous: &'a PodStatus,
}

pub fn status(pod: &Pod, observed: &RuntimePod, cx: &Context<'_>) -> PodStatus {
    let spec = pod.spec.clone().unwrap_or_default();
    let init: Vec<Spec> = spec.init_containers.unwrap_or_default();
    let has_init = !init.is_empty();
    let of = |specs: &[Spec], old: &Option<Vec<ContainerStatus>>, is_init: bool| -> Vec<ContainerStatus> {
        specs.iter().map(|spec| container_status(pod, spec, observed, cx, old, has_init, is_init)).collect()
    };
    let containers = of(&spec.containers, &cx.previous.container_statuses, false);
    let init_statuses = of(&init, &cx.previous.init_container_statuses, true);
    let ephemeral_specs: Vec<Spec> = spec.ephemeral_containers.iter().flatten().map(ephemeral_as_container).collect();
    let ephemeral: Vec<ContainerStatus> = ephemeral_specs
        .iter()
        .map(|spec| container_status(pod, spec, observed, cx, &cx.previous.ephemeral_container_statuses, false, false))
        .collect();

    let verdict = plan::verdict(pod, cx.facts, cx.now);
    let ended = cx.facts.ending_since.is_some() && observed.alive().next().is_none();
    let mut phase = phase(pod, &init, &init_statuses, &containers, ended, plan::is_initialized(pod, observed));
    let final_phase = |phase: &Option<String>| phase.clone().filter(|phase| phase == "Succeeded" || phase == "Failed");
    let api = pod.status.as_ref();
    if let Some(known) = final_phase(&cx.previous.phase).or_else(|| api.and_then(|api| final_phase(&api.phase))) {
        phase = known;
    }
    let (mut reason, mut message) = (None, None);
    if cx.previous.phase.as_deref() == Some(&phase) {
        reason = cx.previous.reason.clone();
        message = cx.previous.message.clone();
    }
    if let Some(verdict) = verdict {
        phase = "Failed".to_owned();
        reason = Some(verdict.reason.to_owned());
        message = Some(verdict.message);
    }

    // A refused pod never had containers, and its status does not pretend so.
    let refused = cx.facts.verdict.is_some() && observed.is_empty();
    let shown = |list: Vec<ContainerStatus>| Some(list).filter(|list| !list.is_empty() && !refused);
    let mut status = PodStatus {
        phase: Some(phase),
        reason,
        message,
        container_statuses: shown(containers),
        init_container_statuses: shown(init_statuses),
        ephemeral_container_statuses: Some(ephemeral).filter(|list| !list.is_empty()),
        start_time: cx.facts.start_time.map(Time),
        qos_class: Some(super::qos::class(pod).as_str().to_owned()),
        observed_generation: pod.metadata.generation,
        ..PodStatus::default()
    };
    addresses(pod, observed, cx, &mut status);
    status.conditions = Some(conditions(pod, observed, cx, &init, &status));
    status
}

/// An ephemeral container seen as a container; it lacks only fields that the API forbids for it.
pub fn ephemeral_as_container(spec: &k8s_openapi::api::core::v1::EphemeralContainer) -> Spec {
    let spec = spec.clone();
    Spec {
        args: spec.args,
        command: spec.command,
        env: spec.env,
        env_from: spec.env_from,
        image: spec.image,
        image_pull_policy: spec.image_pull_policy,
        name: spec.name,
        resources: spec.resources,
        restart_policy: Some("Never".to_owned()),
        security_context: spec.security_context,
        stdin: spec.stdin,
        stdin_once: spec.stdin_once,
        termination_message_path: spec.termination_message_path,
        termination_message_policy: spec.termination_message_policy,
        tty: spec.tty,
        volume_mounts: spec.volume_mounts,
        working_dir: spec.working_dir,
        ..Spec::default()
    }
}

fn addresses(pod: &Pod, observed: &RuntimePod, cx: &Context<'_>, status: &mut PodStatus) {
    status.host_ip = cx.host_ips.first().cloned();
    status.host_ips =
        Some(cx.host_ips.iter().map(|ip| HostIP { ip: ip.clone() }).collect::<Vec<_>>()).filter(|ips| !ips.is_empty());
    let host_network = pod.spec.as_ref().and_then(|spec| spec.host_network).unwrap_or(false);
    let ips: Vec<String> = match observed.sandbox() {
        Some(_) if host_network => cx.host_ips.to_vec(),
        Some(sandbox) => sandbox.ips.clone(),
        None => Vec::new(),
    };
    if ips.is_empty() && cx.facts.ending_since.is_some() {
        // The address stays on record after the sandbox has gone.
        status.pod_ip.clone_from(&cx.previous.pod_ip);
        status.pod_ips.clone_from(&cx.previous.pod_ips);
    } else if !ips.is_empty() {
        status.pod_ip = ips.first().cloned();
        status.pod_ips = Some(ips.into_iter().map(|ip| PodIP { ip }).collect());
    }
}

fn terminated(container: &Container) -> ContainerState {
    let text = |text: &str| Some(text.to_owned()).filter(|text| !text.is_empty());
    ContainerState {
        terminated: Some(ContainerStateTerminated {
            exit_code: container.exit_code,
            reason: text(&container.reason),
            message: text(&container.message),
            started_at: Some(Time(whole_seconds(container.started_at.unwrap_or_default()))),
            finished_at: Some(Time(whole_seconds(container.finished_at.unwrap_or_default()))),
            container_id: Some(container_id(container)),
            signal: None,
        }),
        ..ContainerState::default()
    }
}

fn waiting(reason: &str, message: Option<String>) -> ContainerState {
    let waiting = ContainerStateWaiting { reason: Some(reason.to_owned()), message };
    ContainerState { waiting: Some(waiting), ..ContainerState::default() }
}

fn container_id(container: &Container) -> String {
    format!("containerd://{}", container.id)
}

/// The API's times have no fractions; with them a status read back would always differ.
pub fn whole_seconds(time: Timestamp) -> Timestamp {
    Timestamp::from_second(time.as_second()).unwrap_or(time)
}

fn container_status(
    pod: &Pod,
    spec: &Spec,
    observed: &RuntimePod,
    cx: &Context<'_>,
    old: &Option<Vec<ContainerStatus>>,
    has_init: bool,
    is_init: bool,
) -> ContainerStatus {
    let old = old.iter().flatten().find(|status| status.name == spec.name);
    let mut status = ContainerStatus {
        name: spec.name.clone(),
        image: spec.image.clone().unwrap_or_default(),
        started: Some(false),
        volume_mounts: mounts(spec),
        ..ContainerStatus::default()
    };
    let newest = observed.newest(&spec.name);
    let Some(container) = newest else {
        return never_run(spec, cx, old, has_init, is_init, plan::is_initialized(pod, observed), status);
    };
    if !container.image.is_empty() {
        status.image.clone_from(&container.image);
    }
    status.image_id.clone_from(&container.image_id);
    status.container_id = Some(container_id(container));
    status.restart_count = container.restart_count;
    status.last_state = observed.previous(&spec.name).filter(|c| c.state == RunState::Exited).map(terminated);
    if status.last_state.is_none() && container.restart_count > 0 {
        status.last_state = old.and_then(|old| old.last_state.clone());
    }
    status.user = container.user.as_ref().map(|user| ContainerUser {
        linux: Some(LinuxContainerUser {
            uid: user.uid,
            gid: user.gid,
            supplemental_groups: Some(user.supplemental_groups.clone()).filter(|groups| !groups.is_empty()),
        }),
    });
    let as_wanted = cx.facts.applied.get(&container.id);
    let as_wanted = as_wanted.is_none_or(|applied| *applied == super::qos::Resources::of(spec.resources.as_ref()));
    status.resources = match old {
        Some(old) if !as_wanted => old.resources.clone(),
        _ => spec.resources.clone(),
    };
    status.allocated_resources = spec.resources.as_ref().and_then(|resources| resources.requests.clone());
    match container.state {
        RunState::Running => {
            let health = plan::health(cx.facts, spec, container);
            let started_at = Some(Time(whole_seconds(container.started_at.unwrap_or_default())));
            let running = Some(ContainerStateRunning { started_at });
            status.state = Some(ContainerState { running, ..ContainerState::default() });
            status.started = Some(health.started);
            status.ready = if is_init && !plan::is_sidecar(spec) { false } else { health.started && health.ready };
        }
        RunState::Created | RunState::Unknown => {
            status.state =
                Some(ContainerState { waiting: Some(ContainerStateWaiting::default()), ..Default::default() });
        }
        RunState::Exited => {
            status.state = Some(terminated(container));
            // A completed init container counts as ready.
            status.ready = is_init && container.exit_code == 0 && !plan::is_sidecar(spec);
            may_be_waiting(pod, spec, container, cx, is_init, &mut status);
        }
    }
    status
}

/// A dead container that will start again, but not now, is waiting; its end moves to the last state.
fn may_be_waiting(
    pod: &Pod,
    spec: &Spec,
    container: &Container,
    cx: &Context<'_>,
    is_init: bool,
    status: &mut ContainerStatus,
) {
    if cx.facts.ending_since.is_some() || !plan::should_restart(pod, spec, container.exit_code, is_init) {
        return;
    }
    let crash_loop = plan::backoff_until(cx.facts, container).filter(|until| *until > cx.now);
    let state = if let Some(problem) = cx.facts.problems.get(&spec.name) {
        waiting(problem.reason, Some(problem.message.clone()))
    } else if crash_loop.is_some() {
        let delay = cx.facts.backoff.get(&spec.name).copied().unwrap_or_default();
        waiting("CrashLoopBackOff", Some(backoff_message(pod, spec, delay)))
    } else {
        return;
    };
    status.last_state = status.state.replace(state);
}

/// `back-off 20s restarting failed container=c pod=p_ns(uid)`, as events and states say it.
pub fn backoff_message(pod: &Pod, spec: &Spec, delay: std::time::Duration) -> String {
    let text = |text: &Option<String>| text.clone().unwrap_or_default();
    let (name, namespace, uid) = (text(&pod.metadata.name), text(&pod.metadata.namespace), super::runtime_uid(pod));
    let seconds = delay.as_secs();
    let delay = if seconds < 60 { format!("{seconds}s") } else { format!("{}m{}s", seconds / 60, seconds % 60) };
    format!("back-off {delay} restarting failed container={} pod={name}_{namespace}({uid})", spec.name)
}

fn never_run(
    spec: &Spec,
    cx: &Context<'_>,
    old: Option<&ContainerStatus>,
    has_init: bool,
    is_init: bool,
    initialized: bool,
    mut status: ContainerStatus,
) -> ContainerStatus {
    if let Some(old) = old {
        let was_terminated = old.state.as_ref().is_some_and(|state| state.terminated.is_some());
        if was_terminated {
            return old.clone();
        }
        status.restart_count = old.restart_count;
        status.last_state.clone_from(&old.last_state);
        if old.state.as_ref().is_some_and(|state| state.running.is_some()) {
            lost(old, cx.facts.ending_since.is_some(), &mut status);
            if cx.facts.ending_since.is_some() {
                return status;
            }
        }
    }
    if is_init && initialized && !plan::is_sidecar(spec) {
        let completed = ContainerStateTerminated { reason: Some("Completed".to_owned()), ..Default::default() };
        status.state = Some(ContainerState { terminated: Some(completed), ..ContainerState::default() });
        status.ready = true;
        return status;
    }
    let default = if has_init { "PodInitializing" } else { "ContainerCreating" };
    status.state = Some(match cx.facts.problems.get(&spec.name) {
        Some(problem) => waiting(problem.reason, Some(problem.message.clone())),
        None => waiting(default, None),
    });
    status
}

/// The API says that it ran, the runtime has no trace of it.
fn lost(old: &ContainerStatus, ending: bool, status: &mut ContainerStatus) {
    let gone = ContainerState {
        terminated: Some(ContainerStateTerminated {
            exit_code: 137,
            reason: Some("ContainerStatusUnknown".to_owned()),
            message: Some("The container could not be located when the pod was terminated".to_owned()),
            ..ContainerStateTerminated::default()
        }),
        ..ContainerState::default()
    };
    if ending {
        status.state = Some(gone);
        status.container_id.clone_from(&old.container_id);
        status.image_id.clone_from(&old.image_id);
    } else {
        status.last_state = Some(gone);
        status.restart_count += 1;
    }
}

fn mounts(spec: &Spec) -> Option<Vec<VolumeMountStatus>> {
    let mounts = spec.volume_mounts.as_ref()?;
    let status = |mount: &k8s_openapi::api::core::v1::VolumeMount| VolumeMountStatus {
        name: mount.name.clone(),
        mount_path: mount.mount_path.clone(),
        read_only: mount.read_only,
        recursive_read_only: mount.read_only.filter(|read_only| *read_only).map(|_| "Disabled".to_owned()),
        ..VolumeMountStatus::default()
    };
    Some(mounts.iter().map(status).collect())
}

/// The last exit code of a container that is not running: of its end, or of the run before the present wait.
fn last_exit(status: &ContainerStatus) -> Option<i32> {
    let ended = |state: &Option<ContainerState>| Some(state.as_ref()?.terminated.as_ref()?.exit_code);
    ended(&status.state).or_else(|| ended(&status.last_state))
}

fn is_running(status: &ContainerStatus) -> bool {
    status.state.as_ref().is_some_and(|state| state.running.is_some())
}

fn phase(
    pod: &Pod,
    init: &[Spec],
    init_statuses: &[ContainerStatus],
    statuses: &[ContainerStatus],
    ended: bool,
    initialized: bool,
) -> String {
    let (mut pending, mut running, mut waiting) = (false, 0, 0);
    for (spec, status) in init.iter().zip(init_statuses) {
        let exit = last_exit(status);
        if plan::is_sidecar(spec) {
            running += usize::from(is_running(status));
            let not_started = status.started != Some(true) && (is_running(status) || exit.is_none());
            pending |= not_started && !initialized;
            waiting += usize::from(!is_running(status) && exit.is_none());
            continue;
        }
        match exit {
            Some(code) if code != 0 && !plan::should_restart(pod, spec, code, true) && !is_running(status) => {
                return "Failed".to_owned();
            }
            Some(code) if code != 0 => {}
            Some(_) if !is_running(status) => {}
            _ => pending = true,
        }
    }
    let specs = pod.spec.as_ref().map(|spec| spec.containers.as_slice()).unwrap_or_default();
    let (mut stopped, mut succeeded, mut final_stops) = (0, 0, 0);
    for (spec, status) in specs.iter().zip(statuses) {
        match last_exit(status) {
            _ if is_running(status) => running += 1,
            None => waiting += 1,
            Some(code) => {
                stopped += 1;
                succeeded += usize::from(code == 0);
                final_stops += usize::from(!plan::should_restart(pod, spec, code, false));
            }
        }
    }
    // Nothing that has not run by the end will: a pod that ends is finished, whatever it was waiting for.
    let phase = if ended && (pending || waiting > 0) && !super::is_static(pod) {
        "Failed"
    } else if pending || waiting > 0 {
        "Pending"
    } else if running > 0 {
        "Running"
    } else if stopped == 0 {
        "Pending"
    } else if (ended && !super::is_static(pod)) || stopped == final_stops {
        if stopped == succeeded { "Succeeded" } else { "Failed" }
    } else {
        "Running"
    };
    phase.to_owned()
}

fn conditions(
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
    list
}

fn is_own(type_: &str) -> bool {
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

/// The strategic merge patch that turns `old` into `new`; `None` when they are the same. Conditions that are not the
/// kubelet's are never mentioned, so that no one else's write is lost.
pub fn patch(uid: &str, old: &PodStatus, new: &PodStatus) -> Result<Option<Value>, serde_json::Error> {
    let (Value::Object(old), Value::Object(new)) = (serde_json::to_value(old)?, serde_json::to_value(new)?) else {
        return Ok(None);
    };
    let mut changes = Map::new();
    for (key, value) in &new {
        let before = old.get(key);
        if canonical(before.unwrap_or(&Value::Null)) == canonical(value) {
            continue;
        }
        let change = match key.as_str() {
            "conditions" => changed_conditions(before, value),
            "podIPs" | "hostIPs" => {
                let mut entries = value.as_array().cloned().unwrap_or_default();
                entries.insert(0, json!({"$patch": "replace"}));
                Some(Value::Array(entries))
            }
            _ => Some(value.clone()),
        };
        changes.extend(change.map(|change| (key.clone(), change)));
    }
    // Fields that are another component's are left alone even if this version does not produce them.
    for key in ["podIP", "podIPs", "reason", "message", "initContainerStatuses"] {
        if old.get(key).is_some_and(|old| !canonical(old).is_null()) && !new.contains_key(key) {
            changes.insert(key.to_owned(), Value::Null);
        }
    }
    if changes.is_empty() {
        return Ok(None);
    }
    Ok(Some(json!({"metadata": {"uid": uid}, "status": changes})))
}

/// The value without the parts that say nothing: the server writes `lastState: {}` where others write nothing.
fn canonical(value: &Value) -> Value {
    match value {
        Value::Object(fields) => {
            let full = fields.iter().map(|(key, value)| (key.clone(), canonical(value)));
            let full: Map<String, Value> = full.filter(|(_, value)| !value.is_null()).collect();
            if full.is_empty() { Value::Null } else { Value::Object(full) }
        }
        Value::Array(list) if list.is_empty() => Value::Null,
        Value::Array(list) => Value::Array(list.iter().map(canonical).collect()),
        Value::String(text) if text.is_empty() => Value::Null,
        other => other.clone(),
    }
}

fn changed_conditions(old: Option<&Value>, new: &Value) -> Option<Value> {
    let old: Vec<Value> = old.and_then(Value::as_array).into_iter().flatten().map(canonical).collect();
    let new = new.as_array()?;
    let is_resizing = |list: &[Value]| list.iter().any(|condition| condition["type"] == RESIZING);
    let mut changed: Vec<Value> = new
        .iter()
        .filter(|condition| condition["type"].as_str().is_some_and(is_own) && !old.contains(&canonical(condition)))
        .map(|condition| {
            let mut condition = condition.clone();
            // A merge keeps what it does not name.
            for key in ["reason", "message"] {
                if condition.get(key).is_none() {
                    condition[key] = Value::Null;
                }
            }
            condition
        })
        .collect();
    if is_resizing(&old) && !is_resizing(new) {
        changed.push(json!({"$patch": "delete", "type": RESIZING}));
    }
    (!changed.is_empty()).then_some(Value::Array(changed))
}

#[cfg(test)]
#[path = "status_tests.rs"]
mod tests;
