//! Which pods stand behind a service and on which ports: what the endpoints and the endpoint slice controllers share.

use std::sync::Arc;

use apimachinery::controller::{Change, Informer, ObjectKey, Wiring};
use k8s_openapi::api::core::v1::{Pod, Service, ServicePort, ServiceSpec};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use crate::common::selector::Selector;
use crate::common::{is_deleted, labels, name, namespace, pods};

/// Marks what belongs to headless services.
pub const HEADLESS: &str = "service.kubernetes.io/headless";

/// A pod behind a service.
pub struct Backend {
    pub pod: Arc<Pod>,
    /// Takes traffic, or is to be published regardless.
    pub ready: bool,
    /// Answers, even if it is on its way out.
    pub serving: bool,
    pub terminating: bool,
}

/// The pods that the service selects and that have an address, ordered by name.
pub fn backends(service: &Service, pods: &Informer<Pod>) -> Vec<Backend> {
    let Some(spec) = &service.spec else { return Vec::new() };
    let selector = Selector::of_map(spec.selector.as_ref());
    let publish_all = spec.publish_not_ready_addresses == Some(true);
    let candidates = pods.in_namespace(namespace(&service.metadata)).into_iter();
    candidates
        .filter(|pod| selector.matches(labels(&pod.metadata)) && !pods::is_finished(pod) && has_address(pod))
        .map(|pod| {
            let (serving, terminating) = (pods::is_ready(&pod), is_deleted(&pod.metadata));
            Backend { ready: publish_all || serving && !terminating, serving, terminating, pod }
        })
        .collect()
}

fn has_address(pod: &Pod) -> bool {
    pod.status.as_ref().and_then(|status| status.pod_ip.as_deref()).is_some_and(|ip| !ip.is_empty())
}

/// All addresses of the pod, the main one first.
pub fn addresses(pod: &Pod) -> Vec<String> {
    let Some(status) = &pod.status else { return Vec::new() };
    let mut all: Vec<String> = status.pod_ips.iter().flatten().map(|ip| ip.ip.clone()).collect();
    if let Some(main) = status.pod_ip.as_ref().filter(|ip| !ip.is_empty() && !all.contains(ip)) {
        all.insert(0, main.clone());
    }
    all
}

/// A service port as this pod serves it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Port {
    pub name: String,
    pub protocol: String,
    pub number: i32,
    pub app_protocol: Option<String>,
}

/// The ports of the service on this pod; ports that the pod does not have are left out.
pub fn ports(spec: &ServiceSpec, pod: &Pod) -> Vec<Port> {
    let mut ports: Vec<_> = spec
        .ports
        .iter()
        .flatten()
        .filter_map(|port| {
            Some(Port {
                name: port.name.clone().unwrap_or_default(),
                protocol: protocol(port).to_owned(),
                number: target_port(port, pod)?,
                app_protocol: port.app_protocol.clone(),
            })
        })
        .collect();
    ports.sort();
    ports
}

fn protocol(port: &ServicePort) -> &str {
    port.protocol.as_deref().unwrap_or("TCP")
}

fn target_port(port: &ServicePort, pod: &Pod) -> Option<i32> {
    match &port.target_port {
        None => Some(port.port),
        Some(IntOrString::Int(0)) => Some(port.port),
        Some(IntOrString::Int(number)) => Some(*number),
        Some(IntOrString::String(wanted)) => {
            let spec = pod.spec.as_ref()?;
            // Init containers serve when they are sidecars, which run as long as the pod.
            let sidecars =
                spec.init_containers.iter().flatten().filter(|c| c.restart_policy.as_deref() == Some("Always"));
            let mut declared =
                spec.containers.iter().chain(sidecars).flat_map(|container| container.ports.iter().flatten());
            let found = declared.find(|declared| {
                declared.name.as_deref() == Some(wanted)
                    && declared.protocol.as_deref().unwrap_or("TCP") == protocol(port)
            });
            found.map(|declared| declared.container_port)
        }
    }
}

pub fn is_headless(spec: &ServiceSpec) -> bool {
    spec.cluster_ip.as_deref() == Some("None") || (spec.type_.as_deref() == Some("ExternalName"))
}

/// The name under which the pod has its own DNS record in the service, if it has one.
pub fn hostname<'a>(service: &Service, pod: &'a Pod) -> Option<&'a str> {
    let spec = pod.spec.as_ref()?;
    let hostname = spec.hostname.as_deref().filter(|hostname| !hostname.is_empty())?;
    (spec.subdomain.as_deref() == Some(name(&service.metadata))).then_some(hostname)
}

/// A change of a pod asks for the services that select it, as it was and as it is, if something that they publish has
/// changed.
pub fn wire_pods(wiring: &Wiring, pods: &Informer<Pod>, services: &Arc<Informer<Service>>) {
    let services = services.clone();
    wiring.map(pods, move |change| {
        if is_unimportant(change) {
            return Vec::new();
        }
        let mut keys = Vec::new();
        for service in change.versions().take(1).flat_map(|pod| services.in_namespace(namespace(&pod.metadata))) {
            let selector = Selector::of_map(service.spec.as_ref().and_then(|spec| spec.selector.as_ref()));
            if change.versions().any(|pod| selector.matches(labels(&pod.metadata))) {
                keys.push(ObjectKey::of(&service.metadata));
            }
        }
        keys
    });
}

fn is_unimportant(change: &Change<Pod>) -> bool {
    let (Some(old), Some(new)) = (&change.old, &change.new) else { return false };
    let published = |pod: &Pod| {
        (
            addresses(pod),
            pods::is_ready(pod),
            pods::is_finished(pod),
            is_deleted(&pod.metadata),
            pods::node_name(pod).map(str::to_owned),
        )
    };
    old.metadata.labels == new.metadata.labels && published(old) == published(new)
}
