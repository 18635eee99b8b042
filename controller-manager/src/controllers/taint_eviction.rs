//! Drives pods from nodes with `NoExecute` taints: at once those that do not tolerate them, others when their
//! `tolerationSeconds` are over.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use apimachinery::controller::{Controller, EventType, Informer, ObjectKey, Plan, Write, object_reference};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, Pod, PodCondition, Taint, Toleration};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use parking_lot::Mutex;

use super::node_lifecycle::{NODE_INDEX, index_by_node};
use crate::app::Context;
use crate::common::{after, elapsed, is_deleted, name, pods, seconds, uid};

struct TaintEvictionController {
    nodes: Arc<Informer<Node>>,
    pods: Arc<Informer<Pod>>,
    /// Since when pods (by uid) have been on a tainted node, where the taint does not say it.
    tainted_since: Mutex<HashMap<String, Timestamp>>,
}

pub fn start(context: &Context) {
    let informers = context.driver.informers();
    let controller =
        TaintEvictionController { nodes: informers.of(), pods: informers.of(), tainted_since: Mutex::default() };
    index_by_node(&controller.pods);
    context.driver.run(controller, 8, |controller, wiring| {
        // Of a pod only its placement and its tolerations matter.
        wiring.map(&controller.pods, |change| {
            let relevant = |pod: &Pod| {
                (pods::node_name(pod).map(str::to_owned), pod.spec.as_ref().and_then(|s| s.tolerations.clone()))
            };
            let same = matches!((&change.old, &change.new), (Some(old), Some(new)) if relevant(old) == relevant(new));
            if same { Vec::new() } else { change.versions().take(1).map(|pod| ObjectKey::of(&pod.metadata)).collect() }
        });
        let pods = controller.pods.clone();
        wiring.map(&controller.nodes, move |change| {
            let old = change.old.as_ref().map(|node| no_execute(node)).unwrap_or_default();
            let new = change.new.as_ref().map(|node| no_execute(node)).unwrap_or_default();
            if old == new {
                return Vec::new();
            }
            let node = change.versions().next().map(|node| name(&node.metadata).to_owned()).unwrap_or_default();
            pods.indexed(NODE_INDEX, &node).iter().map(|pod| ObjectKey::of(&pod.metadata)).collect()
        });
    });
}

impl Controller for TaintEvictionController {
    fn name(&self) -> &'static str {
        "taint-eviction"
    }

    fn component(&self) -> &'static str {
        "taint-eviction-controller"
    }

    fn reconcile(&self, key: &ObjectKey, now: Timestamp) -> Plan {
        let Some(pod) = self.pods.get(key).filter(|pod| !is_deleted(&pod.metadata)) else {
            // The uid is no longer known here; entries of deleted pods go with the next clean-up.
            self.forget_gone();
            return Plan::nothing();
        };
        let node = pods::node_name(&pod).and_then(|node| self.nodes.get(&ObjectKey::cluster(node)));
        let taints = node.map(|node| no_execute(&node)).unwrap_or_default();
        let tolerations = pod.spec.as_ref().and_then(|spec| spec.tolerations.clone()).unwrap_or_default();
        if taints.is_empty() {
            self.tainted_since.lock().remove(uid(&pod.metadata));
            return Plan::nothing();
        }
        let mut plan = Plan::nothing();
        match patience(&taints, &tolerations) {
            Patience::Forever => {}
            Patience::None => evict(&pod, now, &mut plan),
            Patience::For(patience) => {
                let due = after(self.since(&pod, &taints, now), patience);
                if due <= now {
                    evict(&pod, now, &mut plan);
                } else {
                    plan.again_after(elapsed(now, due));
                }
            }
        }
        plan
    }
}

impl TaintEvictionController {
    fn since(&self, pod: &Pod, taints: &[Taint], now: Timestamp) -> Timestamp {
        let added = taints.iter().map(|taint| taint.time_added.as_ref().map(|time| time.0)).collect::<Option<Vec<_>>>();
        // A pod that came later than the taint is counted from its own beginning.
        let started = pod.status.as_ref().and_then(|status| status.start_time.as_ref()).map(|time| time.0);
        match added.and_then(|added| added.into_iter().min()) {
            Some(added) => started.map_or(added, |started| started.max(added)),
            None => *self.tainted_since.lock().entry(uid(&pod.metadata).to_owned()).or_insert(now),
        }
    }

    fn forget_gone(&self) {
        let mut since = self.tainted_since.lock();
        if since.len() > 2 * self.pods.len() + 64 {
            let alive: std::collections::HashSet<_> =
                self.pods.list().iter().map(|pod| uid(&pod.metadata).to_owned()).collect();
            since.retain(|uid, _| alive.contains(uid));
        }
    }
}

fn no_execute(node: &Node) -> Vec<Taint> {
    let taints = node.spec.iter().flat_map(|spec| spec.taints.iter().flatten());
    taints.filter(|taint| taint.effect == "NoExecute").cloned().collect()
}

fn evict(pod: &Pod, now: Timestamp, plan: &mut Plan) {
    let mut marked = pod.clone();
    let conditions = marked.status.get_or_insert_default().conditions.get_or_insert_default();
    conditions.retain(|condition| condition.type_ != "DisruptionTarget");
    conditions.push(PodCondition {
        type_: "DisruptionTarget".to_owned(),
        status: "True".to_owned(),
        reason: Some("DeletionByTaintManager".to_owned()),
        message: Some("Taint manager: deleting due to NoExecute taint".to_owned()),
        last_transition_time: Some(Time(now)),
        ..PodCondition::default()
    });
    plan.writes.extend(Write::status(pod, &marked));
    plan.push(Write::delete(pod));
    let message = format!("Marking for deletion Pod {}", ObjectKey::of(&pod.metadata));
    plan.event(object_reference(pod), EventType::Normal, "TaintManagerEviction", message);
}

#[derive(Debug, PartialEq)]
enum Patience {
    Forever,
    For(Duration),
    /// Some taint is not tolerated.
    None,
}

/// How long the tolerations bear all of the taints together.
fn patience(taints: &[Taint], tolerations: &[Toleration]) -> Patience {
    let mut least: Option<Duration> = None;
    for taint in taints {
        let matching = tolerations.iter().filter(|toleration| tolerates(toleration, taint));
        // Of several tolerations for one taint, the first one counts.
        match matching.map(|toleration| toleration.toleration_seconds).next() {
            None => return Patience::None,
            Some(None) => {}
            Some(Some(limit)) => {
                let limit = seconds(limit);
                least = Some(least.map_or(limit, |least| least.min(limit)));
            }
        }
    }
    match least {
        None => Patience::Forever,
        Some(Duration::ZERO) => Patience::None,
        Some(limit) => Patience::For(limit),
    }
}

fn tolerates(toleration: &Toleration, taint: &Taint) -> bool {
    let effect = toleration.effect.as_deref().unwrap_or("");
    let key = toleration.key.as_deref().unwrap_or("");
    if !effect.is_empty() && effect != taint.effect || !key.is_empty() && key != taint.key {
        return false;
    }
    match toleration.operator.as_deref().unwrap_or("Equal") {
        "Exists" => true,
        "Equal" | "" => {
            !key.is_empty() && toleration.value.as_deref().unwrap_or("") == taint.value.as_deref().unwrap_or("")
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn parse<T: serde::de::DeserializeOwned>(value: Value) -> T {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn how_long_pods_stay() {
        let taints: Vec<Taint> =
            parse(json!([{"key": "a", "effect": "NoExecute"}, {"key": "b", "value": "x", "effect": "NoExecute"}]));
        let cases = [
            (json!([]), Patience::None),
            (json!([{"operator": "Exists"}]), Patience::Forever),
            (json!([{"key": "a", "operator": "Exists"}]), Patience::None),
            (
                json!([{"key": "a", "operator": "Exists", "tolerationSeconds": 300}, {"key": "b", "value": "x", "tolerationSeconds": 20}]),
                Patience::For(Duration::from_secs(20)),
            ),
            (json!([{"key": "a", "operator": "Exists"}, {"key": "b", "value": "y"}]), Patience::None),
            (json!([{"operator": "Exists", "effect": "NoSchedule"}]), Patience::None),
            (json!([{"operator": "Exists", "tolerationSeconds": 0}]), Patience::None),
        ];
        for (tolerations, expected) in cases {
            assert_eq!(patience(&taints, &parse::<Vec<_>>(tolerations.clone())), expected, "{tolerations}");
        }
    }

    #[test]
    fn a_pod_is_evicted_when_its_patience_ends() {
        let node: Node = parse(
            json!({"metadata": {"name": "n"}, "spec": {"taints": [{"key": "k", "effect": "NoExecute", "timeAdded": "1970-01-01T00:01:40Z"}]}}),
        );
        let mut pod = pods::tests::pod("p", Some("n"), "Running", Some(0));
        pod.spec.as_mut().unwrap().tolerations = parse(json!([{"operator": "Exists", "tolerationSeconds": 300}]));
        let controller = TaintEvictionController {
            nodes: Informer::fixed([node]),
            pods: Informer::fixed([pod]),
            tainted_since: Mutex::default(),
        };
        let plan = |second| controller.reconcile(&ObjectKey::new("ns", "p"), Timestamp::from_second(second).unwrap());
        assert_eq!(plan(150).again_after, Some(Duration::from_secs(250)));
        let plan = plan(400);
        assert_eq!(plan.writes.iter().map(|write| write.subresource).collect::<Vec<_>>(), ["status", ""]);
    }
}
