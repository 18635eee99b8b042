//! NodeResourcesFit: what a pod requests must be free on the node; of those that fit, emptier nodes are better
//! (LeastAllocated). NodeResourcesBalancedAllocation: nodes whose CPU and memory would be used in equal shares are better.

use std::sync::Arc;

use crate::cache::{NodeInfo, Snapshot};
use crate::framework::{ClusterEvent, Filter, MAX_SCORE, Plugin, PreFilter, Rejection, Score};
use crate::pod_info::PodInfo;

pub struct NodeResourcesFit;
pub struct NodeResourcesBalancedAllocation;

const NAME: &str = "NodeResourcesFit";

#[derive(Clone)]
struct Fit(Arc<PodInfo>);

struct LeastAllocated(Arc<PodInfo>);
struct Balanced(Arc<PodInfo>);

impl Plugin for NodeResourcesFit {
    fn name(&self) -> &'static str {
        NAME
    }

    fn events(&self) -> &'static [ClusterEvent] {
        use ClusterEvent::{AssignedPodGone, NodeAdded, NodeAllocatableChanged, PodItself};
        &[NodeAdded, NodeAllocatableChanged, AssignedPodGone, PodItself]
    }

    fn pre_filter(&self, pod: &Arc<PodInfo>, _snapshot: &Snapshot) -> PreFilter {
        PreFilter::Check(Box::new(Fit(pod.clone())))
    }

    fn pre_score(&self, pod: &Arc<PodInfo>, _snapshot: &Snapshot, _nodes: &[Arc<NodeInfo>]) -> Option<Box<dyn Score>> {
        Some(Box::new(LeastAllocated(pod.clone())))
    }
}

impl Plugin for NodeResourcesBalancedAllocation {
    fn name(&self) -> &'static str {
        "NodeResourcesBalancedAllocation"
    }

    fn events(&self) -> &'static [ClusterEvent] {
        &[]
    }

    fn pre_score(&self, pod: &Arc<PodInfo>, _snapshot: &Snapshot, _nodes: &[Arc<NodeInfo>]) -> Option<Box<dyn Score>> {
        Some(Box::new(Balanced(pod.clone())))
    }
}

impl Filter for Fit {
    fn filter(&self, node: &NodeInfo) -> Result<(), Vec<Rejection>> {
        let mut rejections = Vec::new();
        if i64::try_from(node.pods.len()).unwrap_or(i64::MAX) + 1 > node.max_pods {
            rejections.push(Rejection::resolvable(NAME, "Too many pods"));
        }
        let (want, have, used) = (&self.0.requests, &node.allocatable, &node.requested);
        let mut check = |name: &str, want: i64, have: i64, used: i64| {
            if want > 0 && want > have - used {
                let reason = format!("Insufficient {name}");
                // More than the whole node has: no victim could make room for it.
                rejections.push(Rejection { plugin: NAME, reason, resolvable: want <= have });
            }
        };
        check("cpu", want.milli_cpu, have.milli_cpu, used.milli_cpu);
        check("memory", want.memory, have.memory, used.memory);
        check("ephemeral-storage", want.ephemeral_storage, have.ephemeral_storage, used.ephemeral_storage);
        for (name, amount) in &want.other {
            let of = |list: &std::collections::BTreeMap<String, i64>| list.get(name).copied().unwrap_or(0);
            check(name, *amount, of(&have.other), of(&used.other));
        }
        if rejections.is_empty() { Ok(()) } else { Err(rejections) }
    }

    fn clone_box(&self) -> Box<dyn Filter> {
        Box::new(self.clone())
    }
}

impl Score for LeastAllocated {
    fn score(&self, node: &NodeInfo) -> i64 {
        let share = |have: i64, used: i64| if have == 0 || used > have { 0 } else { (have - used) * MAX_SCORE / have };
        let (want, used) = (&self.0.scoring_requests, &node.scoring_requested);
        let cpu = share(node.allocatable.milli_cpu, used.milli_cpu + want.milli_cpu);
        let memory = share(node.allocatable.memory, used.memory + want.memory);
        i64::midpoint(cpu, memory)
    }
}

impl Score for Balanced {
    /// 100 × (1 − standard deviation of the used fractions), as upstream; of two fractions it is half their distance.
    fn score(&self, node: &NodeInfo) -> i64 {
        #[allow(clippy::cast_precision_loss, reason = "fractions of bytes and millicores need no more than 52 bits")]
        let fraction = |have: i64, used: i64| if have == 0 { 1.0 } else { (used as f64 / have as f64).min(1.0) };
        let (want, used) = (&self.0.requests, &node.requested);
        let cpu = fraction(node.allocatable.milli_cpu, used.milli_cpu + want.milli_cpu);
        let memory = fraction(node.allocatable.memory, used.memory + want.memory);
        #[allow(clippy::cast_possible_truncation, reason = "between 0 and 100")]
        let score = ((1.0 - (cpu - memory).abs() / 2.0) * 100.0) as i64;
        score
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{node, pod};

    #[test]
    fn names_everything_that_is_missing() {
        let info = node("a", 1000).memory(100).info();
        let filter = Fit(pod("p").cpu(2000).memory(50).request("example.com/gpu", 1).info());
        let rejections = filter.filter(&info).unwrap_err();
        let reasons: Vec<(&str, bool)> = rejections.iter().map(|r| (r.reason.as_str(), r.resolvable)).collect();
        assert_eq!(reasons, [("Insufficient cpu", false), ("Insufficient example.com/gpu", false)]);
    }

    #[test]
    fn a_full_node_could_be_emptied() {
        let mut info = node("a", 1000).info();
        info.add_pod(pod("q").cpu(800).info());
        let rejections = Fit(pod("p").cpu(500).info()).filter(&info).unwrap_err();
        assert!(rejections[0].resolvable);
        assert!(Fit(pod("p").cpu(200).info()).filter(&info).is_ok());
    }

    #[test]
    fn emptier_and_more_balanced_nodes_are_better() {
        let mut used = node("a", 1000).memory(1 << 30).info();
        used.add_pod(pod("q").cpu(800).info());
        let free = node("b", 1000).memory(1 << 30).info();
        let new = pod("p").cpu(100).memory(100 << 20).info();
        assert!(LeastAllocated(new.clone()).score(&free) > LeastAllocated(new.clone()).score(&used));
        assert!(Balanced(new.clone()).score(&free) > Balanced(new).score(&used));
    }
}
