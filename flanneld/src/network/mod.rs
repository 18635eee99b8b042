//! The network configuration that all nodes share: the JSON document under `<prefix>/config` in etcd, or
//! `net-conf.json` in Kubernetes mode. Parsing and checking only; nothing here reads files or etcd.

mod backend;
mod pool;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::Deserialize;
use serde_json::{Map, Value};

pub use self::backend::{BackendConfig, ExtensionConfig, VxlanConfig, WireguardConfig, WireguardMode};
pub use self::pool::Pool;
use crate::family::Family;
use crate::lease::Subnets;

#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    #[error("the network configuration is not the JSON object that is expected")]
    Decode(#[source] serde_json::Error),
    #[error("the network configuration has no Network (for example \"10.244.0.0/16\")")]
    NoNetwork,
    #[error("EnableIPv6 is set, but there is no IPv6Network (for example \"2001:cafe:42::/56\")")]
    NoIpv6Network,
    #[error("EnableIPv4 is false and EnableIPv6 is not set: a network needs one of them")]
    NoFamily,
    #[error("a subnet length of {asked} leaves no room for hosts: it must be at most {longest}")]
    SubnetTooSmall { asked: u8, longest: u8 },
    #[error("network {network} cannot hold four subnets of length {subnet_len}")]
    NetworkTooSmall { network: IpNet, subnet_len: u8 },
    #[error("{field} {address} is outside of the network {network}")]
    OutsideNetwork { field: &'static str, address: IpAddr, network: IpNet },
    #[error("{field} {address} is not on a boundary of subnets of length {subnet_len}")]
    Unaligned { field: &'static str, address: IpAddr, subnet_len: u8 },
    #[error("the first subnet {min} is above the last {max}")]
    EmptyRange { min: IpAddr, max: IpAddr },
    #[error("the configuration of backend {backend} is wrong")]
    Backend { backend: String, source: serde_json::Error },
    #[error("VNI {0} does not fit into 24 bits")]
    Vni(u32),
    #[error("PSK is not 32 bytes in base64; `wg genpsk` makes one")]
    Psk,
    #[error("backend {backend} carries {family} in no configuration; use vxlan, host-gw or wireguard")]
    Family { backend: &'static str, family: Family },
    #[error("backend type {0:?} is not supported; known are vxlan, host-gw, udp, wireguard, ipip, extension and alloc")]
    UnknownBackend(String),
}

/// What all nodes agree on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkConfig {
    pub ipv4: Option<Pool>,
    pub ipv6: Option<Pool>,
    /// Masquerade and forward rules go through nftables instead of iptables.
    pub nftables: bool,
    pub backend: BackendConfig,
}

#[derive(Deserialize)]
struct Document {
    network: Option<Ipv4Net>,
    subnetmin: Option<Ipv4Addr>,
    subnetmax: Option<Ipv4Addr>,
    #[serde(default)]
    subnetlen: u8,
    ipv6network: Option<Ipv6Net>,
    ipv6subnetmin: Option<Ipv6Addr>,
    ipv6subnetmax: Option<Ipv6Addr>,
    #[serde(default)]
    ipv6subnetlen: u8,
    #[serde(default = "yes")]
    enableipv4: bool,
    #[serde(default)]
    enableipv6: bool,
    #[serde(default)]
    enablenftables: bool,
    #[serde(default)]
    backend: Map<String, Value>,
}

fn yes() -> bool {
    true
}

impl Document {
    fn ipv4(&self) -> Result<Option<Pool>, NetworkError> {
        if !self.enableipv4 {
            return Ok(None);
        }
        let network = self.network.ok_or(NetworkError::NoNetwork)?.into();
        let (min, max) = (self.subnetmin.map(IpAddr::V4), self.subnetmax.map(IpAddr::V4));
        Pool::new(&pool::Asked { network, subnet_len: self.subnetlen, min, max }).map(Some)
    }

    fn ipv6(&self) -> Result<Option<Pool>, NetworkError> {
        if !self.enableipv6 {
            return Ok(None);
        }
        let network = self.ipv6network.ok_or(NetworkError::NoIpv6Network)?.into();
        let (min, max) = (self.ipv6subnetmin.map(IpAddr::V6), self.ipv6subnetmax.map(IpAddr::V6));
        Pool::new(&pool::Asked { network, subnet_len: self.ipv6subnetlen, min, max }).map(Some)
    }
}

impl NetworkConfig {
    /// Reads the document; names of fields match in any case, as in upstream's reader.
    pub fn parse(text: &str) -> Result<Self, NetworkError> {
        let object: Map<String, Value> = serde_json::from_str(text).map_err(NetworkError::Decode)?;
        let document: Document =
            serde_json::from_value(Value::Object(lower_case_keys(object))).map_err(NetworkError::Decode)?;
        let (ipv4, ipv6) = (document.ipv4()?, document.ipv6()?);
        let backend = BackendConfig::parse(document.backend)?;
        let config = Self { ipv4, ipv6, nftables: document.enablenftables, backend };
        if config.families().next().is_none() {
            return Err(NetworkError::NoFamily);
        }
        if let Some(backend) = config.backend.only_ipv4()
            && config.ipv6.is_some()
        {
            return Err(NetworkError::Family { backend, family: Family::V6 });
        }
        Ok(config)
    }

    pub fn pool(&self, family: Family) -> Option<&Pool> {
        match family {
            Family::V4 => self.ipv4.as_ref(),
            Family::V6 => self.ipv6.as_ref(),
        }
    }

    pub fn pools(&self) -> impl Iterator<Item = &Pool> {
        self.ipv4.iter().chain(&self.ipv6)
    }

    pub fn families(&self) -> impl Iterator<Item = Family> {
        self.pools().map(Pool::family)
    }

    /// Whether the subnets are ones that this network could lease.
    pub fn allows(&self, subnets: &Subnets) -> bool {
        Family::BOTH.into_iter().all(|family| match (self.pool(family), subnets.get(family)) {
            (Some(pool), Some(subnet)) => pool.allows(subnet),
            (None, None) => true,
            _ => false,
        })
    }

    /// Whether the subnet is a part of the pod network.
    pub fn contains(&self, subnet: IpNet) -> bool {
        self.pool(Family::of_net(subnet)).is_some_and(|pool| pool.network.contains(&subnet))
    }
}

fn lower_case_keys(object: Map<String, Value>) -> Map<String, Value> {
    object.into_iter().map(|(key, value)| (key.to_ascii_lowercase(), value)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn field_names_match_in_any_case() {
        let config = NetworkConfig::parse(
            r#"{"network":"10.0.0.0/8","subnetlen":20,"SUBNETMIN":"10.10.0.0","SubnetMax":"10.99.0.0",
            "Backend":{"type":"vxlan","VNI":100,"port":8473,"directRouting":true}}"#,
        )
        .unwrap();
        let allows = |net: &str| config.allows(&Subnets::default().with(net.parse().unwrap()));
        assert!(allows("10.10.16.0/20"));
        assert!(!allows("10.9.0.0/20"));
        assert!(!allows("10.10.16.0/24"));
        let BackendConfig::Vxlan(vxlan) = config.backend else { panic!("not vxlan") };
        assert_eq!((vxlan.vni, vxlan.port, vxlan.direct_routing), (100, 8473, true));
    }

    #[test]
    fn both_families_or_one() {
        let parse = |text: &str| NetworkConfig::parse(text).unwrap();
        let dual =
            parse(r#"{"Network":"10.0.0.0/8","EnableIPv6":true,"IPv6Network":"fd00::/48","Backend":{"Type":"vxlan"}}"#);
        let subnets = Subnets::default().with("10.1.0.0/24".parse().unwrap());
        assert!(!dual.allows(&subnets));
        assert!(dual.allows(&subnets.with("fd00:0:0:7::/64".parse().unwrap())));
        let alone =
            parse(r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00::/48","Backend":{"Type":"host-gw"}}"#);
        assert_eq!(alone.families().collect::<Vec<_>>(), [Family::V6]);
    }

    #[test]
    fn mistakes_are_named() {
        let cases = [
            (r#"{"Backend":{"Type":"vxlan"}}"#, "no Network"),
            (r#"{"Network":"10.0.0.0/8","SubnetLen":31,"Backend":{"Type":"vxlan"}}"#, "at most 30"),
            (r#"{"Network":"10.0.0.0/24","SubnetLen":25,"Backend":{"Type":"vxlan"}}"#, "four subnets"),
            (r#"{"Network":"10.0.0.0/29","Backend":{"Type":"vxlan"}}"#, "four subnets"),
            (r#"{"Network":"10.0.0.0/8","SubnetMin":"11.0.0.0","Backend":{"Type":"vxlan"}}"#, "SubnetMin 11.0.0.0"),
            (r#"{"Network":"10.0.0.0/8","SubnetMin":"10.0.0.5","Backend":{"Type":"vxlan"}}"#, "boundary"),
            (
                r#"{"Network":"10.0.0.0/8","SubnetMin":"10.9.0.0","SubnetMax":"10.8.0.0","Backend":{"Type":"vxlan"}}"#,
                "above the last",
            ),
            (r#"{"Network":"10.0.0.0/8","Backend":{"Type":"ipsec"}}"#, "ipsec"),
            (r#"{"Network":"10.0.0.0/8","Backend":{"Type":"vxlan","VNI":16777216}}"#, "24 bits"),
            (r#"{"Network":"10.0.0.0/8","Backend":{"Type":"vxlan","VNI":"one"}}"#, "backend vxlan is wrong"),
            (r#"{"Network":"10.0.0.0/8","Backend":{"Type":"wireguard","PSK":"short"}}"#, "PSK"),
            (r#"{"Network":"10.0.0.0/8","EnableIPv6":true}"#, "no IPv6Network"),
            (r#"{"Network":"10.0.0.0/8","EnableIPv6":true,"IPv6Network":"fd00::/125"}"#, "four subnets"),
            (r#"{"Network":"10.0.0.0/8","EnableIPv6":true,"IPv6Network":"fd00::/48"}"#, "udp carries IPv6 in no"),
            (r#"{"EnableIPv4":false}"#, "needs one of them"),
            ("[]", "JSON object"),
        ];
        for (text, expected) in cases {
            let error = NetworkConfig::parse(text).unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}
