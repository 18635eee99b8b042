//! The command line, with upstream's flags. With `--config`, most of them are ignored, as upstream does.

use std::path::PathBuf;

use apimachinery::process::{KubeconfigArgs, LogArgs};
use clap::{ArgAction, Parser};

use super::document::{ConntrackDocument, DetectLocalDocument, Document, ModeDocument};
use super::{Config, ConfigError, Mode};

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
    /// How packets are redirected [default: iptables].
    #[arg(long, value_enum)]
    proxy_mode: Option<Mode>,
    /// Network of all pods, or one for each family, separated by a comma.
    #[arg(long, default_value = "")]
    cluster_cidr: String,
    /// ClusterCIDR, NodeCIDR, BridgeInterface or InterfaceNamePrefix: how traffic of this node's pods is recognised.
    #[arg(long, default_value = "")]
    detect_local_mode: String,
    /// For --detect-local-mode=BridgeInterface.
    #[arg(long, default_value = "")]
    pod_bridge_interface: String,
    /// For --detect-local-mode=InterfaceNamePrefix.
    #[arg(long, default_value = "")]
    pod_interface_name_prefix: String,
    /// Masquerade all traffic to cluster IPs.
    #[arg(long, action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = false)]
    masquerade_all: bool,
    /// Node ports answer on 127.0.0.1, too (iptables mode only).
    #[arg(long, action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = true)]
    iptables_localhost_nodeports: bool,
    /// The bit of packet marks that means "masquerade".
    #[arg(long, default_value_t = 14)]
    iptables_masquerade_bit: u32,
    /// How often the rules are checked.
    #[arg(long, default_value = "30s")]
    iptables_sync_period: String,
    /// At least so long between two changes of the rules.
    #[arg(long, default_value = "1s")]
    iptables_min_sync_period: String,
    /// Networks of the addresses that answer on node ports, separated by commas; or primary, localhost, all.
    #[arg(long, value_delimiter = ',')]
    nodeport_addresses: Vec<String>,
    /// An IPv6 address makes the health checks and metrics listen there by default.
    #[arg(long, default_value = "0.0.0.0")]
    bind_address: String,
    /// Remove all rules of all modes and end.
    #[arg(long, action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = false)]
    pub cleanup: bool,
    /// Do what needs all privileges, and end.
    #[arg(long, action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = false)]
    pub init_only: bool,
    /// Address and port of the health checks; empty switches them off.
    #[arg(long)]
    healthz_bind_address: Option<String>,
    /// Address and port of the metrics; empty switches them off.
    #[arg(long)]
    metrics_bind_address: Option<String>,
    /// Tracked connections for each CPU; 0 leaves the limit as it is.
    #[arg(long, default_value_t = 32 * 1024)]
    conntrack_max_per_core: u64,
    #[arg(long, default_value_t = 128 * 1024)]
    conntrack_min: u64,
    #[arg(long, default_value = "24h")]
    conntrack_tcp_timeout_established: String,
    #[arg(long, default_value = "1h")]
    conntrack_tcp_timeout_close_wait: String,
    #[arg(long, default_value = "0s")]
    conntrack_udp_timeout: String,
    #[arg(long, default_value = "0s")]
    conntrack_udp_timeout_stream: String,
    #[arg(long, action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = false)]
    conntrack_tcp_be_liberal: bool,
}

impl Options {
    /// Reads the file, if there is one, and checks everything.
    pub fn resolve(&self) -> Result<Config, ConfigError> {
        let mut document = match &self.config {
            Some(path) => Document::read(path)?,
            None => self.document(),
        };
        if let Some(name) = &self.hostname_override {
            document.hostname_override = name.clone();
        }
        // In a file, an empty address means the default.
        if self.config.is_some() {
            document.healthz_bind_address = document.healthz_bind_address.filter(|text| !text.is_empty());
            document.metrics_bind_address = document.metrics_bind_address.filter(|text| !text.is_empty());
        }
        let mut config = document.check()?;
        if let Some(path) = &self.api.kubeconfig {
            config.kubeconfig = Some(path.clone());
        }
        Ok(config)
    }

    /// What the flags say, as a file would.
    fn document(&self) -> Document {
        let settings = ModeDocument {
            masquerade_bit: Some(self.iptables_masquerade_bit),
            masquerade_all: self.masquerade_all,
            localhost_node_ports: Some(self.iptables_localhost_nodeports),
            sync_period: Some(self.iptables_sync_period.clone()),
            min_sync_period: Some(self.iptables_min_sync_period.clone()),
        };
        Document {
            mode: self.proxy_mode.unwrap_or_default().as_str().to_owned(),
            bind_address: self.bind_address.clone(),
            cluster_cidr: self.cluster_cidr.clone(),
            detect_local_mode: self.detect_local_mode.clone(),
            detect_local: DetectLocalDocument {
                bridge_interface: self.pod_bridge_interface.clone(),
                interface_name_prefix: self.pod_interface_name_prefix.clone(),
            },
            node_port_addresses: self.nodeport_addresses.clone(),
            healthz_bind_address: self.healthz_bind_address.clone(),
            metrics_bind_address: self.metrics_bind_address.clone(),
            nftables: settings.clone(),
            iptables: settings,
            conntrack: ConntrackDocument {
                max_per_core: Some(self.conntrack_max_per_core),
                min: Some(self.conntrack_min),
                tcp_established_timeout: Some(self.conntrack_tcp_timeout_established.clone()),
                tcp_close_wait_timeout: Some(self.conntrack_tcp_timeout_close_wait.clone()),
                udp_timeout: Some(self.conntrack_udp_timeout.clone()),
                udp_stream_timeout: Some(self.conntrack_udp_timeout_stream.clone()),
                tcp_be_liberal: self.conntrack_tcp_be_liberal,
            },
            ..Document::default()
        }
    }
}
