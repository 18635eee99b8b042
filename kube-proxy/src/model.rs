//! What kube-proxy keeps of the API's objects: only what decides where packets go. Whole objects are dropped as soon
//! as they were read, which is what keeps a node's share of a large cluster small.

use std::collections::BTreeMap;
use std::fmt;
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;

const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";
const ZONE_LABEL: &str = "topology.kubernetes.io/zone";
/// The cluster autoscaler's taint on a node that it is about to delete.
const TO_BE_DELETED_TAINT: &str = "ToBeDeletedByClusterAutoscaler";
const DEFAULT_AFFINITY_SECONDS: u32 = 3 * 60 * 60;

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceName {
    pub namespace: String,
    pub name: String,
}

impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
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
}

/// The name that nft, iptables and conntrack use.
impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
        })
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    pub cluster_ip: Ipv4Addr,
    pub external_ips: Vec<Ipv4Addr>,
    /// Load balancer addresses whose packets arrive unchanged (`ipMode: VIP`).
    pub load_balancer_ips: Vec<Ipv4Addr>,
    /// Who may use the load balancer addresses; empty means everybody.
    pub source_ranges: Vec<Ipv4Net>,
    pub internal_local: bool,
    pub external_local: bool,
    /// Seconds for which a client stays with its endpoint.
    pub affinity: Option<u32>,
    pub health_check_node_port: Option<u16>,
    pub ports: Vec<ServicePort>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    pub name: String,
    pub protocol: Protocol,
    pub port: u16,
    pub node_port: Option<u16>,
}

/// An endpoint slice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slice {
    pub service: ServiceName,
    pub ports: Vec<SlicePort>,
    pub endpoints: Vec<Endpoint>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlicePort {
    pub name: String,
    pub protocol: Protocol,
    pub port: u16,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    pub address: Ipv4Addr,
    pub ready: bool,
    pub serving: bool,
    pub terminating: bool,
    pub node: Option<String>,
    /// Zones and nodes whose clients should use this endpoint.
    pub zone_hints: Vec<String>,
    pub node_hints: Vec<String>,
}

/// This node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Node {
    pub zone: String,
    pub internal_ip: Option<Ipv4Addr>,
    /// False while the node is being taken out: load balancers should stop sending to it.
    pub eligible: bool,
}

/// Everything at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Model {
    pub services: BTreeMap<ServiceName, Service>,
    /// By namespace and name of the slice.
    pub slices: BTreeMap<(String, String), Slice>,
    pub node_name: String,
    pub node: Node,
}

impl Service {
    /// `None` when there is nothing to do for the service: headless, external name, or IPv6 only.
    pub fn read(service: &core::Service) -> Option<Self> {
        let spec = service.spec.as_ref()?;
        if spec.type_.as_deref() == Some("ExternalName") {
            return None;
        }
        let mut cluster_ips = spec.cluster_ips.iter().flatten().chain(&spec.cluster_ip);
        let cluster_ip = cluster_ips.find_map(|address| address.parse().ok())?;
        let local = |policy: &Option<String>| policy.as_deref() == Some("Local");
        let accessible = matches!(spec.type_.as_deref(), Some("NodePort" | "LoadBalancer"));
        let external_ips = addresses(spec.external_ips.iter().flatten());
        let client_ip = spec.session_affinity.as_deref() == Some("ClientIP");
        let timeout =
            spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref()?.timeout_seconds);
        Some(Self {
            cluster_ip,
            external_local: local(&spec.external_traffic_policy) && (accessible || !external_ips.is_empty()),
            external_ips,
            load_balancer_ips: load_balancer_ips(service),
            source_ranges: source_ranges(spec),
            internal_local: local(&spec.internal_traffic_policy),
            affinity: client_ip
                .then(|| timeout.and_then(|seconds| u32::try_from(seconds).ok()).unwrap_or(DEFAULT_AFFINITY_SECONDS)),
            health_check_node_port: spec.health_check_node_port.and_then(port_number),
            ports: spec.ports.iter().flatten().filter_map(ServicePort::read).collect(),
        })
    }
}

impl ServicePort {
    fn read(port: &core::ServicePort) -> Option<Self> {
        Some(Self {
            name: port.name.clone().unwrap_or_default(),
            protocol: Protocol::parse(port.protocol.as_deref())?,
            port: port_number(port.port)?,
            node_port: port.node_port.and_then(port_number),
        })
    }
}

impl Slice {
    /// `None` for slices of other address families and those that belong to no service.
    pub fn read(slice: &discovery::EndpointSlice) -> Option<Self> {
        if slice.address_type != "IPv4" {
            return None;
        }
        let service = slice.metadata.labels.as_ref()?.get(SERVICE_NAME_LABEL)?.clone();
        let ports = slice.ports.iter().flatten().filter_map(|port| {
            Some(SlicePort {
                name: port.name.clone().unwrap_or_default(),
                protocol: Protocol::parse(port.protocol.as_deref())?,
                port: port_number(port.port?)?,
            })
        });
        Some(Self {
            service: ServiceName { namespace: slice.metadata.namespace.clone().unwrap_or_default(), name: service },
            ports: ports.collect(),
            endpoints: slice.endpoints.iter().flatten().filter_map(Endpoint::read).collect(),
        })
    }
}

impl Endpoint {
    /// Only the first address counts: more than one was never given a meaning.
    fn read(endpoint: &discovery::Endpoint) -> Option<Self> {
        let conditions = endpoint.conditions.as_ref();
        let ready = conditions.and_then(|c| c.ready).unwrap_or(true);
        let hints = endpoint.hints.as_ref();
        Some(Self {
            address: endpoint.addresses.first()?.parse().ok()?,
            ready,
            serving: conditions.and_then(|c| c.serving).unwrap_or(ready),
            terminating: conditions.and_then(|c| c.terminating).unwrap_or(false),
            node: endpoint.node_name.clone(),
            zone_hints: hints.iter().flat_map(|h| h.for_zones.iter().flatten()).map(|zone| zone.name.clone()).collect(),
            node_hints: hints.iter().flat_map(|h| h.for_nodes.iter().flatten()).map(|node| node.name.clone()).collect(),
        })
    }
}

impl Node {
    pub fn read(node: &core::Node) -> Self {
        let labels = node.metadata.labels.as_ref();
        let addresses = node.status.iter().flat_map(|status| status.addresses.iter().flatten());
        let mut internal = addresses.filter(|address| address.type_ == "InternalIP");
        let taints = node.spec.iter().flat_map(|spec| spec.taints.iter().flatten());
        let leaving = taints.into_iter().any(|taint| taint.key == TO_BE_DELETED_TAINT);
        Self {
            zone: labels.and_then(|labels| labels.get(ZONE_LABEL)).cloned().unwrap_or_default(),
            internal_ip: internal.find_map(|address| address.address.parse().ok()),
            eligible: !leaving && node.metadata.deletion_timestamp.is_none(),
        }
    }
}

fn addresses<'a>(texts: impl Iterator<Item = &'a String>) -> Vec<Ipv4Addr> {
    texts.filter_map(|text| text.parse().ok()).collect()
}

fn load_balancer_ips(service: &core::Service) -> Vec<Ipv4Addr> {
    let ingress = service
        .status
        .iter()
        .filter_map(|status| status.load_balancer.as_ref())
        .flat_map(|balancer| balancer.ingress.iter().flatten());
    let passed_on = ingress.filter(|ingress| ingress.ip_mode.as_deref().unwrap_or("VIP") == "VIP");
    passed_on.filter_map(|ingress| ingress.ip.as_ref()?.parse().ok()).collect()
}

fn source_ranges(spec: &core::ServiceSpec) -> Vec<Ipv4Net> {
    let ranges = spec.load_balancer_source_ranges.iter().flatten();
    ranges.filter_map(|range| range.trim().parse::<Ipv4Net>().ok()).map(|range| range.trunc()).collect()
}

fn port_number(port: i32) -> Option<u16> {
    u16::try_from(port).ok().filter(|&port| port != 0)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn service(spec: &serde_json::Value) -> Option<Service> {
        let object = json!({"metadata": {"namespace": "ns", "name": "svc"}, "spec": spec,
            "status": {"loadBalancer": {"ingress": [
                {"ip": "192.0.2.1"}, {"ip": "192.0.2.2", "ipMode": "Proxy"}, {"hostname": "x"}]}}});
        Service::read(&serde_json::from_value(object).unwrap())
    }

    #[test]
    fn a_load_balancer_service() {
        let read = service(&json!({"type": "LoadBalancer", "clusterIP": "10.96.0.5", "clusterIPs": ["10.96.0.5"],
            "externalTrafficPolicy": "Local", "healthCheckNodePort": 32000, "sessionAffinity": "ClientIP",
            "loadBalancerSourceRanges": [" 10.1.2.3/8 ", "fd00::/64"],
            "ports": [{"name": "http", "port": 80, "nodePort": 30080, "protocol": "TCP"}, {"port": 53, "protocol": "UDP"}]}))
        .unwrap();
        assert_eq!(read.load_balancer_ips, [Ipv4Addr::new(192, 0, 2, 1)]);
        assert_eq!(read.source_ranges, ["10.0.0.0/8".parse::<Ipv4Net>().unwrap()]);
        assert_eq!((read.affinity, read.health_check_node_port, read.external_local), (Some(10800), Some(32000), true));
        assert_eq!(read.ports[0].node_port, Some(30080));
        assert_eq!(read.ports[1].protocol, Protocol::Udp);
    }

    #[test]
    fn services_without_anything_to_do() {
        assert_eq!(service(&json!({"clusterIP": "None", "clusterIPs": ["None"]})), None);
        assert_eq!(service(&json!({"type": "ExternalName", "externalName": "example.org"})), None);
        assert_eq!(service(&json!({"clusterIP": "fd00::1", "clusterIPs": ["fd00::1"]})), None);
        let dual = service(&json!({"clusterIP": "fd00::1", "clusterIPs": ["fd00::1", "10.96.0.7"]})).unwrap();
        assert_eq!(dual.cluster_ip, Ipv4Addr::new(10, 96, 0, 7));
    }

    #[test]
    fn an_endpoint_slice() {
        let object = json!({"metadata": {"namespace": "ns", "name": "svc-x1", "labels": {"kubernetes.io/service-name": "svc"}},
            "addressType": "IPv4", "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}, {"name": "no-port"}],
            "endpoints": [
                {"addresses": ["10.244.1.5"], "nodeName": "node1"},
                {"addresses": ["10.244.1.6"], "conditions": {"ready": false, "serving": true, "terminating": true},
                 "hints": {"forZones": [{"name": "a"}]}},
                {"addresses": ["not an address"]}]});
        let slice = Slice::read(&serde_json::from_value(object).unwrap()).unwrap();
        assert_eq!((slice.ports.len(), slice.endpoints.len()), (1, 2));
        assert!(slice.endpoints[0].ready && slice.endpoints[0].serving);
        assert!(!slice.endpoints[1].ready && slice.endpoints[1].serving && slice.endpoints[1].terminating);
        assert_eq!(slice.endpoints[1].zone_hints, ["a"]);
    }

    #[test]
    fn a_node_that_is_being_taken_out() {
        let node = json!({"metadata": {"name": "n", "labels": {"topology.kubernetes.io/zone": "a"}},
            "spec": {"taints": [{"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}]},
            "status": {"addresses": [{"type": "InternalIP", "address": "10.0.0.1"}]}});
        let node = Node::read(&serde_json::from_value(node).unwrap());
        assert_eq!((node.zone.as_str(), node.eligible), ("a", false));
    }
}
