//! WireGuard's keys: 32 bytes, written in base64, and the file that keeps this node's own between restarts.

use std::fmt;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde::{Deserialize, Serialize};
use x25519_dalek::{PublicKey, StaticSecret};

/// A public or shared key.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(pub [u8; 32]);

/// A key that is never printed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct PrivateKey([u8; 32]);

#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    #[error("{0:?} is not a key of 32 bytes in base64")]
    Malformed(String),
    #[error("cannot read the private key in {path}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{0} has no private key of 32 bytes in base64; delete it to have a new one made")]
    Content(PathBuf),
    #[error("cannot write the new private key to {path}")]
    Write { path: PathBuf, source: std::io::Error },
}

impl PrivateKey {
    /// The key in the file; a new one is written there when there is none.
    pub fn load_or_create(path: &Path) -> Result<Self, KeyError> {
        match std::fs::read_to_string(path) {
            Ok(text) => decode(text.trim()).map(Self).ok_or_else(|| KeyError::Content(path.to_owned())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let key = Self(rand::random());
                key.save(path).map_err(|source| KeyError::Write { path: path.to_owned(), source })?;
                Ok(key)
            }
            Err(source) => Err(KeyError::Read { path: path.to_owned(), source }),
        }
    }

    fn save(&self, path: &Path) -> std::io::Result<()> {
        if let Some(directory) = path.parent() {
            std::fs::create_dir_all(directory)?;
        }
        let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o400).open(path)?;
        file.write_all(BASE64_STANDARD.encode(self.0).as_bytes())
    }

    pub fn public(&self) -> Key {
        Key(PublicKey::from(&StaticSecret::from(self.0)).to_bytes())
    }

    /// The bytes as the kernel wants them.
    pub fn bytes(&self) -> [u8; 32] {
        self.0
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PrivateKey(hidden)")
    }
}

fn decode(text: &str) -> Option<[u8; 32]> {
    BASE64_STANDARD.decode(text).ok()?.try_into().ok()
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&BASE64_STANDARD.encode(self.0))
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Key {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        decode(text).map(Self).ok_or_else(|| KeyError::Malformed(text.to_owned()))
    }
}

impl Serialize for Key {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Key {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pair_of_keys_that_openssl_made() {
        let private = PrivateKey(decode("mBz8fo63dHkxPQsJ4M0AWbT535PYk5OKk09KxuAUEmM=").unwrap());
        assert_eq!(private.public().to_string(), "NaUHVoXVA+BkgIAx5hkPJ7iXJYRajWA3Zbq4vPJPslY=");
    }

    #[test]
    fn the_key_outlives_a_restart() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("run/wgkey");
        let first = PrivateKey::load_or_create(&path).unwrap();
        assert_eq!(PrivateKey::load_or_create(&path).unwrap(), first);
        assert_eq!(format!("{first:?}"), "PrivateKey(hidden)");
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "junk").unwrap();
        assert!(PrivateKey::load_or_create(&path).is_err());
    }

    #[test]
    fn keys_are_base64_of_32_bytes() {
        let key = Key([7; 32]);
        assert_eq!(key.to_string().parse::<Key>().unwrap(), key);
        assert!("c2hvcnQ=".parse::<Key>().is_err());
    }
}
