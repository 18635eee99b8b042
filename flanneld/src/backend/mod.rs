//! Backends: how packets get from one node's subnet to another's.
//!
//! A backend only decides. It says what it publishes in the lease and, given all leases, which devices, routes and
//! entries there should be; comparing and changing are done elsewhere, once for all backends.

mod extension;
mod host_gw;
mod ipip;
mod plan;
mod prepare;
mod udp;
mod vxlan;
mod wireguard;

use std::net::IpAddr;

pub use extension::Extension;
pub use host_gw::HostGw;
pub use ipip::Ipip;
pub use plan::{
    Change, DataPlane, Device, DeviceKind, DevicePlane, Observed, Peer, Route, Tables, Via, VxlanLink, changes,
};
pub use prepare::{PrepareError, Prepared};
pub use udp::Udp;
pub use vxlan::Vxlan;
pub use wireguard::Wireguard;

use crate::family::Family;
use crate::interface::{Endpoint, ExternalInterface};
use crate::lease::{Lease, LeaseAttributes, LeaseSet};
use crate::network::{BackendConfig, NetworkConfig};

/// Decides the data plane. Called in this order: `attributes` once before a lease is acquired, then `plan` whenever
/// the leases or the kernel changed. Neither may have side effects.
pub trait Backend: Send + Sync {
    /// What this node publishes in its lease.
    fn attributes(&self) -> LeaseAttributes;

    /// The largest packet that a pod may send without fragmentation.
    fn mtu(&self) -> u32;

    /// The data plane for these leases: this node's own, and those of the other nodes, whose subnets are parts of the
    /// network and do not overlap.
    fn plan(&self, own: &Lease, peers: &LeaseSet) -> DataPlane;
}

#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    #[error(
        "host-gw needs the public address {public} to be the address {interface} of the interface (no NAT between)"
    )]
    BehindNat { public: IpAddr, interface: IpAddr },
    #[error("the interface's MTU of {mtu} leaves no room for the {overhead} bytes that {backend} adds")]
    MtuTooSmall { backend: &'static str, mtu: u32, overhead: u32 },
    #[error("the network has {0}, but the interface was chosen without")]
    NoEndpoint(Family),
    #[error("there is no key for wireguard")]
    NoKey,
}

/// The backend that the network asks for.
pub fn new(
    network: &NetworkConfig,
    interface: &ExternalInterface,
    prepared: &Prepared,
) -> Result<Box<dyn Backend>, BackendError> {
    let interface = interface.clone();
    Ok(match &network.backend {
        BackendConfig::Vxlan(config) => {
            Box::new(Vxlan::new(config.clone(), network.families().collect(), interface, prepared.macs.clone())?)
        }
        BackendConfig::HostGw => Box::new(HostGw::new(interface)?),
        BackendConfig::Udp { port } => {
            let pool = network.ipv4.as_ref().ok_or(BackendError::NoEndpoint(Family::V4))?;
            Box::new(Udp::new(*port, pool.network, interface)?)
        }
        BackendConfig::Ipip { direct_routing } => Box::new(Ipip::new(*direct_routing, interface)?),
        BackendConfig::Wireguard(config) => {
            let key = prepared.wireguard_key.ok_or(BackendError::NoKey)?;
            Box::new(Wireguard::new(config.clone(), network, interface, key)?)
        }
        BackendConfig::Extension(config) => {
            Box::new(Extension::new(config.clone(), network, interface, prepared.extension_data.clone()))
        }
        BackendConfig::Alloc => Box::new(Alloc(interface)),
    })
}

/// The attributes of a backend that needs no data of its own.
fn plain_attributes(interface: &ExternalInterface, backend_type: &str) -> LeaseAttributes {
    LeaseAttributes {
        public_ip: interface.public_ipv4(),
        public_ipv6: interface.public_ipv6(),
        backend_type: backend_type.to_owned(),
        backend_data: None,
        backend_v6_data: None,
    }
}

/// What is left of the MTU for packets inside the tunnel; at least what IPv4 guarantees.
fn inner_mtu(backend: &'static str, mtu: u32, overhead: u32) -> Result<u32, BackendError> {
    let inner = mtu.checked_sub(overhead).filter(|&inner| inner >= 68);
    inner.ok_or(BackendError::MtuTooSmall { backend, mtu, overhead })
}

fn endpoint(interface: &ExternalInterface, family: Family) -> Result<Endpoint, BackendError> {
    interface.endpoint(family).copied().ok_or(BackendError::NoEndpoint(family))
}

/// The backend that only leases subnets; routing is somebody else's.
struct Alloc(ExternalInterface);

impl Backend for Alloc {
    fn attributes(&self) -> LeaseAttributes {
        plain_attributes(&self.0, "alloc")
    }

    fn mtu(&self) -> u32 {
        self.0.mtu
    }

    fn plan(&self, _own: &Lease, _peers: &LeaseSet) -> DataPlane {
        DataPlane::default()
    }
}

#[cfg(test)]
pub(crate) mod testing {
    use serde_json::Value;

    use super::*;
    use crate::lease::Subnets;

    pub fn interface() -> ExternalInterface {
        let endpoint = |net: &str| {
            let address: ipnet::IpNet = net.parse().unwrap();
            Some(Endpoint { address, public: address.addr() })
        };
        ExternalInterface {
            name: "eth0".to_owned(),
            index: 2,
            mtu: 1500,
            ipv4: endpoint("10.99.0.2/24"),
            ipv6: endpoint("fd99::2/64"),
        }
    }

    /// The interface of a network without IPv6.
    pub fn ipv4_interface() -> ExternalInterface {
        ExternalInterface { ipv6: None, ..interface() }
    }

    /// A lease; subnets and public addresses of both families may be given.
    pub fn lease(subnets: &[&str], public: &[&str], backend_type: &str, data: Option<Value>) -> Lease {
        let mut attributes = LeaseAttributes {
            public_ip: std::net::Ipv4Addr::UNSPECIFIED,
            public_ipv6: None,
            backend_type: backend_type.to_owned(),
            backend_data: data.clone(),
            backend_v6_data: None,
        };
        for address in public {
            match address.parse().unwrap() {
                IpAddr::V4(address) => attributes.public_ip = address,
                IpAddr::V6(address) => {
                    attributes.public_ipv6 = Some(address);
                    attributes.backend_v6_data = data.clone();
                }
            }
        }
        let subnets = subnets.iter().fold(Subnets::default(), |all, net| all.with(net.parse().unwrap()));
        Lease { subnets, attributes }
    }

    pub fn set(leases: &[Lease]) -> LeaseSet {
        leases.iter().map(|lease| (lease.subnets, lease.attributes.clone())).collect()
    }

    pub fn routes(plane: &DataPlane) -> Vec<(String, Option<String>, Via)> {
        let text = |(net, route): (&ipnet::IpNet, &Route)| {
            (net.to_string(), route.gateway.map(|ip| ip.to_string()), route.via)
        };
        plane.routes.iter().map(text).collect()
    }
}
