//! The claims that are prepared on this node: for which pods, and what drivers have given. Kept in memory and in
//! upstream's checkpoint (`dra_manager_state`), so that a restarted kubelet can take back what pods have left.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

const KIND: &str = "DRACheckpoint";
const API_VERSION: &str = "checkpoint.dra.kubelet.k8s.io/v1";
const MAX_SIZE: u64 = 64 << 20;

/// A claim by its namespace and name.
pub type Key = (String, String);

#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Claim {
    #[serde(rename = "ClaimUID")]
    pub uid: String,
    #[serde(rename = "ClaimName")]
    pub name: String,
    pub namespace: String,
    /// Pods that use it.
    #[serde(rename = "PodUIDs", serialize_with = "as_go_set", deserialize_with = "from_go_set")]
    pub pods: BTreeSet<String>,
    /// What each driver has given.
    #[serde(rename = "DriverState")]
    pub drivers: BTreeMap<String, Given>,
    /// All drivers have prepared it for this process.
    #[serde(skip)]
    pub is_prepared: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Given {
    pub devices: Option<Vec<Device>>,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Device {
    pub pool_name: String,
    pub device_name: String,
    #[serde(rename = "ShareID")]
    pub share_id: Option<String>,
    pub request_names: Option<Vec<String>>,
    #[serde(rename = "CDIDeviceIDs")]
    pub cdi_ids: Option<Vec<String>>,
}

/// Sets are maps to nothing there.
fn as_go_set<S: Serializer>(set: &BTreeSet<String>, serializer: S) -> Result<S::Ok, S::Error> {
    let map: BTreeMap<&String, BTreeMap<String, String>> = set.iter().map(|key| (key, BTreeMap::new())).collect();
    map.serialize(serializer)
}

fn from_go_set<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeSet<String>, D::Error> {
    let map = Option::<BTreeMap<String, serde::de::IgnoredAny>>::deserialize(deserializer)?;
    Ok(map.unwrap_or_default().into_keys().collect())
}

impl Claim {
    /// CDI devices for a container that uses `request` of the claim, or all of it.
    pub fn cdi_devices(&self, request: &str) -> Vec<String> {
        let devices = self.drivers.values().flat_map(|given| given.devices.iter().flatten());
        let for_request = devices.filter(|device| match device.request_names.as_deref() {
            None | Some([]) => true,
            Some(names) => request.is_empty() || names.iter().any(|name| name == request),
        });
        for_request.flat_map(|device| device.cdi_ids.iter().flatten().cloned()).collect()
    }
}

pub type Ledger = BTreeMap<Key, Claim>;

#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    #[error("cannot read the checkpoint of resource claims {path}")]
    Read { path: PathBuf, source: io::Error },
    #[error("the checkpoint of resource claims {path} is not one")]
    Decode { path: PathBuf, source: serde_json::Error },
    #[error("the checkpoint of resource claims {0} is corrupt: its checksum is wrong")]
    Checksum(PathBuf),
    #[error("cannot write the checkpoint of resource claims {path}")]
    Write { path: PathBuf, source: io::Error },
}

#[derive(Deserialize, Serialize)]
#[serde(rename_all = "PascalCase")]
struct File {
    /// JSON in JSON.
    data: String,
    checksum: u32,
}

#[derive(Deserialize, Serialize)]
struct Data {
    kind: String,
    #[serde(rename = "apiVersion")]
    api_version: String,
    #[serde(rename = "ClaimInfoStateList")]
    claims: Option<Vec<Claim>>,
}

fn checksum(text: &str) -> u32 {
    let mut crc = flate2::Crc::new();
    crc.update(text.as_bytes());
    crc.sum()
}

/// What an earlier process has written; without a file nothing.
pub fn load(path: &Path) -> Result<Ledger, LedgerError> {
    let failed = |source| LedgerError::Read { path: path.to_owned(), source };
    match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Ledger::new()),
        Err(error) => return Err(failed(error)),
        Ok(metadata) if metadata.len() > MAX_SIZE => return Err(failed(io::ErrorKind::FileTooLarge.into())),
        Ok(_) => {}
    }
    let decode = |source| LedgerError::Decode { path: path.to_owned(), source };
    let file: File = serde_json::from_slice(&fs::read(path).map_err(failed)?).map_err(decode)?;
    if checksum(&file.data) != file.checksum {
        return Err(LedgerError::Checksum(path.to_owned()));
    }
    let data: Data = serde_json::from_str(&file.data).map_err(decode)?;
    let claims = data.claims.into_iter().flatten();
    Ok(claims.map(|claim| ((claim.namespace.clone(), claim.name.clone()), claim)).collect())
}

/// Written aside and renamed: a file that is there is whole.
pub fn save(path: &Path, ledger: &Ledger) -> Result<(), LedgerError> {
    let claims = Some(ledger.values().cloned().collect());
    let render = || -> io::Result<Vec<u8>> {
        let data = Data { kind: KIND.to_owned(), api_version: API_VERSION.to_owned(), claims };
        let data = serde_json::to_string(&data)?;
        Ok(serde_json::to_vec(&File { checksum: checksum(&data), data })?)
    };
    let aside = path.with_extension("new");
    let written = render().and_then(|text| fs::write(&aside, text)).and_then(|()| fs::rename(&aside, path));
    written.map_err(|source| LedgerError::Write { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn upstreams_file_is_read_and_written() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("dra_manager_state");
        assert!(load(&path).unwrap().is_empty());
        let data = r#"{"kind":"DRACheckpoint","apiVersion":"checkpoint.dra.kubelet.k8s.io/v1","ClaimInfoStateList":[{"ClaimUID":"cu","ClaimName":"c","Namespace":"n","PodUIDs":{"u":{}},"DriverState":{"d":{"Devices":[{"PoolName":"p","DeviceName":"x","ShareID":null,"RequestNames":["r"],"CDIDeviceIDs":["v/d=x"]}]}}}]}"#;
        let text = serde_json::to_vec(&File { data: data.to_owned(), checksum: checksum(data) }).unwrap();
        fs::write(&path, text).unwrap();
        let ledger = load(&path).unwrap();
        let claim = &ledger[&("n".to_owned(), "c".to_owned())];
        assert_eq!(claim.pods, BTreeSet::from(["u".to_owned()]));
        for (request, want) in [("", 1), ("r", 1), ("other", 0)] {
            assert_eq!(claim.cdi_devices(request).len(), want, "{request}");
        }
        save(&path, &ledger).unwrap();
        let file: File = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        assert_eq!(file.data, data);
        fs::write(&path, r#"{"Data":"{}","Checksum":1}"#).unwrap();
        assert!(matches!(load(&path), Err(LedgerError::Checksum(_))));
    }

    #[test]
    fn the_checksum_is_the_ieee_crc() {
        assert_eq!(checksum("123456789"), 0xcbf4_3926);
    }
}
