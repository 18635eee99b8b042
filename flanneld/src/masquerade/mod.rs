//! Packet filter rules beside the routes: traffic that leaves the pod network gets the node's address, and traffic of
//! the pod network is accepted in forwarding. Written as whole scripts that are applied in one transaction and can be
//! applied again at any time; other programs' rules are never touched.

use std::process::Stdio;

use ipnet::Ipv4Net;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

/// kube-proxy's mark on packets that it masquerades itself.
const KUBE_PROXY_MARK: &str = "0x4000/0x4000";
const MULTICAST: &str = "224.0.0.0/4";

#[derive(Debug, thiserror::Error)]
pub enum FirewallError {
    #[error("cannot run {program}; is it installed?")]
    Spawn { program: &'static str, source: std::io::Error },
    #[error("{program} refused the rules: {message}")]
    Refused { program: &'static str, message: String },
}

/// Which tool's tables hold the rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Firewall {
    Nftables,
    Iptables,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rules {
    pub network: Ipv4Net,
    /// This node's subnet.
    pub subnet: Ipv4Net,
    pub masquerade: bool,
    /// Choose source ports at random, which avoids collisions of parallel connections.
    pub random_fully: bool,
    pub forward: bool,
}

impl Firewall {
    /// Makes the kernel have exactly these rules of ours.
    pub async fn apply(self, rules: &Rules) -> Result<(), FirewallError> {
        match self {
            Self::Nftables => run("nft", &["-f", "-"], &nft_script(rules)).await,
            Self::Iptables => {
                run("iptables-restore", &["--noflush", "--wait", "5"], &iptables_script(rules)).await?;
                for (wanted, [table, chain, comment, target]) in [
                    (rules.masquerade, ["nat", "POSTROUTING", "flanneld masq", "FLANNEL-POSTRTG"]),
                    (rules.forward, ["filter", "FORWARD", "flanneld forward", "FLANNEL-FWD"]),
                ] {
                    if wanted {
                        ensure_jump(table, chain, comment, target).await?;
                    }
                }
                Ok(())
            }
        }
    }
}

async fn ensure_jump(table: &str, chain: &str, comment: &str, target: &str) -> Result<(), FirewallError> {
    let rule = |action| ["-w", "5", "-t", table, action, chain, "-m", "comment", "--comment", comment, "-j", target];
    match run("iptables", &rule("-C"), "").await {
        Err(FirewallError::Refused { .. }) => run("iptables", &rule("-A"), "").await,
        other => other,
    }
}

async fn run(program: &'static str, arguments: &[&str], input: &str) -> Result<(), FirewallError> {
    let spawn = |source| FirewallError::Spawn { program, source };
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(spawn)?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(input.as_bytes()).await.map_err(spawn)?;
    }
    let output = child.wait_with_output().await.map_err(spawn)?;
    if output.status.success() {
        return Ok(());
    }
    Err(FirewallError::Refused { program, message: String::from_utf8_lossy(&output.stderr).trim().to_owned() })
}

/// The table is deleted and made again inside one transaction: no packet sees it missing.
fn nft_script(rules: &Rules) -> String {
    let Rules { network, subnet, .. } = rules;
    let mut script = String::from("add table ip flannel-ipv4\ndelete table ip flannel-ipv4\ntable ip flannel-ipv4 {\n");
    if rules.masquerade {
        let masquerade = if rules.random_fully { "masquerade fully-random" } else { "masquerade" };
        script += &format!(
            "  chain postrtg {{
    type nat hook postrouting priority srcnat;
    meta mark & 0x4000 == 0x4000 return
    ip saddr {subnet} ip daddr {network} return
    ip saddr {network} ip daddr {subnet} return
    ip saddr != {network} ip daddr {subnet} return
    ip saddr {network} ip daddr != {MULTICAST} {masquerade}
    ip saddr != {network} ip daddr {network} {masquerade}
  }}
"
        );
    }
    if rules.forward {
        script += &format!(
            "  chain forward {{
    type filter hook forward priority filter;
    ip saddr {network} accept
    ip daddr {network} accept
  }}
"
        );
    }
    script += "}\n";
    script
}

fn iptables_script(rules: &Rules) -> String {
    let Rules { network, subnet, .. } = rules;
    let mut script = String::new();
    if rules.masquerade {
        let random = if rules.random_fully { " --random-fully" } else { "" };
        let rule = |condition: String, target: &str| {
            format!("-A FLANNEL-POSTRTG {condition} -m comment --comment \"flanneld masq\" -j {target}\n")
        };
        script += "*nat\n:FLANNEL-POSTRTG - [0:0]\n";
        script += &rule(format!("-m mark --mark {KUBE_PROXY_MARK}"), "RETURN");
        script += &rule(format!("-s {subnet} -d {network}"), "RETURN");
        script += &rule(format!("-s {network} -d {subnet}"), "RETURN");
        script += &rule(format!("! -s {network} -d {subnet}"), "RETURN");
        script += &rule(format!("-s {network} ! -d {MULTICAST}"), &format!("MASQUERADE{random}"));
        script += &rule(format!("! -s {network} -d {network}"), &format!("MASQUERADE{random}"));
        script += "COMMIT\n";
    }
    if rules.forward {
        script += &format!(
            "*filter\n:FLANNEL-FWD - [0:0]\n\
             -A FLANNEL-FWD -s {network} -m comment --comment \"flanneld forward\" -j ACCEPT\n\
             -A FLANNEL-FWD -d {network} -m comment --comment \"flanneld forward\" -j ACCEPT\nCOMMIT\n"
        );
    }
    script
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules() -> Rules {
        Rules {
            network: "10.244.0.0/16".parse().unwrap(),
            subnet: "10.244.1.0/24".parse().unwrap(),
            masquerade: true,
            random_fully: true,
            forward: true,
        }
    }

    #[test]
    fn traffic_inside_the_network_keeps_its_address() {
        let script = iptables_script(&rules());
        let inside = script.find("-s 10.244.1.0/24 -d 10.244.0.0/16").unwrap();
        let outside = script.find("MASQUERADE --random-fully").unwrap();
        assert!(inside < outside);
        assert_eq!(script.matches("COMMIT").count(), 2);
        let nft = nft_script(&rules());
        assert!(nft.find("return").unwrap() < nft.find("masquerade fully-random").unwrap());
    }

    #[test]
    fn what_is_switched_off_is_left_out() {
        let off = Rules { masquerade: false, forward: false, ..rules() };
        assert_eq!(iptables_script(&off), "");
        assert!(!nft_script(&off).contains("chain"));
    }
}
