//! The side of the claims: each is brought to a volume step by step, and told what it waits for. Any step can be
//! repeated, and the next look at the claim takes the next one.

use std::collections::HashMap;
use std::sync::Arc;

use apimachinery::controller::{Controller, EventType, Informer, ObjectKey, Plan, Write, object_reference};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim, PersistentVolumeClaimSpec, Pod};
use k8s_openapi::api::storage::v1::StorageClass;
use parking_lot::Mutex;
use serde_json::json;

use super::matching::{best_match, why_not};
use super::provision::{Note, OLD_PROVISIONER, PROVISIONER, Step};
use super::{BIND_COMPLETED, BOUND_BY_CONTROLLER, claim_phase, claim_ref, refers_to};
use crate::common::{annotation, is_deleted, name, uid};

pub struct Binder {
    pub claims: Arc<Informer<PersistentVolumeClaim>>,
    pub volumes: Arc<Informer<PersistentVolume>>,
    pub classes: Arc<Informer<StorageClass>>,
    pub pods: Arc<Informer<Pod>>,
    /// What claims were told last: looking again is no news.
    pub told: Mutex<HashMap<ObjectKey, String>>,
}

impl Controller for Binder {
    fn name(&self) -> &'static str {
        "persistentvolume-binder"
    }

    fn component(&self) -> &'static str {
        "persistentvolume-controller"
    }

    fn reconcile(&self, key: &ObjectKey, _: Timestamp) -> Plan {
        let claim = self.claims.get(key).filter(|claim| !is_deleted(&claim.metadata));
        let Some((claim, spec)) = claim.as_deref().and_then(|claim| Some((claim, claim.spec.as_ref()?))) else {
            self.told.lock().remove(key);
            return Plan::nothing();
        };
        let volume = spec.volume_name.as_deref().filter(|volume| !volume.is_empty());
        if annotation(&claim.metadata, BIND_COMPLETED).is_some() {
            return self.bound(claim, volume);
        }
        match volume {
            Some(volume) => self.named(key, claim, spec, volume),
            None => match best_match(&self.volumes, claim, spec, self.waits_for_a_pod(claim)) {
                Some(volume) => bind(claim, &volume),
                None => self.unmatched(key, claim),
            },
        }
    }
}

impl Binder {
    /// A claim that was bound before.
    fn bound(&self, claim: &PersistentVolumeClaim, volume: Option<&str>) -> Plan {
        let Some(volume) = volume else {
            let message = "Bound claim has lost reference to PersistentVolume. Data on the volume is lost!";
            return lose(claim, "ClaimLost", message);
        };
        let Some(volume) = self.volumes.get(&ObjectKey::cluster(volume)) else {
            return lose(claim, "ClaimLost", "Bound claim has lost its PersistentVolume. Data on the volume is lost!");
        };
        match claim_ref(&volume) {
            Some(reference) if reference.uid.as_deref() != Some(uid(&claim.metadata)) => {
                let message = "Two claims are bound to the same volume, this one is bound incorrectly";
                lose(claim, "ClaimMisbound", message)
            }
            _ => bind(claim, &volume),
        }
    }

    /// A claim that asks for this volume and no other.
    fn named(
        &self,
        key: &ObjectKey,
        claim: &PersistentVolumeClaim,
        spec: &PersistentVolumeClaimSpec,
        volume: &str,
    ) -> Plan {
        let mut plan = wait(claim);
        let Some(found) = self.volumes.get(&ObjectKey::cluster(volume)) else { return plan };
        if refers_to(&found, claim) {
            return bind(claim, &found);
        }
        let (reason, message) = if claim_ref(&found).is_some() {
            ("FailedBinding", format!("volume \"{volume}\" already bound to a different claim."))
        } else if let Some(why) = why_not(&found, claim, spec) {
            ("VolumeMismatch", format!("Cannot bind to requested volume \"{volume}\": {why}"))
        } else {
            return bind(claim, &found);
        };
        self.tell(key, claim, Note { type_: EventType::Warning, reason, message }, &mut plan);
        plan
    }

    /// A claim that no volume fits.
    fn unmatched(&self, key: &ObjectKey, claim: &PersistentVolumeClaim) -> Plan {
        let amend = |patch| Plan::write(Write::amend::<PersistentVolumeClaim>(key.clone(), patch));
        match self.without_volume(claim) {
            Step::Class(class) => {
                amend(json!({"metadata": {"uid": claim.metadata.uid}, "spec": {"storageClassName": class}}))
            }
            Step::Wait(note) => {
                let mut plan = wait(claim);
                self.tell(key, claim, note, &mut plan);
                plan
            }
            Step::Ask(provisioner, note) => {
                let mut plan = Plan::nothing();
                if annotation(&claim.metadata, PROVISIONER) != Some(provisioner.as_str()) {
                    let asked = json!({PROVISIONER: provisioner, OLD_PROVISIONER: provisioner});
                    plan = amend(json!({"metadata": {"uid": claim.metadata.uid, "annotations": asked}}));
                }
                self.tell(key, claim, note, &mut plan);
                plan
            }
        }
    }

    fn tell(&self, key: &ObjectKey, claim: &PersistentVolumeClaim, note: Note, plan: &mut Plan) {
        if self.told.lock().insert(key.clone(), note.message.clone()).as_ref() != Some(&note.message) {
            plan.event(object_reference(claim), note.type_, note.reason, note.message);
        }
    }
}

/// The claim says that it waits.
fn wait(claim: &PersistentVolumeClaim) -> Plan {
    has_nothing(claim, "Pending")
}

/// The claim says that it has no volume.
fn has_nothing(claim: &PersistentVolumeClaim, phase: &str) -> Plan {
    let mut next = claim.clone();
    let status = next.status.get_or_insert_default();
    status.phase = Some(phase.to_owned());
    status.access_modes = None;
    status.capacity = None;
    status.current_volume_attributes_class_name = None;
    Plan { writes: Write::status(claim, &next).into_iter().collect(), ..Plan::default() }
}

/// First the volume is reserved, then the claim is pointed to it, then the claim says so.
fn bind(claim: &PersistentVolumeClaim, volume: &PersistentVolume) -> Plan {
    let mut plan = Plan::nothing();
    let volume_name = name(&volume.metadata);
    let complete = claim_ref(volume).is_some_and(|reference| reference.uid.as_deref() == Some(uid(&claim.metadata)));
    if !complete {
        let reference = json!({"kind": "PersistentVolumeClaim", "apiVersion": "v1", "namespace": claim.metadata.namespace,
            "name": claim.metadata.name, "uid": claim.metadata.uid, "resourceVersion": claim.metadata.resource_version});
        let mut patch =
            json!({"metadata": {"resourceVersion": volume.metadata.resource_version}, "spec": {"claimRef": reference}});
        if claim_ref(volume).is_none() {
            patch["metadata"]["annotations"] = json!({BOUND_BY_CONTROLLER: "yes"});
        }
        plan.push(Write::amend::<PersistentVolume>(ObjectKey::cluster(volume_name), patch));
    }
    let pointed = claim.spec.as_ref().and_then(|spec| spec.volume_name.as_deref()) == Some(volume_name);
    if !pointed || annotation(&claim.metadata, BIND_COMPLETED).is_none() {
        let mut patch = json!({"metadata": {"uid": claim.metadata.uid, "annotations": {BIND_COMPLETED: "yes"}}});
        if !pointed {
            patch["metadata"]["annotations"][BOUND_BY_CONTROLLER] = json!("yes");
            patch["spec"] = json!({"volumeName": volume_name});
        }
        plan.push(Write::amend::<PersistentVolumeClaim>(ObjectKey::of(&claim.metadata), patch));
        // The status goes on top of the claim as it is then: at the next look.
        return plan;
    }
    let mut next = claim.clone();
    let status = next.status.get_or_insert_default();
    let spec = volume.spec.as_ref();
    if claim_phase(claim) != "Bound" {
        // Later the size is what the node has made of it, and the class what the driver has.
        status.capacity = spec.and_then(|spec| spec.capacity.clone());
        status.current_volume_attributes_class_name = spec.and_then(|spec| spec.volume_attributes_class_name.clone());
    }
    status.phase = Some("Bound".to_owned());
    status.access_modes = spec.and_then(|spec| spec.access_modes.clone());
    plan.writes.extend(Write::status(claim, &next));
    plan
}

/// The volume of a bound claim is gone, and the data with it.
fn lose(claim: &PersistentVolumeClaim, reason: &str, message: &str) -> Plan {
    let mut plan = has_nothing(claim, "Lost");
    if !plan.writes.is_empty() {
        plan.event(object_reference(claim), EventType::Warning, reason, message.to_owned());
    }
    plan
}
