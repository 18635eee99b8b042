//! NodeAffinity: `nodeSelector` and required node affinity decide, preferred node affinity adds to a node's score.

use std::sync::Arc;

use crate::cache::{NodeInfo, Snapshot};
use crate::framework::{ClusterEvent, Filter, Plugin, PreFilter, Rejection, Score, scale};
use crate::pod_info::PodInfo;
use crate::selectors::{NodeRequirement, NodeTerm};

pub struct NodeAffinity;

const NAME: &str = "NodeAffinity";

#[derive(Clone)]
struct Required(NodeRequirement);

struct Preferred(Vec<(i64, NodeTerm)>);

/// What nodes the pod's own spec accepts.
pub fn requirement(pod: &PodInfo) -> NodeRequirement {
    let spec = pod.pod.spec.as_ref();
    let affinity = spec.and_then(|s| s.affinity.as_ref()).and_then(|a| a.node_affinity.as_ref());
    NodeRequirement::compile(
        spec.and_then(|s| s.node_selector.as_ref()),
        affinity.and_then(|a| a.required_during_scheduling_ignored_during_execution.as_ref()),
    )
}

impl Plugin for NodeAffinity {
    fn name(&self) -> &'static str {
        NAME
    }

    fn events(&self) -> &'static [ClusterEvent] {
        &[ClusterEvent::NodeAdded, ClusterEvent::NodeLabelsChanged, ClusterEvent::PodItself]
    }

    fn pre_filter(&self, pod: &Arc<PodInfo>, _snapshot: &Snapshot) -> PreFilter {
        let required = requirement(pod);
        if required.is_empty() { PreFilter::Skip } else { PreFilter::Check(Box::new(Required(required))) }
    }

    fn pre_score(&self, pod: &Arc<PodInfo>, _snapshot: &Snapshot, _nodes: &[Arc<NodeInfo>]) -> Option<Box<dyn Score>> {
        let affinity = pod.pod.spec.as_ref()?.affinity.as_ref()?.node_affinity.as_ref()?;
        let preferred = affinity.preferred_during_scheduling_ignored_during_execution.as_ref()?;
        let terms = preferred.iter().map(|p| (i64::from(p.weight), NodeTerm::compile(&p.preference))).collect();
        Some(Box::new(Preferred(terms)))
    }

    fn weight(&self) -> i64 {
        2
    }
}

impl Filter for Required {
    fn filter(&self, node: &NodeInfo) -> Result<(), Vec<Rejection>> {
        if self.0.matches(node.node()) {
            Ok(())
        } else {
            Err(vec![Rejection::unresolvable(NAME, "node(s) didn't match Pod's node affinity/selector")])
        }
    }

    fn clone_box(&self) -> Box<dyn Filter> {
        Box::new(self.clone())
    }
}

impl Score for Preferred {
    fn score(&self, node: &NodeInfo) -> i64 {
        self.0.iter().filter(|(_, term)| term.matches(node.node())).map(|(weight, _)| weight).sum()
    }

    fn normalize(&self, scores: &mut [i64], _nodes: &[Arc<NodeInfo>]) {
        scale(scores, false);
    }
}
