//! The secure port: TLS with optional client certificates, HTTP/1.1 and HTTP/2, graceful shutdown. Client certificates
//! are taken as they come; whether they mean anything is for `auth` to say.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::GracefulShutdown;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{DigitallySignedStruct, DistinguishedName, ServerConfig, SignatureScheme};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

use super::filters::{self, Peer};
use crate::config::Config;
use crate::server::Server;

const HANDSHAKE: Duration = Duration::from_secs(10);
/// How long requests may still take after the server was told to stop.
const DRAIN: Duration = Duration::from_secs(10);
const STREAMS_PER_CONNECTION: u32 = 250;

#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    #[error("cannot read certificates from {path}")]
    ReadCertificate { path: PathBuf, source: rustls::pki_types::pem::Error },
    #[error("cannot read the private key from {path}")]
    ReadKey { path: PathBuf, source: rustls::pki_types::pem::Error },
    #[error("--tls-cert-file and --tls-private-key-file must be given together")]
    HalfPair,
    #[error("certificate and key do not go together")]
    Pair(#[source] rustls::Error),
    #[error("cannot make a self-signed certificate")]
    SelfSigned(#[source] rcgen::Error),
    #[error("cannot keep the self-signed certificate in {path}")]
    WriteSelfSigned { path: PathBuf, source: std::io::Error },
    #[error("cannot listen on {address}")]
    Bind { address: SocketAddr, source: std::io::Error },
}

/// A bound port that does not serve yet.
pub struct Listener {
    tcp: TcpListener,
    tls: TlsAcceptor,
}

impl Listener {
    pub async fn bind(config: &Config) -> Result<Self, ListenError> {
        let address = SocketAddr::new(config.bind_address, config.secure_port);
        let tls = TlsAcceptor::from(Arc::new(tls_config(config)?));
        let tcp = TcpListener::bind(address).await.map_err(|source| ListenError::Bind { address, source })?;
        Ok(Self { tcp, tls })
    }

    pub fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.tcp.local_addr()
    }

    /// Serves until shutdown, then lets requests finish for a while.
    pub async fn serve(self, server: Arc<Server>) {
        let graceful = GracefulShutdown::new();
        loop {
            let (stream, address) = tokio::select! {
                () = server.shutdown.cancelled() => break,
                accepted = self.tcp.accept() => match accepted {
                    Ok(accepted) => accepted,
                    Err(error) => {
                        // Mostly too many open files: the next connection may fare better a little later.
                        tracing::warn!(%error, "cannot accept a connection");
                        tokio::time::sleep(Duration::from_millis(50)).await;
                        continue;
                    }
                },
            };
            let watcher = graceful.watcher();
            tokio::spawn(serve_connection(self.tls.clone(), stream, address, server.clone(), watcher));
        }
        drop(self.tcp);
        if timeout(DRAIN, graceful.shutdown()).await.is_err() {
            tracing::info!("some requests were cut off at shutdown");
        }
    }
}

async fn serve_connection(
    tls: TlsAcceptor,
    stream: TcpStream,
    address: SocketAddr,
    server: Arc<Server>,
    watcher: hyper_util::server::graceful::Watcher,
) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "cannot turn off delays of a connection");
    }
    let stream = match timeout(HANDSHAKE, tls.accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return tracing::debug!(%error, "TLS handshake failed"),
        Err(_) => return tracing::debug!("TLS handshake took too long"),
    };
    let certificates = stream.get_ref().1.peer_certificates().map(<[_]>::to_vec).unwrap_or_default();
    let peer = Arc::new(Peer { certificates, address });
    let service = service_fn(move |request: http::Request<Incoming>| {
        let request = request.map(|body| body.map_err(Into::into).boxed_unsync());
        let (server, peer) = (server.clone(), peer.clone());
        async move { Ok::<_, Infallible>(filters::handle(server, peer, request).await) }
    });
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(Duration::from_secs(32)).max_buf_size(64 * 1024);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS_PER_CONNECTION)
        .keep_alive_interval(Duration::from_secs(45))
        .keep_alive_timeout(Duration::from_secs(15));
    let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), service);
    if let Err(error) = watcher.watch(connection.into_owned()).await {
        tracing::debug!(%error, "connection ended");
    }
}

fn tls_config(config: &Config) -> Result<ServerConfig, ListenError> {
    let (certs, key) = match (&config.tls_cert_file, &config.tls_private_key_file) {
        (Some(cert), Some(key)) => (read_certs(cert)?, read_key(key)?),
        (None, None) => self_signed(config)?,
        _ => return Err(ListenError::HalfPair),
    };
    let versions: &[&rustls::SupportedProtocolVersion] = match config.tls_min_version.as_str() {
        "VersionTLS13" => &[&rustls::version::TLS13],
        _ => rustls::ALL_VERSIONS,
    };
    let mut tls = ServerConfig::builder_with_protocol_versions(versions)
        .with_client_cert_verifier(Arc::new(AnyClientCert::default()))
        .with_single_cert(certs, key)
        .map_err(ListenError::Pair)?;
    tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    // Our order begins with what costs least.
    tls.ignore_client_order = true;
    Ok(tls)
}

fn read_certs(path: &Path) -> Result<Vec<CertificateDer<'static>>, ListenError> {
    CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect)
        .map_err(|source| ListenError::ReadCertificate { path: path.to_owned(), source })
}

fn read_key(path: &Path) -> Result<PrivateKeyDer<'static>, ListenError> {
    PrivateKeyDer::from_pem_file(path).map_err(|source| ListenError::ReadKey { path: path.to_owned(), source })
}

/// A certificate of our own, kept in --cert-dir so that clients can be told to trust it.
fn self_signed(config: &Config) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), ListenError> {
    let (cert_path, key_path) = (config.cert_dir.join("apiserver.crt"), config.cert_dir.join("apiserver.key"));
    if cert_path.exists() && key_path.exists() {
        return Ok((read_certs(&cert_path)?, read_key(&key_path)?));
    }
    let mut names = vec!["localhost".to_owned(), "kubernetes.default.svc".to_owned(), "127.0.0.1".to_owned()];
    names.extend(config.advertise_address.map(|address| address.to_string()));
    let made = rcgen::generate_simple_self_signed(names).map_err(ListenError::SelfSigned)?;
    let keep = |path: &Path, text: String| {
        std::fs::create_dir_all(&config.cert_dir)
            .and_then(|()| std::fs::write(path, text))
            .map_err(|source| ListenError::WriteSelfSigned { path: path.to_owned(), source })
    };
    keep(&cert_path, made.cert.pem())?;
    keep(&key_path, made.signing_key.serialize_pem())?;
    Ok((read_certs(&cert_path)?, read_key(&key_path)?))
}

/// Accepts every client certificate whose key the client proves to hold. Authentication checks the chain against the
/// right authority; there are several (clients, front proxy), and a wrong certificate is no reason to refuse TLS.
#[derive(Debug)]
struct AnyClientCert {
    algorithms: rustls::crypto::WebPkiSupportedAlgorithms,
}

impl Default for AnyClientCert {
    fn default() -> Self {
        Self { algorithms: rustls::crypto::ring::default_provider().signature_verification_algorithms }
    }
}

impl ClientCertVerifier for AnyClientCert {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
