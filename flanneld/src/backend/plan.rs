//! The data plane as a value, and the difference between what is wanted and what the kernel has.
//!
//! Only entries that are recognisably flannel's are ever removed: on its own device everything, on the external
//! interface only gateway routes to whole subnets inside the pod network.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

use crate::lease::Mac;

/// What this node's kernel should have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DataPlane {
    pub device: Option<VxlanDevice>,
    /// One route for each other node's subnet.
    pub routes: BTreeMap<Ipv4Net, Route>,
    /// ARP entries on the VXLAN device: overlay address → hardware address.
    pub neighbours: BTreeMap<Ipv4Addr, Mac>,
    /// Forwarding database of the VXLAN device: hardware address → node.
    pub forwarding: BTreeMap<Mac, Ipv4Addr>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VxlanDevice {
    pub name: String,
    pub vni: u32,
    pub port: u16,
    pub mtu: u32,
    pub mac: Mac,
    pub gbp: bool,
    pub learning: bool,
    /// Source address and interface of the encapsulated packets.
    pub local: Ipv4Addr,
    pub link: u32,
    /// The device's own address, as a /32 so that no broadcast routes appear.
    pub address: Ipv4Addr,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    pub gateway: Ipv4Addr,
    pub via: Via,
}

/// The interface that a route leaves through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Via {
    /// The VXLAN device; the gateway is declared on-link.
    Overlay,
    /// The external interface.
    Underlay,
}

/// What the kernel has now, reduced to what can be flannel's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observed {
    /// The device by the wanted name, if there is one and it is up with the right address.
    pub device: Option<VxlanDevice>,
    pub routes: BTreeMap<Ipv4Net, Route>,
    pub neighbours: BTreeMap<Ipv4Addr, Mac>,
    pub forwarding: BTreeMap<Mac, Ipv4Addr>,
}

/// One step towards the wanted data plane.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Creates the device, or recreates it when one with other settings has its name; everything on it is gone then.
    EnsureDevice(VxlanDevice),
    DeleteRoute(Ipv4Net, Route),
    DeleteForwarding(Mac, Ipv4Addr),
    DeleteNeighbour(Ipv4Addr, Mac),
    SetNeighbour(Ipv4Addr, Mac),
    SetForwarding(Mac, Ipv4Addr),
    SetRoute(Ipv4Net, Route),
}

/// The steps from `observed` to `wanted`, in an order in which no packet is routed to a neighbour that is not known yet.
/// A device that is not right yet is the only step: what else is needed shows when the kernel is observed again.
pub fn changes(wanted: &DataPlane, observed: &Observed) -> Vec<Change> {
    if let Some(device) = &wanted.device
        && observed.device.as_ref() != Some(device)
    {
        return vec![Change::EnsureDevice(device.clone())];
    }
    let mut steps = Vec::new();
    for (&subnet, &route) in &observed.routes {
        if !wanted.routes.contains_key(&subnet) {
            steps.push(Change::DeleteRoute(subnet, route));
        }
    }
    for (&mac, &node) in &observed.forwarding {
        if wanted.forwarding.get(&mac) != Some(&node) {
            steps.push(Change::DeleteForwarding(mac, node));
        }
    }
    for (&address, &mac) in &observed.neighbours {
        if !wanted.neighbours.contains_key(&address) {
            steps.push(Change::DeleteNeighbour(address, mac));
        }
    }
    steps.extend(missing(&wanted.neighbours, &observed.neighbours).map(|(ip, mac)| Change::SetNeighbour(ip, mac)));
    steps.extend(missing(&wanted.forwarding, &observed.forwarding).map(|(mac, ip)| Change::SetForwarding(mac, ip)));
    steps.extend(missing(&wanted.routes, &observed.routes).map(|(net, route)| Change::SetRoute(net, route)));
    steps
}

fn missing<'a, K: Copy + Ord, V: Copy + PartialEq>(
    wanted: &'a BTreeMap<K, V>,
    observed: &'a BTreeMap<K, V>,
) -> impl Iterator<Item = (K, V)> + 'a {
    wanted.iter().filter(|(key, value)| observed.get(key) != Some(value)).map(|(&key, &value)| (key, value))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: Mac = Mac([2, 0, 0, 0, 0, 9]);

    fn device() -> VxlanDevice {
        VxlanDevice {
            name: "flannel.1".to_owned(),
            vni: 1,
            port: 8472,
            mtu: 1450,
            mac: Mac([2, 0, 0, 0, 0, 1]),
            gbp: false,
            learning: false,
            local: Ipv4Addr::new(10, 99, 0, 2),
            link: 2,
            address: Ipv4Addr::new(10, 244, 1, 0),
        }
    }

    fn wanted() -> DataPlane {
        let overlay = Ipv4Addr::new(10, 244, 2, 0);
        DataPlane {
            device: Some(device()),
            routes: [("10.244.2.0/24".parse().unwrap(), Route { gateway: overlay, via: Via::Overlay })].into(),
            neighbours: [(overlay, MAC)].into(),
            forwarding: [(MAC, Ipv4Addr::new(10, 99, 0, 3))].into(),
        }
    }

    fn observe(plane: DataPlane) -> Observed {
        let DataPlane { device, routes, neighbours, forwarding } = plane;
        Observed { device, routes, neighbours, forwarding }
    }

    #[test]
    fn nothing_to_do_when_all_is_right() {
        assert_eq!(changes(&wanted(), &observe(wanted())), vec![]);
    }

    #[test]
    fn a_new_device_comes_first_and_the_route_last() {
        assert_eq!(changes(&wanted(), &Observed::default()), [Change::EnsureDevice(device())]);
        let bare = Observed { device: Some(device()), ..Observed::default() };
        let steps = changes(&wanted(), &bare);
        assert_eq!(steps.len(), 3);
        assert!(matches!(steps[2], Change::SetRoute(..)));
    }

    #[test]
    fn a_node_that_left_is_removed_route_first() {
        let mut plane = wanted();
        plane.routes.clear();
        plane.neighbours.clear();
        plane.forwarding.clear();
        let steps = changes(&plane, &observe(wanted()));
        assert_eq!(steps.len(), 3);
        assert!(matches!(steps[0], Change::DeleteRoute(..)));
    }

    #[test]
    fn a_node_with_a_new_address_replaces_its_forwarding_entry() {
        let mut plane = wanted();
        let node = Ipv4Addr::new(10, 99, 0, 7);
        plane.forwarding.insert(MAC, node);
        assert_eq!(
            changes(&plane, &observe(wanted())),
            [Change::DeleteForwarding(MAC, Ipv4Addr::new(10, 99, 0, 3)), Change::SetForwarding(MAC, node)]
        );
    }
}
