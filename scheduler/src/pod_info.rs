//! A pod with everything that plugins ask about it, worked out once when the pod arrives.

use std::collections::BTreeSet;
use std::sync::Arc;

use apimachinery::controller::ObjectKey;
use k8s_openapi::api::core::v1::{Pod, PodAffinityTerm, PodSpec, Toleration, WeightedPodAffinityTerm};

use crate::resources::{Resources, pod_requests};
use crate::selectors::{Labels, Selector};

/// A port that a pod occupies on its node.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct HostPort {
    pub port: i32,
    pub protocol: String,
    /// `0.0.0.0` stands for every address.
    pub ip: String,
}

impl HostPort {
    pub fn conflicts_with(&self, other: &Self) -> bool {
        const ANY: [&str; 2] = ["0.0.0.0", "::"];
        let any = |ip: &str| ANY.contains(&ip);
        self.port == other.port
            && self.protocol == other.protocol
            && (self.ip == other.ip || any(&self.ip) || any(&other.ip))
    }
}

/// A pod-affinity term: which pods it is about, and over which topology.
#[derive(Clone, Debug)]
pub struct AffinityTerm {
    pub topology_key: String,
    selector: Selector,
    namespaces: BTreeSet<String>,
    namespace_selector: Selector,
}

impl AffinityTerm {
    fn compile(term: &PodAffinityTerm, pod: &Pod) -> Self {
        let own = pod.metadata.namespace.clone().unwrap_or_default();
        let mut namespaces: BTreeSet<String> = term.namespaces.iter().flatten().cloned().collect();
        if namespaces.is_empty() && term.namespace_selector.is_none() {
            namespaces.insert(own);
        }
        let mut selector = Selector::compile(term.label_selector.as_ref());
        let labels = pod.metadata.labels.as_ref();
        for (keys, positive) in [(&term.match_label_keys, true), (&term.mismatch_label_keys, false)] {
            for key in keys.iter().flatten() {
                if let Some(value) = labels.and_then(|labels| labels.get(key)) {
                    selector.require(key, value, positive);
                }
            }
        }
        Self {
            topology_key: term.topology_key.clone(),
            selector,
            namespaces,
            namespace_selector: Selector::compile(term.namespace_selector.as_ref()),
        }
    }

    /// Whether the term is about this pod. `labels_of` answers a namespace's labels.
    pub fn matches(&self, pod: &PodInfo, labels_of: &dyn Fn(&str) -> Option<Labels>) -> bool {
        let in_namespace = self.namespaces.contains(&pod.key.namespace)
            || (self.namespace_selector != Selector::Nothing
                && labels_of(&pod.key.namespace).is_some_and(|labels| self.namespace_selector.matches(&labels)));
        in_namespace && self.selector.matches(&pod.labels)
    }
}

/// A preference: the term counts `weight` (negative for anti-affinity).
#[derive(Clone, Debug)]
pub struct WeightedTerm {
    pub weight: i64,
    pub term: AffinityTerm,
}

#[derive(Clone, Debug, Default)]
pub struct PodAffinity {
    pub required: Vec<AffinityTerm>,
    pub required_anti: Vec<AffinityTerm>,
    /// Preferred affinity and anti-affinity, the latter with negative weights.
    pub preferred: Vec<WeightedTerm>,
}

/// A pod as the scheduler sees it.
#[derive(Debug)]
pub struct PodInfo {
    pub pod: Arc<Pod>,
    pub key: ObjectKey,
    pub uid: String,
    pub labels: Labels,
    pub priority: i32,
    pub requests: Resources,
    /// Requests with defaults where the pod asks for nothing; only for comparing nodes.
    pub scoring_requests: Resources,
    pub host_ports: Vec<HostPort>,
    pub affinity: PodAffinity,
}

impl PodInfo {
    pub fn new(pod: Arc<Pod>) -> Self {
        let spec = pod.spec.as_ref();
        Self {
            key: ObjectKey::of(&pod.metadata),
            uid: pod.metadata.uid.clone().unwrap_or_default(),
            labels: pod.metadata.labels.clone().unwrap_or_default(),
            priority: spec.and_then(|s| s.priority).unwrap_or(0),
            requests: pod_requests(&pod, false),
            scoring_requests: pod_requests(&pod, true),
            host_ports: spec.map(host_ports).unwrap_or_default(),
            affinity: affinity(&pod),
            pod,
        }
    }

    pub fn tolerations(&self) -> &[Toleration] {
        self.pod.spec.as_ref().and_then(|s| s.tolerations.as_deref()).unwrap_or_default()
    }

    /// The name of the node that the pod is bound to.
    pub fn node_name(&self) -> Option<&str> {
        bound_node(&self.pod)
    }

    pub fn scheduler_name(&self) -> &str {
        self.pod.spec.as_ref().and_then(|s| s.scheduler_name.as_deref()).unwrap_or("default-scheduler")
    }

    /// The node where pods of lower priority were ended in favour of this one.
    pub fn nominated_node(&self) -> Option<&str> {
        self.pod.status.as_ref()?.nominated_node_name.as_deref().filter(|name| !name.is_empty())
    }

    pub fn is_terminating(&self) -> bool {
        self.pod.metadata.deletion_timestamp.is_some()
    }
}

/// The node in a pod's spec, if there is one.
pub fn bound_node(pod: &Pod) -> Option<&str> {
    pod.spec.as_ref()?.node_name.as_deref().filter(|name| !name.is_empty())
}

/// Whether the pod has run to its end and holds nothing any more.
pub fn is_finished(pod: &Pod) -> bool {
    matches!(pod.status.as_ref().and_then(|s| s.phase.as_deref()), Some("Succeeded" | "Failed"))
}

fn host_ports(spec: &PodSpec) -> Vec<HostPort> {
    let sidecars = spec.init_containers.iter().flatten().filter(|c| c.restart_policy.as_deref() == Some("Always"));
    spec.containers
        .iter()
        .chain(sidecars)
        .flat_map(|container| container.ports.iter().flatten())
        .filter_map(|port| {
            let number = port.host_port.filter(|number| *number > 0)?;
            let ip = port.host_ip.clone().filter(|ip| !ip.is_empty()).unwrap_or_else(|| "0.0.0.0".to_owned());
            let protocol = port.protocol.clone().unwrap_or_else(|| "TCP".to_owned());
            Some(HostPort { port: number, protocol, ip })
        })
        .collect()
}

fn affinity(pod: &Pod) -> PodAffinity {
    let Some(affinity) = pod.spec.as_ref().and_then(|s| s.affinity.as_ref()) else { return PodAffinity::default() };
    let compile = |terms: Option<&Vec<PodAffinityTerm>>| -> Vec<AffinityTerm> {
        terms.into_iter().flatten().map(|term| AffinityTerm::compile(term, pod)).collect()
    };
    let weighted = |terms: Option<&Vec<WeightedPodAffinityTerm>>, sign: i64| -> Vec<WeightedTerm> {
        terms
            .into_iter()
            .flatten()
            .map(|t| WeightedTerm {
                weight: sign * i64::from(t.weight),
                term: AffinityTerm::compile(&t.pod_affinity_term, pod),
            })
            .collect()
    };
    let toward = affinity.pod_affinity.as_ref();
    let away = affinity.pod_anti_affinity.as_ref();
    let mut preferred =
        weighted(toward.and_then(|a| a.preferred_during_scheduling_ignored_during_execution.as_ref()), 1);
    preferred.extend(weighted(away.and_then(|a| a.preferred_during_scheduling_ignored_during_execution.as_ref()), -1));
    PodAffinity {
        required: compile(toward.and_then(|a| a.required_during_scheduling_ignored_during_execution.as_ref())),
        required_anti: compile(away.and_then(|a| a.required_during_scheduling_ignored_during_execution.as_ref())),
        preferred,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_conflict_on_the_same_address_only() {
        let port = |port, protocol: &str, ip: &str| HostPort { port, protocol: protocol.into(), ip: ip.into() };
        for (a, b, conflict) in [
            (port(80, "TCP", "0.0.0.0"), port(80, "TCP", "10.0.0.1"), true),
            (port(80, "TCP", "10.0.0.2"), port(80, "TCP", "10.0.0.1"), false),
            (port(80, "UDP", "10.0.0.1"), port(80, "TCP", "10.0.0.1"), false),
            (port(81, "TCP", "10.0.0.1"), port(80, "TCP", "10.0.0.1"), false),
        ] {
            assert_eq!(a.conflicts_with(&b), conflict, "{a:?} {b:?}");
        }
    }
}
