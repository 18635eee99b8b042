//! The audit trail: who did what, when, and what came of it, as upstream's `audit.k8s.io/v1` events. A policy says how
//! much of which requests is kept (`policy`), backends keep it (`log`, `webhook`). Without `--audit-policy-file` no
//! request pays for any of this.
//! <https://kubernetes.io/docs/tasks/debug/debug-cluster/audit/>

mod body;
mod log;
mod policy;
mod trail;
mod webhook;

use std::sync::Arc;

use serde_json::Value;

use crate::auth::UserInfo;
use crate::auth::kubeconfig::{KubeconfigError, Webhook};
use crate::config::Config;
use crate::http::{Request, RequestInfo};
pub use body::Captured;
use log::LogFile;
use policy::{Policy, PolicyError};
pub use trail::{Stage, Trail};
use webhook::Batches;

/// How much of a request is kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    #[default]
    None,
    /// Who, what and when, but no objects.
    Metadata,
    /// And the object that was sent.
    Request,
    /// And the object that was answered.
    RequestResponse,
}

impl Level {
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "None",
            Self::Metadata => "Metadata",
            Self::Request => "Request",
            Self::RequestResponse => "RequestResponse",
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum AuditError {
    #[error(transparent)]
    Policy(#[from] PolicyError),
    #[error("cannot write the audit log")]
    Log(#[from] std::io::Error),
    #[error("audit webhook")]
    Webhook(#[from] KubeconfigError),
    #[error("--audit-log-format {0:?} is not known: it is json or legacy")]
    Format(String),
}

/// Keeps events.
trait Backend: Send + Sync {
    /// `line` is the same event as JSON.
    fn keep(&self, event: &Value, line: &str);
}

/// What watches over all requests.
pub struct Auditor {
    policy: Policy,
    backends: Vec<Box<dyn Backend>>,
}

impl Auditor {
    /// `None`: nothing is audited. Must run inside the runtime.
    pub fn build(config: &Config) -> Result<Option<Arc<Self>>, AuditError> {
        let Some(path) = &config.audit_policy_file else { return Ok(None) };
        let mut backends: Vec<Box<dyn Backend>> = Vec::new();
        if !config.audit_log_path.is_empty() {
            backends.push(Box::new(LogFile::open(config)?));
        }
        if let Some(path) = &config.audit_webhook_config_file {
            let webhook = Webhook::read(path, webhook::TIMEOUT)?;
            backends.push(Box::new(Batches::start(webhook, config)));
        }
        Ok(Some(Arc::new(Self { policy: Policy::read(path)?, backends })))
    }

    /// Begins the trail of a request. `None`: the policy does not want one.
    pub fn begin(
        self: &Arc<Self>,
        user: &UserInfo,
        info: &RequestInfo,
        request: &Request,
        audit_id: &http::HeaderValue,
        peer: Option<std::net::SocketAddr>,
    ) -> Option<Arc<Trail>> {
        let wanted = self.policy.of_request(user, info);
        if wanted.level == Level::None || self.backends.is_empty() {
            return None;
        }
        Some(Arc::new(Trail::new(self.clone(), wanted, user, info, request, audit_id, peer)))
    }

    fn keep(&self, event: &Value) {
        let line = event.to_string();
        self.backends.iter().for_each(|backend| backend.keep(event, &line));
    }
}

#[cfg(test)]
mod tests {
    use parking_lot::Mutex;
    use serde_json::json;

    use super::*;
    use crate::http::full;

    struct Kept(Arc<Mutex<Vec<Value>>>);

    impl Backend for Kept {
        fn keep(&self, event: &Value, _line: &str) {
            self.0.lock().push(event.clone());
        }
    }

    fn auditor(policy: &Value) -> (Arc<Auditor>, Arc<Mutex<Vec<Value>>>) {
        let events = Arc::new(Mutex::new(Vec::new()));
        let policy = Policy::from_value(policy).unwrap();
        (Arc::new(Auditor { policy, backends: vec![Box::new(Kept(events.clone()))] }), events)
    }

    fn policy(rule: Value) -> Value {
        json!({"apiVersion": "audit.k8s.io/v1", "kind": "Policy", "rules": [rule]})
    }

    async fn one_request(auditor: &Arc<Auditor>) {
        use http_body_util::BodyExt;
        let user = UserInfo { name: "jane".into(), groups: vec!["g".into()], ..UserInfo::default() };
        let request = http::Request::post("/api/v1/namespaces/a/secrets?x=y")
            .header("content-type", "application/json")
            .header("user-agent", "kubectl/1")
            .body(full(r#"{"kind":"Secret","apiVersion":"v1","metadata":{"name":"s","managedFields":[{}]}}"#))
            .unwrap();
        let info = RequestInfo::new(request.method(), request.uri().path(), request.uri().query());
        let id = http::HeaderValue::from_static("id-1");
        let Some(trail) = auditor.begin(&user, &info, &request, &id, "10.0.0.1:55".parse().ok()) else { return };
        trail.received();
        trail.authorized("allow", "because");
        let request = trail.capture_request(request);
        request.into_body().collect().await.unwrap();
        let response = http::Response::builder()
            .status(201)
            .header("content-type", "application/json")
            .body(full(r#"{"kind":"Secret","apiVersion":"v1","metadata":{"name":"s","uid":"u"}}"#))
            .unwrap();
        trail.answer(response, None).into_body().collect().await.unwrap();
    }

    #[tokio::test]
    async fn events_are_upstreams() {
        let (auditor, events) = auditor(&policy(json!({"level": "Metadata"})));
        one_request(&auditor).await;
        let events = events.lock();
        assert_eq!(events.len(), 2);
        assert_eq!((&events[0]["stage"], &events[1]["stage"]), (&json!("RequestReceived"), &json!("ResponseComplete")));
        let mut last = events[1].clone();
        for time in ["requestReceivedTimestamp", "stageTimestamp"] {
            let text = last.as_object_mut().unwrap().remove(time).unwrap();
            assert_eq!(text.as_str().unwrap().len(), "2024-01-01T00:00:00.000000Z".len());
        }
        let expected = json!({
            "kind": "Event", "apiVersion": "audit.k8s.io/v1", "level": "Metadata", "auditID": "id-1",
            "stage": "ResponseComplete", "requestURI": "/api/v1/namespaces/a/secrets?x=y", "verb": "create",
            "user": {"username": "jane", "groups": ["g"]}, "sourceIPs": ["10.0.0.1"], "userAgent": "kubectl/1",
            "objectRef": {"resource": "secrets", "namespace": "a", "apiVersion": "v1", "name": "s"},
            "responseStatus": {"metadata": {}, "code": 201},
            "annotations": {"authorization.k8s.io/decision": "allow", "authorization.k8s.io/reason": "because"},
        });
        assert_eq!(last, expected);
    }

    #[tokio::test]
    async fn objects_are_kept_where_the_policy_wants_them() {
        let rule = json!({"level": "RequestResponse", "omitStages": ["RequestReceived"], "omitManagedFields": true});
        let (auditor, events) = auditor(&policy(rule));
        one_request(&auditor).await;
        let events = events.lock();
        assert_eq!(events.len(), 1);
        assert_eq!(events[0]["requestObject"]["metadata"], json!({"name": "s"}));
        assert_eq!(events[0]["responseObject"]["metadata"]["uid"], "u");
    }

    #[tokio::test]
    async fn what_is_not_wanted_is_not_kept() {
        let (auditor, events) = auditor(&policy(json!({"level": "None"})));
        one_request(&auditor).await;
        assert!(events.lock().is_empty());
    }
}
