//! Leases in the Kubernetes API: a node's pod CIDRs are its subnets, and what flannel publishes are annotations of the
//! node. The network configuration comes from a file that is the same on all nodes.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;

use async_trait::async_trait;
use futures::StreamExt;
use ipnet::IpNet;
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

use super::{Leases, StoredPublic, SubnetError, SubnetManager, macs, publish};
use crate::family::Family;
use crate::lease::{Lease, LeaseAttributes, LeaseSet, Subnets};
use crate::mac::Mac;
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

    /// The file belongs to the daemon's deployment, which restarts it when the file changes.
    async fn network_changed(&self, _present: &NetworkConfig) -> NetworkConfig {
        std::future::pending().await
    }

    async fn stored_public(&self) -> Result<StoredPublic, SubnetError> {
        let node = self.node().await?;
        let annotation = |name| node.annotations().get(name);
        Ok(StoredPublic {
            ipv4: annotation(&self.annotations.node_public_ip).and_then(|address| address.parse().ok()),
            ipv6: annotation(&self.annotations.node_public_ipv6).and_then(|address| address.parse().ok()),
        })
    }

    async fn stored_macs(&self, _owner: IpAddr) -> Result<BTreeMap<Family, Mac>, SubnetError> {
        let node = self.node().await?;
        let attributes = self.annotations.read(node.annotations());
        Ok(attributes.map(|attributes| macs(&attributes)).unwrap_or_default())
    }

    async fn acquire(&self, network: &NetworkConfig, attributes: &LeaseAttributes) -> Result<Lease, SubnetError> {
        let node = self.node().await?;
        let cidrs = pod_cidrs(&node);
        let mut subnets = Subnets::default();
        for pool in network.pools() {
            let family = pool.family();
            let none = || SubnetError::NoPodCidr { node: self.node_name.clone(), family };
            let cidr = cidrs.get(family).ok_or_else(none)?;
            if !pool.network.contains(&cidr) {
                return Err(SubnetError::ForeignPodCidr { cidr, network: pool.network });
            }
            subnets = subnets.with(cidr);
        }
        let current = node.annotations();
        let mut published = attributes.clone();
        self.annotations.overwrite(current, &mut published);
        let wanted = self.annotations.write(&published).map_err(SubnetError::Encode)?;
        if wanted.iter().any(|(key, value)| current.get(key) != Some(value)) {
            self.patch(json!({"metadata": {"annotations": wanted}})).await?;
        }
        Ok(Lease { subnets, attributes: published })
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
            let set: LeaseSet = known.values().map(|lease| (lease.subnets, lease.attributes.clone())).collect();
            publish(&leases, set);
        }
    }
}

/// The names of the annotations for one prefix.
#[derive(Clone, Debug)]
struct Annotations {
    managed: String,
    backend_data: String,
    backend_v6_data: String,
    backend_type: String,
    public_ip: String,
    public_ipv6: String,
    node_public_ip: String,
    node_public_ipv6: String,
    public_ip_overwrite: String,
    public_ipv6_overwrite: String,
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
            backend_v6_data: full("backend-v6-data"),
            backend_type: full("backend-type"),
            public_ip: full("public-ip"),
            public_ipv6: full("public-ipv6"),
            node_public_ip: full("node-public-ip"),
            node_public_ipv6: full("node-public-ipv6"),
            public_ip_overwrite: full("public-ip-overwrite"),
            public_ipv6_overwrite: full("public-ipv6-overwrite"),
        })
    }

    /// Addresses that an administrator wants the other nodes to use, whatever this node has found.
    fn overwrite(&self, annotations: &BTreeMap<String, String>, attributes: &mut LeaseAttributes) {
        let value = |name| annotations.get(name).filter(|value| !value.is_empty());
        if let Some(address) = value(&self.public_ip_overwrite).and_then(|value| value.parse().ok()) {
            attributes.public_ip = address;
        }
        if let Some(address) = value(&self.public_ipv6_overwrite).and_then(|value| value.parse().ok()) {
            attributes.public_ipv6 = Some(address);
        }
    }

    /// What upstream writes for one family: without the family nothing, without data `null`.
    fn write(&self, attributes: &LeaseAttributes) -> Result<BTreeMap<String, String>, serde_json::Error> {
        let mut annotations = BTreeMap::from([
            (self.managed.clone(), "true".to_owned()),
            (self.backend_type.clone(), attributes.backend_type.clone()),
        ]);
        if let Some(address) = attributes.public(Family::V4) {
            annotations.insert(self.public_ip.clone(), address.to_string());
            annotations.insert(self.backend_data.clone(), serde_json::to_string(&attributes.backend_data)?);
        }
        if let Some(address) = attributes.public(Family::V6) {
            annotations.insert(self.public_ipv6.clone(), address.to_string());
            annotations.insert(self.backend_v6_data.clone(), serde_json::to_string(&attributes.backend_v6_data)?);
        }
        Ok(annotations)
    }

    fn read(&self, annotations: &BTreeMap<String, String>) -> Option<LeaseAttributes> {
        if annotations.get(&self.managed).is_none_or(|managed| managed != "true") {
            return None;
        }
        let data = |name| {
            let value = annotations.get(name).and_then(|data| serde_json::from_str::<Value>(data).ok());
            value.filter(|data| !data.is_null())
        };
        let public_ip = annotations.get(&self.public_ip).and_then(|address| address.parse().ok());
        let public_ipv6 = annotations.get(&self.public_ipv6).and_then(|address| address.parse().ok());
        if public_ip.is_none() && public_ipv6.is_none() {
            return None;
        }
        Some(LeaseAttributes {
            public_ip: public_ip.unwrap_or(Ipv4Addr::UNSPECIFIED),
            public_ipv6,
            backend_type: annotations.get(&self.backend_type)?.clone(),
            backend_data: data(&self.backend_data),
            backend_v6_data: data(&self.backend_v6_data),
        })
    }

    fn lease(&self, node: &SlimNode) -> Option<Lease> {
        let subnets = pod_cidrs(node);
        subnets.iter().next()?;
        Some(Lease { subnets, attributes: self.read(node.annotations())? })
    }
}

/// The first pod CIDR of each family.
fn pod_cidrs(node: &SlimNode) -> Subnets {
    let all = node.spec.pod_cidrs.iter().flatten().chain(&node.spec.pod_cidr);
    let mut subnets = Subnets::default();
    for cidr in all.filter_map(|cidr| cidr.parse::<IpNet>().ok()) {
        if subnets.get(Family::of_net(cidr)).is_none() {
            subnets = subnets.with(cidr);
        }
    }
    subnets
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
        let data = Some(json!({"VNI": 1, "VtepMAC": "02:00:00:00:00:01"}));
        let ipv4 = LeaseAttributes {
            public_ip: "10.0.0.1".parse().unwrap(),
            public_ipv6: None,
            backend_type: "vxlan".to_owned(),
            backend_data: data.clone(),
            backend_v6_data: None,
        };
        let written = annotations.write(&ipv4).unwrap();
        assert_eq!(written["flannel.alpha.coreos.com/backend-data"], r#"{"VNI":1,"VtepMAC":"02:00:00:00:00:01"}"#);
        assert_eq!((annotations.read(&written), written.len()), (Some(ipv4.clone()), 4));
        let both = LeaseAttributes { public_ipv6: "fd01::1".parse().ok(), backend_v6_data: data, ..ipv4.clone() };
        assert_eq!(annotations.read(&annotations.write(&both).unwrap()), Some(both));
        assert_eq!(annotations.read(&BTreeMap::new()), None);
        let host_gw = LeaseAttributes { backend_type: "host-gw".to_owned(), backend_data: None, ..ipv4 };
        assert_eq!(annotations.write(&host_gw).unwrap()["flannel.alpha.coreos.com/backend-data"], "null");
    }

    #[test]
    fn an_administrators_address_is_published() {
        let annotations = Annotations::new("flannel.alpha.coreos.com").unwrap();
        let mut attributes = annotations
            .read(
                &[
                    ("flannel.alpha.coreos.com/kube-subnet-manager".to_owned(), "true".to_owned()),
                    ("flannel.alpha.coreos.com/backend-type".to_owned(), "vxlan".to_owned()),
                    ("flannel.alpha.coreos.com/public-ip".to_owned(), "10.0.0.1".to_owned()),
                ]
                .into(),
            )
            .unwrap();
        let overwrite = [("flannel.alpha.coreos.com/public-ip-overwrite".to_owned(), "192.0.2.1".to_owned())].into();
        annotations.overwrite(&overwrite, &mut attributes);
        assert_eq!(attributes.public_ip.to_string(), "192.0.2.1");
    }

    #[test]
    fn the_first_cidr_of_each_family_counts() {
        let cidrs = |list: &[&str], one: Option<&str>| {
            let list = (!list.is_empty()).then(|| list.iter().map(|cidr| (*cidr).to_owned()).collect());
            let spec = PodCidrs { pod_cidr: one.map(str::to_owned), pod_cidrs: list };
            let types = ApiResource::erase::<Node>(&());
            pod_cidrs(&Object { spec, ..Object::new("n", &types, PodCidrs::default()) }).to_string()
        };
        assert_eq!(cidrs(&["10.244.1.0/24", "fd00:1::/64"], Some("10.244.1.0/24")), "10.244.1.0/24 and fd00:1::/64");
        assert_eq!(cidrs(&["fd00:1::/64"], None), "fd00:1::/64");
        assert_eq!(cidrs(&[], Some("10.244.1.0/24")), "10.244.1.0/24");
        assert_eq!(cidrs(&["junk"], None), "no subnet");
    }
}
