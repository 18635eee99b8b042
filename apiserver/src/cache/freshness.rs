//! Linearizable reads from the caches: ask the store for its present revision, then wait until the caches are there.
//!
//! One question serves everyone who asked before it was sent. When the revision does not show up in the watch by
//! itself — the last write was outside of the watched prefix — a write of an own key inside of it makes the watch move:
//! its event proves that everything before it has been seen. That works with every version of etcd, unlike progress
//! requests, which are only reliable from 3.4.31 and 3.5.13 on.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use super::Caches;
use crate::storage::{Store, StoreError};

/// How long a revision may take to show up before the watch is made to move.
const STALL: Duration = Duration::from_millis(15);
/// How long a reader waits for a revision.
pub const WAIT: Duration = Duration::from_secs(3);

#[derive(Debug, Clone, thiserror::Error)]
pub enum FreshnessError {
    #[error("the store does not tell its revision")]
    Store(#[source] Arc<StoreError>),
    #[error("the cache did not reach revision {wanted} in time, it is at {reached}")]
    Timeout { wanted: u64, reached: u64 },
    #[error("the server is shutting down")]
    Shutdown,
}

type Answer = Result<u64, FreshnessError>;

/// Asks for the store's revision on behalf of all readers.
pub struct Freshness {
    questions: mpsc::Sender<oneshot::Sender<Answer>>,
}

impl Freshness {
    pub fn start(store: Arc<dyn Store>, prefix: String, caches: Arc<Caches>, shutdown: CancellationToken) -> Self {
        let (questions, mut asked) = mpsc::channel::<oneshot::Sender<Answer>>(4096);
        tokio::spawn(async move {
            let mut waiting = Vec::new();
            loop {
                tokio::select! {
                    () = shutdown.cancelled() => return,
                    count = asked.recv_many(&mut waiting, 4096) => if count == 0 { return },
                }
                let answer = store.revision().await.map_err(|error| FreshnessError::Store(Arc::new(error)));
                let revision = answer.as_ref().ok().copied();
                for asker in waiting.drain(..) {
                    let _ = asker.send(answer.clone()); // The asker may have gone away.
                }
                if let Some(revision) = revision.filter(|revision| *revision > caches.revision())
                    && timeout(STALL, caches.wait_for(revision)).await.is_err()
                    && let Err(error) = store.touch(&prefix).await
                {
                    tracing::warn!(%error, "cannot make the store's watch move");
                }
            }
        });
        Self { questions }
    }

    /// Waits until the caches hold everything that was written before the call.
    pub async fn reach_present(&self, caches: &Caches) -> Result<u64, FreshnessError> {
        let (asker, answer) = oneshot::channel();
        let deadline = Instant::now() + WAIT;
        self.questions.send(asker).await.map_err(|_| FreshnessError::Shutdown)?;
        let revision = answer.await.map_err(|_| FreshnessError::Shutdown)??;
        self.reach(caches, revision, deadline).await?;
        Ok(revision)
    }

    /// Waits until the caches have this revision.
    pub async fn reach(&self, caches: &Caches, revision: u64, deadline: Instant) -> Result<(), FreshnessError> {
        if caches.revision() >= revision {
            return Ok(());
        }
        tokio::time::timeout_at(deadline, caches.wait_for(revision))
            .await
            .map_err(|_| FreshnessError::Timeout { wanted: revision, reached: caches.revision() })
    }
}
