//! The policy of the kubelet: from what a pod should be and what the runtime says it is to the next actions. Pure; it
//! reads no clock, makes no call and remembers nothing. What has to be remembered between two looks (probe results,
//! back-off, failed attempts) is handed in as [`Facts`].
//!
//! Actions are proposals for now: the worker runs those whose [`Lane`] is free and asks again after each one ends, so
//! a plan may name the same action many times.

use std::collections::HashMap;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container as Spec, Pod};

use super::observed::{Container, RunState, RuntimePod};
use super::qos::Resources;

/// First delay between two starts of a failing container; doubles up to [`BACKOFF_MAX`].
pub const BACKOFF_START: Duration = Duration::from_secs(10);
pub const BACKOFF_MAX: Duration = Duration::from_secs(300);
/// A container that ran this long starts again with a clean record.
pub const BACKOFF_FORGIVE: Duration = Duration::from_secs(600);
/// Dead containers that are kept of each name, for `kubectl logs --previous`, beside the newest.
const KEEP_PREVIOUS: usize = 1;

/// What probes say about one running container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Health {
    /// The startup probe has succeeded, or there is none and the container runs.
    pub started: bool,
    pub alive: bool,
    pub ready: bool,
}

impl Health {
    /// Before any probe has answered.
    pub fn initial(spec: &Spec) -> Self {
        Self { started: spec.startup_probe.is_none(), alive: true, ready: spec.readiness_probe.is_none() }
    }
}

/// Why something does not run, in the words of the API: the waiting state's reason and message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    pub reason: &'static str,
    pub message: String,
    /// Not to be tried again before this time.
    pub retry_at: Timestamp,
}

/// A decision of this node that the pod must end, other than its deletion.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    pub reason: &'static str,
    pub message: String,
    /// Seconds that the containers have, if not what the pod asks for.
    pub grace: Option<i64>,
    /// The pod did nothing wrong: it has to make room. Its conditions say so.
    pub is_disruption: bool,
}

/// Why a pod could not be prepared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unprepared {
    /// Not now; it is tried again.
    Problem(Problem),
    /// Never on this node.
    Refused(Verdict),
}

impl From<Problem> for Unprepared {
    fn from(problem: Problem) -> Self {
        Self::Problem(problem)
    }
}

/// What the worker remembers between two looks at the pod.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// By container id.
    pub health: HashMap<String, Health>,
    /// By container id: the resources that it runs with.
    pub applied: HashMap<String, Resources>,
    /// Applying other resources failed; not again before this time.
    pub resize_retry: Option<Timestamp>,
    /// By container name: how long after its end a container may start again.
    pub backoff: HashMap<String, Duration>,
    /// By container name: the last attempt to start it failed.
    pub problems: HashMap<String, Problem>,
    /// The last attempt to prepare the pod (cgroup, volumes, sandbox) failed.
    pub pod_problem: Option<Problem>,
    /// Rejected at admission, or evicted.
    pub verdict: Option<Verdict>,
    /// The object is gone from its source (API or file).
    pub removed: bool,
    /// When this kubelet first saw the pod; the API's `status.startTime`.
    pub start_time: Option<Timestamp>,
    /// When ending the pod began.
    pub ending_since: Option<Timestamp>,
    /// Volumes are unmounted and the cgroup is gone.
    pub released: bool,
    /// Giving back what the pod holds failed; not again before this time.
    pub release_retry: Option<Timestamp>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Prepare directories, cgroup and volumes and start a sandbox.
    CreateSandbox {
        attempt: u32,
    },
    StopSandbox {
        id: String,
    },
    RemoveSandbox {
        id: String,
    },
    /// Pull the image if necessary, create, start, run the postStart hook.
    Start {
        name: String,
        restart_count: i32,
    },
    /// Run the preStop hook and stop within `grace` seconds.
    Kill {
        id: String,
        name: String,
        grace: i64,
        message: String,
    },
    /// Give a running container, and its pod's cgroup, other resources.
    Resize {
        id: String,
        name: String,
    },
    /// Remove a dead container and its log.
    Remove {
        id: String,
    },
    /// Unmount the volumes and remove the cgroup.
    Release,
    /// Nothing of the pod runs any more: delete the API object.
    Delete,
    /// The object is gone and nothing runs: forget the pod and remove its directories.
    Forget,
}

/// Actions of one lane exclude each other; different lanes run side by side.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Lane {
    /// The sandbox and the starting of containers, which happens in the order of the spec.
    Start,
    /// What is done to one existing container.
    Container(String),
    /// Giving back what the pod holds.
    End,
}

impl Action {
    pub fn lane(&self) -> Lane {
        match self {
            Self::CreateSandbox { .. } | Self::Start { .. } => Lane::Start,
            Self::Kill { id, .. } | Self::Remove { id } | Self::Resize { id, .. } => Lane::Container(id.clone()),
            Self::StopSandbox { .. } | Self::RemoveSandbox { .. } | Self::Release | Self::Delete | Self::Forget => {
                Lane::End
            }
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    pub actions: Vec<Action>,
    /// Look again at this time even if nothing happens before.
    pub look_at: Option<Timestamp>,
    /// The pod must not run (any more): starts under way are to be given up.
    pub ending: bool,
}

impl Plan {
    fn push(&mut self, action: Action) {
        self.actions.push(action);
    }

    fn look_at(&mut self, at: Timestamp) {
        self.look_at = Some(self.look_at.map_or(at, |earlier| earlier.min(at)));
    }
}

pub fn is_sidecar(spec: &Spec) -> bool {
    spec.restart_policy.as_deref() == Some("Always")
}

fn init_specs(pod: &Pod) -> &[Spec] {
    pod.spec.as_ref().and_then(|spec| spec.init_containers.as_deref()).unwrap_or_default()
}

fn app_specs(pod: &Pod) -> &[Spec] {
    pod.spec.as_ref().map(|spec| spec.containers.as_slice()).unwrap_or_default()
}

/// Whether a container that ended with this code may be started again, by its own policy or else the pod's.
pub fn should_restart(pod: &Pod, spec: &Spec, exit_code: i32, is_init: bool) -> bool {
    for rule in spec.restart_policy_rules.iter().flatten() {
        let Some(codes) = &rule.exit_codes else { continue };
        let listed = codes.values.as_ref().is_some_and(|values| values.contains(&exit_code));
        let matches = if codes.operator == "NotIn" { !listed } else { listed };
        if matches && rule.action == "Restart" {
            return true;
        }
    }
    let pod_policy = pod.spec.as_ref().and_then(|spec| spec.restart_policy.as_deref()).unwrap_or("Always");
    match spec.restart_policy.as_deref().unwrap_or(pod_policy) {
        "Never" => false,
        "OnFailure" => exit_code != 0,
        // An init container that succeeded is done, whatever the policy.
        _ => !is_init || is_sidecar(spec) || exit_code != 0,
    }
}

/// When the pod runs out of its `activeDeadlineSeconds`.
pub fn deadline(pod: &Pod, facts: &Facts) -> Option<Timestamp> {
    let seconds = pod.spec.as_ref()?.active_deadline_seconds?;
    facts.start_time?.checked_add(Duration::from_secs(u64::try_from(seconds).unwrap_or(0))).ok()
}

/// The reason for which this node ends the pod, if there is one.
pub fn verdict(pod: &Pod, facts: &Facts, now: Timestamp) -> Option<Verdict> {
    if let Some(verdict) = &facts.verdict {
        return Some(verdict.clone());
    }
    deadline(pod, facts).filter(|deadline| now >= *deadline).map(|_| Verdict {
        reason: "DeadlineExceeded",
        message: "Pod was active on the node longer than the specified deadline".to_owned(),
        ..Verdict::default()
    })
}

/// All containers have ended for good and by themselves.
pub fn is_finished(pod: &Pod, observed: &RuntimePod) -> bool {
    let ended = |spec: &Spec, is_init| {
        observed.newest(&spec.name).is_some_and(|container| {
            container.state == RunState::Exited && !should_restart(pod, spec, container.exit_code, is_init)
        })
    };
    let init_failed = init_specs(pod).iter().any(|spec| {
        let failed = observed.newest(&spec.name).is_some_and(|container| container.exit_code != 0);
        !is_sidecar(spec) && failed && ended(spec, true)
    });
    init_failed || (!app_specs(pod).is_empty() && app_specs(pod).iter().all(|spec| ended(spec, false)))
}

/// The phase that the API already knows is final.
pub fn is_terminal(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    matches!(phase, Some("Succeeded" | "Failed"))
}

pub fn health(facts: &Facts, spec: &Spec, container: &Container) -> Health {
    facts.health.get(&container.id).copied().unwrap_or_else(|| Health::initial(spec))
}

/// The time before which a dead container must not start again.
pub fn backoff_until(facts: &Facts, container: &Container) -> Option<Timestamp> {
    let delay = facts.backoff.get(&container.name)?;
    container.finished_at?.checked_add(*delay).ok()
}

/// The next delay after starting a container again that ran from `started` to `finished`.
pub fn next_backoff(current: Option<Duration>, ended: &Container) -> Duration {
    let ran = match (ended.started_at, ended.finished_at) {
        (Some(started), Some(finished)) => Duration::try_from(finished.duration_since(started)).unwrap_or_default(),
        _ => Duration::ZERO,
    };
    match current {
        Some(delay) if ran < BACKOFF_FORGIVE => (delay * 2).min(BACKOFF_MAX),
        _ => BACKOFF_START,
    }
}

/// The spec's fields whose change needs a new container.
pub fn container_hash(spec: &Spec) -> String {
    // FNV-1a: small, stable across versions of this program.
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    for byte in spec.name.bytes().chain([0]).chain(spec.image.iter().flat_map(|image| image.bytes())) {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    format!("{hash:x}")
}

/// The next actions for this pod; see the module.
pub fn plan(pod: &Pod, observed: &RuntimePod, facts: &Facts, now: Timestamp) -> Plan {
    let mut plan = Plan::default();
    let deleted = pod.metadata.deletion_timestamp.is_some() || facts.removed;
    let terminal = is_terminal(pod) || is_finished(pod, observed);
    if deleted || terminal || verdict(pod, facts, now).is_some() {
        plan.ending = true;
        end(pod, observed, facts, now, deleted, &mut plan);
        return plan;
    }
    if let Some(deadline) = deadline(pod, facts) {
        plan.look_at(deadline);
    }
    if !prepare(pod, observed, facts, now, &mut plan) {
        return plan;
    }
    kill_unfit(pod, observed, facts, &mut plan);
    resize(pod, observed, facts, now, &mut plan);
    if start_init(pod, observed, facts, now, &mut plan) {
        for spec in app_specs(pod) {
            start_if_due(pod, spec, observed, facts, now, false, &mut plan);
        }
    }
    for spec in pod.spec.iter().flat_map(|spec| spec.ephemeral_containers.iter().flatten()) {
        let failed = facts.problems.get(&spec.name);
        if observed.newest(&spec.name).is_none() && failed.is_none_or(|problem| problem.retry_at <= now) {
            plan.push(Action::Start { name: spec.name.clone(), restart_count: 0 });
        } else if let Some(problem) = failed {
            plan.look_at(problem.retry_at);
        }
    }
    prune(observed, &mut plan);
    plan
}

/// Seconds that containers of an ending pod still have, at least one.
fn remaining_grace(pod: &Pod, facts: &Facts, now: Timestamp) -> i64 {
    let spec_grace = pod.spec.as_ref().and_then(|spec| spec.termination_grace_period_seconds).unwrap_or(30);
    let decided = facts.verdict.as_ref().and_then(|verdict| verdict.grace);
    let shortest = pod.metadata.deletion_grace_period_seconds.into_iter().chain(decided).min();
    let grace = shortest.unwrap_or(spec_grace);
    let spent = facts.ending_since.map_or(0, |since| now.duration_since(since).as_secs());
    (grace - spent).max(1)
}

/// Ends the pod: application containers first, then sidecars from the last to the first, then the sandbox, then what
/// the pod holds, at last the object.
fn end(pod: &Pod, observed: &RuntimePod, facts: &Facts, now: Timestamp, deleted: bool, plan: &mut Plan) {
    let grace = remaining_grace(pod, facts, now);
    let kill = |container: &Container| Action::Kill {
        id: container.id.clone(),
        name: container.name.clone(),
        grace,
        message: format!("Stopping container {}", container.name),
    };
    let sidecars: Vec<&str> =
        init_specs(pod).iter().filter(|spec| is_sidecar(spec)).map(|spec| spec.name.as_str()).collect();
    let (last, first): (Vec<_>, Vec<_>) =
        observed.alive().partition(|container| sidecars.contains(&container.name.as_str()));
    if !first.is_empty() {
        plan.actions.extend(first.into_iter().map(kill));
        return;
    }
    let order = |container: &&Container| sidecars.iter().position(|name| *name == container.name);
    if let Some(position) = last.iter().filter_map(order).max() {
        plan.actions.extend(last.into_iter().filter(|container| order(container) == Some(position)).map(kill));
        return;
    }
    if let Some(sandbox) = observed.sandboxes.iter().find(|sandbox| sandbox.ready) {
        plan.push(Action::StopSandbox { id: sandbox.id.clone() });
    } else if !facts.released {
        match facts.release_retry {
            Some(retry) if retry > now => plan.look_at(retry),
            _ => plan.push(Action::Release),
        }
    } else if facts.removed {
        forget(observed, plan);
    } else if deleted {
        plan.push(Action::Delete);
    } else {
        prune(observed, plan);
    }
}

fn forget(observed: &RuntimePod, plan: &mut Plan) {
    if !observed.containers.is_empty() {
        plan.actions.extend(observed.containers.iter().map(|container| Action::Remove { id: container.id.clone() }));
    } else if let Some(sandbox) = observed.sandboxes.first() {
        plan.push(Action::RemoveSandbox { id: sandbox.id.clone() });
    } else {
        plan.push(Action::Forget);
    }
}

/// Whether the pod needs a new sandbox.
pub fn sandbox_is_usable(pod: &Pod, observed: &RuntimePod) -> bool {
    let host_network = pod.spec.as_ref().and_then(|spec| spec.host_network).unwrap_or(false);
    observed.sandbox().is_some_and(|sandbox| sandbox.ready && (host_network || !sandbox.ips.is_empty()))
}

/// A usable sandbox, or the way to one. True when containers can be started.
fn prepare(pod: &Pod, observed: &RuntimePod, facts: &Facts, now: Timestamp, plan: &mut Plan) -> bool {
    if sandbox_is_usable(pod, observed) {
        return true;
    }
    let alive: Vec<_> = observed.alive().collect();
    if !alive.is_empty() {
        plan.actions.extend(alive.into_iter().map(|container| Action::Kill {
            id: container.id.clone(),
            name: container.name.clone(),
            grace: remaining_grace(pod, facts, now),
            message: format!("Stopping container {}", container.name),
        }));
        return false;
    }
    if let Some(sandbox) = observed.sandboxes.iter().find(|sandbox| sandbox.ready) {
        plan.push(Action::StopSandbox { id: sandbox.id.clone() });
        return false;
    }
    match &facts.pod_problem {
        Some(problem) if problem.retry_at > now => plan.look_at(problem.retry_at),
        _ => {
            let attempt = observed.sandboxes.iter().map(|sandbox| sandbox.attempt + 1).max().unwrap_or(0);
            plan.push(Action::CreateSandbox { attempt });
        }
    }
    false
}

/// Containers that run but must not go on as they are; they start again afterwards if their policy says so.
fn kill_unfit(pod: &Pod, observed: &RuntimePod, facts: &Facts, plan: &mut Plan) {
    let current = observed.sandbox().map(|sandbox| sandbox.id.as_str()).unwrap_or_default();
    let specs: HashMap<&str, &Spec> =
        init_specs(pod).iter().chain(app_specs(pod)).map(|spec| (spec.name.as_str(), spec)).collect();
    for container in observed.alive() {
        let Some(spec) = specs.get(container.name.as_str()) else { continue };
        let health = health(facts, spec, container);
        let why = if container.sandbox_id != current || container.state == RunState::Unknown {
            "is in an unknown state"
        } else if container.hash != container_hash(spec) && !container.hash.is_empty() {
            "definition changed"
        } else if !health.alive && !health.started {
            "failed startup probe"
        } else if !health.alive {
            "failed liveness probe"
        } else {
            continue;
        };
        let restarts = should_restart(pod, spec, 137, init_specs(pod).iter().any(|init| init.name == spec.name));
        let tail = if restarts { ", will be restarted" } else { "" };
        let probe = if health.started { &spec.liveness_probe } else { &spec.startup_probe };
        let probe_grace = probe.as_ref().and_then(|probe| probe.termination_grace_period_seconds);
        let pod_grace = pod.spec.as_ref().and_then(|spec| spec.termination_grace_period_seconds).unwrap_or(30);
        plan.push(Action::Kill {
            id: container.id.clone(),
            name: container.name.clone(),
            grace: probe_grace.filter(|_| !health.alive).unwrap_or(pod_grace),
            message: format!("Container {} {why}{tail}", container.name),
        });
    }
}

/// Running containers whose spec asks for other resources than they run with, and what that is.
fn outgrown<'a>(
    pod: &'a Pod,
    observed: &'a RuntimePod,
    facts: &'a Facts,
) -> impl Iterator<Item = (&'a Spec, &'a Container, &'a Resources)> {
    let specs = init_specs(pod).iter().filter(|spec| is_sidecar(spec)).chain(app_specs(pod));
    specs.filter_map(|spec| {
        let container = observed.current(&spec.name).filter(|container| container.is_running())?;
        let applied = facts.applied.get(&container.id)?;
        (Resources::of(spec.resources.as_ref()) != *applied).then_some((spec, container, applied))
    })
}

/// Resources of the spec are not yet those that its containers run with.
pub fn is_resizing(pod: &Pod, observed: &RuntimePod, facts: &Facts) -> bool {
    outgrown(pod, observed, facts).next().is_some()
}

/// Applies changed resources to running containers, in place or by a restart, as the container asks for.
fn resize(pod: &Pod, observed: &RuntimePod, facts: &Facts, now: Timestamp, plan: &mut Plan) {
    if let Some(retry) = facts.resize_retry.filter(|retry| *retry > now) {
        plan.look_at(retry);
        return;
    }
    for (spec, container, applied) in outgrown(pod, observed, facts) {
        if plan.actions.iter().any(|action| action.lane() == Lane::Container(container.id.clone())) {
            continue;
        }
        let wanted = Resources::of(spec.resources.as_ref());
        let cpu_changed = (wanted.cpu_request, wanted.cpu_limit) != (applied.cpu_request, applied.cpu_limit);
        let memory_changed = wanted.memory_limit != applied.memory_limit;
        let restarts = spec.resize_policy.iter().flatten().any(|policy| {
            let changed = if policy.resource_name == "cpu" { cpu_changed } else { memory_changed };
            policy.restart_policy == "RestartContainer" && changed
        });
        plan.push(if restarts {
            Action::Kill {
                id: container.id.clone(),
                name: spec.name.clone(),
                grace: pod.spec.as_ref().and_then(|spec| spec.termination_grace_period_seconds).unwrap_or(30),
                message: format!("Container {} resize requires restart", spec.name),
            }
        } else {
            Action::Resize { id: container.id.clone(), name: spec.name.clone() }
        });
    }
}

/// Moves the init containers forward. True when the application containers may run.
fn start_init(pod: &Pod, observed: &RuntimePod, facts: &Facts, now: Timestamp, plan: &mut Plan) -> bool {
    let initialized = is_initialized(pod, observed);
    for spec in init_specs(pod) {
        let container = observed.current(&spec.name);
        if is_sidecar(spec) {
            let running = container.filter(|container| container.is_running());
            if running.is_none() {
                start_if_due(pod, spec, observed, facts, now, true, plan);
            }
            let started = running.is_some_and(|container| health(facts, spec, container).started);
            if !initialized && !started {
                return false;
            }
            continue;
        }
        if initialized {
            continue;
        }
        match container {
            Some(container) if container.state == RunState::Exited && container.exit_code == 0 => {}
            _ => {
                start_if_due(pod, spec, observed, facts, now, true, plan);
                return false;
            }
        }
    }
    true
}

/// An application container has been started in this sandbox, so the init containers are behind us.
pub fn is_initialized(pod: &Pod, observed: &RuntimePod) -> bool {
    app_specs(pod).iter().any(|spec| observed.current(&spec.name).is_some_and(|c| c.state != RunState::Created))
}

fn start_if_due(
    pod: &Pod,
    spec: &Spec,
    observed: &RuntimePod,
    facts: &Facts,
    now: Timestamp,
    is_init: bool,
    plan: &mut Plan,
) {
    let newest = observed.newest(&spec.name);
    if let Some(container) = observed.current(&spec.name) {
        match container.state {
            RunState::Running | RunState::Unknown => return,
            RunState::Exited if !should_restart(pod, spec, container.exit_code, is_init) => return,
            // Created and never started: the attempt was cut off. It is replaced, and pruned later.
            RunState::Exited | RunState::Created => {}
        }
    } else if let Some(earlier) = newest
        && earlier.state == RunState::Exited
        && !is_init
        && !should_restart(pod, spec, earlier.exit_code, is_init)
    {
        // It ended for good in a sandbox that has been replaced since.
        return;
    }
    let retry = facts.problems.get(&spec.name).map(|problem| problem.retry_at);
    let backoff = newest.filter(|container| container.state == RunState::Exited);
    let backoff = backoff.and_then(|container| backoff_until(facts, container));
    match retry.into_iter().chain(backoff).max() {
        Some(at) if at > now => plan.look_at(at),
        _ => {
            let restart_count = newest.map_or(0, |container| container.restart_count.saturating_add(1));
            plan.push(Action::Start { name: spec.name.clone(), restart_count });
        }
    }
}

/// Removes dead containers beyond those that are kept, and sandboxes that hold nothing.
fn prune(observed: &RuntimePod, plan: &mut Plan) {
    let mut seen: HashMap<&str, usize> = HashMap::new();
    for container in &observed.containers {
        let count = seen.entry(&container.name).or_default();
        *count += 1;
        if *count > KEEP_PREVIOUS + 1 && !container.is_alive() {
            plan.push(Action::Remove { id: container.id.clone() });
        }
    }
    for sandbox in observed.sandboxes.iter().skip(1) {
        if !sandbox.ready && !observed.containers.iter().any(|container| container.sandbox_id == sandbox.id) {
            plan.push(Action::RemoveSandbox { id: sandbox.id.clone() });
        }
    }
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
