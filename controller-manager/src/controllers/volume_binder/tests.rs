//! Both sides of binding, and what claims without a volume are told.

use super::*;
use apimachinery::controller::{Controller, Plan, Verb};
use jiff::Timestamp;
use serde_json::{Value, json};

fn parse<T: serde::de::DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).unwrap()
}

/// A free volume, or one that is reserved for a claim whose uid is its name.
fn volume(name: &str, size: &str, claim: Option<&str>) -> Value {
    let reference = claim.map(|claim| json!({"namespace": "ns", "name": claim, "uid": claim}));
    json!({"metadata": {"name": name, "uid": name, "resourceVersion": "1"}, "status": {"phase": "Available"},
        "spec": {"capacity": {"storage": size}, "accessModes": ["ReadWriteOnce"], "claimRef": reference}})
}

fn claim(size: &str, volume: Option<&str>) -> Value {
    json!({"metadata": {"name": "c", "namespace": "ns", "uid": "c", "annotations": {}}, "status": {"phase": "Pending"},
        "spec": {"volumeName": volume, "accessModes": ["ReadWriteOnce"], "storageClassName": "",
            "resources": {"requests": {"storage": size}}}})
}

#[derive(Default)]
struct World {
    claim: Value,
    volumes: Vec<Value>,
    classes: Vec<Value>,
    pods: Vec<Value>,
}

impl World {
    fn binder(self) -> Binder {
        let pods = Informer::fixed(self.pods.into_iter().map(parse));
        index_by_claim(&pods);
        Binder {
            claims: Informer::fixed([parse(self.claim)]),
            volumes: Informer::fixed(self.volumes.into_iter().map(parse)),
            classes: Informer::fixed(self.classes.into_iter().map(parse)),
            pods,
            told: Mutex::default(),
        }
    }

    fn plan(self) -> Plan {
        look(&self.binder())
    }
}

fn look(binder: &Binder) -> Plan {
    binder.reconcile(&ObjectKey::new("ns", "c"), Timestamp::UNIX_EPOCH)
}

fn bound_to(claim: Value, volumes: Vec<Value>) -> Option<String> {
    let plan = World { claim, volumes, ..World::default() }.plan();
    let reserve = plan.writes.iter().find(|write| write.resource.kind == "PersistentVolume");
    reserve.map(|write| write.name.clone())
}

fn told(plan: &Plan) -> Vec<(&str, &str)> {
    plan.events.iter().map(|event| (event.reason.as_str(), event.message.as_str())).collect()
}

#[test]
fn the_smallest_fitting_free_volume_is_bound() {
    let mut many_modes = volume("many", "4Gi", None);
    many_modes["spec"]["accessModes"] = json!(["ReadWriteOnce", "ReadWriteMany"]);
    let mut new = volume("new", "4Gi", None);
    new["status"] = json!({});
    let volumes = || {
        vec![
            volume("big", "10Gi", None),
            volume("small", "1Gi", None),
            volume("right", "5Gi", None),
            volume("taken", "4Gi", Some("other")),
            many_modes.clone(),
            new.clone(),
        ]
    };
    assert_eq!(bound_to(claim("4Gi", None), volumes()).as_deref(), Some("right"));
    assert_eq!(bound_to(claim("4Gi", Some("big")), volumes()).as_deref(), Some("big"));
    assert_eq!(bound_to(claim("40Gi", None), volumes()), None);
    assert_eq!(bound_to(claim("4Gi", Some("taken")), volumes()), None);
    let mut gold = claim("4Gi", None);
    gold["spec"]["volumeAttributesClassName"] = json!("gold");
    assert_eq!(bound_to(gold, volumes()), None);
}

#[test]
fn a_volume_reserved_for_the_claim_goes_before_all_others() {
    let mut reserved = volume("reserved", "50Gi", Some("c"));
    reserved["spec"]["claimRef"]["uid"] = json!(null);
    reserved["spec"]["storageClassName"] = json!("whatever");
    assert_eq!(bound_to(claim("4Gi", None), vec![volume("a", "4Gi", None), reserved]).as_deref(), Some("reserved"));
}

#[test]
fn binding_ends_with_the_status() {
    let world = |claim| World { claim, volumes: vec![volume("v", "5Gi", Some("c"))], ..World::default() };
    let first = world(claim("4Gi", None)).plan();
    assert_eq!(first.writes.len(), 1);
    assert_eq!(first.writes[0].body["spec"]["volumeName"], "v");
    let mut pointed = claim("4Gi", Some("v"));
    pointed["metadata"]["annotations"] = json!({BIND_COMPLETED: "yes"});
    let second = world(pointed.clone()).plan();
    let status = &second.writes[0].body["status"];
    assert_eq!((&status["phase"], &status["capacity"]["storage"]), (&json!("Bound"), &json!("5Gi")));
    // The size of a bound claim is what the node has made of it.
    pointed["status"] = json!({"phase": "Bound", "accessModes": ["ReadWriteOnce"], "capacity": {"storage": "4Gi"}});
    assert!(world(pointed).plan().is_empty());
}

#[test]
fn bound_claims_can_lose_their_volume() {
    let plan = |volumes| {
        let mut bound = claim("4Gi", Some("v"));
        bound["metadata"]["annotations"] = json!({BIND_COMPLETED: "yes"});
        bound["status"]["phase"] = json!("Bound");
        World { claim: bound, volumes, ..World::default() }.plan()
    };
    for (volumes, reason) in [(vec![], "ClaimLost"), (vec![volume("v", "4Gi", Some("other"))], "ClaimMisbound")] {
        let plan = plan(volumes);
        assert_eq!((told(&plan)[0].0, &plan.writes[0].body["status"]["phase"]), (reason, &json!("Lost")));
    }
}

#[test]
fn what_claims_wait_for() {
    let class = |mode: &str, provisioner: &str| json!({"metadata": {"name": "fast"}, "provisioner": provisioner, "volumeBindingMode": mode});
    let of_class = |annotations: Value| {
        let mut claim = claim("4Gi", None);
        claim["spec"]["storageClassName"] = json!("fast");
        claim["metadata"]["annotations"] = annotations;
        claim
    };
    let pod = json!({"metadata": {"name": "p", "namespace": "ns"}, "spec": {"containers": [],
        "volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": "c"}}]}});
    let late = || class("WaitForFirstConsumer", "d");
    let chosen = json!({"volume.kubernetes.io/selected-node": "n"});
    for (claim, classes, pods, reason, asked) in [
        (claim("4Gi", None), vec![], vec![], "FailedBinding", None),
        (of_class(json!({})), vec![], vec![], "ProvisioningFailed", None),
        (
            of_class(json!({})),
            vec![class("Immediate", "kubernetes.io/no-provisioner")],
            vec![],
            "ProvisioningFailed",
            None,
        ),
        (of_class(json!({})), vec![class("Immediate", "d")], vec![], "ExternalProvisioning", Some("d")),
        (
            of_class(json!({})),
            vec![class("Immediate", "kubernetes.io/aws-ebs")],
            vec![],
            "ExternalProvisioning",
            Some("ebs.csi.aws.com"),
        ),
        (of_class(json!({})), vec![late()], vec![], "WaitForFirstConsumer", None),
        (of_class(json!({})), vec![late()], vec![pod], "WaitForPodScheduled", None),
        (of_class(chosen), vec![late()], vec![], "ExternalProvisioning", Some("d")),
    ] {
        let binder = World { claim, classes, pods, ..World::default() }.binder();
        let plan = look(&binder);
        assert_eq!(told(&plan)[0].0, reason);
        let annotations = plan.writes.first().map(|write| write.body["metadata"]["annotations"].clone());
        let expected = asked.map(|d| json!({"volume.kubernetes.io/storage-provisioner": d, "volume.beta.kubernetes.io/storage-provisioner": d}));
        assert_eq!(annotations, expected, "{reason}");
        assert!(look(&binder).events.is_empty(), "told once");
    }
}

#[test]
fn free_volumes_of_late_classes_are_the_schedulers() {
    let class = json!({"metadata": {"name": "fast"}, "provisioner": "d", "volumeBindingMode": "WaitForFirstConsumer"});
    let mut claim = claim("4Gi", None);
    claim["spec"]["storageClassName"] = json!("fast");
    let mut free = volume("v", "4Gi", None);
    free["spec"]["storageClassName"] = json!("fast");
    let world = |volume| World {
        claim: claim.clone(),
        classes: vec![class.clone()],
        volumes: vec![volume],
        ..World::default()
    };
    assert_eq!(told(&world(free.clone()).plan())[0].0, "WaitForFirstConsumer");
    free["spec"]["claimRef"] = json!({"namespace": "ns", "name": "c", "uid": "c"});
    assert_eq!(world(free).plan().writes[0].body["spec"]["volumeName"], "v");
}

#[test]
fn claims_without_a_class_get_the_newest_default() {
    let class = |name: &str, default: &str, created: &str| {
        json!({"metadata": {"name": name, "creationTimestamp": created, "annotations": {"storageclass.kubernetes.io/is-default-class": default}},
            "provisioner": "d", "volumeBindingMode": "Immediate"})
    };
    let mut claim = claim("4Gi", None);
    claim["spec"]["storageClassName"] = json!(null);
    let (old, new) = ("2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z");
    let classes =
        vec![class("a", "true", old), class("b", "true", new), class("c", "true", new), class("d", "false", new)];
    let plan = World { claim, classes, ..World::default() }.plan();
    assert_eq!(plan.writes[0].body["spec"]["storageClassName"], "b");
}

fn phases(volume: Value, claim: Value) -> VolumePhases {
    VolumePhases {
        claims: Informer::fixed([parse(claim)]),
        volumes: Informer::fixed([parse(volume)]),
        missing_since: Mutex::default(),
    }
}

fn turn(phases: &VolumePhases, second: i64) -> Plan {
    phases.reconcile(&ObjectKey::cluster("v"), Timestamp::from_second(second).unwrap())
}

#[test]
fn phases_of_volumes() {
    let with_phase = |mut volume: Value, phase: &str| {
        volume["status"]["phase"] = json!(phase);
        volume
    };
    let mut reserved = volume("v", "1Gi", Some("c"));
    reserved["spec"]["claimRef"]["uid"] = json!(null);
    for (volume, claim, expected) in [
        (with_phase(volume("v", "1Gi", None), "Pending"), claim("1Gi", None), Some("Available")),
        (with_phase(reserved, "Pending"), claim("1Gi", None), Some("Available")),
        (volume("v", "1Gi", Some("c")), claim("1Gi", Some("v")), Some("Bound")),
        (volume("v", "1Gi", Some("c")), claim("1Gi", None), None),
        (with_phase(volume("v", "1Gi", Some("gone")), "Bound"), claim("1Gi", None), Some("Released")),
        (with_phase(volume("v", "1Gi", Some("gone")), "Released"), claim("1Gi", None), None),
    ] {
        let plan = turn(&phases(volume.clone(), claim), 0);
        let phase = plan.writes.first().map(|write| write.body["status"]["phase"].clone());
        assert_eq!(phase, expected.map(|phase| json!(phase)), "{volume}");
    }
}

#[test]
fn new_volumes_wait_for_news_of_their_claims() {
    let phases = phases(volume("v", "1Gi", Some("gone")), claim("1Gi", None));
    assert_eq!(turn(&phases, 0).again_after, Some(std::time::Duration::from_secs(5)));
    assert!(turn(&phases, 3).writes.is_empty());
    assert_eq!(turn(&phases, 5).writes[0].body["status"]["phase"], "Released");
}

#[test]
fn released_volumes_that_nobody_can_delete_have_failed() {
    let plan = |policy: &str, csi: Value| {
        let mut volume = volume("v", "1Gi", Some("gone"));
        volume["status"]["phase"] = json!("Released");
        volume["spec"]["persistentVolumeReclaimPolicy"] = json!(policy);
        volume["spec"]["csi"] = csi;
        turn(&phases(volume, claim("1Gi", None)), 0)
    };
    assert!(plan("Retain", Value::Null).is_empty());
    assert!(plan("Delete", json!({"driver": "d", "volumeHandle": "h"})).is_empty());
    let failed = plan("Delete", Value::Null);
    assert_eq!(
        (told(&failed)[0].0, &failed.writes[0].body["status"]["phase"]),
        ("VolumeFailedDelete", &json!("Failed"))
    );
}

#[test]
fn bindings_that_came_to_nothing_end() {
    let plan = |annotations: Value, policy: &str| {
        let mut volume = volume("v", "1Gi", Some("c"));
        volume["metadata"]["annotations"] = annotations;
        volume["spec"]["persistentVolumeReclaimPolicy"] = json!(policy);
        turn(&phases(volume, claim("1Gi", Some("other"))), 0)
    };
    let ours = plan(json!({BOUND_BY_CONTROLLER: "yes"}), "Retain");
    assert_eq!((&ours.writes[0].verb, &ours.writes[0].body["spec"]["claimRef"]), (&Verb::Amend(None), &Value::Null));
    assert_eq!(plan(json!({}), "Retain").writes[0].body["spec"]["claimRef"], json!({"uid": null}));
    let provisioned = plan(json!({"pv.kubernetes.io/provisioned-by": "d"}), "Delete");
    assert_eq!(provisioned.writes[0].body["status"]["phase"], "Released");
}
