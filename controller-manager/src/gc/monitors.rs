//! Feeds the graph: the metadata of every object of every deletable kind, from shared informers where this process has
//! them and from metadata-only watches elsewhere. Kinds come and go with custom resource definitions and API services.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use apimachinery::controller::{Informers, ObjectKey, Queue, ResourceId};
use apimachinery::process::{CancellationToken, error_chain};
use futures::StreamExt;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Client;
use kube::api::{Api, ApiResource, DynamicObject, GroupVersionKind};
use kube::core::PartialObjectMeta;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{Config, Event, watcher};
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::graph::{Graph, Uid};
use crate::discovery::{ServedResource, discover};

/// Changes of definitions come in bursts; discovery is asked once they are over.
const SETTLE: Duration = Duration::from_secs(1);
const RETRY: Duration = Duration::from_secs(10);

/// The graph and everything that keeps it up to date.
pub struct Monitors {
    client: Client,
    informers: Arc<Informers>,
    queue: Arc<Queue<ObjectKey>>,
    shutdown: CancellationToken,
    pub graph: Mutex<Graph>,
    served: Mutex<Vec<ServedResource>>,
    kinds_changed: Notify,
    /// Watches that have not been complete yet.
    pending: Mutex<HashSet<ResourceId>>,
}

impl Monitors {
    pub fn start(
        client: Client,
        informers: Arc<Informers>,
        queue: Arc<Queue<ObjectKey>>,
        shutdown: CancellationToken,
    ) -> Arc<Self> {
        let monitors = Arc::new(Self {
            client,
            informers,
            queue,
            shutdown,
            graph: Mutex::default(),
            served: Mutex::default(),
            kinds_changed: Notify::new(),
            pending: Mutex::default(),
        });
        tokio::spawn(monitors.clone().follow_kinds());
        monitors
    }

    /// Whether the kinds are known and every object of them has been seen once.
    pub fn is_complete(&self) -> bool {
        !self.served.lock().is_empty() && self.pending.lock().is_empty()
    }

    /// The resource of a group and kind, whatever the version.
    pub fn resource(&self, api_version: &str, kind: &str) -> Option<ServedResource> {
        let group = api_version.rsplit_once('/').map_or("", |(group, _)| group);
        self.served.lock().iter().find(|served| served.id.group == group && served.id.kind == kind).cloned()
    }

    /// Something points to a kind that is not known: perhaps it is new.
    pub fn look_for_new_kinds(&self) {
        self.kinds_changed.notify_one();
    }

    async fn follow_kinds(self: Arc<Self>) {
        let mut running: HashMap<ResourceId, CancellationToken> = HashMap::new();
        loop {
            let pause = match discover(&self.client).await {
                Ok(discovered) => {
                    let complete = discovered.stale.is_empty();
                    *self.served.lock() = discovered.resources.clone();
                    self.adjust(&mut running, &discovered.resources, complete);
                    None
                }
                Err(error) => {
                    tracing::warn!(error = error_chain(&error), "cannot discover resources; trying again");
                    Some(RETRY)
                }
            };
            let next = async {
                match pause {
                    Some(pause) => tokio::time::sleep(pause).await,
                    None => {
                        self.kinds_changed.notified().await;
                        tokio::time::sleep(SETTLE).await;
                    }
                }
            };
            tokio::select! {
                () = self.shutdown.cancelled() => return,
                () = next => {}
            }
        }
    }

    /// Starts what is missing; ends what is gone, unless discovery could not see everything.
    fn adjust(
        self: &Arc<Self>,
        running: &mut HashMap<ResourceId, CancellationToken>,
        served: &[ServedResource],
        complete: bool,
    ) {
        let wanted = |resource: &ServedResource| {
            resource.id.plural != "events" && ["list", "watch", "delete"].iter().all(|verb| resource.can(verb))
        };
        let wanted: HashSet<_> =
            served.iter().filter(|served| wanted(served)).map(|served| served.id.clone()).collect();
        if complete {
            running.retain(|id, token| {
                let stays = wanted.contains(id);
                if !stays {
                    token.cancel();
                    self.pending.lock().remove(id);
                }
                stays
            });
        }
        for id in wanted {
            if running.contains_key(&id) {
                continue;
            }
            let token = self.shutdown.child_token();
            running.insert(id.clone(), token.clone());
            self.monitor(id, token);
        }
    }

    fn monitor(self: &Arc<Self>, id: ResourceId, token: CancellationToken) {
        let monitors = self.clone();
        if let Some(informer) = self.informers.find(&id) {
            // Shared informers are complete before the collector starts.
            let resource = Arc::new(id);
            informer.subscribe_metadata(Box::new(move |change| match (change.old, change.new) {
                (Some(old), new) if new.is_none_or(|new| new.uid != old.uid) => {
                    monitors.removed(old.uid.as_deref());
                    if let Some(new) = new {
                        monitors.seen(&resource, new);
                    }
                }
                (_, Some(new)) => monitors.seen(&resource, new),
                _ => {}
            }));
        } else {
            self.pending.lock().insert(id.clone());
            tokio::spawn(async move {
                tokio::select! {
                    () = token.cancelled() => {}
                    () = monitors.watch(id) => {}
                }
            });
        }
    }

    async fn watch(self: Arc<Self>, id: ResourceId) {
        let gvk = GroupVersionKind::gvk(&id.group, &id.version, &id.kind);
        let api: Api<PartialObjectMeta<DynamicObject>> =
            Api::all_with(self.client.clone(), &ApiResource::from_gvk_with_plural(&gvk, &id.plural));
        let defines_kinds = matches!(id.plural.as_ref(), "customresourcedefinitions" | "apiservices");
        let resource = Arc::new(id);
        let mut known: HashSet<Uid> = HashSet::new();
        let mut listed: HashSet<Uid> = HashSet::new();
        let mut stream = std::pin::pin!(watcher(api, Config::default()).default_backoff());
        while let Some(event) = stream.next().await {
            match event {
                Ok(Event::Init) => listed.clear(),
                Ok(Event::InitApply(object)) => {
                    listed.extend(object.metadata.uid.as_deref().map(Uid::from));
                    self.seen(&resource, &object.metadata);
                }
                Ok(Event::InitDone) => {
                    for uid in known.difference(&listed) {
                        self.removed(Some(uid));
                    }
                    known = std::mem::take(&mut listed);
                    self.pending.lock().remove(resource.as_ref());
                }
                Ok(Event::Apply(object)) => {
                    known.extend(object.metadata.uid.as_deref().map(Uid::from));
                    self.seen(&resource, &object.metadata);
                    if defines_kinds {
                        self.kinds_changed.notify_one();
                    }
                }
                Ok(Event::Delete(object)) => {
                    known.remove(object.metadata.uid.as_deref().unwrap_or(""));
                    self.removed(object.metadata.uid.as_deref());
                    if defines_kinds {
                        self.kinds_changed.notify_one();
                    }
                }
                Err(error) => {
                    tracing::debug!(resource = %resource.plural, error = error_chain(&error), "a metadata watch failed; trying again");
                }
            }
        }
    }

    fn seen(&self, resource: &Arc<ResourceId>, meta: &ObjectMeta) {
        let look = self.graph.lock().seen(resource, meta);
        self.look_at(look);
    }

    fn removed(&self, uid: Option<&str>) {
        let Some(uid) = uid else { return };
        let look = self.graph.lock().removed(uid);
        self.look_at(look);
    }

    fn look_at(&self, uids: impl IntoIterator<Item = Uid>) {
        for uid in uids {
            self.queue.add(ObjectKey::cluster(&uid));
        }
    }
}
