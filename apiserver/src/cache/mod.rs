//! What the server knows of the store, kept up to date by one ordered watch of everything under the prefix. Reads are
//! answered from here; nothing here ever writes an object.

pub mod feed;
pub mod freshness;
pub mod resource;
pub mod selection;
pub mod stored;
pub mod watchers;

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arc_swap::ArcSwap;
use tokio::sync::watch;

pub use freshness::{Freshness, FreshnessError};
pub use resource::{Objects, ResourceCache, Slot, Snapshot, Start, Watch, WatchError, range_within};
pub use selection::{ConvertedFields, Seen, Selection};
pub use stored::{Extracted, KindInfo, Stored};
pub use watchers::{Delivery, Event, FrameKind};

/// The caches of all resources.
pub struct Caches {
    by_prefix: ArcSwap<BTreeMap<String, Arc<ResourceCache>>>,
    by_resource: ArcSwap<BTreeMap<(String, String), Arc<ResourceCache>>>,
    progress: Arc<AtomicU64>,
    progressed: watch::Sender<u64>,
}

impl Default for Caches {
    fn default() -> Self {
        Self {
            by_prefix: ArcSwap::default(),
            by_resource: ArcSwap::default(),
            progress: Arc::default(),
            progressed: watch::Sender::new(0),
        }
    }
}

impl Caches {
    pub fn get(&self, group: &str, resource: &str) -> Option<Arc<ResourceCache>> {
        self.by_resource.load().get(&(group.to_owned(), resource.to_owned())).cloned()
    }

    /// The cache for what is stored under `prefix` (made when it is new), reachable as this resource. Resources that
    /// share a prefix share the cache. A cache that is made after the feed has started is filled by `feed::fill_new`.
    pub fn add(&self, group: &str, resource: &str, prefix: &str, kind: KindInfo) -> Arc<ResourceCache> {
        let existing = self.by_prefix.load().get(prefix).cloned();
        let cache = existing
            .unwrap_or_else(|| Arc::new(ResourceCache::new(prefix.to_owned(), Arc::new(kind), self.progress.clone())));
        self.put(group, resource, cache)
    }

    /// A new cache in the place of one, to be filled by `feed::fill_new`. Whoever reads the old one goes on to see all
    /// changes.
    pub fn replace(&self, group: &str, resource: &str, old: &Arc<ResourceCache>, kind: KindInfo) -> Arc<ResourceCache> {
        self.put(group, resource, Arc::new(old.successor(kind)))
    }

    fn put(&self, group: &str, resource: &str, cache: Arc<ResourceCache>) -> Arc<ResourceCache> {
        self.by_prefix.rcu(|map| {
            let mut map = BTreeMap::clone(map);
            map.insert(cache.prefix().to_owned(), cache.clone());
            map
        });
        self.by_resource.rcu(|map| {
            let mut map = BTreeMap::clone(map);
            map.insert((group.to_owned(), resource.to_owned()), cache.clone());
            map
        });
        cache
    }

    /// Forgets the resource; its watchers end. What is in the store stays.
    pub fn remove(&self, group: &str, resource: &str) {
        let key = (group.to_owned(), resource.to_owned());
        let Some(cache) = self.by_resource.load().get(&key).cloned() else { return };
        self.by_resource.rcu(|map| {
            let mut map = BTreeMap::clone(map);
            map.remove(&key);
            map
        });
        if !self.by_resource.load().values().any(|other| Arc::ptr_eq(other, &cache)) {
            self.by_prefix.rcu(|map| {
                let mut map = BTreeMap::clone(map);
                map.remove(cache.prefix());
                map
            });
            cache.end_watches();
        }
    }

    /// The cache that a key belongs to: the one with the longest prefix of it.
    pub(crate) fn of_key(&self, key: &str) -> Option<Arc<ResourceCache>> {
        let map = self.by_prefix.load();
        // Among the prefixes that sort before the key, the nearest that is a prefix of it is the longest one.
        map.range::<str, _>((Bound::Unbounded, Bound::Included(key)))
            .rev()
            .take(8)
            .find(|(prefix, _)| key.starts_with(prefix.as_str()))
            .map(|(_, c)| c.clone())
    }

    pub(crate) fn all(&self) -> Vec<Arc<ResourceCache>> {
        self.by_prefix.load().values().cloned().collect()
    }

    /// Everything up to this revision is in the caches.
    pub fn revision(&self) -> u64 {
        self.progress.load(Ordering::Acquire)
    }

    /// Whether all caches are filled.
    pub fn are_ready(&self) -> bool {
        self.revision() > 0
    }

    pub(crate) fn advance(&self, revision: u64) {
        if self.progress.fetch_max(revision, Ordering::AcqRel) < revision {
            self.progressed.send_replace(revision);
        }
    }

    /// Waits until the caches have everything up to `revision`.
    pub async fn wait_for(&self, revision: u64) {
        if self.revision() >= revision {
            return;
        }
        let mut progressed = self.progressed.subscribe();
        // The sender lives as long as `self`, so this cannot fail.
        let _ = progressed.wait_for(|now| *now >= revision).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::{Change, Entry};

    #[test]
    fn a_replaced_cache_follows_the_store_while_somebody_reads_it() {
        let caches = Caches::default();
        let (prefix, kind) = ("/registry/g/things/", KindInfo { kind: "Thing".into(), ..KindInfo::default() });
        let old = caches.add("g", "things", prefix, KindInfo::default());
        old.fill(Vec::new(), 1);
        let new = caches.replace("g", "things", &old, kind);
        new.fill(Vec::new(), 1);
        let key = format!("{prefix}a");
        let value = br#"{"metadata":{"name":"a"}}"#.to_vec().into();
        let change = Change::Put(Entry { key: key.clone(), value, revision: 2 });
        caches.of_key(&key).expect("the new cache").apply(&[&change]);
        assert!(new.get("", "a").is_some() && old.get("", "a").is_some());
        assert!(Arc::ptr_eq(&caches.get("g", "things").expect("the resource has a cache"), &new));
    }
}
