//! The actor of one pod. It looks at the runtime, asks [`plan`] what to do, runs the actions whose lane is free,
//! reports the status when it changed, and waits for the next thing to happen. It holds no policy.
//!
//! Its mailbox keeps only the newest desired state; everything else that wakes it (a runtime event, a probe, an action
//! that ended, a time) only means "look again".

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, PodStatus};
use tokio::sync::{mpsc, watch};
use tokio::task::{AbortHandle, JoinSet};

use super::api::{self, name_of};
use super::context::NodeContext;
use super::mailbox::{Desired, Handle, Wake};
use super::observed::{Container, RunState, RuntimePod};
use super::plan::{self, Action, Facts, Health, Lane, Plan, Problem, Unprepared};
use super::qos::Resources;
use super::reporter::Reporter;
use super::run::{self, Job};
use super::{runtime_uid, status, termination};
use crate::events::Level;
use crate::objects::api_error;
use crate::probes::{Kind, Prober, Report, Target};
use crate::state::PodView;
use crate::volumes::{self, Volumes};
use crate::watches::{self, Listener, Reference};

/// The safety net under the runtime's events.
const RELIST: Duration = Duration::from_secs(60);
/// The safety net under the watches of what volumes show.
const REFRESH: Duration = Duration::from_secs(600);
/// After a refresh that failed.
const REFRESH_RETRY: Duration = Duration::from_secs(20);
/// After what the pod holds could not be given back.
const RELEASE_RETRY: Duration = Duration::from_secs(5);
/// How long the CRI may lag behind containerd's own exit event, and how often to ask meanwhile.
const EXIT_LAG: Duration = Duration::from_secs(2);
const EXIT_POLL: Duration = Duration::from_millis(15);

type Notes = Option<std::collections::BTreeMap<String, String>>;

/// What an action or a report leaves behind.
enum Outcome {
    Sandbox(Result<Arc<Volumes>, Unprepared>),
    Started {
        name: String,
        /// The dead container that this start replaces.
        replaced: Option<Box<Container>>,
        result: Result<(), Problem>,
    },
    Resized {
        id: String,
        resources: Resources,
        result: Result<(), String>,
    },
    Refreshed(Option<Arc<Volumes>>),
    Released(bool),
    Deleted(Result<(), kube::Error>),
    Reported {
        result: Box<Result<Pod, kube::Error>>,
        status: Box<PodStatus>,
    },
    Forgotten,
    Done,
}

struct Worker {
    node: Arc<NodeContext>,
    desired: watch::Receiver<Desired>,
    wake: Arc<Wake>,
    facts: Facts,
    volumes: Option<Arc<Volumes>>,
    probers: HashMap<String, Prober>,
    reports: (mpsc::Sender<Report>, mpsc::Receiver<Report>),
    tasks: JoinSet<(Option<Lane>, Outcome)>,
    lanes: HashMap<Lane, (AbortHandle, Action)>,
    reporter: Reporter,
    refresh_at: tokio::time::Instant,
    /// The refresh of the volumes that is under way.
    refreshing: Option<AbortHandle>,
    /// What the pod's watches cover; none while it is ending.
    references: BTreeSet<Reference>,
    /// Told by those watches.
    stale: Listener,
    /// Labels and annotations at the last look.
    shown: Option<(Notes, Notes)>,
    /// Termination messages already read, by container id.
    messages: HashMap<String, String>,
    announced: HashSet<String>,
    exit_seen: HashMap<String, tokio::time::Instant>,
}

/// Starts a worker; `ended` gets the uid when the pod is forgotten.
pub fn spawn(node: &Arc<NodeContext>, desired: Desired, ended: mpsc::UnboundedSender<String>) -> Handle {
    let (sender, receiver) = watch::channel(desired);
    let wake = Arc::new(Wake::default());
    let uid = runtime_uid(&receiver.borrow().pod).to_owned();
    let stale = {
        let wake = wake.clone();
        Arc::new(move || {
            wake.volumes_stale.store(true, Ordering::Relaxed);
            wake.notify.notify_one();
        })
    };
    let worker = Worker {
        node: node.clone(),
        desired: receiver,
        wake: wake.clone(),
        facts: Facts::default(),
        volumes: None,
        probers: HashMap::new(),
        reports: mpsc::channel(16),
        tasks: JoinSet::new(),
        lanes: HashMap::new(),
        reporter: Reporter::default(),
        refresh_at: tokio::time::Instant::now() + REFRESH,
        refreshing: None,
        references: BTreeSet::new(),
        stale,
        shown: None,
        messages: HashMap::new(),
        announced: HashSet::new(),
        exit_seen: HashMap::new(),
    };
    tokio::spawn(async move {
        worker.run().await;
        // The manager outlives its workers, except at the end of the process.
        let _ = ended.send(uid);
    });
    Handle::new(sender, wake)
}

impl Worker {
    async fn run(mut self) {
        loop {
            let desired = self.desired.borrow_and_update().clone();
            self.adopt(&desired);
            let observed = match self.observe(&desired.pod).await {
                Ok(observed) => Arc::new(observed),
                Err(error) => {
                    tracing::warn!(pod = name_of(&desired.pod), %error, "cannot ask the container runtime");
                    tokio::time::sleep(Duration::from_secs(1)).await;
                    continue;
                }
            };
            self.follow_probes(&desired, &observed);
            self.follow_references(&desired);
            let now = Timestamp::now();
            let mut plan = plan::plan(&desired.pod, &observed, &self.facts, now);
            if plan.ending && self.facts.ending_since.is_none() {
                self.begin_ending();
                plan = plan::plan(&desired.pod, &observed, &self.facts, now);
            }
            self.report(&desired, &observed, now);
            self.announce_backoff(&desired.pod, &observed, &plan, now);
            self.act(&desired, &observed, &plan);
            if self.wait(&plan, now).await {
                return;
            }
        }
    }

    /// Takes over what the newest desired state says.
    fn adopt(&mut self, desired: &Desired) {
        self.facts.removed |= desired.removed;
        let metadata = &desired.pod.metadata;
        let shown = (metadata.labels.clone(), metadata.annotations.clone());
        if self.shown.as_ref() != Some(&shown) {
            // Files of the downward API show these.
            if self.shown.replace(shown).is_some() {
                self.refresh_at = tokio::time::Instant::now();
            }
        }
        if self.facts.verdict.is_none() {
            self.facts.verdict.clone_from(&desired.verdict);
        }
        self.reporter.adopt(desired.object.as_deref());
        if let Some(object) = desired.object.as_ref().filter(|_| self.facts.start_time.is_none()) {
            let of_api = object.status.as_ref().and_then(|status| status.start_time.as_ref()).map(|time| time.0);
            self.facts.start_time = Some(of_api.unwrap_or_else(|| status::whole_seconds(Timestamp::now())));
        }
    }

    /// Asks the runtime, and once more while it has not yet noticed an end that containerd has announced.
    async fn observe(&mut self, pod: &Pod) -> Result<RuntimePod, crate::cri::RuntimeError> {
        let uid = runtime_uid(pod).to_owned();
        let announced: Vec<String> = self.wake.exited.lock().drain().collect();
        let now = tokio::time::Instant::now();
        self.exit_seen.extend(announced.into_iter().map(|id| (id, now)));
        let mut observed = loop {
            let observed = self.node.state.runtime.observe(&uid).await?;
            let lagging = |id: &String| {
                let running = observed.by_id(id).is_some_and(|container| container.is_running());
                running || observed.sandboxes.iter().any(|sandbox| sandbox.id == *id && sandbox.ready)
            };
            self.exit_seen.retain(|id, since| since.elapsed() < EXIT_LAG && lagging(id));
            if self.exit_seen.is_empty() {
                break observed;
            }
            tokio::time::sleep(EXIT_POLL).await;
        };
        {
            let mut owners = self.node.owners.write();
            let ids = observed.containers.iter().map(|c| &c.id).chain(observed.sandboxes.iter().map(|s| &s.id));
            for id in ids {
                if !owners.contains_key(id) {
                    owners.insert(id.clone(), uid.clone());
                }
            }
        }
        self.messages.retain(|id, _| observed.by_id(id).is_some());
        for container in observed.containers.iter_mut().filter(|container| container.state == RunState::Exited) {
            let message = self.messages.entry(container.id.clone()).or_insert_with(|| termination::message(container));
            if !message.is_empty() {
                container.message.clone_from(message);
            }
        }
        Ok(observed)
    }

    /// Starts probers for containers that run and drops those of containers that do not.
    fn follow_probes(&mut self, desired: &Desired, observed: &RuntimePod) {
        let running: HashMap<&str, _> = observed
            .containers
            .iter()
            .filter(|container| container.is_running())
            .map(|container| (container.id.as_str(), container))
            .collect();
        self.probers.retain(|id, _| running.contains_key(id.as_str()));
        self.facts.health.retain(|id, _| running.contains_key(id.as_str()));
        self.facts.applied.retain(|id, _| running.contains_key(id.as_str()));
        if self.facts.ending_since.is_some() {
            // A pod that is going keeps its readiness probe out of the way of its last requests.
            self.probers.clear();
            return;
        }
        let host_network = super::config::host_network(&desired.pod);
        let ips = if host_network { Some(&self.node.host_ips) } else { observed.sandbox().map(|sandbox| &sandbox.ips) };
        let pod_ip = ips.and_then(|ips| ips.first()).cloned().unwrap_or_default();
        for (id, container) in running {
            let Some(spec) = run::spec_of(&desired.pod, &container.name) else { continue };
            // At first sight it runs with what it was started with.
            let resources = || Resources::of(spec.resources.as_ref());
            self.facts.applied.entry(id.to_owned()).or_insert_with(resources);
            let was_ready = self.reporter.known().is_some_and(|status| was_ready(status, id));
            let health = *self.facts.health.entry(id.to_owned()).or_insert_with(|| {
                // After a restart of the kubelet a ready container stays ready until a probe says otherwise.
                if was_ready { Health { started: true, alive: true, ready: true } } else { Health::initial(&spec) }
            });
            if self.probers.get(id).is_some_and(|prober| prober.started == health.started) {
                continue;
            }
            let target = Target {
                node: self.node.clone(),
                pod: desired.pod.clone(),
                spec: Arc::new(spec),
                container_id: id.to_owned(),
                pod_ip: pod_ip.clone(),
                started_at: container.started_at.unwrap_or_default(),
            };
            let prober = Prober::start(&target, health.started, &self.reports.0);
            self.probers.insert(id.to_owned(), prober);
        }
    }

    /// Has the pod told of changes to what its volumes show, until it ends.
    fn follow_references(&mut self, desired: &Desired) {
        let ending = self.facts.ending_since.is_some();
        let references = if ending { BTreeSet::new() } else { watches::references(&desired.pod) };
        if references != self.references {
            self.node.watches.listen(runtime_uid(&desired.pod), &references, &self.stale);
            self.references = references;
        }
    }

    fn begin_ending(&mut self) {
        self.facts.ending_since = Some(Timestamp::now());
        if let Some((task, action)) = self.lanes.get(&Lane::Start) {
            tracing::debug!(?action, "given up, the pod is ending");
            task.abort();
        }
        if let Some(task) = &self.refreshing {
            task.abort();
        }
        self.probers.clear();
    }

    fn job(&self, desired: &Desired, observed: &Arc<RuntimePod>) -> Job {
        Job {
            node: self.node.clone(),
            pod: desired.pod.clone(),
            observed: observed.clone(),
            volumes: self.volumes.clone(),
        }
    }

    /// Runs the planned actions whose lanes are free.
    fn act(&mut self, desired: &Desired, observed: &Arc<RuntimePod>, plan: &Plan) {
        for action in &plan.actions {
            let lane = action.lane();
            if let Some((task, running)) = self.lanes.get(&lane) {
                // A shorter grace period overrides the one under way.
                match (running, action) {
                    (Action::Kill { grace: old, .. }, Action::Kill { grace, .. }) if *grace + 1 < *old => task.abort(),
                    _ => continue,
                }
            }
            // What is being set up or refreshed cannot be released; it has been told to end.
            let busy = self.refreshing.is_some() || self.lanes.contains_key(&Lane::Start);
            if *action == Action::Release && busy {
                continue;
            }
            // The object must not go before its last status has arrived.
            if *action == Action::Delete && desired.object.is_some() && self.reporter.is_dirty() {
                continue;
            }
            self.spawn(action.clone(), self.job(desired, observed), desired);
        }
        if !plan.ending && observed.sandbox().is_some() {
            self.refresh_volumes(desired, observed);
        }
    }

    /// Brings the volumes up to date when something that they show has changed or got old.
    fn refresh_volumes(&mut self, desired: &Desired, observed: &Arc<RuntimePod>) {
        if self.refreshing.is_some() || !volumes::may_change(&desired.pod) {
            return;
        }
        let stale = self.wake.volumes_stale.swap(false, Ordering::Relaxed);
        if !stale && tokio::time::Instant::now() < self.refresh_at {
            return;
        }
        let job = self.job(desired, observed);
        let task = self.tasks.spawn(async move {
            let result = job.mount_volumes().await;
            if let Err(error) = &result {
                tracing::warn!(
                    pod = name_of(&job.pod),
                    error = apimachinery::process::error_chain(error),
                    "cannot refresh volumes"
                );
            }
            (None, Outcome::Refreshed(result.ok()))
        });
        self.refreshing = Some(task);
    }

    /// Notes what the volumes are now and when they have to be looked at again.
    fn take_volumes(&mut self, volumes: Option<Arc<Volumes>>) {
        let delay = match &volumes {
            None => REFRESH_RETRY,
            Some(volumes) => volumes.refresh_at.map_or(REFRESH, |at| {
                let left = Duration::try_from(at.duration_since(Timestamp::now())).unwrap_or_default();
                left.clamp(Duration::from_secs(1), REFRESH)
            }),
        };
        self.refresh_at = tokio::time::Instant::now() + delay;
        self.volumes = volumes.or(self.volumes.take());
    }

    fn spawn(&mut self, action: Action, job: Job, desired: &Desired) {
        let lane = action.lane();
        tracing::debug!(pod = name_of(&job.pod), ?action, "acting");
        let object = desired.object.clone();
        let (task_lane, work) = (lane.clone(), action.clone());
        let task = self.tasks.spawn(async move {
            let outcome = match work {
                Action::CreateSandbox { attempt } => Outcome::Sandbox(job.create_sandbox(attempt).await),
                Action::Start { name, restart_count } => {
                    let newest = job.observed.newest(&name);
                    let dead = newest.filter(|container| container.state == RunState::Exited);
                    let replaced = dead.cloned().map(Box::new);
                    let result = job.start(&name, restart_count).await;
                    Outcome::Started { name, replaced, result }
                }
                Action::Kill { id, name, grace, message } => {
                    job.kill(&id, &name, grace, &message).await;
                    Outcome::Done
                }
                Action::Resize { id, name } => {
                    let spec = run::spec_of(&job.pod, &name);
                    let resources = Resources::of(spec.and_then(|spec| spec.resources).as_ref());
                    let result = job.resize(&id, &name).await;
                    Outcome::Resized { id, resources, result }
                }
                Action::Remove { id } => {
                    job.remove_container(&id).await;
                    Outcome::Done
                }
                Action::StopSandbox { id } => {
                    job.stop_sandbox(&id).await;
                    Outcome::Done
                }
                Action::RemoveSandbox { id } => {
                    job.remove_sandbox(&id).await;
                    Outcome::Done
                }
                Action::Release => Outcome::Released(job.release().await),
                Action::Delete => Outcome::Deleted(api::delete(job.node.objects.client(), object.as_deref()).await),
                Action::Forget => {
                    job.forget();
                    Outcome::Forgotten
                }
            };
            (Some(task_lane), outcome)
        });
        self.lanes.insert(lane, (task, action));
    }

    /// Computes the status, shows it to the HTTP server, and sends it to the API if it differs.
    fn report(&mut self, desired: &Desired, observed: &Arc<RuntimePod>, now: Timestamp) {
        // Conditions of others live in the API's object, also for a static pod.
        let mut seen = Pod::clone(&desired.pod);
        if let Some(object) = &desired.object {
            seen.status.clone_from(&object.status);
        }
        let (facts, host_ips) = (&self.facts, &self.node.host_ips);
        let computed = self
            .reporter
            .compute(|previous| status::status(&seen, observed, &status::Context { facts, host_ips, now, previous }));
        seen.status = Some(computed.clone());
        // What an earlier pod left on the disk has no name, and nobody asks for it.
        if seen.metadata.name.is_some() {
            let uid = runtime_uid(&desired.pod);
            self.node.state.publish(uid, PodView { pod: Arc::new(seen), observed: observed.clone() });
        }

        let Some(object) = desired.object.clone().filter(|_| !desired.removed) else { return };
        let Some((patch, status)) = self.reporter.next(&object) else { return };
        let (node, status) = (self.node.clone(), Box::new(status));
        self.tasks.spawn(async move {
            let result = Box::new(api::report(node.objects.client(), &object, patch).await);
            (None, Outcome::Reported { result, status })
        });
    }

    /// Tells users once per crash that the next start is being delayed.
    fn announce_backoff(&mut self, pod: &Pod, observed: &RuntimePod, plan: &Plan, now: Timestamp) {
        if plan.ending {
            return;
        }
        self.announced.retain(|id| observed.by_id(id).is_some());
        for container in observed.containers.iter().filter(|container| container.state == RunState::Exited) {
            let newest = observed.newest(&container.name).is_some_and(|newest| newest.id == container.id);
            let delayed = plan::backoff_until(&self.facts, container).is_some_and(|until| until > now);
            if newest && delayed && self.announced.insert(container.id.clone()) {
                let text = |text: &Option<String>| text.clone().unwrap_or_default();
                let (name, namespace) = (text(&pod.metadata.name), text(&pod.metadata.namespace));
                let message = format!(
                    "Back-off restarting failed container {} in pod {name}_{namespace}({})",
                    container.name,
                    runtime_uid(pod)
                );
                self.node.recorder.container(pod, &container.name, Level::Warning, "BackOff", message);
            }
        }
    }

    /// Waits for anything to happen. True when the pod has been forgotten.
    async fn wait(&mut self, plan: &Plan, now: Timestamp) -> bool {
        let mut until = tokio::time::Instant::now() + RELIST;
        if let Some(at) = plan.look_at {
            let delay = Duration::try_from(at.duration_since(now)).unwrap_or_default();
            until = until.min(tokio::time::Instant::now() + delay + Duration::from_millis(5));
        }
        if let Some(retry) = self.reporter.retry_at() {
            until = until.min(retry);
        }
        // One in the past is of a pod whose volumes need no refreshing, or no longer.
        if self.refreshing.is_none() && self.refresh_at > tokio::time::Instant::now() {
            until = until.min(self.refresh_at);
        }
        tokio::select! {
            changed = self.desired.changed() => {
                // Without a manager the process is ending; containers run on.
                changed.is_err()
            }
            () = self.wake.notify.notified() => false,
            Some(report) = self.reports.1.recv() => {
                self.take_report(&report);
                false
            }
            Some(joined) = self.tasks.join_next_with_id() => {
                match joined {
                    Ok((_, (lane, outcome))) => self.take_outcome(lane, outcome),
                    Err(error) => {
                        // Given up by us, or a bug: either way the lane is free again.
                        let id = error.id();
                        self.lanes.retain(|_, (task, _)| task.id() != id);
                        self.refreshing.take_if(|task| task.id() == id);
                        if error.is_panic() {
                            tracing::error!(%error, "an action failed unexpectedly");
                        }
                        false
                    }
                }
            }
            () = tokio::time::sleep_until(until) => false,
        }
    }

    fn take_report(&mut self, report: &Report) {
        let Some(health) = self.facts.health.get_mut(&report.container_id) else { return };
        match (report.kind, report.healthy) {
            (Kind::Startup, true) => health.started = true,
            (Kind::Startup | Kind::Liveness, false) => health.alive = false,
            (Kind::Liveness, true) => health.alive = true,
            (Kind::Readiness, ready) => health.ready = ready,
        }
    }

    fn take_outcome(&mut self, lane: Option<Lane>, outcome: Outcome) -> bool {
        if let Some(lane) = lane {
            self.lanes.remove(&lane);
        }
        match outcome {
            Outcome::Sandbox(Ok(volumes)) => {
                self.take_volumes(Some(volumes));
                self.facts.pod_problem = None;
            }
            Outcome::Sandbox(Err(Unprepared::Problem(problem))) => self.facts.pod_problem = Some(problem),
            Outcome::Sandbox(Err(Unprepared::Refused(verdict))) => {
                self.facts.verdict.get_or_insert(verdict);
            }
            Outcome::Started { name, replaced, result } => self.started(name, replaced.as_deref(), result),
            Outcome::Resized { id, resources, result: Ok(()) } => {
                self.facts.resize_retry = None;
                self.facts.applied.insert(id, resources);
            }
            Outcome::Resized { result: Err(error), .. } => {
                let pod = self.desired.borrow().pod.clone();
                tracing::warn!(pod = name_of(&pod), error, "cannot resize a container");
                self.node.recorder.pod(&pod, Level::Warning, "ResizeError", error);
                self.facts.resize_retry = Timestamp::now().checked_add(RELIST).ok();
            }
            Outcome::Refreshed(volumes) => {
                self.refreshing = None;
                self.take_volumes(volumes);
            }
            Outcome::Released(done) => {
                self.facts.released = done;
                self.facts.release_retry = if done { None } else { Timestamp::now().checked_add(RELEASE_RETRY).ok() };
            }
            Outcome::Deleted(Ok(())) => self.facts.removed = true,
            Outcome::Done => {}
            Outcome::Deleted(Err(error)) => tracing::warn!(error = api_error(&error), "cannot delete the pod's object"),
            Outcome::Reported { result, status } => self.reporter.answered(*result, *status),
            Outcome::Forgotten => {
                self.node.state.forget(runtime_uid(&self.desired.borrow().pod));
                return true;
            }
        }
        false
    }

    fn started(&mut self, name: String, replaced: Option<&Container>, result: Result<(), Problem>) {
        // What failed before there was a container has its own time to be tried again.
        let was_created = result.as_ref().err().is_none_or(|problem| problem.retry_at <= Timestamp::now());
        if let Some(ended) = replaced.filter(|_| was_created) {
            let next = plan::next_backoff(self.facts.backoff.get(&name).copied(), ended);
            self.facts.backoff.insert(name.clone(), next);
        }
        match result {
            Ok(()) => drop(self.facts.problems.remove(&name)),
            Err(problem) => drop(self.facts.problems.insert(name, problem)),
        }
    }
}

fn was_ready(status: &PodStatus, container_id: &str) -> bool {
    let lists = [&status.container_statuses, &status.init_container_statuses];
    lists
        .into_iter()
        .flatten()
        .flatten()
        .any(|status| status.ready && status.container_id.as_deref().is_some_and(|id| id.ends_with(container_id)))
}
