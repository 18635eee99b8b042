//! The only place that changes the kernel: runs nft, iptables and conntrack, writes sysctls, and reads which objects
//! and addresses exist. It decides nothing.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::{Output, Stdio};
use std::time::Duration;

use serde::Deserialize;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use crate::conntrack::Connection;
use crate::nftables::{Installed, TABLE};

/// Longer than any healthy run: a hanging tool must not hang the proxy.
const LIMIT: Duration = Duration::from_secs(60);

#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    #[error("cannot run {program}; is it installed?")]
    Spawn { program: &'static str, source: std::io::Error },
    #[error("{program} did not end within {seconds} s")]
    Hanging { program: &'static str, seconds: u64 },
    #[error("{program} failed: {message}")]
    Failed { program: &'static str, message: String },
    #[error("{program} listed what cannot be read")]
    Listing { program: &'static str, source: serde_json::Error },
    #[error("cannot write {path}")]
    Sysctl { path: PathBuf, source: std::io::Error },
    #[error("cannot list the node's addresses")]
    Addresses(#[source] nix::Error),
}

async fn run(program: &'static str, arguments: &[&str], input: &str) -> Result<Output, KernelError> {
    let spawn = |source| KernelError::Spawn { program, source };
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
    let hanging = |_| KernelError::Hanging { program, seconds: LIMIT.as_secs() };
    tokio::time::timeout(LIMIT, work).await.map_err(hanging)?
}

async fn must(program: &'static str, arguments: &[&str], input: &str) -> Result<String, KernelError> {
    let output = run(program, arguments, input).await?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    const LONGEST: usize = 2000;
    let message = String::from_utf8_lossy(&output.stderr).trim().chars().take(LONGEST).collect();
    Err(KernelError::Failed { program, message })
}

/// Applies a script for `nft -f -`: all of it or nothing.
pub async fn nft(script: &str) -> Result<(), KernelError> {
    must("nft", &["-f", "-"], script).await.map(|_| ())
}

/// Removes our table if there is one.
pub async fn nft_remove() -> Result<(), KernelError> {
    nft(&format!("add table ip {TABLE}\ndelete table ip {TABLE}\n")).await
}

/// Whether our table is still there with the chain that everything starts from.
pub async fn nft_present() -> Result<bool, KernelError> {
    Ok(run("nft", &["list", "chain", "ip", TABLE, "services"], "").await?.status.success())
}

/// The objects of our table; `None` when there is no such table.
pub async fn nft_installed() -> Result<Option<Installed>, KernelError> {
    #[derive(Deserialize)]
    struct Listing {
        nftables: Vec<Object>,
    }
    #[derive(Deserialize)]
    struct Object {
        chain: Option<Named>,
        map: Option<Named>,
        set: Option<Named>,
    }
    #[derive(Deserialize)]
    struct Named {
        name: String,
    }
    let output = run("nft", &["-j", "-t", "list", "table", "ip", TABLE], "").await?;
    if !output.status.success() {
        return Ok(None);
    }
    let listing: Listing =
        serde_json::from_slice(&output.stdout).map_err(|source| KernelError::Listing { program: "nft", source })?;
    let mut installed = Installed::default();
    for object in listing.nftables {
        installed.chains.extend(object.chain.map(|named| named.name));
        installed.maps.extend(object.map.map(|named| named.name));
        installed.sets.extend(object.set.map(|named| named.name));
    }
    Ok(Some(installed))
}

/// Applies a script for `iptables-restore --noflush`: each table of it whole or not at all.
pub async fn iptables_restore(script: &str) -> Result<(), KernelError> {
    must("iptables-restore", &["--noflush", "--counters", "-w", "5"], script).await.map(|_| ())
}

/// The chains of one table.
pub async fn iptables_chains(table: &str) -> Result<BTreeSet<String>, KernelError> {
    let text = must("iptables-save", &["-t", table], "").await?;
    let name = |line: &str| Some(line.strip_prefix(':')?.split(' ').next()?.to_owned());
    Ok(text.lines().filter_map(name).collect())
}

/// Whether the chain exists and, if `target` is given, has a rule that leads there.
pub async fn iptables_leads(table: &str, chain: &str, target: Option<&str>) -> Result<bool, KernelError> {
    let output = run("iptables", &["-w", "5", "-t", table, "-S", chain], "").await?;
    let rules = String::from_utf8_lossy(&output.stdout);
    let leads = target.is_none_or(|target| rules.lines().any(|rule| rule.ends_with(&format!("-j {target}"))));
    Ok(output.status.success() && leads)
}

/// Puts a rule in front of a chain's others unless it is in the chain already.
pub async fn iptables_ensure(table: &str, chain: &str, rule: &[&str]) -> Result<(), KernelError> {
    let arguments = |action| [&["-w", "5", "-t", table, action, chain], rule].concat();
    if run("iptables", &arguments("-C"), "").await?.status.success() {
        return Ok(());
    }
    must("iptables", &arguments("-I"), "").await.map(|_| ())
}

/// Takes a rule out of a chain, as often as it is there.
pub async fn iptables_remove(table: &str, chain: &str, rule: &[&str]) -> Result<(), KernelError> {
    let arguments = [&["-w", "5", "-t", table, "-D", chain], rule].concat();
    // Bounded, in case somebody else keeps putting it back.
    for _ in 0..16 {
        if !run("iptables", &arguments, "").await?.status.success() {
            break;
        }
    }
    Ok(())
}

/// All tracked UDP connections.
pub async fn udp_connections() -> Result<Vec<Connection>, KernelError> {
    let text = must("conntrack", &["-L", "-p", "udp"], "").await?;
    Ok(text.lines().filter_map(Connection::parse).collect())
}

/// Forgets tracked connections that match; that there are none is fine.
pub async fn forget_connections(filter: &[String]) -> Result<(), KernelError> {
    let arguments: Vec<&str> = std::iter::once("-D").chain(filter.iter().map(String::as_str)).collect();
    match must("conntrack", &arguments, "").await {
        Err(KernelError::Failed { message, .. }) if message.contains("0 flow entries have been deleted") => Ok(()),
        result => result.map(|_| ()),
    }
}

/// Writes a kernel parameter, given as a path below /proc/sys, unless it has the value.
pub fn sysctl(name: &str, value: &str) -> Result<(), KernelError> {
    let path = PathBuf::from("/proc/sys").join(name);
    if std::fs::read_to_string(&path).is_ok_and(|current| current.trim() == value) {
        return Ok(());
    }
    std::fs::write(&path, value).map_err(|source| KernelError::Sysctl { path, source })
}

pub fn sysctl_number(name: &str) -> Option<u64> {
    std::fs::read_to_string(PathBuf::from("/proc/sys").join(name)).ok()?.trim().parse().ok()
}

/// The IPv4 addresses of this node's interfaces.
pub fn node_addresses() -> Result<BTreeSet<Ipv4Addr>, KernelError> {
    let interfaces = nix::ifaddrs::getifaddrs().map_err(KernelError::Addresses)?;
    Ok(interfaces.filter_map(|interface| Some(interface.address?.as_sockaddr_in()?.ip())).collect())
}
