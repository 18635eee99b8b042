//! What belongs to an ordinal: the pod's name, its labels, and its volume claims.

use apimachinery::controller::{ObjectKey, Write};
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{
    PersistentVolumeClaim, PersistentVolumeClaimVolumeSource, Pod, PodTemplateSpec, Volume,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::Resource;
use serde_json::json;

use super::Look;
use crate::common::revisions::{REVISION_LABEL, template_of};
use crate::common::template::pod_from_template;
use crate::common::{controller_reference, is_deleted, name, namespace};

const POD_NAME: &str = "statefulset.kubernetes.io/pod-name";
const POD_INDEX: &str = "apps.kubernetes.io/pod-index";

/// The ordinal in the pod's name, if the name is one of the set's.
pub fn ordinal_of(set: &StatefulSet, pod: &Pod) -> Option<i32> {
    let digits = name(&pod.metadata).strip_prefix(name(&set.metadata))?.strip_prefix('-')?;
    let canonical = digits == "0" || !digits.starts_with('0') && digits.bytes().all(|b| b.is_ascii_digit());
    digits.parse().ok().filter(|_| canonical)
}

impl Look<'_> {
    fn pod_name(&self, ordinal: i32) -> String {
        format!("{}-{ordinal}", name(&self.set.metadata))
    }

    /// The pod of an ordinal, of the revision that the update strategy holds it at.
    pub fn new_pod(&self, ordinal: i32) -> Pod {
        let (template, revision) = self.template_for(ordinal);
        let mut pod = pod_from_template(self.set, &template);
        let pod_name = self.pod_name(ordinal);
        pod.metadata.generate_name = None;
        pod.metadata.name = Some(pod_name.clone());
        let labels = pod.metadata.labels.get_or_insert_default();
        labels.insert(POD_NAME.to_owned(), pod_name.clone());
        labels.insert(POD_INDEX.to_owned(), ordinal.to_string());
        labels.insert(REVISION_LABEL.to_owned(), revision);
        if let Some(spec) = &mut pod.spec {
            spec.hostname = Some(pod_name);
            spec.subdomain = self.set.spec.service_name.clone().filter(|service| !service.is_empty());
            let claims = self.claim_names(ordinal);
            let volumes = spec.volumes.get_or_insert_default();
            volumes.retain(|volume| !claims.iter().any(|(template, _)| *template == volume.name));
            volumes.extend(claims.into_iter().map(|(template, claim_name)| Volume {
                name: template,
                persistent_volume_claim: Some(PersistentVolumeClaimVolumeSource { claim_name, read_only: None }),
                ..Volume::default()
            }));
        }
        pod
    }

    fn template_for(&self, ordinal: i32) -> (PodTemplateSpec, String) {
        let newest = (self.set.spec.template.clone(), self.update_revision().to_owned());
        let strategy = self.set.spec.update_strategy.as_ref();
        let rolls = strategy.and_then(|strategy| strategy.type_.as_deref()) != Some("OnDelete");
        if !rolls || ordinal >= self.start_ordinal().saturating_add(self.partition()) {
            return newest;
        }
        let held = self.history.all.iter().find(|revision| name(&revision.metadata) == self.current_revision);
        held.and_then(|revision| template_of(revision))
            .map_or(newest, |template| (template, self.current_revision.clone()))
    }

    /// Names of claim templates and of the ordinal's claims.
    fn claim_names(&self, ordinal: i32) -> Vec<(String, String)> {
        let templates = self.set.spec.volume_claim_templates.iter().flatten();
        templates
            .map(|template| {
                let template = name(&template.metadata).to_owned();
                let claim = format!("{template}-{}", self.pod_name(ordinal));
                (template, claim)
            })
            .collect()
    }

    fn deletes_claims(
        &self,
        when: fn(&k8s_openapi::api::apps::v1::StatefulSetPersistentVolumeClaimRetentionPolicy) -> Option<&String>,
    ) -> bool {
        self.set
            .spec
            .persistent_volume_claim_retention_policy
            .as_ref()
            .and_then(when)
            .is_some_and(|policy| policy == "Delete")
    }

    pub fn missing_claims(&self, ordinal: i32) -> Vec<PersistentVolumeClaim> {
        let templates = self.set.spec.volume_claim_templates.iter().flatten();
        let mut missing = Vec::new();
        for (template, (_, claim_name)) in templates.zip(self.claim_names(ordinal)) {
            if self.claims.get(&ObjectKey::new(namespace(&self.set.metadata), &claim_name)).is_some() {
                continue;
            }
            let mut claim = template.clone();
            claim.metadata.name = Some(claim_name);
            claim.metadata.namespace = Some(namespace(&self.set.metadata).to_owned());
            let selected = self.set.spec.selector.match_labels.clone().unwrap_or_default();
            claim.metadata.labels.get_or_insert_default().extend(selected);
            if self.deletes_claims(|policy| policy.when_deleted.as_ref()) {
                claim.metadata.owner_references = Some(vec![controller_reference(self.set)]);
            }
            claim.status = None;
            missing.push(claim);
        }
        missing
    }

    /// Missing claims of a pod that waits for them come back; owners follow the retention policy.
    pub fn keep_claims(&mut self, ordinal: i32, pod: &Pod) {
        if !is_deleted(&pod.metadata) {
            let missing = self.missing_claims(ordinal);
            self.work.extend(missing.iter().map(|claim| Write::create(claim).if_absent()));
        }
        if self.set.spec.persistent_volume_claim_retention_policy.is_some() {
            let owner =
                self.deletes_claims(|policy| policy.when_deleted.as_ref()).then(|| controller_reference(self.set));
            self.own_claims(ordinal, owner.as_ref());
        }
    }

    /// When scaling down deletes claims, they go with the pod.
    pub fn give_claims_to_pod(&mut self, ordinal: i32, pod: &Pod) {
        if self.deletes_claims(|policy| policy.when_scaled.as_ref()) {
            let owner = OwnerReference { block_owner_deletion: None, ..controller_reference(pod) };
            self.own_claims(ordinal, Some(&owner));
        }
    }

    /// Makes `owner` the only one of our kind that the ordinal's claims belong to.
    fn own_claims(&mut self, ordinal: i32, owner: Option<&OwnerReference>) {
        for (_, claim_name) in self.claim_names(ordinal) {
            let key = ObjectKey::new(namespace(&self.set.metadata), &claim_name);
            let Some(claim) = self.claims.get(&key) else { continue };
            let current = claim.meta().owner_references.clone().unwrap_or_default();
            let ours = |reference: &OwnerReference| {
                reference.kind == "StatefulSet" && reference.name == name(&self.set.metadata)
                    || reference.kind == "Pod" && reference.name == self.pod_name(ordinal)
            };
            let mut wanted: Vec<_> = current.iter().filter(|reference| !ours(reference)).cloned().collect();
            wanted.extend(owner.cloned());
            if wanted != current {
                let meta = json!({"uid": claim.metadata.uid, "resourceVersion": claim.metadata.resource_version, "ownerReferences": wanted});
                self.work.push(Write::amend::<PersistentVolumeClaim>(key, json!({"metadata": meta})));
            }
        }
    }
}
