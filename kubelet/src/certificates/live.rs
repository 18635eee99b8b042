//! The certificate that new connections show, which may be exchanged at any time.

use std::sync::Arc;

use parking_lot::RwLock;
use rustls::SignatureScheme;
use rustls::client::ResolvesClientCert;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;

use super::store::Pair;

#[derive(Debug, Default)]
pub struct Live {
    shown: RwLock<Option<Arc<CertifiedKey>>>,
}

impl Live {
    /// From now on new connections show this certificate.
    pub fn show(&self, pair: &Pair) -> Result<(), rustls::Error> {
        let key = rustls::crypto::ring::sign::any_supported_type(&pair.key)?;
        *self.shown.write() = Some(Arc::new(CertifiedKey::new(pair.chain.clone(), key)));
        Ok(())
    }
}

impl ResolvesClientCert for Live {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.shown.read().clone()
    }

    fn has_certs(&self) -> bool {
        self.shown.read().is_some()
    }
}

impl ResolvesServerCert for Live {
    /// Without a certificate yet the handshake fails, as it must.
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.shown.read().clone()
    }
}
