//! Leases in etcd v3, with upstream's layout: `<prefix>/config` and `<prefix>/subnets/10.244.1.0-24`, each lease key
//! bound to an etcd lease of 24 hours. Networks with different prefixes share one etcd. A key without an etcd lease is a reservation and never expires.
//!
//! Every write is a transaction on the revision that was read, so two nodes can never both believe in one subnet.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;
use etcd_client::{
    Certificate, Client, Compare, CompareOp, ConnectOptions, EventType, GetOptions, Identity, PutOptions, TlsOptions,
    Txn, TxnOp, WatchOptions,
};
use ipnet::IpNet;
use parking_lot::Mutex;
use rand::seq::IndexedRandom;
use tokio::sync::watch;
use tokio::time::Instant;

use super::{Leases, StoredPublic, SubnetError, SubnetManager, macs, publish};
use crate::family::{Family, overlap};
use crate::lease::{Lease, LeaseAttributes, LeaseSet, Subnets};
use crate::mac::Mac;
use crate::network::{NetworkConfig, Pool};

const LEASE_TTL: Duration = Duration::from_secs(24 * 60 * 60);
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
const RENEWAL_RETRY: Duration = Duration::from_secs(60);
const RECLAIM_RETRY: Duration = Duration::from_secs(2);
const WATCH_RETRY: Duration = Duration::from_secs(5);
/// Nodes that start together pick among this many subnets, so that they seldom pick the same.
const CANDIDATES: usize = 100;
const RACE_LIMIT: usize = 32;

#[derive(Clone, Debug, Default)]
pub struct EtcdOptions {
    pub endpoints: Vec<String>,
    pub prefix: String,
    pub key_file: Option<PathBuf>,
    pub cert_file: Option<PathBuf>,
    pub ca_file: Option<PathBuf>,
    pub username: String,
    pub password: String,
    /// How long before its expiry a lease is renewed.
    pub renew_margin: Duration,
    /// The subnets that this node had before, tried first.
    pub previous: Subnets,
}

pub struct EtcdSubnetManager {
    client: Client,
    /// Without a slash at the end.
    prefix: String,
    renew_margin: Duration,
    previous: Subnets,
    /// When our lease ends; `None` while there is none, or when it is a reservation.
    expiry: Mutex<Option<Instant>>,
}

/// A lease key as it was read.
#[derive(Clone, Debug)]
struct Entry {
    attributes: LeaseAttributes,
    create_revision: i64,
    mod_revision: i64,
    /// The key has no etcd lease: an administrator reserved the subnet for the node.
    reserved: bool,
}

struct Listing {
    entries: Vec<(Subnets, Entry)>,
    revision: i64,
}

impl EtcdSubnetManager {
    pub async fn connect(options: EtcdOptions) -> Result<Self, SubnetError> {
        let connect = connect_options(&options)?;
        let client = Client::connect(&options.endpoints, Some(connect));
        let client = bounded("connect", client).await?;
        Ok(Self {
            client,
            prefix: options.prefix.trim_end_matches('/').to_owned(),
            renew_margin: options.renew_margin,
            previous: options.previous,
            expiry: Mutex::new(None),
        })
    }

    fn subnets_prefix(&self) -> String {
        format!("{}/subnets/", self.prefix)
    }

    fn key(&self, subnets: &Subnets) -> String {
        format!("{}/subnets/{}", self.prefix, subnets.key())
    }

    fn config_key(&self) -> String {
        format!("{}/config", self.prefix)
    }

    async fn list(&self) -> Result<Listing, SubnetError> {
        let mut client = self.client.kv_client();
        let request = client.get(self.subnets_prefix(), Some(GetOptions::new().with_prefix()));
        let response = bounded("list the subnets", request).await?;
        let revision = response.header().map_or(0, |header| header.revision());
        let entries = response.kvs().iter().filter_map(|kv| {
            let subnets = subnets_of(kv.key())?;
            Some((subnets, Entry::read(&subnets, kv)?))
        });
        Ok(Listing { entries: entries.collect(), revision })
    }

    /// One try to get subnets; `None` when another node was faster.
    async fn try_acquire(
        &self,
        network: &NetworkConfig,
        attributes: &LeaseAttributes,
    ) -> Result<Option<Subnets>, SubnetError> {
        let listing = self.list().await?;
        let ours = listing.entries.iter().find(|(_, entry)| entry.attributes.owner() == attributes.owner());
        if let Some((subnets, entry)) = ours {
            if network.allows(subnets) {
                tracing::info!(%subnets, "taking up the lease that this node already has");
                return Ok(self.claim(subnets, attributes, Some(entry)).await?.then_some(*subnets));
            }
            tracing::info!(%subnets, "giving up a lease that does not fit the network configuration");
            self.release(subnets, entry).await?;
        }
        let taken: Vec<Subnets> = listing.entries.iter().map(|(subnets, _)| *subnets).collect();
        let subnets = choose(network, &self.previous, &taken)?;
        let won = self.claim(&subnets, attributes, None).await? && self.is_alone(&subnets).await?;
        Ok(won.then_some(subnets))
    }

    /// Whether no lease that is older than ours overlaps it. A transaction sees only its own key, and in dual stack two
    /// nodes may have chosen different IPv4 subnets with the same IPv6 subnet; the later one gives way.
    async fn is_alone(&self, subnets: &Subnets) -> Result<bool, SubnetError> {
        let listing = self.list().await?;
        let Some((_, ours)) = listing.entries.iter().find(|(other, _)| other == subnets) else { return Ok(false) };
        let older = listing.entries.iter().find(|(other, entry)| {
            other != subnets && other.overlaps(subnets) && entry.create_revision < ours.create_revision
        });
        if let Some((other, _)) = older {
            tracing::info!(%subnets, %other, "another lease overlaps the chosen one");
            self.release(subnets, ours).await?;
        }
        Ok(older.is_none())
    }

    /// Writes our lease if the key still is what was read (`None`: absent). False when it is not.
    async fn claim(
        &self,
        subnets: &Subnets,
        attributes: &LeaseAttributes,
        seen: Option<&Entry>,
    ) -> Result<bool, SubnetError> {
        let key = self.key(subnets);
        let value = serde_json::to_vec(attributes).map_err(SubnetError::Encode)?;
        let lease = if seen.is_some_and(|entry| entry.reserved) { 0 } else { self.grant().await? };
        let condition = match seen {
            Some(entry) => Compare::mod_revision(key.clone(), CompareOp::Equal, entry.mod_revision),
            None => Compare::version(key.clone(), CompareOp::Equal, 0),
        };
        let put = TxnOp::put(key, value, Some(PutOptions::new().with_lease(lease)));
        let mut kv = self.client.kv_client();
        let outcome = bounded("write the lease", kv.txn(Txn::new().when([condition]).and_then([put]))).await;
        let won = matches!(&outcome, Ok(response) if response.succeeded());
        if won {
            *self.expiry.lock() = (lease != 0).then(|| Instant::now() + LEASE_TTL);
        } else if lease != 0 {
            self.revoke(lease).await;
        }
        outcome.map(|_| won)
    }

    async fn grant(&self) -> Result<i64, SubnetError> {
        let seconds = i64::try_from(LEASE_TTL.as_secs()).unwrap_or(i64::MAX);
        let mut client = self.client.lease_client();
        Ok(bounded("grant an etcd lease", client.grant(seconds, None)).await?.id())
    }

    /// Best effort: a lease without keys only waits for its expiry.
    async fn revoke(&self, lease: i64) {
        let mut client = self.client.lease_client();
        if let Err(error) = bounded("revoke an etcd lease", client.revoke(lease)).await {
            tracing::debug!(%error, "an unused etcd lease stays until it expires");
        }
    }

    async fn release(&self, subnets: &Subnets, entry: &Entry) -> Result<(), SubnetError> {
        let key = self.key(subnets);
        let unchanged = Compare::mod_revision(key.clone(), CompareOp::Equal, entry.mod_revision);
        let transaction = Txn::new().when([unchanged]).and_then([TxnOp::delete(key, None)]);
        let mut kv = self.client.kv_client();
        bounded("give up a lease", kv.txn(transaction)).await.map(|_| ())
    }

    /// Extends our lease, or takes the subnet again if the key is gone. False when it must be tried again soon.
    async fn renew(&self, lease: &Lease) -> Result<bool, SubnetError> {
        let mut kv = self.client.kv_client();
        let response = bounded("read the own lease", kv.get(self.key(&lease.subnets), None)).await?;
        let seen = response.kvs().first().and_then(|kv| Entry::read(&lease.subnets, kv));
        match &seen {
            Some(entry) if entry.attributes.owner() != lease.attributes.owner() => {
                Err(SubnetError::Lost { subnets: lease.subnets, owner: entry.attributes.owner() })
            }
            seen => self.claim(&lease.subnets, &lease.attributes, seen.as_ref()).await,
        }
    }

    /// When to renew next; far away for a reservation.
    fn renewal(&self) -> Instant {
        let expiry = self.expiry.lock().unwrap_or_else(|| Instant::now() + LEASE_TTL);
        expiry.checked_sub(self.renew_margin).unwrap_or_else(Instant::now)
    }

    /// Lists, publishes and follows the changes until something breaks.
    async fn follow(&self, leases: &watch::Sender<Option<LeaseSet>>) -> Result<(), SubnetError> {
        let listing = self.list().await?;
        let set = listing.entries.into_iter().map(|(subnets, entry)| (subnets, entry.attributes)).collect();
        publish(leases, set);
        let options = WatchOptions::new().with_prefix().with_start_revision(listing.revision + 1);
        let mut client = self.client.watch_client();
        let mut stream = bounded("watch the subnets", client.watch(self.subnets_prefix(), Some(options))).await?;
        loop {
            let message = stream.message().await;
            let Some(response) = message.map_err(|source| SubnetError::Etcd { step: "follow the subnets", source })?
            else {
                return Ok(());
            };
            if response.canceled() {
                tracing::warn!(reason = response.cancel_reason(), "etcd cancelled the watch of the subnets");
                return Ok(());
            }
            let mut set = leases.borrow().clone().unwrap_or_default();
            for event in response.events() {
                let Some((kv, subnets)) = event.kv().and_then(|kv| Some((kv, subnets_of(kv.key())?))) else {
                    continue;
                };
                match event.event_type() {
                    EventType::Delete => {
                        set.remove(&subnets);
                    }
                    EventType::Put => {
                        if let Some(attributes) = decode(&subnets, kv.value()) {
                            set.insert(subnets, attributes);
                        }
                    }
                }
            }
            publish(leases, set);
        }
    }

    /// Reads the configuration with the revision of the whole store.
    async fn read_config(&self) -> Result<(NetworkConfig, i64), SubnetError> {
        let key = self.config_key();
        let mut kv = self.client.kv_client();
        let response = bounded("read the network configuration", kv.get(key.clone(), None)).await?;
        let revision = response.header().map_or(0, |header| header.revision());
        let value = response.kvs().first().ok_or(SubnetError::NoNetworkConfig { key })?;
        Ok((NetworkConfig::parse(&String::from_utf8_lossy(value.value()))?, revision))
    }

    /// Returns when the key of the configuration was written after the revision, or the watch broke.
    async fn config_written(&self, revision: i64) -> Result<(), SubnetError> {
        let options = WatchOptions::new().with_start_revision(revision + 1);
        let mut client = self.client.watch_client();
        let watch = client.watch(self.config_key(), Some(options));
        let mut stream = bounded("watch the network configuration", watch).await?;
        let follow = |source| SubnetError::Etcd { step: "follow the network configuration", source };
        while let Some(response) = stream.message().await.map_err(follow)? {
            if response.canceled() || !response.events().is_empty() {
                break;
            }
        }
        Ok(())
    }

    async fn current_revision(&self) -> Result<i64, SubnetError> {
        let mut kv = self.client.kv_client();
        let response = bounded("read the store's revision", kv.get(self.config_key(), None)).await?;
        Ok(response.header().map_or(0, |header| header.revision()))
    }
}

impl Entry {
    fn read(subnets: &Subnets, kv: &etcd_client::KeyValue) -> Option<Self> {
        Some(Self {
            attributes: decode(subnets, kv.value())?,
            create_revision: kv.create_revision(),
            mod_revision: kv.mod_revision(),
            reserved: kv.lease() == 0,
        })
    }
}

#[async_trait]
impl SubnetManager for EtcdSubnetManager {
    async fn network(&self) -> Result<NetworkConfig, SubnetError> {
        self.read_config().await.map(|(config, _)| config)
    }

    async fn network_changed(&self, present: &NetworkConfig) -> NetworkConfig {
        loop {
            let attempt = async {
                // One that cannot be used is waited out from the revision at which it was seen.
                let revision = self.current_revision().await?;
                match self.read_config().await {
                    Ok((config, _)) if config != *present => return Ok(Some(config)),
                    Err(error @ (SubnetError::NetworkConfig(_) | SubnetError::NoNetworkConfig { .. })) => {
                        let error = apimachinery::process::error_chain(&error);
                        tracing::error!(error, "the new network configuration is not used; the present one goes on");
                    }
                    other => {
                        other?;
                    }
                }
                self.config_written(revision).await.map(|()| None)
            };
            match attempt.await {
                Ok(Some(config)) => return config,
                Ok(None) => {}
                Err(error) => {
                    let error = apimachinery::process::error_chain(&error);
                    tracing::warn!(error, "cannot watch the network configuration");
                    tokio::time::sleep(WATCH_RETRY).await;
                }
            }
        }
    }

    async fn stored_public(&self) -> Result<StoredPublic, SubnetError> {
        Ok(StoredPublic::default())
    }

    async fn stored_macs(&self, owner: IpAddr) -> Result<BTreeMap<Family, Mac>, SubnetError> {
        let listing = self.list().await?;
        let ours = listing.entries.iter().find(|(_, entry)| entry.attributes.owner() == owner);
        Ok(ours.map(|(_, entry)| macs(&entry.attributes)).unwrap_or_default())
    }

    async fn acquire(&self, network: &NetworkConfig, attributes: &LeaseAttributes) -> Result<Lease, SubnetError> {
        for _ in 0..RACE_LIMIT {
            if let Some(subnets) = self.try_acquire(network, attributes).await? {
                return Ok(Lease { subnets, attributes: attributes.clone() });
            }
            tracing::info!("another node took the chosen subnet; choosing again");
        }
        Err(SubnetError::Contended(RACE_LIMIT))
    }

    async fn keep(&self, lease: &Lease, mut leases: Leases) -> SubnetError {
        let mut next = self.renewal();
        loop {
            let gone = tokio::select! {
                () = tokio::time::sleep_until(next) => false,
                changed = leases.changed() => {
                    let known = leases.borrow_and_update();
                    let owner = lease.attributes.owner();
                    let present = known
                        .as_ref()
                        .is_none_or(|set| set.get(&lease.subnets).is_some_and(|seen| seen.owner() == owner));
                    if changed.is_ok() && present {
                        continue;
                    }
                    true
                }
            };
            next = match self.renew(lease).await {
                Ok(true) => self.renewal(),
                Ok(false) => Instant::now() + RECLAIM_RETRY,
                Err(lost @ SubnetError::Lost { .. }) => return lost,
                Err(error) => {
                    let retry = if gone { RECLAIM_RETRY } else { RENEWAL_RETRY };
                    tracing::warn!(
                        error = apimachinery::process::error_chain(&error),
                        ?retry,
                        "cannot renew the lease"
                    );
                    Instant::now() + retry
                }
            };
        }
    }

    async fn watch(&self, leases: watch::Sender<Option<LeaseSet>>) {
        const FIRST: Duration = Duration::from_millis(100);
        let mut backoff = FIRST;
        loop {
            let started = Instant::now();
            match self.follow(&leases).await {
                Ok(()) => tracing::info!("the watch of the subnets ended; starting again"),
                Err(error) => {
                    tracing::warn!(
                        error = apimachinery::process::error_chain(&error),
                        "the watch of the subnets broke"
                    );
                }
            }
            if started.elapsed() > Duration::from_secs(30) {
                backoff = FIRST;
            }
            tokio::time::sleep(backoff).await;
            backoff = (backoff * 2).min(Duration::from_secs(5));
        }
    }
}

/// The previous subnets if they are free, or else for each family one of the first free ones at random.
fn choose(network: &NetworkConfig, previous: &Subnets, taken: &[Subnets]) -> Result<Subnets, SubnetError> {
    let given = previous.iter().next().is_some();
    if given && network.allows(previous) && !taken.iter().any(|other| other.overlaps(previous)) {
        return Ok(*previous);
    }
    let mut chosen = Subnets::default();
    for pool in network.pools() {
        chosen = chosen.with(choose_from(pool, taken).ok_or(SubnetError::OutOfSubnets(pool.network))?);
    }
    Ok(chosen)
}

fn choose_from(pool: &Pool, taken: &[Subnets]) -> Option<IpNet> {
    let taken: Vec<IpNet> = taken.iter().filter_map(|subnets| subnets.get(pool.family())).collect();
    let free = |subnet: &IpNet| !taken.iter().any(|other| overlap(*other, *subnet));
    let candidates: Vec<IpNet> = pool.subnets().filter(free).take(CANDIDATES).collect();
    candidates.choose(&mut rand::rng()).copied()
}

fn subnets_of(key: &[u8]) -> Option<Subnets> {
    Subnets::parse_key(std::str::from_utf8(key).ok()?.rsplit('/').next()?)
}

fn decode(subnets: &Subnets, value: &[u8]) -> Option<LeaseAttributes> {
    match serde_json::from_slice(value) {
        Ok(attributes) => Some(attributes),
        Err(error) => {
            tracing::warn!(%subnets, %error, "ignoring a lease that cannot be read");
            None
        }
    }
}

/// Runs one request with a time limit: a dead connection must not hang the daemon.
async fn bounded<T>(
    step: &'static str,
    request: impl Future<Output = Result<T, etcd_client::Error>>,
) -> Result<T, SubnetError> {
    match tokio::time::timeout(REQUEST_TIMEOUT, request).await {
        Ok(result) => result.map_err(|source| SubnetError::Etcd { step, source }),
        Err(_) => Err(SubnetError::EtcdTimeout { step, seconds: REQUEST_TIMEOUT.as_secs() }),
    }
}

fn connect_options(options: &EtcdOptions) -> Result<ConnectOptions, SubnetError> {
    let mut connect = ConnectOptions::new()
        .with_connect_timeout(Duration::from_secs(5))
        .with_keep_alive(Duration::from_secs(30), Duration::from_secs(10))
        .with_keep_alive_while_idle(true)
        .with_require_leader(true);
    if !options.username.is_empty() {
        connect = connect.with_user(&options.username, &options.password).with_auto_token_refresh(true);
    }
    let read = |path: &PathBuf| {
        std::fs::read(path).map_err(|source| SubnetError::ReadFile { path: path.display().to_string(), source })
    };
    let mut tls = TlsOptions::new();
    let mut wanted = false;
    if let Some(ca) = &options.ca_file {
        tls = tls.ca_certificate(Certificate::from_pem(read(ca)?));
        wanted = true;
    }
    if let (Some(cert), Some(key)) = (&options.cert_file, &options.key_file) {
        tls = tls.identity(Identity::from_pem(read(cert)?, read(key)?));
        wanted = true;
    }
    Ok(if wanted { connect.with_tls(tls) } else { connect })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network() -> NetworkConfig {
        NetworkConfig::parse(r#"{"Network":"10.244.0.0/22","SubnetLen":24,"Backend":{"Type":"host-gw"}}"#).unwrap()
    }

    fn dual() -> NetworkConfig {
        let text =
            r#"{"Network":"10.244.0.0/22","EnableIPv6":true,"IPv6Network":"fd00::/62","Backend":{"Type":"vxlan"}}"#;
        NetworkConfig::parse(text).unwrap()
    }

    fn subnets(nets: &[&str]) -> Subnets {
        nets.iter().fold(Subnets::default(), |all, net| all.with(net.parse().unwrap()))
    }

    #[test]
    fn the_previous_subnet_is_taken_when_it_is_free_and_fits() {
        let previous = subnets(&["10.244.2.0/24"]);
        let taken = |nets: &[&str]| nets.iter().map(|net| subnets(&[net])).collect::<Vec<_>>();
        let chosen = |previous, nets: &[&str]| choose(&network(), &previous, &taken(nets)).unwrap();
        assert_eq!(chosen(previous, &["10.244.1.0/24"]), previous);
        assert_eq!(chosen(previous, &["10.244.1.0/24", "10.244.2.0/24"]), subnets(&["10.244.3.0/24"]));
        assert_eq!(chosen(subnets(&["10.9.2.0/24"]), &["10.244.2.0/23"]), subnets(&["10.244.1.0/24"]));
    }

    #[test]
    fn dual_stack_takes_a_free_one_of_each() {
        let taken = [subnets(&["10.244.1.0/24", "fd00:0:0:1::/64"]), subnets(&["10.244.2.0/24", "fd00:0:0:3::/64"])];
        let expected = subnets(&["10.244.3.0/24", "fd00:0:0:2::/64"]);
        assert_eq!(choose(&dual(), &Subnets::default(), &taken).unwrap(), expected);
        // The IPv6 subnet of before is taken by now.
        assert_eq!(choose(&dual(), &subnets(&["10.244.3.0/24", "fd00:0:0:1::/64"]), &taken).unwrap(), expected);
    }

    #[test]
    fn a_full_network_is_named() {
        let taken: Vec<Subnets> = ["10.244.1.0/24", "10.244.2.0/24", "10.244.3.0/24"].map(|net| subnets(&[net])).into();
        let error = choose(&network(), &Subnets::default(), &taken).unwrap_err();
        assert!(error.to_string().contains("10.244.0.0/22"), "{error}");
    }

    #[test]
    fn keys_under_any_prefix() {
        assert_eq!(subnets_of(b"/coreos.com/network/subnets/10.244.1.0-24"), Some(subnets(&["10.244.1.0/24"])));
        assert_eq!(subnets_of(b"/coreos.com/network/subnets/what"), None);
    }
}
