//! VolumeBinding: a pod goes only where its volumes are, or can be. Claims that are bound must be reachable from the
//! node; claims of a class with `WaitForFirstConsumer` need a matching volume, or a provisioner, for that node. What has
//! to be written before the pod is bound is decided here ([`decide`]) and done by the scheduler.

use std::sync::Arc;

use apimachinery::controller::ObjectKey;
use apimachinery::meta::Quantity;
use imbl::OrdMap;
use k8s_openapi::api::core::v1::{Node, PersistentVolume, PersistentVolumeClaim};
use k8s_openapi::api::storage::v1::StorageClass;

use crate::cache::{NodeInfo, Snapshot};
use crate::framework::{ClusterEvent, Filter, Plugin, PreFilter, Rejection};
use crate::pod_info::PodInfo;
use crate::selectors::{NodeTerm, Selector};

pub struct VolumeBinding;

const NAME: &str = "VolumeBinding";
const NODE_CONFLICT: &str = "node(s) didn't match PersistentVolume's node affinity";
const BIND_CONFLICT: &str = "node(s) didn't find available persistent volumes to bind";
const NO_PROVISIONER: &str = "kubernetes.io/no-provisioner";
pub const SELECTED_NODE: &str = "volume.kubernetes.io/selected-node";

/// Claims, volumes and classes; cloning shares them.
#[derive(Clone, Default)]
pub struct Volumes {
    pub claims: OrdMap<(String, String), Arc<PersistentVolumeClaim>>,
    pub volumes: OrdMap<String, Arc<PersistentVolume>>,
    pub classes: OrdMap<String, Arc<StorageClass>>,
}

/// Something to write before the pod can be bound.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VolumeAction {
    /// Reserve a volume for a claim.
    Bind { volume: String, claim: ObjectKey },
    /// Ask the claim's provisioner for a volume that the node can reach.
    Provision { claim: ObjectKey, node: String },
}

#[derive(Clone)]
struct Check {
    volumes: Volumes,
    bound: Vec<Arc<PersistentVolume>>,
    waiting: Vec<Arc<PersistentVolumeClaim>>,
}

/// The names of the claims that a pod uses; a generic ephemeral volume has a claim named after pod and volume.
pub fn claim_names(pod: &PodInfo) -> Vec<String> {
    let volumes = pod.pod.spec.as_ref().and_then(|s| s.volumes.as_deref()).unwrap_or_default();
    volumes
        .iter()
        .filter_map(|volume| {
            let claim = volume.persistent_volume_claim.as_ref().map(|source| source.claim_name.clone());
            claim.or_else(|| volume.ephemeral.as_ref().map(|_| format!("{}-{}", pod.key.name, volume.name)))
        })
        .collect()
}

pub fn is_bound(claim: &PersistentVolumeClaim) -> bool {
    let named = claim.spec.as_ref().and_then(|s| s.volume_name.as_deref()).is_some_and(|name| !name.is_empty());
    let annotations = claim.metadata.annotations.as_ref();
    named && annotations.is_some_and(|a| a.contains_key("pv.kubernetes.io/bind-completed"))
}

fn class_name(claim: &PersistentVolumeClaim) -> &str {
    claim.spec.as_ref().and_then(|s| s.storage_class_name.as_deref()).unwrap_or("")
}

fn reachable(volume: &PersistentVolume, node: &Node) -> bool {
    let required = volume.spec.as_ref().and_then(|s| s.node_affinity.as_ref()).and_then(|a| a.required.as_ref());
    required.is_none_or(|s| s.node_selector_terms.iter().any(|term| NodeTerm::compile(term).matches(node)))
}

impl Volumes {
    fn waits_for_consumer(&self, claim: &PersistentVolumeClaim) -> bool {
        let class = self.classes.get(class_name(claim));
        class.is_some_and(|c| c.volume_binding_mode.as_deref() == Some("WaitForFirstConsumer"))
    }

    /// The smallest free volume that satisfies the claim and can be reached from the node.
    fn matching(&self, claim: &PersistentVolumeClaim, node: &Node, taken: &[String]) -> Option<&Arc<PersistentVolume>> {
        let spec = claim.spec.as_ref()?;
        let requested = capacity(spec.resources.as_ref().and_then(|r| r.requests.as_ref()))?;
        let selector = spec.selector.as_ref().map(|s| Selector::compile(Some(s)));
        let suitable = |volume: &&Arc<PersistentVolume>| {
            let Some(offer) = volume.spec.as_ref() else { return false };
            let name = volume.metadata.name.as_deref().unwrap_or("");
            let free = match &offer.claim_ref {
                None => !taken.iter().any(|t| t == name),
                Some(reference) => {
                    reference.name == claim.metadata.name && reference.namespace == claim.metadata.namespace
                }
            };
            let modes = offer.access_modes.as_deref().unwrap_or_default();
            let labels = volume.metadata.labels.clone().unwrap_or_default();
            free && volume.metadata.deletion_timestamp.is_none()
                && offer.storage_class_name.as_deref().unwrap_or("") == class_name(claim)
                && offer.volume_mode.as_deref().unwrap_or("Filesystem")
                    == spec.volume_mode.as_deref().unwrap_or("Filesystem")
                && spec.access_modes.iter().flatten().all(|mode| modes.contains(mode))
                && selector.as_ref().is_none_or(|s| s.matches(&labels))
                && capacity(offer.capacity.as_ref()).is_some_and(|size| size >= requested)
                && reachable(volume, node)
        };
        self.volumes
            .values()
            .filter(suitable)
            .min_by_key(|v| capacity(v.spec.as_ref().and_then(|s| s.capacity.as_ref())))
    }

    fn can_provision(&self, claim: &PersistentVolumeClaim, node: &Node) -> bool {
        let Some(class) = self.classes.get(class_name(claim)) else { return false };
        let labels = node.metadata.labels.as_ref();
        class.provisioner != NO_PROVISIONER
            && class.allowed_topologies.as_ref().is_none_or(|terms| {
                terms.is_empty()
                    || terms.iter().any(|term| {
                        term.match_label_expressions
                            .iter()
                            .flatten()
                            .all(|e| labels.and_then(|l| l.get(&e.key)).is_some_and(|value| e.values.contains(value)))
                    })
            })
    }
}

fn capacity(
    list: Option<&std::collections::BTreeMap<String, k8s_openapi::apimachinery::pkg::api::resource::Quantity>>,
) -> Option<i64> {
    list?.get("storage")?.0.parse::<Quantity>().ok().map(|quantity| quantity.value())
}

/// What has to be written for the pod's claims before it is bound to the node.
pub fn decide(pod: &PodInfo, node: &Node, volumes: &Volumes) -> Vec<VolumeAction> {
    let mut actions = Vec::new();
    let mut taken: Vec<String> = Vec::new();
    for name in claim_names(pod) {
        let Some(claim) = volumes.claims.get(&(pod.key.namespace.clone(), name.clone())) else { continue };
        if is_bound(claim) || !volumes.waits_for_consumer(claim) {
            continue;
        }
        let key = ObjectKey::new(&pod.key.namespace, &name);
        if let Some(volume) = volumes.matching(claim, node, &taken).and_then(|v| v.metadata.name.clone()) {
            taken.push(volume.clone());
            actions.push(VolumeAction::Bind { volume, claim: key });
        } else {
            let node = node.metadata.name.clone().unwrap_or_default();
            actions.push(VolumeAction::Provision { claim: key, node });
        }
    }
    actions
}

impl Plugin for VolumeBinding {
    fn name(&self) -> &'static str {
        NAME
    }

    fn events(&self) -> &'static [ClusterEvent] {
        &[ClusterEvent::VolumesChanged, ClusterEvent::NodeAdded, ClusterEvent::NodeLabelsChanged]
    }

    fn pre_filter(&self, pod: &Arc<PodInfo>, snapshot: &Snapshot) -> PreFilter {
        let names = claim_names(pod);
        if names.is_empty() {
            return PreFilter::Skip;
        }
        let volumes = &snapshot.volumes;
        let mut check = Check { volumes: volumes.clone(), bound: vec![], waiting: vec![] };
        let reject = |reason: String| PreFilter::Reject(vec![Rejection::unresolvable(NAME, reason)]);
        for name in names {
            let Some(claim) = volumes.claims.get(&(pod.key.namespace.clone(), name.clone())) else {
                return reject(format!("persistentvolumeclaim {name:?} not found"));
            };
            if claim.metadata.deletion_timestamp.is_some() {
                return reject(format!("persistentvolumeclaim {name:?} is being deleted"));
            }
            if is_bound(claim) {
                let volume =
                    claim.spec.as_ref().and_then(|s| s.volume_name.as_ref()).and_then(|v| volumes.volumes.get(v));
                match volume {
                    Some(volume) => check.bound.push(volume.clone()),
                    None => {
                        return reject(
                            "node(s) unavailable due to one or more pvc(s) bound to non-existent pv(s)".to_owned(),
                        );
                    }
                }
            } else if volumes.waits_for_consumer(claim) {
                check.waiting.push(claim.clone());
            } else {
                return reject("pod has unbound immediate PersistentVolumeClaims".to_owned());
            }
        }
        PreFilter::Check(Box::new(check))
    }
}

impl Filter for Check {
    fn filter(&self, node: &NodeInfo) -> Result<(), Vec<Rejection>> {
        if !self.bound.iter().all(|volume| reachable(volume, node.node())) {
            return Err(vec![Rejection::unresolvable(NAME, NODE_CONFLICT)]);
        }
        let mut taken: Vec<String> = Vec::new();
        for claim in &self.waiting {
            match self.volumes.matching(claim, node.node(), &taken) {
                Some(volume) => taken.extend(volume.metadata.name.clone()),
                None if self.volumes.can_provision(claim, node.node()) => {}
                None => return Err(vec![Rejection::unresolvable(NAME, BIND_CONFLICT)]),
            }
        }
        Ok(())
    }

    fn clone_box(&self) -> Box<dyn Filter> {
        Box::new(self.clone())
    }
}
