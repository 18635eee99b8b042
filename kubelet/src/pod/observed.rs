//! What the container runtime says about one pod. Built from CRI answers only; no policy and no memory.

use jiff::Timestamp;
use k8s_cri::v1 as cri;

/// Labels and annotations that upstream's kubelet puts on sandboxes and containers; the same names here mean that
/// either kubelet can take over a node from the other without restarting a container.
pub mod keys {
    pub const POD_NAME: &str = "io.kubernetes.pod.name";
    pub const POD_NAMESPACE: &str = "io.kubernetes.pod.namespace";
    pub const POD_UID: &str = "io.kubernetes.pod.uid";
    pub const CONTAINER_NAME: &str = "io.kubernetes.container.name";
    pub const CONTAINER_HASH: &str = "io.kubernetes.container.hash";
    pub const RESTART_COUNT: &str = "io.kubernetes.container.restartCount";
    pub const TERMINATION_PATH: &str = "io.kubernetes.container.terminationMessagePath";
    pub const TERMINATION_POLICY: &str = "io.kubernetes.container.terminationMessagePolicy";
    pub const POD_GRACE: &str = "io.kubernetes.pod.terminationGracePeriod";
}

/// Everything of one pod that exists in the runtime; newest first in both lists.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RuntimePod {
    pub sandboxes: Vec<Sandbox>,
    pub containers: Vec<Container>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Sandbox {
    pub id: String,
    pub ready: bool,
    pub attempt: u32,
    pub created_at: Timestamp,
    /// Empty for host-network pods and after the sandbox has stopped.
    pub ips: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunState {
    Created,
    Running,
    Exited,
    /// The runtime lost track of it; to be killed and replaced.
    Unknown,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Container {
    pub id: String,
    pub name: String,
    pub sandbox_id: String,
    /// How many containers of this name came before; the restart count of the API.
    pub restart_count: i32,
    pub state: RunState,
    pub created_at: Timestamp,
    pub started_at: Option<Timestamp>,
    pub finished_at: Option<Timestamp>,
    pub exit_code: i32,
    pub reason: String,
    pub message: String,
    pub image: String,
    pub image_id: String,
    /// Hash of the part of the spec whose change needs a new container.
    pub hash: String,
    /// The file that the runtime writes the container's output to; absolute.
    pub log_path: String,
    /// Where the termination message is on the host, when the container asked for one.
    pub termination_message_host_path: Option<String>,
    pub termination_message_policy: String,
    /// The user of the first process, where the runtime reports it.
    pub user: Option<cri::LinuxContainerUser>,
}

impl Container {
    pub fn is_running(&self) -> bool {
        matches!(self.state, RunState::Running)
    }

    /// Running, or in a state from which it has to be stopped before it can be forgotten.
    pub fn is_alive(&self) -> bool {
        matches!(self.state, RunState::Running | RunState::Unknown)
    }
}

impl RuntimePod {
    pub fn sandbox(&self) -> Option<&Sandbox> {
        self.sandboxes.first()
    }

    /// The newest container with this name, of any sandbox.
    pub fn newest(&self, name: &str) -> Option<&Container> {
        self.containers.iter().find(|container| container.name == name)
    }

    /// The newest container of this name in the current sandbox.
    pub fn current(&self, name: &str) -> Option<&Container> {
        let sandbox = &self.sandbox()?.id;
        self.newest(name).filter(|container| container.sandbox_id == *sandbox)
    }

    /// The container that ran before the newest one of this name.
    pub fn previous(&self, name: &str) -> Option<&Container> {
        self.containers.iter().filter(|container| container.name == name).nth(1)
    }

    pub fn by_id(&self, id: &str) -> Option<&Container> {
        self.containers.iter().find(|container| container.id == id)
    }

    pub fn alive(&self) -> impl Iterator<Item = &Container> {
        self.containers.iter().filter(|container| container.is_alive())
    }

    pub fn is_empty(&self) -> bool {
        self.sandboxes.is_empty() && self.containers.is_empty()
    }
}

fn time(nanoseconds: i64) -> Option<Timestamp> {
    (nanoseconds > 0).then(|| Timestamp::from_nanosecond(i128::from(nanoseconds)).ok()).flatten()
}

pub(crate) fn sandbox(status: cri::PodSandboxStatus) -> Sandbox {
    let ips = status.network.map(|network| {
        let first = (!network.ip.is_empty()).then_some(network.ip);
        first.into_iter().chain(network.additional_ips.into_iter().map(|more| more.ip)).collect()
    });
    Sandbox {
        id: status.id,
        ready: status.state == cri::PodSandboxState::SandboxReady as i32,
        attempt: status.metadata.map_or(0, |metadata| metadata.attempt),
        created_at: time(status.created_at).unwrap_or_default(),
        ips: ips.unwrap_or_default(),
    }
}

pub(crate) fn container(status: cri::ContainerStatus, sandbox_id: String) -> Container {
    let label = |map: &std::collections::HashMap<String, String>, key: &str| map.get(key).cloned();
    let metadata = status.metadata.unwrap_or_default();
    let termination_path = label(&status.annotations, keys::TERMINATION_PATH).filter(|path| !path.is_empty());
    let host_path = |path: String| {
        status.mounts.iter().find(|mount| mount.container_path == path).map(|mount| mount.host_path.clone())
    };
    Container {
        name: label(&status.labels, keys::CONTAINER_NAME).unwrap_or(metadata.name),
        sandbox_id,
        restart_count: label(&status.annotations, keys::RESTART_COUNT)
            .and_then(|count| count.parse().ok())
            .unwrap_or(i32::try_from(metadata.attempt).unwrap_or(i32::MAX)),
        state: match cri::ContainerState::try_from(status.state) {
            Ok(cri::ContainerState::ContainerCreated) => RunState::Created,
            Ok(cri::ContainerState::ContainerRunning) => RunState::Running,
            Ok(cri::ContainerState::ContainerExited) => RunState::Exited,
            Ok(cri::ContainerState::ContainerUnknown) | Err(_) => RunState::Unknown,
        },
        created_at: time(status.created_at).unwrap_or_default(),
        started_at: time(status.started_at),
        finished_at: time(status.finished_at),
        exit_code: status.exit_code,
        reason: status.reason,
        message: status.message,
        image: status.image.map(|image| image.image).unwrap_or_default(),
        image_id: if status.image_ref.is_empty() { status.image_id } else { status.image_ref },
        hash: label(&status.annotations, keys::CONTAINER_HASH).unwrap_or_default(),
        log_path: status.log_path,
        termination_message_host_path: termination_path.and_then(host_path),
        termination_message_policy: label(&status.annotations, keys::TERMINATION_POLICY).unwrap_or_default(),
        user: status.user.and_then(|user| user.linux),
        id: status.id,
    }
}
