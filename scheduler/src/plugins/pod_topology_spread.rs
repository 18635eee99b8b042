//! PodTopologySpread: keeps the numbers of matching pods in the topology domains (zones, nodes) within `maxSkew` of each
//! other. Pods per domain are counted once per cycle; each node is then a look-up.

use std::collections::HashMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::TopologySpreadConstraint;

use super::node_affinity;
use super::taint_toleration::tolerates;
use crate::cache::{NodeInfo, Snapshot};
use crate::framework::{ClusterEvent, Filter, MAX_SCORE, Plugin, PreFilter, Rejection, Score};
use crate::pod_info::PodInfo;
use crate::selectors::{NodeRequirement, Selector};

pub struct PodTopologySpread;

const NAME: &str = "PodTopologySpread";
const MISMATCH: &str = "node(s) didn't match pod topology spread constraints";
const MISSING_LABEL: &str = "node(s) didn't match pod topology spread constraints (missing required label)";
const HOSTNAME: &str = "kubernetes.io/hostname";

#[derive(Clone)]
struct Constraint {
    topology_key: String,
    max_skew: i64,
    min_domains: i64,
    selector: Selector,
    respect_affinity: bool,
    respect_taints: bool,
    /// Whether the pod counts in the domain that it goes to.
    matches_itself: bool,
    /// Matching pods per value of the topology key, for the domains that count.
    counts: HashMap<String, i64>,
}

#[derive(Clone)]
struct Spread {
    pod: Arc<PodInfo>,
    constraints: Vec<Constraint>,
}

impl Constraint {
    fn compile(constraint: &TopologySpreadConstraint, pod: &PodInfo) -> Self {
        let mut selector = Selector::compile(constraint.label_selector.as_ref());
        for key in constraint.match_label_keys.iter().flatten() {
            if let Some(value) = pod.labels.get(key) {
                selector.require(key, value, true);
            }
        }
        Self {
            topology_key: constraint.topology_key.clone(),
            max_skew: i64::from(constraint.max_skew),
            min_domains: i64::from(constraint.min_domains.unwrap_or(1)),
            matches_itself: selector.matches(&pod.labels),
            selector,
            respect_affinity: constraint.node_affinity_policy.as_deref() != Some("Ignore"),
            respect_taints: constraint.node_taints_policy.as_deref() == Some("Honor"),
            counts: HashMap::new(),
        }
    }

    fn counts_node(&self, pod: &PodInfo, required: &NodeRequirement, node: &NodeInfo) -> bool {
        (!self.respect_affinity || required.matches(node.node())) && (!self.respect_taints || tolerated(pod, node))
    }

    fn count(&self, namespace: &str, node: &NodeInfo) -> i64 {
        let matching = |pod: &&Arc<PodInfo>| {
            !pod.is_terminating() && pod.key.namespace == namespace && self.selector.matches(&pod.labels)
        };
        i64::try_from(node.pods.iter().filter(matching).count()).unwrap_or(i64::MAX)
    }

    /// The smallest count of all domains; zero while there are fewer than `minDomains`.
    fn minimum(&self) -> i64 {
        let domains = i64::try_from(self.counts.len()).unwrap_or(i64::MAX);
        if domains < self.min_domains { 0 } else { self.counts.values().copied().min().unwrap_or(0) }
    }
}

fn tolerated(pod: &PodInfo, node: &NodeInfo) -> bool {
    node.node().spec.iter().flat_map(|s| s.taints.iter().flatten()).filter(|t| t.effect != "PreferNoSchedule").all(
        |taint| {
            let value = taint.value.as_deref().unwrap_or("");
            pod.tolerations().iter().any(|t| tolerates(t, &taint.key, value, &taint.effect))
        },
    )
}

/// The pod's constraints with the counts of the snapshot.
fn constraints(pod: &PodInfo, snapshot: &Snapshot, when: &str) -> Vec<Constraint> {
    let all = pod.pod.spec.as_ref().and_then(|s| s.topology_spread_constraints.as_deref()).unwrap_or_default();
    let mut compiled: Vec<Constraint> =
        all.iter().filter(|c| c.when_unsatisfiable == when).map(|c| Constraint::compile(c, pod)).collect();
    if compiled.is_empty() {
        return compiled;
    }
    let required = node_affinity::requirement(pod);
    let keys: Vec<String> = compiled.iter().map(|c| c.topology_key.clone()).collect();
    for node in &snapshot.nodes {
        // A node counts for none of the constraints unless it has the keys of all.
        if !keys.iter().all(|key| node.label(key).is_some()) {
            continue;
        }
        for constraint in &mut compiled {
            if let Some(value) = node.label(&constraint.topology_key)
                && constraint.counts_node(pod, &required, node)
            {
                let count = constraint.count(&pod.key.namespace, node);
                *constraint.counts.entry(value.to_owned()).or_default() += count;
            }
        }
    }
    compiled
}

impl Plugin for PodTopologySpread {
    fn name(&self) -> &'static str {
        NAME
    }

    fn events(&self) -> &'static [ClusterEvent] {
        use ClusterEvent::{
            AssignedPodChanged, AssignedPodGone, NodeAdded, NodeLabelsChanged, NodeTaintsChanged, PodItself,
        };
        &[AssignedPodChanged, AssignedPodGone, NodeAdded, NodeLabelsChanged, NodeTaintsChanged, PodItself]
    }

    fn pre_filter(&self, pod: &Arc<PodInfo>, snapshot: &Snapshot) -> PreFilter {
        let constraints = constraints(pod, snapshot, "DoNotSchedule");
        if constraints.is_empty() {
            return PreFilter::Skip;
        }
        PreFilter::Check(Box::new(Spread { pod: pod.clone(), constraints }))
    }

    fn pre_score(&self, pod: &Arc<PodInfo>, snapshot: &Snapshot, _nodes: &[Arc<NodeInfo>]) -> Option<Box<dyn Score>> {
        let constraints = constraints(pod, snapshot, "ScheduleAnyway");
        (!constraints.is_empty()).then(|| Box::new(Spread { pod: pod.clone(), constraints }) as Box<dyn Score>)
    }

    fn weight(&self) -> i64 {
        2
    }
}

impl Filter for Spread {
    fn filter(&self, node: &NodeInfo) -> Result<(), Vec<Rejection>> {
        for constraint in &self.constraints {
            let Some(value) = node.label(&constraint.topology_key) else {
                return Err(vec![Rejection::unresolvable(NAME, MISSING_LABEL)]);
            };
            let here = constraint.counts.get(value).copied().unwrap_or(0) + i64::from(constraint.matches_itself);
            if here - constraint.minimum() > constraint.max_skew {
                return Err(vec![Rejection::resolvable(NAME, MISMATCH)]);
            }
        }
        Ok(())
    }

    fn remove_pod(&mut self, pod: &PodInfo, node: &NodeInfo) {
        self.adjust(pod, node, -1);
    }

    fn add_pod(&mut self, pod: &PodInfo, node: &NodeInfo) {
        self.adjust(pod, node, 1);
    }

    fn clone_box(&self) -> Box<dyn Filter> {
        Box::new(self.clone())
    }
}

impl Spread {
    fn adjust(&mut self, pod: &PodInfo, node: &NodeInfo, by: i64) {
        if pod.key.namespace != self.pod.key.namespace {
            return;
        }
        for constraint in &mut self.constraints {
            if !constraint.selector.matches(&pod.labels) {
                continue;
            }
            if let Some(count) = node.label(&constraint.topology_key).and_then(|v| constraint.counts.get_mut(v)) {
                *count += by;
            }
        }
    }
}

impl Score for Spread {
    /// The number of matching pods in the node's domains, each weighted so that few large domains do not drown many
    /// small ones.
    fn score(&self, node: &NodeInfo) -> i64 {
        let mut score = 0.0;
        for constraint in &self.constraints {
            let Some(value) = node.label(&constraint.topology_key) else { continue };
            let count = if constraint.topology_key == HOSTNAME {
                constraint.count(&self.pod.key.namespace, node)
            } else {
                constraint.counts.get(value).copied().unwrap_or(0)
            };
            #[allow(clippy::cast_precision_loss, reason = "numbers of pods and domains are small")]
            let weighted =
                count as f64 * (constraint.counts.len() as f64 + 2.0).ln() + (constraint.max_skew - 1) as f64;
            score += weighted;
        }
        #[allow(clippy::cast_possible_truncation, reason = "a rounded small number")]
        let rounded = score.round() as i64;
        rounded
    }

    fn normalize(&self, scores: &mut [i64], nodes: &[Arc<NodeInfo>]) {
        let complete = |node: &NodeInfo| self.constraints.iter().all(|c| node.label(&c.topology_key).is_some());
        let usable = || scores.iter().zip(nodes).filter(|(_, node)| complete(node)).map(|(score, _)| *score);
        let (max, min) = (usable().max().unwrap_or(0), usable().min().unwrap_or(0));
        for (score, node) in scores.iter_mut().zip(nodes) {
            *score = match (complete(node), max) {
                (false, _) => 0,
                (true, 0) => MAX_SCORE,
                (true, _) => MAX_SCORE * (max + min - *score) / max,
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{node, pod, snapshot};

    #[test]
    fn skew_is_kept() {
        let spread = pod("new").label("app", "a").spread("zone", 1, "DoNotSchedule", "app", "a").info();
        let mut one = node("a", 1000).label("zone", "1").info();
        one.add_pod(pod("p").label("app", "a").info());
        let cluster = snapshot(vec![one, node("b", 1000).label("zone", "2").info(), node("c", 1000).info()]);
        let PreFilter::Check(filter) = PodTopologySpread.pre_filter(&spread, &cluster) else {
            panic!("constraint ignored")
        };
        assert_eq!(filter.filter(&cluster.nodes[0]).unwrap_err()[0].reason, MISMATCH);
        assert!(filter.filter(&cluster.nodes[1]).is_ok());
        assert_eq!(filter.filter(&cluster.nodes[2]).unwrap_err()[0].reason, MISSING_LABEL);
    }

    #[test]
    fn emptier_domains_score_higher() {
        let spread = pod("new").label("app", "a").spread("zone", 1, "ScheduleAnyway", "app", "a").info();
        let mut one = node("a", 1000).label("zone", "1").info();
        one.add_pod(pod("p").label("app", "a").info());
        let cluster = snapshot(vec![one, node("b", 1000).label("zone", "2").info()]);
        let score = PodTopologySpread.pre_score(&spread, &cluster, &cluster.nodes).unwrap();
        let mut scores: Vec<i64> = cluster.nodes.iter().map(|n| score.score(n)).collect();
        score.normalize(&mut scores, &cluster.nodes);
        assert!(scores[1] > scores[0], "{scores:?}");
    }
}
