//! InterPodAffinity: pods that want to be near, or away from, other pods. What exists is counted per (term, topology
//! value) once per cycle, and only on nodes that hold pods with terms; each node is then a few look-ups.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use crate::cache::{NodeInfo, Snapshot};
use crate::framework::{ClusterEvent, Filter, MAX_SCORE, Plugin, PreFilter, Rejection, Score};
use crate::pod_info::{AffinityTerm, PodInfo};

pub struct InterPodAffinity;

const NAME: &str = "InterPodAffinity";
const EXISTING_ANTI: &str = "node(s) didn't satisfy existing pods anti-affinity rules";
const AFFINITY: &str = "node(s) didn't match pod affinity rules";
const ANTI: &str = "node(s) didn't match pod anti-affinity rules";
/// What a required affinity of an existing pod counts as a preference for the new one.
const HARD_AFFINITY_WEIGHT: i64 = 1;

/// A topology domain: the key and its value.
type Domain = (String, String);

#[derive(Clone)]
struct Check {
    pod: Arc<PodInfo>,
    namespaces: Snapshot,
    /// Domains in which an existing pod refuses the new one.
    refused: HashMap<Domain, i64>,
    /// Per required affinity term of the new pod: matching pods per topology value.
    wanted: Vec<HashMap<String, i64>>,
    /// Per required anti-affinity term of the new pod: matching pods per topology value.
    unwanted: Vec<HashMap<String, i64>>,
}

struct Preferences {
    scores: HashMap<Domain, i64>,
    keys: HashSet<String>,
}

fn domain(term: &AffinityTerm, node: &NodeInfo) -> Option<Domain> {
    node.label(&term.topology_key).map(|value| (term.topology_key.clone(), value.to_owned()))
}

impl Plugin for InterPodAffinity {
    fn name(&self) -> &'static str {
        NAME
    }

    fn events(&self) -> &'static [ClusterEvent] {
        use ClusterEvent::{
            AssignedPodChanged, AssignedPodGone, NamespaceChanged, NodeAdded, NodeLabelsChanged, PodItself,
        };
        &[AssignedPodChanged, AssignedPodGone, NodeAdded, NodeLabelsChanged, NamespaceChanged, PodItself]
    }

    fn pre_filter(&self, pod: &Arc<PodInfo>, snapshot: &Snapshot) -> PreFilter {
        let affinity = &pod.affinity;
        if affinity.required.is_empty() && affinity.required_anti.is_empty() && snapshot.anti_affinity_nodes.is_empty()
        {
            return PreFilter::Skip;
        }
        let mut check = Check {
            pod: pod.clone(),
            namespaces: Snapshot { namespaces: snapshot.namespaces.clone(), ..Snapshot::default() },
            refused: HashMap::new(),
            wanted: vec![HashMap::new(); affinity.required.len()],
            unwanted: vec![HashMap::new(); affinity.required_anti.len()],
        };
        let own_terms = !affinity.required.is_empty() || !affinity.required_anti.is_empty();
        let nodes = if own_terms { &snapshot.nodes } else { &snapshot.anti_affinity_nodes };
        for node in nodes {
            for existing in &node.pods {
                check.count(existing, node, 1);
            }
        }
        PreFilter::Check(Box::new(check))
    }

    fn pre_score(&self, pod: &Arc<PodInfo>, snapshot: &Snapshot, _nodes: &[Arc<NodeInfo>]) -> Option<Box<dyn Score>> {
        let preferred = &pod.affinity.preferred;
        if preferred.is_empty() && snapshot.affinity_nodes.is_empty() {
            return None;
        }
        let labels_of = |namespace: &str| snapshot.namespace_labels(namespace);
        let nodes = if preferred.is_empty() { &snapshot.affinity_nodes } else { &snapshot.nodes };
        let mut scores: HashMap<Domain, i64> = HashMap::new();
        for node in nodes {
            for existing in &node.pods {
                let mut add = |term: &AffinityTerm, weight: i64, about: &PodInfo| {
                    if let Some(domain) = domain(term, node)
                        && term.matches(about, &labels_of)
                    {
                        *scores.entry(domain).or_default() += weight;
                    }
                };
                for preference in preferred {
                    add(&preference.term, preference.weight, existing);
                }
                // What existing pods wish for counts as well, seen from their side.
                for term in &existing.affinity.required {
                    add(term, HARD_AFFINITY_WEIGHT, pod);
                }
                for preference in &existing.affinity.preferred {
                    add(&preference.term, preference.weight, pod);
                }
            }
        }
        if scores.is_empty() {
            return None;
        }
        let keys = scores.keys().map(|(key, _)| key.clone()).collect();
        Some(Box::new(Preferences { scores, keys }))
    }

    fn weight(&self) -> i64 {
        2
    }
}

impl Check {
    /// Counts (or, with -1, uncounts) what an existing pod contributes.
    fn count(&mut self, existing: &PodInfo, node: &NodeInfo, by: i64) {
        let namespaces = self.namespaces.clone();
        let labels_of = |namespace: &str| namespaces.namespace_labels(namespace);
        for term in &existing.affinity.required_anti {
            if let Some(domain) = domain(term, node)
                && term.matches(&self.pod, &labels_of)
            {
                *self.refused.entry(domain).or_default() += by;
            }
        }
        let pod = self.pod.clone();
        let required = &pod.affinity.required;
        // A pod counts towards affinity only when it matches every term.
        if !required.is_empty() && required.iter().all(|term| term.matches(existing, &labels_of)) {
            for (term, counts) in required.iter().zip(&mut self.wanted) {
                if let Some(value) = node.label(&term.topology_key) {
                    *counts.entry(value.to_owned()).or_default() += by;
                }
            }
        }
        for (term, counts) in pod.affinity.required_anti.iter().zip(&mut self.unwanted) {
            if let Some(value) = node.label(&term.topology_key)
                && term.matches(existing, &labels_of)
            {
                *counts.entry(value.to_owned()).or_default() += by;
            }
        }
    }

    fn affinity_holds(&self, node: &NodeInfo) -> bool {
        let required = &self.pod.affinity.required;
        let values: Option<Vec<&str>> = required.iter().map(|term| node.label(&term.topology_key)).collect();
        let Some(values) = values else { return false };
        let near =
            values.iter().zip(&self.wanted).all(|(value, counts)| counts.get(*value).is_some_and(|count| *count > 0));
        if near {
            return true;
        }
        // The first pod of a group that wants to be near itself has nobody to be near to.
        let nobody = self.wanted.iter().all(|counts| counts.values().all(|count| *count <= 0));
        let labels_of = |namespace: &str| self.namespaces.namespace_labels(namespace);
        nobody && required.iter().all(|term| term.matches(&self.pod, &labels_of))
    }
}

impl Filter for Check {
    fn filter(&self, node: &NodeInfo) -> Result<(), Vec<Rejection>> {
        if !self.affinity_holds(node) {
            return Err(vec![Rejection::unresolvable(NAME, AFFINITY)]);
        }
        let near_unwanted = self.pod.affinity.required_anti.iter().zip(&self.unwanted).any(|(term, counts)| {
            node.label(&term.topology_key).and_then(|value| counts.get(value)).is_some_and(|count| *count > 0)
        });
        if near_unwanted {
            return Err(vec![Rejection::resolvable(NAME, ANTI)]);
        }
        let refused = self.refused.iter().any(|((key, value), count)| *count > 0 && node.label(key) == Some(value));
        if refused { Err(vec![Rejection::resolvable(NAME, EXISTING_ANTI)]) } else { Ok(()) }
    }

    fn remove_pod(&mut self, pod: &PodInfo, node: &NodeInfo) {
        self.count(pod, node, -1);
    }

    fn add_pod(&mut self, pod: &PodInfo, node: &NodeInfo) {
        self.count(pod, node, 1);
    }

    fn clone_box(&self) -> Box<dyn Filter> {
        Box::new(self.clone())
    }
}

impl Score for Preferences {
    fn score(&self, node: &NodeInfo) -> i64 {
        self.keys.iter().filter_map(|key| self.scores.get(&(key.clone(), node.label(key)?.to_owned()))).sum()
    }

    fn normalize(&self, scores: &mut [i64], _nodes: &[Arc<NodeInfo>]) {
        let (max, min) = (scores.iter().copied().max().unwrap_or(0), scores.iter().copied().min().unwrap_or(0));
        for score in scores {
            *score = if max == min { 0 } else { MAX_SCORE * (*score - min) / (max - min) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{node, pod, snapshot};

    fn check(new: &Arc<PodInfo>, cluster: &Snapshot) -> Vec<Option<String>> {
        let PreFilter::Check(filter) = InterPodAffinity.pre_filter(new, cluster) else { return vec![] };
        cluster.nodes.iter().map(|n| filter.filter(n).err().map(|r| r[0].reason.clone())).collect()
    }

    #[test]
    fn anti_affinity_works_both_ways() {
        let mut one = node("a", 1000).label("host", "a").info();
        one.add_pod(pod("old").label("app", "a").anti_affinity("host", "app", "a").info());
        let cluster = snapshot(vec![one, node("b", 1000).label("host", "b").info()]);
        let new = pod("new").label("app", "a").anti_affinity("host", "app", "a").info();
        assert_eq!(check(&new, &cluster), [Some(ANTI.to_owned()), None]);
        let plain = pod("plain").label("app", "a").info();
        assert_eq!(check(&plain, &cluster), [Some(EXISTING_ANTI.to_owned()), None]);
        let other = pod("other").label("app", "b").info();
        assert_eq!(check(&other, &cluster), [None, None]);
    }

    #[test]
    fn the_first_of_a_group_may_go_anywhere() {
        let cluster = snapshot(vec![node("a", 1000).label("host", "a").info(), node("b", 1000).info()]);
        let first = pod("first").label("app", "a").affinity("host", "app", "a").info();
        assert_eq!(check(&first, &cluster), [None, Some(AFFINITY.to_owned())]);
        let stranger = pod("stranger").label("app", "b").affinity("host", "app", "a").info();
        assert_eq!(check(&stranger, &cluster)[0], Some(AFFINITY.to_owned()));
    }
}
