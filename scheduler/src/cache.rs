//! What the scheduler believes about nodes and the pods on them: what the API server reported, plus pods that were just
//! assigned and whose binding is on its way (assumed).
//!
//! Nodes are held as `Arc`s. A [`Snapshot`] is a clone of the list, so that taking one costs a pointer per node; a change
//! copies the one node that it touches, and only when a snapshot still holds it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use apimachinery::controller::ObjectKey;
use k8s_openapi::api::core::v1::Node;

use crate::pod_info::{HostPort, PodInfo};
use crate::resources::Resources;
use crate::selectors::Labels;

/// A node and the pods on it.
#[derive(Clone, Debug, Default)]
pub struct NodeInfo {
    pub name: String,
    /// Absent while pods are known on a node that is not (yet, or any more).
    pub node: Option<Arc<Node>>,
    pub pods: Vec<Arc<PodInfo>>,
    pub allocatable: Resources,
    pub max_pods: i64,
    pub requested: Resources,
    pub scoring_requested: Resources,
    pub used_ports: BTreeSet<HostPort>,
    /// Sizes of the images on the node, by each of their names.
    pub images: Arc<HashMap<String, i64>>,
}

impl NodeInfo {
    pub fn node(&self) -> &Node {
        static NONE: std::sync::OnceLock<Node> = std::sync::OnceLock::new();
        self.node.as_deref().unwrap_or_else(|| NONE.get_or_init(Node::default))
    }

    pub fn label(&self, key: &str) -> Option<&str> {
        self.node().metadata.labels.as_ref()?.get(key).map(String::as_str)
    }

    pub fn set_node(&mut self, node: Arc<Node>) {
        let status = node.status.as_ref();
        let allocatable = status.and_then(|s| s.allocatable.as_ref());
        self.allocatable = Resources::from_list(allocatable);
        self.max_pods = allocatable
            .and_then(|list| list.get("pods"))
            .and_then(|quantity| quantity.0.parse::<apimachinery::meta::Quantity>().ok())
            .map_or(0, |quantity| quantity.value());
        let mut images = HashMap::new();
        for image in status.and_then(|s| s.images.as_ref()).into_iter().flatten() {
            for name in image.names.iter().flatten() {
                images.insert(name.clone(), image.size_bytes.unwrap_or(0));
            }
        }
        if *self.images != images {
            self.images = Arc::new(images);
        }
        self.node = Some(node);
    }

    pub fn add_pod(&mut self, pod: Arc<PodInfo>) {
        self.requested.add(&pod.requests);
        self.scoring_requested.add(&pod.scoring_requests);
        self.used_ports.extend(pod.host_ports.iter().cloned());
        self.pods.push(pod);
    }

    /// Removes the pod with this uid; answers it.
    pub fn remove_pod(&mut self, uid: &str) -> Option<Arc<PodInfo>> {
        let index = self.pods.iter().position(|pod| pod.uid == uid)?;
        let pod = self.pods.swap_remove(index);
        self.requested.subtract(&pod.requests);
        self.scoring_requested.subtract(&pod.scoring_requests);
        // Two pods never hold the same port: one of them would not have passed the filter.
        for port in &pod.host_ports {
            self.used_ports.remove(port);
        }
        Some(pod)
    }
}

/// The cluster at one moment; cheap to take and never changed.
#[derive(Clone, Default)]
pub struct Snapshot {
    /// Nodes that exist, ordered by name.
    pub nodes: Vec<Arc<NodeInfo>>,
    pub namespaces: Arc<BTreeMap<String, Labels>>,
    /// Nodes that hold a pod with required anti-affinity; most clusters have few.
    pub anti_affinity_nodes: Vec<Arc<NodeInfo>>,
    /// Nodes that hold a pod with any affinity.
    pub affinity_nodes: Vec<Arc<NodeInfo>>,
    pub volumes: crate::plugins::volume_binding::Volumes,
}

impl Snapshot {
    pub fn node(&self, name: &str) -> Option<&Arc<NodeInfo>> {
        self.nodes.binary_search_by(|node| node.name.as_str().cmp(name)).ok().map(|index| &self.nodes[index])
    }

    pub fn namespace_labels(&self, namespace: &str) -> Option<Labels> {
        self.namespaces.get(namespace).cloned()
    }
}

#[derive(Default)]
pub struct Cache {
    nodes: BTreeMap<String, Arc<NodeInfo>>,
    /// Where each known pod is, by uid, and whether that is only assumed.
    placements: HashMap<String, Placement>,
    namespaces: Arc<BTreeMap<String, Labels>>,
    pub volumes: crate::plugins::volume_binding::Volumes,
}

struct Placement {
    node: String,
    assumed: bool,
}

impl Cache {
    pub fn snapshot(&self) -> Snapshot {
        let nodes: Vec<_> = self.nodes.values().filter(|info| info.node.is_some()).cloned().collect();
        let with = |test: fn(&PodInfo) -> bool| -> Vec<Arc<NodeInfo>> {
            nodes.iter().filter(|node| node.pods.iter().any(|pod| test(pod))).cloned().collect()
        };
        Snapshot {
            anti_affinity_nodes: with(|pod| !pod.affinity.required_anti.is_empty()),
            affinity_nodes: with(|pod| !pod.affinity.preferred.is_empty() || !pod.affinity.required.is_empty()),
            nodes,
            namespaces: self.namespaces.clone(),
            volumes: self.volumes.clone(),
        }
    }

    pub fn set_node(&mut self, node: Arc<Node>) {
        let name = node.metadata.name.clone().unwrap_or_default();
        self.edit(&name).set_node(node);
    }

    pub fn remove_node(&mut self, name: &str) {
        if self.nodes.get(name).is_some_and(|info| info.pods.is_empty()) {
            self.nodes.remove(name);
        } else if self.nodes.contains_key(name) {
            self.edit(name).node = None;
        }
    }

    pub fn set_namespace(&mut self, name: &str, labels: Option<Labels>) {
        let namespaces = Arc::make_mut(&mut self.namespaces);
        match labels {
            Some(labels) => namespaces.insert(name.to_owned(), labels),
            None => namespaces.remove(name),
        };
    }

    /// A pod was reported on a node. This confirms an assumption, or corrects it.
    pub fn set_pod(&mut self, pod: Arc<PodInfo>) {
        let Some(node) = pod.node_name().map(str::to_owned) else { return };
        self.take(&pod.uid);
        self.place(pod, node, false);
    }

    /// Counts a pod on a node before the API server confirms it.
    pub fn assume(&mut self, pod: Arc<PodInfo>, node: &str) {
        self.take(&pod.uid);
        self.place(pod, node.to_owned(), true);
    }

    /// Takes an assumption back, because the binding failed. One that was confirmed meanwhile stays.
    pub fn forget(&mut self, uid: &str) {
        if self.placements.get(uid).is_some_and(|placement| placement.assumed) {
            self.take(uid);
        }
    }

    /// A pod is gone or finished. Answers whether it was on a node.
    pub fn remove_pod(&mut self, uid: &str) -> bool {
        self.take(uid)
    }

    pub fn is_assumed(&self, uid: &str) -> bool {
        self.placements.get(uid).is_some_and(|placement| placement.assumed)
    }

    pub fn pod_on(&self, node: &str, key: &ObjectKey) -> Option<Arc<PodInfo>> {
        self.nodes.get(node)?.pods.iter().find(|pod| pod.key == *key).cloned()
    }

    fn edit(&mut self, node: &str) -> &mut NodeInfo {
        let entry = self
            .nodes
            .entry(node.to_owned())
            .or_insert_with(|| Arc::new(NodeInfo { name: node.to_owned(), ..NodeInfo::default() }));
        Arc::make_mut(entry)
    }

    fn place(&mut self, pod: Arc<PodInfo>, node: String, assumed: bool) {
        let uid = pod.uid.clone();
        self.edit(&node).add_pod(pod);
        self.placements.insert(uid, Placement { node, assumed });
    }

    fn take(&mut self, uid: &str) -> bool {
        let Some(placement) = self.placements.remove(uid) else { return false };
        let info = self.edit(&placement.node);
        info.remove_pod(uid);
        if info.node.is_none() && info.pods.is_empty() {
            self.nodes.remove(&placement.node);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{node, pod};

    #[test]
    fn a_snapshot_does_not_change_with_the_cache() {
        let mut cache = Cache::default();
        cache.set_node(node("a", 1000).build());
        let before = cache.snapshot();
        cache.assume(pod("p").cpu(300).info(), "a");
        assert_eq!(before.nodes[0].requested.milli_cpu, 0);
        assert_eq!(cache.snapshot().nodes[0].requested.milli_cpu, 300);
    }

    #[test]
    fn confirmation_corrects_an_assumption() {
        let mut cache = Cache::default();
        cache.set_node(node("a", 1000).build());
        cache.set_node(node("b", 1000).build());
        cache.assume(pod("p").cpu(300).info(), "a");
        cache.set_pod(pod("p").cpu(300).on("b").info());
        assert_eq!(cache.snapshot().node("a").unwrap().requested.milli_cpu, 0);
        assert_eq!(cache.snapshot().node("b").unwrap().requested.milli_cpu, 300);
        cache.forget("p");
        assert_eq!(cache.snapshot().node("b").unwrap().requested.milli_cpu, 300, "a confirmed pod is not forgotten");
    }

    #[test]
    fn a_node_without_its_object_is_kept_while_pods_are_on_it() {
        let mut cache = Cache::default();
        cache.set_pod(pod("p").cpu(300).on("a").info());
        assert!(cache.snapshot().nodes.is_empty());
        cache.set_node(node("a", 1000).build());
        assert_eq!(cache.snapshot().nodes[0].requested.milli_cpu, 300);
        cache.remove_node("a");
        assert!(cache.remove_pod("p"));
        assert!(cache.nodes.is_empty());
    }
}
