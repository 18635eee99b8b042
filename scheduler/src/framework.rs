//! What a plugin is. The names of plugins and extension points are upstream's
//! (<https://kubernetes.io/docs/concepts/scheduling-eviction/scheduling-framework/>).
//!
//! Call order for a pod: [`Plugin::pre_enqueue`] before it may enter the active queue; [`Plugin::pre_filter`] once per
//! cycle, where everything that does not depend on a node is worked out; [`Filter::filter`] for each node;
//! [`Plugin::pre_score`] once with the nodes that are left; [`Score::score`] for each; [`Score::normalize`] once.
//! During preemption a clone of a filter is told of pods that come and go ([`Filter::add_pod`], [`Filter::remove_pod`]).
//! Plugins never write: not to the API server, not to the snapshot.

use std::sync::Arc;

use crate::cache::{NodeInfo, Snapshot};
use crate::pod_info::PodInfo;

/// The best score of a node.
pub const MAX_SCORE: i64 = 100;

/// Why a node (or, from pre-filter, every node) cannot take a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejection {
    pub plugin: &'static str,
    /// As users read it, `node(s) …`.
    pub reason: String,
    /// Whether ending other pods on the node could help.
    pub resolvable: bool,
}

impl Rejection {
    pub fn resolvable(plugin: &'static str, reason: impl Into<String>) -> Self {
        Self { plugin, reason: reason.into(), resolvable: true }
    }

    pub fn unresolvable(plugin: &'static str, reason: impl Into<String>) -> Self {
        Self { plugin, reason: reason.into(), resolvable: false }
    }
}

/// What happened in the cluster that could make a rejected pod fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ClusterEvent {
    NodeAdded,
    NodeAllocatableChanged,
    NodeLabelsChanged,
    NodeTaintsChanged,
    /// A pod on a node appeared or its labels changed.
    AssignedPodChanged,
    /// A pod on a node went away or finished.
    AssignedPodGone,
    /// The pending pod itself changed.
    PodItself,
    NamespaceChanged,
    VolumesChanged,
    /// Some time went by: pods that wait too long are tried again whatever rejected them.
    Timeout,
}

/// What a plugin has to say about a pod before nodes are looked at.
pub enum PreFilter {
    /// Nothing: the plugin's filter is not called.
    Skip,
    Check(Box<dyn Filter>),
    /// No node will do.
    Reject(Vec<Rejection>),
}

/// A plugin's check for one pod, with all that it needs to look at a node quickly.
pub trait Filter: Send + Sync {
    fn filter(&self, node: &NodeInfo) -> Result<(), Vec<Rejection>>;

    /// Takes back what a pod on the node contributes; only filters that look beyond one node have something to do.
    fn remove_pod(&mut self, _pod: &PodInfo, _node: &NodeInfo) {}

    /// The opposite of `remove_pod`.
    fn add_pod(&mut self, _pod: &PodInfo, _node: &NodeInfo) {}

    fn clone_box(&self) -> Box<dyn Filter>;
}

/// A plugin's opinion on the nodes that are left.
pub trait Score: Send + Sync {
    fn score(&self, node: &NodeInfo) -> i64;

    /// Brings the scores into 0 ..= [`MAX_SCORE`]. `nodes` are in the order of `scores`.
    fn normalize(&self, _scores: &mut [i64], _nodes: &[Arc<NodeInfo>]) {}
}

pub trait Plugin: Send + Sync {
    fn name(&self) -> &'static str;

    /// What could make a pod fit that this plugin rejected.
    fn events(&self) -> &'static [ClusterEvent];

    /// Whether the pod may be tried at all; the error says what it waits for.
    fn pre_enqueue(&self, _pod: &PodInfo) -> Result<(), String> {
        Ok(())
    }

    fn pre_filter(&self, _pod: &Arc<PodInfo>, _snapshot: &Snapshot) -> PreFilter {
        PreFilter::Skip
    }

    fn pre_score(&self, _pod: &Arc<PodInfo>, _snapshot: &Snapshot, _nodes: &[Arc<NodeInfo>]) -> Option<Box<dyn Score>> {
        None
    }

    /// How much the plugin's score counts.
    fn weight(&self) -> i64 {
        1
    }
}

/// Scales scores so that the largest becomes [`MAX_SCORE`]; `reverse` makes small scores the good ones.
pub fn scale(scores: &mut [i64], reverse: bool) {
    let max = scores.iter().copied().max().unwrap_or(0);
    for score in scores {
        let scaled = if max == 0 { 0 } else { *score * MAX_SCORE / max };
        *score = if reverse { MAX_SCORE - scaled } else { scaled };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scaling() {
        let mut scores = [0, 5, 10];
        scale(&mut scores, false);
        assert_eq!(scores, [0, 50, 100]);
        scale(&mut scores, true);
        assert_eq!(scores, [100, 50, 0]);
        let mut none = [0, 0];
        scale(&mut none, true);
        assert_eq!(none, [100, 100]);
    }
}
