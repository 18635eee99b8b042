//! The content of our chains as text for `iptables-restore`, with upstream's chain names, as existing clusters and the
//! tools around them know them.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::IpAddr;

use ipnet::IpNet;
use sha2::{Digest, Sha256};

use crate::model::{Family, ServiceName};
use crate::nftables::{LocalTraffic, Settings};
use crate::plan::{Disposition, PlannedPort, Plans, Target};

/// A chain that exists as long as nobody flushed the tables behind our back.
const CANARY: &str = "KUBE-PROXY-CANARY";

/// What shows that our rules are in place: table, chain, and the chain that a rule of it must lead to.
pub const SIGNS: [(&str, &str, Option<&str>); 3] =
    [("nat", CANARY, None), ("nat", "PREROUTING", Some("KUBE-SERVICES")), ("filter", "FORWARD", Some("KUBE-SERVICES"))];

const FILTER_CHAINS: [&str; 5] =
    ["KUBE-SERVICES", "KUBE-EXTERNAL-SERVICES", "KUBE-FORWARD", "KUBE-PROXY-FIREWALL", "KUBE-FIREWALL"];
const NAT_CHAINS: [&str; 5] = ["KUBE-SERVICES", "KUBE-NODEPORTS", "KUBE-POSTROUTING", "KUBE-MARK-MASQ", CANARY];

/// Prefixes of the chains that belong to single services.
const OWN_PREFIXES: [&str; 5] = ["KUBE-SVC-", "KUBE-SVL-", "KUBE-EXT-", "KUBE-SEP-", "KUBE-FW-"];

/// Kubelets of upstream have it as well.
pub const SHARED_CHAIN: &str = "KUBE-FIREWALL";
#[rustfmt::skip]
pub const FOREIGN_TO_LOOPBACK: [&str; 12] = [
    "!", "-s", "127.0.0.0/8", "-d", "127.0.0.0/8", "-m", "conntrack", "!", "--ctstate", "RELATED,ESTABLISHED,DNAT", "-j", "DROP",
];

/// Whether the chain is one of ours. The last one is shared with kubelets.
pub fn is_ours(chain: &str) -> bool {
    let fixed = FILTER_CHAINS.contains(&chain) || NAT_CHAINS.contains(&chain);
    (fixed && chain != SHARED_CHAIN) || OWN_PREFIXES.iter().any(|prefix| chain.starts_with(prefix))
}

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
        (&["INPUT", "OUTPUT"], "KUBE-FIREWALL", "kubernetes firewall", &[]),
    ] {
        all.extend(chains.iter().map(|chain| jump("filter", chain, target, comment, condition)));
    }
    for chain in ["PREROUTING", "OUTPUT"] {
        all.push(jump("nat", chain, "KUBE-SERVICES", "kubernetes service portals", &[]));
    }
    all.push(jump("nat", "POSTROUTING", "KUBE-POSTROUTING", "kubernetes postrouting rules", &[]));
    all
}

/// What `iptables` alone has to know.
#[derive(Clone, Copy, Debug)]
pub struct Extras {
    /// Node ports answer on 127.0.0.1, too.
    pub localhost_node_ports: bool,
}

/// The content of all our chains: filter, and nat.
pub fn tables(plans: &Plans, settings: &Settings, extras: Extras) -> [Table; 2] {
    let mut filter = Table::new("filter", &FILTER_CHAINS);
    let mut nat = Table::new("nat", &NAT_CHAINS);
    fixed_rules(&mut filter, &mut nat, settings, extras);
    for (service, plan) in plans {
        for port in plan.ports.iter().filter(|port| port.family() == settings.family) {
            let id = match &*port.name {
                "" => service.to_string(),
                name => format!("{service}:{name}"),
            };
            Writer { filter: &mut filter, nat: &mut nat, settings, port, service, id }.write();
        }
    }
    node_port_jumps(&mut nat, settings, extras);
    [filter, nat]
}

fn fixed_rules(filter: &mut Table, nat: &mut Table, settings: &Settings, extras: Extras) {
    let mark = format!("{:#x}", settings.mark);
    filter.rule("KUBE-FORWARD", "-m conntrack --ctstate INVALID -j DROP");
    filter.rule("KUBE-FORWARD", &format!("-m mark --mark {mark}/{mark} -j ACCEPT"));
    filter.rule("KUBE-FORWARD", "-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT");
    if extras.localhost_node_ports && settings.family == Family::Ipv4 {
        // Packets for 127.0.0.1 are routed now; those of others must not get there.
        filter.rule(SHARED_CHAIN, &FOREIGN_TO_LOOPBACK.join(" "));
    }
    nat.rule("KUBE-POSTROUTING", &format!("-m mark ! --mark {mark}/{mark} -j RETURN"));
    nat.rule("KUBE-POSTROUTING", &format!("-j MARK --xor-mark {mark}"));
    nat.rule("KUBE-POSTROUTING", "-j MASQUERADE --random-fully");
    nat.rule("KUBE-MARK-MASQ", &format!("-j MARK --or-mark {mark}"));
}

/// Must come last in KUBE-SERVICES: everything else is more specific.
fn node_port_jumps(nat: &mut Table, settings: &Settings, extras: Extras) {
    let loopback = extras.localhost_node_ports && settings.family == Family::Ipv4;
    match &settings.node_port_addresses {
        None => {
            let outside = match (loopback, settings.family) {
                (true, _) => "",
                (false, Family::Ipv4) => "! -d 127.0.0.0/8 ",
                (false, Family::Ipv6) => "! -d ::1/128 ",
            };
            nat.rule("KUBE-SERVICES", &format!("{outside}-m addrtype --dst-type LOCAL -j KUBE-NODEPORTS"));
        }
        Some(addresses) => {
            for address in addresses.iter().filter(|address| loopback || !address.is_loopback()) {
                nat.rule("KUBE-SERVICES", &format!("-d {} -j KUBE-NODEPORTS", IpNet::from(*address)));
            }
        }
    }
}

/// The chains of one table, each with its rules.
pub struct Table {
    pub name: &'static str,
    chains: BTreeMap<String, String>,
}

/// The chains that a table has, with a number that stands for their rules; 0 if those are not known.
pub type Applied = BTreeMap<String, u64>;

impl Table {
    fn new(name: &'static str, chains: &[&str]) -> Self {
        Self { name, chains: chains.iter().map(|&chain| (chain.to_owned(), String::new())).collect() }
    }

    fn chain(&mut self, name: &str) {
        self.chains.entry(name.to_owned()).or_default();
    }

    fn rule(&mut self, chain: &str, rule: &str) {
        let rules = self.chains.entry(chain.to_owned()).or_default();
        // Writing to a string cannot fail.
        let _ = writeln!(rules, "-A {chain} {rule}");
    }

    pub fn applied(&self) -> Applied {
        let number = |rules: &String| {
            let mut hasher = DefaultHasher::new();
            rules.hash(&mut hasher);
            hasher.finish().max(1)
        };
        self.chains.iter().map(|(name, rules)| (name.clone(), number(rules))).collect()
    }

    /// The script that brings the table from what it has to what is wanted: `wanted` is what this table's
    /// [`applied`](Self::applied) says. Chains that do not change are not mentioned.
    pub fn script(&self, has: &Applied, wanted: &Applied) -> Option<String> {
        let changed: Vec<(&String, &String)> =
            self.chains.iter().filter(|(name, _)| has.get(*name) != wanted.get(*name)).collect();
        let stale: Vec<&String> = has.keys().filter(|name| is_ours(name) && !wanted.contains_key(*name)).collect();
        if changed.is_empty() && stale.is_empty() {
            return None;
        }
        let mut text = format!("*{}\n", self.name);
        // Declaring a chain empties it.
        for name in changed.iter().map(|(name, _)| *name).chain(stale.iter().copied()) {
            let _ = writeln!(text, ":{name} - [0:0]");
        }
        changed.iter().for_each(|(_, rules)| text.push_str(rules));
        for name in stale {
            let _ = writeln!(text, "-X {name}");
        }
        text.push_str("COMMIT\n");
        Some(text)
    }
}

/// The script that removes all our chains from a table; the jumps must have been removed before.
pub fn removal(table: &'static str, has: &Applied) -> Option<String> {
    Table::new(table, &[]).script(has, &Applied::new())
}

struct Writer<'a> {
    filter: &'a mut Table,
    nat: &'a mut Table,
    settings: &'a Settings,
    port: &'a PlannedPort,
    service: &'a ServiceName,
    /// For people.
    id: String,
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
            let protocol = port.protocol;
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
            if let Some(pods) = self.pods(true) {
                self.nat.rule(external, &format!("{pods} -j {cluster}"));
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
        let Some(ranges) = port.source_ranges.as_ref().filter(|_| port.served && !port.load_balancer_ips.is_empty())
        else {
            return external.to_owned();
        };
        let firewall = self.hashed("KUBE-FW-", "");
        self.nat.chain(&firewall);
        let own = port.load_balancer_ips.iter().map(|&address| IpNet::from(address));
        for allowed in ranges.iter().copied().chain(own) {
            self.nat.rule(&firewall, &format!("-s {allowed} -j {external}"));
        }
        for &address in &port.load_balancer_ips {
            let to = self.to(address);
            let why = format!("-m comment --comment \"{} not in the source ranges\"", self.id);
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
        } else if let Some(others) = self.pods(false) {
            self.nat.rule(&name, &format!("{others} {to} -j KUBE-MARK-MASQ"));
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
        let protocol = self.port.protocol;
        for target in self.port.targets() {
            let chain = self.endpoint_chain(&target);
            self.nat.chain(&chain);
            self.nat.rule(&chain, &format!("-s {} -j KUBE-MARK-MASQ", IpNet::from(target.address)));
            let remember = match self.port.affinity {
                Some(_) => format!("-m recent --name {chain} --set "),
                None => String::new(),
            };
            let to = std::net::SocketAddr::new(target.address, target.port);
            self.nat.rule(&chain, &format!("-p {protocol} -m {protocol} {remember}-j DNAT --to-destination {to}"));
        }
    }

    fn refuse(&mut self, chain: &str, to: &str, disposition: Disposition) {
        let (why, action) = match disposition {
            Disposition::Forward => return,
            Disposition::Drop => ("has no local endpoints", "DROP"),
            Disposition::Reject => ("has no endpoints", "REJECT"),
        };
        self.filter.rule(chain, &format!("-m comment --comment \"{} {why}\" {to} -j {action}", self.id));
    }

    fn comment(&self, what: &str) -> String {
        format!("-m comment --comment \"{} {what}\"", self.id)
    }

    fn to(&self, address: IpAddr) -> String {
        let (protocol, to) = (self.port.protocol, IpNet::from(address));
        format!("-d {to} -p {protocol} -m {protocol} --dport {}", self.port.port)
    }

    /// The condition that traffic comes from pods of this node, or does not; `None` if that cannot be known.
    fn pods(&self, expected: bool) -> Option<String> {
        let not = if expected { "" } else { "! " };
        match &self.settings.local_traffic {
            LocalTraffic::Unknown => None,
            LocalTraffic::Network(net) => Some(format!("{not}-s {net}")),
            LocalTraffic::Interface(name) => Some(format!("{not}-i {name}")),
            LocalTraffic::InterfacePrefix(prefix) => Some(format!("{not}-i {prefix}+")),
        }
    }

    fn endpoint_chain(&self, target: &Target) -> String {
        self.hashed("KUBE-SEP-", &format!("{}:{}", target.address, target.port))
    }

    /// Sixteen characters of the base32 form of a hash, as upstream names its chains.
    fn hashed(&self, prefix: &str, suffix: &str) -> String {
        let identity = format!("{}/{}{}{suffix}", self.service, self.port.name, self.port.protocol);
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
    use crate::plan::testing::{endpoint, planned, service};

    fn settings(family: Family) -> Settings {
        let pods = if family == Family::Ipv4 { "10.244.0.0/16" } else { "fd01::/48" };
        Settings {
            family,
            mark: 0x4000,
            masquerade_all: false,
            local_traffic: LocalTraffic::Network(pods.parse().unwrap()),
            node_port_addresses: None,
        }
    }

    fn http() -> Service {
        service("10.96.0.1", &[("http", Protocol::Tcp, 80, Some(30080))])
    }

    fn tables_of(plans: &Plans, settings: &Settings) -> [Table; 2] {
        tables(plans, settings, Extras { localhost_node_ports: false })
    }

    fn whole(tables: &[Table; 2]) -> String {
        tables.iter().filter_map(|table| table.script(&Applied::new(), &table.applied())).collect()
    }

    fn plans(service: Service, nodes: &[&str]) -> Plans {
        let prefix = if service.cluster_ip.is_ipv4() { "10.244.0." } else { "fd01::" };
        let endpoints =
            nodes.iter().enumerate().map(|(i, node)| endpoint(&format!("{prefix}{}", i + 1), node)).collect();
        [(ServiceName::new("ns", "svc"), planned(service, endpoints))].into()
    }

    fn script_for(service: Service, nodes: &[&str]) -> String {
        let settings = settings(Family::of(service.cluster_ip));
        whole(&tables_of(&plans(service, nodes), &settings))
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
        assert!(text.contains("-j DNAT --to-destination 10.244.0.2:8080"));
        assert!(text.contains(
            "-A KUBE-NODEPORTS -m comment --comment \"ns/svc:http node port\" -p tcp -m tcp --dport 30080 -j KUBE-EXT-"
        ));
        assert_eq!(text.matches("COMMIT").count(), 2);
        assert!(!text.contains("REJECT"));
    }

    #[test]
    fn the_other_family_has_its_own_script() {
        let six = script_for(service("fd00::1", &[("", Protocol::Udp, 53, None)]), &["node1"]);
        assert!(six.contains("-d fd00::1/128 -p udp -m udp --dport 53 -j KUBE-SVC-"), "{six}");
        assert!(six.contains("-j DNAT --to-destination [fd01::1]:8080") && six.contains("! -s fd01::/48"));
        let four = whole(&tables_of(
            &plans(service("fd00::1", &[("", Protocol::Udp, 53, None)]), &["node1"]),
            &settings(Family::Ipv4),
        ));
        assert!(!four.contains("fd00"));
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
    fn ways_to_detect_local_traffic() {
        for (local, expected) in [
            (LocalTraffic::Interface("cni0".to_owned()), "! -i cni0 -d 10.96.0.1/32"),
            (LocalTraffic::InterfacePrefix("veth".to_owned()), "! -i veth+ -d 10.96.0.1/32"),
        ] {
            let settings = Settings { local_traffic: local, ..settings(Family::Ipv4) };
            assert!(whole(&tables_of(&plans(http(), &["node1"]), &settings)).contains(expected), "{expected}");
        }
    }

    #[test]
    fn only_what_changed_is_written_again() {
        let settings = settings(Family::Ipv4);
        let [_, before] = tables_of(&plans(http(), &["node1", "node2"]), &settings);
        let [_, after] = tables_of(&plans(http(), &["node1"]), &settings);
        let (has, wanted) = (before.applied(), after.applied());
        assert_eq!(before.script(&has, &has), None);
        let text = after.script(&has, &wanted).unwrap();
        assert!(text.contains(":KUBE-SVC-") && !text.contains(":KUBE-SERVICES"), "{text}");
        assert_eq!(text.matches("-X KUBE-SEP-").count(), 1);
    }

    #[test]
    fn chains_of_services_that_are_gone_are_removed() {
        let existing: Applied = ["KUBE-SVC-OLD", "KUBE-SERVICES", "OTHER"].map(|name| (name.to_owned(), 0)).into();
        let [_, nat] = tables_of(&Plans::default(), &settings(Family::Ipv4));
        let text = nat.script(&existing, &nat.applied()).unwrap();
        assert!(text.contains(":KUBE-SVC-OLD - [0:0]") && text.contains("-X KUBE-SVC-OLD"));
        assert!(!text.contains("OTHER") && !text.contains("-X KUBE-SERVICES"));
        let removal = removal("nat", &existing).unwrap();
        assert!(
            removal.contains("-X KUBE-SVC-OLD") && removal.contains("-X KUBE-SERVICES") && !removal.contains("OTHER")
        );
    }
}
