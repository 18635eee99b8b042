//! From the plan to the rule set.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use sha2::{Digest, Sha256};

use super::{Action, Chain, Hook, Key, Map, Match, Rule, Ruleset, Set, Verdict};
use crate::plan::{Disposition, Plan, PlannedPort, Target};

const SERVICES: &str = "services";
const MASQUERADING: &str = "masquerading";
const REJECT: &str = "reject-chain";
const SERVICE_CHECK: &str = "service-endpoints-check";
const NODE_PORT_CHECK: &str = "nodeport-endpoints-check";
const CLUSTER_IPS_CHECK: &str = "cluster-ips-check";
const FIREWALL_CHECK: &str = "firewall-check";

const SERVICE_IPS: &str = "service-ips";
const SERVICE_NODE_PORTS: &str = "service-nodeports";
const NO_ENDPOINT_SERVICES: &str = "no-endpoint-services";
const NO_ENDPOINT_NODE_PORTS: &str = "no-endpoint-nodeports";
const FIREWALL_IPS: &str = "firewall-ips";
const CLUSTER_IPS: &str = "cluster-ips";
const NODE_PORT_IPS: &str = "nodeport-ips";
const HAIRPINS: &str = "hairpin-connections";

// Numbers, because not every nft knows the names of these priorities for every hook.
const BEFORE_DNAT: i32 = -110;
const DNAT: i32 = -100;
const FILTER: i32 = 0;
const SNAT: i32 = 100;

/// What does not come from the API.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// The bit that marks packets to masquerade, as a value.
    pub mark: u32,
    pub masquerade_all: bool,
    /// The network of all pods; with it, traffic from elsewhere to cluster IPs is masqueraded, and pods' own traffic
    /// to external addresses is told apart.
    pub cluster_cidr: Option<Ipv4Net>,
    /// The node's addresses that answer on node ports; `None` means all but loopback.
    pub node_port_addresses: Option<BTreeSet<Ipv4Addr>>,
}

/// Compiles the whole table.
pub fn compile(plan: &Plan, settings: &Settings) -> Ruleset {
    let mut ruleset = skeleton(settings);
    for port in &plan.ports {
        Compiler { ruleset: &mut ruleset, settings, port }.compile();
    }
    ruleset
}

/// The part that does not depend on any service.
fn skeleton(settings: &Settings) -> Ruleset {
    let loopback = Match::DestinationNotIn(Ipv4Net::new_assert(Ipv4Addr::new(127, 0, 0, 0), 8));
    let node_port = |map| {
        let action = Action::LookUp { map, with_address: false };
        let matches = match &settings.node_port_addresses {
            None => vec![Match::DestinationLocal, loopback.clone()],
            Some(_) => vec![Match::DestinationInSet(NODE_PORT_IPS)],
        };
        Rule { matches, action }
    };
    let by_address = |map| rule([], Action::LookUp { map, with_address: true });

    let mut services = Vec::new();
    if settings.masquerade_all {
        services.push(rule([Match::DestinationInSet(CLUSTER_IPS)], Action::Mark(settings.mark)));
    } else if let Some(pods) = settings.cluster_cidr {
        let outside = [Match::DestinationInSet(CLUSTER_IPS), Match::SourceNotIn(vec![pods])];
        services.push(rule(outside, Action::Mark(settings.mark)));
    }
    services.push(by_address(SERVICE_IPS));
    services.push(node_port(SERVICE_NODE_PORTS));

    let masquerading = vec![
        rule([Match::MarkSet(settings.mark)], Action::Masquerade { clear: Some(settings.mark) }),
        rule([Match::CtDnat, Match::Hairpin(HAIRPINS)], Action::Masquerade { clear: None }),
    ];
    let mut ruleset = Ruleset { chains: base_chains(), ..Ruleset::default() };
    for (name, rules) in [
        (SERVICES, services),
        (MASQUERADING, masquerading),
        (REJECT, vec![rule([], Action::Reject)]),
        (SERVICE_CHECK, vec![by_address(NO_ENDPOINT_SERVICES)]),
        (NODE_PORT_CHECK, vec![node_port(NO_ENDPOINT_NODE_PORTS)]),
        (CLUSTER_IPS_CHECK, vec![rule([Match::DestinationInSet(CLUSTER_IPS)], Action::Reject)]),
        (FIREWALL_CHECK, vec![by_address(FIREWALL_IPS)]),
    ] {
        ruleset.chains.insert(name.to_owned(), Chain { hook: None, rules });
    }
    for (name, with_address) in [
        (SERVICE_IPS, true),
        (NO_ENDPOINT_SERVICES, true),
        (FIREWALL_IPS, true),
        (SERVICE_NODE_PORTS, false),
        (NO_ENDPOINT_NODE_PORTS, false),
    ] {
        ruleset.maps.insert(name.to_owned(), Map { with_address, elements: BTreeMap::new() });
    }
    ruleset.sets.insert(CLUSTER_IPS.to_owned(), Set::Addresses(BTreeSet::new()));
    ruleset.sets.insert(HAIRPINS.to_owned(), Set::Hairpins(BTreeSet::new()));
    if let Some(addresses) = &settings.node_port_addresses {
        let usable = addresses.iter().filter(|address| !address.is_loopback()).copied();
        ruleset.sets.insert(NODE_PORT_IPS.to_owned(), Set::Addresses(usable.collect()));
    }
    ruleset
}

/// The hooks. Source ranges are checked before the destination is rewritten; unserved services after it, where
/// rejecting is allowed.
fn base_chains() -> BTreeMap<String, Chain> {
    let new_jump = |chain: &str| rule([Match::CtNew], Action::Jump(chain.to_owned()));
    let jump = |chain: &str| rule([], Action::Jump(chain.to_owned()));
    let chains = [
        ("filter-prerouting-pre-dnat", "filter", "prerouting", BEFORE_DNAT, vec![new_jump(FIREWALL_CHECK)]),
        ("filter-output-pre-dnat", "filter", "output", BEFORE_DNAT, vec![new_jump(FIREWALL_CHECK)]),
        ("filter-input", "filter", "input", FILTER, vec![new_jump(NODE_PORT_CHECK), new_jump(SERVICE_CHECK)]),
        ("filter-forward", "filter", "forward", FILTER, vec![new_jump(SERVICE_CHECK), new_jump(CLUSTER_IPS_CHECK)]),
        ("filter-output", "filter", "output", FILTER, vec![new_jump(SERVICE_CHECK), new_jump(CLUSTER_IPS_CHECK)]),
        ("nat-prerouting", "nat", "prerouting", DNAT, vec![jump(SERVICES)]),
        ("nat-output", "nat", "output", DNAT, vec![jump(SERVICES)]),
        ("nat-postrouting", "nat", "postrouting", SNAT, vec![jump(MASQUERADING)]),
    ];
    let chain = |(name, kind, hook, priority, rules): (&str, _, _, _, _)| {
        (name.to_owned(), Chain { hook: Some(Hook { kind, hook, priority }), rules })
    };
    chains.into_iter().map(chain).collect()
}

fn rule<const N: usize>(matches: [Match; N], action: Action) -> Rule {
    Rule { matches: matches.into(), action }
}

/// Adds one service port.
struct Compiler<'a> {
    ruleset: &'a mut Ruleset,
    settings: &'a Settings,
    port: &'a PlannedPort,
}

impl Compiler<'_> {
    fn compile(&mut self) {
        let port = self.port;
        self.endpoint_chains();
        let cluster = self.policy_chain("service", &port.cluster, !port.internal_local || port.externally_accessible());
        let local = self.policy_chain("local", &port.local, port.internal_local || port.external_local);
        self.internal(if port.internal_local { &local } else { &cluster });
        if port.externally_accessible() {
            self.external(&cluster, &local);
        }
    }

    fn internal(&mut self, chain: &str) {
        let key = self.key(self.port.cluster_ip);
        if let Some(Set::Addresses(addresses)) = self.ruleset.sets.get_mut(CLUSTER_IPS) {
            addresses.insert(self.port.cluster_ip);
        }
        match unserved(self.port.internal) {
            None => self.element(SERVICE_IPS, key, Verdict::Goto(chain.to_owned())),
            Some(verdict) => self.element(NO_ENDPOINT_SERVICES, key, verdict),
        }
    }

    fn external(&mut self, cluster: &str, local: &str) {
        let port = self.port;
        let external = self.name("external");
        if port.served {
            self.chain(external.clone(), self.external_rules(cluster, local));
        }
        let verdict = Verdict::Goto(external);
        let node_port = port.node_port.map(|number| Key { address: None, protocol: port.id.protocol, port: number });
        for address in port.external_addresses() {
            if port.served {
                self.element(SERVICE_IPS, self.key(address), verdict.clone());
            }
            if let Some(refusal) = unserved(port.external) {
                self.element(NO_ENDPOINT_SERVICES, self.key(address), refusal);
            }
        }
        if let Some(key) = node_port {
            if port.served {
                self.element(SERVICE_NODE_PORTS, key, verdict);
            }
            if let Some(refusal) = unserved(port.external) {
                self.element(NO_ENDPOINT_NODE_PORTS, key, refusal);
            }
        }
        if !port.load_balancer_ips.is_empty() && !port.source_ranges.is_empty() {
            let firewall = self.name("firewall");
            // A node that talks to the address of its own load balancer may have that address as its source.
            let own = port.load_balancer_ips.iter().map(|&address| Ipv4Net::from(address));
            let allowed: BTreeSet<Ipv4Net> = port.source_ranges.iter().copied().chain(own).collect();
            let allowed = Ipv4Net::aggregate(&allowed.into_iter().collect());
            self.chain(firewall.clone(), vec![rule([Match::SourceNotIn(allowed)], Action::Drop)]);
            for &address in &port.load_balancer_ips {
                self.element(FIREWALL_IPS, self.key(address), Verdict::Goto(firewall.clone()));
            }
        }
    }

    /// With policy Local, traffic that comes from this node or its pods still goes everywhere, as if it had left the
    /// cluster and come back through a load balancer.
    fn external_rules(&self, cluster: &str, local: &str) -> Vec<Rule> {
        let mark = Action::Mark(self.settings.mark);
        if !self.port.external_local {
            return vec![rule([], mark), rule([], Action::Goto(cluster.to_owned()))];
        }
        let mut rules = Vec::new();
        if !self.port.cluster.is_empty() {
            let everywhere = Action::Goto(cluster.to_owned());
            if let Some(pods) = self.settings.cluster_cidr {
                rules.push(rule([Match::SourceIn(pods)], everywhere.clone()));
            }
            rules.push(rule([Match::SourceLocal], mark));
            rules.push(rule([Match::SourceLocal], everywhere));
        }
        if self.port.external == Disposition::Forward {
            rules.push(rule([], Action::Goto(local.to_owned())));
        }
        rules
    }

    /// The chain that picks among the targets; not made when nothing leads to it.
    fn policy_chain(&mut self, kind: &str, targets: &[Target], used: bool) -> String {
        let name = self.name(kind);
        if !used || targets.is_empty() {
            return name;
        }
        let rules = if self.port.affinity.is_none() {
            let targets = targets.iter().map(|target| (target.address, target.port)).collect();
            vec![rule([], Action::Dnat { protocol: self.port.id.protocol, targets })]
        } else {
            let chains: Vec<String> = targets.iter().map(|target| self.endpoint_name("endpoint", target)).collect();
            let known = targets.iter().zip(&chains).map(|(target, chain)| {
                rule([Match::SourceInAffinity(self.endpoint_name("affinity", target))], Action::Goto(chain.clone()))
            });
            known.chain([rule([], Action::GotoAny(chains.clone()))]).collect()
        };
        self.chain(name.clone(), rules);
        name
    }

    /// Only affinity needs chains of single endpoints: they remember the client.
    fn endpoint_chains(&mut self) {
        for target in self.port.targets() {
            if target.local
                && let Some(Set::Hairpins(hairpins)) = self.ruleset.sets.get_mut(HAIRPINS)
            {
                hairpins.insert((target.address, self.port.id.protocol, target.port));
            }
            if let Some(seconds) = self.port.affinity {
                let clients = self.endpoint_name("affinity", &target);
                let dnat =
                    Action::Dnat { protocol: self.port.id.protocol, targets: vec![(target.address, target.port)] };
                let rules = vec![rule([], Action::Remember(clients.clone())), rule([], dnat)];
                self.ruleset.sets.insert(clients, Set::Affinity { seconds });
                self.chain(self.endpoint_name("endpoint", &target), rules);
            }
        }
    }

    fn key(&self, address: Ipv4Addr) -> Key {
        Key { address: Some(address), protocol: self.port.id.protocol, port: self.port.port }
    }

    fn chain(&mut self, name: String, rules: Vec<Rule>) {
        self.ruleset.chains.insert(name, Chain { hook: None, rules });
    }

    /// The first service to claim an address and port keeps it; the API server prevents most conflicts.
    fn element(&mut self, map: &str, key: Key, verdict: Verdict) {
        if let Some(map) = self.ruleset.maps.get_mut(map) {
            map.elements.entry(key).or_insert(verdict);
        }
    }

    fn name(&self, kind: &str) -> String {
        object_name(kind, &self.readable())
    }

    /// The time to live is part of an affinity set's identity: it cannot be changed in place.
    fn endpoint_name(&self, kind: &str, target: &Target) -> String {
        let seconds = self.port.affinity.unwrap_or_default();
        object_name(kind, &format!("{}__{}/{}/{seconds}", self.readable(), target.address, target.port))
    }

    fn readable(&self) -> String {
        let id = &self.port.id;
        format!("{}/{}/{}/{}", id.service.namespace, id.service.name, id.protocol, id.port)
    }
}

/// What the filter hooks do with traffic that has no endpoint.
fn unserved(disposition: Disposition) -> Option<Verdict> {
    match disposition {
        Disposition::Forward => None,
        Disposition::Drop => Some(Verdict::Drop),
        Disposition::Reject => Some(Verdict::Goto(REJECT.to_owned())),
    }
}

/// `kind-hash-readable`: unique by the hash, which stays when a long readable part is cut.
fn object_name(kind: &str, readable: &str) -> String {
    const LONGEST: usize = 110;
    let digest = Sha256::digest(readable.as_bytes());
    let mut name = format!("{kind}-");
    for byte in &digest[..5] {
        // Writing to a string cannot fail.
        let _ = write!(name, "{byte:02x}");
    }
    name.push('-');
    name.push_str(readable);
    name.truncate(LONGEST);
    name
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Protocol;
    use crate::plan::plan;
    use crate::plan::testing::{endpoint, model, service};

    #[test]
    fn every_reference_has_its_object() {
        let mut svc =
            service("10.96.0.1", &[("http", Protocol::Tcp, 80, Some(30080)), ("dns", Protocol::Udp, 53, None)]);
        svc.affinity = Some(60);
        svc.external_local = true;
        svc.load_balancer_ips = vec![Ipv4Addr::new(192, 0, 2, 1)];
        svc.source_ranges = vec!["198.51.100.0/24".parse().unwrap()];
        let plan = plan(&model(svc, vec![endpoint("10.244.1.2", "node1"), endpoint("10.244.2.2", "node2")]));
        let ruleset = compile(&plan, &super::super::trace::testing::settings());
        let chain_exists = |chain: &String| assert!(ruleset.chains.contains_key(chain), "{chain}");
        for chain in ruleset.chains.values() {
            for rule in &chain.rules {
                match &rule.action {
                    Action::Jump(chain) | Action::Goto(chain) => chain_exists(chain),
                    Action::GotoAny(chains) => chains.iter().for_each(chain_exists),
                    Action::LookUp { map, .. } => assert!(ruleset.maps.contains_key(*map)),
                    Action::Remember(set) => assert!(ruleset.sets.contains_key(set)),
                    _ => {}
                }
                for condition in &rule.matches {
                    match condition {
                        Match::SourceInAffinity(set) => assert!(ruleset.sets.contains_key(set)),
                        Match::DestinationInSet(set) | Match::Hairpin(set) => assert!(ruleset.sets.contains_key(*set)),
                        _ => {}
                    }
                }
            }
        }
        for map in ruleset.maps.values() {
            for (key, verdict) in &map.elements {
                assert_eq!(key.address.is_some(), map.with_address);
                if let Verdict::Goto(chain) = verdict {
                    chain_exists(chain);
                }
            }
        }
    }

    #[test]
    fn names_stay_short_and_different() {
        let long = "x".repeat(300);
        let (a, b) = (object_name("service", &format!("{long}a")), object_name("service", &format!("{long}b")));
        assert_ne!(a, b);
        assert_eq!(a.len(), 110);
    }
}
