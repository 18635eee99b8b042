//! Keeps one pod of the template on every node that the pod may run on, and replaces pods node by node when the
//! template changes.

mod nodes;
mod status;
#[cfg(test)]
mod tests;
mod update;

use std::collections::BTreeMap;
use std::sync::Arc;

use apimachinery::controller::{
    Controller, EventType, Informer, ObjectKey, Plan, Write, controller_of, object_reference,
};
use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{ControllerRevision, DaemonSet};
use k8s_openapi::api::core::v1::{Node, Pod};

use self::nodes::{Placement, pinned_node, placement};
use crate::app::Context;
use crate::common::adoption::claim;
use crate::common::revisions::{self, REVISION_LABEL};
use crate::common::selector::Selector;
use crate::common::template::{create_pod, delete_pod, pod_from_template};
use crate::common::{is_deleted, labels, name, namespace, pods, uid};

/// The most pods created or deleted at one look.
const BURST: usize = 250;

struct DaemonSetController {
    sets: Arc<Informer<DaemonSet>>,
    pods: Arc<Informer<Pod>>,
    nodes: Arc<Informer<Node>>,
    revisions: Arc<Informer<ControllerRevision>>,
}

pub fn start(context: &Context) {
    let informers = context.driver.informers();
    let controller = DaemonSetController {
        sets: informers.of(),
        pods: informers.of(),
        nodes: informers.of(),
        revisions: informers.of(),
    };
    context.driver.run(controller, 2, |controller, wiring| {
        wiring.primary(&controller.sets);
        wiring.owned::<Pod, DaemonSet>(&controller.pods);
        wiring.owned::<ControllerRevision, DaemonSet>(&controller.revisions);
        let sets = controller.sets.clone();
        wiring.map(&controller.pods, move |change| {
            let orphans = change.new.iter().filter(|pod| controller_of(&pod.metadata).is_none());
            orphans.flat_map(|pod| possible_owners(&sets, pod)).collect()
        });
        let sets = controller.sets.clone();
        wiring.map(&controller.nodes, move |change| {
            // Heartbeats are no reason to look.
            let relevant = |node: &Node| {
                let spec = node.spec.as_ref();
                let taints = spec.and_then(|spec| spec.taints.clone());
                (node.metadata.labels.clone(), taints, spec.and_then(|spec| spec.unschedulable))
            };
            let same = matches!((&change.old, &change.new), (Some(old), Some(new)) if relevant(old) == relevant(new));
            if same { Vec::new() } else { sets.list().iter().map(|set| ObjectKey::of(&set.metadata)).collect() }
        });
    });
}

fn possible_owners(sets: &Informer<DaemonSet>, pod: &Pod) -> Vec<ObjectKey> {
    let sets = sets.in_namespace(namespace(&pod.metadata));
    let matching = sets.iter().filter(|set| Selector::of(Some(&set.spec.selector)).matches(labels(&pod.metadata)));
    matching.map(|set| ObjectKey::of(&set.metadata)).collect()
}

/// One look at a daemon set.
struct Look<'a> {
    set: &'a DaemonSet,
    /// The hash of the current template.
    hash: String,
    nodes: Vec<(Arc<Node>, Placement)>,
    /// Owned pods by the node that they run on or are meant for.
    by_node: BTreeMap<String, Vec<Arc<Pod>>>,
    now: Timestamp,
    plan: Plan,
    creations: Vec<Write>,
    deletions: Vec<Write>,
}

impl Controller for DaemonSetController {
    fn name(&self) -> &'static str {
        "daemonset"
    }

    fn component(&self) -> &'static str {
        "daemonset-controller"
    }

    fn reconcile(&self, key: &ObjectKey, now: Timestamp) -> Plan {
        let Some(set) = self.sets.get(key) else { return Plan::nothing() };
        let selector = Selector::of(Some(&set.spec.selector));
        if selector.is_empty() {
            let mut plan = Plan::nothing();
            let message = "This daemon set is selecting all pods. A non-empty selector is required.".to_owned();
            plan.event(object_reference(set.as_ref()), EventType::Warning, "SelectingAll", message);
            return plan;
        }
        if is_deleted(&set.metadata) {
            return Plan::nothing();
        }
        let mut candidates = self.pods.owned_by(uid(&set.metadata));
        let namespaced = self.pods.in_namespace(&key.namespace);
        candidates.extend(namespaced.into_iter().filter(|pod| controller_of(&pod.metadata).is_none()));
        let claim = claim(set.as_ref(), &selector, candidates);
        let collisions = set.status.as_ref().and_then(|status| status.collision_count);
        let history = revisions::history(set.as_ref(), &set.spec.template, collisions, &self.revisions);
        let in_use = |revision: &ControllerRevision| {
            let hash = revisions::hash_of(revision);
            claim.mine.iter().any(|pod| labels(&pod.metadata).get(REVISION_LABEL).is_some_and(|have| have == hash))
        };
        let limit = set.spec.revision_history_limit.unwrap_or(10);
        let mut plan = Plan { writes: claim.writes, ..Plan::default() };
        plan.writes.extend(history.write.clone());
        plan.writes.extend(revisions::truncate(&history, limit, in_use));

        let template = pod_from_template(set.as_ref(), &set.spec.template);
        let mut by_node = BTreeMap::<String, Vec<Arc<Pod>>>::new();
        for pod in claim.mine {
            if let Some(node) = pods::node_name(&pod).or_else(|| pinned_node(&pod)) {
                by_node.entry(node.to_owned()).or_default().push(pod);
            }
        }
        let nodes = self.nodes.list().into_iter().map(|node| {
            let placement = placement(&template, &node);
            (node, placement)
        });
        let mut look = Look {
            set: &set,
            hash: revisions::hash_of(&history.current).to_owned(),
            nodes: nodes.collect(),
            by_node,
            now,
            plan,
            creations: Vec::new(),
            deletions: Vec::new(),
        };
        look.place();
        if look.creations.is_empty() && look.deletions.is_empty() {
            look.update();
        }
        look.finish()
    }
}

impl Look<'_> {
    fn on_node(&self, node: &str) -> &[Arc<Pod>] {
        self.by_node.get(node).map_or(&[], Vec::as_slice)
    }

    /// Pods where they are missing; none where they may not be; never two for long.
    fn place(&mut self) {
        for (node, placement) in self.nodes.clone() {
            let node_name = name(&node.metadata).to_owned();
            let pods = self.on_node(&node_name).to_vec();
            let failed = pods
                .iter()
                .filter(|pod| pods::is_finished(pod) && !is_deleted(&pod.metadata))
                .cloned()
                .collect::<Vec<_>>();
            let mut living: Vec<_> = pods.iter().filter(|pod| !pods::is_finished(pod)).cloned().collect();
            if !placement.may_continue {
                let victims: Vec<_> = living.iter().filter(|pod| !is_deleted(&pod.metadata)).cloned().collect();
                self.delete(&victims);
                continue;
            }
            if !placement.may_run {
                continue;
            }
            self.replace_failed(&failed);
            if living.is_empty() && failed.is_empty() {
                self.create(&node_name);
                continue;
            }
            living.retain(|pod| !is_deleted(&pod.metadata));
            self.delete_duplicates(living);
        }
        // Pods of nodes that are gone are the pod garbage collector's.
    }

    /// An ended pod is deleted; its successor comes once it is gone, so that a pod that cannot run does not spin.
    fn replace_failed(&mut self, failed: &[Arc<Pod>]) {
        for pod in failed {
            let message = format!(
                "Found failed daemon pod {} on node {}, will try to kill it",
                ObjectKey::of(&pod.metadata),
                pods::node_name(pod).unwrap_or("")
            );
            self.plan.event(object_reference(self.set), EventType::Warning, "FailedDaemonPod", message);
        }
        self.delete(failed);
    }

    /// Of several pods on a node the oldest of the newest template stays; during an update with surge one old pod may
    /// stay beside it.
    fn delete_duplicates(&mut self, living: Vec<Arc<Pod>>) {
        let (mut new, mut old): (Vec<_>, Vec<_>) = living.into_iter().partition(|pod| self.is_current(pod));
        let age = |pod: &Arc<Pod>| {
            (!pods::is_ready(pod), pod.metadata.creation_timestamp.clone(), name(&pod.metadata).to_owned())
        };
        new.sort_by_key(age);
        old.sort_by_key(age);
        let keep_old = new.is_empty() || self.max_surge() > 0;
        let victims: Vec<_> = new.into_iter().skip(1).chain(old.into_iter().skip(usize::from(keep_old))).collect();
        self.delete(&victims);
    }

    fn is_current(&self, pod: &Pod) -> bool {
        labels(&pod.metadata).get(REVISION_LABEL).is_some_and(|hash| *hash == self.hash)
    }

    fn create(&mut self, node: &str) {
        if self.creations.len() >= BURST {
            return;
        }
        let mut pod = pod_from_template(self.set, &self.set.spec.template);
        pod.metadata.labels.get_or_insert_default().insert(REVISION_LABEL.to_owned(), self.hash.clone());
        nodes::pin(&mut pod, node);
        nodes::add_tolerations(&mut pod);
        self.creations.push(create_pod(self.set, &pod));
    }

    fn delete(&mut self, victims: &[Arc<Pod>]) {
        let room = BURST.saturating_sub(self.deletions.len());
        self.deletions.extend(victims.iter().take(room).map(|pod| delete_pod(self.set, pod)));
    }

    fn finish(mut self) -> Plan {
        self.report();
        self.plan.writes.append(&mut self.creations);
        self.plan.writes.append(&mut self.deletions);
        self.plan
    }
}
