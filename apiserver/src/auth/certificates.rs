//! Users by client certificate: common name is the user, organizations are the groups. The TLS listener asks for a
//! certificate without checking it; the check is here, so that several authorities can vouch for different things.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use sha2::{Digest, Sha256};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::UserInfo;

/// Verified certificates that are remembered, by fingerprint; a connection shows the same one on every request.
const REMEMBERED: usize = 1024;
const CREDENTIAL_ID: &str = "authentication.kubernetes.io/credential-id";

#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    #[error("cannot read {path}")]
    Read { path: PathBuf, source: rustls::pki_types::pem::Error },
    #[error("{path} holds an unusable certificate")]
    Unusable { path: PathBuf, source: rustls::Error },
    #[error("{path} is no usable certificate authority")]
    Verifier { path: PathBuf, source: rustls::server::VerifierBuilderError },
}

#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    #[error("verifying certificate failed")]
    Untrusted(#[source] rustls::Error),
    #[error("certificate cannot be parsed")]
    Malformed,
    #[error("certificate has no common name")]
    Nameless,
}

/// The authorities of one `--*-ca-file`.
pub struct Authorities {
    verifier: Arc<dyn ClientCertVerifier>,
    /// Fingerprint → the user and the time in seconds after which the certificate must be looked at again.
    known: Mutex<HashMap<[u8; 32], (UserInfo, u64)>>,
}

impl Authorities {
    pub fn read(path: &Path) -> Result<Self, AuthorityError> {
        let mut roots = RootCertStore::empty();
        let read = |source| AuthorityError::Read { path: path.to_owned(), source };
        for certificate in CertificateDer::pem_file_iter(path).map_err(read)? {
            let certificate = certificate.map_err(read)?;
            roots.add(certificate).map_err(|source| AuthorityError::Unusable { path: path.to_owned(), source })?;
        }
        let verifier = WebPkiClientVerifier::builder(Arc::new(roots))
            .build()
            .map_err(|source| AuthorityError::Verifier { path: path.to_owned(), source })?;
        Ok(Self { verifier, known: Mutex::default() })
    }

    /// The user that the verified leaf of the chain names.
    pub fn user(&self, chain: &[CertificateDer<'static>]) -> Result<Option<UserInfo>, CertificateError> {
        let Some((leaf, intermediates)) = chain.split_first() else { return Ok(None) };
        let now = UnixTime::now();
        let fingerprint: [u8; 32] = Sha256::digest(leaf).into();
        if let Some((user, until)) = self.known.lock().get(&fingerprint)
            && now.as_secs() < *until
        {
            return Ok(Some(user.clone()));
        }
        self.verifier.verify_client_cert(leaf, intermediates, now).map_err(CertificateError::Untrusted)?;
        let (user, not_after) = parse(leaf, &fingerprint)?;
        let mut known = self.known.lock();
        if known.len() >= REMEMBERED {
            known.clear();
        }
        known.insert(fingerprint, (user.clone(), not_after));
        Ok(Some(user))
    }
}

fn parse(leaf: &CertificateDer<'_>, fingerprint: &[u8; 32]) -> Result<(UserInfo, u64), CertificateError> {
    let (_, certificate) = X509Certificate::from_der(leaf).map_err(|_| CertificateError::Malformed)?;
    let subject = certificate.subject();
    let name = subject.iter_common_name().filter_map(|name| name.as_str().ok()).last().unwrap_or_default();
    if name.is_empty() {
        return Err(CertificateError::Nameless);
    }
    let groups = subject.iter_organization().filter_map(|name| name.as_str().ok()).map(str::to_owned).collect();
    let hex: String = fingerprint.iter().map(|byte| format!("{byte:02x}")).collect();
    let extra = [(CREDENTIAL_ID.to_owned(), vec![format!("X509SHA256={hex}")])].into();
    let not_after = u64::try_from(certificate.validity().not_after.timestamp()).unwrap_or(0);
    Ok((UserInfo { name: name.to_owned(), groups, extra, ..UserInfo::default() }, not_after))
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};

    use super::*;

    fn authority(name: &str) -> (Issuer<'static, KeyPair>, String) {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        (Issuer::new(params, key), pem)
    }

    fn client(issuer: &Issuer<'static, KeyPair>, name: &str, organization: &str) -> Vec<CertificateDer<'static>> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.distinguished_name.push(DnType::OrganizationName, organization);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        vec![params.signed_by(&KeyPair::generate().unwrap(), issuer).unwrap().der().clone()]
    }

    #[test]
    fn only_the_authority_vouches() {
        apimachinery::process::install_crypto_provider();
        let ((ours, pem), (theirs, _)) = (authority("ours"), authority("theirs"));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ca.crt");
        std::fs::write(&path, pem).unwrap();
        let authorities = Authorities::read(&path).unwrap();
        let chain = client(&ours, "jane", "devs");
        for _ in 0..2 {
            let user = authorities.user(&chain).unwrap().unwrap();
            assert_eq!((user.name.as_str(), user.groups.as_slice()), ("jane", ["devs".to_owned()].as_slice()));
        }
        assert!(authorities.user(&client(&theirs, "jane", "devs")).is_err());
        assert!(authorities.user(&[]).unwrap().is_none());
    }
}
