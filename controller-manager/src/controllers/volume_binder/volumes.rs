//! The side of the volumes: their phases, the release of those whose claim is gone, and the end of bindings that came to
//! nothing.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use apimachinery::controller::{Controller, EventType, Informer, ObjectKey, Plan, Write, object_reference};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim};
use parking_lot::Mutex;
use serde_json::json;

use super::matching::modes_differ;
use super::{BOUND_BY_CONTROLLER, claim_ref, key_of, volume_phase};
use crate::common::{annotation, elapsed, name, uid};

const PROVISIONED_BY: &str = "pv.kubernetes.io/provisioned-by";
/// A new volume may be known before its claim is. Provisioners delete what is released, so nothing is released for
/// want of news.
const PATIENCE: Duration = Duration::from_secs(5);

pub struct VolumePhases {
    pub claims: Arc<Informer<PersistentVolumeClaim>>,
    pub volumes: Arc<Informer<PersistentVolume>>,
    /// Since when the claims of volumes (by the volumes' names) that were never seen bound have been missing.
    pub missing_since: Mutex<HashMap<String, Timestamp>>,
}

impl Controller for VolumePhases {
    fn name(&self) -> &'static str {
        "persistentvolume-phases"
    }

    fn component(&self) -> &'static str {
        "persistentvolume-controller"
    }

    fn reconcile(&self, key: &ObjectKey, now: Timestamp) -> Plan {
        let missing_since = self.missing_since.lock().remove(&key.name);
        let Some(volume) = self.volumes.get(key) else { return Plan::nothing() };
        let bound_to = claim_ref(&volume).and_then(|reference| Some((reference, reference.uid.as_deref()?)));
        let Some((reference, claim_uid)) = bound_to.filter(|(_, uid)| !uid.is_empty()) else {
            return set_phase(&volume, "Available", None);
        };
        let claim = self.claims.get(&key_of(reference)).filter(|claim| uid(&claim.metadata) == claim_uid);
        let Some(claim) = claim else {
            let since = missing_since.unwrap_or(now);
            let known = matches!(volume_phase(&volume), "Bound" | "Released" | "Failed");
            let left = PATIENCE.saturating_sub(elapsed(since, now));
            if known || left.is_zero() {
                return release(&volume);
            }
            self.missing_since.lock().insert(key.name.clone(), since);
            return Plan { again_after: Some(left), ..Plan::default() };
        };
        match claim.spec.as_ref().and_then(|spec| spec.volume_name.as_deref()).unwrap_or("") {
            "" => mismatch(&volume, &claim),
            bound if bound == key.name => set_phase(&volume, "Bound", None),
            _ if annotation(&volume.metadata, PROVISIONED_BY).is_some() && policy(&volume) == "Delete" => {
                release(&volume)
            }
            _ => unbind(&volume),
        }
    }
}

fn set_phase(volume: &PersistentVolume, phase: &str, message: Option<&str>) -> Plan {
    let mut next = volume.clone();
    let status = next.status.get_or_insert_default();
    status.phase = Some(phase.to_owned());
    status.message = message.map(str::to_owned);
    Plan { writes: Write::status(volume, &next).into_iter().collect(), ..Plan::default() }
}

fn policy(volume: &PersistentVolume) -> &str {
    let spec = volume.spec.as_ref();
    spec.and_then(|spec| spec.persistent_volume_reclaim_policy.as_deref()).unwrap_or("Retain")
}

/// The claim is gone. Whoever provisioned the volume deletes it, if that is its policy; nobody here can.
fn release(volume: &PersistentVolume) -> Plan {
    if volume_phase(volume) == "Failed" {
        return Plan::nothing();
    }
    if volume_phase(volume) != "Released" {
        return set_phase(volume, "Released", None);
    }
    let has_deleter = volume.spec.as_ref().is_some_and(|spec| spec.csi.is_some())
        || annotation(&volume.metadata, PROVISIONED_BY).is_some_and(|by| !by.starts_with("kubernetes.io/"))
        || annotation(&volume.metadata, "pv.kubernetes.io/migrated-to").is_some();
    let (reason, message) = match policy(volume) {
        "Retain" => return Plan::nothing(),
        "Delete" if has_deleter => return Plan::nothing(),
        "Delete" => {
            let volume = name(&volume.metadata);
            let why = "no deletable volume plugin matched";
            ("VolumeFailedDelete", format!("error getting deleter volume plugin for volume \"{volume}\": {why}"))
        }
        "Recycle" => ("VolumeFailedRecycle", "No recycler plugin found for the volume!".to_owned()),
        _ => ("VolumeUnknownReclaimPolicy", "Volume has unrecognized PersistentVolumeReclaimPolicy".to_owned()),
    };
    let mut plan = set_phase(volume, "Failed", Some(&message));
    plan.event(object_reference(volume), EventType::Warning, reason, message);
    plan
}

/// The claim has not chosen yet. It never will choose a volume of another mode.
fn mismatch(volume: &PersistentVolume, claim: &PersistentVolumeClaim) -> Plan {
    let mut plan = Plan::nothing();
    if let (Some(own), Some(wanted)) = (&volume.spec, &claim.spec)
        && modes_differ(own, wanted)
    {
        let (volume_name, claim_name) = (name(&volume.metadata), name(&claim.metadata));
        let message = format!(
            "Cannot bind PersistentVolume to requested PersistentVolumeClaim \"{claim_name}\" due to incompatible volumeMode."
        );
        plan.event(object_reference(volume), EventType::Warning, "VolumeMismatch", message);
        let message = format!(
            "Cannot bind PersistentVolume \"{volume_name}\" to requested PersistentVolumeClaim due to incompatible volumeMode."
        );
        plan.event(object_reference(claim), EventType::Warning, "VolumeMismatch", message);
    }
    plan
}

/// The claim has another volume. A reservation that somebody made by hand stays, for the next claim of the name.
fn unbind(volume: &PersistentVolume) -> Plan {
    let meta = json!({"resourceVersion": volume.metadata.resource_version});
    let patch = if annotation(&volume.metadata, BOUND_BY_CONTROLLER).is_some() {
        let mut meta = meta;
        meta["annotations"] = json!({BOUND_BY_CONTROLLER: null});
        json!({"metadata": meta, "spec": {"claimRef": null}})
    } else {
        json!({"metadata": meta, "spec": {"claimRef": {"uid": null}}})
    };
    Plan::write(Write::amend::<PersistentVolume>(ObjectKey::of(&volume.metadata), patch))
}
