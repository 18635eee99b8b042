//! Binds claims to volumes that exist: the smallest one that fits, one claim per volume, both sides recorded. Volumes
//! whose claim is gone are released; those that are to be deleted need a provisioner, which is not here.

use std::sync::Arc;

use apimachinery::controller::{Controller, EventType, Informer, ObjectKey, Plan, Wiring, Write, object_reference};
use apimachinery::meta::Quantity;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{
    ObjectReference, PersistentVolume, PersistentVolumeClaim, PersistentVolumeClaimSpec, PersistentVolumeSpec,
};
use serde_json::json;

use crate::app::Context;
use crate::common::selector::Selector;
use crate::common::{annotation, is_deleted, labels, name, uid};

const BIND_COMPLETED: &str = "pv.kubernetes.io/bind-completed";
const BOUND_BY_CONTROLLER: &str = "pv.kubernetes.io/bound-by-controller";

struct Binder {
    claims: Arc<Informer<PersistentVolumeClaim>>,
    volumes: Arc<Informer<PersistentVolume>>,
}

/// Writes the phase of volumes; keys are volumes.
struct VolumePhases(Binder);

pub fn start(context: &Context) {
    let informers = context.driver.informers();
    let binder = || Binder { claims: informers.of(), volumes: informers.of() };
    // One at a time: two claims must not take one volume.
    context.driver.run(binder(), 1, |binder, wiring| {
        wiring.primary(&binder.claims);
        let claims = binder.claims.clone();
        wiring.map(&binder.volumes, move |_| {
            let open = claims.list().into_iter().filter(|claim| claim_phase(claim) != "Bound");
            open.map(|claim| ObjectKey::of(&claim.metadata)).collect()
        });
    });
    context.driver.run(VolumePhases(binder()), 1, |phases, wiring: &Wiring| {
        wiring.primary(&phases.0.volumes);
        let volumes = phases.0.volumes.clone();
        wiring.map(&phases.0.claims, move |change| {
            let named = change.versions().filter_map(|claim| claim.spec.as_ref()?.volume_name.clone());
            let keys = change.versions().take(1).map(|claim| ObjectKey::of(&claim.metadata)).collect::<Vec<_>>();
            let referring = volumes
                .list()
                .into_iter()
                .filter(|volume| claim_ref(volume).is_some_and(|r| keys.contains(&key_of(r))));
            let referring = referring.map(|volume| name(&volume.metadata).to_owned());
            named.chain(referring).map(|volume| ObjectKey::cluster(&volume)).collect()
        });
    });
}

fn claim_phase(claim: &PersistentVolumeClaim) -> &str {
    claim.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or("Pending")
}

fn claim_ref(volume: &PersistentVolume) -> Option<&ObjectReference> {
    volume.spec.as_ref()?.claim_ref.as_ref()
}

fn key_of(reference: &ObjectReference) -> ObjectKey {
    ObjectKey::new(reference.namespace.as_deref().unwrap_or(""), reference.name.as_deref().unwrap_or(""))
}

/// Whether the volume is reserved for this very claim.
fn refers_to(volume: &PersistentVolume, claim: &PersistentVolumeClaim) -> bool {
    claim_ref(volume).is_some_and(|reference| {
        key_of(reference) == ObjectKey::of(&claim.metadata)
            && reference.uid.as_deref().is_none_or(|wanted| wanted.is_empty() || wanted == uid(&claim.metadata))
    })
}

impl Controller for Binder {
    fn name(&self) -> &'static str {
        "persistentvolume-binder"
    }

    fn component(&self) -> &'static str {
        "persistentvolume-controller"
    }

    fn reconcile(&self, key: &ObjectKey, _: Timestamp) -> Plan {
        let Some(claim) = self.claims.get(key) else { return Plan::nothing() };
        let Some(spec) = claim.spec.as_ref().filter(|_| !is_deleted(&claim.metadata)) else { return Plan::nothing() };
        let named = spec.volume_name.as_deref().filter(|volume| !volume.is_empty());
        if let Some(named) = named {
            return match self.volumes.get(&ObjectKey::cluster(named)) {
                Some(volume) if claim_ref(&volume).is_none() || refers_to(&volume, &claim) => {
                    bind(&claim, spec, &volume)
                }
                None if annotation(&claim.metadata, BIND_COMPLETED).is_some() => lose(&claim),
                _ => self.wait(&claim),
            };
        }
        match self.best_match(&claim, spec) {
            Some(volume) => bind(&claim, spec, &volume),
            None => self.wait(&claim),
        }
    }
}

impl Binder {
    /// A volume that is reserved for the claim, or else the smallest free one that fits.
    fn best_match(
        &self,
        claim: &PersistentVolumeClaim,
        spec: &PersistentVolumeClaimSpec,
    ) -> Option<Arc<PersistentVolume>> {
        let volumes = self.volumes.list();
        if let Some(reserved) = volumes.iter().find(|volume| claim_ref(volume).is_some() && refers_to(volume, claim)) {
            return Some(reserved.clone());
        }
        let fitting = volumes.into_iter().filter(|volume| claim_ref(volume).is_none() && fits(volume, spec));
        fitting.min_by_key(|volume| (volume.spec.as_ref().and_then(capacity), name(&volume.metadata).to_owned()))
    }

    fn wait(&self, claim: &PersistentVolumeClaim) -> Plan {
        let mut plan = Plan::nothing();
        let mut next = claim.clone();
        next.status.get_or_insert_default().phase = Some("Pending".to_owned());
        plan.writes.extend(Write::status(claim, &next));
        if claim.status.as_ref().and_then(|status| status.phase.as_ref()).is_none() {
            let message = "no persistent volumes available for this claim and no storage class is set".to_owned();
            plan.event(object_reference(claim), EventType::Normal, "FailedBinding", message);
        }
        plan
    }
}

fn capacity(spec: &PersistentVolumeSpec) -> Option<Quantity> {
    spec.capacity.as_ref()?.get("storage")?.0.parse().ok()
}

fn fits(volume: &PersistentVolume, claim: &PersistentVolumeClaimSpec) -> bool {
    let Some(spec) = volume.spec.as_ref().filter(|_| !is_deleted(&volume.metadata)) else { return false };
    let wanted = claim.resources.as_ref().and_then(|r| r.requests.as_ref()?.get("storage")?.0.parse::<Quantity>().ok());
    let large_enough = capacity(spec).zip(wanted).is_none_or(|(have, wanted)| have >= wanted);
    let class = |class: &Option<String>| class.clone().unwrap_or_default();
    let mode = |mode: &Option<String>| mode.clone().unwrap_or_else(|| "Filesystem".to_owned());
    let modes = spec.access_modes.as_deref().unwrap_or_default();
    let selector = claim.selector.as_ref().is_none_or(|s| Selector::of(Some(s)).matches(labels(&volume.metadata)));
    large_enough
        && class(&spec.storage_class_name) == class(&claim.storage_class_name)
        && mode(&spec.volume_mode) == mode(&claim.volume_mode)
        && claim.access_modes.iter().flatten().all(|mode| modes.contains(mode))
        && selector
}

/// First the volume is reserved, then the claim is pointed to it, then both say so: each step can be repeated.
fn bind(claim: &PersistentVolumeClaim, spec: &PersistentVolumeClaimSpec, volume: &PersistentVolume) -> Plan {
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
    let pointed = spec.volume_name.as_deref() == Some(volume_name);
    if !pointed || annotation(&claim.metadata, BIND_COMPLETED).is_none() {
        let mut patch = json!({"metadata": {"uid": claim.metadata.uid, "annotations": {BIND_COMPLETED: "yes"}}});
        if !pointed {
            patch["metadata"]["annotations"][BOUND_BY_CONTROLLER] = json!("yes");
            patch["spec"] = json!({"volumeName": volume_name});
        }
        plan.push(Write::amend::<PersistentVolumeClaim>(ObjectKey::of(&claim.metadata), patch));
    }
    let mut next = claim.clone();
    let status = next.status.get_or_insert_default();
    status.phase = Some("Bound".to_owned());
    status.access_modes = volume.spec.as_ref().and_then(|spec| spec.access_modes.clone());
    if status.capacity.is_none() {
        status.capacity = volume.spec.as_ref().and_then(|spec| spec.capacity.clone());
    }
    plan.writes.extend(Write::status(claim, &next));
    plan
}

/// The volume of a bound claim is gone, and the data with it.
fn lose(claim: &PersistentVolumeClaim) -> Plan {
    let mut next = claim.clone();
    next.status.get_or_insert_default().phase = Some("Lost".to_owned());
    let mut plan = Plan { writes: Write::status(claim, &next).into_iter().collect(), ..Plan::default() };
    if !plan.writes.is_empty() {
        let message = "Bound claim has lost its PersistentVolume. Data on the volume is lost!".to_owned();
        plan.event(object_reference(claim), EventType::Warning, "ClaimLost", message);
    }
    plan
}

impl Controller for VolumePhases {
    fn name(&self) -> &'static str {
        "persistentvolume-phases"
    }

    fn component(&self) -> &'static str {
        "persistentvolume-controller"
    }

    fn reconcile(&self, key: &ObjectKey, _: Timestamp) -> Plan {
        let Some(volume) = self.0.volumes.get(key) else { return Plan::nothing() };
        let phase = match claim_ref(&volume) {
            None => "Available",
            Some(reference) if reference.uid.as_deref().is_none_or(str::is_empty) => "Available",
            Some(reference) => match self.0.claims.get(&key_of(reference)) {
                Some(claim) if refers_to(&volume, &claim) => "Bound",
                _ => "Released",
            },
        };
        let mut next = volume.as_ref().clone();
        next.status.get_or_insert_default().phase = Some(phase.to_owned());
        Plan { writes: Write::status(volume.as_ref(), &next).into_iter().collect(), ..Plan::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume(name: &str, size: &str, claim: Option<&str>) -> PersistentVolume {
        let reference = claim.map(|claim| json!({"namespace": "ns", "name": claim, "uid": claim}));
        serde_json::from_value(json!({"metadata": {"name": name, "uid": name, "resourceVersion": "1"}, "spec": {"capacity": {"storage": size}, "accessModes": ["ReadWriteOnce"], "claimRef": reference}})).unwrap()
    }

    fn claim(size: &str, volume: Option<&str>) -> PersistentVolumeClaim {
        serde_json::from_value(json!({"metadata": {"name": "c", "namespace": "ns", "uid": "c"}, "spec": {"volumeName": volume, "accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": size}}}})).unwrap()
    }

    fn bound_to(claim: PersistentVolumeClaim, volumes: Vec<PersistentVolume>) -> Option<String> {
        let binder = Binder { claims: Informer::fixed([claim]), volumes: Informer::fixed(volumes) };
        let plan = binder.reconcile(&ObjectKey::new("ns", "c"), Timestamp::UNIX_EPOCH);
        plan.writes.iter().find(|write| write.resource.kind == "PersistentVolume").map(|write| write.name.clone())
    }

    #[test]
    fn the_smallest_fitting_free_volume_is_bound() {
        let volumes = || {
            vec![
                volume("big", "10Gi", None),
                volume("small", "1Gi", None),
                volume("right", "5Gi", None),
                volume("taken", "4Gi", Some("other")),
            ]
        };
        assert_eq!(bound_to(claim("4Gi", None), volumes()).as_deref(), Some("right"));
        assert_eq!(bound_to(claim("4Gi", Some("big")), volumes()).as_deref(), Some("big"));
        assert_eq!(bound_to(claim("40Gi", None), volumes()), None);
        assert_eq!(bound_to(claim("4Gi", Some("taken")), volumes()), None);
    }

    #[test]
    fn phases_of_volumes() {
        for (volume, expected) in [
            (volume("v", "1Gi", None), "Available"),
            (volume("v", "1Gi", Some("c")), "Bound"),
            (volume("v", "1Gi", Some("gone")), "Released"),
        ] {
            let phases = VolumePhases(Binder {
                claims: Informer::fixed([claim("1Gi", None)]),
                volumes: Informer::fixed([volume]),
            });
            let plan = phases.reconcile(&ObjectKey::cluster("v"), Timestamp::UNIX_EPOCH);
            assert_eq!(plan.writes[0].body["status"]["phase"], expected);
        }
    }
}
