//! Makes the claims of pods' ephemeral volumes: each is the pod's own, and goes with it by garbage collection.

use std::sync::Arc;

use apimachinery::controller::{
    Controller, EventType, Informer, ObjectKey, Plan, Write, is_controlled_by, object_reference,
};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, PersistentVolumeClaimTemplate, Pod, Volume};
use kube::api::ObjectMeta;

use super::volume_protection::{CLAIM_INDEX, index_by_claim};
use crate::app::Context;
use crate::common::{controller_reference, is_deleted, uid};

struct EphemeralVolumeController {
    pods: Arc<Informer<Pod>>,
    claims: Arc<Informer<PersistentVolumeClaim>>,
}

pub fn start(context: &Context) {
    let informers = context.driver.informers();
    let controller = EphemeralVolumeController { pods: informers.of(), claims: informers.of() };
    index_by_claim(&controller.pods);
    context.driver.run(controller, 5, |controller, wiring| {
        // The volumes of a pod never change.
        wiring.map(&controller.pods, |change| {
            let new = change.new.iter().filter(|pod| change.old.is_none() && templates(pod).next().is_some());
            new.map(|pod| ObjectKey::of(&pod.metadata)).collect()
        });
        let pods = controller.pods.clone();
        wiring.map(&controller.claims, move |change| {
            let (Some(gone), None) = (&change.old, &change.new) else { return Vec::new() };
            let pods = pods.indexed(CLAIM_INDEX, &ObjectKey::of(&gone.metadata).to_string());
            pods.iter().map(|pod| ObjectKey::of(&pod.metadata)).collect()
        });
    });
}

/// The ephemeral volumes of a pod, with the templates of their claims.
fn templates(pod: &Pod) -> impl Iterator<Item = (&Volume, &PersistentVolumeClaimTemplate)> {
    let volumes = pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
    volumes.filter_map(|volume| Some((volume, volume.ephemeral.as_ref()?.volume_claim_template.as_ref()?)))
}

impl Controller for EphemeralVolumeController {
    fn name(&self) -> &'static str {
        "ephemeral-volume"
    }

    fn component(&self) -> &'static str {
        "ephemeral_volume"
    }

    fn reconcile(&self, key: &ObjectKey, _: Timestamp) -> Plan {
        let mut plan = Plan::nothing();
        let Some(pod) = self.pods.get(key).filter(|pod| !is_deleted(&pod.metadata)) else { return plan };
        for (volume, template) in templates(&pod) {
            let claim = ObjectKey::new(&key.namespace, &format!("{}-{}", key.name, volume.name));
            match self.claims.get(&claim) {
                None => {
                    plan.push(Write::create(&new_claim(&pod, &claim, template)));
                }
                Some(found) if is_controlled_by(&found.metadata, uid(&pod.metadata)) => {}
                Some(_) => {
                    let message = format!(
                        "ephemeral volume {}: PVC {claim} was not created for pod {key} (pod is not owner)",
                        volume.name
                    );
                    plan.event(object_reference(pod.as_ref()), EventType::Warning, "FailedBinding", message);
                }
            }
        }
        plan
    }
}

fn new_claim(pod: &Pod, key: &ObjectKey, template: &PersistentVolumeClaimTemplate) -> PersistentVolumeClaim {
    let of_template = template.metadata.as_ref();
    PersistentVolumeClaim {
        metadata: ObjectMeta {
            name: Some(key.name.clone()),
            namespace: Some(key.namespace.clone()),
            labels: of_template.and_then(|meta| meta.labels.clone()),
            annotations: of_template.and_then(|meta| meta.annotations.clone()),
            owner_references: Some(vec![controller_reference(pod)]),
            ..ObjectMeta::default()
        },
        spec: Some(template.spec.clone()),
        status: None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn plan(claims: Vec<PersistentVolumeClaim>) -> Plan {
        let template = json!({"metadata": {"labels": {"l": "v"}}, "spec": {"storageClassName": "fast"}});
        let pod: Pod = serde_json::from_value(json!({"metadata": {"name": "p", "namespace": "ns", "uid": "u"},
            "spec": {"containers": [], "volumes": [{"name": "v", "ephemeral": {"volumeClaimTemplate": template}}, {"name": "w", "emptyDir": {}}]}}))
        .unwrap();
        let controller = EphemeralVolumeController { pods: Informer::fixed([pod]), claims: Informer::fixed(claims) };
        controller.reconcile(&ObjectKey::new("ns", "p"), Timestamp::UNIX_EPOCH)
    }

    fn claim(owner: &str) -> PersistentVolumeClaim {
        let owner = json!({"apiVersion": "v1", "kind": "Pod", "name": "p", "uid": owner, "controller": true});
        serde_json::from_value(json!({"metadata": {"name": "p-v", "namespace": "ns", "ownerReferences": [owner]}}))
            .unwrap()
    }

    #[test]
    fn a_pod_gets_its_claim_and_nobody_elses() {
        let body = &plan(vec![]).writes[0].body;
        assert_eq!((&body["metadata"]["name"], &body["metadata"]["labels"]), (&json!("p-v"), &json!({"l": "v"})));
        assert_eq!(body["metadata"]["ownerReferences"][0]["uid"], "u");
        assert_eq!(body["spec"]["storageClassName"], "fast");
        assert!(plan(vec![claim("u")]).is_empty());
        let foreign = plan(vec![claim("other")]);
        assert_eq!((foreign.writes.len(), foreign.events[0].reason.as_str()), (0, "FailedBinding"));
    }
}
