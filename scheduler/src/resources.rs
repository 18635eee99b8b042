//! Amounts of what pods ask for and nodes have: CPU in millicores, memory and ephemeral storage in bytes, and counts of
//! everything else (huge pages, devices).

use std::collections::BTreeMap;

use apimachinery::meta::Quantity;
use k8s_openapi::api::core::v1::{Container, Pod, ResourceRequirements};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity as ApiQuantity;

/// What a pod without requests counts as when nodes are compared, so that many such pods do not all land on one node.
pub const DEFAULT_MILLI_CPU: i64 = 100;
pub const DEFAULT_MEMORY: i64 = 200 * 1024 * 1024;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resources {
    pub milli_cpu: i64,
    pub memory: i64,
    pub ephemeral_storage: i64,
    /// Every other resource, in its own unit. Most pods have none: the map then costs nothing.
    pub other: BTreeMap<String, i64>,
}

impl Resources {
    pub fn from_list(list: Option<&BTreeMap<String, ApiQuantity>>) -> Self {
        let mut resources = Self::default();
        for (name, quantity) in list.into_iter().flatten() {
            // The API server has validated quantities; one that cannot be read counts as nothing.
            let Ok(quantity) = quantity.0.parse::<Quantity>() else { continue };
            match name.as_str() {
                "cpu" => resources.milli_cpu = quantity.milli_value(),
                "memory" => resources.memory = quantity.value(),
                "ephemeral-storage" => resources.ephemeral_storage = quantity.value(),
                "pods" => {}
                _ => {
                    resources.other.insert(name.clone(), quantity.value());
                }
            }
        }
        resources
    }

    pub fn add(&mut self, more: &Self) {
        self.combine(more, i64::saturating_add);
    }

    pub fn subtract(&mut self, less: &Self) {
        self.combine(less, i64::saturating_sub);
    }

    /// Raises each amount to at least that of `floor`.
    pub fn at_least(&mut self, floor: &Self) {
        self.combine(floor, i64::max);
    }

    fn combine(&mut self, with: &Self, operation: impl Fn(i64, i64) -> i64) {
        self.milli_cpu = operation(self.milli_cpu, with.milli_cpu);
        self.memory = operation(self.memory, with.memory);
        self.ephemeral_storage = operation(self.ephemeral_storage, with.ephemeral_storage);
        for (name, amount) in &with.other {
            let own = self.other.entry(name.clone()).or_default();
            *own = operation(*own, *amount);
        }
    }

    /// Overwrites what `list` names; used for pod-level requests, which win over the sum of the containers'.
    fn replace(&mut self, list: &BTreeMap<String, ApiQuantity>) {
        let named = Self::from_list(Some(list));
        if list.contains_key("cpu") {
            self.milli_cpu = named.milli_cpu;
        }
        if list.contains_key("memory") {
            self.memory = named.memory;
        }
        self.other.extend(named.other);
    }
}

fn requests(resources: Option<&ResourceRequirements>) -> Option<&BTreeMap<String, ApiQuantity>> {
    resources?.requests.as_ref()
}

/// What a container asks for, with the defaults for comparison where it asks for nothing.
fn container_request(container: &Container, defaults: bool) -> Resources {
    let list = requests(container.resources.as_ref());
    let mut resources = Resources::from_list(list);
    if defaults {
        let has = |name| list.is_some_and(|list| list.contains_key(name));
        if !has("cpu") {
            resources.milli_cpu = DEFAULT_MILLI_CPU;
        }
        if !has("memory") {
            resources.memory = DEFAULT_MEMORY;
        }
    }
    resources
}

/// What a pod needs at most at any time of its life: init containers run one after another, each beside the sidecars
/// (restartable init containers) started before it; then all containers run beside all sidecars.
pub fn pod_requests(pod: &Pod, defaults: bool) -> Resources {
    let Some(spec) = &pod.spec else { return Resources::default() };
    let mut running = Resources::default();
    for container in &spec.containers {
        running.add(&container_request(container, defaults));
    }
    let mut sidecars = Resources::default();
    let mut peak = Resources::default();
    for container in spec.init_containers.iter().flatten() {
        let mut need = container_request(container, defaults);
        if container.restart_policy.as_deref() == Some("Always") {
            running.add(&need);
            sidecars.add(&need);
            need = sidecars.clone();
        } else {
            need.add(&sidecars);
        }
        peak.at_least(&need);
    }
    running.at_least(&peak);
    if let Some(list) = requests(spec.resources.as_ref()) {
        running.replace(list);
    }
    running.add(&Resources::from_list(spec.overhead.as_ref()));
    running
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_peak_of_a_pods_life_counts() {
        let container = |cpu: &str| json!({"name": "c", "resources": {"requests": {"cpu": cpu}}});
        let sidecar =
            |cpu: &str| json!({"name": "s", "restartPolicy": "Always", "resources": {"requests": {"cpu": cpu}}});
        for (init, main, expected) in [
            (vec![], vec![container("1"), container("500m")], 1500),
            (vec![container("2")], vec![container("1")], 2000),
            (vec![sidecar("1"), container("2")], vec![container("500m")], 3000),
            (vec![sidecar("1")], vec![container("1")], 2000),
        ] {
            let pod: Pod =
                serde_json::from_value(json!({"spec": {"initContainers": init, "containers": main}})).unwrap();
            assert_eq!(pod_requests(&pod, false).milli_cpu, expected);
        }
    }
}
