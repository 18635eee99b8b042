//! Which endpoints each service port uses on this node, and what happens to traffic that has none. The same for every
//! backend, and free of anything that a kernel understands.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use ipnet::IpNet;

use crate::model::{Endpoint, Entry, Family, Node, Protocol, Service, ServiceName, ServicePort, Slice};

/// Where packets can be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Target {
    pub address: IpAddr,
    pub port: u16,
    /// On this node.
    pub local: bool,
}

/// What happens to traffic for one kind of address of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disposition {
    Forward,
    /// The policy is Local and this node has no endpoint: other nodes do, so be silent.
    Drop,
    /// Nobody serves.
    Reject,
}

/// One port of a service in one address family as this node should treat it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlannedPort {
    pub name: Box<str>,
    pub protocol: Protocol,
    pub cluster_ip: IpAddr,
    pub port: u16,
    pub node_port: Option<u16>,
    pub external_ips: Vec<IpAddr>,
    pub load_balancer_ips: Vec<IpAddr>,
    pub source_ranges: Option<Vec<IpNet>>,
    pub internal_local: bool,
    pub external_local: bool,
    pub affinity: Option<u32>,
    /// Endpoints for traffic policy Cluster; empty when the service never uses it.
    pub cluster: Vec<Target>,
    /// Endpoints for traffic policy Local; empty when the service never uses it.
    pub local: Vec<Target>,
    /// Somebody in the cluster serves, even if traffic from here may not reach it.
    pub served: bool,
    pub internal: Disposition,
    pub external: Disposition,
    /// Who may go on answering a UDP client, whatever the policies say now. Empty for other protocols, whose clients
    /// notice themselves.
    pub serving: Vec<(IpAddr, u16)>,
}

impl PlannedPort {
    pub fn family(&self) -> Family {
        Family::of(self.cluster_ip)
    }

    /// Reachable under other addresses than the cluster IP.
    pub fn externally_accessible(&self) -> bool {
        self.node_port.is_some() || !self.external_ips.is_empty() || !self.load_balancer_ips.is_empty()
    }

    /// Every endpoint that traffic of any kind can reach from here, once.
    pub fn targets(&self) -> BTreeSet<Target> {
        self.cluster.iter().chain(&self.local).copied().collect()
    }

    /// The addresses that only external traffic uses.
    pub fn external_addresses(&self) -> impl Iterator<Item = IpAddr> + '_ {
        self.external_ips.iter().chain(&self.load_balancer_ips).copied()
    }
}

/// A node port on which load balancers ask whether this node has endpoints of a service, and how many it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HealthCheck {
    pub node_port: u16,
    pub local_endpoints: usize,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServicePlan {
    pub ports: Vec<PlannedPort>,
    pub health_check: Option<HealthCheck>,
}

/// The plans of all services.
pub type Plans = BTreeMap<ServiceName, ServicePlan>;

/// A service whose plan changed, with the plan that it had.
#[derive(Clone, Debug)]
pub struct Changed {
    pub name: ServiceName,
    pub old: ServicePlan,
}

/// Decides for one service.
pub fn plan(entry: &Entry, node: &Node, node_name: &str) -> ServicePlan {
    let mut result = ServicePlan::default();
    let slices = |family| entry.slices.values().filter(move |slice| slice.family == family);
    for service in &entry.families {
        let family = Family::of(service.cluster_ip);
        for port in &service.ports {
            let candidates = candidates(slices(family), port);
            let here = Here { node, node_name };
            result.ports.push(plan_port(here, service, port, &candidates));
        }
        if let Some(node_port) = service.health_check_node_port.filter(|_| service.external_local) {
            let endpoints = slices(family).flat_map(|slice| &slice.endpoints);
            // Not those that terminate: load balancers should go elsewhere before they are gone.
            let addresses: BTreeSet<IpAddr> =
                endpoints.filter(|endpoint| endpoint.local && endpoint.ready).map(|e| e.address).collect();
            let before = result.health_check.map_or(0, |check| check.local_endpoints);
            // A dual-stack service has its pods once in each family.
            result.health_check = Some(HealthCheck { node_port, local_endpoints: before.max(addresses.len()) });
        }
    }
    result
}

/// The endpoints behind a service port, each with its own port number.
fn candidates<'a>(slices: impl Iterator<Item = &'a Slice>, port: &ServicePort) -> Vec<(&'a Endpoint, u16)> {
    let mut candidates: Vec<(&Endpoint, u16)> = slices
        .flat_map(|slice| slice.ports.iter().map(move |port| (slice, port)))
        .filter(|(_, slice_port)| slice_port.name == port.name && slice_port.protocol == port.protocol)
        .flat_map(|(slice, port)| slice.endpoints.iter().map(move |endpoint| (endpoint, port.port)))
        .collect();
    // An endpoint that moves between slices is in two of them for a moment; ready wins.
    candidates.sort_by_key(|(endpoint, port)| (endpoint.address, *port, !endpoint.ready));
    candidates.dedup_by_key(|(endpoint, port)| (endpoint.address, *port));
    candidates
}

/// Where the proxy runs.
#[derive(Clone, Copy)]
struct Here<'a> {
    node: &'a Node,
    node_name: &'a str,
}

fn plan_port(here: Here<'_>, service: &Service, port: &ServicePort, candidates: &[(&Endpoint, u16)]) -> PlannedPort {
    let accessible =
        port.node_port.is_some() || !service.external_ips.is_empty() || !service.load_balancer_ips.is_empty();
    let external_local = service.external_local && accessible;
    // Local external traffic still needs the Cluster endpoints: pods and processes of the node itself use those.
    let uses_cluster = !service.internal_local || accessible;
    let uses_local = service.internal_local || external_local;
    let target =
        |(endpoint, port): &(&Endpoint, u16)| Target { address: endpoint.address, port: *port, local: endpoint.local };

    let cluster: Vec<Target> = if uses_cluster {
        let topology = Topology::choose(here, candidates);
        usable(candidates.iter().filter(|(endpoint, _)| !endpoint.ready || topology.admits(here, endpoint)))
            .map(target)
            .collect()
    } else {
        Vec::new()
    };
    let local: Vec<Target> = if uses_local {
        usable(candidates.iter().filter(|(endpoint, _)| endpoint.local)).map(target).collect()
    } else {
        Vec::new()
    };
    let served = usable(candidates.iter()).next().is_some();
    let disposition = |policy_local: bool| match (served, policy_local && local.is_empty()) {
        (false, _) => Disposition::Reject,
        (true, true) => Disposition::Drop,
        (true, false) => Disposition::Forward,
    };
    let serving = candidates.iter().filter(|(endpoint, _)| port.protocol == Protocol::Udp && endpoint.serving);
    PlannedPort {
        name: port.name.clone(),
        protocol: port.protocol,
        cluster_ip: service.cluster_ip,
        port: port.port,
        node_port: port.node_port,
        external_ips: service.external_ips.clone(),
        load_balancer_ips: service.load_balancer_ips.clone(),
        source_ranges: service.source_ranges.clone(),
        internal_local: service.internal_local,
        external_local,
        affinity: service.affinity,
        internal: disposition(service.internal_local),
        external: disposition(external_local),
        serving: serving.map(|(endpoint, port)| (endpoint.address, *port)).collect(),
        cluster,
        local,
        served,
    }
}

/// The ready endpoints, or else those that are terminating but still answer.
fn usable<'a>(
    candidates: impl Iterator<Item = &'a (&'a Endpoint, u16)> + Clone,
) -> impl Iterator<Item = &'a (&'a Endpoint, u16)> {
    let any_ready = candidates.clone().any(|(endpoint, _)| endpoint.ready);
    candidates.filter(
        move |(endpoint, _)| {
            if any_ready { endpoint.ready } else { endpoint.serving && endpoint.terminating }
        },
    )
}

/// Whether the hints of the endpoints restrict which of them this node uses.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Topology {
    Everywhere,
    SameZone,
    SameNode,
}

impl Topology {
    /// Hints count only if every ready endpoint has them and some endpoint is meant for us.
    fn choose(here: Here<'_>, candidates: &[(&Endpoint, u16)]) -> Self {
        let ready = || candidates.iter().map(|(endpoint, _)| *endpoint).filter(|endpoint| endpoint.ready);
        if ready().next().is_none() || ready().any(|endpoint| endpoint.hints.is_none()) {
            return Self::Everywhere;
        }
        let hints = || ready().filter_map(|endpoint| endpoint.hints.as_deref());
        if hints().all(|h| !h.nodes.is_empty()) && ready().any(|endpoint| Self::SameNode.admits(here, endpoint)) {
            return Self::SameNode;
        }
        if hints().all(|h| !h.zones.is_empty()) && ready().any(|endpoint| Self::SameZone.admits(here, endpoint)) {
            return Self::SameZone;
        }
        Self::Everywhere
    }

    fn admits(self, here: Here<'_>, endpoint: &Endpoint) -> bool {
        let names = |names: &[String], name: &str| names.iter().any(|hint| hint == name);
        let hints = endpoint.hints.as_deref();
        match self {
            Self::Everywhere => true,
            Self::SameZone => hints.is_some_and(|hints| names(&hints.zones, &here.node.zone)),
            Self::SameNode => hints.is_some_and(|hints| names(&hints.nodes, here.node_name)),
        }
    }
}

impl ServicePlan {
    /// Makes targets that were there before keep their places in the lists.
    pub fn keep_places_of(&mut self, old: &Self) {
        let same =
            |a: &PlannedPort, b: &PlannedPort| (a.cluster_ip, a.protocol, a.port) == (b.cluster_ip, b.protocol, b.port);
        for port in &mut self.ports {
            if let Some(before) = old.ports.iter().find(|before| same(before, port)) {
                keep_places(&before.cluster, &mut port.cluster);
                keep_places(&before.local, &mut port.local);
            }
        }
    }
}

/// The new targets in an order in which as many as possible keep the place that they have in `old`: whoever left is
/// replaced by a newcomer, or else by the last.
pub fn keep_places(old: &[Target], new: &mut Vec<Target>) {
    if old.is_empty() || new.is_empty() {
        return;
    }
    // By address and port: that an endpoint is local does not make it another.
    let key = |target: &Target| (target.address, target.port);
    let mut waiting: HashMap<(IpAddr, u16), Target> = new.iter().map(|target| (key(target), *target)).collect();
    let mut places: Vec<Option<Target>> = old.iter().map(|target| waiting.remove(&key(target))).collect();
    let mut newcomers = new.iter().filter(|target| waiting.contains_key(&key(target))).copied();
    for place in places.iter_mut().filter(|place| place.is_none()) {
        *place = newcomers.next();
    }
    places.extend(newcomers.map(Some));
    let mut at = 0;
    while at < places.len() {
        if places[at].is_none() {
            // Somebody is behind the gap or nobody: either way the list gets shorter.
            places.swap_remove(at);
        } else {
            at += 1;
        }
    }
    *new = places.into_iter().flatten().collect();
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;
    use crate::model::{Hints, SlicePort};

    pub fn endpoint(address: &str, node: &str) -> Endpoint {
        Endpoint {
            address: address.parse().unwrap(),
            ready: true,
            serving: true,
            terminating: false,
            local: node == "node1",
            hints: None,
        }
    }

    pub fn terminating(address: &str, node: &str) -> Endpoint {
        Endpoint { ready: false, terminating: true, ..endpoint(address, node) }
    }

    pub fn hinted(endpoint: Endpoint, zones: &[&str], nodes: &[&str]) -> Endpoint {
        let owned = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect();
        Endpoint { hints: Some(Box::new(Hints { zones: owned(zones), nodes: owned(nodes) })), ..endpoint }
    }

    pub fn service(cluster_ip: &str, ports: &[(&str, Protocol, u16, Option<u16>)]) -> Service {
        Service {
            cluster_ip: cluster_ip.parse().unwrap(),
            external_ips: Vec::new(),
            load_balancer_ips: Vec::new(),
            source_ranges: None,
            internal_local: false,
            external_local: false,
            affinity: None,
            health_check_node_port: None,
            ports: ports
                .iter()
                .map(|(name, protocol, port, node_port)| ServicePort {
                    name: (*name).into(),
                    protocol: *protocol,
                    port: *port,
                    node_port: *node_port,
                })
                .collect(),
        }
    }

    /// One service and one slice, whose ports are the service's on 8080.
    pub fn entry(service: Service, endpoints: Vec<Endpoint>) -> Entry {
        let ports = service.ports.iter();
        let ports = ports.map(|port| SlicePort { name: port.name.clone(), protocol: port.protocol, port: 8080 });
        let family = Family::of(service.cluster_ip);
        let slice = Slice { family, ports: ports.collect(), endpoints };
        Entry { families: vec![service], slices: [("svc-1".into(), slice)].into() }
    }

    /// On node1 in zone a.
    pub fn planned(service: Service, endpoints: Vec<Endpoint>) -> ServicePlan {
        let node = Node { zone: "a".to_owned(), eligible: true, ..Node::default() };
        plan(&entry(service, endpoints), &node, "node1")
    }
}

#[cfg(test)]
mod tests {
    use super::testing::{endpoint, entry, hinted, planned, service, terminating};
    use super::*;

    fn addresses(targets: &[Target]) -> Vec<String> {
        targets.iter().map(|target| target.address.to_string()).collect()
    }

    fn http(cluster_ip: &str, node_port: Option<u16>) -> Service {
        service(cluster_ip, &[("http", Protocol::Tcp, 80, node_port)])
    }

    #[test]
    fn ready_endpoints_anywhere_serve() {
        let mut away = endpoint("10.244.2.2", "node2");
        away.ready = false;
        away.serving = false;
        let plan = planned(
            http("10.96.0.1", None),
            vec![endpoint("10.244.1.2", "node1"), endpoint("10.244.2.3", "node2"), away],
        );
        let port = &plan.ports[0];
        assert_eq!(addresses(&port.cluster), ["10.244.1.2", "10.244.2.3"]);
        assert_eq!((port.internal, port.served, port.cluster[0].local), (Disposition::Forward, true, true));
        assert!(port.local.is_empty());
    }

    #[test]
    fn nobody_serves_is_a_rejection() {
        let plan = planned(http("10.96.0.1", Some(30000)), vec![]);
        assert_eq!((plan.ports[0].internal, plan.ports[0].external), (Disposition::Reject, Disposition::Reject));
    }

    #[test]
    fn terminating_endpoints_are_the_fallback_for_each_policy_alone() {
        let mut service = http("10.96.0.1", Some(30000));
        service.external_local = true;
        let plan = planned(service, vec![terminating("10.244.1.2", "node1"), endpoint("10.244.2.3", "node2")]);
        assert_eq!(addresses(&plan.ports[0].cluster), ["10.244.2.3"]);
        assert_eq!(addresses(&plan.ports[0].local), ["10.244.1.2"]);
        assert_eq!(plan.ports[0].external, Disposition::Forward);
    }

    #[test]
    fn local_policies_without_local_endpoints_drop() {
        let mut service = http("10.96.0.1", Some(30000));
        (service.external_local, service.internal_local, service.health_check_node_port) = (true, true, Some(32000));
        let plan = planned(service, vec![endpoint("10.244.2.3", "node2")]);
        let port = &plan.ports[0];
        assert_eq!((port.internal, port.external), (Disposition::Drop, Disposition::Drop));
        assert_eq!(addresses(&port.cluster), ["10.244.2.3"]);
        assert_eq!(plan.health_check, Some(HealthCheck { node_port: 32000, local_endpoints: 0 }));
    }

    #[test]
    fn health_checks_count_ready_endpoints_only() {
        let mut service = http("10.96.0.1", Some(30000));
        (service.external_local, service.health_check_node_port) = (true, Some(32000));
        let count = |endpoints| planned(service.clone(), endpoints).health_check.map(|check| check.local_endpoints);
        assert_eq!(count(vec![endpoint("10.244.1.2", "node1"), endpoint("10.244.2.3", "node2")]), Some(1));
        assert_eq!(count(vec![terminating("10.244.1.2", "node1")]), Some(0), "though it still serves");
    }

    #[test]
    fn hints_keep_traffic_near_if_they_are_complete() {
        let (near, far) = (endpoint("10.244.1.2", "node1"), endpoint("10.244.2.2", "node2"));
        let used = |endpoints| addresses(&planned(http("10.96.0.1", None), endpoints).ports[0].cluster);
        let zones = vec![hinted(near.clone(), &["a"], &[]), hinted(far.clone(), &["b"], &[])];
        assert_eq!(used(zones), ["10.244.1.2"]);
        let nodes = vec![hinted(near.clone(), &["b"], &["node2"]), hinted(far.clone(), &["b"], &["node1"])];
        assert_eq!(used(nodes), ["10.244.2.2"]);
        let nobody_here = vec![hinted(near.clone(), &["b"], &["node2"]), hinted(far.clone(), &["c"], &["node3"])];
        assert_eq!(used(nobody_here).len(), 2);
        assert_eq!(used(vec![hinted(near, &["a"], &[]), far]).len(), 2, "incomplete hints do not count");
    }

    #[test]
    fn an_endpoint_in_two_slices_counts_once() {
        let mut entry = entry(http("10.96.0.1", None), vec![endpoint("10.244.1.2", "node1")]);
        let mut copy = entry.slices["svc-1"].clone();
        copy.endpoints[0].ready = false;
        entry.slices.insert("svc-0".into(), copy);
        assert_eq!(plan(&entry, &Node::default(), "node1").ports[0].cluster.len(), 1);
    }

    #[test]
    fn families_are_planned_apart() {
        let mut entry = entry(http("10.96.0.1", None), vec![endpoint("10.244.1.2", "node1")]);
        let six = super::testing::entry(http("fd00::1", None), vec![endpoint("fd01::2", "node2")]);
        entry.families.extend(six.families);
        entry.slices.insert("svc-6".into(), six.slices["svc-1"].clone());
        let plan = plan(&entry, &Node::default(), "node1");
        assert_eq!(plan.ports.iter().map(PlannedPort::family).collect::<Vec<_>>(), Family::ALL);
        assert_eq!(addresses(&plan.ports[0].cluster), ["10.244.1.2"]);
        assert_eq!(addresses(&plan.ports[1].cluster), ["fd01::2"]);
    }

    #[test]
    fn targets_keep_their_places() {
        let targets = |last: &[u8]| -> Vec<Target> {
            let target = |last: &u8| Target { address: IpAddr::from([10, 0, 0, *last]), port: 80, local: false };
            last.iter().map(target).collect()
        };
        for (old, new, expected) in [
            (&[1, 2, 3][..], &[1, 2, 3][..], &[1, 2, 3][..]),
            (&[3, 1, 2], &[1, 2, 3], &[3, 1, 2]),
            (&[1, 2, 3, 4, 5], &[1, 3, 4, 5], &[1, 5, 3, 4]),
            (&[1, 2, 3], &[1, 3, 9], &[1, 9, 3]),
            (&[1, 2], &[1, 2, 8, 9], &[1, 2, 8, 9]),
            (&[1, 2, 3], &[9], &[9]),
            (&[], &[2, 1], &[2, 1]),
            (&[1, 2], &[], &[]),
        ] {
            let mut arranged = targets(new);
            keep_places(&targets(old), &mut arranged);
            assert_eq!(arranged, targets(expected), "{old:?} → {new:?}");
        }
    }
}
