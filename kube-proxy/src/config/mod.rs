//! What the proxy needs to know, checked: from flags ([`Options`]) or from a `KubeProxyConfiguration` file. Fields and
//! flags for platforms and modes that do not exist here are accepted and ignored, so that existing files work.

mod document;
mod flags;
mod values;

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use clap::ValueEnum;
use ipnet::IpNet;

pub use flags::Options;

use crate::model::{Family, Node};
use crate::nftables::{LocalTraffic, Settings};

#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read {path}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{path} is not a KubeProxyConfiguration")]
    Decode { path: PathBuf, source: Box<serde_saphyr::Error> },
    #[error("{path} has kind {found:?} instead of KubeProxyConfiguration")]
    Kind { path: PathBuf, found: String },
    #[error("{field}: {value:?} is not {expected}")]
    Value { field: &'static str, value: String, expected: &'static str },
    #[error("cannot find out the name of this host; use --hostname-override")]
    HostName(#[source] nix::Error),
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    #[default]
    Iptables,
    Nftables,
}

impl Mode {
    /// The word for configuration files and for /proxyMode.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Nftables => "nftables",
            Self::Iptables => "iptables",
        }
    }
}

/// Which of the node's addresses answer on node ports: those in the networks, and the node's internal IPs if
/// `primary`. All addresses of a family for which that says nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodePortAddresses {
    pub primary: bool,
    pub networks: Vec<IpNet>,
}

/// How traffic of this node's pods is recognised.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DetectLocal {
    /// By their addresses, from these networks; at most one of each family counts.
    ClusterCidr(Vec<IpNet>),
    /// By their addresses, from the node's `podCIDRs`.
    NodeCidr,
    BridgeInterface(String),
    InterfaceNamePrefix(String),
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Conntrack {
    pub max_per_core: u64,
    pub min: u64,
    pub tcp_established: Option<Duration>,
    pub tcp_close_wait: Option<Duration>,
    pub udp: Option<Duration>,
    pub udp_stream: Option<Duration>,
    pub tcp_be_liberal: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    pub mode: Mode,
    pub node_name: String,
    pub kubeconfig: Option<PathBuf>,
    pub detect_local: DetectLocal,
    pub mark: u32,
    pub masquerade_all: bool,
    /// In iptables mode, node ports answer on 127.0.0.1, too.
    pub localhost_node_ports: bool,
    pub node_port_addresses: NodePortAddresses,
    /// At least so long between two changes of the kernel.
    pub min_sync: Duration,
    /// How often it is checked that the rules are still there.
    pub sync: Duration,
    pub healthz: Option<SocketAddr>,
    pub metrics: Option<SocketAddr>,
    pub conntrack: Conntrack,
}

impl Config {
    /// The configuration for one family, together with what only the running node knows.
    pub fn settings(&self, family: Family, node: &Node, node_addresses: impl FnOnce() -> Vec<IpAddr>) -> Settings {
        let same = |net: &&IpNet| Family::of(net.addr()) == family;
        let own = |nets: &[IpNet]| nets.iter().find(same).copied().map_or(LocalTraffic::Unknown, LocalTraffic::Network);
        Settings {
            family,
            mark: self.mark,
            masquerade_all: self.masquerade_all,
            local_traffic: match &self.detect_local {
                DetectLocal::ClusterCidr(nets) => own(nets),
                DetectLocal::NodeCidr => own(&node.pod_cidrs),
                DetectLocal::BridgeInterface(name) => LocalTraffic::Interface(name.clone()),
                DetectLocal::InterfaceNamePrefix(prefix) => LocalTraffic::InterfacePrefix(prefix.clone()),
            },
            node_port_addresses: self.node_port_addresses.of(family, node, node_addresses),
        }
    }
}

impl NodePortAddresses {
    /// `None` means all.
    fn of(&self, family: Family, node: &Node, all: impl FnOnce() -> Vec<IpAddr>) -> Option<Vec<IpAddr>> {
        let internal = node.internal_ips.iter().filter(|address| self.primary && !address.is_loopback());
        let primary = internal.map(|address| IpNet::from(*address));
        let networks: Vec<IpNet> =
            self.networks.iter().copied().chain(primary).filter(|net| Family::of(net.addr()) == family).collect();
        if networks.is_empty() || networks.iter().any(|net| net.prefix_len() == 0) {
            return None;
        }
        let mut addresses: Vec<IpAddr> =
            all().into_iter().filter(|address| networks.iter().any(|net| net.contains(address))).collect();
        // A single address is meant even before the interface has it.
        addresses.extend(networks.iter().filter(|net| net.prefix_len() == net.max_prefix_len()).map(IpNet::addr));
        addresses.sort();
        addresses.dedup();
        Some(addresses)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn node_port_addresses_of_a_family() {
        let node = Node { internal_ips: vec!["10.0.0.5".parse().unwrap()], ..Node::default() };
        let has = || vec!["10.0.0.5".parse().unwrap(), "192.168.1.1".parse().unwrap(), "fd00::1".parse().unwrap()];
        for (primary, networks, family, expected) in [
            (false, &[][..], Family::Ipv4, None),
            (true, &[], Family::Ipv4, Some(&["10.0.0.5"][..])),
            (true, &[], Family::Ipv6, None),
            (false, &["192.168.0.0/16"], Family::Ipv4, Some(&["192.168.1.1"])),
            (true, &["192.168.0.0/16"], Family::Ipv4, Some(&["10.0.0.5", "192.168.1.1"])),
            (true, &["0.0.0.0/0"], Family::Ipv4, None),
            (false, &["172.16.0.0/12"], Family::Ipv4, Some(&[])),
        ] {
            let networks = networks.iter().map(|net| net.parse().unwrap()).collect();
            let found = NodePortAddresses { primary, networks }.of(family, &node, has);
            let expected =
                expected.map(|texts| texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<IpAddr>>());
            assert_eq!(found, expected);
        }
    }
}
