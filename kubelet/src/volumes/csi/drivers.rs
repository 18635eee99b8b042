//! The CSI drivers that have registered on this node, and their registration.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use parking_lot::RwLock;
use tokio::sync::Notify;

use super::api::Driver;
use super::node_info::NodeInfo;
use crate::plugins::{Handler, Plugin, Refusal};

/// A driver's version, as far as it can be compared.
type Version = Vec<u64>;

struct Registered {
    endpoint: PathBuf,
    version: Version,
}

/// By name.
#[derive(Default)]
pub struct Drivers {
    known: RwLock<HashMap<String, Registered>>,
    /// Another driver is there: what waited for it can go on.
    pub came: Notify,
}

impl Drivers {
    pub fn get(&self, name: &str) -> Option<Driver> {
        self.known.read().get(name).map(|registered| Driver::at(&registered.endpoint))
    }

    fn check(&self, plugin: &Plugin) -> Result<Version, Refusal> {
        let newest = highest(&plugin.versions).map_err(|why| {
            let (name, versions) = (&plugin.name, plugin.versions.join(" "));
            Refusal(format!("CSI driver {name:?}: none of the versions [{versions}] is supported: {why}"))
        })?;
        match self.known.read().get(&plugin.name) {
            Some(known) if known.version >= newest => Err(Refusal(format!(
                "CSI driver {:?}: another driver with the same name is already registered with a version as high: {}",
                plugin.name,
                known.version.iter().map(u64::to_string).collect::<Vec<_>>().join(".")
            ))),
            _ => Ok(newest),
        }
    }

    pub fn insert(&self, plugin: &Plugin) -> Result<Driver, Refusal> {
        let version = self.check(plugin)?;
        let driver = Driver::at(&plugin.endpoint);
        self.known.write().insert(plugin.name.clone(), Registered { endpoint: plugin.endpoint.clone(), version });
        Ok(driver)
    }

    fn remove(&self, plugin: &Plugin) {
        let mut known = self.known.write();
        // Another of the same name may have taken its place.
        if known.get(&plugin.name).is_some_and(|registered| registered.endpoint == plugin.endpoint) {
            known.remove(&plugin.name);
        }
    }
}

/// The highest of the versions, all of the series 1; drivers of series 0 are too old, those of later ones unknown.
fn highest(versions: &[String]) -> Result<Version, String> {
    let parse = |text: &String| -> Option<Version> {
        let numbers: Option<Version> =
            text.trim_start_matches('v').split('.').map(|part| part.parse::<u64>().ok()).collect();
        numbers.filter(|numbers| numbers.len() >= 2)
    };
    let known: Vec<Version> = versions.iter().filter_map(parse).collect();
    match known.into_iter().filter(|version| version[0] <= 1).max() {
        None => Err("no known version among them".to_owned()),
        Some(version) if version[0] == 0 => Err("the highest must be v1.x".to_owned()),
        Some(version) => Ok(version),
    }
}

/// Takes drivers up: learns what the driver calls this node and shows that in the node's objects.
pub struct Registration {
    pub drivers: Arc<Drivers>,
    pub node_info: NodeInfo,
}

#[async_trait]
impl Handler for Registration {
    fn validate(&self, plugin: &Plugin) -> Result<(), Refusal> {
        self.drivers.check(plugin).map(drop)
    }

    async fn register(&self, plugin: &Plugin) -> Result<(), Refusal> {
        let driver = self.drivers.insert(plugin)?;
        let installed = async {
            let info = driver.info().await.map_err(|error| Refusal(error.to_string()))?;
            let installed = self.node_info.install(&plugin.name, &info).await;
            installed.map_err(|error| Refusal(apimachinery::process::error_chain(&error)))
        };
        if let Err(refusal) = installed.await {
            self.deregister(plugin).await;
            return Err(refusal);
        }
        self.drivers.came.notify_waiters();
        Ok(())
    }

    async fn deregister(&self, plugin: &Plugin) {
        self.drivers.remove(plugin);
        if let Err(error) = self.node_info.uninstall(&plugin.name).await {
            let error = apimachinery::process::error_chain(&error);
            tracing::warn!(driver = plugin.name, error, "cannot take a CSI driver out of the node's objects");
        }
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
    fn versions_of_the_first_series() {
        for (versions, want) in [
            (&["1.0.0"][..], Some(vec![1, 0, 0])),
            (&["v1.1.0", "1.2.0", "2.0.0"], Some(vec![1, 2, 0])),
            (&["0.3.0"], None),
            (&["2.0.0"], None),
            (&["new"], None),
            (&[], None),
        ] {
            let versions: Vec<String> = versions.iter().map(|version| (*version).to_owned()).collect();
            assert_eq!(highest(&versions).ok(), want, "{versions:?}");
        }
    }

    #[tokio::test]
    async fn one_driver_of_a_name() {
        let drivers = Drivers::default();
        drivers.insert(&plugin("/a", &["1.0.0"])).unwrap();
        let error = drivers.check(&plugin("/b", &["1.0.0"])).unwrap_err();
        assert!(error.0.contains("already registered"), "{error}");
        drivers.insert(&plugin("/b", &["1.1.0"])).unwrap();
        // The earlier one's socket going away is not the end of its successor.
        drivers.remove(&plugin("/a", &["1.0.0"]));
        assert!(drivers.get("d").is_some());
        drivers.remove(&plugin("/b", &["1.1.0"]));
        assert!(drivers.get("d").is_none());
    }
}
