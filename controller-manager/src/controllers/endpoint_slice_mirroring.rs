//! Copies Endpoints objects that people maintain themselves (for services without a selector) to endpoint slices.

use std::collections::BTreeMap;
use std::sync::Arc;

use apimachinery::controller::{Controller, Informer, ObjectKey, Plan, Write};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{EndpointAddress, EndpointSubset, Endpoints, Service};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice};
use kube::api::ObjectMeta;

use crate::app::Context;
use crate::common::{controller_reference, is_deleted, labels, name, namespace};

const SERVICE_NAME: &str = "kubernetes.io/service-name";
const MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";
const US: &str = "endpointslicemirroring-controller.k8s.io";
const SKIP: &str = "endpointslice.kubernetes.io/skip-mirror";
const LEADER: &str = "control-plane.alpha.kubernetes.io/leader";
/// The most addresses that are copied from one subset.
const CAPACITY: usize = 1000;

struct MirroringController {
    endpoints: Arc<Informer<Endpoints>>,
    services: Arc<Informer<Service>>,
    slices: Arc<Informer<EndpointSlice>>,
}

pub fn start(context: &Context) {
    let informers = context.driver.informers();
    let controller =
        MirroringController { endpoints: informers.of(), services: informers.of(), slices: informers.of() };
    context.driver.run(controller, 2, |controller, wiring| {
        wiring.primary(&controller.endpoints);
        wiring.primary(&controller.services);
        wiring.map(&controller.slices, |change| {
            let ours = change.versions().filter(|slice| is_ours(slice));
            ours.filter_map(|slice| {
                Some(ObjectKey::new(namespace(&slice.metadata), labels(&slice.metadata).get(SERVICE_NAME)?))
            })
            .collect()
        });
    });
}

fn is_ours(slice: &EndpointSlice) -> bool {
    labels(&slice.metadata).get(MANAGED_BY).is_some_and(|by| by == US)
}

impl Controller for MirroringController {
    fn name(&self) -> &'static str {
        "endpointslice-mirroring"
    }

    fn component(&self) -> &'static str {
        "endpoint-slice-mirroring-controller"
    }

    fn reconcile(&self, key: &ObjectKey, _: Timestamp) -> Plan {
        let mut current = self.slices.in_namespace(&key.namespace);
        current.retain(|slice| is_ours(slice) && labels(&slice.metadata).get(SERVICE_NAME) == Some(&key.name));
        let wanted = self.wanted(key);
        let mut plan = Plan::nothing();
        let mut spare: Vec<_> = current.clone();
        for slice in wanted {
            let same_place =
                |have: &Arc<EndpointSlice>| have.address_type == slice.address_type && have.ports == slice.ports;
            match spare.iter().position(same_place) {
                Some(position) => {
                    let have = spare.remove(position);
                    let updated = EndpointSlice {
                        metadata: ObjectMeta {
                            labels: slice.metadata.labels,
                            annotations: slice.metadata.annotations,
                            ..have.metadata.clone()
                        },
                        ..slice
                    };
                    if updated != *have {
                        plan.push(Write::update(&updated));
                    }
                }
                None => {
                    plan.push(Write::create(&slice));
                }
            }
        }
        plan.writes.extend(
            spare.iter().filter(|slice| !is_deleted(&slice.metadata)).map(|slice| Write::delete(slice.as_ref())),
        );
        plan
    }
}

impl MirroringController {
    fn wanted(&self, key: &ObjectKey) -> Vec<EndpointSlice> {
        let service = self.services.get(key).and_then(|service| service.spec.clone());
        let endpoints = self.endpoints.get(key).filter(|endpoints| is_mirrored(endpoints));
        let (Some(service), Some(endpoints)) = (service, endpoints) else { return Vec::new() };
        // Services with a selector have slices of their own.
        if service.selector.as_ref().is_some_and(|selector| !selector.is_empty()) {
            return Vec::new();
        }
        let mut slices: BTreeMap<String, EndpointSlice> = BTreeMap::new();
        for subset in endpoints.subsets.iter().flatten() {
            for family in ["IPv4", "IPv6"] {
                let copied = copy(subset, family);
                if copied.is_empty() {
                    continue;
                }
                let ports = ports(subset);
                let place = format!("{family} {}", serde_json::to_string(&ports).unwrap_or_default());
                let slice = slices.entry(place).or_insert_with(|| empty_slice(&endpoints, family, ports));
                slice.endpoints.get_or_insert_default().extend(copied);
            }
        }
        slices.into_values().collect()
    }
}

fn is_mirrored(endpoints: &Endpoints) -> bool {
    let meta = &endpoints.metadata;
    let leader = meta.annotations.as_ref().is_some_and(|annotations| annotations.contains_key(LEADER));
    !is_deleted(meta) && !leader && labels(meta).get(SKIP).is_none_or(|skip| skip != "true")
}

fn ports(subset: &EndpointSubset) -> Vec<EndpointPort> {
    let port = |port: &k8s_openapi::api::core::v1::EndpointPort| EndpointPort {
        name: Some(port.name.clone().unwrap_or_default()),
        port: Some(port.port),
        protocol: Some(port.protocol.clone().unwrap_or_else(|| "TCP".to_owned())),
        app_protocol: port.app_protocol.clone(),
    };
    subset.ports.iter().flatten().map(port).collect()
}

fn copy(subset: &EndpointSubset, family: &str) -> Vec<Endpoint> {
    let of_family = |address: &&EndpointAddress| (family == "IPv6") == address.ip.contains(':');
    let endpoint = |address: &EndpointAddress, ready: bool| Endpoint {
        addresses: vec![address.ip.clone()],
        conditions: Some(EndpointConditions { ready: Some(ready), ..EndpointConditions::default() }),
        hostname: address.hostname.clone(),
        node_name: address.node_name.clone(),
        target_ref: address.target_ref.clone(),
        ..Endpoint::default()
    };
    let ready = subset.addresses.iter().flatten().filter(of_family).map(|address| endpoint(address, true));
    let not_ready =
        subset.not_ready_addresses.iter().flatten().filter(of_family).map(|address| endpoint(address, false));
    ready.chain(not_ready).take(CAPACITY).collect()
}

fn empty_slice(endpoints: &Endpoints, family: &str, ports: Vec<EndpointPort>) -> EndpointSlice {
    let mut wanted_labels = labels(&endpoints.metadata).clone();
    wanted_labels.insert(SERVICE_NAME.to_owned(), name(&endpoints.metadata).to_owned());
    wanted_labels.insert(MANAGED_BY.to_owned(), US.to_owned());
    let mut annotations = endpoints.metadata.annotations.clone().unwrap_or_default();
    annotations.retain(|key, _| {
        key != "kubectl.kubernetes.io/last-applied-configuration"
            && key != "endpoints.kubernetes.io/last-change-trigger-time"
    });
    EndpointSlice {
        address_type: family.to_owned(),
        metadata: ObjectMeta {
            generate_name: Some(format!("{}-", name(&endpoints.metadata))),
            namespace: Some(namespace(&endpoints.metadata).to_owned()),
            labels: Some(wanted_labels),
            annotations: (!annotations.is_empty()).then_some(annotations),
            owner_references: Some(vec![controller_reference(endpoints)]),
            ..ObjectMeta::default()
        },
        ports: Some(ports),
        endpoints: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use apimachinery::controller::Verb;
    use serde_json::{Value, json};

    fn plan(selector: Value, endpoints: Value, slices: Vec<EndpointSlice>) -> Plan {
        let service = json!({"metadata": {"name": "s", "namespace": "ns"}, "spec": {"selector": selector}});
        let controller = MirroringController {
            endpoints: Informer::fixed([serde_json::from_value::<Endpoints>(endpoints).unwrap()]),
            services: Informer::fixed([serde_json::from_value::<Service>(service).unwrap()]),
            slices: Informer::fixed(slices),
        };
        controller.reconcile(&ObjectKey::new("ns", "s"), Timestamp::UNIX_EPOCH)
    }

    #[test]
    fn endpoints_without_a_selector_are_copied_and_followed() {
        let mut endpoints = json!({"metadata": {"name": "s", "namespace": "ns", "uid": "e"}, "subsets": [{"addresses": [{"ip": "10.0.0.1"}], "ports": [{"port": 80}]}]});
        let created = plan(Value::Null, endpoints.clone(), vec![]).writes.remove(0);
        assert_eq!(created.body["endpoints"][0]["addresses"], json!(["10.0.0.1"]));
        let mut slice: EndpointSlice = serde_json::from_value(created.body).unwrap();
        slice.metadata.name = Some("s-1".to_owned());
        assert!(plan(Value::Null, endpoints.clone(), vec![slice.clone()]).is_empty());
        endpoints["subsets"][0]["addresses"][0]["ip"] = json!("10.0.0.2");
        assert_eq!(plan(Value::Null, endpoints.clone(), vec![slice.clone()]).writes[0].verb, Verb::Update);
        assert_eq!(plan(json!({"a": "b"}), endpoints.clone(), vec![slice.clone()]).writes[0].verb, Verb::Delete);
        endpoints["metadata"]["labels"] = json!({SKIP: "true"});
        assert_eq!(plan(Value::Null, endpoints, vec![slice]).writes[0].verb, Verb::Delete);
    }
}
