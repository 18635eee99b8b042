//! Carries a review to a webhook and its answer back: one POST, bounded in time and size. What a review says is known to
//! those who ask: admission and the conversion of custom resources.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use http::{Method, StatusCode, header};
use http_body_util::{BodyExt, Limited};
use parking_lot::Mutex;
use serde_json::Value;

use super::outbound::{Identity, Outbound, OutboundError, Trust, outbound};
use super::{BoxError, Request, full};
use crate::cache::Caches;
use crate::registry::object::ObjectExt;

/// The largest answer that is read, in bytes.
const ANSWER_LIMIT: usize = 16 << 20;
/// More CA bundles than this, and the clients begin anew.
const CLIENTS_LIMIT: usize = 128;
const CONNECT: Duration = Duration::from_secs(5);

#[derive(Debug, thiserror::Error)]
pub enum CallError {
    #[error("failed to call webhook: cannot use its caBundle")]
    Client(#[source] OutboundError),
    #[error("failed to call webhook: its URL {url:?} cannot be used")]
    Url { url: String, source: http::Error },
    #[error("failed to call webhook: Post {url:?}: context deadline exceeded")]
    Timeout { url: String },
    #[error("failed to call webhook: Post {url:?}: {why}")]
    Send { url: String, why: String },
    #[error("failed to call webhook: Post {url:?}: the answer broke off")]
    Body { url: String, source: BoxError },
    #[error("failed to call webhook: Post {url:?}: the server answered {code}: {text}")]
    Code { url: String, code: StatusCode, text: String },
    #[error("failed to call webhook: the answer is no JSON")]
    Json(#[source] serde_json::Error),
    #[error("received invalid webhook response: {why}")]
    Invalid { why: String },
}

/// How to reach a webhook.
pub struct Target {
    /// `https://NAME.NAMESPACE.svc:PORT/PATH`, or the given URL.
    pub url: String,
    /// PEM; nothing: the machine's authorities.
    ca_bundle: Vec<u8>,
}

impl Target {
    /// From a `clientConfig`.
    pub fn read(config: &Value) -> Self {
        let bundle = base64::engine::general_purpose::STANDARD.decode(config.str_at(&["caBundle"]));
        Self { url: url(config), ca_bundle: bundle.unwrap_or_default() }
    }
}

fn url(config: &Value) -> String {
    let url = config.str_at(&["url"]);
    if !url.is_empty() {
        return url.to_owned();
    }
    let service = &config["service"];
    let port = service.i64_at(&["port"]).unwrap_or(443);
    let path = service.str_at(&["path"]).trim_start_matches('/');
    format!("https://{}.{}.svc:{port}/{path}", service.str_at(&["name"]), service.str_at(&["namespace"]))
}

/// The clients of webhooks, one for each CA bundle, so that connections are kept.
#[derive(Default)]
pub struct Clients(Mutex<HashMap<Vec<u8>, Outbound>>);

impl Clients {
    fn get(&self, services: &Arc<Caches>, target: &Target) -> Result<Outbound, CallError> {
        let mut clients = self.0.lock();
        if let Some(client) = clients.get(&target.ca_bundle) {
            return Ok(client.clone());
        }
        let trust = if target.ca_bundle.is_empty() { Trust::System } else { Trust::Pem(&target.ca_bundle) };
        let client = outbound(&Identity::new(trust), Some(services.clone()), CONNECT).map_err(CallError::Client)?;
        if clients.len() >= CLIENTS_LIMIT {
            clients.clear();
        }
        clients.insert(target.ca_bundle.clone(), client.clone());
        Ok(client)
    }

    /// Sends the review and answers what came back.
    pub async fn post(
        &self,
        services: &Arc<Caches>,
        target: &Target,
        timeout: Duration,
        review: &Value,
    ) -> Result<Value, CallError> {
        let client = self.get(services, target)?;
        let joint = if target.url.contains('?') { '&' } else { '?' };
        let url = format!("{}{joint}timeout={}s", target.url, timeout.as_secs());
        let body = serde_json::to_vec(review).map_err(CallError::Json)?;
        let request = http::Request::builder()
            .method(Method::POST)
            .uri(&url)
            .header(header::CONTENT_TYPE, "application/json")
            .header(header::ACCEPT, "application/json")
            .header(header::USER_AGENT, "kube-apiserver-webhooks")
            .body(full(body))
            .map_err(|source| CallError::Url { url: url.clone(), source })?;
        let exchange = exchange(&client, &url, request);
        tokio::time::timeout(timeout, exchange).await.map_err(|_| CallError::Timeout { url: url.clone() })?
    }
}

async fn exchange(client: &Outbound, url: &str, request: Request) -> Result<Value, CallError> {
    let sent = client.request(request).await;
    let answer =
        sent.map_err(|error| CallError::Send { url: url.to_owned(), why: apimachinery::process::error_chain(&error) })?;
    let code = answer.status();
    let body = Limited::new(answer.into_body(), ANSWER_LIMIT).collect().await;
    let body = body.map_err(|source| CallError::Body { url: url.to_owned(), source })?.to_bytes();
    if !code.is_success() {
        let text = String::from_utf8_lossy(&body).chars().take(1024).collect();
        return Err(CallError::Code { url: url.to_owned(), code, text });
    }
    serde_json::from_slice(&body).map_err(CallError::Json)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn services_have_names_of_their_own() {
        let service = json!({"service": {"name": "hook", "namespace": "ns", "path": "/a", "port": 8443}});
        assert_eq!(url(&service), "https://hook.ns.svc:8443/a");
        assert_eq!(url(&json!({"url": "https://x/y"})), "https://x/y");
    }
}
