//! Rolls out pod templates: each template has a replica set, and the deployment moves its replicas from the old ones to
//! the new one by its strategy, keeps revisions for rollbacks, and reports progress.
//!
//! It never touches pods: replica sets do.

mod conditions;
mod replica_sets;
mod scaling;
mod status;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use apimachinery::controller::{
    Controller, EventType, Informer, ObjectKey, Plan, Write, controller_of, object_reference,
};
use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{Deployment, DeploymentSpec, ReplicaSet};
use k8s_openapi::api::core::v1::Pod;

use crate::app::Context;
use crate::common::adoption::claim;
use crate::common::selector::Selector;
use crate::common::{is_deleted, labels, namespace, pods, uid};
use replica_sets::ReplicaSets;

struct DeploymentController {
    deployments: Arc<Informer<Deployment>>,
    replica_sets: Arc<Informer<ReplicaSet>>,
    pods: Arc<Informer<Pod>>,
}

pub fn start(context: &Context) {
    let informers = context.driver.informers();
    let controller =
        DeploymentController { deployments: informers.of(), replica_sets: informers.of(), pods: informers.of() };
    context.driver.run(controller, 5, |controller, wiring| {
        wiring.primary(&controller.deployments);
        wiring.owned::<ReplicaSet, Deployment>(&controller.replica_sets);
        let deployments = controller.deployments.clone();
        wiring.map(&controller.replica_sets, move |change| {
            let orphans = change.new.iter().filter(|set| controller_of(&set.metadata).is_none());
            orphans.flat_map(|set| possible_owners(&deployments, set)).collect()
        });
        // Recreate waits for the last old pod to go.
        let sets = controller.replica_sets.clone();
        wiring.map(&controller.pods, move |change| match (&change.old, &change.new) {
            (Some(gone), None) => deployment_of(&sets, gone).into_iter().collect(),
            _ => Vec::new(),
        });
    });
}

fn possible_owners(deployments: &Informer<Deployment>, set: &ReplicaSet) -> Vec<ObjectKey> {
    let candidates = deployments.in_namespace(namespace(&set.metadata));
    let matching = candidates
        .iter()
        .filter(|deployment| Selector::of(Some(&deployment.spec.selector)).matches(labels(&set.metadata)));
    matching.map(|deployment| ObjectKey::of(&deployment.metadata)).collect()
}

fn deployment_of(sets: &Informer<ReplicaSet>, pod: &Pod) -> Option<ObjectKey> {
    let owner = controller_of(&pod.metadata)?;
    let set = sets.get(&ObjectKey::new(namespace(&pod.metadata), &owner.name))?;
    let deployment = controller_of(&set.metadata).filter(|owner| owner.kind == "Deployment")?;
    Some(ObjectKey::new(namespace(&pod.metadata), &deployment.name))
}

/// One look at a deployment: what it is, what it has, and what follows.
struct Rollout<'a> {
    deployment: &'a Deployment,
    spec: &'a DeploymentSpec,
    sets: ReplicaSets,
    /// The status to be written at the end, conditions included.
    next: Deployment,
    now: Timestamp,
    plan: Plan,
}

impl Controller for DeploymentController {
    fn name(&self) -> &'static str {
        "deployment"
    }

    fn component(&self) -> &'static str {
        "deployment-controller"
    }

    fn reconcile(&self, key: &ObjectKey, now: Timestamp) -> Plan {
        let Some(deployment) = self.deployments.get(key) else { return Plan::nothing() };
        let spec = &deployment.spec;
        let selector = Selector::of(Some(&spec.selector));
        if selector.is_empty() {
            let mut plan = Plan::nothing();
            let message = "This deployment is selecting all pods. A non-empty selector is required.".to_owned();
            plan.event(object_reference(deployment.as_ref()), EventType::Warning, "SelectingAll", message);
            return plan;
        }
        let mut candidates = self.replica_sets.owned_by(uid(&deployment.metadata));
        let namespaced = self.replica_sets.in_namespace(&key.namespace);
        candidates.extend(namespaced.into_iter().filter(|set| controller_of(&set.metadata).is_none()));
        let claim = claim(deployment.as_ref(), &selector, candidates);

        let mut rollout = Rollout {
            deployment: &deployment,
            spec,
            sets: ReplicaSets::sort_out(&spec.template, claim.mine),
            next: deployment.as_ref().clone(),
            now,
            plan: Plan { writes: claim.writes, ..Plan::default() },
        };
        self.roll(key, &mut rollout);
        rollout.plan
    }
}

impl DeploymentController {
    fn roll(&self, key: &ObjectKey, rollout: &mut Rollout<'_>) {
        if is_deleted(&rollout.deployment.metadata) {
            return rollout.finish();
        }
        rollout.note_pause();
        if rollout.spec.paused == Some(true) {
            rollout.sync_revision();
            rollout.scale_proportionally();
            rollout.clean_up();
            return rollout.finish();
        }
        if rollout.is_scaling() {
            rollout.sync_revision();
            rollout.scale_proportionally();
            return rollout.finish();
        }
        let recreate = rollout.spec.strategy.as_ref().and_then(|s| s.type_.as_deref()) == Some("Recreate");
        if recreate {
            self.recreate(key, rollout)
        } else {
            self.rolling_update(key, rollout)
        }
        if rollout.is_complete() {
            rollout.clean_up();
        }
        rollout.finish();
    }

    fn rolling_update(&self, key: &ObjectKey, rollout: &mut Rollout<'_>) {
        if !self.ensure_new_set(key, rollout) {
            return;
        }
        if !rollout.scale_up_new() {
            rollout.scale_down_old();
        }
    }

    /// First all old pods go, then the new ones come.
    fn recreate(&self, key: &ObjectKey, rollout: &mut Rollout<'_>) {
        rollout.sync_revision();
        if rollout.scale_old_to_zero() || self.old_pods_run(rollout) {
            return;
        }
        if self.ensure_new_set(key, rollout) {
            rollout.scale_new_to(rollout.wanted());
        }
    }

    fn old_pods_run(&self, rollout: &Rollout<'_>) -> bool {
        let old = rollout.sets.old.iter();
        old.flat_map(|set| self.pods.owned_by(uid(&set.metadata))).any(|pod| !pods::is_finished(&pod))
    }

    /// Creates the replica set of the template if it is missing; true when it was already there.
    fn ensure_new_set(&self, key: &ObjectKey, rollout: &mut Rollout<'_>) -> bool {
        if rollout.sets.new.is_some() {
            rollout.sync_revision();
            return true;
        }
        let set = rollout.new_set();
        let name = ObjectKey::new(&key.namespace, crate::common::name(&set.metadata));
        if self.replica_sets.get(&name).is_some() {
            // Another template has the same hash: count the collision and try the next hash.
            rollout.count_collision();
            return false;
        }
        rollout.create_new_set(&set);
        false
    }
}

impl Rollout<'_> {
    /// The asked number of replicas.
    fn wanted(&self) -> i32 {
        self.spec.replicas.unwrap_or(1)
    }

    /// Ends the look: reports what there is.
    fn finish(&mut self) {
        self.report();
        if let Some(write) = Write::status(self.deployment, &self.next) {
            self.plan.push(write);
        }
    }
}
