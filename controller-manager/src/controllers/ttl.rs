//! Tells kubelets, in an annotation of their nodes, how long they may keep secrets and config maps without asking again:
//! the longer the more nodes there are.

use std::sync::Arc;

use apimachinery::controller::{Controller, Informer, ObjectKey, Plan, Write};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Node;
use parking_lot::Mutex;
use serde_json::json;

use crate::app::Context;
use crate::common::annotation;

const ANNOTATION: &str = "node.alpha.kubernetes.io/ttl";

/// Seconds for clusters of `min` to `max` nodes. Neighbours overlap, so that a node more or less does not change all.
struct Step {
    min: usize,
    max: usize,
    seconds: u32,
}

const STEPS: [Step; 5] = [
    Step { min: 0, max: 100, seconds: 0 },
    Step { min: 90, max: 500, seconds: 15 },
    Step { min: 450, max: 1000, seconds: 30 },
    Step { min: 900, max: 2000, seconds: 60 },
    Step { min: 1800, max: usize::MAX, seconds: 300 },
];

struct TtlController {
    nodes: Arc<Informer<Node>>,
    /// The step that the cluster is at.
    step: Mutex<usize>,
}

pub fn start(context: &Context) {
    let controller = TtlController { nodes: context.driver.informers().of(), step: Mutex::default() };
    context.driver.run(controller, 5, |controller, wiring| {
        let nodes = controller.nodes.clone();
        wiring.map(&controller.nodes, move |change| match (&change.old, &change.new) {
            (Some(old), Some(new)) if old.metadata.annotations == new.metadata.annotations => Vec::new(),
            (Some(_), Some(new)) => vec![ObjectKey::of(&new.metadata)],
            // The number of nodes concerns all of them, once it is near the end of a step.
            _ if STEPS
                .iter()
                .any(|step| step.max.abs_diff(nodes.len()) <= 1 || step.min.abs_diff(nodes.len()) <= 1) =>
            {
                nodes.list().iter().map(|node| ObjectKey::of(&node.metadata)).collect()
            }
            _ => change.new.iter().map(|node| ObjectKey::of(&node.metadata)).collect(),
        });
    });
}

impl Controller for TtlController {
    fn name(&self) -> &'static str {
        "ttl"
    }

    fn component(&self) -> &'static str {
        "ttl-controller"
    }

    fn reconcile(&self, key: &ObjectKey, _: Timestamp) -> Plan {
        let Some(node) = self.nodes.get(key) else { return Plan::nothing() };
        let seconds = self.seconds(self.nodes.len()).to_string();
        if annotation(&node.metadata, ANNOTATION) == Some(seconds.as_str()) {
            return Plan::nothing();
        }
        let patch = json!({"metadata": {"annotations": {ANNOTATION: seconds}}});
        Plan::write(Write::strategic_patch::<Node>(key.clone(), patch))
    }
}

impl TtlController {
    /// The seconds for so many nodes, given where the cluster comes from.
    fn seconds(&self, nodes: usize) -> u32 {
        let mut step = self.step.lock();
        while nodes > STEPS[*step].max {
            *step += 1;
        }
        while nodes < STEPS[*step].min {
            *step -= 1;
        }
        STEPS[*step].seconds
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_hold_until_the_cluster_has_left_them() {
        let controller = TtlController { nodes: Informer::fixed([]), step: Mutex::default() };
        for (nodes, seconds) in
            [(1, 0), (100, 0), (101, 15), (95, 15), (90, 15), (89, 0), (2001, 300), (1800, 300), (1799, 60), (0, 0)]
        {
            assert_eq!(controller.seconds(nodes), seconds, "{nodes}");
        }
    }

    #[test]
    fn nodes_are_told_once() {
        let node = |annotations: serde_json::Value| -> Node {
            serde_json::from_value(json!({"metadata": {"name": "n", "annotations": annotations}})).unwrap()
        };
        let plan = |node| {
            let controller = TtlController { nodes: Informer::fixed([node]), step: Mutex::default() };
            controller.reconcile(&ObjectKey::cluster("n"), Timestamp::UNIX_EPOCH)
        };
        assert_eq!(plan(node(json!({}))).writes[0].body, json!({"metadata": {"annotations": {ANNOTATION: "0"}}}));
        assert!(plan(node(json!({ANNOTATION: "0"}))).is_empty());
        assert_eq!(plan(node(json!({ANNOTATION: "15"}))).writes.len(), 1);
    }
}
