//! A store in memory, for tests that need no etcd. It keeps its whole history, expires keys when they are looked at,
//! and refuses what etcd refuses.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::Instant;

use super::{Change, Entry, Expect, Outcome, Page, Store, StoreError, StoreResult, WatchStream};

pub struct Memory {
    shared: Arc<Shared>,
}

struct Shared {
    inner: Mutex<Inner>,
    revision: watch::Sender<u64>,
}

#[derive(Default)]
struct Inner {
    entries: BTreeMap<String, Entry>,
    deadlines: BTreeMap<String, Instant>,
    history: Vec<Change>,
    revision: u64,
    compacted: u64,
}

impl Default for Memory {
    fn default() -> Self {
        // etcd's first revision is 1, before any write.
        let inner = Mutex::new(Inner { revision: 1, ..Inner::default() });
        Self { shared: Arc::new(Shared { inner, revision: watch::Sender::new(1) }) }
    }
}

impl Inner {
    fn expire(&mut self) {
        let now = Instant::now();
        let expired: Vec<String> =
            self.deadlines.iter().filter(|(_, at)| **at <= now).map(|(key, _)| key.clone()).collect();
        for key in expired {
            self.remove(&key);
        }
    }

    fn remove(&mut self, key: &str) {
        self.deadlines.remove(key);
        if self.entries.remove(key).is_some() {
            self.revision += 1;
            self.history.push(Change::Delete { key: key.to_owned(), revision: self.revision });
        }
    }

    fn insert(&mut self, key: &str, value: Bytes, ttl: Option<Duration>) {
        self.revision += 1;
        let entry = Entry { key: key.to_owned(), value, revision: self.revision };
        self.entries.insert(key.to_owned(), entry.clone());
        self.history.push(Change::Put(entry));
        match ttl {
            Some(ttl) => self.deadlines.insert(key.to_owned(), Instant::now() + ttl),
            None => self.deadlines.remove(key),
        };
    }

    fn holds(&self, key: &str, expect: Expect) -> bool {
        match (self.entries.get(key), expect) {
            (None, Expect::Absent) => true,
            (Some(entry), Expect::Revision(revision)) => entry.revision == revision,
            _ => false,
        }
    }

    /// All entries as of a revision, by playing the history again.
    fn entries_at(&self, revision: u64) -> BTreeMap<String, Entry> {
        let mut entries = BTreeMap::new();
        for change in self.history.iter().take_while(|change| revision_of(change) <= revision) {
            match change {
                Change::Put(entry) => entries.insert(entry.key.clone(), entry.clone()),
                Change::Delete { key, .. } => entries.remove(key),
            };
        }
        entries
    }
}

impl Memory {
    fn change<T>(&self, change: impl FnOnce(&mut Inner) -> T) -> T {
        let mut inner = self.shared.inner.lock();
        inner.expire();
        let result = change(&mut inner);
        self.shared.revision.send_replace(inner.revision);
        result
    }
}

#[async_trait]
impl Store for Memory {
    async fn get(&self, key: &str) -> StoreResult<Option<Entry>> {
        Ok(self.change(|inner| inner.entries.get(key).cloned()))
    }

    async fn range(&self, prefix: &str, after: Option<&str>, limit: usize, revision: Option<u64>) -> StoreResult<Page> {
        self.change(|inner| {
            if revision.is_some_and(|revision| revision < inner.compacted) {
                return Err(StoreError::Compacted);
            }
            let past = revision.filter(|at| *at < inner.revision).map(|at| inner.entries_at(at));
            let entries = past.as_ref().unwrap_or(&inner.entries);
            let mut found = entries
                .values()
                .filter(|entry| entry.key.starts_with(prefix) && after.is_none_or(|after| entry.key.as_str() > after));
            let count = if limit == 0 { usize::MAX } else { limit };
            let page = found.by_ref().take(count).cloned().collect();
            Ok(Page { entries: page, revision: inner.revision, more: found.next().is_some() })
        })
    }

    async fn put(&self, key: &str, value: Bytes, expect: Expect, ttl: Option<Duration>) -> StoreResult<Outcome> {
        Ok(self.change(|inner| {
            if !inner.holds(key, expect) {
                return Outcome::Mismatch(inner.entries.get(key).cloned());
            }
            inner.insert(key, value, ttl);
            Outcome::Done(inner.revision)
        }))
    }

    async fn delete(&self, key: &str, revision: u64) -> StoreResult<Outcome> {
        Ok(self.change(|inner| {
            if !inner.holds(key, Expect::Revision(revision)) {
                return Outcome::Mismatch(inner.entries.get(key).cloned());
            }
            inner.remove(key);
            Outcome::Done(inner.revision)
        }))
    }

    async fn watch(&self, prefix: &str, after: u64) -> StoreResult<Box<dyn WatchStream>> {
        if after + 1 < self.shared.inner.lock().compacted {
            return Err(StoreError::Compacted);
        }
        Ok(Box::new(MemoryWatch {
            shared: self.shared.clone(),
            prefix: prefix.to_owned(),
            after,
            revision: self.shared.revision.subscribe(),
        }))
    }

    async fn revision(&self) -> StoreResult<u64> {
        Ok(self.change(|inner| inner.revision))
    }

    async fn touch(&self, prefix: &str) -> StoreResult<u64> {
        Ok(self.change(|inner| {
            inner.insert(&format!("{prefix}/ketch/freshness"), Bytes::new(), None);
            inner.revision
        }))
    }

    async fn compact(&self, revision: u64) -> StoreResult<()> {
        self.change(|inner| inner.compacted = inner.compacted.max(revision));
        Ok(())
    }
}

struct MemoryWatch {
    shared: Arc<Shared>,
    prefix: String,
    after: u64,
    revision: watch::Receiver<u64>,
}

#[async_trait]
impl WatchStream for MemoryWatch {
    async fn next(&mut self) -> StoreResult<Vec<Change>> {
        loop {
            self.revision.borrow_and_update();
            let found = self.take_new();
            if !found.is_empty() {
                return Ok(found);
            }
            self.revision.changed().await.map_err(|_| StoreError::WatchEnded)?;
        }
    }
}

impl MemoryWatch {
    fn take_new(&mut self) -> Vec<Change> {
        let inner = self.shared.inner.lock();
        let first = inner.history.partition_point(|change| revision_of(change) <= self.after);
        self.after = inner.revision.max(self.after);
        let is_ours = |change: &&Change| match change {
            Change::Put(entry) => entry.key.starts_with(&self.prefix),
            Change::Delete { key, .. } => key.starts_with(&self.prefix),
        };
        inner.history[first..].iter().filter(is_ours).cloned().collect()
    }
}

fn revision_of(change: &Change) -> u64 {
    match change {
        Change::Put(entry) => entry.revision,
        Change::Delete { revision, .. } => *revision,
    }
}
