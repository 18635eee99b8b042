//! A cgroup per node, `ketch/<cluster>/<node>`, in every hierarchy. The node sees its own as the root, so that three
//! kubelets on one machine do not share one `kubepods`; and all processes of a cluster can be found from it.
//!
//! Both cgroup versions are served: v1 has a directory tree per controller, v2 a single tree.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

const MOUNT: &str = "/sys/fs/cgroup";

/// The v1 hierarchies that container runtimes use. `systemd` is a named hierarchy without a controller.
pub const V1_HIERARCHIES: [&str; 9] =
    ["cpu", "cpuacct", "cpuset", "memory", "devices", "freezer", "blkio", "pids", "systemd"];

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Version {
    V1,
    V2,
}

/// What this machine has. Only right outside of nodes, where /sys is the machine's own.
pub fn version() -> Version {
    if Path::new(MOUNT).join("cgroup.controllers").exists() { Version::V2 } else { Version::V1 }
}

/// The root directories of the hierarchies that exist here.
fn roots() -> Vec<PathBuf> {
    match version() {
        Version::V2 => vec![MOUNT.into()],
        Version::V1 => {
            V1_HIERARCHIES.iter().map(|name| Path::new(MOUNT).join(name)).filter(|path| path.is_dir()).collect()
        }
    }
}

fn group(root: &Path, cluster: &str, node: &str) -> PathBuf {
    root.join("ketch").join(cluster).join(node)
}

/// Makes the node's cgroups.
pub fn create(cluster: &str, node: &str) -> Result<()> {
    for root in roots() {
        let leaf = group(&root, cluster, node);
        fs::create_dir_all(&leaf).with_context(|| format!("cannot make the cgroup {}", leaf.display()))?;
        let levels = [root.join("ketch"), root.join("ketch").join(cluster), leaf];
        if version() == Version::V2 {
            for parent in [&root, &levels[0], &levels[1]] {
                enable_controllers(parent)?;
            }
        } else if root.ends_with("cpuset") {
            // A new v1 cpuset is empty, and no process may join it until it has CPUs and memory nodes.
            for level in &levels {
                for file in ["cpuset.cpus", "cpuset.mems"] {
                    let value = fs::read(root.join(file)).with_context(|| format!("cannot read the root's {file}"))?;
                    fs::write(level.join(file), value)
                        .with_context(|| format!("cannot set {file} of {}", level.display()))?;
                }
            }
        }
    }
    Ok(())
}

/// Lets children of a v2 group use every controller that the group has.
pub fn enable_controllers(dir: &Path) -> Result<()> {
    let file = dir.join("cgroup.controllers");
    let available = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
    let wanted: Vec<String> = available.split_whitespace().map(|c| format!("+{c}")).collect();
    fs::write(dir.join("cgroup.subtree_control"), wanted.join(" "))
        .with_context(|| format!("cannot enable controllers below {}", dir.display()))
}

/// A shell fragment that moves the shell into the node's cgroups.
pub fn join_script(cluster: &str, node: &str) -> String {
    roots()
        .iter()
        .map(|root| {
            let group = group(root, cluster, node);
            // Inside a running v2 node the group itself may not hold processes: its supervisor made a leaf for them.
            let leaf = group.join("init");
            let target = if leaf.is_dir() { leaf } else { group };
            format!("echo $$ > '{}/cgroup.procs';", target.display())
        })
        .collect()
}

/// Every process in the cluster's cgroups, as pids of the host.
pub fn processes(cluster: &str) -> Vec<i32> {
    processes_below(|root| root.join("ketch").join(cluster))
}

/// Every process in one node's cgroups, those of its pods too, as pids of the host.
pub fn node_processes(cluster: &str, node: &str) -> Vec<i32> {
    processes_below(|root| group(root, cluster, node))
}

fn processes_below(top: impl Fn(&Path) -> PathBuf) -> Vec<i32> {
    let mut pids = Vec::new();
    for root in roots() {
        for dir in tree(&top(&root)) {
            let text = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
            pids.extend(text.split_whitespace().filter_map(|pid| pid.parse::<i32>().ok()).filter(|pid| *pid > 0));
        }
    }
    pids.sort_unstable();
    pids.dedup();
    pids
}

/// Removes the cluster's cgroups; they must be empty. Answers what could not be removed.
pub fn remove(cluster: &str) -> Vec<PathBuf> {
    let mut left = Vec::new();
    for root in roots() {
        let top = root.join("ketch").join(cluster);
        for dir in tree(&top).into_iter().rev() {
            if fs::remove_dir(&dir).is_err() && dir.exists() {
                left.push(dir);
            }
        }
        // Shared by all clusters: goes when the last one goes.
        let _ = fs::remove_dir(root.join("ketch"));
    }
    left
}

/// A directory and all below it, parents before children.
fn tree(top: &Path) -> Vec<PathBuf> {
    let mut dirs = if top.is_dir() { vec![top.to_owned()] } else { Vec::new() };
    let mut next = 0;
    while next < dirs.len() {
        if let Ok(entries) = fs::read_dir(&dirs[next]) {
            dirs.extend(entries.flatten().map(|e| e.path()).filter(|p| p.is_dir()));
        }
        next += 1;
    }
    dirs
}
