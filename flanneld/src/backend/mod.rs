//! Backends: how packets get from one node's subnet to another's.
//!
//! A backend only decides. It says what it publishes in the lease and, given all leases, which device, routes and
//! neighbour entries the kernel should have; comparing and changing are done elsewhere, once for all backends.

mod host_gw;
mod plan;
mod vxlan;

use std::net::Ipv4Addr;

pub use host_gw::HostGw;
pub use plan::{Change, DataPlane, Observed, Route, Via, VxlanDevice, changes};
pub use vxlan::Vxlan;

use crate::interface::ExternalInterface;
use crate::lease::{Lease, LeaseAttributes, LeaseSet, Mac};
use crate::network::{BackendConfig, NetworkConfig};

/// Decides the data plane. Called in this order: `attributes` once before a lease is acquired, then `plan` whenever
/// the leases or the kernel changed. Neither may have side effects.
pub trait Backend: Send + Sync {
    /// What this node publishes in its lease.
    fn attributes(&self) -> LeaseAttributes;

    /// The largest packet that a pod may send without fragmentation.
    fn mtu(&self) -> u32;

    /// The data plane for these leases. `own` is this node's lease and `leases` has all, `own` included.
    fn plan(&self, own: &Lease, leases: &LeaseSet) -> DataPlane;
}

#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    #[error(
        "host-gw needs the public address {public} to be the address {interface} of the interface (no NAT between)"
    )]
    BehindNat { public: Ipv4Addr, interface: Ipv4Addr },
    #[error("interface MTU {0} leaves no room for VXLAN's 50 bytes")]
    MtuTooSmall(u32),
}

/// The backend that the network asks for. `mac` is the hardware address of this node's VXLAN device.
pub fn new(network: &NetworkConfig, interface: &ExternalInterface, mac: Mac) -> Result<Box<dyn Backend>, BackendError> {
    Ok(match &network.backend {
        BackendConfig::Vxlan(config) => Box::new(Vxlan::new(config.clone(), network.network, interface.clone(), mac)?),
        BackendConfig::HostGw => Box::new(HostGw::new(interface.clone())?),
        BackendConfig::Alloc => Box::new(Alloc(interface.clone())),
    })
}

/// The backend that only leases subnets; routing is somebody else's.
struct Alloc(ExternalInterface);

impl Backend for Alloc {
    fn attributes(&self) -> LeaseAttributes {
        LeaseAttributes {
            public_ip: self.0.public_ip,
            public_ipv6: None,
            backend_type: "alloc".to_owned(),
            backend_data: None,
        }
    }

    fn mtu(&self) -> u32 {
        self.0.mtu
    }

    fn plan(&self, _own: &Lease, _leases: &LeaseSet) -> DataPlane {
        DataPlane::default()
    }
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    pub fn interface() -> ExternalInterface {
        ExternalInterface {
            name: "eth0".to_owned(),
            index: 2,
            mtu: 1500,
            address: "10.99.0.2/24".parse().unwrap(),
            public_ip: Ipv4Addr::new(10, 99, 0, 2),
        }
    }

    pub fn lease(subnet: &str, public_ip: &str, backend_type: &str, mac: Option<&str>) -> Lease {
        Lease {
            subnet: subnet.parse().unwrap(),
            attributes: LeaseAttributes {
                public_ip: public_ip.parse().unwrap(),
                public_ipv6: None,
                backend_type: backend_type.to_owned(),
                backend_data: mac.map(|mac| serde_json::json!({"VNI": 1, "VtepMAC": mac})),
            },
        }
    }

    pub fn set(leases: &[Lease]) -> LeaseSet {
        leases.iter().map(|lease| (lease.subnet, lease.attributes.clone())).collect()
    }
}
