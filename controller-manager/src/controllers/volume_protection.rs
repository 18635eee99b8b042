//! Keeps volumes and claims that are in use from disappearing: a deleted claim waits for the last pod that uses it, a
//! deleted volume for the end of its binding.

use std::sync::Arc;

use apimachinery::controller::{Controller, Informer, Object, ObjectKey, Plan, Write};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim, Pod};
use serde_json::json;

use crate::app::Context;
use crate::common::{is_deleted, name, namespace, pods};

const CLAIM_FINALIZER: &str = "kubernetes.io/pvc-protection";
const VOLUME_FINALIZER: &str = "kubernetes.io/pv-protection";

struct ClaimProtection {
    claims: Arc<Informer<PersistentVolumeClaim>>,
    pods: Arc<Informer<Pod>>,
}

struct VolumeProtection {
    volumes: Arc<Informer<PersistentVolume>>,
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

#[cfg(test)]
mod tests {
    use super::*;

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
