//! What every request passes, in this order: panic recovery, request info, authentication, audit, impersonation, its
//! place among the others, authorization, and then the resource (with limits of body and time) or the route. Each step
//! is one small function; there is no other way in.

use std::net::SocketAddr;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use apimachinery::status::Status;
use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use http::{HeaderValue, Method, header};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use rustls::pki_types::CertificateDer;
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::{Instant, timeout};

use super::resources::{self, Input, Output};
use super::{Request, RequestInfo, Response, error, metrics, proxy, routes, stream_socket};
use crate::admission::Warnings;
use crate::audit::Trail;
use crate::auth::{Attributes, AuthnRequest, Decision, UserInfo};
use crate::flow::{Flow, Place};
use crate::server::Server;

/// The largest body of a request.
const BODY_MAX: usize = 3 * 1024 * 1024;
const WARNINGS_MAX: usize = 4 * 1024;

/// How many requests may be under way.
pub struct InFlight {
    reading: Semaphore,
    mutating: Semaphore,
}

impl InFlight {
    pub fn new(reading: usize, mutating: usize) -> Self {
        let semaphore = |permits: usize| Semaphore::new(if permits == 0 { Semaphore::MAX_PERMITS } else { permits });
        Self { reading: semaphore(reading), mutating: semaphore(mutating) }
    }

    /// `None` for requests that are not counted; an error when there are too many.
    fn admit(&self, info: &RequestInfo) -> Result<Option<SemaphorePermit<'_>>, Status> {
        if info.is_long_running() || !info.is_resource {
            return Ok(None);
        }
        let semaphore = if info.is_mutating() { &self.mutating } else { &self.reading };
        semaphore
            .try_acquire()
            .map(Some)
            .map_err(|_| Status::too_many_requests("Too many requests, please try again later.", 1))
    }
}

/// Who sends a request.
pub struct Peer {
    /// The client's certificate chain, leaf first; unverified.
    pub certificates: Vec<CertificateDer<'static>>,
    pub address: SocketAddr,
}

/// Answers one request, whatever happens.
pub fn handle(server: Arc<Server>, peer: Arc<Peer>, request: Request) -> BoxFuture<'static, Response> {
    Box::pin(answer(server, peer, request))
}

async fn answer(server: Arc<Server>, peer: Arc<Peer>, request: Request) -> Response {
    let info = RequestInfo::new(request.method(), request.uri().path(), request.uri().query());
    let encoding = resources::error_encoding(request.headers());
    let audit_id = audit_id(&request);
    let is_head = request.method() == Method::HEAD;
    let started = Instant::now();
    let served =
        server.registry.get(&info.api_group, &info.resource).is_some_and(|r| r.version(&info.api_version).is_some());
    let warnings = Arc::new(Warnings::default());
    let mut asked =
        Asked { peer: &peer, info: &info, audit_id: &audit_id, warnings: &warnings, trail: None, place: None };
    let answered = AssertUnwindSafe(chain(&server, &mut asked, request)).catch_unwind().await;
    let (trail, place) = (asked.trail, asked.place);
    let mut failure = None;
    let mut response = match answered {
        Ok(Ok(output)) => with_warnings(output.response, output.warnings.into_iter().chain(warnings.take())),
        Ok(Err(status)) => {
            let response = error::response(&status, encoding);
            failure = Some(status);
            with_warnings(response, warnings.take().into_iter())
        }
        Err(_) => {
            tracing::error!(path = info.path, verb = info.verb, "a request made the server panic");
            let text = "This request caused apiserver to panic. Look in the logs for details.";
            if let Some(trail) = &trail {
                trail.panicked();
            }
            error::response(&Status::internal(text), encoding)
        }
    };
    metrics::observe(&info, served, response.status().as_u16(), started.elapsed());
    if let Some(place) = place {
        place.mark(&mut response);
    }
    response.headers_mut().insert("audit-id", audit_id);
    response
        .headers_mut()
        .entry(header::CACHE_CONTROL)
        .or_insert_with(|| HeaderValue::from_static("no-cache, private"));
    if is_head {
        *response.body_mut() = super::full(Bytes::new());
    }
    match trail {
        Some(trail) => trail.answer(response, failure.as_ref()),
        None => response,
    }
}

/// A request, as far as it is known before it is read.
struct Asked<'a> {
    peer: &'a Peer,
    info: &'a RequestInfo,
    audit_id: &'a HeaderValue,
    warnings: &'a Arc<Warnings>,
    /// `None` unless it is audited.
    trail: Option<Arc<Trail>>,
    /// Where it stands among the others, once that is known.
    place: Option<Place>,
}

impl Asked<'_> {
    /// Begins the trail, if the request is to have one.
    fn audit(&mut self, server: &Server, user: &UserInfo, request: Request) -> Request {
        let Some(auditor) = &server.audit else { return request };
        self.trail = auditor.begin(user, self.info, &request, self.audit_id, Some(self.peer.address));
        match &self.trail {
            Some(trail) => {
                trail.received();
                trail.capture_request(request)
            }
            None => request,
        }
    }

    /// Waits until there is room. The permit is of those who are only counted.
    async fn enter<'s>(&mut self, server: &'s Server, user: &UserInfo) -> Result<Option<SemaphorePermit<'s>>, Status> {
        let Some(flow) = &server.flow else { return server.in_flight.admit(self.info) };
        if !Flow::counts(self.info) {
            return Ok(None);
        }
        let resource = (self.info.verb == "list")
            .then(|| server.registry.get(&self.info.api_group, &self.info.resource))
            .flatten();
        let count = resource.map_or(0, |resource| resource.cache.len());
        match flow.admit(user, self.info, count).await {
            Ok(Some(place)) => {
                self.place = Some(place);
                Ok(None)
            }
            Ok(None) => server.in_flight.admit(self.info),
            Err((status, place)) => {
                self.place = Some(place);
                Err(status)
            }
        }
    }
}

async fn chain(server: &Arc<Server>, asked: &mut Asked<'_>, request: Request) -> Result<Output, Status> {
    let info = asked.info;
    let _counted = (!info.is_long_running()).then(|| metrics::InFlight::start(info.is_mutating()));
    let authn =
        AuthnRequest { headers: request.headers(), peer_certs: &asked.peer.certificates, path: &info.path, server };
    let user = match server.auth.authenticate(&authn).boxed().await {
        Ok(user) => user,
        Err(status) => {
            drop(asked.audit(server, &UserInfo::default(), request));
            return Err(status);
        }
    };
    let request = asked.audit(server, &user, request);
    let user = server.auth.impersonate(server, user, request.headers()).await?;
    let _permit = asked.enter(server, &user).await?;
    authorize(server, &user, asked).await?;
    let warnings = asked.warnings;
    if proxy::is_connect(info) {
        return proxy::connect(server, &user, info, request, warnings).await.map(Into::into);
    }
    if server.aggregator.has(&info.api_group, &info.api_version) {
        return server.aggregator.serve(server, &user, info, request).await.map(Into::into);
    }
    if !info.is_resource {
        return routes::route(server, info, request.method(), request.headers()).await.map(Into::into);
    }
    if routes::is_nowhere(server, &info.path) {
        return Ok(routes::not_found().into());
    }
    serve_resource(server, &user, info, request, warnings.clone()).await
}

async fn serve_resource(
    server: &Arc<Server>,
    user: &UserInfo,
    info: &RequestInfo,
    mut request: Request,
    warnings: Arc<Warnings>,
) -> Result<Output, Status> {
    let socket = if info.verb == "watch" { stream_socket::wanted_for_events(&mut request)? } else { None };
    let (parts, body) = request.into_parts();
    let work = async {
        let body = read_body(body).await?;
        let input = Input { server, user, info, method: &parts.method, headers: &parts.headers, body, warnings };
        resources::serve(&input).await
    };
    match timeout(request_timeout(server, info), work).await {
        Ok(Ok(mut output)) => {
            if let Some(socket) = socket.filter(|_| output.response.status().is_success()) {
                output.response = stream_socket::send(socket, output.response, server.shutdown.clone());
            }
            Ok(output)
        }
        Ok(Err(status)) => Err(status),
        Err(_) => Err(Status::gateway_timeout("request did not complete within the allotted timeout")),
    }
}

fn request_timeout(server: &Server, info: &RequestInfo) -> std::time::Duration {
    let limit = server.config.request_timeout;
    if info.verb == "watch" {
        return limit;
    }
    let asked = info.param("timeout").and_then(|text| crate::config::go_duration(text).ok()).filter(|d| !d.is_zero());
    asked.map_or(limit, |asked| asked.min(limit))
}

/// The whole body, if it is not too large.
pub async fn read_body(body: super::Body) -> Result<Bytes, Status> {
    match Limited::new(body, BODY_MAX).collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => {
            Err(Status::entity_too_large(format!("Request entity too large: limit is {BODY_MAX}")))
        }
        Err(error) => Err(Status::bad_request(format!("cannot read the request body: {error}"))),
    }
}

async fn authorize(server: &Arc<Server>, user: &UserInfo, asked: &Asked<'_>) -> Result<(), Status> {
    let attributes = Attributes::of_request(user, asked.info);
    let decision = server.auth.decide(&*server.caches, &attributes).await;
    if let Some(trail) = &asked.trail {
        trail.impersonated(user);
        trail.authorized(if decision.is_allowed() { "allow" } else { "forbid" }, decision.reason());
    }
    match decision {
        Decision::Allow(_) => Ok(()),
        Decision::Deny(reason) | Decision::NoOpinion(reason) => Err(attributes.forbidden(&reason)),
    }
}

fn with_warnings(mut response: Response, warnings: impl Iterator<Item = String>) -> Response {
    let mut size = 0;
    for text in warnings {
        let text: String = text.chars().filter(|c| !c.is_control()).collect();
        size += text.len();
        if size > WARNINGS_MAX {
            break;
        }
        let quoted = text.replace('\\', "\\\\").replace('"', "\\\"");
        if let Ok(value) = HeaderValue::from_str(&format!("299 - \"{quoted}\"")) {
            response.headers_mut().append(header::WARNING, value);
        }
    }
    response
}

/// The client's audit id, or a new one.
fn audit_id(request: &Request) -> HeaderValue {
    request.headers().get("audit-id").filter(|id| id.len() <= 64).cloned().unwrap_or_else(|| {
        HeaderValue::from_str(&uuid::Uuid::new_v4().to_string()).unwrap_or_else(|_| HeaderValue::from_static(""))
    })
}
