//! Keeps volumes, claims and their attributes classes that are in use from disappearing: a deleted claim waits for the
//! last pod that uses it, a deleted volume for the end of its binding, a deleted class for the last volume or claim
//! that names it.

use std::sync::Arc;

use apimachinery::controller::{Controller, Informer, Object, ObjectKey, Plan, Write};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim, Pod};
use k8s_openapi::api::storage::v1::VolumeAttributesClass;
use serde_json::json;

use crate::app::Context;
use crate::common::{is_deleted, name, namespace, pods};

const CLAIM_FINALIZER: &str = "kubernetes.io/pvc-protection";
const VOLUME_FINALIZER: &str = "kubernetes.io/pv-protection";
const CLASS_FINALIZER: &str = "kubernetes.io/vac-protection";

struct ClaimProtection {
    claims: Arc<Informer<PersistentVolumeClaim>>,
    pods: Arc<Informer<Pod>>,
}

struct VolumeProtection {
    volumes: Arc<Informer<PersistentVolume>>,
}

struct ClassProtection {
    classes: Arc<Informer<VolumeAttributesClass>>,
    volumes: Arc<Informer<PersistentVolume>>,
    claims: Arc<Informer<PersistentVolumeClaim>>,
}

pub fn start_claims(context: &Context) {
    let informers = context.driver.informers();
    let controller = ClaimProtection { claims: informers.of(), pods: informers.of() };
    context.driver.run(controller, 2, |controller, wiring| {
        wiring.primary(&controller.claims);
        wiring.map(&controller.pods, |change| {
            let ended = change.new.as_ref().is_none_or(|pod| pods::is_finished(pod));
            let pod = change.versions().next().filter(|_| ended);
            pod.into_iter().flat_map(|pod| claims_of(pod)).collect()
        });
    });
}

pub fn start_volumes(context: &Context) {
    let controller = VolumeProtection { volumes: context.driver.informers().of() };
    context.driver.run(controller, 1, |controller, wiring| wiring.primary(&controller.volumes));
}

pub fn start_classes(context: &Context) {
    let informers = context.driver.informers();
    let controller = ClassProtection { classes: informers.of(), volumes: informers.of(), claims: informers.of() };
    context.driver.run(controller, 1, |controller, wiring| {
        wiring.primary(&controller.classes);
        wiring.map(&controller.volumes, |change| {
            change.versions().flat_map(|volume| classes_of_volume(volume)).map(ObjectKey::cluster).collect()
        });
        wiring.map(&controller.claims, |change| {
            change.versions().flat_map(|claim| classes_of_claim(claim)).map(ObjectKey::cluster).collect()
        });
    });
}

fn classes_of_volume(volume: &PersistentVolume) -> impl Iterator<Item = &str> {
    volume.spec.iter().filter_map(|spec| spec.volume_attributes_class_name.as_deref())
}

/// The classes that the claim asks for, has, and is on its way to.
fn classes_of_claim(claim: &PersistentVolumeClaim) -> impl Iterator<Item = &str> {
    let wanted = claim.spec.iter().filter_map(|spec| spec.volume_attributes_class_name.as_deref());
    let status = claim.status.as_ref();
    let current = status.and_then(|status| status.current_volume_attributes_class_name.as_deref());
    let target = status.and_then(|status| status.modify_volume_status.as_ref());
    let target = target.and_then(|modify| modify.target_volume_attributes_class_name.as_deref());
    wanted.chain(current).chain(target)
}

/// Pods by the claims that they use, each as `namespace/name`.
pub const CLAIM_INDEX: &str = "claim";

pub fn index_by_claim(pods: &Informer<Pod>) {
    pods.add_index(CLAIM_INDEX, |pod| claims_of(pod).iter().map(ToString::to_string).collect());
}

/// The claims that the pod uses, by name and by ephemeral volumes.
pub fn claims_of(pod: &Pod) -> Vec<ObjectKey> {
    let volumes = pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
    let claims = volumes.filter_map(|volume| match (&volume.persistent_volume_claim, &volume.ephemeral) {
        (Some(claim), _) => Some(claim.claim_name.clone()),
        (None, Some(_)) => Some(format!("{}-{}", name(&pod.metadata), volume.name)),
        (None, None) => None,
    });
    claims.map(|claim| ObjectKey::new(namespace(&pod.metadata), &claim)).collect()
}

/// Adds the finalizer to a living object, takes it from a deleted one that is not in use.
fn protect<K: Object>(object: &K, finalizer: &str, in_use: bool) -> Plan {
    let meta = object.meta();
    let has = meta.finalizers.iter().flatten().any(|have| have == finalizer);
    let mut wanted: Vec<_> = meta.finalizers.iter().flatten().filter(|have| *have != finalizer).cloned().collect();
    match (is_deleted(meta), has) {
        (false, false) => wanted.push(finalizer.to_owned()),
        (true, true) if !in_use => {}
        _ => return Plan::nothing(),
    }
    let patch = json!({"metadata": {"uid": meta.uid, "resourceVersion": meta.resource_version, "finalizers": wanted}});
    Plan::write(Write::amend::<K>(ObjectKey::of(meta), patch))
}

impl Controller for ClaimProtection {
    fn name(&self) -> &'static str {
        "persistentvolumeclaim-protection"
    }

    fn component(&self) -> &'static str {
        "pvc-protection-controller"
    }

    fn reconcile(&self, key: &ObjectKey, _: Timestamp) -> Plan {
        let Some(claim) = self.claims.get(key) else { return Plan::nothing() };
        let uses =
            |pod: &Arc<Pod>| !pods::is_finished(pod) && pods::node_name(pod).is_some() && claims_of(pod).contains(key);
        let in_use = is_deleted(&claim.metadata) && self.pods.in_namespace(&key.namespace).iter().any(uses);
        protect(claim.as_ref(), CLAIM_FINALIZER, in_use)
    }
}

impl Controller for VolumeProtection {
    fn name(&self) -> &'static str {
        "persistentvolume-protection"
    }

    fn component(&self) -> &'static str {
        "pv-protection-controller"
    }

    fn reconcile(&self, key: &ObjectKey, _: Timestamp) -> Plan {
        let Some(volume) = self.volumes.get(key) else { return Plan::nothing() };
        let bound = volume.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Bound");
        protect(volume.as_ref(), VOLUME_FINALIZER, bound)
    }
}

impl Controller for ClassProtection {
    fn name(&self) -> &'static str {
        "volumeattributesclass-protection"
    }

    fn component(&self) -> &'static str {
        "volumeattributesclass-protection-controller"
    }

    fn reconcile(&self, key: &ObjectKey, _: Timestamp) -> Plan {
        let Some(class) = self.classes.get(key) else { return Plan::nothing() };
        let used = || {
            let by_volume = self.volumes.list().iter().any(|v| classes_of_volume(v).any(|name| name == key.name));
            by_volume || self.claims.list().iter().any(|c| classes_of_claim(c).any(|name| name == key.name))
        };
        let in_use = is_deleted(&class.metadata) && used();
        protect(class.as_ref(), CLASS_FINALIZER, in_use)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_wait_for_volumes_and_claims() {
        let class: VolumeAttributesClass = serde_json::from_value(json!({"driverName": "d",
            "metadata": {"name": "gold", "deletionTimestamp": "2026-01-01T00:00:00Z", "finalizers": [CLASS_FINALIZER]}}))
        .unwrap();
        let volume = |class: &str| -> PersistentVolume {
            serde_json::from_value(json!({"metadata": {"name": "v"}, "spec": {"volumeAttributesClassName": class}}))
                .unwrap()
        };
        let claim = |status: serde_json::Value| -> PersistentVolumeClaim {
            serde_json::from_value(json!({"metadata": {"name": "c", "namespace": "n"}, "spec": {}, "status": status}))
                .unwrap()
        };
        let modifying = json!({"modifyVolumeStatus": {"status": "Pending", "targetVolumeAttributesClassName": "gold"}});
        for (volumes, claims, released) in [
            (vec![], vec![], true),
            (vec![volume("silver")], vec![claim(json!({"currentVolumeAttributesClassName": "silver"}))], true),
            (vec![volume("gold")], vec![], false),
            (vec![], vec![claim(json!({"currentVolumeAttributesClassName": "gold"}))], false),
            (vec![], vec![claim(modifying)], false),
        ] {
            let controller = ClassProtection {
                classes: Informer::fixed([class.clone()]),
                volumes: Informer::fixed(volumes),
                claims: Informer::fixed(claims),
            };
            let plan = controller.reconcile(&ObjectKey::cluster("gold"), Timestamp::UNIX_EPOCH);
            assert_eq!(!plan.writes.is_empty(), released);
        }
    }

    #[test]
    fn claims_wait_for_their_pods() {
        let claim = |deleted: bool, finalizers: &[&str]| -> PersistentVolumeClaim {
            let time = deleted.then_some("2026-01-01T00:00:00Z");
            serde_json::from_value(json!({"metadata": {"name": "c", "namespace": "ns", "deletionTimestamp": time, "finalizers": finalizers}})).unwrap()
        };
        let pod = |phase: &str| {
            let mut pod = pods::tests::pod("p", Some("n"), phase, None);
            pod.spec.as_mut().unwrap().volumes =
                serde_json::from_value(json!([{"name": "v", "persistentVolumeClaim": {"claimName": "c"}}])).unwrap();
            pod
        };
        let plan = |claim, pods: Vec<Pod>| {
            let controller = ClaimProtection { claims: Informer::fixed([claim]), pods: Informer::fixed(pods) };
            let plan = controller.reconcile(&ObjectKey::new("ns", "c"), Timestamp::UNIX_EPOCH);
            plan.writes.first().map(|write| write.body["metadata"]["finalizers"].clone())
        };
        assert_eq!(plan(claim(false, &[]), vec![]), Some(json!([CLAIM_FINALIZER])));
        assert_eq!(plan(claim(true, &[CLAIM_FINALIZER]), vec![pod("Running")]), None);
        assert_eq!(plan(claim(true, &["x", CLAIM_FINALIZER]), vec![pod("Succeeded")]), Some(json!(["x"])));
    }
}
