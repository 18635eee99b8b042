//! The replica sets of a deployment: which one is new, revisions and annotations, creating and removing them.

use std::collections::BTreeMap;
use std::sync::Arc;

use apimachinery::controller::{EventType, ObjectKey, Report, Write, WriteError, object_reference};
use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet, ReplicaSetSpec};
use k8s_openapi::api::core::v1::PodTemplateSpec;
use kube::api::ObjectMeta;
use serde_json::json;

use super::Rollout;
use super::conditions::{self, Progress};
use crate::common::hash::template_hash;
use crate::common::{annotation, controller_reference, is_deleted, name, namespace, uid};

pub const HASH_LABEL: &str = "pod-template-hash";
pub const REVISION: &str = "deployment.kubernetes.io/revision";
const REVISION_HISTORY: &str = "deployment.kubernetes.io/revision-history";
pub const DESIRED: &str = "deployment.kubernetes.io/desired-replicas";
pub const MAX: &str = "deployment.kubernetes.io/max-replicas";
/// Annotations of the deployment that are not for its replica sets.
const OWN_ANNOTATIONS: [&str; 6] = [
    "kubectl.kubernetes.io/last-applied-configuration",
    REVISION,
    REVISION_HISTORY,
    DESIRED,
    MAX,
    "deprecated.deployment.rollback.to",
];

/// The replica set of the current template, and all others, oldest first.
pub struct ReplicaSets {
    pub new: Option<Arc<ReplicaSet>>,
    pub old: Vec<Arc<ReplicaSet>>,
    /// Sizes decided at this look, by uid; they count as if they had taken effect.
    pub sizes: BTreeMap<String, i32>,
}

impl ReplicaSets {
    pub fn sort_out(template: &PodTemplateSpec, mut sets: Vec<Arc<ReplicaSet>>) -> Self {
        sets.sort_by_key(|set| (set.metadata.creation_timestamp.clone(), name(&set.metadata).to_owned()));
        let wanted = without_hash(template);
        let is_new = |set: &Arc<ReplicaSet>| set.spec.template.as_ref().is_some_and(|t| without_hash(t) == wanted);
        // When several are equal the oldest one counts, so that all controllers agree.
        let new = sets.iter().position(is_new).map(|position| sets.remove(position));
        Self { new, old: sets, sizes: BTreeMap::new() }
    }

    pub fn all(&self) -> impl Iterator<Item = &Arc<ReplicaSet>> {
        self.old.iter().chain(&self.new)
    }

    /// The size that the set has or is being given.
    pub fn size(&self, set: &ReplicaSet) -> i32 {
        self.sizes.get(uid(&set.metadata)).copied().unwrap_or_else(|| spec_replicas(set))
    }

    pub fn total(&self) -> i32 {
        self.all().map(|set| self.size(set)).sum()
    }

    pub fn active(&self) -> Vec<Arc<ReplicaSet>> {
        self.all().filter(|set| self.size(set) > 0).cloned().collect()
    }
}

pub fn spec_replicas(set: &ReplicaSet) -> i32 {
    set.spec.replicas.unwrap_or(1)
}

pub fn available(set: &ReplicaSet) -> i32 {
    set.status.as_ref().and_then(|status| status.available_replicas).unwrap_or(0)
}

/// The template without the label that only replica sets' templates have.
fn without_hash(template: &PodTemplateSpec) -> PodTemplateSpec {
    let mut template = template.clone();
    let metadata = template.metadata.get_or_insert_default();
    metadata.creation_timestamp = None;
    if let Some(labels) = &mut metadata.labels {
        labels.remove(HASH_LABEL);
    }
    metadata.labels.take_if(|labels| labels.is_empty());
    metadata.annotations.take_if(|annotations| annotations.is_empty());
    template
}

fn revision(meta: &ObjectMeta) -> i64 {
    annotation(meta, REVISION).and_then(|text| text.parse().ok()).unwrap_or(0)
}

/// The annotations that replica sets have from their deployment.
fn inherited(deployment: &Deployment) -> BTreeMap<String, String> {
    let own = deployment.metadata.annotations.iter().flatten();
    own.filter(|(key, _)| !OWN_ANNOTATIONS.contains(&key.as_str())).map(|(k, v)| (k.clone(), v.clone())).collect()
}

impl Rollout<'_> {
    fn new_revision(&self) -> i64 {
        self.sets.old.iter().map(|set| revision(&set.metadata)).max().unwrap_or(0) + 1
    }

    /// Makes the new set the newest revision and gives it the deployment's annotations.
    pub fn sync_revision(&mut self) {
        let Some(set) = self.sets.new.clone() else { return };
        let mut wanted = inherited(self.deployment);
        let have = revision(&set.metadata);
        let next = self.new_revision().max(have);
        if next != have {
            wanted.insert(REVISION.to_owned(), next.to_string());
            if have > 0 {
                let history = annotation(&set.metadata, REVISION_HISTORY).filter(|text| !text.is_empty());
                let history = history.map_or_else(|| have.to_string(), |text| format!("{text},{have}"));
                wanted.insert(REVISION_HISTORY.to_owned(), history);
            }
        }
        let current = set.metadata.annotations.clone().unwrap_or_default();
        let changed: BTreeMap<_, _> =
            wanted.into_iter().filter(|(key, value)| current.get(key) != Some(value)).collect();
        let min_ready = self.spec.min_ready_seconds.unwrap_or(0);
        let set_min_ready = set.spec.min_ready_seconds.unwrap_or(0);
        if !changed.is_empty() || min_ready != set_min_ready {
            let patch = json!({"metadata": {"uid": set.metadata.uid, "annotations": changed}, "spec": {"minReadySeconds": min_ready}});
            self.plan.push(Write::merge_patch::<ReplicaSet>(ObjectKey::of(&set.metadata), patch));
        }
        self.annotate_revision(next);
        if self.has_deadline() && conditions::find(&self.next, conditions::PROGRESSING).is_none() {
            let message = format!("Found new replica set \"{}\"", name(&set.metadata));
            self.set_progress(Progress::FoundNewReplicaSet, message);
        }
    }

    fn annotate_revision(&mut self, revision: i64) {
        let text = revision.to_string();
        if annotation(&self.deployment.metadata, REVISION) != Some(&text) {
            let patch = json!({"metadata": {"uid": self.deployment.metadata.uid, "annotations": {REVISION: text}}});
            self.plan.push(Write::amend::<Deployment>(ObjectKey::of(&self.deployment.metadata), patch));
        }
    }

    /// The replica set that the template needs, sized as the strategy allows.
    pub fn new_set(&self) -> ReplicaSet {
        let collisions = self.deployment.status.as_ref().and_then(|status| status.collision_count);
        let hash = template_hash(&self.spec.template, collisions);
        let mut template = self.spec.template.clone();
        let labels = template.metadata.get_or_insert_default().labels.get_or_insert_default();
        labels.insert(HASH_LABEL.to_owned(), hash.clone());
        let labels = labels.clone();
        let mut selector = self.spec.selector.clone();
        selector.match_labels.get_or_insert_default().insert(HASH_LABEL.to_owned(), hash.clone());
        let mut annotations = inherited(self.deployment);
        annotations.insert(REVISION.to_owned(), self.new_revision().to_string());
        annotations.insert(DESIRED.to_owned(), self.wanted().to_string());
        annotations.insert(MAX.to_owned(), (self.wanted() + self.max_surge()).to_string());
        ReplicaSet {
            metadata: ObjectMeta {
                name: Some(format!("{}-{hash}", name(&self.deployment.metadata))),
                namespace: Some(namespace(&self.deployment.metadata).to_owned()),
                labels: Some(labels),
                annotations: Some(annotations),
                owner_references: Some(vec![controller_reference(self.deployment)]),
                ..ObjectMeta::default()
            },
            spec: ReplicaSetSpec {
                replicas: Some(self.new_size(0)),
                min_ready_seconds: self.spec.min_ready_seconds,
                selector,
                template: Some(template),
            },
            status: None,
        }
    }

    pub fn create_new_set(&mut self, set: &ReplicaSet) {
        let set_name = name(&set.metadata).to_owned();
        self.plan.push(Write::create(set));
        self.annotate_revision(self.new_revision());
        if spec_replicas(set) > 0 {
            let message = format!("Scaled up replica set {set_name} from 0 to {}", spec_replicas(set));
            self.plan.event(object_reference(self.deployment), EventType::Normal, "ScalingReplicaSet", message);
        }
        if !self.has_deadline() {
            return;
        }
        self.set_progress(Progress::NewReplicaSetCreated, format!("Created new replica set \"{set_name}\""));
        let (deployment, now) = (self.deployment.clone(), self.now);
        self.plan.on_failure = Some(Box::new(move |error: &WriteError| {
            let mut failed = deployment.clone();
            conditions::set_progress(&mut failed, Progress::FailedCreate, error.message(), now);
            Write::status(&deployment, &failed).into_iter().collect()
        }));
    }

    /// The next look will use another hash.
    pub fn count_collision(&mut self) {
        let count = self.next.status.get_or_insert_default().collision_count.get_or_insert(0);
        *count = count.saturating_add(1);
    }

    /// Removes old, empty replica sets beyond the history limit, oldest revision first.
    pub fn clean_up(&mut self) {
        let Some(limit) = self.spec.revision_history_limit.filter(|limit| *limit < i32::MAX) else { return };
        let idle = |set: &Arc<ReplicaSet>| {
            let status = set.status.as_ref();
            self.sets.size(set) == 0
                && status.is_none_or(|status| status.replicas == 0)
                && set.metadata.generation <= status.and_then(|status| status.observed_generation)
                && !is_deleted(&set.metadata)
        };
        let mut removable: Vec<_> = self.sets.old.iter().filter(|set| idle(set)).cloned().collect();
        removable.sort_by_key(|set| revision(&set.metadata));
        let surplus = removable.len().saturating_sub(usize::try_from(limit).unwrap_or(0));
        self.plan.writes.extend(removable[..surplus].iter().map(|set| Write::delete(set.as_ref())));
    }

    /// Gives a set a size, with the annotations that proportional scaling reads; true when the size changes.
    pub fn resize(&mut self, set: &Arc<ReplicaSet>, size: i32) -> bool {
        let current = self.sets.size(set);
        let (desired, max) = (self.wanted().to_string(), (self.wanted() + self.max_surge()).to_string());
        let annotated =
            annotation(&set.metadata, DESIRED) == Some(&desired) && annotation(&set.metadata, MAX) == Some(&max);
        if current == size && annotated {
            return false;
        }
        let patch = json!({
            "metadata": {"uid": set.metadata.uid, "annotations": {DESIRED: desired, MAX: max}},
            "spec": {"replicas": size},
        });
        let mut write = Write::merge_patch::<ReplicaSet>(ObjectKey::of(&set.metadata), patch);
        if current != size {
            let direction = if size > current { "up" } else { "down" };
            let message = format!("Scaled {direction} replica set {} from {current} to {size}", name(&set.metadata));
            write = write.report(Report {
                on: object_reference(self.deployment),
                done: ("ScalingReplicaSet", message),
                failed: ("FailedScaling", "Error scaling: {}".to_owned()),
            });
        }
        self.plan.push(write);
        self.sets.sizes.insert(uid(&set.metadata).to_owned(), size);
        current != size
    }
}
