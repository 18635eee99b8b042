//! The store under the server: keys to bytes with one revision that counts every change, compare-and-write, and an
//! ordered watch. Implementations know nothing of objects; what is in the bytes is the business of `cache` and
//! `registry`. Every implementation passes the one behaviour suite in `storage::suite`.

mod channel;
pub mod encryption;
pub mod etcd;
pub mod memory;
#[cfg(test)]
mod suite;

use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;

/// One key as it was at some revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub key: String,
    pub value: Bytes,
    /// The revision of the write that made this value.
    pub revision: u64,
}

/// What must be true of a key for a write to happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// The key does not exist.
    Absent,
    /// The key's last write was this one.
    Revision(u64),
}

/// What came of a conditional write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Done, at this revision.
    Done(u64),
    /// Nothing was written: the key is otherwise than expected; this is how it is.
    Mismatch(Option<Entry>),
}

/// A part of a range, all of it as of `revision`.
#[derive(Clone, Debug, Default)]
pub struct Page {
    pub entries: Vec<Entry>,
    pub revision: u64,
    /// Whether keys follow after the last one.
    pub more: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    Put(Entry),
    /// `revision` is that of the deletion.
    Delete {
        key: String,
        revision: u64,
    },
}

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("the required revision has been compacted")]
    Compacted,
    #[error("cannot read the store's certificates: {path}")]
    ReadTls { path: std::path::PathBuf, source: std::io::Error },
    #[error("cannot connect to the store")]
    Connect(#[source] BoxError),
    #[error("the store failed to {operation}")]
    Operation { operation: &'static str, source: BoxError },
    #[error("the store did not answer in time to {operation}")]
    Timeout { operation: &'static str },
    #[error("the store's watch ended")]
    WatchEnded,
}

pub type BoxError = Box<dyn std::error::Error + Send + Sync>;
pub type StoreResult<T> = Result<T, StoreError>;

/// The ordered changes under a prefix. Batches are never empty and never split a revision.
#[async_trait]
pub trait WatchStream: Send {
    async fn next(&mut self) -> StoreResult<Vec<Change>>;
}

#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// Linearizable read of one key.
    async fn get(&self, key: &str) -> StoreResult<Option<Entry>>;

    /// Keys under `prefix` that come after `after`, at most `limit` (0: all), as of `revision` (`None`: now).
    async fn range(&self, prefix: &str, after: Option<&str>, limit: usize, revision: Option<u64>) -> StoreResult<Page>;

    /// Writes when `expect` holds. With a `ttl` the key goes away by itself that much later, give or take a minute.
    async fn put(&self, key: &str, value: Bytes, expect: Expect, ttl: Option<Duration>) -> StoreResult<Outcome>;

    /// Deletes when the last write of the key was `revision`.
    async fn delete(&self, key: &str, revision: u64) -> StoreResult<Outcome>;

    /// All changes under `prefix` with a revision greater than `after`; `Compacted` when they are no longer known.
    async fn watch(&self, prefix: &str, after: u64) -> StoreResult<Box<dyn WatchStream>>;

    /// The revision of the last write anywhere: linearizable.
    async fn revision(&self) -> StoreResult<u64>;

    /// Writes a key of the store's own under `prefix`, so that a watch of the prefix moves; the write's revision.
    async fn touch(&self, prefix: &str) -> StoreResult<u64>;

    /// Forgets history before `revision`.
    async fn compact(&self, revision: u64) -> StoreResult<()>;

    /// Whether the value is kept in a way that it should not be kept in any more, so that writing the same again is
    /// worth it.
    fn is_stale(&self, _key: &str) -> bool {
        false
    }
}
