//! The network between the nodes: a namespace with a bridge, and a veth pair to each node's namespace. It has no
//! uplink, and an unreachable default route so that look-ups of outside names fail at once instead of hanging.

use std::process::Command;

use anyhow::{Context, Result, bail};

use super::FABRIC;
use super::plan::{FABRIC_IP, Plan};

const BRIDGE: &str = "br0";

pub fn create(plan: &Plan) -> Result<()> {
    let fabric = plan.netns(FABRIC);
    ip(&["netns", "add", &fabric])?;
    ip(&["-n", &fabric, "link", "set", "lo", "up"])?;
    ip(&["-n", &fabric, "link", "add", BRIDGE, "type", "bridge"])?;
    ip(&["-n", &fabric, "addr", "add", &format!("{FABRIC_IP}/24"), "dev", BRIDGE])?;
    ip(&["-n", &fabric, "link", "set", BRIDGE, "up"])?;
    ip(&["-n", &fabric, "route", "add", "unreachable", "default"])?;
    ip(&["netns", "exec", &fabric, "sysctl", "-qw", "net.ipv4.ip_forward=1"])?;
    for node in plan.nodes() {
        let netns = plan.netns(&node.name);
        ip(&["netns", "add", &netns])?;
        ip(&["-n", &netns, "link", "add", "eth0", "type", "veth", "peer", "name", &node.name, "netns", &fabric])?;
        ip(&["-n", &fabric, "link", "set", "dev", &node.name, "master", BRIDGE, "up"])?;
        ip(&["-n", &netns, "addr", "add", &format!("{}/24", node.ip), "dev", "eth0"])?;
        ip(&["-n", &netns, "link", "set", "eth0", "up"])?;
        // A ClusterIP connection made on the node itself needs a route before it is translated.
        ip(&["-n", &netns, "route", "add", "default", "via", &FABRIC_IP.to_string()])?;
    }
    Ok(())
}

/// The network namespaces of a cluster that exist, by name.
pub fn namespaces(cluster: &str) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir("/run/netns") else { return Vec::new() };
    let mut names: Vec<String> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.strip_prefix(cluster).and_then(|rest| rest.strip_prefix('-')).is_some_and(is_machine))
        .collect();
    names.sort();
    names
}

fn is_machine(name: &str) -> bool {
    let worker = name.strip_prefix("node").is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()));
    worker || name == FABRIC || name == super::plan::MASTER
}

pub fn delete(netns: &str) -> Result<()> {
    ip(&["netns", "del", netns])
}

fn ip(args: &[&str]) -> Result<()> {
    let output = Command::new("ip").args(args).output().context("cannot run ip (apt-get install iproute2)")?;
    if !output.status.success() {
        bail!("ip {}: {}", args.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_own_machines_are_recognised() {
        for (name, own) in
            [("master", true), ("node12", true), ("fabric", true), ("node", false), ("other-node1", false)]
        {
            assert_eq!(is_machine(name), own, "{name}");
        }
    }
}
