//! The network configuration that all nodes share: the JSON document under `<prefix>/config` in etcd, or
//! `net-conf.json` in Kubernetes mode. Parsing and checking only; nothing here reads files or etcd.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use serde::Deserialize;
use serde_json::{Map, Value};

#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    #[error("the network configuration is not the JSON object that is expected")]
    Decode(#[source] serde_json::Error),
    #[error("the network configuration has no Network (for example \"10.244.0.0/16\")")]
    NoNetwork,
    #[error("EnableIPv6 is set, but only IPv4 networks are supported")]
    Ipv6,
    #[error("EnableIPv4 is false, but only IPv4 networks are supported")]
    NoIpv4,
    #[error("SubnetLen {0} leaves no room for hosts: it must be at most 30")]
    SubnetTooSmall(u8),
    #[error("Network {network} cannot hold four subnets of length {subnet_len}")]
    NetworkTooSmall { network: Ipv4Net, subnet_len: u8 },
    #[error("{field} {address} is outside of Network {network}")]
    OutsideNetwork { field: &'static str, address: Ipv4Addr, network: Ipv4Net },
    #[error("{field} {address} is not on a boundary of SubnetLen {subnet_len}")]
    Unaligned { field: &'static str, address: Ipv4Addr, subnet_len: u8 },
    #[error("SubnetMin {min} is above SubnetMax {max}")]
    EmptyRange { min: Ipv4Addr, max: Ipv4Addr },
    #[error("backend type {0:?} is not supported; known are vxlan, host-gw and alloc")]
    UnknownBackend(String),
}

/// What all nodes agree on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkConfig {
    /// The pod network of the whole cluster.
    pub network: Ipv4Net,
    /// Prefix length of each node's subnet.
    pub subnet_len: u8,
    /// First and last subnet that may be leased.
    pub subnet_min: Ipv4Addr,
    pub subnet_max: Ipv4Addr,
    /// Masquerade and forward rules go through nftables instead of iptables.
    pub nftables: bool,
    pub backend: BackendConfig,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BackendConfig {
    Vxlan(VxlanConfig),
    HostGw,
    /// Leases only: somebody else routes.
    Alloc,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VxlanConfig {
    pub vni: u32,
    /// UDP port; 8472 (the kernel's own default) when the document has none.
    pub port: u16,
    /// MTU of the underlying interface, over what the interface says.
    pub mtu: Option<u32>,
    pub gbp: bool,
    pub learning: bool,
    /// Route without encapsulation to nodes in the same layer 2 network.
    pub direct_routing: bool,
}

const DEFAULT_VXLAN_PORT: u16 = 8472;

#[derive(Deserialize)]
struct Document {
    network: Option<Ipv4Net>,
    subnetmin: Option<Ipv4Addr>,
    subnetmax: Option<Ipv4Addr>,
    #[serde(default)]
    subnetlen: u8,
    #[serde(default = "yes")]
    enableipv4: bool,
    #[serde(default)]
    enableipv6: bool,
    #[serde(default)]
    enablenftables: bool,
    #[serde(default)]
    backend: Map<String, Value>,
}

#[derive(Deserialize)]
struct BackendDocument {
    #[serde(default = "default_backend", rename = "type")]
    kind: String,
    vni: Option<u32>,
    port: Option<u16>,
    mtu: Option<u32>,
    #[serde(default)]
    gbp: bool,
    #[serde(default)]
    learning: bool,
    #[serde(default)]
    directrouting: bool,
}

fn yes() -> bool {
    true
}

fn default_backend() -> String {
    "udp".to_owned()
}

impl NetworkConfig {
    /// Reads the document; names of fields match in any case, as in upstream's reader.
    pub fn parse(text: &str) -> Result<Self, NetworkError> {
        let object: Map<String, Value> = serde_json::from_str(text).map_err(NetworkError::Decode)?;
        let document: Document =
            serde_json::from_value(Value::Object(lower_case_keys(object))).map_err(NetworkError::Decode)?;
        if document.enableipv6 {
            return Err(NetworkError::Ipv6);
        }
        if !document.enableipv4 {
            return Err(NetworkError::NoIpv4);
        }
        let network = document.network.ok_or(NetworkError::NoNetwork)?.trunc();
        let subnet_len = subnet_len(network, document.subnetlen)?;
        let (subnet_min, subnet_max) = subnet_range(network, subnet_len, document.subnetmin, document.subnetmax)?;
        let backend = BackendConfig::parse(document.backend)?;
        Ok(Self { network, subnet_len, subnet_min, subnet_max, nftables: document.enablenftables, backend })
    }

    /// Whether the subnet is one that this network could lease.
    pub fn allows(&self, subnet: Ipv4Net) -> bool {
        subnet.prefix_len() == self.subnet_len
            && subnet.network() == subnet.addr()
            && (self.subnet_min..=self.subnet_max).contains(&subnet.addr())
    }

    /// Every subnet that may be leased, in order.
    pub fn subnets(&self) -> impl Iterator<Item = Ipv4Net> + use<> {
        let (last, subnet_len) = (self.subnet_max, self.subnet_len);
        let mut next = Some(u32::from(self.subnet_min));
        std::iter::from_fn(move || {
            let address = next.filter(|&address| address <= u32::from(last))?;
            next = address.checked_add(1 << (32 - subnet_len));
            Ipv4Net::new(address.into(), subnet_len).ok()
        })
    }
}

impl BackendConfig {
    fn parse(object: Map<String, Value>) -> Result<Self, NetworkError> {
        let document: BackendDocument =
            serde_json::from_value(Value::Object(lower_case_keys(object))).map_err(NetworkError::Decode)?;
        match document.kind.as_str() {
            "vxlan" => Ok(Self::Vxlan(VxlanConfig {
                vni: document.vni.unwrap_or(1),
                port: document.port.filter(|&port| port != 0).unwrap_or(DEFAULT_VXLAN_PORT),
                mtu: document.mtu.filter(|&mtu| mtu != 0),
                gbp: document.gbp,
                learning: document.learning,
                direct_routing: document.directrouting,
            })),
            "host-gw" => Ok(Self::HostGw),
            "alloc" => Ok(Self::Alloc),
            _ => Err(NetworkError::UnknownBackend(document.kind)),
        }
    }
}

fn lower_case_keys(object: Map<String, Value>) -> Map<String, Value> {
    object.into_iter().map(|(key, value)| (key.to_ascii_lowercase(), value)).collect()
}

/// The length asked for, or /24 where at least four of them fit, or a quarter of a smaller network.
fn subnet_len(network: Ipv4Net, asked: u8) -> Result<u8, NetworkError> {
    let subnet_len = match asked {
        0 if network.prefix_len() <= 22 => 24,
        0 => network.prefix_len() + 2,
        asked => asked,
    };
    if asked > 30 {
        return Err(NetworkError::SubnetTooSmall(asked));
    }
    if subnet_len > 30 || subnet_len < network.prefix_len() + 2 {
        return Err(NetworkError::NetworkTooSmall { network, subnet_len });
    }
    Ok(subnet_len)
}

/// The first subnet is left out by default: an interface with the network's own address confuses routing.
fn subnet_range(
    network: Ipv4Net,
    subnet_len: u8,
    min: Option<Ipv4Addr>,
    max: Option<Ipv4Addr>,
) -> Result<(Ipv4Addr, Ipv4Addr), NetworkError> {
    let size = 1_u32 << (32 - subnet_len);
    let check = |field, address: Ipv4Addr| {
        if !network.contains(&address) {
            Err(NetworkError::OutsideNetwork { field, address, network })
        } else if u32::from(address) % size != 0 {
            Err(NetworkError::Unaligned { field, address, subnet_len })
        } else {
            Ok(address)
        }
    };
    let unset = |address: &Ipv4Addr| !address.is_unspecified();
    let min = match min.filter(unset) {
        Some(min) => check("SubnetMin", min)?,
        None => Ipv4Addr::from(u32::from(network.network()) + size),
    };
    let max = match max.filter(unset) {
        Some(max) => check("SubnetMax", max)?,
        None => Ipv4Addr::from(u32::from(network.broadcast()) - (size - 1)),
    };
    if min > max {
        return Err(NetworkError::EmptyRange { min, max });
    }
    Ok((min, max))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> NetworkConfig {
        NetworkConfig::parse(text).unwrap()
    }

    #[test]
    fn defaults_leave_out_the_first_subnet() {
        let config = parse(r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#);
        assert_eq!(config.subnet_len, 24);
        assert_eq!(config.subnet_min, Ipv4Addr::new(10, 244, 1, 0));
        assert_eq!(config.subnet_max, Ipv4Addr::new(10, 244, 255, 0));
        let BackendConfig::Vxlan(vxlan) = config.backend.clone() else { panic!("not vxlan") };
        assert_eq!((vxlan.vni, vxlan.port, vxlan.direct_routing), (1, 8472, false));
        assert_eq!(config.subnets().count(), 255);
    }

    #[test]
    fn field_names_match_in_any_case() {
        let config = parse(
            r#"{"network":"10.0.0.0/8","subnetlen":20,"SUBNETMIN":"10.10.0.0","SubnetMax":"10.99.0.0",
            "Backend":{"type":"vxlan","VNI":100,"port":8473,"directRouting":true}}"#,
        );
        assert!(config.allows("10.10.16.0/20".parse().unwrap()));
        assert!(!config.allows("10.9.0.0/20".parse().unwrap()));
        assert!(!config.allows("10.10.16.0/24".parse().unwrap()));
        let BackendConfig::Vxlan(vxlan) = config.backend else { panic!("not vxlan") };
        assert_eq!((vxlan.vni, vxlan.port, vxlan.direct_routing), (100, 8473, true));
    }

    #[test]
    fn a_small_network_is_quartered() {
        let config = parse(r#"{"Network":"10.3.0.0/28","Backend":{"Type":"host-gw"}}"#);
        assert_eq!(config.subnet_len, 30);
        assert_eq!(config.subnets().count(), 3);
    }

    #[test]
    fn the_top_of_the_address_space_does_not_overflow() {
        let config = parse(r#"{"Network":"255.255.0.0/16","Backend":{"Type":"host-gw"}}"#);
        assert_eq!(config.subnets().count(), 255);
    }

    #[test]
    fn mistakes_are_named() {
        let cases = [
            (r#"{"Backend":{"Type":"vxlan"}}"#, "no Network"),
            (r#"{"Network":"10.0.0.0/8","SubnetLen":31,"Backend":{"Type":"vxlan"}}"#, "at most 30"),
            (r#"{"Network":"10.0.0.0/24","SubnetLen":25,"Backend":{"Type":"vxlan"}}"#, "four subnets"),
            (r#"{"Network":"10.0.0.0/29","Backend":{"Type":"vxlan"}}"#, "four subnets"),
            (r#"{"Network":"10.0.0.0/8","SubnetMin":"11.0.0.0","Backend":{"Type":"vxlan"}}"#, "outside"),
            (r#"{"Network":"10.0.0.0/8","SubnetMin":"10.0.0.5","Backend":{"Type":"vxlan"}}"#, "boundary"),
            (r#"{"Network":"10.0.0.0/8","Backend":{"Type":"wireguard"}}"#, "wireguard"),
            (r#"{"Network":"10.0.0.0/8"}"#, "udp"),
            (r#"{"Network":"10.0.0.0/8","EnableIPv6":true}"#, "IPv6"),
            ("[]", "JSON object"),
        ];
        for (text, expected) in cases {
            let error = NetworkConfig::parse(text).unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}
