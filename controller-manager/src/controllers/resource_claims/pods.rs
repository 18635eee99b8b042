//! The side of the pods: claims are made from templates, noted in the pod's status, and reserved for pods that have a
//! node already. One step after the other: each step's result brings the pod here again.

use std::sync::Arc;

use apimachinery::controller::{Controller, EventType, Informer, ObjectKey, Plan, Write, object_reference};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, PodResourceClaim, PodResourceClaimStatus};
use k8s_openapi::api::resource::v1::{ResourceClaim, ResourceClaimConsumerReference, ResourceClaimTemplate};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::api::ObjectMeta;

use super::{
    COMPONENT, MOST_RESERVED, POD_CLAIM, claims_of, is_allocated, is_made_for, made_for, pod_claims, reserved_for,
};
use crate::common::{annotation, controller_reference, is_deleted, name, pods as facts, uid};

/// The longest base of a generated name: five random characters come after it.
const LONGEST_BASE: usize = 57;

pub struct PodClaims {
    pub pods: Arc<Informer<Pod>>,
    pub claims: Arc<Informer<ResourceClaim>>,
    pub templates: Arc<Informer<ResourceClaimTemplate>>,
}

impl Controller for PodClaims {
    fn name(&self) -> &'static str {
        "resource-claim"
    }

    fn component(&self) -> &'static str {
        COMPONENT
    }

    fn reconcile(&self, key: &ObjectKey, _: Timestamp) -> Plan {
        let mut plan = Plan::nothing();
        // Claims of pod groups come with gang scheduling, which is off by default upstream and not here.
        let alone = |pod: &Arc<Pod>| pod.spec.as_ref().is_some_and(|spec| spec.scheduling_group.is_none());
        let Some(pod) = self.pods.get(key).filter(|pod| !is_deleted(&pod.metadata) && alone(pod)) else { return plan };
        let mut made = Vec::new();
        for claim in pod_claims(&pod) {
            let Some(template) = claim.resource_claim_template_name.as_deref() else { continue };
            match made_for(&pod, &claim.name) {
                Some(None) => continue,
                Some(Some(name)) if self.is_there(&pod, name) => continue,
                _ => {}
            }
            match self.made(&pod, &claim.name) {
                Some(found) => made.push((claim.name.clone(), name(&found.metadata).to_owned())),
                None => self.make(&pod, claim, template, &mut plan),
            }
        }
        plan.writes.extend(note(&pod, made));
        if facts::node_name(&pod).is_some() && !facts::is_finished(&pod) {
            plan.writes.extend(claims_of(&pod).iter().filter_map(|claim| self.reserve(&pod, claim)));
        }
        plan
    }
}

impl PodClaims {
    fn is_there(&self, pod: &Pod, claim: &str) -> bool {
        let key = ObjectKey::new(pod.metadata.namespace.as_deref().unwrap_or(""), claim);
        self.claims.get(&key).is_some_and(|claim| is_made_for(&claim, pod))
    }

    /// The claim that was made for one of the pod's claims and is not noted yet.
    fn made(&self, pod: &Pod, claim: &str) -> Option<Arc<ResourceClaim>> {
        let owned = self.claims.owned_by(uid(&pod.metadata));
        owned.into_iter().find(|found| annotation(&found.metadata, POD_CLAIM) == Some(claim))
    }

    fn make(&self, pod: &Pod, claim: &PodResourceClaim, template: &str, plan: &mut Plan) {
        let key = ObjectKey::new(pod.metadata.namespace.as_deref().unwrap_or(""), template);
        match self.templates.get(&key) {
            Some(template) => {
                plan.push(Write::create(&new_claim(pod, &claim.name, &template)));
            }
            None => {
                let message = format!(
                    "PodResourceClaim {}: resource claim template \"{template}\": \
                     resourceclaimtemplate.resource.k8s.io \"{template}\" not found",
                    claim.name
                );
                plan.event(object_reference(pod), EventType::Warning, "FailedResourceClaimCreation", message);
            }
        }
    }

    /// The scheduler reserves claims itself; for pods that it has not placed somebody else must.
    fn reserve(&self, pod: &Pod, key: &ObjectKey) -> Option<Write> {
        let claim = self.claims.get(key)?;
        let reserved = reserved_for(&claim);
        let has = reserved.iter().any(|consumer| consumer.uid == uid(&pod.metadata));
        if !is_allocated(&claim) || has || reserved.len() >= MOST_RESERVED {
            return None;
        }
        let mut next = claim.as_ref().clone();
        let consumer = ResourceClaimConsumerReference {
            api_group: None,
            resource: "pods".to_owned(),
            name: name(&pod.metadata).to_owned(),
            uid: uid(&pod.metadata).to_owned(),
        };
        next.status.get_or_insert_default().reserved_for.get_or_insert_default().push(consumer);
        Write::status(claim.as_ref(), &next)
    }
}

/// Notes made claims in the pod's status, in the order of their names.
fn note(pod: &Pod, made: Vec<(String, String)>) -> Option<Write> {
    if made.is_empty() {
        return None;
    }
    let mut next = pod.clone();
    let statuses = next.status.get_or_insert_default().resource_claim_statuses.get_or_insert_default();
    statuses.retain(|status| !made.iter().any(|(name, _)| *name == status.name));
    let status = |(name, claim)| PodResourceClaimStatus { name, resource_claim_name: Some(claim) };
    statuses.extend(made.into_iter().map(status));
    statuses.sort_by(|a, b| a.name.cmp(&b.name));
    Write::status(pod, &next)
}

fn new_claim(pod: &Pod, claim: &str, template: &ResourceClaimTemplate) -> ResourceClaim {
    let content = template.spec.as_ref();
    let of_template = content.and_then(|content| content.metadata.as_ref());
    let mut annotations = of_template.and_then(|meta| meta.annotations.clone()).unwrap_or_default();
    annotations.insert(POD_CLAIM.to_owned(), claim.to_owned());
    ResourceClaim {
        metadata: ObjectMeta {
            generate_name: Some(base(name(&pod.metadata), claim)),
            namespace: pod.metadata.namespace.clone(),
            labels: of_template.and_then(|meta| meta.labels.clone()),
            annotations: Some(annotations),
            owner_references: Some(vec![OwnerReference { block_owner_deletion: None, ..controller_reference(pod) }]),
            ..ObjectMeta::default()
        },
        spec: content.and_then(|content| content.spec.clone()),
        status: None,
    }
}

/// What generated names begin with: pod and claim, both cut in proportion if they are too long together.
fn base(pod: &str, claim: &str) -> String {
    let whole = format!("{pod}-{claim}-");
    if whole.len() <= LONGEST_BASE {
        return whole;
    }
    // Names of pods and claims are ASCII.
    let cut = |text: &str| text.chars().take(text.len() * LONGEST_BASE / whole.len()).collect::<String>();
    format!("{}-{}", cut(pod), cut(claim))
}
