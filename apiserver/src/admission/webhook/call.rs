//! Carries an `AdmissionReview` to a webhook and its answer back: one POST, bounded in time and size.

use std::collections::HashMap;
use std::sync::Arc;

use http::{Method, StatusCode, header};
use http_body_util::{BodyExt, Limited};
use parking_lot::Mutex;
use serde_json::Value;

use super::hook::{Hook, Target};
use crate::http::outbound::{Identity, Outbound, OutboundError, Trust, outbound};
use crate::http::{BoxError, Request, full};
use crate::server::Server;

/// The largest answer that is read, in bytes.
const ANSWER_LIMIT: usize = 16 << 20;
/// More CA bundles than this, and the clients begin anew.
const CLIENTS_LIMIT: usize = 128;

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

/// The clients of webhooks, one for each CA bundle, so that connections are kept.
#[derive(Default)]
pub struct Clients(Mutex<HashMap<Vec<u8>, Outbound>>);

impl Clients {
    fn get(&self, server: &Server, target: &Target) -> Result<Outbound, CallError> {
        let mut clients = self.0.lock();
        if let Some(client) = clients.get(&target.ca_bundle) {
            return Ok(client.clone());
        }
        let trust = if target.ca_bundle.is_empty() { Trust::System } else { Trust::Pem(&target.ca_bundle) };
        let services = Some(Arc::clone(&server.caches));
        let client =
            outbound(&Identity::new(trust), services, server.config.kubelet_timeout).map_err(CallError::Client)?;
        if clients.len() >= CLIENTS_LIMIT {
            clients.clear();
        }
        clients.insert(target.ca_bundle.clone(), client.clone());
        Ok(client)
    }

    /// Sends the review and answers what came back.
    pub async fn post(&self, server: &Server, hook: &Hook, review: &Value) -> Result<Value, CallError> {
        let client = self.get(server, &hook.target)?;
        let joint = if hook.target.url.contains('?') { '&' } else { '?' };
        let url = format!("{}{joint}timeout={}s", hook.target.url, hook.timeout.as_secs());
        let body = serde_json::to_vec(review).map_err(CallError::Json)?;
        let request = http::Request::builder()
            .method(Method::POST)
            .uri(&url)
            .header(header::CONTENT_TYPE, "application/json")
            .header(header::ACCEPT, "application/json")
            .header(header::USER_AGENT, "kube-apiserver-admission")
            .body(full(body))
            .map_err(|source| CallError::Url { url: url.clone(), source })?;
        let exchange = exchange(&client, &url, request);
        tokio::time::timeout(hook.timeout, exchange).await.map_err(|_| CallError::Timeout { url: url.clone() })?
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
