//! How much the node, its pods and their containers use, measured when asked: by the container runtime for
//! containers, by the kernel's files for the rest. Nothing is sampled in the background; a rate appears from the
//! second request on, over the time between the two.
//!
//! [`summary`] and [`metrics`] are pure views of one [`Snapshot`].

pub mod kernel;
pub mod metrics;
pub mod summary;

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use jiff::Timestamp;
use k8s_cri::v1 as cri;
use parking_lot::Mutex;

use crate::cri::RuntimeError;
use crate::pod::observed::keys;
use crate::state::{NodeState, PodView};
use crate::volumes::csi::{Csi, VolumeStats};
use kernel::{Filesystem, Interface};

/// Processor time and memory of something, at one time. What is not known is `None`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Nanoseconds of processor time since the start.
    pub cpu: Option<u64>,
    /// Billionths of a processor since the request before.
    pub cpu_rate: Option<u64>,
    pub memory: Option<u64>,
    pub working_set: Option<u64>,
    pub rss: Option<u64>,
    pub page_faults: Option<u64>,
    pub major_page_faults: Option<u64>,
}

#[derive(Clone, Debug)]
pub struct ContainerUsage {
    pub name: String,
    pub id: String,
    pub image: String,
    pub started: Option<Timestamp>,
    pub usage: Usage,
    /// Bytes and inodes of the writable layer.
    pub layer: (Option<u64>, Option<u64>),
    /// Bytes of its log files.
    pub logs: u64,
}

#[derive(Clone, Debug)]
pub struct PodUsage {
    pub view: PodView,
    pub containers: Vec<ContainerUsage>,
    /// Empty for pods on the node's network.
    pub interfaces: Vec<Interface>,
    /// Of drivers that can tell.
    pub volumes: Vec<VolumeStats>,
}

impl PodUsage {
    /// The containers' sum of a figure; `None` when no container has it.
    pub fn total(&self, figure: impl Fn(&Usage) -> Option<u64>) -> Option<u64> {
        self.containers.iter().filter_map(|container| figure(&container.usage)).reduce(u64::saturating_add)
    }
}

/// Everything at one time.
#[derive(Clone, Debug)]
pub struct Snapshot {
    pub time: Timestamp,
    pub node_name: String,
    pub usage: Usage,
    pub available_memory: u64,
    pub booted: Option<Timestamp>,
    pub interfaces: Vec<Interface>,
    /// The file system of the pods' volumes and logs.
    pub disk: Option<Filesystem>,
    /// The file system of the images, and what they use of it.
    pub image_disk: Option<Filesystem>,
    pub processes: (u64, u64),
    pub pods: Vec<PodUsage>,
}

/// What the request before saw, to compute rates, and the processes by which sandboxes' networks are found.
#[derive(Default)]
pub struct History {
    cpu: Mutex<HashMap<String, (Timestamp, u64)>>,
    sandboxes: Mutex<HashMap<String, u32>>,
}

impl History {
    /// Billionths of a processor since the reading before; remembers this one.
    fn rate(&self, id: &str, now: Timestamp, cpu: u64) -> Option<u64> {
        let mut seen = self.cpu.lock();
        let (before, then) = seen.insert(id.to_owned(), (now, cpu))?;
        let nanoseconds = u64::try_from(now.duration_since(before).as_nanos()).ok().filter(|n| *n > 0)?;
        let used = u128::from(cpu.checked_sub(then)?);
        u64::try_from(used * 1_000_000_000 / u128::from(nanoseconds)).ok()
    }

    fn forget_all_but(&self, containers: impl Fn(&str) -> bool, sandboxes: impl Fn(&str) -> bool) {
        self.cpu.lock().retain(|id, _| id.is_empty() || containers(id));
        self.sandboxes.lock().retain(|id, _| sandboxes(id));
    }
}

/// Measures everything; volumes only if there is somebody to ask.
pub async fn snapshot(state: &Arc<NodeState>, csi: Option<&Csi>, history: &History) -> Result<Snapshot, RuntimeError> {
    let (stats, images) = tokio::try_join!(state.runtime.list_container_stats(), state.runtime.image_fs_info())?;
    let time = Timestamp::now();
    let mut by_pod: HashMap<String, Vec<cri::ContainerStats>> = HashMap::new();
    for stats in stats {
        if let Some(uid) = stats.attributes.as_ref().and_then(|attributes| attributes.labels.get(keys::POD_UID)) {
            by_pod.entry(uid.clone()).or_default().push(stats);
        }
    }
    let mut pods = Vec::new();
    for view in state.pods() {
        let containers = by_pod.remove(view.uid()).unwrap_or_default();
        let containers = containers.into_iter().filter_map(|stats| container(state, &view, stats, time, history));
        let containers = containers.collect();
        let interfaces = pod_interfaces(state, &view, history).await;
        let volumes = match csi {
            Some(csi) => csi.stats(view.uid()).await,
            None => Vec::new(),
        };
        pods.push(PodUsage { interfaces, volumes, containers, view });
    }
    let known = |id: &str| pods.iter().any(|pod| pod.containers.iter().any(|container| container.id == id));
    let sandboxes = |id: &str| pods.iter().any(|pod| pod.view.observed.sandboxes.iter().any(|s| s.id == id));
    history.forget_all_but(known, sandboxes);
    let cpu = kernel::cpu_time();
    let memory = kernel::memory();
    let usage = Usage {
        cpu,
        cpu_rate: cpu.and_then(|cpu| history.rate("", time, cpu)),
        memory: Some(memory.used),
        working_set: Some(memory.working_set),
        ..Usage::default()
    };
    Ok(Snapshot {
        time,
        node_name: state.node_name.clone(),
        usage,
        available_memory: memory.available,
        booted: kernel::boot_time(),
        interfaces: kernel::interfaces(None),
        disk: kernel::filesystem(&state.root_dir),
        image_disk: images.first().and_then(image_disk),
        processes: kernel::processes(),
        pods,
    })
}

/// Containers that have ended or that the pod no longer knows are left out: they use nothing.
fn container(
    state: &NodeState,
    view: &PodView,
    stats: cri::ContainerStats,
    time: Timestamp,
    history: &History,
) -> Option<ContainerUsage> {
    let id = stats.attributes?.id;
    let observed = view.observed.by_id(&id).filter(|container| container.is_running())?;
    let value = |value: Option<cri::UInt64Value>| value.map(|value| value.value);
    let cpu = stats.cpu.and_then(|cpu| value(cpu.usage_core_nano_seconds));
    let memory = stats.memory.unwrap_or_default();
    let usage = Usage {
        cpu,
        cpu_rate: cpu.and_then(|cpu| history.rate(&id, time, cpu)),
        memory: value(memory.usage_bytes),
        working_set: value(memory.working_set_bytes),
        rss: value(memory.rss_bytes),
        page_faults: value(memory.page_faults),
        major_page_faults: value(memory.major_page_faults),
    };
    let layer = stats.writable_layer.unwrap_or_default();
    Some(ContainerUsage {
        name: observed.name.clone(),
        image: observed.image.clone(),
        started: observed.started_at,
        usage,
        layer: (value(layer.used_bytes), value(layer.inodes_used)),
        logs: kernel::directory_size(&state.log_dir(view).join(&observed.name)),
        id,
    })
}

async fn pod_interfaces(state: &NodeState, view: &PodView, history: &History) -> Vec<Interface> {
    let host = view.pod.spec.as_ref().and_then(|spec| spec.host_network).unwrap_or(false);
    let Some(sandbox) = view.observed.sandbox().filter(|sandbox| sandbox.ready && !host) else { return Vec::new() };
    let known = history.sandboxes.lock().get(&sandbox.id).copied();
    let process = match known {
        Some(process) => Some(process),
        None => crate::streaming::netns::process_of_sandbox(state, &sandbox.id).await,
    };
    let Some(process) = process else { return Vec::new() };
    history.sandboxes.lock().insert(sandbox.id.clone(), process);
    kernel::interfaces(Some(process))
}

fn image_disk(usage: &cri::FilesystemUsage) -> Option<Filesystem> {
    let mountpoint = &usage.fs_id.as_ref()?.mountpoint;
    let mut disk = kernel::filesystem(Path::new(mountpoint))?;
    disk.used = usage.used_bytes.as_ref()?.value;
    Some(disk)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_the_use_between_two_readings() {
        let history = History::default();
        let at = |seconds| Timestamp::from_second(seconds).expect("a time");
        assert_eq!(history.rate("a", at(10), 1_000), None);
        assert_eq!(history.rate("a", at(12), 1_000 + 1_000_000_000), Some(500_000_000));
        assert_eq!(history.rate("a", at(13), 5), None, "the container was restarted");
        assert_eq!(history.rate("a", at(13), 6), None, "no time has passed");
        history.forget_all_but(|_| false, |_| false);
        assert!(history.cpu.lock().is_empty());
    }
}
