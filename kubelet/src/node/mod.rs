//! This machine as a node of the cluster: its object, its status, its lease.

pub mod machine;
pub mod readiness;
pub mod status;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::api::core::v1::{ContainerImage, Node, NodeSpec, NodeStatus, ObjectReference};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta, OwnerReference};
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client};
use serde_json::{Map, Value, json};
use tokio::sync::watch;

use crate::events::{Level, Recorder};
use crate::objects::api_error;
use crate::state::NodeState;
use crate::volumes::csi::{Names, VolumesInUse};
use machine::Machine;
use readiness::Obstacles;
use status::{Inputs, Offered};

/// How often a node that is not ready looks whether it has become so.
const IMPATIENT: Duration = Duration::from_millis(500);
const IMAGES_EVERY: Duration = Duration::from_secs(60);
const LEASES: &str = "kube-node-lease";

/// What identifies the node and does not change while the process runs.
#[derive(Clone)]
pub struct Identity {
    pub name: String,
    pub hostname: String,
    pub host_ips: Vec<String>,
    /// `--node-ip` was given.
    pub provided_ip: Option<String>,
    pub labels: BTreeMap<String, String>,
    pub schedulable: bool,
    pub runtime_version: String,
}

/// What parts of the kubelet have to say about the node, and wake-ups when that changes.
pub struct Sources {
    pub obstacles: watch::Receiver<Obstacles>,
    pub volumes_in_use: Arc<VolumesInUse>,
    pub devices: watch::Receiver<Offered>,
}

pub struct NodeAgent {
    state: Arc<NodeState>,
    sources: Sources,
    identity: Identity,
    machine: Machine,
    recorder: Recorder,
    nodes: Api<Node>,
    leases: Api<Lease>,
}

impl NodeAgent {
    pub fn new(
        state: Arc<NodeState>,
        sources: Sources,
        identity: Identity,
        machine: Machine,
        recorder: Recorder,
    ) -> Self {
        let client: Client = state.client.clone();
        Self {
            state,
            sources,
            identity,
            machine,
            recorder,
            nodes: Api::all(client.clone()),
            leases: Api::namespaced(client, LEASES),
        }
    }

    /// Registers the node and keeps its status and lease fresh until the process ends.
    /// The node's uid is announced as soon as it is known.
    pub async fn run(self, uid: watch::Sender<Option<String>>) {
        let node = self.register_until_done().await;
        uid.send_replace(node.metadata.uid.clone());
        self.record(&node, Level::Normal, "Starting", "Starting kubelet.");
        tokio::join!(self.keep_status(node.clone()), self.keep_lease(node));
    }

    async fn register_until_done(&self) -> Node {
        let mut delay = Duration::from_millis(100);
        loop {
            match self.register().await {
                Ok(node) => return node,
                Err(error) => {
                    tracing::warn!(error = api_error(&error), node = self.identity.name, "cannot register the node")
                }
            }
            tokio::time::sleep(delay).await;
            delay = (delay * 2).min(Duration::from_secs(7));
        }
    }

    /// Creates the node's object, or brings the labels of an existing one up to date.
    async fn register(&self) -> Result<Node, kube::Error> {
        let wanted = self.object().await;
        if !self.state.config.register_node {
            return self.nodes.get(&self.identity.name).await;
        }
        match self.nodes.create(&PostParams::default(), &wanted).await {
            Err(kube::Error::Api(answer)) if answer.code == 409 => {}
            other => return other,
        }
        let existing = self.nodes.get(&self.identity.name).await?;
        let labels = existing.metadata.labels.clone().unwrap_or_default();
        let missing: BTreeMap<_, _> =
            self.labels().into_iter().filter(|(key, value)| labels.get(key) != Some(value)).collect();
        if missing.is_empty() {
            return Ok(existing);
        }
        let patch = json!({"metadata": {"labels": missing}});
        self.nodes.patch(&self.identity.name, &PatchParams::default(), &Patch::Merge(patch)).await
    }

    fn labels(&self) -> BTreeMap<String, String> {
        let mut labels = self.identity.labels.clone();
        for (key, value) in [
            ("kubernetes.io/hostname", self.identity.hostname.as_str()),
            ("kubernetes.io/os", "linux"),
            ("kubernetes.io/arch", machine::architecture()),
            ("beta.kubernetes.io/os", "linux"),
            ("beta.kubernetes.io/arch", machine::architecture()),
        ] {
            labels.insert(key.to_owned(), value.to_owned());
        }
        labels
    }

    async fn object(&self) -> Node {
        let config = &self.state.config;
        let mut annotations = BTreeMap::new();
        if config.enable_controller_attach_detach {
            annotations.insert("volumes.kubernetes.io/controller-managed-attach-detach".to_owned(), "true".to_owned());
        }
        if let Some(ip) = &self.identity.provided_ip {
            annotations.insert("alpha.kubernetes.io/provided-node-ip".to_owned(), ip.clone());
        }
        let text = |text: &String| Some(text.clone()).filter(|text| !text.is_empty());
        Node {
            metadata: ObjectMeta {
                name: Some(self.identity.name.clone()),
                labels: Some(self.labels()),
                annotations: Some(annotations),
                ..ObjectMeta::default()
            },
            spec: Some(NodeSpec {
                taints: Some(config.register_with_taints.clone()).filter(|taints| !taints.is_empty()),
                unschedulable: (!self.identity.schedulable).then_some(true),
                provider_id: text(&config.provider_id),
                ..NodeSpec::default()
            }),
            status: Some(self.status(&NodeStatus::default(), &[]).await),
        }
    }

    async fn status(&self, previous: &NodeStatus, images: &[ContainerImage]) -> NodeStatus {
        let runtime = self.state.runtime.status().await.map_err(|error| error.to_string());
        let obstacles: Vec<String> = self.sources.obstacles.borrow().values().cloned().collect();
        let volumes_in_use: Vec<String> = self.sources.volumes_in_use.wanted().into_iter().collect();
        let devices = self.sources.devices.borrow().clone();
        let inputs = Inputs {
            machine: &self.machine,
            config: &self.state.config,
            hostname: &self.identity.hostname,
            host_ips: &self.identity.host_ips,
            runtime_version: &self.identity.runtime_version,
            runtime: runtime.as_ref().map_err(Clone::clone),
            images,
            pressure: self.state.pressure(),
            obstacles: &obstacles,
            volumes_in_use: &volumes_in_use,
            devices: &devices,
            now: Timestamp::now(),
        };
        status::status(&inputs, previous)
    }

    async fn keep_status(&self, mut node: Node) {
        let config = &self.state.config;
        let mut images = self.images().await;
        let mut images_at = tokio::time::Instant::now();
        let mut sent_at: Option<tokio::time::Instant> = None;
        let mut pod_cidr = String::new();
        let (mut obstacles, mut devices) = (self.sources.obstacles.clone(), self.sources.devices.clone());
        let mut volumes = self.sources.volumes_in_use.changes();
        loop {
            obstacles.mark_unchanged();
            devices.mark_unchanged();
            volumes.mark_unchanged();
            if images_at.elapsed() >= IMAGES_EVERY {
                images = self.images().await;
                images_at = tokio::time::Instant::now();
            }
            // Others write the status too: a node that was cut off is declared unknown, and must contradict.
            match self.nodes.get(&self.identity.name).await {
                Ok(current) => node = current,
                Err(error) => tracing::debug!(error = api_error(&error), "cannot read the node's own object"),
            }
            let previous = node.status.clone().unwrap_or_default();
            let current = self.status(&previous, &images).await;
            let in_use: Names = current.volumes_in_use.iter().flatten().cloned().collect();
            let due = sent_at.is_none_or(|at| at.elapsed() >= config.node_status_report_frequency.0);
            if !due && status::same(&previous, &current) {
                self.sources.volumes_in_use.show(in_use);
            } else {
                match self.send(&previous, &current).await {
                    Ok(updated) => {
                        self.sources.volumes_in_use.show(in_use);
                        self.tell_changes(&updated, &previous, &current);
                        node = updated;
                        sent_at = Some(tokio::time::Instant::now());
                    }
                    Err(error) => tracing::warn!(error = api_error(&error), "cannot update the node's status"),
                }
            }
            let cidr = node.spec.as_ref().and_then(|spec| spec.pod_cidr.clone()).unwrap_or_default();
            if !cidr.is_empty() && cidr != pod_cidr {
                match self.state.runtime.update_pod_cidr(&cidr).await {
                    Ok(()) => pod_cidr = cidr,
                    Err(error) => tracing::warn!(%error, "cannot tell the container runtime the pod CIDR"),
                }
            }
            let ready = is_ready(&current) && sent_at.is_some();
            let pause = if ready { config.node_status_update_frequency.0 } else { IMPATIENT };
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                Ok(()) = obstacles.changed() => {}
                Ok(()) = devices.changed() => {}
                Ok(()) = volumes.changed() => {}
            }
        }
    }

    async fn images(&self) -> Vec<ContainerImage> {
        match self.state.runtime.list_images().await {
            Ok(images) => status::images(images),
            Err(error) => {
                tracing::debug!(%error, "cannot list images");
                Vec::new()
            }
        }
    }

    async fn send(&self, previous: &NodeStatus, current: &NodeStatus) -> Result<Node, kube::Error> {
        let patch = json!({"status": changes(previous, current).map_err(kube::Error::SerdeError)?});
        self.nodes.patch_status(&self.identity.name, &PatchParams::default(), &Patch::Strategic(patch)).await
    }

    fn tell_changes(&self, node: &Node, previous: &NodeStatus, current: &NodeStatus) {
        for condition in current.conditions.iter().flatten() {
            let old = previous.conditions.iter().flatten().find(|old| old.type_ == condition.type_);
            if old.is_some_and(|old| old.status == condition.status) {
                continue;
            }
            let event = match (condition.type_.as_str(), condition.status == "True") {
                ("Ready", true) => "NodeReady",
                ("Ready", false) => "NodeNotReady",
                ("MemoryPressure", true) => "NodeHasInsufficientMemory",
                ("MemoryPressure", false) => "NodeHasSufficientMemory",
                ("DiskPressure", true) => "NodeHasDiskPressure",
                ("DiskPressure", false) => "NodeHasNoDiskPressure",
                ("PIDPressure", true) => "NodeHasInsufficientPID",
                ("PIDPressure", false) => "NodeHasSufficientPID",
                _ => continue,
            };
            self.record(node, Level::Normal, event, &format!("Node {} status is now: {event}", self.identity.name));
        }
    }

    fn record(&self, node: &Node, level: Level, reason: &'static str, message: &str) {
        let object = ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Node".to_owned()),
            name: node.metadata.name.clone(),
            uid: node.metadata.uid.clone(),
            ..ObjectReference::default()
        };
        self.recorder.event(object, level, reason, message);
    }

    /// Renews the lease at a quarter of its duration; its absence is what makes a node count as lost.
    async fn keep_lease(&self, node: Node) {
        let seconds = self.state.config.node_lease_duration_seconds.max(4);
        let period = Duration::from_secs(u64::from(seconds.unsigned_abs())) / 4;
        let mut known: Option<Lease> = None;
        loop {
            let next = match self.renew(known.as_ref(), &node, seconds).await {
                Ok(lease) => {
                    known = Some(lease);
                    period
                }
                Err(error) => {
                    tracing::warn!(error = api_error(&error), "cannot renew the node's lease");
                    known = None;
                    Duration::from_millis(1000)
                }
            };
            tokio::time::sleep(next).await;
        }
    }

    async fn renew(&self, known: Option<&Lease>, node: &Node, seconds: i32) -> Result<Lease, kube::Error> {
        let name = &self.identity.name;
        let existing = match known {
            Some(lease) => Some(lease.clone()),
            None => self.leases.get_opt(name).await?,
        };
        let owner = OwnerReference {
            api_version: "v1".to_owned(),
            kind: "Node".to_owned(),
            name: name.clone(),
            uid: node.metadata.uid.clone().unwrap_or_default(),
            ..OwnerReference::default()
        };
        let now = Timestamp::now();
        let now = Timestamp::from_microsecond(now.as_microsecond()).unwrap_or(now);
        let is_new = existing.is_none();
        let mut lease = existing.unwrap_or_default();
        lease.metadata.managed_fields = None;
        lease.metadata.name = Some(name.clone());
        lease.metadata.namespace = Some(LEASES.to_owned());
        lease.metadata.owner_references.get_or_insert_with(|| vec![owner]);
        let spec = lease.spec.get_or_insert_with(LeaseSpec::default);
        spec.holder_identity = Some(name.clone());
        spec.lease_duration_seconds = Some(seconds);
        spec.renew_time = Some(MicroTime(now));
        if is_new {
            self.leases.create(&PostParams::default(), &lease).await
        } else {
            self.leases.replace(name, &PostParams::default(), &lease).await
        }
    }
}

fn is_ready(status: &NodeStatus) -> bool {
    status.conditions.iter().flatten().any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

/// The fields of a strategic merge patch from one status to the next. Conditions always go along: they carry the
/// heartbeat.
fn changes(previous: &NodeStatus, current: &NodeStatus) -> Result<Map<String, Value>, serde_json::Error> {
    let (Value::Object(old), Value::Object(new)) = (serde_json::to_value(previous)?, serde_json::to_value(current)?)
    else {
        return Ok(Map::new());
    };
    let mut changes = Map::new();
    for (key, value) in new {
        if key != "conditions" && old.get(&key) == Some(&value) {
            continue;
        }
        let change = match (key.as_str(), value) {
            // Addresses merge by type, which is not unique.
            ("addresses", Value::Array(mut list)) => {
                list.insert(0, json!({"$patch": "replace"}));
                Value::Array(list)
            }
            (_, value) => value,
        };
        changes.insert(key, change);
    }
    if current.volumes_in_use.is_none() && previous.volumes_in_use.is_some() {
        changes.insert("volumesInUse".to_owned(), Value::Null);
    }
    Ok(changes)
}
