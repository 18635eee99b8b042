//! A lock for each of many things, of which only those in use are kept.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::OwnedMutexGuard;

pub struct Locks<K> {
    held: Mutex<HashMap<K, Arc<tokio::sync::Mutex<()>>>>,
}

impl<K> Default for Locks<K> {
    fn default() -> Self {
        Self { held: Mutex::default() }
    }
}

impl<K: Clone + Eq + Hash> Locks<K> {
    fn of(&self, key: &K) -> Arc<tokio::sync::Mutex<()>> {
        let mut held = self.held.lock();
        held.retain(|_, lock| Arc::strong_count(lock) > 1);
        held.entry(key.clone()).or_default().clone()
    }

    /// Waits until nobody else has the thing.
    pub async fn lock(&self, key: &K) -> OwnedMutexGuard<()> {
        self.of(key).lock_owned().await
    }

    /// `None` while somebody else has the thing.
    pub fn try_lock(&self, key: &K) -> Option<OwnedMutexGuard<()>> {
        self.of(key).try_lock_owned().ok()
    }

    /// What somebody has, or waits for.
    pub fn busy(&self) -> Vec<K> {
        let held = self.held.lock();
        held.iter().filter(|(_, lock)| Arc::strong_count(lock) > 1).map(|(key, _)| key.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn one_at_a_time() {
        let locks = Locks::default();
        let first = locks.lock(&"a").await;
        assert!(locks.try_lock(&"a").is_none());
        assert!(locks.try_lock(&"b").is_some());
        assert_eq!(locks.busy(), ["a"]);
        drop(first);
        assert!(locks.busy().is_empty());
        assert!(locks.try_lock(&"a").is_some());
    }
}
