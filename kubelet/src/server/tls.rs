//! The server's certificate and which client certificates are trusted.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use tokio_rustls::TlsAcceptor;

use crate::certificates::Live;
use crate::config::KubeletConfiguration;

#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("cannot read certificates from {path}")]
    Certificates { path: PathBuf, source: rustls::pki_types::pem::Error },
    #[error("cannot read a private key from {path}")]
    Key { path: PathBuf, source: rustls::pki_types::pem::Error },
    #[error("the certificate authorities in {path} cannot be used")]
    Authorities { path: PathBuf, source: rustls::server::VerifierBuilderError },
    #[error("{path} holds a certificate that is not one")]
    Authority { path: PathBuf, source: rustls::Error },
    #[error("certificate and private key cannot be used")]
    Pair(#[source] rustls::Error),
    #[error("cannot make a self-signed certificate")]
    SelfSign(#[source] rcgen::Error),
    #[error("cannot keep the self-signed certificate in {path}")]
    Keep { path: PathBuf, source: std::io::Error },
}

/// Upstream's names, so that a node taken over keeps its certificate.
const CERTIFICATE_FILE: &str = "kubelet.crt";
const KEY_FILE: &str = "kubelet.key";

/// With `live` the certificate is whatever the cluster has issued for this node; otherwise that of the configuration,
/// or one of our own making.
pub(super) fn acceptor(
    config: &KubeletConfiguration,
    node: &str,
    directory: &Path,
    live: Option<Arc<Live>>,
) -> Result<TlsAcceptor, TlsError> {
    let verifier = client_verifier(&config.authentication.x509.client_ca_file)?;
    let builder = rustls::ServerConfig::builder().with_client_cert_verifier(verifier);
    let mut tls = match live {
        Some(live) => builder.with_cert_resolver(live),
        None => {
            let (chain, key) = own_certificate(config, node, directory)?;
            builder.with_single_cert(chain, key).map_err(TlsError::Pair)?
        }
    };
    tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(tls)))
}

type Own = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

fn own_certificate(config: &KubeletConfiguration, node: &str, directory: &Path) -> Result<Own, TlsError> {
    let (certificate, key) = match (config.tls_cert_file.as_str(), config.tls_private_key_file.as_str()) {
        ("", _) | (_, "") => {
            let (certificate, key) = (directory.join(CERTIFICATE_FILE), directory.join(KEY_FILE));
            if !certificate.exists() || !key.exists() {
                self_sign(node, directory, &certificate, &key)?;
            }
            (certificate, key)
        }
        (certificate, key) => (certificate.into(), key.into()),
    };
    let chain = certificates(&certificate)?;
    let key = PrivateKeyDer::from_pem_file(&key).map_err(|source| TlsError::Key { path: key, source })?;
    Ok((chain, key))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let failed = |source| TlsError::Certificates { path: path.to_owned(), source };
    CertificateDer::pem_file_iter(path).map_err(failed)?.collect::<Result<_, _>>().map_err(failed)
}

/// A client without a certificate is let in: it may have a token.
fn client_verifier(authorities: &str) -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
    if authorities.is_empty() {
        return Ok(WebPkiClientVerifier::no_client_auth());
    }
    let path = PathBuf::from(authorities);
    let mut roots = RootCertStore::empty();
    for certificate in certificates(&path)? {
        roots.add(certificate).map_err(|source| TlsError::Authority { path: path.clone(), source })?;
    }
    WebPkiClientVerifier::builder(Arc::new(roots))
        .allow_unauthenticated()
        .build()
        .map_err(|source| TlsError::Authorities { path, source })
}

fn self_sign(node: &str, directory: &Path, certificate: &Path, key: &Path) -> Result<(), TlsError> {
    let signed = rcgen::generate_simple_self_signed([node.to_owned()]).map_err(TlsError::SelfSign)?;
    let keep = |path: &Path, text: String| {
        use std::io::Write;
        use std::os::unix::fs::OpenOptionsExt;
        std::fs::OpenOptions::new()
            .create(true)
            .write(true)
            .truncate(true)
            .mode(0o600)
            .open(path)
            .and_then(|mut file| file.write_all(text.as_bytes()))
            .map_err(|source| TlsError::Keep { path: path.to_owned(), source })
    };
    std::fs::create_dir_all(directory).map_err(|source| TlsError::Keep { path: directory.to_owned(), source })?;
    keep(key, signed.signing_key.serialize_pem())?;
    keep(certificate, signed.cert.pem())
}
