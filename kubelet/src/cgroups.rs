//! The cgroups of pods: `/kubepods[/burstable|/besteffort]/pod<uid>` in every hierarchy, with the pod's shares, quota
//! and memory limit. Works on cgroup v1 and v2 and needs no state: what exists in the file system is the truth.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::Pod;

use crate::pod::qos::{self, Class, Resources};

#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    #[error("cannot create cgroup {path}")]
    Create { path: PathBuf, source: io::Error },
    #[error("cannot write {value:?} to {path}")]
    Write { path: PathBuf, value: String, source: io::Error },
    #[error("cannot remove cgroup {path}")]
    Remove { path: PathBuf, source: io::Error },
    #[error("no cgroup hierarchy is mounted below {0}")]
    NotMounted(PathBuf),
    #[error("this node uses cgroup v1, which the configuration refuses (failCgroupV1)")]
    RefusedV1,
}

/// The node's hierarchies and where pods live in them.
#[derive(Clone, Debug)]
pub struct Cgroups {
    /// One directory on v2, one per controller on v1.
    hierarchies: Vec<PathBuf>,
    unified: bool,
    /// The pods' common parent, `/kubepods` below the configured root.
    base: String,
    quota_period_us: i64,
}

impl Cgroups {
    pub fn detect(mount: &Path, cgroup_root: &str, fail_v1: bool, quota_period_us: i64) -> Result<Self, CgroupError> {
        let unified = mount.join("cgroup.controllers").exists();
        let hierarchies = if unified { vec![mount.to_owned()] } else { v1_hierarchies(mount) };
        if hierarchies.is_empty() {
            return Err(CgroupError::NotMounted(mount.to_owned()));
        }
        if !unified && fail_v1 {
            return Err(CgroupError::RefusedV1);
        }
        let base = format!("{}/kubepods", cgroup_root.trim_end_matches('/'));
        Ok(Self { hierarchies, unified, base, quota_period_us })
    }

    pub fn is_v1(&self) -> bool {
        !self.unified
    }

    fn class_path(&self, class: Class) -> String {
        match class {
            Class::Guaranteed => self.base.clone(),
            Class::Burstable => format!("{}/burstable", self.base),
            Class::BestEffort => format!("{}/besteffort", self.base),
        }
    }

    /// The parents of all pods; `milli_cpu` is what pods may use together.
    pub fn ensure_tree(&self, milli_cpu: i64) -> Result<(), CgroupError> {
        for class in [Class::Guaranteed, Class::Burstable, Class::BestEffort] {
            let path = self.class_path(class);
            self.create(&path)?;
            let cpu_request = match class {
                Class::Guaranteed => Some(milli_cpu),
                Class::Burstable | Class::BestEffort => None,
            };
            self.limit(&path, &Resources { cpu_request, ..Resources::default() })?;
        }
        Ok(())
    }

    /// Creates (or updates) the pod's cgroup and returns its path as the runtime's `cgroup_parent`.
    pub fn ensure_pod(&self, pod: &Pod) -> Result<String, CgroupError> {
        let path = format!("{}/pod{}", self.class_path(qos::class(pod)), crate::pod::runtime_uid(pod));
        self.create(&path)?;
        self.limit(&path, &qos::pod_resources(pod))?;
        Ok(path)
    }

    /// The uids of all pods that have a cgroup.
    pub fn pods(&self) -> BTreeSet<String> {
        let mut uids = BTreeSet::new();
        for hierarchy in &self.hierarchies {
            for class in [Class::Guaranteed, Class::Burstable, Class::BestEffort] {
                let entries = fs::read_dir(below(hierarchy, &self.class_path(class)));
                let names = entries.into_iter().flatten().flatten().map(|entry| entry.file_name());
                uids.extend(names.filter_map(|name| Some(name.to_str()?.strip_prefix("pod")?.to_owned())));
            }
        }
        uids
    }

    /// How many processes and threads the pod has.
    pub fn processes(&self, uid: &str) -> i64 {
        let classes = [Class::Guaranteed, Class::Burstable, Class::BestEffort];
        let mut files = self.hierarchies.iter().flat_map(|hierarchy| {
            classes.map(|class| below(hierarchy, &format!("{}/pod{uid}/pids.current", self.class_path(class))))
        });
        files.find_map(|file| fs::read_to_string(file).ok()?.trim().parse().ok()).unwrap_or(0)
    }

    /// Removes the pod's cgroup wherever it is. Fails while processes are left in it.
    pub fn remove_pod(&self, uid: &str) -> Result<(), CgroupError> {
        let mut first_error = None;
        for hierarchy in &self.hierarchies {
            for class in [Class::Guaranteed, Class::Burstable, Class::BestEffort] {
                let path = below(hierarchy, &format!("{}/pod{uid}", self.class_path(class)));
                if let Err(source) = remove_tree(&path) {
                    first_error.get_or_insert(CgroupError::Remove { path, source });
                }
            }
        }
        first_error.map_or(Ok(()), Err)
    }

    fn create(&self, path: &str) -> Result<(), CgroupError> {
        for hierarchy in &self.hierarchies {
            let mut directory = hierarchy.clone();
            for part in path.split('/').filter(|part| !part.is_empty()) {
                let parent = directory.clone();
                directory.push(part);
                if directory.exists() {
                    continue;
                }
                fs::create_dir(&directory).map_err(|source| CgroupError::Create { path: directory.clone(), source })?;
                if self.unified {
                    self.delegate(&parent)?;
                } else {
                    inherit_cpuset(&parent, &directory)?;
                }
            }
        }
        Ok(())
    }

    /// v2: lets children of `parent` have controllers. Those that the kernel lacks are skipped.
    fn delegate(&self, parent: &Path) -> Result<(), CgroupError> {
        let available = fs::read_to_string(parent.join("cgroup.controllers")).unwrap_or_default();
        for controller in available.split_whitespace() {
            write(&parent.join("cgroup.subtree_control"), &format!("+{controller}"))?;
        }
        Ok(())
    }

    fn limit(&self, path: &str, resources: &Resources) -> Result<(), CgroupError> {
        let shares = resources.cpu_shares();
        let quota = if self.quota_period_us > 0 { resources.cpu_quota(self.quota_period_us) } else { None };
        if self.unified {
            let directory = below(&self.hierarchies[0], path);
            let weight = 1 + (shares.saturating_sub(2) * 9999) / 262_142;
            write_if_there(&directory.join("cpu.weight"), &weight.to_string())?;
            let quota = quota.map_or_else(|| "max".to_owned(), |quota| quota.to_string());
            write_if_there(&directory.join("cpu.max"), &format!("{quota} {}", self.quota_period_us.max(1000)))?;
            let limit = resources.memory_limit.map_or_else(|| "max".to_owned(), |limit| limit.to_string());
            write_if_there(&directory.join("memory.max"), &limit)?;
            return Ok(());
        }
        for hierarchy in &self.hierarchies {
            let directory = below(hierarchy, path);
            write_if_there(&directory.join("cpu.shares"), &shares.to_string())?;
            if quota.is_some() {
                write_if_there(&directory.join("cpu.cfs_period_us"), &self.quota_period_us.to_string())?;
            }
            // -1 is no limit: one that a resize took away must not stay.
            write_if_there(&directory.join("cpu.cfs_quota_us"), &quota.unwrap_or(-1).to_string())?;
            let limit = resources.memory_limit.unwrap_or(-1).to_string();
            write_if_there(&directory.join("memory.limit_in_bytes"), &limit)?;
        }
        Ok(())
    }
}

/// Directories below the mount point that are v1 hierarchies; a second name of the same one is left out.
fn v1_hierarchies(mount: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(mount).into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> = entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        // A v2 mount beside v1 (hybrid) has no use here: it holds no controllers.
        .filter(|path| path.join("cgroup.procs").exists() && !path.join("cgroup.controllers").exists())
        .collect();
    found.sort();
    found
}

fn below(hierarchy: &Path, path: &str) -> PathBuf {
    hierarchy.join(path.trim_start_matches('/'))
}

/// A new v1 cpuset is empty, and nothing can be put into it until it has CPUs and memory nodes.
fn inherit_cpuset(parent: &Path, child: &Path) -> Result<(), CgroupError> {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        if let Ok(value) = fs::read_to_string(parent.join(file)) {
            write(&child.join(file), value.trim())?;
        }
    }
    Ok(())
}

fn write(path: &Path, value: &str) -> Result<(), CgroupError> {
    fs::write(path, value).map_err(|source| CgroupError::Write {
        path: path.to_owned(),
        value: value.to_owned(),
        source,
    })
}

fn write_if_there(path: &Path, value: &str) -> Result<(), CgroupError> {
    if path.exists() { write(path, value) } else { Ok(()) }
}

/// Removes the deepest directories first; a cgroup's files go with its directory.
fn remove_tree(path: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for entry in entries.flatten() {
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    match fs::remove_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fake_v1() -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for name in ["cpu", "memory", "cpuset"] {
            fs::create_dir(root.path().join(name)).unwrap();
            fs::write(root.path().join(name).join("cgroup.procs"), "").unwrap();
        }
        fs::write(root.path().join("cpuset/cpuset.cpus"), "0-1\n").unwrap();
        root
    }

    #[test]
    fn limits_come_and_go() {
        let root = fake_v1();
        let cgroups = Cgroups::detect(root.path(), "", false, 100_000).unwrap();
        cgroups.create("/kubepods").unwrap();
        let files = [
            "cpu/kubepods/cpu.cfs_period_us",
            "cpu/kubepods/cpu.cfs_quota_us",
            "memory/kubepods/memory.limit_in_bytes",
        ];
        let files = files.map(|file| root.path().join(file));
        files.iter().for_each(|file| fs::write(file, "").unwrap());
        let limited = Resources { cpu_limit: Some(35), memory_limit: Some(4096), ..Resources::default() };
        for (resources, want) in [(limited, ["100000", "3500", "4096"]), (Resources::default(), ["100000", "-1", "-1"])]
        {
            cgroups.limit("/kubepods", &resources).unwrap();
            assert_eq!(files.each_ref().map(|file| fs::read_to_string(file).unwrap()), want);
        }
    }

    #[test]
    fn a_pods_cgroup_comes_and_goes() {
        let root = fake_v1();
        assert!(matches!(Cgroups::detect(root.path(), "/", true, 100_000), Err(CgroupError::RefusedV1)));
        let cgroups = Cgroups::detect(root.path(), "", false, 100_000).unwrap();
        cgroups.ensure_tree(2000).unwrap();
        let pod: Pod = serde_json::from_value(
            serde_json::json!({"metadata": {"uid": "u1"}, "spec": {"containers": [{"name": "a"}]}}),
        )
        .unwrap();
        assert_eq!(cgroups.ensure_pod(&pod).unwrap(), "/kubepods/besteffort/podu1");
        assert_eq!(fs::read_to_string(root.path().join("cpuset/kubepods/cpuset.cpus")).unwrap(), "0-1");
        assert_eq!(cgroups.pods().into_iter().collect::<Vec<_>>(), ["u1"]);
        // Unlike in a real hierarchy, files keep this directory from being removed.
        fs::remove_file(root.path().join("cpuset/kubepods/besteffort/podu1/cpuset.cpus")).unwrap();
        cgroups.remove_pod("u1").unwrap();
        assert!(cgroups.pods().is_empty());
        cgroups.remove_pod("u1").unwrap();
    }
}
