//! The command line: upstream's flags for what this program does. Flags of upstream that change nothing here are
//! accepted, so that existing unit files and static pods keep working.

use std::path::PathBuf;
use std::time::Duration;

use apimachinery::controller::{LeaderElectionArgs, parse_duration};
use apimachinery::process::{KubeconfigArgs, LogArgs, SecureServingArgs};
use clap::{ArgAction, Parser};
use ipnet::IpNet;

use crate::controllers::autoscaler::Settings;

#[derive(Parser, Clone, Debug)]
#[command(name = "kube-controller-manager", version = apimachinery::process::KUBERNETES_VERSION)]
pub struct Options {
    #[command(flatten)]
    pub logs: LogArgs,
    #[command(flatten)]
    pub kubeconfig: KubeconfigArgs,
    #[command(flatten)]
    pub leader_election: LeaderElectionArgs,
    #[command(flatten)]
    pub serving: SecureServingArgs,
    /// Controllers to run: `*` for all that are on by default, `name` to add one, `-name` to leave one out.
    #[arg(long, value_delimiter = ',', default_value = "*", allow_hyphen_values = true)]
    pub controllers: Vec<String>,

    /// Certificates that pods verify the API server with.
    #[arg(long)]
    pub root_ca_file: Option<PathBuf>,
    /// The key that signs service account tokens in secrets.
    #[arg(long)]
    pub service_account_private_key_file: Option<PathBuf>,
    /// The authority that signs certificate requests.
    #[arg(long, requires = "cluster_signing_key_file")]
    pub cluster_signing_cert_file: Option<PathBuf>,
    #[arg(long, requires = "cluster_signing_cert_file")]
    pub cluster_signing_key_file: Option<PathBuf>,
    /// The longest validity of signed certificates.
    #[arg(long, default_value = "8760h", value_parser = parse_duration)]
    pub cluster_signing_duration: Duration,

    /// Give each node a part of --cluster-cidr for its pods.
    #[arg(long, default_value_t = false, action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub allocate_node_cidrs: bool,
    /// The addresses of pods; two ranges for two IP families.
    #[arg(long, value_delimiter = ',')]
    pub cluster_cidr: Vec<IpNet>,
    /// The prefix length of each node's range; by default 24 for IPv4 and 64 for IPv6.
    #[arg(long)]
    pub node_cidr_mask_size: Option<u8>,
    #[arg(long)]
    pub node_cidr_mask_size_ipv4: Option<u8>,
    #[arg(long)]
    pub node_cidr_mask_size_ipv6: Option<u8>,
    /// How long a node may be silent before it is not ready.
    #[arg(long, default_value = "50s", value_parser = parse_duration)]
    pub node_monitor_grace_period: Duration,
    /// How long a new node may take to report for the first time.
    #[arg(long, default_value = "1m", value_parser = parse_duration)]
    pub node_startup_grace_period: Duration,
    /// Finished pods beyond this number are removed, oldest first.
    #[arg(long, default_value_t = 12_500)]
    pub terminated_pod_gc_threshold: i32,
    /// Tokens of service accounts that were made automatically go when they were not used for so long, twice.
    #[arg(long, default_value = "8760h", value_parser = parse_duration)]
    pub legacy_service_account_token_clean_up_period: Duration,
    #[command(flatten)]
    pub autoscaler: Settings,
    /// Never take a volume from a node before the node says that it is unmounted, or is tainted as out of service.
    #[arg(long, default_value_t = false, action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub disable_force_detach_on_timeout: bool,

    /// Each controller acts under its own service account of kube-system, not under the credentials of --kubeconfig.
    #[arg(long, default_value_t = false, action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub use_service_account_credentials: bool,
    #[command(flatten)]
    pub accepted: Accepted,
}

/// Upstream's flags without effect here.
#[derive(clap::Args, Clone, Debug, Default)]
pub struct Accepted {
    #[arg(long, hide = true)]
    authentication_kubeconfig: Option<String>,
    #[arg(long, hide = true)]
    authorization_kubeconfig: Option<String>,
    #[arg(long, hide = true)]
    authorization_always_allow_paths: Option<String>,
    #[arg(long, hide = true)]
    client_ca_file: Option<String>,
    #[arg(long, hide = true)]
    requestheader_client_ca_file: Option<String>,
    #[arg(long, hide = true)]
    requestheader_allowed_names: Option<String>,
    #[arg(long, hide = true)]
    cluster_name: Option<String>,
    #[arg(long, hide = true)]
    service_cluster_ip_range: Option<String>,
    #[arg(long, hide = true)]
    cloud_provider: Option<String>,
    #[arg(long, hide = true)]
    flex_volume_plugin_dir: Option<String>,
    #[arg(long, hide = true)]
    kube_api_qps: Option<f32>,
    #[arg(long, hide = true)]
    kube_api_burst: Option<u32>,
    #[arg(long, hide = true)]
    feature_gates: Option<String>,
    #[arg(long, hide = true)]
    profiling: Option<String>,
    #[arg(long, hide = true)]
    cert_dir: Option<String>,
    #[arg(long, hide = true, num_args = 0..=1, require_equals = true)]
    disable_attach_detach_reconcile_sync: Option<String>,
    #[arg(long, hide = true)]
    attach_detach_reconcile_sync_period: Option<String>,
    #[arg(long, hide = true)]
    node_monitor_period: Option<String>,
    #[arg(long, hide = true)]
    min_resync_period: Option<String>,
    #[arg(long, hide = true)]
    concurrent_deployment_syncs: Option<u32>,
    #[arg(long, hide = true)]
    concurrent_replicaset_syncs: Option<u32>,
    #[arg(long, hide = true)]
    concurrent_gc_syncs: Option<u32>,
    #[arg(long, hide = true)]
    concurrent_namespace_syncs: Option<u32>,
    #[arg(long, hide = true)]
    configure_cloud_routes: Option<String>,
}

impl Options {
    /// Whether `--controllers` asks for the controller. The first mention of it decides, then `*`.
    pub fn wants(&self, name: &str, alias: &str, off_by_default: bool) -> bool {
        for item in &self.controllers {
            let (wanted, item) = item.strip_prefix('-').map_or((true, item.as_str()), |rest| (false, rest));
            if item == name || item == alias {
                return wanted;
            }
        }
        !off_by_default && self.controllers.iter().any(|item| item == "*")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn controllers_are_selected() {
        let options = Options::parse_from(["kcm", "--controllers=*,-nodeipam,bootstrap-signer-controller"]);
        for (name, alias, off, expected) in [
            ("deployment-controller", "deployment", false, true),
            ("node-ipam-controller", "nodeipam", false, false),
            ("bootstrap-signer-controller", "bootstrapsigner", true, true),
            ("token-cleaner-controller", "tokencleaner", true, false),
        ] {
            assert_eq!(options.wants(name, alias, off), expected, "{name}");
        }
        let few = Options::parse_from(["kcm", "--controllers=deployment", "--leader-elect=false"]);
        assert!(few.wants("deployment-controller", "deployment", false));
        assert!(!few.wants("replicaset-controller", "replicaset", false));
        assert!(!few.leader_election.leader_elect);
    }
}
