//! The status of a pod for the API, computed from the spec, what the runtime reports and what the worker remembers.
//! Pure: the same inputs give the same status, which is why "write only on change" is a comparison.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{
    Container as Spec, ContainerState, ContainerStateRunning, ContainerStateTerminated, ContainerStateWaiting,
    ContainerStatus, ContainerUser, HostIP, LinuxContainerUser, Pod, PodIP, PodStatus, VolumeMountStatus,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::conditions::conditions;
use super::observed::{Container, RunState, RuntimePod};
use super::plan::{self, Facts};

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
            status.state = Some(waiting(until_it_runs(has_init), None));
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
    let default = until_it_runs(has_init);
    status.state = Some(match cx.facts.problems.get(&spec.name) {
        Some(problem) => waiting(problem.reason, Some(problem.message.clone())),
        None => waiting(default, None),
    });
    status
}

/// Why a container that was never started does not run.
fn until_it_runs(has_init: bool) -> &'static str {
    if has_init { "PodInitializing" } else { "ContainerCreating" }
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
pub(super) fn last_exit(status: &ContainerStatus) -> Option<i32> {
    let ended = |state: &Option<ContainerState>| Some(state.as_ref()?.terminated.as_ref()?.exit_code);
    ended(&status.state).or_else(|| ended(&status.last_state))
}

pub(super) fn is_running(status: &ContainerStatus) -> bool {
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

#[cfg(test)]
#[path = "status_tests.rs"]
mod tests;
