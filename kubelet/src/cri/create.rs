//! The request to create a container, written out here because the `k8s-cri` crate's edition of the protocol is older
//! than image volumes with a sub-path and custom stop signals. The parts that have not changed are the crate's; the
//! numbers are those of `runtime.v1`. A runtime that does not know the newer fields ignores them.

use std::collections::HashMap;

use http::uri::PathAndQuery;
use k8s_cri::v1 as cri;
use tonic::client::Grpc;
use tonic::transport::Channel;
use tonic::{Code, Response, Status};
use tonic_prost::ProstCodec;

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct CreateContainerRequest {
    #[prost(string, tag = "1")]
    pub pod_sandbox_id: String,
    #[prost(message, optional, tag = "2")]
    pub config: Option<ContainerConfig>,
    #[prost(message, optional, tag = "3")]
    pub sandbox_config: Option<cri::PodSandboxConfig>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct ContainerConfig {
    #[prost(message, optional, tag = "1")]
    pub metadata: Option<cri::ContainerMetadata>,
    #[prost(message, optional, tag = "2")]
    pub image: Option<cri::ImageSpec>,
    #[prost(string, repeated, tag = "3")]
    pub command: Vec<String>,
    #[prost(string, repeated, tag = "4")]
    pub args: Vec<String>,
    #[prost(string, tag = "5")]
    pub working_dir: String,
    #[prost(message, repeated, tag = "6")]
    pub envs: Vec<cri::KeyValue>,
    #[prost(message, repeated, tag = "7")]
    pub mounts: Vec<Mount>,
    #[prost(message, repeated, tag = "8")]
    pub devices: Vec<cri::Device>,
    #[prost(map = "string, string", tag = "9")]
    pub labels: HashMap<String, String>,
    #[prost(map = "string, string", tag = "10")]
    pub annotations: HashMap<String, String>,
    /// Relative to the sandbox's log directory.
    #[prost(string, tag = "11")]
    pub log_path: String,
    #[prost(bool, tag = "12")]
    pub stdin: bool,
    #[prost(bool, tag = "13")]
    pub stdin_once: bool,
    #[prost(bool, tag = "14")]
    pub tty: bool,
    #[prost(message, optional, tag = "15")]
    pub linux: Option<cri::LinuxContainerConfig>,
    #[prost(message, repeated, tag = "17")]
    pub cdi_devices: Vec<cri::CdiDevice>,
    /// Zero is the image's own; see [`stop_signal`].
    #[prost(int32, tag = "18")]
    pub stop_signal: i32,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Mount {
    #[prost(string, tag = "1")]
    pub container_path: String,
    /// Empty for an image.
    #[prost(string, tag = "2")]
    pub host_path: String,
    #[prost(bool, tag = "3")]
    pub readonly: bool,
    #[prost(enumeration = "cri::MountPropagation", tag = "5")]
    pub propagation: i32,
    #[prost(message, repeated, tag = "6")]
    pub uid_mappings: Vec<cri::IdMapping>,
    #[prost(message, repeated, tag = "7")]
    pub gid_mappings: Vec<cri::IdMapping>,
    #[prost(bool, tag = "8")]
    pub recursive_read_only: bool,
    #[prost(message, optional, tag = "9")]
    pub image: Option<cri::ImageSpec>,
    #[prost(string, tag = "10")]
    pub image_sub_path: String,
}

pub(super) async fn create_container(
    channel: Channel,
    request: CreateContainerRequest,
) -> Result<Response<cri::CreateContainerResponse>, Status> {
    let mut client = Grpc::new(channel);
    client.ready().await.map_err(|error| Status::new(Code::Unavailable, error.to_string()))?;
    let path = PathAndQuery::from_static("/runtime.v1.RuntimeService/CreateContainer");
    let codec = ProstCodec::<CreateContainerRequest, cri::CreateContainerResponse>::default();
    client.unary(tonic::Request::new(request), path, codec).await
}

/// Signals in the order of the protocol's numbers, from 1; the real-time signals follow.
const SIGNALS: &str = "ABRT ALRM BUS CHLD CLD CONT FPE HUP ILL INT IO IOT KILL PIPE POLL PROF PWR QUIT SEGV STKFLT STOP \
    SYS TERM TRAP TSTP TTIN TTOU URG USR1 USR2 VTALRM WINCH XCPU XFSZ";

/// The protocol's number of a signal by the API's name; zero for a name that it does not have.
pub fn stop_signal(name: &str) -> i32 {
    let Some(name) = name.strip_prefix("SIG") else { return 0 };
    let steps = |prefix: &str| name.strip_prefix(prefix)?.parse::<i32>().ok();
    // Real-time signals are counted up from one end and down to the other.
    match (name, steps("RTMIN+"), steps("RTMAX-")) {
        ("RTMIN", ..) => 35,
        ("RTMAX", ..) => 65,
        (_, Some(steps @ 1..=15), _) => 35 + steps,
        (_, _, Some(steps @ 1..=14)) => 65 - steps,
        _ => (1..).zip(SIGNALS.split_whitespace()).find(|(_, signal)| *signal == name).map_or(0, |(number, _)| number),
    }
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;

    #[test]
    fn the_crates_decoder_reads_what_it_knows() {
        let config = ContainerConfig {
            command: vec!["sh".into()],
            mounts: vec![Mount {
                container_path: "/v".into(),
                readonly: true,
                propagation: cri::MountPropagation::PropagationHostToContainer as i32,
                image: Some(cri::ImageSpec { image: "i".into(), ..Default::default() }),
                image_sub_path: "etc".into(),
                ..Mount::default()
            }],
            labels: HashMap::from([("a".to_owned(), "b".to_owned())]),
            log_path: "c/0.log".into(),
            tty: true,
            linux: Some(cri::LinuxContainerConfig::default()),
            stop_signal: 29,
            ..ContainerConfig::default()
        };
        let request = CreateContainerRequest { pod_sandbox_id: "s".into(), config: Some(config), sandbox_config: None };
        let known = cri::CreateContainerRequest::decode(request.encode_to_vec().as_slice()).unwrap();
        assert_eq!(known.pod_sandbox_id, "s");
        let config = known.config.unwrap();
        assert_eq!((config.command, config.log_path.as_str(), config.tty), (vec!["sh".to_owned()], "c/0.log", true));
        assert_eq!(config.labels["a"], "b");
        assert!(config.linux.is_some());
        let mount = &config.mounts[0];
        assert_eq!((mount.container_path.as_str(), mount.readonly, mount.propagation), ("/v", true, 1));
        assert_eq!(mount.image.as_ref().unwrap().image, "i");
    }

    #[test]
    fn signals_have_the_protocols_numbers() {
        for (name, want) in [
            ("SIGABRT", 1),
            ("SIGTERM", 23),
            ("SIGUSR1", 29),
            ("SIGXFSZ", 34),
            ("SIGRTMIN", 35),
            ("SIGRTMIN+1", 36),
            ("SIGRTMIN+15", 50),
            ("SIGRTMAX-14", 51),
            ("SIGRTMAX-1", 64),
            ("SIGRTMAX", 65),
            ("SIGRTMIN+", 0),
            ("", 0),
            ("SIGNONE", 0),
        ] {
            assert_eq!(stop_signal(name), want, "{name}");
        }
    }
}
