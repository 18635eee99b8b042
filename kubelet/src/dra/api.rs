//! The node's part of dynamic resource allocation, as drivers serve it: `DRAPlugin` in its versions v1 and v1beta1,
//! whose messages are the same.

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use tonic::transport::Channel;

use crate::grpc::{self, CallError};

/// How long a driver has for all claims of a pod; upstream's limit.
const WITHIN: Duration = Duration::from_secs(45);

/// Versions of the service by the name under which drivers announce it, the best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    V1,
    V1beta1,
}

impl Version {
    pub const KNOWN: [(&str, Version); 2] = [("v1.DRAPlugin", Self::V1), ("v1beta1.DRAPlugin", Self::V1beta1)];

    pub fn prepare(self) -> &'static str {
        match self {
            Self::V1 => "/k8s.io.kubelet.pkg.apis.dra.v1.DRAPlugin/NodePrepareResources",
            Self::V1beta1 => "/k8s.io.kubelet.pkg.apis.dra.v1beta1.DRAPlugin/NodePrepareResources",
        }
    }

    pub fn unprepare(self) -> &'static str {
        match self {
            Self::V1 => "/k8s.io.kubelet.pkg.apis.dra.v1.DRAPlugin/NodeUnprepareResources",
            Self::V1beta1 => "/k8s.io.kubelet.pkg.apis.dra.v1beta1.DRAPlugin/NodeUnprepareResources",
        }
    }
}

/// The request of both calls.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Claims {
    #[prost(message, repeated, tag = "1")]
    pub claims: Vec<Claim>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Claim {
    #[prost(string, tag = "1")]
    pub namespace: String,
    #[prost(string, tag = "2")]
    pub uid: String,
    #[prost(string, tag = "3")]
    pub name: String,
}

/// What became of each claim, by its uid.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Prepared {
    #[prost(map = "string, message", tag = "1")]
    pub claims: HashMap<String, PreparedClaim>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct PreparedClaim {
    #[prost(message, repeated, tag = "1")]
    pub devices: Vec<Device>,
    #[prost(string, tag = "2")]
    pub error: String,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Device {
    /// Requests of the claim for which it was allocated; none for all of them.
    #[prost(string, repeated, tag = "1")]
    pub request_names: Vec<String>,
    #[prost(string, tag = "2")]
    pub pool_name: String,
    #[prost(string, tag = "3")]
    pub device_name: String,
    #[prost(string, repeated, tag = "4")]
    pub cdi_device_ids: Vec<String>,
    #[prost(string, optional, tag = "5")]
    pub share_id: Option<String>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Unprepared {
    #[prost(map = "string, message", tag = "1")]
    pub claims: HashMap<String, UnpreparedClaim>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct UnpreparedClaim {
    #[prost(string, tag = "1")]
    pub error: String,
}

/// A handle to one driver; cheap to clone.
#[derive(Clone, Debug)]
pub struct Driver {
    channel: Channel,
    version: Version,
}

impl Driver {
    pub fn at(socket: &Path, version: Version) -> Self {
        Self { channel: grpc::channel(socket), version }
    }

    pub async fn prepare(&self, claims: Vec<Claim>) -> Result<Prepared, CallError> {
        grpc::call(&self.channel, self.version.prepare(), Claims { claims }, WITHIN).await
    }

    pub async fn unprepare(&self, claims: Vec<Claim>) -> Result<Unprepared, CallError> {
        grpc::call(&self.channel, self.version.unprepare(), Claims { claims }, WITHIN).await
    }
}
