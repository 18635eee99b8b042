//! Attaches the volumes of CSI drivers to the nodes whose pods need them, and detaches them when no pod does: it makes
//! and deletes `VolumeAttachment` objects, which the drivers act on, and tells each kubelet in its node's
//! `volumesAttached` what may be mounted.
//!
//! A volume is detached in two steps, each of which shows in the node: first it is no longer listed in
//! `volumesAttached`; then, if the kubelet has not meanwhile reported it in `volumesInUse` (which it does before it looks
//! whether it may mount), the attachment goes. Both lists are read from one version of the node, so neither side can
//! miss the other.

mod volumes;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use apimachinery::controller::{Controller, EventType, Informer, ObjectKey, Plan, Wiring, Write, object_reference};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{AttachedVolume, Node, Pod};
use k8s_openapi::api::storage::v1::{VolumeAttachment, VolumeAttachmentSource, VolumeAttachmentSpec};
use kube::api::ObjectMeta;
use parking_lot::Mutex;

use crate::app::Context;
use crate::common::{annotation, elapsed, is_deleted, name, namespace, pods};
use volumes::{Volumes, Wanted, attachment_name, claims_of, csi, is_shareable, needs_volumes};

/// Nodes without it attach their volumes themselves.
const MANAGED: &str = "volumes.kubernetes.io/controller-managed-attach-detach";
const OUT_OF_SERVICE: &str = "node.kubernetes.io/out-of-service";
/// So long a kubelet may take to unmount; from a node that is not ready the volume is taken away then.
const MAX_WAIT_FOR_UNMOUNT: Duration = Duration::from_secs(6 * 60);

struct AttachDetachController {
    volumes: Volumes,
    nodes: Arc<Informer<Node>>,
    /// Whether a volume may be taken from a node that is not ready before the node says that it is unmounted.
    force_detach: bool,
    memory: Mutex<HashMap<String, Memory>>,
}

/// What the objects do not tell about a node; after a restart it is found out again.
#[derive(Clone, Default)]
struct Memory {
    /// What the node last said that it has in use: a node that is gone has not unmounted anything.
    in_use: BTreeSet<String>,
    /// Since when attached volumes, by unique name, have not been needed.
    unneeded_since: HashMap<String, Timestamp>,
    /// The last trouble with a volume that was told, by unique name.
    told: HashMap<String, String>,
}

pub fn start(context: &Context) {
    let informers = context.driver.informers();
    let volumes = Volumes {
        pods: informers.of(),
        claims: informers.of(),
        volumes: informers.of(),
        attachments: informers.of(),
        drivers: informers.of(),
    };
    volumes.add_indexes();
    let controller = AttachDetachController {
        volumes,
        nodes: informers.of(),
        force_detach: !context.options.disable_force_detach_on_timeout,
        memory: Mutex::default(),
    };
    // One at a time: two nodes must not take one volume. Keys are nodes.
    context.driver.run(controller, 1, |controller, wiring| {
        wire_nodes_and_pods(controller, wiring);
        let volumes = controller.volumes.clone();
        wiring.map(&controller.volumes.claims, move |change| {
            change
                .versions()
                .take(1)
                .flat_map(|claim| volumes.nodes_of_claim(&ObjectKey::of(&claim.metadata)))
                .collect()
        });
        let volumes = controller.volumes.clone();
        wiring.map(&controller.volumes.volumes, move |change| {
            change.versions().take(1).flat_map(|volume| volumes.nodes_of_volume(volume)).collect()
        });
        let volumes = controller.volumes.clone();
        wiring.map(&controller.volumes.attachments, move |change| {
            let Some(attachment) = change.versions().next() else { return Vec::new() };
            let volume = attachment.spec.source.persistent_volume_name.as_deref().unwrap_or("");
            let waiting =
                volumes.volumes.get(&ObjectKey::cluster(volume)).map(|volume| volumes.nodes_of_volume(&volume));
            waiting.into_iter().flatten().chain([ObjectKey::cluster(&attachment.spec.node_name)]).collect()
        });
        let nodes = controller.nodes.clone();
        wiring.map(&controller.volumes.drivers, move |_| {
            nodes.list().iter().map(|node| ObjectKey::of(&node.metadata)).collect()
        });
    });
}

fn wire_nodes_and_pods(controller: &AttachDetachController, wiring: &Wiring) {
    wiring.map(&controller.nodes, |change| {
        // Most changes of a node are of no interest here.
        let relevant = |node: &Arc<Node>| {
            let status = node.status.as_ref();
            let lists = status.map(|status| (status.volumes_attached.clone(), status.volumes_in_use.clone()));
            (is_managed(node), is_ready(node), is_out_of_service(node), lists)
        };
        let same =
            change.old.as_ref().zip(change.new.as_ref()).is_some_and(|(old, new)| relevant(old) == relevant(new));
        change.versions().take(usize::from(!same)).map(|node| ObjectKey::of(&node.metadata)).collect()
    });
    wiring.map(&controller.volumes.pods, |change| {
        let relevant = |pod: &Arc<Pod>| (pods::node_name(pod).map(str::to_owned), needs_volumes(pod));
        let same =
            change.old.as_ref().zip(change.new.as_ref()).is_some_and(|(old, new)| relevant(old) == relevant(new));
        let with_claims = change.versions().filter(|pod| !same && claims_of(pod).next().is_some());
        with_claims.filter_map(|pod| pods::node_name(pod)).map(ObjectKey::cluster).collect()
    });
}

impl Controller for AttachDetachController {
    fn name(&self) -> &'static str {
        "persistentvolume-attach-detach"
    }

    fn component(&self) -> &'static str {
        "attachdetach-controller"
    }

    fn reconcile(&self, key: &ObjectKey, now: Timestamp) -> Plan {
        let node = self.nodes.get(key);
        let wanted = match &node {
            Some(node) if !is_managed(node) => return Plan::nothing(),
            Some(_) => self.volumes.wanted(&key.name),
            None => BTreeMap::new(),
        };
        let mut look = Look::new(&key.name, node, self.memory.lock().remove(&key.name).unwrap_or_default());
        let attachments = self.volumes.attachments_on(&key.name);
        let mut plan = Plan::nothing();
        let mut listed = BTreeSet::new();
        for (volume, attachment) in &attachments {
            let detach = match wanted.get(volume) {
                Some(_) => None,
                None => Some(look.may_detach(volume, self.force_detach, now, &mut plan)),
            };
            let attached = attachment.status.as_ref().is_some_and(|status| status.attached);
            if attached && !is_deleted(&attachment.metadata) && detach != Some(true) {
                listed.insert(volume.clone());
            } else if detach == Some(true) && !look.listed.contains(volume) && !is_deleted(&attachment.metadata) {
                plan.push(Write::delete(attachment.as_ref()));
            }
        }
        for (volume, wanted) in &wanted {
            let attachment = attachments.iter().find(|(name, _)| name == volume).map(|(_, attachment)| &**attachment);
            self.attach(&mut look, volume, wanted, attachment, &mut plan);
        }
        look.forget_all_but(&wanted, &attachments);
        if let Some(write) = look.list(&listed) {
            plan.writes.insert(0, write);
        }
        if !(attachments.is_empty() && look.memory.told.is_empty()) {
            self.memory.lock().insert(key.name.clone(), look.memory);
        }
        plan
    }
}

impl AttachDetachController {
    /// Brings a wanted volume one step nearer to the node, and tells its pods how it goes.
    fn attach(
        &self,
        look: &mut Look<'_>,
        volume: &str,
        wanted: &Wanted,
        attachment: Option<&VolumeAttachment>,
        plan: &mut Plan,
    ) {
        look.memory.unneeded_since.remove(volume);
        let Some(source) = csi(&wanted.volume) else { return };
        let volume_name = name(&wanted.volume.metadata);
        let failed = |why: &str| format!("AttachVolume.Attach failed for volume \"{volume_name}\" : {why}");
        let Some(attachment) = attachment else {
            let elsewhere = if is_shareable(&wanted.volume) {
                Vec::new()
            } else {
                self.volumes.attached_elsewhere(volume, look.name)
            };
            if elsewhere.is_empty() {
                look.memory.told.remove(volume);
                plan.push(
                    Write::create(&new_attachment(
                        attachment_name(source, look.name),
                        &source.driver,
                        wanted,
                        look.name,
                    ))
                    .if_absent(),
                );
            } else if look.memory.told.insert(volume.to_owned(), String::new()).is_none() {
                self.tell_who_has_it(volume, wanted, &elsewhere, plan);
            }
            return;
        };
        let status = attachment.status.as_ref();
        if is_deleted(&attachment.metadata) {
            look.tell(volume, wanted, failed("volume attachment is being deleted"), plan);
        } else if status.is_some_and(|status| status.attached) {
            look.memory.told.remove(volume);
            if !look.listed.contains(volume) {
                let message = format!("AttachVolume.Attach succeeded for volume \"{volume_name}\" ");
                tell_pods(wanted, EventType::Normal, "SuccessfulAttachVolume", &message, plan);
            }
        } else if let Some(error) = status.and_then(|status| status.attach_error.as_ref()) {
            look.tell(volume, wanted, failed(error.message.as_deref().unwrap_or("")), plan);
        }
    }

    /// Tells the pods that wait for a volume what keeps it: names of pods to those of the same namespace only.
    fn tell_who_has_it(&self, volume: &str, wanted: &Wanted, nodes: &[String], plan: &mut Plan) {
        let users = nodes.iter().filter_map(|node| self.volumes.wanted(node).remove(volume));
        let users: Vec<Arc<Pod>> = users.flat_map(|wanted| wanted.pods).collect();
        for pod in &wanted.pods {
            let (local, others): (Vec<_>, Vec<_>) =
                users.iter().partition(|user| namespace(&user.metadata) == namespace(&pod.metadata));
            let names = local.iter().map(|user| name(&user.metadata)).collect::<Vec<_>>().join(", ");
            let others = others.len();
            let why = match (local.is_empty(), others) {
                (true, 0) => "Volume is already exclusively attached to one node, waiting on detach before it can be \
                              attached to another node"
                    .to_owned(),
                (true, _) => format!("Volume is already used by {others} pod(s) in different namespaces"),
                (false, 0) => format!("Volume is already used by pod(s) {names}"),
                (false, _) => {
                    format!("Volume is already used by pod(s) {names} and {others} pod(s) in different namespaces")
                }
            };
            let message = format!("Waiting for detach for volume \"{}\" {why}", name(&wanted.volume.metadata));
            plan.event(object_reference(pod.as_ref()), EventType::Warning, "FailedAttachVolume", message);
        }
    }
}

/// One look at a node, with what is remembered of it.
struct Look<'a> {
    name: &'a str,
    node: Option<Arc<Node>>,
    /// The volumes that the node's status says are attached.
    listed: BTreeSet<String>,
    memory: Memory,
}

impl<'a> Look<'a> {
    fn new(name: &'a str, node: Option<Arc<Node>>, mut memory: Memory) -> Self {
        let status = node.as_ref().and_then(|node| node.status.as_ref());
        let attached = status.iter().flat_map(|status| status.volumes_attached.iter().flatten());
        let listed = attached.map(|volume| volume.name.clone()).collect();
        if node.is_some() {
            memory.in_use = status.iter().flat_map(|status| status.volumes_in_use.iter().flatten()).cloned().collect();
        }
        Self { name, node, listed, memory }
    }

    /// Whether a volume that nobody needs can be taken away now; if it must wait, the plan says how long.
    fn may_detach(&mut self, volume: &str, force: bool, now: Timestamp, plan: &mut Plan) -> bool {
        let since = *self.memory.unneeded_since.entry(volume.to_owned()).or_insert(now);
        let out_of_service = self.node.as_ref().is_some_and(|node| is_out_of_service(node));
        if out_of_service || !self.memory.in_use.contains(volume) {
            return true;
        }
        let ready = self.node.as_ref().is_some_and(|node| is_ready(node));
        match MAX_WAIT_FOR_UNMOUNT.checked_sub(elapsed(since, now)) {
            Some(left) if !left.is_zero() => {
                plan.again_after(left);
                false
            }
            _ => force && !ready,
        }
    }

    /// The write after which the node lists exactly these volumes as attached, if it does not yet.
    fn list(&self, volumes: &BTreeSet<String>) -> Option<Write> {
        let node = self.node.as_ref().filter(|_| self.listed != *volumes)?;
        let mut next = node.as_ref().clone();
        let attached = volumes.iter().map(|name| AttachedVolume { name: name.clone(), device_path: String::new() });
        let attached: Vec<_> = attached.collect();
        next.status.get_or_insert_default().volumes_attached = (!attached.is_empty()).then_some(attached);
        Write::status(node.as_ref(), &next)
    }

    fn tell(&mut self, volume: &str, wanted: &Wanted, message: String, plan: &mut Plan) {
        if self.memory.told.get(volume) != Some(&message) {
            tell_pods(wanted, EventType::Warning, "FailedAttachVolume", &message, plan);
            self.memory.told.insert(volume.to_owned(), message);
        }
    }

    fn forget_all_but(&mut self, wanted: &BTreeMap<String, Wanted>, attachments: &[(String, Arc<VolumeAttachment>)]) {
        let is_attached = |volume: &String| attachments.iter().any(|(name, _)| name == volume);
        self.memory.unneeded_since.retain(|volume, _| is_attached(volume));
        self.memory.told.retain(|volume, _| wanted.contains_key(volume));
    }
}

fn tell_pods(wanted: &Wanted, type_: EventType, reason: &str, message: &str, plan: &mut Plan) {
    for pod in &wanted.pods {
        plan.event(object_reference(pod.as_ref()), type_, reason, message.to_owned());
    }
}

fn new_attachment(name: String, driver: &str, wanted: &Wanted, node: &str) -> VolumeAttachment {
    VolumeAttachment {
        metadata: ObjectMeta { name: Some(name), ..ObjectMeta::default() },
        spec: VolumeAttachmentSpec {
            attacher: driver.to_owned(),
            node_name: node.to_owned(),
            source: VolumeAttachmentSource {
                persistent_volume_name: wanted.volume.metadata.name.clone(),
                inline_volume_spec: None,
            },
        },
        status: None,
    }
}

fn is_managed(node: &Node) -> bool {
    annotation(&node.metadata, MANAGED).is_some()
}

fn is_ready(node: &Node) -> bool {
    let mut conditions = node.status.iter().flat_map(|status| status.conditions.iter().flatten());
    conditions.any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

fn is_out_of_service(node: &Node) -> bool {
    node.spec.iter().flat_map(|spec| spec.taints.iter().flatten()).any(|taint| taint.key == OUT_OF_SERVICE)
}
