//! Aggregation: groups and versions that another API server answers, as an `APIService` says. Follows those objects,
//! watches over the servers behind them and says in their status whether they can be reached; passes requests on with
//! the user's identity in `X-Remote-*` headers. This server stays the only one that authenticates
//! (<https://kubernetes.io/docs/concepts/extend-kubernetes/api-extension/apiserver-aggregation/>).

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use apimachinery::meta::GroupVersionResource;
use apimachinery::status::{Result, Status};
use arc_swap::ArcSwap;
use base64::Engine;
use http::{HeaderName, HeaderValue, Method, Uri, header};
use http_body_util::{BodyExt, Limited};
use serde_json::{Value, json};

use crate::auth::UserInfo;
use crate::cache::{Selection, Start};
use crate::http::outbound::{Identity, Outbound, OutboundError, Trust, outbound};
use crate::http::upgrade::{forward, reach_error};
use crate::http::{Request, RequestInfo, Response, full};
use crate::registry::object::ObjectExt;
use crate::server::Server;
use crate::verbs::timestamp;

const GROUP: &str = "apiregistration.k8s.io";
const RESOURCE: &str = "apiservices";
/// How often a server that answers is asked again, and one that does not.
const CHECK: Duration = Duration::from_secs(30);
const CHECK_FAILED: Duration = Duration::from_secs(1);
const CHECK_TIMEOUT: Duration = Duration::from_secs(5);
const DISCOVERY_LIMIT: usize = 4 << 20;

/// Another server, for one group and version.
struct Target {
    name: String,
    group: String,
    version: String,
    /// `https://NAME.NAMESPACE.svc:PORT`
    base: String,
    spec: Value,
    client: std::result::Result<Outbound, OutboundError>,
    service: (String, String),
    /// Its `APIResourceList` as last seen; nothing while it cannot be reached.
    discovery: ArcSwap<Option<Value>>,
    /// Why it cannot be used.
    unavailable: ArcSwap<Option<Condition>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Condition {
    reason: &'static str,
    message: String,
}

/// The servers by group and version.
#[derive(Default)]
pub struct Aggregator {
    targets: ArcSwap<HashMap<(String, String), Arc<Target>>>,
}

impl Aggregator {
    fn target(&self, group: &str, version: &str) -> Option<Arc<Target>> {
        let targets = self.targets.load();
        if targets.is_empty() || group.is_empty() {
            return None;
        }
        targets.get(&(group.to_owned(), version.to_owned())).cloned()
    }

    /// Whether another server answers this group and version.
    pub fn has(&self, group: &str, version: &str) -> bool {
        self.target(group, version).is_some()
    }

    /// What the other servers serve, as far as it is known: group, version and `APIResourceList`.
    pub fn discovered(&self) -> Vec<(String, String, Value)> {
        let targets = self.targets.load();
        let known = targets.values().filter_map(|target| {
            let list = (**target.discovery.load()).clone()?;
            Some((target.group.clone(), target.version.clone(), list))
        });
        known.collect()
    }

    /// Passes a request on. Only for groups and versions that it `has`.
    pub async fn serve(
        &self,
        server: &Arc<Server>,
        user: &UserInfo,
        info: &RequestInfo,
        mut request: Request,
    ) -> Result<Response> {
        let target = self.target(&info.api_group, &info.api_version).ok_or_else(Status::path_not_found)?;
        if target.unavailable.load().is_some() {
            return Err(Status::service_unavailable("service unavailable"));
        }
        let client = target.client.as_ref().map_err(|_| Status::service_unavailable("service unavailable"))?;
        identify(request.headers_mut(), user);
        let path = request.uri().path_and_query().map_or("/", |path| path.as_str());
        let url = format!("{}{path}", target.base);
        let uri: Uri = url.parse().map_err(|_| Status::bad_request(format!("{path:?} cannot be passed on")))?;
        forward(client, uri, request, &server.shutdown).await.map_err(|error| {
            Status::service_unavailable(format!("error trying to reach service: {}", reach_error(&url, &error)))
        })
    }
}

/// Tells the other server who asks, and lets nobody else tell it.
fn identify(headers: &mut http::HeaderMap, user: &UserInfo) {
    let stale: Vec<HeaderName> =
        headers.keys().filter(|name| name.as_str().starts_with("x-remote-")).cloned().collect();
    for name in stale {
        headers.remove(name);
    }
    let mut add = |name: &str, value: &str| {
        if let (Ok(name), Ok(value)) = (name.parse::<HeaderName>(), HeaderValue::from_str(value)) {
            headers.append(name, value);
        }
    };
    add("x-remote-user", &user.name);
    if !user.uid.is_empty() {
        add("x-remote-uid", &user.uid);
    }
    for group in &user.groups {
        add("x-remote-group", group);
    }
    for (key, values) in &user.extra {
        let key = percent_encoding::utf8_percent_encode(key, percent_encoding::NON_ALPHANUMERIC);
        for value in values {
            add(&format!("x-remote-extra-{key}"), value);
        }
    }
}

/// Runs until shutdown.
pub async fn run(server: Arc<Server>) {
    let Some(cache) = server.caches.get(GROUP, RESOURCE) else { return };
    server.caches.wait_for(1).await;
    while !server.shutdown.is_cancelled() {
        // Services and endpoints matter too, but a look every second while something is missing finds them soon enough.
        let Ok((mut watch, _)) = cache.watch(Selection::default(), Start::Snapshot) else {
            tokio::time::sleep(CHECK_FAILED).await;
            continue;
        };
        loop {
            let all_well = reconcile(&server).await;
            let pause = if all_well { CHECK } else { CHECK_FAILED };
            tokio::select! {
                () = server.shutdown.cancelled() => return,
                () = tokio::time::sleep(pause) => {}
                event = watch.next() => if event.is_none() { break },
            }
        }
    }
}

/// Brings the targets up to date and checks each; answers whether all can be reached.
async fn reconcile(server: &Arc<Server>) -> bool {
    let Some(cache) = server.caches.get(GROUP, RESOURCE) else { return true };
    let old = server.aggregator.targets.load_full();
    let mut targets = HashMap::new();
    for stored in cache.list(None) {
        let object = stored.value();
        if !object["spec"]["service"].is_object() {
            continue;
        }
        let key = (object.str_at(&["spec", "group"]).to_owned(), object.str_at(&["spec", "version"]).to_owned());
        let known = old.get(&key).filter(|known| known.name == object.name() && known.spec == object["spec"]);
        let target = known.cloned().unwrap_or_else(|| Arc::new(Target::read(server, &object)));
        targets.insert(key, target);
    }
    server.aggregator.targets.store(Arc::new(targets.clone()));
    let checks = targets.into_values().map(|target| async move {
        let condition = target.check(server).await;
        target.unavailable.store(Arc::new(condition.clone()));
        if let Err(error) = report(server, &target.name, condition.as_ref()).await
            && error.code != 404
        {
            tracing::warn!(name = target.name, %error, "cannot write the status of an API service");
        }
        condition.is_none()
    });
    futures::future::join_all(checks).await.into_iter().all(|is_well| is_well)
}

impl Target {
    fn read(server: &Server, object: &Value) -> Self {
        let spec = &object["spec"];
        let service = (spec.str_at(&["service", "namespace"]).to_owned(), spec.str_at(&["service", "name"]).to_owned());
        let port = spec.i64_at(&["service", "port"]).unwrap_or(443);
        let bundle = base64::engine::general_purpose::STANDARD.decode(spec.str_at(&["caBundle"])).unwrap_or_default();
        let trust = match (spec["insecureSkipTLSVerify"] == true, bundle.is_empty()) {
            (true, _) => Trust::Anyone,
            (false, true) => Trust::System,
            (false, false) => Trust::Pem(&bundle),
        };
        let config = &server.config;
        let certificate = config.proxy_client_cert_file.as_deref().zip(config.proxy_client_key_file.as_deref());
        let client = outbound(&Identity { certificate, trust }, Some(server.caches.clone()), config.kubelet_timeout);
        Self {
            name: object.name().to_owned(),
            group: spec.str_at(&["group"]).to_owned(),
            version: spec.str_at(&["version"]).to_owned(),
            base: format!("https://{}.{}.svc:{port}", service.1, service.0),
            spec: spec.clone(),
            client,
            service,
            discovery: ArcSwap::default(),
            // Not before the first check.
            unavailable: ArcSwap::from_pointee(Some(Condition {
                reason: "Unknown",
                message: "not checked yet".into(),
            })),
        }
    }

    /// What is wrong with it; nothing: it answers.
    async fn check(&self, server: &Server) -> Option<Condition> {
        let condition = |reason, message| Some(Condition { reason, message });
        let (namespace, name) = (&self.service.0, &self.service.1);
        let services = server.caches.get("", "services");
        if services.and_then(|cache| cache.get(namespace, name)).is_none() {
            let message = format!("service/{name} in {namespace:?} is not present");
            return condition("ServiceNotFound", message);
        }
        let client = match &self.client {
            Ok(client) => client,
            Err(error) => {
                return condition("FailedDiscoveryCheck", apimachinery::process::error_chain(error));
            }
        };
        let url = format!("{}/apis/{}/{}", self.base, self.group, self.version);
        let asked = tokio::time::timeout(CHECK_TIMEOUT, ask(client, &url)).await;
        let problem = match asked {
            Ok(Ok(list)) => {
                self.discovery.store(Arc::new(Some(list)));
                return None;
            }
            Ok(Err(problem)) => problem,
            Err(_) => "context deadline exceeded".to_owned(),
        };
        self.discovery.store(Arc::new(None));
        condition("FailedDiscoveryCheck", format!("failing or missing response from {url}: {problem}"))
    }
}

/// Reads the resources of the other server, as a member of the group that may see them.
async fn ask(client: &Outbound, url: &str) -> std::result::Result<Value, String> {
    let mut request = http::Request::builder()
        .method(Method::GET)
        .uri(url)
        .header(header::ACCEPT, "application/json")
        .body(full(""))
        .map_err(|error| error.to_string())?;
    let checker = UserInfo {
        name: "system:kube-aggregator".into(),
        groups: vec!["system:masters".into()],
        ..UserInfo::default()
    };
    identify(request.headers_mut(), &checker);
    let answer = client.request(request).await.map_err(|error| reach_error(url, &error))?;
    if !answer.status().is_success() {
        return Err(format!("bad status from {url}: {}", answer.status().as_u16()));
    }
    let body = Limited::new(answer.into_body(), DISCOVERY_LIMIT).collect().await.map_err(|error| error.to_string())?;
    serde_json::from_slice(&body.to_bytes()).map_err(|error| error.to_string())
}

/// Writes the `Available` condition when it is another one.
async fn report(server: &Arc<Server>, name: &str, problem: Option<&Condition>) -> Result<()> {
    let passed = Condition { reason: "Passed", message: "all checks passed".into() };
    let status = if problem.is_none() { "True" } else { "False" };
    let wanted = problem.unwrap_or(&passed);
    let gvr = GroupVersionResource::new(GROUP, "v1", RESOURCE);
    let object = server.get(&gvr, "", name).await?;
    let is_current = object.list_at(&["status", "conditions"]).iter().any(|condition| {
        condition["type"] == "Available"
            && condition["status"] == status
            && condition["reason"] == wanted.reason
            && condition["message"] == wanted.message.as_str()
    });
    if is_current {
        return Ok(());
    }
    let user = UserInfo::server();
    let written = server.guaranteed_update(&user, &gvr, "", name, "status", |mut object| {
        let mut conditions = object.list_at(&["status", "conditions"]).to_vec();
        let old = conditions.iter().position(|condition| condition["type"] == "Available");
        let since = old.filter(|at| conditions[*at]["status"] == status);
        let since = since.map(|at| conditions[at]["lastTransitionTime"].clone());
        let condition = json!({
            "type": "Available",
            "status": status,
            "reason": wanted.reason,
            "message": wanted.message,
            "lastTransitionTime": since.unwrap_or_else(|| timestamp(jiff::Timestamp::now()).into()),
        });
        match old {
            Some(at) => conditions[at] = condition,
            None => conditions.insert(0, condition),
        }
        object.set(&["status", "conditions"], conditions);
        Ok(object)
    });
    written.await.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identities_cannot_be_forged() {
        let mut headers = http::HeaderMap::new();
        headers.insert("x-remote-group", HeaderValue::from_static("system:masters"));
        headers.insert("x-remote-extra-a", HeaderValue::from_static("b"));
        let user = UserInfo { name: "alice".into(), groups: vec!["dev".into()], ..UserInfo::default() };
        identify(&mut headers, &user);
        assert_eq!(headers["x-remote-user"], "alice");
        assert_eq!(headers.get_all("x-remote-group").iter().collect::<Vec<_>>(), ["dev"]);
        assert!(!headers.contains_key("x-remote-extra-a"));
    }
}
