//! PID 1 of a node. It starts in fresh mount, uts, ipc, pid and cgroup namespaces inside the node's network namespace,
//! gives the node files and cgroups of its own, and then supervises the node's programs for as long as the node lives.
//! When it ends, the kernel ends everything in the node and drops its mounts.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};

use super::cgroups::{self, V1_HIERARCHIES, Version};
use super::plan::{FABRIC_IP, Plan};
use super::supervisor;

/// Directories in which each node has its own content; kept below `root/` in the node's directory.
pub const PRIVATE_DIRS: [&str; 11] = [
    "/etc/cni",
    "/etc/containerd",
    "/etc/kubernetes",
    "/opt/cni",
    "/var/lib/cni",
    "/var/lib/containerd",
    "/var/lib/etcd",
    "/var/lib/kubelet",
    "/var/lib/kube-proxy",
    "/var/log/containers",
    "/var/log/pods",
];

/// Written when the node is ready to be entered.
pub const READY_FILE: &str = "ready";

pub fn main(plan: &Plan, node: &str) -> Result<()> {
    let dir = plan.node_dir(node);
    let root = dir.join("root");
    nix::unistd::sethostname(node).context("cannot set the host name")?;
    private_files(plan, node, &root)?;
    match plan.cgroups {
        Version::V1 => mount_cgroup_v1()?,
        Version::V2 => mount_cgroup_v2()?,
    }
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_SHARED | MsFlags::MS_REC, none).context("cannot make the mounts shared")?;
    network_settings()?;
    let units = supervisor::read_units(&dir)?;
    fs::write(dir.join(READY_FILE), b"").context("cannot report that the node is ready")?;
    supervisor::supervise(&dir, units)
}

fn private_files(plan: &Plan, node: &str, root: &Path) -> Result<()> {
    let none: Option<&str> = None;
    mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), Some("mode=755")).context("cannot mount /run")?;
    for dir in ["/run/netns", "/run/lock", "/run/flannel"] {
        fs::create_dir_all(dir).with_context(|| format!("cannot create {dir}"))?;
    }
    for dir in PRIVATE_DIRS {
        let source = root.join(&dir[1..]);
        fs::create_dir_all(&source).with_context(|| format!("cannot create {}", source.display()))?;
        mount(Some(&source), dir, none, MsFlags::MS_BIND, none).with_context(|| format!("cannot mount {dir}"))?;
    }
    fs::create_dir_all(root.join("etc")).context("cannot create the node's etc")?;
    let mut hosts = format!("127.0.0.1 localhost {node}\n");
    for other in plan.nodes() {
        hosts.push_str(&format!("{} {}\n", other.ip, other.name));
    }
    private_file(root, "/etc/hosts", &hosts)?;
    private_file(root, "/etc/resolv.conf", &format!("nameserver {FABRIC_IP}\n"))
}

/// Puts a file of the node's own over one of the host's, following a symbolic link to where the file really is.
fn private_file(root: &Path, path: &str, text: &str) -> Result<()> {
    let source = root.join(&path[1..]);
    fs::write(&source, text).with_context(|| format!("cannot write {}", source.display()))?;
    fs::set_permissions(&source, fs::Permissions::from_mode(0o644)).context("cannot set permissions")?;
    let target: PathBuf = match fs::read_link(path) {
        Ok(link) => Path::new("/etc").join(link),
        Err(_) => path.into(),
    };
    if !target.exists() {
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent).with_context(|| format!("cannot create {}", parent.display()))?;
        }
        fs::write(&target, b"").with_context(|| format!("cannot create {}", target.display()))?;
    }
    let none: Option<&str> = None;
    mount(Some(&source), &target, none, MsFlags::MS_BIND, none).with_context(|| format!("cannot mount {path}"))
}

/// Mounts every v1 hierarchy again: inside the cgroup namespace each shows this node's subtree as its root.
fn mount_cgroup_v1() -> Result<()> {
    let base = Path::new("/sys/fs/cgroup");
    mount(Some("tmpfs"), base, Some("tmpfs"), MsFlags::empty(), Some("mode=755"))
        .context("cannot mount /sys/fs/cgroup")?;
    for name in V1_HIERARCHIES {
        let dir = base.join(name);
        fs::create_dir(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        let options = if name == "systemd" { "none,name=systemd" } else { name };
        mount(Some("cgroup"), &dir, Some("cgroup"), MsFlags::empty(), Some(options))
            .with_context(|| format!("cannot mount the {name} cgroup hierarchy"))?;
    }
    Ok(())
}

fn mount_cgroup_v2() -> Result<()> {
    let base = Path::new("/sys/fs/cgroup");
    let none: Option<&str> = None;
    mount(Some("cgroup2"), base, Some("cgroup2"), MsFlags::empty(), none).context("cannot mount /sys/fs/cgroup")?;
    // A v2 group that has children with controllers may hold no processes itself: ours move to a leaf.
    let leaf = base.join("init");
    fs::create_dir_all(&leaf).context("cannot create the init cgroup")?;
    fs::write(leaf.join("cgroup.procs"), b"0").context("cannot join the init cgroup")?;
    cgroups::enable_controllers(base)
}

fn network_settings() -> Result<()> {
    let status = std::process::Command::new("ip")
        .args(["link", "set", "lo", "up"])
        .status()
        .context("cannot run ip (apt-get install iproute2)")?;
    anyhow::ensure!(status.success(), "cannot bring the loopback interface up");
    for (name, value) in [
        ("ipv4/ip_forward", "1"),
        ("bridge/bridge-nf-call-iptables", "1"),
        ("ipv4/conf/all/rp_filter", "0"),
        ("ipv4/conf/default/rp_filter", "0"),
    ] {
        let file = Path::new("/proc/sys/net").join(name);
        // Absent while br_netfilter is a module that is not loaded; kube-proxy's rules for bridged pods need it.
        if file.exists() {
            fs::write(&file, value).with_context(|| format!("cannot set {}", file.display()))?;
        }
    }
    Ok(())
}
