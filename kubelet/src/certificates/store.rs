//! Certificates with their keys on disk: `NAME-DATE.pem` holds both, and `NAME-current.pem` is a link to the newest,
//! exchanged by renaming.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use x509_parser::prelude::{FromDer, X509Certificate};

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("cannot read {path}: {source:?}")]
    Read { path: PathBuf, source: rustls::pki_types::pem::Error },
    #[error("{0} holds a certificate that is not one")]
    Certificate(PathBuf),
    #[error("cannot {step} {path}")]
    Io { step: &'static str, path: PathBuf, source: io::Error },
}

/// A certificate chain with its key.
#[derive(Debug)]
pub struct Pair {
    pub chain: Vec<CertificateDer<'static>>,
    pub key: PrivateKeyDer<'static>,
    pub not_before: Timestamp,
    pub not_after: Timestamp,
    /// Both as text, the certificates first.
    text: String,
}

impl Pair {
    /// From certificates and key in one text; `path` is for messages.
    pub fn read(text: String, path: &Path) -> Result<Self, StoreError> {
        let failed = |source| StoreError::Read { path: path.to_owned(), source };
        let chain: Vec<_> =
            CertificateDer::pem_slice_iter(text.as_bytes()).collect::<Result<_, _>>().map_err(failed)?;
        let key = PrivateKeyDer::from_pem_slice(text.as_bytes()).map_err(failed)?;
        let bad = || StoreError::Certificate(path.to_owned());
        let leaf = chain.first().ok_or_else(bad)?;
        let (_, leaf) = X509Certificate::from_der(leaf).map_err(|_| bad())?;
        let time = |seconds| Timestamp::from_second(seconds).map_err(|_| bad());
        let not_before = time(leaf.validity().not_before.timestamp())?;
        let not_after = time(leaf.validity().not_after.timestamp())?;
        Ok(Self { chain, key, not_before, not_after, text })
    }

    /// After seven to nine tenths of the life, so that nodes do not all come at once.
    pub fn renew_at(&self) -> Timestamp {
        let life = Duration::try_from(self.not_after.duration_since(self.not_before)).unwrap_or_default();
        let share = 0.7 + 0.2 * rand::random::<f64>();
        self.not_before.checked_add(life.mul_f64(share)).unwrap_or(self.not_after)
    }
}

/// One of the kubelet's certificates.
#[derive(Clone, Debug)]
pub struct Store {
    directory: PathBuf,
    name: &'static str,
}

impl Store {
    /// `name` is `kubelet-client` or `kubelet-server`.
    pub fn new(directory: &Path, name: &'static str) -> Self {
        Self { directory: directory.to_owned(), name }
    }

    pub fn current_path(&self) -> PathBuf {
        self.directory.join(format!("{}-current.pem", self.name))
    }

    /// The newest pair; `None` before the first.
    pub fn current(&self) -> Result<Option<Pair>, StoreError> {
        let path = self.current_path();
        match fs::read_to_string(&path) {
            Ok(text) => Pair::read(text, &path).map(Some),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(StoreError::Io { step: "read", path, source }),
        }
    }

    /// Makes this pair the newest.
    pub fn keep(&self, pair: &Pair) -> Result<(), StoreError> {
        let failed = |step, path: &Path| {
            let path = path.to_owned();
            move |source| StoreError::Io { step, path, source }
        };
        fs::create_dir_all(&self.directory).map_err(failed("create", &self.directory))?;
        let stamp = Timestamp::now().strftime("%Y-%m-%d-%H-%M-%S");
        let file = self.directory.join(format!("{}-{stamp}.pem", self.name));
        write_private(&file, &pair.text).map_err(failed("write", &file))?;
        let next = self.directory.join(format!("{}-updated.pem", self.name));
        match fs::remove_file(&next) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed("remove", &next)(error)),
            _ => {}
        }
        symlink(&file, &next).map_err(failed("link", &next))?;
        fs::rename(&next, self.current_path()).map_err(failed("switch to", &file))
    }
}

/// Writes a file that only root may read.
pub fn write_private(path: &Path, text: &str) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    let mut file = fs::OpenOptions::new().create(true).write(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(text.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> Pair {
        let made = rcgen::generate_simple_self_signed(["a".to_owned()]).unwrap();
        let text = format!("{}{}", made.cert.pem(), made.signing_key.serialize_pem());
        Pair::read(text, Path::new("x")).unwrap()
    }

    #[test]
    fn the_newest_is_current() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path(), "kubelet-client");
        assert!(store.current().unwrap().is_none());
        for _ in 0..2 {
            let pair = pair();
            store.keep(&pair).unwrap();
            assert_eq!(store.current().unwrap().unwrap().text, pair.text);
        }
        fs::write(store.current_path(), "garbage").unwrap();
        assert!(store.current().is_err());
    }

    #[test]
    fn renewal_comes_in_the_last_third() {
        let mut pair = pair();
        (pair.not_before, pair.not_after) =
            (Timestamp::from_second(1000).unwrap(), Timestamp::from_second(2000).unwrap());
        for _ in 0..100 {
            let at = pair.renew_at().as_second();
            assert!((1700..=1900).contains(&at), "{at}");
        }
    }
}
