//! The data plane as a value, and the difference between what is wanted and what there is.
//!
//! Only entries that are recognisably flannel's are ever removed: on its own devices everything, on the external
//! interface only gateway routes to whole subnets inside the pod network.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};

use ipnet::{IpNet, Ipv4Net};

use crate::commands::Commands;
use crate::keys::{Key, PrivateKey};
use crate::mac::Mac;

/// What this node should have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DataPlane {
    /// Whether the backend routes. Otherwise somebody else does, and no route on the external interface is touched.
    pub routed: bool,
    pub devices: Vec<DevicePlane>,
    /// The way to each other node's subnet.
    pub routes: BTreeMap<IpNet, Route>,
    /// What the extension backend runs.
    pub commands: Commands,
}

/// A device of ours and what it knows about the other nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DevicePlane {
    pub device: Device,
    pub tables: Tables,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    pub name: String,
    pub mtu: u32,
    /// The device's own addresses, each of a single host so that no broadcast routes appear.
    pub addresses: BTreeSet<IpNet>,
    pub kind: DeviceKind,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    Vxlan(VxlanLink),
    Ipip {
        /// Source address of the encapsulated packets.
        local: Ipv4Addr,
    },
    Wireguard {
        key: PrivateKey,
        port: u16,
    },
    /// Ends in this process, which is the udp backend's data path.
    Tun {
        /// Where this node sends and receives.
        local: SocketAddrV4,
        /// Whom the process answers for when there is no route.
        address: Ipv4Addr,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VxlanLink {
    pub vni: u32,
    pub port: u16,
    pub mac: Mac,
    pub gbp: bool,
    pub learning: bool,
    /// Source address and interface of the encapsulated packets.
    pub local: IpAddr,
    pub link: u32,
}

/// The entries behind a device; each kind of device uses its own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tables {
    /// vxlan: overlay address → hardware address.
    pub neighbours: BTreeMap<IpAddr, Mac>,
    /// vxlan: hardware address → node.
    pub forwarding: BTreeMap<Mac, IpAddr>,
    /// wireguard: the other nodes by their keys.
    pub peers: BTreeMap<Key, Peer>,
    /// udp: subnet → node.
    pub tunnel: BTreeMap<Ipv4Net, SocketAddrV4>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    pub endpoint: SocketAddr,
    pub allowed: BTreeSet<IpNet>,
    pub psk: Option<Key>,
    /// Seconds; 0 is never.
    pub keepalive: u16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Route {
    pub gateway: Option<IpAddr>,
    pub via: Via,
}

/// Where a route leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Via {
    /// Our device with this place in the plan; a gateway is declared on-link.
    Device(usize),
    /// The external interface.
    Underlay,
    /// Nowhere: what is left of our own subnet when no pod and no bridge wants it.
    Blackhole,
}

/// What there is now, reduced to what can be flannel's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observed {
    /// For each wanted device its tables, or `None` when it is missing, down or has other settings.
    pub devices: Vec<Option<Tables>>,
    pub routes: BTreeSet<(IpNet, Route)>,
}

/// One step towards the wanted data plane. The numbers are places in the plan's devices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Creates the device, or recreates it when one with other settings has its name; everything on it is gone then.
    EnsureDevice(usize),
    DeleteRoute(IpNet, Route),
    DeleteForwarding(usize, Mac, IpAddr),
    DeleteNeighbour(usize, IpAddr, Mac),
    DeletePeer(usize, Key),
    SetNeighbour(usize, IpAddr, Mac),
    SetForwarding(usize, Mac, IpAddr),
    SetPeer(usize, Key),
    SetTunnel(usize),
    SetRoute(IpNet, Route),
}

impl Change {
    /// Whether it is done when there is nothing to remove: somebody else was faster.
    pub fn removes(&self) -> bool {
        matches!(
            self,
            Self::DeleteRoute(..) | Self::DeleteForwarding(..) | Self::DeleteNeighbour(..) | Self::DeletePeer(..)
        )
    }
}

/// The steps from `observed` to `wanted`, in an order in which no packet is routed to a neighbour that is not known yet.
/// Devices that are not right yet are the only steps: what else is needed shows when everything is observed again.
pub fn changes(wanted: &DataPlane, observed: &Observed) -> Vec<Change> {
    let right = |number: &usize| observed.devices.get(*number).is_some_and(Option::is_some);
    let devices: Vec<Change> =
        (0..wanted.devices.len()).filter(|number| !right(number)).map(Change::EnsureDevice).collect();
    if !devices.is_empty() {
        return devices;
    }
    let mut steps = Vec::new();
    for &(subnet, route) in &observed.routes {
        let ours = wanted.routed || route.via != Via::Underlay;
        if ours && wanted.routes.get(&subnet) != Some(&route) && !replaced(wanted, observed, subnet, route) {
            steps.push(Change::DeleteRoute(subnet, route));
        }
    }
    let tables = || {
        let pairs = wanted.devices.iter().zip(&observed.devices).enumerate();
        pairs.filter_map(|(number, (plane, has))| has.as_ref().map(|has| (number, &plane.tables, has)))
    };
    for (number, wants, has) in tables() {
        removals(number, wants, has, &mut steps);
    }
    for (number, wants, has) in tables() {
        additions(number, wants, has, &mut steps);
    }
    for (&subnet, &route) in &wanted.routes {
        if !observed.routes.contains(&(subnet, route)) {
            steps.push(Change::SetRoute(subnet, route));
        }
    }
    steps
}

/// Whether setting the wanted route takes this one's place, so that there is never a moment without a way.
fn replaced(wanted: &DataPlane, observed: &Observed, subnet: IpNet, route: Route) -> bool {
    let missing = |wanted: &&Route| !observed.routes.contains(&(subnet, **wanted));
    let sole = observed.routes.iter().filter(|(other, _)| *other == subnet).count() == 1;
    sole && route.via != Via::Blackhole
        && wanted.routes.get(&subnet).filter(missing).is_some_and(|new| new.via != Via::Blackhole)
}

fn removals(number: usize, wants: &Tables, has: &Tables, steps: &mut Vec<Change>) {
    for (&mac, &node) in &has.forwarding {
        if wants.forwarding.get(&mac) != Some(&node) {
            steps.push(Change::DeleteForwarding(number, mac, node));
        }
    }
    for (&address, &mac) in &has.neighbours {
        if !wants.neighbours.contains_key(&address) {
            steps.push(Change::DeleteNeighbour(number, address, mac));
        }
    }
    for key in has.peers.keys().filter(|key| !wants.peers.contains_key(key)) {
        steps.push(Change::DeletePeer(number, *key));
    }
}

fn additions(number: usize, wants: &Tables, has: &Tables, steps: &mut Vec<Change>) {
    let neighbours = missing(&wants.neighbours, &has.neighbours);
    steps.extend(neighbours.map(|(&address, &mac)| Change::SetNeighbour(number, address, mac)));
    let forwarding = missing(&wants.forwarding, &has.forwarding);
    steps.extend(forwarding.map(|(&mac, &node)| Change::SetForwarding(number, mac, node)));
    steps.extend(missing(&wants.peers, &has.peers).map(|(&key, _)| Change::SetPeer(number, key)));
    if wants.tunnel != has.tunnel {
        steps.push(Change::SetTunnel(number));
    }
}

fn missing<'a, K: Ord, V: PartialEq>(
    wanted: &'a BTreeMap<K, V>,
    observed: &'a BTreeMap<K, V>,
) -> impl Iterator<Item = (&'a K, &'a V)> {
    wanted.iter().filter(|(key, value)| observed.get(key) != Some(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: Mac = Mac([2, 0, 0, 0, 0, 9]);

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn wanted() -> DataPlane {
        let overlay = ip("10.244.2.0");
        let link = VxlanLink {
            vni: 1,
            port: 8472,
            mac: Mac([2, 0, 0, 0, 0, 1]),
            gbp: false,
            learning: false,
            local: ip("10.99.0.2"),
            link: 2,
        };
        let device = Device {
            name: "flannel.1".to_owned(),
            mtu: 1450,
            addresses: [net("10.244.1.0/32")].into(),
            kind: DeviceKind::Vxlan(link),
        };
        let tables = Tables {
            neighbours: [(overlay, MAC)].into(),
            forwarding: [(MAC, ip("10.99.0.3"))].into(),
            ..Tables::default()
        };
        DataPlane {
            routed: true,
            devices: vec![DevicePlane { device, tables }],
            routes: [(net("10.244.2.0/24"), Route { gateway: Some(overlay), via: Via::Device(0) })].into(),
            commands: Commands::default(),
        }
    }

    fn observe(plane: DataPlane) -> Observed {
        Observed {
            devices: plane.devices.into_iter().map(|plane| Some(plane.tables)).collect(),
            routes: plane.routes.into_iter().collect(),
        }
    }

    #[test]
    fn nothing_to_do_when_all_is_right() {
        assert_eq!(changes(&wanted(), &observe(wanted())), vec![]);
    }

    #[test]
    fn a_new_device_comes_first_and_the_route_last() {
        assert_eq!(changes(&wanted(), &Observed::default()), [Change::EnsureDevice(0)]);
        let bare = Observed { devices: vec![Some(Tables::default())], ..Observed::default() };
        let steps = changes(&wanted(), &bare);
        assert_eq!(steps.len(), 3);
        assert!(matches!(steps[2], Change::SetRoute(..)));
    }

    #[test]
    fn a_node_that_left_is_removed_route_first() {
        let mut plane = wanted();
        plane.routes.clear();
        plane.devices[0].tables = Tables::default();
        let steps = changes(&plane, &observe(wanted()));
        assert_eq!(steps.len(), 3);
        assert!(matches!(steps[0], Change::DeleteRoute(..)));
        assert!(steps.iter().all(Change::removes));
    }

    #[test]
    fn a_node_with_a_new_address_replaces_its_forwarding_entry() {
        let mut plane = wanted();
        let node = ip("10.99.0.7");
        plane.devices[0].tables.forwarding.insert(MAC, node);
        assert_eq!(
            changes(&plane, &observe(wanted())),
            [Change::DeleteForwarding(0, MAC, ip("10.99.0.3")), Change::SetForwarding(0, MAC, node)]
        );
    }

    #[test]
    fn a_wrong_route_is_replaced_and_a_second_one_removed() {
        let subnet = net("10.244.2.0/24");
        let wrong = Route { gateway: Some(ip("10.99.0.9")), via: Via::Underlay };
        let right = wanted().routes[&subnet];
        let mut observed = observe(wanted());
        observed.routes.insert((subnet, wrong));
        assert_eq!(changes(&wanted(), &observed), [Change::DeleteRoute(subnet, wrong)]);
        observed.routes.remove(&(subnet, right));
        assert_eq!(changes(&wanted(), &observed), [Change::SetRoute(subnet, right)]);
    }

    #[test]
    fn where_somebody_else_routes_nothing_is_removed() {
        let foreign = Route { gateway: Some(ip("10.99.0.9")), via: Via::Underlay };
        let blackhole = Route { gateway: None, via: Via::Blackhole };
        let observed = Observed {
            devices: vec![],
            routes: [(net("10.244.2.0/24"), foreign), (net("10.244.1.0/24"), blackhole)].into(),
        };
        assert_eq!(changes(&DataPlane::default(), &observed), [Change::DeleteRoute(net("10.244.1.0/24"), blackhole)]);
        let steps = changes(&DataPlane { routed: true, ..DataPlane::default() }, &observed);
        assert_eq!(steps.len(), 2);
    }

    #[test]
    fn a_tunnel_gets_its_table_as_a_whole() {
        let mut plane = wanted();
        let node = "10.99.0.3:8285".parse().unwrap();
        plane.devices[0].tables.tunnel.insert("10.244.2.0/24".parse().unwrap(), node);
        assert_eq!(changes(&plane, &observe(wanted())), [Change::SetTunnel(0)]);
    }
}
