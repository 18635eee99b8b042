//! A client for small JSON documents: reviews sent to webhooks, an issuer's keys. One exchange is bounded in time and
//! size. Nothing here knows what the documents say.

use std::path::Path;
use std::time::Duration;

use http::{HeaderValue, Method, StatusCode, header};
use http_body_util::{BodyExt, Limited};
use serde_json::Value;

use super::outbound::{Identity, Outbound, OutboundError, Trust, outbound};
use super::{BoxError, Request, full};

/// The largest answer that is read, in bytes.
const ANSWER_LIMIT: usize = 4 << 20;
const CONNECT: Duration = Duration::from_secs(5);

#[derive(Debug, thiserror::Error)]
pub enum ExchangeError {
    #[error("the URL {url:?} cannot be used")]
    Url { url: String, source: http::Error },
    #[error("{url}: no answer within {timeout:?}")]
    Timeout { url: String, timeout: Duration },
    #[error("cannot reach {url}")]
    Send { url: String, source: hyper_util::client::legacy::Error },
    #[error("the answer of {url} broke off")]
    Body { url: String, source: BoxError },
    #[error("{url} answered {code}: {text}")]
    Code { url: String, code: StatusCode, text: String },
    #[error("the answer of {url} is no JSON")]
    Json { url: String, source: serde_json::Error },
}

impl ExchangeError {
    /// Whether the same request may do better a little later.
    pub fn is_passing(&self) -> bool {
        match self {
            Self::Timeout { .. } | Self::Send { .. } | Self::Body { .. } => true,
            Self::Code { code, .. } => code.is_server_error() || *code == StatusCode::TOO_MANY_REQUESTS,
            Self::Url { .. } | Self::Json { .. } => false,
        }
    }
}

/// A client that trusts somebody, and may show who it is.
pub struct JsonClient {
    client: Outbound,
    timeout: Duration,
    authorization: Option<HeaderValue>,
}

impl JsonClient {
    /// `certificate`: PEM files of a certificate and its key.
    pub fn new(
        trust: Trust<'_>,
        certificate: Option<(&Path, &Path)>,
        timeout: Duration,
    ) -> Result<Self, OutboundError> {
        let client = outbound(&Identity { certificate, trust }, None, CONNECT)?;
        Ok(Self { client, timeout, authorization: None })
    }

    /// Sends this `Authorization` header with every request.
    pub fn authorized(self, authorization: Option<HeaderValue>) -> Self {
        Self { authorization, ..self }
    }

    pub async fn get(&self, url: &str) -> Result<Value, ExchangeError> {
        self.exchange(Method::GET, url, None).await
    }

    pub async fn post(&self, url: &str, document: &Value) -> Result<Value, ExchangeError> {
        self.exchange(Method::POST, url, Some(document.to_string())).await
    }

    async fn exchange(&self, method: Method, url: &str, body: Option<String>) -> Result<Value, ExchangeError> {
        let mut builder = http::Request::builder().method(method).uri(url).header(header::ACCEPT, "application/json");
        if let Some(authorization) = &self.authorization {
            builder = builder.header(header::AUTHORIZATION, authorization);
        }
        if body.is_some() {
            builder = builder.header(header::CONTENT_TYPE, "application/json");
        }
        let request = builder.body(full(body.unwrap_or_default()));
        let request = request.map_err(|source| ExchangeError::Url { url: url.to_owned(), source })?;
        let late = |_| ExchangeError::Timeout { url: url.to_owned(), timeout: self.timeout };
        tokio::time::timeout(self.timeout, self.answer(url, request)).await.map_err(late)?
    }

    async fn answer(&self, url: &str, request: Request) -> Result<Value, ExchangeError> {
        let url = || url.to_owned();
        let sent = self.client.request(request).await;
        let answer = sent.map_err(|source| ExchangeError::Send { url: url(), source })?;
        let code = answer.status();
        let body = Limited::new(answer.into_body(), ANSWER_LIMIT).collect().await;
        let body = body.map_err(|source| ExchangeError::Body { url: url(), source })?.to_bytes();
        if !code.is_success() {
            let text = String::from_utf8_lossy(&body).chars().take(1024).collect();
            return Err(ExchangeError::Code { url: url(), code, text });
        }
        if body.is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_slice(&body).map_err(|source| ExchangeError::Json { url: url(), source })
    }
}

/// Tries again what failed in passing, a few times, with growing pauses, as upstream does with its webhooks.
pub async fn with_retries<T, F>(mut attempt: impl FnMut() -> F) -> Result<T, ExchangeError>
where
    F: Future<Output = Result<T, ExchangeError>>,
{
    const PAUSES: [Duration; 4] = [
        Duration::from_millis(500),
        Duration::from_millis(750),
        Duration::from_millis(1125),
        Duration::from_millis(1688),
    ];
    for pause in PAUSES {
        match attempt().await {
            Err(error) if error.is_passing() => {
                tracing::debug!(error = apimachinery::process::error_chain(&error), "tried again in a moment");
                tokio::time::sleep(pause).await;
            }
            outcome => return outcome,
        }
    }
    attempt().await
}
