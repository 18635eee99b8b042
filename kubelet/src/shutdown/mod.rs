//! Keeps the machine from going down before its pods have ended. The kubelet holds one of systemd-logind's delaying
//! locks; when a shutdown is announced, the node says so, takes no more pods, ends those that it has in the order of
//! their priority, and lets the lock go.

mod logind;
mod order;

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::BoxStream;
use k8s_openapi::api::core::v1::{ObjectReference, Pod};
use tokio::sync::mpsc;

pub use logind::SystemBus;

use crate::config::ShutdownPeriod;
use crate::events::{Level, Recorder};
use crate::eviction::Eviction;
use crate::node::readiness::{Obstacle, Readiness};
use crate::pod::plan::{Verdict, is_terminal};
use crate::pod::runtime_uid;
use crate::state::NodeState;
use crate::volumes;
use order::Group;

/// After the connection to logind was lost, and after it could not be had.
const RECONNECT: Duration = Duration::from_secs(1);
const RECONNECT_MAX: Duration = Duration::from_secs(60);
const MESSAGE: &str = "Pod was terminated in response to imminent node shutdown.";

/// What could not be had from logind.
#[derive(Debug, thiserror::Error)]
#[error("cannot {step}: {why}")]
pub struct LogindError {
    pub step: &'static str,
    pub why: String,
}

/// The part of systemd that announces shutdowns.
#[async_trait::async_trait]
pub trait Logind: Send + Sync {
    /// How long logind lets locks delay a shutdown.
    async fn longest_delay(&self) -> Result<Duration, LogindError>;
    /// Has logind allow delays of this length.
    async fn allow_delay(&self, delay: Duration) -> Result<(), LogindError>;
    /// A lock that delays a shutdown until it is closed.
    async fn delay_shutdown(&self) -> Result<OwnedFd, LogindError>;
    /// True when the machine is about to go down, false when that was called off. Ends with the connection.
    async fn announcements(&self) -> Result<BoxStream<'static, bool>, LogindError>;
}

/// Connects to logind; called again when a connection is lost.
#[async_trait::async_trait]
pub trait Connect: Send + Sync {
    async fn connect(&self) -> Result<Arc<dyn Logind>, LogindError>;
}

pub struct Shutdown {
    pub state: Arc<NodeState>,
    pub readiness: Arc<Readiness>,
    pub recorder: Recorder,
    /// Ends pods.
    pub evictions: mpsc::Sender<Eviction>,
}

impl Shutdown {
    /// Runs until the process ends; at once when the configuration does not ask for it.
    pub async fn run(self, connector: impl Connect) {
        let periods = order::periods(&self.state.config);
        if periods.is_empty() {
            return;
        }
        let mut pause = RECONNECT;
        loop {
            match self.follow(&connector, &periods).await {
                Ok(()) => {
                    tracing::warn!("the connection to logind was lost");
                    pause = RECONNECT;
                }
                Err(error) => {
                    tracing::warn!(%error, "the machine may go down without waiting for its pods");
                    pause = (pause * 2).min(RECONNECT_MAX);
                }
            }
            tokio::time::sleep(pause).await;
        }
    }

    async fn follow(&self, connector: &impl Connect, periods: &[ShutdownPeriod]) -> Result<(), LogindError> {
        let logind = connector.connect().await?;
        let needed = order::total(periods);
        if logind.longest_delay().await? < needed {
            logind.allow_delay(needed).await?;
        }
        let mut announcements = logind.announcements().await?;
        let mut lock = Some(logind.delay_shutdown().await?);
        while let Some(is_going) = announcements.next().await {
            self.tell(is_going);
            if is_going {
                self.readiness.set(Obstacle::Shutdown, "node is shutting down");
                self.end_pods(periods).await;
                // From here on the machine goes down.
                lock = None;
            } else {
                self.readiness.clear(Obstacle::Shutdown);
                lock = Some(logind.delay_shutdown().await?);
            }
        }
        drop(lock);
        Ok(())
    }

    fn tell(&self, is_going: bool) {
        let message = match is_going {
            true => "Shutdown manager detected shutdown event",
            false => "Shutdown manager detected shutdown cancellation",
        };
        tracing::info!(message);
        let name = &self.state.node_name;
        let node = ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Node".to_owned()),
            name: Some(name.clone()),
            uid: Some(name.clone()),
            ..ObjectReference::default()
        };
        self.recorder.event(node, Level::Normal, "NodeShutdown", message);
    }

    /// One group after the other, each as long as it may take.
    async fn end_pods(&self, periods: &[ShutdownPeriod]) {
        let views = self.state.pods();
        let pods: Vec<&Pod> = views.iter().map(|view| &*view.pod).filter(|pod| !is_terminal(pod)).collect();
        for group in order::groups(periods, &pods) {
            let (priority, pods) = (group.period.priority, group.pods.len());
            tracing::info!(
                priority,
                pods,
                seconds = group.time().as_secs(),
                "ending pods before the machine goes down"
            );
            let ended = tokio::time::timeout(group.time(), self.end_group(&group)).await;
            if ended.is_err() {
                tracing::warn!(priority, "pods have not ended in the time that they had");
            }
        }
    }

    async fn end_group(&self, group: &Group<'_>) {
        let mut changes = self.state.changes();
        for pod in &group.pods {
            let verdict = Verdict {
                reason: "Terminated",
                message: MESSAGE.to_owned(),
                grace: Some(group.grace(pod)),
                is_disruption: true,
            };
            if self.evictions.send((runtime_uid(pod).to_owned(), verdict)).await.is_err() {
                tracing::error!("nobody ends pods any more");
                return;
            }
        }
        // Drivers of volumes are in a later group: until then they have to be there.
        while group.pods.iter().any(|pod| self.is_here(runtime_uid(pod))) {
            if changes.changed().await.is_err() {
                return;
            }
        }
    }

    /// Something of the pod runs, or is mounted.
    fn is_here(&self, uid: &str) -> bool {
        let Some(view) = self.state.pod_by_uid(uid) else { return false };
        view.observed.alive().next().is_some() || volumes::has_volumes(&self.state.root_dir, uid)
    }
}

#[cfg(test)]
mod tests;
