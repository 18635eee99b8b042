//! `/metrics`: requests by what they asked and how it ended, and the process itself, under upstream's names. The
//! filters report every request here; nothing here reads a clock or the network by itself.

use std::fmt::Write;
use std::sync::LazyLock;
use std::sync::atomic::AtomicI64;
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use super::RequestInfo;
use crate::server::Server;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Asked {
    verb: String,
    group: String,
    version: String,
    resource: String,
    subresource: String,
    scope: &'static str,
    component: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Answered {
    verb: String,
    group: String,
    version: String,
    resource: String,
    subresource: String,
    scope: &'static str,
    component: &'static str,
    dry_run: String,
    code: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestKind {
    request_kind: &'static str,
}

/// Upper bounds of the duration buckets, in seconds.
const BUCKETS: [f64; 14] = [0.005, 0.025, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.25, 2.0, 5.0, 10.0, 60.0];

struct Metrics {
    requests: Family<Answered, Counter>,
    durations: Family<Asked, Histogram, fn() -> Histogram>,
    in_flight: Family<RequestKind, Gauge<i64, AtomicI64>>,
    registry: Registry,
}

static METRICS: LazyLock<Metrics> = LazyLock::new(|| {
    let requests = Family::default();
    let durations = Family::new_with_constructor((|| Histogram::new(BUCKETS)) as fn() -> Histogram);
    let in_flight = Family::default();
    let mut registry = Registry::default();
    registry.register("apiserver_request", "Requests by what they asked and how they ended.", requests.clone());
    registry.register(
        "apiserver_request_duration_seconds",
        "How long requests took, but for long-running ones.",
        durations.clone(),
    );
    registry.register("apiserver_current_inflight_requests", "Requests being worked on.", in_flight.clone());
    Metrics { requests, durations, in_flight, registry }
});

/// The verb label: upstream's upper-case names; anything odd that a client sends counts as `other`.
fn verb(info: &RequestInfo) -> String {
    const KNOWN: [&str; 14] = [
        "get",
        "list",
        "watch",
        "create",
        "update",
        "patch",
        "delete",
        "deletecollection",
        "post",
        "put",
        "head",
        "options",
        "proxy",
        "connect",
    ];
    let verb = if super::proxy::is_connect(info) { "connect" } else { info.verb.as_str() };
    match verb {
        "create" => "POST".into(),
        "update" => "PUT".into(),
        verb if KNOWN.contains(&verb) => verb.to_ascii_uppercase(),
        _ => "other".into(),
    }
}

fn scope(info: &RequestInfo) -> &'static str {
    match (info.is_resource, info.name.is_empty(), info.namespace.is_empty()) {
        (false, ..) => "",
        (true, false, _) => "resource",
        (true, true, false) => "namespace",
        (true, true, true) => "cluster",
    }
}

/// Counts a finished request. Paths that are no resources and requests that nothing serves share one series, so that
/// clients cannot make series at will.
pub fn observe(info: &RequestInfo, served: bool, code: u16, took: Duration) {
    let text = |value: &str| if served { value.to_owned() } else { String::new() };
    let asked = Asked {
        verb: verb(info),
        group: text(&info.api_group),
        version: text(&info.api_version),
        resource: text(&info.resource),
        subresource: text(&info.subresource),
        scope: scope(info),
        component: "apiserver",
    };
    let Asked { verb, group, version, resource, subresource, scope, component } = asked.clone();
    let dry_run = info.param("dryRun").filter(|value| *value == "All").unwrap_or_default().to_owned();
    let answered = Answered { verb, group, version, resource, subresource, scope, component, dry_run, code };
    METRICS.requests.get_or_create(&answered).inc();
    if !info.is_long_running() {
        METRICS.durations.get_or_create(&asked).observe(took.as_secs_f64());
    }
}

/// Counts a request as being worked on until it is dropped.
pub struct InFlight(&'static str);

impl InFlight {
    pub fn start(mutating: bool) -> Self {
        let request_kind = if mutating { "mutating" } else { "readOnly" };
        METRICS.in_flight.get_or_create(&RequestKind { request_kind }).inc();
        Self(request_kind)
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        METRICS.in_flight.get_or_create(&RequestKind { request_kind: self.0 }).dec();
    }
}

/// The text that a scraper reads.
pub fn render(server: &Server) -> String {
    let mut text = String::new();
    if let Err(error) = prometheus_client::encoding::text::encode(&mut text, &METRICS.registry) {
        tracing::warn!(%error, "metrics cannot be written");
    }
    // The format's end marker must stay last.
    text.truncate(text.trim_end_matches("# EOF\n").len());
    objects(server, &mut text);
    process(&mut text);
    text
}

fn objects(server: &Server, text: &mut String) {
    text.push_str(
        "# HELP apiserver_resource_objects Stored objects by resource.\n# TYPE apiserver_resource_objects gauge\n",
    );
    for resource in server.registry.all() {
        let (name, count) = (&resource.group_resource, resource.cache.len());
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "apiserver_resource_objects{{group=\"{}\",resource=\"{}\"}} {count}",
            name.group, name.resource
        );
    }
}

/// Memory, processor time and start of the process, from `/proc`.
fn process(text: &mut String) {
    let Ok(stat) = std::fs::read_to_string("/proc/self/stat") else { return };
    // Fields after the command, which is in parentheses and may hold anything.
    let fields: Vec<&str> = stat.rsplit_once(") ").map(|(_, rest)| rest.split(' ').collect()).unwrap_or_default();
    let number = |index: usize| fields.get(index).and_then(|field| field.parse::<f64>().ok()).unwrap_or_default();
    const TICKS_PER_SECOND: f64 = 100.0;
    const PAGE: f64 = 4096.0;
    for (name, kind, value) in [
        ("process_cpu_seconds_total", "counter", (number(11) + number(12)) / TICKS_PER_SECOND),
        ("process_virtual_memory_bytes", "gauge", number(20)),
        ("process_resident_memory_bytes", "gauge", number(21) * PAGE),
    ] {
        let _ = writeln!(text, "# TYPE {name} {kind}\n{name} {value}");
    }
}

#[cfg(test)]
mod tests {
    use http::Method;

    use super::*;

    #[test]
    fn requests_are_counted_by_what_they_asked() {
        let info = RequestInfo::new(&Method::GET, "/api/v1/namespaces/a/pods", None);
        observe(&info, true, 200, Duration::from_millis(3));
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &METRICS.registry).unwrap();
        assert!(
            text.contains(r#"apiserver_request_total{verb="LIST",group="",version="v1",resource="pods""#),
            "{text}"
        );
        let odd = RequestInfo { verb: "brew".into(), ..RequestInfo::default() };
        assert_eq!(verb(&odd), "other");
    }
}
