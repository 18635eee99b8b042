//! Walks one packet through a rule set the way the kernel would, so that tests can ask "where does this go?".

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use super::{Action, Key, Match, Rule, Ruleset, Set, Verdict};
use crate::model::Protocol;

/// The first packet of a connection.
#[derive(Clone, Copy, Debug)]
pub struct Packet {
    pub source: Ipv4Addr,
    pub destination: Ipv4Addr,
    pub protocol: Protocol,
    pub port: u16,
    /// The source is this node.
    pub from_node: bool,
    /// The destination is an address of this node.
    pub to_node: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Rewritten to one of these.
    Forwarded {
        targets: BTreeSet<(Ipv4Addr, u16)>,
        masqueraded: bool,
    },
    /// Not for a service: goes where it wanted.
    Untouched,
    Dropped,
    Rejected,
}

enum Walk {
    Continue,
    Return(Outcome),
}

/// Where the packet goes.
pub fn trace(ruleset: &Ruleset, packet: Packet) -> Outcome {
    let mut tracer = Tracer { ruleset, packet, mark: 0, dnat: BTreeSet::new(), masqueraded: false };
    let before = if packet.from_node {
        ["filter-output-pre-dnat", "nat-output"]
    } else {
        ["filter-prerouting-pre-dnat", "nat-prerouting"]
    };
    for chain in before {
        if let Walk::Return(outcome) = tracer.chain(chain) {
            return outcome;
        }
    }
    if tracer.dnat.is_empty() {
        let filter = match (packet.from_node, packet.to_node) {
            (true, _) => "filter-output",
            (false, true) => "filter-input",
            (false, false) => "filter-forward",
        };
        return match tracer.chain(filter) {
            Walk::Return(outcome) => outcome,
            Walk::Continue => Outcome::Untouched,
        };
    }
    tracer.chain("nat-postrouting");
    Outcome::Forwarded { targets: tracer.dnat, masqueraded: tracer.masqueraded }
}

struct Tracer<'a> {
    ruleset: &'a Ruleset,
    packet: Packet,
    mark: u32,
    dnat: BTreeSet<(Ipv4Addr, u16)>,
    masqueraded: bool,
}

impl Tracer<'_> {
    fn chain(&mut self, name: &str) -> Walk {
        let ruleset = self.ruleset;
        let chain = ruleset.chains.get(name).unwrap_or_else(|| panic!("a rule leads to {name}, which does not exist"));
        for rule in &chain.rules {
            if !rule.matches.iter().all(|condition| self.matches(condition)) {
                continue;
            }
            if let Some(walk) = self.act(rule) {
                return walk;
            }
        }
        Walk::Continue
    }

    /// `None` goes on with the next rule.
    fn act(&mut self, rule: &Rule) -> Option<Walk> {
        match &rule.action {
            Action::Jump(chain) => match self.chain(chain) {
                Walk::Continue if self.dnat.is_empty() && !self.masqueraded => None,
                walk => Some(walk),
            },
            Action::Goto(chain) => Some(self.chain(chain)),
            Action::LookUp { map, with_address } => {
                let address = with_address.then_some(self.packet.destination);
                let key = Key { address, protocol: self.packet.protocol, port: self.packet.port };
                match self.ruleset.maps[*map].elements.get(&key)? {
                    Verdict::Goto(chain) => Some(self.chain(&chain.clone())),
                    Verdict::Drop => Some(Walk::Return(Outcome::Dropped)),
                }
            }
            Action::Mark(mark) => {
                self.mark |= mark;
                None
            }
            Action::Masquerade { .. } => {
                self.masqueraded = true;
                Some(Walk::Continue)
            }
            Action::Dnat { protocol, targets } => {
                if *protocol != self.packet.protocol {
                    return None;
                }
                self.dnat.extend(targets);
                Some(Walk::Continue)
            }
            Action::GotoAny(chains) => {
                for chain in chains {
                    self.chain(chain);
                }
                Some(Walk::Continue)
            }
            Action::Remember(_) => None,
            Action::Drop => Some(Walk::Return(Outcome::Dropped)),
            Action::Reject => Some(Walk::Return(Outcome::Rejected)),
        }
    }

    fn matches(&self, condition: &Match) -> bool {
        let packet = &self.packet;
        match condition {
            Match::CtNew => true,
            Match::CtDnat => !self.dnat.is_empty(),
            Match::SourceIn(net) => net.contains(&packet.source),
            Match::SourceNotIn(nets) => !nets.iter().any(|net| net.contains(&packet.source)),
            Match::DestinationNotIn(net) => !net.contains(&packet.destination),
            Match::SourceLocal => packet.from_node,
            Match::DestinationLocal => packet.to_node,
            Match::DestinationInSet(set) => match &self.ruleset.sets[*set] {
                Set::Addresses(addresses) => addresses.contains(&packet.destination),
                _ => false,
            },
            // Nobody is remembered yet: the packet is the first of its client.
            Match::SourceInAffinity(_) => false,
            Match::MarkSet(mark) => self.mark & mark != 0,
            Match::Hairpin(set) => match &self.ruleset.sets[*set] {
                Set::Hairpins(hairpins) => hairpins.iter().any(|(address, protocol, port)| {
                    *address == packet.source && *protocol == packet.protocol && self.dnat.contains(&(*address, *port))
                }),
                _ => false,
            },
        }
    }
}

#[cfg(test)]
pub(crate) mod testing {
    use super::super::Settings;

    pub fn settings() -> Settings {
        Settings {
            mark: 0x4000,
            masquerade_all: false,
            cluster_cidr: Some("10.244.0.0/16".parse().unwrap()),
            node_port_addresses: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::compile;
    use super::testing::settings;
    use super::*;
    use crate::model::{Endpoint, Service};
    use crate::plan::plan;
    use crate::plan::testing::{endpoint, model, service};

    const POD: &str = "10.244.1.9";
    const NODE: &str = "10.99.0.2";
    const OUTSIDE: &str = "203.0.113.7";

    fn packet(source: &str, destination: &str, port: u16) -> Packet {
        Packet {
            source: source.parse().unwrap(),
            destination: destination.parse().unwrap(),
            protocol: Protocol::Tcp,
            port,
            from_node: source == NODE,
            to_node: destination == NODE,
        }
    }

    fn http() -> Service {
        service("10.96.0.1", &[("http", Protocol::Tcp, 80, Some(30080))])
    }

    fn both() -> Vec<Endpoint> {
        vec![endpoint("10.244.1.2", "node1"), endpoint("10.244.2.2", "node2")]
    }

    fn run(service: Service, endpoints: Vec<Endpoint>, packet: Packet) -> Outcome {
        trace(&compile(&plan(&model(service, endpoints)), &settings()), packet)
    }

    fn to(addresses: &[&str], masqueraded: bool) -> Outcome {
        let targets = addresses.iter().map(|address| (address.parse().unwrap(), 8080)).collect();
        Outcome::Forwarded { targets, masqueraded }
    }

    #[test]
    fn cluster_ip() {
        let all = ["10.244.1.2", "10.244.2.2"];
        assert_eq!(run(http(), both(), packet(POD, "10.96.0.1", 80)), to(&all, false));
        assert_eq!(run(http(), both(), packet(NODE, "10.96.0.1", 80)), to(&all, true));
        assert_eq!(run(http(), both(), packet(OUTSIDE, "10.96.0.1", 80)), to(&all, true));
        // An endpoint that reaches itself must not see its own address as the client.
        assert_eq!(
            run(http(), vec![both().remove(0)], packet("10.244.1.2", "10.96.0.1", 80)),
            to(&["10.244.1.2"], true)
        );
        assert_eq!(run(http(), both(), packet(POD, "10.96.0.1", 81)), Outcome::Rejected);
        assert_eq!(run(http(), vec![], packet(POD, "10.96.0.1", 80)), Outcome::Rejected);
        assert_eq!(run(http(), both(), packet(POD, "192.0.2.99", 80)), Outcome::Untouched);
    }

    #[test]
    fn node_port() {
        let all = ["10.244.1.2", "10.244.2.2"];
        assert_eq!(run(http(), both(), packet(OUTSIDE, NODE, 30080)), to(&all, true));
        assert_eq!(run(http(), both(), packet(OUTSIDE, NODE, 30081)), Outcome::Untouched);
        assert_eq!(run(http(), vec![], packet(OUTSIDE, NODE, 30080)), Outcome::Rejected);
    }

    #[test]
    fn node_port_on_chosen_addresses_only() {
        let chosen = super::super::Settings { node_port_addresses: Some([NODE.parse().unwrap()].into()), ..settings() };
        let ruleset = compile(&plan(&model(http(), both())), &chosen);
        assert_eq!(trace(&ruleset, packet(OUTSIDE, NODE, 30080)), to(&["10.244.1.2", "10.244.2.2"], true));
        let other = Packet { to_node: true, ..packet(OUTSIDE, "10.98.0.2", 30080) };
        assert_eq!(trace(&ruleset, other), Outcome::Untouched);
    }

    #[test]
    fn external_policy_local_keeps_the_client_address() {
        let mut local = http();
        local.external_local = true;
        let all = ["10.244.1.2", "10.244.2.2"];
        assert_eq!(run(local.clone(), both(), packet(OUTSIDE, NODE, 30080)), to(&["10.244.1.2"], false));
        assert_eq!(run(local.clone(), both(), packet(POD, NODE, 30080)), to(&all, false));
        assert_eq!(run(local.clone(), both(), packet(NODE, NODE, 30080)), to(&all, true));
        let away = vec![endpoint("10.244.2.2", "node2")];
        assert_eq!(run(local.clone(), away.clone(), packet(OUTSIDE, NODE, 30080)), Outcome::Dropped);
        assert_eq!(run(local, away, packet(POD, "10.96.0.1", 80)), to(&["10.244.2.2"], false));
    }

    #[test]
    fn internal_policy_local() {
        let mut local = http();
        local.internal_local = true;
        assert_eq!(run(local.clone(), both(), packet(POD, "10.96.0.1", 80)), to(&["10.244.1.2"], false));
        let away = vec![endpoint("10.244.2.2", "node2")];
        assert_eq!(run(local.clone(), away.clone(), packet(POD, "10.96.0.1", 80)), Outcome::Dropped);
        assert_eq!(run(local, away, packet(OUTSIDE, NODE, 30080)), to(&["10.244.2.2"], true));
    }

    #[test]
    fn external_and_load_balancer_addresses() {
        let mut public = http();
        public.external_ips = vec!["198.51.100.1".parse().unwrap()];
        public.load_balancer_ips = vec!["198.51.100.2".parse().unwrap()];
        public.source_ranges = vec!["203.0.113.0/24".parse().unwrap()];
        let all = ["10.244.1.2", "10.244.2.2"];
        assert_eq!(run(public.clone(), both(), packet(OUTSIDE, "198.51.100.1", 80)), to(&all, true));
        assert_eq!(run(public.clone(), both(), packet(OUTSIDE, "198.51.100.2", 80)), to(&all, true));
        assert_eq!(run(public.clone(), both(), packet("8.8.8.8", "198.51.100.2", 80)), Outcome::Dropped);
        assert_eq!(run(public, both(), packet("8.8.8.8", "198.51.100.1", 80)), to(&all, true));
    }

    #[test]
    fn affinity_starts_at_any_endpoint() {
        let mut sticky = http();
        sticky.affinity = Some(60);
        assert_eq!(run(sticky, both(), packet(POD, "10.96.0.1", 80)), to(&["10.244.1.2", "10.244.2.2"], false));
    }
}
