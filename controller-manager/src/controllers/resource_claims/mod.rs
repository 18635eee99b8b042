//! Resource claims: made from templates for the pods that ask for them, reserved for pods that were put on a node without
//! the scheduler, and given free when the last pod that uses them has ended.

mod pods;
mod release;

#[cfg(test)]
mod tests;

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;

use apimachinery::controller::{Informer, ObjectKey, controller_of};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::resource::v1::{ResourceClaim, ResourceClaimConsumerReference, ResourceClaimTemplate};
use parking_lot::Mutex;

use self::pods::PodClaims;
use self::release::ClaimReleaser;
use crate::app::Context;
use crate::common::{is_deleted, name, namespace, pods as facts, uid};

/// Which of the pod's claims a generated claim is.
const POD_CLAIM: &str = "resource.kubernetes.io/pod-claim-name";
/// Keeps a claim from going while it is allocated.
const FINALIZER: &str = "resource.kubernetes.io/delete-protection";
/// A claim has no room for more pods.
const MOST_RESERVED: usize = 256;
/// Pods by the claims and the templates that they use, each as `namespace/name`.
const CLAIM_INDEX: &str = "resource-claim";
const TEMPLATE_INDEX: &str = "resource-claim-template";
const COMPONENT: &str = "resource_claim";

pub fn start(context: &Context) {
    let informers = context.driver.informers();
    let pods: Arc<Informer<Pod>> = informers.of();
    let claims: Arc<Informer<ResourceClaim>> = informers.of();
    let templates: Arc<Informer<ResourceClaimTemplate>> = informers.of();
    pods.add_index(CLAIM_INDEX, |pod| claims_of(pod).iter().map(ToString::to_string).collect());
    pods.add_index(TEMPLATE_INDEX, templates_of);
    let controller = PodClaims { pods: pods.clone(), claims: claims.clone(), templates };
    context.driver.run(controller, 10, |controller, wiring| {
        wiring.map(&controller.pods, |change| {
            let new = change.new.iter().filter(|pod| !pod_claims(pod).is_empty());
            new.map(|pod| ObjectKey::of(&pod.metadata)).collect()
        });
        let pods = controller.pods.clone();
        wiring.map(&controller.templates, move |change| {
            let template = change.versions().take(1).map(|template| ObjectKey::of(&template.metadata).to_string());
            template.flat_map(|template| keys(&pods.indexed(TEMPLATE_INDEX, &template))).collect()
        });
        let pods = controller.pods.clone();
        wiring.map(&controller.claims, move |change| {
            let Some(claim) = change.versions().next() else { return Vec::new() };
            let mut users = keys(&pods.indexed(CLAIM_INDEX, &ObjectKey::of(&claim.metadata).to_string()));
            users.extend(owning_pod(claim).map(|(owner, _)| ObjectKey::new(namespace(&claim.metadata), owner)));
            users
        });
    });
    let gone = Arc::new(Mutex::new(Gone::default()));
    let releaser = ClaimReleaser {
        rest: context.driver.rest().clone(),
        executor: context.driver.executor(COMPONENT),
        pods,
        claims,
        gone: gone.clone(),
    };
    context.driver.run_reconciler(releaser, 10, |releaser, wiring| {
        wiring.primary(&releaser.claims);
        wiring.map(&releaser.pods, move |change| {
            let Some(pod) = change.versions().next() else { return Vec::new() };
            if change.new.is_none() {
                gone.lock().add(uid(&pod.metadata));
            } else if !is_done(pod) {
                return Vec::new();
            }
            claims_of(pod)
        });
    });
}

fn keys(pods: &[Arc<Pod>]) -> Vec<ObjectKey> {
    pods.iter().map(|pod| ObjectKey::of(&pod.metadata)).collect()
}

/// The last pods that were seen to go, by uid: about these nobody needs to be asked.
#[derive(Default)]
struct Gone {
    known: HashSet<String>,
    order: VecDeque<String>,
}

impl Gone {
    const MOST: usize = 500;

    fn add(&mut self, uid: &str) {
        if self.known.insert(uid.to_owned()) {
            self.order.push_back(uid.to_owned());
        }
        if self.order.len() > Self::MOST
            && let Some(oldest) = self.order.pop_front()
        {
            self.known.remove(&oldest);
        }
    }

    fn has(&self, uid: &str) -> bool {
        self.known.contains(uid)
    }
}

/// None of the pod's containers runs, or ever will.
fn is_done(pod: &Pod) -> bool {
    facts::is_finished(pod) || (is_deleted(&pod.metadata) && facts::node_name(pod).is_none())
}

fn pod_claims(pod: &Pod) -> &[k8s_openapi::api::core::v1::PodResourceClaim] {
    pod.spec.as_ref().and_then(|spec| spec.resource_claims.as_deref()).unwrap_or_default()
}

/// The name of the claim that was made for one of the pod's claims: none if that is not known yet, an inner none if it
/// is known that there is none to be.
fn made_for<'a>(pod: &'a Pod, claim: &str) -> Option<Option<&'a str>> {
    let mut statuses = pod.status.iter().flat_map(|status| status.resource_claim_statuses.iter().flatten());
    statuses.find(|status| status.name == claim).map(|status| status.resource_claim_name.as_deref())
}

/// The claims that the pod uses, as far as they are known.
fn claims_of(pod: &Pod) -> Vec<ObjectKey> {
    let named = pod_claims(pod).iter().filter_map(|claim| match &claim.resource_claim_name {
        Some(name) => Some(name.as_str()),
        None => made_for(pod, &claim.name).flatten(),
    });
    let extended = pod.status.as_ref().and_then(|status| status.extended_resource_claim_status.as_ref());
    let extended = extended.map(|status| status.resource_claim_name.as_str());
    named.chain(extended).map(|claim| ObjectKey::new(namespace(&pod.metadata), claim)).collect()
}

fn templates_of(pod: &Pod) -> Vec<String> {
    let templates = pod_claims(pod).iter().filter_map(|claim| claim.resource_claim_template_name.as_deref());
    templates.map(|template| ObjectKey::new(namespace(&pod.metadata), template).to_string()).collect()
}

/// Name and uid of the pod that the claim was made for.
fn owning_pod(claim: &ResourceClaim) -> Option<(&str, &str)> {
    let owner = controller_of(&claim.metadata).filter(|owner| owner.api_version == "v1" && owner.kind == "Pod")?;
    Some((&owner.name, &owner.uid))
}

fn reserved_for(claim: &ResourceClaim) -> &[ResourceClaimConsumerReference] {
    claim.status.as_ref().and_then(|status| status.reserved_for.as_deref()).unwrap_or_default()
}

fn is_allocated(claim: &ResourceClaim) -> bool {
    claim.status.as_ref().is_some_and(|status| status.allocation.is_some())
}

fn has_finalizer(claim: &ResourceClaim) -> bool {
    claim.metadata.finalizers.iter().flatten().any(|finalizer| finalizer == FINALIZER)
}

fn is_made_for(claim: &ResourceClaim, pod: &Pod) -> bool {
    owning_pod(claim) == Some((name(&pod.metadata), uid(&pod.metadata)))
}
