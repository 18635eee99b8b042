//! The rules in nftables: a table of our own for each family.

use ipnet::IpNet;

use super::ruleset::Place;
use super::run::{FirewallError, run};
use super::{Rules, multicast};
use crate::family::Family;

fn family_name(family: Family) -> &'static str {
    match family {
        Family::V4 => "ip",
        Family::V6 => "ip6",
    }
}

fn table(family: Family) -> &'static str {
    match family {
        Family::V4 => "flannel-ipv4",
        Family::V6 => "flannel-ipv6",
    }
}

pub fn place(family: Family) -> Place {
    Place { family, table: table(family), chain: None, mentioning: None }
}

pub async fn apply(rules: &Rules) -> Result<(), FirewallError> {
    let scripts = rules.subnets.iter().map(|(network, subnet)| script(rules, *network, *subnet));
    run("nft", &["-f", "-"], &scripts.collect::<String>()).await.map(|_| ())
}

pub async fn clean_up() -> Result<(), FirewallError> {
    let gone = Family::BOTH.map(|family| {
        let (name, table) = (family_name(family), table(family));
        format!("add table {name} {table}\ndelete table {name} {table}\n")
    });
    run("nft", &["-f", "-"], &gone.concat()).await.map(|_| ())
}

/// The table is deleted and made again inside one transaction: no packet sees it missing.
fn script(rules: &Rules, network: IpNet, subnet: IpNet) -> String {
    let family = Family::of_net(network);
    let (ip, table) = (family_name(family), table(family));
    let mut script = format!("add table {ip} {table}\ndelete table {ip} {table}\ntable {ip} {table} {{\n");
    if rules.masquerade {
        let masquerade = if rules.random_fully { "masquerade fully-random" } else { "masquerade" };
        let multicast = multicast(family);
        script += &format!(
            "  chain postrtg {{
    type nat hook postrouting priority srcnat;
    meta mark & 0x4000 == 0x4000 return
    {ip} saddr {subnet} {ip} daddr {network} return
    {ip} saddr {network} {ip} daddr {subnet} return
    {ip} saddr != {network} {ip} daddr {subnet} return
    {ip} saddr {network} {ip} daddr != {multicast} {masquerade}
    {ip} saddr != {network} {ip} daddr {network} {masquerade}
  }}
"
        );
    }
    if rules.forward {
        script += &format!(
            "  chain forward {{
    type filter hook forward priority filter;
    {ip} saddr {network} accept
    {ip} daddr {network} accept
  }}
"
        );
    }
    script + "}\n"
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
        for script in scripts(&rules()) {
            assert!(script.find("return").unwrap() < script.find("masquerade fully-random").unwrap());
        }
        assert!(scripts(&rules())[1].contains("ip6 saddr fd00:0:0:1::/64 ip6 daddr fd00::/48 return"));
    }

    #[test]
    fn what_is_switched_off_is_left_out() {
        let off = Rules { masquerade: false, forward: false, ..rules() };
        assert!(scripts(&off).iter().all(|script| !script.contains("chain")));
    }
}
