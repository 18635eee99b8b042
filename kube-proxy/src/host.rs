//! What is changed and read on the node beside nftables and connection tracking: runs the iptables tools, writes
//! kernel parameters, and reads which addresses exist. It decides nothing.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::{Output, Stdio};
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use crate::model::Family;

/// Longer than any healthy run: a hanging tool must not hang the proxy.
const LIMIT: Duration = Duration::from_secs(60);

#[derive(Debug, thiserror::Error)]
pub enum HostError {
    #[error("cannot run {program}; is it installed?")]
    Spawn { program: &'static str, source: std::io::Error },
    #[error("{program} did not end within {seconds} s")]
    Hanging { program: &'static str, seconds: u64 },
    #[error("{program} failed: {message}")]
    Failed { program: &'static str, message: String },
    #[error("cannot write {path}")]
    Sysctl { path: PathBuf, source: std::io::Error },
    #[error("cannot list the node's addresses")]
    Addresses(#[source] nix::Error),
}

async fn run(program: &'static str, arguments: &[&str], input: &str) -> Result<Output, HostError> {
    let spawn = |source| HostError::Spawn { program, source };
    let work = async {
        let mut child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(spawn)?;
        let stdin = child.stdin.take();
        let write = async {
            if let Some(mut stdin) = stdin {
                // A tool that ends early says why on its standard error; that is the message to report.
                let _ = stdin.write_all(input.as_bytes()).await;
            }
        };
        let ((), output) = tokio::join!(write, child.wait_with_output());
        output.map_err(spawn)
    };
    let hanging = |_| HostError::Hanging { program, seconds: LIMIT.as_secs() };
    tokio::time::timeout(LIMIT, work).await.map_err(hanging)?
}

async fn must(program: &'static str, arguments: &[&str], input: &str) -> Result<String, HostError> {
    let output = run(program, arguments, input).await?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    const LONGEST: usize = 2000;
    let message = String::from_utf8_lossy(&output.stderr).trim().chars().take(LONGEST).collect();
    Err(HostError::Failed { program, message })
}

/// A tool of iptables for one address family.
fn tool(family: Family, four: &'static str, six: &'static str) -> &'static str {
    match family {
        Family::Ipv4 => four,
        Family::Ipv6 => six,
    }
}

/// Applies a script for `iptables-restore --noflush`: each table of it whole or not at all.
pub async fn iptables_restore(family: Family, script: &str) -> Result<(), HostError> {
    let program = tool(family, "iptables-restore", "ip6tables-restore");
    must(program, &["--noflush", "--counters", "-w", "5"], script).await.map(|_| ())
}

/// The chains of one table.
pub async fn iptables_chains(family: Family, table: &str) -> Result<BTreeSet<String>, HostError> {
    let text = must(tool(family, "iptables-save", "ip6tables-save"), &["-t", table], "").await?;
    let name = |line: &str| Some(line.strip_prefix(':')?.split(' ').next()?.to_owned());
    Ok(text.lines().filter_map(name).collect())
}

/// Whether the chain exists and, if `target` is given, has a rule that leads there.
pub async fn iptables_leads(family: Family, table: &str, chain: &str, target: Option<&str>) -> Result<bool, HostError> {
    let output = run(tool(family, "iptables", "ip6tables"), &["-w", "5", "-t", table, "-S", chain], "").await?;
    let rules = String::from_utf8_lossy(&output.stdout);
    let leads = target.is_none_or(|target| rules.lines().any(|rule| rule.ends_with(&format!("-j {target}"))));
    Ok(output.status.success() && leads)
}

/// Puts a rule in front of a chain's others unless it is in the chain already.
pub async fn iptables_ensure(family: Family, table: &str, chain: &str, rule: &[&str]) -> Result<(), HostError> {
    let program = tool(family, "iptables", "ip6tables");
    let arguments = |action| [&["-w", "5", "-t", table, action, chain], rule].concat();
    if run(program, &arguments("-C"), "").await?.status.success() {
        return Ok(());
    }
    must(program, &arguments("-I"), "").await.map(|_| ())
}

/// Takes a rule out of a chain, as often as it is there.
pub async fn iptables_remove(family: Family, table: &str, chain: &str, rule: &[&str]) -> Result<(), HostError> {
    let arguments = [&["-w", "5", "-t", table, "-D", chain], rule].concat();
    // Bounded, in case somebody else keeps putting it back.
    for _ in 0..16 {
        if !run(tool(family, "iptables", "ip6tables"), &arguments, "").await?.status.success() {
            break;
        }
    }
    Ok(())
}

/// Writes a kernel parameter, given as a path below /proc/sys, unless it has the value.
pub fn sysctl(name: &str, value: &str) -> Result<(), HostError> {
    let path = PathBuf::from("/proc/sys").join(name);
    if std::fs::read_to_string(&path).is_ok_and(|current| current.trim() == value) {
        return Ok(());
    }
    std::fs::write(&path, value).map_err(|source| HostError::Sysctl { path, source })
}

pub fn sysctl_number(name: &str) -> Option<u64> {
    std::fs::read_to_string(PathBuf::from("/proc/sys").join(name)).ok()?.trim().parse().ok()
}

/// The addresses of this node's interfaces.
pub fn node_addresses() -> Result<Vec<IpAddr>, HostError> {
    let interfaces = nix::ifaddrs::getifaddrs().map_err(HostError::Addresses)?;
    let address = |interface: nix::ifaddrs::InterfaceAddress| {
        let address = interface.address?;
        let four = address.as_sockaddr_in().map(|four| IpAddr::V4(four.ip()));
        four.or_else(|| address.as_sockaddr_in6().map(|six| IpAddr::V6(six.ip())))
    };
    Ok(interfaces.filter_map(address).collect())
}

/// The address families that this node speaks.
pub fn families() -> Vec<Family> {
    let six = std::path::Path::new("/proc/net/if_inet6").exists();
    Family::ALL.into_iter().filter(|family| *family == Family::Ipv4 || six).collect()
}
