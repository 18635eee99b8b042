//! Slow chores of the node: rotating container logs and removing images that nothing uses when the disk fills up.
//! Works from what exists at the time; remembers only when an unused image was first seen.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use apimachinery::meta::Quantity;
use k8s_cri::v1 as cri;
use nix::sys::statvfs::statvfs;
use tokio::time::Instant;

use crate::cri::RuntimeError;
use crate::pod::context::NodeContext;

const IMAGE_PERIOD: Duration = Duration::from_secs(300);

#[derive(Debug, thiserror::Error)]
enum RotateError {
    #[error("cannot {step} {path}")]
    Io { step: &'static str, path: PathBuf, source: std::io::Error },
    #[error("cannot reopen the log")]
    Reopen(#[source] RuntimeError),
}

/// Runs until the process ends.
pub async fn run(node: Arc<NodeContext>) {
    let config = node.state.config.clone();
    let mut rotate = tokio::time::interval(config.container_log_monitor_interval.0.max(Duration::from_secs(3)));
    let mut collect = tokio::time::interval(IMAGE_PERIOD);
    let mut unused: HashMap<String, Instant> = HashMap::new();
    loop {
        tokio::select! {
            _ = rotate.tick() => rotate_logs(&node).await,
            _ = collect.tick() => collect_images(&node, &mut unused).await,
        }
    }
}

async fn rotate_logs(node: &NodeContext) {
    let config = &node.state.config;
    let limit = config.container_log_max_size.parse::<Quantity>().map_or(10 << 20, |size| size.value());
    let limit = u64::try_from(limit).unwrap_or(u64::MAX);
    let keep = usize::try_from(config.container_log_max_files.max(2)).unwrap_or(5);
    for view in node.state.pods() {
        for container in view.observed.containers.iter().filter(|container| container.is_running()) {
            let path = Path::new(&container.log_path);
            if fs::metadata(path).map_or(0, |metadata| metadata.len()) <= limit {
                continue;
            }
            if let Err(error) = rotate_log(node, &container.id, path, keep).await {
                let error = apimachinery::process::error_chain(&error);
                tracing::warn!(path = %path.display(), error, "cannot rotate a container's log");
            }
        }
    }
}

/// Moves the log aside, has the runtime open a new one, and removes the oldest beyond `keep` files.
async fn rotate_log(node: &NodeContext, id: &str, path: &Path, keep: usize) -> Result<(), RotateError> {
    let failed = |step, path: &Path| {
        let path = path.to_owned();
        move |source| RotateError::Io { step, path, source }
    };
    let stamp = jiff::Timestamp::now().strftime("%Y%m%d-%H%M%S");
    let aside = PathBuf::from(format!("{}.{stamp}", path.display()));
    fs::rename(path, &aside).map_err(failed("move", path))?;
    if let Err(error) = node.state.runtime.reopen_log(id).await {
        // Nothing writes to a new file: the old one goes on.
        fs::rename(&aside, path).map_err(failed("move back", &aside))?;
        return Err(RotateError::Reopen(error));
    }
    for old in rotated(path).into_iter().rev().skip(keep - 1) {
        fs::remove_file(&old).map_err(failed("remove", &old))?;
    }
    Ok(())
}

/// Earlier parts of a log, the oldest first.
fn rotated(path: &Path) -> Vec<PathBuf> {
    let Some(name) = path.file_name().map(|name| format!("{}.", name.to_string_lossy())) else { return Vec::new() };
    let entries = path.parent().and_then(|directory| fs::read_dir(directory).ok());
    let files = entries.into_iter().flatten().flatten();
    let mut parts: Vec<PathBuf> = files
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(&name))
        .map(|entry| entry.path())
        .collect();
    parts.sort();
    parts
}

async fn collect_images(node: &NodeContext, unused: &mut HashMap<String, Instant>) {
    if let Err(error) = try_collect_images(node, unused).await {
        tracing::warn!(%error, "cannot look for images to remove");
    }
}

/// Images that no container uses and that are not pinned.
async fn unused_images(node: &NodeContext) -> Result<Vec<cri::Image>, RuntimeError> {
    let (images, containers) =
        tokio::try_join!(node.state.runtime.list_images(), node.state.runtime.list_containers(&[]))?;
    // Of images that are mounted as volumes containers say nothing.
    let pods = node.state.pods();
    let volumes = pods.iter().flat_map(|view| view.pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten()));
    let mounted = volumes.filter_map(|volume| volume.image.as_ref()?.reference.as_deref());
    let used: HashSet<&str> = containers
        .iter()
        .flat_map(|container| [Some(&container.image_ref), container.image.as_ref().map(|image| &image.image)])
        .flatten()
        .map(String::as_str)
        .chain(mounted)
        .collect();
    let unused = images.iter().filter(|image| !image.pinned && !is_used(image, &used)).cloned().collect();
    Ok(unused)
}

/// Removes all images that nothing uses, however young: the disk is full.
pub async fn remove_unused_images(node: &NodeContext) -> Result<(), RuntimeError> {
    for image in unused_images(node).await? {
        tracing::info!(image = image.id, size = image.size, "removing an unused image");
        if let Err(error) = node.state.runtime.remove_image(&image.id).await {
            tracing::warn!(image = image.id, %error, "cannot remove an unused image");
        }
    }
    Ok(())
}

async fn try_collect_images(node: &NodeContext, unused: &mut HashMap<String, Instant>) -> Result<(), RuntimeError> {
    let (runtime, config) = (&node.state.runtime, &node.state.config);
    let candidates = unused_images(node).await?;
    let now = Instant::now();
    unused.retain(|id, _| candidates.iter().any(|image| image.id == *id));
    for image in &candidates {
        unused.entry(image.id.clone()).or_insert(now);
    }
    let Some((path, used_percent)) = image_disk(&runtime.image_fs_info().await?) else { return Ok(()) };
    if used_percent < u64::from(config.image_gc_high_threshold_percent) {
        return Ok(());
    }
    let mut oldest: Vec<_> = candidates.iter().filter_map(|image| Some((*unused.get(&image.id)?, image))).collect();
    oldest.sort_by_key(|(since, _)| *since);
    for (since, image) in oldest {
        let enough = percent_used(&path).is_none_or(|used| used <= u64::from(config.image_gc_low_threshold_percent));
        if enough || now - since < config.image_minimum_gc_age.0 {
            break;
        }
        tracing::info!(image = image.id, size = image.size, "removing an unused image");
        match runtime.remove_image(&image.id).await {
            Ok(()) => drop(unused.remove(&image.id)),
            Err(error) => tracing::warn!(image = image.id, %error, "cannot remove an unused image"),
        }
    }
    Ok(())
}

/// Sandboxes use their image without a container; it is the one whose name says so.
fn is_used(image: &cri::Image, used: &HashSet<&str>) -> bool {
    let pause = |name: &String| name.split('/').next_back().is_some_and(|name| name.starts_with("pause:"));
    let names = || image.repo_tags.iter().chain(&image.repo_digests);
    used.contains(image.id.as_str()) || names().any(|name| used.contains(name.as_str()) || pause(name))
}

fn image_disk(filesystems: &[cri::FilesystemUsage]) -> Option<(PathBuf, u64)> {
    let path = PathBuf::from(&filesystems.first()?.fs_id.as_ref()?.mountpoint);
    let percent = percent_used(&path)?;
    Some((path, percent))
}

fn percent_used(path: &Path) -> Option<u64> {
    let disk = statvfs(path).ok()?;
    let total = disk.blocks().max(1);
    Some((total - disk.blocks_available().min(total)) * 100 / total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn used_images_are_kept() {
        let image =
            |id: &str, tag: &str| cri::Image { id: id.into(), repo_tags: vec![tag.into()], ..Default::default() };
        let used = HashSet::from(["sha256:1", "docker.io/library/b:1"]);
        for (image, want) in [
            (image("sha256:1", "a:1"), true),
            (image("sha256:2", "docker.io/library/b:1"), true),
            (image("sha256:3", "registry.k8s.io/pause:3.10"), true),
            (image("sha256:4", "c:1"), false),
        ] {
            assert_eq!(is_used(&image, &used), want, "{}", image.id);
        }
    }

    #[test]
    fn parts_of_a_log_are_found_in_order() {
        let directory = tempfile::tempdir().unwrap();
        for name in ["0.log", "0.log.20260102-000000", "0.log.20260101-000000", "1.log.x"] {
            fs::write(directory.path().join(name), "").unwrap();
        }
        let names: Vec<String> = rotated(&directory.path().join("0.log"))
            .iter()
            .map(|path| path.file_name().unwrap().to_string_lossy().into_owned())
            .collect();
        assert_eq!(names, ["0.log.20260101-000000", "0.log.20260102-000000"]);
    }
}
