//! Passing a request on to another server and its answer back, streaming both ways. When the other side switches
//! protocols (WebSocket, SPDY), the two connections are joined byte for byte; nothing here understands the protocols.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use http::header::{
    AUTHORIZATION, CONNECTION, HOST, HeaderName, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION, SEC_WEBSOCKET_PROTOCOL, TE,
    TRAILER, TRANSFER_ENCODING, UPGRADE,
};
use http::{HeaderMap, HeaderValue, StatusCode, Uri};
use http_body_util::BodyExt;
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use tokio_util::sync::CancellationToken;

use super::{Body, Request, Response, full};

/// Names of the headers that only concern one hop.
const HOP_BY_HOP: [HeaderName; 9] = [
    CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    PROXY_AUTHENTICATE,
    PROXY_AUTHORIZATION,
    TE,
    TRAILER,
    TRANSFER_ENCODING,
    UPGRADE,
];

pub type Outbound = Client<HttpsConnector<HttpConnector>, Body>;

#[derive(Debug, thiserror::Error)]
pub enum OutboundError {
    #[error("cannot read {path}")]
    Read { path: PathBuf, source: rustls::pki_types::pem::Error },
    #[error("{path} holds an unusable certificate")]
    Authority { path: PathBuf, source: rustls::Error },
    #[error("client certificate and key do not fit together")]
    Identity(#[source] rustls::Error),
    #[error("no protocol versions for outbound TLS")]
    Versions(#[source] rustls::Error),
}

/// How to reach one kind of backend.
#[derive(Default)]
pub struct Identity<'a> {
    /// Certificate and key to show.
    pub certificate: Option<(&'a Path, &'a Path)>,
    /// Who may vouch for the backend; nobody needs to when absent, as upstream has it.
    pub authority: Option<&'a Path>,
}

/// A client that keeps a few idle connections per backend.
pub fn outbound(identity: &Identity<'_>, connect_timeout: Duration) -> Result<Outbound, OutboundError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(OutboundError::Versions)?;
    let builder = match identity.authority {
        Some(path) => builder.with_root_certificates(roots(path)?),
        None => builder.dangerous().with_custom_certificate_verifier(Arc::new(AnyServer(provider))),
    };
    let config = match identity.certificate {
        Some((certificate, key)) => {
            let read = |path: &Path| {
                let path = path.to_owned();
                move |source| OutboundError::Read { path, source }
            };
            let chain =
                CertificateDer::pem_file_iter(certificate).and_then(Iterator::collect).map_err(read(certificate))?;
            let key = PrivateKeyDer::from_pem_file(key).map_err(read(key))?;
            builder.with_client_auth_cert(chain, key).map_err(OutboundError::Identity)?
        }
        None => builder.with_no_client_auth(),
    };
    let mut connector = HttpConnector::new();
    connector.enforce_http(false);
    connector.set_nodelay(true);
    connector.set_connect_timeout(Some(connect_timeout));
    let connector = hyper_rustls::HttpsConnectorBuilder::new()
        .with_tls_config(config)
        .https_or_http()
        .enable_http1()
        .wrap_connector(connector);
    Ok(Client::builder(TokioExecutor::new())
        .pool_timer(hyper_util::rt::TokioTimer::new())
        .pool_idle_timeout(Duration::from_secs(30))
        .pool_max_idle_per_host(2)
        .build(connector))
}

fn roots(path: &Path) -> Result<RootCertStore, OutboundError> {
    let mut roots = RootCertStore::empty();
    let read = |source| OutboundError::Read { path: path.to_owned(), source };
    for certificate in CertificateDer::pem_file_iter(path).map_err(read)? {
        let certificate = certificate.map_err(read)?;
        roots.add(certificate).map_err(|source| OutboundError::Authority { path: path.to_owned(), source })?;
    }
    Ok(roots)
}

/// Takes any server for what it says it is: pods and services have no names that anybody vouches for, and kubelets
/// only with `--kubelet-certificate-authority`.
#[derive(Debug)]
struct AnyServer(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyServer {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signature, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// Whether the client asks to switch protocols.
pub fn wants_upgrade(headers: &HeaderMap) -> bool {
    let connection = headers.get_all(CONNECTION).iter().filter_map(|value| value.to_str().ok());
    let asks = connection.flat_map(|line| line.split(',')).any(|token| token.trim().eq_ignore_ascii_case("upgrade"));
    asks && headers.contains_key(UPGRADE)
}

/// Sends the request to `target` and answers what the backend answers. Credentials of the client stay here.
pub async fn forward(
    client: &Outbound,
    target: Uri,
    mut request: Request,
    shutdown: &CancellationToken,
) -> Result<Response, hyper_util::client::legacy::Error> {
    let upgrade = wants_upgrade(request.headers()).then(|| request.headers().get(UPGRADE).cloned()).flatten();
    let from_client = upgrade.is_some().then(|| hyper::upgrade::on(&mut request));
    let (mut parts, body) = request.into_parts();
    strip(&mut parts.headers);
    if let Some(protocol) = upgrade {
        parts.headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
        parts.headers.insert(UPGRADE, protocol);
    }
    let mut outgoing = Request::new(body);
    *outgoing.method_mut() = parts.method;
    *outgoing.uri_mut() = target;
    *outgoing.headers_mut() = parts.headers;
    let mut answer = client.request(outgoing).await?;
    if answer.status() == StatusCode::SWITCHING_PROTOCOLS
        && let Some(from_client) = from_client
    {
        join(from_client, hyper::upgrade::on(&mut answer), shutdown.clone());
        let (parts, _) = answer.into_parts();
        return Ok(Response::from_parts(parts, full("")));
    }
    let (mut parts, body) = answer.into_parts();
    for name in &HOP_BY_HOP {
        parts.headers.remove(name);
    }
    parts.version = http::Version::default();
    Ok(Response::from_parts(parts, body.map_err(Into::into).boxed_unsync()))
}

/// What went wrong on the way to a backend, in the words that users of upstream search for.
pub fn reach_error(target: &str, error: &(dyn std::error::Error + 'static)) -> String {
    let address =
        target.split_once("://").map_or(target, |(_, rest)| rest).split(['/', '?']).next().unwrap_or_default();
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(io) = error.downcast_ref::<std::io::Error>() {
            return match io.kind() {
                std::io::ErrorKind::ConnectionRefused => format!("dial tcp {address}: connect: connection refused"),
                std::io::ErrorKind::HostUnreachable => format!("dial tcp {address}: connect: no route to host"),
                std::io::ErrorKind::TimedOut => format!("dial tcp {address}: i/o timeout"),
                _ => format!("dial tcp {address}: {io}"),
            };
        }
        cause = error.source();
    }
    apimachinery::process::error_chain(error)
}

/// Copies bytes both ways until either side is done, off the request's task: the answer must go out first.
fn join(client: hyper::upgrade::OnUpgrade, backend: hyper::upgrade::OnUpgrade, shutdown: CancellationToken) {
    tokio::spawn(async move {
        let copy = async {
            let (client, backend) = tokio::try_join!(client, backend)?;
            tokio::io::copy_bidirectional(&mut TokioIo::new(client), &mut TokioIo::new(backend)).await?;
            Ok::<(), super::BoxError>(())
        };
        tokio::select! {
            outcome = copy => if let Err(error) = outcome {
                tracing::debug!(%error, "an upgraded connection broke");
            },
            () = shutdown.cancelled() => {}
        }
    });
}

/// Takes out what is for this server only: hop-by-hop headers, credentials, impersonation.
fn strip(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|line| line.split(','))
        .filter_map(|token| token.trim().parse().ok())
        .collect();
    for name in HOP_BY_HOP.iter().chain(&named).chain(&[HOST, AUTHORIZATION]) {
        headers.remove(name);
    }
    let impersonation: Vec<HeaderName> =
        headers.keys().filter(|name| name.as_str().starts_with("impersonate-")).cloned().collect();
    for name in impersonation {
        headers.remove(name);
    }
    hide_token_protocol(headers);
}

/// Browsers send their bearer token as a WebSocket protocol; the backend must not see it.
fn hide_token_protocol(headers: &mut HeaderMap) {
    let Some(line) = headers.get(SEC_WEBSOCKET_PROTOCOL).and_then(|value| value.to_str().ok()) else { return };
    let kept: Vec<&str> =
        line.split(',').map(str::trim).filter(|p| !p.starts_with("base64url.bearer.authorization.k8s.io.")).collect();
    let kept = kept.join(", ");
    match HeaderValue::from_str(&kept) {
        Ok(value) if !kept.is_empty() => headers.insert(SEC_WEBSOCKET_PROTOCOL, value),
        _ => headers.remove(SEC_WEBSOCKET_PROTOCOL),
    };
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    fn headers(pairs: &[(&str, &str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect()
    }

    #[test]
    fn upgrades_are_asked_for_by_two_headers() {
        assert!(wants_upgrade(&headers(&[("connection", "keep-alive, Upgrade"), ("upgrade", "SPDY/3.1")])));
        assert!(!wants_upgrade(&headers(&[("connection", "upgrade")])));
        assert!(!wants_upgrade(&headers(&[("upgrade", "websocket")])));
    }

    #[test]
    fn credentials_stay_here() {
        let mut all = headers(&[
            ("authorization", "Bearer x"),
            ("impersonate-user", "y"),
            ("connection", "x-hop, close"),
            ("x-hop", "1"),
            ("accept", "*/*"),
            ("sec-websocket-protocol", "v5.channel.k8s.io, base64url.bearer.authorization.k8s.io.YQ"),
        ]);
        strip(&mut all);
        assert_eq!(all, headers(&[("accept", "*/*"), ("sec-websocket-protocol", "v5.channel.k8s.io")]));
    }

    /// A backend that switches protocols and then sends back what it gets.
    async fn echo_backend() -> std::net::SocketAddr {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(stream.read_u8().await.unwrap());
            }
            assert!(!String::from_utf8_lossy(&head).to_lowercase().contains("authorization"));
            let answer = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n";
            stream.write_all(answer.as_bytes()).await.unwrap();
            let (mut from, mut to) = stream.split();
            tokio::io::copy(&mut from, &mut to).await.unwrap();
        });
        address
    }

    /// A server that passes its one connection's requests on to `backend`.
    async fn front(backend: std::net::SocketAddr) -> std::net::SocketAddr {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let client = outbound(&Identity::default(), Duration::from_secs(5)).unwrap();
        tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let service = hyper::service::service_fn(move |request: http::Request<hyper::body::Incoming>| {
                let client = client.clone();
                async move {
                    let request = request.map(|body| body.map_err(Into::into).boxed_unsync());
                    let target = format!("http://{backend}/exec").parse().unwrap();
                    forward(&client, target, request, &CancellationToken::new()).await
                }
            });
            let connection = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
            connection.with_upgrades().await.unwrap();
        });
        address
    }

    #[tokio::test]
    async fn bytes_pass_both_ways_after_an_upgrade() {
        apimachinery::process::install_crypto_provider();
        let mut client = tokio::net::TcpStream::connect(front(echo_backend().await).await).await.unwrap();
        let request = "GET /x HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: echo\r\nAuthorization: Bearer secret\r\n\r\n";
        client.write_all(request.as_bytes()).await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(client.read_u8().await.unwrap());
        }
        assert!(head.starts_with(b"HTTP/1.1 101"), "{}", String::from_utf8_lossy(&head));
        client.write_all(b"hello").await.unwrap();
        let mut echo = [0; 5];
        client.read_exact(&mut echo).await.unwrap();
        assert_eq!(&echo, b"hello");
        client.shutdown().await.unwrap();
        assert_eq!(client.read(&mut echo).await.unwrap(), 0, "the end of one side ends the other");
    }
}
