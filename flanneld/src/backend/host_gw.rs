//! host-gw: plain routes over a layer 2 network that all nodes share. The fastest backend, with nothing to set up.

use crate::family::Family;
use crate::interface::ExternalInterface;
use crate::lease::{Lease, LeaseAttributes, LeaseSet};

use super::{Backend, BackendError, DataPlane, Route, Via, plain_attributes};

pub struct HostGw {
    interface: ExternalInterface,
}

impl HostGw {
    /// Fails when other nodes know this one under an address that is not the interface's: a router in between would
    /// not know the pod subnets.
    pub fn new(interface: ExternalInterface) -> Result<Self, BackendError> {
        for endpoint in interface.ipv4.iter().chain(&interface.ipv6) {
            if endpoint.public != endpoint.address.addr() {
                return Err(BackendError::BehindNat { public: endpoint.public, interface: endpoint.address.addr() });
            }
        }
        Ok(Self { interface })
    }
}

impl Backend for HostGw {
    fn attributes(&self) -> LeaseAttributes {
        plain_attributes(&self.interface, "host-gw")
    }

    fn mtu(&self) -> u32 {
        self.interface.mtu
    }

    fn plan(&self, _own: &Lease, peers: &LeaseSet) -> DataPlane {
        let mut plane = DataPlane { routed: true, ..DataPlane::default() };
        for (subnets, attributes) in peers.iter().filter(|(_, attributes)| attributes.backend_type == "host-gw") {
            for subnet in subnets.iter() {
                let family = Family::of_net(subnet);
                let gateway = attributes.public(family).filter(|_| self.interface.endpoint(family).is_some());
                if gateway.is_some() {
                    plane.routes.insert(subnet, Route { gateway, via: Via::Underlay });
                }
            }
        }
        plane
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{interface, ipv4_interface, lease, routes, set};
    use super::*;

    #[test]
    fn routes_go_to_the_other_nodes_of_the_same_backend() {
        let own = lease(&["10.244.1.0/24", "fd00:1::/64"], &["10.99.0.2", "fd99::2"], "host-gw", None);
        let peers = set(&[
            lease(&["10.244.2.0/24", "fd00:2::/64"], &["10.99.0.3", "fd99::3"], "host-gw", None),
            lease(&["10.244.3.0/24"], &["10.99.0.4"], "vxlan", None),
        ]);
        let plane = HostGw::new(interface()).unwrap().plan(&own, &peers);
        assert!(plane.devices.is_empty());
        let both = [
            ("10.244.2.0/24".to_owned(), Some("10.99.0.3".to_owned()), Via::Underlay),
            ("fd00:2::/64".to_owned(), Some("fd99::3".to_owned()), Via::Underlay),
        ];
        assert_eq!(routes(&plane), both);
        assert_eq!(routes(&HostGw::new(ipv4_interface()).unwrap().plan(&own, &peers)), both[..1]);
    }

    #[test]
    fn an_address_behind_nat_is_refused() {
        let mut interface = interface();
        interface.ipv4.as_mut().unwrap().public = "192.0.2.1".parse().unwrap();
        assert!(HostGw::new(interface).is_err());
    }
}
