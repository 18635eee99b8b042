//! ipip: packets travel inside IP, with the smallest overhead of all tunnels. Needs the kernel's ipip driver.

use std::net::{IpAddr, Ipv4Addr};

use ipnet::IpNet;

use crate::family::{Family, host};
use crate::interface::ExternalInterface;
use crate::lease::{Lease, LeaseAttributes, LeaseSet};

use super::{
    Backend, BackendError, DataPlane, Device, DeviceKind, DevicePlane, Route, Tables, Via, endpoint, inner_mtu,
    plain_attributes,
};

/// The outer IP header.
const OVERHEAD: u32 = 20;
const DEVICE: &str = "flannel.ipip";

pub struct Ipip {
    direct_routing: bool,
    interface: ExternalInterface,
    /// The interface's address and the network that is reached without the tunnel.
    local: IpNet,
    source: Ipv4Addr,
    mtu: u32,
}

impl Ipip {
    pub fn new(direct_routing: bool, interface: ExternalInterface) -> Result<Self, BackendError> {
        let mtu = inner_mtu("ipip", interface.mtu, OVERHEAD)?;
        let local = endpoint(&interface, Family::V4)?.address;
        let IpAddr::V4(source) = local.addr() else { return Err(BackendError::NoEndpoint(Family::V4)) };
        Ok(Self { direct_routing, interface, local, source, mtu })
    }
}

impl Backend for Ipip {
    fn attributes(&self) -> LeaseAttributes {
        plain_attributes(&self.interface, "ipip")
    }

    fn mtu(&self) -> u32 {
        self.mtu
    }

    fn plan(&self, own: &Lease, peers: &LeaseSet) -> DataPlane {
        let device = Device {
            name: DEVICE.to_owned(),
            mtu: self.mtu,
            addresses: own.subnets.ipv4.map(|subnet| host(subnet.network().into())).into_iter().collect(),
            kind: DeviceKind::Ipip { local: self.source },
        };
        let mut plane = DataPlane {
            routed: true,
            devices: vec![DevicePlane { device, tables: Tables::default() }],
            ..DataPlane::default()
        };
        for (subnets, attributes) in peers.iter().filter(|(_, attributes)| attributes.backend_type == "ipip") {
            let (Some(subnet), Some(node)) = (subnets.get(Family::V4), attributes.public(Family::V4)) else { continue };
            let direct = self.direct_routing && self.local.contains(&node);
            let via = if direct { Via::Underlay } else { Via::Device(0) };
            plane.routes.insert(subnet, Route { gateway: Some(node), via });
        }
        plane
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{ipv4_interface, lease, routes, set};
    use super::*;

    #[test]
    fn routes_lead_to_the_nodes_through_the_tunnel_or_directly() {
        let own = lease(&["10.244.1.0/24"], &["10.99.0.2"], "ipip", None);
        let peers = set(&[
            lease(&["10.244.2.0/24"], &["10.99.0.3"], "ipip", None),
            lease(&["10.244.3.0/24"], &["10.50.0.3"], "ipip", None),
            lease(&["10.244.4.0/24"], &["10.99.0.4"], "vxlan", None),
        ]);
        for (direct, first) in [(false, Via::Device(0)), (true, Via::Underlay)] {
            let plane = Ipip::new(direct, ipv4_interface()).unwrap().plan(&own, &peers);
            assert_eq!(
                routes(&plane),
                [
                    ("10.244.2.0/24".to_owned(), Some("10.99.0.3".to_owned()), first),
                    ("10.244.3.0/24".to_owned(), Some("10.50.0.3".to_owned()), Via::Device(0)),
                ]
            );
            assert_eq!((plane.devices[0].device.name.as_str(), plane.devices[0].device.mtu), ("flannel.ipip", 1480));
        }
    }
}
