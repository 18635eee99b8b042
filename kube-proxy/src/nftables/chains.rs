//! The rules: a fixed part that depends on the configuration only, and the chain of each class.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use super::rule::{
    Fact, Register, Rule, STATE_NEW, STATUS_DNAT, Step, change_mark, compare, destination, destination_port, has_bit,
    in_network, in_set, is_local, scratch, source,
};
use super::schema::{Class, Route, Scope, SetName};
use crate::model::Family;

const SERVICES: &str = "services";
const MASQUERADING: &str = "masquerading";
const SERVICE_CHECK: &str = "service-endpoints-check";
const NODE_PORT_CHECK: &str = "nodeport-endpoints-check";
const CLUSTER_IPS_CHECK: &str = "cluster-ips-check";
const FIREWALL_CHECK: &str = "firewall-check";

/// `NF_INET_*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HookPoint {
    Prerouting = 0,
    Input = 1,
    Forward = 2,
    Output = 3,
    Postrouting = 4,
}

/// Where the kernel calls a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hook {
    pub kind: &'static str,
    pub point: HookPoint,
    pub priority: i32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    pub name: String,
    pub hook: Option<Hook>,
    pub rules: Vec<Rule>,
}

/// How traffic of this node's pods is told from other traffic.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum LocalTraffic {
    /// It is not: only `masquerade_all` makes traffic to cluster IPs masqueraded.
    #[default]
    Unknown,
    /// Comes from these addresses.
    Network(IpNet),
    /// Comes by the interface with this name …
    Interface(String),
    /// … or whose name begins so.
    InterfacePrefix(String),
}

/// What does not come from services and endpoints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    pub family: Family,
    /// The bit that marks packets to masquerade, as a value.
    pub mark: u32,
    pub masquerade_all: bool,
    pub local_traffic: LocalTraffic,
    /// The node's addresses that answer on node ports; `None` means all but loopback.
    pub node_port_addresses: Option<Vec<IpAddr>>,
}

const BEFORE_DNAT: i32 = -110;
const DNAT: i32 = -100;
const FILTER: i32 = 0;
const SNAT: i32 = 100;

/// The part that does not depend on any service.
pub fn skeleton(settings: &Settings) -> Vec<Chain> {
    let family = settings.family;
    let layout = Layout::of(family);
    let plain = |name: &str, rules| Chain { name: name.to_owned(), hook: None, rules };
    let address_in = |set, then| layout.front_in(false, set, then);
    let node_port_in = |set, then| {
        let Rule(steps) = layout.front_in(true, set, then);
        Rule::of(to_node_port(settings).into_iter().chain(steps))
    };
    let mut chains = vec![
        plain(SERVICES, services(settings)),
        plain(MASQUERADING, masquerading(settings)),
        plain(
            SERVICE_CHECK,
            vec![address_in(SetName::SilentServices, Step::Drop), address_in(SetName::RefusedServices, Step::Reject)],
        ),
        plain(
            NODE_PORT_CHECK,
            vec![
                node_port_in(SetName::SilentNodePorts, Step::Drop),
                node_port_in(SetName::RefusedNodePorts, Step::Reject),
            ],
        ),
        plain(CLUSTER_IPS_CHECK, vec![Rule::of(to_cluster_ip(family).into_iter().chain([Step::Reject]))]),
        plain(FIREWALL_CHECK, vec![firewall(&layout)]),
    ];
    chains.extend(base_chains());
    chains
}

/// The hooks. Source ranges are checked before the destination is rewritten; unserved services after it, where
/// rejecting is allowed.
fn base_chains() -> Vec<Chain> {
    let new = |chain| Rule::of(has_bit(Fact::ConnectionState, STATE_NEW).into_iter().chain([Step::Jump(chain)]));
    let every = |chain| Rule::of([Step::Jump(chain)]);
    use HookPoint::{Forward, Input, Output, Postrouting, Prerouting};
    let chains = [
        ("filter-prerouting-pre-dnat", "filter", Prerouting, BEFORE_DNAT, vec![new(FIREWALL_CHECK)]),
        ("filter-output-pre-dnat", "filter", Output, BEFORE_DNAT, vec![new(FIREWALL_CHECK)]),
        ("filter-input", "filter", Input, FILTER, vec![new(NODE_PORT_CHECK), new(SERVICE_CHECK)]),
        ("filter-forward", "filter", Forward, FILTER, vec![new(SERVICE_CHECK), new(CLUSTER_IPS_CHECK)]),
        ("filter-output", "filter", Output, FILTER, vec![new(SERVICE_CHECK), new(CLUSTER_IPS_CHECK)]),
        ("nat-prerouting", "nat", Prerouting, DNAT, vec![every(SERVICES)]),
        ("nat-output", "nat", Output, DNAT, vec![every(SERVICES)]),
        ("nat-postrouting", "nat", Postrouting, SNAT, vec![every(MASQUERADING)]),
    ];
    let chain = |(name, kind, point, priority, rules): (&str, _, _, _, _)| Chain {
        name: name.to_owned(),
        hook: Some(Hook { kind, point, priority }),
        rules,
    };
    chains.into_iter().map(chain).collect()
}

fn services(settings: &Settings) -> Vec<Rule> {
    let layout = Layout::of(settings.family);
    let mark = change_mark(!settings.mark, settings.mark);
    let mut rules = Vec::new();
    let from_outside = match (settings.masquerade_all, from_pods(settings, false)) {
        (true, _) => Some(Vec::new()),
        (false, outside) => outside,
    };
    if let Some(outside) = from_outside {
        rules.push(Rule::of(to_cluster_ip(settings.family).into_iter().chain(outside).chain(mark)));
    }
    rules.push(layout.dispatch(false, Vec::new()));
    rules.push(layout.dispatch(true, to_node_port(settings)));
    rules
}

/// The mark is cleared, so that the packet is not masqueraded again in another place.
fn masquerading(settings: &Settings) -> Vec<Rule> {
    let marked = has_bit(Fact::Mark, settings.mark);
    let layout = Layout::of(settings.family);
    let hairpin = [
        source(settings.family, 0),
        destination(settings.family, layout.words),
        Step::InSet { set: SetName::Hairpins, key: 0, expected: true },
    ];
    vec![
        Rule::of(marked.into_iter().chain(change_mark(!settings.mark, 0)).chain([Step::Masquerade])),
        Rule::of(has_bit(Fact::ConnectionStatus, STATUS_DNAT).into_iter().chain(hairpin).chain([Step::Masquerade])),
    ]
}

fn firewall(layout: &Layout) -> Rule {
    let mut steps = layout.load_front(false);
    steps.extend([
        Step::InSet { set: SetName::GuardedServices, key: 0, expected: true },
        source(layout.family, layout.after(false)),
        Step::InSet { set: SetName::AllowedClients, key: 0, expected: false },
        Step::Drop,
    ]);
    Rule(steps)
}

fn to_cluster_ip(family: Family) -> [Step; 2] {
    in_set(destination(family, scratch()), SetName::ClusterIps)
}

fn to_node_port(settings: &Settings) -> Vec<Step> {
    let family = settings.family;
    if settings.node_port_addresses.is_some() {
        return in_set(destination(family, scratch()), SetName::NodePortIps).to_vec();
    }
    let loopback = match family {
        Family::Ipv4 => IpNet::new_assert(IpAddr::V4(Ipv4Addr::new(127, 0, 0, 0)), 8),
        Family::Ipv6 => IpNet::new_assert(IpAddr::V6(Ipv6Addr::LOCALHOST), 128),
    };
    let outward = in_network(|to| destination(family, to), loopback, false);
    is_local(Fact::DestinationType).into_iter().chain(outward).collect()
}

/// `None` if it cannot be known.
fn from_pods(settings: &Settings, expected: bool) -> Option<Vec<Step>> {
    let by_name = |name: &[u8]| {
        let load = Step::Load { fact: Fact::InputInterface, to: scratch() };
        Some(vec![load, compare(expected, name)])
    };
    match &settings.local_traffic {
        LocalTraffic::Unknown => None,
        LocalTraffic::Network(net) => Some(in_network(|to| source(settings.family, to), *net, expected).to_vec()),
        LocalTraffic::Interface(name) => {
            let mut whole = name.as_bytes().to_vec();
            whole.resize(16, 0);
            by_name(&whole)
        }
        LocalTraffic::InterfacePrefix(prefix) => by_name(prefix.as_bytes()),
    }
}

/// The chain that treats packets as the class says. It changes nothing when the class has no endpoint: then the filter
/// hooks know what to do.
pub fn class_chain(class: Class, settings: &Settings) -> Chain {
    let layout = Layout::of(settings.family);
    let mark = || change_mark(!settings.mark, settings.mark).to_vec();
    let mut rules = Vec::new();
    if class.masquerade {
        rules.push(Rule(mark()));
    }
    match class.route {
        Route::Cluster => layout.pick(&mut rules, class, Scope::Cluster, &[]),
        Route::Local => layout.pick(&mut rules, class, Scope::Local, &[]),
        Route::ExternalLocal => {
            if let Some(pods) = from_pods(settings, true) {
                layout.pick(&mut rules, class, Scope::Cluster, &pods);
            }
            let here = is_local(Fact::SourceType);
            if class.cluster > 0 {
                rules.push(Rule::of(here.clone().into_iter().chain(mark())));
            }
            layout.pick(&mut rules, class, Scope::Cluster, &here);
            layout.pick(&mut rules, class, Scope::Local, &[]);
        }
    }
    Chain { name: class.chain(), hook: None, rules }
}

/// Which registers hold what. The key of a front is loaded to 0 and up, and behind it the place in the list of
/// endpoints, or the client. What is looked up goes to 0 again, or behind the longest key.
///
/// No key is made of what was looked up before: nft 1.0 aborts when it is to list such a rule. It still does when it
/// meets what remembers clients, whose data was looked up.
struct Layout {
    family: Family,
    /// Registers of one address.
    words: Register,
    /// The first one behind a client's key.
    target: Register,
}

impl Layout {
    fn of(family: Family) -> Self {
        let words = match family {
            Family::Ipv4 => 1,
            Family::Ipv6 => 4,
        };
        Self { family, words, target: 2 * words + 2 }
    }

    /// The first register behind a front.
    fn after(&self, node_port: bool) -> Register {
        if node_port { 2 } else { self.words + 2 }
    }

    fn load_front(&self, node_port: bool) -> Vec<Step> {
        let protocol = |to| Step::Load { fact: Fact::Protocol, to };
        if node_port {
            return vec![protocol(0), destination_port(1)];
        }
        vec![destination(self.family, 0), protocol(self.words), destination_port(self.words + 1)]
    }

    fn front_in(&self, node_port: bool, set: SetName, then: Step) -> Rule {
        let found = [Step::InSet { set, key: 0, expected: true }, then];
        Rule::of(self.load_front(node_port).into_iter().chain(found))
    }

    fn dispatch(&self, node_port: bool, mut steps: Vec<Step>) -> Rule {
        let map = if node_port { SetName::NodePorts } else { SetName::Services };
        steps.extend(self.load_front(node_port));
        steps.push(Step::Dispatch { map, key: 0 });
        Rule(steps)
    }

    /// Rules that rewrite the destination of packets for which `condition` holds; none if there are no endpoints.
    fn pick(&self, rules: &mut Vec<Rule>, class: Class, scope: Scope, condition: &[Step]) {
        let (count, map) = match (scope, class.node_port) {
            (Scope::Cluster, false) => (class.cluster, SetName::ClusterEndpoints),
            (Scope::Cluster, true) => (class.cluster, SetName::NodePortClusterEndpoints),
            (Scope::Local, false) => (class.local, SetName::LocalEndpoints),
            (Scope::Local, true) => (class.local, SetName::NodePortLocalEndpoints),
        };
        if count == 0 {
            return;
        }
        let mut rule = |steps: Vec<Step>| {
            let front = self.load_front(class.node_port);
            rules.push(Rule::of(condition.iter().cloned().chain(front).chain(steps)));
        };
        let place = Step::Random { below: count, to: self.after(class.node_port) };
        if class.affinity > 0 {
            rule(self.remembered(class));
            let chosen = [place.clone(), Step::LookUp { map, key: 0, to: self.target }];
            rule(chosen.into_iter().chain(self.remember(class)).collect());
        }
        // Also with affinity, for when the kernel cannot remember more clients.
        rule(vec![place, Step::LookUp { map, key: 0, to: 0 }, Step::Dnat { address: 0, port: self.words }]);
    }

    /// To where the client was sent last.
    fn remembered(&self, class: Class) -> Vec<Step> {
        let map = affinity(class);
        vec![source(self.family, self.after(class.node_port)), Step::LookUp { map, key: 0, to: self.target }]
            .into_iter()
            .chain(self.to_target(class))
            .collect()
    }

    fn remember(&self, class: Class) -> Vec<Step> {
        std::iter::once(source(self.family, self.after(class.node_port))).chain(self.to_target(class)).collect()
    }

    /// Remembers the client, or that it came again.
    fn to_target(&self, class: Class) -> [Step; 2] {
        let remember = Step::Remember { map: affinity(class), key: 0, data: self.target, seconds: class.affinity };
        [remember, Step::Dnat { address: self.target, port: self.target + self.words }]
    }
}

fn affinity(class: Class) -> SetName {
    if class.node_port { SetName::NodePortAffinity } else { SetName::Affinity }
}
