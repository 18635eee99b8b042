//! Shared informers: one watch per kind and process, an indexed copy of what the API server holds, and callbacks on
//! each change.
//!
//! Objects are kept without `managedFields`, which no controller reads and which are often half of an object. Nobody
//! changes an object here but the watch; readers get `Arc`s and never block the watch for longer than a look-up.

use std::any::{Any, TypeId};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Debug;
use std::ops::Bound;
use std::sync::Arc;

use async_trait::async_trait;
use futures::StreamExt;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::core::NamespaceResourceScope;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher;
use kube::{Api, Client, Resource};
use parking_lot::{Mutex, RwLock};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::key::{ObjectKey, controller_of};
use super::rest::ResourceId;

/// What can be watched: every API type of `k8s_openapi`.
pub trait Object:
    Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Serialize + Send + Sync + 'static
{
}
impl<K> Object for K where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Serialize + Send + Sync + 'static
{
}

/// What happened to one object: created (`old` is none), changed, or gone (`new` is none).
#[derive(Clone, Debug)]
pub struct Change<K> {
    pub old: Option<Arc<K>>,
    pub new: Option<Arc<K>>,
}

impl<K> Change<K> {
    /// The versions that there are, newest first.
    pub fn versions(&self) -> impl Iterator<Item = &Arc<K>> {
        self.new.iter().chain(&self.old)
    }
}

/// A change reduced to metadata, the same for every kind.
pub struct MetadataChange<'a> {
    pub old: Option<&'a ObjectMeta>,
    pub new: Option<&'a ObjectMeta>,
}

type Handler<K> = Box<dyn Fn(&Change<K>) + Send + Sync>;
type IndexFn<K> = fn(&K) -> Vec<String>;

/// The index by the uid of the managing owner, which every informer has.
const OWNER: &str = "owner";

struct Index<K> {
    name: &'static str,
    values: IndexFn<K>,
    keys: HashMap<String, BTreeSet<ObjectKey>>,
}

struct State<K> {
    objects: BTreeMap<ObjectKey, Arc<K>>,
    indexes: Vec<Index<K>>,
    /// What the current (re-)list has brought so far.
    listing: Option<BTreeMap<ObjectKey, K>>,
}

/// All objects of one kind, up to date within the watch's latency.
pub struct Informer<K> {
    /// Lock order: `handlers` before `state`.
    handlers: RwLock<Vec<Handler<K>>>,
    state: RwLock<State<K>>,
    trim: Mutex<Option<fn(&mut K)>>,
    /// The highest resourceVersion seen; touched on every event.
    seen: watch::Sender<u64>,
    synced: watch::Sender<bool>,
}

impl<K: Object> Default for Informer<K> {
    fn default() -> Self {
        let owner = Index {
            name: OWNER,
            values: |object: &K| controller_of(object.meta()).map(|o| o.uid.clone()).into_iter().collect(),
            keys: HashMap::new(),
        };
        Self {
            handlers: RwLock::default(),
            state: RwLock::new(State { objects: BTreeMap::new(), indexes: vec![owner], listing: None }),
            trim: Mutex::new(None),
            seen: watch::Sender::new(0),
            synced: watch::Sender::new(false),
        }
    }
}

impl<K: Object> Informer<K> {
    /// An informer that watches nothing and holds the given objects: what tests of controllers read from.
    pub fn fixed(objects: impl IntoIterator<Item = K>) -> Arc<Self> {
        let informer = Self::default();
        for object in objects {
            informer.apply(watcher::Event::Apply(object));
        }
        informer.synced.send_replace(true);
        Arc::new(informer)
    }

    pub fn get(&self, key: &ObjectKey) -> Option<Arc<K>> {
        self.state.read().objects.get(key).cloned()
    }

    /// All objects, ordered by namespace and name.
    pub fn list(&self) -> Vec<Arc<K>> {
        self.state.read().objects.values().cloned().collect()
    }

    /// All objects of a namespace, ordered by name.
    pub fn in_namespace(&self, namespace: &str) -> Vec<Arc<K>> {
        let from = ObjectKey::new(namespace, "");
        let state = self.state.read();
        let range = state.objects.range((Bound::Included(from), Bound::Unbounded));
        range.take_while(|(key, _)| key.namespace == namespace).map(|(_, object)| object.clone()).collect()
    }

    /// The objects that the owner with this uid manages.
    pub fn owned_by(&self, uid: &str) -> Vec<Arc<K>> {
        self.indexed(OWNER, uid)
    }

    /// The objects with this value in the index that was added under this name.
    pub fn indexed(&self, index: &str, value: &str) -> Vec<Arc<K>> {
        let state = self.state.read();
        let keys = state.indexes.iter().find(|i| i.name == index).and_then(|i| i.keys.get(value));
        keys.into_iter().flatten().filter_map(|key| state.objects.get(key).cloned()).collect()
    }

    pub fn len(&self) -> usize {
        self.state.read().objects.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Adds an index; adding one of the same name again does nothing.
    pub fn add_index(&self, name: &'static str, values: IndexFn<K>) {
        let mut state = self.state.write();
        if state.indexes.iter().any(|index| index.name == name) {
            return;
        }
        let mut index = Index { name, values, keys: HashMap::new() };
        for (key, object) in &state.objects {
            index.insert(key, object);
        }
        state.indexes.push(index);
    }

    /// Drops parts of each object that nobody in this process reads. Must be called before the first event.
    pub fn trim(&self, trim: fn(&mut K)) {
        *self.trim.lock() = Some(trim);
    }

    /// Calls the handler for each object that is there, as created, and then for every change, in order. The handler
    /// runs on the watch's task: it must be quick and must not subscribe.
    pub fn subscribe(&self, handler: impl Fn(&Change<K>) + Send + Sync + 'static) {
        let mut handlers = self.handlers.write();
        for object in self.list() {
            handler(&Change { old: None, new: Some(object) });
        }
        handlers.push(Box::new(handler));
    }

    pub fn has_synced(&self) -> bool {
        *self.synced.borrow()
    }

    /// Takes one event of the watch.
    pub fn apply(&self, event: watcher::Event<K>) {
        let handlers = self.handlers.read();
        let changes = match event {
            watcher::Event::Init => {
                self.state.write().listing = Some(BTreeMap::new());
                Vec::new()
            }
            watcher::Event::InitApply(object) => {
                let object = self.trimmed(object);
                if let Some(listing) = &mut self.state.write().listing {
                    listing.insert(ObjectKey::of(object.meta()), object);
                }
                Vec::new()
            }
            watcher::Event::InitDone => self.state.write().replace_by_listing(),
            watcher::Event::Apply(object) => {
                let object = self.trimmed(object);
                vec![self.state.write().insert(object)]
            }
            watcher::Event::Delete(object) => {
                self.state.write().remove(&ObjectKey::of(object.meta())).into_iter().collect()
            }
        };
        for change in &changes {
            for handler in handlers.iter() {
                handler(change);
            }
        }
        drop(handlers);
        let newest = changes.iter().filter_map(|change| version(change.new.as_ref()?.meta())).max().unwrap_or(0);
        self.seen.send_modify(|seen| *seen = newest.max(*seen));
    }

    fn trimmed(&self, mut object: K) -> K {
        object.meta_mut().managed_fields = None;
        if let Some(trim) = *self.trim.lock() {
            trim(&mut object);
        }
        object
    }

    /// Keeps the copy up to date until the shutdown.
    async fn watch(self: Arc<Self>, api: Api<K>, shutdown: CancellationToken) {
        let stream = watcher(api, watcher::Config::default()).default_backoff();
        let mut stream = std::pin::pin!(stream);
        loop {
            let event = tokio::select! {
                () = shutdown.cancelled() => return,
                event = stream.next() => event,
            };
            match event {
                Some(Ok(event)) => {
                    let listed = matches!(event, watcher::Event::InitDone);
                    self.apply(event);
                    if listed {
                        self.synced.send_replace(true);
                    }
                }
                // A kind that is not served has no objects; nobody must wait for it.
                Some(Err(watcher::Error::InitialListFailed(kube::Error::Api(status)))) if status.code == 404 => {
                    self.synced.send_replace(true);
                }
                Some(Err(error)) => {
                    let kind = K::kind(&());
                    tracing::warn!(%kind, error = crate::process::error_chain(&error), "the watch failed; trying again");
                }
                None => return,
            }
        }
    }
}

impl<K: Object> Index<K> {
    fn insert(&mut self, key: &ObjectKey, object: &K) {
        for value in (self.values)(object) {
            self.keys.entry(value).or_default().insert(key.clone());
        }
    }

    fn remove(&mut self, key: &ObjectKey, object: &K) {
        for value in (self.values)(object) {
            if let Some(keys) = self.keys.get_mut(&value) {
                keys.remove(key);
                if keys.is_empty() {
                    self.keys.remove(&value);
                }
            }
        }
    }
}

impl<K: Object> State<K> {
    fn insert(&mut self, object: K) -> Change<K> {
        let key = ObjectKey::of(object.meta());
        let new = Arc::new(object);
        let old = self.objects.insert(key.clone(), new.clone());
        for index in &mut self.indexes {
            if let Some(old) = &old {
                index.remove(&key, old);
            }
            index.insert(&key, &new);
        }
        Change { old, new: Some(new) }
    }

    fn remove(&mut self, key: &ObjectKey) -> Option<Change<K>> {
        let old = self.objects.remove(key)?;
        for index in &mut self.indexes {
            index.remove(key, &old);
        }
        Some(Change { old: Some(old), new: None })
    }

    /// Makes the copy equal to the finished list; unchanged objects cause no change.
    fn replace_by_listing(&mut self) -> Vec<Change<K>> {
        let Some(listing) = self.listing.take() else { return Vec::new() };
        let gone: Vec<_> = self.objects.keys().filter(|key| !listing.contains_key(key)).cloned().collect();
        let mut changes: Vec<_> = gone.iter().filter_map(|key| self.remove(key)).collect();
        for (key, object) in listing {
            let same = |old: &Arc<K>| {
                old.meta().uid == object.meta().uid && old.meta().resource_version == object.meta().resource_version
            };
            if !self.objects.get(&key).is_some_and(same) {
                changes.push(self.insert(object));
            }
        }
        changes
    }
}

fn version(meta: &ObjectMeta) -> Option<u64> {
    meta.resource_version.as_deref()?.parse().ok()
}

/// An informer whose kind is not known to the caller.
#[async_trait]
pub trait AnyInformer: Send + Sync {
    fn resource(&self) -> ResourceId;
    /// How many objects there are in the namespace.
    fn count(&self, namespace: &str) -> usize;
    async fn wait_synced(&self);
    /// Returns once something at least as new as the version has been seen.
    async fn wait_seen(&self, version: u64);
    /// Returns once the object with this uid is gone or on its way out.
    async fn wait_gone(&self, key: &ObjectKey, uid: &str);
    /// Like `subscribe`, for metadata alone.
    fn subscribe_metadata(&self, handler: Box<dyn Fn(&MetadataChange<'_>) + Send + Sync>);
}

#[async_trait]
impl<K: Object> AnyInformer for Informer<K> {
    fn resource(&self) -> ResourceId {
        ResourceId::of::<K>()
    }

    fn count(&self, namespace: &str) -> usize {
        self.in_namespace(namespace).len()
    }

    async fn wait_synced(&self) {
        // The sender lives in `self`, so waiting cannot fail.
        let _ = self.synced.subscribe().wait_for(|synced| *synced).await;
    }

    async fn wait_seen(&self, version: u64) {
        let _ = self.seen.subscribe().wait_for(|seen| *seen >= version).await;
    }

    async fn wait_gone(&self, key: &ObjectKey, uid: &str) {
        let gone = || {
            self.get(key).is_none_or(|object| {
                object.meta().uid.as_deref() != Some(uid) || object.meta().deletion_timestamp.is_some()
            })
        };
        let _ = self.seen.subscribe().wait_for(|_| gone()).await;
    }

    fn subscribe_metadata(&self, handler: Box<dyn Fn(&MetadataChange<'_>) + Send + Sync>) {
        self.subscribe(move |change| {
            handler(&MetadataChange {
                old: change.old.as_ref().map(|object| object.meta()),
                new: change.new.as_ref().map(|object| object.meta()),
            });
        });
    }
}

struct Entry {
    typed: Arc<dyn Any + Send + Sync>,
    untyped: Arc<dyn AnyInformer>,
}

/// The informers of a process: each kind is watched once, from the first time that somebody asks for it.
pub struct Informers {
    client: Client,
    shutdown: CancellationToken,
    /// By type and namespace; the namespace is empty for informers of the whole cluster.
    entries: Mutex<HashMap<(TypeId, &'static str), Entry>>,
}

impl Informers {
    pub fn new(client: Client, shutdown: CancellationToken) -> Arc<Self> {
        Arc::new(Self { client, shutdown, entries: Mutex::default() })
    }

    /// The informer of a kind; its watch starts with the first call.
    pub fn of<K: Object>(&self) -> Arc<Informer<K>> {
        self.entry("", Api::all)
    }

    /// The informer of a kind in one namespace, for kinds that change often elsewhere (such as leases).
    pub fn in_namespace<K>(&self, namespace: &'static str) -> Arc<Informer<K>>
    where
        K: Object + Resource<Scope = NamespaceResourceScope>,
    {
        self.entry(namespace, |client| Api::namespaced(client, namespace))
    }

    fn entry<K: Object>(&self, namespace: &'static str, api: impl FnOnce(Client) -> Api<K>) -> Arc<Informer<K>> {
        let mut entries = self.entries.lock();
        let entry = entries.entry((TypeId::of::<K>(), namespace)).or_insert_with(|| {
            let informer = Arc::new(Informer::<K>::default());
            tokio::spawn(informer.clone().watch(api(self.client.clone()), self.shutdown.clone()));
            Entry { typed: informer.clone(), untyped: informer }
        });
        entry.typed.clone().downcast().expect("the entry under a type's id is that type's informer")
    }

    /// The cluster-wide informer of a resource, if somebody has asked for it by type.
    pub fn find(&self, resource: &ResourceId) -> Option<Arc<dyn AnyInformer>> {
        let entries = self.entries.lock();
        let mut whole = entries.iter().filter(|((_, namespace), _)| namespace.is_empty());
        whole.find(|(_, entry)| entry.untyped.resource() == *resource).map(|(_, entry)| entry.untyped.clone())
    }

    /// Returns once all informers that exist now hold a complete copy.
    pub async fn wait_synced(&self) {
        let all: Vec<_> = self.entries.lock().values().map(|entry| entry.untyped.clone()).collect();
        for informer in all {
            informer.wait_synced().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::ConfigMap;
    use serde_json::json;

    fn object(name: &str, version: u64, owner: Option<&str>) -> ConfigMap {
        let owners: Vec<_> = owner
            .map(|uid| json!({"apiVersion": "v1", "kind": "Pod", "name": uid, "uid": uid, "controller": true}))
            .into_iter()
            .collect();
        serde_json::from_value(json!({"metadata": {
            "namespace": "ns", "name": name, "uid": name, "resourceVersion": version.to_string(),
            "ownerReferences": owners, "managedFields": [{"manager": "x"}],
        }}))
        .unwrap()
    }

    #[test]
    fn the_owner_index_follows_changes() {
        let informer = Informer::fixed([object("a", 1, Some("u")), object("b", 2, Some("u")), object("c", 3, None)]);
        let names = |uid| informer.owned_by(uid).iter().map(|o| o.metadata.name.clone().unwrap()).collect::<Vec<_>>();
        assert_eq!(names("u"), ["a", "b"]);
        assert!(informer.list().iter().all(|o| o.metadata.managed_fields.is_none()));
        informer.apply(watcher::Event::Apply(object("a", 4, None)));
        informer.apply(watcher::Event::Delete(object("b", 5, Some("u"))));
        assert!(names("u").is_empty());
        assert_eq!(informer.in_namespace("ns").len(), 2);
        assert!(informer.in_namespace("n").is_empty());
    }

    #[test]
    fn a_relist_reports_only_differences() {
        let informer = Informer::fixed([object("same", 1, None), object("changed", 2, None), object("gone", 3, None)]);
        let seen = Arc::new(Mutex::new(Vec::new()));
        informer.subscribe({
            let seen = seen.clone();
            move |change| {
                let name = change.versions().next().and_then(|o| o.metadata.name.clone()).unwrap();
                seen.lock().push((name, change.old.is_some(), change.new.is_some()));
            }
        });
        assert_eq!(std::mem::take(&mut *seen.lock()).len(), 3, "what is there is told as created");
        informer.apply(watcher::Event::Init);
        for o in [object("same", 1, None), object("changed", 5, None), object("new", 6, None)] {
            informer.apply(watcher::Event::InitApply(o));
        }
        assert!(seen.lock().is_empty(), "nothing is told before the list is complete");
        informer.apply(watcher::Event::InitDone);
        let expected = [("gone", true, false), ("changed", true, true), ("new", false, true)];
        assert_eq!(*seen.lock(), expected.map(|(name, old, new)| (name.to_owned(), old, new)));
    }

    #[tokio::test]
    async fn waiting_for_ones_own_writes() {
        let informer = Informer::fixed([object("a", 1, None)]);
        informer.wait_seen(1).await;
        let later = tokio::spawn({
            let informer = informer.clone();
            async move {
                informer.wait_seen(9).await;
                informer.wait_gone(&ObjectKey::new("ns", "a"), "a").await;
            }
        });
        tokio::task::yield_now().await;
        assert!(!later.is_finished());
        informer.apply(watcher::Event::Apply(object("b", 9, None)));
        informer.apply(watcher::Event::Delete(object("a", 10, None)));
        later.await.unwrap();
    }
}
