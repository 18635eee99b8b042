//! Whose the devices are, written down: a restarted kubelet must not give a running container's devices to another.
//! The file is upstream's (`kubelet_internal_checkpoint`), down to its checksum, so that either kubelet can follow the
//! other.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use prost::Message;
use serde::{Deserialize, Serialize};

use super::api::ContainerAllocated;
use super::inventory::{Inventory, Share};

pub const FILE: &str = "kubelet_internal_checkpoint";
/// Many pods with many devices; more is not a checkpoint.
const MAX_SIZE: u64 = 64 << 20;

#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    #[error("cannot read the checkpoint of devices {path}")]
    Read { path: PathBuf, source: io::Error },
    #[error("the checkpoint of devices {path} is not one")]
    Decode { path: PathBuf, source: serde_json::Error },
    #[error("the checkpoint of devices {path} is corrupt: its checksum is {found}, not {wanted}")]
    Checksum { path: PathBuf, found: u64, wanted: u64 },
    #[error("the checkpoint of devices {path} is corrupt: {pod}/{container} {resource}")]
    Response { path: PathBuf, pod: String, container: String, resource: String },
    #[error("cannot write the checkpoint of devices {path}")]
    Write { path: PathBuf, source: io::Error },
}

#[derive(Deserialize, Serialize)]
#[serde(rename_all = "PascalCase")]
struct File {
    data: Data,
    checksum: u64,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Data {
    pod_device_entries: Option<Vec<Entry>>,
    registered_devices: Option<BTreeMap<String, Option<Vec<String>>>>,
}

#[derive(Deserialize, Serialize)]
struct Entry {
    #[serde(rename = "PodUID")]
    pod_uid: String,
    #[serde(rename = "ContainerName")]
    container_name: String,
    #[serde(rename = "ResourceName")]
    resource_name: String,
    #[serde(rename = "DeviceIDs")]
    device_ids: Option<BTreeMap<i64, Vec<String>>>,
    /// Base64 of the plugin's answer.
    #[serde(rename = "AllocResp")]
    response: Option<String>,
}

/// Upstream hashes a rendering of its own types; this is that rendering.
fn checksum(data: &Data) -> u64 {
    let list = |items: &[String]| format!("[{}]", items.join(" "));
    let entry = |entry: &Entry| {
        let devices = entry.device_ids.as_ref().map_or_else(
            || "<nil>".to_owned(),
            |devices| {
                let nodes: Vec<String> = devices.iter().map(|(node, ids)| format!("{node}:{}", list(ids))).collect();
                format!("map{}", list(&nodes))
            },
        );
        let response = entry.response.as_ref().map_or_else(
            || "<nil>".to_owned(),
            |text| {
                let bytes: Vec<String> =
                    STANDARD.decode(text).unwrap_or_default().iter().map(ToString::to_string).collect();
                list(&bytes)
            },
        );
        format!(
            "{{PodUID:(string){} ContainerName:(string){} ResourceName:(string){} \
             DeviceIDs:(checkpoint.DevicesPerNUMA){devices} AllocResp:([]uint8){response}}}",
            entry.pod_uid, entry.container_name, entry.resource_name
        )
    };
    let entries = data
        .pod_device_entries
        .as_ref()
        .map_or_else(|| "<nil>".to_owned(), |entries| list(&entries.iter().map(entry).collect::<Vec<_>>()));
    let registered = data.registered_devices.as_ref().map_or_else(
        || "<nil>".to_owned(),
        |registered| {
            let show = |ids: &Option<Vec<String>>| ids.as_ref().map_or_else(|| "<nil>".to_owned(), |ids| list(ids));
            let resources: Vec<String> = registered.iter().map(|(name, ids)| format!("{name}:{}", show(ids))).collect();
            format!("map{}", list(&resources))
        },
    );
    let text = format!(
        "(checkpoint.checkpointData){{PodDeviceEntries:([]checkpoint.PodDevicesEntry){entries} \
         RegisteredDevices:(map[string][]string){registered}}}"
    );
    // FNV-1a of 32 bits.
    let hash = text.bytes().fold(0x811c_9dc5u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    u64::from(hash)
}

/// Fills the inventory with what an earlier process has given. Without a file there was none.
pub fn load(directory: &Path, inventory: &mut Inventory) -> Result<(), CheckpointError> {
    let path = directory.join(FILE);
    let failed = |source| CheckpointError::Read { path: path.clone(), source };
    match fs::metadata(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
        Ok(metadata) if metadata.len() > MAX_SIZE => return Err(failed(io::ErrorKind::FileTooLarge.into())),
        Ok(_) => {}
    }
    let text = fs::read(&path).map_err(failed)?;
    let file: File =
        serde_json::from_slice(&text).map_err(|source| CheckpointError::Decode { path: path.clone(), source })?;
    let wanted = checksum(&file.data);
    if file.checksum != wanted {
        return Err(CheckpointError::Checksum { path, found: file.checksum, wanted });
    }
    for entry in file.data.pod_device_entries.into_iter().flatten() {
        let bytes = STANDARD.decode(entry.response.as_deref().unwrap_or_default()).ok();
        let Some(response) = bytes.and_then(|bytes| ContainerAllocated::decode(bytes.as_slice()).ok()) else {
            let Entry { pod_uid: pod, container_name: container, resource_name: resource, .. } = entry;
            return Err(CheckpointError::Response { path, pod, container, resource });
        };
        let share = Share { devices: entry.device_ids.unwrap_or_default(), response };
        inventory.restore((entry.pod_uid, entry.container_name), entry.resource_name, share);
    }
    for resource in file.data.registered_devices.into_iter().flatten().map(|(name, _)| name) {
        inventory.expect(&resource);
    }
    Ok(())
}

/// The file's content for this inventory.
pub fn render(inventory: &Inventory) -> Result<Vec<u8>, serde_json::Error> {
    let mut entries = Vec::new();
    for ((pod, container), shares) in inventory.all_shares() {
        entries.extend(shares.iter().map(|(resource, share)| Entry {
            pod_uid: pod.clone(),
            container_name: container.clone(),
            resource_name: resource.clone(),
            device_ids: Some(share.devices.clone()),
            response: Some(STANDARD.encode(share.response.encode_to_vec())),
        }));
    }
    let registered = inventory.registered().into_iter().map(|(name, ids)| (name, Some(ids))).collect();
    let data = Data { pod_device_entries: Some(entries), registered_devices: Some(registered) };
    let checksum = checksum(&data);
    serde_json::to_vec(&File { data, checksum })
}

/// Written aside and renamed: a file that is there is whole.
pub fn save(directory: &Path, content: &[u8]) -> Result<(), CheckpointError> {
    let path = directory.join(FILE);
    let aside = directory.join(format!(".{FILE}.new"));
    let written = fs::create_dir_all(directory)
        .and_then(|()| fs::write(&aside, content))
        .and_then(|()| fs::rename(&aside, &path));
    written.map_err(|source| CheckpointError::Write { path, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Entries and their checksum as upstream's program writes them.
    const UPSTREAM: &str = r#"{"Data":{"PodDeviceEntries":[{"PodUID":"u","ContainerName":"c","ResourceName":"r/x",
        "DeviceIDs":{"-1":["z"],"0":["a","b"],"10":["q"],"2":["w"]},"AllocResp":"AQL/"},{"PodUID":"u2",
        "ContainerName":"c","ResourceName":"r/x","DeviceIDs":null,"AllocResp":null}],
        "RegisteredDevices":{"a":[],"b":["1"],"c":null}},"Checksum":1277572501}"#;

    #[test]
    fn the_checksum_is_upstreams() {
        let file: File = serde_json::from_str(UPSTREAM).unwrap();
        assert_eq!(checksum(&file.data), file.checksum);
        // From the same program, without the package's name in it: the rendering of nothing.
        assert_ne!(checksum(&Data::default()), file.checksum);
    }

    #[test]
    fn what_is_saved_is_loaded() {
        let directory = tempfile::tempdir().unwrap();
        let mut inventory = Inventory::default();
        load(directory.path(), &mut inventory).unwrap();
        inventory.expect("r/x");
        let response =
            ContainerAllocated { envs: [("A".to_owned(), "b".to_owned())].into(), ..ContainerAllocated::default() };
        let owner = ("u".to_owned(), "c".to_owned());
        let devices = BTreeMap::from([(-1, vec!["1".to_owned()])]);
        inventory.restore(owner.clone(), "r/x".into(), Share { devices, response });
        save(directory.path(), &render(&inventory).unwrap()).unwrap();

        let mut later = Inventory::default();
        load(directory.path(), &mut later).unwrap();
        assert_eq!(later.shares(&owner), inventory.shares(&owner));
        assert_eq!(later.offered().capacity["r/x"], 0);

        let path = directory.path().join(FILE);
        let changed = fs::read_to_string(&path).unwrap().replace("\"u\"", "\"v\"");
        fs::write(&path, changed).unwrap();
        assert!(matches!(load(directory.path(), &mut later), Err(CheckpointError::Checksum { .. })));
    }
}
