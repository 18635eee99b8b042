//! One connection pool to one server: sends what it is told to, byte for byte, and reads all that comes back. It
//! interprets nothing.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client as Pool;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use rustls::pki_types::CertificateDer;

use super::{Error, Result, chain};

/// How long an answer, or the awaited part of a stream, may take.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long a stream is listened to when fewer events come than were asked for.
const LULL: Duration = Duration::from_millis(1500);

#[derive(Clone, Debug, Default)]
pub struct Request {
    pub method: String,
    /// With the query.
    pub path: String,
    pub headers: BTreeMap<String, String>,
    pub body: Bytes,
    /// Read a stream until this many lines have come, then hang up.
    pub events: Option<usize>,
}

impl Request {
    pub fn get(path: &str) -> Self {
        Self { method: "GET".into(), path: path.into(), ..Self::default() }
    }

    pub fn json(method: &str, path: &str, body: &serde_json::Value) -> Self {
        let headers = [("content-type".to_owned(), "application/json".to_owned())].into();
        Self { method: method.into(), path: path.into(), headers, body: body.to_string().into(), events: None }
    }
}

#[derive(Clone, Debug, Default)]
pub struct Answer {
    pub status: u16,
    pub headers: BTreeMap<String, Vec<String>>,
    pub body: Bytes,
}

impl Answer {
    /// The body as JSON; `Null` when it is something else.
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_default()
    }

    pub fn header(&self, name: &str) -> String {
        self.headers.get(name).map(|values| values.join("; ")).unwrap_or_default()
    }
}

#[derive(Clone)]
pub struct Client {
    base: String,
    token: String,
    pool: Pool<HttpsConnector<HttpConnector>, Full<Bytes>>,
}

impl Client {
    pub fn new(base: String, authority: CertificateDer<'static>, token: &str) -> Result<Self> {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(authority)?;
        let tls = rustls::ClientConfig::builder_with_provider(rustls::crypto::ring::default_provider().into())
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let connector = HttpsConnectorBuilder::new().with_tls_config(tls).https_only().enable_http1().build();
        Ok(Self { base, token: token.into(), pool: Pool::builder(TokioExecutor::new()).build(connector) })
    }

    pub async fn send(&self, request: &Request) -> Result<Answer> {
        let name = format!("{} {}{}", request.method, self.base, request.path);
        let no_answer = |why: String| Error::NoAnswer { request: name.clone(), why };
        let mut built =
            http::Request::builder().method(request.method.as_str()).uri(format!("{}{}", self.base, request.path));
        if !request.headers.contains_key("authorization") {
            built = built.header("authorization", format!("Bearer {}", self.token));
        }
        for (header, value) in request.headers.iter().filter(|(_, value)| !value.is_empty()) {
            built = built.header(header, value);
        }
        let built = built
            .body(Full::new(request.body.clone()))
            .map_err(|source| Error::Request { request: name.clone(), source })?;
        let response = tokio::time::timeout(PATIENCE, self.pool.request(built)).await;
        let response = response
            .map_err(|_| no_answer(format!("within {PATIENCE:?}")))?
            .map_err(|error| no_answer(chain(&error)))?;
        let (parts, mut body) = response.into_parts();
        let mut headers: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (header, value) in &parts.headers {
            headers.entry(header.to_string()).or_default().push(String::from_utf8_lossy(value.as_bytes()).into());
        }
        let mut read = Vec::new();
        let limit = if request.events.is_some() && parts.status.is_success() { LULL } else { PATIENCE };
        let lines = |bytes: &[u8]| bytes.iter().filter(|byte| **byte == b'\n').count();
        while request.events.is_none_or(|events| lines(&read) < events || !parts.status.is_success()) {
            match tokio::time::timeout(limit, body.frame()).await {
                Ok(Some(Ok(frame))) => read.extend(frame.into_data().unwrap_or_default()),
                Ok(None) => break,
                Ok(Some(Err(error))) => return Err(no_answer(chain(&error))),
                Err(_) if request.events.is_some() => break,
                Err(_) => return Err(no_answer(format!("the body did not end within {PATIENCE:?}"))),
            }
        }
        Ok(Answer { status: parts.status.as_u16(), headers, body: read.into() })
    }
}
