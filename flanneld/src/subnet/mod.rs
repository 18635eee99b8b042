//! Subnet managers: who has which subnet. One keeps the leases in etcd, the other in the Kubernetes API.

mod etcd;
mod kube;
mod subnet_file;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use async_trait::async_trait;
use ipnet::IpNet;
use tokio::sync::watch;

pub use self::etcd::{EtcdOptions, EtcdSubnetManager};
pub use self::kube::{KubeOptions, KubeSubnetManager};
#[cfg(test)]
pub(crate) use self::subnet_file::testing;
pub use self::subnet_file::{Assignment, SubnetFile, SubnetFileError};
use crate::family::Family;
use crate::lease::{Lease, LeaseAttributes, LeaseSet, Subnets, VxlanData};
use crate::mac::Mac;
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
    OutOfSubnets(IpNet),
    #[error("other nodes took the chosen subnet {0} times in a row")]
    Contended(usize),
    #[error("subnet {subnets} now belongs to the node at {owner}")]
    Lost { subnets: Subnets, owner: IpAddr },
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
    #[error("node {node} has no {family} pod CIDR yet")]
    NoPodCidr { node: String, family: Family },
    #[error("pod CIDR {cidr} of the node is not in Network {network}")]
    ForeignPodCidr { cidr: IpNet, network: IpNet },
    #[error("annotation prefix {0:?} is not of the form fqdn/[a-z0-9-_]*")]
    AnnotationPrefix(String),
}

impl SubnetError {
    /// Whether trying again later can help without anybody changing the flags of this daemon.
    pub fn is_temporary(&self) -> bool {
        matches!(
            self,
            Self::Etcd { .. }
                | Self::EtcdTimeout { .. }
                | Self::NoNetworkConfig { .. }
                | Self::NetworkConfig(_)
                | Self::OutOfSubnets(_)
                | Self::Contended(_)
                | Self::Kubernetes { .. }
                | Self::NoPodCidr { .. }
        )
    }
}

/// What is known about all leases; `None` until the first complete listing.
pub type Leases = watch::Receiver<Option<LeaseSet>>;

/// Public addresses that somebody else has decided for this node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoredPublic {
    pub ipv4: Option<Ipv4Addr>,
    pub ipv6: Option<Ipv6Addr>,
}

/// Owns this node's lease and follows those of the others.
///
/// Call order: `network`, then `stored_*`, then `acquire` once, then `watch`, `keep` and `network_changed` side by side
/// until the process ends or the network has changed. All of them may be dropped at any await point; none of them
/// changes the kernel.
#[async_trait]
pub trait SubnetManager: Send + Sync {
    async fn network(&self) -> Result<NetworkConfig, SubnetError>;

    /// Returns when there is another configuration that can be used. One that cannot is reported, and the present one
    /// goes on.
    async fn network_changed(&self, present: &NetworkConfig) -> NetworkConfig;

    /// The public addresses over the ones found or given by flag.
    async fn stored_public(&self) -> Result<StoredPublic, SubnetError>;

    /// The hardware addresses that the node with this public address published before.
    async fn stored_macs(&self, owner: IpAddr) -> Result<BTreeMap<Family, Mac>, SubnetError>;

    /// Takes (again) subnets for this node. Nodes that do so at the same instant get different ones.
    async fn acquire(&self, network: &NetworkConfig, attributes: &LeaseAttributes) -> Result<Lease, SubnetError>;

    /// Keeps the own lease from expiring. Returns only when it is lost for good, with the reason.
    async fn keep(&self, lease: &Lease, leases: Leases) -> SubnetError;

    /// Publishes the complete set of leases whenever it changes. Reconnects by itself and never returns.
    async fn watch(&self, leases: watch::Sender<Option<LeaseSet>>);
}

/// The hardware addresses in a lease of the vxlan backend.
fn macs(attributes: &LeaseAttributes) -> BTreeMap<Family, Mac> {
    let mac = |family| Some((family, attributes.data::<VxlanData>(family)?.vtep_mac));
    Family::BOTH.into_iter().filter_map(mac).collect()
}

/// Replaces the published set if it differs.
fn publish(leases: &watch::Sender<Option<LeaseSet>>, set: LeaseSet) {
    leases.send_if_modified(|current| {
        let changed = current.as_ref() != Some(&set);
        if changed {
            *current = Some(set);
        }
        changed
    });
}
