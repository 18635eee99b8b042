//! The kubelet's settings: upstream's `KubeletConfiguration` (kubelet.config.k8s.io/v1beta1) with upstream's
//! defaults, read from a YAML or JSON file. Fields that have no effect here are named in a warning, never an error,
//! so that a configuration written for upstream's kubelet starts this one.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use k8s_openapi::api::core::v1::Taint;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read the configuration file {path}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{path} is not YAML")]
    Yaml { path: PathBuf, source: Box<serde_saphyr::Error> },
    #[error("{path} is not a KubeletConfiguration")]
    Decode { path: PathBuf, source: serde_json::Error },
    #[error("{path} holds a {kind}, not a KubeletConfiguration of kubelet.config.k8s.io/v1beta1")]
    Kind { path: PathBuf, kind: String },
    #[error("invalid configuration: {field}: {why}")]
    Invalid { field: &'static str, why: String },
}

/// A duration as Go writes it (`1h2m3.5s`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GoDuration(pub Duration);

impl GoDuration {
    pub const fn seconds(seconds: u64) -> Self {
        Self(Duration::from_secs(seconds))
    }
}

impl Serialize for GoDuration {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let (total, millis) = (self.0.as_secs(), self.0.subsec_millis());
        let (hours, minutes, seconds) = (total / 3600, total / 60 % 60, total % 60);
        let mut text = String::new();
        if hours > 0 {
            text.push_str(&format!("{hours}h"));
        }
        if hours > 0 || minutes > 0 {
            text.push_str(&format!("{minutes}m"));
        }
        match millis {
            0 => text.push_str(&format!("{seconds}s")),
            _ => text.push_str(&format!("{seconds}.{millis:03}s")),
        }
        serializer.serialize_str(&text)
    }
}

impl<'de> Deserialize<'de> for GoDuration {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        parse_duration(&text).map(Self).ok_or_else(|| serde::de::Error::custom(format!("invalid duration {text:?}")))
    }
}

/// Parses Go's duration syntax without signs; `0` needs no unit.
pub fn parse_duration(text: &str) -> Option<Duration> {
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let (mut rest, mut seconds) = (text, 0f64);
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').filter(|end| *end > 0)?;
        let (number, tail) = rest.split_at(digits);
        let unit_end = tail.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(tail.len());
        let (unit, next) = tail.split_at(unit_end);
        let scale = match unit {
            "h" => 3600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 1e-3,
            "us" | "µs" => 1e-6,
            "ns" => 1e-9,
            _ => return None,
        };
        seconds += number.parse::<f64>().ok()? * scale;
        rest = next;
    }
    (!text.is_empty()).then(|| Duration::try_from_secs_f64(seconds).ok()).flatten()
}

#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Authentication {
    pub x509: X509Authentication,
    pub webhook: WebhookAuthentication,
    pub anonymous: AnonymousAuthentication,
}

#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct X509Authentication {
    /// Bundle of the authorities whose client certificates are trusted.
    #[serde(rename = "clientCAFile")]
    pub client_ca_file: String,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct WebhookAuthentication {
    pub enabled: bool,
    #[serde(rename = "cacheTTL")]
    pub cache_ttl: GoDuration,
}

impl Default for WebhookAuthentication {
    fn default() -> Self {
        Self { enabled: true, cache_ttl: GoDuration::seconds(120) }
    }
}

#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct AnonymousAuthentication {
    pub enabled: bool,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Authorization {
    /// `Webhook` or `AlwaysAllow`.
    pub mode: String,
    pub webhook: WebhookAuthorization,
}

impl Default for Authorization {
    fn default() -> Self {
        Self { mode: "Webhook".to_owned(), webhook: WebhookAuthorization::default() }
    }
}

#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct WebhookAuthorization {
    #[serde(rename = "cacheAuthorizedTTL")]
    pub cache_authorized_ttl: GoDuration,
    #[serde(rename = "cacheUnauthorizedTTL")]
    pub cache_unauthorized_ttl: GoDuration,
}

impl Default for WebhookAuthorization {
    fn default() -> Self {
        Self { cache_authorized_ttl: GoDuration::seconds(300), cache_unauthorized_ttl: GoDuration::seconds(30) }
    }
}

/// How long pods of this priority, and of those up to the next one, may take to end when the machine goes down.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ShutdownPeriod {
    pub priority: i32,
    pub shutdown_grace_period_seconds: i64,
}

/// The configuration in force. Units are in the types; sizes are quantities as text.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct KubeletConfiguration {
    pub static_pod_path: String,
    pub sync_frequency: GoDuration,
    pub file_check_frequency: GoDuration,
    pub address: String,
    pub port: u16,
    pub read_only_port: u16,
    pub tls_cert_file: String,
    pub tls_private_key_file: String,
    pub authentication: Authentication,
    pub authorization: Authorization,
    pub healthz_port: u16,
    pub healthz_bind_address: String,
    pub cluster_domain: String,
    #[serde(rename = "clusterDNS")]
    pub cluster_dns: Vec<String>,
    pub streaming_connection_idle_timeout: GoDuration,
    pub node_status_update_frequency: GoDuration,
    pub node_status_report_frequency: GoDuration,
    pub node_lease_duration_seconds: i32,
    #[serde(rename = "imageMinimumGCAge")]
    pub image_minimum_gc_age: GoDuration,
    #[serde(rename = "imageMaximumGCAge")]
    pub image_maximum_gc_age: GoDuration,
    #[serde(rename = "imageGCHighThresholdPercent")]
    pub image_gc_high_threshold_percent: u8,
    #[serde(rename = "imageGCLowThresholdPercent")]
    pub image_gc_low_threshold_percent: u8,
    pub cgroup_root: String,
    #[serde(rename = "cgroupsPerQOS")]
    pub cgroups_per_qos: bool,
    pub cgroup_driver: String,
    pub fail_cgroup_v1: bool,
    pub fail_swap_on: bool,
    pub max_pods: u32,
    pub pod_pids_limit: i64,
    pub resolv_conf: String,
    #[serde(rename = "cpuCFSQuota")]
    pub cpu_cfs_quota: bool,
    #[serde(rename = "cpuCFSQuotaPeriod")]
    pub cpu_cfs_quota_period: GoDuration,
    pub serialize_image_pulls: bool,
    pub max_parallel_image_pulls: Option<u32>,
    pub eviction_hard: BTreeMap<String, String>,
    pub eviction_soft: BTreeMap<String, String>,
    pub eviction_soft_grace_period: BTreeMap<String, GoDuration>,
    pub eviction_minimum_reclaim: BTreeMap<String, String>,
    /// Seconds that pods have at most that go because of a soft threshold.
    pub eviction_max_pod_grace_period: i32,
    pub eviction_pressure_transition_period: GoDuration,
    pub enable_controller_attach_detach: bool,
    pub system_reserved: BTreeMap<String, String>,
    pub kube_reserved: BTreeMap<String, String>,
    pub container_log_max_size: String,
    pub container_log_max_files: u32,
    pub container_log_monitor_interval: GoDuration,
    pub allowed_unsafe_sysctls: Vec<String>,
    pub volume_plugin_dir: String,
    #[serde(rename = "providerID")]
    pub provider_id: String,
    pub register_with_taints: Vec<Taint>,
    pub register_node: bool,
    pub container_runtime_endpoint: String,
    pub image_service_endpoint: String,
    pub pod_logs_dir: String,
    pub max_open_files: u64,
    pub oom_score_adj: i32,
    /// Time that pods have when the machine goes down; zero not to wait for them.
    pub shutdown_grace_period: GoDuration,
    /// The last part of it, which is for critical pods.
    pub shutdown_grace_period_critical_pods: GoDuration,
    /// The same for any priorities, in place of these two.
    pub shutdown_grace_period_by_pod_priority: Vec<ShutdownPeriod>,
    pub enable_server: bool,
    pub enable_debugging_handlers: bool,
    #[serde(rename = "eventRecordQPS")]
    pub event_record_qps: i32,
    pub event_burst: i32,
    pub rotate_certificates: bool,
    #[serde(rename = "serverTLSBootstrap")]
    pub server_tls_bootstrap: bool,
    /// Everything else that the file said.
    #[serde(flatten)]
    pub other: BTreeMap<String, Value>,
}

impl Default for KubeletConfiguration {
    fn default() -> Self {
        let text = str::to_owned;
        Self {
            static_pod_path: String::new(),
            sync_frequency: GoDuration::seconds(60),
            file_check_frequency: GoDuration::seconds(20),
            address: text("0.0.0.0"),
            port: 10250,
            read_only_port: 0,
            tls_cert_file: String::new(),
            tls_private_key_file: String::new(),
            authentication: Authentication::default(),
            authorization: Authorization::default(),
            healthz_port: 10248,
            healthz_bind_address: text("127.0.0.1"),
            cluster_domain: String::new(),
            cluster_dns: Vec::new(),
            streaming_connection_idle_timeout: GoDuration::seconds(4 * 3600),
            node_status_update_frequency: GoDuration::seconds(10),
            node_status_report_frequency: GoDuration::seconds(300),
            node_lease_duration_seconds: 40,
            image_minimum_gc_age: GoDuration::seconds(120),
            image_maximum_gc_age: GoDuration::seconds(0),
            image_gc_high_threshold_percent: 85,
            image_gc_low_threshold_percent: 80,
            cgroup_root: String::new(),
            cgroups_per_qos: true,
            cgroup_driver: text("cgroupfs"),
            fail_cgroup_v1: true,
            fail_swap_on: true,
            max_pods: 110,
            pod_pids_limit: -1,
            resolv_conf: text("/etc/resolv.conf"),
            cpu_cfs_quota: true,
            cpu_cfs_quota_period: GoDuration(Duration::from_millis(100)),
            serialize_image_pulls: true,
            max_parallel_image_pulls: None,
            eviction_hard: [
                ("memory.available", "100Mi"),
                ("nodefs.available", "10%"),
                ("nodefs.inodesFree", "5%"),
                ("imagefs.available", "15%"),
                ("imagefs.inodesFree", "5%"),
            ]
            .map(|(signal, threshold)| (text(signal), text(threshold)))
            .into(),
            eviction_soft: BTreeMap::new(),
            eviction_soft_grace_period: BTreeMap::new(),
            eviction_minimum_reclaim: BTreeMap::new(),
            eviction_max_pod_grace_period: 0,
            eviction_pressure_transition_period: GoDuration::seconds(300),
            enable_controller_attach_detach: true,
            system_reserved: BTreeMap::new(),
            kube_reserved: BTreeMap::new(),
            container_log_max_size: text("10Mi"),
            container_log_max_files: 5,
            container_log_monitor_interval: GoDuration::seconds(10),
            allowed_unsafe_sysctls: Vec::new(),
            volume_plugin_dir: text("/usr/libexec/kubernetes/kubelet-plugins/volume/exec/"),
            provider_id: String::new(),
            register_with_taints: Vec::new(),
            register_node: true,
            container_runtime_endpoint: text("unix:///run/containerd/containerd.sock"),
            image_service_endpoint: String::new(),
            pod_logs_dir: text("/var/log/pods"),
            max_open_files: 1_000_000,
            oom_score_adj: -999,
            shutdown_grace_period: GoDuration::seconds(0),
            shutdown_grace_period_critical_pods: GoDuration::seconds(0),
            shutdown_grace_period_by_pod_priority: Vec::new(),
            enable_server: true,
            enable_debugging_handlers: true,
            event_record_qps: 50,
            event_burst: 100,
            rotate_certificates: false,
            server_tls_bootstrap: false,
            other: BTreeMap::new(),
        }
    }
}

impl KubeletConfiguration {
    /// Reads `path`; every field that the file leaves out keeps upstream's default.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text =
            std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        Self::parse(path, &text)
    }

    fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        let mut document: Value = serde_saphyr::from_str(text)
            .map_err(|source| ConfigError::Yaml { path: path.to_owned(), source: Box::new(source) })?;
        let kind = document.get("kind").and_then(Value::as_str).unwrap_or("document without kind").to_owned();
        let version = document.get("apiVersion").and_then(Value::as_str).unwrap_or_default();
        if kind != "KubeletConfiguration" || version != "kubelet.config.k8s.io/v1beta1" {
            return Err(ConfigError::Kind { path: path.to_owned(), kind });
        }
        if let Some(fields) = document.as_object_mut() {
            // An explicit null means "the default" to upstream.
            fields.retain(|name, value| !value.is_null() && name != "kind" && name != "apiVersion");
        }
        serde_json::from_value(document).map_err(|source| ConfigError::Decode { path: path.to_owned(), source })
    }

    /// Refuses what cannot work and names in the log what is not acted upon.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if self.cgroup_driver != "cgroupfs" {
            let why =
                format!("{:?} is not supported; use cgroupfs here and in the container runtime", self.cgroup_driver);
            return Err(ConfigError::Invalid { field: "cgroupDriver", why });
        }
        if !matches!(self.authorization.mode.as_str(), "Webhook" | "AlwaysAllow") {
            let why = format!("{:?} is neither Webhook nor AlwaysAllow", self.authorization.mode);
            return Err(ConfigError::Invalid { field: "authorization.mode", why });
        }
        if !self.container_runtime_endpoint.starts_with("unix://") {
            let why = format!("{:?} is not a unix:// address", self.container_runtime_endpoint);
            return Err(ConfigError::Invalid { field: "containerRuntimeEndpoint", why });
        }
        self.validate_shutdown()?;
        if !self.other.is_empty() {
            let names: Vec<_> = self.other.keys().map(String::as_str).collect();
            tracing::warn!(fields = names.join(", "), "configuration fields that have no effect in this kubelet");
        }
        Ok(())
    }

    fn validate_shutdown(&self) -> Result<(), ConfigError> {
        let (all, critical) = (self.shutdown_grace_period.0, self.shutdown_grace_period_critical_pods.0);
        let second = Duration::from_secs(1);
        for (field, period) in [("shutdownGracePeriod", all), ("shutdownGracePeriodCriticalPods", critical)] {
            if !period.is_zero() && period < second {
                let why = format!("{period:?} must be either zero or otherwise >= 1 sec");
                return Err(ConfigError::Invalid { field, why });
            }
        }
        if critical > all {
            let why = format!("{critical:?} must be <= shutdownGracePeriod {all:?}");
            return Err(ConfigError::Invalid { field: "shutdownGracePeriodCriticalPods", why });
        }
        if !self.shutdown_grace_period_by_pod_priority.is_empty() && !all.is_zero() {
            let why = "cannot be given together with shutdownGracePeriod".to_owned();
            return Err(ConfigError::Invalid { field: "shutdownGracePeriodByPodPriority", why });
        }
        Ok(())
    }

    /// The container runtime's socket.
    pub fn runtime_socket(&self) -> &Path {
        let endpoint = self.container_runtime_endpoint.as_str();
        Path::new(endpoint.strip_prefix("unix://").unwrap_or(endpoint))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_gos() {
        for (text, want) in [
            ("0", Some(0)),
            ("10s", Some(10_000)),
            ("1m30s", Some(90_000)),
            ("4h0m0s", Some(14_400_000)),
            ("1.5s", Some(1_500)),
            ("250ms", Some(250)),
            ("", None),
            ("10", None),
            ("s", None),
            ("10x", None),
        ] {
            assert_eq!(parse_duration(text), want.map(Duration::from_millis), "{text:?}");
        }
        let show = |ms| serde_json::to_value(GoDuration(Duration::from_millis(ms))).unwrap();
        assert_eq!(show(14_400_000), "4h0m0s");
        assert_eq!(show(90_000), "1m30s");
        assert_eq!(show(100), "0.100s");
    }

    #[test]
    fn a_file_overrides_only_what_it_names() {
        let text = "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\n\
            authentication: {anonymous: {enabled: true}, x509: {clientCAFile: /ca.crt}}\nclusterDNS: [10.96.0.10]\n\
            evictionHard: {memory.available: 200Mi}\nregisterWithTaints: [{key: a, effect: NoSchedule}]\n\
            nodeStatusUpdateFrequency: null\nsomethingNew: 1\n";
        let config = KubeletConfiguration::parse(Path::new("k.yaml"), text).unwrap();
        assert!(config.authentication.anonymous.enabled && config.authentication.webhook.enabled);
        assert_eq!(config.authentication.x509.client_ca_file, "/ca.crt");
        assert_eq!(config.cluster_dns, ["10.96.0.10"]);
        assert_eq!(config.eviction_hard.len(), 1);
        assert_eq!(config.node_status_update_frequency, GoDuration::seconds(10));
        assert_eq!(config.other.keys().collect::<Vec<_>>(), ["somethingNew"]);
        assert_eq!(config.max_pods, 110);
        config.validate().unwrap();
    }

    #[test]
    fn periods_of_a_shutdown_fit_together() {
        for (all, critical, by_priority, fits) in [
            (0, 0, false, true),
            (30, 10, false, true),
            (0, 0, true, true),
            (10, 30, false, false),
            (30, 10, true, false),
        ] {
            let periods = vec![ShutdownPeriod::default(); usize::from(by_priority)];
            let config = KubeletConfiguration {
                shutdown_grace_period: GoDuration::seconds(all),
                shutdown_grace_period_critical_pods: GoDuration::seconds(critical),
                shutdown_grace_period_by_pod_priority: periods,
                ..KubeletConfiguration::default()
            };
            assert_eq!(config.validate().is_ok(), fits, "{all} {critical} {by_priority}");
        }
        let short = GoDuration(Duration::from_millis(500));
        let config = KubeletConfiguration { shutdown_grace_period: short, ..KubeletConfiguration::default() };
        assert!(config.validate().is_err());
    }

    #[test]
    fn another_kind_is_refused() {
        let error = KubeletConfiguration::parse(Path::new("k.yaml"), "kind: Pod\napiVersion: v1\n").unwrap_err();
        assert!(error.to_string().contains("holds a Pod"), "{error}");
    }
}
