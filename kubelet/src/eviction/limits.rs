//! Pods that use more of the node's disk than they may: a volume beyond its size, a container or the whole pod beyond
//! its `ephemeral-storage` limit. Judging is pure; measuring walks directories, but only of pods that have a limit.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use apimachinery::meta::Quantity;
use k8s_openapi::api::core::v1::{EmptyDirVolumeSource, Pod};

use super::rank::bytes;
use crate::pod::{plan, qos};
use crate::volumes;

const STORAGE: &str = "ephemeral-storage";
/// Entries of one volume that are counted at most: a pod must not keep the kubelet busy with its files.
const MAX_ENTRIES: usize = 200_000;
const BLOCK: u64 = 512;

/// Bytes on the node's disk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LocalUse {
    /// By volume.
    pub volumes: HashMap<String, i64>,
    /// Writable layer and logs, by container.
    pub containers: HashMap<String, i64>,
}

fn size_limit(source: &EmptyDirVolumeSource) -> Option<i64> {
    let limit = source.size_limit.as_ref()?.0.parse::<Quantity>().ok()?.value();
    // The kernel itself limits those in memory.
    (limit > 0 && source.medium.as_deref() != Some("Memory")).then_some(limit)
}

fn empty_dirs(pod: &Pod) -> impl Iterator<Item = (&String, &EmptyDirVolumeSource)> {
    let volumes = pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
    volumes.filter_map(|volume| Some((&volume.name, volume.empty_dir.as_ref()?)))
}

/// Containers that run as long as the pod, and their limits.
fn container_limits(pod: &Pod) -> Vec<(&str, Option<i64>)> {
    let sidecars = pod.spec.iter().flat_map(|spec| spec.init_containers.iter().flatten());
    let specs = sidecars.filter(|spec| plan::is_sidecar(spec)).chain(pod.spec.iter().flat_map(|spec| &spec.containers));
    specs.map(|spec| (spec.name.as_str(), qos::limit(spec, STORAGE).filter(|limit| *limit > 0))).collect()
}

/// Whether there is anything to measure.
pub fn has_limit(pod: &Pod) -> bool {
    empty_dirs(pod).any(|(_, source)| size_limit(source).is_some())
        || container_limits(pod).iter().any(|(_, limit)| limit.is_some())
}

/// What the pod's volumes take; of its containers the caller knows more.
pub fn measure_volumes(pod: &Pod, root_dir: &Path) -> HashMap<String, i64> {
    let directory = volumes::pod_dir(root_dir, crate::pod::runtime_uid(pod)).join("volumes/kubernetes.io~empty-dir");
    let on_disk = empty_dirs(pod).filter(|(_, source)| source.medium.as_deref() != Some("Memory"));
    on_disk.map(|(name, _)| (name.clone(), disk_use(&directory.join(name)))).collect()
}

/// Bytes that the files below `root` occupy; links are not followed, other file systems not entered.
fn disk_use(root: &Path) -> i64 {
    let Ok(device) = fs::symlink_metadata(root).map(|metadata| metadata.dev()) else { return 0 };
    let (mut total, mut seen) = (0u64, 0);
    let mut open = vec![root.to_owned()];
    while let Some(directory) = open.pop() {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            seen += 1;
            if seen > MAX_ENTRIES {
                return i64::try_from(total).unwrap_or(i64::MAX);
            }
            let Ok(metadata) = entry.metadata() else { continue };
            if metadata.dev() != device {
                continue;
            }
            total = total.saturating_add(metadata.blocks().saturating_mul(BLOCK));
            if metadata.is_dir() {
                open.push(entry.path());
            }
        }
    }
    i64::try_from(total).unwrap_or(i64::MAX)
}

/// What the status of a pod that exceeds a limit says.
pub fn exceeded(pod: &Pod, used: &LocalUse) -> Option<String> {
    for (name, source) in empty_dirs(pod) {
        let limit = size_limit(source).filter(|limit| used.volumes.get(name).is_some_and(|used| used > limit));
        if limit.is_some() {
            let limit = source.size_limit.as_ref().map(|limit| limit.0.clone()).unwrap_or_default();
            return Some(format!("Usage of EmptyDir volume {name:?} exceeds the limit {limit:?}. "));
        }
    }
    let limits = container_limits(pod);
    let whole: i64 = limits.iter().filter_map(|(_, limit)| *limit).sum();
    let total = used.volumes.values().chain(used.containers.values()).sum::<i64>();
    if whole > 0 && total > whole {
        let limit = bytes(whole);
        return Some(format!("Pod ephemeral local storage usage exceeds the total limit of containers {limit}. "));
    }
    limits.into_iter().find_map(|(name, limit)| {
        let limit = limit.filter(|limit| used.containers.get(name).is_some_and(|used| used > limit))?;
        let limit = bytes(limit);
        Some(format!("Container {name} exceeded its local ephemeral storage limit {limit:?}. "))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_limit_has_its_message() {
        let pod: Pod = serde_json::from_value(serde_json::json!({"spec": {
            "volumes": [{"name": "v", "emptyDir": {"sizeLimit": "1Mi"}}, {"name": "m", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}}],
            "containers": [
                {"name": "a", "resources": {"limits": {STORAGE: "1Mi"}}},
                {"name": "b", "resources": {"limits": {STORAGE: "3Mi"}}},
            ],
        }}))
        .unwrap();
        assert!(has_limit(&pod));
        let used = |volume: i64, a: i64, b: i64| LocalUse {
            volumes: HashMap::from([("v".to_owned(), volume)]),
            containers: HashMap::from([("a".to_owned(), a), ("b".to_owned(), b)]),
        };
        for (used, want) in [
            (used(1 << 20, 1 << 20, 1 << 20), None),
            (used(2 << 20, 0, 0), Some("Usage of EmptyDir volume \"v\" exceeds the limit \"1Mi\". ")),
            (used(0, 2 << 20, 0), Some("Container a exceeded its local ephemeral storage limit \"1Mi\". ")),
            (
                used(1 << 20, 1 << 20, 3 << 20),
                Some("Pod ephemeral local storage usage exceeds the total limit of containers 4Mi. "),
            ),
        ] {
            assert_eq!(exceeded(&pod, &used).as_deref(), want);
        }
    }

    #[test]
    fn files_are_counted_but_links_are_not_followed() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("d")).unwrap();
        fs::write(root.path().join("d/f"), vec![1; 100_000]).unwrap();
        std::os::unix::fs::symlink("/usr", root.path().join("out")).unwrap();
        let used = disk_use(root.path());
        assert!((100_000..1_000_000).contains(&used), "{used}");
        assert_eq!(disk_use(&root.path().join("nothing")), 0);
    }
}
