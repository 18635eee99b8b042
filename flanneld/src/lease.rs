//! Leases: which node has which subnets, and the exact JSON and key that other flannel daemons on the same etcd read.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::family::{Family, overlap};
use crate::mac::Mac;
use crate::network::NetworkConfig;

/// The subnets of one node: one in each address family that the network has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Subnets {
    pub ipv4: Option<Ipv4Net>,
    pub ipv6: Option<Ipv6Net>,
}

impl Subnets {
    pub fn with(mut self, subnet: IpNet) -> Self {
        match subnet {
            IpNet::V4(net) => self.ipv4 = Some(net),
            IpNet::V6(net) => self.ipv6 = Some(net),
        }
        self
    }

    pub fn get(&self, family: Family) -> Option<IpNet> {
        match family {
            Family::V4 => self.ipv4.map(IpNet::V4),
            Family::V6 => self.ipv6.map(IpNet::V6),
        }
    }

    pub fn iter(&self) -> impl Iterator<Item = IpNet> + use<> {
        let subnets = *self;
        Family::BOTH.into_iter().filter_map(move |family| subnets.get(family))
    }

    pub fn overlaps(&self, other: &Self) -> bool {
        self.iter().any(|mine| other.iter().any(|theirs| overlap(mine, theirs)))
    }

    /// The last part of a lease's etcd key: `10.244.1.0-24`, in dual stack `10.244.1.0-24&fd00:1::-64`. Upstream's
    /// readers insist on an IPv4 part, so a network of IPv6 alone has the unspecified one there.
    pub fn key(&self) -> String {
        let part = |net: IpNet| format!("{}-{}", net.network(), net.prefix_len());
        let ipv4 = self.ipv4.map_or_else(|| "0.0.0.0-0".to_owned(), |net| part(net.into()));
        match self.ipv6 {
            Some(net) => format!("{ipv4}&{}", part(net.into())),
            None => ipv4,
        }
    }

    /// Reads the last part of a lease's etcd key.
    pub fn parse_key(key: &str) -> Option<Self> {
        let part = |text: &str| -> Option<IpNet> {
            let (address, length) = text.rsplit_once('-')?;
            IpNet::new(address.parse().ok()?, length.parse().ok()?).ok()
        };
        let (ipv4, ipv6) = match key.split_once('&') {
            Some((ipv4, ipv6)) => (part(ipv4)?, Some(part(ipv6)?)),
            None => (part(key)?, None),
        };
        let (IpNet::V4(ipv4), None | Some(IpNet::V6(_))) = (ipv4, ipv6) else { return None };
        let absent = ipv4.prefix_len() == 0 && ipv6.is_some();
        let subnets = if absent { Self::default() } else { Self::default().with(ipv4.into()) };
        Some(ipv6.map_or(subnets, |net| subnets.with(net)))
    }
}

impl fmt::Display for Subnets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.ipv4, self.ipv6) {
            (Some(ipv4), Some(ipv6)) => write!(f, "{ipv4} and {ipv6}"),
            (Some(ipv4), None) => write!(f, "{ipv4}"),
            (None, Some(ipv6)) => write!(f, "{ipv6}"),
            (None, None) => f.write_str("no subnet"),
        }
    }
}

/// What a node publishes about itself beside its subnets. The order of the fields is part of the format.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct LeaseAttributes {
    /// The address under which other nodes reach this one; unspecified in a network of IPv6 alone.
    #[serde(rename = "PublicIP", default = "unspecified")]
    pub public_ip: Ipv4Addr,
    #[serde(rename = "PublicIPv6", default)]
    pub public_ipv6: Option<Ipv6Addr>,
    #[serde(rename = "BackendType", default, skip_serializing_if = "String::is_empty")]
    pub backend_type: String,
    /// What the backend of the other nodes needs to know, for example the MAC address of a VXLAN device.
    #[serde(rename = "BackendData", default, skip_serializing_if = "Option::is_none")]
    pub backend_data: Option<Value>,
    #[serde(rename = "BackendV6Data", default, skip_serializing_if = "Option::is_none")]
    pub backend_v6_data: Option<Value>,
}

fn unspecified() -> Ipv4Addr {
    Ipv4Addr::UNSPECIFIED
}

impl LeaseAttributes {
    /// The address for one family, if the node has published one.
    pub fn public(&self, family: Family) -> Option<IpAddr> {
        match family {
            Family::V4 => Some(self.public_ip).filter(|address| !address.is_unspecified()).map(IpAddr::V4),
            Family::V6 => self.public_ipv6.map(IpAddr::V6),
        }
    }

    /// What identifies the node, across restarts and whichever program runs on it.
    pub fn owner(&self) -> IpAddr {
        self.public(Family::V4).or_else(|| self.public(Family::V6)).unwrap_or(IpAddr::V4(self.public_ip))
    }

    /// The backend's data for one family, if it is there and has the expected form.
    pub fn data<T: DeserializeOwned>(&self, family: Family) -> Option<T> {
        let data = match family {
            Family::V4 => self.backend_data.as_ref(),
            Family::V6 => self.backend_v6_data.as_ref(),
        };
        data.and_then(|data| T::deserialize(data).ok())
    }
}

/// One node's right to its subnets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    pub subnets: Subnets,
    pub attributes: LeaseAttributes,
}

/// All leases of the network, by subnets.
pub type LeaseSet = BTreeMap<Subnets, LeaseAttributes>;

/// Why another node's lease is not followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unusable {
    #[error("{0} is not a part of the network")]
    Outside(IpNet),
    #[error("it overlaps this node's own {0}")]
    OverlapsOwn(Subnets),
    #[error("it overlaps {0}, which another node has")]
    OverlapsOther(Subnets),
}

/// The leases of the other nodes without those that would lead packets astray, and the reasons of these. Where two
/// overlap, the smaller subnet wins: nobody makes one by accident that fits into the gaps of another.
pub fn usable_peers(
    own: &Subnets,
    leases: &LeaseSet,
    network: &NetworkConfig,
) -> (LeaseSet, BTreeMap<Subnets, Unusable>) {
    let mut peers = LeaseSet::new();
    let mut unusable = BTreeMap::new();
    let mut candidates: Vec<(&Subnets, &LeaseAttributes)> = leases.iter().filter(|(other, _)| *other != own).collect();
    candidates.sort_by_key(|(subnets, _)| std::cmp::Reverse(subnets.iter().map(|net| net.prefix_len()).max()));
    for (subnets, attributes) in candidates {
        let outside =
            subnets.iter().find(|net| network.pool(Family::of_net(*net)).is_some() && !network.contains(*net));
        let reason = if let Some(net) = outside {
            Some(Unusable::Outside(net))
        } else if subnets.overlaps(own) {
            Some(Unusable::OverlapsOwn(*own))
        } else {
            peers.keys().find(|other| other.overlaps(subnets)).map(|other| Unusable::OverlapsOther(*other))
        };
        match reason {
            Some(reason) => {
                unusable.insert(*subnets, reason);
            }
            None => {
                peers.insert(*subnets, attributes.clone());
            }
        }
    }
    (peers, unusable)
}

/// `BackendData` of the vxlan backend.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct VxlanData {
    #[serde(rename = "VNI", default)]
    pub vni: u32,
    #[serde(rename = "VtepMAC")]
    pub vtep_mac: Mac,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subnets(nets: &[&str]) -> Subnets {
        nets.iter().fold(Subnets::default(), |all, net| all.with(net.parse().unwrap()))
    }

    #[test]
    fn keys_round_trip() {
        let cases = [
            ("10.244.7.0-24", subnets(&["10.244.7.0/24"])),
            ("10.244.7.0-24&fd00:7::-64", subnets(&["10.244.7.0/24", "fd00:7::/64"])),
            ("0.0.0.0-0&fd00:7::-64", subnets(&["fd00:7::/64"])),
        ];
        for (key, expected) in cases {
            assert_eq!(expected.key(), key);
            assert_eq!(Subnets::parse_key(key), Some(expected), "{key}");
        }
        for bad in ["", "10.244.7.0", "10.244.7.0-33", "x-24", "10.244.7.0-", "fd00::-64", "10.0.0.0-8&10.1.0.0-16"] {
            assert_eq!(Subnets::parse_key(bad), None, "{bad}");
        }
    }

    #[test]
    fn overlap_is_seen_in_either_family() {
        let one = subnets(&["10.244.7.0/24", "fd00:7::/64"]);
        assert!(one.overlaps(&subnets(&["10.244.6.0/23"])));
        assert!(one.overlaps(&subnets(&["10.244.8.0/24", "fd00:7::/80"])));
        assert!(!one.overlaps(&subnets(&["10.244.8.0/24", "fd00:8::/64"])));
    }

    #[test]
    fn the_value_is_what_upstream_writes() {
        let mac = Mac([0xd2, 0x21, 0, 0x3c, 0x5e, 0x11]);
        for text in [
            r#"{"PublicIP":"10.99.0.2","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"d2:21:00:3c:5e:11"}}"#,
            r#"{"PublicIP":"10.99.0.3","PublicIPv6":null,"BackendType":"host-gw"}"#,
            r#"{"PublicIP":"10.99.0.3","PublicIPv6":null}"#,
            r#"{"PublicIP":"0.0.0.0","PublicIPv6":"fd01::2","BackendType":"vxlan","BackendV6Data":{"VNI":1,"VtepMAC":"d2:21:00:3c:5e:11"}}"#,
        ] {
            let attributes: LeaseAttributes = serde_json::from_str(text).unwrap();
            assert_eq!(serde_json::to_string(&attributes).unwrap(), text);
            for family in Family::BOTH {
                if let Some(data) = attributes.data::<VxlanData>(family) {
                    assert_eq!(data.vtep_mac, mac);
                }
            }
        }
    }

    #[test]
    fn leases_that_overlap_are_left_out_with_the_reason() {
        let network = NetworkConfig::parse(r#"{"Network":"10.244.0.0/16","Backend":{"Type":"host-gw"}}"#).unwrap();
        let attributes: LeaseAttributes = serde_json::from_str(r#"{"PublicIP":"10.0.0.1"}"#).unwrap();
        let nets = ["10.244.1.0/24", "10.244.0.0/23", "10.244.4.0/23", "10.244.5.0/24", "10.9.0.0/24", "10.244.8.0/24"];
        let all: LeaseSet = nets.iter().map(|net| (subnets(&[net]), attributes.clone())).collect();
        let own = subnets(&["10.244.1.0/24"]);
        let (peers, unusable) = usable_peers(&own, &all, &network);
        let kept: Vec<String> = peers.keys().map(Subnets::to_string).collect();
        assert_eq!(kept, ["10.244.5.0/24", "10.244.8.0/24"]);
        assert_eq!(unusable[&subnets(&["10.244.0.0/23"])], Unusable::OverlapsOwn(own));
        assert_eq!(unusable[&subnets(&["10.244.4.0/23"])], Unusable::OverlapsOther(subnets(&["10.244.5.0/24"])));
        assert!(matches!(unusable[&subnets(&["10.9.0.0/24"])], Unusable::Outside(_)));
    }

    #[test]
    fn a_node_is_known_by_its_first_address() {
        let read = |text: &str| serde_json::from_str::<LeaseAttributes>(text).unwrap();
        assert_eq!(
            read(r#"{"PublicIP":"10.0.0.1","PublicIPv6":"fd01::2"}"#).owner(),
            "10.0.0.1".parse::<IpAddr>().unwrap()
        );
        assert_eq!(
            read(r#"{"PublicIP":"0.0.0.0","PublicIPv6":"fd01::2"}"#).owner(),
            "fd01::2".parse::<IpAddr>().unwrap()
        );
    }
}
