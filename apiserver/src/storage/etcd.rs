//! etcd as the store. One connection (balanced over the endpoints) carries everything; a write is one transaction, a
//! read of the present one linearizable range.

use std::path::Path;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use etcd_client::{
    Certificate, Client, Compare, CompareOp, ConnectOptions, EventType, GetOptions, GetResponse, Identity, KeyValue,
    KvClient, PutOptions, TlsOptions, Txn, TxnOp, TxnOpResponse, WatchOptions,
};
use tokio::sync::Mutex;
use tokio::time::{Instant, timeout_at};

use super::channel::WideWindows;
use super::{Change, Entry, Expect, Outcome, Page, Store, StoreError, StoreResult, WatchStream};
use crate::config::Config;

/// How long a single request may take.
const TIMEOUT: Duration = Duration::from_secs(10);
/// A member that vanishes without a word (its machine is cut off) is found dead after these two together. etcd closes
/// connections that are asked more often than every 5 s.
const KEEP_ALIVE: Duration = Duration::from_secs(5);
const KEEP_ALIVE_ANSWER: Duration = Duration::from_secs(2);
/// How long one member may take over a request that another could answer as well.
const ATTEMPT: Duration = Duration::from_secs(2);
/// The pause before a request goes to another member.
const REPEAT_PAUSE: Duration = Duration::from_millis(20);
/// A page of large objects, or a watch that catches up, is bigger than gRPC's default of 4 MiB.
const MESSAGE_MAX: usize = 512 << 20;
/// Keys with a time to live share a lease: at most this many, granted at most this long ago.
const LEASE_KEYS: usize = 1000;
const LEASE_REUSE: Duration = Duration::from_secs(60);
/// The key that `touch` writes, below the prefix.
const TOUCHED: &str = "ketch/freshness";

pub struct Etcd {
    client: Client,
    kv: KvClient,
    lease: Mutex<Option<SharedLease>>,
}

struct SharedLease {
    id: i64,
    ttl: Duration,
    granted: Instant,
    keys: usize,
}

impl Etcd {
    /// Connects lazily: an etcd that is not there yet is an error of the first request.
    pub async fn connect(config: &Config) -> StoreResult<Self> {
        let mut options = ConnectOptions::new()
            .with_connect_timeout(Duration::from_secs(5))
            .with_keep_alive(KEEP_ALIVE, KEEP_ALIVE_ANSWER);
        if let Some(tls) = tls_options(config)? {
            options = options.with_tls(tls);
        }
        let client = Client::connect_with_balanced_channel(&config.etcd_servers, Some(options), WideWindows)
            .await
            .map_err(|error| StoreError::Connect(Box::new(error)))?;
        let kv = client.kv_client().max_decoding_message_size(MESSAGE_MAX);
        Ok(Self { client, kv, lease: Mutex::default() })
    }

    async fn read(
        &self,
        operation: &'static str,
        key: Vec<u8>,
        options: Option<GetOptions>,
    ) -> StoreResult<GetResponse> {
        bounded(operation, Repeat::Any, || {
            let (mut kv, key, options) = (self.kv.clone(), key.clone(), options.clone());
            async move { kv.get(key, options).await }
        })
        .await
    }

    /// Runs `then` when the key is as expected, else reads the key.
    async fn conditionally(
        &self,
        operation: &'static str,
        key: &str,
        expect: Expect,
        then: TxnOp,
    ) -> StoreResult<Outcome> {
        let revision = match expect {
            Expect::Absent => 0,
            Expect::Revision(revision) => revision,
        };
        let txn = Txn::new()
            .when([Compare::mod_revision(key, CompareOp::Equal, signed(revision))])
            .and_then([then])
            .or_else([TxnOp::get(key, None)]);
        let response = bounded(operation, Repeat::Unsent, || {
            let (mut kv, txn) = (self.kv.clone(), txn.clone());
            async move { kv.txn(txn).await }
        })
        .await?;
        if response.succeeded() {
            return Ok(Outcome::Done(response.header().map_or(0, |header| unsigned(header.revision()))));
        }
        let present = response.op_responses().into_iter().find_map(|op| match op {
            TxnOpResponse::Get(mut get) => get.take_kvs().into_iter().next(),
            _ => None,
        });
        Ok(Outcome::Mismatch(present.and_then(entry)))
    }

    /// A lease that lasts at least `ttl` from now.
    async fn lease(&self, ttl: Duration) -> StoreResult<i64> {
        let mut shared = self.lease.lock().await;
        if let Some(lease) = shared.as_mut()
            && lease.ttl == ttl
            && lease.keys < LEASE_KEYS
            && lease.granted.elapsed() < LEASE_REUSE
        {
            lease.keys += 1;
            return Ok(lease.id);
        }
        let seconds = i64::try_from((ttl + LEASE_REUSE).as_secs()).unwrap_or(i64::MAX);
        let granted = bounded("grant a lease", Repeat::Any, || {
            let mut client = self.client.lease_client();
            async move { client.grant(seconds, None).await }
        })
        .await?;
        *shared = Some(SharedLease { id: granted.id(), ttl, granted: Instant::now(), keys: 1 });
        Ok(granted.id())
    }
}

#[async_trait]
impl Store for Etcd {
    async fn get(&self, key: &str) -> StoreResult<Option<Entry>> {
        let mut response = self.read("read a key", key.into(), None).await?;
        Ok(response.take_kvs().into_iter().next().and_then(entry))
    }

    async fn range(&self, prefix: &str, after: Option<&str>, limit: usize, revision: Option<u64>) -> StoreResult<Page> {
        let mut options = GetOptions::new().with_range(prefix_end(prefix)).with_limit(limit as i64);
        if let Some(revision) = revision {
            options = options.with_revision(signed(revision));
        }
        let start = after.map_or_else(|| prefix.as_bytes().to_vec(), |after| [after.as_bytes(), b"\0"].concat());
        let mut response = self.read("read a range", start, Some(options)).await?;
        Ok(Page {
            revision: response.header().map_or(0, |header| unsigned(header.revision())),
            more: response.more(),
            entries: response.take_kvs().into_iter().filter_map(entry).collect(),
        })
    }

    async fn put(&self, key: &str, value: Bytes, expect: Expect, ttl: Option<Duration>) -> StoreResult<Outcome> {
        let options = match ttl {
            Some(ttl) => Some(PutOptions::new().with_lease(self.lease(ttl).await?)),
            None => None,
        };
        self.conditionally("write a key", key, expect, TxnOp::put(key, value.to_vec(), options)).await
    }

    async fn delete(&self, key: &str, revision: u64) -> StoreResult<Outcome> {
        self.conditionally("delete a key", key, Expect::Revision(revision), TxnOp::delete(key, None)).await
    }

    async fn watch(&self, prefix: &str, after: u64) -> StoreResult<Box<dyn WatchStream>> {
        let options = WatchOptions::new().with_range(prefix_end(prefix)).with_start_revision(signed(after + 1));
        let stream = bounded("start a watch", Repeat::Any, || {
            let mut client = self.client.watch_client().max_decoding_message_size(MESSAGE_MAX);
            let (prefix, options) = (prefix.to_owned(), options.clone());
            async move { client.watch(prefix, Some(options)).await }
        })
        .await?;
        Ok(Box::new(EtcdWatch(stream)))
    }

    async fn revision(&self) -> StoreResult<u64> {
        // Any read tells the revision; a key that nobody writes makes it the cheapest one.
        let response =
            self.read("read the revision", b"\0".to_vec(), Some(GetOptions::new().with_count_only())).await?;
        Ok(response.header().map_or(0, |header| unsigned(header.revision())))
    }

    async fn touch(&self, prefix: &str) -> StoreResult<u64> {
        let response = bounded("write the freshness key", Repeat::Any, || {
            let (mut kv, key) = (self.kv.clone(), format!("{prefix}/{TOUCHED}"));
            async move { kv.put(key, "", None).await }
        })
        .await?;
        Ok(response.header().map_or(0, |header| unsigned(header.revision())))
    }

    async fn compact(&self, revision: u64) -> StoreResult<()> {
        let compacted = bounded("compact history", Repeat::Any, || {
            let mut kv = self.kv.clone();
            async move { kv.compact(signed(revision), None).await }
        });
        match compacted.await {
            Ok(_) | Err(StoreError::Compacted) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

struct EtcdWatch(etcd_client::WatchStream);

#[async_trait]
impl WatchStream for EtcdWatch {
    async fn next(&mut self) -> StoreResult<Vec<Change>> {
        loop {
            let response =
                self.0.message().await.map_err(|error| failed("watch", error))?.ok_or(StoreError::WatchEnded)?;
            if response.compact_revision() != 0 {
                return Err(StoreError::Compacted);
            }
            if response.canceled() {
                tracing::warn!(reason = response.cancel_reason(), "etcd ended the watch");
                return Err(StoreError::WatchEnded);
            }
            let changes: Vec<Change> = response.events().iter().filter_map(change).collect();
            if !changes.is_empty() {
                return Ok(changes);
            }
        }
    }
}

fn change(event: &etcd_client::Event) -> Option<Change> {
    let kv = event.kv()?;
    match event.event_type() {
        EventType::Put => entry(kv.clone()).map(Change::Put),
        EventType::Delete => {
            Some(Change::Delete { key: kv.key_str().ok()?.to_owned(), revision: unsigned(kv.mod_revision()) })
        }
    }
}

/// A key that is not text is none of ours.
fn entry(kv: KeyValue) -> Option<Entry> {
    let revision = unsigned(kv.mod_revision());
    let (key, value) = kv.into_key_value();
    Some(Entry { key: String::from_utf8(key).ok()?, value: value.into(), revision })
}

/// The key after all keys that start with `prefix`.
fn prefix_end(prefix: &str) -> Vec<u8> {
    let mut end = prefix.as_bytes().to_vec();
    while let Some(last) = end.pop() {
        if last < 0xff {
            end.push(last + 1);
            return end;
        }
    }
    vec![0]
}

fn signed(revision: u64) -> i64 {
    i64::try_from(revision).unwrap_or(i64::MAX)
}

fn unsigned(revision: i64) -> u64 {
    u64::try_from(revision).unwrap_or(0)
}

/// Which failures let a request be sent again, when a member of the cluster is gone.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Repeat {
    /// Any: doing it twice does no harm.
    Any,
    /// Those of which it is certain that no member has seen the request.
    Unsent,
}

impl Repeat {
    fn allows(self, error: &etcd_client::Error) -> bool {
        let etcd_client::Error::GRpcStatus(status) = error else { return false };
        match self {
            // A connection that broke off shows as any of these, whoever ended it.
            Self::Any => {
                matches!(status.code(), tonic::Code::Unavailable | tonic::Code::Cancelled | tonic::Code::Unknown)
            }
            // The connection's error is only told by its text.
            Self::Unsent => status.code() == tonic::Code::Unavailable && status.message().contains("tcp connect error"),
        }
    }
}

/// Sends a request, and sends it again to another member while that is allowed, at most for [`TIMEOUT`] in all.
async fn bounded<T, F>(operation: &'static str, repeat: Repeat, request: impl Fn() -> F) -> StoreResult<T>
where
    F: Future<Output = Result<T, etcd_client::Error>>,
{
    let deadline = Instant::now() + TIMEOUT;
    loop {
        let patience = if repeat == Repeat::Any { deadline.min(Instant::now() + ATTEMPT) } else { deadline };
        match timeout_at(patience, request()).await {
            Ok(Ok(answer)) => return Ok(answer),
            Ok(Err(error)) if repeat.allows(&error) && Instant::now() + REPEAT_PAUSE < deadline => {
                tracing::debug!(operation, %error, "a store member does not answer; trying again");
                tokio::time::sleep(REPEAT_PAUSE).await;
            }
            Ok(Err(error)) => return Err(failed(operation, error)),
            Err(_) if Instant::now() + REPEAT_PAUSE < deadline => {
                tracing::debug!(operation, "a store member is silent; trying again");
            }
            Err(_) => return Err(StoreError::Timeout { operation }),
        }
    }
}

fn failed(operation: &'static str, error: etcd_client::Error) -> StoreError {
    match &error {
        etcd_client::Error::GRpcStatus(status) if status.message().contains("required revision has been compacted") => {
            StoreError::Compacted
        }
        _ => StoreError::Operation { operation, source: Box::new(error) },
    }
}

fn tls_options(config: &Config) -> StoreResult<Option<TlsOptions>> {
    let read =
        |path: &Path| std::fs::read(path).map_err(|source| StoreError::ReadTls { path: path.to_owned(), source });
    if config.etcd_cafile.is_none() && config.etcd_certfile.is_none() {
        return Ok(None);
    }
    let mut tls = TlsOptions::new();
    if let Some(path) = &config.etcd_cafile {
        tls = tls.ca_certificate(Certificate::from_pem(read(path)?));
    }
    if let (Some(cert), Some(key)) = (&config.etcd_certfile, &config.etcd_keyfile) {
        tls = tls.identity(Identity::from_pem(read(cert)?, read(key)?));
    }
    Ok(Some(tls))
}
