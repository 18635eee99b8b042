//! The side of the claims: reservations of pods that have ended go; with the last one goes the allocation, so that the
//! next pod may get the devices of another node; and with it the claim, if it was made for that pod.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use apimachinery::controller::{
    Executor, Informer, ObjectKey, Plan, ReconcileError, Reconciler, ResourceId, Rest, Write,
};
use async_trait::async_trait;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::resource::v1::{ResourceClaim, ResourceClaimConsumerReference};
use parking_lot::Mutex;
use serde_json::{Value, json};

use super::{FINALIZER, Gone, has_finalizer, is_allocated, is_done, owning_pod, reserved_for};
use crate::common::{is_deleted, namespace, uid};

pub struct ClaimReleaser {
    pub rest: Rest,
    pub executor: Executor,
    pub pods: Arc<Informer<Pod>>,
    pub claims: Arc<Informer<ResourceClaim>>,
    pub gone: Arc<Mutex<Gone>>,
}

/// What is to become of a claim.
#[derive(Debug, Default, PartialEq)]
pub struct Release {
    /// The reservations that stay, if some go.
    pub remaining: Option<Vec<ResourceClaimConsumerReference>>,
    pub deallocate: bool,
    /// Nothing keeps the claim from being deleted.
    pub unprotect: bool,
    /// The claim was made for a pod that needs it no more.
    pub delete: bool,
}

#[async_trait]
impl Reconciler for ClaimReleaser {
    fn name(&self) -> &'static str {
        "resource-claim-release"
    }

    async fn reconcile(&self, key: &ObjectKey) -> Result<Option<Duration>, ReconcileError> {
        let Some(claim) = self.claims.get(key) else { return Ok(None) };
        let ended = self.ended(&claim).await?;
        let owner = owning_pod(&claim).and_then(|(name, _)| self.pods.get(&ObjectKey::new(&key.namespace, name)));
        let release = decide(&claim, &ended, owner.as_deref());
        self.carry_out(key, &claim, release).await?;
        Ok(None)
    }
}

impl ClaimReleaser {
    /// The pods, by uid, that the claim is reserved for in vain. Only what is certain counts: the scheduler may have
    /// seen a pod before it is known here.
    async fn ended(&self, claim: &ResourceClaim) -> Result<HashSet<String>, ReconcileError> {
        let mut ended = HashSet::new();
        for consumer in reserved_for(claim) {
            if !is_pod(consumer) {
                continue;
            }
            let key = ObjectKey::new(namespace(&claim.metadata), &consumer.name);
            let over = if self.gone.lock().has(&consumer.uid) {
                true
            } else if let Some(pod) = self.pods.get(&key) {
                uid(&pod.metadata) != consumer.uid || is_done(&pod)
            } else {
                self.is_missing(&key, &consumer.uid).await?
            };
            if over {
                ended.insert(consumer.uid.clone());
            }
        }
        Ok(ended)
    }

    async fn is_missing(&self, key: &ObjectKey, uid: &str) -> kube::Result<bool> {
        match self.rest.get(&ResourceId::of::<Pod>().path(&key.namespace, &key.name, "")).await {
            Ok(pod) => Ok(pod["metadata"]["uid"] != uid),
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(true),
            Err(error) => Err(error),
        }
    }

    /// Each write stands on the answer to the one before: whoever uses the claim meanwhile makes the next one fail.
    async fn carry_out(&self, key: &ObjectKey, claim: &ResourceClaim, release: Release) -> Result<(), ReconcileError> {
        let mut object = json!(claim);
        object["apiVersion"] = json!("resource.k8s.io/v1");
        object["kind"] = json!("ResourceClaim");
        if release.remaining.is_some() || release.deallocate {
            if let Some(remaining) = release.remaining {
                object["status"]["reservedFor"] = json!(remaining);
            }
            if release.deallocate {
                object["status"]["allocation"] = Value::Null;
            }
            object = self.replace(key, "status", &object).await?;
        }
        if release.unprotect {
            if let Some(finalizers) = object["metadata"]["finalizers"].as_array_mut() {
                finalizers.retain(|finalizer| finalizer != FINALIZER);
            }
            self.replace(key, "", &object).await?;
        }
        if release.delete {
            self.executor.run(Plan::write(Write::delete(claim))).await?;
        }
        Ok(())
    }

    async fn replace(&self, key: &ObjectKey, subresource: &str, object: &Value) -> kube::Result<Value> {
        let path = ResourceId::of::<ResourceClaim>().path(&key.namespace, &key.name, subresource);
        self.rest.replace(&path, object).await
    }
}

fn is_pod(consumer: &ResourceClaimConsumerReference) -> bool {
    consumer.api_group.as_deref().unwrap_or("").is_empty() && consumer.resource == "pods"
}

/// What becomes of the claim when the pods with these uids have ended. `owner` is the pod of the owner's name.
pub fn decide(claim: &ResourceClaim, ended: &HashSet<String>, owner: Option<&Pod>) -> Release {
    let reserved = reserved_for(claim);
    let stays = |consumer: &&ResourceClaimConsumerReference| !is_pod(consumer) || !ended.contains(&consumer.uid);
    let remaining: Vec<_> = reserved.iter().filter(stays).cloned().collect();
    let freed = remaining.len() < reserved.len();
    let unused = remaining.is_empty();
    let over = unused && (freed || is_deleted(&claim.metadata)) && has_finalizer(claim);
    let is_owner = |pod: &Pod| owning_pod(claim).is_some_and(|(_, owner)| owner == uid(&pod.metadata));
    Release {
        deallocate: over && is_allocated(claim),
        unprotect: over,
        delete: unused && !is_deleted(&claim.metadata) && owner.is_some_and(|pod| !is_owner(pod) || is_done(pod)),
        remaining: freed.then_some(remaining),
    }
}
