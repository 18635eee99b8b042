//! A server of JSON documents on loopback, with TLS: a webhook or an issuer for tests.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;

use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use serde_json::Value;
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use crate::http::full;

type Error = Box<dyn std::error::Error + Send + Sync>;
/// The answer to a path and a document.
type Answer = dyn Fn(&str, &Value) -> (u16, Value) + Send + Sync;

/// Ends when dropped.
pub struct JsonPeer {
    pub url: String,
    /// PEM, to trust.
    pub certificate: String,
    asked: Arc<Mutex<Vec<(String, Value)>>>,
    task: tokio::task::JoinHandle<()>,
}

impl JsonPeer {
    pub async fn start(answer: impl Fn(&str, &Value) -> (u16, Value) + Send + Sync + 'static) -> Result<Self, Error> {
        apimachinery::process::install_crypto_provider();
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let made = rcgen::generate_simple_self_signed(vec!["127.0.0.1".to_owned(), "localhost".to_owned()])?;
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()));
        let config = rustls::ServerConfig::builder()
            .with_no_client_auth()
            .with_single_cert(vec![made.cert.der().clone()], key)?;
        let asked = Arc::new(Mutex::new(Vec::new()));
        let task = tokio::spawn(serve(listener, TlsAcceptor::from(Arc::new(config)), Arc::new(answer), asked.clone()));
        Ok(Self { url: format!("https://{address}"), certificate: made.cert.pem(), asked, task })
    }

    /// What was asked so far: paths and documents.
    pub fn asked(&self) -> Vec<(String, Value)> {
        self.asked.lock().clone()
    }

    /// A kubeconfig by which this peer is reached as a webhook.
    pub fn kubeconfig(&self) -> String {
        use base64::Engine;
        let authority = base64::engine::general_purpose::STANDARD.encode(&self.certificate);
        format!(
            "apiVersion: v1\nkind: Config\nclusters:\n- name: hook\n  cluster: {{server: \"{}/hook\", certificate-authority-data: {authority}}}\nusers:\n- name: server\n  user: {{token: secret}}\ncontexts:\n- name: hook\n  context: {{cluster: hook, user: server}}\ncurrent-context: hook\n",
            self.url
        )
    }
}

impl Drop for JsonPeer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// An address that nobody listens at.
pub fn nowhere() -> std::io::Result<SocketAddr> {
    std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()
}

async fn serve(listener: TcpListener, tls: TlsAcceptor, answer: Arc<Answer>, asked: Arc<Mutex<Vec<(String, Value)>>>) {
    while let Ok((tcp, _)) = listener.accept().await {
        let (tls, answer, asked) = (tls.clone(), answer.clone(), asked.clone());
        tokio::spawn(async move {
            let Ok(stream) = tls.accept(tcp).await else { return };
            let service = service_fn(move |request: http::Request<Incoming>| {
                let (answer, asked) = (answer.clone(), asked.clone());
                async move {
                    let path = request.uri().path().to_owned();
                    let body = request.into_body().collect().await.map(|body| body.to_bytes()).unwrap_or_default();
                    let document: Value = serde_json::from_slice(&body).unwrap_or_default();
                    asked.lock().push((path.clone(), document.clone()));
                    let (code, answer) = answer(&path, &document);
                    let mut response = http::Response::new(full(answer.to_string()));
                    *response.status_mut() = http::StatusCode::from_u16(code).unwrap_or_default();
                    Ok::<_, Infallible>(response)
                }
            });
            let served = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
            if let Err(error) = served.await {
                tracing::debug!(%error, "a connection of a test's peer broke off");
            }
        });
    }
}
