//! KubeProxyConfiguration (`--config`) and the flags that can be used instead of it. Fields of platforms and modes
//! that do not exist here are accepted and ignored, so that existing files work.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use apimachinery::process::{KubeconfigArgs, LogArgs};
use clap::{ArgAction, Parser, ValueEnum};
use ipnet::{IpNet, Ipv4Net};
use serde::Deserialize;

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

#[derive(Clone, Debug, Parser)]
#[command(name = "kube-proxy", version, about = "Makes the addresses of services lead to their endpoints")]
pub struct Options {
    #[command(flatten)]
    pub logs: LogArgs,
    #[command(flatten)]
    pub api: KubeconfigArgs,
    /// KubeProxyConfiguration file; most other flags are ignored with it.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Name of this node, over the host name and the configuration.
    #[arg(long)]
    hostname_override: Option<String>,
    /// How packets are redirected.
    #[arg(long, value_enum)]
    proxy_mode: Option<Mode>,
    /// Network of all pods.
    #[arg(long, default_value = "")]
    cluster_cidr: String,
    /// Masquerade all traffic to cluster IPs.
    #[arg(long, action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = false)]
    masquerade_all: bool,
    /// Networks of the addresses that answer on node ports, separated by commas; or "primary".
    #[arg(long, value_delimiter = ',')]
    nodeport_addresses: Vec<String>,
    /// Remove all rules of all modes and end.
    #[arg(long, action = ArgAction::SetTrue)]
    pub cleanup: bool,
    /// Address and port of the health checks; empty switches them off.
    #[arg(long, default_value = "0.0.0.0:10256")]
    healthz_bind_address: String,
    /// Address and port of the metrics; empty switches them off.
    #[arg(long, default_value = "127.0.0.1:10249")]
    metrics_bind_address: String,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    #[default]
    Nftables,
    Iptables,
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

/// Which of the node's addresses answer on node ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NodePortAddresses {
    All,
    /// The node's internal IP.
    Primary,
    In(Vec<Ipv4Net>),
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

/// What the proxy needs to know, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    pub mode: Mode,
    pub node_name: String,
    pub kubeconfig: Option<PathBuf>,
    pub cluster_cidr: Option<Ipv4Net>,
    pub mark: u32,
    pub masquerade_all: bool,
    pub node_port_addresses: NodePortAddresses,
    /// At least so long between two changes of the kernel.
    pub min_sync: Duration,
    /// How often it is checked that the rules are still there.
    pub sync: Duration,
    pub healthz: Option<SocketAddr>,
    pub metrics: Option<SocketAddr>,
    pub conntrack: Conntrack,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Document {
    kind: String,
    client_connection: ClientConnection,
    mode: String,
    hostname_override: String,
    #[serde(rename = "clusterCIDR")]
    cluster_cidr: String,
    detect_local_mode: String,
    node_port_addresses: Option<Vec<String>>,
    healthz_bind_address: Option<String>,
    metrics_bind_address: Option<String>,
    iptables: ModeDocument,
    nftables: ModeDocument,
    conntrack: ConntrackDocument,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct ClientConnection {
    kubeconfig: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct ModeDocument {
    masquerade_bit: Option<u32>,
    masquerade_all: bool,
    sync_period: Option<String>,
    min_sync_period: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct ConntrackDocument {
    max_per_core: Option<u64>,
    min: Option<u64>,
    tcp_established_timeout: Option<String>,
    tcp_close_wait_timeout: Option<String>,
    udp_timeout: Option<String>,
    udp_stream_timeout: Option<String>,
    tcp_be_liberal: bool,
}

impl Options {
    /// Reads the file, if there is one, and checks everything.
    pub fn resolve(&self) -> Result<Config, ConfigError> {
        let mut document = match &self.config {
            Some(path) => {
                let text =
                    std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.clone(), source })?;
                let document: Document = serde_saphyr::from_str(&text)
                    .map_err(|source| ConfigError::Decode { path: path.clone(), source: Box::new(source) })?;
                if !matches!(document.kind.as_str(), "" | "KubeProxyConfiguration") {
                    return Err(ConfigError::Kind { path: path.clone(), found: document.kind });
                }
                document
            }
            None => self.document(),
        };
        if let Some(name) = &self.hostname_override {
            document.hostname_override = name.clone();
        }
        let mut config = document.check()?;
        if let Some(path) = &self.api.kubeconfig {
            config.kubeconfig = Some(path.clone());
        }
        Ok(config)
    }

    /// What the flags say, as a file would.
    fn document(&self) -> Document {
        let settings = || ModeDocument { masquerade_all: self.masquerade_all, ..ModeDocument::default() };
        Document {
            mode: self.proxy_mode.unwrap_or_default().as_str().to_owned(),
            cluster_cidr: self.cluster_cidr.clone(),
            node_port_addresses: Some(self.nodeport_addresses.clone()),
            healthz_bind_address: Some(self.healthz_bind_address.clone()),
            metrics_bind_address: Some(self.metrics_bind_address.clone()),
            iptables: settings(),
            nftables: settings(),
            ..Document::default()
        }
    }
}

impl Document {
    fn check(self) -> Result<Config, ConfigError> {
        let mode = match self.mode.as_str() {
            "" | "nftables" => Mode::Nftables,
            "iptables" => Mode::Iptables,
            _ => return Err(ConfigError::Value { field: "mode", value: self.mode, expected: "nftables or iptables" }),
        };
        if !matches!(self.detect_local_mode.as_str(), "" | "ClusterCIDR") {
            return Err(ConfigError::Value {
                field: "detectLocalMode",
                value: self.detect_local_mode,
                expected: "ClusterCIDR",
            });
        }
        let settings = if mode == Mode::Nftables { self.nftables } else { self.iptables };
        let bit = settings.masquerade_bit.unwrap_or(14);
        let mark = 1_u32.checked_shl(bit).ok_or_else(|| ConfigError::Value {
            field: "masqueradeBit",
            value: bit.to_string(),
            expected: "a number from 0 to 31",
        })?;
        Ok(Config {
            mode,
            node_name: node_name(&self.hostname_override)?,
            kubeconfig: Some(self.client_connection.kubeconfig).filter(|path| !path.is_empty()).map(PathBuf::from),
            cluster_cidr: cluster_cidr(&self.cluster_cidr)?,
            mark,
            masquerade_all: settings.masquerade_all,
            node_port_addresses: node_port_addresses(&self.node_port_addresses.unwrap_or_default())?,
            min_sync: duration("minSyncPeriod", settings.min_sync_period)?.unwrap_or(Duration::from_secs(1)),
            sync: duration("syncPeriod", settings.sync_period)?
                .filter(|d| !d.is_zero())
                .unwrap_or(Duration::from_secs(30)),
            healthz: address("healthzBindAddress", self.healthz_bind_address, "0.0.0.0:10256", 10256)?,
            metrics: address("metricsBindAddress", self.metrics_bind_address, "127.0.0.1:10249", 10249)?,
            conntrack: self.conntrack.check()?,
        })
    }
}

impl ConntrackDocument {
    fn check(self) -> Result<Conntrack, ConfigError> {
        let timeout = |field, text, default: Option<u64>| {
            let value = duration(field, text)?.or(default.map(Duration::from_secs));
            Ok(value.filter(|value| !value.is_zero()))
        };
        Ok(Conntrack {
            max_per_core: self.max_per_core.unwrap_or(32 * 1024),
            min: self.min.unwrap_or(128 * 1024),
            tcp_established: timeout("tcpEstablishedTimeout", self.tcp_established_timeout, Some(24 * 60 * 60))?,
            tcp_close_wait: timeout("tcpCloseWaitTimeout", self.tcp_close_wait_timeout, Some(60 * 60))?,
            udp: timeout("udpTimeout", self.udp_timeout, None)?,
            udp_stream: timeout("udpStreamTimeout", self.udp_stream_timeout, None)?,
            tcp_be_liberal: self.tcp_be_liberal,
        })
    }
}

fn node_name(given: &str) -> Result<String, ConfigError> {
    let name = match given.trim() {
        "" => nix::unistd::gethostname().map_err(ConfigError::HostName)?.to_string_lossy().trim().to_owned(),
        given => given.to_owned(),
    };
    Ok(name.to_lowercase())
}

/// The IPv4 network among one or two.
fn cluster_cidr(text: &str) -> Result<Option<Ipv4Net>, ConfigError> {
    let mut found = None;
    for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        match part.parse::<IpNet>() {
            Ok(IpNet::V4(net)) => found = found.or(Some(net.trunc())),
            Ok(IpNet::V6(_)) => {}
            Err(_) => {
                return Err(ConfigError::Value { field: "clusterCIDR", value: part.to_owned(), expected: "a CIDR" });
            }
        }
    }
    Ok(found)
}

fn node_port_addresses(texts: &[String]) -> Result<NodePortAddresses, ConfigError> {
    let mut nets = Vec::new();
    for text in texts.iter().map(|text| text.trim()).filter(|text| !text.is_empty()) {
        if text == "primary" {
            return Ok(NodePortAddresses::Primary);
        }
        match text.parse::<IpNet>() {
            Ok(IpNet::V4(net)) if net.prefix_len() == 0 => return Ok(NodePortAddresses::All),
            Ok(IpNet::V4(net)) => nets.push(net.trunc()),
            Ok(IpNet::V6(_)) => {}
            Err(_) => {
                let expected = "a CIDR or \"primary\"";
                return Err(ConfigError::Value { field: "nodePortAddresses", value: text.to_owned(), expected });
            }
        }
    }
    Ok(if nets.is_empty() { NodePortAddresses::All } else { NodePortAddresses::In(nets) })
}

/// An address with or without port; `None` when it is empty on purpose.
fn address(
    field: &'static str,
    text: Option<String>,
    default: &str,
    port: u16,
) -> Result<Option<SocketAddr>, ConfigError> {
    let given = text.is_some();
    let text = text.unwrap_or_else(|| default.to_owned());
    if text.is_empty() {
        // A file without the field has it empty in upstream's defaulting too; only a flag can switch it off.
        return Ok(if given { None } else { default.parse().ok() });
    }
    let with_port = text.parse().ok().or_else(|| text.parse::<IpAddr>().ok().map(|ip| SocketAddr::new(ip, port)));
    let with_port = with_port.or_else(|| {
        let port = text.strip_prefix(':')?.parse().ok()?;
        Some(SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), port))
    });
    with_port.map(Some).ok_or(ConfigError::Value { field, value: text, expected: "an address with a port" })
}

/// A duration as Go writes it: `1h30m`, `0.5s`, `250ms`.
fn duration(field: &'static str, text: Option<String>) -> Result<Option<Duration>, ConfigError> {
    let Some(text) = text else { return Ok(None) };
    parse_duration(&text).map(Some).ok_or(ConfigError::Value {
        field,
        value: text,
        expected: "a duration like 30s or 1h5m",
    })
}

fn parse_duration(text: &str) -> Option<Duration> {
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let mut rest = text;
    let mut total = 0.0;
    while !rest.is_empty() {
        let unit_at = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let number: f64 = rest[..unit_at].parse().ok()?;
        let after = &rest[unit_at..];
        let unit_end = after.find(|c: char| c.is_ascii_digit()).unwrap_or(after.len());
        total += number
            * match &after[..unit_end] {
                "h" => 3600.0,
                "m" => 60.0,
                "s" => 1.0,
                "ms" => 1e-3,
                "us" | "µs" => 1e-6,
                "ns" => 1e-9,
                _ => return None,
            };
        rest = &after[unit_end..];
    }
    (!text.is_empty()).then(|| Duration::try_from_secs_f64(total).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(yaml: &str) -> Result<Config, ConfigError> {
        serde_saphyr::from_str::<Document>(yaml).unwrap().check()
    }

    #[test]
    fn a_usual_file() {
        let config = check(
            "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n\
             clientConnection: {kubeconfig: /etc/proxy.conf}\nclusterCIDR: 10.244.0.0/16\nmode: iptables\n\
             hostnameOverride: Node1\nconntrack: {maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}\n\
             iptables: {masqueradeBit: 15, minSyncPeriod: 500ms}\nipvs: {strictARP: true}\n",
        )
        .unwrap();
        assert_eq!((config.mode, config.node_name.as_str(), config.mark), (Mode::Iptables, "node1", 0x8000));
        assert_eq!(config.cluster_cidr, "10.244.0.0/16".parse().ok());
        assert_eq!(config.min_sync, Duration::from_millis(500));
        assert_eq!(config.conntrack, Conntrack::default());
        assert_eq!(config.healthz, "0.0.0.0:10256".parse().ok());
        assert_eq!(config.metrics, "127.0.0.1:10249".parse().ok());
    }

    #[test]
    fn mistakes_are_named() {
        for (yaml, expected) in [
            ("mode: ipvs", "mode"),
            ("clusterCIDR: nonsense", "clusterCIDR"),
            ("nodePortAddresses: [x]", "nodePortAddresses"),
            ("healthzBindAddress: nowhere", "healthzBindAddress"),
            ("nftables: {masqueradeBit: 40}", "masqueradeBit"),
            ("nftables: {syncPeriod: 5 parsecs}", "syncPeriod"),
            ("detectLocalMode: BridgeInterface", "detectLocalMode"),
        ] {
            let error = check(yaml).unwrap_err().to_string();
            assert!(error.contains(expected), "{yaml}: {error}");
        }
    }

    #[test]
    fn addresses_for_node_ports() {
        let parse =
            |texts: &[&str]| node_port_addresses(&texts.iter().map(|t| (*t).to_owned()).collect::<Vec<_>>()).unwrap();
        assert_eq!(parse(&[]), NodePortAddresses::All);
        assert_eq!(parse(&["0.0.0.0/0"]), NodePortAddresses::All);
        assert_eq!(parse(&["primary"]), NodePortAddresses::Primary);
        assert_eq!(parse(&["10.0.0.1/8"]), NodePortAddresses::In(vec!["10.0.0.0/8".parse().unwrap()]));
    }

    #[test]
    fn durations() {
        assert_eq!(parse_duration("1h5m0.5s"), Some(Duration::from_millis(3_900_500)));
        assert_eq!(parse_duration("0"), Some(Duration::ZERO));
        for bad in ["", "5", "s", "5x", "-1s"] {
            assert_eq!(parse_duration(bad), None, "{bad}");
        }
    }
}
