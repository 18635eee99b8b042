//! Leases in etcd v3, with upstream's layout: `<prefix>/config` and `<prefix>/subnets/10.244.1.0-24`, each lease key
//! bound to an etcd lease of 24 hours. A key without an etcd lease is a reservation and never expires.
//!
//! Every write is a transaction on the revision that was read, so two nodes can never both believe in one subnet.

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;
use etcd_client::{
    Certificate, Client, Compare, CompareOp, ConnectOptions, EventType, GetOptions, Identity, PutOptions, TlsOptions,
    Txn, TxnOp, WatchOptions,
};
use ipnet::Ipv4Net;
use parking_lot::Mutex;
use rand::seq::IndexedRandom;
use tokio::sync::watch;
use tokio::time::Instant;

use super::{Leases, SubnetError, SubnetManager};
use crate::lease::{Lease, LeaseAttributes, LeaseSet, Mac, parse_subnet_key, subnet_key};
use crate::network::NetworkConfig;

const LEASE_TTL: Duration = Duration::from_secs(24 * 60 * 60);
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
const RENEWAL_RETRY: Duration = Duration::from_secs(60);
const RECLAIM_RETRY: Duration = Duration::from_secs(2);
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
    /// The subnet that this node had before, tried first.
    pub previous: Option<Ipv4Net>,
}

pub struct EtcdSubnetManager {
    client: Client,
    /// Without a slash at the end.
    prefix: String,
    renew_margin: Duration,
    previous: Option<Ipv4Net>,
    /// When our lease ends; `None` while there is none, or when it is a reservation.
    expiry: Mutex<Option<Instant>>,
}

/// A lease key as it was read.
#[derive(Clone, Debug)]
struct Entry {
    attributes: LeaseAttributes,
    mod_revision: i64,
    /// The key has no etcd lease: an administrator reserved the subnet for the node.
    reserved: bool,
}

struct Listing {
    entries: Vec<(Ipv4Net, Entry)>,
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

    fn key(&self, subnet: Ipv4Net) -> String {
        format!("{}/subnets/{}", self.prefix, subnet_key(subnet))
    }

    async fn list(&self) -> Result<Listing, SubnetError> {
        let mut client = self.client.kv_client();
        let request = client.get(self.subnets_prefix(), Some(GetOptions::new().with_prefix()));
        let response = bounded("list the subnets", request).await?;
        let revision = response.header().map_or(0, |header| header.revision());
        let entries = response.kvs().iter().filter_map(|kv| {
            let subnet = subnet_of(kv.key())?;
            let attributes = decode(subnet, kv.value())?;
            Some((subnet, Entry { attributes, mod_revision: kv.mod_revision(), reserved: kv.lease() == 0 }))
        });
        Ok(Listing { entries: entries.collect(), revision })
    }

    /// One try to get a subnet; `None` when another node was faster.
    async fn try_acquire(
        &self,
        network: &NetworkConfig,
        attributes: &LeaseAttributes,
    ) -> Result<Option<Ipv4Net>, SubnetError> {
        let listing = self.list().await?;
        let ours = listing.entries.iter().find(|(_, entry)| entry.attributes.public_ip == attributes.public_ip);
        if let Some((subnet, entry)) = ours {
            if network.allows(*subnet) {
                tracing::info!(%subnet, "taking up the lease that this node already has");
                return Ok(self.claim(*subnet, attributes, Some(entry)).await?.then_some(*subnet));
            }
            tracing::info!(%subnet, "giving up a lease that no longer fits the network configuration");
            self.release(*subnet, entry).await?;
        }
        let taken: Vec<Ipv4Net> = listing.entries.iter().map(|(subnet, _)| *subnet).collect();
        let subnet = choose(network, self.previous, &taken).ok_or(SubnetError::OutOfSubnets(network.network))?;
        Ok(self.claim(subnet, attributes, None).await?.then_some(subnet))
    }

    /// Writes our lease if the key still is what was read (`None`: absent). False when it is not.
    async fn claim(
        &self,
        subnet: Ipv4Net,
        attributes: &LeaseAttributes,
        seen: Option<&Entry>,
    ) -> Result<bool, SubnetError> {
        let key = self.key(subnet);
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

    async fn release(&self, subnet: Ipv4Net, entry: &Entry) -> Result<(), SubnetError> {
        let key = self.key(subnet);
        let unchanged = Compare::mod_revision(key.clone(), CompareOp::Equal, entry.mod_revision);
        let transaction = Txn::new().when([unchanged]).and_then([TxnOp::delete(key, None)]);
        let mut kv = self.client.kv_client();
        bounded("give up a lease", kv.txn(transaction)).await.map(|_| ())
    }

    /// Extends our lease, or takes the subnet again if the key is gone. False when it must be tried again soon.
    async fn renew(&self, lease: &Lease) -> Result<bool, SubnetError> {
        let mut kv = self.client.kv_client();
        let response = bounded("read the own lease", kv.get(self.key(lease.subnet), None)).await?;
        let seen = response.kvs().first().and_then(|kv| {
            let attributes = decode(lease.subnet, kv.value())?;
            Some(Entry { attributes, mod_revision: kv.mod_revision(), reserved: kv.lease() == 0 })
        });
        match &seen {
            Some(entry) if entry.attributes.public_ip != lease.attributes.public_ip => {
                Err(SubnetError::Lost { subnet: lease.subnet, owner: entry.attributes.public_ip })
            }
            seen => self.claim(lease.subnet, &lease.attributes, seen.as_ref()).await,
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
        let set = listing.entries.into_iter().map(|(subnet, entry)| (subnet, entry.attributes)).collect();
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
                let Some((kv, subnet)) = event.kv().and_then(|kv| Some((kv, subnet_of(kv.key())?))) else { continue };
                match event.event_type() {
                    EventType::Delete => {
                        set.remove(&subnet);
                    }
                    EventType::Put => {
                        if let Some(attributes) = decode(subnet, kv.value()) {
                            set.insert(subnet, attributes);
                        }
                    }
                }
            }
            publish(leases, set);
        }
    }
}

#[async_trait]
impl SubnetManager for EtcdSubnetManager {
    async fn network(&self) -> Result<NetworkConfig, SubnetError> {
        let key = format!("{}/config", self.prefix);
        let mut kv = self.client.kv_client();
        let response = bounded("read the network configuration", kv.get(key.clone(), None)).await?;
        let value = response.kvs().first().ok_or(SubnetError::NoNetworkConfig { key })?;
        Ok(NetworkConfig::parse(&String::from_utf8_lossy(value.value()))?)
    }

    async fn stored_public_ip(&self) -> Result<Option<Ipv4Addr>, SubnetError> {
        Ok(None)
    }

    async fn stored_mac(&self, public_ip: Ipv4Addr) -> Result<Option<Mac>, SubnetError> {
        let listing = self.list().await?;
        let ours = listing.entries.into_iter().find(|(_, entry)| entry.attributes.public_ip == public_ip);
        Ok(ours.and_then(|(_, entry)| entry.attributes.vxlan_data()).map(|data| data.vtep_mac))
    }

    async fn acquire(&self, network: &NetworkConfig, attributes: &LeaseAttributes) -> Result<Lease, SubnetError> {
        for _ in 0..RACE_LIMIT {
            if let Some(subnet) = self.try_acquire(network, attributes).await? {
                return Ok(Lease { subnet, attributes: attributes.clone() });
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
                    let present = known.as_ref().is_none_or(|set| set.get(&lease.subnet).is_some_and(|a| a.public_ip == lease.attributes.public_ip));
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

/// The previous subnet if it is free, or else one of the first free ones at random.
fn choose(network: &NetworkConfig, previous: Option<Ipv4Net>, taken: &[Ipv4Net]) -> Option<Ipv4Net> {
    let free = |subnet: &Ipv4Net| !taken.iter().any(|other| other.contains(subnet) || subnet.contains(other));
    let reuse = previous.filter(|subnet| network.allows(*subnet) && free(subnet));
    reuse.or_else(|| {
        let candidates: Vec<Ipv4Net> = network.subnets().filter(free).take(CANDIDATES).collect();
        candidates.choose(&mut rand::rng()).copied()
    })
}

fn publish(leases: &watch::Sender<Option<LeaseSet>>, set: LeaseSet) {
    leases.send_if_modified(|current| {
        let changed = current.as_ref() != Some(&set);
        if changed {
            *current = Some(set);
        }
        changed
    });
}

fn subnet_of(key: &[u8]) -> Option<Ipv4Net> {
    parse_subnet_key(std::str::from_utf8(key).ok()?.rsplit('/').next()?)
}

fn decode(subnet: Ipv4Net, value: &[u8]) -> Option<LeaseAttributes> {
    match serde_json::from_slice(value) {
        Ok(attributes) => Some(attributes),
        Err(error) => {
            tracing::warn!(%subnet, %error, "ignoring a lease that cannot be read");
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

    fn nets(list: &[&str]) -> Vec<Ipv4Net> {
        list.iter().map(|net| net.parse().unwrap()).collect()
    }

    #[test]
    fn the_previous_subnet_is_taken_when_it_is_free_and_fits() {
        let previous = "10.244.2.0/24".parse().ok();
        assert_eq!(choose(&network(), previous, &nets(&["10.244.1.0/24"])), previous);
        assert_eq!(
            choose(&network(), previous, &nets(&["10.244.1.0/24", "10.244.2.0/24"])),
            "10.244.3.0/24".parse().ok()
        );
        assert_eq!(
            choose(&network(), "10.9.2.0/24".parse().ok(), &nets(&["10.244.2.0/23"])),
            "10.244.1.0/24".parse().ok()
        );
    }

    #[test]
    fn a_full_network_has_none() {
        assert_eq!(choose(&network(), None, &nets(&["10.244.1.0/24", "10.244.2.0/24", "10.244.3.0/24"])), None);
    }

    #[test]
    fn keys_under_any_prefix() {
        assert_eq!(subnet_of(b"/coreos.com/network/subnets/10.244.1.0-24"), "10.244.1.0/24".parse().ok());
        assert_eq!(subnet_of(b"/coreos.com/network/subnets/what"), None);
    }
}
