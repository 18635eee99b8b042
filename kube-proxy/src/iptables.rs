//! The iptables backend, with upstream's chain names, as existing clusters and the tools around them know it. The
//! whole of our chains is one script for `iptables-restore --noflush`; chains of others stay as they are.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use sha2::{Digest, Sha256};

use crate::nftables::Settings;
use crate::plan::{Disposition, Plan, PlannedPort, Target};

/// A chain that exists as long as nobody flushed the tables behind our back.
const CANARY: &str = "KUBE-PROXY-CANARY";

/// What shows that our rules are in place: table, chain, and the chain that a rule of it must lead to.
pub const SIGNS: [(&str, &str, Option<&str>); 3] =
    [("nat", CANARY, None), ("nat", "PREROUTING", Some("KUBE-SERVICES")), ("filter", "FORWARD", Some("KUBE-SERVICES"))];

const FILTER_CHAINS: [&str; 4] = ["KUBE-SERVICES", "KUBE-EXTERNAL-SERVICES", "KUBE-FORWARD", "KUBE-PROXY-FIREWALL"];
const NAT_CHAINS: [&str; 5] = ["KUBE-SERVICES", "KUBE-NODEPORTS", "KUBE-POSTROUTING", "KUBE-MARK-MASQ", CANARY];

/// Prefixes of the chains that belong to single services.
const OWN_PREFIXES: [&str; 5] = ["KUBE-SVC-", "KUBE-SVL-", "KUBE-EXT-", "KUBE-SEP-", "KUBE-FW-"];

/// A rule that leads from a built-in chain to one of ours.
pub struct JumpRule {
    pub table: &'static str,
    pub chain: &'static str,
    pub rule: Vec<&'static str>,
}

/// The jumps into our chains, in the order in which they are to be inserted at the front.
pub fn jumps() -> Vec<JumpRule> {
    let new = ["-m", "conntrack", "--ctstate", "NEW"];
    let jump = |table, chain, target, comment, condition: &[&'static str]| JumpRule {
        table,
        chain,
        rule: [condition, &["-m", "comment", "--comment", comment, "-j", target]].concat(),
    };
    let mut all = Vec::new();
    for (chains, target, comment, condition) in [
        (&["FORWARD"][..], "KUBE-FORWARD", "kubernetes forwarding rules", &[][..]),
        (&["FORWARD", "OUTPUT"], "KUBE-SERVICES", "kubernetes service portals", &new),
        (&["INPUT", "FORWARD"], "KUBE-EXTERNAL-SERVICES", "kubernetes externally-visible service portals", &new),
        (&["INPUT", "FORWARD", "OUTPUT"], "KUBE-PROXY-FIREWALL", "kubernetes load balancer firewall", &new),
    ] {
        all.extend(chains.iter().map(|chain| jump("filter", chain, target, comment, condition)));
    }
    for chain in ["PREROUTING", "OUTPUT"] {
        all.push(jump("nat", chain, "KUBE-SERVICES", "kubernetes service portals", &[]));
    }
    all.push(jump("nat", "POSTROUTING", "KUBE-POSTROUTING", "kubernetes postrouting rules", &[]));
    all
}

/// The script for everything. `existing_filter` and `existing_nat` are the chains that the tables have: those of
/// services that are gone are removed.
pub fn script(
    plan: &Plan,
    settings: &Settings,
    existing_filter: &BTreeSet<String>,
    existing_nat: &BTreeSet<String>,
) -> String {
    let mut filter = Table::new("filter", &FILTER_CHAINS);
    let mut nat = Table::new("nat", &NAT_CHAINS);
    fixed_rules(&mut filter, &mut nat, settings);
    for port in &plan.ports {
        Writer { filter: &mut filter, nat: &mut nat, settings, port }.write();
    }
    node_port_jumps(&mut nat, settings);
    filter.finish(existing_filter) + &nat.finish(existing_nat)
}

/// The script that removes all our chains; the jumps must have been removed before.
pub fn removal(existing_filter: &BTreeSet<String>, existing_nat: &BTreeSet<String>) -> String {
    let table = |name: &str, fixed: &[&str], existing: &BTreeSet<String>| {
        let ours = |chain: &&String| {
            fixed.contains(&chain.as_str()) || OWN_PREFIXES.iter().any(|prefix| chain.starts_with(prefix))
        };
        let ours: Vec<&String> = existing.iter().filter(ours).collect();
        let mut text = format!("*{name}\n");
        for chain in &ours {
            let _ = writeln!(text, ":{chain} - [0:0]");
        }
        for chain in &ours {
            let _ = writeln!(text, "-X {chain}");
        }
        text + "COMMIT\n"
    };
    table("filter", &FILTER_CHAINS, existing_filter) + &table("nat", &NAT_CHAINS, existing_nat)
}

fn fixed_rules(filter: &mut Table, nat: &mut Table, settings: &Settings) {
    let mark = format!("{:#x}", settings.mark);
    filter.rule("KUBE-FORWARD", "-m conntrack --ctstate INVALID -j DROP");
    filter.rule("KUBE-FORWARD", &format!("-m mark --mark {mark}/{mark} -j ACCEPT"));
    filter.rule("KUBE-FORWARD", "-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT");
    nat.rule("KUBE-POSTROUTING", &format!("-m mark ! --mark {mark}/{mark} -j RETURN"));
    nat.rule("KUBE-POSTROUTING", &format!("-j MARK --xor-mark {mark}"));
    nat.rule("KUBE-POSTROUTING", "-j MASQUERADE --random-fully");
    nat.rule("KUBE-MARK-MASQ", &format!("-j MARK --or-mark {mark}"));
}

/// Must come last in KUBE-SERVICES: everything else is more specific.
fn node_port_jumps(nat: &mut Table, settings: &Settings) {
    match &settings.node_port_addresses {
        None => {
            let local = "! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS";
            nat.rule("KUBE-SERVICES", local);
        }
        Some(addresses) => {
            for address in addresses.iter().filter(|address| !address.is_loopback()) {
                nat.rule("KUBE-SERVICES", &format!("-d {address}/32 -j KUBE-NODEPORTS"));
            }
        }
    }
}

/// One table of the script: chains are declared (which empties them) before the rules.
struct Table {
    name: &'static str,
    chains: BTreeSet<String>,
    rules: String,
}

impl Table {
    fn new(name: &'static str, chains: &[&str]) -> Self {
        Self { name, chains: chains.iter().map(|&chain| chain.to_owned()).collect(), rules: String::new() }
    }

    fn chain(&mut self, name: &str) {
        self.chains.insert(name.to_owned());
    }

    fn rule(&mut self, chain: &str, rule: &str) {
        // Writing to a string cannot fail.
        let _ = writeln!(self.rules, "-A {chain} {rule}");
    }

    fn finish(self, existing: &BTreeSet<String>) -> String {
        let stale: Vec<&String> = existing
            .iter()
            .filter(|chain| OWN_PREFIXES.iter().any(|prefix| chain.starts_with(prefix)))
            .filter(|chain| !self.chains.contains(*chain))
            .collect();
        let mut text = format!("*{}\n", self.name);
        for chain in self.chains.iter().chain(stale.iter().copied()) {
            let _ = writeln!(text, ":{chain} - [0:0]");
        }
        text.push_str(&self.rules);
        for chain in stale {
            let _ = writeln!(text, "-X {chain}");
        }
        text.push_str("COMMIT\n");
        text
    }
}

struct Writer<'a> {
    filter: &'a mut Table,
    nat: &'a mut Table,
    settings: &'a Settings,
    port: &'a PlannedPort,
}

impl Writer<'_> {
    fn write(&mut self) {
        let port = self.port;
        self.endpoints();
        let cluster =
            self.policy_chain("KUBE-SVC-", &port.cluster, !port.internal_local || port.externally_accessible());
        let local = self.policy_chain("KUBE-SVL-", &port.local, port.internal_local || port.external_local);
        let internal = if port.internal_local { &local } else { &cluster };
        self.internal(internal);
        if port.externally_accessible() {
            self.external(&cluster, &local);
        }
    }

    fn internal(&mut self, chain: &str) {
        let port = self.port;
        let to = self.to(port.cluster_ip);
        match port.internal {
            Disposition::Forward => {
                self.nat.rule("KUBE-SERVICES", &format!("{} {to} -j {chain}", self.comment("cluster IP")))
            }
            refusal => self.refuse("KUBE-SERVICES", &to, refusal),
        }
    }

    fn external(&mut self, cluster: &str, local: &str) {
        let port = self.port;
        let external = self.hashed("KUBE-EXT-", "");
        if port.served {
            self.external_chain(&external, cluster, local);
        }
        let balanced = self.firewall(&external);
        for (addresses, chain) in [(&port.external_ips, &external), (&port.load_balancer_ips, &balanced)] {
            for &address in addresses {
                let to = self.to(address);
                if port.served {
                    self.nat.rule("KUBE-SERVICES", &format!("{} {to} -j {chain}", self.comment("external IP")));
                }
                self.refuse("KUBE-EXTERNAL-SERVICES", &to, port.external);
            }
        }
        if let Some(number) = port.node_port {
            let protocol = port.id.protocol;
            let to = format!("-p {protocol} -m {protocol} --dport {number}");
            if port.served {
                self.nat.rule("KUBE-NODEPORTS", &format!("{} {to} -j {external}", self.comment("node port")));
            }
            self.refuse("KUBE-EXTERNAL-SERVICES", &format!("-m addrtype --dst-type LOCAL {to}"), port.external);
        }
    }

    fn external_chain(&mut self, external: &str, cluster: &str, local: &str) {
        let port = self.port;
        self.nat.chain(external);
        if !port.external_local {
            self.nat.rule(external, "-j KUBE-MARK-MASQ");
            self.nat.rule(external, &format!("-j {cluster}"));
            return;
        }
        if !port.cluster.is_empty() {
            if let Some(pods) = self.settings.cluster_cidr {
                self.nat.rule(external, &format!("-s {pods} -j {cluster}"));
            }
            self.nat.rule(external, "-m addrtype --src-type LOCAL -j KUBE-MARK-MASQ");
            self.nat.rule(external, &format!("-m addrtype --src-type LOCAL -j {cluster}"));
        }
        if port.external == Disposition::Forward {
            self.nat.rule(external, &format!("-j {local}"));
        }
    }

    /// The chain for packets to load balancer addresses. With source ranges only allowed packets are rewritten there;
    /// those that still have the address when they are filtered were not allowed.
    fn firewall(&mut self, external: &str) -> String {
        let port = self.port;
        if !port.served || port.load_balancer_ips.is_empty() || port.source_ranges.is_empty() {
            return external.to_owned();
        }
        let firewall = self.hashed("KUBE-FW-", "");
        self.nat.chain(&firewall);
        let own = port.load_balancer_ips.iter().map(|&address| Ipv4Net::from(address));
        for allowed in port.source_ranges.iter().copied().chain(own) {
            self.nat.rule(&firewall, &format!("-s {allowed} -j {external}"));
        }
        for &address in &port.load_balancer_ips {
            let to = self.to(address);
            let why = format!("-m comment --comment \"{} not in the source ranges\"", port.id);
            self.filter.rule("KUBE-PROXY-FIREWALL", &format!("{why} {to} -j DROP"));
        }
        firewall
    }

    /// The chain that picks among the targets; not made when nothing leads to it.
    fn policy_chain(&mut self, prefix: &str, targets: &[Target], used: bool) -> String {
        let name = self.hashed(prefix, "");
        if !used || targets.is_empty() {
            return name;
        }
        self.nat.chain(&name);
        let to = self.to(self.port.cluster_ip);
        if self.settings.masquerade_all {
            self.nat.rule(&name, &format!("{to} -j KUBE-MARK-MASQ"));
        } else if let Some(pods) = self.settings.cluster_cidr {
            self.nat.rule(&name, &format!("! -s {pods} {to} -j KUBE-MARK-MASQ"));
        }
        let chains: Vec<String> = targets.iter().map(|target| self.endpoint_chain(target)).collect();
        if let Some(seconds) = self.port.affinity {
            for chain in &chains {
                let known = format!("-m recent --name {chain} --rcheck --seconds {seconds} --reap -j {chain}");
                self.nat.rule(&name, &known);
            }
        }
        for (index, chain) in chains.iter().enumerate() {
            match chains.len() - index {
                1 => self.nat.rule(&name, &format!("-j {chain}")),
                left => {
                    let probability = 1.0 / left as f64;
                    let pick = format!("-m statistic --mode random --probability {probability:.10} -j {chain}");
                    self.nat.rule(&name, &pick);
                }
            }
        }
        name
    }

    fn endpoints(&mut self) {
        let protocol = self.port.id.protocol;
        for target in self.port.targets() {
            let chain = self.endpoint_chain(&target);
            self.nat.chain(&chain);
            self.nat.rule(&chain, &format!("-s {}/32 -j KUBE-MARK-MASQ", target.address));
            let remember = match self.port.affinity {
                Some(_) => format!("-m recent --name {chain} --set "),
                None => String::new(),
            };
            let to = format!("{}:{}", target.address, target.port);
            self.nat.rule(&chain, &format!("-p {protocol} -m {protocol} {remember}-j DNAT --to-destination {to}"));
        }
    }

    fn refuse(&mut self, chain: &str, to: &str, disposition: Disposition) {
        let (why, action) = match disposition {
            Disposition::Forward => return,
            Disposition::Drop => ("has no local endpoints", "DROP"),
            Disposition::Reject => ("has no endpoints", "REJECT"),
        };
        self.filter.rule(chain, &format!("-m comment --comment \"{} {why}\" {to} -j {action}", self.port.id));
    }

    fn comment(&self, what: &str) -> String {
        format!("-m comment --comment \"{} {what}\"", self.port.id)
    }

    fn to(&self, address: Ipv4Addr) -> String {
        let protocol = self.port.id.protocol;
        format!("-d {address}/32 -p {protocol} -m {protocol} --dport {}", self.port.port)
    }

    fn endpoint_chain(&self, target: &Target) -> String {
        self.hashed("KUBE-SEP-", &format!("{}:{}", target.address, target.port))
    }

    /// Sixteen characters of the base32 form of a hash, as upstream names its chains.
    fn hashed(&self, prefix: &str, suffix: &str) -> String {
        let identity = format!("{}{}{suffix}", self.port.id, self.port.id.protocol);
        format!("{prefix}{}", base32_16(&Sha256::digest(identity.as_bytes())))
    }
}

fn base32_16(digest: &[u8]) -> String {
    const ALPHABET: &[u8; 32] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";
    let (mut bits, mut count, mut text) = (0_u32, 0, String::with_capacity(16));
    for &byte in digest {
        bits = (bits << 8) | u32::from(byte);
        count += 8;
        while count >= 5 && text.len() < 16 {
            count -= 5;
            text.push(char::from(ALPHABET[(bits >> count) as usize & 31]));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Protocol, Service};
    use crate::plan::plan;
    use crate::plan::testing::{endpoint, model, service};

    fn settings() -> Settings {
        Settings {
            mark: 0x4000,
            masquerade_all: false,
            cluster_cidr: "10.244.0.0/16".parse().ok(),
            node_port_addresses: None,
        }
    }

    fn http() -> Service {
        service("10.96.0.1", &[("http", Protocol::Tcp, 80, Some(30080))])
    }

    fn script_for(service: Service, nodes: &[&str]) -> String {
        let endpoints = nodes.iter().enumerate().map(|(i, node)| endpoint(&format!("10.244.{i}.2"), node)).collect();
        script(&plan(&model(service, endpoints)), &settings(), &BTreeSet::new(), &BTreeSet::new())
    }

    #[test]
    fn base32_is_the_common_one() {
        assert_eq!(base32_16(b"foobarfoobar"), "MZXW6YTBOJTG633C");
    }

    #[test]
    fn a_service_with_two_endpoints() {
        let text = script_for(http(), &["node1", "node2"]);
        assert!(text.contains("-d 10.96.0.1/32 -p tcp -m tcp --dport 80 -j KUBE-SVC-"));
        assert!(text.contains("--probability 0.5000000000"));
        assert!(text.contains("-j DNAT --to-destination 10.244.1.2:8080"));
        assert!(text.contains(
            "-A KUBE-NODEPORTS -m comment --comment \"ns/svc:http node port\" -p tcp -m tcp --dport 30080 -j KUBE-EXT-"
        ));
        assert_eq!(text.matches("COMMIT").count(), 2);
        assert!(!text.contains("REJECT"));
    }

    #[test]
    fn refusals_by_policy() {
        assert!(
            script_for(http(), &[]).contains("-A KUBE-SERVICES -m comment --comment \"ns/svc:http has no endpoints\"")
        );
        let mut local = http();
        local.external_local = true;
        let text = script_for(local, &["node2"]);
        assert!(
            text.contains("has no local endpoints\" -m addrtype --dst-type LOCAL -p tcp -m tcp --dport 30080 -j DROP")
        );
        assert!(text.contains("-m addrtype --src-type LOCAL -j KUBE-SVC-"));
        assert!(!text.contains("KUBE-SVL-"));
    }

    #[test]
    fn every_chain_that_is_named_is_declared() {
        let mut sticky = http();
        sticky.affinity = Some(60);
        sticky.external_local = true;
        let text = script_for(sticky, &["node1", "node2"]);
        assert!(text.contains("--rcheck --seconds 60 --reap"));
        for target in text.lines().filter_map(|line| line.split("-j KUBE-").nth(1)) {
            assert!(text.contains(&format!(":KUBE-{target} - [0:0]")), "KUBE-{target}");
        }
    }

    #[test]
    fn chains_of_services_that_are_gone_are_removed() {
        let existing = BTreeSet::from(["KUBE-SVC-OLD".to_owned(), "KUBE-SERVICES".to_owned(), "OTHER".to_owned()]);
        let text = script(&Plan::default(), &settings(), &BTreeSet::new(), &existing);
        assert!(text.contains(":KUBE-SVC-OLD - [0:0]") && text.contains("-X KUBE-SVC-OLD"));
        assert!(!text.contains("OTHER"));
        let removal = removal(&BTreeSet::new(), &existing);
        assert!(
            removal.contains("-X KUBE-SVC-OLD") && removal.contains("-X KUBE-SERVICES") && !removal.contains("OTHER")
        );
    }
}
