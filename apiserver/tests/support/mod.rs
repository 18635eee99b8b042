//! A small HTTPS client for the tests: requests with a bearer token, answers as status and JSON, watches line by line.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kube_apiserver::testing::{ADMIN_TOKEN, TestServer};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use serde_json::Value;

pub struct Api {
    client: Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
    base: String,
    token: String,
}

/// An open watch.
pub struct Events {
    body: Incoming,
    buffer: BytesMut,
}

impl Api {
    pub fn new(server: &TestServer) -> Self {
        Self::with_token(server, ADMIN_TOKEN)
    }

    /// As somebody else than the administrator.
    pub fn with_token(server: &TestServer, token: &str) -> Self {
        let mut roots = rustls::RootCertStore::empty();
        let certificate = CertificateDer::from_pem_file(&server.certificate).expect("the server's certificate");
        roots.add(certificate).expect("a root");
        let tls = rustls::ClientConfig::builder().with_root_certificates(Arc::new(roots)).with_no_client_auth();
        let connector =
            hyper_rustls::HttpsConnectorBuilder::new().with_tls_config(tls).https_only().enable_http2().build();
        Self {
            client: Client::builder(TokioExecutor::new()).build(connector),
            base: format!("https://localhost:{}", server.address.port()),
            token: token.to_owned(),
        }
    }

    pub async fn send(&self, method: Method, path: &str, content_type: &str, body: &str) -> http::Response<Incoming> {
        let request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.base))
            .header("authorization", format!("Bearer {}", self.token))
            .header("user-agent", "tests/1.0")
            .header("content-type", content_type)
            .body(Full::new(Bytes::copy_from_slice(body.as_bytes())))
            .expect("a request");
        self.client.request(request).await.expect("an answer")
    }

    pub async fn call(&self, method: Method, path: &str, content_type: &str, body: &str) -> (StatusCode, Value) {
        let response = self.send(method, path, content_type, body).await;
        let status = response.status();
        let bytes = response.into_body().collect().await.expect("a body").to_bytes();
        (status, serde_json::from_slice(&bytes).unwrap_or(Value::Null))
    }

    pub async fn get(&self, path: &str) -> (StatusCode, Value) {
        self.call(Method::GET, path, "application/json", "").await
    }

    pub async fn post(&self, path: &str, body: &Value) -> (StatusCode, Value) {
        self.call(Method::POST, path, "application/json", &body.to_string()).await
    }

    pub async fn put(&self, path: &str, body: &Value) -> (StatusCode, Value) {
        self.call(Method::PUT, path, "application/json", &body.to_string()).await
    }

    pub async fn patch(&self, path: &str, kind: &str, body: &Value) -> (StatusCode, Value) {
        self.call(Method::PATCH, path, kind, &body.to_string()).await
    }

    pub async fn delete(&self, path: &str, body: &Value) -> (StatusCode, Value) {
        self.call(Method::DELETE, path, "application/json", &body.to_string()).await
    }

    pub async fn watch(&self, path: &str) -> Events {
        let response = self.send(Method::GET, path, "application/json", "").await;
        assert_eq!(response.status(), StatusCode::OK, "{path}");
        Events { body: response.into_body(), buffer: BytesMut::new() }
    }
}

impl Events {
    /// The next event; `None` when the watch is over.
    pub async fn next(&mut self) -> Option<Value> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line = self.buffer.split_to(end + 1);
                return Some(serde_json::from_slice(&line).expect("an event"));
            }
            let frame = tokio::time::timeout(std::time::Duration::from_secs(10), self.body.frame());
            let frame = frame.await.expect("an event within ten seconds")?;
            if let Ok(data) = frame.expect("an unbroken stream").into_data() {
                self.buffer.extend_from_slice(&data);
            }
        }
    }

    /// The next event's type and object's name.
    pub async fn seen(&mut self) -> (String, String) {
        let event = self.next().await.expect("the watch goes on");
        let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
        (text(&event["type"]), text(&event["object"]["metadata"]["name"]))
    }
}
