//! Which tracked UDP connections to forget after a change, and forgetting them. TCP clients notice an endpoint that is
//! gone; a UDP client may send to the old place forever, because each of its packets keeps the kernel's memory of the
//! connection alive.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use crate::model::{Family, Protocol};
use crate::netlink::{Attributes, Builder, Message, NetlinkError, Socket, Subsystem, flag};
use crate::plan::{PlannedPort, ServicePlan};

/// A tracked UDP connection: where the client sent to, and who answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connection {
    pub family: Family,
    pub destination: (IpAddr, u16),
    pub answered_by: (IpAddr, u16),
    /// The client's side as the kernel wrote it, to name the connection by.
    original: Vec<u8>,
    id: Vec<u8>,
    zone: Option<Vec<u8>>,
}

/// What the UDP ports of some services say about connections.
#[derive(Debug, Default)]
pub struct Expectations {
    /// Who may answer for an address and port.
    fronts: BTreeMap<(IpAddr, u16), BTreeSet<(IpAddr, u16)>>,
    /// The same for node ports, in each family.
    node_ports: BTreeMap<(Family, u16), BTreeSet<(IpAddr, u16)>>,
}

impl Expectations {
    pub fn of<'a>(plans: impl IntoIterator<Item = &'a ServicePlan>) -> Self {
        let mut expectations = Self::default();
        for port in plans.into_iter().flat_map(|plan| &plan.ports) {
            expectations.add(port);
        }
        expectations
    }

    /// Nobody serves the ports any more that the plan had and no service has now.
    pub fn gone(&mut self, old: &ServicePlan) {
        for port in old.ports.iter().filter(|port| port.protocol == Protocol::Udp) {
            for address in std::iter::once(port.cluster_ip).chain(port.external_addresses()) {
                self.fronts.entry((address, port.port)).or_default();
            }
        }
    }

    pub fn is_empty(&self) -> bool {
        self.fronts.is_empty() && self.node_ports.is_empty()
    }

    fn add(&mut self, port: &PlannedPort) {
        if port.protocol != Protocol::Udp {
            return;
        }
        let serving: BTreeSet<(IpAddr, u16)> = port.serving.iter().copied().collect();
        for address in std::iter::once(port.cluster_ip).chain(port.external_addresses()) {
            self.fronts.insert((address, port.port), serving.clone());
        }
        // A node port is known by its number only. Without endpoints, connections of others may have the same.
        if let Some(number) = port.node_port.filter(|_| !serving.is_empty()) {
            self.node_ports.insert((port.family(), number), serving);
        }
    }

    /// Whether the connection leads to somebody who does not serve, or past a service that is served now.
    pub fn disagree(&self, connection: &Connection) -> bool {
        let (_, port) = connection.destination;
        let expected = self.fronts.get(&connection.destination);
        let expected = expected.or_else(|| self.node_ports.get(&(connection.family, port)));
        expected.is_some_and(|serving| !serving.contains(&connection.answered_by))
    }
}

/// Whether connections may have to be forgotten because a service changed so. Endpoints that come beside others are
/// no reason: clients may stay where they are.
pub fn may_be_stale(old: &ServicePlan, new: &ServicePlan) -> bool {
    let udp = |plan: &ServicePlan| -> BTreeMap<(IpAddr, u16), BTreeSet<(IpAddr, u16)>> {
        let ports = plan.ports.iter().filter(|port| port.protocol == Protocol::Udp);
        ports.map(|port| ((port.cluster_ip, port.port), port.serving.iter().copied().collect())).collect()
    };
    let (old, new) = (udp(old), udp(new));
    let left = old.iter().any(|(port, before)| new.get(port).is_none_or(|now| !before.is_subset(now)));
    let came = new.iter().any(|(port, now)| !now.is_empty() && old.get(port).is_none_or(BTreeSet::is_empty));
    left || came
}

// IPCTNL_MSG_CT_*
const GET: u8 = 1;
const DELETE: u8 = 2;
// CTA_*
const ORIGINAL: u16 = 1;
const REPLY: u16 = 2;
const ID: u16 = 12;
const ZONE: u16 = 18;
const NESTED: u16 = 0x8000;

/// Forgets the connections of the family that `stale` tells. Answers how many.
pub fn forget(socket: &mut Socket, family: Family, stale: impl Fn(&Connection) -> bool) -> Result<usize, NetlinkError> {
    let mut request = Builder::default();
    request.message(Subsystem::Conntrack, GET, flag::REQUEST | flag::DUMP, 1, family_number(family), |_| {});
    let each = |found: &mut Vec<Connection>, message: &Message<'_>| {
        found.extend(read(message.attributes(), family).filter(&stale));
    };
    let found = socket.dump(&request, Vec::new, each)?;
    let mut forgotten = 0;
    for connection in found {
        let mut request = Builder::default();
        request.message(Subsystem::Conntrack, DELETE, flag::REQUEST | flag::ACK, 1, family_number(family), |m| {
            m.attribute(ORIGINAL | NESTED, &connection.original);
            m.attribute(ID, &connection.id);
            if let Some(zone) = &connection.zone {
                m.attribute(ZONE, zone);
            }
        });
        // A connection that ended meanwhile is refused; that is as good.
        if socket.transact(&request)?.is_none() {
            forgotten += 1;
        }
    }
    Ok(forgotten)
}

fn family_number(family: Family) -> u8 {
    match family {
        Family::Ipv4 => 2,
        Family::Ipv6 => 10,
    }
}

/// Nothing for connections of other protocols.
fn read(attributes: Attributes<'_>, family: Family) -> Option<Connection> {
    // CTA_TUPLE_PROTO, CTA_PROTO_NUM
    if attributes.path(&[ORIGINAL, 2, 1])?.value != [Protocol::Udp.number()] {
        return None;
    }
    // CTA_IP_V4_*, CTA_IP_V6_*
    let (source, destination) = match family {
        Family::Ipv4 => (1, 2),
        Family::Ipv6 => (3, 4),
    };
    let address = |side, which| read_address(attributes.path(&[side, 1, which])?.value);
    // CTA_PROTO_SRC_PORT, CTA_PROTO_DST_PORT
    let port = |side, which| Some(u16::from_be_bytes(attributes.path(&[side, 2, which])?.value.try_into().ok()?));
    Some(Connection {
        family,
        destination: (address(ORIGINAL, destination)?, port(ORIGINAL, 3)?),
        answered_by: (address(REPLY, source)?, port(REPLY, 2)?),
        original: attributes.get(ORIGINAL)?.value.to_vec(),
        id: attributes.get(ID)?.value.to_vec(),
        zone: attributes.get(ZONE).map(|zone| zone.value.to_vec()),
    })
}

fn read_address(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => Some(IpAddr::from(<[u8; 4]>::try_from(bytes).ok()?)),
        _ => Some(IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Endpoint;
    use crate::plan::testing::{endpoint, planned, service, terminating};

    fn dns(endpoints: Vec<Endpoint>) -> ServicePlan {
        planned(
            service("10.96.0.10", &[("dns", Protocol::Udp, 53, Some(30053)), ("tcp", Protocol::Tcp, 53, None)]),
            endpoints,
        )
    }

    fn connection(destination: &str, answered_by: &str) -> Connection {
        let split = |text: &str| text.parse::<std::net::SocketAddr>().map(|a| (a.ip(), a.port())).unwrap();
        Connection {
            family: Family::Ipv4,
            destination: split(destination),
            answered_by: split(answered_by),
            original: Vec::new(),
            id: Vec::new(),
            zone: None,
        }
    }

    #[test]
    fn connections_to_those_who_do_not_serve_are_forgotten() {
        let one = Expectations::of([&dns(vec![endpoint("10.244.1.2", "node1")])]);
        let none = Expectations::of([&dns(vec![])]);
        for (expectations, destination, answered_by, stale) in [
            (&one, "10.96.0.10:53", "10.244.1.2:8080", false),
            (&one, "10.96.0.10:53", "10.244.1.2:9999", true),
            (&one, "10.96.0.10:53", "10.244.9.9:8080", true),
            (&one, "10.96.0.10:53", "10.96.0.10:53", true),
            (&one, "192.0.2.1:30053", "10.244.9.9:8080", true),
            (&one, "10.96.0.11:53", "10.244.9.9:8080", false),
            (&none, "10.96.0.10:53", "10.244.1.2:8080", true),
            (&none, "192.0.2.1:30053", "10.244.1.2:8080", false),
        ] {
            assert_eq!(
                expectations.disagree(&connection(destination, answered_by)),
                stale,
                "{destination} {answered_by}"
            );
        }
        assert!(
            Expectations::of([&planned(service("10.96.0.1", &[("", Protocol::Tcp, 53, None)]), vec![])]).is_empty()
        );
    }

    #[test]
    fn only_changes_of_udp_endpoints_are_a_reason_to_look() {
        let (a, b) = (endpoint("10.244.1.2", "node1"), endpoint("10.244.1.3", "node1"));
        let (none, one, two) = (dns(vec![]), dns(vec![a.clone()]), dns(vec![a, b]));
        for (old, new, expected) in [(&none, &one, true), (&one, &two, false), (&two, &one, true), (&one, &none, true)]
        {
            assert_eq!(may_be_stale(old, new), expected);
        }
        assert!(!may_be_stale(&one, &dns(vec![terminating("10.244.1.2", "node1")])), "it still serves");
        assert!(may_be_stale(&one, &ServicePlan::default()));
    }

    #[test]
    fn the_kernels_form_is_read() {
        let mut builder = Builder::default();
        let side = |m: &mut Builder, kind, source: [u8; 4], destination: [u8; 4], ports: [u16; 2], protocol| {
            m.nested(kind, |tuple| {
                tuple.nested(1, |ip| {
                    ip.attribute(1, &source);
                    ip.attribute(2, &destination);
                });
                tuple.nested(2, |proto| {
                    proto.attribute(1, &[protocol]);
                    proto.attribute(2, &ports[0].to_be_bytes());
                    proto.attribute(3, &ports[1].to_be_bytes());
                });
            });
        };
        for protocol in [17, 6] {
            builder.message(Subsystem::Conntrack, 0, 0, 1, 2, |m| {
                side(m, ORIGINAL, [10, 244, 1, 3], [10, 96, 0, 10], [40000, 53], protocol);
                side(m, REPLY, [10, 244, 1, 2], [10, 244, 1, 3], [8080, 40000], protocol);
                m.number(ID, 7);
            });
        }
        let read: Vec<Option<Connection>> = crate::netlink::messages(builder.bytes())
            .map(|message| read(message.unwrap().attributes(), Family::Ipv4))
            .collect();
        let udp = read[0].as_ref().unwrap();
        assert_eq!((udp.destination, udp.answered_by), {
            let expected = connection("10.96.0.10:53", "10.244.1.2:8080");
            (expected.destination, expected.answered_by)
        });
        assert_eq!((udp.id.as_slice(), read[1].is_none()), (&[0, 0, 0, 7][..], true));
    }
}
