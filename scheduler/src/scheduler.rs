//! The running scheduler: informers feed cache and queue, one loop decides, and bindings go out in the background.
//!
//! Cache and queue are behind one lock, which is held for look-ups and updates only; a cycle works on a snapshot. Writes
//! to the API server happen outside of it. When one fails, the assumption is taken back and the pod queued again.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use apimachinery::controller::{
    Change, EventRecord, EventType, Informers, ObjectKey, Recorder, ResourceId, Rest, object_reference,
};
use k8s_openapi::api::core::v1::{Namespace, Node, PersistentVolume, PersistentVolumeClaim, Pod};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::api::storage::v1::StorageClass;
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::cache::{Cache, NodeInfo, Snapshot};
use crate::cycle::{Cycle, Unfit};
use crate::framework::{ClusterEvent, Plugin};
use crate::plugins::default_plugins;
use crate::plugins::volume_binding::{SELECTED_NODE, VolumeAction, decide, is_bound};
use crate::pod_info::{PodInfo, bound_node, is_finished};
use crate::preemption::{Preemption, preempt};
use crate::queue::{Queue, Waiting};

const STRATEGIC: &str = "application/strategic-merge-patch+json";
/// How long a claim may take to be provisioned before its pod is tried elsewhere.
const BIND_LIMIT: Duration = Duration::from_secs(600);
const BIND_POLL: Duration = Duration::from_millis(250);

struct State {
    cache: Cache,
    queue: Queue,
}

pub struct Scheduler {
    profiles: Vec<String>,
    plugins: Vec<Arc<dyn Plugin>>,
    rest: Rest,
    informers: Arc<Informers>,
    recorder: Recorder,
    state: Mutex<State>,
    /// Rung when there may be a pod to try.
    bell: Notify,
    /// Where the next cycle starts to look.
    start: AtomicUsize,
}

#[derive(Debug, thiserror::Error)]
enum BindError {
    #[error("cannot bind the volume claims")]
    Volumes(#[source] kube::Error),
    #[error("the claim {0} was not bound in time")]
    VolumesLate(ObjectKey),
    #[error("cannot write the binding")]
    Binding(#[source] kube::Error),
}

impl Scheduler {
    /// Subscribes to everything; nothing is scheduled before `run`.
    pub fn new(profiles: Vec<String>, rest: Rest, informers: &Arc<Informers>, recorder: Recorder) -> Arc<Self> {
        let plugins = default_plugins();
        let state = State { cache: Cache::default(), queue: Queue::new(plugins.clone()) };
        let scheduler = Arc::new(Self {
            profiles,
            plugins,
            rest,
            informers: informers.clone(),
            recorder,
            state: Mutex::new(state),
            bell: Notify::new(),
            start: AtomicUsize::new(0),
        });
        scheduler.watch(informers);
        scheduler
    }

    fn watch(self: &Arc<Self>, informers: &Informers) {
        let pods = informers.of::<Pod>();
        pods.trim(drop_unread);
        let this = self.clone();
        pods.subscribe(move |change| this.on_pod(change));
        let this = self.clone();
        informers.of::<Node>().subscribe(move |change| this.on_node(change));
        let this = self.clone();
        informers.of::<Namespace>().subscribe(move |change| this.on_namespace(change));
        let this = self.clone();
        informers.of::<PersistentVolumeClaim>().subscribe(move |change| {
            this.on_volumes(change, |cache, key, claim| {
                let key = (key.namespace, key.name);
                match claim {
                    Some(claim) => cache.volumes.claims.insert(key, claim),
                    None => cache.volumes.claims.remove(&key),
                };
            });
        });
        let this = self.clone();
        informers.of::<PersistentVolume>().subscribe(move |change| {
            this.on_volumes(change, |cache, key, volume| {
                match volume {
                    Some(volume) => cache.volumes.volumes.insert(key.name, volume),
                    None => cache.volumes.volumes.remove(&key.name),
                };
            });
        });
        let this = self.clone();
        informers.of::<StorageClass>().subscribe(move |change| {
            this.on_volumes(change, |cache, key, class| {
                match class {
                    Some(class) => cache.volumes.classes.insert(key.name, class),
                    None => cache.volumes.classes.remove(&key.name),
                };
            });
        });
        informers.of::<PodDisruptionBudget>();
    }

    fn on_pod(&self, change: &Change<Pod>) {
        let now = Instant::now();
        let mut state = self.state.lock();
        let uid = |pod: &Pod| pod.metadata.uid.clone().unwrap_or_default();
        if let (Some(old), Some(new)) = (&change.old, &change.new)
            && uid(old) != uid(new)
        {
            // Deleted and created again under the same name between two looks.
            state.forget_pod(&uid(old), bound_node(old).is_some(), now);
        }
        match &change.new {
            None => {
                let Some(old) = &change.old else { return };
                state.forget_pod(&uid(old), bound_node(old).is_some(), now);
            }
            Some(new) if is_finished(new) => {
                state.forget_pod(&uid(new), bound_node(new).is_some(), now);
            }
            Some(new) if bound_node(new).is_some() => {
                let info = Arc::new(PodInfo::new(new.clone()));
                let is_news = change.old.as_ref().is_none_or(|old| {
                    bound_node(old).is_none() || old.metadata.labels != new.metadata.labels || old.spec != new.spec
                });
                state.queue.remove(&info.uid);
                state.cache.set_pod(info);
                if is_news {
                    state.queue.on_event(ClusterEvent::AssignedPodChanged, now);
                }
            }
            Some(new) if new.metadata.deletion_timestamp.is_some() => state.queue.remove(&uid(new)),
            Some(new) => {
                let info = Arc::new(PodInfo::new(new.clone()));
                let ours = self.profiles.iter().any(|name| name == info.scheduler_name());
                if ours && !state.cache.is_assumed(&info.uid) {
                    state.queue.put(info, now);
                }
            }
        }
        self.bell.notify_one();
    }

    fn on_node(&self, change: &Change<Node>) {
        let now = Instant::now();
        let mut state = self.state.lock();
        match (&change.old, &change.new) {
            (old, Some(new)) => {
                state.cache.set_node(new.clone());
                for event in node_events(old.as_deref(), new) {
                    state.queue.on_event(event, now);
                }
            }
            (Some(old), None) => state.cache.remove_node(old.metadata.name.as_deref().unwrap_or("")),
            (None, None) => {}
        }
        self.bell.notify_one();
    }

    fn on_namespace(&self, change: &Change<Namespace>) {
        let Some(namespace) = change.versions().next() else { return };
        let name = namespace.metadata.name.clone().unwrap_or_default();
        let labels = change.new.as_ref().map(|n| n.metadata.labels.clone().unwrap_or_default());
        let mut state = self.state.lock();
        state.cache.set_namespace(&name, labels);
        state.queue.on_event(ClusterEvent::NamespaceChanged, Instant::now());
        self.bell.notify_one();
    }

    fn on_volumes<K>(&self, change: &Change<K>, store: impl Fn(&mut Cache, ObjectKey, Option<Arc<K>>))
    where
        K: kube::Resource<DynamicType = ()>,
    {
        let Some(object) = change.versions().next() else { return };
        let mut state = self.state.lock();
        store(&mut state.cache, ObjectKey::of(object.meta()), change.new.clone());
        state.queue.on_event(ClusterEvent::VolumesChanged, Instant::now());
        self.bell.notify_one();
    }

    /// Schedules until dropped.
    pub async fn run(self: &Arc<Self>) {
        loop {
            let (next, wake_at) = {
                let mut state = self.state.lock();
                let wake_at = state.queue.tick(Instant::now());
                (state.queue.pop(), wake_at)
            };
            match next {
                Some(waiting) => {
                    self.schedule(&waiting).await;
                    // A long queue must not starve the informers on a single thread.
                    tokio::task::yield_now().await;
                }
                None => {
                    let sleep = async {
                        match wake_at {
                            Some(at) => tokio::time::sleep_until(at).await,
                            None => std::future::pending().await,
                        }
                    };
                    tokio::select! {
                        () = self.bell.notified() => {}
                        () = sleep => {}
                    }
                }
            }
        }
    }

    async fn schedule(self: &Arc<Self>, waiting: &Waiting) {
        let pod = &waiting.pod;
        let (snapshot, nominated) = {
            let state = self.state.lock();
            let mut nominated: BTreeMap<String, Vec<Arc<PodInfo>>> = BTreeMap::new();
            for other in state.queue.nominated() {
                if let Some(node) = other.nominated_node() {
                    nominated.entry(node.to_owned()).or_default().push(other.clone());
                }
            }
            (state.cache.snapshot(), nominated)
        };
        let start = self.start.fetch_add(1, Ordering::Relaxed) % snapshot.nodes.len().max(1);
        let cycle = Cycle {
            plugins: &self.plugins,
            snapshot: &snapshot,
            pod,
            nominated: &nominated,
            start,
            chance: rand::random(),
        };
        match cycle.run() {
            Ok(node) => self.assign(pod, &node, &snapshot),
            Err(unfit) => self.refuse(pod, &cycle, &unfit).await,
        }
    }

    fn assign(self: &Arc<Self>, pod: &Arc<PodInfo>, node: &Arc<NodeInfo>, snapshot: &Snapshot) {
        let actions = decide(pod, node.node(), &snapshot.volumes);
        {
            let mut state = self.state.lock();
            state.queue.remove(&pod.uid);
            state.cache.assume(pod.clone(), &node.name);
        }
        let (this, pod, node) = (self.clone(), pod.clone(), node.name.clone());
        tokio::spawn(async move {
            match this.bind(&pod, &node, actions).await {
                Ok(()) => {
                    let message = format!("Successfully assigned {}/{} to {node}", pod.key.namespace, pod.key.name);
                    this.tell(&pod, EventType::Normal, "Scheduled", "Binding", message);
                }
                Err(error) => this.binding_failed(&pod, &error),
            }
        });
    }

    async fn bind(&self, pod: &PodInfo, node: &str, actions: Vec<VolumeAction>) -> Result<(), BindError> {
        if !actions.is_empty() {
            self.bind_volumes(&actions).await?;
        }
        let path = ResourceId::of::<Pod>().path(&pod.key.namespace, &pod.key.name, "binding");
        let binding = json!({
            "apiVersion": "v1",
            "kind": "Binding",
            "metadata": {"name": pod.key.name, "namespace": pod.key.namespace, "uid": pod.uid},
            "target": {"kind": "Node", "name": node},
        });
        self.rest.create(&path, &binding).await.map(drop).map_err(BindError::Binding)
    }

    /// Writes what the claims need and waits until all of them are bound.
    async fn bind_volumes(&self, actions: &[VolumeAction]) -> Result<(), BindError> {
        let mut claims = Vec::new();
        for action in actions {
            let (path, patch, claim) = match action {
                VolumeAction::Bind { volume, claim } => (
                    ResourceId::of::<PersistentVolume>().path("", volume, ""),
                    json!({
                        "metadata": {"annotations": {"pv.kubernetes.io/bound-by-controller": "yes"}},
                        "spec": {"claimRef": {
                            "apiVersion": "v1", "kind": "PersistentVolumeClaim",
                            "namespace": claim.namespace, "name": claim.name,
                        }},
                    }),
                    claim,
                ),
                VolumeAction::Provision { claim, node } => (
                    ResourceId::of::<PersistentVolumeClaim>().path(&claim.namespace, &claim.name, ""),
                    json!({"metadata": {"annotations": {SELECTED_NODE: node}}}),
                    claim,
                ),
            };
            self.rest.patch(&path, STRATEGIC, &patch).await.map_err(BindError::Volumes)?;
            claims.push(claim.clone());
        }
        let informer = self.informers.of::<PersistentVolumeClaim>();
        let deadline = Instant::now() + BIND_LIMIT;
        for claim in claims {
            while !informer.get(&claim).is_some_and(|claim| is_bound(&claim)) {
                if Instant::now() >= deadline {
                    return Err(BindError::VolumesLate(claim));
                }
                tokio::time::sleep(BIND_POLL).await;
            }
        }
        Ok(())
    }

    fn binding_failed(&self, pod: &Arc<PodInfo>, error: &BindError) {
        let text = apimachinery::process::error_chain(error);
        // The pod is gone, or another has bound it: the watch tells what is true.
        let settled = matches!(error, BindError::Binding(kube::Error::Api(status)) if matches!(status.code, 404 | 409));
        let mut state = self.state.lock();
        state.cache.forget(&pod.uid);
        if let Some(current) = self.informers.of::<Pod>().get(&pod.key)
            && current.metadata.uid.as_deref() == Some(&pod.uid)
            && bound_node(&current).is_none()
            && current.metadata.deletion_timestamp.is_none()
        {
            let now = Instant::now();
            state.queue.put(Arc::new(PodInfo::new(current)), now);
            state.queue.on_event(ClusterEvent::AssignedPodGone, now);
        }
        drop(state);
        self.bell.notify_one();
        if settled {
            tracing::debug!(pod = %pod.key, error = text, "binding refused");
        } else {
            tracing::warn!(pod = %pod.key, error = text, "binding failed");
            self.tell(pod, EventType::Warning, "FailedScheduling", "Scheduling", text);
        }
    }

    /// No node fits: looks for victims, tells the user, and queues the pod again.
    async fn refuse(&self, pod: &Arc<PodInfo>, cycle: &Cycle<'_>, unfit: &Unfit) {
        let mut message = unfit.message();
        let mut nominated = None;
        if unfit.before_nodes.is_empty() && unfit.nodes > 0 {
            match self.find_victims(pod, cycle, unfit) {
                Ok(preemption) => nominated = Some(preemption),
                Err(why) => message.push_str(&format!(" preemption: {why}")),
            }
        }
        {
            let mut state = self.state.lock();
            let plugins: HashSet<&'static str> = match unfit.plugins() {
                // An empty cluster: the first node that arrives is worth a try.
                none if none.is_empty() => HashSet::from(["NodeResourcesFit"]),
                some => some,
            };
            state.queue.reject(&pod.uid, plugins, Instant::now());
        }
        self.tell(pod, EventType::Warning, "FailedScheduling", "Scheduling", message.clone());
        if let Some(preemption) = nominated {
            self.evict(pod, &preemption).await;
        }
        if let Err(error) = self.report_unschedulable(pod, &message).await {
            tracing::debug!(pod = %pod.key, %error, "cannot report that the pod is unschedulable");
        }
    }

    fn find_victims(&self, pod: &Arc<PodInfo>, cycle: &Cycle<'_>, unfit: &Unfit) -> Result<Preemption, String> {
        let Ok(filters) = cycle.prepare() else { return Err("the cluster changed meanwhile.".to_owned()) };
        let budgets = self.informers.of::<PodDisruptionBudget>().list();
        preempt(pod, cycle.snapshot, &filters, unfit, &budgets)
    }

    async fn evict(&self, pod: &Arc<PodInfo>, preemption: &Preemption) {
        let pods = ResourceId::of::<Pod>();
        let status_path = pods.path(&pod.key.namespace, &pod.key.name, "status");
        let nominate = json!({"status": {"nominatedNodeName": preemption.node}});
        if let Err(error) = self.rest.patch(&status_path, STRATEGIC, &nominate).await {
            tracing::warn!(pod = %pod.key, %error, "cannot nominate a node; nobody is evicted");
            return;
        }
        for victim in &preemption.victims {
            let message = format!("Preempted by pod {} on node {}", pod.uid, preemption.node);
            let condition = json!({"status": {"conditions": [{
                "type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler",
                "message": format!("{}: preempting to accommodate a higher priority pod", pod.scheduler_name()),
                "lastTransitionTime": now(),
            }]}});
            let path = pods.path(&victim.key.namespace, &victim.key.name, "status");
            let marked = self.rest.patch(&path, STRATEGIC, &condition).await;
            let path = pods.path(&victim.key.namespace, &victim.key.name, "");
            let options = json!({"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": {"uid": victim.uid}});
            match marked.and(self.rest.delete(&path, &options).await) {
                Ok(_) => self.tell(victim, EventType::Normal, "Preempted", "Preempting", message),
                Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => {}
                Err(error) => tracing::warn!(victim = %victim.key, %error, "cannot evict"),
            }
        }
    }

    /// Writes `PodScheduled=False`, unless the pod says so already.
    async fn report_unschedulable(&self, pod: &PodInfo, message: &str) -> kube::Result<()> {
        let current = pod.pod.status.as_ref().and_then(|s| s.conditions.as_ref()).into_iter().flatten();
        let known = current
            .filter(|c| c.type_ == "PodScheduled")
            .any(|c| c.status == "False" && c.message.as_deref() == Some(message));
        if known {
            return Ok(());
        }
        let path = ResourceId::of::<Pod>().path(&pod.key.namespace, &pod.key.name, "status");
        let patch = json!({"status": {"conditions": [{
            "type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message,
            "lastTransitionTime": now(), "observedGeneration": pod.pod.metadata.generation,
        }]}});
        self.rest.patch(&path, STRATEGIC, &patch).await.map(drop)
    }

    fn tell(&self, pod: &PodInfo, type_: EventType, reason: &str, action: &str, message: String) {
        let mut event = EventRecord::new(object_reference(pod.pod.as_ref()), type_, reason, message);
        event.action = action.to_owned();
        self.recorder.with_component(pod.scheduler_name()).record(event);
    }
}

impl State {
    fn forget_pod(&mut self, uid: &str, was_assigned: bool, now: Instant) {
        self.queue.remove(uid);
        if self.cache.remove_pod(uid) || was_assigned {
            self.queue.on_event(ClusterEvent::AssignedPodGone, now);
        }
    }
}

fn now() -> Value {
    json!(jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string())
}

/// What changed on a node, as far as plugins care. Heartbeats change nothing.
fn node_events(old: Option<&Node>, new: &Node) -> Vec<ClusterEvent> {
    let Some(old) = old else { return vec![ClusterEvent::NodeAdded] };
    let allocatable = |node: &Node| node.status.as_ref().and_then(|s| s.allocatable.clone());
    let taints = |node: &Node| node.spec.as_ref().map(|s| (s.taints.clone(), s.unschedulable));
    let mut events = Vec::new();
    if allocatable(old) != allocatable(new) {
        events.push(ClusterEvent::NodeAllocatableChanged);
    }
    if old.metadata.labels != new.metadata.labels {
        events.push(ClusterEvent::NodeLabelsChanged);
    }
    if taints(old) != taints(new) {
        events.push(ClusterEvent::NodeTaintsChanged);
    }
    events
}

/// Drops what no plugin reads, which is most of a pod.
fn drop_unread(pod: &mut Pod) {
    pod.metadata.annotations = None;
    if let Some(spec) = &mut pod.spec {
        for container in spec.containers.iter_mut().chain(spec.init_containers.iter_mut().flatten()) {
            container.env = None;
            container.env_from = None;
            container.command = None;
            container.args = None;
            container.volume_mounts = None;
            container.liveness_probe = None;
            container.readiness_probe = None;
            container.startup_probe = None;
            container.lifecycle = None;
            container.security_context = None;
        }
        spec.volumes.iter_mut().flatten().for_each(|volume| volume.projected = None);
    }
    if let Some(status) = &mut pod.status {
        status.container_statuses = None;
        status.init_container_statuses = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::node;

    #[test]
    fn heartbeats_wake_nobody() {
        let old = node("a", 1000).build();
        let mut new = (*old).clone();
        new.metadata.resource_version = Some("2".to_owned());
        assert!(node_events(Some(&old), &new).is_empty());
        assert_eq!(node_events(Some(&old), &node("a", 2000).build()), [ClusterEvent::NodeAllocatableChanged]);
        assert_eq!(
            node_events(Some(&old), &node("a", 1000).taint("k", "NoSchedule").build()),
            [ClusterEvent::NodeTaintsChanged]
        );
        assert_eq!(node_events(None, &old), [ClusterEvent::NodeAdded]);
    }
}
