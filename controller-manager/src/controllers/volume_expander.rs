//! Says on claims that ask for more than they have that somebody else must make their volume larger: the resizer beside
//! the volume's driver. No volume is expanded by the control plane itself any more.

use std::sync::Arc;

use apimachinery::controller::{Controller, EventType, Informer, ObjectKey, Plan, object_reference};
use apimachinery::meta::Quantity;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim};

use crate::app::Context;
use crate::common::uid;

struct VolumeExpander {
    claims: Arc<Informer<PersistentVolumeClaim>>,
    volumes: Arc<Informer<PersistentVolume>>,
}

pub fn start(context: &Context) {
    let informers = context.driver.informers();
    let controller = VolumeExpander { claims: informers.of(), volumes: informers.of() };
    context.driver.run(controller, 10, |controller, wiring| {
        wiring.map(&controller.claims, |change| {
            let grown = |new: &Arc<PersistentVolumeClaim>| {
                change.old.as_ref().is_none_or(|old| requested(new) > requested(old) || capacity(new) > capacity(old))
            };
            change.new.iter().filter(|new| grown(new)).map(|claim| ObjectKey::of(&claim.metadata)).collect()
        });
    });
}

fn requested(claim: &PersistentVolumeClaim) -> Option<Quantity> {
    claim.spec.as_ref()?.resources.as_ref()?.requests.as_ref()?.get("storage")?.0.parse().ok()
}

fn capacity(claim: &PersistentVolumeClaim) -> Option<Quantity> {
    claim.status.as_ref()?.capacity.as_ref()?.get("storage")?.0.parse().ok()
}

impl Controller for VolumeExpander {
    fn name(&self) -> &'static str {
        "persistentvolume-expander"
    }

    fn component(&self) -> &'static str {
        "volume_expand"
    }

    fn reconcile(&self, key: &ObjectKey, _: Timestamp) -> Plan {
        let mut plan = Plan::nothing();
        let Some(claim) = self.claims.get(key) else { return plan };
        let bound = claim.status.as_ref().is_some_and(|status| status.phase.as_deref() == Some("Bound"));
        let volume = claim.spec.as_ref().and_then(|spec| spec.volume_name.as_deref());
        let volume = volume.filter(|_| bound).and_then(|name| self.volumes.get(&ObjectKey::cluster(name)));
        let is_its_own = |volume: &PersistentVolume| {
            let bound_to = volume.spec.as_ref().and_then(|spec| spec.claim_ref.as_ref());
            bound_to.is_some_and(|reference| reference.uid.as_deref() == Some(uid(&claim.metadata)))
        };
        if volume.is_some_and(|volume| is_its_own(&volume)) && requested(&claim) > capacity(&claim) {
            let message = "waiting for an external controller to expand this PVC".to_owned();
            plan.event(object_reference(claim.as_ref()), EventType::Normal, "ExternalExpanding", message);
        }
        plan
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn claims_that_want_more_are_told_to_wait() {
        let told = |requested: &str, bound_to: &str| {
            let claim = serde_json::from_value(json!({"metadata": {"name": "c", "namespace": "ns", "uid": "u"},
                "spec": {"volumeName": "pv", "resources": {"requests": {"storage": requested}}},
                "status": {"phase": "Bound", "capacity": {"storage": "1Gi"}}}))
            .unwrap();
            let volume = serde_json::from_value(json!({"metadata": {"name": "pv"},
                "spec": {"claimRef": {"namespace": "ns", "name": "c", "uid": bound_to}}}))
            .unwrap();
            let controller = VolumeExpander { claims: Informer::fixed([claim]), volumes: Informer::fixed([volume]) };
            let plan = controller.reconcile(&ObjectKey::new("ns", "c"), Timestamp::UNIX_EPOCH);
            plan.events.into_iter().map(|event| event.reason).collect::<Vec<_>>()
        };
        assert_eq!(told("2Gi", "u"), ["ExternalExpanding"]);
        assert_eq!(told("1Gi", "u"), [""; 0]);
        assert_eq!(told("2Gi", "other"), [""; 0]);
    }
}
