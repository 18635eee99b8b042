//! Which volume fits a claim.

use std::sync::Arc;

use apimachinery::controller::Informer;
use apimachinery::meta::Quantity;
use k8s_openapi::api::core::v1::{
    PersistentVolume, PersistentVolumeClaim, PersistentVolumeClaimSpec, PersistentVolumeSpec,
};

use super::{claim_class, claim_ref, class, refers_to, volume_phase};
use crate::common::selector::Selector;
use crate::common::{is_deleted, labels, name};

/// A volume that is reserved for the claim, or else the free one that fits best: the fewest access modes, then the
/// smallest. With `reserved_only` somebody else (the scheduler) chooses among the free ones.
pub fn best_match(
    volumes: &Informer<PersistentVolume>,
    claim: &PersistentVolumeClaim,
    spec: &PersistentVolumeClaimSpec,
    reserved_only: bool,
) -> Option<Arc<PersistentVolume>> {
    let possible = |volume: &Arc<PersistentVolume>| why_not(volume, claim, spec).is_none_or(|why| why == CLASS);
    let mut volumes = volumes.list();
    volumes.retain(|volume| possible(volume) && (claim_ref(volume).is_none() || refers_to(volume, claim)));
    if let Some(reserved) = volumes.iter().find(|volume| claim_ref(volume).is_some()) {
        return Some(reserved.clone());
    }
    let selector = spec.selector.as_ref().map(|selector| Selector::of(Some(selector)));
    let fits = |volume: &Arc<PersistentVolume>| {
        volume_phase(volume) == "Available"
            && why_not(volume, claim, spec).is_none()
            && selector.as_ref().is_none_or(|selector| selector.matches(labels(&volume.metadata)))
    };
    let fitting = volumes.into_iter().filter(|volume| !reserved_only && fits(volume));
    fitting.min_by_key(|volume| {
        let spec = volume.spec.as_ref();
        let modes = spec.and_then(|spec| spec.access_modes.as_ref()).map_or(0, Vec::len);
        (modes, spec.and_then(capacity), name(&volume.metadata).to_owned())
    })
}

const CLASS: &str = "storageClassName does not match";

/// What keeps the claim from this volume, in upstream's words.
pub fn why_not(
    volume: &PersistentVolume,
    claim: &PersistentVolumeClaim,
    wanted: &PersistentVolumeClaimSpec,
) -> Option<String> {
    let Some(spec) = &volume.spec else { return Some("requested PV is too small".to_owned()) };
    if is_deleted(&volume.metadata) {
        return Some(format!("the volume is marked for deletion \"{}\"", name(&volume.metadata)));
    }
    if capacity(spec).unwrap_or_default() < requested(wanted).unwrap_or_default() {
        return Some("requested PV is too small".to_owned());
    }
    let attributes = |class: &Option<String>| class.clone().unwrap_or_default();
    if attributes(&spec.volume_attributes_class_name) != attributes(&wanted.volume_attributes_class_name) {
        return Some("volumeAttributesClassName does not match".to_owned());
    }
    if modes_differ(spec, wanted) {
        return Some("incompatible volumeMode".to_owned());
    }
    let modes = spec.access_modes.as_deref().unwrap_or_default();
    if !wanted.access_modes.iter().flatten().all(|mode| modes.contains(mode)) {
        return Some("incompatible accessMode".to_owned());
    }
    let own = class(&volume.metadata, spec.storage_class_name.as_deref());
    (own.unwrap_or("") != claim_class(claim).unwrap_or("")).then(|| CLASS.to_owned())
}

pub fn modes_differ(volume: &PersistentVolumeSpec, claim: &PersistentVolumeClaimSpec) -> bool {
    let mode = |mode: &Option<String>| mode.clone().unwrap_or_else(|| "Filesystem".to_owned());
    mode(&volume.volume_mode) != mode(&claim.volume_mode)
}

fn capacity(spec: &PersistentVolumeSpec) -> Option<Quantity> {
    spec.capacity.as_ref()?.get("storage")?.0.parse().ok()
}

fn requested(claim: &PersistentVolumeClaimSpec) -> Option<Quantity> {
    claim.resources.as_ref()?.requests.as_ref()?.get("storage")?.0.parse().ok()
}
