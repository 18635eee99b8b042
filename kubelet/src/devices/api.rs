//! The device plugin API, v1beta1: what plugins serve (`v1beta1.DevicePlugin`) and what the kubelet serves for them
//! (`v1beta1.Registration`).

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use tonic::Streaming;
use tonic::transport::Channel;

use crate::grpc::{self, CallError};

pub const VERSION: &str = "v1beta1";
pub const HEALTHY: &str = "Healthy";

pub mod methods {
    pub const REGISTER: &str = "/v1beta1.Registration/Register";
    pub const OPTIONS: &str = "/v1beta1.DevicePlugin/GetDevicePluginOptions";
    pub const LIST_AND_WATCH: &str = "/v1beta1.DevicePlugin/ListAndWatch";
    pub const PREFERRED: &str = "/v1beta1.DevicePlugin/GetPreferredAllocation";
    pub const ALLOCATE: &str = "/v1beta1.DevicePlugin/Allocate";
    pub const PRE_START: &str = "/v1beta1.DevicePlugin/PreStartContainer";
}

/// Upstream gives plugins all the time that they want; a pod's start that hangs helps nobody.
const ALLOCATE_WITHIN: Duration = Duration::from_secs(120);
const PRE_START_WITHIN: Duration = Duration::from_secs(30);
const OPTIONS_WITHIN: Duration = Duration::from_secs(10);

#[derive(Clone, PartialEq, prost::Message)]
pub struct Empty {}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Options {
    #[prost(bool, tag = "1")]
    pub pre_start_required: bool,
    #[prost(bool, tag = "2")]
    pub get_preferred_allocation_available: bool,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Register {
    #[prost(string, tag = "1")]
    pub version: String,
    /// The name of a socket beside the kubelet's.
    #[prost(string, tag = "2")]
    pub endpoint: String,
    #[prost(string, tag = "3")]
    pub resource_name: String,
    #[prost(message, optional, tag = "4")]
    pub options: Option<Options>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct DeviceList {
    #[prost(message, repeated, tag = "1")]
    pub devices: Vec<Device>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Device {
    #[prost(string, tag = "1")]
    pub id: String,
    /// [`HEALTHY`], or anything else.
    #[prost(string, tag = "2")]
    pub health: String,
    #[prost(message, optional, tag = "3")]
    pub topology: Option<Topology>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Topology {
    #[prost(message, repeated, tag = "1")]
    pub nodes: Vec<NumaNode>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct NumaNode {
    #[prost(int64, tag = "1")]
    pub id: i64,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct PreferredRequest {
    #[prost(message, repeated, tag = "1")]
    pub container_requests: Vec<ContainerPreferredRequest>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct ContainerPreferredRequest {
    #[prost(string, repeated, tag = "1")]
    pub available: Vec<String>,
    #[prost(string, repeated, tag = "2")]
    pub must_include: Vec<String>,
    #[prost(int32, tag = "3")]
    pub size: i32,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Preferred {
    #[prost(message, repeated, tag = "1")]
    pub container_responses: Vec<ContainerDevices>,
}

/// Also the request for the devices of one container: both hold nothing but their names.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ContainerDevices {
    #[prost(string, repeated, tag = "1")]
    pub ids: Vec<String>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Allocate {
    #[prost(message, repeated, tag = "1")]
    pub container_requests: Vec<ContainerDevices>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Allocated {
    #[prost(message, repeated, tag = "1")]
    pub container_responses: Vec<ContainerAllocated>,
}

/// What a container needs to use its devices.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ContainerAllocated {
    #[prost(map = "string, string", tag = "1")]
    pub envs: HashMap<String, String>,
    #[prost(message, repeated, tag = "2")]
    pub mounts: Vec<Mount>,
    #[prost(message, repeated, tag = "3")]
    pub devices: Vec<DeviceFile>,
    #[prost(map = "string, string", tag = "4")]
    pub annotations: HashMap<String, String>,
    #[prost(message, repeated, tag = "5")]
    pub cdi_devices: Vec<CdiDevice>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Mount {
    #[prost(string, tag = "1")]
    pub container_path: String,
    #[prost(string, tag = "2")]
    pub host_path: String,
    #[prost(bool, tag = "3")]
    pub read_only: bool,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct DeviceFile {
    #[prost(string, tag = "1")]
    pub container_path: String,
    #[prost(string, tag = "2")]
    pub host_path: String,
    /// Some of `r`, `w` and `m`.
    #[prost(string, tag = "3")]
    pub permissions: String,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct CdiDevice {
    #[prost(string, tag = "1")]
    pub name: String,
}

/// A handle to one plugin; cheap to clone.
#[derive(Clone, Debug)]
pub struct Client {
    channel: Channel,
}

impl Client {
    pub fn at(socket: &Path) -> Self {
        Self { channel: grpc::channel(socket) }
    }

    pub async fn options(&self) -> Result<Options, CallError> {
        grpc::call(&self.channel, methods::OPTIONS, Empty {}, OPTIONS_WITHIN).await
    }

    pub async fn list_and_watch(&self) -> Result<Streaming<DeviceList>, CallError> {
        grpc::subscribe(&self.channel, methods::LIST_AND_WATCH, Empty {}).await
    }

    /// Which of the devices the plugin would rather give to one container.
    pub async fn preferred(&self, request: ContainerPreferredRequest) -> Result<Vec<String>, CallError> {
        let request = PreferredRequest { container_requests: vec![request] };
        let answer: Preferred = grpc::call(&self.channel, methods::PREFERRED, request, ALLOCATE_WITHIN).await?;
        Ok(answer.container_responses.into_iter().next().map(|devices| devices.ids).unwrap_or_default())
    }

    /// `None` when the plugin says nothing about the container.
    pub async fn allocate(&self, ids: Vec<String>) -> Result<Option<ContainerAllocated>, CallError> {
        let request = Allocate { container_requests: vec![ContainerDevices { ids }] };
        let answer: Allocated = grpc::call(&self.channel, methods::ALLOCATE, request, ALLOCATE_WITHIN).await?;
        Ok(answer.container_responses.into_iter().next())
    }

    pub async fn pre_start(&self, ids: Vec<String>) -> Result<(), CallError> {
        let request = ContainerDevices { ids };
        grpc::call::<_, Empty>(&self.channel, methods::PRE_START, request, PRE_START_WITHIN).await.map(drop)
    }
}
