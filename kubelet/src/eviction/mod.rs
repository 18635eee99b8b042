//! Keeps the node alive when memory, disk or processes run short: says so in the node's conditions, clears away what
//! nobody needs, and ends pods one at a time until there is enough again. Also ends pods that exceed their own limits
//! of local storage. What is decided is in the pure modules below; here it is observed and carried out.

mod limits;
mod rank;
mod thresholds;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::mpsc;

pub use rank::{is_critical, keeps_out};
pub use thresholds::{Threshold, ThresholdError, configured};

use crate::cri::RuntimeError;
use crate::housekeeping;
use crate::node::machine;
use crate::pod::context::NodeContext;
use crate::pod::plan::{self, Verdict};
use crate::server::stats::{self, Snapshot, kernel};
use crate::state::PodView;
use limits::LocalUse;
use rank::{Candidate, ContainerUse};
use thresholds::{History, Observation, Observations, Signal};

const PERIOD: Duration = Duration::from_secs(10);
/// How long one eviction may take before the next one follows.
const PATIENCE: Duration = Duration::from_secs(30);
/// Seconds that pods have that are ended because of a hard threshold or their own limit.
const AT_ONCE: i64 = 1;

/// The end of a pod, by its uid on this node.
pub type Eviction = (String, Verdict);

fn verdict(message: String, grace: i64) -> Verdict {
    Verdict { reason: "Evicted", message, grace: Some(grace), is_disruption: true }
}

pub struct Evictions {
    node: Arc<NodeContext>,
    thresholds: Vec<Threshold>,
    history: History,
    image_path: Option<PathBuf>,
    /// The last pod that was evicted, and when.
    last: Option<(String, tokio::time::Instant)>,
    queue: mpsc::Sender<Eviction>,
}

impl Evictions {
    pub fn new(node: Arc<NodeContext>, thresholds: Vec<Threshold>, queue: mpsc::Sender<Eviction>) -> Self {
        Self { node, thresholds, history: History::default(), image_path: None, last: None, queue }
    }

    /// Runs until the process ends.
    pub async fn run(mut self) {
        let mut ticks = tokio::time::interval(PERIOD);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            if let Err(error) = self.look().await {
                tracing::warn!(%error, "cannot look whether the node runs short of something");
            }
        }
    }

    async fn look(&mut self) -> Result<(), RuntimeError> {
        let observations = self.observe().await?;
        let transition = self.node.state.config.eviction_pressure_transition_period.0;
        let finding = self.history.look(&self.thresholds, &observations, transition, Timestamp::now());
        self.node.state.set_pressure(finding.pressure);
        let due = finding.due.first().map(|threshold| (*threshold).clone());
        self.enforce_limits().await?;
        match due {
            Some(threshold) => self.relieve(&threshold, observations).await,
            None => Ok(()),
        }
    }

    async fn observe(&mut self) -> Result<Observations, RuntimeError> {
        if self.image_path.is_none() {
            let filesystems = self.node.state.runtime.image_fs_info().await?;
            let id = filesystems.into_iter().next().and_then(|filesystem| filesystem.fs_id);
            self.image_path = id.map(|id| PathBuf::from(id.mountpoint));
        }
        let memory = Observation { available: machine::available_memory(), capacity: self.node.machine_memory };
        let (running, limit) = kernel::processes();
        let pids = |value| i64::try_from(value).unwrap_or(i64::MAX);
        let pids = Observation { available: pids(limit.saturating_sub(running)), capacity: pids(limit) };
        let mut observations = Observations::from([(Signal::Memory, memory), (Signal::Pids, pids)]);
        let disks = [
            (Some(&self.node.state.root_dir), Signal::NodeFs, Signal::NodeFsInodes),
            (self.image_path.as_ref(), Signal::ImageFs, Signal::ImageFsInodes),
        ];
        for (path, bytes, inodes) in disks {
            let Some(disk) = path.and_then(|path| kernel::filesystem(path)) else { continue };
            let observation = |available: u64, capacity: u64| Observation {
                available: i64::try_from(available).unwrap_or(i64::MAX),
                capacity: i64::try_from(capacity).unwrap_or(i64::MAX),
            };
            observations.insert(bytes, observation(disk.available, disk.capacity));
            // Some file systems do not count inodes.
            if disk.inodes > 0 {
                observations.insert(inodes, observation(disk.inodes_free, disk.inodes));
            }
        }
        Ok(observations)
    }

    /// Pods that are here and have not ended.
    fn active(&self) -> Vec<PodView> {
        let mut pods = self.node.state.pods();
        pods.retain(|view| !plan::is_terminal(&view.pod) && view.pod.metadata.deletion_timestamp.is_none());
        pods
    }

    /// Ends pods that use more local storage than they may.
    async fn enforce_limits(&mut self) -> Result<(), RuntimeError> {
        let limited: Vec<PodView> = self.active().into_iter().filter(|view| limits::has_limit(&view.pod)).collect();
        if limited.is_empty() {
            return Ok(());
        }
        let snapshot = self.snapshot().await?;
        for view in limited {
            if rank::is_critical(&view.pod) {
                continue;
            }
            let volumes = measured(&self.node, &view).await;
            let containers = containers(&snapshot, view.uid());
            let containers = containers.into_iter().map(|used| (used.name, used.disk.unwrap_or(0))).collect();
            if let Some(message) = limits::exceeded(&view.pod, &LocalUse { volumes, containers }) {
                self.evict(&view, message, AT_ONCE).await;
            }
        }
        Ok(())
    }

    /// Clears away what nobody needs; if that does not help, ends the pod that has to go first.
    async fn relieve(&mut self, threshold: &Threshold, observations: Observations) -> Result<(), RuntimeError> {
        if self.is_evicting() {
            return Ok(());
        }
        let signal = threshold.signal;
        tracing::warn!(resource = signal.resource(), threshold = threshold.value, "the node runs short");
        if signal.is_disk() {
            housekeeping::remove_unused_images(&self.node).await?;
            let left = self.observe().await?;
            if left.get(&signal).is_some_and(|seen| seen.available >= threshold.amount(&left)) {
                return Ok(());
            }
        }
        let snapshot = self.snapshot().await?;
        let views = self.active();
        let mut candidates = Vec::new();
        for view in &views {
            let volumes = if signal.is_disk() { measured(&self.node, view).await } else { HashMap::new() };
            candidates.push(Candidate {
                pod: &view.pod,
                containers: containers(&snapshot, view.uid()),
                volumes: volumes.values().sum(),
                processes: self.node.cgroups.processes(view.uid()),
            });
        }
        let ordered = rank::order(signal, candidates);
        let Some(first) = ordered.first() else {
            tracing::error!(
                resource = signal.resource(),
                "the node runs short, and there is no pod that may be evicted"
            );
            return Ok(());
        };
        let available = observations.get(&signal).map_or(0, |seen| seen.available);
        let message = rank::message(first, signal, threshold.amount(&observations), available);
        let uid = crate::pod::runtime_uid(first.pod);
        let grace = match threshold.grace {
            Some(_) => {
                let own = first.pod.spec.as_ref().and_then(|spec| spec.termination_grace_period_seconds).unwrap_or(30);
                own.min(i64::from(self.node.state.config.eviction_max_pod_grace_period))
            }
            None => AT_ONCE,
        };
        if let Some(view) = views.iter().find(|view| view.uid() == uid) {
            self.evict(view, message, grace).await;
        }
        Ok(())
    }

    async fn evict(&mut self, view: &PodView, message: String, grace: i64) {
        tracing::warn!(pod = view.name(), namespace = view.namespace(), message, "evicting a pod");
        let level = crate::events::Level::Warning;
        self.node.recorder.pod(&view.pod, level, "Evicted", message.clone());
        self.last = Some((view.uid().to_owned(), tokio::time::Instant::now()));
        // The manager outlives this task, except at the end of the process.
        let _ = self.queue.send((view.uid().to_owned(), verdict(message, grace))).await;
    }

    /// The last evicted pod has not gone yet: what it gives back is not known.
    fn is_evicting(&self) -> bool {
        let Some((uid, since)) = &self.last else { return false };
        let alive = self.node.state.pod_by_uid(uid).is_some_and(|view| view.observed.alive().next().is_some());
        alive && since.elapsed() < PATIENCE
    }

    async fn snapshot(&self) -> Result<Snapshot, RuntimeError> {
        stats::snapshot(&self.node.state, None, &stats::History::default()).await
    }
}

/// Walking a pod's files may take a while.
async fn measured(node: &Arc<NodeContext>, view: &PodView) -> HashMap<String, i64> {
    let (pod, root) = (view.pod.clone(), node.state.root_dir.clone());
    tokio::task::spawn_blocking(move || limits::measure_volumes(&pod, &root)).await.unwrap_or_default()
}

fn containers(snapshot: &Snapshot, uid: &str) -> Vec<ContainerUse> {
    let pod = snapshot.pods.iter().find(|usage| usage.view.uid() == uid);
    let signed = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
    pod.into_iter()
        .flat_map(|usage| &usage.containers)
        .map(|usage| ContainerUse {
            name: usage.name.clone(),
            memory: usage.usage.working_set.map(signed),
            disk: usage.layer.0.map(|layer| signed(layer.saturating_add(usage.logs))),
            inodes: usage.layer.1.map_or(0, signed),
        })
        .collect()
}
