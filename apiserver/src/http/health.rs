//! `/healthz`, `/livez`, `/readyz`: named checks, alone (`/readyz/etcd`) or together, with `?verbose` and `?exclude=`.

use std::time::Duration;

use http::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderName, HeaderValue};
use http::{HeaderMap, StatusCode};

use super::{RequestInfo, Response, full};
use crate::server::Server;

const TIMEOUT: Duration = Duration::from_secs(2);

/// One named check of one or more of the endpoints.
struct Check {
    name: &'static str,
    kind: Kind,
    /// Only `/readyz` asks.
    ready_only: bool,
}

enum Kind {
    Ping,
    Etcd,
    CachesFilled,
    ShuttingDown,
    /// An object that bootstrap makes exists: group, resource, name.
    Exists(&'static str, &'static str, &'static str),
}

const CHECKS: &[Check] = &[
    Check { name: "ping", kind: Kind::Ping, ready_only: false },
    Check { name: "log", kind: Kind::Ping, ready_only: false },
    Check { name: "etcd", kind: Kind::Etcd, ready_only: false },
    Check { name: "etcd-readiness", kind: Kind::Etcd, ready_only: true },
    Check { name: "informer-sync", kind: Kind::CachesFilled, ready_only: true },
    Check {
        name: "poststarthook/rbac/bootstrap-roles",
        kind: Kind::Exists("rbac.authorization.k8s.io", "clusterrolebindings", "cluster-admin"),
        ready_only: false,
    },
    Check {
        name: "poststarthook/scheduling/bootstrap-system-priority-classes",
        kind: Kind::Exists("scheduling.k8s.io", "priorityclasses", "system-node-critical"),
        ready_only: false,
    },
    Check {
        name: "poststarthook/start-system-namespaces-controller",
        kind: Kind::Exists("", "namespaces", "kube-system"),
        ready_only: false,
    },
    Check { name: "shutdown", kind: Kind::ShuttingDown, ready_only: true },
];

impl Check {
    async fn run(&self, server: &Server) -> Result<(), String> {
        let fine = |good: bool, why: &str| if good { Ok(()) } else { Err(why.to_owned()) };
        match self.kind {
            Kind::Ping => Ok(()),
            Kind::Etcd => match tokio::time::timeout(TIMEOUT, server.store.revision()).await {
                Ok(Ok(_)) => Ok(()),
                Ok(Err(error)) => Err(apimachinery::process::error_chain(&error)),
                Err(_) => Err("etcd did not answer in time".into()),
            },
            Kind::CachesFilled => fine(server.caches.are_ready(), "caches are not filled yet"),
            Kind::ShuttingDown => fine(!server.shutdown.is_cancelled(), "process is shutting down"),
            Kind::Exists(group, resource, name) => {
                let cache = server.caches.get(group, resource);
                fine(cache.is_some_and(|cache| cache.get("", name).is_some()), "not finished")
            }
        }
    }
}

/// The answer to a health path; `None` for other paths.
pub async fn answer(server: &Server, info: &RequestInfo) -> Option<Response> {
    let path = info.path.trim_matches('/');
    let (endpoint, single) = path.split_once('/').map_or((path, None), |(endpoint, check)| (endpoint, Some(check)));
    if !matches!(endpoint, "healthz" | "livez" | "readyz") {
        return None;
    }
    let asked = CHECKS.iter().filter(|check| endpoint == "readyz" || !check.ready_only);
    if let Some(name) = single {
        let check = asked.clone().find(|check| check.name == name)?;
        return Some(match check.run(server).await {
            Ok(()) => text(StatusCode::OK, "ok".into()),
            Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("internal server error: {error}\n")),
        });
    }
    let mut excluded: Vec<&str> = info.params("exclude").collect();
    let (mut lines, mut failed) = (String::new(), Vec::new());
    for check in asked {
        if let Some(position) = excluded.iter().position(|name| *name == check.name) {
            excluded.swap_remove(position);
            lines.push_str(&format!("[+]{} excluded: ok\n", check.name));
            continue;
        }
        match check.run(server).await {
            Ok(()) => lines.push_str(&format!("[+]{} ok\n", check.name)),
            Err(error) => {
                tracing::info!(check = check.name, error, "health check failed");
                failed.push(check.name);
                lines.push_str(&format!("[-]{} failed: reason withheld\n", check.name));
            }
        }
    }
    if !excluded.is_empty() {
        let names: Vec<String> = excluded.iter().map(|name| format!("{name:?}")).collect();
        lines.push_str(&format!("warn: some health checks cannot be excluded: no matches for {}\n", names.join(",")));
    }
    Some(match (failed.is_empty(), info.param("verbose").is_some()) {
        (false, _) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{lines}{endpoint} check failed\n")),
        (true, true) => text(StatusCode::OK, format!("{lines}{endpoint} check passed\n")),
        (true, false) => text(StatusCode::OK, "ok".into()),
    })
}

/// A plain text answer that nobody may guess another type of or keep.
pub fn text(status: StatusCode, body: String) -> Response {
    let mut response = Response::new(full(body));
    *response.status_mut() = status;
    response.headers_mut().extend(HeaderMap::from_iter([
        (CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8")),
        (HeaderName::from_static("x-content-type-options"), HeaderValue::from_static("nosniff")),
        (CACHE_CONTROL, HeaderValue::from_static("no-cache, private")),
    ]));
    response
}
