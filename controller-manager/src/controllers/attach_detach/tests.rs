//! What is attached and detached, when, and what the pods are told.

use super::*;
use serde_json::{Value, json};

const VOLUME: &str = "kubernetes.io/csi/d^h";
const RWO: &[&str] = &["ReadWriteOnce"];

fn parse<T: serde::de::DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).unwrap()
}

/// A cluster with the nodes `n` and `other`, and a volume bound to the claim `ns/c`.
struct World {
    pods: Vec<Value>,
    modes: &'static [&'static str],
    attach_required: bool,
    node: Value,
    attachments: Vec<Value>,
}

fn pod(name: &str, node: &str) -> Value {
    json!({"metadata": {"name": name, "namespace": "ns", "uid": name}, "spec": {"nodeName": node, "containers": [],
        "volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": "c"}}]}, "status": {"phase": "Running"}})
}

fn node(name: &str, attached: &[&str], in_use: &[&str]) -> Value {
    let attached: Vec<_> = attached.iter().map(|name| json!({"name": name, "devicePath": ""})).collect();
    json!({"metadata": {"name": name, "annotations": {MANAGED: "true"}}, "spec": {},
        "status": {"volumesAttached": attached, "volumesInUse": in_use, "conditions": [{"type": "Ready", "status": "True"}]}})
}

fn attachment(node: &str, status: Value) -> Value {
    let name = attachment_name(&parse(json!({"driver": "d", "volumeHandle": "h"})), node);
    json!({"metadata": {"name": name, "uid": name}, "status": status,
        "spec": {"attacher": "d", "nodeName": node, "source": {"persistentVolumeName": "pv"}}})
}

fn attached(node: &str) -> Value {
    attachment(node, json!({"attached": true}))
}

impl Default for World {
    fn default() -> Self {
        Self {
            pods: vec![pod("p", "n")],
            modes: RWO,
            attach_required: true,
            node: node("n", &[], &[]),
            attachments: Vec::new(),
        }
    }
}

impl World {
    fn controller(self) -> AttachDetachController {
        let claim = json!({"metadata": {"name": "c", "namespace": "ns", "uid": "claim"},
            "spec": {"volumeName": "pv"}, "status": {"phase": "Bound"}});
        let volume = json!({"metadata": {"name": "pv"}, "spec": {"accessModes": self.modes,
            "claimRef": {"namespace": "ns", "name": "c", "uid": "claim"}, "csi": {"driver": "d", "volumeHandle": "h"}}});
        let driver = json!({"metadata": {"name": "d"}, "spec": {"attachRequired": self.attach_required}});
        let volumes = Volumes {
            pods: Informer::fixed(self.pods.into_iter().map(parse)),
            claims: Informer::fixed([parse(claim)]),
            volumes: Informer::fixed([parse(volume)]),
            attachments: Informer::fixed(self.attachments.into_iter().map(parse)),
            drivers: Informer::fixed([parse(driver)]),
        };
        volumes.add_indexes();
        let nodes =
            Informer::fixed([self.node, node("other", &[], &[])].into_iter().filter(|n| !n.is_null()).map(parse));
        AttachDetachController { volumes, nodes, force_detach: true, memory: Mutex::default() }
    }

    fn plan(self) -> Plan {
        look(&self.controller(), 0)
    }
}

fn look(controller: &AttachDetachController, second: i64) -> Plan {
    controller.reconcile(&ObjectKey::cluster("n"), Timestamp::from_second(second).unwrap())
}

/// `create`, `delete`, `list` (what the node says is attached).
fn deeds(plan: &Plan) -> Vec<String> {
    let deed = |write: &Write| match (&write.verb, write.subresource) {
        (apimachinery::controller::Verb::Create, _) => "create".to_owned(),
        (apimachinery::controller::Verb::Delete, _) => "delete".to_owned(),
        _ => format!("list {}", write.body["status"]["volumesAttached"].as_array().map_or(0, Vec::len)),
    };
    plan.writes.iter().map(deed).collect()
}

fn told(plan: &Plan) -> Vec<(&str, &str)> {
    plan.events.iter().map(|event| (event.reason.as_str(), event.message.as_str())).collect()
}

#[test]
fn a_scheduled_pods_volume_is_attached_under_the_name_that_drivers_know() {
    let plan = World::default().plan();
    let body = &plan.writes[0].body;
    assert_eq!(body["spec"], attached("n")["spec"]);
    // sha256("hdn")
    assert_eq!(body["metadata"]["name"], "csi-9072ed11cc1acb5fa433a877ff339b6311d013f33bddd1d0092711a8ace5b16d");
}

#[test]
fn what_needs_no_attaching_is_left_alone() {
    let unscheduled = World { pods: vec![pod("p", "")], ..World::default() };
    let finished = || {
        let mut pod = pod("p", "n");
        pod["status"]["phase"] = json!("Succeeded");
        World { pods: vec![pod], ..World::default() }
    };
    let mut unmanaged = World { node: node("n", &[VOLUME], &[]), ..World::default() };
    unmanaged.node["metadata"]["annotations"] = json!({});
    for world in [unscheduled, finished(), unmanaged, World { attach_required: false, ..World::default() }] {
        assert_eq!(deeds(&world.plan()), [""; 0]);
    }
}

#[test]
fn the_node_lists_what_the_driver_has_attached_and_pods_hear_of_it_once() {
    let world = World { attachments: vec![attached("n")], ..World::default() };
    let plan = world.plan();
    assert_eq!(deeds(&plan), ["list 1"]);
    assert_eq!(told(&plan), [("SuccessfulAttachVolume", "AttachVolume.Attach succeeded for volume \"pv\" ")]);
    let settled = World { attachments: vec![attached("n")], node: node("n", &[VOLUME], &[VOLUME]), ..World::default() };
    assert!(settled.plan().is_empty());
}

#[test]
fn a_drivers_error_is_told_once() {
    let error = json!({"attached": false, "attachError": {"message": "no room"}});
    let controller = World { attachments: vec![attachment("n", error)], ..World::default() }.controller();
    let first = look(&controller, 0);
    assert_eq!(told(&first), [("FailedAttachVolume", "AttachVolume.Attach failed for volume \"pv\" : no room")]);
    assert!(look(&controller, 1).is_empty());
}

#[test]
fn an_exclusive_volume_waits_for_the_other_node() {
    let world = |modes, pods| World { modes, pods, attachments: vec![attached("other")], ..World::default() };
    let both = || vec![pod("p", "n"), pod("q", "other")];
    assert_eq!(deeds(&world(&["ReadWriteMany"], both()).plan()), ["create"]);
    assert_eq!(deeds(&world(&[], both()).plan()), ["create"]);
    let controller = world(RWO, both()).controller();
    let refused = look(&controller, 0);
    assert_eq!(deeds(&refused), [""; 0]);
    let message = "Waiting for detach for volume \"pv\" Volume is already used by pod(s) q";
    assert_eq!(told(&refused), [("FailedAttachVolume", message)]);
    assert!(look(&controller, 1).is_empty());
    let left_behind = world(RWO, vec![pod("p", "n")]).plan();
    assert!(told(&left_behind)[0].1.ends_with("waiting on detach before it can be attached to another node"));
}

#[test]
fn detaching_waits_for_the_kubelet_and_takes_two_steps() {
    let world = |attached_to: &[&str], in_use: &[&str]| World {
        pods: vec![],
        node: node("n", attached_to, in_use),
        attachments: vec![attached("n")],
        ..World::default()
    };
    let mounted = world(&[VOLUME], &[VOLUME]).plan();
    assert_eq!((deeds(&mounted), mounted.again_after), (vec![], Some(MAX_WAIT_FOR_UNMOUNT)));
    assert_eq!(deeds(&world(&[VOLUME], &[]).plan()), ["list 0"]);
    assert_eq!(deeds(&world(&[], &[]).plan()), ["delete"]);
    // The kubelet was faster: the volume is attached after all.
    assert_eq!(deeds(&world(&[], &[VOLUME]).plan()), ["list 1"]);
}

#[test]
fn a_deleted_pod_keeps_its_volume_while_a_container_may_run() {
    let world = |state: Value| {
        let mut pod = pod("p", "n");
        pod["metadata"]["deletionTimestamp"] = json!("1970-01-01T00:00:00Z");
        pod["status"]["containerStatuses"] =
            json!([{"name": "c", "image": "", "imageID": "", "ready": false, "restartCount": 0, "state": state}]);
        World { pods: vec![pod], attachments: vec![attached("n")], ..World::default() }
    };
    assert_eq!(deeds(&world(json!({"running": {}})).plan()), ["list 1"]);
    assert_eq!(deeds(&world(json!({"terminated": {"exitCode": 0}})).plan()), ["delete"]);
}

#[test]
fn a_volume_is_taken_by_force_only_from_nodes_that_are_not_ready() {
    let world = |ready: &str, taints: Value| {
        let mut node = node("n", &[VOLUME], &[VOLUME]);
        node["status"]["conditions"][0]["status"] = json!(ready);
        node["spec"]["taints"] = taints;
        World { pods: vec![], node, attachments: vec![attached("n")], ..World::default() }
    };
    let late = |controller: &AttachDetachController| {
        assert_eq!(deeds(&look(controller, 0)), [""; 0]);
        assert_eq!(deeds(&look(controller, 359)), [""; 0]);
        deeds(&look(controller, 360))
    };
    assert_eq!(late(&world("True", json!([])).controller()), [""; 0]);
    assert_eq!(late(&world("Unknown", json!([])).controller()), ["list 0"]);
    let unforced = AttachDetachController { force_detach: false, ..world("Unknown", json!([])).controller() };
    assert_eq!(late(&unforced), [""; 0]);
    let out_of_service = json!([{"key": OUT_OF_SERVICE, "value": "nodeshutdown", "effect": "NoExecute"}]);
    assert_eq!(deeds(&world("True", out_of_service).plan()), ["list 0"]);
}

#[test]
fn a_node_that_is_gone_has_not_unmounted_what_it_had_in_use() {
    let with = World {
        pods: vec![],
        node: node("n", &[VOLUME], &[VOLUME]),
        attachments: vec![attached("n")],
        ..World::default()
    };
    let controller = with.controller();
    look(&controller, 0);
    let gone = AttachDetachController { nodes: Informer::fixed([]), ..controller };
    assert_eq!(deeds(&look(&gone, 100)), [""; 0]);
    assert_eq!(deeds(&look(&gone, 400)), ["delete"]);
}

#[test]
fn attachments_of_others_stay() {
    let mut foreign = attached("n");
    foreign["metadata"]["name"] = json!("made-by-hand");
    assert!(World { pods: vec![], attachments: vec![foreign], ..World::default() }.plan().is_empty());
}
