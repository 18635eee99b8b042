//! The command line: upstream's flags, each of which can also come from the environment as `FLANNELD_<FLAG>`.

use std::ffi::OsString;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::time::Duration;

use apimachinery::process::LogArgs;
use clap::{ArgAction, Parser};

use crate::interface::{InterfaceError, Selection};
use crate::lease::Subnets;
use crate::subnet::{EtcdOptions, KubeOptions};

#[derive(Clone, Debug, Parser)]
#[command(name = "flanneld", version, about = "Connects the pod subnets of all nodes")]
pub struct Options {
    #[command(flatten)]
    pub logs: LogArgs,

    /// Endpoints of etcd, separated by commas.
    #[arg(
        long,
        env = "FLANNELD_ETCD_ENDPOINTS",
        value_delimiter = ',',
        default_value = "http://127.0.0.1:4001,http://127.0.0.1:2379"
    )]
    etcd_endpoints: Vec<String>,
    /// Where the network configuration and the leases are in etcd.
    #[arg(long, env = "FLANNELD_ETCD_PREFIX", default_value = "/coreos.com/network")]
    etcd_prefix: String,
    /// Key of the client certificate for etcd.
    #[arg(long, env = "FLANNELD_ETCD_KEYFILE")]
    etcd_keyfile: Option<PathBuf>,
    /// Client certificate for etcd.
    #[arg(long, env = "FLANNELD_ETCD_CERTFILE")]
    etcd_certfile: Option<PathBuf>,
    /// Certificate authority of etcd's certificates.
    #[arg(long, env = "FLANNELD_ETCD_CAFILE")]
    etcd_cafile: Option<PathBuf>,
    #[arg(long, env = "FLANNELD_ETCD_USERNAME", default_value = "")]
    etcd_username: String,
    #[arg(long, env = "FLANNELD_ETCD_PASSWORD", default_value = "", hide_env_values = true)]
    etcd_password: String,

    /// Interface between the nodes, by name or address; may be given several times, the first that exists is used.
    #[arg(long, env = "FLANNELD_IFACE", value_delimiter = ',')]
    iface: Vec<String>,
    /// Regular expression for an address or name of the interface; used when no --iface matches, may be given several times.
    #[arg(long, env = "FLANNELD_IFACE_REGEX")]
    iface_regex: Vec<String>,
    /// Use the interface that leads to this address.
    #[arg(long, env = "FLANNELD_IFACE_CAN_REACH")]
    iface_can_reach: Option<IpAddr>,
    /// Address under which the other nodes reach this one.
    #[arg(long, env = "FLANNELD_PUBLIC_IP")]
    public_ip: Option<Ipv4Addr>,
    /// IPv6 address under which the other nodes reach this one.
    #[arg(long, env = "FLANNELD_PUBLIC_IPV6")]
    public_ipv6: Option<Ipv6Addr>,

    /// Where to write what the CNI plugin reads.
    #[arg(long, env = "FLANNELD_SUBNET_FILE", default_value = "/run/flannel/subnet.env")]
    pub subnet_file: PathBuf,
    /// Minutes before its expiry at which a lease is renewed.
    #[arg(long, env = "FLANNELD_SUBNET_LEASE_RENEW_MARGIN", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..1440))]
    subnet_lease_renew_margin: u64,

    /// Masquerade traffic that leaves the pod network.
    #[arg(long, env = "FLANNELD_IP_MASQ", action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = false)]
    pub ip_masq: bool,
    /// Do not choose the source ports of masqueraded connections at random.
    #[arg(long, env = "FLANNELD_IP_MASQ_FULLY_RANDOM_DISABLE", action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = false)]
    pub ip_masq_fully_random_disable: bool,
    /// Accept traffic of the pod network in forwarding.
    #[arg(long, env = "FLANNELD_IPTABLES_FORWARD_RULES", action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = true)]
    pub iptables_forward_rules: bool,
    /// Seconds after which the packet filter rules are made sure of again, whatever the kernel reports; by default 60,
    /// and 5 with legacy iptables, whose changes the kernel does not report.
    #[arg(long, env = "FLANNELD_IPTABLES_RESYNC", value_parser = clap::value_parser!(u64).range(1..))]
    pub iptables_resync: Option<u64>,
    /// Refuse packets to addresses of this node's subnet that no pod has, instead of sending them to the default route.
    #[arg(long, env = "FLANNELD_IP_BLACKHOLE_ROUTE", action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = false)]
    pub ip_blackhole_route: bool,

    /// Use the Kubernetes API instead of etcd.
    #[arg(long, env = "FLANNELD_KUBE_SUBNET_MGR", action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = false)]
    pub kube_subnet_mgr: bool,
    /// Address of the Kubernetes API, over what the kubeconfig says.
    #[arg(long, env = "FLANNELD_KUBE_API_URL")]
    pub kube_api_url: Option<String>,
    /// Kubeconfig; without it the pod's service account is used.
    #[arg(long, env = "FLANNELD_KUBECONFIG_FILE")]
    pub kubeconfig_file: Option<PathBuf>,
    /// Prefix of the annotations that flannel writes on nodes.
    #[arg(long, env = "FLANNELD_KUBE_ANNOTATION_PREFIX", default_value = "flannel.alpha.coreos.com")]
    kube_annotation_prefix: String,
    /// Network configuration in Kubernetes mode.
    #[arg(long, env = "FLANNELD_NET_CONFIG_PATH", default_value = "/etc/kube-flannel/net-conf.json")]
    net_config_path: PathBuf,
    /// Set the node's condition NetworkUnavailable to false once flannel runs.
    #[arg(long, env = "FLANNELD_SET_NODE_NETWORK_UNAVAILABLE", action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = true)]
    set_node_network_unavailable: bool,

    /// Address to serve /healthz and /metrics on.
    #[arg(long, env = "FLANNELD_HEALTHZ_IP", default_value = "0.0.0.0")]
    pub healthz_ip: IpAddr,
    /// Port to serve /healthz and /metrics on; 0 switches it off.
    #[arg(long, env = "FLANNELD_HEALTHZ_PORT", default_value_t = 0)]
    pub healthz_port: u16,
}

impl Options {
    /// Reads the process's own arguments, or explains and ends the process.
    pub fn from_process() -> Self {
        Self::parse_from(with_two_dashes(std::env::args_os()))
    }

    pub fn selection(&self) -> Result<Selection, InterfaceError> {
        Ok(Selection {
            interfaces: self.iface.clone(),
            patterns: Selection::compile(&self.iface_regex)?,
            can_reach: self.iface_can_reach,
            public_ip: self.public_ip,
            public_ipv6: self.public_ipv6,
        })
    }

    pub fn etcd(&self) -> EtcdOptions {
        EtcdOptions {
            endpoints: self.etcd_endpoints.clone(),
            prefix: self.etcd_prefix.clone(),
            key_file: self.etcd_keyfile.clone(),
            cert_file: self.etcd_certfile.clone(),
            ca_file: self.etcd_cafile.clone(),
            username: self.etcd_username.clone(),
            password: self.etcd_password.clone(),
            renew_margin: Duration::from_secs(60 * self.subnet_lease_renew_margin),
            previous: Subnets::default(),
        }
    }

    pub fn kube(&self) -> KubeOptions {
        KubeOptions {
            annotation_prefix: self.kube_annotation_prefix.clone(),
            net_conf_path: self.net_config_path.clone(),
            set_node_network_unavailable: self.set_node_network_unavailable,
        }
    }
}

/// Existing unit files write `-iface=eth0` as well as `--iface=eth0`; both are the same flag.
fn with_two_dashes(arguments: impl Iterator<Item = OsString>) -> impl Iterator<Item = OsString> {
    arguments.map(|argument| match argument.to_str() {
        Some(text) if text.len() > 2 && text.starts_with('-') && !text.starts_with("--") && !text.starts_with("-v") => {
            OsString::from(format!("-{text}"))
        }
        _ => argument,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(arguments: &[&str]) -> Options {
        let all = std::iter::once("flanneld").chain(arguments.iter().copied()).map(OsString::from);
        Options::try_parse_from(with_two_dashes(all)).unwrap()
    }

    #[test]
    fn flags_of_unit_files() {
        let options =
            parse(&["-etcd-endpoints=http://a:1,http://b:2", "--ip-masq", "-iface=eth0", "--iface", "10.0.0.1"]);
        assert_eq!(options.etcd().endpoints, ["http://a:1", "http://b:2"]);
        assert!(options.ip_masq && options.iptables_forward_rules);
        assert_eq!(options.selection().unwrap().interfaces, ["eth0", "10.0.0.1"]);
        assert!(!parse(&["--ip-masq=false"]).ip_masq);
        assert_eq!(parse(&["-v=4"]).logs.verbosity, 4);
    }

    #[test]
    fn patterns_are_read_at_the_start() {
        assert_eq!(parse(&["--iface-regex=^eth", "-iface-regex", "10,0"]).selection().unwrap().patterns.len(), 2);
        assert!(parse(&["--iface-regex=("]).selection().is_err());
    }

    #[test]
    fn a_margin_beyond_the_lease_is_refused() {
        assert!(Options::try_parse_from(["flanneld", "--subnet-lease-renew-margin=1440"]).is_err());
    }
}
