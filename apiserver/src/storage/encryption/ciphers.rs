//! How a value is sealed: `k8s:enc:PROVIDER:v1:KEY:` before what the cipher makes of it. The layouts are upstream's:
//! CBC is the initial vector and the padded text; GCM is the nonce and the text with its tag, bound to the store's key;
//! a secretbox is the nonce and the box.

use aes::cipher::block_padding::Pkcs7;
use aes::cipher::consts::U12;
use aes::cipher::{BlockDecryptMut, BlockEncryptMut, KeyIvInit};
use aes::{Aes128, Aes192, Aes256};
use aes_gcm::aead::{Aead, KeyInit, Payload};
use aes_gcm::{Aes128Gcm, Aes256Gcm, AesGcm};
use crypto_secretbox::XSalsa20Poly1305;
use rand::RngCore;

use super::SEALED;

const CBC_VECTOR: usize = 16;
const GCM_NONCE: usize = 12;
const BOX_NONCE: usize = 24;

#[derive(Debug, thiserror::Error)]
pub enum SealError {
    #[error("no matching prefix found")]
    NoProvider,
    #[error("the stored data was shorter than the required size")]
    Short,
    #[error("the value was not sealed with this key, or was changed since")]
    Wrong,
    #[error("the value cannot be sealed")]
    Seal,
    #[error("identity transformer tried to read encrypted data")]
    Identity,
}

/// A key of a provider.
pub struct Provider {
    /// What its values begin with; nothing for the one that seals nothing.
    prefix: Vec<u8>,
    cipher: Cipher,
}

pub enum Cipher {
    Identity,
    AesCbc(Vec<u8>),
    AesGcm(Gcm),
    SecretBox(Box<XSalsa20Poly1305>),
}

pub enum Gcm {
    Short(Box<Aes128Gcm>),
    Middle(Box<AesGcm<Aes192, U12>>),
    Long(Box<Aes256Gcm>),
}

impl Cipher {
    /// `None`: the key does not have the length that AES wants.
    pub fn aes_cbc(key: Vec<u8>) -> Option<Self> {
        matches!(key.len(), 16 | 24 | 32).then_some(Self::AesCbc(key))
    }

    pub fn aes_gcm(key: &[u8]) -> Option<Self> {
        Some(Self::AesGcm(match key.len() {
            16 => Gcm::Short(Box::new(Aes128Gcm::new_from_slice(key).ok()?)),
            24 => Gcm::Middle(Box::new(AesGcm::<Aes192, U12>::new_from_slice(key).ok()?)),
            32 => Gcm::Long(Box::new(Aes256Gcm::new_from_slice(key).ok()?)),
            _ => return None,
        }))
    }

    pub fn secret_box(key: &[u8]) -> Option<Self> {
        Some(Self::SecretBox(Box::new(XSalsa20Poly1305::new_from_slice(key).ok()?)))
    }
}

impl Provider {
    pub fn identity() -> Self {
        Self { prefix: vec![], cipher: Cipher::Identity }
    }

    /// `kind` is the provider's name in the layout: `aescbc`, `aesgcm`, `secretbox`.
    pub fn new(kind: &str, key_name: &str, cipher: Cipher) -> Self {
        Self { prefix: format!("k8s:enc:{kind}:v1:{key_name}:").into_bytes(), cipher }
    }

    /// Whether it sealed the value, as far as can be seen.
    pub fn sealed(&self, value: &[u8]) -> bool {
        value.starts_with(&self.prefix)
    }

    pub fn seal(&self, key: &str, value: &[u8]) -> Result<Vec<u8>, SealError> {
        let mut sealed = self.prefix.clone();
        match &self.cipher {
            Cipher::Identity => sealed.extend_from_slice(value),
            Cipher::AesCbc(secret) => {
                let vector = random::<CBC_VECTOR>();
                sealed.extend_from_slice(&vector);
                sealed.extend(encrypt_cbc(secret, &vector, value).ok_or(SealError::Seal)?);
            }
            Cipher::AesGcm(cipher) => {
                let nonce = random::<GCM_NONCE>();
                sealed.extend_from_slice(&nonce);
                sealed.extend(cipher.seal(&nonce, key, value).ok_or(SealError::Seal)?);
            }
            Cipher::SecretBox(cipher) => {
                let nonce = random::<BOX_NONCE>();
                sealed.extend_from_slice(&nonce);
                sealed.extend(cipher.encrypt(&nonce.into(), value).map_err(|_| SealError::Seal)?);
            }
        }
        Ok(sealed)
    }

    pub fn open(&self, key: &str, value: &[u8]) -> Result<Vec<u8>, SealError> {
        let sealed = value.get(self.prefix.len()..).unwrap_or_default();
        match &self.cipher {
            Cipher::Identity if value.starts_with(SEALED) => Err(SealError::Identity),
            Cipher::Identity => Ok(value.to_vec()),
            Cipher::AesCbc(secret) => {
                let (vector, text) = split::<CBC_VECTOR>(sealed)?;
                decrypt_cbc(secret, vector, text).ok_or(SealError::Wrong)
            }
            Cipher::AesGcm(cipher) => {
                let (nonce, text) = split::<GCM_NONCE>(sealed)?;
                cipher.open(nonce, key, text).ok_or(SealError::Wrong)
            }
            Cipher::SecretBox(cipher) => {
                let (nonce, text) = split::<BOX_NONCE>(sealed)?;
                cipher.decrypt(nonce.into(), text).map_err(|_| SealError::Wrong)
            }
        }
    }
}

fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    rand::rng().fill_bytes(&mut bytes);
    bytes
}

fn split<const N: usize>(sealed: &[u8]) -> Result<(&[u8; N], &[u8]), SealError> {
    sealed.split_first_chunk::<N>().ok_or(SealError::Short)
}

fn encrypt_cbc(secret: &[u8], vector: &[u8], value: &[u8]) -> Option<Vec<u8>> {
    match secret.len() {
        16 => {
            Some(cbc::Encryptor::<Aes128>::new_from_slices(secret, vector).ok()?.encrypt_padded_vec_mut::<Pkcs7>(value))
        }
        24 => {
            Some(cbc::Encryptor::<Aes192>::new_from_slices(secret, vector).ok()?.encrypt_padded_vec_mut::<Pkcs7>(value))
        }
        _ => {
            Some(cbc::Encryptor::<Aes256>::new_from_slices(secret, vector).ok()?.encrypt_padded_vec_mut::<Pkcs7>(value))
        }
    }
}

fn decrypt_cbc(secret: &[u8], vector: &[u8], text: &[u8]) -> Option<Vec<u8>> {
    match secret.len() {
        16 => {
            cbc::Decryptor::<Aes128>::new_from_slices(secret, vector).ok()?.decrypt_padded_vec_mut::<Pkcs7>(text).ok()
        }
        24 => {
            cbc::Decryptor::<Aes192>::new_from_slices(secret, vector).ok()?.decrypt_padded_vec_mut::<Pkcs7>(text).ok()
        }
        _ => cbc::Decryptor::<Aes256>::new_from_slices(secret, vector).ok()?.decrypt_padded_vec_mut::<Pkcs7>(text).ok(),
    }
}

impl Gcm {
    /// The store's key is not kept with the value, and must be the same when it is opened.
    fn seal(&self, nonce: &[u8; GCM_NONCE], key: &str, value: &[u8]) -> Option<Vec<u8>> {
        let payload = Payload { msg: value, aad: key.as_bytes() };
        let sealed = match self {
            Self::Short(cipher) => cipher.encrypt(nonce.into(), payload),
            Self::Middle(cipher) => cipher.encrypt(nonce.into(), payload),
            Self::Long(cipher) => cipher.encrypt(nonce.into(), payload),
        };
        sealed.ok()
    }

    fn open(&self, nonce: &[u8; GCM_NONCE], key: &str, text: &[u8]) -> Option<Vec<u8>> {
        let payload = Payload { msg: text, aad: key.as_bytes() };
        let opened = match self {
            Self::Short(cipher) => cipher.decrypt(nonce.into(), payload),
            Self::Middle(cipher) => cipher.decrypt(nonce.into(), payload),
            Self::Long(cipher) => cipher.decrypt(nonce.into(), payload),
        };
        opened.ok()
    }
}

#[cfg(test)]
mod tests {
    use base64::Engine;
    use base64::engine::general_purpose::STANDARD;

    use super::*;

    const PLAIN: &str = r#"{"kind":"Secret","data":{"a":"b"}}"#;
    const KEY: &[u8] = b"0123456789abcdef0123456789abcdef";
    const PLACE: &str = "/registry/secrets/a/b";

    fn provider(kind: &str, length: usize) -> Provider {
        let key = &KEY[..length];
        let cipher = match kind {
            "aescbc" => Cipher::aes_cbc(key.to_vec()),
            "aesgcm" => Cipher::aes_gcm(key),
            _ => Cipher::secret_box(key),
        };
        Provider::new(kind, "key1", cipher.unwrap())
    }

    /// Made by Go's libraries in upstream's layout.
    const VECTORS: [(&str, usize, &str); 7] = [
        (
            "aescbc",
            16,
            "azhzOmVuYzphZXNjYmM6djE6a2V5MTppdml2aXZpdml2aXZpdmkxtnoeTQNLIQPfZDuJRJ1O3obJ0k2EWjBwynjJ2Od86rYoz1vX4mwLMWg6rC/4oMT3",
        ),
        (
            "aescbc",
            24,
            "azhzOmVuYzphZXNjYmM6djE6a2V5MTppdml2aXZpdml2aXZpdmkxJ53UXmrkKEt/qpeMmUvhtYIbVSmn+qD/LgsunI5nNjWggTnXoLrADOjhTa6zCyl2",
        ),
        (
            "aescbc",
            32,
            "azhzOmVuYzphZXNjYmM6djE6a2V5MTppdml2aXZpdml2aXZpdmkxuF3MOelAX4yDtKBHitJh3+n4STprGiOF+cIhdbAXWqsduVCkUm94oYyQErMQUozW",
        ),
        (
            "aesgcm",
            16,
            "azhzOmVuYzphZXNnY206djE6a2V5MTppdml2aXZpdml2aXY6c8vSf9932hGdiJ9n+5Y6lqdjyr3A7PZZZ9+kRchJnOq/ES4NFTe45zA2Uyve/XKJuA==",
        ),
        (
            "aesgcm",
            24,
            "azhzOmVuYzphZXNnY206djE6a2V5MTppdml2aXZpdml2aXbmNfYyBI2LzRARJcA2NQkXHFyeVkfJDRYMLzKAIzkgmbwKy2/dcizS+rzp/WXcnbF/Cg==",
        ),
        (
            "aesgcm",
            32,
            "azhzOmVuYzphZXNnY206djE6a2V5MTppdml2aXZpdml2aXZ5VlmSaDOtE0gO1E+Xp9Md5mZMEXdDvCwGjDEC8NiouuZtTi55isubEebe2hY8a4bEuQ==",
        ),
        (
            "secretbox",
            32,
            "azhzOmVuYzpzZWNyZXRib3g6djE6a2V5MTpub25jZS1ub25jZS1ub25jZS1ub25jZS0nwnZfTNOC9vpBjVXuj5/dEHjPrS+mho5svSYiGFyte8A1yNGWLxgbgwDmZ0Hc7cF5Rg==",
        ),
    ];

    #[test]
    fn what_upstream_wrote_is_read() {
        for (kind, length, sealed) in VECTORS {
            let (provider, sealed) = (provider(kind, length), STANDARD.decode(sealed).unwrap());
            assert!(provider.sealed(&sealed));
            assert_eq!(provider.open(PLACE, &sealed).unwrap(), PLAIN.as_bytes(), "{kind} {length}");
        }
    }

    #[test]
    fn what_was_sealed_is_opened_and_nothing_else() {
        for (kind, length, _) in VECTORS {
            let provider = provider(kind, length);
            let mut sealed = provider.seal(PLACE, PLAIN.as_bytes()).unwrap();
            assert!(sealed.starts_with(format!("k8s:enc:{kind}:v1:key1:").as_bytes()));
            assert_eq!(provider.open(PLACE, &sealed).unwrap(), PLAIN.as_bytes());
            if kind == "aesgcm" {
                assert!(provider.open("/registry/secrets/a/c", &sealed).is_err());
            }
            assert!(provider.open(PLACE, &sealed[..30]).is_err());
            let last = sealed.len() - 1;
            sealed[last] ^= 1;
            assert_ne!(provider.open(PLACE, &sealed).ok().as_deref(), Some(PLAIN.as_bytes()));
        }
        assert!(Cipher::aes_cbc(vec![0; 17]).is_none());
    }
}
