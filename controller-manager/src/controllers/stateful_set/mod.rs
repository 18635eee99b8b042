//! Keeps pods with identities: each has an ordinal, a stable name and its own volume claims. They come in order, go in
//! reverse order, and are updated from the last to the first.

mod identity;
mod status;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;

use apimachinery::controller::{
    Controller, EventType, Informer, ObjectKey, Plan, Report, Write, controller_of, object_reference,
};
use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{ControllerRevision, StatefulSet};
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod};

use self::identity::ordinal_of;
use crate::app::Context;
use crate::common::adoption::claim;
use crate::common::revisions::{self, History, REVISION_LABEL};
use crate::common::rollout::resolve;
use crate::common::selector::Selector;
use crate::common::{is_deleted, labels, name, namespace, pods, uid};

struct StatefulSetController {
    sets: Arc<Informer<StatefulSet>>,
    pods: Arc<Informer<Pod>>,
    claims: Arc<Informer<PersistentVolumeClaim>>,
    revisions: Arc<Informer<ControllerRevision>>,
}

pub fn start(context: &Context) {
    let informers = context.driver.informers();
    let controller = StatefulSetController {
        sets: informers.of(),
        pods: informers.of(),
        claims: informers.of(),
        revisions: informers.of(),
    };
    context.driver.run(controller, 5, |controller, wiring| {
        wiring.primary(&controller.sets);
        wiring.owned::<Pod, StatefulSet>(&controller.pods);
        wiring.owned::<ControllerRevision, StatefulSet>(&controller.revisions);
        let sets = controller.sets.clone();
        wiring.map(&controller.pods, move |change| {
            let orphans = change.new.iter().filter(|pod| controller_of(&pod.metadata).is_none());
            orphans.flat_map(|pod| possible_owners(&sets, pod)).collect()
        });
    });
}

fn possible_owners(sets: &Informer<StatefulSet>, pod: &Pod) -> Vec<ObjectKey> {
    let sets = sets.in_namespace(namespace(&pod.metadata));
    let matching = sets.iter().filter(|set| {
        Selector::of(Some(&set.spec.selector)).matches(labels(&pod.metadata)) && ordinal_of(set, pod).is_some()
    });
    matching.map(|set| ObjectKey::of(&set.metadata)).collect()
}

/// One look at a stateful set.
struct Look<'a> {
    set: &'a StatefulSet,
    claims: &'a Informer<PersistentVolumeClaim>,
    history: History,
    /// The name of the revision that was complete last.
    current_revision: String,
    pods: BTreeMap<i32, Arc<Pod>>,
    now: Timestamp,
    plan: Plan,
    work: Vec<Write>,
}

impl Controller for StatefulSetController {
    fn name(&self) -> &'static str {
        "statefulset"
    }

    fn component(&self) -> &'static str {
        "statefulset-controller"
    }

    fn reconcile(&self, key: &ObjectKey, now: Timestamp) -> Plan {
        let Some(set) = self.sets.get(key) else { return Plan::nothing() };
        let mut candidates = self.pods.owned_by(uid(&set.metadata));
        let namespaced = self.pods.in_namespace(&key.namespace);
        candidates.extend(namespaced.into_iter().filter(|pod| controller_of(&pod.metadata).is_none()));
        candidates.retain(|pod| ordinal_of(&set, pod).is_some());
        let claim = claim(set.as_ref(), &Selector::of(Some(&set.spec.selector)), candidates);
        let collisions = set.status.as_ref().and_then(|status| status.collision_count);
        let history = revisions::history(set.as_ref(), &set.spec.template, collisions, &self.revisions);
        let known =
            set.status.as_ref().and_then(|status| status.current_revision.clone()).filter(|name| !name.is_empty());
        let current_revision = known.unwrap_or_else(|| name(&history.current.metadata).to_owned());
        let pods = claim.mine.iter().filter_map(|pod| Some((ordinal_of(&set, pod)?, pod.clone()))).collect();
        let mut look = Look {
            set: &set,
            claims: &self.claims,
            history,
            current_revision,
            pods,
            now,
            plan: Plan { writes: claim.writes, ..Plan::default() },
            work: Vec::new(),
        };
        if !is_deleted(&set.metadata) {
            look.keep_history();
            look.converge();
        }
        look.finish()
    }
}

impl Look<'_> {
    fn update_revision(&self) -> &str {
        name(&self.history.current.metadata)
    }

    fn start_ordinal(&self) -> i32 {
        self.set.spec.ordinals.as_ref().and_then(|ordinals| ordinals.start).unwrap_or(0)
    }

    fn replicas(&self) -> i32 {
        self.set.spec.replicas.unwrap_or(1)
    }

    fn is_wanted(&self, ordinal: i32) -> bool {
        (self.start_ordinal()..self.start_ordinal().saturating_add(self.replicas())).contains(&ordinal)
    }

    /// Pods come and go one after the other, unless the set is parallel.
    fn is_ordered(&self) -> bool {
        self.set.spec.pod_management_policy.as_deref() != Some("Parallel")
    }

    fn is_available(&self, pod: &Pod) -> bool {
        let min_ready = self.set.spec.min_ready_seconds.unwrap_or(0);
        pods::phase(pod) == "Running" && pods::availability(pod, min_ready, self.now).is_ok()
    }

    fn is_healthy(&self, pod: &Pod) -> bool {
        self.is_available(pod) && !is_deleted(&pod.metadata)
    }

    fn revision_of<'p>(&self, pod: &'p Pod) -> &'p str {
        labels(&pod.metadata).get(REVISION_LABEL).map_or("", String::as_str)
    }

    fn keep_history(&mut self) {
        self.plan.writes.extend(self.history.write.clone());
        let used: Vec<_> = self.pods.values().map(|pod| self.revision_of(pod)).collect();
        let in_use = |revision: &ControllerRevision| {
            let revision = name(&revision.metadata);
            revision == self.current_revision || used.contains(&revision)
        };
        let limit = self.set.spec.revision_history_limit.unwrap_or(10);
        self.plan.writes.extend(revisions::truncate(&self.history, limit, in_use));
    }

    fn converge(&mut self) {
        if self.bring_up() && self.take_down() {
            self.update();
        }
    }

    /// Creates missing pods; answers whether all that must be up before the next step are.
    fn bring_up(&mut self) -> bool {
        let first = self.start_ordinal();
        for ordinal in first..first.saturating_add(self.replicas()) {
            let Some(pod) = self.pods.get(&ordinal).cloned() else {
                self.create(ordinal);
                if self.is_ordered() {
                    return false;
                }
                continue;
            };
            self.keep_claims(ordinal, &pod);
            if pods::is_finished(&pod) && !is_deleted(&pod.metadata) {
                let message = format!(
                    "StatefulSet {} is recreating failed Pod {}",
                    ObjectKey::of(&self.set.metadata),
                    name(&pod.metadata)
                );
                self.plan.event(object_reference(self.set), EventType::Warning, "RecreatingFailedPod", message);
                self.delete(&pod);
                if self.is_ordered() {
                    return false;
                }
            } else if self.is_ordered() && !self.is_healthy(&pod) {
                self.wake_when_available(&pod);
                return false;
            }
        }
        true
    }

    fn wake_when_available(&mut self, pod: &Pod) {
        if let Err(Some(wait)) = pods::availability(pod, self.set.spec.min_ready_seconds.unwrap_or(0), self.now) {
            self.plan.again_after(wait);
        }
    }

    /// Deletes pods beyond the wanted ordinals, the last one first; answers whether none is left.
    fn take_down(&mut self) -> bool {
        let condemned: Vec<_> = self
            .pods
            .iter()
            .rev()
            .filter(|(ordinal, _)| !self.is_wanted(**ordinal))
            .map(|(o, p)| (*o, p.clone()))
            .collect();
        let wanted_are_healthy =
            self.pods.iter().filter(|(o, _)| self.is_wanted(**o)).all(|(_, pod)| self.is_healthy(pod));
        let first_unhealthy =
            condemned.iter().rev().find(|(_, pod)| !self.is_healthy(pod)).map(|(ordinal, _)| *ordinal);
        for (ordinal, pod) in &condemned {
            // An unhealthy pod goes only when no pod before it is unhealthy: the set halts instead of losing more.
            let is_first_unhealthy = wanted_are_healthy && first_unhealthy == Some(*ordinal);
            if self.is_ordered() && !self.is_healthy(pod) && !is_first_unhealthy {
                self.wake_when_available(pod);
                return false;
            }
            if !is_deleted(&pod.metadata) {
                self.give_claims_to_pod(*ordinal, pod);
                self.delete(pod);
            }
            if self.is_ordered() {
                return false;
            }
        }
        condemned.is_empty()
    }

    /// Deletes pods of old revisions, the last ordinal first, as few at once as the strategy says.
    fn update(&mut self) {
        let strategy = self.set.spec.update_strategy.as_ref();
        if strategy.and_then(|strategy| strategy.type_.as_deref()) == Some("OnDelete") {
            return;
        }
        let rolling = strategy.and_then(|strategy| strategy.rolling_update.as_ref());
        let max_unavailable = resolve(rolling.and_then(|r| r.max_unavailable.as_ref()), self.replicas(), true).max(1);
        let first = self.start_ordinal().saturating_add(self.partition());
        let unavailable = self.pods.iter().filter(|(o, pod)| self.is_wanted(**o) && !self.is_healthy(pod)).count();
        let mut budget = max_unavailable.saturating_sub(i32::try_from(unavailable).unwrap_or(i32::MAX));
        let outdated = self.pods.iter().rev().filter(|(ordinal, pod)| {
            **ordinal >= first && self.is_wanted(**ordinal) && self.revision_of(pod) != self.update_revision()
        });
        let outdated: Vec<_> = outdated.map(|(_, pod)| pod.clone()).collect();
        for pod in outdated {
            if is_deleted(&pod.metadata) {
                continue;
            }
            // A pod that does not work is unavailable already; replacing it costs nothing more.
            let costs = self.is_healthy(&pod);
            if costs && budget <= 0 {
                return;
            }
            budget -= i32::from(costs);
            self.delete(&pod);
        }
    }

    fn partition(&self) -> i32 {
        let strategy = self.set.spec.update_strategy.as_ref();
        strategy.and_then(|s| s.rolling_update.as_ref()).and_then(|rolling| rolling.partition).unwrap_or(0)
    }

    fn delete(&mut self, pod: &Pod) {
        let pod_name = name(&pod.metadata);
        let set_name = name(&self.set.metadata);
        self.work.push(Write::delete(pod).report(Report {
            on: object_reference(self.set),
            done: ("SuccessfulDelete", format!("delete Pod {pod_name} in StatefulSet {set_name} successful")),
            failed: ("FailedDelete", format!("delete Pod {pod_name} in StatefulSet {set_name} failed error: {{}}")),
        }));
    }

    fn create(&mut self, ordinal: i32) {
        for claim in self.missing_claims(ordinal) {
            self.work.push(Write::create(&claim).if_absent());
        }
        let pod = self.new_pod(ordinal);
        let (pod_name, set_name) = (name(&pod.metadata), name(&self.set.metadata));
        self.work.push(Write::create(&pod).report(Report {
            on: object_reference(self.set),
            done: ("SuccessfulCreate", format!("create Pod {pod_name} in StatefulSet {set_name} successful")),
            failed: ("FailedCreate", format!("create Pod {pod_name} in StatefulSet {set_name} failed error: {{}}")),
        }));
    }

    fn finish(mut self) -> Plan {
        self.report();
        self.plan.writes.append(&mut self.work);
        self.plan
    }
}
