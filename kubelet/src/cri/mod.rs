//! The container runtime as the kubelet sees it: the CRI services of containerd's socket, one thin method per call
//! with a deadline, and containerd's event stream. No policy; a failed call is reported, never retried here.

mod create;
mod events;

use std::future::Future;
use std::path::Path;
use std::time::Duration;

use k8s_cri::v1 as cri;
use k8s_cri::v1::image_service_client::ImageServiceClient;
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use tonic::transport::Channel;
use tonic::{Code, Response, Status};

use crate::grpc;
use crate::pod::observed::{self, RuntimePod, keys};

pub use create::{ContainerConfig, Mount, stop_signal};
pub use events::{RuntimeEvent, follow as follow_events};

/// No call but a pull, a stop with a grace period or an exec may take longer.
const DEADLINE: Duration = Duration::from_secs(120);
/// Image layers' lists and logs of exec can be large; the same limit as upstream's client.
const MAX_MESSAGE: usize = 16 << 20;

#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// The runtime refused or failed a call. The text is the runtime's own, as users know it from events.
    #[error("rpc error: code = {code:?} desc = {message}")]
    Call { call: &'static str, code: Code, message: String },
    #[error("{call}: no answer from the container runtime within {} s", .after.as_secs())]
    Deadline { call: &'static str, after: Duration },
    #[error("{call}: the container runtime's answer lacks {what}")]
    Incomplete { call: &'static str, what: &'static str },
}

impl RuntimeError {
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Call { code: Code::NotFound, .. })
    }

    /// The runtime's own words, without the gRPC frame.
    pub fn description(&self) -> String {
        match self {
            Self::Call { message, .. } => message.clone(),
            other => other.to_string(),
        }
    }
}

/// A handle to the runtime; cheap to clone, all clones share one connection.
#[derive(Clone, Debug)]
pub struct Runtime {
    runtime: RuntimeServiceClient<Channel>,
    images: ImageServiceClient<Channel>,
    channel: Channel,
}

async fn within<T>(
    call: &'static str,
    after: Duration,
    answer: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, RuntimeError> {
    match tokio::time::timeout(after, answer).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(RuntimeError::Call { call, code: status.code(), message: status.message().to_owned() }),
        Err(_) => Err(RuntimeError::Deadline { call, after }),
    }
}

/// `rpc!(self.runtime, run_pod_sandbox, request, deadline)`: one CRI call on a fresh handle.
macro_rules! rpc {
    ($client:expr, $call:ident, $request:expr) => {
        rpc!($client, $call, $request, DEADLINE)
    };
    ($client:expr, $call:ident, $request:expr, $after:expr) => {{
        let mut client = $client.clone();
        within(stringify!($call), $after, client.$call($request)).await
    }};
}

impl Runtime {
    /// Connects when first used and again whenever the runtime has restarted.
    pub fn new(socket: &Path) -> Self {
        let channel = grpc::channel(socket);
        Self {
            runtime: RuntimeServiceClient::new(channel.clone()).max_decoding_message_size(MAX_MESSAGE),
            images: ImageServiceClient::new(channel.clone()).max_decoding_message_size(MAX_MESSAGE),
            channel,
        }
    }

    /// The connection itself, for containerd's own services.
    pub fn channel(&self) -> Channel {
        self.channel.clone()
    }

    pub async fn version(&self) -> Result<cri::VersionResponse, RuntimeError> {
        rpc!(self.runtime, version, cri::VersionRequest { version: "0.1.0".to_owned() }, Duration::from_secs(10))
    }

    pub async fn status(&self) -> Result<cri::StatusResponse, RuntimeError> {
        rpc!(self.runtime, status, cri::StatusRequest { verbose: false }, Duration::from_secs(10))
    }

    pub async fn update_pod_cidr(&self, pod_cidr: &str) -> Result<(), RuntimeError> {
        let network_config = Some(cri::NetworkConfig { pod_cidr: pod_cidr.to_owned() });
        let request = cri::UpdateRuntimeConfigRequest { runtime_config: Some(cri::RuntimeConfig { network_config }) };
        rpc!(self.runtime, update_runtime_config, request).map(drop)
    }

    /// Starts a sandbox and returns its id.
    pub async fn run_sandbox(&self, config: cri::PodSandboxConfig, handler: &str) -> Result<String, RuntimeError> {
        let request = cri::RunPodSandboxRequest { config: Some(config), runtime_handler: handler.to_owned() };
        Ok(rpc!(self.runtime, run_pod_sandbox, request, Duration::from_secs(240))?.pod_sandbox_id)
    }

    pub async fn stop_sandbox(&self, id: &str) -> Result<(), RuntimeError> {
        rpc!(self.runtime, stop_pod_sandbox, cri::StopPodSandboxRequest { pod_sandbox_id: id.to_owned() }).map(drop)
    }

    pub async fn remove_sandbox(&self, id: &str) -> Result<(), RuntimeError> {
        rpc!(self.runtime, remove_pod_sandbox, cri::RemovePodSandboxRequest { pod_sandbox_id: id.to_owned() }).map(drop)
    }

    pub async fn create_container(
        &self,
        sandbox_id: &str,
        config: ContainerConfig,
        sandbox_config: cri::PodSandboxConfig,
    ) -> Result<String, RuntimeError> {
        let request = create::CreateContainerRequest {
            pod_sandbox_id: sandbox_id.to_owned(),
            config: Some(config),
            sandbox_config: Some(sandbox_config),
        };
        let answer = create::create_container(self.channel.clone(), request);
        Ok(within("create_container", DEADLINE, answer).await?.container_id)
    }

    pub async fn start_container(&self, id: &str) -> Result<(), RuntimeError> {
        rpc!(self.runtime, start_container, cri::StartContainerRequest { container_id: id.to_owned() }).map(drop)
    }

    /// Sends the stop signal, and the kill signal after `grace` seconds; returns when the container has ended.
    pub async fn stop_container(&self, id: &str, grace: i64) -> Result<(), RuntimeError> {
        let request = cri::StopContainerRequest { container_id: id.to_owned(), timeout: grace.max(0) };
        let after = DEADLINE + Duration::from_secs(u64::try_from(grace).unwrap_or(0));
        rpc!(self.runtime, stop_container, request, after).map(drop)
    }

    pub async fn remove_container(&self, id: &str) -> Result<(), RuntimeError> {
        rpc!(self.runtime, remove_container, cri::RemoveContainerRequest { container_id: id.to_owned() }).map(drop)
    }

    pub async fn container_status(&self, id: &str) -> Result<cri::ContainerStatus, RuntimeError> {
        let request = cri::ContainerStatusRequest { container_id: id.to_owned(), verbose: false };
        let answer = rpc!(self.runtime, container_status, request)?;
        answer.status.ok_or(RuntimeError::Incomplete { call: "container_status", what: "a status" })
    }

    pub async fn update_container_resources(
        &self,
        id: &str,
        resources: cri::LinuxContainerResources,
    ) -> Result<(), RuntimeError> {
        let request = cri::UpdateContainerResourcesRequest {
            container_id: id.to_owned(),
            linux: Some(resources),
            ..Default::default()
        };
        rpc!(self.runtime, update_container_resources, request).map(drop)
    }

    pub async fn reopen_log(&self, id: &str) -> Result<(), RuntimeError> {
        rpc!(self.runtime, reopen_container_log, cri::ReopenContainerLogRequest { container_id: id.to_owned() })
            .map(drop)
    }

    /// Runs a command to its end; `limit` is enforced by the runtime and, a little later, here.
    pub async fn exec_sync(
        &self,
        id: &str,
        command: &[String],
        limit: Option<Duration>,
    ) -> Result<cri::ExecSyncResponse, RuntimeError> {
        let seconds = limit.map_or(0, |limit| i64::try_from(limit.as_secs()).unwrap_or(i64::MAX));
        let request = cri::ExecSyncRequest { container_id: id.to_owned(), cmd: command.to_vec(), timeout: seconds };
        let after = limit.map_or(Duration::from_secs(24 * 3600), |limit| limit + Duration::from_secs(2));
        rpc!(self.runtime, exec_sync, request, after)
    }

    /// The address of the runtime's streaming server for this exec session.
    pub async fn exec(&self, request: cri::ExecRequest) -> Result<String, RuntimeError> {
        Ok(rpc!(self.runtime, exec, request)?.url)
    }

    pub async fn attach(&self, request: cri::AttachRequest) -> Result<String, RuntimeError> {
        Ok(rpc!(self.runtime, attach, request)?.url)
    }

    pub async fn port_forward(&self, request: cri::PortForwardRequest) -> Result<String, RuntimeError> {
        Ok(rpc!(self.runtime, port_forward, request)?.url)
    }

    pub async fn list_container_stats(&self) -> Result<Vec<cri::ContainerStats>, RuntimeError> {
        Ok(rpc!(self.runtime, list_container_stats, cri::ListContainerStatsRequest { filter: None })?.stats)
    }

    pub async fn list_sandbox_stats(&self) -> Result<Vec<cri::PodSandboxStats>, RuntimeError> {
        Ok(rpc!(self.runtime, list_pod_sandbox_stats, cri::ListPodSandboxStatsRequest { filter: None })?.stats)
    }

    pub async fn list_sandboxes(&self, selector: &[(&str, &str)]) -> Result<Vec<cri::PodSandbox>, RuntimeError> {
        let filter = cri::PodSandboxFilter { label_selector: owned(selector), ..Default::default() };
        Ok(rpc!(self.runtime, list_pod_sandbox, cri::ListPodSandboxRequest { filter: Some(filter) })?.items)
    }

    pub async fn list_containers(&self, selector: &[(&str, &str)]) -> Result<Vec<cri::Container>, RuntimeError> {
        let filter = cri::ContainerFilter { label_selector: owned(selector), ..Default::default() };
        Ok(rpc!(self.runtime, list_containers, cri::ListContainersRequest { filter: Some(filter) })?.containers)
    }

    async fn sandbox_status(&self, id: &str) -> Result<cri::PodSandboxStatus, RuntimeError> {
        let request = cri::PodSandboxStatusRequest { pod_sandbox_id: id.to_owned(), verbose: false };
        let answer = rpc!(self.runtime, pod_sandbox_status, request)?;
        answer.status.ok_or(RuntimeError::Incomplete { call: "pod_sandbox_status", what: "a status" })
    }

    /// The namespace of the image's user and the size; `None` when the image is not present.
    pub async fn image(&self, reference: &str) -> Result<Option<cri::Image>, RuntimeError> {
        let image = Some(cri::ImageSpec { image: reference.to_owned(), ..Default::default() });
        Ok(rpc!(self.images, image_status, cri::ImageStatusRequest { image, verbose: false })?.image)
    }

    pub async fn list_images(&self) -> Result<Vec<cri::Image>, RuntimeError> {
        Ok(rpc!(self.images, list_images, cri::ListImagesRequest { filter: None })?.images)
    }

    /// Pulls an image and returns its id. Bounded by the runtime's own progress timeout, and here by an hour.
    pub async fn pull_image(
        &self,
        reference: &str,
        auth: Option<cri::AuthConfig>,
        sandbox_config: cri::PodSandboxConfig,
    ) -> Result<String, RuntimeError> {
        let image = Some(cri::ImageSpec { image: reference.to_owned(), ..Default::default() });
        let request = cri::PullImageRequest { image, auth, sandbox_config: Some(sandbox_config) };
        Ok(rpc!(self.images, pull_image, request, Duration::from_secs(3600))?.image_ref)
    }

    pub async fn remove_image(&self, id: &str) -> Result<(), RuntimeError> {
        let image = Some(cri::ImageSpec { image: id.to_owned(), ..Default::default() });
        rpc!(self.images, remove_image, cri::RemoveImageRequest { image }).map(drop)
    }

    pub async fn image_fs_info(&self) -> Result<Vec<cri::FilesystemUsage>, RuntimeError> {
        Ok(rpc!(self.images, image_fs_info, cri::ImageFsInfoRequest {})?.image_filesystems)
    }

    /// All that the runtime holds of one pod. Containers that disappear while we look are left out.
    pub async fn observe(&self, pod_uid: &str) -> Result<RuntimePod, RuntimeError> {
        let selector = [(keys::POD_UID, pod_uid)];
        let (sandboxes, containers) =
            tokio::try_join!(self.list_sandboxes(&selector), self.list_containers(&selector))?;
        let mut pod = RuntimePod::default();
        for found in sandboxes {
            match self.sandbox_status(&found.id).await {
                Ok(status) => pod.sandboxes.push(observed::sandbox(status)),
                Err(error) if error.is_not_found() => {}
                Err(error) => return Err(error),
            }
        }
        for found in containers {
            match self.container_status(&found.id).await {
                Ok(status) => pod.containers.push(observed::container(status, found.pod_sandbox_id)),
                Err(error) if error.is_not_found() => {}
                Err(error) => return Err(error),
            }
        }
        pod.sandboxes.sort_by_key(|sandbox| std::cmp::Reverse(sandbox.created_at));
        pod.containers.sort_by(|a, b| b.created_at.cmp(&a.created_at).then(b.restart_count.cmp(&a.restart_count)));
        Ok(pod)
    }
}

fn owned(selector: &[(&str, &str)]) -> std::collections::HashMap<String, String> {
    selector.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}
