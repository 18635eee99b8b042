//! Stateful sets played through on a small world.

use apimachinery::controller::Verb;
use serde_json::{Value, json};

use super::*;

struct World {
    set: Value,
    pods: Vec<Value>,
    claims: Vec<Value>,
    revisions: Vec<Value>,
}

impl World {
    fn new(extra: Value) -> Self {
        let mut spec = json!({"replicas": 3, "serviceName": "svc", "selector": {"matchLabels": {"s": "s"}},
            "volumeClaimTemplates": [{"metadata": {"name": "data"}, "spec": {}}],
            "template": {"metadata": {"labels": {"s": "s"}}, "spec": {"containers": [{"name": "c", "image": "1"}]}}});
        for (key, value) in extra.as_object().unwrap() {
            spec[key] = value.clone();
        }
        Self {
            set: json!({"metadata": {"name": "db", "namespace": "ns", "uid": "db"}, "spec": spec}),
            pods: vec![],
            claims: vec![],
            revisions: vec![],
        }
    }

    fn step(&mut self) -> Vec<(Verb, String)> {
        fn parse<T: serde::de::DeserializeOwned>(list: &[Value]) -> Vec<T> {
            list.iter().map(|value| serde_json::from_value(value.clone()).unwrap()).collect()
        }
        let controller = StatefulSetController {
            sets: Informer::fixed(parse::<StatefulSet>(std::slice::from_ref(&self.set))),
            pods: Informer::fixed(parse::<Pod>(&self.pods)),
            claims: Informer::fixed(parse::<PersistentVolumeClaim>(&self.claims)),
            revisions: Informer::fixed(parse::<ControllerRevision>(&self.revisions)),
        };
        let plan = controller.reconcile(&ObjectKey::new("ns", "db"), Timestamp::from_second(100).unwrap());
        let mut done = Vec::new();
        for write in plan.writes {
            let list = match write.resource.kind.as_ref() {
                "StatefulSet" => {
                    self.set["status"] = json!({"currentRevision": write.body["status"]["currentRevision"].as_str()
                        .map_or(self.set["status"]["currentRevision"].clone(), |s| json!(s))});
                    continue;
                }
                "Pod" => &mut self.pods,
                "PersistentVolumeClaim" => &mut self.claims,
                _ => &mut self.revisions,
            };
            if write.resource.kind == "Pod" {
                done.push((write.verb.clone(), write.name.clone()));
            }
            list.retain(|object| object["metadata"]["name"] != json!(write.name));
            if write.verb != Verb::Delete {
                let mut object = write.body;
                object["metadata"]["uid"] = json!(write.name);
                list.push(object);
            }
        }
        done
    }

    fn all_ready(&mut self) {
        for pod in &mut self.pods {
            pod["status"] = json!({"phase": "Running", "conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": "1970-01-01T00:00:00Z"}]});
        }
    }

    fn settle(&mut self) {
        for _ in 0..20 {
            self.step();
            self.all_ready();
        }
    }
}

fn created(name: &str) -> (Verb, String) {
    (Verb::Create, name.to_owned())
}

fn deleted(name: &str) -> (Verb, String) {
    (Verb::Delete, name.to_owned())
}

#[test]
fn pods_come_in_order_with_identity_and_claims() {
    let mut world = World::new(json!({}));
    assert_eq!(world.step(), [created("db-0")]);
    assert!(world.step().is_empty(), "db-0 is not ready");
    world.all_ready();
    assert_eq!(world.step(), [created("db-1")]);
    let pod = &world.pods[1];
    assert_eq!((&pod["spec"]["hostname"], &pod["spec"]["subdomain"]), (&json!("db-1"), &json!("svc")));
    assert_eq!(pod["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"], "data-db-1");
    assert_eq!(pod["metadata"]["labels"]["apps.kubernetes.io/pod-index"], "1");
    assert_eq!(world.claims.len(), 2);
}

#[test]
fn parallel_sets_do_not_wait() {
    let mut world = World::new(json!({"podManagementPolicy": "Parallel"}));
    assert_eq!(world.step(), [created("db-0"), created("db-1"), created("db-2")]);
    world.all_ready();
    world.set["spec"]["replicas"] = json!(1);
    assert_eq!(world.step(), [deleted("db-2"), deleted("db-1")]);
}

#[test]
fn scaling_down_goes_backwards_and_keeps_claims() {
    let mut world = World::new(json!({}));
    world.settle();
    world.set["spec"]["replicas"] = json!(1);
    assert_eq!(world.step(), [deleted("db-2")]);
    assert_eq!(world.step(), [deleted("db-1")]);
    assert!(world.step().is_empty());
    assert_eq!(world.claims.len(), 3);
}

#[test]
fn scaling_down_halts_while_a_pod_before_is_unhealthy() {
    for (unready, replicas, expected) in [
        (&["db-0", "db-1", "db-2"][..], 0, &[][..]),
        (&["db-0", "db-2"], 1, &[]),
        (&["db-2"], 0, &["db-2"]),
        (&["db-0"], 0, &["db-2"]),
    ] {
        let mut world = World::new(json!({}));
        world.settle();
        for pod in &mut world.pods {
            if unready.iter().any(|name| pod["metadata"]["name"] == *name) {
                pod["status"]["conditions"][0]["status"] = json!("False");
            }
        }
        world.set["spec"]["replicas"] = json!(replicas);
        let expected: Vec<_> = expected.iter().copied().map(deleted).collect();
        assert_eq!(world.step(), expected, "{unready:?} to {replicas}");
    }
}

#[test]
fn updates_go_backwards_down_to_the_partition() {
    let mut world = World::new(json!({"updateStrategy": {"type": "RollingUpdate", "rollingUpdate": {"partition": 1}}}));
    world.settle();
    world.set["spec"]["template"]["spec"]["containers"][0]["image"] = json!("2");
    assert_eq!(world.step(), [deleted("db-2")]);
    assert_eq!(world.step(), [created("db-2")]);
    assert!(world.step().is_empty());
    world.all_ready();
    assert_eq!(world.step(), [deleted("db-1")]);
    world.settle();
    let image = |world: &World, name: &str| {
        world.pods.iter().find(|pod| pod["metadata"]["name"] == name).unwrap()["spec"]["containers"][0]["image"].clone()
    };
    assert_eq!((image(&world, "db-0"), image(&world, "db-1")), (json!("1"), json!("2")));
    world.pods.retain(|pod| pod["metadata"]["name"] != "db-0");
    world.settle();
    assert_eq!(image(&world, "db-0"), json!("1"), "below the partition the old revision is kept");
}

#[test]
fn failed_pods_are_replaced() {
    let mut world = World::new(json!({"replicas": 1}));
    world.settle();
    world.pods[0]["status"]["phase"] = json!("Failed");
    assert_eq!(world.step(), [deleted("db-0")]);
    assert_eq!(world.step(), [created("db-0")]);
}
