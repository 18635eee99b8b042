//! vxlan: packets between subnets travel inside UDP, so the nodes need nothing but to reach each other by IP.
//!
//! For each other node there is one route (its subnet, by its overlay address, on-link on the device), one ARP entry
//! (overlay address → its device's MAC) and one forwarding entry (MAC → the node's address). The kernel never has to
//! ask anybody, so the device neither learns nor broadcasts.

use ipnet::Ipv4Net;

use crate::interface::ExternalInterface;
use crate::lease::{Lease, LeaseAttributes, LeaseSet, Mac, VxlanData};
use crate::network::VxlanConfig;

use super::{Backend, BackendError, DataPlane, Route, Via, VxlanDevice};

/// Outer Ethernet, IP, UDP and VXLAN headers.
const OVERHEAD: u32 = 50;

pub struct Vxlan {
    config: VxlanConfig,
    network: Ipv4Net,
    interface: ExternalInterface,
    mac: Mac,
    mtu: u32,
}

impl Vxlan {
    pub fn new(
        config: VxlanConfig,
        network: Ipv4Net,
        interface: ExternalInterface,
        mac: Mac,
    ) -> Result<Self, BackendError> {
        let outer = config.mtu.unwrap_or(interface.mtu);
        let mtu = outer.checked_sub(OVERHEAD).filter(|&mtu| mtu >= 68).ok_or(BackendError::MtuTooSmall(outer))?;
        Ok(Self { config, network, interface, mac, mtu })
    }

    /// The name of the device for this network identifier.
    pub fn device_name(vni: u32) -> String {
        format!("flannel.{vni}")
    }

    fn device(&self, own: &Lease) -> VxlanDevice {
        VxlanDevice {
            name: Self::device_name(self.config.vni),
            vni: self.config.vni,
            port: self.config.port,
            mtu: self.mtu,
            mac: self.mac,
            gbp: self.config.gbp,
            learning: self.config.learning,
            local: self.interface.address.addr(),
            link: self.interface.index,
            address: own.subnet.network(),
        }
    }

    fn reachable_directly(&self, attributes: &LeaseAttributes) -> bool {
        self.config.direct_routing && self.interface.address.contains(&attributes.public_ip)
    }
}

impl Backend for Vxlan {
    fn attributes(&self) -> LeaseAttributes {
        let data = VxlanData { vni: self.config.vni, vtep_mac: self.mac };
        LeaseAttributes {
            public_ip: self.interface.public_ip,
            public_ipv6: None,
            backend_type: "vxlan".to_owned(),
            backend_data: serde_json::to_value(data).ok(),
        }
    }

    fn mtu(&self) -> u32 {
        self.mtu
    }

    fn plan(&self, own: &Lease, leases: &LeaseSet) -> DataPlane {
        let mut plane = DataPlane { device: Some(self.device(own)), ..DataPlane::default() };
        for (&subnet, attributes) in leases {
            if subnet == own.subnet || !self.network.contains(&subnet) || attributes.backend_type != "vxlan" {
                continue;
            }
            if self.reachable_directly(attributes) {
                plane.routes.insert(subnet, Route { gateway: attributes.public_ip, via: Via::Underlay });
                continue;
            }
            let Some(data) = attributes.vxlan_data() else {
                tracing::warn!(%subnet, "ignoring a vxlan lease without a usable VtepMAC");
                continue;
            };
            let overlay = subnet.network();
            plane.neighbours.insert(overlay, data.vtep_mac);
            plane.forwarding.insert(data.vtep_mac, attributes.public_ip);
            plane.routes.insert(subnet, Route { gateway: overlay, via: Via::Overlay });
        }
        plane
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{interface, lease, set};
    use super::*;

    fn backend(direct_routing: bool) -> Vxlan {
        let config = VxlanConfig { vni: 1, port: 8472, mtu: None, gbp: false, learning: false, direct_routing };
        Vxlan::new(config, "10.244.0.0/16".parse().unwrap(), interface(), Mac([2, 0, 0, 0, 0, 1])).unwrap()
    }

    #[test]
    fn every_peer_gets_route_neighbour_and_forwarding_entry() {
        let own = lease("10.244.1.0/24", "10.99.0.2", "vxlan", Some("02:00:00:00:00:01"));
        let leases = set(&[
            own.clone(),
            lease("10.244.2.0/24", "10.98.0.3", "vxlan", Some("02:00:00:00:00:02")),
            lease("10.244.4.0/24", "10.99.0.4", "vxlan", None),
            lease("10.244.5.0/24", "10.99.0.5", "host-gw", None),
        ]);
        let plane = backend(false).plan(&own, &leases);
        let device = plane.device.unwrap();
        assert_eq!((device.name.as_str(), device.mtu, device.learning), ("flannel.1", 1450, false));
        assert_eq!(device.address, own.subnet.network());
        assert_eq!(plane.routes.len(), 1);
        assert_eq!(plane.forwarding[&Mac([2, 0, 0, 0, 0, 2])].to_string(), "10.98.0.3");
        assert_eq!(plane.neighbours.len(), 1);
    }

    #[test]
    fn direct_routing_is_for_nodes_on_the_same_link_only() {
        let own = lease("10.244.1.0/24", "10.99.0.2", "vxlan", Some("02:00:00:00:00:01"));
        let leases = set(&[
            own.clone(),
            lease("10.244.2.0/24", "10.99.0.3", "vxlan", Some("02:00:00:00:00:02")),
            lease("10.244.3.0/24", "10.50.0.3", "vxlan", Some("02:00:00:00:00:03")),
        ]);
        let plane = backend(true).plan(&own, &leases);
        assert_eq!(plane.routes[&"10.244.2.0/24".parse().unwrap()].via, Via::Underlay);
        assert_eq!(plane.routes[&"10.244.3.0/24".parse().unwrap()].via, Via::Overlay);
        assert_eq!(plane.forwarding.len(), 1);
    }

    #[test]
    fn the_published_data_is_what_peers_read() {
        let attributes = backend(false).attributes();
        assert_eq!(
            serde_json::to_string(&attributes).unwrap(),
            r#"{"PublicIP":"10.99.0.2","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:01"}}"#
        );
    }
}
