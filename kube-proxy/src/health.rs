//! What others can ask: is the proxy alive (`/livez`), should load balancers use this node (`/healthz`), and how many
//! endpoints of a service are here (a node port of its own for each service that keeps traffic local).

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use apimachinery::process::error_chain;
use http::StatusCode;
use jiff::Timestamp;
use parking_lot::Mutex;
use serde_json::{Value, json};

use crate::http_server::{Answer, Handler, Server, answer, not_found, serve};
use crate::metrics::Metrics;
use crate::model::{Family, ServiceName};

/// When changes waited so long for the kernel, something is wrong.
const STALE_AFTER: Duration = Duration::from_secs(60);

/// The state of the proxy as others may know it.
#[derive(Clone, Default)]
pub struct Health(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    families: BTreeMap<Family, FamilyState>,
    eligible: bool,
}

#[derive(Default)]
struct FamilyState {
    updated: Option<Timestamp>,
    /// Since when changes wait.
    pending: Option<Timestamp>,
}

impl FamilyState {
    fn healthy(&self, now: Timestamp) -> bool {
        self.updated.is_some()
            && self.pending.is_none_or(|since| now.duration_since(since).unsigned_abs() < STALE_AFTER)
    }
}

impl Health {
    /// Knows of the families; they are not healthy before their first update.
    pub fn new(families: &[Family]) -> Self {
        let states = families.iter().map(|family| (*family, FamilyState::default())).collect();
        Self(Arc::new(Mutex::new(State { families: states, eligible: false })))
    }

    /// Changes are waiting for the kernel.
    pub fn queued(&self) {
        for family in self.0.lock().families.values_mut() {
            family.pending.get_or_insert_with(Timestamp::now);
        }
    }

    /// The kernel has all changes of the family.
    pub fn updated(&self, family: Family) {
        if let Some(state) = self.0.lock().families.get_mut(&family) {
            *state = FamilyState { updated: Some(Timestamp::now()), pending: None };
        }
    }

    pub fn set_eligible(&self, eligible: bool) {
        self.0.lock().eligible = eligible;
    }

    /// Whether changes reach the kernel in time.
    pub fn is_healthy(&self) -> bool {
        self.healthy_at(Timestamp::now())
    }

    fn healthy_at(&self, now: Timestamp) -> bool {
        self.0.lock().families.values().all(|family| family.healthy(now))
    }

    fn report(&self, with_eligibility: bool) -> Answer {
        let now = Timestamp::now();
        let healthy = self.healthy_at(now);
        let state = self.0.lock();
        let time = |time: Option<Timestamp>| time.unwrap_or(Timestamp::UNIX_EPOCH).to_string();
        let status: serde_json::Map<String, Value> = state
            .families
            .iter()
            .map(|(family, s)| {
                let body = json!({"lastUpdated": time(s.updated), "healthy": s.healthy(now)});
                (family.as_str().to_owned(), body)
            })
            .collect();
        // While nothing waits, the kernel is up to date at the moment of asking.
        let updated = if healthy { Some(now) } else { state.families.values().filter_map(|s| s.updated).max() };
        let mut body = json!({
            "lastUpdated": time(updated), "currentTime": now.to_string(), "healthy": healthy, "status": status,
        });
        let mut good = healthy;
        if with_eligibility {
            body["nodeEligible"] = Value::Bool(state.eligible);
            good &= state.eligible;
        }
        let status = if good { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
        answer(status, "application/json", body.to_string())
    }

    /// `/healthz` and `/livez`; the metrics count the answers.
    pub fn handler(&self, metrics: Arc<Metrics>) -> Handler {
        let health = self.clone();
        Arc::new(move |path| match path {
            "/healthz" => {
                let answer = health.report(true);
                metrics.answered(&metrics.healthz, answer.status());
                answer
            }
            "/livez" => {
                let answer = health.report(false);
                metrics.answered(&metrics.livez, answer.status());
                answer
            }
            _ => not_found(),
        })
    }
}

/// Which services ask for a health check: node port, service, and how many endpoints it has here.
pub type HealthChecks = BTreeMap<u16, (ServiceName, usize)>;

/// The servers on the health check node ports of services.
#[derive(Default)]
pub struct ServiceChecks {
    /// Whether they answer on IPv6, too.
    both_families: bool,
    running: BTreeMap<u16, (ServiceName, Arc<Mutex<usize>>, Server)>,
}

impl ServiceChecks {
    pub fn new(families: &[Family]) -> Self {
        Self { both_families: families.contains(&Family::Ipv6), running: BTreeMap::new() }
    }

    fn address(&self) -> IpAddr {
        if self.both_families { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() }
    }

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
            match serve(SocketAddr::new(self.address(), port), handler).await {
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

    fn health() -> Health {
        Health::new(&Family::ALL)
    }

    fn status(health: &Health, path: &str) -> StatusCode {
        health.handler(Arc::new(Metrics::default()))(path).status()
    }

    #[test]
    fn healthy_while_changes_reach_the_kernel() {
        let health = health();
        health.set_eligible(true);
        assert_eq!(status(&health, "/healthz"), StatusCode::SERVICE_UNAVAILABLE);
        health.updated(Family::Ipv4);
        assert_eq!(status(&health, "/healthz"), StatusCode::SERVICE_UNAVAILABLE, "the other family is not ready");
        health.updated(Family::Ipv6);
        assert_eq!(status(&health, "/healthz"), StatusCode::OK);
        health.queued();
        assert!(health.healthy_at(Timestamp::now()));
        assert!(!health.healthy_at(Timestamp::now() + 2 * STALE_AFTER));
    }

    #[test]
    fn a_node_that_leaves_is_alive_but_not_for_load_balancers() {
        let health = health();
        Family::ALL.into_iter().for_each(|family| health.updated(family));
        assert_eq!(status(&health, "/healthz"), StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(status(&health, "/livez"), StatusCode::OK);
        assert_eq!(status(&health, "/other"), StatusCode::NOT_FOUND);
    }

    #[test]
    fn a_service_is_healthy_where_it_has_endpoints() {
        let health = health();
        Family::ALL.into_iter().for_each(|family| health.updated(family));
        let service = ServiceName::new("ns", "svc");
        let answer = |count| service_handler(service.clone(), Arc::new(Mutex::new(count)), health.clone())("/");
        assert_eq!(answer(0).status(), StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(answer(2).status(), StatusCode::OK);
        assert_eq!(answer(2).headers()["x-load-balancing-endpoint-weight"], "2");
    }
}
