//! The trail of one request: an event for each stage that the policy wants.

use std::net::SocketAddr;
use std::sync::Arc;

use apimachinery::status::Status;
use http::{HeaderMap, header};
use jiff::Timestamp;
use parking_lot::Mutex;
use serde_json::{Map, Value, json};

use super::body::{Captured, End, Watched};
use super::policy::Wanted;
use super::{Auditor, Level};
use crate::auth::UserInfo;
use crate::auth::reviews::user_json;
use crate::http::{Request, RequestInfo, Response};
use crate::registry::object::ObjectExt;

/// Where a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    RequestReceived,
    /// The answer of a long request begins.
    ResponseStarted,
    ResponseComplete,
    Panic,
}

impl Stage {
    const ALL: [(&'static str, Self); 4] = [
        ("RequestReceived", Self::RequestReceived),
        ("ResponseStarted", Self::ResponseStarted),
        ("ResponseComplete", Self::ResponseComplete),
        ("Panic", Self::Panic),
    ];

    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|(known, _)| *known == name).map(|(_, stage)| *stage)
    }

    pub fn bit(self) -> u8 {
        1 << self as u8
    }

    fn name(self) -> &'static str {
        Self::ALL[self as usize].0
    }
}

pub struct Trail {
    auditor: Arc<Auditor>,
    wanted: Wanted,
    is_long: bool,
    event: Mutex<Event>,
    sent: Arc<Captured>,
    answered: Arc<Captured>,
}

/// What the events of a request have in common, as far as it is known.
struct Event {
    fields: Map<String, Value>,
    received: Timestamp,
    status: Value,
    annotations: Map<String, Value>,
}

impl Trail {
    pub fn new(
        auditor: Arc<Auditor>,
        wanted: Wanted,
        user: &UserInfo,
        info: &RequestInfo,
        request: &Request,
        audit_id: &http::HeaderValue,
        peer: Option<SocketAddr>,
    ) -> Self {
        let text = |value: &http::HeaderValue| Value::from(String::from_utf8_lossy(value.as_bytes()));
        let uri = request.uri().path_and_query().map_or("/", |uri| uri.as_str());
        let mut fields = Map::new();
        fields.insert("kind".into(), "Event".into());
        fields.insert("apiVersion".into(), "audit.k8s.io/v1".into());
        fields.insert("level".into(), wanted.level.name().into());
        fields.insert("auditID".into(), text(audit_id));
        fields.insert("requestURI".into(), uri.into());
        fields.insert("verb".into(), info.verb.as_str().into());
        fields.insert("user".into(), user_json(user));
        fields.insert("sourceIPs".into(), source_addresses(request.headers(), peer).into());
        if let Some(agent) = request.headers().get(header::USER_AGENT) {
            fields.insert("userAgent".into(), text(agent));
        }
        if info.is_resource {
            fields.insert("objectRef".into(), object_ref(info));
        }
        // Only the object says what it is called.
        let needs_name = info.verb == "create" && info.is_resource && info.name.is_empty();
        let event = Event { fields, received: Timestamp::now(), status: Value::Null, annotations: Map::new() };
        Self {
            auditor,
            is_long: info.is_long_running(),
            event: Mutex::new(event),
            sent: Arc::new(Captured::new(wanted.level >= Level::Request || needs_name)),
            answered: Arc::new(Captured::new(wanted.level >= Level::RequestResponse && !info.is_long_running())),
            wanted,
        }
    }

    pub fn received(&self) {
        self.tell(Stage::RequestReceived);
    }

    pub fn impersonated(&self, user: &UserInfo) {
        let user = user_json(user);
        let mut event = self.event.lock();
        if event.fields.get("user") != Some(&user) {
            event.fields.insert("impersonatedUser".into(), user);
        }
    }

    /// `decision`: `allow` or `forbid`.
    pub fn authorized(&self, decision: &str, reason: &str) {
        let mut event = self.event.lock();
        event.annotations.insert("authorization.k8s.io/decision".into(), decision.into());
        event.annotations.insert("authorization.k8s.io/reason".into(), reason.into());
    }

    /// The request, whose body is remembered as it is read, where it is wanted.
    pub fn capture_request(&self, request: Request) -> Request {
        if !self.sent.is_wanted() {
            return request;
        }
        self.sent.begin(request.headers());
        let sent = self.sent.clone();
        request.map(|body| Watched::new(body, sent, None).boxed())
    }

    /// The answer, which ends the trail when it has been sent.
    pub fn answer(self: &Arc<Self>, response: Response, failure: Option<&Status>) -> Response {
        self.event.lock().status = response_status(response.status().as_u16(), failure);
        if self.is_long {
            self.tell(Stage::ResponseStarted);
        }
        self.answered.begin(response.headers());
        let trail = self.clone();
        let end: End = Box::new(move || trail.tell(Stage::ResponseComplete));
        response.map(|body| Watched::new(body, self.answered.clone(), Some(end)).boxed())
    }

    pub fn panicked(&self) {
        let failure = json!({"metadata": {}, "status": "Failure", "reason": "InternalError", "code": 500});
        self.event.lock().status = failure;
        self.tell(Stage::Panic);
    }

    fn tell(&self, stage: Stage) {
        if !self.wanted.wants(stage) {
            return;
        }
        let event = {
            let event = self.event.lock();
            let mut fields = event.fields.clone();
            fields.insert("stage".into(), stage.name().into());
            fields.insert("requestReceivedTimestamp".into(), micros(event.received).into());
            fields.insert("stageTimestamp".into(), micros(Timestamp::now()).into());
            if !event.status.is_null() {
                fields.insert("responseStatus".into(), event.status.clone());
            }
            if !event.annotations.is_empty() {
                fields.insert("annotations".into(), event.annotations.clone().into());
            }
            fields
        };
        self.auditor.keep(&self.with_objects(event, stage).into());
    }

    fn with_objects(&self, mut event: Map<String, Value>, stage: Stage) -> Map<String, Value> {
        if stage == Stage::RequestReceived {
            return event;
        }
        let object = |captured: &Captured| {
            let mut object = captured.object()?;
            if self.wanted.omits_managed_fields {
                without_managed_fields(&mut object);
            }
            Some(object)
        };
        if let Some(sent) = object(&self.sent) {
            name_by_object(&mut event, &sent);
            if self.wanted.level >= Level::Request {
                event.insert("requestObject".into(), sent);
            }
        }
        if stage == Stage::ResponseComplete
            && let Some(answered) = object(&self.answered)
        {
            event.insert("responseObject".into(), answered);
        }
        event
    }
}

/// A create learns the object's name from what was sent.
fn name_by_object(event: &mut Map<String, Value>, object: &Value) {
    let name = object.name();
    if event["verb"] == "create"
        && !name.is_empty()
        && let Some(reference) = event.get_mut("objectRef")
        && reference.get("name").is_none()
    {
        reference["name"] = name.into();
    }
}

fn object_ref(info: &RequestInfo) -> Value {
    let fields = [
        ("resource", &info.resource),
        ("namespace", &info.namespace),
        ("name", &info.name),
        ("apiGroup", &info.api_group),
        ("apiVersion", &info.api_version),
        ("subresource", &info.subresource),
    ];
    let given = fields.into_iter().filter(|(_, value)| !value.is_empty());
    given.map(|(name, value)| (name.to_owned(), Value::from(value.as_str()))).collect::<Map<_, _>>().into()
}

fn response_status(code: u16, failure: Option<&Status>) -> Value {
    let mut status = json!({"metadata": {}, "code": code});
    if let Some(failure) = failure {
        status["status"] = failure.status.as_str().into();
        for (name, text) in [("message", &failure.message), ("reason", &failure.reason)] {
            if !text.is_empty() {
                status[name] = text.as_str().into();
            }
        }
        if let Some(details) = failure.details.as_ref().and_then(|details| serde_json::to_value(details).ok()) {
            status["details"] = details;
        }
    }
    status
}

/// The addresses that the request came through, the client's first.
fn source_addresses(headers: &HeaderMap, peer: Option<SocketAddr>) -> Vec<String> {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let mut addresses: Vec<String> = text("x-forwarded-for")
        .split(',')
        .chain([text("x-real-ip")])
        .filter_map(|address| address.trim().parse::<std::net::IpAddr>().ok())
        .map(|address| address.to_string())
        .collect();
    addresses.extend(peer.map(|peer| peer.ip().to_canonical().to_string()));
    addresses.dedup();
    addresses
}

fn without_managed_fields(object: &mut Value) {
    object.remove_at(&["metadata", "managedFields"]);
    if let Some(items) = object.get_mut("items").and_then(Value::as_array_mut) {
        for item in items {
            item.remove_at(&["metadata", "managedFields"]);
        }
    }
}

fn micros(time: Timestamp) -> String {
    format!("{time:.6}")
}
