//! Requests that this server passes on: to a kubelet for `log`, `exec`, `attach`, `portforward` and `nodes/proxy`, to
//! a pod or to an endpoint of a service for their `proxy`. Here is decided where to; `upgrade` carries the bytes.

use std::net::IpAddr;
use std::sync::Arc;

use apimachinery::meta::{GroupKind, GroupResource};
use apimachinery::status::{FieldError, Result, Status};
use http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, HeaderValue, LOCATION};
use http::{Method, StatusCode, Uri};
use http_body_util::{BodyExt, Limited};
use serde_json::{Value, json};

use super::outbound::{Identity, Outbound, OutboundError, Trust, outbound};
use super::upgrade::{forward, reach_error, wants_upgrade};
use super::{Request, RequestInfo, Response, full};
use super::{links, stream_socket};
use crate::admission::{Operation, Warnings};
use crate::auth::UserInfo;
use crate::config::Config;
use crate::registry::object::ObjectExt;
use crate::server::Server;
use crate::verbs::Call;

/// What is read at most of a backend's error message.
const ERROR_LIMIT: usize = 50_000;
/// The largest page whose links are rewritten, in bytes.
const PAGE_LIMIT: usize = 16 << 20;
const KUBELET_PORT: u64 = 10250;

/// The clients of the two kinds of backends.
pub struct Proxies {
    kubelets: Outbound,
    pods: Outbound,
    address_types: Vec<String>,
}

impl Proxies {
    pub fn build(config: &Config) -> std::result::Result<Self, OutboundError> {
        let certificate = config.kubelet_client_certificate.as_deref().zip(config.kubelet_client_key.as_deref());
        let trust = config.kubelet_certificate_authority.as_deref().map_or(Trust::Anyone, Trust::File);
        Ok(Self {
            kubelets: outbound(&Identity { certificate, trust }, None, config.kubelet_timeout)?,
            pods: outbound(&Identity::new(Trust::Anyone), None, config.kubelet_timeout)?,
            address_types: config.kubelet_preferred_address_types.clone(),
        })
    }

    /// A client that shows no certificate and asks for none.
    pub fn any_server(&self) -> &Outbound {
        &self.pods
    }
}

/// Whether a resource and subresource are answered by another server.
pub fn is_connect(info: &RequestInfo) -> bool {
    info.is_resource
        && info.api_group.is_empty()
        && matches!(
            (info.resource.as_str(), info.subresource.as_str()),
            ("pods", "log" | "exec" | "attach" | "portforward" | "proxy") | ("services" | "nodes", "proxy")
        )
}

/// Answers what the backend answers. Only for requests that `is_connect`.
pub async fn connect(
    server: &Arc<Server>,
    user: &UserInfo,
    info: &RequestInfo,
    request: Request,
    warnings: &Arc<Warnings>,
) -> Result<Response> {
    admit(server, user, info, warnings).await?;
    match (info.resource.as_str(), info.subresource.as_str()) {
        ("pods", "log") => log(server, info, request).await,
        ("pods", "exec" | "attach" | "portforward") => stream(server, info, request).await,
        ("pods", _) => {
            let base = pod_base(server, info)?;
            proxied(server, &server.proxies.pods, &base, info, request).await
        }
        ("services", _) => {
            let base = service_base(server, info)?;
            proxied(server, &server.proxies.pods, &base, info, request).await
        }
        _ => {
            let (scheme, name, port) = split(&info.name, "node")?;
            let (host, kubelet_port) = kubelet(server, name)?;
            let (client, base) = match port.is_empty() || port == kubelet_port.to_string() {
                true => (&server.proxies.kubelets, format!("https://{}:{kubelet_port}", bracketed(&host))),
                false => (&server.proxies.pods, format!("{}://{}:{port}", scheme_or_http(scheme), bracketed(&host))),
            };
            proxied(server, client, &base, info, request).await
        }
    }
}

/// Asks admission about the connection; what it is asked about are the options of the request as an object.
async fn admit(server: &Arc<Server>, user: &UserInfo, info: &RequestInfo, warnings: &Arc<Warnings>) -> Result<()> {
    if info.subresource == "log" {
        return Ok(());
    }
    let resource = server.registry.get(&info.api_group, &info.resource).ok_or_else(Status::path_not_found)?;
    let served = resource.version(&info.api_version).ok_or_else(Status::path_not_found)?.clone();
    let mut options = json!({"kind": options_kind(info), "apiVersion": "v1"});
    match info.subresource.as_str() {
        "exec" | "attach" => {
            for stream in ["stdin", "stdout", "stderr", "tty"] {
                if info.flag(stream) {
                    options[stream] = true.into();
                }
            }
            if let Some(container) = info.param("container") {
                options["container"] = container.into();
            }
            let command: Vec<&str> = info.params("command").collect();
            if !command.is_empty() {
                options["command"] = json!(command);
            }
        }
        "portforward" => {
            let ports: Vec<i64> = info.params("ports").filter_map(|port| port.parse().ok()).collect();
            options["ports"] = json!(ports);
        }
        _ => options["path"] = info.param("path").unwrap_or_default().into(),
    }
    let call = Call {
        namespace: info.namespace.clone(),
        name: info.name.clone(),
        subresource: info.subresource.clone(),
        warnings: warnings.clone(),
        ..Call::new(server, user, resource, served)
    };
    call.admit(Operation::Connect, &info.name, &mut options, None).await?;
    call.validate_admission(Operation::Connect, &info.name, &mut options, None).await
}

fn options_kind(info: &RequestInfo) -> &'static str {
    match (info.resource.as_str(), info.subresource.as_str()) {
        (_, "exec") => "PodExecOptions",
        (_, "attach") => "PodAttachOptions",
        (_, "portforward") => "PodPortForwardOptions",
        ("services", _) => "ServiceProxyOptions",
        ("nodes", _) => "NodeProxyOptions",
        _ => "PodProxyOptions",
    }
}

fn cached(server: &Server, resource: &'static str, namespace: &str, name: &str) -> Result<Value> {
    let found = server.caches.get("", resource).and_then(|cache| cache.get(namespace, name));
    found.map(|stored| stored.value()).ok_or_else(|| Status::not_found(&GroupResource::new("", resource), name))
}

/// Host and port of the kubelet of a node.
fn kubelet(server: &Server, node: &str) -> Result<(String, u64)> {
    let node = cached(server, "nodes", "", node)?;
    let port = node["status"]["daemonEndpoints"]["kubeletEndpoint"]["Port"].as_u64().filter(|port| *port != 0);
    let addresses = node.list_at(&["status", "addresses"]);
    let of_type = |wanted: &String| addresses.iter().find(|address| address["type"] == wanted.as_str());
    let address = server.proxies.address_types.iter().find_map(of_type).map(|address| address.str_at(&["address"]));
    match address.filter(|address| !address.is_empty()) {
        Some(address) => Ok((address.to_owned(), port.unwrap_or(KUBELET_PORT))),
        None => {
            let known: Vec<String> = addresses
                .iter()
                .map(|address| format!("{{{} {}}}", address.str_at(&["type"]), address.str_at(&["address"])))
                .collect();
            Err(Status::internal(format!("no preferred addresses found; known addresses: [{}]", known.join(" "))))
        }
    }
}

fn bracketed(host: &str) -> String {
    if host.contains(':') { format!("[{host}]") } else { host.to_owned() }
}

fn scheme_or_http(scheme: &str) -> &str {
    if scheme.is_empty() { "http" } else { scheme }
}

/// `[scheme:]name[:port]`.
fn split<'a>(id: &'a str, kind: &str) -> Result<(&'a str, &'a str, &'a str)> {
    let parts: Vec<&str> = id.split(':').collect();
    let (scheme, name, port) = match parts.as_slice() {
        [name] => ("", *name, ""),
        [name, port] => ("", *name, *port),
        [scheme, name, port] => (*scheme, *name, *port),
        _ => ("", "", ""),
    };
    if name.is_empty() || !matches!(scheme, "" | "http" | "https") {
        return Err(Status::bad_request(format!("invalid {kind} request {id:?}")));
    }
    Ok((scheme, name, port))
}

fn pod_base(server: &Server, info: &RequestInfo) -> Result<String> {
    let (scheme, name, port) = split(&info.name, "pod")?;
    let pod = cached(server, "pods", &info.namespace, name)?;
    let declared = || {
        let ports = pod.list_at(&["spec", "containers"]).iter().flat_map(|container| container.list_at(&["ports"]));
        ports.filter_map(|port| port.i64_at(&["containerPort"])).next().map(|port| port.to_string())
    };
    let port = if port.is_empty() { declared().unwrap_or_default() } else { port.to_owned() };
    let ip = pod.str_at(&["status", "podIP"]);
    if !ip.parse::<IpAddr>().is_ok_and(is_global_unicast) {
        return Err(Status::bad_request("address not allowed"));
    }
    let port = if port.is_empty() { String::new() } else { format!(":{port}") };
    Ok(format!("{}://{}{port}", scheme_or_http(scheme), bracketed(ip)))
}

fn is_global_unicast(ip: IpAddr) -> bool {
    let link_local = match ip {
        IpAddr::V4(ip) => ip.is_link_local() || ip.is_broadcast(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    !(ip.is_loopback() || ip.is_unspecified() || ip.is_multicast() || link_local)
}

/// A ready endpoint of the service, chosen at random.
fn service_base(server: &Server, info: &RequestInfo) -> Result<String> {
    let (scheme, name, port) = split(&info.name, "service")?;
    let mut port_name = port.to_owned();
    if let Ok(number) = port.parse::<i64>() {
        let service = cached(server, "services", &info.namespace, name)?;
        let declared = service.list_at(&["spec", "ports"]).iter().find(|port| port.i64_at(&["port"]) == Some(number));
        let Some(declared) = declared else {
            return Err(Status::service_unavailable(format!("no service port {number} found for service {name:?}")));
        };
        port_name = declared.str_at(&["name"]).to_owned();
    }
    let candidates = endpoints(server, &info.namespace, name, &port_name);
    if candidates.is_empty() {
        return Err(Status::service_unavailable(format!("no endpoints available for service {name:?}")));
    }
    let (ip, port) = &candidates[rand::random_range(0..candidates.len())];
    Ok(format!("{}://{}:{port}", scheme_or_http(scheme), bracketed(ip)))
}

/// Addresses of ready endpoints that are pods of the namespace, with the number of the named port.
fn endpoints(server: &Server, namespace: &str, service: &str, port_name: &str) -> Vec<(String, i64)> {
    let Some(cache) = server.caches.get("discovery.k8s.io", "endpointslices") else { return Vec::new() };
    let slices = cache.list(Some(namespace)).into_iter().map(|stored| stored.value());
    let mut found = Vec::new();
    for slice in slices.filter(|slice| slice.label("kubernetes.io/service-name") == Some(service)) {
        let named = |port: &&Value| port.str_at(&["name"]) == port_name;
        let Some(port) = slice.list_at(&["ports"]).iter().find(named).and_then(|port| port.i64_at(&["port"])) else {
            continue;
        };
        for endpoint in slice.list_at(&["endpoints"]) {
            let ready = endpoint.bool_at(&["conditions", "ready"]).unwrap_or(true);
            let ip = endpoint.list_at(&["addresses"]).first().and_then(Value::as_str).unwrap_or_default();
            let target = &endpoint["targetRef"];
            let in_namespace = target["namespace"] == namespace;
            let pod = || cached(server, "pods", namespace, target.str_at(&["name"]));
            let is_its = |pod: Value| pod.list_at(&["status", "podIPs"]).iter().any(|entry| entry["ip"] == ip);
            if ready && in_namespace && pod().is_ok_and(is_its) {
                found.push((ip.to_owned(), port));
            }
        }
    }
    found
}

/// The part of the raw path that follows `/proxy`; `None` when not even a slash does.
fn rest_of_path<'a>(info: &RequestInfo, path: &'a str) -> Option<&'a str> {
    // "", api, v1, namespaces, <ns>, pods, <name>, proxy — or, for nodes, without the namespace.
    let before = if info.namespace.is_empty() { 6 } else { 8 };
    path.match_indices('/').nth(before - 1).map(|(at, _)| &path[at..])
}

/// Passes the request to `base` with the rest of its path and its query.
async fn proxied(
    server: &Arc<Server>,
    client: &Outbound,
    base: &str,
    info: &RequestInfo,
    request: Request,
) -> Result<Response> {
    let path = request.uri().path().to_owned();
    let query = request.uri().query().map(|query| format!("?{query}")).unwrap_or_default();
    let Some(rest) = rest_of_path(info, &path) else {
        if matches!(*request.method(), Method::GET | Method::HEAD) && !wants_upgrade(request.headers()) {
            let mut response = Response::new(full(""));
            *response.status_mut() = StatusCode::MOVED_PERMANENTLY;
            if let Ok(location) = HeaderValue::from_str(&format!("{path}/{query}")) {
                response.headers_mut().insert(LOCATION, location);
            }
            return Ok(response);
        }
        return send(server, client, &format!("{base}/{query}"), request).await;
    };
    let prefix = path[..path.len() - rest.len()].to_owned();
    let mut response = send(server, client, &format!("{base}{rest}{query}"), request).await?;
    if response.headers().contains_key(LOCATION) {
        rewrite_location(&mut response, base, &prefix);
        return Ok(response);
    }
    if is_plain_page(&response) { rewrite_page(response, base, &prefix).await } else { Ok(response) }
}

/// Whether the answer is a page that can be read; pages that say that they are too large or compressed cannot.
fn is_plain_page(response: &Response) -> bool {
    let header = |name| response.headers().get(name).and_then(|value| value.to_str().ok());
    let media_type = header(CONTENT_TYPE).and_then(|value| value.split(';').next()).unwrap_or_default();
    let length = header(CONTENT_LENGTH).and_then(|value| value.parse::<usize>().ok());
    media_type.trim().eq_ignore_ascii_case("text/html")
        && !response.headers().contains_key(CONTENT_ENCODING)
        && length.is_none_or(|length| length <= PAGE_LIMIT)
}

async fn rewrite_page(response: Response, base: &str, prefix: &str) -> Result<Response> {
    let (mut parts, body) = response.into_parts();
    let body = Limited::new(body, PAGE_LIMIT).collect().await;
    let body = body.map_err(|error| Status::service_unavailable(format!("error reading the page: {error}")))?;
    let body = body.to_bytes();
    let body = match std::str::from_utf8(&body) {
        Ok(page) => links::rewrite(page, base, prefix).into(),
        Err(_) => body,
    };
    // The answer to HEAD has no page, but says how long it would be; what it would be then, nobody knows.
    parts.headers.remove(CONTENT_LENGTH);
    Ok(Response::from_parts(parts, full(body)))
}

/// A redirect of the backend to itself must come back through this server.
fn rewrite_location(response: &mut Response, base: &str, prefix: &str) {
    let Some(location) = response.headers().get(LOCATION).and_then(|value| value.to_str().ok()) else { return };
    let Some(location) = links::through_proxy(location, base, prefix) else { return };
    if let Ok(value) = HeaderValue::from_str(&location) {
        response.headers_mut().insert(LOCATION, value);
    }
}

async fn send(server: &Arc<Server>, client: &Outbound, target: &str, request: Request) -> Result<Response> {
    let uri: Uri =
        target.parse().map_err(|error| Status::bad_request(format!("invalid target of the proxy: {error}")))?;
    let sent = forward(client, uri, request, &server.shutdown).await;
    sent.map_err(|error| {
        Status::service_unavailable(format!("error trying to reach service: {}", reach_error(target, &error)))
    })
}

/// The container that is meant: the named one, which must exist, or the only one.
fn container(pod: &Value, wanted: &str) -> Result<String> {
    let spec = &pod["spec"];
    let names = |list: &str| -> Vec<String> {
        spec.list_at(&[list]).iter().map(|container| container.str_at(&["name"]).to_owned()).collect()
    };
    let containers = names("containers");
    let all = || [names("initContainers"), containers.clone(), names("ephemeralContainers")].concat();
    match (wanted, containers.as_slice()) {
        ("", [only]) => Ok(only.clone()),
        ("", []) => Err(Status::bad_request(format!("a container name must be specified for pod {}", pod.name()))),
        ("", _) => Err(Status::bad_request(format!(
            "a container name must be specified for pod {}, choose one of: [{}]",
            pod.name(),
            all().join(" ")
        ))),
        (name, _) if all().iter().any(|known| known == name) => Ok(name.to_owned()),
        (name, _) => Err(Status::bad_request(format!("container {name} is not valid for pod {}", pod.name()))),
    }
}

fn encoded(pairs: &[(&str, String)]) -> String {
    let mut query = form_urlencoded::Serializer::new(String::new());
    for (name, value) in pairs {
        query.append_pair(name, value);
    }
    query.finish()
}

/// `exec`, `attach` and `portforward`: an upgraded connection to the kubelet.
async fn stream(server: &Arc<Server>, info: &RequestInfo, request: Request) -> Result<Response> {
    let pod = cached(server, "pods", &info.namespace, &info.name)?;
    let mut params = Vec::new();
    let path = if info.subresource == "portforward" {
        let ports: Vec<&str> = info.params("ports").collect();
        if !ports.is_empty() {
            params.push(("port", ports.join(",")));
        }
        format!("/portForward/{}/{}", info.namespace, info.name)
    } else {
        let container = container(&pod, info.param("container").unwrap_or_default())?;
        for (given, passed) in [("stdin", "input"), ("stdout", "output"), ("stderr", "error"), ("tty", "tty")] {
            if info.flag(given) {
                params.push((passed, "1".to_owned()));
            }
        }
        if info.subresource == "exec" {
            params.extend(info.params("command").map(|word| ("command", word.to_owned())));
        }
        format!("/{}/{}/{}/{container}", info.subresource, info.namespace, info.name)
    };
    let node = pod.str_at(&["spec", "nodeName"]);
    if node.is_empty() {
        return Err(Status::bad_request(format!("pod {} does not have a host assigned", info.name)));
    }
    if !wants_upgrade(request.headers()) {
        return Err(Status::bad_request("Upgrade request required"));
    }
    let (host, port) = kubelet(server, node)?;
    let target = format!("https://{}:{port}{path}?{}", bracketed(&host), encoded(&params));
    let uri: Uri = target.parse().map_err(|error| Status::internal(format!("address of the kubelet: {error}")))?;
    let sent = forward(&server.proxies.kubelets, uri, request, &server.shutdown).await;
    sent.map_err(|error| Status::internal(format!("error dialing backend: {}", reach_error(&target, &error))))
}

/// `log`: the kubelet's text as it comes.
async fn log(server: &Arc<Server>, info: &RequestInfo, mut request: Request) -> Result<Response> {
    if *request.method() != Method::GET {
        return Err(Status::method_not_supported(&GroupResource::new("", "pods"), &info.verb));
    }
    let pod = cached(server, "pods", &info.namespace, &info.name)?;
    let query = log_query(info)?;
    let container = container(&pod, info.param("container").unwrap_or_default())?;
    let node = pod.str_at(&["spec", "nodeName"]);
    if node.is_empty() {
        let mut nothing = Response::new(full(""));
        *nothing.status_mut() = StatusCode::NO_CONTENT;
        return Ok(nothing);
    }
    let (host, port) = kubelet(server, node)?;
    let path = format!("/containerLogs/{}/{}/{container}", info.namespace, info.name);
    let target = format!("https://{}:{port}{path}?{query}", bracketed(&host));
    let uri: Uri = target.parse().map_err(|error| Status::internal(format!("address of the kubelet: {error}")))?;
    let socket = stream_socket::wanted(&mut request)?;
    let (parts, _) = request.into_parts();
    let mut asked = Request::new(full(""));
    if let Some(encoding) = parts.headers.get(http::header::ACCEPT_ENCODING).filter(|_| socket.is_none()) {
        asked.headers_mut().insert(http::header::ACCEPT_ENCODING, encoding.clone());
    }
    let sent = forward(&server.proxies.kubelets, uri, asked, &server.shutdown).await;
    let response =
        sent.map_err(|error| Status::internal(format!("Get {target:?}: {}", reach_error(&target, &error))))?;
    if !response.status().is_success() {
        return Err(kubelet_error(response, &info.name).await);
    }
    if let Some(socket) = socket {
        return Ok(stream_socket::send(socket, response, server.shutdown.clone()));
    }
    let (mut parts, body) = response.into_parts();
    let headers = std::mem::take(&mut parts.headers);
    if let Some(encoding) = headers.get(http::header::CONTENT_ENCODING) {
        parts.headers.insert(http::header::CONTENT_ENCODING, encoding.clone());
    }
    parts.headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain"));
    parts.headers.insert(http::header::CACHE_CONTROL, HeaderValue::from_static("no-cache, private"));
    Ok(Response::from_parts(parts, body))
}

/// The options of `log` as the kubelet wants them, checked as upstream checks them.
fn log_query(info: &RequestInfo) -> Result<String> {
    let mut params = Vec::new();
    for flag in ["follow", "previous", "timestamps"] {
        if info.flag(flag) {
            params.push((flag, "true".to_owned()));
        }
    }
    let mut errors = Vec::new();
    for (name, least) in [("sinceSeconds", 1), ("tailLines", 0), ("limitBytes", 1)] {
        let Some(text) = info.param(name).filter(|text| !text.is_empty()) else { continue };
        let number: i64 = text
            .parse()
            .map_err(|_| Status::bad_request(format!("strconv.ParseInt: parsing {text:?}: invalid syntax")))?;
        if number < least {
            let detail = if least == 0 { "must be greater than or equal to 0" } else { "must be greater than 0" };
            errors.push(FieldError::invalid(name, number, detail));
        }
        params.push((name, number.to_string()));
    }
    if let Some(at) = info.param("sinceTime").filter(|at| !at.is_empty()) {
        if info.param("sinceSeconds").is_some() {
            errors.push(FieldError::forbidden("", "at most one of `sinceTime` or `sinceSeconds` may be specified"));
        }
        let at: jiff::Timestamp =
            at.parse().map_err(|_| Status::bad_request(format!("parsing time {at:?}: not RFC 3339")))?;
        params.push(("sinceTime", at.to_string()));
    }
    let stream = info.param("stream").unwrap_or("All");
    if !matches!(stream, "All" | "Stdout" | "Stderr") {
        errors.push(FieldError::not_supported("stream", stream, &["All", "Stdout", "Stderr"]));
    } else if stream != "All" && info.param("tailLines").is_some() {
        errors.push(FieldError::forbidden("", "`tailLines` and specific `stream` are mutually exclusive for now"));
    }
    params.push(("stream", stream.to_owned()));
    if errors.is_empty() {
        return Ok(encoded(&params));
    }
    Err(Status::invalid(&GroupKind::new("", "PodLogOptions"), &info.name, &errors))
}

/// A kubelet's refusal as a `Status`.
async fn kubelet_error(response: Response, name: &str) -> Status {
    let code = response.status();
    let body = Limited::new(response.into_body(), ERROR_LIMIT).collect().await;
    let text = body.map(|body| String::from_utf8_lossy(&body.to_bytes()).into_owned()).unwrap_or_default();
    match code {
        StatusCode::INTERNAL_SERVER_ERROR => Status::internal(text),
        StatusCode::BAD_REQUEST => Status::bad_request(text),
        StatusCode::NOT_FOUND => Status::failure(
            404,
            "NotFound",
            format!("the server could not find the requested resource ( pods/log {name})"),
        ),
        code => Status::failure(code.as_u16(), code.canonical_reason().unwrap_or("Unknown"), text),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn info(path: &str) -> RequestInfo {
        let (path, query) = path.split_once('?').map_or((path, None), |(path, query)| (path, Some(query)));
        RequestInfo::new(&Method::GET, path, query)
    }

    #[test]
    fn the_rest_of_the_path_is_passed_on_raw() {
        for (path, rest) in [
            ("/api/v1/namespaces/a/pods/p:80/proxy/x%2Fy/z", Some("/x%2Fy/z")),
            ("/api/v1/namespaces/a/pods/proxy/proxy/", Some("/")),
            ("/api/v1/namespaces/a/services/s/proxy", None),
            ("/api/v1/nodes/n/proxy/metrics", Some("/metrics")),
            ("/api/v1/nodes/n/proxy", None),
        ] {
            assert_eq!(rest_of_path(&info(path), path), rest, "{path}");
        }
    }

    #[test]
    fn containers_are_chosen_or_named() {
        let pod = json!({"metadata": {"name": "p"}, "spec": {
            "initContainers": [{"name": "i"}], "containers": [{"name": "a"}, {"name": "b"}]}});
        let message = |wanted| container(&pod, wanted).map_err(|status| status.message);
        assert_eq!(message("i"), Ok("i".to_owned()));
        assert_eq!(message(""), Err("a container name must be specified for pod p, choose one of: [i a b]".to_owned()));
        assert_eq!(message("c"), Err("container c is not valid for pod p".to_owned()));
    }

    #[test]
    fn log_options_are_checked() {
        let base = "/api/v1/namespaces/a/pods/p/log";
        assert_eq!(
            log_query(&info(&format!("{base}?follow=true&tailLines=5"))).unwrap(),
            "follow=true&tailLines=5&stream=All"
        );
        assert_eq!(log_query(&info(&format!("{base}?tailLines=-1"))).unwrap_err().code, 422);
        assert_eq!(log_query(&info(&format!("{base}?tailLines=x"))).unwrap_err().code, 400);
        assert_eq!(log_query(&info(&format!("{base}?sinceSeconds=0"))).unwrap_err().code, 422);
    }

    #[test]
    fn redirects_come_back_through_here() {
        let mut response = Response::new(full(""));
        response.headers_mut().insert(LOCATION, HeaderValue::from_static("http://10.0.0.1:80/b"));
        rewrite_location(&mut response, "http://10.0.0.1:80", "/api/v1/namespaces/a/pods/p/proxy");
        assert_eq!(response.headers()[LOCATION], "/api/v1/namespaces/a/pods/p/proxy/b");
    }

    #[test]
    fn ids_have_up_to_three_parts() {
        assert_eq!(split("https:p:443", "pod").unwrap(), ("https", "p", "443"));
        assert_eq!(split("p", "pod").unwrap(), ("", "p", ""));
        assert_eq!(split("ftp:p:1", "pod").unwrap_err().message, r#"invalid pod request "ftp:p:1""#);
    }
}
