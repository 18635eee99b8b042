//! host-gw: plain routes over a layer 2 network that all nodes share. The fastest backend, with nothing to set up.

use crate::interface::ExternalInterface;
use crate::lease::{Lease, LeaseAttributes, LeaseSet};

use super::{Backend, BackendError, DataPlane, Route, Via};

pub struct HostGw {
    interface: ExternalInterface,
}

impl HostGw {
    /// Fails when other nodes know this one under an address that is not the interface's: a router in between would
    /// not know the pod subnets.
    pub fn new(interface: ExternalInterface) -> Result<Self, BackendError> {
        if interface.public_ip != interface.address.addr() {
            return Err(BackendError::BehindNat { public: interface.public_ip, interface: interface.address.addr() });
        }
        Ok(Self { interface })
    }
}

impl Backend for HostGw {
    fn attributes(&self) -> LeaseAttributes {
        LeaseAttributes {
            public_ip: self.interface.public_ip,
            public_ipv6: None,
            backend_type: "host-gw".to_owned(),
            backend_data: None,
        }
    }

    fn mtu(&self) -> u32 {
        self.interface.mtu
    }

    fn plan(&self, own: &Lease, leases: &LeaseSet) -> DataPlane {
        let peers = leases.iter().filter(|(subnet, _)| **subnet != own.subnet);
        let routes = peers
            .filter(|(_, attributes)| attributes.backend_type == "host-gw")
            .map(|(&subnet, attributes)| (subnet, Route { gateway: attributes.public_ip, via: Via::Underlay }))
            .collect();
        DataPlane { routes, ..DataPlane::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{interface, lease, set};
    use super::*;

    #[test]
    fn routes_go_to_the_other_nodes_of_the_same_backend() {
        let backend = HostGw::new(interface()).unwrap();
        let own = lease("10.244.1.0/24", "10.99.0.2", "host-gw", None);
        let leases = set(&[
            own.clone(),
            lease("10.244.2.0/24", "10.99.0.3", "host-gw", None),
            lease("10.244.3.0/24", "10.99.0.4", "vxlan", Some("02:00:00:00:00:03")),
        ]);
        let plane = backend.plan(&own, &leases);
        assert_eq!(plane.device, None);
        assert_eq!(
            plane.routes,
            [("10.244.2.0/24".parse().unwrap(), Route { gateway: "10.99.0.3".parse().unwrap(), via: Via::Underlay })]
                .into()
        );
    }

    #[test]
    fn an_address_behind_nat_is_refused() {
        let mut interface = interface();
        interface.public_ip = "192.0.2.1".parse().unwrap();
        assert!(HostGw::new(interface).is_err());
    }
}
