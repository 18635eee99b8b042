//! The HTTPS port that control-plane components have for health checks and metrics, with upstream's flags. The
//! certificate is the one given, or made up at start.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use prometheus_client::registry::Registry;
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use super::{HealthChecks, StatusServer, StatusServerError};

#[derive(Args, Clone, Debug)]
pub struct SecureServingArgs {
    /// The address to serve health checks and metrics on.
    #[arg(long, default_value_t = IpAddr::V4(Ipv4Addr::UNSPECIFIED))]
    pub bind_address: IpAddr,
    /// The HTTPS port of health checks and metrics; 0 serves none. The default is the component's own.
    #[arg(long)]
    pub secure_port: Option<u16>,
    /// The certificate of the HTTPS port; without it one is made at start.
    #[arg(long, requires = "tls_private_key_file")]
    pub tls_cert_file: Option<PathBuf>,
    #[arg(long, requires = "tls_cert_file")]
    pub tls_private_key_file: Option<PathBuf>,
}

#[derive(Debug, thiserror::Error)]
pub enum SecureServingError {
    #[error("cannot read the certificate or key {path}")]
    Read { path: PathBuf, source: rustls::pki_types::pem::Error },
    #[error("cannot make a certificate")]
    SelfSign(#[from] rcgen::Error),
    #[error("the certificate and key cannot be used")]
    Use(#[from] rustls::Error),
    #[error(transparent)]
    Serve(#[from] StatusServerError),
}

impl SecureServingArgs {
    /// Serves until the shutdown; `default_port` is used when `--secure-port` is not given.
    pub async fn start(
        &self,
        default_port: u16,
        checks: HealthChecks,
        metrics: Arc<Registry>,
        shutdown: &CancellationToken,
    ) -> Result<(), SecureServingError> {
        let port = self.secure_port.unwrap_or(default_port);
        if port == 0 {
            return Ok(());
        }
        let tls = match (&self.tls_cert_file, &self.tls_private_key_file) {
            (Some(certificate), Some(key)) => from_files(certificate, key)?,
            _ => self_signed()?,
        };
        let address = SocketAddr::new(self.bind_address, port);
        let server = StatusServer { address, checks, metrics, tls: Some(TlsAcceptor::from(Arc::new(tls))) };
        Ok(server.start(shutdown.clone()).await?)
    }
}

fn from_files(certificate: &Path, key: &Path) -> Result<ServerConfig, SecureServingError> {
    let read = |path: &Path, source| SecureServingError::Read { path: path.to_owned(), source };
    let certificates = CertificateDer::pem_file_iter(certificate)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|source| read(certificate, source))?;
    let key_der = PrivateKeyDer::from_pem_file(key).map_err(|source| read(key, source))?;
    Ok(ServerConfig::builder().with_no_client_auth().with_single_cert(certificates, key_der)?)
}

fn self_signed() -> Result<ServerConfig, SecureServingError> {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned(), "127.0.0.1".to_owned()])?;
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()));
    Ok(ServerConfig::builder().with_no_client_auth().with_single_cert(vec![made.cert.der().clone()], key)?)
}
