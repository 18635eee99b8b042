//! Builders for tests: `pod("a").cpu(100).info()`, `node("n", 1000).label("zone", "1").info()`.

use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node, Pod};
use serde_json::{Value, json};

use crate::cache::{Cache, NodeInfo, Snapshot};
use crate::pod_info::PodInfo;

pub struct PodBuilder(Value);

/// A pod whose uid is its name, without any request.
pub fn pod(name: &str) -> PodBuilder {
    PodBuilder(json!({
        "metadata": {"name": name, "namespace": "default", "uid": name, "labels": {}},
        "spec": {"containers": [{"name": "c", "resources": {"requests": {}}}]},
    }))
}

impl PodBuilder {
    pub fn request(mut self, resource: &str, amount: i64) -> Self {
        self.0["spec"]["containers"][0]["resources"]["requests"][resource] = json!(amount.to_string());
        self
    }

    pub fn cpu(mut self, milli: i64) -> Self {
        self.0["spec"]["containers"][0]["resources"]["requests"]["cpu"] = json!(format!("{milli}m"));
        self
    }

    pub fn memory(self, bytes: i64) -> Self {
        self.request("memory", bytes)
    }

    pub fn on(mut self, node: &str) -> Self {
        self.0["spec"]["nodeName"] = json!(node);
        self
    }

    pub fn priority(mut self, priority: i32) -> Self {
        self.0["spec"]["priority"] = json!(priority);
        self
    }

    pub fn label(mut self, key: &str, value: &str) -> Self {
        self.0["metadata"]["labels"][key] = json!(value);
        self
    }

    pub fn gate(mut self, name: &str) -> Self {
        self.0["spec"]["schedulingGates"] = json!([{"name": name}]);
        self
    }

    pub fn claim(mut self, name: &str) -> Self {
        self.0["spec"]["volumes"] = json!([{"name": "v", "persistentVolumeClaim": {"claimName": name}}]);
        self
    }

    pub fn spread(mut self, topology: &str, skew: i32, when: &str, key: &str, value: &str) -> Self {
        self.0["spec"]["topologySpreadConstraints"] = json!([{
            "topologyKey": topology, "maxSkew": skew, "whenUnsatisfiable": when,
            "labelSelector": {"matchLabels": {key: value}},
        }]);
        self
    }

    pub fn affinity(self, topology: &str, key: &str, value: &str) -> Self {
        self.pod_affinity("podAffinity", topology, key, value)
    }

    pub fn anti_affinity(self, topology: &str, key: &str, value: &str) -> Self {
        self.pod_affinity("podAntiAffinity", topology, key, value)
    }

    fn pod_affinity(mut self, kind: &str, topology: &str, key: &str, value: &str) -> Self {
        self.0["spec"]["affinity"][kind] = json!({"requiredDuringSchedulingIgnoredDuringExecution": [{
            "topologyKey": topology, "labelSelector": {"matchLabels": {key: value}},
        }]});
        self
    }

    pub fn info(self) -> Arc<PodInfo> {
        let pod: Pod = serde_json::from_value(self.0).expect("a valid pod");
        Arc::new(PodInfo::new(Arc::new(pod)))
    }
}

pub struct NodeBuilder(Value);

/// A node with so many millicores and plenty of everything else.
pub fn node(name: &str, milli_cpu: i64) -> NodeBuilder {
    NodeBuilder(json!({
        "metadata": {"name": name, "labels": {}},
        "spec": {"taints": []},
        "status": {"allocatable": {"cpu": format!("{milli_cpu}m"), "memory": "8Gi", "pods": "110"}},
    }))
}

impl NodeBuilder {
    pub fn memory(mut self, bytes: i64) -> Self {
        self.0["status"]["allocatable"]["memory"] = json!(bytes.to_string());
        self
    }

    pub fn label(mut self, key: &str, value: &str) -> Self {
        self.0["metadata"]["labels"][key] = json!(value);
        self
    }

    pub fn taint(mut self, key: &str, effect: &str) -> Self {
        self.0["spec"]["taints"] = json!([{"key": key, "effect": effect}]);
        self
    }

    pub fn build(self) -> Arc<Node> {
        Arc::new(serde_json::from_value(self.0).expect("a valid node"))
    }

    pub fn info(self) -> NodeInfo {
        let node = self.build();
        let mut info = NodeInfo { name: node.metadata.name.clone().unwrap_or_default(), ..NodeInfo::default() };
        info.set_node(node);
        info
    }
}

pub fn snapshot(nodes: Vec<NodeInfo>) -> Snapshot {
    let mut cache = Cache::default();
    for info in nodes {
        cache.set_node(info.node.clone().expect("a node with its object"));
        for pod in info.pods {
            cache.assume(pod, &info.name);
        }
    }
    cache.snapshot()
}
