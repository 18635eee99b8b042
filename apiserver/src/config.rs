//! The flags of the server: upstream's names, meanings and defaults. Nothing here reads a file or opens a socket.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use apimachinery::process::LogArgs;
use clap::Parser;

/// A Kubernetes API server: the REST front of the cluster's state in etcd.
#[derive(Clone, Debug, Parser)]
#[command(name = "kube-apiserver", version = apimachinery::process::KUBERNETES_VERSION, disable_help_subcommand = true)]
pub struct Config {
    #[command(flatten)]
    pub logs: LogArgs,

    // Serving
    /// The address that the members of the cluster reach this server at; found out when not given.
    #[arg(long)]
    pub advertise_address: Option<IpAddr>,
    #[arg(long, default_value = "0.0.0.0")]
    pub bind_address: IpAddr,
    #[arg(long, default_value_t = 6443)]
    pub secure_port: u16,
    /// Where a self-signed certificate is kept when no --tls-cert-file is given.
    #[arg(long, default_value = "/var/run/kubernetes")]
    pub cert_dir: PathBuf,
    #[arg(long)]
    pub tls_cert_file: Option<PathBuf>,
    #[arg(long)]
    pub tls_private_key_file: Option<PathBuf>,
    /// `VersionTLS12` or `VersionTLS13`.
    #[arg(long, default_value = "VersionTLS12")]
    pub tls_min_version: String,
    #[arg(long, default_value = "")]
    pub external_hostname: String,
    #[arg(long, default_value_t = 400)]
    pub max_requests_inflight: usize,
    #[arg(long, default_value_t = 200)]
    pub max_mutating_requests_inflight: usize,
    /// Lets requests wait in queues by what flow schemas say, instead of only counting them.
    #[arg(long, default_value = "true", num_args = 0..=1, require_equals = true, default_missing_value = "true", action = clap::ArgAction::Set)]
    pub enable_priority_and_fairness: bool,
    #[arg(long, default_value = "1m0s", value_parser = go_duration)]
    pub request_timeout: Duration,
    /// Watches end after a random time between this many seconds and twice as many.
    #[arg(long, default_value_t = 1800)]
    pub min_request_timeout: u64,
    #[arg(long, default_value = "0s", value_parser = go_duration)]
    pub shutdown_delay_duration: Duration,
    #[arg(long, value_delimiter = ',')]
    pub cors_allowed_origins: Vec<String>,
    /// `group/version=true|false`, `api/all=…`, comma-separated.
    #[arg(long, value_delimiter = ',')]
    pub runtime_config: Vec<String>,
    #[arg(long, value_delimiter = ',')]
    pub feature_gates: Vec<String>,

    // Storage
    #[arg(long, value_delimiter = ',')]
    pub etcd_servers: Vec<String>,
    #[arg(long, default_value = "/registry")]
    pub etcd_prefix: String,
    #[arg(long)]
    pub etcd_cafile: Option<PathBuf>,
    #[arg(long)]
    pub etcd_certfile: Option<PathBuf>,
    #[arg(long)]
    pub etcd_keyfile: Option<PathBuf>,
    /// How often history that nobody needs any more is compacted away; 0 leaves that to others.
    #[arg(long, default_value = "5m0s", value_parser = go_duration)]
    pub etcd_compaction_interval: Duration,
    #[arg(long, default_value = "")]
    pub storage_backend: String,
    #[arg(long, default_value = "1h0m0s", value_parser = go_duration)]
    pub event_ttl: Duration,
    #[arg(long)]
    pub encryption_provider_config: Option<PathBuf>,
    #[arg(long, default_value_t = 1)]
    pub delete_collection_workers: usize,

    // Who may do what
    #[arg(long, default_value = "true", num_args = 0..=1, require_equals = true, default_missing_value = "true", action = clap::ArgAction::Set)]
    pub anonymous_auth: bool,
    #[arg(long)]
    pub client_ca_file: Option<PathBuf>,
    #[arg(long)]
    pub token_auth_file: Option<PathBuf>,
    #[arg(long, default_value = "false", num_args = 0..=1, require_equals = true, default_missing_value = "true", action = clap::ArgAction::Set)]
    pub enable_bootstrap_token_auth: bool,
    #[arg(long, value_delimiter = ',')]
    pub api_audiences: Vec<String>,
    #[arg(long)]
    pub service_account_issuer: Vec<String>,
    #[arg(long, default_value = "")]
    pub service_account_jwks_uri: String,
    #[arg(long)]
    pub service_account_key_file: Vec<PathBuf>,
    #[arg(long)]
    pub service_account_signing_key_file: Option<PathBuf>,
    #[arg(long, default_value = "true", num_args = 0..=1, require_equals = true, default_missing_value = "true", action = clap::ArgAction::Set)]
    pub service_account_lookup: bool,
    #[arg(long, default_value = "0s", value_parser = go_duration)]
    pub service_account_max_token_expiration: Duration,
    #[arg(long, default_value = "true", num_args = 0..=1, require_equals = true, default_missing_value = "true", action = clap::ArgAction::Set)]
    pub service_account_extend_token_expiration: bool,
    #[arg(long)]
    pub requestheader_client_ca_file: Option<PathBuf>,
    #[arg(long, value_delimiter = ',')]
    pub requestheader_allowed_names: Vec<String>,
    #[arg(long, value_delimiter = ',')]
    pub requestheader_extra_headers_prefix: Vec<String>,
    #[arg(long, value_delimiter = ',')]
    pub requestheader_group_headers: Vec<String>,
    #[arg(long, value_delimiter = ',')]
    pub requestheader_username_headers: Vec<String>,
    #[arg(long, value_delimiter = ',')]
    pub requestheader_uid_headers: Vec<String>,
    #[arg(long)]
    pub authentication_token_webhook_config_file: Option<PathBuf>,
    #[arg(long, default_value = "2m0s", value_parser = go_duration)]
    pub authentication_token_webhook_cache_ttl: Duration,
    #[arg(long, default_value = "v1beta1")]
    pub authentication_token_webhook_version: String,
    #[arg(long, default_value = "")]
    pub oidc_issuer_url: String,
    #[arg(long, default_value = "")]
    pub oidc_client_id: String,
    #[arg(long)]
    pub oidc_ca_file: Option<PathBuf>,
    #[arg(long, default_value = "sub")]
    pub oidc_username_claim: String,
    /// `-`: none.
    #[arg(long, default_value = "")]
    pub oidc_username_prefix: String,
    #[arg(long, default_value = "")]
    pub oidc_groups_claim: String,
    #[arg(long, default_value = "")]
    pub oidc_groups_prefix: String,
    #[arg(long, value_delimiter = ',')]
    pub oidc_required_claim: Vec<String>,
    #[arg(long, value_delimiter = ',', default_value = "RS256")]
    pub oidc_signing_algs: Vec<String>,
    #[arg(long)]
    pub authentication_config: Option<PathBuf>,
    #[arg(long, value_delimiter = ',', default_value = "AlwaysAllow")]
    pub authorization_mode: Vec<String>,
    #[arg(long)]
    pub authorization_policy_file: Option<PathBuf>,
    #[arg(long)]
    pub authorization_config: Option<PathBuf>,
    #[arg(long)]
    pub authorization_webhook_config_file: Option<PathBuf>,
    #[arg(long, default_value = "5m0s", value_parser = go_duration)]
    pub authorization_webhook_cache_authorized_ttl: Duration,
    #[arg(long, default_value = "30s", value_parser = go_duration)]
    pub authorization_webhook_cache_unauthorized_ttl: Duration,
    #[arg(long, default_value = "v1beta1")]
    pub authorization_webhook_version: String,
    #[arg(long, value_delimiter = ',')]
    pub enable_admission_plugins: Vec<String>,
    #[arg(long, value_delimiter = ',')]
    pub disable_admission_plugins: Vec<String>,
    #[arg(long)]
    pub admission_control_config_file: Option<PathBuf>,
    #[arg(long, default_value_t = 300)]
    pub default_not_ready_toleration_seconds: i64,
    #[arg(long, default_value_t = 300)]
    pub default_unreachable_toleration_seconds: i64,

    // The cluster
    #[arg(long, default_value = "false", num_args = 0..=1, require_equals = true, default_missing_value = "true", action = clap::ArgAction::Set)]
    pub allow_privileged: bool,
    #[arg(long, value_delimiter = ',', default_value = "10.0.0.0/24")]
    pub service_cluster_ip_range: Vec<ipnet::IpNet>,
    /// `first-last`.
    #[arg(long, default_value = "30000-32767")]
    pub service_node_port_range: String,
    #[arg(long, default_value = "lease")]
    pub endpoint_reconciler_type: String,
    #[arg(long, default_value_t = 0)]
    pub kubernetes_service_node_port: u16,
    #[arg(long)]
    pub kubelet_client_certificate: Option<PathBuf>,
    #[arg(long)]
    pub kubelet_client_key: Option<PathBuf>,
    #[arg(long)]
    pub kubelet_certificate_authority: Option<PathBuf>,
    #[arg(long, value_delimiter = ',', default_value = "Hostname,InternalDNS,InternalIP,ExternalDNS,ExternalIP")]
    pub kubelet_preferred_address_types: Vec<String>,
    #[arg(long, default_value = "5s", value_parser = go_duration)]
    pub kubelet_timeout: Duration,
    #[arg(long)]
    pub proxy_client_cert_file: Option<PathBuf>,
    #[arg(long)]
    pub proxy_client_key_file: Option<PathBuf>,
    #[arg(long, default_value = "true", num_args = 0..=1, require_equals = true, default_missing_value = "true", action = clap::ArgAction::Set)]
    pub enable_aggregator_routing: bool,
    #[arg(long)]
    pub audit_policy_file: Option<PathBuf>,
    /// `-`: standard output.
    #[arg(long, default_value = "")]
    pub audit_log_path: String,
    /// `json` or `legacy`.
    #[arg(long, default_value = "json")]
    pub audit_log_format: String,
    /// In megabytes; 0: 100.
    #[arg(long, default_value_t = 0)]
    pub audit_log_maxsize: u64,
    /// In days; 0: for ever.
    #[arg(long, default_value_t = 0)]
    pub audit_log_maxage: u32,
    /// 0: all.
    #[arg(long, default_value_t = 0)]
    pub audit_log_maxbackup: usize,
    #[arg(long)]
    pub audit_webhook_config_file: Option<PathBuf>,
    #[arg(long, default_value_t = 10_000)]
    pub audit_webhook_batch_buffer_size: usize,
    #[arg(long, default_value_t = 400)]
    pub audit_webhook_batch_max_size: usize,
    #[arg(long, default_value = "30s", value_parser = go_duration)]
    pub audit_webhook_batch_max_wait: Duration,
}

/// Upstream's flags that are accepted so that unit files carry over, and that change nothing here.
const WITHOUT_EFFECT: &[&str] = &[
    "aggregator-reject-forwarding-redirect",
    "allow-metric-labels",
    "apiserver-count",
    "audit-log-mode",
    "audit-webhook-mode",
    "audit-webhook-version",
    "concurrent-service-syncs",
    "contention-profiling",
    "default-watch-cache-size",
    "emulated-version",
    "enable-garbage-collector",
    "enable-logs-handler",
    "etcd-count-metric-poll-period",
    "etcd-db-metric-poll-interval",
    "etcd-healthcheck-timeout",
    "etcd-readycheck-timeout",
    "event-qps",
    "goaway-chance",
    "http2-max-streams-per-connection",
    "kubelet-port",
    "kubelet-read-only-port",
    "livez-grace-period",
    "log-flush-frequency",
    "logging-format",
    "max-connection-bytes-per-sec",
    "permit-address-sharing",
    "permit-port-sharing",
    "profiling",
    "shutdown-send-retry-after",
    "shutdown-watch-termination-grace-period",
    "storage-initialization-timeout",
    "storage-media-type",
    "strict-transport-security-directives",
    "tls-cipher-suites",
    "tls-sni-cert-key",
    "tracing-config-file",
    "version",
    "watch-cache",
    "watch-cache-sizes",
];

impl Config {
    /// Reads the process's arguments. Known flags without effect are left out and returned, to be logged.
    pub fn from_args(args: impl IntoIterator<Item = String>) -> Result<(Self, Vec<String>), clap::Error> {
        let mut ignored = Vec::new();
        let mut kept = Vec::new();
        let mut args = args.into_iter().peekable();
        kept.extend(args.next());
        while let Some(arg) = args.next() {
            let name = arg.strip_prefix("--").map(|rest| rest.split('=').next().unwrap_or(rest));
            match name {
                Some(name) if name != "version" && WITHOUT_EFFECT.contains(&name) => {
                    // `--flag value`: the value goes with it.
                    if !arg.contains('=') && args.peek().is_some_and(|next| !next.starts_with('-')) {
                        args.next();
                    }
                    ignored.push(name.to_owned());
                }
                _ => kept.push(arg),
            }
        }
        Ok((Self::try_parse_from(kept)?, ignored))
    }

    /// The defaults with one etcd server, for tests and in-process servers.
    pub fn for_etcd(server: &str) -> Self {
        Self::parse_from(["kube-apiserver", "--etcd-servers", server])
    }
}

/// A duration the way Go's flags are written: `1h2m3.5s`, `300ms`, `0`.
pub fn go_duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("invalid duration {text:?}");
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    let mut seconds = 0.0;
    let mut rest = text;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(wrong)?;
        let number: f64 = rest[..digits].parse().map_err(|_| wrong())?;
        let tail = &rest[digits..];
        let unit_len = tail.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(tail.len());
        seconds += number
            * match &tail[..unit_len] {
                "h" => 3600.0,
                "m" => 60.0,
                "s" => 1.0,
                "ms" => 1e-3,
                "us" | "µs" => 1e-6,
                "ns" => 1e-9,
                _ => return Err(wrong()),
            };
        rest = &tail[unit_len..];
    }
    if text.is_empty() { Err(wrong()) } else { Duration::try_from_secs_f64(seconds).map_err(|_| wrong()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_written_as_in_go() {
        for (text, expected) in [
            ("1m0s", Some(60_000)),
            ("1h", Some(3_600_000)),
            ("300ms", Some(300)),
            ("1.5s", Some(1500)),
            ("0", Some(0)),
            ("5", None),
            ("", None),
            ("x", None),
        ] {
            assert_eq!(go_duration(text).ok(), expected.map(Duration::from_millis), "{text}");
        }
    }

    #[test]
    fn known_flags_without_effect_are_dropped_with_their_value() {
        let args = [
            "kube-apiserver",
            "--profiling=false",
            "--goaway-chance",
            "0.1",
            "--secure-port=7443",
            "--allow-privileged",
            "--anonymous-auth=false",
        ];
        let (config, ignored) = Config::from_args(args.map(str::to_owned)).expect("parses");
        assert_eq!(ignored, ["profiling", "goaway-chance"]);
        assert_eq!((config.secure_port, config.allow_privileged, config.anonymous_auth), (7443, true, false));
        assert!(Config::from_args(["kube-apiserver", "--no-such-flag"].map(str::to_owned)).is_err());
    }
}
