//! wireguard: packets between nodes are encrypted by the kernel. Needs the kernel's wireguard driver.
//!
//! The whole network is routed to the device, and each node is a peer that may send from its subnets. In dual stack
//! there is a tunnel for each family, or one for both, whose packets travel over the family that `Mode` says.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::family::{Family, host};
use crate::interface::ExternalInterface;
use crate::keys::{Key, PrivateKey};
use crate::lease::{Lease, LeaseAttributes, LeaseSet, Subnets};
use crate::network::{NetworkConfig, WireguardConfig, WireguardMode};

use super::{
    Backend, BackendError, DataPlane, Device, DeviceKind, DevicePlane, Peer, Route, Tables, Via, inner_mtu,
    plain_attributes,
};

/// An outer IPv6 header, UDP, WireGuard's own header and the authentication tag.
const OVERHEAD: u32 = 80;

pub struct Wireguard {
    config: WireguardConfig,
    /// The pod networks, in the order of their families.
    networks: Vec<IpNet>,
    interface: ExternalInterface,
    key: PrivateKey,
    mtu: u32,
    tunnels: Vec<Tunnel>,
}

/// A device, and the families that travel in it.
struct Tunnel {
    name: &'static str,
    port: u16,
    families: Vec<Family>,
}

/// `BackendData` of the wireguard backend.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "PascalCase")]
struct WireguardData {
    public_key: Key,
    /// Zero from versions that did not publish it: the reader's own port then.
    #[serde(default)]
    port: u16,
}

impl Wireguard {
    pub fn new(
        config: WireguardConfig,
        network: &NetworkConfig,
        interface: ExternalInterface,
        key: PrivateKey,
    ) -> Result<Self, BackendError> {
        let outer = if config.mtu == 0 { interface.mtu } else { config.mtu };
        let mtu = inner_mtu("wireguard", outer, OVERHEAD)?;
        let families: Vec<Family> = network.families().collect();
        let tunnels = match config.mode {
            WireguardMode::Separate => {
                let tunnel = |&family: &Family| match family {
                    Family::V4 => Tunnel { name: "flannel-wg", port: config.port, families: vec![family] },
                    Family::V6 => Tunnel { name: "flannel-wg-v6", port: config.port_v6, families: vec![family] },
                };
                families.iter().map(tunnel).collect()
            }
            _ => vec![Tunnel { name: "flannel-wg", port: config.port, families }],
        };
        let networks = network.pools().map(|pool| pool.network).collect();
        Ok(Self { config, networks, interface, key, mtu, tunnels })
    }

    fn data(&self, family: Family) -> Option<serde_json::Value> {
        let port = match family {
            Family::V4 => self.config.port,
            Family::V6 => self.config.port_v6,
        };
        let present = self.networks.iter().any(|network| Family::of_net(*network) == family);
        let data = WireguardData { public_key: self.key.public(), port };
        serde_json::to_value(data).ok().filter(|_| present)
    }

    fn peer(&self, tunnel: &Tunnel, subnets: &Subnets, attributes: &LeaseAttributes) -> Option<(Key, Peer)> {
        let data = |family| attributes.data::<WireguardData>(family);
        let key = tunnel.families.iter().find_map(|&family| data(family))?.public_key;
        let over = match self.config.mode {
            WireguardMode::Separate => *tunnel.families.first()?,
            WireguardMode::Ipv4 => Family::V4,
            WireguardMode::Ipv6 => Family::V6,
            WireguardMode::Auto => self.likelier(attributes),
        };
        let published = data(over).map(|data| data.port).filter(|&port| port != 0);
        let endpoint = SocketAddr::new(attributes.public(over)?, published.unwrap_or(tunnel.port));
        let allowed: BTreeSet<IpNet> = tunnel.families.iter().filter_map(|&family| subnets.get(family)).collect();
        let (psk, keepalive) = (self.config.psk.map(Key), self.config.keepalive);
        (!allowed.is_empty()).then_some((key, Peer { endpoint, allowed, psk, keepalive }))
    }

    /// IPv4 unless the peer's IPv4 address is private and both sides have a public IPv6 address.
    fn likelier(&self, attributes: &LeaseAttributes) -> Family {
        let Some(IpAddr::V6(theirs)) = attributes.public(Family::V6) else { return Family::V4 };
        let Some(ours) = self.interface.public_ipv6() else { return Family::V4 };
        let ipv4 = attributes.public_ip;
        let ipv4_is_public = !ipv4.is_private() && !ipv4.is_unspecified() && self.interface.ipv4.is_some();
        if !ipv4_is_public && !theirs.is_unique_local() && !ours.is_unique_local() { Family::V6 } else { Family::V4 }
    }
}

impl Backend for Wireguard {
    fn attributes(&self) -> LeaseAttributes {
        LeaseAttributes {
            backend_data: self.data(Family::V4),
            backend_v6_data: self.data(Family::V6),
            ..plain_attributes(&self.interface, "wireguard")
        }
    }

    fn mtu(&self) -> u32 {
        self.mtu
    }

    fn plan(&self, own: &Lease, peers: &LeaseSet) -> DataPlane {
        let mut plane = DataPlane { routed: true, ..DataPlane::default() };
        for (number, tunnel) in self.tunnels.iter().enumerate() {
            let peers = peers.iter().filter(|(_, attributes)| attributes.backend_type == "wireguard");
            let peers = peers.filter_map(|(subnets, attributes)| {
                let peer = self.peer(tunnel, subnets, attributes);
                if peer.is_none() {
                    tracing::warn!(%subnets, "ignoring a wireguard lease without a usable key or address");
                }
                peer
            });
            let tables = Tables { peers: peers.collect(), ..Tables::default() };
            let addresses = tunnel.families.iter().filter_map(|&family| own.subnets.get(family));
            let device = Device {
                name: tunnel.name.to_owned(),
                mtu: self.mtu,
                addresses: addresses.map(|subnet| host(subnet.network())).collect(),
                kind: DeviceKind::Wireguard { key: self.key, port: tunnel.port },
            };
            plane.devices.push(DevicePlane { device, tables });
            for network in self.networks.iter().filter(|net| tunnel.families.contains(&Family::of_net(**net))) {
                plane.routes.insert(*network, Route { gateway: None, via: Via::Device(number) });
            }
        }
        plane
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::testing::{interface, lease, set};
    use super::*;
    use crate::network::BackendConfig;

    fn backend(mode: &str) -> Wireguard {
        let document = json!({"Network": "10.244.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00::/48",
            "Backend": {"Type": "wireguard", "Mode": mode, "PersistentKeepaliveInterval": 25}});
        let network = NetworkConfig::parse(&document.to_string()).unwrap();
        let BackendConfig::Wireguard(config) = network.backend.clone() else { panic!("not wireguard") };
        let directory = tempfile::tempdir().unwrap();
        let key = PrivateKey::load_or_create(&directory.path().join("key")).unwrap();
        Wireguard::new(config, &network, interface(), key).unwrap()
    }

    fn peers(key: Key, public: &[&str]) -> LeaseSet {
        let data = json!({"PublicKey": key, "Port": 7000});
        set(&[lease(&["10.244.2.0/24", "fd00:0:0:2::/64"], public, "wireguard", Some(data))])
    }

    #[test]
    fn separate_tunnels_carry_a_family_each() {
        let (key, backend) = (Key([7; 32]), backend("separate"));
        let own = lease(&["10.244.1.0/24", "fd00:0:0:1::/64"], &["10.99.0.2", "fd99::2"], "wireguard", None);
        let plane = backend.plan(&own, &peers(key, &["10.99.0.3", "fd99::3"]));
        let devices: Vec<&str> = plane.devices.iter().map(|plane| plane.device.name.as_str()).collect();
        assert_eq!(devices, ["flannel-wg", "flannel-wg-v6"]);
        let peer = &plane.devices[1].tables.peers[&key];
        assert_eq!((peer.endpoint.to_string().as_str(), peer.keepalive), ("[fd99::3]:7000", 25));
        assert_eq!(peer.allowed, ["fd00:0:0:2::/64".parse().unwrap()].into());
        assert_eq!((plane.routes.len(), backend.mtu()), (2, 1420));
        let published = backend.attributes().backend_v6_data.unwrap();
        assert_eq!(published["Port"], 51821);
    }

    #[test]
    fn one_tunnel_takes_the_way_that_the_mode_says() {
        let key = Key([7; 32]);
        let own = lease(&["10.244.1.0/24", "fd00:0:0:1::/64"], &["10.99.0.2", "fd99::2"], "wireguard", None);
        for (mode, public, endpoint) in [
            ("ipv4", ["10.99.0.3", "fd99::3"], "10.99.0.3:7000"),
            ("ipv6", ["10.99.0.3", "fd99::3"], "[fd99::3]:7000"),
            ("auto", ["10.99.0.3", "2001:db8::3"], "10.99.0.3:7000"),
        ] {
            let plane = backend(mode).plan(&own, &peers(key, &public));
            assert_eq!(plane.devices.len(), 1);
            let peer = &plane.devices[0].tables.peers[&key];
            assert_eq!((peer.endpoint.to_string().as_str(), peer.allowed.len()), (endpoint, 2), "{mode}");
        }
    }
}
