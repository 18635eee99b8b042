//! Watches that nodes are alive: a node whose lease is not renewed in time gets status `Unknown`, and every condition
//! that keeps pods away becomes a taint.
//!
//! Times written by nodes are never compared with this machine's clock: a node is silent when its heartbeat has not
//! *changed* for the grace period since this process saw it change. After a restart each node has a full period.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use apimachinery::controller::{Controller, EventType, Informer, ObjectKey, Plan, Write, object_reference};
use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Node, NodeCondition, Pod, Taint};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use parking_lot::Mutex;
use serde_json::json;

use crate::app::Context;
use crate::common::{after, elapsed, is_deleted, name, pods};

const LEASES: &str = "kube-node-lease";
pub const NODE_INDEX: &str = "node";
const NOT_READY: &str = "node.kubernetes.io/not-ready";
const UNREACHABLE: &str = "node.kubernetes.io/unreachable";
const UNSCHEDULABLE: &str = "node.kubernetes.io/unschedulable";
/// Conditions that keep new pods away: type, status, taint.
const PRESSURES: [(&str, &str, &str); 4] = [
    ("MemoryPressure", "True", "node.kubernetes.io/memory-pressure"),
    ("DiskPressure", "True", "node.kubernetes.io/disk-pressure"),
    ("PIDPressure", "True", "node.kubernetes.io/pid-pressure"),
    ("NetworkUnavailable", "True", "node.kubernetes.io/network-unavailable"),
];

/// The last heartbeat and when it was seen to change.
struct Heartbeat {
    value: String,
    seen: Timestamp,
}

struct NodeLifecycleController {
    grace: Duration,
    startup_grace: Duration,
    nodes: Arc<Informer<Node>>,
    leases: Arc<Informer<Lease>>,
    pods: Arc<Informer<Pod>>,
    heartbeats: Mutex<HashMap<String, Heartbeat>>,
}

/// The names of the nodes that pods run on, as an index of the pod informer.
pub fn index_by_node(pods: &Informer<Pod>) {
    pods.add_index(NODE_INDEX, |pod| pods::node_name(pod).map(str::to_owned).into_iter().collect());
}

pub fn start(context: &Context) {
    let informers = context.driver.informers();
    let controller = NodeLifecycleController {
        grace: context.options.node_monitor_grace_period,
        startup_grace: context.options.node_startup_grace_period,
        nodes: informers.of(),
        leases: informers.in_namespace(LEASES),
        pods: informers.of(),
        heartbeats: Mutex::default(),
    };
    index_by_node(&controller.pods);
    context.driver.run(controller, 4, |controller, wiring| {
        let nodes = controller.nodes.clone();
        wiring.map(&controller.nodes, move |change| {
            let changed = change.versions().take(1).map(|node| ObjectKey::cluster(name(&node.metadata)));
            // Whether all nodes are silent concerns every node.
            let turned = change.versions().map(|node| ready_status(node)).collect::<Vec<_>>();
            let turned = turned.len() < 2 || turned[0] != turned[1];
            let others =
                turned.then(|| nodes.list()).into_iter().flatten().map(|node| ObjectKey::cluster(name(&node.metadata)));
            changed.chain(others).collect()
        });
        wiring.map(&controller.leases, |change| {
            change.versions().take(1).map(|lease| ObjectKey::cluster(name(&lease.metadata))).collect()
        });
        // Pods that come up on a silent node are not ready either.
        wiring.map(&controller.pods, |change| match (&change.old, &change.new) {
            (None, Some(pod)) => pods::node_name(pod).map(ObjectKey::cluster).into_iter().collect(),
            _ => Vec::new(),
        });
    });
}

impl Controller for NodeLifecycleController {
    fn name(&self) -> &'static str {
        "node-lifecycle"
    }

    fn component(&self) -> &'static str {
        "node-controller"
    }

    fn reconcile(&self, key: &ObjectKey, now: Timestamp) -> Plan {
        let Some(node) = self.nodes.get(key).filter(|node| !is_deleted(&node.metadata)) else {
            self.heartbeats.lock().remove(&key.name);
            return Plan::nothing();
        };
        let mut plan = Plan::nothing();
        let mut judged = node.as_ref().clone();
        let due = self.silent_at(&node, now);
        if due <= now {
            mark_silent(&mut judged, now);
        } else {
            plan.again_after(elapsed(now, due));
        }
        plan.writes.extend(Write::status(node.as_ref(), &judged));
        let was_ready = ready_status(&node) == "True";
        if was_ready && ready_status(&judged) != "True" {
            let message = format!("Node {} status is now: NodeNotReady", key.name);
            plan.event(object_reference(node.as_ref()), EventType::Normal, "NodeNotReady", message);
        }
        self.taint(&node, &judged, now, &mut plan);
        if ready_status(&judged) == "Unknown" {
            self.mark_pods_not_ready(&key.name, now, &mut plan);
        }
        plan
    }
}

impl NodeLifecycleController {
    /// When the node will have been silent for too long, unless it is heard of before.
    fn silent_at(&self, node: &Node, now: Timestamp) -> Timestamp {
        let node_name = name(&node.metadata);
        let renewed = self
            .leases
            .get(&ObjectKey::new(LEASES, node_name))
            .and_then(|lease| lease.spec.as_ref()?.renew_time.clone());
        let reported = condition(node, "Ready").and_then(|ready| ready.last_heartbeat_time.as_ref()).map(|time| time.0);
        let value = format!("{:?} {reported:?}", renewed.map(|time| time.0));
        let never_heard_of = condition(node, "Ready").is_none();
        let mut heartbeats = self.heartbeats.lock();
        let heartbeat = heartbeats.entry(node_name.to_owned()).or_insert_with(|| {
            // A node that has never reported is judged from its creation on.
            let created = node.metadata.creation_timestamp.as_ref().map_or(now, |time| time.0);
            Heartbeat { value: value.clone(), seen: if never_heard_of { created } else { now } }
        });
        // What this controller writes itself (status Unknown) keeps the heartbeat times, so it is not taken for a sign of life.
        if heartbeat.value != value {
            *heartbeat = Heartbeat { value, seen: now };
        }
        after(heartbeat.seen, if never_heard_of { self.startup_grace } else { self.grace })
    }

    fn taint(&self, node: &Node, judged: &Node, now: Timestamp, plan: &mut Plan) {
        let everybody_is_silent = self.nodes.list().iter().all(|other| {
            let judged = if other.metadata.uid == node.metadata.uid { judged } else { other };
            ready_status(judged) == "Unknown"
        });
        let current = node.spec.as_ref().and_then(|spec| spec.taints.clone()).unwrap_or_default();
        let wanted = wanted_taints(judged, everybody_is_silent);
        let ours = |taint: &Taint| {
            let by_condition = PRESSURES.iter().any(|(_, _, key)| *key == taint.key) || taint.key == UNSCHEDULABLE;
            let effects = if by_condition { &["NoSchedule"][..] } else { &["NoSchedule", "NoExecute"][..] };
            (by_condition || taint.key == NOT_READY || taint.key == UNREACHABLE)
                && effects.contains(&taint.effect.as_str())
        };
        let mut taints: Vec<_> = current
            .iter()
            .filter(|taint| !ours(taint) || wanted.contains(&(taint.key.as_str(), taint.effect.as_str())))
            .cloned()
            .collect();
        for (key, effect) in wanted {
            if !taints.iter().any(|taint| taint.key == key && taint.effect == effect) {
                taints.push(Taint {
                    key: key.to_owned(),
                    effect: effect.to_owned(),
                    value: None,
                    time_added: Some(Time(now)),
                });
            }
        }
        if taints == current {
            return;
        }
        // Taints are one list for many writers: somebody else's change in between must fail this one.
        let mut patch = json!({"metadata": {"uid": node.metadata.uid}, "spec": {"taints": taints}});
        if judged.status == node.status {
            patch["metadata"]["resourceVersion"] = json!(node.metadata.resource_version);
        } else {
            // The status was written just before, so that the version is not known: the next look adds the taints.
            plan.again_after(Duration::from_millis(1));
            return;
        }
        plan.push(Write::merge_patch::<Node>(ObjectKey::of(&node.metadata), patch));
    }

    fn mark_pods_not_ready(&self, node: &str, now: Timestamp, plan: &mut Plan) {
        for pod in self.pods.indexed(NODE_INDEX, node) {
            if !pods::is_ready(&pod) {
                continue;
            }
            let mut marked = pod.as_ref().clone();
            let conditions = marked.status.iter_mut().flat_map(|status| status.conditions.iter_mut().flatten());
            for condition in conditions.filter(|condition| condition.type_ == "Ready") {
                condition.status = "False".to_owned();
                condition.last_transition_time = Some(Time(now));
            }
            plan.writes.extend(Write::status(pod.as_ref(), &marked));
            plan.event(
                object_reference(pod.as_ref()),
                EventType::Warning,
                "NodeNotReady",
                "Node is not ready".to_owned(),
            );
        }
    }
}

fn condition<'a>(node: &'a Node, type_: &str) -> Option<&'a NodeCondition> {
    node.status.as_ref()?.conditions.as_ref()?.iter().find(|condition| condition.type_ == type_)
}

fn ready_status(node: &Node) -> &str {
    condition(node, "Ready").map_or("Unknown", |ready| &ready.status)
}

/// Everything the node said is no longer known.
fn mark_silent(node: &mut Node, now: Timestamp) {
    let conditions = node.status.get_or_insert_default().conditions.get_or_insert_default();
    for type_ in ["Ready", "MemoryPressure", "DiskPressure", "PIDPressure"] {
        match conditions.iter_mut().find(|condition| condition.type_ == type_) {
            Some(condition) if condition.status == "Unknown" => {}
            Some(condition) => {
                condition.status = "Unknown".to_owned();
                condition.reason = Some("NodeStatusUnknown".to_owned());
                condition.message = Some("Kubelet stopped posting node status.".to_owned());
                condition.last_transition_time = Some(Time(now));
            }
            None => conditions.push(NodeCondition {
                type_: type_.to_owned(),
                status: "Unknown".to_owned(),
                reason: Some("NodeStatusNeverUpdated".to_owned()),
                message: Some("Kubelet never posted node status.".to_owned()),
                last_heartbeat_time: node.metadata.creation_timestamp.clone(),
                last_transition_time: Some(Time(now)),
            }),
        }
    }
}

/// The taints that follow from the node's state. When no node is heard of, the fault is rather here than there, and no
/// pod is driven away.
fn wanted_taints(node: &Node, everybody_is_silent: bool) -> Vec<(&'static str, &'static str)> {
    let mut wanted = Vec::new();
    for (type_, status, taint) in PRESSURES {
        if condition(node, type_).is_some_and(|condition| condition.status == status) {
            wanted.push((taint, "NoSchedule"));
        }
    }
    if node.spec.as_ref().and_then(|spec| spec.unschedulable) == Some(true) {
        wanted.push((UNSCHEDULABLE, "NoSchedule"));
    }
    if condition(node, "Ready").is_none() {
        // A node that has not reported yet takes no pods, and there is nobody to drive away.
        wanted.push((NOT_READY, "NoSchedule"));
        return wanted;
    }
    let silence = match ready_status(node) {
        "True" => return wanted,
        "False" => NOT_READY,
        _ => UNREACHABLE,
    };
    wanted.push((silence, "NoSchedule"));
    if !everybody_is_silent {
        wanted.push((silence, "NoExecute"));
    }
    wanted
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str, ready: &str, heartbeat: i64) -> Node {
        let time = Timestamp::from_second(heartbeat).unwrap().to_string();
        serde_json::from_value(json!({
            "metadata": {"name": name, "uid": name, "resourceVersion": "1", "creationTimestamp": "1970-01-01T00:00:00Z"},
            "status": {"conditions": [{"type": "Ready", "status": ready, "lastHeartbeatTime": time}]},
        }))
        .unwrap()
    }

    fn controller(nodes: Vec<Node>) -> NodeLifecycleController {
        NodeLifecycleController {
            grace: Duration::from_secs(50),
            startup_grace: Duration::from_secs(60),
            nodes: Informer::fixed(nodes),
            leases: Informer::fixed([]),
            pods: {
                let pods = Informer::fixed([pods::tests::pod("p", Some("a"), "Running", Some(0))]);
                index_by_node(&pods);
                pods
            },
            heartbeats: Mutex::default(),
        }
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn a_silent_node_becomes_unknown_with_its_pods() {
        let controller = controller(vec![node("a", "True", 0), node("b", "True", 0)]);
        let key = ObjectKey::cluster("a");
        let plan = controller.reconcile(&key, at(1000));
        assert!(plan.writes.is_empty());
        assert_eq!(plan.again_after, Some(Duration::from_secs(50)), "clocks of nodes do not count");
        let plan = controller.reconcile(&key, at(1050));
        assert_eq!(plan.writes[0].body["status"]["conditions"][0]["status"], "Unknown");
        assert_eq!(plan.writes[1].resource.plural, "pods");
        controller.nodes.apply(kube::runtime::watcher::Event::Apply(node("a", "True", 1)));
        assert!(controller.reconcile(&key, at(1051)).writes.is_empty(), "a sign of life");
    }

    #[test]
    fn taints_follow_the_conditions() {
        let taints = |nodes: Vec<Node>| {
            let plan = controller(nodes).reconcile(&ObjectKey::cluster("a"), at(10));
            let patch =
                plan.writes.iter().find(|write| write.subresource.is_empty() && write.resource.plural == "nodes");
            let taints = patch.and_then(|write| write.body["spec"]["taints"].as_array().cloned()).unwrap_or_default();
            taints
                .iter()
                .map(|t| format!("{}:{}", t["key"].as_str().unwrap(), t["effect"].as_str().unwrap()))
                .collect::<Vec<_>>()
        };
        assert!(taints(vec![node("a", "True", 0)]).is_empty());
        assert_eq!(
            taints(vec![node("a", "False", 0)]),
            [format!("{NOT_READY}:NoSchedule"), format!("{NOT_READY}:NoExecute")]
        );
        assert_eq!(taints(vec![node("a", "Unknown", 0), node("b", "True", 0)]).len(), 2);
        assert_eq!(
            taints(vec![node("a", "Unknown", 0)]),
            [format!("{UNREACHABLE}:NoSchedule")],
            "nobody is driven away when all are silent"
        );
        let mut cordoned = node("a", "True", 0);
        cordoned.spec.get_or_insert_default().unschedulable = Some(true);
        assert_eq!(taints(vec![cordoned]), [format!("{UNSCHEDULABLE}:NoSchedule")]);
    }
}
