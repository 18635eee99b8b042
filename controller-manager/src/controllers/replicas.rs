//! Keeps the asked number of pods: replica sets and replication controllers, which differ only in their types.

use std::sync::Arc;

use apimachinery::controller::{Controller, Informer, Object, ObjectKey, Plan, Write, WriteError, controller_of};
use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{ReplicaSet, ReplicaSetCondition, ReplicaSetStatus};
use k8s_openapi::api::core::v1::{
    Pod, PodTemplateSpec, ReplicationController, ReplicationControllerCondition, ReplicationControllerStatus,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use crate::app::Context;
use crate::common::adoption::claim;
use crate::common::selector::Selector;
use crate::common::template::{create_pod, delete_pod, pod_from_template};
use crate::common::{is_deleted, labels, namespace, pods, uid};

/// The most pods created or deleted at one look.
const BURST: usize = 500;
const FAILURE: &str = "ReplicaFailure";

/// The condition that tells why pods could not be created or deleted.
#[derive(Clone, Debug, PartialEq)]
pub struct Failure {
    reason: String,
    message: String,
    since: Option<Time>,
}

/// The counts that both kinds report.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Counts {
    replicas: i32,
    fully_labeled: i32,
    ready: i32,
    available: i32,
    /// Only replica sets report it.
    terminating: i32,
}

/// A kind that keeps a number of equal pods.
pub trait ReplicaOwner: Object {
    const NAME: &'static str;
    const COMPONENT: &'static str;
    fn replicas(&self) -> i32;
    fn min_ready_seconds(&self) -> i32;
    fn selector(&self) -> Selector;
    fn template(&self) -> Option<&PodTemplateSpec>;
    fn failure(&self) -> Option<Failure>;
    /// The object with a new status; conditions of other types stay.
    fn with_status(&self, counts: &Counts, failure: Option<Failure>) -> Self;
}

struct ReplicaController<K> {
    owners: Arc<Informer<K>>,
    pods: Arc<Informer<Pod>>,
}

pub fn start_replica_sets(context: &Context) {
    start::<ReplicaSet>(context);
}

pub fn start_replication_controllers(context: &Context) {
    start::<ReplicationController>(context);
}

fn start<K: ReplicaOwner>(context: &Context) {
    let informers = context.driver.informers();
    let controller = ReplicaController::<K> { owners: informers.of(), pods: informers.of() };
    context.driver.run(controller, 5, |controller, wiring| {
        wiring.primary(&controller.owners);
        wiring.owned::<Pod, K>(&controller.pods);
        let owners = controller.owners.clone();
        wiring.map(&controller.pods, move |change| {
            change.versions().flat_map(|pod| possible_owners(&owners, pod)).collect()
        });
    });
}

impl<K: ReplicaOwner> Controller for ReplicaController<K> {
    fn name(&self) -> &'static str {
        K::NAME
    }

    fn component(&self) -> &'static str {
        K::COMPONENT
    }

    fn reconcile(&self, key: &ObjectKey, now: Timestamp) -> Plan {
        let Some(owner) = self.owners.get(key) else { return Plan::nothing() };
        let claim = claim(owner.as_ref(), &owner.selector(), self.candidates(key, owner.as_ref()));
        let mut plan = Plan { writes: claim.writes, ..Plan::default() };
        let active: Vec<_> = claim.mine.iter().filter(|pod| pods::is_active(pod)).cloned().collect();
        if !is_deleted(owner.meta()) {
            self.scale(owner.as_ref(), &active, now, &mut plan);
        }
        let terminating = claim.mine.iter().filter(|pod| is_deleted(&pod.metadata) && !pods::is_finished(pod)).count();
        self.report(&owner, &active, count(terminating), now, &mut plan);
        plan
    }
}

impl<K: ReplicaOwner> ReplicaController<K> {
    /// Owned pods, and the namespace's pods without an owner.
    fn candidates(&self, key: &ObjectKey, owner: &K) -> Vec<Arc<Pod>> {
        let mut candidates = self.pods.owned_by(uid(owner.meta()));
        let orphans =
            self.pods.in_namespace(&key.namespace).into_iter().filter(|pod| controller_of(&pod.metadata).is_none());
        candidates.extend(orphans);
        candidates
    }

    fn scale(&self, owner: &K, active: &[Arc<Pod>], now: Timestamp, plan: &mut Plan) {
        let wanted = usize::try_from(owner.replicas()).unwrap_or(0);
        if active.len() < wanted {
            let Some(template) = owner.template() else { return };
            let pod = pod_from_template(owner, template);
            let missing = (wanted - active.len()).min(BURST);
            plan.writes.extend(std::iter::repeat_with(|| create_pod(owner, &pod)).take(missing));
        } else if active.len() > wanted {
            let surplus = (active.len() - wanted).min(BURST);
            let victims = pods::choose_victims(active.to_vec(), &self.related(owner), surplus, now);
            plan.writes.extend(victims.iter().map(|pod| delete_pod(owner, pod)));
        }
    }

    /// The pods of all owners that share this one's managing owner, such as a deployment's other replica sets.
    fn related(&self, owner: &K) -> Vec<Arc<Pod>> {
        let siblings = match controller_of(owner.meta()) {
            Some(parent) => self.owners.owned_by(&parent.uid),
            None => Vec::new(),
        };
        let mut uids: Vec<_> = siblings.iter().map(|sibling| uid(sibling.meta()).to_owned()).collect();
        if uids.is_empty() {
            uids.push(uid(owner.meta()).to_owned());
        }
        uids.iter().flat_map(|uid| self.pods.owned_by(uid)).collect()
    }

    fn report(&self, owner: &Arc<K>, active: &[Arc<Pod>], terminating: i32, now: Timestamp, plan: &mut Plan) {
        let template_labels = owner.template().and_then(|t| t.metadata.as_ref()).map(labels);
        let mut counts = Counts { replicas: count(active.len()), terminating, ..Counts::default() };
        for pod in active {
            let has_all = template_labels.is_none_or(|wanted| {
                let have = labels(&pod.metadata);
                wanted.iter().all(|(key, value)| have.get(key) == Some(value))
            });
            counts.fully_labeled += i32::from(has_all);
            counts.ready += i32::from(pods::is_ready(pod));
            match pods::availability(pod, owner.min_ready_seconds(), now) {
                Ok(()) => counts.available += 1,
                Err(Some(wait)) => {
                    plan.again_after(wait);
                }
                Err(None) => {}
            }
        }
        let creating = active.len() < usize::try_from(owner.replicas()).unwrap_or(0);
        plan.writes.extend(Write::status(owner.as_ref(), &owner.with_status(&counts, None)));
        let previous = owner.failure();
        let owner = owner.clone();
        plan.on_failure = Some(Box::new(move |error: &WriteError| {
            let reason = if creating { "FailedCreate" } else { "FailedDelete" };
            let message = error.message();
            let since = previous.and_then(|failure| failure.since).unwrap_or(Time(now));
            let failure = Failure { reason: reason.to_owned(), message, since: Some(since) };
            Write::status(owner.as_ref(), &owner.with_status(&counts, Some(failure))).into_iter().collect()
        }));
    }
}

fn count(n: usize) -> i32 {
    i32::try_from(n).unwrap_or(i32::MAX)
}

impl ReplicaOwner for ReplicaSet {
    const NAME: &'static str = "replicaset";
    const COMPONENT: &'static str = "replicaset-controller";

    fn replicas(&self) -> i32 {
        self.spec.replicas.unwrap_or(1)
    }

    fn min_ready_seconds(&self) -> i32 {
        self.spec.min_ready_seconds.unwrap_or(0)
    }

    fn selector(&self) -> Selector {
        Selector::of(Some(&self.spec.selector))
    }

    fn template(&self) -> Option<&PodTemplateSpec> {
        self.spec.template.as_ref()
    }

    fn failure(&self) -> Option<Failure> {
        let condition =
            self.status.as_ref()?.conditions.as_ref()?.iter().find(|c| c.type_.as_deref() == Some(FAILURE))?;
        Some(Failure {
            reason: condition.reason.clone().unwrap_or_default(),
            message: condition.message.clone().unwrap_or_default(),
            since: condition.last_transition_time.clone(),
        })
    }

    fn with_status(&self, counts: &Counts, failure: Option<Failure>) -> Self {
        let mut conditions = self.status.as_ref().and_then(|status| status.conditions.clone()).unwrap_or_default();
        conditions.retain(|condition| condition.type_.as_deref() != Some(FAILURE));
        conditions.extend(failure.map(|failure| ReplicaSetCondition {
            type_: Some(FAILURE.to_owned()),
            status: Some("True".to_owned()),
            reason: Some(failure.reason),
            message: Some(failure.message),
            last_transition_time: failure.since,
        }));
        let status = ReplicaSetStatus {
            replicas: counts.replicas,
            fully_labeled_replicas: non_zero(counts.fully_labeled),
            ready_replicas: non_zero(counts.ready),
            available_replicas: non_zero(counts.available),
            terminating_replicas: Some(counts.terminating),
            observed_generation: self.metadata.generation,
            conditions: (!conditions.is_empty()).then_some(conditions),
        };
        Self { status: Some(status), ..self.clone() }
    }
}

impl ReplicaOwner for ReplicationController {
    const NAME: &'static str = "replicationcontroller";
    const COMPONENT: &'static str = "replication-controller";

    fn replicas(&self) -> i32 {
        self.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1)
    }

    fn min_ready_seconds(&self) -> i32 {
        self.spec.as_ref().and_then(|spec| spec.min_ready_seconds).unwrap_or(0)
    }

    fn selector(&self) -> Selector {
        Selector::of_map(self.spec.as_ref().and_then(|spec| spec.selector.as_ref()))
    }

    fn template(&self) -> Option<&PodTemplateSpec> {
        self.spec.as_ref()?.template.as_ref()
    }

    fn failure(&self) -> Option<Failure> {
        let condition = self.status.as_ref()?.conditions.as_ref()?.iter().find(|c| c.type_ == FAILURE)?;
        Some(Failure {
            reason: condition.reason.clone().unwrap_or_default(),
            message: condition.message.clone().unwrap_or_default(),
            since: condition.last_transition_time.clone(),
        })
    }

    fn with_status(&self, counts: &Counts, failure: Option<Failure>) -> Self {
        let mut conditions = self.status.as_ref().and_then(|status| status.conditions.clone()).unwrap_or_default();
        conditions.retain(|condition| condition.type_ != FAILURE);
        conditions.extend(failure.map(|failure| ReplicationControllerCondition {
            type_: FAILURE.to_owned(),
            status: "True".to_owned(),
            reason: Some(failure.reason),
            message: Some(failure.message),
            last_transition_time: failure.since,
        }));
        let status = ReplicationControllerStatus {
            replicas: counts.replicas,
            fully_labeled_replicas: non_zero(counts.fully_labeled),
            ready_replicas: non_zero(counts.ready),
            available_replicas: non_zero(counts.available),
            observed_generation: self.metadata.generation,
            conditions: (!conditions.is_empty()).then_some(conditions),
        };
        Self { status: Some(status), ..self.clone() }
    }
}

/// The API leaves zero counts out.
fn non_zero(n: i32) -> Option<i32> {
    (n != 0).then_some(n)
}

/// Keys of the owners of `K` in the pod's namespace whose selector matches a pod that nobody owns: one of them may want
/// to adopt it.
fn possible_owners<K: ReplicaOwner>(owners: &Informer<K>, pod: &Pod) -> Vec<ObjectKey> {
    if controller_of(&pod.metadata).is_some() {
        return Vec::new();
    }
    let owners = owners.in_namespace(namespace(&pod.metadata));
    owners
        .iter()
        .filter(|owner| owner.selector().matches(labels(&pod.metadata)))
        .map(|owner| ObjectKey::of(owner.meta()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::common::controller_reference;
    use apimachinery::controller::Verb;
    use serde_json::json;

    fn owner(replicas: i32) -> ReplicaSet {
        serde_json::from_value(json!({
            "metadata": {"name": "web", "namespace": "ns", "uid": "web", "generation": 2},
            "spec": {"replicas": replicas, "selector": {"matchLabels": {"app": "web"}},
                "template": {"metadata": {"labels": {"app": "web"}}, "spec": {"containers": []}}},
        }))
        .unwrap()
    }

    fn pod(name: &str, ready: Option<i64>) -> Pod {
        let mut pod = pods::tests::pod(name, Some("n"), "Running", ready);
        pod.metadata.labels = Some([("app".to_owned(), "web".to_owned())].into());
        pod.metadata.owner_references = Some(vec![controller_reference(&owner(0))]);
        pod
    }

    fn reconcile(owner: ReplicaSet, pods: Vec<Pod>) -> Plan {
        let controller = ReplicaController { owners: Informer::fixed([owner]), pods: Informer::fixed(pods) };
        controller.reconcile(&ObjectKey::new("ns", "web"), Timestamp::from_second(100).unwrap())
    }

    #[test]
    fn missing_pods_are_created_and_surplus_deleted() {
        let verbs = |plan: &Plan| {
            plan.writes
                .iter()
                .filter(|w| w.subresource.is_empty())
                .map(|w| (w.verb.clone(), w.name.clone()))
                .collect::<Vec<_>>()
        };
        let plan = reconcile(owner(3), vec![pod("a", Some(0))]);
        assert_eq!(verbs(&plan), [(Verb::Create, String::new()), (Verb::Create, String::new())]);
        assert_eq!(plan.writes[0].body["metadata"]["generateName"], "web-");
        let plan = reconcile(owner(1), vec![pod("a", Some(0)), pod("b", None)]);
        assert_eq!(verbs(&plan), [(Verb::Delete, "b".to_owned())]);
    }

    #[test]
    fn the_status_counts_and_is_written_only_when_it_differs() {
        let plan = reconcile(owner(2), vec![pod("a", Some(0)), pod("b", None)]);
        let status = plan.writes.iter().find(|w| w.subresource == "status").unwrap().body["status"].clone();
        assert_eq!(
            status,
            json!({"replicas": 2, "fullyLabeledReplicas": 2, "readyReplicas": 1, "availableReplicas": 1, "terminatingReplicas": 0, "observedGeneration": 2})
        );
        let mut settled = owner(2);
        settled.status = serde_json::from_value(status).unwrap();
        assert!(reconcile(settled, vec![pod("a", Some(0)), pod("b", None)]).writes.is_empty());
    }

    #[test]
    fn finished_and_going_pods_are_replaced() {
        let mut failed = pod("a", None);
        failed.status.as_mut().unwrap().phase = Some("Failed".to_owned());
        let mut going = pod("b", None);
        going.metadata.deletion_timestamp = Some(Time(Timestamp::UNIX_EPOCH));
        let plan = reconcile(owner(1), vec![failed, going]);
        assert_eq!(plan.writes.iter().filter(|write| write.verb == Verb::Create).count(), 1);
    }

    #[test]
    fn availability_is_looked_at_again_in_time() {
        let mut patient = owner(1);
        patient.spec.min_ready_seconds = Some(30);
        let plan = reconcile(patient, vec![pod("a", Some(90))]);
        assert_eq!(plan.again_after, Some(std::time::Duration::from_secs(20)));
    }
}
