//! What kube-proxy keeps of the API's objects: only what decides where packets go. Whole objects are dropped as soon
//! as they were read, which is what keeps a node's share of a large cluster small.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;

pub const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";
const ZONE_LABEL: &str = "topology.kubernetes.io/zone";
/// The cluster autoscaler's taint on a node that it is about to delete.
const TO_BE_DELETED_TAINT: &str = "ToBeDeletedByClusterAutoscaler";
const DEFAULT_AFFINITY_SECONDS: u32 = 3 * 60 * 60;

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceName {
    pub namespace: Box<str>,
    pub name: Box<str>,
}

impl ServiceName {
    pub fn new(namespace: &str, name: &str) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    Ipv4,
    Ipv6,
}

impl Family {
    pub const ALL: [Self; 2] = [Self::Ipv4, Self::Ipv6];

    pub fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Self::Ipv4 } else { Self::Ipv6 }
    }

    /// The name in the API, in `/healthz` and in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ipv4 => "IPv4",
            Self::Ipv6 => "IPv6",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

impl Protocol {
    fn parse(text: Option<&str>) -> Option<Self> {
        match text {
            None | Some("" | "TCP") => Some(Self::Tcp),
            Some("UDP") => Some(Self::Udp),
            Some("SCTP") => Some(Self::Sctp),
            Some(_) => None,
        }
    }

    /// `IPPROTO_*`.
    pub fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
        }
    }
}

/// The name that iptables uses.
impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
        })
    }
}

/// A service in one of its address families.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    pub cluster_ip: IpAddr,
    pub external_ips: Vec<IpAddr>,
    /// Load balancer addresses whose packets arrive unchanged (`ipMode: VIP`).
    pub load_balancer_ips: Vec<IpAddr>,
    /// Who may use the load balancer addresses; `None` means everybody.
    pub source_ranges: Option<Vec<IpNet>>,
    pub internal_local: bool,
    pub external_local: bool,
    /// Seconds for which a client stays with its endpoint.
    pub affinity: Option<u32>,
    pub health_check_node_port: Option<u16>,
    pub ports: Vec<ServicePort>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    pub name: Box<str>,
    pub protocol: Protocol,
    pub port: u16,
    pub node_port: Option<u16>,
}

/// An endpoint slice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slice {
    pub family: Family,
    pub ports: Vec<SlicePort>,
    pub endpoints: Vec<Endpoint>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlicePort {
    pub name: Box<str>,
    pub protocol: Protocol,
    pub port: u16,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    pub address: IpAddr,
    pub ready: bool,
    pub serving: bool,
    pub terminating: bool,
    /// On this node.
    pub local: bool,
    /// Most endpoints have none.
    pub hints: Option<Box<Hints>>,
}

/// Zones and nodes whose clients should use an endpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hints {
    pub zones: Vec<String>,
    pub nodes: Vec<String>,
}

/// This node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Node {
    pub zone: String,
    /// At most one for each family.
    pub internal_ips: Vec<IpAddr>,
    pub pod_cidrs: Vec<IpNet>,
    /// False while the node is being taken out: load balancers should stop sending to it.
    pub eligible: bool,
}

/// All that the API says about one service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// One for each family.
    pub families: Vec<Service>,
    /// By name.
    pub slices: BTreeMap<Box<str>, Slice>,
}

impl Entry {
    pub fn is_empty(&self) -> bool {
        self.families.is_empty() && self.slices.is_empty()
    }
}

/// Everything at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Model {
    pub services: BTreeMap<ServiceName, Entry>,
    pub node_name: String,
    pub node: Node,
}

impl Service {
    /// Nothing when there is nothing to do for the service: headless, or external name.
    pub fn read(service: &core::Service) -> Vec<Self> {
        let Some(spec) = service.spec.as_ref().filter(|spec| spec.type_.as_deref() != Some("ExternalName")) else {
            return Vec::new();
        };
        let mut cluster_ips: Vec<IpAddr> = addresses(spec.cluster_ips.iter().flatten());
        if cluster_ips.is_empty() {
            cluster_ips = addresses(spec.cluster_ip.iter());
        }
        cluster_ips.into_iter().map(|cluster_ip| Self::in_family(service, spec, cluster_ip)).collect()
    }

    fn in_family(service: &core::Service, spec: &core::ServiceSpec, cluster_ip: IpAddr) -> Self {
        let same = |address: &IpAddr| Family::of(*address) == Family::of(cluster_ip);
        let local = |policy: &Option<String>| policy.as_deref() == Some("Local");
        let accessible = matches!(spec.type_.as_deref(), Some("NodePort" | "LoadBalancer"));
        let external_ips: Vec<IpAddr> =
            addresses(spec.external_ips.iter().flatten()).into_iter().filter(same).collect();
        let client_ip = spec.session_affinity.as_deref() == Some("ClientIP");
        let timeout =
            spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref()?.timeout_seconds);
        Self {
            cluster_ip,
            external_local: local(&spec.external_traffic_policy) && (accessible || !external_ips.is_empty()),
            external_ips,
            load_balancer_ips: load_balancer_ips(service).into_iter().filter(same).collect(),
            source_ranges: source_ranges(spec, Family::of(cluster_ip)),
            internal_local: local(&spec.internal_traffic_policy),
            affinity: client_ip
                .then(|| timeout.and_then(|seconds| u32::try_from(seconds).ok()).unwrap_or(DEFAULT_AFFINITY_SECONDS)),
            health_check_node_port: spec.health_check_node_port.and_then(port_number),
            ports: spec.ports.iter().flatten().filter_map(ServicePort::read).collect(),
        }
    }
}

impl ServicePort {
    fn read(port: &core::ServicePort) -> Option<Self> {
        Some(Self {
            name: port.name.as_deref().unwrap_or_default().into(),
            protocol: Protocol::parse(port.protocol.as_deref())?,
            port: port_number(port.port)?,
            node_port: port.node_port.and_then(port_number),
        })
    }
}

impl Slice {
    /// The service of a slice; `None` if it belongs to none.
    pub fn service(slice: &discovery::EndpointSlice) -> Option<ServiceName> {
        let name = slice.metadata.labels.as_ref()?.get(SERVICE_NAME_LABEL)?;
        Some(ServiceName::new(slice.metadata.namespace.as_deref().unwrap_or_default(), name))
    }

    /// `None` for slices of names instead of addresses.
    pub fn read(slice: &discovery::EndpointSlice, node_name: &str) -> Option<Self> {
        let family = match slice.address_type.as_str() {
            "IPv4" => Family::Ipv4,
            "IPv6" => Family::Ipv6,
            _ => return None,
        };
        let ports = slice.ports.iter().flatten().filter_map(|port| {
            Some(SlicePort {
                name: port.name.as_deref().unwrap_or_default().into(),
                protocol: Protocol::parse(port.protocol.as_deref())?,
                port: port_number(port.port?)?,
            })
        });
        let endpoints = slice.endpoints.iter().flatten();
        let endpoints = endpoints.filter_map(|endpoint| Endpoint::read(endpoint, node_name));
        Some(Self {
            family,
            ports: ports.collect(),
            endpoints: endpoints.filter(|endpoint| Family::of(endpoint.address) == family).collect(),
        })
    }
}

impl Endpoint {
    /// Only the first address counts: more than one was never given a meaning.
    fn read(endpoint: &discovery::Endpoint, node_name: &str) -> Option<Self> {
        let conditions = endpoint.conditions.as_ref();
        let ready = conditions.and_then(|c| c.ready).unwrap_or(true);
        Some(Self {
            address: endpoint.addresses.first()?.parse().ok()?,
            ready,
            serving: conditions.and_then(|c| c.serving).unwrap_or(ready),
            terminating: conditions.and_then(|c| c.terminating).unwrap_or(false),
            local: endpoint.node_name.as_deref() == Some(node_name),
            hints: endpoint.hints.as_ref().and_then(Hints::read),
        })
    }
}

impl Hints {
    fn read(hints: &discovery::EndpointHints) -> Option<Box<Self>> {
        let read = Self {
            zones: hints.for_zones.iter().flatten().map(|zone| zone.name.clone()).collect(),
            nodes: hints.for_nodes.iter().flatten().map(|node| node.name.clone()).collect(),
        };
        (read != Self::default()).then(|| Box::new(read))
    }
}

impl Node {
    pub fn read(node: &core::Node) -> Self {
        let labels = node.metadata.labels.as_ref();
        let addresses = node.status.iter().flat_map(|status| status.addresses.iter().flatten());
        let mut internal_ips: Vec<IpAddr> = Vec::new();
        for address in addresses.filter(|address| address.type_ == "InternalIP") {
            if let Ok(address) = address.address.parse::<IpAddr>()
                && internal_ips.iter().all(|known| Family::of(*known) != Family::of(address))
            {
                internal_ips.push(address);
            }
        }
        let spec = node.spec.as_ref();
        let leaving =
            spec.iter().flat_map(|spec| spec.taints.iter().flatten()).any(|taint| taint.key == TO_BE_DELETED_TAINT);
        let cidrs = spec.iter().flat_map(|spec| spec.pod_cidrs.iter().flatten().chain(&spec.pod_cidr));
        let mut pod_cidrs: Vec<IpNet> =
            cidrs.filter_map(|cidr| cidr.parse::<IpNet>().ok()).map(|n| n.trunc()).collect();
        pod_cidrs.sort();
        pod_cidrs.dedup();
        Self {
            zone: labels.and_then(|labels| labels.get(ZONE_LABEL)).cloned().unwrap_or_default(),
            internal_ips,
            pod_cidrs,
            eligible: !leaving && node.metadata.deletion_timestamp.is_none(),
        }
    }
}

pub fn service_name(service: &core::Service) -> ServiceName {
    let text = |text: &Option<String>| text.as_deref().unwrap_or_default().to_owned();
    ServiceName::new(&text(&service.metadata.namespace), &text(&service.metadata.name))
}

fn addresses<'a>(texts: impl Iterator<Item = &'a String>) -> Vec<IpAddr> {
    texts.filter_map(|text| text.parse().ok()).collect()
}

fn load_balancer_ips(service: &core::Service) -> Vec<IpAddr> {
    let ingress = service
        .status
        .iter()
        .filter_map(|status| status.load_balancer.as_ref())
        .flat_map(|balancer| balancer.ingress.iter().flatten());
    let passed_on = ingress.filter(|ingress| ingress.ip_mode.as_deref().unwrap_or("VIP") == "VIP");
    passed_on.filter_map(|ingress| ingress.ip.as_ref()?.parse().ok()).collect()
}

/// Ranges that let everybody in are as good as none; ranges of the other family only let nobody in.
fn source_ranges(spec: &core::ServiceSpec, family: Family) -> Option<Vec<IpNet>> {
    let ranges = spec.load_balancer_source_ranges.iter().flatten();
    let all: Vec<IpNet> = ranges.filter_map(|range| range.trim().parse::<IpNet>().ok()).map(|r| r.trunc()).collect();
    if all.is_empty() {
        return None;
    }
    let own: Vec<IpNet> = all.into_iter().filter(|range| Family::of(range.addr()) == family).collect();
    (!own.iter().any(|range| range.prefix_len() == 0)).then_some(own)
}

fn port_number(port: i32) -> Option<u16> {
    u16::try_from(port).ok().filter(|&port| port != 0)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn service(spec: &serde_json::Value) -> Vec<Service> {
        let object = json!({"metadata": {"namespace": "ns", "name": "svc"}, "spec": spec,
            "status": {"loadBalancer": {"ingress": [
                {"ip": "192.0.2.1"}, {"ip": "192.0.2.2", "ipMode": "Proxy"}, {"hostname": "x"}]}}});
        Service::read(&serde_json::from_value(object).unwrap())
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn a_load_balancer_service() {
        let read = &service(&json!({"type": "LoadBalancer", "clusterIP": "10.96.0.5", "clusterIPs": ["10.96.0.5"],
            "externalTrafficPolicy": "Local", "healthCheckNodePort": 32000, "sessionAffinity": "ClientIP",
            "loadBalancerSourceRanges": [" 10.1.2.3/8 ", "fd00::/64"],
            "ports": [{"name": "http", "port": 80, "nodePort": 30080, "protocol": "TCP"}, {"port": 53, "protocol": "UDP"}]}))
            [0];
        assert_eq!(read.load_balancer_ips, [ip("192.0.2.1")]);
        assert_eq!(read.source_ranges, Some(vec!["10.0.0.0/8".parse().unwrap()]));
        assert_eq!((read.affinity, read.health_check_node_port, read.external_local), (Some(10800), Some(32000), true));
        assert_eq!(read.ports[0].node_port, Some(30080));
        assert_eq!(read.ports[1].protocol, Protocol::Udp);
    }

    #[test]
    fn source_ranges_by_family() {
        let ranges = |texts: &[&str]| {
            service(&json!({"clusterIPs": ["10.96.0.5"], "loadBalancerSourceRanges": texts}))[0].source_ranges.clone()
        };
        assert_eq!(ranges(&[]), None);
        assert_eq!(ranges(&["0.0.0.0/0", "10.0.0.0/8"]), None);
        assert_eq!(ranges(&["fd00::/64"]), Some(vec![]), "nobody of this family");
    }

    #[test]
    fn services_by_family() {
        assert_eq!(service(&json!({"clusterIP": "None", "clusterIPs": ["None"]})), []);
        assert_eq!(service(&json!({"type": "ExternalName", "externalName": "example.org"})), []);
        let dual = service(&json!({"clusterIP": "fd00::1", "clusterIPs": ["fd00::1", "10.96.0.7"],
            "externalIPs": ["198.51.100.1"]}));
        assert_eq!((dual[0].cluster_ip, dual[1].cluster_ip), (ip("fd00::1"), ip("10.96.0.7")));
        assert_eq!((dual[0].external_ips.len(), dual[1].external_ips.len()), (0, 1));
        assert_eq!((dual[0].load_balancer_ips.len(), dual[1].load_balancer_ips.len()), (0, 1));
    }

    #[test]
    fn an_endpoint_slice() {
        let object = json!({"metadata": {"namespace": "ns", "name": "svc-x1", "labels": {"kubernetes.io/service-name": "svc"}},
            "addressType": "IPv4", "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}, {"name": "no-port"}],
            "endpoints": [
                {"addresses": ["10.244.1.5"], "nodeName": "node1"},
                {"addresses": ["10.244.1.6"], "conditions": {"ready": false, "serving": true, "terminating": true},
                 "hints": {"forZones": [{"name": "a"}]}},
                {"addresses": ["not an address"]}, {"addresses": ["fd00::1"]}]});
        let object = serde_json::from_value(object).unwrap();
        let slice = Slice::read(&object, "node1").unwrap();
        assert_eq!(Slice::service(&object), Some(ServiceName::new("ns", "svc")));
        assert_eq!((slice.ports.len(), slice.endpoints.len()), (1, 2));
        assert!(slice.endpoints[0].ready && slice.endpoints[0].serving && slice.endpoints[0].local);
        assert!(!slice.endpoints[1].ready && slice.endpoints[1].serving && slice.endpoints[1].terminating);
        assert_eq!(slice.endpoints[1].hints.as_ref().map(|hints| hints.zones.clone()), Some(vec!["a".to_owned()]));
    }

    #[test]
    fn a_node_that_is_being_taken_out() {
        let node = json!({"metadata": {"name": "n", "labels": {"topology.kubernetes.io/zone": "a"}},
            "spec": {"taints": [{"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}],
                "podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24", "fd01::/64"]},
            "status": {"addresses": [{"type": "InternalIP", "address": "10.0.0.1"},
                {"type": "InternalIP", "address": "10.0.0.2"}, {"type": "InternalIP", "address": "fd00::1"}]}});
        let node = Node::read(&serde_json::from_value(node).unwrap());
        assert_eq!((node.zone.as_str(), node.eligible), ("a", false));
        assert_eq!(node.internal_ips, [ip("10.0.0.1"), ip("fd00::1")]);
        assert_eq!(node.pod_cidrs.len(), 2);
    }
}
