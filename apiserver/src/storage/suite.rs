//! What every store must do, run against each implementation.

use std::time::Duration;

use bytes::Bytes;

use super::memory::Memory;
use super::{Change, Expect, Outcome, Store, StoreError};

#[tokio::test]
async fn memory_passes() {
    run(&Memory::default(), "/suite").await;
}

#[tokio::test]
async fn etcd_passes() {
    let Some(etcd) = crate::testing::TestEtcd::start().expect("etcd starts") else { return };
    run(etcd.store().await.expect("etcd answers").as_ref(), "/suite").await;
}

/// Runs everything below `prefix`, which must be empty.
pub async fn run(store: &dyn Store, prefix: &str) {
    writes_are_conditional(store, &format!("{prefix}/writes")).await;
    ranges_are_pages_of_one_revision(store, &format!("{prefix}/ranges")).await;
    watches_are_ordered_and_resume(store, &format!("{prefix}/watches")).await;
    touching_moves_a_watch(store, &format!("{prefix}/touch")).await;
    compaction_forgets(store, &format!("{prefix}/compaction")).await;
}

fn text(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}

async fn put(store: &dyn Store, key: &str, value: &str, expect: Expect) -> u64 {
    match store.put(key, text(value), expect, None).await.expect("put") {
        Outcome::Done(revision) => revision,
        Outcome::Mismatch(found) => panic!("{key} is not {expect:?} but {found:?}"),
    }
}

async fn writes_are_conditional(store: &dyn Store, prefix: &str) {
    let key = format!("{prefix}/a");
    assert_eq!(store.get(&key).await.expect("get"), None);
    let first = put(store, &key, "1", Expect::Absent).await;
    assert_eq!(store.revision().await.expect("revision"), first);
    let again = store.put(&key, text("x"), Expect::Absent, None).await.expect("put");
    assert!(matches!(again, Outcome::Mismatch(Some(entry)) if entry.value == "1" && entry.revision == first));
    let second = put(store, &key, "2", Expect::Revision(first)).await;
    assert!(second > first);
    let stale = store.put(&key, text("x"), Expect::Revision(first), None).await.expect("put");
    assert!(matches!(stale, Outcome::Mismatch(Some(entry)) if entry.value == "2"));
    assert!(matches!(store.delete(&key, first).await.expect("delete"), Outcome::Mismatch(Some(_))));
    assert!(matches!(store.delete(&key, second).await.expect("delete"), Outcome::Done(third) if third > second));
    assert_eq!(store.delete(&key, second).await.expect("delete"), Outcome::Mismatch(None));
    assert_eq!(store.put(&key, text("x"), Expect::Revision(second), None).await.expect("put"), Outcome::Mismatch(None));
    let leased = store.put(&key, text("x"), Expect::Absent, Some(Duration::from_secs(3600))).await.expect("put");
    assert!(matches!(leased, Outcome::Done(_)));
}

async fn ranges_are_pages_of_one_revision(store: &dyn Store, prefix: &str) {
    for name in ["a", "b", "c", "d"] {
        put(store, &format!("{prefix}/{name}"), name, Expect::Absent).await;
    }
    let root = format!("{prefix}/");
    let first = store.range(&root, None, 2, None).await.expect("range");
    let keys = |page: &super::Page| page.entries.iter().map(|e| e.key[root.len()..].to_owned()).collect::<Vec<_>>();
    assert_eq!((keys(&first), first.more), (vec!["a".into(), "b".into()], true));
    let old = store.get(&format!("{root}c")).await.expect("get").expect("c").revision;
    assert!(matches!(store.delete(&format!("{root}c"), old).await.expect("delete"), Outcome::Done(_)));
    let last = first.entries.last().map(|entry| entry.key.clone());
    let second = store.range(&root, last.as_deref(), 2, Some(first.revision)).await.expect("range");
    assert_eq!((keys(&second), second.more), (vec!["c".into(), "d".into()], false));
    assert_eq!(keys(&store.range(&root, None, 0, None).await.expect("range")), ["a", "b", "d"]);
}

async fn watches_are_ordered_and_resume(store: &dyn Store, prefix: &str) {
    let root = format!("{prefix}/");
    let key = format!("{root}a");
    let start = store.revision().await.expect("revision");
    let mut live = store.watch(&root, start).await.expect("watch");
    let one = put(store, &key, "1", Expect::Absent).await;
    put(store, &format!("{prefix}-other"), "x", Expect::Absent).await;
    let two = put(store, &key, "2", Expect::Revision(one)).await;
    store.delete(&key, two).await.expect("delete");
    let mut seen = Vec::new();
    while seen.len() < 3 {
        seen.extend(live.next().await.expect("next"));
    }
    assert!(matches!(&seen[0], Change::Put(entry) if entry.value == "1" && entry.revision == one));
    assert!(matches!(&seen[1], Change::Put(entry) if entry.value == "2" && entry.revision == two));
    assert!(matches!(&seen[2], Change::Delete { key: gone, revision } if *gone == key && *revision > two));
    let mut resumed = store.watch(&root, one).await.expect("watch");
    assert!(matches!(&resumed.next().await.expect("next")[0], Change::Put(entry) if entry.revision == two));
}

async fn touching_moves_a_watch(store: &dyn Store, prefix: &str) {
    let start = store.revision().await.expect("revision");
    let mut watch = store.watch(&format!("{prefix}/"), start).await.expect("watch");
    let touched = store.touch(prefix).await.expect("touch");
    assert!(matches!(&watch.next().await.expect("next")[0], Change::Put(entry) if entry.revision == touched));
}

async fn compaction_forgets(store: &dyn Store, prefix: &str) {
    let root = format!("{prefix}/");
    let one = put(store, &format!("{root}a"), "1", Expect::Absent).await;
    put(store, &format!("{root}a"), "2", Expect::Revision(one)).await;
    let three = put(store, &format!("{root}b"), "3", Expect::Absent).await;
    store.compact(three).await.expect("compact");
    store.compact(three).await.expect("compacting twice is no error");
    assert!(matches!(store.range(&root, None, 0, Some(one)).await, Err(StoreError::Compacted)));
    let refused = match store.watch(&root, one).await {
        Ok(mut watch) => watch.next().await.err(),
        Err(error) => Some(error),
    };
    assert!(matches!(refused, Some(StoreError::Compacted)));
    assert_eq!(store.range(&root, None, 0, None).await.expect("range").entries.len(), 2);
}
