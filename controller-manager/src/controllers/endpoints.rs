//! Writes the Endpoints object of each service with a selector: the addresses of its pods, grouped by ports. (The older
//! form of endpoint slices, which some clients still read.)

use std::collections::BTreeMap;
use std::sync::Arc;

use apimachinery::controller::{Controller, Informer, ObjectKey, Plan, Write};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{
    EndpointAddress, EndpointPort, EndpointSubset, Endpoints, ObjectReference, Pod, Service, ServiceSpec,
};
use kube::api::ObjectMeta;

use super::service_endpoints::{Backend, HEADLESS, Port, addresses, backends, hostname, is_headless, ports, wire_pods};
use crate::app::Context;
use crate::common::{labels, pods};

/// More addresses than this are cut off, and the object says so.
const CAPACITY: usize = 1000;
const OVER_CAPACITY: &str = "endpoints.kubernetes.io/over-capacity";
const MANAGED_BY: &str = "endpoints.kubernetes.io/managed-by";
const US: &str = "endpoint-controller";

struct EndpointsController {
    services: Arc<Informer<Service>>,
    endpoints: Arc<Informer<Endpoints>>,
    pods: Arc<Informer<Pod>>,
}

pub fn start(context: &Context) {
    let informers = context.driver.informers();
    let controller = EndpointsController { services: informers.of(), endpoints: informers.of(), pods: informers.of() };
    context.driver.run(controller, 5, |controller, wiring| {
        wiring.primary(&controller.services);
        wiring.primary(&controller.endpoints);
        wire_pods(wiring, &controller.pods, &controller.services);
    });
}

impl Controller for EndpointsController {
    fn name(&self) -> &'static str {
        "endpoints"
    }

    fn component(&self) -> &'static str {
        "endpoint-controller"
    }

    fn reconcile(&self, key: &ObjectKey, _: Timestamp) -> Plan {
        let current = self.endpoints.get(key);
        let Some(service) = self.services.get(key) else {
            // Endpoints that somebody made without a service are none of our business.
            let ours =
                current.filter(|endpoints| labels(&endpoints.metadata).get(MANAGED_BY).is_some_and(|by| by == US));
            return ours.map_or_else(Plan::nothing, |endpoints| Plan::write(Write::delete(endpoints.as_ref())));
        };
        let Some(spec) = service.spec.as_ref().filter(|spec| spec.selector.is_some()) else { return Plan::nothing() };
        let (subsets, cut) = cut_off(subsets(&service, spec, &backends(&service, &self.pods)));
        let wanted = self.wanted(key, &service, spec, subsets, cut, current.as_deref());
        match current {
            None => Plan::write(Write::create(&wanted)),
            Some(current) if *current == wanted => Plan::nothing(),
            Some(_) => Plan::write(Write::update(&wanted)),
        }
    }
}

impl EndpointsController {
    fn wanted(
        &self,
        key: &ObjectKey,
        service: &Service,
        spec: &ServiceSpec,
        subsets: Vec<EndpointSubset>,
        cut: bool,
        current: Option<&Endpoints>,
    ) -> Endpoints {
        let mut wanted_labels = labels(&service.metadata).clone();
        wanted_labels.insert(MANAGED_BY.to_owned(), US.to_owned());
        if is_headless(spec) {
            wanted_labels.insert(HEADLESS.to_owned(), String::new());
        } else {
            wanted_labels.remove(HEADLESS);
        }
        let mut metadata = current.map_or_else(
            || ObjectMeta {
                name: Some(key.name.clone()),
                namespace: Some(key.namespace.clone()),
                ..ObjectMeta::default()
            },
            |current| current.metadata.clone(),
        );
        metadata.labels = Some(wanted_labels);
        let mut annotations = metadata.annotations.take().unwrap_or_default();
        annotations.remove(OVER_CAPACITY);
        if cut {
            annotations.insert(OVER_CAPACITY.to_owned(), "truncated".to_owned());
        }
        metadata.annotations = (!annotations.is_empty()).then_some(annotations);
        Endpoints { metadata, subsets: (!subsets.is_empty()).then_some(subsets) }
    }
}

#[derive(Default)]
struct Addresses {
    ready: Vec<EndpointAddress>,
    not_ready: Vec<EndpointAddress>,
}

fn subsets(service: &Service, spec: &ServiceSpec, backends: &[Backend]) -> Vec<EndpointSubset> {
    let publish_all = spec.publish_not_ready_addresses == Some(true);
    let family = spec.ip_families.as_ref().and_then(|families| families.first()).map(String::as_str);
    let mut groups: BTreeMap<Vec<Port>, Addresses> = BTreeMap::new();
    for backend in backends.iter().filter(|backend| publish_all || !backend.terminating) {
        let all = addresses(&backend.pod);
        let of_family = all.iter().find(|ip| family.is_none_or(|family| (family == "IPv6") == ip.contains(':')));
        let Some(ip) = of_family else { continue };
        let served = ports(spec, &backend.pod);
        // A pod without any of the ports has no endpoint, unless the service is headless and has no ports at all.
        if served.is_empty() && !(spec.ports.iter().flatten().next().is_none() && is_headless(spec)) {
            continue;
        }
        let group = groups.entry(served).or_default();
        let list = if backend.ready { &mut group.ready } else { &mut group.not_ready };
        list.push(address(service, &backend.pod, ip));
    }
    let some = |list: Vec<EndpointAddress>| (!list.is_empty()).then_some(list);
    let subset = |(ports, addresses): (Vec<Port>, Addresses)| EndpointSubset {
        addresses: some(sorted(addresses.ready)),
        not_ready_addresses: some(sorted(addresses.not_ready)),
        ports: (!ports.is_empty()).then(|| ports.into_iter().map(endpoint_port).collect()),
    };
    groups.into_iter().map(subset).collect()
}

fn sorted(mut addresses: Vec<EndpointAddress>) -> Vec<EndpointAddress> {
    addresses.sort_by(|a, b| a.ip.cmp(&b.ip));
    addresses
}

fn address(service: &Service, pod: &Pod, ip: &str) -> EndpointAddress {
    EndpointAddress {
        ip: ip.to_owned(),
        hostname: hostname(service, pod).map(str::to_owned),
        node_name: pods::node_name(pod).map(str::to_owned),
        target_ref: Some(target(pod)),
    }
}

pub fn target(pod: &Pod) -> ObjectReference {
    ObjectReference {
        kind: Some("Pod".to_owned()),
        namespace: pod.metadata.namespace.clone(),
        name: pod.metadata.name.clone(),
        uid: pod.metadata.uid.clone(),
        ..ObjectReference::default()
    }
}

fn endpoint_port(port: Port) -> EndpointPort {
    EndpointPort {
        name: (!port.name.is_empty()).then_some(port.name),
        port: port.number,
        protocol: Some(port.protocol),
        app_protocol: port.app_protocol,
    }
}

/// Keeps what fits, ready addresses first; true when something had to go.
fn cut_off(mut subsets: Vec<EndpointSubset>) -> (Vec<EndpointSubset>, bool) {
    let mut room = CAPACITY;
    let mut cut = false;
    let mut keep = |list: &mut Option<Vec<EndpointAddress>>| {
        if let Some(addresses) = list {
            cut |= addresses.len() > room;
            addresses.truncate(room);
            room -= addresses.len();
        }
        list.take_if(|addresses| addresses.is_empty());
    };
    subsets.iter_mut().for_each(|subset| keep(&mut subset.addresses));
    subsets.iter_mut().for_each(|subset| keep(&mut subset.not_ready_addresses));
    subsets.retain(|subset| subset.addresses.is_some() || subset.not_ready_addresses.is_some());
    (subsets, cut)
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use serde_json::{Value, json};

    pub fn service(extra: Value) -> Service {
        let mut service = json!({
            "metadata": {"name": "web", "namespace": "ns", "uid": "svc", "labels": {"l": "v"}},
            "spec": {"selector": {"app": "web"}, "clusterIP": "10.0.0.1", "ipFamilies": ["IPv4"], "ports": [{"name": "http", "port": 80, "targetPort": "web", "protocol": "TCP"}]},
        });
        for (key, value) in extra.as_object().unwrap() {
            service["spec"][key] = value.clone();
        }
        serde_json::from_value(service).unwrap()
    }

    pub fn pod(name: &str, ip: &str, ready: bool, port: Option<i32>) -> Pod {
        let mut pod = pods::tests::pod(name, Some("n1"), "Running", ready.then_some(0));
        pod.metadata.labels = Some([("app".to_owned(), "web".to_owned())].into());
        let status = pod.status.as_mut().unwrap();
        status.pod_ip = Some(ip.to_owned());
        status.pod_ips = serde_json::from_value(json!([{"ip": ip}])).unwrap();
        let ports: Vec<_> = port.map(|number| json!({"name": "web", "containerPort": number})).into_iter().collect();
        pod.spec.as_mut().unwrap().containers = serde_json::from_value(json!([{"name": "c", "ports": ports}])).unwrap();
        pod
    }

    fn plan(service: Option<Service>, pods: Vec<Pod>, endpoints: Vec<Endpoints>) -> Plan {
        let controller = EndpointsController {
            services: Informer::fixed(service),
            endpoints: Informer::fixed(endpoints),
            pods: Informer::fixed(pods),
        };
        controller.reconcile(&ObjectKey::new("ns", "web"), Timestamp::UNIX_EPOCH)
    }

    #[test]
    fn addresses_are_grouped_by_the_ports_that_pods_have() {
        let pods = vec![
            pod("a", "10.1.0.2", true, Some(8080)),
            pod("b", "10.1.0.1", true, Some(8080)),
            pod("c", "10.1.0.3", false, Some(9090)),
            pod("d", "10.1.0.4", true, None),
        ];
        let plan = plan(Some(service(json!({}))), pods, vec![]);
        let subsets = &plan.writes[0].body["subsets"];
        assert_eq!(subsets.as_array().unwrap().len(), 2);
        assert_eq!(subsets[0]["ports"], json!([{"name": "http", "port": 8080, "protocol": "TCP"}]));
        assert_eq!(subsets[0]["addresses"][0]["ip"], "10.1.0.1");
        assert_eq!(
            subsets[0]["addresses"][1]["targetRef"],
            json!({"kind": "Pod", "namespace": "ns", "name": "a", "uid": "a"})
        );
        assert_eq!(subsets[1]["notReadyAddresses"][0]["ip"], "10.1.0.3");
    }

    #[test]
    fn what_is_right_is_left_alone_and_what_is_orphaned_goes() {
        let pods = vec![pod("a", "10.1.0.2", true, Some(8080))];
        let created = plan(Some(service(json!({}))), pods.clone(), vec![]).writes.remove(0);
        let endpoints: Endpoints = serde_json::from_value(created.body).unwrap();
        assert!(plan(Some(service(json!({}))), pods, vec![endpoints.clone()]).is_empty());
        assert_eq!(plan(None, vec![], vec![endpoints.clone()]).writes.len(), 1);
        let foreign = Endpoints { metadata: ObjectMeta { labels: None, ..endpoints.metadata }, ..endpoints };
        assert!(plan(None, vec![], vec![foreign]).is_empty());
    }

    #[test]
    fn unready_addresses_are_published_on_request_and_headless_services_need_no_ports() {
        let asked = service(json!({"publishNotReadyAddresses": true, "clusterIP": "None", "ports": null}));
        let plan = plan(Some(asked), vec![pod("a", "10.1.0.2", false, None)], vec![]);
        let body = &plan.writes[0].body;
        assert_eq!(body["subsets"][0]["addresses"][0]["ip"], "10.1.0.2");
        assert_eq!(body["metadata"]["labels"][HEADLESS], "");
    }
}
