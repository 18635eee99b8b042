//! Encryption at rest: a store that keeps the values of some resources sealed in another one, in upstream's layout, so
//! that either server reads what the other wrote. Which resources and with which keys is in
//! `--encryption-provider-config`; without it none of this is in the way.
//! <https://kubernetes.io/docs/tasks/administer-cluster/encrypt-data/>

mod ciphers;
mod config;

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;

use super::{Change, Entry, Expect, Outcome, Page, Store, StoreError, StoreResult, WatchStream};
use ciphers::Provider;
pub use ciphers::SealError;
pub use config::{EncryptionConfig, EncryptionConfigError};

/// What every sealed value begins with.
const SEALED: &[u8] = b"k8s:enc:";

/// The providers of some resources: the first seals, all open.
struct Providers(Vec<Provider>);

impl Providers {
    fn seal(&self, key: &str, value: &[u8]) -> Result<Vec<u8>, SealError> {
        let first = self.0.first().ok_or(SealError::NoProvider)?;
        first.seal(key, value)
    }

    /// The value, and whether another provider than the first sealed it.
    fn open(&self, key: &str, value: &[u8]) -> Result<(Vec<u8>, bool), SealError> {
        let mut last = SealError::NoProvider;
        for (index, provider) in self.0.iter().enumerate().filter(|(_, provider)| provider.sealed(value)) {
            match provider.open(key, value) {
                Ok(opened) => return Ok((opened, index > 0)),
                Err(error) => last = error,
            }
        }
        Err(last)
    }
}

/// A store whose values of some resources are sealed.
pub struct Encrypted {
    inner: Arc<dyn Store>,
    seals: Arc<Seals>,
}

struct Seals {
    config: EncryptionConfig,
    /// Keys whose values another provider than the first sealed, or none: they are written again even when nothing
    /// changed.
    stale: Mutex<HashSet<String>>,
}

impl Seals {
    /// The entry as it was before it was sealed. What cannot be opened stays as it is: the object is unreadable then,
    /// and told to be when somebody wants it.
    fn reveal(&self, mut entry: Entry) -> Entry {
        let Some(providers) = self.config.of_key(&entry.key) else { return entry };
        match providers.open(&entry.key, &entry.value) {
            Ok((opened, is_stale)) => {
                entry.value = opened.into();
                let mut stale = self.stale.lock();
                if is_stale {
                    stale.insert(entry.key.clone());
                } else if !stale.is_empty() {
                    stale.remove(&entry.key);
                }
            }
            Err(error) => {
                tracing::error!(key = entry.key, error = apimachinery::process::error_chain(&error), "cannot decrypt");
            }
        }
        entry
    }

    fn reveal_change(&self, change: Change) -> Change {
        match change {
            Change::Put(entry) => Change::Put(self.reveal(entry)),
            Change::Delete { key, revision } => {
                self.stale.lock().remove(&key);
                Change::Delete { key, revision }
            }
        }
    }

    fn reveal_outcome(&self, outcome: Outcome) -> Outcome {
        match outcome {
            Outcome::Mismatch(entry) => Outcome::Mismatch(entry.map(|entry| self.reveal(entry))),
            done => done,
        }
    }
}

impl Encrypted {
    pub fn new(inner: Arc<dyn Store>, config: EncryptionConfig) -> Self {
        Self { inner, seals: Arc::new(Seals { config, stale: Mutex::default() }) }
    }
}

#[async_trait]
impl Store for Encrypted {
    async fn get(&self, key: &str) -> StoreResult<Option<Entry>> {
        Ok(self.inner.get(key).await?.map(|entry| self.seals.reveal(entry)))
    }

    async fn range(&self, prefix: &str, after: Option<&str>, limit: usize, revision: Option<u64>) -> StoreResult<Page> {
        let page = self.inner.range(prefix, after, limit, revision).await?;
        Ok(Page { entries: page.entries.into_iter().map(|entry| self.seals.reveal(entry)).collect(), ..page })
    }

    async fn put(&self, key: &str, value: Bytes, expect: Expect, ttl: Option<Duration>) -> StoreResult<Outcome> {
        let value = match self.seals.config.of_key(key) {
            Some(providers) => {
                let sealed = providers.seal(key, &value);
                sealed.map_err(|error| StoreError::Operation { operation: "encrypt", source: Box::new(error) })?.into()
            }
            None => value,
        };
        let outcome = self.inner.put(key, value, expect, ttl).await?;
        Ok(self.seals.reveal_outcome(outcome))
    }

    async fn delete(&self, key: &str, revision: u64) -> StoreResult<Outcome> {
        Ok(self.seals.reveal_outcome(self.inner.delete(key, revision).await?))
    }

    async fn watch(&self, prefix: &str, after: u64) -> StoreResult<Box<dyn WatchStream>> {
        let inner = self.inner.watch(prefix, after).await?;
        Ok(Box::new(Revealed { inner, seals: self.seals.clone() }))
    }

    async fn revision(&self) -> StoreResult<u64> {
        self.inner.revision().await
    }

    async fn touch(&self, prefix: &str) -> StoreResult<u64> {
        self.inner.touch(prefix).await
    }

    async fn compact(&self, revision: u64) -> StoreResult<()> {
        self.inner.compact(revision).await
    }

    fn is_stale(&self, key: &str) -> bool {
        self.seals.stale.lock().contains(key)
    }
}

struct Revealed {
    inner: Box<dyn WatchStream>,
    seals: Arc<Seals>,
}

#[async_trait]
impl WatchStream for Revealed {
    async fn next(&mut self) -> StoreResult<Vec<Change>> {
        let changes = self.inner.next().await?;
        Ok(changes.into_iter().map(|change| self.seals.reveal_change(change)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::super::memory::Memory;
    use super::*;

    const KEY: &str = "c2VjcmV0IGlzIHNlY3VyZQ==";

    fn config(providers: &str) -> EncryptionConfig {
        let text = format!(
            "kind: EncryptionConfiguration\napiVersion: apiserver.config.k8s.io/v1\nresources:\n- resources: [secrets, things.example.com]\n  providers: {providers}\n"
        );
        EncryptionConfig::parse(text.as_bytes(), "/registry").unwrap()
    }

    fn cbc(name: &str) -> String {
        format!("{{aescbc: {{keys: [{{name: {name}, secret: {KEY}}}]}}}}")
    }

    async fn stored(store: &dyn Store, key: &str) -> Bytes {
        store.get(key).await.unwrap().unwrap().value
    }

    #[tokio::test]
    async fn the_store_behaves_as_any_other() {
        let store = Encrypted::new(Arc::new(Memory::default()), config(&format!("[{}]", cbc("a"))));
        super::super::suite::run(&store, "/registry/secrets").await;
    }

    #[tokio::test]
    async fn only_the_named_resources_are_sealed() {
        let inner: Arc<dyn Store> = Arc::new(Memory::default());
        let store = Encrypted::new(inner.clone(), config(&format!("[{}, {{identity: {{}}}}]", cbc("a"))));
        for key in ["/registry/secrets/a/b", "/registry/example.com/things/x", "/registry/configmaps/a/b"] {
            store.put(key, "{}".into(), Expect::Absent, None).await.unwrap();
            assert_eq!(stored(&store, key).await, "{}");
            let is_sealed = stored(&*inner, key).await.starts_with(b"k8s:enc:aescbc:v1:a:");
            assert_eq!(is_sealed, !key.contains("configmaps"), "{key}");
        }
    }

    #[tokio::test]
    async fn old_keys_open_and_are_told() {
        let inner: Arc<dyn Store> = Arc::new(Memory::default());
        let key = "/registry/secrets/a/b";
        let plain = Encrypted::new(inner.clone(), config("[{identity: {}}]"));
        plain.put(key, "{}".into(), Expect::Absent, None).await.unwrap();
        assert!(!plain.is_stale(key));
        let store = Encrypted::new(inner.clone(), config(&format!("[{}, {{identity: {{}}}}]", cbc("a"))));
        let entry = store.get(key).await.unwrap().unwrap();
        assert_eq!((&entry.value[..], store.is_stale(key)), (&b"{}"[..], true));
        store.put(key, entry.value, Expect::Revision(entry.revision), None).await.unwrap();
        assert_eq!(stored(&store, key).await, "{}");
        assert!(!store.is_stale(key));
        // Whoever lacks the key sees what is there.
        assert!(stored(&plain, key).await.starts_with(SEALED));
    }
}
