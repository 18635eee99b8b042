//! Figures about the proxy's own work, under upstream's names.

use std::sync::Arc;
use std::time::Duration;

use http::StatusCode;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family as Labelled;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

use crate::config::Mode;
use crate::http_server::{Handler, answer, not_found};
use crate::informers::Counts;
use crate::model::Family;
use crate::plan::{Disposition, PlannedPort};

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ByFamily {
    ip_family: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ByCode {
    code: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ByPolicy {
    traffic_policy: &'static str,
    ip_family: &'static str,
}

type Seconds = Labelled<ByFamily, Histogram, fn() -> Histogram>;

pub struct Metrics {
    registry: Registry,
    sync: Seconds,
    full_sync: Seconds,
    partial_sync: Seconds,
    network_programming: Seconds,
    last_sync: Labelled<ByFamily, Gauge>,
    last_queued: Labelled<ByFamily, Gauge>,
    endpoint_changes: Counter,
    service_changes: Counter,
    nftables_failures: Labelled<ByFamily, Counter>,
    iptables_failures: Labelled<ByFamily, Counter>,
    pub healthz: Labelled<ByCode, Counter>,
    pub livez: Labelled<ByCode, Counter>,
    no_local_endpoints: Labelled<ByPolicy, Gauge>,
    conntrack: Seconds,
    conntrack_deleted: Labelled<ByFamily, Counter>,
}

fn by(family: Family) -> ByFamily {
    ByFamily { ip_family: family.as_str() }
}

impl Default for Metrics {
    fn default() -> Self {
        let millisecond_and_up = || Histogram::new(exponential_buckets(0.001, 2.0, 15));
        let quarter_second_and_up = || Histogram::new(exponential_buckets(0.25, 2.0, 11));
        let metrics = Self {
            registry: Registry::default(),
            sync: Labelled::new_with_constructor(millisecond_and_up),
            full_sync: Labelled::new_with_constructor(millisecond_and_up),
            partial_sync: Labelled::new_with_constructor(millisecond_and_up),
            network_programming: Labelled::new_with_constructor(quarter_second_and_up),
            last_sync: Labelled::default(),
            last_queued: Labelled::default(),
            endpoint_changes: Counter::default(),
            service_changes: Counter::default(),
            nftables_failures: Labelled::default(),
            iptables_failures: Labelled::default(),
            healthz: Labelled::default(),
            livez: Labelled::default(),
            no_local_endpoints: Labelled::default(),
            conntrack: Labelled::new_with_constructor(millisecond_and_up),
            conntrack_deleted: Labelled::default(),
        };
        metrics.registered()
    }
}

impl Metrics {
    /// The library appends `_total` to the names of counters.
    #[rustfmt::skip]
    fn registered(mut self) -> Self {
        let all = self.registry.sub_registry_with_prefix("kubeproxy");
        all.register("sync_proxy_rules_duration_seconds", "Time to bring the kernel up to date", self.sync.clone());
        all.register("sync_full_proxy_rules_duration_seconds", "Time to bring everything in the kernel up to date", self.full_sync.clone());
        all.register("sync_partial_proxy_rules_duration_seconds", "Time to bring the kernel up to date with a few changes", self.partial_sync.clone());
        all.register("network_programming_duration_seconds", "From the change of a pod or service to the change of the kernel", self.network_programming.clone());
        all.register("sync_proxy_rules_last_timestamp_seconds", "When the kernel was brought up to date last", self.last_sync.clone());
        all.register("sync_proxy_rules_last_queued_timestamp_seconds", "When a change came last", self.last_queued.clone());
        all.register("sync_proxy_rules_endpoint_changes", "Changes of endpoint slices", self.endpoint_changes.clone());
        all.register("sync_proxy_rules_service_changes", "Changes of services", self.service_changes.clone());
        all.register("sync_proxy_rules_nftables_sync_failures", "Times that nftables could not be brought up to date", self.nftables_failures.clone());
        all.register("sync_proxy_rules_iptables_restore_failures", "Times that iptables could not be brought up to date", self.iptables_failures.clone());
        all.register("proxy_healthz", "Answers of /healthz", self.healthz.clone());
        all.register("proxy_livez", "Answers of /livez", self.livez.clone());
        // A gauge in spite of its name, as upstream's.
        all.register("sync_proxy_rules_no_local_endpoints_total", "Service ports with a Local traffic policy and no local endpoint", self.no_local_endpoints.clone());
        all.register("conntrack_reconciler_sync_duration_seconds", "Time to look for stale connections", self.conntrack.clone());
        all.register("conntrack_reconciler_deleted_entries", "Stale connections that were forgotten", self.conntrack_deleted.clone());
        self
    }

    pub fn synced(&self, family: Family, full: bool, took: Duration) {
        let seconds = took.as_secs_f64();
        self.sync.get_or_create(&by(family)).observe(seconds);
        let kind = if full { &self.full_sync } else { &self.partial_sync };
        kind.get_or_create(&by(family)).observe(seconds);
        self.last_sync.get_or_create(&by(family)).set(jiff::Timestamp::now().as_second());
    }

    pub fn failed(&self, mode: Mode, family: Family) {
        let counter = match mode {
            Mode::Nftables => &self.nftables_failures,
            Mode::Iptables => &self.iptables_failures,
        };
        counter.get_or_create(&by(family)).inc();
    }

    /// All changes so far.
    pub fn changes(&self, counts: Counts) {
        self.service_changes.inc_by(counts.services.saturating_sub(self.service_changes.get()));
        self.endpoint_changes.inc_by(counts.slices.saturating_sub(self.endpoint_changes.get()));
    }

    pub fn queued(&self, families: &[Family]) {
        for family in families {
            self.last_queued.get_or_create(&by(*family)).set(jiff::Timestamp::now().as_second());
        }
    }

    pub fn programmed(&self, family: Family, since_change: Duration) {
        self.network_programming.get_or_create(&by(family)).observe(since_change.as_secs_f64());
    }

    pub fn forgot(&self, family: Family, connections: usize, took: Duration) {
        self.conntrack.get_or_create(&by(family)).observe(took.as_secs_f64());
        self.conntrack_deleted.get_or_create(&by(family)).inc_by(connections as u64);
    }

    /// Counts a port that keeps traffic local and has no endpoint here, or one less.
    pub fn count_local(&self, port: &PlannedPort, step: i64) {
        for (traffic_policy, disposition) in [("internal", port.internal), ("external", port.external)] {
            if disposition == Disposition::Drop {
                let labels = ByPolicy { traffic_policy, ip_family: port.family().as_str() };
                self.no_local_endpoints.get_or_create(&labels).inc_by(step);
            }
        }
    }

    pub fn answered(&self, counter: &Labelled<ByCode, Counter>, status: StatusCode) {
        counter.get_or_create(&ByCode { code: status.as_u16() }).inc();
    }

    /// `/metrics` and `/proxyMode`; `/healthz` says that the process runs.
    pub fn handler(self: Arc<Self>, mode: &'static str) -> Handler {
        const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
        Arc::new(move |path| match path {
            "/proxyMode" => answer(StatusCode::OK, "text/plain; charset=utf-8", mode.to_owned()),
            "/healthz" | "/livez" => answer(StatusCode::OK, "text/plain; charset=utf-8", "ok".to_owned()),
            "/metrics" => {
                let mut body = String::new();
                match prometheus_client::encoding::text::encode(&mut body, &self.registry) {
                    Ok(()) => answer(StatusCode::OK, OPEN_METRICS, body),
                    Err(error) => answer(StatusCode::INTERNAL_SERVER_ERROR, "text/plain", error.to_string()),
                }
            }
            _ => not_found(),
        })
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;

    use super::*;

    #[tokio::test]
    async fn metrics_have_upstreams_names() {
        let metrics = Arc::new(Metrics::default());
        metrics.synced(Family::Ipv4, true, Duration::from_millis(3));
        metrics.programmed(Family::Ipv4, Duration::from_secs(1));
        metrics.forgot(Family::Ipv6, 2, Duration::from_millis(1));
        metrics.answered(&metrics.healthz, StatusCode::OK);
        let answer = metrics.handler("nftables")("/metrics");
        let body = answer.into_body().collect().await.unwrap().to_bytes();
        let text = std::str::from_utf8(&body).unwrap();
        for line in [
            "kubeproxy_sync_proxy_rules_duration_seconds_count{ip_family=\"IPv4\"} 1",
            "kubeproxy_sync_full_proxy_rules_duration_seconds_count{ip_family=\"IPv4\"} 1",
            "kubeproxy_network_programming_duration_seconds_count{ip_family=\"IPv4\"} 1",
            "kubeproxy_conntrack_reconciler_deleted_entries_total{ip_family=\"IPv6\"} 2",
            "kubeproxy_proxy_healthz_total{code=\"200\"} 1",
            "kubeproxy_sync_proxy_rules_service_changes_total 0",
        ] {
            assert!(text.contains(line), "no {line} in\n{text}");
        }
    }
}
