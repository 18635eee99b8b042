//! One cluster on one machine: a fabric (a network namespace with a bridge) and nodes (network, mount, pid, ipc, uts
//! and cgroup namespaces), each with a supervisor as its PID 1 that runs the node's programs.
//!
//! The host's own network, firewall, containerd and files stay untouched; all that a cluster makes carries its name,
//! so that it can be recognised and removed even when the process that made it is gone.

pub mod cgroups;
pub mod dns_query;
pub mod down;
mod fabric;
pub mod forward;
mod kubeconfig;
pub mod node_init;
pub mod pki;
pub mod plan;
pub mod supervisor;
mod units;
pub mod up;

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};

use plan::Plan;

/// The name under which the network between the nodes can be entered.
pub const FABRIC: &str = "fabric";

/// Replaces this process by `argv`, run inside the node (or inside the fabric's network).
pub fn exec(plan: &Plan, node: &str, argv: &[String]) -> Result<ExitCode> {
    let error = in_node(plan, node, argv)?.exec();
    Err(error).with_context(|| format!("cannot run {} in {node}", argv.join(" ")))
}

/// A command that runs `argv` inside the node.
pub fn in_node<S: AsRef<std::ffi::OsStr>>(plan: &Plan, node: &str, argv: &[S]) -> Result<Command> {
    if node == FABRIC {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &plan.netns(FABRIC)]).args(argv);
        return Ok(command);
    }
    let pid = init_pid(plan, node)?.with_context(|| format!("node {node} of cluster {} is not running", plan.name))?;
    // Entering the cgroup namespace does not move a process into the node's cgroup: it has to join first.
    let join = cgroups::join_script(&plan.name, node);
    let mut command = Command::new("sh");
    command.arg("-c").arg(format!("{join} exec nsenter -t {pid} -m -u -i -n -p -C -- \"$@\"")).arg("sh").args(argv);
    Ok(command)
}

/// The host's pid of the node's PID 1, if it lives.
pub fn init_pid(plan: &Plan, node: &str) -> Result<Option<i32>> {
    if !plan.nodes().iter().any(|n| n.name == node) {
        bail!("cluster {} has no node {node}; it has {}", plan.name, plan.node_names().join(", "));
    }
    let file = plan.node_dir(node).join("init.pid");
    let Ok(text) = std::fs::read_to_string(&file) else { return Ok(None) };
    let pid: i32 = text.trim().parse().with_context(|| format!("{} holds no pid", file.display()))?;
    Ok(is_node_init(pid, &plan.data_dir, node).then_some(pid))
}

/// Whether the process is the node's supervisor and not another that got the same pid later.
fn is_node_init(pid: i32, data_dir: &Path, node: &str) -> bool {
    let Ok(cmdline) = std::fs::read(format!("/proc/{pid}/cmdline")) else { return false };
    let args: Vec<&[u8]> = cmdline.split(|b| *b == 0).collect();
    args.len() >= 4
        && args[1] == b"node-init"
        && args[2] == data_dir.as_os_str().as_encoded_bytes()
        && args[3] == node.as_bytes()
}
