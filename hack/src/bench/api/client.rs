//! The client that measures: HTTP/2 over TLS with the received bytes counted as they come off the socket. It knows
//! requests and answers, and nothing of what they mean.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use http::{HeaderValue, Method, StatusCode, header};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};
use tokio_rustls::TlsConnector;
use tokio_util::io::InspectReader;

pub const JSON: &str = "application/json";
pub const PROTOBUF: &str = "application/vnd.kubernetes.protobuf";
pub const STRATEGIC: &str = "application/strategic-merge-patch+json";
pub const MERGE: &str = "application/merge-patch+json";
pub const APPLY: &str = "application/apply-patch+yaml";

/// No single answer may take longer; streams may.
const LIMIT: Duration = Duration::from_secs(120);
/// As client-go's: a stream may run this far ahead of its reader.
const STREAM_WINDOW: u32 = 4 << 20;
const CONNECTION_WINDOW: u32 = 16 << 20;

/// Where a server listens, and what it takes to talk to it.
#[derive(Clone)]
pub struct Endpoint {
    address: SocketAddr,
    tls: TlsConnector,
    authorization: HeaderValue,
    received: Arc<AtomicU64>,
}

/// One connection. Requests run on it side by side.
#[derive(Clone)]
pub struct Connection {
    requests: http2::SendRequest<Full<Bytes>>,
    endpoint: Endpoint,
}

#[derive(Clone, Debug)]
pub struct Request {
    pub method: Method,
    pub path: String,
    pub content_type: &'static str,
    pub accept: &'static str,
    pub body: Bytes,
}

/// A whole answer. `latency` runs from the request to the body's last byte.
pub struct Answer {
    pub status: StatusCode,
    pub body: Bytes,
    pub latency: Duration,
}

impl Endpoint {
    pub fn new(address: SocketAddr, ca: &Path, token: &str) -> Result<Self> {
        let mut roots = rustls::RootCertStore::empty();
        for certificate in CertificateDer::pem_file_iter(ca).with_context(|| format!("cannot read {}", ca.display()))? {
            let certificate = certificate.with_context(|| format!("cannot read {}", ca.display()))?;
            roots.add(certificate).with_context(|| format!("{} holds no usable certificate", ca.display()))?;
        }
        let mut config = rustls::ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec()];
        let authorization = HeaderValue::from_str(&format!("Bearer {token}")).context("the token is malformed")?;
        Ok(Self { address, tls: Arc::new(config).into(), authorization, received: Arc::default() })
    }

    /// The bytes that all connections have received so far, TLS included.
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    pub async fn connect(&self) -> Result<Connection> {
        let tcp = TcpStream::connect(self.address).await.context("cannot connect")?;
        tcp.set_nodelay(true).context("cannot turn off delays")?;
        let received = self.received.clone();
        let counted = InspectReader::new(tcp, move |bytes: &[u8]| {
            received.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        });
        let name = ServerName::from(self.address.ip());
        let tls = self.tls.connect(name, counted).await.context("cannot make a TLS connection")?;
        ensure!(tls.get_ref().1.alpn_protocol() == Some(b"h2"), "the server does not speak HTTP/2");
        let (requests, connection) = http2::Builder::new(TokioExecutor::new())
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_frame_size(64 << 10)
            .handshake(TokioIo::new(tls))
            .await
            .context("cannot begin HTTP/2")?;
        // Ends with the connection; what went wrong is told to whoever waits for an answer on it.
        tokio::spawn(connection);
        Ok(Connection { requests, endpoint: self.clone() })
    }
}

impl Request {
    pub fn get(path: impl Into<String>) -> Self {
        Self { method: Method::GET, path: path.into(), content_type: "", accept: JSON, body: Bytes::new() }
    }

    pub fn write(method: Method, path: impl Into<String>, content_type: &'static str, body: Vec<u8>) -> Self {
        Self { method, path: path.into(), content_type, accept: JSON, body: body.into() }
    }

    pub fn accept(self, accept: &'static str) -> Self {
        Self { accept, ..self }
    }
}

impl Connection {
    /// Sends the request; the answer's body is still to come.
    pub async fn open(&self, request: &Request) -> Result<http::Response<Incoming>> {
        let uri = format!("https://{}{}", self.endpoint.address, request.path);
        let mut built = http::Request::builder()
            .method(request.method.clone())
            .uri(uri)
            .header(header::AUTHORIZATION, self.endpoint.authorization.clone())
            .header(header::ACCEPT, request.accept)
            .header(header::USER_AGENT, "ketch-bench");
        if !request.content_type.is_empty() {
            built = built.header(header::CONTENT_TYPE, request.content_type);
        }
        let built = built.body(Full::new(request.body.clone())).context("the request is malformed")?;
        let mut requests = self.requests.clone();
        requests.ready().await.context("the connection broke")?;
        requests.send_request(built).await.context("no answer")
    }

    pub async fn ask(&self, request: &Request) -> Result<Answer> {
        let describe = || format!("{} {}", request.method, request.path);
        let whole = async {
            let start = Instant::now();
            let response = self.open(request).await?;
            let status = response.status();
            let body = response.into_body().collect().await.context("the answer broke off")?.to_bytes();
            anyhow::Ok(Answer { status, body, latency: start.elapsed() })
        };
        match timeout(LIMIT, whole).await {
            Ok(answer) => answer.with_context(describe),
            Err(_) => bail!("{}: no answer after {LIMIT:?}", describe()),
        }
    }
}

impl Answer {
    pub fn expect(&self, status: StatusCode) -> Result<()> {
        ensure!(self.status == status, "the answer is {}, not {status}: {}", self.status, self.start());
        Ok(())
    }

    /// The beginning of the body, for messages.
    pub fn start(&self) -> String {
        String::from_utf8_lossy(&self.body[..self.body.len().min(400)]).into_owned()
    }
}
