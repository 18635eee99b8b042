//! Rollouts played through: a fake of the replica set controller takes what the plans write.

use apimachinery::controller::Verb;
use serde_json::{Value, json};

use super::*;
use crate::common::name;

/// A deployment and its replica sets; pods become available when told to.
struct World {
    deployment: Value,
    sets: Vec<Value>,
}

impl World {
    fn new(replicas: i32, strategy: Value) -> Self {
        Self {
            deployment: json!({
                "metadata": {"name": "web", "namespace": "ns", "uid": "d", "generation": 1},
                "spec": {"replicas": replicas, "strategy": strategy, "selector": {"matchLabels": {"app": "web"}},
                    "revisionHistoryLimit": 1, "progressDeadlineSeconds": 600,
                    "template": {"metadata": {"labels": {"app": "web"}}, "spec": {"containers": [{"name": "c", "image": "v1"}]}}},
            }),
            sets: Vec::new(),
        }
    }

    fn image(&mut self, image: &str) {
        self.deployment["spec"]["template"]["spec"]["containers"][0]["image"] = json!(image);
    }

    fn plan(&self, second: i64) -> Plan {
        let controller = DeploymentController {
            deployments: Informer::fixed([serde_json::from_value::<Deployment>(self.deployment.clone()).unwrap()]),
            replica_sets: Informer::fixed(
                self.sets.iter().map(|set| serde_json::from_value::<ReplicaSet>(set.clone()).unwrap()),
            ),
            pods: Informer::fixed([]),
        };
        controller.reconcile(&ObjectKey::new("ns", "web"), Timestamp::from_second(second).unwrap())
    }

    /// Carries out one look.
    fn step(&mut self, second: i64) {
        for write in self.plan(second).writes {
            match (write.verb, write.resource.kind.as_ref()) {
                (Verb::Create, _) => {
                    let mut set = write.body;
                    set["metadata"]["uid"] = json!(format!("uid-{}", self.sets.len()));
                    set["metadata"]["creationTimestamp"] = json!(format!("1970-01-01T00:00:{:02}Z", self.sets.len()));
                    self.sets.push(set);
                }
                (Verb::Delete, _) => self.sets.retain(|set| set["metadata"]["name"] != json!(write.name)),
                (_, "Deployment") => json_patch_merge(&mut self.deployment, &write.body),
                (_, _) => {
                    let set = self.sets.iter_mut().find(|set| set["metadata"]["name"] == json!(write.name)).unwrap();
                    json_patch_merge(set, &write.body);
                }
            }
        }
    }

    /// Replica sets bring their pods up and take them down at once.
    fn pods_follow(&mut self) {
        for set in &mut self.sets {
            let size = set["spec"]["replicas"].clone();
            set["status"] = json!({"replicas": size, "readyReplicas": size, "availableReplicas": size});
        }
    }

    fn sizes(&self) -> Vec<i64> {
        self.sets.iter().map(|set| set["spec"]["replicas"].as_i64().unwrap()).collect()
    }

    fn reason(&self) -> &str {
        let conditions = self.deployment["status"]["conditions"].as_array().unwrap();
        conditions.iter().find(|c| c["type"] == "Progressing").unwrap()["reason"].as_str().unwrap()
    }

    fn settle(&mut self) {
        for second in 0..20 {
            self.step(second);
            self.pods_follow();
        }
    }
}

fn json_patch_merge(target: &mut Value, patch: &Value) {
    let Value::Object(fields) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    for (key, value) in fields {
        if value.is_null() {
            target.as_object_mut().unwrap().remove(key);
        } else {
            json_patch_merge(&mut target[key], value);
        }
    }
}

fn rolling(surge: Value, unavailable: Value) -> Value {
    json!({"type": "RollingUpdate", "rollingUpdate": {"maxSurge": surge, "maxUnavailable": unavailable}})
}

#[test]
fn a_first_rollout_completes() {
    let mut world = World::new(3, rolling(json!("25%"), json!("25%")));
    world.step(0);
    assert_eq!((world.sizes(), world.reason()), (vec![3], "NewReplicaSetCreated"));
    world.pods_follow();
    world.step(1);
    assert_eq!(world.reason(), "NewReplicaSetAvailable");
    assert_eq!(world.deployment["metadata"]["annotations"]["deployment.kubernetes.io/revision"], "1");
    world.step(2);
    assert!(world.plan(3).writes.is_empty(), "a settled deployment asks for nothing");
}

#[test]
fn a_rolling_update_stays_within_its_bounds() {
    let mut world = World::new(4, rolling(json!(1), json!(1)));
    world.settle();
    world.image("v2");
    let mut seen = Vec::new();
    for second in 20..40 {
        world.step(second);
        let sizes = world.sizes();
        assert!(sizes.iter().sum::<i64>() <= 5, "{sizes:?}");
        if seen.last() != Some(&sizes) {
            seen.push(sizes);
        }
        world.pods_follow();
        let available: i64 = world.sizes().iter().sum();
        assert!(available >= 3);
    }
    assert_eq!(seen.first(), Some(&vec![4, 1]));
    assert_eq!(seen.last(), Some(&vec![0, 4]));
    assert_eq!(world.reason(), "NewReplicaSetAvailable");
}

#[test]
fn recreate_never_mixes_templates() {
    let mut world = World::new(2, json!({"type": "Recreate"}));
    world.settle();
    world.image("v2");
    world.step(20);
    assert_eq!(world.sizes(), [0]);
    world.pods_follow();
    world.step(21);
    assert_eq!(world.sizes(), [0, 2]);
}

#[test]
fn going_back_reuses_the_old_set_as_a_new_revision_and_history_is_limited() {
    let mut world = World::new(1, rolling(json!(1), json!(0)));
    world.settle();
    for image in ["v2", "v3"] {
        world.image(image);
        world.settle();
    }
    assert_eq!(world.sizes(), [0, 1], "one old set is kept");
    world.image("v2");
    world.settle();
    assert_eq!(world.sizes(), [1, 0]);
    let annotations = &world.sets[0]["metadata"]["annotations"];
    assert_eq!(annotations["deployment.kubernetes.io/revision"], "4");
    assert_eq!(annotations["deployment.kubernetes.io/revision-history"], "2");
}

#[test]
fn scaling_in_the_middle_of_a_rollout_is_proportional() {
    let mut world = World::new(10, rolling(json!(3), json!(2)));
    world.settle();
    world.image("v2");
    // The new pods never become available.
    for second in 20..24 {
        world.step(second);
        let sizes = world.sizes();
        world.sets[0]["status"] =
            json!({"replicas": sizes[0], "availableReplicas": sizes[0], "readyReplicas": sizes[0]});
        if let Some(new) = world.sets.get_mut(1) {
            new["status"] = json!({"replicas": sizes[1]});
        }
    }
    assert_eq!(world.sizes(), [8, 5]);
    world.deployment["spec"]["replicas"] = json!(15);
    world.step(30);
    assert_eq!(world.sizes(), [11, 7]);
}

#[test]
fn a_rollout_that_does_not_move_is_reported_in_time() {
    let mut world = World::new(1, rolling(json!(1), json!(0)));
    world.step(0);
    world.sets[0]["status"] = json!({"replicas": 1});
    world.step(10);
    assert_eq!(world.reason(), "ReplicaSetUpdated");
    assert_eq!(world.plan(310).again_after, Some(std::time::Duration::from_secs(301)));
    world.step(611);
    assert_eq!(world.reason(), "ProgressDeadlineExceeded");
}

#[test]
fn a_paused_deployment_scales_and_does_not_roll() {
    let mut world = World::new(1, rolling(json!(1), json!(0)));
    world.settle();
    world.deployment["spec"]["paused"] = json!(true);
    world.deployment["spec"]["replicas"] = json!(3);
    world.image("v2");
    world.settle();
    assert_eq!((world.sizes(), world.reason()), (vec![3], "DeploymentPaused"));
}

#[test]
fn a_name_that_is_taken_counts_as_a_collision() {
    let mut world = World::new(1, json!({"type": "Recreate"}));
    world.step(0);
    let mut foreign = world.sets[0].clone();
    foreign["metadata"]["ownerReferences"] =
        json!([{"apiVersion": "v1", "kind": "X", "name": "x", "uid": "x", "controller": true}]);
    let taken = foreign["metadata"]["name"].clone();
    world.sets = vec![foreign];
    world.deployment["status"] = Value::Null;
    world.step(1);
    assert_eq!(world.deployment["status"]["collisionCount"], 1);
    world.step(2);
    assert_eq!(world.sets.len(), 2);
    assert_ne!(world.sets[1]["metadata"]["name"], taken);
    let controller_name = serde_json::from_value::<ReplicaSet>(world.sets[1].clone()).unwrap();
    assert!(name(&controller_name.metadata).starts_with("web-"));
}
