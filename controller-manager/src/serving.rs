//! The HTTPS port of health checks and metrics, with the given certificate or one made up at start.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use apimachinery::process::{CancellationToken, HealthChecks, StatusServer};
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio_rustls::TlsAcceptor;

use crate::app::AppError;
use crate::options::Options;

#[derive(Debug, thiserror::Error)]
pub enum ServingError {
    #[error("cannot read the certificate or key {path}")]
    Read { path: PathBuf, source: rustls::pki_types::pem::Error },
    #[error("cannot make a certificate")]
    SelfSign(#[from] rcgen::Error),
    #[error("the certificate and key cannot be used")]
    Use(#[from] rustls::Error),
}

/// Starts serving, unless the port is 0.
pub async fn start(options: &Options, shutdown: &CancellationToken) -> Result<(), AppError> {
    if options.secure_port == 0 {
        return Ok(());
    }
    let tls = match (&options.tls_cert_file, &options.tls_private_key_file) {
        (Some(certificate), Some(key)) => from_files(certificate, key)?,
        _ => self_signed()?,
    };
    let server = StatusServer {
        address: SocketAddr::new(options.bind_address, options.secure_port),
        checks: HealthChecks::default(),
        metrics: Arc::default(),
        tls: Some(TlsAcceptor::from(Arc::new(tls))),
    };
    Ok(server.start(shutdown.clone()).await?)
}

fn from_files(certificate: &Path, key: &Path) -> Result<ServerConfig, ServingError> {
    let read = |path: &Path, source| ServingError::Read { path: path.to_owned(), source };
    let certificates = CertificateDer::pem_file_iter(certificate)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|source| read(certificate, source))?;
    let key_der = PrivateKeyDer::from_pem_file(key).map_err(|source| read(key, source))?;
    Ok(ServerConfig::builder().with_no_client_auth().with_single_cert(certificates, key_der)?)
}

fn self_signed() -> Result<ServerConfig, ServingError> {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned(), "127.0.0.1".to_owned()])?;
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()));
    Ok(ServerConfig::builder().with_no_client_auth().with_single_cert(vec![made.cert.der().clone()], key)?)
}
