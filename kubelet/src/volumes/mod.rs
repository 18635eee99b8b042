//! The volumes of pods: made before the first container starts, refreshed while the pod runs, removed after it.
//!
//! Every path derives from the pod's uid and the volume's name (`pods/<uid>/volumes/<plugin>/<name>`, as upstream
//! lays it out), and mounts are looked up in the kernel's table, so setting up twice changes nothing and cleaning up
//! needs no record.

mod claims;
pub mod csi;
mod mount;
mod payload;
mod pem;
mod pod_certificates;
mod projected;
mod tokens;
mod trust_bundles;

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};

use apimachinery::meta::Quantity;
use jiff::Timestamp;
use k8s_cri::v1 as cri;
use k8s_openapi::api::core::v1::{Container as Spec, HostPathVolumeSource, Pod, Volume, VolumeMount};
use nix::unistd::{Gid, chown};

use csi::{Csi, CsiError, Source, Wanted};
pub use mount::{MountError, unmount_below};
pub use payload::PayloadError;
pub use pod_certificates::PodCertificates;
pub use projected::ProjectedError;
pub use tokens::Tokens;

use crate::cri::Mount;
use crate::objects::{ObjectError, Objects};
use crate::pod::downward::Downward;
use crate::pod::env::expand;

#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    #[error(transparent)]
    Fetch(#[from] ObjectError),
    #[error(transparent)]
    Content(#[from] ProjectedError),
    #[error(transparent)]
    Payload(#[from] PayloadError),
    #[error(transparent)]
    Mount(#[from] MountError),
    #[error("cannot {step} {path}")]
    Io { step: &'static str, path: PathBuf, source: io::Error },
    #[error("hostPath type check failed: {path} is not a {expected}")]
    HostPathType { path: PathBuf, expected: &'static str },
    #[error("volume type of {0:?} is not supported by this kubelet")]
    Unsupported(String),
    #[error("error processing PVC {namespace}/{name}: {source}")]
    Claim { namespace: String, name: String, source: Box<claims::ClaimError> },
    #[error("MountVolume.SetUp failed for volume {volume:?} : {source}")]
    Csi { volume: String, source: CsiError },
    #[error("UnmountVolume.TearDown failed: {0}")]
    Release(#[from] CsiError),
    #[error("volume {0:?} is not defined in the pod")]
    NoVolume(String),
}

fn failed(step: &'static str, path: &Path) -> impl FnOnce(io::Error) -> VolumeError {
    let path = path.to_owned();
    move |source| VolumeError::Io { step, path, source }
}

/// Where each volume of a pod is on the host.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Volumes {
    pub mounted: HashMap<String, Mounted>,
    /// When to set them up again although nothing has changed: something in them gets old.
    pub refresh_at: Option<Timestamp>,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Mounted {
    Path {
        path: PathBuf,
        read_only: bool,
    },
    /// An image, which the runtime mounts for each container; see [`ImageVolumes`].
    Image,
}

/// What was pulled for the image volumes of a container, by the volume's name.
pub type ImageVolumes = HashMap<String, cri::ImageSpec>;

/// What volumes are made from beside the pod.
pub struct VolumeContext<'a> {
    pub root_dir: &'a Path,
    pub objects: &'a Objects,
    pub tokens: &'a Tokens,
    pub certificates: &'a PodCertificates,
    pub csi: &'a Csi,
    pub downward: &'a Downward<'a>,
}

pub fn pod_dir(root_dir: &Path, uid: &str) -> PathBuf {
    root_dir.join("pods").join(uid)
}

/// Creates the pod's own directories.
pub fn make_pod_dirs(root_dir: &Path, uid: &str) -> Result<(), VolumeError> {
    let pod = pod_dir(root_dir, uid);
    for name in ["", "volumes", "plugins", "containers"] {
        let path = pod.join(name);
        fs::DirBuilder::new().recursive(true).mode(0o750).create(&path).map_err(failed("create", &path))?;
    }
    Ok(())
}

/// Gives the drivers' volumes back and unmounts whatever else is mounted below the pod's directory, which stays for the
/// logs of termination messages.
pub async fn release(root_dir: &Path, uid: &str, csi: &Csi) -> Result<(), VolumeError> {
    let pod = pod_dir(root_dir, uid);
    // They hold the volumes that they are parts of.
    unmount_below(&pod.join("volume-subpaths"))?;
    csi.release(uid).await?;
    unmount_below(&pod)?;
    for name in ["volumes", "volume-subpaths"] {
        remove(&pod.join(name))?;
    }
    Ok(())
}

/// Whether volumes of the pod are still set up.
pub fn has_volumes(root_dir: &Path, uid: &str) -> bool {
    pod_dir(root_dir, uid).join("volumes").exists()
}

/// Removes the pod's directory. Call [`release`] first: a mount left inside would be emptied.
pub fn remove_pod_dir(root_dir: &Path, uid: &str) -> Result<(), VolumeError> {
    unmount_below(&pod_dir(root_dir, uid))?;
    remove(&pod_dir(root_dir, uid))
}

fn remove(path: &Path) -> Result<(), VolumeError> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", path)(error)),
        _ => Ok(()),
    }
}

/// Sets up (or refreshes) all volumes of the pod.
pub async fn setup(pod: &Pod, cx: &VolumeContext<'_>) -> Result<Volumes, VolumeError> {
    let mut volumes = Volumes::default();
    for volume in pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten()) {
        let (mounted, refresh_at) = one(pod, volume, cx).await?;
        volumes.mounted.insert(volume.name.clone(), mounted);
        volumes.refresh_at = volumes.refresh_at.into_iter().chain(refresh_at).min();
    }
    Ok(volumes)
}

/// True when a later look may find other content.
pub fn may_change(pod: &Pod) -> bool {
    let volumes = pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
    let mut changing = volumes.filter(|volume| {
        volume.config_map.is_some()
            || volume.secret.is_some()
            || volume.projected.is_some()
            || volume.downward_api.is_some()
            || volume.persistent_volume_claim.is_some()
            || volume.ephemeral.is_some()
            || volume.csi.is_some()
    });
    changing.next().is_some()
}

/// The claim that a volume of the pod refers to, if it does.
pub fn claim_name(pod: &Pod, volume: &Volume) -> Option<String> {
    claims::reference(pod, volume).map(|reference| reference.claim)
}

fn fs_group(pod: &Pod) -> Option<u32> {
    let group = pod.spec.as_ref()?.security_context.as_ref()?.fs_group?;
    u32::try_from(group).ok()
}

/// One volume, and when it gets old.
async fn one(pod: &Pod, volume: &Volume, cx: &VolumeContext<'_>) -> Result<(Mounted, Option<Timestamp>), VolumeError> {
    let plugin_dir = |plugin: &str| {
        let uid = crate::pod::runtime_uid(pod);
        pod_dir(cx.root_dir, uid).join("volumes").join(plugin).join(&volume.name)
    };
    let lasting = |mounted| Ok((mounted, None));
    if let Some(source) = &volume.empty_dir {
        let path = plugin_dir("kubernetes.io~empty-dir");
        let limit = source.size_limit.as_ref().and_then(|limit| limit.0.parse::<Quantity>().ok());
        let size = limit.and_then(|limit| u64::try_from(limit.value()).ok()).unwrap_or(0);
        empty_dir(&path, source.medium.as_deref() == Some("Memory"), size, fs_group(pod))?;
        return lasting(Mounted::Path { path, read_only: false });
    }
    if let Some(source) = &volume.host_path {
        host_path(source)?;
        return lasting(Mounted::Path { path: PathBuf::from(&source.path), read_only: false });
    }
    if volume.image.is_some() {
        return lasting(Mounted::Image);
    }
    if let Some(reference) = claims::reference(pod, volume) {
        return persistent(pod, volume, &reference, cx).await;
    }
    if let Some(source) = &volume.csi {
        let read_only = source.read_only.unwrap_or(false);
        let wanted = Wanted { pod, volume: &volume.name, source: Source::Inline(source), claim: None, read_only };
        return of_driver(&wanted, cx).await;
    }
    let Some(content) = projected::content(pod, volume, cx).await? else {
        return Err(VolumeError::Unsupported(volume.name.clone()));
    };
    let path = plugin_dir(content.plugin);
    fs::DirBuilder::new().recursive(true).mode(0o755).create(&path).map_err(failed("create", &path))?;
    if content.in_memory {
        mount::tmpfs(&path, 0)?;
    }
    payload::write(&path, &content.files, fs_group(pod))?;
    if let Some(group) = fs_group(pod) {
        chown(&path, None, Some(Gid::from_raw(group))).map_err(|errno| failed("chown", &path)(errno.into()))?;
    }
    Ok((Mounted::Path { path, read_only: true }, content.refresh_at))
}

fn empty_dir(path: &Path, memory: bool, size: u64, group: Option<u32>) -> Result<(), VolumeError> {
    let is_new = !path.exists();
    fs::create_dir_all(path).map_err(failed("create", path))?;
    if memory {
        mount::tmpfs(path, size)?;
    }
    if is_new {
        let mode = if group.is_some() { 0o2777 } else { 0o777 };
        if let Some(group) = group {
            chown(path, None, Some(Gid::from_raw(group))).map_err(|errno| failed("chown", path)(errno.into()))?;
        }
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(failed("set the mode of", path))?;
    }
    Ok(())
}

fn host_path(source: &HostPathVolumeSource) -> Result<(), VolumeError> {
    let path = Path::new(&source.path);
    let kind = fs::metadata(path).map(|metadata| metadata.file_type());
    let check = |expected: &'static str, test: fn(&fs::FileType) -> bool| match &kind {
        Ok(kind) if test(kind) => Ok(()),
        _ => Err(VolumeError::HostPathType { path: path.to_owned(), expected }),
    };
    match source.type_.as_deref().unwrap_or_default() {
        "DirectoryOrCreate" if kind.is_err() => {
            fs::DirBuilder::new().recursive(true).mode(0o755).create(path).map_err(failed("create", path))
        }
        "FileOrCreate" if kind.is_err() => {
            fs::OpenOptions::new().create(true).append(true).open(path).map(drop).map_err(failed("create", path))
        }
        "DirectoryOrCreate" | "Directory" => check("directory", fs::FileType::is_dir),
        "FileOrCreate" | "File" => check("file", fs::FileType::is_file),
        "Socket" => check("socket", fs::FileType::is_socket),
        "CharDevice" => check("character device", fs::FileType::is_char_device),
        "BlockDevice" => check("block device", fs::FileType::is_block_device),
        _ => Ok(()),
    }
}

/// The volume behind a claim: a directory of this node or a driver's.
async fn persistent(
    pod: &Pod,
    volume: &Volume,
    reference: &claims::Reference,
    cx: &VolumeContext<'_>,
) -> Result<(Mounted, Option<Timestamp>), VolumeError> {
    let read_only = reference.read_only;
    let resolved = claims::resolve(pod, volume, reference, cx.objects).await;
    let (claim, found) = resolved.map_err(|source| VolumeError::Claim {
        namespace: pod.metadata.namespace.clone().unwrap_or_default(),
        name: reference.claim.clone(),
        source: Box::new(source),
    })?;
    let Some(spec) = &found.spec else { return Err(VolumeError::Unsupported(volume.name.clone())) };
    if let Some(host) = &spec.host_path {
        host_path(host)?;
        return Ok((Mounted::Path { path: PathBuf::from(&host.path), read_only }, None));
    }
    if let Some(local) = &spec.local {
        return Ok((Mounted::Path { path: PathBuf::from(&local.path), read_only }, None));
    }
    match &spec.csi {
        Some(source) if spec.volume_mode.as_deref() != Some("Block") => {
            let source = Source::Persistent(&found, source);
            let wanted = Wanted { pod, volume: &volume.name, source, claim: Some(&claim), read_only };
            of_driver(&wanted, cx).await
        }
        _ => Err(VolumeError::Unsupported(volume.name.clone())),
    }
}

async fn of_driver(wanted: &Wanted<'_>, cx: &VolumeContext<'_>) -> Result<(Mounted, Option<Timestamp>), VolumeError> {
    let published = cx.csi.publish(wanted, cx.tokens).await;
    let published = published.map_err(|source| VolumeError::Csi { volume: wanted.name().to_owned(), source })?;
    Ok((Mounted::Path { path: published.path, read_only: wanted.read_only }, published.refresh_at))
}

/// What the mounts of one container are made from beside its spec.
pub struct MountContext<'a> {
    pub pod: &'a Pod,
    pub volumes: &'a Volumes,
    pub images: &'a ImageVolumes,
    /// The container's environment, for `subPathExpr`.
    pub env: &'a [(String, String)],
    pub root_dir: &'a Path,
}

/// The runtime's mounts for one container.
pub fn container_mounts(spec: &Spec, cx: &MountContext<'_>) -> Result<Vec<Mount>, VolumeError> {
    let mounts = spec.volume_mounts.iter().flatten().enumerate();
    mounts.map(|(index, mount)| container_mount(spec, index, mount, cx)).collect()
}

fn container_mount(
    spec: &Spec,
    index: usize,
    mount: &VolumeMount,
    cx: &MountContext<'_>,
) -> Result<Mount, VolumeError> {
    let volume = cx.volumes.mounted.get(&mount.name).ok_or_else(|| VolumeError::NoVolume(mount.name.clone()))?;
    let container_path =
        if mount.mount_path.starts_with('/') { mount.mount_path.clone() } else { format!("/{}", mount.mount_path) };
    let sub_path = match &mount.sub_path_expr {
        Some(text) => expand(text, |name| cx.env.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone())),
        None => mount.sub_path.clone().unwrap_or_default(),
    };
    let Mounted::Path { path, read_only } = volume else {
        let image = cx.images.get(&mount.name).ok_or_else(|| VolumeError::NoVolume(mount.name.clone()))?;
        let image = Some(image.clone());
        return Ok(Mount { container_path, readonly: true, image, image_sub_path: sub_path, ..Default::default() });
    };
    let host_path = if sub_path.is_empty() {
        path.clone()
    } else {
        let subpaths = pod_dir(cx.root_dir, crate::pod::runtime_uid(cx.pod)).join("volume-subpaths");
        let target = subpaths.join(&mount.name).join(&spec.name).join(index.to_string());
        mount::bind_sub_path(path, &sub_path, &target)?;
        target
    };
    Ok(Mount {
        container_path,
        host_path: host_path.display().to_string(),
        readonly: mount.read_only.unwrap_or(false) || *read_only,
        propagation: match mount.mount_propagation.as_deref() {
            Some("HostToContainer") => cri::MountPropagation::PropagationHostToContainer,
            Some("Bidirectional") => cri::MountPropagation::PropagationBidirectional,
            _ => cri::MountPropagation::PropagationPrivate,
        } as i32,
        ..Default::default()
    })
}
