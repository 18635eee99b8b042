//! Which pod has to go first when the node is short of something, and what it is told. Pure.

use std::cmp::Reverse;

use apimachinery::meta::{Quantity, QuantityFormat};
use k8s_openapi::api::core::v1::Pod;

use super::thresholds::Signal;
use crate::pod::qos::{self, Class};
use crate::pod::{annotation, annotations, is_static};

/// The lowest priority of pods that the system itself depends on.
const CRITICAL: i32 = 2_000_000_000;

/// A container's use beside what it asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ContainerUse {
    pub name: String,
    pub memory: Option<i64>,
    /// Bytes of its writable layer and its logs.
    pub disk: Option<i64>,
    pub inodes: i64,
}

#[derive(Clone, Debug)]
pub struct Candidate<'a> {
    pub pod: &'a Pod,
    pub containers: Vec<ContainerUse>,
    /// Bytes of its volumes on the node's disk.
    pub volumes: i64,
    pub processes: i64,
}

/// Pods that are never evicted: those that the node or the cluster cannot do without.
pub fn is_critical(pod: &Pod) -> bool {
    let priority = pod.spec.as_ref().and_then(|spec| spec.priority).unwrap_or(0);
    is_static(pod) || annotation(pod, annotations::MIRROR).is_some() || priority >= CRITICAL
}

impl Candidate<'_> {
    fn used(&self, signal: Signal) -> i64 {
        let sum = |figure: fn(&ContainerUse) -> i64| self.containers.iter().map(figure).sum::<i64>();
        match signal {
            Signal::Memory => sum(|container| container.memory.unwrap_or(0)),
            Signal::NodeFs | Signal::ImageFs => sum(|container| container.disk.unwrap_or(0)) + self.volumes,
            Signal::NodeFsInodes | Signal::ImageFsInodes => sum(|container| container.inodes),
            Signal::Pids => self.processes,
        }
    }

    fn requested(&self, signal: Signal) -> i64 {
        match signal {
            Signal::Memory => qos::pod_resources(self.pod).memory_request.unwrap_or(0),
            Signal::NodeFs | Signal::ImageFs => {
                let specs = self.pod.spec.iter().flat_map(|spec| &spec.containers);
                specs.map(|spec| qos::request(spec, "ephemeral-storage").unwrap_or(0)).sum()
            }
            Signal::NodeFsInodes | Signal::ImageFsInodes | Signal::Pids => 0,
        }
    }
}

/// The pods that may be evicted, the first to go first: those that use more than they asked for, then those of low
/// priority, then those that use the most beyond what they asked for.
pub fn order<'a>(signal: Signal, candidates: Vec<Candidate<'a>>) -> Vec<Candidate<'a>> {
    let mut candidates: Vec<_> = candidates.into_iter().filter(|candidate| !is_critical(candidate.pod)).collect();
    candidates.sort_by_key(|candidate| {
        let beyond = candidate.used(signal) - candidate.requested(signal);
        let exceeds = signal != Signal::Pids && beyond > 0;
        let priority = candidate.pod.spec.as_ref().and_then(|spec| spec.priority).unwrap_or(0);
        (Reverse(exceeds), priority, Reverse(beyond))
    });
    candidates
}

pub fn bytes(value: i64) -> String {
    Quantity::from_value(value, QuantityFormat::BinarySi).to_string()
}

/// What the status of an evicted pod says.
pub fn message(candidate: &Candidate<'_>, signal: Signal, threshold: i64, available: i64) -> String {
    let resource = signal.resource();
    let mut text = format!(
        "The node was low on resource: {resource}. Threshold quantity: {}, available: {}. ",
        bytes(threshold),
        bytes(available)
    );
    for container in &candidate.containers {
        let used = match signal {
            Signal::Memory => container.memory,
            Signal::NodeFs | Signal::ImageFs => container.disk,
            Signal::NodeFsInodes | Signal::ImageFsInodes | Signal::Pids => None,
        };
        let specs =
            candidate.pod.spec.iter().flat_map(|spec| spec.init_containers.iter().flatten().chain(&spec.containers));
        let spec = specs.into_iter().find(|spec| spec.name == container.name);
        let request = spec.and_then(|spec| qos::request(spec, resource)).unwrap_or(0);
        if let Some(used) = used.filter(|used| *used > request) {
            text.push_str(&format!(
                "Container {} was using {}, request is {}, has larger consumption of {resource}. ",
                container.name,
                bytes(used),
                bytes(request)
            ));
        }
    }
    text
}

/// Whether a pod is kept out while the node is short of something: under memory pressure only those that asked for
/// nothing, under other pressures all but critical ones.
pub fn keeps_out(pod: &Pod, pressure: crate::node::status::Pressure) -> Option<String> {
    if is_critical(pod) || pressure == Default::default() {
        return None;
    }
    let only_memory = pressure.memory && !pressure.disk && !pressure.pids;
    let tolerates = || {
        let tolerations = pod.spec.iter().flat_map(|spec| spec.tolerations.iter().flatten());
        let key = "node.kubernetes.io/memory-pressure";
        tolerations.into_iter().any(|toleration| {
            let effect = toleration.effect.as_deref().unwrap_or_default();
            toleration.key.as_deref().is_none_or(|own| own == key) && matches!(effect, "" | "NoSchedule")
        })
    };
    if only_memory && (qos::class(pod) != Class::BestEffort || tolerates()) {
        return None;
    }
    let names = [(pressure.memory, "MemoryPressure"), (pressure.disk, "DiskPressure"), (pressure.pids, "PIDPressure")];
    let names: Vec<&str> = names.into_iter().filter(|(under, _)| *under).map(|(_, name)| name).collect();
    Some(format!("The node had condition: [{}]. ", names.join(" ")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::status::Pressure;

    fn pod(name: &str, priority: i32, request: &str) -> Pod {
        serde_json::from_value(serde_json::json!({
            "metadata": {"name": name},
            "spec": {"priority": priority, "containers": [{"name": "c", "resources": {"requests": {"memory": request}}}]},
        }))
        .unwrap()
    }

    fn candidate(pod: &Pod, memory: i64) -> Candidate<'_> {
        let containers = vec![ContainerUse { name: "c".into(), memory: Some(memory), ..ContainerUse::default() }];
        Candidate { pod, containers, volumes: 0, processes: 1 }
    }

    #[test]
    fn greed_then_priority_then_amount() {
        let pods = [
            pod("modest", 0, "100Mi"),
            pod("important", 10, "1Mi"),
            pod("greedy", 0, "1Mi"),
            pod("greedier", 0, "1Mi"),
            pod("critical", CRITICAL, "1Mi"),
        ];
        let used = [50, 500, 20, 30, 900];
        let candidates = pods.iter().zip(used).map(|(pod, used)| candidate(pod, used << 20)).collect();
        let order: Vec<_> =
            order(Signal::Memory, candidates).iter().map(|c| c.pod.metadata.name.clone().unwrap()).collect();
        assert_eq!(order, ["greedier", "greedy", "important", "modest"]);
        let greedy = candidate(&pods[2], 20 << 20);
        assert_eq!(
            message(&greedy, Signal::Memory, 100 << 20, 64 << 20),
            "The node was low on resource: memory. Threshold quantity: 100Mi, available: 64Mi. \
             Container c was using 20Mi, request is 1Mi, has larger consumption of memory. "
        );
    }

    #[test]
    fn memory_pressure_keeps_only_modest_pods_out() {
        let best_effort: Pod =
            serde_json::from_value(serde_json::json!({"spec": {"containers": [{"name": "c"}]}})).unwrap();
        let memory = Pressure { memory: true, ..Pressure::default() };
        let disk = Pressure { disk: true, ..Pressure::default() };
        assert_eq!(keeps_out(&best_effort, memory).unwrap(), "The node had condition: [MemoryPressure]. ");
        assert_eq!(keeps_out(&pod("burstable", 0, "1Mi"), memory), None);
        assert!(keeps_out(&pod("burstable", 0, "1Mi"), disk).is_some());
        assert_eq!(keeps_out(&pod("critical", CRITICAL, "1Mi"), disk), None);
        assert_eq!(keeps_out(&best_effort, Pressure::default()), None);
    }
}
