//! Devices of this node that plugins look after: which there are, and which container has which.
//!
//! The [`inventory`] knows and decides, purely. Around it: one actor for each plugin, which follows its list of
//! devices; the allocation of a pod's devices, before its sandbox is made; and what its containers are started with.
//! Whose the devices are is written down ([`checkpoint`]), because neither the runtime nor the plugin could say it
//! later.

mod api;
mod checkpoint;
mod inventory;
mod options;
mod registration;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use apimachinery::meta::Quantity;
use apimachinery::process::CancellationToken;
use futures::StreamExt;
use k8s_openapi::api::core::v1::{Container, Pod};
use parking_lot::Mutex;
use tokio::sync::watch;

pub use checkpoint::CheckpointError;
pub use inventory::{Ids, NO_NODE, Shortage};
pub use options::DeviceOptions;
pub use registration::{Registration, serve};

use crate::grpc::CallError;
use crate::node::status::Offered;
use crate::pod::plan::is_sidecar;
use crate::pod::runtime_uid;
use api::{Client, ContainerPreferredRequest};
use inventory::{Endpoint, Inventory, Owner};

/// How long a plugin may be away before its devices are no longer the node's.
const GRACE: Duration = Duration::from_secs(300);

/// Why a pod does not get its devices.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    #[error(transparent)]
    Shortage(#[from] Shortage),
    #[error("unknown Device Plugin {0}")]
    NoPlugin(String),
    #[error(transparent)]
    Call(#[from] CallError),
    #[error("no containers return in allocation response of {0}")]
    NoAnswer(String),
    #[error("device plugin PreStartContainer rpc failed with err: {0}")]
    PreStart(#[source] CallError),
    #[error("no devices found allocated in local cache for pod {pod}, container {container}, resource {resource}")]
    NotAllocated { pod: String, container: String, resource: String },
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error("cannot write the checkpoint of devices")]
    Render(#[from] serde_json::Error),
}

/// Ids of devices by NUMA node.
pub type ByNode = Vec<(i64, Vec<String>)>;

pub struct Devices {
    directory: PathBuf,
    inventory: Mutex<Inventory>,
    offered: watch::Sender<Offered>,
    /// One pod at a time: between choosing devices and giving them, plugins are asked.
    turn: tokio::sync::Mutex<()>,
    registrations: AtomicU64,
}

/// Devices of plugins that a container asks for. They are never overcommitted, so that limits say it all.
fn limits(spec: &Container) -> impl Iterator<Item = (&str, usize)> {
    let limits = spec.resources.iter().flat_map(|resources| resources.limits.iter().flatten());
    limits.filter(|(name, _)| name.contains('/')).filter_map(|(name, quantity)| {
        let amount = quantity.0.parse::<Quantity>().ok()?.value();
        Some((name.as_str(), usize::try_from(amount).ok().filter(|amount| *amount > 0)?))
    })
}

impl Devices {
    /// `directory` is that of the plugins' sockets (`device-plugins`). What an earlier process has given stays given; a
    /// checkpoint that cannot be used is named in the log.
    pub fn open(directory: PathBuf) -> Arc<Self> {
        let mut inventory = Inventory::default();
        if let Err(error) = checkpoint::load(&directory, &mut inventory) {
            let error = apimachinery::process::error_chain(&error);
            tracing::error!(error, "devices may be given twice: what was given before is not known");
            inventory = Inventory::default();
        }
        let offered = watch::Sender::new(inventory.offered());
        let expected: Vec<String> = inventory.registered().into_keys().collect();
        let devices = Arc::new(Self {
            directory,
            inventory: Mutex::new(inventory),
            offered,
            turn: tokio::sync::Mutex::default(),
            registrations: AtomicU64::default(),
        });
        for resource in expected {
            devices.clone().expire_later(resource);
        }
        devices
    }

    /// What the node's status has to say, and a wake-up when that changes.
    pub fn offered(&self) -> watch::Receiver<Offered> {
        self.offered.subscribe()
    }

    /// Devices by NUMA node ([`NO_NODE`] for none) of one container, by resource.
    pub fn of_container(&self, pod_uid: &str, container: &str) -> Vec<(String, ByNode)> {
        let owner = (pod_uid.to_owned(), container.to_owned());
        let inventory = self.inventory.lock();
        let shares = inventory.shares(&owner).into_iter().flatten();
        shares.map(|(name, share)| (name.clone(), share.devices.clone().into_iter().collect())).collect()
    }

    /// All devices that can be used, with their NUMA nodes.
    pub fn usable(&self) -> Vec<(String, String, Vec<i64>)> {
        let inventory = self.inventory.lock();
        inventory.usable().map(|(name, id, nodes)| (name.to_owned(), id.to_owned(), nodes.to_vec())).collect()
    }

    /// Gives each container of the pod the devices that it asks for; those that have theirs keep them.
    pub async fn allocate(&self, pod: &Pod) -> Result<(), DeviceError> {
        let Some(spec) = &pod.spec else { return Ok(()) };
        let init = spec.init_containers.iter().flatten().map(|spec| (spec, !is_sidecar(spec)));
        let apps = spec.containers.iter().map(|spec| (spec, false));
        let containers: Vec<_> = init.chain(apps).filter(|(spec, _)| limits(spec).next().is_some()).collect();
        if containers.is_empty() {
            return Ok(());
        }
        let _turn = self.turn.lock().await;
        // What init containers leave to those that run after them.
        let mut reusable: BTreeMap<&str, Ids> = BTreeMap::new();
        for (spec, ends) in containers {
            let owner = (runtime_uid(pod).to_owned(), spec.name.clone());
            for (resource, needed) in limits(spec) {
                let left = reusable.entry(resource).or_default();
                let Some(given) = self.allocate_one(&owner, resource, needed, left).await? else { continue };
                match ends {
                    true => left.extend(given),
                    false => left.retain(|id| !given.contains(id)),
                }
            }
        }
        Ok(())
    }

    /// The devices that the container has now; `None` when the resource is not one of devices.
    async fn allocate_one(
        &self,
        owner: &Owner,
        resource: &str,
        needed: usize,
        reusable: &Ids,
    ) -> Result<Option<Ids>, DeviceError> {
        let (choice, endpoint) = {
            let inventory = self.inventory.lock();
            if !inventory.knows(resource) {
                return Ok(None);
            }
            let Some(choice) = inventory.choose(owner, resource, needed, reusable)? else {
                return Ok(inventory.shares(owner).and_then(|shares| shares.get(resource)).map(|share| share.ids()));
            };
            (choice, inventory.endpoint(resource))
        };
        let endpoint = endpoint.ok_or_else(|| DeviceError::NoPlugin(resource.to_owned()))?;
        let preferred = match endpoint.options.get_preferred_allocation_available && !choice.is_done() {
            true => {
                let available = choice.free.union(&choice.certain).cloned().collect();
                let must_include = choice.certain.iter().cloned().collect();
                let size = i32::try_from(needed).unwrap_or(i32::MAX);
                endpoint.client.preferred(ContainerPreferredRequest { available, must_include, size }).await?
            }
            false => Vec::new(),
        };
        let ids = choice.pick(&preferred);
        let response = endpoint.client.allocate(ids.iter().cloned().collect()).await?;
        let response = response.ok_or_else(|| DeviceError::NoAnswer(resource.to_owned()))?;
        let content = {
            let mut inventory = self.inventory.lock();
            inventory.give(owner, resource, &ids, response);
            checkpoint::render(&inventory)?
        };
        checkpoint::save(&self.directory, &content)?;
        Ok(Some(ids))
    }

    /// What the container is started with; plugins that want to are told that it starts.
    pub async fn start(&self, pod: &Pod, spec: &Container) -> Result<DeviceOptions, DeviceError> {
        let owner = (runtime_uid(pod).to_owned(), spec.name.clone());
        for (resource, _) in limits(spec) {
            let (endpoint, share) = {
                let inventory = self.inventory.lock();
                if !inventory.knows(resource) {
                    continue;
                }
                let shares = inventory.shares(&owner);
                (inventory.endpoint(resource), shares.and_then(|shares| shares.get(resource)).map(|share| share.ids()))
            };
            let share = share.ok_or_else(|| {
                let (pod, container) = owner.clone();
                DeviceError::NotAllocated { pod, container, resource: resource.to_owned() }
            })?;
            let endpoint = endpoint.ok_or_else(|| DeviceError::NoPlugin(resource.to_owned()))?;
            if endpoint.options.pre_start_required {
                let ids = share.into_iter().collect();
                endpoint.client.pre_start(ids).await.map_err(DeviceError::PreStart)?;
            }
        }
        Ok(self.inventory.lock().shares(&owner).map(options::options).unwrap_or_default())
    }

    /// The pod does not need its devices any more.
    pub fn release(&self, pod_uid: &str) {
        self.retain_pods(|uid| uid != pod_uid);
    }

    /// Only these pods are left on the node.
    pub fn retain_pods(&self, keep: impl Fn(&str) -> bool) {
        let changed = self.inventory.lock().retain_pods(keep);
        if changed {
            self.save();
        }
    }

    /// For changes that may be lost: what is free is found out again.
    fn save(&self) {
        let content = checkpoint::render(&self.inventory.lock());
        let saved = content
            .map_err(DeviceError::from)
            .and_then(|content| checkpoint::save(&self.directory, &content).map_err(DeviceError::from));
        if let Err(error) = saved {
            tracing::warn!(error = apimachinery::process::error_chain(&error), "cannot write down whose devices are");
        }
    }

    fn publish(&self) {
        let offered = self.inventory.lock().offered();
        self.offered.send_if_modified(|known| {
            let changed = *known != offered;
            *known = offered;
            changed
        });
    }

    /// Follows a plugin's devices until the plugin ends.
    async fn follow(&self, resource: &str, client: &Client, options: api::Options) -> Result<(), CallError> {
        let mut lists = client.list_and_watch().await?;
        let number = self.registrations.fetch_add(1, Ordering::Relaxed);
        self.inventory.lock().connect(resource, Endpoint { number, client: client.clone(), options });
        let _connected = Connected { devices: self, resource, number };
        while let Some(list) = lists.next().await {
            let devices = list?.devices;
            tracing::info!(resource, devices = devices.len(), "a device plugin has told its devices");
            self.inventory.lock().update(resource, devices);
            self.publish();
            self.save();
        }
        Ok(())
    }

    /// Takes a plugin up: one actor from now on until its connection ends.
    fn connect(self: Arc<Self>, resource: String, client: Client, options: api::Options) {
        self.connect_until(resource, client, options, CancellationToken::new());
    }

    fn connect_until(
        self: Arc<Self>,
        resource: String,
        client: Client,
        options: api::Options,
        gone: CancellationToken,
    ) {
        tokio::spawn(async move {
            match gone.run_until_cancelled(self.follow(&resource, &client, options)).await {
                Some(Err(error)) => tracing::info!(resource, %error, "a device plugin is not connected any more"),
                Some(Ok(())) | None => tracing::info!(resource, "a device plugin has ended"),
            }
            self.expire_later(resource);
        });
    }

    fn expire_later(self: Arc<Self>, resource: String) {
        let registrations = self.inventory.lock().registrations(&resource);
        tokio::spawn(async move {
            tokio::time::sleep(GRACE).await;
            self.inventory.lock().expire(&resource, registrations);
            self.publish();
            self.save();
        });
    }
}

/// A plugin that is connected as long as this lives.
struct Connected<'a> {
    devices: &'a Devices,
    resource: &'a str,
    number: u64,
}

impl Drop for Connected<'_> {
    fn drop(&mut self) {
        if self.devices.inventory.lock().disconnect(self.resource, self.number) {
            self.devices.publish();
        }
    }
}

#[cfg(test)]
mod tests;
