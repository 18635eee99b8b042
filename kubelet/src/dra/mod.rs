//! Resource claims of pods: drivers prepare the devices of a claim before the pod's sandbox is made, the containers get
//! them by their CDI names, and drivers take them back when no pod uses the claim any more.
//!
//! What is prepared is in the [`ledger`]; which claims a pod may use is decided purely, in [`request`].

mod api;
mod ledger;
mod registration;
mod request;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Container, Pod};
use k8s_openapi::api::resource::v1::ResourceClaim;
use kube::{Api, Client};
use parking_lot::Mutex;

pub use ledger::{Device, LedgerError};
pub use registration::{Drivers, Registration, wipe_all};
pub use request::ClaimError;

use crate::grpc::CallError;
use crate::locks::Locks;
use crate::objects::api_error;
use crate::pod::runtime_uid;
use ledger::{Claim, Given, Key, Ledger};
use request::Reference;

/// Why the claims of a pod could not be prepared or given back.
#[derive(Debug, thiserror::Error)]
pub enum DraError {
    #[error(transparent)]
    Claim(#[from] ClaimError),
    #[error("fetch ResourceClaim {name}: {}", api_error(.source))]
    Fetch { name: String, source: Box<kube::Error> },
    #[error("DRA driver {0} is not registered")]
    NoDriver(String),
    #[error(
        "old ResourceClaim with same name {name} and different UID {uid} still exists (previous pod force-deleted?!)"
    )]
    OldClaim { name: String, uid: String },
    #[error("{call}: {source}")]
    Call { call: &'static str, source: CallError },
    #[error("{call} failed for ResourceClaim {name}: {why}")]
    Failed { call: &'static str, name: String, why: String },
    #[error("{call} skipped ResourceClaim {name}")]
    Skipped { call: &'static str, name: String },
    #[error("internal error: unable to get claim info for ResourceClaim {name} in namespace {namespace}")]
    NotPrepared { namespace: String, name: String },
    #[error(transparent)]
    Ledger(#[from] LedgerError),
}

const PREPARE: &str = "NodePrepareResources";
const UNPREPARE: &str = "NodeUnprepareResources";

/// A device of a claim that a container uses, for those who ask what containers have.
#[derive(Clone, Debug, PartialEq)]
pub struct InUse {
    pub claim: String,
    pub namespace: String,
    pub devices: Vec<(String, Device)>,
}

pub struct Claims {
    client: Client,
    path: PathBuf,
    ledger: Mutex<Ledger>,
    /// Whoever prepares or gives back a claim has it to himself.
    locks: Locks<Key>,
    pub drivers: Arc<Drivers>,
}

impl Claims {
    /// `path` is that of the checkpoint. One that cannot be used is named in the log.
    pub fn open(client: Client, path: PathBuf, drivers: Arc<Drivers>) -> Self {
        let ledger = ledger::load(&path).unwrap_or_else(|error| {
            let error = apimachinery::process::error_chain(&error);
            tracing::error!(error, "what drivers have prepared for earlier pods is not known");
            Ledger::new()
        });
        Self { client, path, ledger: Mutex::new(ledger), locks: Locks::default(), drivers }
    }

    fn save(&self) -> Result<(), LedgerError> {
        ledger::save(&self.path, &self.ledger.lock())
    }

    /// Has drivers prepare all claims of the pod. Nothing is noted for a pod that may not use one of them.
    pub async fn prepare(&self, pod: &Pod) -> Result<(), DraError> {
        let references = request::references(pod)?;
        if references.is_empty() {
            return Ok(());
        }
        let mut wanted: BTreeMap<Key, Claim> = BTreeMap::new();
        for reference in &references {
            let claim = self.resolve(pod, reference).await?;
            for driver in claim.drivers.keys() {
                self.drivers.get(driver).ok_or_else(|| DraError::NoDriver(driver.clone()))?;
            }
            wanted.insert((claim.namespace.clone(), claim.name.clone()), claim);
        }
        // In the order of their keys, as everybody takes them.
        let mut turns = Vec::new();
        for key in wanted.keys() {
            turns.push(self.locks.lock(key).await);
        }
        let unprepared = self.note_user(runtime_uid(pod), wanted)?;
        self.save()?;
        for (driver, claims) in by_driver(&unprepared) {
            let given = self.prepare_with(&driver, &claims).await?;
            let mut ledger = self.ledger.lock();
            for (key, given) in given {
                if let Some(claim) = ledger.get_mut(&key) {
                    claim.drivers.insert(driver.clone(), given);
                }
            }
        }
        {
            let mut ledger = self.ledger.lock();
            for claim in &unprepared {
                if let Some(claim) = ledger.get_mut(&key_of(claim)) {
                    claim.is_prepared = true;
                }
            }
        }
        Ok(self.save()?)
    }

    async fn resolve(&self, pod: &Pod, reference: &Reference) -> Result<Claim, DraError> {
        let namespace = pod.metadata.namespace.clone().unwrap_or_default();
        let api = Api::<ResourceClaim>::namespaced(self.client.clone(), &namespace);
        let fetched = api.get(&reference.name).await;
        let claim =
            fetched.map_err(|error| DraError::Fetch { name: reference.name.clone(), source: Box::new(error) })?;
        let drivers = request::check(pod, reference, &claim)?;
        Ok(Claim {
            uid: claim.metadata.uid.unwrap_or_default(),
            name: reference.name.clone(),
            namespace,
            drivers: drivers.into_iter().map(|driver| (driver, Given::default())).collect(),
            ..Claim::default()
        })
    }

    /// Notes that the pod uses the claims; returns those that are not prepared yet.
    fn note_user(&self, pod_uid: &str, wanted: BTreeMap<Key, Claim>) -> Result<Vec<Claim>, DraError> {
        let mut ledger = self.ledger.lock();
        for (key, claim) in &wanted {
            if let Some(known) = ledger.get(key).filter(|known| known.uid != claim.uid) {
                return Err(DraError::OldClaim { name: known.name.clone(), uid: known.uid.clone() });
            }
        }
        let mut unprepared = Vec::new();
        for (key, claim) in wanted {
            let known = ledger.entry(key).or_insert(claim);
            known.pods.insert(pod_uid.to_owned());
            if !known.is_prepared {
                unprepared.push(known.clone());
            }
        }
        Ok(unprepared)
    }

    async fn prepare_with(&self, name: &str, claims: &[&Claim]) -> Result<Vec<(Key, Given)>, DraError> {
        let driver = self.drivers.get(name).ok_or_else(|| DraError::NoDriver(name.to_owned()))?;
        let answer = driver.prepare(claims.iter().map(|claim| asked(claim)).collect()).await;
        let mut answer = answer.map_err(|source| DraError::Call { call: PREPARE, source })?.claims;
        let mut given = Vec::new();
        for claim in claims {
            let name = || claim.name.clone();
            let prepared =
                answer.remove(&claim.uid).ok_or_else(|| DraError::Skipped { call: PREPARE, name: name() })?;
            if !prepared.error.is_empty() {
                return Err(DraError::Failed { call: PREPARE, name: name(), why: prepared.error });
            }
            let devices = prepared.devices.into_iter().map(|device| Device {
                pool_name: device.pool_name,
                device_name: device.device_name,
                share_id: device.share_id,
                request_names: Some(device.request_names),
                cdi_ids: Some(device.cdi_device_ids),
            });
            given.push((key_of(claim), Given { devices: Some(devices.collect()) }));
        }
        Ok(given)
    }

    /// The CDI devices that the container is started with.
    pub fn cdi_devices(&self, pod: &Pod, container: &Container) -> Result<Vec<String>, DraError> {
        let namespace = pod.metadata.namespace.clone().unwrap_or_default();
        let ledger = self.ledger.lock();
        let mut devices = Vec::new();
        for (name, request) in request::of_container(pod, container)? {
            let key = (namespace.clone(), name);
            let Some(claim) = ledger.get(&key) else {
                let (namespace, name) = key;
                return Err(DraError::NotPrepared { namespace, name });
            };
            devices.extend(claim.cdi_devices(&request));
        }
        Ok(devices)
    }

    /// Claims that the container uses, with all their devices and the drivers of these.
    pub fn in_use(&self, pod: &Pod, container: &Container) -> Vec<InUse> {
        let namespace = pod.metadata.namespace.clone().unwrap_or_default();
        let names: BTreeSet<String> =
            request::of_container(pod, container).unwrap_or_default().into_iter().map(|(name, _)| name).collect();
        let ledger = self.ledger.lock();
        let claims = names.into_iter().filter_map(|name| ledger.get(&(namespace.clone(), name)));
        claims
            .map(|claim| {
                let devices = claim.drivers.iter().flat_map(|(driver, given)| {
                    given.devices.iter().flatten().map(|device| (driver.clone(), device.clone()))
                });
                InUse { claim: claim.name.clone(), namespace: claim.namespace.clone(), devices: devices.collect() }
            })
            .collect()
    }

    /// The pod does not use its claims any more; drivers take back those that nobody uses.
    pub async fn release(&self, pod_uid: &str) -> Result<(), DraError> {
        let keys: Vec<Key> = {
            let ledger = self.ledger.lock();
            let used = ledger.iter().filter(|(_, claim)| claim.pods.contains(pod_uid));
            used.map(|(key, _)| key.clone()).collect()
        };
        for key in keys {
            let _turn = self.locks.lock(&key).await;
            let Some(claim) = self.ledger.lock().get(&key).cloned() else { continue };
            if claim.pods.iter().all(|uid| uid == pod_uid) {
                self.unprepare(&claim).await?;
                self.ledger.lock().remove(&key);
            } else if let Some(claim) = self.ledger.lock().get_mut(&key) {
                claim.pods.remove(pod_uid);
            }
            self.save()?;
        }
        Ok(())
    }

    /// Pods that some claim names as its users.
    pub fn users(&self) -> BTreeSet<String> {
        self.ledger.lock().values().flat_map(|claim| claim.pods.clone()).collect()
    }

    async fn unprepare(&self, claim: &Claim) -> Result<(), DraError> {
        for name in claim.drivers.keys() {
            let driver = self.drivers.get(name).ok_or_else(|| DraError::NoDriver(name.clone()))?;
            let answer = driver.unprepare(vec![asked(claim)]).await;
            let mut answer = answer.map_err(|source| DraError::Call { call: UNPREPARE, source })?.claims;
            let name = || claim.name.clone();
            match answer.remove(&claim.uid) {
                None => return Err(DraError::Skipped { call: UNPREPARE, name: name() }),
                Some(result) if result.error.is_empty() => {}
                Some(result) => return Err(DraError::Failed { call: UNPREPARE, name: name(), why: result.error }),
            }
        }
        Ok(())
    }
}

fn key_of(claim: &Claim) -> Key {
    (claim.namespace.clone(), claim.name.clone())
}

fn asked(claim: &Claim) -> api::Claim {
    api::Claim { namespace: claim.namespace.clone(), uid: claim.uid.clone(), name: claim.name.clone() }
}

fn by_driver(claims: &[Claim]) -> HashMap<String, Vec<&Claim>> {
    let mut batches: HashMap<String, Vec<&Claim>> = HashMap::new();
    for claim in claims {
        for driver in claim.drivers.keys() {
            batches.entry(driver.clone()).or_default().push(claim);
        }
    }
    batches
}

#[cfg(test)]
mod tests;
