//! What pods request of a resource, in thousandths, as the utilization of it is measured by.

use std::collections::BTreeMap;
use std::sync::Arc;

use apimachinery::meta::Quantity;
use k8s_openapi::api::core::v1::{Container, Pod, ResourceRequirements};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity as Text;

use super::replicas::Missing;
use crate::common::name;

/// The requests by the pods' names: of one container, or if its name is empty of the whole pod.
pub fn requests(pods: &[Arc<Pod>], resource: &str, container: &str) -> Result<BTreeMap<String, i64>, Missing> {
    let request = |pod: &Arc<Pod>| {
        let request = if container.is_empty() { of_pod(pod, resource) } else { of_container(pod, resource, container) };
        request.map(|request| (name(&pod.metadata).to_owned(), request))
    };
    pods.iter().map(request).collect()
}

/// What the pod says for the whole of itself, or else the sum of its containers.
fn of_pod(pod: &Pod, resource: &str) -> Result<i64, Missing> {
    let own = pod.spec.as_ref().and_then(|spec| spec.resources.as_ref()).filter(|own| is_set(own));
    let sum = || {
        let mut sum = 0_i64;
        for container in lasting(pod) {
            sum = sum.saturating_add(amount(container, resource).ok_or_else(|| missing(pod, resource, container))?);
        }
        Ok(sum)
    };
    let Some(own) = own else { return sum() };
    let overhead = pod.spec.as_ref().and_then(|spec| milli(spec.overhead.as_ref(), resource)).unwrap_or(0);
    match of(Some(own), resource) {
        Some(request) => Ok(request.saturating_add(overhead)),
        // Resources that the pod as a whole says nothing about come from the containers, if any of them says something.
        None if lasting(pod).any(|container| amount(container, resource).is_some()) => {
            Ok(lasting(pod).filter_map(|container| amount(container, resource)).fold(overhead, i64::saturating_add))
        }
        None => Err(Missing::PodRequest { resource: resource.to_owned(), pod: name(&pod.metadata).to_owned() }),
    }
}

fn of_container(pod: &Pod, resource: &str, container: &str) -> Result<i64, Missing> {
    match lasting(pod).find(|candidate| candidate.name == container) {
        Some(found) => amount(found, resource).ok_or_else(|| missing(pod, resource, found)),
        None => Err(Missing::Container { container: container.to_owned(), pod: name(&pod.metadata).to_owned() }),
    }
}

/// The containers that run as long as the pod: the usual ones and the sidecars.
fn lasting(pod: &Pod) -> impl Iterator<Item = &Container> {
    let spec = pod.spec.as_ref();
    let init = spec.into_iter().flat_map(|spec| spec.init_containers.iter().flatten());
    let sidecars = init.filter(|container| container.restart_policy.as_deref() == Some("Always"));
    spec.into_iter().flat_map(|spec| &spec.containers).chain(sidecars)
}

/// Only these can be requested for a pod as a whole.
fn is_set(own: &ResourceRequirements) -> bool {
    let mut names = own.requests.iter().flat_map(BTreeMap::keys);
    names.any(|name| name == "cpu" || name == "memory" || name.starts_with("hugepages-"))
}

fn amount(container: &Container, resource: &str) -> Option<i64> {
    of(container.resources.as_ref(), resource)
}

fn of(resources: Option<&ResourceRequirements>, resource: &str) -> Option<i64> {
    milli(resources?.requests.as_ref(), resource)
}

fn milli(list: Option<&BTreeMap<String, Text>>, resource: &str) -> Option<i64> {
    list?.get(resource)?.0.parse::<Quantity>().ok().map(|quantity| quantity.milli_value())
}

fn missing(pod: &Pod, resource: &str, container: &Container) -> Missing {
    Missing::Request {
        resource: resource.to_owned(),
        container: container.name.clone(),
        pod: name(&pod.metadata).to_owned(),
    }
}
