//! Writes the endpoint slices of each service with a selector: what kube-proxy and cluster DNS read.
//!
//! Endpoints stay in the slice in which they are, so that a change touches as few slices as possible; new ones fill
//! slices that have room.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use apimachinery::controller::{Controller, Informer, ObjectKey, Plan, Write};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, Pod, Service, ServiceSpec};
use k8s_openapi::api::discovery::v1::{
    Endpoint, EndpointConditions, EndpointHints, EndpointPort, EndpointSlice, ForNode, ForZone,
};
use kube::api::ObjectMeta;

use super::endpoints::target;
use super::service_endpoints::{Backend, HEADLESS, Port, addresses, backends, hostname, is_headless, ports, wire_pods};
use crate::app::Context;
use crate::common::{controller_reference, is_deleted, labels, name, namespace, pods};

/// The most endpoints in one slice.
const CAPACITY: usize = 100;
const SERVICE_NAME: &str = "kubernetes.io/service-name";
const MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";
const US: &str = "endpointslice-controller.k8s.io";
const ZONE: &str = "topology.kubernetes.io/zone";
const SERVICE_INDEX: &str = "service";

struct EndpointSliceController {
    services: Arc<Informer<Service>>,
    slices: Arc<Informer<EndpointSlice>>,
    pods: Arc<Informer<Pod>>,
    nodes: Arc<Informer<Node>>,
}

pub fn start(context: &Context) {
    let informers = context.driver.informers();
    let controller = EndpointSliceController {
        services: informers.of(),
        slices: informers.of(),
        pods: informers.of(),
        nodes: informers.of(),
    };
    index_by_service(&controller.slices);
    context.driver.run(controller, 5, |controller, wiring| {
        wiring.primary(&controller.services);
        wiring.map(&controller.slices, |change| {
            change.versions().filter(|slice| is_ours(slice)).filter_map(|slice| service_key(slice)).collect()
        });
        wire_pods(wiring, &controller.pods, &controller.services);
        let services = controller.services.clone();
        wiring.map(&controller.nodes, move |change| {
            let zone = |node: Option<&Arc<Node>>| node.and_then(|node| labels(&node.metadata).get(ZONE).cloned());
            if zone(change.old.as_ref()) == zone(change.new.as_ref()) {
                return Vec::new();
            }
            services.list().iter().map(|service| ObjectKey::of(&service.metadata)).collect()
        });
    });
}

fn index_by_service(slices: &Informer<EndpointSlice>) {
    slices.add_index(SERVICE_INDEX, |slice| service_key(slice).map(|key| key.to_string()).into_iter().collect());
}

fn service_key(slice: &EndpointSlice) -> Option<ObjectKey> {
    let service = labels(&slice.metadata).get(SERVICE_NAME)?;
    Some(ObjectKey::new(namespace(&slice.metadata), service))
}

fn is_ours(slice: &EndpointSlice) -> bool {
    labels(&slice.metadata).get(MANAGED_BY).is_some_and(|by| by == US)
}

/// Endpoints that may share a slice: one address family, the same ports.
type Group = (&'static str, Vec<Port>);

impl Controller for EndpointSliceController {
    fn name(&self) -> &'static str {
        "endpointslice"
    }

    fn component(&self) -> &'static str {
        "endpoint-slice-controller"
    }

    fn reconcile(&self, key: &ObjectKey, _: Timestamp) -> Plan {
        let current: Vec<_> =
            self.slices.indexed(SERVICE_INDEX, &key.to_string()).into_iter().filter(|s| is_ours(s)).collect();
        let wanted = self.services.get(key).filter(|service| !is_deleted(&service.metadata));
        let Some(service) = wanted else {
            let plan = current.iter().map(|slice| Write::delete(slice.as_ref())).collect();
            return Plan { writes: plan, ..Plan::default() };
        };
        let Some(spec) = &service.spec else { return Plan::nothing() };
        if spec.type_.as_deref() == Some("ExternalName") || spec.selector.is_none() {
            return Plan::nothing();
        }
        let mut plan = Plan::nothing();
        let groups = self.groups(&service, spec);
        let mut surplus: Vec<_> =
            current.iter().filter(|slice| !groups.contains_key(&group_of(slice))).cloned().collect();
        for (group, endpoints) in groups {
            let existing: Vec<_> = current.iter().filter(|slice| group_of(slice) == group).cloned().collect();
            surplus.extend(arrange(&service, spec, &group, endpoints, &existing, &mut plan));
        }
        plan.writes.extend(
            surplus.iter().filter(|slice| !is_deleted(&slice.metadata)).map(|slice| Write::delete(slice.as_ref())),
        );
        plan
    }
}

impl EndpointSliceController {
    /// All endpoints of the service by group; a family without endpoints has one empty group, so that there is a slice
    /// which says that there is nothing.
    fn groups(&self, service: &Service, spec: &ServiceSpec) -> BTreeMap<Group, Vec<Endpoint>> {
        let mut groups = BTreeMap::<Group, Vec<Endpoint>>::new();
        let backends = backends(service, &self.pods);
        for family in families(spec) {
            let mut found = false;
            for backend in &backends {
                let all = addresses(&backend.pod);
                let Some(ip) = all.iter().find(|ip| (family == "IPv6") == ip.contains(':')) else { continue };
                let group = (family, ports(spec, &backend.pod));
                groups.entry(group).or_default().push(self.endpoint(service, spec, backend, ip));
                found = true;
            }
            if !found {
                groups.entry((family, Vec::new())).or_default();
            }
        }
        groups
    }

    fn endpoint(&self, service: &Service, spec: &ServiceSpec, backend: &Backend, ip: &str) -> Endpoint {
        let node_name = pods::node_name(&backend.pod);
        let node = node_name.and_then(|node| self.nodes.get(&ObjectKey::cluster(node)));
        let zone = node.and_then(|node| labels(&node.metadata).get(ZONE).cloned());
        Endpoint {
            addresses: vec![ip.to_owned()],
            conditions: Some(EndpointConditions {
                ready: Some(backend.ready),
                serving: Some(backend.serving),
                terminating: Some(backend.terminating),
            }),
            hints: hints(spec, backend, node_name, zone.as_deref()),
            hostname: hostname(service, &backend.pod).map(str::to_owned),
            node_name: node_name.map(str::to_owned),
            target_ref: Some(target(&backend.pod)),
            zone,
            ..Endpoint::default()
        }
    }
}

/// Where traffic for the endpoint should come from, for services that ask for near endpoints.
fn hints(spec: &ServiceSpec, backend: &Backend, node: Option<&str>, zone: Option<&str>) -> Option<EndpointHints> {
    if !backend.ready {
        return None;
    }
    let for_zones = zone.map(|zone| vec![ForZone { name: zone.to_owned() }]);
    match spec.traffic_distribution.as_deref() {
        Some("PreferClose" | "PreferSameZone") => {
            for_zones.map(|for_zones| EndpointHints { for_zones: Some(for_zones), for_nodes: None })
        }
        Some("PreferSameNode") => {
            let for_nodes = node.map(|node| vec![ForNode { name: node.to_owned() }]);
            for_nodes.map(|for_nodes| EndpointHints { for_zones, for_nodes: Some(for_nodes) })
        }
        _ => None,
    }
}

fn families(spec: &ServiceSpec) -> Vec<&'static str> {
    let named: Vec<_> =
        spec.ip_families.iter().flatten().map(|family| if family == "IPv6" { "IPv6" } else { "IPv4" }).collect();
    if named.is_empty() { vec!["IPv4"] } else { named }
}

fn group_of(slice: &EndpointSlice) -> Group {
    let mut ports: Vec<_> = slice
        .ports
        .iter()
        .flatten()
        .map(|port| Port {
            name: port.name.clone().unwrap_or_default(),
            protocol: port.protocol.clone().unwrap_or_else(|| "TCP".to_owned()),
            number: port.port.unwrap_or(0),
            app_protocol: port.app_protocol.clone(),
        })
        .collect();
    ports.sort();
    (if slice.address_type == "IPv6" { "IPv6" } else { "IPv4" }, ports)
}

/// Spreads the group's endpoints over its slices and answers the slices that are not needed any more.
fn arrange(
    service: &Service,
    spec: &ServiceSpec,
    group: &Group,
    endpoints: Vec<Endpoint>,
    existing: &[Arc<EndpointSlice>],
    plan: &mut Plan,
) -> Vec<Arc<EndpointSlice>> {
    let mut missing: BTreeMap<String, Endpoint> =
        endpoints.into_iter().map(|endpoint| (identity(&endpoint), endpoint)).collect();
    let wanted_none = missing.is_empty();
    let mut contents: Vec<Vec<Endpoint>> = existing
        .iter()
        .map(|slice| {
            slice.endpoints.iter().flatten().filter_map(|endpoint| missing.remove(&identity(endpoint))).collect()
        })
        .collect();
    let mut new: Vec<Endpoint> = missing.into_values().collect();
    // The fullest slices first, so that few slices are touched and few stay half empty.
    let mut order: BTreeSet<_> =
        contents.iter().enumerate().map(|(i, list)| (std::cmp::Reverse(list.len()), i)).collect();
    while let Some((_, index)) = order.pop_first().filter(|_| !new.is_empty()) {
        let room = CAPACITY.saturating_sub(contents[index].len()).min(new.len());
        contents[index].extend(new.drain(..room));
    }
    let mut surplus = Vec::new();
    let mut placeholder_needed = wanted_none;
    for (slice, list) in existing.iter().zip(contents) {
        if list.is_empty() && !placeholder_needed {
            surplus.push(slice.clone());
            continue;
        }
        placeholder_needed = false;
        let mut updated = slice.as_ref().clone();
        updated.endpoints = Some(list);
        updated.metadata.labels = Some(slice_labels(service, spec));
        if updated != **slice {
            plan.push(Write::update(&updated));
        }
    }
    let mut rest = new.into_iter().peekable();
    while rest.peek().is_some() || placeholder_needed {
        placeholder_needed = false;
        let list = rest.by_ref().take(CAPACITY).collect();
        plan.push(Write::create(&new_slice(service, spec, group, list)));
    }
    surplus
}

/// What makes an endpoint the same one as before.
fn identity(endpoint: &Endpoint) -> String {
    let target = endpoint.target_ref.as_ref().and_then(|target| target.uid.as_deref()).unwrap_or("");
    format!("{target} {}", endpoint.addresses.first().map_or("", String::as_str))
}

fn slice_labels(service: &Service, spec: &ServiceSpec) -> BTreeMap<String, String> {
    let mut wanted = labels(&service.metadata).clone();
    wanted.remove(HEADLESS);
    wanted.insert(SERVICE_NAME.to_owned(), name(&service.metadata).to_owned());
    wanted.insert(MANAGED_BY.to_owned(), US.to_owned());
    if is_headless(spec) {
        wanted.insert(HEADLESS.to_owned(), String::new());
    }
    wanted
}

fn new_slice(
    service: &Service,
    spec: &ServiceSpec,
    (family, ports): &Group,
    endpoints: Vec<Endpoint>,
) -> EndpointSlice {
    let port = |port: &Port| EndpointPort {
        name: Some(port.name.clone()),
        port: Some(port.number),
        protocol: Some(port.protocol.clone()),
        app_protocol: port.app_protocol.clone(),
    };
    EndpointSlice {
        address_type: (*family).to_owned(),
        metadata: ObjectMeta {
            generate_name: Some(format!("{}-", name(&service.metadata))),
            namespace: Some(namespace(&service.metadata).to_owned()),
            labels: Some(slice_labels(service, spec)),
            owner_references: Some(vec![controller_reference(service)]),
            ..ObjectMeta::default()
        },
        ports: Some(ports.iter().map(port).collect()),
        endpoints: Some(endpoints),
    }
}

#[cfg(test)]
mod tests {
    use super::super::endpoints::tests::{pod, service};
    use super::*;
    use apimachinery::controller::Verb;
    use serde_json::json;

    fn plan(service: Option<Service>, pods: Vec<Pod>, slices: &[EndpointSlice]) -> Plan {
        let node: Node = serde_json::from_value(json!({"metadata": {"name": "n1", "labels": {ZONE: "z1"}}})).unwrap();
        let controller = EndpointSliceController {
            services: Informer::fixed(service),
            slices: Informer::fixed(slices.to_vec()),
            pods: Informer::fixed(pods),
            nodes: Informer::fixed([node]),
        };
        index_by_service(&controller.slices);
        controller.reconcile(&ObjectKey::new("ns", "web"), Timestamp::UNIX_EPOCH)
    }

    /// The slices after the plan.
    fn carry_out(plan: &Plan, slices: &mut Vec<EndpointSlice>) {
        for write in &plan.writes {
            let slice = || -> EndpointSlice { serde_json::from_value(write.body.clone()).unwrap() };
            match write.verb {
                Verb::Create => {
                    let mut slice = slice();
                    slice.metadata.name = Some(format!("web-{}", slices.len()));
                    slices.push(slice);
                }
                Verb::Delete => slices.retain(|slice| name(&slice.metadata) != write.name),
                _ => *slices.iter_mut().find(|slice| name(&slice.metadata) == write.name).unwrap() = slice(),
            }
        }
    }

    fn pods(range: std::ops::Range<usize>) -> Vec<Pod> {
        range.map(|n| pod(&format!("p{n}"), &format!("10.1.{}.{}", n / 250, n % 250), true, Some(8080))).collect()
    }

    #[test]
    fn endpoints_fill_slices_and_stay_where_they_are() {
        let mut slices = Vec::new();
        carry_out(&plan(Some(service(json!({}))), pods(0..150), &slices), &mut slices);
        assert_eq!(slices.iter().map(|slice| slice.endpoints.iter().flatten().count()).collect::<Vec<_>>(), [100, 50]);
        assert!(plan(Some(service(json!({}))), pods(0..150), &slices).is_empty(), "nothing to do twice");
        let changed = plan(Some(service(json!({}))), pods(1..160), &slices);
        assert!(changed.writes.iter().all(|write| write.verb == Verb::Update));
        carry_out(&changed, &mut slices);
        assert_eq!(slices.iter().map(|slice| slice.endpoints.iter().flatten().count()).sum::<usize>(), 159);
        carry_out(&plan(None, vec![], &slices), &mut slices);
        assert!(slices.is_empty());
    }

    #[test]
    fn a_service_without_pods_has_an_empty_slice() {
        let mut slices = Vec::new();
        carry_out(&plan(Some(service(json!({}))), vec![], &slices), &mut slices);
        assert_eq!((slices.len(), slices[0].endpoints.iter().flatten().count()), (1, 0));
        assert!(plan(Some(service(json!({}))), vec![], &slices).is_empty());
        carry_out(&plan(Some(service(json!({}))), pods(0..1), &slices), &mut slices);
        assert_eq!((slices.len(), slices[0].endpoints.iter().flatten().count()), (1, 1), "the empty slice gives way");
    }

    #[test]
    fn conditions_and_topology_of_an_endpoint() {
        let mut going = pod("a", "10.1.0.1", true, Some(8080));
        going.metadata.deletion_timestamp =
            Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(Timestamp::UNIX_EPOCH));
        let near = service(json!({"trafficDistribution": "PreferClose"}));
        let plan = plan(Some(near), vec![going, pod("b", "10.1.0.2", true, Some(8080))], &[]);
        let endpoints = plan.writes[0].body["endpoints"].as_array().unwrap();
        assert_eq!(endpoints[0]["conditions"], json!({"ready": false, "serving": true, "terminating": true}));
        assert_eq!(endpoints[1]["conditions"], json!({"ready": true, "serving": true, "terminating": false}));
        assert_eq!((&endpoints[1]["zone"], &endpoints[1]["nodeName"]), (&json!("z1"), &json!("n1")));
        assert_eq!(endpoints[1]["hints"], json!({"forZones": [{"name": "z1"}]}));
    }

    #[test]
    fn two_families_have_slices_of_their_own() {
        let mut pod = pod("a", "10.1.0.1", true, Some(8080));
        pod.status.as_mut().unwrap().pod_ips =
            serde_json::from_value(json!([{"ip": "10.1.0.1"}, {"ip": "fd00::1"}])).unwrap();
        let plan = plan(Some(service(json!({"ipFamilies": ["IPv4", "IPv6"]}))), vec![pod], &[]);
        let types: Vec<_> = plan
            .writes
            .iter()
            .map(|write| {
                (
                    write.body["addressType"].as_str().unwrap(),
                    write.body["endpoints"][0]["addresses"][0].as_str().unwrap(),
                )
            })
            .collect();
        assert_eq!(types, [("IPv4", "10.1.0.1"), ("IPv6", "fd00::1")]);
    }
}
