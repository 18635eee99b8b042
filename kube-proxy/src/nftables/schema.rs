//! What the sets and maps of the table hold: their fields, and their elements as values and as the kernel's bytes.
//! Every field starts at a multiple of four bytes; addresses, ports and protocols are in network order, numbers that
//! rules compute with (`mark`) in the machine's.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::model::{Family, Protocol};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SetName {
    /// The chain for packets to an address and port of a service.
    Services,
    /// The chain for packets to a node port.
    NodePorts,
    /// By address and port of a service, or by node port, and by place in the list: the endpoint.
    ClusterEndpoints,
    LocalEndpoints,
    NodePortClusterEndpoints,
    NodePortLocalEndpoints,
    /// Filled by the kernel: where a client was sent last.
    Affinity,
    NodePortAffinity,
    /// Services that nobody serves: packets are refused …
    RefusedServices,
    RefusedNodePorts,
    /// … or dropped, when it is only this node that has no endpoint.
    SilentServices,
    SilentNodePorts,
    /// Load balancer addresses that only `AllowedClients` may use.
    GuardedServices,
    AllowedClients,
    ClusterIps,
    /// Pods of this node that might reach themselves through a service.
    Hairpins,
    /// The node's addresses that answer on node ports, if not all do.
    NodePortIps,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    Address,
    Protocol,
    Port,
    Number,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Data {
    /// A set, not a map.
    None,
    Fields(&'static [Field]),
    Verdict,
}

const FRONT: &[Field] = &[Field::Address, Field::Protocol, Field::Port];
const NODE_PORT: &[Field] = &[Field::Protocol, Field::Port];
const PLACE: &[Field] = &[Field::Address, Field::Protocol, Field::Port, Field::Number];
const NODE_PORT_PLACE: &[Field] = &[Field::Protocol, Field::Port, Field::Number];
const CLIENT: &[Field] = &[Field::Address, Field::Protocol, Field::Port, Field::Address];
const NODE_PORT_CLIENT: &[Field] = &[Field::Protocol, Field::Port, Field::Address];
const TARGET: Data = Data::Fields(&[Field::Address, Field::Port]);

impl SetName {
    pub const ALL: [Self; 17] = [
        Self::Services,
        Self::NodePorts,
        Self::ClusterEndpoints,
        Self::LocalEndpoints,
        Self::NodePortClusterEndpoints,
        Self::NodePortLocalEndpoints,
        Self::Affinity,
        Self::NodePortAffinity,
        Self::RefusedServices,
        Self::RefusedNodePorts,
        Self::SilentServices,
        Self::SilentNodePorts,
        Self::GuardedServices,
        Self::AllowedClients,
        Self::ClusterIps,
        Self::Hairpins,
        Self::NodePortIps,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Services => "services",
            Self::NodePorts => "node-ports",
            Self::ClusterEndpoints => "cluster-endpoints",
            Self::LocalEndpoints => "local-endpoints",
            Self::NodePortClusterEndpoints => "node-port-cluster-endpoints",
            Self::NodePortLocalEndpoints => "node-port-local-endpoints",
            Self::Affinity => "affinity",
            Self::NodePortAffinity => "node-port-affinity",
            Self::RefusedServices => "refused-services",
            Self::RefusedNodePorts => "refused-node-ports",
            Self::SilentServices => "silent-services",
            Self::SilentNodePorts => "silent-node-ports",
            Self::GuardedServices => "guarded-services",
            Self::AllowedClients => "allowed-clients",
            Self::ClusterIps => "cluster-ips",
            Self::Hairpins => "hairpins",
            Self::NodePortIps => "node-port-ips",
        }
    }

    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|set| set.as_str() == name)
    }

    pub fn key(self) -> &'static [Field] {
        match self {
            Self::Services | Self::RefusedServices | Self::SilentServices | Self::GuardedServices => FRONT,
            Self::NodePorts | Self::RefusedNodePorts | Self::SilentNodePorts => NODE_PORT,
            Self::ClusterEndpoints | Self::LocalEndpoints => PLACE,
            Self::NodePortClusterEndpoints | Self::NodePortLocalEndpoints => NODE_PORT_PLACE,
            Self::Affinity | Self::AllowedClients => CLIENT,
            Self::NodePortAffinity => NODE_PORT_CLIENT,
            Self::ClusterIps | Self::NodePortIps => &[Field::Address],
            Self::Hairpins => &[Field::Address, Field::Address],
        }
    }

    pub fn data(self) -> Data {
        match self {
            Self::Services | Self::NodePorts => Data::Verdict,
            Self::ClusterEndpoints
            | Self::LocalEndpoints
            | Self::NodePortClusterEndpoints
            | Self::NodePortLocalEndpoints
            | Self::Affinity
            | Self::NodePortAffinity => TARGET,
            _ => Data::None,
        }
    }

    /// Keys are ranges.
    pub fn is_interval(self) -> bool {
        self == Self::AllowedClients
    }

    /// The kernel adds elements itself, and they expire.
    pub fn is_dynamic(self) -> bool {
        matches!(self, Self::Affinity | Self::NodePortAffinity)
    }
}

impl Field {
    pub fn length(self, family: Family) -> usize {
        match (self, family) {
            (Self::Address, Family::Ipv6) => 16,
            _ => 4,
        }
    }

    /// Without the padding.
    pub fn exact_length(self, family: Family) -> usize {
        match self {
            Self::Address | Self::Number => self.length(family),
            Self::Protocol => 1,
            Self::Port => 2,
        }
    }

    /// The number by which `nft` knows the type.
    pub fn nft_type(self, family: Family) -> u32 {
        match (self, family) {
            (Self::Address, Family::Ipv4) => 7,
            (Self::Address, Family::Ipv6) => 8,
            (Self::Protocol, _) => 12,
            (Self::Port, _) => 13,
            (Self::Number, _) => 19,
        }
    }
}

/// An address and port to which clients send.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Front {
    Address(IpAddr, Protocol, u16),
    NodePort(Protocol, u16),
}

/// Names a service port and its endpoints: the cluster IP and port, which belong to no other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Backend {
    pub cluster_ip: IpAddr,
    pub protocol: Protocol,
    pub port: u16,
}

/// Which endpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scope {
    Cluster,
    Local,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Route {
    Cluster,
    Local,
    /// Traffic from this node and its pods goes to all endpoints, other traffic to those on this node.
    ExternalLocal,
}

/// A way to treat packets for a service. Services with equal classes share a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Class {
    /// Came through the map of node ports.
    pub node_port: bool,
    pub masquerade: bool,
    pub route: Route,
    /// Numbers of endpoints.
    pub cluster: u32,
    pub local: u32,
    /// Seconds, or 0.
    pub affinity: u32,
}

impl Class {
    /// More endpoints of one service cannot be told apart; those beyond are not used.
    pub const MOST_ENDPOINTS: u32 = (1 << 20) - 1;
    pub const LONGEST_AFFINITY: u32 = (1 << 17) - 1;

    /// The name of the class's chain.
    pub fn chain(self) -> String {
        let front = if self.node_port { "node-port" } else { "address" };
        let mut name = match self.route {
            Route::Cluster => format!("{front}-cluster-{}", self.cluster),
            Route::Local => format!("{front}-local-{}", self.local),
            Route::ExternalLocal => format!("{front}-external-{}-of-{}", self.local, self.cluster),
        };
        if self.masquerade {
            name.push_str("-masquerade");
        }
        if self.affinity > 0 {
            name.push_str(&format!("-sticky-{}", self.affinity));
        }
        name
    }
}

/// An element of one of the sets.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Element {
    Served(Front, Class),
    Endpoint(Scope, Front, u32, (IpAddr, u16)),
    Refused(Front),
    Silent(Front),
    Guarded(Front),
    Allowed(Front, IpNet),
    ClusterIp(IpAddr),
    Hairpin(IpAddr),
    NodePortIp(IpAddr),
}

impl Element {
    pub fn set(&self) -> SetName {
        let by_front = |front: &Front, address, node_port| match front {
            Front::Address(..) => address,
            Front::NodePort(..) => node_port,
        };
        match self {
            Self::Served(front, _) => by_front(front, SetName::Services, SetName::NodePorts),
            Self::Endpoint(Scope::Cluster, front, ..) => {
                by_front(front, SetName::ClusterEndpoints, SetName::NodePortClusterEndpoints)
            }
            Self::Endpoint(Scope::Local, front, ..) => {
                by_front(front, SetName::LocalEndpoints, SetName::NodePortLocalEndpoints)
            }
            Self::Refused(front) => by_front(front, SetName::RefusedServices, SetName::RefusedNodePorts),
            Self::Silent(front) => by_front(front, SetName::SilentServices, SetName::SilentNodePorts),
            Self::Guarded(_) => SetName::GuardedServices,
            Self::Allowed(..) => SetName::AllowedClients,
            Self::ClusterIp(_) => SetName::ClusterIps,
            Self::Hairpin(_) => SetName::Hairpins,
            Self::NodePortIp(_) => SetName::NodePortIps,
        }
    }

    pub fn key(&self) -> Bytes {
        let mut key = Bytes::default();
        match self {
            Self::Served(front, _) | Self::Refused(front) | Self::Silent(front) | Self::Guarded(front) => {
                key.front(front);
            }
            Self::Endpoint(_, front, place, _) => {
                key.front(front);
                key.number(*place);
            }
            Self::Allowed(front, net) => {
                key.front(front);
                key.address(net.network());
            }
            Self::ClusterIp(address) | Self::NodePortIp(address) => key.address(*address),
            Self::Hairpin(address) => {
                key.address(*address);
                key.address(*address);
            }
        }
        key
    }

    /// The last key of a range.
    pub fn key_end(&self) -> Option<Bytes> {
        let Self::Allowed(front, net) = self else { return None };
        let mut key = Bytes::default();
        key.front(front);
        key.address(net.broadcast());
        Some(key)
    }

    /// What the key leads to; where that is a chain, its name.
    pub fn data(&self) -> Bytes {
        let mut data = Bytes::default();
        match self {
            Self::Served(_, class) => data.0.extend_from_slice(class.chain().as_bytes()),
            Self::Endpoint(_, _, _, target) => data.target(target),
            _ => {}
        }
        data
    }
}

/// The key of a front, by which the keys of its endpoints and clients begin.
pub fn front_key(front: &Front) -> Bytes {
    let mut key = Bytes::default();
    key.front(front);
    key
}

/// Fields as the kernel keeps them.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bytes(smallvec::SmallVec<[u8; 48]>);

impl std::ops::Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl Bytes {
    fn address(&mut self, address: IpAddr) {
        match address {
            IpAddr::V4(address) => self.0.extend_from_slice(&address.octets()),
            IpAddr::V6(address) => self.0.extend_from_slice(&address.octets()),
        }
    }

    fn port(&mut self, port: u16) {
        let [high, low] = port.to_be_bytes();
        self.0.extend_from_slice(&[high, low, 0, 0]);
    }

    fn protocol(&mut self, protocol: Protocol) {
        self.0.extend_from_slice(&[protocol.number(), 0, 0, 0]);
    }

    fn number(&mut self, number: u32) {
        self.0.extend_from_slice(&number.to_ne_bytes());
    }

    fn target(&mut self, (address, port): &(IpAddr, u16)) {
        self.address(*address);
        self.port(*port);
    }

    fn front(&mut self, front: &Front) {
        match front {
            Front::Address(address, protocol, port) => {
                self.address(*address);
                self.protocol(*protocol);
                self.port(*port);
            }
            Front::NodePort(protocol, port) => {
                self.protocol(*protocol);
                self.port(*port);
            }
        }
    }
}

/// Reads what [`Element::data`] writes for an endpoint.
pub fn read_target(data: &[u8]) -> Option<(IpAddr, u16)> {
    let (address, port) = match data.len() {
        8 => (IpAddr::from(<[u8; 4]>::try_from(&data[..4]).ok()?), &data[4..]),
        20 => (IpAddr::from(<[u8; 16]>::try_from(&data[..16]).ok()?), &data[16..]),
        _ => return None,
    };
    Some((address, u16::from_be_bytes([port[0], port[1]])))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_have_the_lengths_of_the_fields() {
        for (address, family) in [("10.96.0.1", Family::Ipv4), ("fd00::1", Family::Ipv6)] {
            let address: IpAddr = address.parse().unwrap();
            let target = (address, 8080);
            let fronts = [Front::Address(address, Protocol::Tcp, 80), Front::NodePort(Protocol::Udp, 30000)];
            let class = class(3);
            let mut elements = vec![
                Element::ClusterIp(address),
                Element::Hairpin(address),
                Element::NodePortIp(address),
                Element::Guarded(fronts[0]),
                Element::Allowed(fronts[0], IpNet::new(address, 8).unwrap()),
            ];
            for front in fronts {
                elements.extend([Element::Served(front, class), Element::Refused(front), Element::Silent(front)]);
                elements.extend([Scope::Cluster, Scope::Local].map(|scope| Element::Endpoint(scope, front, 7, target)));
            }
            for element in elements {
                let length = |fields: &[Field]| fields.iter().map(|field| field.length(family)).sum::<usize>();
                assert_eq!(element.key().len(), length(element.set().key()), "{element:?}");
                match element.set().data() {
                    Data::None => assert!(element.data().is_empty()),
                    Data::Fields(fields) => assert_eq!(element.data().len(), length(fields), "{element:?}"),
                    Data::Verdict => assert_eq!(&*element.data(), class.chain().as_bytes()),
                }
                if element.set().is_interval() {
                    assert_eq!(element.key_end().map(|end| end.len()), Some(element.key().len()));
                }
            }
            assert_eq!(read_target(&Element::Endpoint(Scope::Local, fronts[0], 0, target).data()), Some(target));
        }
    }

    fn class(cluster: u32) -> Class {
        Class { node_port: false, masquerade: true, route: Route::Cluster, cluster, local: 0, affinity: 0 }
    }

    #[test]
    fn classes_differ_in_name() {
        let mut all = Vec::new();
        for route in [Route::Cluster, Route::Local, Route::ExternalLocal] {
            for (node_port, masquerade, affinity) in
                [(false, false, 0), (true, false, 0), (false, true, 0), (true, true, 60)]
            {
                for count in [1, 2, Class::MOST_ENDPOINTS] {
                    all.push(Class { node_port, masquerade, route, cluster: count, local: count, affinity });
                }
            }
        }
        let names: std::collections::BTreeSet<_> = all.iter().map(|class| class.chain()).collect();
        assert_eq!(names.len(), all.len());
    }
}
