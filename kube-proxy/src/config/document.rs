//! The `KubeProxyConfiguration` file, `kubeproxy.config.k8s.io/v1alpha1`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use super::values::{address, duration, networks, node_port_addresses};
use super::{Config, ConfigError, Conntrack, DetectLocal, Mode, NodePortAddresses};

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Document {
    pub kind: String,
    pub client_connection: ClientConnection,
    pub mode: String,
    pub hostname_override: String,
    pub bind_address: String,
    #[serde(rename = "clusterCIDR")]
    pub cluster_cidr: String,
    pub detect_local_mode: String,
    pub detect_local: DetectLocalDocument,
    pub node_port_addresses: Vec<String>,
    pub healthz_bind_address: Option<String>,
    pub metrics_bind_address: Option<String>,
    pub iptables: ModeDocument,
    pub nftables: ModeDocument,
    pub conntrack: ConntrackDocument,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct ClientConnection {
    pub kubeconfig: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct DetectLocalDocument {
    pub bridge_interface: String,
    pub interface_name_prefix: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ModeDocument {
    pub masquerade_bit: Option<u32>,
    pub masquerade_all: bool,
    pub localhost_node_ports: Option<bool>,
    pub sync_period: Option<String>,
    pub min_sync_period: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ConntrackDocument {
    pub max_per_core: Option<u64>,
    pub min: Option<u64>,
    pub tcp_established_timeout: Option<String>,
    pub tcp_close_wait_timeout: Option<String>,
    pub udp_timeout: Option<String>,
    pub udp_stream_timeout: Option<String>,
    pub tcp_be_liberal: bool,
}

impl Document {
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text =
            std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        let document: Self = serde_saphyr::from_str(&text)
            .map_err(|source| ConfigError::Decode { path: path.to_owned(), source: Box::new(source) })?;
        if !matches!(document.kind.as_str(), "" | "KubeProxyConfiguration") {
            return Err(ConfigError::Kind { path: path.to_owned(), found: document.kind });
        }
        Ok(document)
    }

    pub fn check(self) -> Result<Config, ConfigError> {
        let mode = match self.mode.as_str() {
            "" => Mode::default(),
            "nftables" => Mode::Nftables,
            "iptables" => Mode::Iptables,
            _ => return Err(ConfigError::Value { field: "mode", value: self.mode, expected: "nftables or iptables" }),
        };
        let settings = if mode == Mode::Nftables { &self.nftables } else { &self.iptables };
        let bit = settings.masquerade_bit.unwrap_or(14);
        let mark = 1_u32.checked_shl(bit).ok_or_else(|| ConfigError::Value {
            field: "masqueradeBit",
            value: bit.to_string(),
            expected: "a number from 0 to 31",
        })?;
        // Only iptables can answer on addresses that come and go without being told.
        let everywhere = NodePortAddresses { primary: mode == Mode::Nftables, networks: Vec::new() };
        let all_interfaces = if self.bind_address.contains(':') { "[::]" } else { "0.0.0.0" };
        let loopback = if self.bind_address.contains(':') { "[::1]" } else { "127.0.0.1" };
        // A field that is empty means the default; only flags can switch these off.
        let bound = |text: Option<String>, host: &str, port| text.unwrap_or_else(|| format!("{host}:{port}"));
        Ok(Config {
            mode,
            node_name: node_name(&self.hostname_override)?,
            detect_local: self.detect_local()?,
            mark,
            masquerade_all: settings.masquerade_all,
            localhost_node_ports: self.iptables.localhost_node_ports.unwrap_or(true),
            node_port_addresses: node_port_addresses(&self.node_port_addresses)?.unwrap_or(everywhere),
            min_sync: positive("minSyncPeriod", settings.min_sync_period.as_deref(), Duration::from_secs(1))?,
            sync: positive("syncPeriod", settings.sync_period.as_deref(), Duration::from_secs(30))?,
            kubeconfig: Some(self.client_connection.kubeconfig).filter(|path| !path.is_empty()).map(PathBuf::from),
            healthz: address("healthzBindAddress", &bound(self.healthz_bind_address, all_interfaces, 10256), 10256)?,
            metrics: address("metricsBindAddress", &bound(self.metrics_bind_address, loopback, 10249), 10249)?,
            conntrack: self.conntrack.check()?,
        })
    }

    fn detect_local(&self) -> Result<DetectLocal, ConfigError> {
        let named = |field, name: &str| match name {
            "" => {
                let expected = "the name of an interface, which this detectLocalMode needs";
                Err(ConfigError::Value { field, value: String::new(), expected })
            }
            name if name.len() > 15 => {
                let expected = "the name of an interface, at most 15 bytes";
                Err(ConfigError::Value { field, value: name.to_owned(), expected })
            }
            name => Ok(name.to_owned()),
        };
        let details = &self.detect_local;
        Ok(match self.detect_local_mode.as_str() {
            "" | "ClusterCIDR" => DetectLocal::ClusterCidr(networks("clusterCIDR", &self.cluster_cidr)?),
            "NodeCIDR" => DetectLocal::NodeCidr,
            "BridgeInterface" => {
                DetectLocal::BridgeInterface(named("detectLocal.bridgeInterface", &details.bridge_interface)?)
            }
            "InterfaceNamePrefix" => DetectLocal::InterfaceNamePrefix(named(
                "detectLocal.interfaceNamePrefix",
                &details.interface_name_prefix,
            )?),
            other => {
                let expected = "ClusterCIDR, NodeCIDR, BridgeInterface or InterfaceNamePrefix";
                return Err(ConfigError::Value { field: "detectLocalMode", value: other.to_owned(), expected });
            }
        })
    }
}

impl ConntrackDocument {
    fn check(self) -> Result<Conntrack, ConfigError> {
        let timeout = |field, text: Option<String>, default: Option<u64>| {
            let value = duration(field, text.as_deref())?.or(default.map(Duration::from_secs));
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

/// Zero is as good as nothing.
fn positive(field: &'static str, text: Option<&str>, default: Duration) -> Result<Duration, ConfigError> {
    Ok(duration(field, text)?.filter(|value| !value.is_zero()).unwrap_or(default))
}

fn node_name(given: &str) -> Result<String, ConfigError> {
    let name = match given.trim() {
        "" => nix::unistd::gethostname().map_err(ConfigError::HostName)?.to_string_lossy().trim().to_owned(),
        given => given.to_owned(),
    };
    Ok(name.to_lowercase())
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
             clientConnection: {kubeconfig: /etc/proxy.conf}\nclusterCIDR: 10.244.0.0/16,fd01::/48\nmode: iptables\n\
             hostnameOverride: Node1\nconntrack: {maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}\n\
             iptables: {masqueradeBit: 15, minSyncPeriod: 500ms}\nipvs: {strictARP: true}\n",
        )
        .unwrap();
        assert_eq!((config.mode, config.node_name.as_str(), config.mark), (Mode::Iptables, "node1", 0x8000));
        let nets = vec!["10.244.0.0/16".parse().unwrap(), "fd01::/48".parse().unwrap()];
        assert_eq!(config.detect_local, DetectLocal::ClusterCidr(nets));
        assert_eq!((config.min_sync, config.sync), (Duration::from_millis(500), Duration::from_secs(30)));
        assert_eq!(config.conntrack, Conntrack::default());
        assert_eq!(config.healthz, "0.0.0.0:10256".parse().ok());
        assert_eq!(config.metrics, "127.0.0.1:10249".parse().ok());
        assert_eq!(config.node_port_addresses, NodePortAddresses::default());
    }

    #[test]
    fn defaults_depend_on_the_mode() {
        assert_eq!(check("kind: ''").unwrap().mode, Mode::Iptables);
        assert!(check("mode: nftables").unwrap().node_port_addresses.primary);
        assert!(!check("{mode: nftables, nodePortAddresses: [all]}").unwrap().node_port_addresses.primary);
    }

    #[test]
    fn ways_to_detect_local_traffic() {
        for (yaml, expected) in [
            ("detectLocalMode: NodeCIDR", DetectLocal::NodeCidr),
            (
                "{detectLocalMode: BridgeInterface, detectLocal: {bridgeInterface: cni0}}",
                DetectLocal::BridgeInterface("cni0".to_owned()),
            ),
            (
                "{detectLocalMode: InterfaceNamePrefix, detectLocal: {interfaceNamePrefix: veth}}",
                DetectLocal::InterfaceNamePrefix("veth".to_owned()),
            ),
        ] {
            assert_eq!(check(yaml).unwrap().detect_local, expected);
        }
    }

    #[test]
    fn mistakes_are_named() {
        for (yaml, expected) in [
            ("mode: ipvs", "mode"),
            ("clusterCIDR: nonsense", "clusterCIDR"),
            ("nodePortAddresses: [x]", "nodePortAddresses"),
            ("healthzBindAddress: nowhere", "healthzBindAddress"),
            ("{mode: nftables, nftables: {masqueradeBit: 40}}", "masqueradeBit"),
            ("iptables: {syncPeriod: 5 parsecs}", "syncPeriod"),
            ("detectLocalMode: Guess", "detectLocalMode"),
            ("detectLocalMode: BridgeInterface", "detectLocal.bridgeInterface"),
            (
                "{detectLocalMode: InterfaceNamePrefix, detectLocal: {interfaceNamePrefix: far-too-long-a-name}}",
                "at most 15 bytes",
            ),
        ] {
            let error = check(yaml).unwrap_err().to_string();
            assert!(error.contains(expected), "{yaml}: {error}");
        }
    }
}
