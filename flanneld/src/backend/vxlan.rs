//! vxlan: packets between subnets travel inside UDP, so the nodes need nothing but to reach each other by IP.
//!
//! Each address family has a device. For each other node there is one route (its subnet, by its overlay address,
//! on-link on the device), one neighbour (overlay address → its device's MAC) and one forwarding entry (MAC → the node's
//! address). The kernel never has to ask anybody, so the device neither learns nor broadcasts.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;

use crate::family::{Family, host};
use crate::interface::ExternalInterface;
use crate::lease::{Lease, LeaseAttributes, LeaseSet, VxlanData};
use crate::mac::Mac;
use crate::network::VxlanConfig;

use super::{
    Backend, BackendError, DataPlane, Device, DeviceKind, DevicePlane, Route, Tables, Via, VxlanLink, endpoint,
    inner_mtu, plain_attributes,
};

pub struct Vxlan {
    config: VxlanConfig,
    interface: ExternalInterface,
    /// One tunnel for each family of the network, in the order of the plan's devices.
    tunnels: Vec<Tunnel>,
}

struct Tunnel {
    family: Family,
    mac: Mac,
    mtu: u32,
    /// The interface's address, where the encapsulated packets come from.
    local: IpNet,
}

/// Outer Ethernet, IP, UDP and VXLAN headers.
fn overhead(family: Family) -> u32 {
    match family {
        Family::V4 => 50,
        Family::V6 => 70,
    }
}

impl Vxlan {
    pub fn new(
        config: VxlanConfig,
        families: Vec<Family>,
        interface: ExternalInterface,
        macs: BTreeMap<Family, Mac>,
    ) -> Result<Self, BackendError> {
        let outer = if config.mtu == 0 { interface.mtu } else { config.mtu };
        let tunnel = |family: Family| {
            let mtu = inner_mtu("vxlan", outer, overhead(family))?;
            let local = endpoint(&interface, family)?.address;
            Ok(Tunnel { family, mac: macs.get(&family).copied().unwrap_or_else(Mac::random), mtu, local })
        };
        let tunnels = families.into_iter().map(tunnel).collect::<Result<Vec<_>, BackendError>>()?;
        Ok(Self { config, interface, tunnels })
    }

    /// The name of the device for this network identifier.
    pub fn device_name(family: Family, vni: u32) -> String {
        match family {
            Family::V4 => format!("flannel.{vni}"),
            Family::V6 => format!("flannel-v6.{vni}"),
        }
    }

    fn device(&self, tunnel: &Tunnel, own: &Lease) -> Device {
        let link = VxlanLink {
            vni: self.config.vni,
            port: self.config.port,
            mac: tunnel.mac,
            gbp: self.config.gbp,
            learning: self.config.learning,
            local: tunnel.local.addr(),
            link: self.interface.index,
        };
        Device {
            name: Self::device_name(tunnel.family, self.config.vni),
            mtu: tunnel.mtu,
            addresses: own.subnets.get(tunnel.family).map(|subnet| host(subnet.network())).into_iter().collect(),
            kind: DeviceKind::Vxlan(link),
        }
    }

    fn reachable_directly(&self, tunnel: &Tunnel, node: IpAddr) -> bool {
        self.config.direct_routing && tunnel.local.contains(&node)
    }

    fn data(&self, family: Family) -> Option<serde_json::Value> {
        let tunnel = self.tunnels.iter().find(|tunnel| tunnel.family == family)?;
        serde_json::to_value(VxlanData { vni: self.config.vni, vtep_mac: tunnel.mac }).ok()
    }
}

impl Backend for Vxlan {
    fn attributes(&self) -> LeaseAttributes {
        LeaseAttributes {
            backend_data: self.data(Family::V4),
            backend_v6_data: self.data(Family::V6),
            ..plain_attributes(&self.interface, "vxlan")
        }
    }

    fn mtu(&self) -> u32 {
        self.tunnels.iter().map(|tunnel| tunnel.mtu).min().unwrap_or(self.interface.mtu)
    }

    fn plan(&self, own: &Lease, peers: &LeaseSet) -> DataPlane {
        let mut plane = DataPlane { routed: true, ..DataPlane::default() };
        for (number, tunnel) in self.tunnels.iter().enumerate() {
            let mut tables = Tables::default();
            for (subnets, attributes) in peers.iter().filter(|(_, attributes)| attributes.backend_type == "vxlan") {
                let (Some(subnet), Some(node)) = (subnets.get(tunnel.family), attributes.public(tunnel.family)) else {
                    continue;
                };
                if self.reachable_directly(tunnel, node) {
                    plane.routes.insert(subnet, Route { gateway: Some(node), via: Via::Underlay });
                    continue;
                }
                let Some(data) = attributes.data::<VxlanData>(tunnel.family) else {
                    tracing::warn!(%subnet, "ignoring a vxlan lease without a usable VtepMAC");
                    continue;
                };
                let overlay = subnet.network();
                tables.neighbours.insert(overlay, data.vtep_mac);
                tables.forwarding.insert(data.vtep_mac, node);
                plane.routes.insert(subnet, Route { gateway: Some(overlay), via: Via::Device(number) });
            }
            plane.devices.push(DevicePlane { device: self.device(tunnel, own), tables });
        }
        plane
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::testing::{interface, ipv4_interface, lease, set};
    use super::*;

    fn backend(families: &[Family], direct_routing: bool) -> Vxlan {
        let config = VxlanConfig { direct_routing, ..VxlanConfig::default() };
        let interface = if families.contains(&Family::V6) { interface() } else { ipv4_interface() };
        let macs = [(Family::V4, Mac([2, 0, 0, 0, 0, 1])), (Family::V6, Mac([2, 0, 0, 0, 6, 1]))].into();
        Vxlan::new(config, families.to_vec(), interface, macs).unwrap()
    }

    fn data(last: u8) -> Option<serde_json::Value> {
        Some(json!({"VNI": 1, "VtepMAC": Mac([2, 0, 0, 0, 0, last])}))
    }

    #[test]
    fn every_peer_gets_route_neighbour_and_forwarding_entry() {
        let own = lease(&["10.244.1.0/24"], &["10.99.0.2"], "vxlan", data(1));
        let peers = set(&[
            lease(&["10.244.2.0/24"], &["10.98.0.3"], "vxlan", data(2)),
            lease(&["10.244.4.0/24"], &["10.99.0.4"], "vxlan", None),
            lease(&["10.244.5.0/24"], &["10.99.0.5"], "host-gw", None),
        ]);
        let plane = backend(&[Family::V4], false).plan(&own, &peers);
        let DevicePlane { device, tables } = &plane.devices[0];
        assert_eq!((device.name.as_str(), device.mtu), ("flannel.1", 1450));
        assert_eq!(device.addresses, ["10.244.1.0/32".parse().unwrap()].into());
        assert_eq!(plane.routes.len(), 1);
        assert_eq!(tables.forwarding[&Mac([2, 0, 0, 0, 0, 2])].to_string(), "10.98.0.3");
        assert_eq!(tables.neighbours.len(), 1);
    }

    #[test]
    fn dual_stack_has_a_device_for_each_family() {
        let own = lease(&["10.244.1.0/24", "fd00:1::/64"], &["10.99.0.2", "fd99::2"], "vxlan", data(1));
        let peers = set(&[
            lease(&["10.244.2.0/24", "fd00:2::/64"], &["10.99.0.3", "fd99::3"], "vxlan", data(2)),
            lease(&["10.244.3.0/24"], &["10.99.0.4"], "vxlan", data(3)),
        ]);
        let backend = backend(&Family::BOTH, false);
        let plane = backend.plan(&own, &peers);
        let names: Vec<&str> = plane.devices.iter().map(|plane| plane.device.name.as_str()).collect();
        assert_eq!(names, ["flannel.1", "flannel-v6.1"]);
        assert_eq!(plane.devices[1].tables.forwarding[&Mac([2, 0, 0, 0, 0, 2])].to_string(), "fd99::3");
        assert_eq!(plane.routes[&"fd00:2::/64".parse().unwrap()].via, Via::Device(1));
        assert_eq!((plane.routes.len(), backend.mtu()), (3, 1430));
    }

    #[test]
    fn direct_routing_is_for_nodes_on_the_same_link_only() {
        let own = lease(&["10.244.1.0/24"], &["10.99.0.2"], "vxlan", data(1));
        let peers = set(&[
            lease(&["10.244.2.0/24"], &["10.99.0.3"], "vxlan", data(2)),
            lease(&["10.244.3.0/24"], &["10.50.0.3"], "vxlan", data(3)),
        ]);
        let plane = backend(&[Family::V4], true).plan(&own, &peers);
        assert_eq!(plane.routes[&"10.244.2.0/24".parse().unwrap()].via, Via::Underlay);
        assert_eq!(plane.routes[&"10.244.3.0/24".parse().unwrap()].via, Via::Device(0));
        assert_eq!(plane.devices[0].tables.forwarding.len(), 1);
    }

    #[test]
    fn the_published_data_is_what_peers_read() {
        let text = |families: &[Family]| serde_json::to_string(&backend(families, false).attributes()).unwrap();
        assert_eq!(
            text(&[Family::V4]),
            r#"{"PublicIP":"10.99.0.2","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:01"}}"#
        );
        assert_eq!(
            text(&Family::BOTH),
            r#"{"PublicIP":"10.99.0.2","PublicIPv6":"fd99::2","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:01"},"BackendV6Data":{"VNI":1,"VtepMAC":"02:00:00:00:06:01"}}"#
        );
    }
}
