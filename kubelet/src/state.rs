//! What the HTTP server of the kubelet may see: the node's pods as they are now, its configuration, the API client
//! and the container runtime. Pod workers publish here; the server only reads.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;
use parking_lot::RwLock;
use tokio::sync::watch;

use crate::config::KubeletConfiguration;
use crate::cri::Runtime;
use crate::node::status::Pressure;
use crate::pod::observed::{Container, RuntimePod};

/// One pod: the object with the status that this kubelet last computed, and what the runtime holds of it.
#[derive(Clone, Debug)]
pub struct PodView {
    pub pod: Arc<Pod>,
    pub observed: Arc<RuntimePod>,
}

impl PodView {
    pub fn namespace(&self) -> &str {
        self.pod.metadata.namespace.as_deref().unwrap_or_default()
    }

    pub fn name(&self) -> &str {
        self.pod.metadata.name.as_deref().unwrap_or_default()
    }

    /// The uid under which the runtime and the directories of the node know the pod. For a mirror pod this is the
    /// uid of the static pod, not that of the API object.
    pub fn uid(&self) -> &str {
        crate::pod::runtime_uid(&self.pod)
    }

    /// The newest container of this name, or with `previous` the one that ran before it.
    pub fn container(&self, name: &str, previous: bool) -> Option<&Container> {
        if previous { self.observed.previous(name) } else { self.observed.newest(name) }
    }
}

/// Shared by the whole process; see the module's documentation for who writes what.
pub struct NodeState {
    pub node_name: String,
    pub config: Arc<KubeletConfiguration>,
    pub client: kube::Client,
    pub runtime: Runtime,
    /// `/var/lib/kubelet`, or what `--root-dir` says.
    pub root_dir: PathBuf,
    pods: RwLock<HashMap<String, PodView>>,
    /// What the node is short of, as the evictions last saw it.
    pressure: RwLock<Pressure>,
    changed: watch::Sender<()>,
}

impl NodeState {
    pub fn new(
        node_name: String,
        config: Arc<KubeletConfiguration>,
        client: kube::Client,
        runtime: Runtime,
        root_dir: PathBuf,
    ) -> Self {
        Self {
            node_name,
            config,
            client,
            runtime,
            root_dir,
            pods: RwLock::default(),
            pressure: RwLock::default(),
            changed: watch::Sender::default(),
        }
    }

    /// Every pod of the node, in no order.
    pub fn pods(&self) -> Vec<PodView> {
        self.pods.read().values().cloned().collect()
    }

    pub fn pod(&self, namespace: &str, name: &str) -> Option<PodView> {
        self.pods.read().values().find(|view| view.namespace() == namespace && view.name() == name).cloned()
    }

    /// By the runtime's uid; see [`PodView::uid`].
    pub fn pod_by_uid(&self, uid: &str) -> Option<PodView> {
        self.pods.read().get(uid).cloned()
    }

    /// The directory that holds `<container>/<restart count>.log` of the pod.
    pub fn log_dir(&self, view: &PodView) -> PathBuf {
        let name = format!("{}_{}_{}", view.namespace(), view.name(), view.uid());
        PathBuf::from(&self.config.pod_logs_dir).join(name)
    }

    pub fn pressure(&self) -> Pressure {
        *self.pressure.read()
    }

    pub(crate) fn set_pressure(&self, pressure: Pressure) {
        *self.pressure.write() = pressure;
    }

    /// Wakes whenever a pod was published or forgotten; log followers wait on it for their container's end.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    pub(crate) fn publish(&self, uid: &str, view: PodView) {
        self.pods.write().insert(uid.to_owned(), view);
        self.changed.send_replace(());
    }

    pub(crate) fn forget(&self, uid: &str) {
        self.pods.write().remove(uid);
        self.changed.send_replace(());
    }
}
