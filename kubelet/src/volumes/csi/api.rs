//! The node service of a CSI driver: messages of `csi.v1.Node` with the fields that the kubelet uses, and one thin
//! method for each call.

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use tonic::transport::Channel;

use crate::grpc::{self, CallError, Message};

/// No call of a driver may take longer; upstream's limit.
const WITHIN: Duration = Duration::from_secs(120);

/// What a driver can do beyond publishing, by the protocol's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Capability {
    StageUnstage = 1,
    VolumeStats = 2,
    Expand = 3,
    SingleNodeMultiWriter = 5,
    VolumeMountGroup = 6,
}

/// How many nodes and pods may use a volume, by the protocol's numbers.
pub mod access {
    pub const UNKNOWN: i32 = 0;
    pub const SINGLE_NODE_WRITER: i32 = 1;
    pub const MULTI_NODE_READER_ONLY: i32 = 3;
    pub const MULTI_NODE_MULTI_WRITER: i32 = 5;
    pub const SINGLE_NODE_SINGLE_WRITER: i32 = 6;
    pub const SINGLE_NODE_MULTI_WRITER: i32 = 7;
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Empty {}

#[derive(Clone, PartialEq, prost::Message)]
pub struct NodeInfo {
    #[prost(string, tag = "1")]
    pub node_id: String,
    /// Zero for no limit.
    #[prost(int64, tag = "2")]
    pub max_volumes_per_node: i64,
    #[prost(message, optional, tag = "3")]
    pub accessible_topology: Option<Topology>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Topology {
    #[prost(map = "string, string", tag = "1")]
    pub segments: HashMap<String, String>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Capabilities {
    #[prost(message, repeated, tag = "1")]
    pub capabilities: Vec<NodeCapability>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct NodeCapability {
    #[prost(message, optional, tag = "1")]
    pub rpc: Option<RpcCapability>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct RpcCapability {
    #[prost(int32, tag = "1")]
    pub r#type: i32,
}

impl Capabilities {
    pub fn has(&self, wanted: Capability) -> bool {
        let mut known = self.capabilities.iter().filter_map(|capability| capability.rpc.as_ref());
        known.any(|rpc| rpc.r#type == wanted as i32)
    }
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct VolumeCapability {
    /// Exactly one of these two.
    #[prost(message, optional, tag = "1")]
    pub block: Option<Empty>,
    #[prost(message, optional, tag = "2")]
    pub mount: Option<MountVolume>,
    #[prost(message, optional, tag = "3")]
    pub access_mode: Option<AccessMode>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct MountVolume {
    #[prost(string, tag = "1")]
    pub fs_type: String,
    #[prost(string, repeated, tag = "2")]
    pub mount_flags: Vec<String>,
    /// A group's number, for drivers that give the volume to it themselves.
    #[prost(string, tag = "3")]
    pub volume_mount_group: String,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct AccessMode {
    #[prost(int32, tag = "1")]
    pub mode: i32,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Stage {
    #[prost(string, tag = "1")]
    pub volume_id: String,
    #[prost(map = "string, string", tag = "2")]
    pub publish_context: HashMap<String, String>,
    #[prost(string, tag = "3")]
    pub staging_target_path: String,
    #[prost(message, optional, tag = "4")]
    pub volume_capability: Option<VolumeCapability>,
    #[prost(map = "string, string", tag = "5")]
    pub secrets: HashMap<String, String>,
    #[prost(map = "string, string", tag = "6")]
    pub volume_context: HashMap<String, String>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Unstage {
    #[prost(string, tag = "1")]
    pub volume_id: String,
    #[prost(string, tag = "2")]
    pub staging_target_path: String,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Publish {
    #[prost(string, tag = "1")]
    pub volume_id: String,
    #[prost(map = "string, string", tag = "2")]
    pub publish_context: HashMap<String, String>,
    /// Empty for drivers that do not stage.
    #[prost(string, tag = "3")]
    pub staging_target_path: String,
    #[prost(string, tag = "4")]
    pub target_path: String,
    #[prost(message, optional, tag = "5")]
    pub volume_capability: Option<VolumeCapability>,
    #[prost(bool, tag = "6")]
    pub readonly: bool,
    #[prost(map = "string, string", tag = "7")]
    pub secrets: HashMap<String, String>,
    #[prost(map = "string, string", tag = "8")]
    pub volume_context: HashMap<String, String>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Unpublish {
    #[prost(string, tag = "1")]
    pub volume_id: String,
    #[prost(string, tag = "2")]
    pub target_path: String,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct GetStats {
    #[prost(string, tag = "1")]
    pub volume_id: String,
    #[prost(string, tag = "2")]
    pub volume_path: String,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Stats {
    #[prost(message, repeated, tag = "1")]
    pub usage: Vec<Usage>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Usage {
    #[prost(int64, tag = "1")]
    pub available: i64,
    #[prost(int64, tag = "2")]
    pub total: i64,
    #[prost(int64, tag = "3")]
    pub used: i64,
    /// See [`Usage::BYTES`] and [`Usage::INODES`].
    #[prost(int32, tag = "4")]
    pub unit: i32,
}

impl Usage {
    pub const BYTES: i32 = 1;
    pub const INODES: i32 = 2;
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Expand {
    #[prost(string, tag = "1")]
    pub volume_id: String,
    #[prost(string, tag = "2")]
    pub volume_path: String,
    #[prost(message, optional, tag = "3")]
    pub capacity_range: Option<CapacityRange>,
    #[prost(string, tag = "4")]
    pub staging_target_path: String,
    #[prost(message, optional, tag = "5")]
    pub volume_capability: Option<VolumeCapability>,
    #[prost(map = "string, string", tag = "6")]
    pub secrets: HashMap<String, String>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct CapacityRange {
    #[prost(int64, tag = "1")]
    pub required_bytes: i64,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Expanded {
    /// In bytes; zero when the driver does not say.
    #[prost(int64, tag = "1")]
    pub capacity_bytes: i64,
}

pub mod methods {
    pub const GET_INFO: &str = "/csi.v1.Node/NodeGetInfo";
    pub const GET_CAPABILITIES: &str = "/csi.v1.Node/NodeGetCapabilities";
    pub const STAGE: &str = "/csi.v1.Node/NodeStageVolume";
    pub const UNSTAGE: &str = "/csi.v1.Node/NodeUnstageVolume";
    pub const PUBLISH: &str = "/csi.v1.Node/NodePublishVolume";
    pub const UNPUBLISH: &str = "/csi.v1.Node/NodeUnpublishVolume";
    pub const GET_STATS: &str = "/csi.v1.Node/NodeGetVolumeStats";
    pub const EXPAND: &str = "/csi.v1.Node/NodeExpandVolume";
}

/// A handle to one driver's node service; cheap to clone.
#[derive(Clone)]
pub struct Driver {
    channel: Channel,
}

impl Driver {
    pub fn at(endpoint: &Path) -> Self {
        Self { channel: grpc::channel(endpoint) }
    }

    async fn call<Q: Message, A: Message>(&self, method: &'static str, question: Q) -> Result<A, CallError> {
        grpc::call(&self.channel, method, question, WITHIN).await
    }

    pub async fn info(&self) -> Result<NodeInfo, CallError> {
        self.call(methods::GET_INFO, Empty {}).await
    }

    pub async fn capabilities(&self) -> Result<Capabilities, CallError> {
        self.call(methods::GET_CAPABILITIES, Empty {}).await
    }

    pub async fn stage(&self, question: Stage) -> Result<(), CallError> {
        self.call::<_, Empty>(methods::STAGE, question).await.map(drop)
    }

    pub async fn unstage(&self, question: Unstage) -> Result<(), CallError> {
        self.call::<_, Empty>(methods::UNSTAGE, question).await.map(drop)
    }

    pub async fn publish(&self, question: Publish) -> Result<(), CallError> {
        self.call::<_, Empty>(methods::PUBLISH, question).await.map(drop)
    }

    pub async fn unpublish(&self, question: Unpublish) -> Result<(), CallError> {
        self.call::<_, Empty>(methods::UNPUBLISH, question).await.map(drop)
    }

    pub async fn stats(&self, question: GetStats) -> Result<Stats, CallError> {
        self.call(methods::GET_STATS, question).await
    }

    pub async fn expand(&self, question: Expand) -> Result<Expanded, CallError> {
        self.call(methods::EXPAND, question).await
    }
}
