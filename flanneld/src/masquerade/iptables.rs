//! The rules in iptables: chains of our own that the built-in ones jump to, with upstream's names, so that the two
//! programs recognise each other's.

use ipnet::IpNet;

use super::ruleset::Place;
use super::run::{FirewallError, run};
use super::{KUBE_PROXY_MARK, Rules, multicast};
use crate::family::Family;

/// A chain of ours and where it is jumped to from.
struct Chain {
    table: &'static str,
    from: &'static str,
    comment: &'static str,
    name: &'static str,
}

const MASQUERADE: Chain =
    Chain { table: "nat", from: "POSTROUTING", comment: "flanneld masq", name: "FLANNEL-POSTRTG" };
const FORWARD: Chain = Chain { table: "filter", from: "FORWARD", comment: "flanneld forward", name: "FLANNEL-FWD" };

fn tools(family: Family) -> [&'static str; 2] {
    match family {
        Family::V4 => ["iptables", "iptables-restore"],
        Family::V6 => ["ip6tables", "ip6tables-restore"],
    }
}

/// Whether the rules are kept by the old kernel interface, which reports no changes.
pub async fn is_legacy() -> bool {
    match run("iptables", &["-V"], "").await {
        Ok(version) => !version.contains("nf_tables"),
        Err(error) => {
            tracing::debug!(%error, "cannot ask iptables for its version");
            true
        }
    }
}

fn wanted(rules: &Rules) -> impl Iterator<Item = &'static Chain> {
    [(rules.masquerade, &MASQUERADE), (rules.forward, &FORWARD)]
        .into_iter()
        .filter(|(on, _)| *on)
        .map(|(_, chain)| chain)
}

pub fn places(family: Family, rules: &Rules) -> Vec<Place> {
    let both = |chain: &'static Chain| {
        let place = |name, mentioning| Place { family, table: chain.table, chain: Some(name), mentioning };
        [place(chain.name, None), place(chain.from, Some(chain.name))]
    };
    wanted(rules).flat_map(both).collect()
}

pub async fn apply(rules: &Rules) -> Result<(), FirewallError> {
    for (network, subnet) in &rules.subnets {
        let [iptables, restore] = tools(Family::of_net(*network));
        run(restore, &["--noflush", "--wait", "5"], &script(rules, *network, *subnet)).await?;
        for chain in wanted(rules) {
            if let Err(FirewallError::Refused { .. }) = run(iptables, &jump("-C", chain), "").await {
                run(iptables, &jump("-A", chain), "").await?;
            }
        }
    }
    Ok(())
}

/// Takes our chains away. Each command may find that there is nothing.
pub async fn clean_up() -> Result<(), FirewallError> {
    for family in Family::BOTH {
        let [iptables, _] = tools(family);
        for chain in [&MASQUERADE, &FORWARD] {
            let on_chain = |action| ["-w", "5", "-t", chain.table, action, chain.name];
            let commands: [&[&str]; 3] = [&jump("-D", chain), &on_chain("-F"), &on_chain("-X")];
            for command in commands {
                match run(iptables, command, "").await {
                    Ok(_) | Err(FirewallError::Refused { .. }) => {}
                    Err(error) => return Err(error),
                }
            }
        }
    }
    Ok(())
}

fn jump<'a>(action: &'a str, chain: &Chain) -> [&'a str; 12] {
    let Chain { table, from, comment, name } = *chain;
    ["-w", "5", "-t", table, action, from, "-m", "comment", "--comment", comment, "-j", name]
}

fn script(rules: &Rules, network: IpNet, subnet: IpNet) -> String {
    let mut script = String::new();
    if rules.masquerade {
        let random = if rules.random_fully { " --random-fully" } else { "" };
        let multicast = multicast(Family::of_net(network));
        let rule = |condition: String, target: &str| {
            format!("-A FLANNEL-POSTRTG {condition} -m comment --comment \"flanneld masq\" -j {target}\n")
        };
        script += "*nat\n:FLANNEL-POSTRTG - [0:0]\n";
        script += &rule(format!("-m mark --mark {KUBE_PROXY_MARK}"), "RETURN");
        script += &rule(format!("-s {subnet} -d {network}"), "RETURN");
        script += &rule(format!("-s {network} -d {subnet}"), "RETURN");
        script += &rule(format!("! -s {network} -d {subnet}"), "RETURN");
        script += &rule(format!("-s {network} ! -d {multicast}"), &format!("MASQUERADE{random}"));
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
    use super::super::testing::rules;
    use super::*;

    fn scripts(rules: &Rules) -> Vec<String> {
        rules.subnets.iter().map(|(network, subnet)| script(rules, *network, *subnet)).collect()
    }

    #[test]
    fn traffic_inside_the_network_keeps_its_address() {
        let [ipv4, ipv6] = scripts(&rules()).try_into().unwrap();
        let inside = ipv4.find("-s 10.244.1.0/24 -d 10.244.0.0/16").unwrap();
        let outside = ipv4.find("MASQUERADE --random-fully").unwrap();
        assert!(inside < outside);
        assert_eq!(ipv4.matches("COMMIT").count(), 2);
        assert!(ipv6.contains("! -d ff00::/8"));
    }

    #[test]
    fn what_is_switched_off_is_left_out() {
        let off = Rules { masquerade: false, forward: false, ..rules() };
        assert!(scripts(&off).iter().all(String::is_empty));
        assert!(places(Family::V4, &off).is_empty());
        assert_eq!(places(Family::V4, &Rules { masquerade: false, ..rules() }).len(), 2);
    }
}
