//! The cache of one resource: a persistent ordered map that readers take without locks, and, behind one lock, the
//! recent history and the watchers.
//!
//! Order inside `apply`, which makes every reader's view consistent: the new map is published, then the event goes
//! into the history and to the watchers, and only after that the feed publishes the revision. So whoever reads the
//! revision first and the map second sees everything up to that revision; and a watcher that registers under the lock
//! sees each event either in the snapshot or in its queue, never in both and never in neither.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::selection::Selection;
use super::stored::{KindInfo, Stored};
use super::watchers::{Delivery, Event, Watchers};
use crate::storage::Change;

/// Events that are kept whatever their age, and at most.
const HISTORY_MIN: usize = 128;
const HISTORY_MAX: usize = 16_384;
/// Beyond the minimum, how long an event is kept for watchers that come back.
const HISTORY_AGE: Duration = Duration::from_secs(300);
/// Snapshots kept for paginated lists, and how long.
const SNAPSHOTS_MAX: usize = 64;
const SNAPSHOT_AGE: Duration = Duration::from_secs(300);

pub type Objects = imbl::OrdMap<Arc<str>, Slot>;

/// An object in a snapshot, and of it what a search looks at first: so that it need not touch what it passes over.
#[derive(Clone)]
pub struct Slot {
    pub(super) marks: u64,
    pub object: Arc<Stored>,
}

impl From<Arc<Stored>> for Slot {
    fn from(object: Arc<Stored>) -> Self {
        Self { marks: object.meta.label_marks, object }
    }
}

/// All objects as of `revision`.
#[derive(Clone, Default)]
pub struct Snapshot {
    pub objects: Objects,
    pub revision: u64,
}

impl Snapshot {
    pub fn values(&self) -> impl Iterator<Item = &Arc<Stored>> {
        self.objects.values().map(|slot| &slot.object)
    }
}

#[derive(Default)]
struct View {
    objects: Objects,
    /// The revision of the last change in `objects`.
    changed: u64,
    ready: bool,
}

#[derive(Default)]
struct State {
    history: VecDeque<Arc<Event>>,
    /// Every event with a greater revision is in `history`.
    horizon: u64,
    watchers: Watchers,
    snapshots: BTreeMap<u64, (Instant, Objects)>,
    /// Revisions before this one are history that is gone.
    forgotten: u64,
    /// What happened while the cache was still being filled.
    pending: Vec<Change>,
}

pub struct ResourceCache {
    /// `/registry/pods/`.
    prefix: String,
    kind: Arc<KindInfo>,
    view: ArcSwap<View>,
    state: Mutex<State>,
    /// The revision up to which the feed has applied everything, of all resources.
    progress: Arc<AtomicU64>,
    /// The cache that this one has replaced: it follows the store as long as somebody still reads it.
    predecessor: Weak<Self>,
}

/// Why a watch cannot start where it was asked to.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum WatchError {
    #[error("too old resource version: {asked} ({oldest})")]
    TooOld { asked: u64, oldest: u64 },
    #[error("the cache is not filled yet")]
    NotReady,
}

/// Where a watch starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// With everything that exists, then what changes.
    Snapshot,
    /// With what changes from now on.
    Now,
    /// With everything after this revision.
    After(u64),
}

/// A running watch; dropping it ends it.
pub struct Watch {
    cache: Arc<ResourceCache>,
    pub selection: Selection,
    id: u64,
    queue: mpsc::Receiver<Arc<Delivery>>,
    /// Events older than the registration, delivered first.
    backlog: VecDeque<Arc<Event>>,
    after: u64,
}

impl ResourceCache {
    pub(super) fn new(prefix: String, kind: Arc<KindInfo>, progress: Arc<AtomicU64>) -> Self {
        Self { prefix, kind, view: ArcSwap::default(), state: Mutex::default(), progress, predecessor: Weak::new() }
    }

    /// An empty cache of the same objects, to be kept in another way.
    pub(super) fn successor(self: &Arc<Self>, kind: KindInfo) -> Self {
        let fresh = Self::new(self.prefix.clone(), Arc::new(kind), self.progress.clone());
        Self { predecessor: Arc::downgrade(self), ..fresh }
    }

    pub fn kind(&self) -> &Arc<KindInfo> {
        &self.kind
    }

    /// The key prefix in the store, with a slash at its end.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// The key of an object.
    pub fn key(&self, namespace: &str, name: &str) -> String {
        if namespace.is_empty() {
            format!("{}{name}", self.prefix)
        } else {
            format!("{}{namespace}/{name}", self.prefix)
        }
    }

    /// `namespace` is empty for cluster-scoped resources.
    pub fn get(&self, namespace: &str, name: &str) -> Option<Arc<Stored>> {
        self.view.load().objects.get(self.key(namespace, name).as_str()).map(|slot| slot.object.clone())
    }

    /// All objects, or those of a namespace, in the order of their keys.
    pub fn list(&self, namespace: Option<&str>) -> Vec<Arc<Stored>> {
        let view = self.view.load();
        match namespace.filter(|namespace| !namespace.is_empty()) {
            None => view.objects.values().map(|slot| slot.object.clone()).collect(),
            Some(namespace) => {
                let prefix = format!("{}{namespace}/", self.prefix);
                range_within(&view.objects, &prefix, &prefix).map(|slot| slot.object.clone()).collect()
            }
        }
    }

    /// Whether the cache has been filled.
    pub fn is_ready(&self) -> bool {
        self.view.load().ready
    }

    /// The revision of the last change to this resource: an index built at it is good until it moves.
    pub fn changed(&self) -> u64 {
        self.view.load().changed
    }

    /// Everything up to this revision is in the cache.
    pub fn revision(&self) -> u64 {
        self.progress.load(Ordering::Acquire).max(self.view.load().changed)
    }

    pub fn len(&self) -> usize {
        self.view.load().objects.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn watcher_count(&self) -> usize {
        self.state.lock().watchers.len()
    }

    pub fn snapshot(&self) -> Snapshot {
        let progress = self.progress.load(Ordering::Acquire);
        let view = self.view.load();
        Snapshot { objects: view.objects.clone(), revision: progress.max(view.changed) }
    }

    /// Keeps a snapshot for the pages of a list that follow.
    pub fn keep_snapshot(&self, snapshot: &Snapshot) {
        let mut state = self.state.lock();
        let now = Instant::now();
        state.snapshots.retain(|_, (kept, _)| now.duration_since(*kept) < SNAPSHOT_AGE);
        while state.snapshots.len() >= SNAPSHOTS_MAX {
            state.snapshots.pop_first();
        }
        state.snapshots.insert(snapshot.revision, (now, snapshot.objects.clone()));
    }

    /// The snapshot of exactly this revision, while it is kept or still the present, and not forgotten.
    pub fn snapshot_at(&self, revision: u64) -> Option<Snapshot> {
        if revision < self.state.lock().forgotten {
            return None;
        }
        let present = self.snapshot();
        if present.revision == revision {
            return Some(present);
        }
        if self.view.load().changed <= revision && revision <= present.revision {
            return Some(Snapshot { revision, ..present });
        }
        let state = self.state.lock();
        state.snapshots.get(&revision).map(|(_, objects)| Snapshot { objects: objects.clone(), revision })
    }

    /// Lists of earlier revisions cannot be continued any more, as the store cannot.
    pub fn forget_before(&self, revision: u64) {
        let mut state = self.state.lock();
        state.forgotten = state.forgotten.max(revision);
        state.snapshots = state.snapshots.split_off(&revision);
    }

    /// Starts a watch; with `Start::Snapshot` the answer holds what exists, and the revision of that.
    pub fn watch(
        self: &Arc<Self>,
        selection: Selection,
        start: Start,
    ) -> Result<(Watch, Option<Snapshot>), WatchError> {
        let mut state = self.state.lock();
        if !self.is_ready() {
            return Err(WatchError::NotReady);
        }
        let present = self.snapshot();
        let mut backlog = VecDeque::new();
        let after = match start {
            Start::Snapshot | Start::Now => present.revision,
            Start::After(revision) => {
                if revision < state.horizon {
                    return Err(WatchError::TooOld { asked: revision, oldest: state.horizon });
                }
                let first = state.history.partition_point(|event| event.revision <= revision);
                // What has to be converted to be looked at is left to the watch: it may wait, this lock may not.
                let is_seen = |event: &Event| selection.converted.is_some() || selection.see(event).is_some();
                backlog.extend(state.history.range(first..).filter(|event| is_seen(event)).cloned());
                revision
            }
        };
        let (id, queue) = state.watchers.add(&self.kind, &selection);
        let watch = Watch { cache: self.clone(), selection, id, queue, backlog, after };
        Ok((watch, (start == Start::Snapshot).then_some(present)))
    }

    /// Takes over everything that the store holds, as of `revision`. Watchers of an earlier time are ended when what
    /// happened in between is not known.
    pub(super) fn fill(&self, entries: Vec<Arc<Stored>>, revision: u64) {
        let mut state = self.state.lock();
        let objects = entries.into_iter().map(|object| (object.key.clone(), Slot::from(object))).collect();
        self.view.store(Arc::new(View { objects, changed: revision, ready: true }));
        state.history.clear();
        state.horizon = revision;
        state.watchers.clear();
        state.snapshots.clear();
        let pending = std::mem::take(&mut state.pending);
        self.apply_locked(&mut state, &pending.iter().collect::<Vec<_>>());
    }

    /// Ends every watch, because the resource is served no more, or from another cache.
    pub(crate) fn end_watches(&self) {
        self.state.lock().watchers.clear();
    }

    /// Applies changes, in order. Nothing under another prefix may be among them.
    pub(super) fn apply(&self, changes: &[&Change]) {
        if let Some(predecessor) = self.predecessor.upgrade() {
            predecessor.apply(changes);
        }
        let mut state = self.state.lock();
        if !self.is_ready() {
            return state.pending.extend(changes.iter().map(|change| (*change).clone()));
        }
        self.apply_locked(&mut state, changes);
    }

    fn apply_locked(&self, state: &mut State, changes: &[&Change]) {
        let view = self.view.load_full();
        let mut objects = view.objects.clone();
        let mut changed = view.changed;
        let mut events = Vec::with_capacity(changes.len());
        let now = Instant::now();
        for change in changes {
            let revision = revision_of(change);
            if revision <= view.changed {
                continue; // Seen before, in the list that filled the cache.
            }
            changed = changed.max(revision);
            if let Some(event) = self.event(&mut objects, change, now) {
                events.push(Arc::new(event));
            }
        }
        self.view.store(Arc::new(View { objects, changed, ready: view.ready }));
        for event in events {
            state.watchers.send(&event);
            state.history.push_back(event);
        }
        state.trim_history(now);
    }

    fn event(&self, objects: &mut Objects, change: &Change, now: Instant) -> Option<Event> {
        match change {
            Change::Put(entry) => match Stored::decode(&self.kind, &entry.key, &entry.value, entry.revision) {
                Ok(object) => {
                    let object = Arc::new(object);
                    let previous = objects.insert(object.key.clone(), object.clone().into()).map(|slot| slot.object);
                    Some(Event { revision: entry.revision, object, previous, deleted: false, at: now })
                }
                Err(error) => {
                    tracing::error!(key = entry.key, %error, "cannot read what the store holds; it is left out");
                    objects.remove(entry.key.as_str());
                    None
                }
            },
            Change::Delete { key, revision } => {
                let previous = objects.remove(key.as_str())?.object;
                match previous.at_revision(*revision) {
                    Ok(last) => Some(Event {
                        revision: *revision,
                        object: Arc::new(last),
                        previous: Some(previous),
                        deleted: true,
                        at: now,
                    }),
                    Err(error) => {
                        tracing::error!(key, %error, "cannot write the last state of a deleted object");
                        None
                    }
                }
            }
        }
    }
}

impl State {
    fn trim_history(&mut self, now: Instant) {
        while self.history.len() > HISTORY_MIN {
            let old = self.history.front().is_some_and(|event| now.duration_since(event.at) > HISTORY_AGE);
            if !old && self.history.len() <= HISTORY_MAX {
                break;
            }
            if let Some(event) = self.history.pop_front() {
                self.horizon = event.revision;
            }
        }
    }
}

impl Watch {
    /// The next event that the selection sees; `None` when the watch has been ended (too slow, or the store's
    /// history broke): the client lists anew.
    pub async fn next(&mut self) -> Option<Arc<Delivery>> {
        loop {
            if self.selection.failure().is_some() {
                return None;
            }
            let delivery = match self.backlog.pop_front() {
                Some(event) => Delivery::new(event),
                None => self.queue.recv().await?,
            };
            if self.is_due(&delivery) {
                return Some(delivery);
            }
        }
    }

    /// Like `next`, but only what is already there.
    pub fn try_next(&mut self) -> Option<Arc<Delivery>> {
        loop {
            let delivery = match self.backlog.pop_front() {
                Some(event) => Delivery::new(event),
                None => self.queue.try_recv().ok()?,
            };
            if self.is_due(&delivery) {
                return Some(delivery);
            }
        }
    }

    fn is_due(&self, event: &Event) -> bool {
        event.revision > self.after && self.selection.see(event).is_some()
    }

    /// What all objects of the watch have in common.
    pub fn kind(&self) -> &KindInfo {
        &self.cache.kind
    }

    /// A revision up to which, once `try_next` has answered `None`, nothing more will come.
    pub fn revision(&self) -> u64 {
        self.cache.revision().max(self.after)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.cache.state.lock().watchers.remove(&self.cache.kind, &self.selection, self.id);
    }
}

/// The objects whose keys begin with `prefix`, which ends with a slash, from the key `from` on, which begins with it.
/// No key but those at the ends is looked at: they lie all over the memory.
pub fn range_within<'a>(objects: &'a Objects, prefix: &str, from: &str) -> impl Iterator<Item = &'a Slot> {
    // `0` is the character after the slash.
    let end: Arc<str> = format!("{}0", prefix.trim_end_matches('/')).into();
    let from: Arc<str> = from.into();
    objects.range(from..end).map(|(_, object)| object)
}

fn revision_of(change: &Change) -> u64 {
    match change {
        Change::Put(entry) => entry.revision,
        Change::Delete { revision, .. } => *revision,
    }
}
