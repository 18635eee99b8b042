//! Which volumes need attaching: those of CSI drivers that pods on a node use through claims, and under which names
//! they and their attachments go.

use std::collections::BTreeMap;
use std::sync::Arc;

use apimachinery::controller::{Informer, ObjectKey, is_controlled_by};
use k8s_openapi::api::core::v1::{
    CSIPersistentVolumeSource, ContainerStatus, PersistentVolume, PersistentVolumeClaim, Pod, Volume,
};
use k8s_openapi::api::storage::v1::{CSIDriver, VolumeAttachment};
use sha2::{Digest, Sha256};

use super::super::node_lifecycle::{NODE_INDEX, index_by_node};
use super::super::volume_protection::{CLAIM_INDEX, index_by_claim};
use crate::common::{is_deleted, name, namespace, pods, uid};

/// Volumes by what their driver calls them: several objects may stand for one volume.
const HANDLE_INDEX: &str = "handle";
/// Attachments by the volume object that they attach.
const VOLUME_INDEX: &str = "volume";

/// The informers behind both the wishes and the attachments.
#[derive(Clone)]
pub struct Volumes {
    pub pods: Arc<Informer<Pod>>,
    pub claims: Arc<Informer<PersistentVolumeClaim>>,
    pub volumes: Arc<Informer<PersistentVolume>>,
    pub attachments: Arc<Informer<VolumeAttachment>>,
    pub drivers: Arc<Informer<CSIDriver>>,
}

/// A volume that pods of a node need.
pub struct Wanted {
    pub volume: Arc<PersistentVolume>,
    pub pods: Vec<Arc<Pod>>,
}

impl Volumes {
    pub fn add_indexes(&self) {
        index_by_node(&self.pods);
        self.attachments.add_index(NODE_INDEX, |attachment| vec![attachment.spec.node_name.clone()]);
        self.attachments.add_index(VOLUME_INDEX, |attachment| {
            attachment.spec.source.persistent_volume_name.iter().cloned().collect()
        });
        self.volumes.add_index(HANDLE_INDEX, |volume| csi(volume).map(unique_name).into_iter().collect());
        index_by_claim(&self.pods);
    }

    /// What the pods of the node need, by unique name.
    pub fn wanted(&self, node: &str) -> BTreeMap<String, Wanted> {
        let mut wanted: BTreeMap<String, Wanted> = BTreeMap::new();
        for pod in self.pods.indexed(NODE_INDEX, node).into_iter().filter(|pod| needs_volumes(pod)) {
            for volume in claims_of(&pod).filter_map(|(key, ephemeral)| self.volume(&pod, &key, ephemeral)) {
                let Some(source) = csi(&volume).filter(|source| self.is_attachable(source)) else { continue };
                let entry = wanted.entry(unique_name(source)).or_insert_with(|| Wanted { volume, pods: Vec::new() });
                if !entry.pods.iter().any(|known| Arc::ptr_eq(known, &pod)) {
                    entry.pods.push(pod.clone());
                }
            }
        }
        wanted
    }

    /// The volume behind a claim of the pod, once both sides agree that they are bound.
    fn volume(&self, pod: &Pod, claim: &ObjectKey, ephemeral: bool) -> Option<Arc<PersistentVolume>> {
        let claim = self.claims.get(claim)?;
        if ephemeral && !is_controlled_by(&claim.metadata, uid(&pod.metadata)) {
            return None;
        }
        let bound = claim.status.as_ref()?.phase.as_deref() == Some("Bound");
        let volume = claim.spec.as_ref()?.volume_name.as_deref().filter(|name| bound && !name.is_empty())?;
        let volume = self.volumes.get(&ObjectKey::cluster(volume))?;
        let bound_to = volume.spec.as_ref()?.claim_ref.as_ref()?.uid.as_deref();
        (bound_to == Some(uid(&claim.metadata))).then_some(volume)
    }

    /// A driver that says nothing about itself needs attaching.
    fn is_attachable(&self, source: &CSIPersistentVolumeSource) -> bool {
        let driver = self.drivers.get(&ObjectKey::cluster(&source.driver));
        driver.is_none_or(|driver| driver.spec.attach_required != Some(false))
    }

    /// This controller's attachments on the node, with the unique names of their volumes. It knows them by their names:
    /// those that somebody else made are not its business.
    pub fn attachments_on(&self, node: &str) -> Vec<(String, Arc<VolumeAttachment>)> {
        let own = |attachment: Arc<VolumeAttachment>| {
            let volume = attachment.spec.source.persistent_volume_name.as_deref()?;
            let volume = self.volumes.get(&ObjectKey::cluster(volume))?;
            let source = csi(&volume)?;
            (name(&attachment.metadata) == attachment_name(source, node)).then(|| (unique_name(source), attachment))
        };
        self.attachments.indexed(NODE_INDEX, node).into_iter().filter_map(own).collect()
    }

    /// The other nodes that the volume is attached to, or may be.
    pub fn attached_elsewhere(&self, unique_name: &str, node: &str) -> Vec<String> {
        let volumes = self.volumes.indexed(HANDLE_INDEX, unique_name);
        let attachments =
            volumes.iter().flat_map(|volume| self.attachments.indexed(VOLUME_INDEX, name(&volume.metadata)));
        let nodes = attachments.map(|attachment| attachment.spec.node_name.clone());
        nodes.filter(|other| other != node).collect()
    }

    /// The nodes that a change of the volume concerns: those that it is attached to, and those of its pods.
    pub fn nodes_of_volume(&self, volume: &PersistentVolume) -> Vec<ObjectKey> {
        let same = csi(volume).map(|source| self.volumes.indexed(HANDLE_INDEX, &unique_name(source)));
        let mut nodes = Vec::new();
        for volume in same.iter().flatten().map(Arc::as_ref).chain([volume]) {
            let attachments = self.attachments.indexed(VOLUME_INDEX, name(&volume.metadata));
            nodes.extend(attachments.iter().map(|attachment| ObjectKey::cluster(&attachment.spec.node_name)));
            if let Some(claim) = volume.spec.as_ref().and_then(|spec| spec.claim_ref.as_ref()) {
                let (namespace, name) = (claim.namespace.as_deref(), claim.name.as_deref());
                nodes.extend(self.nodes_of_claim(&ObjectKey::new(namespace.unwrap_or(""), name.unwrap_or(""))));
            }
        }
        nodes
    }

    /// The nodes of the pods that use the claim.
    pub fn nodes_of_claim(&self, claim: &ObjectKey) -> Vec<ObjectKey> {
        let pods = self.pods.indexed(CLAIM_INDEX, &claim.to_string());
        pods.iter().filter_map(|pod| pods::node_name(pod)).map(ObjectKey::cluster).collect()
    }
}

/// The claims that the pod uses, and whether each is one of the pod's own.
pub fn claims_of(pod: &Pod) -> impl Iterator<Item = (ObjectKey, bool)> {
    let claim = move |volume: &Volume| match (&volume.persistent_volume_claim, &volume.ephemeral) {
        (Some(claim), _) => Some((ObjectKey::new(namespace(&pod.metadata), &claim.claim_name), false)),
        (None, Some(_)) => {
            let claim = format!("{}-{}", name(&pod.metadata), volume.name);
            Some((ObjectKey::new(namespace(&pod.metadata), &claim), true))
        }
        (None, None) => None,
    };
    pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten()).filter_map(claim)
}

/// A pod needs its volumes until it has ended, or is deleted and none of its containers may still run.
pub fn needs_volumes(pod: &Pod) -> bool {
    let mut statuses = pod.status.iter().flat_map(|status| status.container_statuses.iter().flatten());
    let may_run = |status: &ContainerStatus| {
        status.state.as_ref().is_none_or(|state| state.terminated.is_none() && state.waiting.is_none())
    };
    !pods::is_finished(pod) && (!is_deleted(&pod.metadata) || statuses.any(may_run))
}

pub fn csi(volume: &PersistentVolume) -> Option<&CSIPersistentVolumeSource> {
    volume.spec.as_ref()?.csi.as_ref()
}

/// The volume's name in the status of nodes.
pub fn unique_name(source: &CSIPersistentVolumeSource) -> String {
    format!("kubernetes.io/csi/{}^{}", source.driver, source.volume_handle)
}

/// The name of the attachment of the volume to the node, which kubelets and drivers compute as well.
pub fn attachment_name(source: &CSIPersistentVolumeSource, node: &str) -> String {
    let digest = Sha256::digest(format!("{}{}{node}", source.volume_handle, source.driver));
    digest.iter().fold("csi-".to_owned(), |name, byte| format!("{name}{byte:02x}"))
}

/// Whether the volume may be attached to several nodes: it says so, or does not say anything.
pub fn is_shareable(volume: &PersistentVolume) -> bool {
    let modes = volume.spec.as_ref().and_then(|spec| spec.access_modes.as_deref()).unwrap_or_default();
    modes.is_empty() || modes.iter().any(|mode| mode == "ReadWriteMany" || mode == "ReadOnlyMany")
}
