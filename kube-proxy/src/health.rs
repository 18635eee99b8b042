//! What others can ask: is the proxy alive (`/livez`), should load balancers use this node (`/healthz`), how many
//! endpoints of a service are here (a node port of its own for each service that keeps traffic local), and metrics.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use apimachinery::process::error_chain;
use http::StatusCode;
use jiff::Timestamp;
use parking_lot::Mutex;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;
use serde_json::{Value, json};

use crate::http_server::{Answer, Handler, Server, answer, not_found, serve};
use crate::model::ServiceName;
use crate::plan::HealthChecks;

/// When changes waited so long for the kernel, something is wrong.
const STALE_AFTER: Duration = Duration::from_secs(60);

/// The state of the proxy as others may know it.
#[derive(Clone, Default)]
pub struct Health(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    updated: Option<Timestamp>,
    /// Since when changes wait.
    pending: Option<Timestamp>,
    eligible: bool,
}

impl Health {
    /// Changes are waiting for the kernel.
    pub fn queued(&self) {
        self.0.lock().pending.get_or_insert_with(Timestamp::now);
    }

    /// The kernel has all changes.
    pub fn updated(&self) {
        let mut state = self.0.lock();
        state.updated = Some(Timestamp::now());
        state.pending = None;
    }

    pub fn set_eligible(&self, eligible: bool) {
        self.0.lock().eligible = eligible;
    }

    /// Whether changes reach the kernel in time.
    pub fn is_healthy(&self) -> bool {
        self.healthy_at(Timestamp::now())
    }

    fn healthy_at(&self, now: Timestamp) -> bool {
        let state = self.0.lock();
        state.updated.is_some()
            && state.pending.is_none_or(|since| now.duration_since(since).unsigned_abs() < STALE_AFTER)
    }

    fn report(&self, with_eligibility: bool) -> Answer {
        let now = Timestamp::now();
        let healthy = self.healthy_at(now);
        let state = self.0.lock();
        // The time of the last update is the time of asking while nothing waits: the kernel is up to date now.
        let updated = if healthy { Some(now) } else { state.updated };
        let updated = updated.unwrap_or(Timestamp::UNIX_EPOCH).to_string();
        let mut body = json!({
            "lastUpdated": updated, "currentTime": now.to_string(), "healthy": healthy,
            "status": {"IPv4": {"lastUpdated": updated, "healthy": healthy}},
        });
        let mut good = healthy;
        if with_eligibility {
            body["nodeEligible"] = Value::Bool(state.eligible);
            good &= state.eligible;
        }
        let status = if good { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
        answer(status, "application/json", body.to_string())
    }

    /// `/healthz` and `/livez`.
    pub fn handler(&self) -> Handler {
        let health = self.clone();
        Arc::new(move |path| match path {
            "/healthz" => health.report(true),
            "/livez" => health.report(false),
            _ => not_found(),
        })
    }
}

/// Figures about the proxy's own work.
pub struct Metrics {
    registry: Registry,
    pub sync_seconds: Histogram,
    pub sync_failures: Counter,
    pub last_sync: Gauge,
    pub no_local_internal: Gauge,
    pub no_local_external: Gauge,
}

impl Default for Metrics {
    fn default() -> Self {
        let metrics = Self {
            registry: Registry::default(),
            sync_seconds: Histogram::new(exponential_buckets(0.001, 2.0, 15)),
            sync_failures: Counter::default(),
            last_sync: Gauge::default(),
            no_local_internal: Gauge::default(),
            no_local_external: Gauge::default(),
        };
        metrics.registered()
    }
}

impl Metrics {
    fn registered(mut self) -> Self {
        let registry = self.registry.sub_registry_with_prefix("kubeproxy");
        registry.register(
            "sync_proxy_rules_duration_seconds",
            "Time to bring the kernel up to date",
            self.sync_seconds.clone(),
        );
        registry.register(
            "sync_proxy_rules_failures",
            "Times that the kernel could not be brought up to date",
            self.sync_failures.clone(),
        );
        registry.register(
            "sync_proxy_rules_last_timestamp_seconds",
            "When the kernel was brought up to date last",
            self.last_sync.clone(),
        );
        registry.register(
            "sync_proxy_rules_no_local_endpoints_internal",
            "Service ports with internal traffic policy Local and no local endpoint",
            self.no_local_internal.clone(),
        );
        registry.register(
            "sync_proxy_rules_no_local_endpoints_external",
            "Service ports with external traffic policy Local and no local endpoint",
            self.no_local_external.clone(),
        );
        self
    }

    /// `/metrics` and `/proxyMode`; `/healthz` says that the process runs.
    pub fn handler(self: Arc<Self>, mode: &'static str) -> Handler {
        const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
        Arc::new(move |path| match path {
            "/proxyMode" => answer(StatusCode::OK, "text/plain; charset=utf-8", mode.to_owned()),
            "/healthz" => answer(StatusCode::OK, "text/plain; charset=utf-8", "ok".to_owned()),
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

/// The servers on the health check node ports of services.
#[derive(Default)]
pub struct ServiceChecks {
    running: BTreeMap<u16, (ServiceName, Arc<Mutex<usize>>, Server)>,
}

impl ServiceChecks {
    /// Makes the servers be those of the plan. A port that cannot be bound is reported and tried again next time.
    pub async fn update(&mut self, wanted: &HealthChecks, health: &Health) {
        self.running.retain(|port, (service, ..)| wanted.get(port).is_some_and(|(name, _)| name == service));
        for (&port, (service, count)) in wanted {
            if let Some((_, current, _)) = self.running.get(&port) {
                *current.lock() = *count;
                continue;
            }
            let current = Arc::new(Mutex::new(*count));
            let handler = service_handler(service.clone(), current.clone(), health.clone());
            match serve(SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), port), handler).await {
                Ok(server) => {
                    self.running.insert(port, (service.clone(), current, server));
                }
                Err(error) => {
                    tracing::error!(%service, error = error_chain(&error), "cannot serve the service's health check");
                }
            }
        }
    }
}

fn service_handler(service: ServiceName, count: Arc<Mutex<usize>>, health: Health) -> Handler {
    Arc::new(move |_| {
        let (count, healthy) = (*count.lock(), health.is_healthy());
        let good = count > 0 && healthy;
        let status = if good { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
        let body = json!({
            "service": {"namespace": service.namespace, "name": service.name},
            "localEndpoints": count, "serviceProxyHealthy": healthy,
        });
        let mut answer = answer(status, "application/json", body.to_string());
        answer.headers_mut().insert("x-load-balancing-endpoint-weight", http::HeaderValue::from(count));
        answer
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn healthy_while_changes_reach_the_kernel() {
        let health = Health::default();
        health.set_eligible(true);
        assert_eq!(health.handler()("/healthz").status(), StatusCode::SERVICE_UNAVAILABLE);
        health.updated();
        assert_eq!(health.handler()("/healthz").status(), StatusCode::OK);
        health.queued();
        assert!(health.healthy_at(Timestamp::now()));
        assert!(!health.healthy_at(Timestamp::now() + 2 * STALE_AFTER));
    }

    #[test]
    fn a_node_that_leaves_is_alive_but_not_for_load_balancers() {
        let health = Health::default();
        health.updated();
        assert_eq!(health.handler()("/healthz").status(), StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(health.handler()("/livez").status(), StatusCode::OK);
        assert_eq!(health.handler()("/other").status(), StatusCode::NOT_FOUND);
    }

    #[test]
    fn a_service_is_healthy_where_it_has_endpoints() {
        let health = Health::default();
        health.updated();
        let service = ServiceName { namespace: "ns".to_owned(), name: "svc".to_owned() };
        let answer = |count| service_handler(service.clone(), Arc::new(Mutex::new(count)), health.clone())("/");
        assert_eq!(answer(0).status(), StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(answer(2).status(), StatusCode::OK);
        assert_eq!(answer(2).headers()["x-load-balancing-endpoint-weight"], "2");
    }

    #[test]
    fn metrics_have_upstreams_names() {
        let answer = Arc::new(Metrics::default()).handler("nftables")("/metrics");
        assert_eq!(answer.status(), StatusCode::OK);
    }
}
