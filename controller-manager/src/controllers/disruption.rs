//! Says how many pods may be disrupted now: the status of pod disruption budgets, which evictions are checked against.

use std::sync::Arc;
use std::time::Duration;

use apimachinery::controller::{Controller, Informer, ObjectKey, Plan, Write, controller_of};
use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet, StatefulSet};
use k8s_openapi::api::core::v1::{Pod, ReplicationController};
use k8s_openapi::api::policy::v1::{PodDisruptionBudget, PodDisruptionBudgetStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use crate::app::Context;
use crate::common::rollout::resolve;
use crate::common::selector::Selector;
use crate::common::{after, elapsed, is_deleted, labels, name, namespace, pods};

/// An eviction that has not deleted its pod by then is taken to have failed.
const EVICTION_TIMEOUT: Duration = Duration::from_secs(120);
const ALLOWED: &str = "DisruptionAllowed";

struct DisruptionController {
    budgets: Arc<Informer<PodDisruptionBudget>>,
    pods: Arc<Informer<Pod>>,
    deployments: Arc<Informer<Deployment>>,
    replica_sets: Arc<Informer<ReplicaSet>>,
    replication_controllers: Arc<Informer<ReplicationController>>,
    stateful_sets: Arc<Informer<StatefulSet>>,
}

pub fn start(context: &Context) {
    let informers = context.driver.informers();
    let controller = DisruptionController {
        budgets: informers.of(),
        pods: informers.of(),
        deployments: informers.of(),
        replica_sets: informers.of(),
        replication_controllers: informers.of(),
        stateful_sets: informers.of(),
    };
    context.driver.run(controller, 2, |controller, wiring| {
        wiring.primary(&controller.budgets);
        let budgets = controller.budgets.clone();
        wiring.map(&controller.pods, move |change| {
            let of_pod = change.versions().take(1).flat_map(|pod| budgets.in_namespace(namespace(&pod.metadata)));
            let matching =
                of_pod.filter(|budget| change.versions().any(|pod| selector(budget).matches(labels(&pod.metadata))));
            matching.map(|budget| ObjectKey::of(&budget.metadata)).collect()
        });
    });
}

fn selector(budget: &PodDisruptionBudget) -> Selector {
    Selector::of(budget.spec.as_ref().and_then(|spec| spec.selector.as_ref()))
}

impl Controller for DisruptionController {
    fn name(&self) -> &'static str {
        "disruption"
    }

    fn component(&self) -> &'static str {
        "controllermanager"
    }

    fn reconcile(&self, key: &ObjectKey, now: Timestamp) -> Plan {
        let Some(budget) = self.budgets.get(key) else { return Plan::nothing() };
        let selector = selector(&budget);
        let mut pods = self.pods.in_namespace(&key.namespace);
        pods.retain(|pod| selector.matches(labels(&pod.metadata)) && !pods::is_finished(pod));
        let (expected, desired) = self.numbers(&budget, &pods);
        let mut plan = Plan::nothing();
        let mut status = PodDisruptionBudgetStatus {
            observed_generation: budget.metadata.generation,
            expected_pods: Some(expected),
            desired_healthy: Some(desired),
            ..PodDisruptionBudgetStatus::default()
        };
        let old = budget.status.clone().unwrap_or_default();
        // Pods whose eviction was admitted and that are not deleted yet.
        let mut disrupted = old.disrupted_pods.unwrap_or_default();
        disrupted.retain(|pod_name, since| {
            let waits = pods.iter().any(|pod| name(&pod.metadata) == pod_name && !is_deleted(&pod.metadata));
            let due = after(since.0, EVICTION_TIMEOUT);
            if waits && due > now {
                plan.again_after(elapsed(now, due));
            }
            waits && due > now
        });
        let healthy = pods.iter().filter(|pod| {
            pods::is_ready(pod) && !is_deleted(&pod.metadata) && !disrupted.contains_key(name(&pod.metadata))
        });
        let healthy = count(healthy.count());
        let allowed = if expected > 0 { (healthy - desired).max(0) } else { 0 };
        status.current_healthy = Some(healthy);
        status.disruptions_allowed = Some(allowed);
        status.disrupted_pods = (!disrupted.is_empty()).then_some(disrupted);
        status.conditions =
            Some(with_condition(old.conditions.unwrap_or_default(), allowed, budget.metadata.generation, now));
        let next = PodDisruptionBudget { status: Some(status), ..budget.as_ref().clone() };
        plan.writes.extend(Write::status(budget.as_ref(), &next));
        plan
    }
}

impl DisruptionController {
    /// How many pods there should be, and how many of them must be healthy.
    fn numbers(&self, budget: &PodDisruptionBudget, pods: &[Arc<Pod>]) -> (i32, i32) {
        let Some(spec) = &budget.spec else { return (0, 0) };
        match (&spec.max_unavailable, &spec.min_available) {
            (Some(max), _) => {
                let expected = self.expected(pods);
                (expected, (expected - resolve(Some(max), expected, true)).max(0))
            }
            (None, Some(IntOrString::Int(min))) => (count(pods.len()), *min),
            (None, Some(min)) => {
                let expected = self.expected(pods);
                (expected, resolve(Some(min), expected, true))
            }
            (None, None) => (count(pods.len()), 0),
        }
    }

    /// The sum of what the pods' owners ask for.
    fn expected(&self, pods: &[Arc<Pod>]) -> i32 {
        let mut owners = std::collections::BTreeMap::new();
        for pod in pods {
            if let Some(owner) = controller_of(&pod.metadata) {
                let key = ObjectKey::new(namespace(&pod.metadata), &owner.name);
                if let Some((id, scale)) = self.scale(&owner.kind, &key) {
                    owners.insert(id, scale);
                }
            }
        }
        owners.values().sum()
    }

    fn scale(&self, kind: &str, key: &ObjectKey) -> Option<(String, i32)> {
        let scale = match kind {
            "ReplicaSet" => {
                let set = self.replica_sets.get(key)?;
                if let Some(owner) = controller_of(&set.metadata).filter(|owner| owner.kind == "Deployment") {
                    let deployment = self.deployments.get(&ObjectKey::new(&key.namespace, &owner.name))?;
                    return Some((owner.uid.clone(), deployment.spec.replicas.unwrap_or(1)));
                }
                set.spec.replicas
            }
            "StatefulSet" => self.stateful_sets.get(key)?.spec.replicas,
            "ReplicationController" => self.replication_controllers.get(key)?.spec.as_ref()?.replicas,
            _ => return None,
        };
        Some((format!("{kind}/{}", key.name), scale.unwrap_or(1)))
    }
}

fn count(n: usize) -> i32 {
    i32::try_from(n).unwrap_or(i32::MAX)
}

fn with_condition(
    mut conditions: Vec<Condition>,
    allowed: i32,
    generation: Option<i64>,
    now: Timestamp,
) -> Vec<Condition> {
    let (status, reason) = if allowed > 0 { ("True", "SufficientPods") } else { ("False", "InsufficientPods") };
    let old = conditions.iter().position(|condition| condition.type_ == ALLOWED).map(|i| conditions.remove(i));
    let since = old.filter(|old| old.status == status).map_or(Time(now), |old| old.last_transition_time);
    conditions.push(Condition {
        type_: ALLOWED.to_owned(),
        status: status.to_owned(),
        reason: reason.to_owned(),
        message: String::new(),
        observed_generation: generation,
        last_transition_time: since,
    });
    conditions
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    #[test]
    fn how_many_disruptions_are_allowed() {
        let cases = [
            (json!({"minAvailable": 2}), (3, 2, 1)),
            (json!({"minAvailable": "50%"}), (4, 2, 1)),
            (json!({"maxUnavailable": 1}), (4, 3, 0)),
            (json!({"maxUnavailable": "50%"}), (4, 2, 1)),
        ];
        for (mut spec, (expected, desired, allowed)) in cases {
            let text = spec.to_string();
            spec["selector"] = json!({"matchLabels": {"a": "b"}});
            let pods = ["p", "q", "r"].map(|name| {
                let mut pod = pods::tests::pod(name, Some("n"), "Running", Some(0));
                pod.metadata.labels = Some([("a".to_owned(), "b".to_owned())].into());
                pod.metadata.owner_references = serde_json::from_value(json!([{"apiVersion": "apps/v1", "kind": "StatefulSet", "name": "s", "uid": "s", "controller": true}])).unwrap();
                pod
            });
            let parse = |value: Value| serde_json::from_value::<PodDisruptionBudget>(value).unwrap();
            let controller = DisruptionController {
                budgets: Informer::fixed([parse(json!({"metadata": {"name": "b", "namespace": "ns"}, "spec": spec}))]),
                pods: Informer::fixed(pods),
                deployments: Informer::fixed([]),
                replica_sets: Informer::fixed([]),
                replication_controllers: Informer::fixed([]),
                stateful_sets: Informer::fixed([serde_json::from_value::<StatefulSet>(json!({"metadata": {"name": "s", "namespace": "ns"}, "spec": {"replicas": 4, "selector": {}, "template": {}}})).unwrap()]),
            };
            let plan = controller.reconcile(&ObjectKey::new("ns", "b"), Timestamp::UNIX_EPOCH);
            let status = &plan.writes[0].body["status"];
            assert_eq!(
                (&status["expectedPods"], &status["desiredHealthy"], &status["disruptionsAllowed"]),
                (&json!(expected), &json!(desired), &json!(allowed)),
                "{text}"
            );
        }
    }
}
