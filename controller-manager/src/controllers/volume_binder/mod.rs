//! Binds claims to volumes: the smallest one that fits, one claim per volume, both sides recorded. Where none fits it
//! asks the class's provisioner for one, once a pod is there if the class wants that. Volumes whose claim is gone are
//! released; what deletes them is the provisioner beside their driver.

mod claims;
mod matching;
mod provision;
mod volumes;

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::sync::Arc;

use apimachinery::controller::{Informer, ObjectKey, Wiring};
use k8s_openapi::api::core::v1::{ObjectReference, PersistentVolume, PersistentVolumeClaim, Pod};
use k8s_openapi::api::storage::v1::StorageClass;
use kube::api::ObjectMeta;
use parking_lot::Mutex;

use super::volume_protection::{claims_of, index_by_claim};
use crate::app::Context;
use crate::common::{annotation, name, pods, uid};
use claims::Binder;
use volumes::VolumePhases;

const BIND_COMPLETED: &str = "pv.kubernetes.io/bind-completed";
const BOUND_BY_CONTROLLER: &str = "pv.kubernetes.io/bound-by-controller";
/// Older objects have their class here.
const OLD_CLASS: &str = "volume.beta.kubernetes.io/storage-class";

pub fn start(context: &Context) {
    let informers = context.driver.informers();
    let pods: Arc<Informer<Pod>> = informers.of();
    let classes: Arc<Informer<StorageClass>> = informers.of();
    index_by_claim(&pods);
    let binder = Binder { claims: informers.of(), volumes: informers.of(), classes, pods, told: Mutex::default() };
    // One at a time: two claims must not take one volume.
    context.driver.run(binder, 1, |binder, wiring| {
        wiring.primary(&binder.claims);
        let claims = binder.claims.clone();
        wiring.map(&binder.volumes, move |_| open_claims(&claims));
        let claims = binder.claims.clone();
        wiring.map(&binder.classes, move |_| open_claims(&claims));
        // Claims say which pod they wait for.
        wiring.map(&binder.pods, |change| {
            let node = |pod: &Option<Arc<Pod>>| pod.as_ref().map(|pod| pods::node_name(pod).map(str::to_owned));
            let moved = node(&change.old) != node(&change.new);
            change.versions().take(usize::from(moved)).flat_map(|pod| claims_of(pod)).collect()
        });
    });
    let phases =
        VolumePhases { claims: informers.of(), volumes: informers.of(), missing_since: Mutex::new(HashMap::new()) };
    context.driver.run(phases, 1, |phases, wiring: &Wiring| {
        wiring.primary(&phases.volumes);
        let volumes = phases.volumes.clone();
        wiring.map(&phases.claims, move |change| {
            let named = change.versions().filter_map(|claim| claim.spec.as_ref()?.volume_name.clone());
            let keys = change.versions().take(1).map(|claim| ObjectKey::of(&claim.metadata)).collect::<Vec<_>>();
            let all = volumes.list();
            let referring = all.iter().filter(|volume| claim_ref(volume).is_some_and(|r| keys.contains(&key_of(r))));
            let referring = referring.map(|volume| name(&volume.metadata).to_owned());
            named.chain(referring).map(|volume| ObjectKey::cluster(&volume)).collect()
        });
    });
}

/// The claims that a new volume or class may help.
fn open_claims(claims: &Informer<PersistentVolumeClaim>) -> Vec<ObjectKey> {
    let open = claims.list().into_iter().filter(|claim| claim_phase(claim) != "Bound");
    open.map(|claim| ObjectKey::of(&claim.metadata)).collect()
}

fn claim_phase(claim: &PersistentVolumeClaim) -> &str {
    claim.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or("Pending")
}

fn volume_phase(volume: &PersistentVolume) -> &str {
    volume.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or("Pending")
}

fn claim_ref(volume: &PersistentVolume) -> Option<&ObjectReference> {
    volume.spec.as_ref()?.claim_ref.as_ref()
}

fn key_of(reference: &ObjectReference) -> ObjectKey {
    ObjectKey::new(reference.namespace.as_deref().unwrap_or(""), reference.name.as_deref().unwrap_or(""))
}

/// Whether the volume is reserved for this very claim, or for any of its name.
fn refers_to(volume: &PersistentVolume, claim: &PersistentVolumeClaim) -> bool {
    claim_ref(volume).is_some_and(|reference| {
        key_of(reference) == ObjectKey::of(&claim.metadata)
            && reference.uid.as_deref().is_none_or(|wanted| wanted.is_empty() || wanted == uid(&claim.metadata))
    })
}

/// The class of a claim or a volume; none if nothing is said about it.
fn class<'a>(meta: &'a ObjectMeta, spec: Option<&'a str>) -> Option<&'a str> {
    annotation(meta, OLD_CLASS).or(spec)
}

fn claim_class(claim: &PersistentVolumeClaim) -> Option<&str> {
    class(&claim.metadata, claim.spec.as_ref().and_then(|spec| spec.storage_class_name.as_deref()))
}
