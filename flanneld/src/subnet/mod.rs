//! Subnet managers: who has which subnet. One keeps the leases in etcd, the other in the Kubernetes API.

mod etcd;
mod kube;
mod subnet_file;

use std::net::Ipv4Addr;

use async_trait::async_trait;
use ipnet::Ipv4Net;
use tokio::sync::watch;

pub use self::etcd::{EtcdOptions, EtcdSubnetManager};
pub use self::kube::{KubeOptions, KubeSubnetManager};
pub use self::subnet_file::{SubnetFile, SubnetFileError};
use crate::lease::{Lease, LeaseAttributes, LeaseSet, Mac};
use crate::network::{NetworkConfig, NetworkError};

#[derive(Debug, thiserror::Error)]
pub enum SubnetError {
    #[error("cannot {step} in etcd")]
    Etcd { step: &'static str, source: etcd_client::Error },
    #[error("etcd did not answer within {seconds} s when asked to {step}")]
    EtcdTimeout { step: &'static str, seconds: u64 },
    #[error(
        "there is no network configuration at {key}; put one there, e.g. {{\"Network\":\"10.244.0.0/16\",\"Backend\":{{\"Type\":\"vxlan\"}}}}"
    )]
    NoNetworkConfig { key: String },
    #[error("the network configuration cannot be used")]
    NetworkConfig(#[from] NetworkError),
    #[error("no subnet of {0} is free")]
    OutOfSubnets(Ipv4Net),
    #[error("other nodes took the chosen subnet {0} times in a row")]
    Contended(usize),
    #[error("subnet {subnet} now belongs to the node at {owner}")]
    Lost { subnet: Ipv4Net, owner: Ipv4Addr },
    #[error("cannot read {path}")]
    ReadFile { path: String, source: std::io::Error },
    #[error("cannot encode the lease")]
    Encode(#[source] serde_json::Error),
    #[error("cannot {step} in the Kubernetes API")]
    Kubernetes { step: &'static str, source: Box<::kube::Error> },
    #[error("neither NODE_NAME nor POD_NAME and POD_NAMESPACE are set, so the node is not known")]
    NoNodeName,
    #[error("pod {namespace}/{name} is not bound to a node")]
    PodWithoutNode { namespace: String, name: String },
    #[error("node {0} has no pod CIDR yet")]
    NoPodCidr(String),
    #[error("pod CIDR {cidr} of the node is not in Network {network}")]
    ForeignPodCidr { cidr: Ipv4Net, network: Ipv4Net },
    #[error("annotation prefix {0:?} is not of the form fqdn/[a-z0-9-_]*")]
    AnnotationPrefix(String),
}

impl SubnetError {
    /// Whether trying again later can help without anybody changing the configuration of this daemon.
    pub fn is_temporary(&self) -> bool {
        matches!(
            self,
            Self::Etcd { .. }
                | Self::EtcdTimeout { .. }
                | Self::NoNetworkConfig { .. }
                | Self::OutOfSubnets(_)
                | Self::Contended(_)
                | Self::Kubernetes { .. }
                | Self::NoPodCidr(_)
        )
    }
}

/// What is known about all leases; `None` until the first complete listing.
pub type Leases = watch::Receiver<Option<LeaseSet>>;

/// Owns this node's lease and follows those of the others.
///
/// Call order: `network`, then `stored_*`, then `acquire` once, then `watch` and `keep` side by side until the
/// process ends. All of them may be dropped at any await point; none of them changes the kernel.
#[async_trait]
pub trait SubnetManager: Send + Sync {
    async fn network(&self) -> Result<NetworkConfig, SubnetError>;

    /// The public address that somebody else has decided for this node, over the one found or given by flag.
    async fn stored_public_ip(&self) -> Result<Option<Ipv4Addr>, SubnetError>;

    /// The hardware address that this node published before, so that its peers need not learn a new one.
    async fn stored_mac(&self, public_ip: Ipv4Addr) -> Result<Option<Mac>, SubnetError>;

    /// Takes (again) a subnet for this node. Nodes that do so at the same instant get different subnets.
    async fn acquire(&self, network: &NetworkConfig, attributes: &LeaseAttributes) -> Result<Lease, SubnetError>;

    /// Keeps the own lease from expiring. Returns only when it is lost for good, with the reason.
    async fn keep(&self, lease: &Lease, leases: Leases) -> SubnetError;

    /// Publishes the complete set of leases whenever it changes. Reconnects by itself and never returns.
    async fn watch(&self, leases: watch::Sender<Option<LeaseSet>>);
}
