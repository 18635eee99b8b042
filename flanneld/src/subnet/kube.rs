//! Leases in the Kubernetes API: a node's pod CIDR is its subnet, and what flannel publishes are annotations of the
//! node. The network configuration comes from a file that is the same on all nodes.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::PathBuf;

use async_trait::async_trait;
use futures::StreamExt;
use ipnet::Ipv4Net;
use k8s_openapi::api::core::v1::{Node, NodeCondition, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::api::{Patch, PatchParams};
use kube::core::object::{NotUsed, Object};
use kube::core::{ApiResource, ResourceExt};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::watch;

use super::{Leases, SubnetError, SubnetManager};
use crate::lease::{Lease, LeaseAttributes, LeaseSet, Mac};
use crate::network::NetworkConfig;

#[derive(Clone, Debug, Default)]
pub struct KubeOptions {
    pub annotation_prefix: String,
    pub net_conf_path: PathBuf,
    /// Report the node's network as available once flannel runs.
    pub set_node_network_unavailable: bool,
}

/// Nodes without the parts that flannel never reads.
type SlimNode = Object<PodCidrs, NotUsed>;

#[derive(Clone, Debug, Default, Deserialize, serde::Serialize)]
#[serde(rename_all = "camelCase")]
struct PodCidrs {
    #[serde(rename = "podCIDR")]
    pod_cidr: Option<String>,
    #[serde(rename = "podCIDRs")]
    pod_cidrs: Option<Vec<String>>,
}

pub struct KubeSubnetManager {
    nodes: Api<SlimNode>,
    node_name: String,
    annotations: Annotations,
    options: KubeOptions,
}

impl KubeSubnetManager {
    /// Finds out which node this is: from NODE_NAME, or from the pod that POD_NAME and POD_NAMESPACE name.
    pub async fn new(client: Client, options: KubeOptions) -> Result<Self, SubnetError> {
        let annotations = Annotations::new(&options.annotation_prefix)?;
        let node_name = node_name(&client).await?;
        let nodes = Api::all_with(client, &ApiResource::erase::<Node>(&()));
        Ok(Self { nodes, node_name, annotations, options })
    }

    async fn node(&self) -> Result<SlimNode, SubnetError> {
        self.nodes.get(&self.node_name).await.map_err(api("read the node"))
    }

    async fn patch(&self, patch: Value) -> Result<(), SubnetError> {
        let patch = Patch::Strategic(patch);
        let result = self.nodes.patch_status(&self.node_name, &PatchParams::default(), &patch).await;
        result.map(|_| ()).map_err(api("publish the lease on the node"))
    }

    async fn report_network_available(&self) {
        let now = Time(k8s_openapi::jiff::Timestamp::now());
        let condition = NodeCondition {
            type_: "NetworkUnavailable".to_owned(),
            status: "False".to_owned(),
            reason: Some("FlannelIsUp".to_owned()),
            message: Some("Flannel is running on this node".to_owned()),
            last_transition_time: Some(now.clone()),
            last_heartbeat_time: Some(now),
        };
        if let Err(error) = self.patch(json!({"status": {"conditions": [condition]}})).await {
            tracing::error!(
                error = apimachinery::process::error_chain(&error),
                "cannot set NetworkUnavailable to false"
            );
        }
    }
}

#[async_trait]
impl SubnetManager for KubeSubnetManager {
    async fn network(&self) -> Result<NetworkConfig, SubnetError> {
        let path = &self.options.net_conf_path;
        let text = tokio::fs::read_to_string(path)
            .await
            .map_err(|source| SubnetError::ReadFile { path: path.display().to_string(), source })?;
        Ok(NetworkConfig::parse(&text)?)
    }

    async fn stored_public_ip(&self) -> Result<Option<Ipv4Addr>, SubnetError> {
        let node = self.node().await?;
        let annotations = node.annotations();
        let stored = annotations
            .get(&self.annotations.public_ip_overwrite)
            .or_else(|| annotations.get(&self.annotations.node_public_ip));
        Ok(stored.and_then(|address| address.parse().ok()))
    }

    async fn stored_mac(&self, _public_ip: Ipv4Addr) -> Result<Option<Mac>, SubnetError> {
        let node = self.node().await?;
        let attributes = self.annotations.read(node.annotations());
        Ok(attributes.and_then(|attributes| attributes.vxlan_data()).map(|data| data.vtep_mac))
    }

    async fn acquire(&self, network: &NetworkConfig, attributes: &LeaseAttributes) -> Result<Lease, SubnetError> {
        let node = self.node().await?;
        let subnet = pod_cidr(&node).ok_or_else(|| SubnetError::NoPodCidr(self.node_name.clone()))?;
        if !network.network.contains(&subnet) {
            return Err(SubnetError::ForeignPodCidr { cidr: subnet, network: network.network });
        }
        let wanted = self.annotations.write(attributes).map_err(SubnetError::Encode)?;
        let current = node.annotations();
        if wanted.iter().any(|(key, value)| current.get(key) != Some(value)) {
            self.patch(json!({"metadata": {"annotations": wanted}})).await?;
        }
        Ok(Lease { subnet, attributes: attributes.clone() })
    }

    /// Nothing expires here; a node keeps its pod CIDR as long as it exists.
    async fn keep(&self, _lease: &Lease, _leases: Leases) -> SubnetError {
        if self.options.set_node_network_unavailable {
            self.report_network_available().await;
        }
        std::future::pending().await
    }

    async fn watch(&self, leases: watch::Sender<Option<LeaseSet>>) {
        let mut events = watcher(self.nodes.clone(), watcher::Config::default()).default_backoff().boxed();
        let mut known: BTreeMap<String, Lease> = BTreeMap::new();
        let mut listed: BTreeMap<String, Lease> = BTreeMap::new();
        while let Some(event) = events.next().await {
            match event {
                Ok(watcher::Event::Init) => {
                    listed.clear();
                    continue;
                }
                Ok(watcher::Event::InitApply(node)) => {
                    listed.extend(self.annotations.lease(&node).map(|lease| (node.name_any(), lease)));
                    continue;
                }
                Ok(watcher::Event::InitDone) => known = std::mem::take(&mut listed),
                Ok(watcher::Event::Apply(node)) => {
                    match self.annotations.lease(&node) {
                        Some(lease) => known.insert(node.name_any(), lease),
                        None => known.remove(&node.name_any()),
                    };
                }
                Ok(watcher::Event::Delete(node)) => {
                    known.remove(&node.name_any());
                }
                Err(error) => {
                    tracing::warn!(error = apimachinery::process::error_chain(&error), "the watch of the nodes broke");
                    continue;
                }
            }
            let set: LeaseSet = known.values().map(|lease| (lease.subnet, lease.attributes.clone())).collect();
            leases.send_if_modified(|current| {
                let changed = current.as_ref() != Some(&set);
                if changed {
                    *current = Some(set);
                }
                changed
            });
        }
    }
}

/// The names of the annotations for one prefix.
#[derive(Clone, Debug)]
struct Annotations {
    managed: String,
    backend_data: String,
    backend_type: String,
    public_ip: String,
    node_public_ip: String,
    public_ip_overwrite: String,
}

impl Annotations {
    fn new(prefix: &str) -> Result<Self, SubnetError> {
        let error = || SubnetError::AnnotationPrefix(prefix.to_owned());
        let (domain, name) = prefix.split_once('/').unwrap_or((prefix, ""));
        let legal = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '_';
        let domain_legal =
            domain.contains('.') && domain.split('.').all(|part| !part.is_empty() && part.chars().all(legal));
        if !domain_legal || !name.chars().all(legal) {
            return Err(error());
        }
        let separator = if name.is_empty() || name.ends_with('-') { "" } else { "-" };
        let full = |suffix: &str| format!("{domain}/{name}{separator}{suffix}");
        Ok(Self {
            managed: full("kube-subnet-manager"),
            backend_data: full("backend-data"),
            backend_type: full("backend-type"),
            public_ip: full("public-ip"),
            node_public_ip: full("node-public-ip"),
            public_ip_overwrite: full("public-ip-overwrite"),
        })
    }

    fn write(&self, attributes: &LeaseAttributes) -> Result<BTreeMap<String, String>, serde_json::Error> {
        let data = serde_json::to_string(&attributes.backend_data)?;
        Ok([
            (self.managed.clone(), "true".to_owned()),
            (self.backend_type.clone(), attributes.backend_type.clone()),
            (self.backend_data.clone(), data),
            (self.public_ip.clone(), attributes.public_ip.to_string()),
        ]
        .into())
    }

    fn read(&self, annotations: &BTreeMap<String, String>) -> Option<LeaseAttributes> {
        if annotations.get(&self.managed).is_none_or(|managed| managed != "true") {
            return None;
        }
        let data = annotations.get(&self.backend_data).and_then(|data| serde_json::from_str::<Value>(data).ok());
        Some(LeaseAttributes {
            public_ip: annotations.get(&self.public_ip)?.parse().ok()?,
            public_ipv6: None,
            backend_type: annotations.get(&self.backend_type)?.clone(),
            backend_data: data.filter(|data| !data.is_null()),
        })
    }

    fn lease(&self, node: &SlimNode) -> Option<Lease> {
        Some(Lease { subnet: pod_cidr(node)?, attributes: self.read(node.annotations())? })
    }
}

fn pod_cidr(node: &SlimNode) -> Option<Ipv4Net> {
    let all = node.spec.pod_cidrs.iter().flatten().chain(&node.spec.pod_cidr);
    all.filter_map(|cidr| cidr.parse::<Ipv4Net>().ok()).next()
}

async fn node_name(client: &Client) -> Result<String, SubnetError> {
    let variable = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
    if let Some(name) = variable("NODE_NAME") {
        return Ok(name);
    }
    let (Some(name), Some(namespace)) = (variable("POD_NAME"), variable("POD_NAMESPACE")) else {
        return Err(SubnetError::NoNodeName);
    };
    let pods: Api<Pod> = Api::namespaced(client.clone(), &namespace);
    let pod = pods.get(&name).await.map_err(api("read the own pod"))?;
    pod.spec.and_then(|spec| spec.node_name).ok_or(SubnetError::PodWithoutNode { namespace, name })
}

fn api(step: &'static str) -> impl FnOnce(kube::Error) -> SubnetError {
    move |source| SubnetError::Kubernetes { step, source: Box::new(source) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn annotation_names_follow_the_prefix() {
        let names = |prefix| Annotations::new(prefix).map(|a| a.backend_data).map_err(|e| e.to_string());
        assert_eq!(names("flannel.alpha.coreos.com").unwrap(), "flannel.alpha.coreos.com/backend-data");
        assert_eq!(names("a.b/net").unwrap(), "a.b/net-backend-data");
        assert_eq!(names("a.b/net-").unwrap(), "a.b/net-backend-data");
        for bad in ["nodots", "a.b/c/d", "A.b", "a..b"] {
            assert!(names(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_lease_survives_the_annotations() {
        let annotations = Annotations::new("flannel.alpha.coreos.com").unwrap();
        let attributes = LeaseAttributes {
            public_ip: "10.0.0.1".parse().unwrap(),
            public_ipv6: None,
            backend_type: "vxlan".to_owned(),
            backend_data: Some(json!({"VNI": 1, "VtepMAC": "02:00:00:00:00:01"})),
        };
        let written = annotations.write(&attributes).unwrap();
        assert_eq!(written["flannel.alpha.coreos.com/backend-data"], r#"{"VNI":1,"VtepMAC":"02:00:00:00:00:01"}"#);
        assert_eq!(annotations.read(&written), Some(attributes));
        assert_eq!(annotations.read(&BTreeMap::new()), None);
    }
}
