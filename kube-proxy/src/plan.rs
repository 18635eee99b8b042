//! Which endpoints each service port uses on this node, and what happens to traffic that has none. The same for every
//! backend, and free of anything that a kernel understands.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

use crate::model::{Endpoint, Model, Protocol, Service, ServiceName, ServicePort};

/// Names one port of one service.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortId {
    pub service: ServiceName,
    pub port: String,
    pub protocol: Protocol,
}

impl std::fmt::Display for PortId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.port.as_str() {
            "" => write!(f, "{}", self.service),
            port => write!(f, "{}:{port}", self.service),
        }
    }
}

/// Where packets can be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Target {
    pub address: Ipv4Addr,
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

/// One service port as this node should treat it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlannedPort {
    pub id: PortId,
    pub cluster_ip: Ipv4Addr,
    pub port: u16,
    pub node_port: Option<u16>,
    pub external_ips: Vec<Ipv4Addr>,
    pub load_balancer_ips: Vec<Ipv4Addr>,
    pub source_ranges: Vec<Ipv4Net>,
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
}

impl PlannedPort {
    /// Reachable under other addresses than the cluster IP.
    pub fn externally_accessible(&self) -> bool {
        self.node_port.is_some() || !self.external_ips.is_empty() || !self.load_balancer_ips.is_empty()
    }

    /// Every endpoint that traffic of any kind can reach from here, once.
    pub fn targets(&self) -> BTreeSet<Target> {
        self.cluster.iter().chain(&self.local).copied().collect()
    }

    /// The addresses that only external traffic uses.
    pub fn external_addresses(&self) -> impl Iterator<Item = Ipv4Addr> + '_ {
        self.external_ips.iter().chain(&self.load_balancer_ips).copied()
    }
}

/// How many endpoints on this node each service has that asks load balancers to check.
pub type HealthChecks = BTreeMap<u16, (ServiceName, usize)>;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    pub ports: Vec<PlannedPort>,
    pub health_checks: HealthChecks,
}

/// Decides for every service.
pub fn plan(model: &Model) -> Plan {
    let mut slices: BTreeMap<&ServiceName, Vec<&crate::model::Slice>> = BTreeMap::new();
    for slice in model.slices.values() {
        slices.entry(&slice.service).or_default().push(slice);
    }
    let mut result = Plan::default();
    for (name, service) in &model.services {
        let slices = slices.get(name).map(Vec::as_slice).unwrap_or_default();
        let first = result.ports.len();
        for port in &service.ports {
            let mut candidates: Vec<(&Endpoint, u16)> = slices
                .iter()
                .flat_map(|slice| slice.ports.iter().map(move |port| (slice, port)))
                .filter(|(_, slice_port)| slice_port.name == port.name && slice_port.protocol == port.protocol)
                .flat_map(|(slice, port)| slice.endpoints.iter().map(move |endpoint| (endpoint, port.port)))
                .collect();
            // An endpoint that moves between slices is in two of them for a moment; ready wins.
            candidates.sort_by_key(|(endpoint, port)| (endpoint.address, *port, !endpoint.ready));
            candidates.dedup_by_key(|(endpoint, port)| (endpoint.address, *port));
            result.ports.push(plan_port(model, name, service, port, &candidates));
        }
        if let Some(node_port) = service.health_check_node_port.filter(|_| service.external_local) {
            let local: BTreeSet<Ipv4Addr> =
                result.ports[first..].iter().flat_map(|port| &port.local).map(|target| target.address).collect();
            result.health_checks.insert(node_port, (name.clone(), local.len()));
        }
    }
    result
}

fn plan_port(
    model: &Model,
    name: &ServiceName,
    service: &Service,
    port: &ServicePort,
    candidates: &[(&Endpoint, u16)],
) -> PlannedPort {
    let accessible =
        port.node_port.is_some() || !service.external_ips.is_empty() || !service.load_balancer_ips.is_empty();
    let external_local = service.external_local && accessible;
    // Local external traffic still needs the Cluster endpoints: pods and processes of the node itself use those.
    let uses_cluster = !service.internal_local || accessible;
    let uses_local = service.internal_local || external_local;
    let here = |endpoint: &Endpoint| endpoint.node.as_deref() == Some(model.node_name.as_str());
    let target =
        |(endpoint, port): &(&Endpoint, u16)| Target { address: endpoint.address, port: *port, local: here(endpoint) };

    let cluster: Vec<Target> = if uses_cluster {
        let topology = Topology::choose(model, candidates);
        usable(candidates.iter().filter(|(endpoint, _)| !endpoint.ready || topology.admits(model, endpoint)))
            .map(target)
            .collect()
    } else {
        Vec::new()
    };
    let local: Vec<Target> = if uses_local {
        usable(candidates.iter().filter(|(endpoint, _)| here(endpoint))).map(target).collect()
    } else {
        Vec::new()
    };
    let served = usable(candidates.iter()).next().is_some();
    let disposition = |policy_local: bool| match (served, policy_local && local.is_empty()) {
        (false, _) => Disposition::Reject,
        (true, true) => Disposition::Drop,
        (true, false) => Disposition::Forward,
    };
    PlannedPort {
        id: PortId { service: name.clone(), port: port.name.clone(), protocol: port.protocol },
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
    fn choose(model: &Model, candidates: &[(&Endpoint, u16)]) -> Self {
        let ready: Vec<&Endpoint> = candidates.iter().map(|(endpoint, _)| *endpoint).filter(|e| e.ready).collect();
        if ready.is_empty() {
            return Self::Everywhere;
        }
        let complete = |hints: fn(&Endpoint) -> &Vec<String>| ready.iter().all(|endpoint| !hints(endpoint).is_empty());
        if complete(|e| &e.node_hints) && ready.iter().any(|e| e.node_hints.contains(&model.node_name)) {
            return Self::SameNode;
        }
        if complete(|e| &e.zone_hints) && ready.iter().any(|e| e.zone_hints.contains(&model.node.zone)) {
            return Self::SameZone;
        }
        Self::Everywhere
    }

    fn admits(self, model: &Model, endpoint: &Endpoint) -> bool {
        match self {
            Self::Everywhere => true,
            Self::SameZone => endpoint.zone_hints.contains(&model.node.zone),
            Self::SameNode => endpoint.node_hints.contains(&model.node_name),
        }
    }
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;
    use crate::model::{Slice, SlicePort};

    pub fn endpoint(address: &str, node: &str) -> Endpoint {
        Endpoint {
            address: address.parse().unwrap(),
            ready: true,
            serving: true,
            terminating: false,
            node: Some(node.to_owned()),
            zone_hints: Vec::new(),
            node_hints: Vec::new(),
        }
    }

    pub fn terminating(address: &str, node: &str) -> Endpoint {
        Endpoint { ready: false, terminating: true, ..endpoint(address, node) }
    }

    pub fn service(cluster_ip: &str, ports: &[(&str, Protocol, u16, Option<u16>)]) -> Service {
        Service {
            cluster_ip: cluster_ip.parse().unwrap(),
            external_ips: Vec::new(),
            load_balancer_ips: Vec::new(),
            source_ranges: Vec::new(),
            internal_local: false,
            external_local: false,
            affinity: None,
            health_check_node_port: None,
            ports: ports
                .iter()
                .map(|(name, protocol, port, node_port)| ServicePort {
                    name: (*name).to_owned(),
                    protocol: *protocol,
                    port: *port,
                    node_port: *node_port,
                })
                .collect(),
        }
    }

    /// A model of node1 with one service and one slice, whose ports are the service's on 8080.
    pub fn model(service: Service, endpoints: Vec<Endpoint>) -> Model {
        let name = ServiceName { namespace: "ns".to_owned(), name: "svc".to_owned() };
        let ports = service.ports.iter();
        let ports = ports.map(|port| SlicePort { name: port.name.clone(), protocol: port.protocol, port: 8080 });
        let slice = Slice { service: name.clone(), ports: ports.collect(), endpoints };
        Model {
            services: [(name, service)].into(),
            slices: [(("ns".to_owned(), "svc-1".to_owned()), slice)].into(),
            node_name: "node1".to_owned(),
            node: crate::model::Node { zone: "a".to_owned(), internal_ip: None, eligible: true },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::testing::{endpoint, model, service, terminating};
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
        let plan = plan(&model(
            http("10.96.0.1", None),
            vec![endpoint("10.244.1.2", "node1"), endpoint("10.244.2.3", "node2"), away],
        ));
        let port = &plan.ports[0];
        assert_eq!(addresses(&port.cluster), ["10.244.1.2", "10.244.2.3"]);
        assert_eq!((port.internal, port.served, port.cluster[0].local), (Disposition::Forward, true, true));
        assert!(port.local.is_empty());
    }

    #[test]
    fn nobody_serves_is_a_rejection() {
        let plan = plan(&model(http("10.96.0.1", Some(30000)), vec![]));
        assert_eq!((plan.ports[0].internal, plan.ports[0].external), (Disposition::Reject, Disposition::Reject));
    }

    #[test]
    fn terminating_endpoints_are_the_fallback_for_each_policy_alone() {
        let mut service = http("10.96.0.1", Some(30000));
        service.external_local = true;
        let plan = plan(&model(service, vec![terminating("10.244.1.2", "node1"), endpoint("10.244.2.3", "node2")]));
        assert_eq!(addresses(&plan.ports[0].cluster), ["10.244.2.3"]);
        assert_eq!(addresses(&plan.ports[0].local), ["10.244.1.2"]);
        assert_eq!(plan.ports[0].external, Disposition::Forward);
    }

    #[test]
    fn local_policies_without_local_endpoints_drop() {
        let mut service = http("10.96.0.1", Some(30000));
        (service.external_local, service.internal_local, service.health_check_node_port) = (true, true, Some(32000));
        let plan = plan(&model(service, vec![endpoint("10.244.2.3", "node2")]));
        let port = &plan.ports[0];
        assert_eq!((port.internal, port.external), (Disposition::Drop, Disposition::Drop));
        assert_eq!(addresses(&port.cluster), ["10.244.2.3"]);
        assert_eq!(plan.health_checks[&32000].1, 0);
    }

    #[test]
    fn hints_keep_traffic_in_the_zone_if_they_are_complete() {
        let mut near = endpoint("10.244.1.2", "node1");
        near.zone_hints = vec!["a".to_owned()];
        let mut far = endpoint("10.244.2.2", "node2");
        far.zone_hints = vec!["b".to_owned()];
        let hinted = plan(&model(http("10.96.0.1", None), vec![near.clone(), far.clone()]));
        assert_eq!(addresses(&hinted.ports[0].cluster), ["10.244.1.2"]);
        far.zone_hints.clear();
        let incomplete = plan(&model(http("10.96.0.1", None), vec![near, far]));
        assert_eq!(incomplete.ports[0].cluster.len(), 2);
    }

    #[test]
    fn an_endpoint_in_two_slices_counts_once() {
        let mut model = model(http("10.96.0.1", None), vec![endpoint("10.244.1.2", "node1")]);
        let mut copy = model.slices.values().next().unwrap().clone();
        copy.endpoints[0].ready = false;
        model.slices.insert(("ns".to_owned(), "svc-0".to_owned()), copy);
        assert_eq!(plan(&model).ports[0].cluster.len(), 1);
    }
}
