//! What a container is started with to use its devices, put together from the answers of their plugins.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;

use k8s_cri::v1 as cri;

use super::inventory::Share;
use crate::cri::Mount;

/// Parts of a container's configuration.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DeviceOptions {
    pub env: Vec<(String, String)>,
    pub mounts: Vec<Mount>,
    pub devices: Vec<cri::Device>,
    pub annotations: BTreeMap<String, String>,
    pub cdi_devices: Vec<String>,
}

/// Keeps the first of two that claim the same key.
struct Claims<V> {
    what: &'static str,
    taken: BTreeMap<String, V>,
}

impl<V: PartialEq + Debug> Claims<V> {
    fn new(what: &'static str) -> Self {
        Self { what, taken: BTreeMap::new() }
    }

    fn claim(&mut self, key: String, value: V) {
        match self.taken.get(&key) {
            None => drop(self.taken.insert(key, value)),
            Some(earlier) if *earlier == value => {}
            Some(_) => tracing::error!(what = self.what, key, "plugins disagree about a container; the first is heard"),
        }
    }
}

pub fn options(shares: &BTreeMap<String, Share>) -> DeviceOptions {
    let (mut env, mut annotations) = (Claims::new("environment"), Claims::new("annotations"));
    let (mut mounts, mut devices) = (Claims::new("mounts"), Claims::new("devices"));
    let mut cdi = BTreeSet::new();
    for response in shares.values().map(|share| &share.response) {
        response.envs.iter().for_each(|(key, value)| env.claim(key.clone(), value.clone()));
        response.annotations.iter().for_each(|(key, value)| annotations.claim(key.clone(), value.clone()));
        for mount in &response.mounts {
            mounts.claim(mount.container_path.clone(), (mount.host_path.clone(), mount.read_only));
        }
        for device in &response.devices {
            devices.claim(device.container_path.clone(), (device.host_path.clone(), device.permissions.clone()));
        }
        cdi.extend(response.cdi_devices.iter().map(|device| device.name.clone()));
    }
    let mount =
        |(container_path, (host_path, readonly))| Mount { container_path, host_path, readonly, ..Mount::default() };
    let device = |(container_path, (host_path, permissions))| cri::Device { container_path, host_path, permissions };
    DeviceOptions {
        env: env.taken.into_iter().collect(),
        mounts: mounts.taken.into_iter().map(mount).collect(),
        devices: devices.taken.into_iter().map(device).collect(),
        annotations: annotations.taken,
        cdi_devices: cdi.into_iter().collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::api::{CdiDevice, ContainerAllocated, DeviceFile};
    use super::*;

    #[test]
    fn the_first_plugin_is_heard() {
        let share = |value: &str, path: &str| {
            let file = DeviceFile { container_path: "/dev/x".into(), host_path: path.into(), permissions: "rw".into() };
            let response = ContainerAllocated {
                envs: [("A".to_owned(), value.to_owned())].into(),
                devices: vec![file],
                cdi_devices: vec![CdiDevice { name: "v.example/gpu=0".into() }],
                ..ContainerAllocated::default()
            };
            Share { response, ..Share::default() }
        };
        let shares =
            BTreeMap::from([("r/a".to_owned(), share("1", "/dev/a")), ("r/b".to_owned(), share("2", "/dev/b"))]);
        let options = options(&shares);
        assert_eq!(options.env, [("A".to_owned(), "1".to_owned())]);
        assert_eq!((options.devices.len(), options.devices[0].host_path.as_str()), (1, "/dev/a"));
        assert_eq!(options.cdi_devices, ["v.example/gpu=0"]);
    }
}
