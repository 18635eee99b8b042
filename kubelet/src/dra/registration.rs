//! Drivers of dynamic resources that have registered on this node. What a driver that has gone offered on this node is
//! taken out of the cluster, so that no pod is sent here for it.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use k8s_openapi::api::resource::v1::ResourceSlice;
use kube::api::{DeleteParams, ListParams};
use kube::{Api, Client};
use parking_lot::RwLock;

use super::api::{Driver, Version};
use crate::objects::api_error;
use crate::plugins::{Handler, Plugin, Refusal};

/// How long a driver may be away before what it offered is taken out.
const GRACE: Duration = Duration::from_secs(30);
const RETRY: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(300);

#[derive(Clone)]
struct Registered {
    endpoint: PathBuf,
    driver: Driver,
}

/// By name; of several instances of a driver, as during an update, the newest is last.
#[derive(Default)]
pub struct Drivers {
    known: RwLock<HashMap<String, Vec<Registered>>>,
}

impl Drivers {
    /// The newest instance.
    pub fn get(&self, name: &str) -> Option<Driver> {
        self.known.read().get(name)?.last().map(|registered| registered.driver.clone())
    }

    fn insert(&self, plugin: &Plugin) -> Result<(), Refusal> {
        let driver = Driver::at(&plugin.endpoint, best(plugin)?);
        let mut known = self.known.write();
        let instances = known.entry(plugin.name.clone()).or_default();
        if instances.iter().any(|registered| registered.endpoint == plugin.endpoint) {
            let (endpoint, name) = (plugin.endpoint.display(), &plugin.name);
            return Err(Refusal(format!("endpoint {endpoint} already registered for DRA driver plugin {name}")));
        }
        instances.push(Registered { endpoint: plugin.endpoint.clone(), driver });
        Ok(())
    }

    fn remove(&self, plugin: &Plugin) {
        let mut known = self.known.write();
        if let Some(instances) = known.get_mut(&plugin.name) {
            instances.retain(|registered| registered.endpoint != plugin.endpoint);
        }
        known.retain(|_, instances| !instances.is_empty());
    }
}

fn best(plugin: &Plugin) -> Result<Version, Refusal> {
    let offered = |name: &str| plugin.versions.iter().any(|version| version == name);
    let known = Version::KNOWN.iter().find(|(name, _)| offered(name)).map(|(_, version)| *version);
    known.ok_or_else(|| {
        let (name, endpoint, versions) = (&plugin.name, plugin.endpoint.display(), &plugin.versions);
        Refusal(format!(
            "invalid supported gRPC versions of DRA driver plugin {name} at endpoint {endpoint}: none of services \
             supported by the plugin ({versions:?}) are supported by the kubelet"
        ))
    })
}

pub struct Registration {
    pub drivers: Arc<Drivers>,
    pub client: Client,
    pub node: String,
}

#[async_trait]
impl Handler for Registration {
    fn validate(&self, plugin: &Plugin) -> Result<(), Refusal> {
        best(plugin).map(drop)
    }

    async fn register(&self, plugin: &Plugin) -> Result<(), Refusal> {
        self.drivers.insert(plugin)
    }

    async fn deregister(&self, plugin: &Plugin) {
        self.drivers.remove(plugin);
        let (drivers, name) = (self.drivers.clone(), plugin.name.clone());
        let (client, node) = (self.client.clone(), self.node.clone());
        tokio::spawn(async move {
            tokio::time::sleep(GRACE).await;
            if drivers.get(&name).is_none() {
                wipe(client, &format!("spec.nodeName={node},spec.driver={name}"), || drivers.get(&name).is_some())
                    .await;
            }
        });
    }
}

/// No driver has registered yet: nothing is offered on this node.
pub async fn wipe_all(client: Client, node: String) {
    wipe(client, &format!("spec.nodeName={node}"), || false).await;
}

/// Tries until it is done, or needless.
async fn wipe(client: Client, selector: &str, is_needless: impl Fn() -> bool) {
    let slices = Api::<ResourceSlice>::all(client);
    let mut pause = RETRY;
    while !is_needless() {
        let list = ListParams::default().fields(selector);
        match slices.delete_collection(&DeleteParams::default(), &list).await {
            Ok(_) => return,
            Err(kube::Error::Api(status)) if status.code == 404 => return,
            Err(error) => {
                tracing::debug!(selector, error = api_error(&error), "cannot delete resource slices, trying again");
            }
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(RETRY_MAX);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plugin(endpoint: &str, versions: &[&str]) -> Plugin {
        let versions = versions.iter().map(|version| (*version).to_owned()).collect();
        Plugin { name: "d".into(), endpoint: endpoint.into(), versions }
    }

    #[test]
    fn the_best_version_is_spoken() {
        for (versions, want) in [
            (&["v1beta1.DRAPlugin", "v1.DRAPlugin"][..], Some(Version::V1)),
            (&["v1beta1.DRAPlugin"], Some(Version::V1beta1)),
            (&["1.0.0", "v2.DRAPlugin"], None),
            (&[], None),
        ] {
            assert_eq!(best(&plugin("/a", versions)).ok(), want, "{versions:?}");
        }
    }

    #[tokio::test]
    async fn an_update_overlaps() {
        let drivers = Drivers::default();
        let (old, new) = (plugin("/old", &["v1.DRAPlugin"]), plugin("/new", &["v1.DRAPlugin"]));
        drivers.insert(&old).unwrap();
        assert!(drivers.insert(&old).unwrap_err().0.contains("already registered"));
        drivers.insert(&new).unwrap();
        drivers.remove(&old);
        assert!(drivers.get("d").is_some());
        drivers.remove(&new);
        assert!(drivers.get("d").is_none());
    }
}
