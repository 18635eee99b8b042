//! Hands each pod of the node to its worker: pods from the API, static pods from files with their mirror objects, and
//! orphans that only the runtime remembers. Decides nothing about a pod itself.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::api::core::v1::{Pod, PodSpec};
use kube::api::PostParams;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client};
use tokio::sync::mpsc;

use super::admission::{self, Offer};
use super::api::name_of;
use super::context::NodeContext;
use super::mailbox::{Desired, Handle};
use super::observed::keys;
use super::plan::{self, Verdict};
use super::{annotation, annotations, log_files, run, runtime_uid, static_pods, worker};
use crate::cri::{RuntimeError, RuntimeEvent};
use crate::events::Level;
use crate::eviction::Eviction;
use crate::node::readiness::Obstacle;
use crate::objects::api_error;
use crate::volumes::csi;

/// How often a mirror object that could not be made is tried again.
const MIRROR_CHECK: Duration = Duration::from_secs(10);

/// Namespace and name: one pod at a time may have them on this node.
type Key = (String, String);

struct Entry {
    handle: Handle,
    key: Key,
    is_static: bool,
    /// The API's object of this pod (or its mirror).
    object: Option<Arc<Pod>>,
    pod: Arc<Pod>,
    removed: bool,
}

pub struct Manager {
    node: Arc<NodeContext>,
    workers: HashMap<String, Entry>,
    /// Pods that wait for another of the same name to leave, by uid.
    waiting: HashMap<String, (Arc<Pod>, bool)>,
    mirrors: HashMap<Key, Arc<Pod>>,
    statics: HashMap<String, Arc<Pod>>,
    ended: (mpsc::UnboundedSender<String>, mpsc::UnboundedReceiver<String>),
    /// The first complete list of the API has arrived.
    synced: bool,
    /// Uids seen since the list began.
    listing: Option<BTreeSet<String>>,
}

fn key(pod: &Pod) -> Key {
    (pod.metadata.namespace.clone().unwrap_or_default(), pod.metadata.name.clone().unwrap_or_default())
}

impl Manager {
    pub fn new(node: Arc<NodeContext>) -> Self {
        Self {
            node,
            workers: HashMap::new(),
            waiting: HashMap::new(),
            mirrors: HashMap::new(),
            statics: HashMap::new(),
            ended: mpsc::unbounded_channel(),
            synced: false,
            listing: None,
        }
    }

    /// Runs until the process ends.
    pub async fn run(
        mut self,
        client: Client,
        mut runtime_events: mpsc::Receiver<RuntimeEvent>,
        mut evictions: mpsc::Receiver<Eviction>,
    ) {
        let config = &self.node.state.config;
        let selector = format!("spec.nodeName={}", self.node.state.node_name);
        let pods = watcher(Api::<Pod>::all(client), watcher::Config::default().fields(&selector));
        let mut pods = std::pin::pin!(pods.default_backoff());
        let (files, mut static_updates) = mpsc::channel(1);
        if !config.static_pod_path.is_empty() {
            let source = static_pods::Source::new(config, &self.node.state.node_name);
            tokio::spawn(source.follow(files.clone()));
        }
        let mut node_uid = self.node.node_uid.subscribe();
        let mut mirrors_due = tokio::time::interval(MIRROR_CHECK);
        loop {
            tokio::select! {
                Some(event) = pods.next() => match event {
                    Ok(event) => self.api_event(event).await,
                    Err(error) => tracing::warn!(%error, "the pod watch was interrupted"),
                },
                Some(statics) = static_updates.recv() => self.set_statics(statics).await,
                Some(event) = runtime_events.recv() => self.runtime_event(event).await,
                Some(uid) = self.ended.1.recv() => self.worker_ended(&uid).await,
                Some((uid, verdict)) = evictions.recv() => if let Some(entry) = self.workers.get(&uid) {
                    entry.send_with(Some(verdict));
                },
                Ok(()) = node_uid.changed() => self.ensure_mirrors().await,
                _ = mirrors_due.tick(), if !self.statics.is_empty() => self.ensure_mirrors().await,
                else => return,
            }
        }
    }

    async fn api_event(&mut self, event: watcher::Event<Pod>) {
        match event {
            watcher::Event::Init => self.listing = Some(BTreeSet::new()),
            watcher::Event::InitApply(pod) | watcher::Event::Apply(pod) => {
                if let (Some(listing), Some(uid)) = (self.listing.as_mut(), &pod.metadata.uid) {
                    listing.insert(uid.clone());
                }
                self.apply(pod).await;
            }
            watcher::Event::Delete(pod) => {
                if let Some(uid) = &pod.metadata.uid {
                    self.gone(uid).await;
                }
            }
            watcher::Event::InitDone => {
                let listed = self.listing.take().unwrap_or_default();
                let objects = self.workers.values().filter_map(|entry| entry.object.as_ref());
                let mirrors = self.mirrors.values();
                let missing: BTreeSet<String> = objects
                    .chain(mirrors)
                    .filter_map(|object| object.metadata.uid.clone())
                    .filter(|uid| !listed.contains(uid))
                    .collect();
                for uid in missing {
                    self.gone(&uid).await;
                }
                if !std::mem::replace(&mut self.synced, true) {
                    self.adopt_leftovers().await;
                }
            }
        }
    }

    /// A pod object is new or has changed.
    async fn apply(&mut self, mut pod: Pod) {
        pod.metadata.managed_fields = None;
        let pod = Arc::new(pod);
        if annotation(&pod, annotations::MIRROR).is_some() {
            self.mirrors.insert(key(&pod), pod.clone());
            self.follow_mirror(&pod).await;
            return;
        }
        self.dispatch(pod, false);
    }

    /// Gives a pod to its worker, or starts one.
    fn dispatch(&mut self, pod: Arc<Pod>, is_static: bool) {
        let uid = runtime_uid(&pod).to_owned();
        if let Some(entry) = self.workers.get_mut(&uid) {
            entry.pod = pod.clone();
            if !is_static {
                entry.object = Some(pod);
            }
            entry.send();
            return;
        }
        let key = key(&pod);
        if self.workers.values().any(|entry| entry.key == key) {
            self.waiting.insert(uid, (pod, is_static));
            return;
        }
        let object = if is_static {
            self.mirrors.get(&key).filter(|mirror| runtime_uid(mirror) == uid).cloned()
        } else {
            Some(pod.clone())
        };
        let verdict = if is_static { None } else { self.refuse(&pod) };
        let desired = Desired { pod: pod.clone(), object: object.clone(), removed: false, verdict };
        let handle = worker::spawn(&self.node, desired, self.ended.0.clone());
        self.workers.insert(uid, Entry { handle, key, is_static, object, pod, removed: false });
    }

    /// A pod that has not been here before is checked against what the node has left.
    fn refuse(&self, pod: &Pod) -> Option<Verdict> {
        let is_new = pod.status.as_ref().is_none_or(|status| status.start_time.is_none());
        if !is_new || pod.metadata.deletion_timestamp.is_some() {
            return None;
        }
        let active = |entry: &&Entry| {
            let object = entry.object.as_ref().unwrap_or(&entry.pod);
            !entry.removed && !plan::is_terminal(object)
        };
        let present: Vec<&Pod> = self.workers.values().filter(active).map(|entry| &*entry.pod).collect();
        let config = &self.node.state.config;
        let offer = Offer {
            cpu_milli: self.node.cpu_milli,
            memory: self.node.memory,
            pods: usize::try_from(config.max_pods).unwrap_or(usize::MAX),
            pressure: self.node.state.pressure(),
            is_going_down: self.node.readiness.has(Obstacle::Shutdown),
            allowed_sysctls: &config.allowed_unsafe_sysctls,
        };
        let verdict = admission::refuse(pod, &present, &offer)?;
        self.node.recorder.pod(pod, Level::Warning, verdict.reason, verdict.message.clone());
        Some(verdict)
    }

    /// An object has left the API.
    async fn gone(&mut self, uid: &str) {
        self.waiting.remove(uid);
        if let Some(mirror) = self.mirrors.values().find(|mirror| mirror.metadata.uid.as_deref() == Some(uid)).cloned()
        {
            self.mirrors.remove(&key(&mirror));
            let hash = runtime_uid(&mirror).to_owned();
            if let Some(entry) = self.workers.get_mut(&hash) {
                entry.object = None;
                entry.send();
            }
            // Of the same file content, or of the next.
            let pod = self.statics.values().find(|pod| key(pod) == key(&mirror)).cloned();
            if let Some(pod) = pod.filter(|pod| !self.waiting.contains_key(runtime_uid(pod))) {
                self.create_mirror(&pod).await;
            }
            return;
        }
        if let Some(entry) = self.workers.get_mut(uid) {
            entry.removed = true;
            entry.send();
        }
    }

    async fn worker_ended(&mut self, uid: &str) {
        let Some(entry) = self.workers.remove(uid) else { return };
        if entry.is_static
            && let Some(mirror) = self.mirrors.get(&entry.key).filter(|mirror| runtime_uid(mirror) == uid).cloned()
        {
            self.delete_mirror(&mirror).await;
        }
        let next = self.waiting.iter().find(|(_, (pod, _))| key(pod) == entry.key).map(|(uid, _)| uid.clone());
        if let Some((pod, is_static)) = next.and_then(|uid| self.waiting.remove(&uid)) {
            self.dispatch(pod.clone(), is_static);
            if is_static {
                self.ensure_mirror(&pod).await;
            }
        }
    }

    async fn set_statics(&mut self, pods: Vec<Pod>) {
        let pods: HashMap<String, Arc<Pod>> =
            pods.into_iter().map(|pod| (runtime_uid(&pod).to_owned(), Arc::new(pod))).collect();
        let gone: Vec<String> = self.statics.keys().filter(|uid| !pods.contains_key(*uid)).cloned().collect();
        for uid in gone {
            tracing::info!(uid, "a static pod was removed");
            self.waiting.remove(&uid);
            if let Some(entry) = self.workers.get_mut(&uid) {
                entry.removed = true;
                entry.send();
            }
        }
        self.statics = pods;
        for pod in self.statics.values().cloned().collect::<Vec<_>>() {
            if !self.workers.contains_key(runtime_uid(&pod)) {
                self.dispatch(pod.clone(), true);
            }
            if self.synced && !self.waiting.contains_key(runtime_uid(&pod)) {
                self.ensure_mirror(&pod).await;
            }
        }
    }

    /// A mirror object was seen: it belongs to a static pod, or to none any more.
    async fn follow_mirror(&mut self, mirror: &Arc<Pod>) {
        let hash = runtime_uid(mirror);
        if let Some(entry) = self.workers.get_mut(hash) {
            entry.object = Some(mirror.clone());
            entry.send();
            if mirror.metadata.deletion_timestamp.is_some() && self.statics.contains_key(hash) {
                // Deleting a mirror does not delete the pod: the object goes and comes back.
                self.delete_mirror(mirror).await;
            }
        } else if self.synced && !self.statics.contains_key(hash) {
            self.delete_mirror(mirror).await;
        }
    }

    async fn ensure_mirror(&mut self, pod: &Arc<Pod>) {
        match self.mirrors.get(&key(pod)).cloned() {
            None => self.create_mirror(pod).await,
            Some(mirror) if runtime_uid(&mirror) == runtime_uid(pod) => {}
            // Of the file's earlier content; its successor follows when it is gone.
            Some(mirror) => self.delete_mirror(&mirror).await,
        }
    }

    async fn ensure_mirrors(&mut self) {
        if !self.synced {
            return;
        }
        for pod in self.statics.values().cloned().collect::<Vec<_>>() {
            if !self.waiting.contains_key(runtime_uid(&pod)) {
                self.ensure_mirror(&pod).await;
            }
        }
    }

    async fn create_mirror(&self, pod: &Pod) {
        let Some(node_uid) = self.node.node_uid.borrow().clone() else { return };
        let mirror = static_pods::mirror(pod, &self.node.state.node_name, &node_uid);
        let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
        let api = Api::<Pod>::namespaced(self.node.objects.client(), namespace);
        match api.create(&PostParams::default(), &mirror).await {
            Ok(_) => {}
            Err(kube::Error::Api(status)) if status.code == 409 => {}
            Err(error) => tracing::warn!(
                pod = name_of(pod),
                error = api_error(&error),
                "cannot create the mirror of a static pod"
            ),
        }
    }

    async fn delete_mirror(&self, mirror: &Pod) {
        if let Err(error) = super::api::delete(self.node.objects.client(), Some(mirror)).await {
            tracing::warn!(pod = name_of(mirror), error = api_error(&error), "cannot delete a mirror object");
        }
    }

    async fn runtime_event(&mut self, event: RuntimeEvent) {
        let (id, exited) = match event {
            RuntimeEvent::Resync => {
                self.workers.values().for_each(|entry| entry.handle.wake(None));
                return;
            }
            RuntimeEvent::Exited(id) => (id, true),
            RuntimeEvent::Changed(id) => (id, false),
        };
        let owner = self.node.owners.read().get(&id).cloned();
        let owner = match owner {
            Some(owner) => Some(owner),
            // Just created; its worker has not looked yet.
            None => self.owner_in_runtime(&id).await,
        };
        if let Some(entry) = owner.and_then(|uid| self.workers.get(&uid)) {
            entry.handle.wake(exited.then_some(id));
        }
    }

    async fn owner_in_runtime(&self, id: &str) -> Option<String> {
        match self.node.state.runtime.container_status(id).await {
            Ok(status) => status.labels.get(keys::POD_UID).cloned(),
            Err(error) => {
                if !error.is_not_found() {
                    tracing::debug!(%error, id, "cannot find the pod of a container");
                }
                None
            }
        }
    }

    /// Once, when all sources are known: what runs without a pod is ended, what is left on disk is removed.
    async fn adopt_leftovers(&mut self) {
        self.ensure_mirrors().await;
        let stale: Vec<_> =
            self.mirrors.values().filter(|mirror| !self.statics.contains_key(runtime_uid(mirror))).cloned().collect();
        for mirror in stale {
            self.delete_mirror(&mirror).await;
        }
        match self.runtime_orphans().await {
            Ok(orphans) => {
                for (uid, pod) in orphans {
                    tracing::info!(uid, pod = name_of(&pod), "ending a pod that nobody wants any more");
                    self.end_orphan(uid, pod);
                }
            }
            Err(error) => tracing::warn!(%error, "cannot look for orphaned pods in the container runtime"),
        }
        self.clean_logs();
        for uid in self.leftovers() {
            tracing::info!(uid, "removing what an earlier pod left behind");
            let mut pod = Pod { spec: Some(PodSpec::default()), ..Pod::default() };
            pod.metadata.uid = Some(uid.clone());
            self.end_orphan(uid, pod);
        }
        self.node.devices.retain_pods(|uid| self.knows(uid));
        tokio::spawn(csi::take_back_unused(self.node.csi.clone()));
    }

    /// A worker ends the pod and tries until nothing is left of it.
    fn end_orphan(&mut self, uid: String, pod: Pod) {
        let pod = Arc::new(pod);
        let desired = Desired { pod: pod.clone(), object: None, removed: true, verdict: None };
        let handle = worker::spawn(&self.node, desired, self.ended.0.clone());
        let key = key(&pod);
        self.workers.insert(uid, Entry { handle, key, is_static: false, object: None, pod, removed: true });
    }

    async fn runtime_orphans(&self) -> Result<HashMap<String, Pod>, RuntimeError> {
        let runtime = &self.node.state.runtime;
        let sandboxes = runtime.list_sandboxes(&[]).await?;
        let containers = runtime.list_containers(&[]).await?;
        let labels =
            sandboxes.into_iter().map(|found| found.labels).chain(containers.into_iter().map(|found| found.labels));
        let orphans = labels.filter_map(|labels| run::orphan(&labels));
        Ok(orphans.map(|pod| (runtime_uid(&pod).to_owned(), pod)).filter(|(uid, _)| !self.knows(uid)).collect())
    }

    /// Whether the pod has a worker, or waits for one.
    fn knows(&self, uid: &str) -> bool {
        self.workers.contains_key(uid) || self.waiting.contains_key(uid)
    }

    /// Pods that have no worker and left a directory, a cgroup or a claim.
    fn leftovers(&self) -> BTreeSet<String> {
        let directories = fs::read_dir(self.node.state.root_dir.join("pods")).into_iter().flatten().flatten();
        let on_disk = directories.filter_map(|entry| entry.file_name().into_string().ok());
        on_disk.chain(self.node.cgroups.pods()).chain(self.node.claims.users()).filter(|uid| !self.knows(uid)).collect()
    }

    /// Logs go last when a pod is forgotten: a kubelet that ended just before has left nothing else.
    fn clean_logs(&self) {
        for path in log_files::directories_without(&self.node.state.config.pod_logs_dir, |uid| self.knows(uid)) {
            tracing::info!(path = %path.display(), "removing the logs of an earlier pod");
            if let Err(error) = fs::remove_dir_all(&path) {
                tracing::warn!(path = %path.display(), %error, "cannot remove the logs of an earlier pod");
            }
        }
        log_files::remove_dead_links();
    }
}

impl Entry {
    fn send(&self) {
        // A decision that the worker has not seen yet stays.
        let pending = self.handle.desired.borrow().verdict.clone();
        self.send_with(pending);
    }

    fn send_with(&self, verdict: Option<Verdict>) {
        let desired = Desired { pod: self.pod.clone(), object: self.object.clone(), removed: self.removed, verdict };
        self.handle.desired.send_replace(desired);
    }
}
