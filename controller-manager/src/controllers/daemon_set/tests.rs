//! Daemon sets on a small cluster.

use apimachinery::controller::Verb;
use serde_json::{Value, json};

use super::*;

fn set(extra: Value) -> DaemonSet {
    let mut spec = json!({"selector": {"matchLabels": {"d": "d"}}, "template": {"metadata": {"labels": {"d": "d"}}, "spec": {"containers": [{"name": "c", "image": "1"}]}}});
    for (key, value) in extra.as_object().unwrap() {
        spec[key] = value.clone();
    }
    serde_json::from_value(
        json!({"metadata": {"name": "d", "namespace": "ns", "uid": "d", "generation": 1}, "spec": spec}),
    )
    .unwrap()
}

fn node(name: &str, taints: Value) -> Node {
    serde_json::from_value(json!({"metadata": {"name": name, "labels": {"n": name}}, "spec": {"taints": taints}}))
        .unwrap()
}

fn pod(name: &str, node: &str, hash: &str, ready: bool) -> Pod {
    let mut pod = pods::tests::pod(name, Some(node), "Running", ready.then_some(0));
    pod.metadata.labels = Some([("d".to_owned(), "d".to_owned()), (REVISION_LABEL.to_owned(), hash.to_owned())].into());
    pod.metadata.owner_references = Some(vec![crate::common::controller_reference(&set(json!({})))]);
    pod
}

fn plan(set: DaemonSet, nodes: Vec<Node>, pods: Vec<Pod>) -> Plan {
    let revisions = Informer::fixed([revisions::history(&set, &set.spec.template, None, &Informer::fixed([])).current]);
    let controller = DaemonSetController {
        sets: Informer::fixed([set]),
        pods: Informer::fixed(pods),
        nodes: Informer::fixed(nodes),
        revisions,
    };
    controller.reconcile(&ObjectKey::new("ns", "d"), Timestamp::from_second(100).unwrap())
}

fn current_hash() -> String {
    let set = set(json!({}));
    revisions::hash_of(&revisions::history(&set, &set.spec.template, None, &Informer::fixed([])).current).to_owned()
}

/// Nodes that get a pod, and pods that go.
fn summary(plan: &Plan) -> (Vec<String>, Vec<String>) {
    let of = |verb: Verb| plan.writes.iter().filter(move |write| write.verb == verb && write.resource.kind == "Pod");
    let created = of(Verb::Create).map(|write| {
        let pod: Pod = serde_json::from_value(write.body.clone()).unwrap();
        pinned_node(&pod).unwrap().to_owned()
    });
    (created.collect(), of(Verb::Delete).map(|write| write.name.clone()).collect())
}

#[test]
fn every_node_gets_one_pod_where_it_may() {
    let nodes = vec![
        node("a", json!([])),
        node("cordoned", json!([{"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule"}])),
        node("control", json!([{"key": "role", "effect": "NoSchedule"}])),
        node("b", json!([])),
    ];
    let plan = plan(
        set(json!({})),
        nodes,
        vec![pod("p", "b", &current_hash(), true), pod("q", "control", &current_hash(), true)],
    );
    assert_eq!(summary(&plan), (vec!["a".to_owned(), "cordoned".to_owned()], vec![]));
    let status = &plan.writes.iter().find(|write| write.subresource == "status").unwrap().body["status"];
    assert_eq!(
        (&status["desiredNumberScheduled"], &status["numberReady"], &status["numberMisscheduled"]),
        (&json!(3), &json!(1), &json!(1))
    );
}

#[test]
fn pods_leave_nodes_that_are_not_selected_any_more() {
    let mut selective = set(json!({}));
    selective.spec.template.spec.as_mut().unwrap().node_selector = Some([("n".to_owned(), "a".to_owned())].into());
    let nodes = vec![node("a", json!([])), node("b", json!([]))];
    let plan = plan(selective, nodes, vec![pod("p", "b", "old", true)]);
    assert_eq!(summary(&plan), (vec!["a".to_owned()], vec!["p".to_owned()]));
}

#[test]
fn updates_go_node_by_node() {
    let nodes = || ["a", "b", "c"].map(|name| node(name, json!([]))).to_vec();
    let old = |name: &str, ready| pod(name, name, "old", ready);
    let all_old = vec![old("a", true), old("b", true), old("c", true)];
    assert_eq!(summary(&plan(set(json!({})), nodes(), all_old.clone())).1, ["a"]);
    let in_progress = vec![pod("a", "a", &current_hash(), false), old("b", true), old("c", true)];
    assert!(summary(&plan(set(json!({})), nodes(), in_progress)).1.is_empty(), "one is not available yet");
    let broken = vec![old("a", true), old("b", false), old("c", true)];
    assert_eq!(summary(&plan(set(json!({})), nodes(), broken)).1, ["b"]);
    let on_delete = set(json!({"updateStrategy": {"type": "OnDelete"}}));
    assert!(summary(&plan(on_delete, nodes(), all_old.clone())).1.is_empty());
    let surge = set(
        json!({"updateStrategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}}),
    );
    assert_eq!(summary(&plan(surge.clone(), nodes(), all_old)), (vec!["a".to_owned()], vec![]));
    let surged = vec![old("a", true), pod("a2", "a", &current_hash(), true), old("b", true), old("c", true)];
    assert_eq!(summary(&plan(surge, nodes(), surged)), (vec!["b".to_owned()], vec!["a".to_owned()]));
}

#[test]
fn failed_pods_go_before_they_are_replaced() {
    let mut failed = pod("p", "a", &current_hash(), false);
    failed.status.as_mut().unwrap().phase = Some("Failed".to_owned());
    let plan = plan(set(json!({})), vec![node("a", json!([]))], vec![failed]);
    assert_eq!(summary(&plan), (vec![], vec!["p".to_owned()]));
}
