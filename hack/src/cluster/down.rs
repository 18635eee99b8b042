//! Takes a cluster down and leaves nothing behind. It works from what exists — the cluster's cgroups, namespaces and
//! directories carry its name — and so cleans up after a run that died half-way, too.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{cgroups, fabric};

const LIMIT: Duration = Duration::from_secs(20);

/// Removes the cluster `name`. Removing one that does not exist is fine.
pub fn down(root: &Path, name: &str, keep_data: bool) -> Result<()> {
    let dir = root.join(name);
    if super::up::is_up(&dir) || leftovers(name) {
        println!("taking cluster {name} down");
    }
    end_processes(name)?;
    for netns in fabric::namespaces(name) {
        fabric::delete(&netns)?;
    }
    unmount_below(&dir)?;
    remove_cgroups(name)?;
    if !keep_data && dir.exists() {
        fs::remove_dir_all(&dir).with_context(|| format!("cannot remove {}", dir.display()))?;
    }
    if !keep_data {
        super::up::remove_host_dirs(root)?;
    }
    Ok(())
}

/// Whether anything of the cluster is on the machine apart from its data.
pub fn leftovers(name: &str) -> bool {
    !fabric::namespaces(name).is_empty() || !cgroups::processes(name).is_empty()
}

/// Kills what is in the cluster's cgroups until nothing is left; a process may fork while we look.
fn end_processes(name: &str) -> Result<()> {
    let deadline = Instant::now() + LIMIT;
    loop {
        let pids = cgroups::processes(name);
        if pids.is_empty() {
            return Ok(());
        }
        if Instant::now() >= deadline {
            bail!("processes of cluster {name} do not end: {pids:?}");
        }
        for pid in pids {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        pause();
    }
}

/// The nodes' mounts go with their namespaces; these are ones that a dead run left in the host's namespace.
fn unmount_below(dir: &Path) -> Result<()> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("cannot read the mounts")?;
    let mut points: Vec<&str> = mounts
        .lines()
        .filter_map(|line| line.split(' ').nth(1))
        .filter(|point| Path::new(point).starts_with(dir))
        .collect();
    points.sort_unstable_by_key(|point| std::cmp::Reverse(point.len()));
    for point in points {
        nix::mount::umount2(point, nix::mount::MntFlags::MNT_DETACH)
            .with_context(|| format!("cannot unmount {point}"))?;
    }
    Ok(())
}

fn remove_cgroups(name: &str) -> Result<()> {
    let deadline = Instant::now() + LIMIT;
    loop {
        let left = cgroups::remove(name);
        if left.is_empty() {
            return Ok(());
        }
        if Instant::now() >= deadline {
            bail!("cannot remove cgroups: {left:?}");
        }
        pause();
    }
}

fn pause() {
    // Not a worker thread of any runtime: nothing else happens here.
    std::thread::park_timeout(Duration::from_millis(50));
}
