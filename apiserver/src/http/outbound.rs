//! Clients for the servers that this one calls: kubelets, pods, webhooks, aggregated API servers. They differ in whom
//! they trust and what they show of themselves; hosts named `NAME.NAMESPACE.svc` are reached at their service's cluster
//! address, because the machine's own resolver does not know them. Nothing here knows what is sent.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::Uri;
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use tokio::net::TcpStream;

use super::{Body, BoxError};
use crate::cache::Caches;
use crate::registry::object::ObjectExt;

pub type Outbound = Client<HttpsConnector<Connector>, Body>;

#[derive(Debug, thiserror::Error)]
pub enum OutboundError {
    #[error("cannot read {path}")]
    Read { path: PathBuf, source: rustls::pki_types::pem::Error },
    #[error("{path} holds an unusable certificate")]
    Authority { path: PathBuf, source: rustls::Error },
    #[error("the given CA bundle is not a list of PEM certificates")]
    Bundle(#[source] rustls::pki_types::pem::Error),
    #[error("the given CA bundle holds an unusable certificate")]
    BundleAuthority(#[source] rustls::Error),
    #[error("client certificate and key do not fit together")]
    Identity(#[source] rustls::Error),
    #[error("no protocol versions for outbound TLS")]
    Versions(#[source] rustls::Error),
}

/// Who may vouch for the backend.
pub enum Trust<'a> {
    /// Nobody needs to.
    Anyone,
    File(&'a Path),
    Pem(&'a [u8]),
    /// The machine's authorities.
    System,
}

/// How to reach one kind of backend.
pub struct Identity<'a> {
    /// Certificate and key to show.
    pub certificate: Option<(&'a Path, &'a Path)>,
    pub trust: Trust<'a>,
}

impl<'a> Identity<'a> {
    /// Shows no certificate.
    pub fn new(trust: Trust<'a>) -> Self {
        Self { certificate: None, trust }
    }
}

/// A client that keeps a few idle connections per backend. With `services`, it knows the names of services.
pub fn outbound(
    identity: &Identity<'_>,
    services: Option<Arc<Caches>>,
    connect_timeout: Duration,
) -> Result<Outbound, OutboundError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(OutboundError::Versions)?;
    let builder = match identity.trust {
        Trust::Anyone => builder.dangerous().with_custom_certificate_verifier(Arc::new(AnyServer(provider))),
        Trust::File(path) => builder.with_root_certificates(roots_of_file(path)?),
        Trust::Pem(bundle) => builder.with_root_certificates(roots_of_bundle(bundle)?),
        Trust::System => builder.with_root_certificates(system_roots()),
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
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_nodelay(true);
    tcp.set_connect_timeout(Some(connect_timeout));
    let connector = hyper_rustls::HttpsConnectorBuilder::new()
        .with_tls_config(config)
        .https_or_http()
        .enable_http1()
        .wrap_connector(Connector { tcp, services });
    Ok(Client::builder(TokioExecutor::new())
        .pool_timer(hyper_util::rt::TokioTimer::new())
        .pool_idle_timeout(Duration::from_secs(30))
        .pool_max_idle_per_host(2)
        .build(connector))
}

fn roots_of_file(path: &Path) -> Result<RootCertStore, OutboundError> {
    let mut roots = RootCertStore::empty();
    let read = |source| OutboundError::Read { path: path.to_owned(), source };
    for certificate in CertificateDer::pem_file_iter(path).map_err(read)? {
        let certificate = certificate.map_err(read)?;
        roots.add(certificate).map_err(|source| OutboundError::Authority { path: path.to_owned(), source })?;
    }
    Ok(roots)
}

fn roots_of_bundle(bundle: &[u8]) -> Result<RootCertStore, OutboundError> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(bundle) {
        let certificate = certificate.map_err(OutboundError::Bundle)?;
        roots.add(certificate).map_err(OutboundError::BundleAuthority)?;
    }
    Ok(roots)
}

/// What of the machine's authorities can be read; none on a machine without any.
fn system_roots() -> RootCertStore {
    let found = rustls_native_certs::load_native_certs();
    for error in &found.errors {
        tracing::warn!(%error, "an authority of this machine cannot be read");
    }
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(found.certs);
    roots
}

/// Opens TCP connections; services by their cluster address.
#[derive(Clone)]
pub struct Connector {
    tcp: HttpConnector,
    services: Option<Arc<Caches>>,
}

#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    #[error("service {name:?} not found")]
    NotFound { name: String },
    #[error("service {name:?} has no cluster IP")]
    NoAddress { name: String },
    #[error("the address {address:?} of service {name:?} makes no URL")]
    BadAddress { name: String, address: String },
}

impl Connector {
    /// The same URL with an address that can be dialed.
    fn resolve(&self, uri: Uri) -> Result<Uri, ServiceError> {
        let host = uri.host().unwrap_or_default();
        let named = host.strip_suffix(".svc").and_then(|rest| rest.split_once('.'));
        let (Some(services), Some((name, namespace))) = (&self.services, named) else { return Ok(uri) };
        let not_found = || ServiceError::NotFound { name: name.to_owned() };
        let cache = services.get("", "services").ok_or_else(not_found)?;
        let service = cache.get(namespace, name).ok_or_else(not_found)?.value();
        let address = match service.str_at(&["spec", "type"]) {
            "ExternalName" => service.str_at(&["spec", "externalName"]),
            _ => service.str_at(&["spec", "clusterIP"]),
        };
        if address.is_empty() || address == "None" {
            return Err(ServiceError::NoAddress { name: name.to_owned() });
        }
        let bracketed = if address.contains(':') { format!("[{address}]") } else { address.to_owned() };
        let port = uri.port_u16().unwrap_or(443);
        let bad = |_| ServiceError::BadAddress { name: name.to_owned(), address: address.to_owned() };
        let scheme = uri.scheme_str().unwrap_or("https");
        Uri::builder().scheme(scheme).authority(format!("{bracketed}:{port}")).path_and_query("/").build().map_err(bad)
    }
}

impl tower::Service<Uri> for Connector {
    type Response = TokioIo<TcpStream>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.tcp.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        match self.resolve(uri) {
            Ok(uri) => {
                let connecting = self.tcp.call(uri);
                Box::pin(async move { connecting.await.map_err(Into::into) })
            }
            Err(error) => Box::pin(std::future::ready(Err(error.into()))),
        }
    }
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
