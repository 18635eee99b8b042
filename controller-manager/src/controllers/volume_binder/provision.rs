//! Claims for which there is no volume: asking the provisioner of their class, in the annotations that provisioners
//! watch for, or saying what they wait for.

use apimachinery::controller::{EventType, ObjectKey};
use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use k8s_openapi::api::storage::v1::StorageClass;

use super::super::volume_protection::CLAIM_INDEX;
use super::claim_class;
use super::claims::Binder;
use crate::common::{annotation, name, pods};

pub const PROVISIONER: &str = "volume.kubernetes.io/storage-provisioner";
pub const OLD_PROVISIONER: &str = "volume.beta.kubernetes.io/storage-provisioner";
/// The scheduler's choice, with which provisioning may begin.
const SELECTED_NODE: &str = "volume.kubernetes.io/selected-node";
const DEFAULT: [&str; 2] =
    ["storageclass.kubernetes.io/is-default-class", "storageclass.beta.kubernetes.io/is-default-class"];
/// Provisioners that were once built in, and the drivers that have taken over from them.
const MIGRATED: [(&str, &str); 7] = [
    ("kubernetes.io/aws-ebs", "ebs.csi.aws.com"),
    ("kubernetes.io/azure-disk", "disk.csi.azure.com"),
    ("kubernetes.io/azure-file", "file.csi.azure.com"),
    ("kubernetes.io/cinder", "cinder.csi.openstack.org"),
    ("kubernetes.io/gce-pd", "pd.csi.storage.gke.io"),
    ("kubernetes.io/portworx-volume", "pxd.portworx.com"),
    ("kubernetes.io/vsphere-volume", "csi.vsphere.vmware.com"),
];

/// An event about a claim.
pub struct Note {
    pub type_: EventType,
    pub reason: &'static str,
    pub message: String,
}

/// What is to be done for a claim without a volume.
pub enum Step {
    /// It has no class, and there is a default one.
    Class(String),
    /// This provisioner is asked.
    Ask(String, Note),
    Wait(Note),
}

impl Binder {
    /// Whether the claim's class leaves the choice of the volume to the scheduler.
    pub fn waits_for_a_pod(&self, claim: &PersistentVolumeClaim) -> bool {
        let class = claim_class(claim).and_then(|class| self.classes.get(&ObjectKey::cluster(class)));
        class.is_some_and(|class| class.volume_binding_mode.as_deref() == Some("WaitForFirstConsumer"))
    }

    pub fn without_volume(&self, claim: &PersistentVolumeClaim) -> Step {
        let note = |type_, reason, message| Note { type_, reason, message };
        let Some(class_name) = claim_class(claim) else {
            return self.default_class().map_or_else(|| Step::Wait(no_class()), Step::Class);
        };
        if class_name.is_empty() {
            return Step::Wait(no_class());
        }
        if self.waits_for_a_pod(claim) && annotation(&claim.metadata, SELECTED_NODE).is_none() {
            return Step::Wait(self.waits_for(claim));
        }
        let Some(class) = self.classes.get(&ObjectKey::cluster(class_name)) else {
            let message = format!("storageclass.storage.k8s.io \"{class_name}\" not found");
            return Step::Wait(note(EventType::Warning, "ProvisioningFailed", message));
        };
        match external(&class) {
            Some(provisioner) => {
                let message = format!(
                    "Waiting for a volume to be created either by the external provisioner '{provisioner}' or manually \
                     by the system administrator. If volume creation is delayed, please verify that the provisioner is \
                     running and correctly registered."
                );
                Step::Ask(provisioner.to_owned(), note(EventType::Normal, "ExternalProvisioning", message))
            }
            None => {
                let message = format!("no volume plugin matched name: {}", class.provisioner);
                Step::Wait(note(EventType::Warning, "ProvisioningFailed", message))
            }
        }
    }

    /// The newest of the default classes.
    fn default_class(&self) -> Option<String> {
        let classes = self.classes.list();
        let is_default =
            |class: &StorageClass| DEFAULT.iter().any(|key| annotation(&class.metadata, key) == Some("true"));
        let defaults = classes.iter().filter(|class| is_default(class));
        // Listed by name: of several as new as each other the first one counts.
        let newest = defaults.rev().max_by_key(|class| class.metadata.creation_timestamp.as_ref().map(|time| time.0));
        newest.map(|class| name(&class.metadata).to_owned())
    }

    fn waits_for(&self, claim: &PersistentVolumeClaim) -> Note {
        let pods = self.pods.indexed(CLAIM_INDEX, &ObjectKey::of(&claim.metadata).to_string());
        let unscheduled = pods.iter().filter(|pod| !pods::is_finished(pod) && pods::node_name(pod).is_none());
        let names: Vec<_> = unscheduled.map(|pod| name(&pod.metadata)).collect();
        let (reason, message) = match names.as_slice() {
            [] => ("WaitForFirstConsumer", "waiting for first consumer to be created before binding".to_owned()),
            [pod] => ("WaitForPodScheduled", format!("waiting for pod {pod} to be scheduled")),
            pods => ("WaitForPodScheduled", format!("waiting for pods {} to be scheduled", pods.join(","))),
        };
        Note { type_: EventType::Normal, reason, message }
    }
}

/// The provisioner of the class, unless the name is one of the built-in ones, of which none is left.
fn external(class: &StorageClass) -> Option<&str> {
    let name = class.provisioner.as_str();
    let migrated = MIGRATED.iter().find(|(old, _)| *old == name).map(|(_, driver)| *driver);
    migrated.or_else(|| (!name.starts_with("kubernetes.io/")).then_some(name))
}

fn no_class() -> Note {
    let message = "no persistent volumes available for this claim and no storage class is set".to_owned();
    Note { type_: EventType::Normal, reason: "FailedBinding", message }
}
