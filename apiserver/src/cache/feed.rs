//! Fills the caches and keeps them up to date: one task, one watch of the whole prefix. Because the watch is ordered
//! over all resources, one number — the last revision seen — is the freshness of every cache.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::{Caches, ResourceCache, Stored};
use crate::storage::{Change, Entry, Store, StoreError, StoreResult};

/// Keys per read while filling: bounds what is in memory twice.
const PAGE: usize = 500;
const RETRY: Duration = Duration::from_millis(250);
const RETRY_MAX: Duration = Duration::from_secs(5);

/// Runs until shutdown: fill, follow, and start over when the store has lost our place.
pub async fn run(store: Arc<dyn Store>, prefix: String, caches: Arc<Caches>, shutdown: CancellationToken) {
    let mut delay = RETRY;
    let mut place = None;
    loop {
        let followed = async {
            let after = match place {
                Some(revision) => revision,
                None => fill(&store, &prefix, &caches).await?,
            };
            place = Some(after);
            follow(store.as_ref(), &prefix, &caches, after, &mut place, &mut delay).await
        };
        let result = tokio::select! {
            () = shutdown.cancelled() => return,
            result = followed => result,
        };
        match result {
            Err(StoreError::Compacted) => {
                tracing::warn!("the store has forgotten what came after our last revision; filling the caches anew");
                place = None;
            }
            Err(error) => {
                tracing::warn!(error = %apimachinery::process::error_chain(&error), "the store's watch broke, retrying");
                tokio::select! {
                    () = shutdown.cancelled() => return,
                    () = tokio::time::sleep(delay) => delay = (delay * 2).min(RETRY_MAX),
                }
            }
            Ok(never) => match never {},
        }
    }
}

enum Never {}

async fn fill(store: &Arc<dyn Store>, prefix: &str, caches: &Caches) -> StoreResult<u64> {
    let mut found: HashMap<String, Vec<Arc<Stored>>> = HashMap::new();
    let root = format!("{prefix}/");
    let revision = read_all(store, &root, |entry| {
        if let Some(cache) = caches.of_key(&entry.key)
            && let Some(object) = decode(&cache, entry)
        {
            found.entry(cache.prefix().to_owned()).or_default().push(object);
        }
    })
    .await?;
    for cache in caches.all() {
        cache.fill(found.remove(cache.prefix()).unwrap_or_default(), revision);
    }
    caches.advance(revision);
    tracing::info!(revision, "caches are filled");
    Ok(revision)
}

/// Fills a cache that was added while the feed runs: its objects as of a revision that the feed then catches up with.
pub async fn fill_new(store: &Arc<dyn Store>, cache: &ResourceCache) -> StoreResult<()> {
    let mut objects = Vec::new();
    let revision = read_all(store, cache.prefix(), |entry| objects.extend(decode(cache, entry))).await?;
    cache.fill(objects, revision);
    Ok(())
}

/// Everything under a prefix, at one revision. Each page is on its way while the one before is being looked at.
async fn read_all(store: &Arc<dyn Store>, prefix: &str, mut each: impl FnMut(&Entry)) -> StoreResult<u64> {
    let fetch = |after: Option<String>, at| {
        let (store, prefix) = (store.clone(), prefix.to_owned());
        tokio::spawn(async move { store.range(&prefix, after.as_deref(), PAGE, at).await })
    };
    let (mut coming, mut at) = (Some(fetch(None, None)), None);
    while let Some(page) = coming.take() {
        let page = page
            .await
            .map_err(|error| StoreError::Operation { operation: "read everything", source: Box::new(error) })??;
        at = at.or(Some(page.revision));
        coming = page.entries.last().filter(|_| page.more).map(|last| fetch(Some(last.key.clone()), at));
        page.entries.iter().for_each(&mut each);
    }
    Ok(at.unwrap_or_default())
}

fn decode(cache: &ResourceCache, entry: &Entry) -> Option<Arc<Stored>> {
    match Stored::decode(cache.kind(), &entry.key, &entry.value, entry.revision) {
        Ok(object) => Some(Arc::new(object)),
        Err(error) => {
            tracing::error!(key = entry.key, %error, "cannot read what the store holds; it is left out");
            None
        }
    }
}

async fn follow(
    store: &dyn Store,
    prefix: &str,
    caches: &Caches,
    after: u64,
    place: &mut Option<u64>,
    delay: &mut Duration,
) -> StoreResult<Never> {
    let mut stream = store.watch(&format!("{prefix}/"), after).await?;
    loop {
        let changes = stream.next().await?;
        *delay = RETRY;
        if let Some(revision) = apply(caches, &changes) {
            caches.advance(revision);
            *place = Some(revision);
        }
    }
}

/// Hands each cache its changes, in order; the last revision.
fn apply(caches: &Caches, changes: &[Change]) -> Option<u64> {
    let mut by_cache: Vec<(Arc<ResourceCache>, Vec<&Change>)> = Vec::new();
    let mut last = None;
    for change in changes {
        let (key, revision) = match change {
            Change::Put(entry) => (entry.key.as_str(), entry.revision),
            Change::Delete { key, revision } => (key.as_str(), *revision),
        };
        last = Some(revision);
        let Some(cache) = caches.of_key(key) else { continue };
        match by_cache.iter_mut().find(|(known, _)| Arc::ptr_eq(known, &cache)) {
            Some((_, changes)) => changes.push(change),
            None => by_cache.push((cache, vec![change])),
        }
    }
    for (cache, changes) in by_cache {
        cache.apply(&changes);
    }
    last
}
