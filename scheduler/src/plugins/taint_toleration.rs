//! TaintToleration: nodes with taints that a pod does not tolerate are out; among the others, those with fewer
//! untolerated `PreferNoSchedule` taints are better.

use std::sync::Arc;

use k8s_openapi::api::core::v1::{Taint, Toleration};

use crate::cache::{NodeInfo, Snapshot};
use crate::framework::{ClusterEvent, Filter, Plugin, PreFilter, Rejection, Score, scale};
use crate::pod_info::PodInfo;

pub struct TaintToleration;

const NAME: &str = "TaintToleration";

#[derive(Clone)]
struct Tolerations(Arc<PodInfo>);

/// Whether a toleration covers a taint. An empty key with `Exists` covers every key, an empty effect every effect.
pub fn tolerates(toleration: &Toleration, key: &str, value: &str, effect: &str) -> bool {
    let wanted_effect = toleration.effect.as_deref().unwrap_or("");
    let wanted_key = toleration.key.as_deref().unwrap_or("");
    let wanted_value = toleration.value.as_deref().unwrap_or("");
    if !(wanted_effect.is_empty() || wanted_effect == effect) || !(wanted_key.is_empty() || wanted_key == key) {
        return false;
    }
    match toleration.operator.as_deref().unwrap_or("") {
        "Exists" => true,
        "" | "Equal" => !wanted_key.is_empty() && wanted_value == value,
        "Gt" => numbers(value, wanted_value).is_some_and(|(taint, limit)| taint > limit),
        "Lt" => numbers(value, wanted_value).is_some_and(|(taint, limit)| taint < limit),
        _ => false,
    }
}

fn numbers(a: &str, b: &str) -> Option<(i64, i64)> {
    Some((a.parse().ok()?, b.parse().ok()?))
}

impl Tolerations {
    fn covers(&self, taint: &Taint) -> bool {
        let value = taint.value.as_deref().unwrap_or("");
        self.0.tolerations().iter().any(|t| tolerates(t, &taint.key, value, &taint.effect))
    }
}

fn taints(node: &NodeInfo) -> &[Taint] {
    node.node().spec.as_ref().and_then(|s| s.taints.as_deref()).unwrap_or_default()
}

impl Plugin for TaintToleration {
    fn name(&self) -> &'static str {
        NAME
    }

    fn events(&self) -> &'static [ClusterEvent] {
        &[ClusterEvent::NodeAdded, ClusterEvent::NodeTaintsChanged, ClusterEvent::PodItself]
    }

    fn pre_filter(&self, pod: &Arc<PodInfo>, _snapshot: &Snapshot) -> PreFilter {
        PreFilter::Check(Box::new(Tolerations(pod.clone())))
    }

    fn pre_score(&self, pod: &Arc<PodInfo>, _snapshot: &Snapshot, nodes: &[Arc<NodeInfo>]) -> Option<Box<dyn Score>> {
        let preferring = nodes.iter().any(|node| taints(node).iter().any(|taint| taint.effect == "PreferNoSchedule"));
        preferring.then(|| Box::new(Tolerations(pod.clone())) as Box<dyn Score>)
    }

    fn weight(&self) -> i64 {
        3
    }
}

impl Filter for Tolerations {
    fn filter(&self, node: &NodeInfo) -> Result<(), Vec<Rejection>> {
        let hard = |taint: &&Taint| matches!(taint.effect.as_str(), "NoSchedule" | "NoExecute");
        if taints(node).iter().filter(hard).all(|taint| self.covers(taint)) {
            Ok(())
        } else {
            Err(vec![Rejection::unresolvable(NAME, "node(s) had untolerated taint(s)")])
        }
    }

    fn clone_box(&self) -> Box<dyn Filter> {
        Box::new(self.clone())
    }
}

impl Score for Tolerations {
    fn score(&self, node: &NodeInfo) -> i64 {
        let soft = taints(node).iter().filter(|t| t.effect == "PreferNoSchedule" && !self.covers(t)).count();
        i64::try_from(soft).unwrap_or(i64::MAX)
    }

    fn normalize(&self, scores: &mut [i64], _nodes: &[Arc<NodeInfo>]) {
        scale(scores, true);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_covers_what() {
        for (toleration, covered) in [
            (json!({"key": "k", "value": "v", "effect": "NoSchedule"}), true),
            (json!({"key": "k", "operator": "Equal", "value": "w"}), false),
            (json!({"key": "k", "operator": "Exists"}), true),
            (json!({"operator": "Exists"}), true),
            (json!({"key": "k", "operator": "Exists", "effect": "NoExecute"}), false),
            (json!({"key": "other", "operator": "Exists"}), false),
            (json!({}), false),
        ] {
            let toleration: Toleration = serde_json::from_value(toleration).unwrap();
            assert_eq!(tolerates(&toleration, "k", "v", "NoSchedule"), covered, "{toleration:?}");
        }
    }
}
