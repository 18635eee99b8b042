//! Removes pods that nobody else removes: those of nodes that are gone, those that were never placed and are being
//! deleted, and the oldest finished ones when there are too many.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use apimachinery::controller::{Controller, Informer, ObjectKey, Plan, Write};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, Pod, PodCondition, PodStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use parking_lot::Mutex;

use super::node_lifecycle::{NODE_INDEX, index_by_node};
use crate::app::Context;
use crate::common::{after, elapsed, is_deleted, name, pods, uid};

/// A node must have been missing for so long before its pods go: it may be registering again.
const QUARANTINE: Duration = Duration::from_secs(40);
const OUT_OF_SERVICE: &str = "node.kubernetes.io/out-of-service";

struct PodGcController {
    threshold: usize,
    nodes: Arc<Informer<Node>>,
    pods: Arc<Informer<Pod>>,
    /// Since when nodes have been missing.
    missing: Mutex<HashMap<String, Timestamp>>,
}

pub fn start(context: &Context) {
    let informers = context.driver.informers();
    let controller = PodGcController {
        threshold: usize::try_from(context.options.terminated_pod_gc_threshold).unwrap_or(usize::MAX),
        nodes: informers.of(),
        pods: informers.of(),
        missing: Mutex::default(),
    };
    index_by_node(&controller.pods);
    context.driver.run(controller, 4, |controller, wiring| {
        wiring.map(&controller.pods, |change| {
            let relevant =
                |pod: &Pod| (pods::node_name(pod).is_some(), is_deleted(&pod.metadata), pods::is_finished(pod));
            let same = matches!((&change.old, &change.new), (Some(old), Some(new)) if relevant(old) == relevant(new));
            if same { Vec::new() } else { change.new.iter().map(|pod| ObjectKey::of(&pod.metadata)).collect() }
        });
        let pods = controller.pods.clone();
        wiring.map(&controller.nodes, move |change| {
            let out_of_service = |node: &Arc<Node>| is_out_of_service(node);
            if change.new.is_some() && !change.new.iter().any(out_of_service) {
                return Vec::new();
            }
            let node = change.versions().next().map(|node| name(&node.metadata).to_owned()).unwrap_or_default();
            pods.indexed(NODE_INDEX, &node).iter().map(|pod| ObjectKey::of(&pod.metadata)).collect()
        });
    });
}

impl Controller for PodGcController {
    fn name(&self) -> &'static str {
        "pod-garbage-collector"
    }

    fn component(&self) -> &'static str {
        "pod-garbage-collector"
    }

    fn reconcile(&self, key: &ObjectKey, now: Timestamp) -> Plan {
        let Some(pod) = self.pods.get(key) else { return Plan::nothing() };
        let Some(node_name) = pods::node_name(&pod) else {
            return if is_deleted(&pod.metadata) { Plan::write(remove(&pod)) } else { self.limit_finished(&pod) };
        };
        match self.nodes.get(&ObjectKey::cluster(node_name)) {
            Some(node) => {
                self.missing.lock().remove(node_name);
                if is_deleted(&pod.metadata) && is_out_of_service(&node) {
                    return fail_and_remove(&pod, "PodGC: node is out of service", now);
                }
                self.limit_finished(&pod)
            }
            None => {
                let since = *self.missing.lock().entry(node_name.to_owned()).or_insert(now);
                let due = after(since, QUARANTINE);
                if due <= now {
                    return fail_and_remove(&pod, "PodGC: node no longer exists", now);
                }
                let mut plan = Plan::nothing();
                plan.again_after(elapsed(now, due));
                plan
            }
        }
    }
}

impl PodGcController {
    fn limit_finished(&self, pod: &Pod) -> Plan {
        if self.threshold == 0 || !pods::is_finished(pod) || self.pods.len() <= self.threshold {
            return Plan::nothing();
        }
        let mut finished: Vec<_> = self.pods.list().into_iter().filter(|pod| pods::is_finished(pod)).collect();
        let surplus = finished.len().saturating_sub(self.threshold);
        finished.sort_by_key(|pod| (pod.metadata.creation_timestamp.clone(), name(&pod.metadata).to_owned()));
        let is_surplus = finished[..surplus].iter().any(|old| uid(&old.metadata) == uid(&pod.metadata));
        if is_surplus { Plan::write(remove(pod)) } else { Plan::nothing() }
    }
}

fn is_out_of_service(node: &Node) -> bool {
    let taints = node.spec.iter().flat_map(|spec| spec.taints.iter().flatten());
    let ready = node
        .status
        .iter()
        .flat_map(|s| s.conditions.iter().flatten())
        .any(|c| c.type_ == "Ready" && c.status == "True");
    !ready && taints.into_iter().any(|taint| taint.key == OUT_OF_SERVICE)
}

fn remove(pod: &Pod) -> Write {
    Write::delete(pod).grace_period(0)
}

/// Nobody on the node will ever report the end, so it is told here.
fn fail_and_remove(pod: &Pod, why: &str, now: Timestamp) -> Plan {
    let mut failed = pod.clone();
    if !pods::is_finished(pod) {
        let status: &mut PodStatus = failed.status.get_or_insert_default();
        status.phase = Some("Failed".to_owned());
        let conditions = status.conditions.get_or_insert_default();
        conditions.retain(|condition| condition.type_ != "DisruptionTarget");
        conditions.push(PodCondition {
            type_: "DisruptionTarget".to_owned(),
            status: "True".to_owned(),
            reason: Some("DeletionByPodGC".to_owned()),
            message: Some(why.to_owned()),
            last_transition_time: Some(Time(now)),
            ..PodCondition::default()
        });
    }
    let mut plan = Plan::nothing();
    plan.writes.extend(Write::status(pod, &failed));
    plan.push(remove(pod));
    plan
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn plan(pods: Vec<Pod>, threshold: usize, seconds: &[i64]) -> Plan {
        let node: Node = serde_json::from_value(json!({"metadata": {"name": "n"}})).unwrap();
        let controller = PodGcController {
            threshold,
            nodes: Informer::fixed([node]),
            pods: Informer::fixed(pods),
            missing: Mutex::default(),
        };
        let mut last = Plan::nothing();
        for second in seconds {
            last = controller.reconcile(&ObjectKey::new("ns", "p"), Timestamp::from_second(*second).unwrap());
        }
        last
    }

    #[test]
    fn pods_of_missing_nodes_go_after_the_quarantine() {
        let pod = || pods::tests::pod("p", Some("gone"), "Running", Some(0));
        assert_eq!(plan(vec![pod()], 10, &[100]).again_after, Some(QUARANTINE));
        let plan = plan(vec![pod()], 10, &[100, 140]);
        assert_eq!(plan.writes[0].body["status"]["phase"], "Failed");
        assert_eq!(plan.writes[1].body["gracePeriodSeconds"], 0);
    }

    #[test]
    fn surplus_finished_pods_go_and_others_stay() {
        let done = |name: &str| pods::tests::pod(name, Some("n"), "Succeeded", None);
        assert_eq!(plan(vec![done("p"), done("q")], 1, &[0]).writes.len(), 1);
        assert!(plan(vec![done("p"), done("o")], 1, &[0]).writes.is_empty(), "o is older by name");
        assert!(plan(vec![pods::tests::pod("p", Some("n"), "Running", None), done("q")], 1, &[0]).writes.is_empty());
    }
}
