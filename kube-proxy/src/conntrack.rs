//! Which tracked UDP connections to forget after a change. TCP clients notice an endpoint that is gone; a UDP client
//! may send to the old place forever, because each of its packets keeps the kernel's memory of the connection alive.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use crate::model::Protocol;
use crate::plan::{Plan, PlannedPort, PortId};

/// Arguments for `conntrack -D`, one list for each kind of stale connection.
pub fn stale(old: &Plan, new: &Plan) -> Vec<Vec<String>> {
    let before = udp_ports(old);
    let now = udp_ports(new);
    let mut filters = Vec::new();
    for (id, port) in &before {
        let current = now.get(id).copied();
        let kept: BTreeSet<Ipv4Addr> = current.map(addresses).unwrap_or_default();
        for gone in addresses(port).difference(&kept) {
            filters.extend(ways_in(port).map(|way| filter(&way, Some(*gone))));
        }
    }
    for (id, port) in &now {
        let empty_before = before.get(id).is_none_or(|port| port.targets().is_empty());
        // Until now packets went past the service's address; those connections must be looked at again.
        if empty_before && !port.targets().is_empty() {
            filters.extend(ways_in(port).map(|way| filter(&way, None)));
        }
    }
    filters
}

/// A tracked UDP connection: where the client sent to, and who answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connection {
    pub destination: Ipv4Addr,
    pub port: u16,
    pub answered_by: Ipv4Addr,
}

impl Connection {
    /// Reads a line of `conntrack -L`; the first `dst` and `dport` are the client's, the second `src` is the answer's.
    pub fn parse(line: &str) -> Option<Self> {
        let values = |name: &'static str| line.split_whitespace().filter_map(move |word| word.strip_prefix(name));
        Some(Self {
            destination: values("dst=").next()?.parse().ok()?,
            port: values("dport=").next()?.parse().ok()?,
            answered_by: values("src=").nth(1)?.parse().ok()?,
        })
    }
}

/// What to forget at the start, when it is not known what changed while no proxy ran: connections to services that
/// are answered by somebody who is no endpoint. The others are left alone, so that a restart loses no packet.
pub fn orphans(plan: &Plan, connections: &[Connection]) -> Vec<Vec<String>> {
    let mut filters = BTreeSet::new();
    for port in plan.ports.iter().filter(|port| port.id.protocol == Protocol::Udp && !port.targets().is_empty()) {
        let current = addresses(port);
        for way in ways_in(port) {
            let leads_here = |connection: &&Connection| {
                connection.port == way.port && way.address.is_none_or(|address| address == connection.destination)
            };
            let orphaned = connections.iter().filter(leads_here).filter(|c| !current.contains(&c.answered_by));
            filters.extend(orphaned.map(|connection| filter(&way, Some(connection.answered_by))));
        }
    }
    filters.into_iter().collect()
}

/// One address and port, or node port, of a service.
struct WayIn {
    address: Option<Ipv4Addr>,
    port: u16,
}

fn udp_ports(plan: &Plan) -> BTreeMap<&PortId, &PlannedPort> {
    plan.ports.iter().filter(|port| port.id.protocol == Protocol::Udp).map(|port| (&port.id, port)).collect()
}

fn addresses(port: &PlannedPort) -> BTreeSet<Ipv4Addr> {
    port.targets().iter().map(|target| target.address).collect()
}

fn ways_in(port: &PlannedPort) -> impl Iterator<Item = WayIn> + '_ {
    let services = std::iter::once(port.cluster_ip).chain(port.external_addresses());
    let services = services.map(|address| WayIn { address: Some(address), port: port.port });
    services.chain(port.node_port.map(|port| WayIn { address: None, port }))
}

fn filter(way: &WayIn, endpoint: Option<Ipv4Addr>) -> Vec<String> {
    let mut arguments = vec!["-p".to_owned(), "udp".to_owned()];
    if let Some(address) = way.address {
        arguments.extend(["--orig-dst".to_owned(), address.to_string()]);
    }
    arguments.extend(["--orig-port-dst".to_owned(), way.port.to_string()]);
    if let Some(endpoint) = endpoint {
        arguments.extend(["--reply-src".to_owned(), endpoint.to_string()]);
    }
    arguments
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Endpoint;
    use crate::plan::plan;
    use crate::plan::testing::{endpoint, model, service};

    fn dns(endpoints: Vec<Endpoint>) -> Plan {
        let ports = [("dns", Protocol::Udp, 53, Some(30053)), ("dns-tcp", Protocol::Tcp, 53, None)];
        plan(&model(service("10.96.0.10", &ports), endpoints))
    }

    #[test]
    fn an_endpoint_that_left_and_a_first_endpoint() {
        let (none, one) = (dns(vec![]), dns(vec![endpoint("10.244.1.2", "node1")]));
        let words = |filters: Vec<Vec<String>>| filters.iter().map(|f| f.join(" ")).collect::<Vec<_>>();
        assert_eq!(
            words(stale(&one, &none)),
            [
                "-p udp --orig-dst 10.96.0.10 --orig-port-dst 53 --reply-src 10.244.1.2",
                "-p udp --orig-port-dst 30053 --reply-src 10.244.1.2"
            ]
        );
        assert_eq!(
            words(stale(&none, &one)),
            ["-p udp --orig-dst 10.96.0.10 --orig-port-dst 53", "-p udp --orig-port-dst 30053"]
        );
        assert!(stale(&one, &one).is_empty());
    }

    #[test]
    fn at_the_start_only_orphans_are_forgotten() {
        let line = |answer: &str| {
            let text = format!(
                "udp      17 27 src=10.244.1.3 dst=10.96.0.10 sport=40000 dport=53 \
                 src={answer} dst=10.244.1.3 sport=8080 dport=40000 mark=0 use=1"
            );
            Connection::parse(&text).unwrap()
        };
        let plan = dns(vec![endpoint("10.244.1.2", "node1")]);
        assert!(orphans(&plan, &[line("10.244.1.2")]).is_empty());
        let filters = orphans(&plan, &[line("10.244.1.2"), line("10.244.9.9"), line("10.244.9.9")]);
        assert_eq!(filters.len(), 1);
        assert_eq!(filters[0].join(" "), "-p udp --orig-dst 10.96.0.10 --orig-port-dst 53 --reply-src 10.244.9.9");
        assert_eq!(Connection::parse("nonsense"), None);
    }
}
