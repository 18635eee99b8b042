//! Where CSI volumes are on the disk and what is written down beside them, as upstream lays it out: either kubelet can
//! take over what the other has mounted.
//!
//! ```text
//! pods/<uid>/volumes/kubernetes.io~csi/<volume>/mount             published for one pod
//! pods/<uid>/volumes/kubernetes.io~csi/<volume>/vol_data.json
//! plugins/kubernetes.io/csi/<driver>/<digest>/globalmount         staged for the whole node
//! plugins/kubernetes.io/csi/<driver>/<digest>/vol_data.json
//! ```

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

const DATA_FILE: &str = "vol_data.json";
const POD_PLUGIN: &str = "kubernetes.io~csi";
/// A volume data file is a handful of short texts.
const MAX_DATA: u64 = 1 << 20;

/// A volume by its driver and the driver's name for it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VolumeId {
    pub driver: String,
    pub handle: String,
}

impl VolumeId {
    /// The name in `volumesInUse` and `volumesAttached` of the node's status.
    pub fn unique_name(&self) -> String {
        format!("kubernetes.io/csi/{}^{}", self.driver, self.handle)
    }

    /// The name of the object that tells whether the volume is attached to this node.
    pub fn attachment(&self, node: &str) -> String {
        format!("csi-{}", digest(&[&self.handle, &self.driver, node]))
    }
}

/// The content of `vol_data.json`: all texts, most of them absent beside a staged volume.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct VolumeData {
    #[serde(rename = "specVolID", skip_serializing_if = "String::is_empty")]
    pub spec_volume_id: String,
    pub volume_handle: String,
    pub driver_name: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub node_name: String,
    #[serde(rename = "attachmentID", skip_serializing_if = "String::is_empty")]
    pub attachment_id: String,
    /// `Persistent` or `Ephemeral`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub volume_lifecycle_mode: String,
}

impl VolumeData {
    pub fn id(&self) -> VolumeId {
        VolumeId { driver: self.driver_name.clone(), handle: self.volume_handle.clone() }
    }
}

/// A step on the disk that failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {step} {path}")]
pub struct DiskError {
    pub step: &'static str,
    pub path: PathBuf,
    pub source: io::Error,
}

impl DiskError {
    pub fn at(step: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self { step, path, source }
    }
}

fn digest(parts: &[&str]) -> String {
    let mut digest = Sha256::new();
    parts.iter().for_each(|part| digest.update(part));
    digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The handle of a volume that exists only in its pod.
pub fn inline_handle(pod_uid: &str, volume: &str) -> String {
    format!("csi-{}", digest(&[pod_uid, volume]))
}

/// A place with a volume: the directory that holds the mount point and the data file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    directory: PathBuf,
    mount: &'static str,
}

/// The pod's own place for a volume; `name` is that of the persistent volume or of the pod's inline volume.
pub fn published(root: &Path, pod_uid: &str, name: &str) -> Place {
    Place { directory: pod_volumes(root, pod_uid).join(name.replace('/', "~")), mount: "mount" }
}

/// The node's place for a volume.
pub fn staged(root: &Path, id: &VolumeId) -> Place {
    let directory = staging(root).join(&id.driver).join(digest(&[&id.handle]));
    Place { directory, mount: "globalmount" }
}

fn pod_volumes(root: &Path, pod_uid: &str) -> PathBuf {
    root.join("pods").join(pod_uid).join("volumes").join(POD_PLUGIN)
}

fn staging(root: &Path) -> PathBuf {
    root.join("plugins/kubernetes.io/csi")
}

impl Place {
    pub fn mount_point(&self) -> PathBuf {
        self.directory.join(self.mount)
    }

    pub fn directory(&self) -> &Path {
        &self.directory
    }

    pub fn prepare(&self) -> Result<(), DiskError> {
        let create = fs::DirBuilder::new().recursive(true).mode(0o750).create(&self.directory);
        create.map_err(DiskError::at("create", &self.directory))
    }

    /// The mount point itself, for drivers that expect it to exist.
    pub fn prepare_mount_point(&self) -> Result<(), DiskError> {
        let path = self.mount_point();
        let create = fs::DirBuilder::new().recursive(true).mode(0o750).create(&path);
        create.map_err(DiskError::at("create", &path))
    }

    /// Written aside and renamed: a file that is there is whole.
    pub fn save(&self, data: &VolumeData) -> Result<(), DiskError> {
        let path = self.directory.join(DATA_FILE);
        let aside = self.directory.join(format!(".{DATA_FILE}.new"));
        let text = serde_json::to_vec(data).map_err(io::Error::from);
        let write = text.and_then(|text| fs::write(&aside, text)).and_then(|()| fs::rename(&aside, &path));
        write.map_err(DiskError::at("save volume data in", &path))
    }

    /// `None` when no volume was ever set up here.
    pub fn load(&self) -> Result<Option<VolumeData>, DiskError> {
        let path = self.directory.join(DATA_FILE);
        let failed = |source: io::Error| DiskError::at("read volume data from", &path)(source);
        match fs::metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error)),
            Ok(metadata) if metadata.len() > MAX_DATA => return Err(failed(io::ErrorKind::FileTooLarge.into())),
            Ok(_) => {}
        }
        let text = fs::read(&path).map_err(failed)?;
        serde_json::from_slice(&text).map(Some).map_err(|error| failed(error.into()))
    }

    /// Removes the mount point, the data file and the directory. What is still mounted, or not empty, stays: an error.
    pub fn remove(&self) -> Result<(), DiskError> {
        let gone = |path: &Path, result: io::Result<()>| match result {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(DiskError::at("remove", path)(error)),
            _ => Ok(()),
        };
        let mount = self.mount_point();
        let removed = match fs::symlink_metadata(&mount) {
            Ok(metadata) if metadata.is_dir() => fs::remove_dir(&mount),
            Ok(_) => fs::remove_file(&mount),
            Err(error) => Err(error),
        };
        gone(&mount, removed)?;
        let data = self.directory.join(DATA_FILE);
        gone(&data, fs::remove_file(&data))?;
        gone(&self.directory, fs::remove_dir(&self.directory))
    }
}

fn subdirectories(path: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path())
}

/// The places of one pod's volumes.
pub fn published_of(root: &Path, pod_uid: &str) -> Vec<Place> {
    subdirectories(&pod_volumes(root, pod_uid)).map(|directory| Place { directory, mount: "mount" }).collect()
}

/// The places of the volumes of all pods.
pub fn all_published(root: &Path) -> Vec<Place> {
    let pods = subdirectories(&root.join("pods"));
    let uids = pods.filter_map(|path| path.file_name().and_then(|name| name.to_str()).map(str::to_owned));
    uids.flat_map(|uid| published_of(root, &uid)).collect()
}

/// The places of the volumes that are, or were being, staged.
pub fn all_staged(root: &Path) -> Vec<Place> {
    let drivers = subdirectories(&staging(root));
    drivers
        .flat_map(|path| subdirectories(&path).collect::<Vec<_>>())
        .map(|directory| Place { directory, mount: "globalmount" })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_upstreams() {
        let id = VolumeId { driver: "d.example".into(), handle: "vol/1".into() };
        assert_eq!(id.unique_name(), "kubernetes.io/csi/d.example^vol/1");
        // sha256("vol/1d.examplenode")
        assert_eq!(id.attachment("node"), format!("csi-{}", digest(&["vol/1d.examplenode"])));
        assert_eq!(
            digest(&["a", "bc"]),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
            "the digest of abc"
        );
        let root = Path::new("/r");
        assert_eq!(
            published(root, "u", "a/b").mount_point(),
            Path::new("/r/pods/u/volumes/kubernetes.io~csi/a~b/mount")
        );
        let staged = staged(root, &id).mount_point();
        let want = format!("/r/plugins/kubernetes.io/csi/d.example/{}/globalmount", digest(&["vol/1"]));
        assert_eq!(staged, Path::new(&want));
    }

    #[test]
    fn data_is_read_back_and_written_as_upstream_writes_it() {
        let root = tempfile::tempdir().unwrap();
        let place = published(root.path(), "u", "pv");
        assert_eq!(place.load().unwrap(), None);
        place.prepare().unwrap();
        let upstream = r#"{"attachmentID":"csi-1","driverName":"d","nodeName":"n","specVolID":"pv",
            "volumeHandle":"h","volumeLifecycleMode":"Persistent","seLinuxMountContext":"x"}"#;
        fs::write(place.directory.join(DATA_FILE), upstream).unwrap();
        let data = place.load().unwrap().unwrap();
        assert_eq!((data.attachment_id.as_str(), data.spec_volume_id.as_str()), ("csi-1", "pv"));
        place.save(&data).unwrap();
        assert_eq!(place.load().unwrap(), Some(data));
        assert_eq!(all_published(root.path()), std::slice::from_ref(&place));
        place.prepare_mount_point().unwrap();
        place.remove().unwrap();
        assert!(!place.directory.exists());
        place.remove().unwrap();
    }

    #[test]
    fn what_holds_files_is_not_removed() {
        let root = tempfile::tempdir().unwrap();
        let place = published(root.path(), "u", "pv");
        place.prepare_mount_point().unwrap();
        fs::write(place.mount_point().join("precious"), "x").unwrap();
        assert!(place.remove().is_err());
        assert!(place.mount_point().join("precious").exists());
    }
}
