//! What CSI drivers say about this node, shown to the cluster: the driver's name for the node in an annotation, the
//! topology as labels, and all of it in the node's CSINode object.

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::api::core::v1::Node;
use k8s_openapi::api::storage::v1::{CSINode, CSINodeDriver, CSINodeSpec, VolumeNodeResources};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use kube::{Api, Client};
use serde_json::json;
use tokio::sync::Mutex;

use super::api;
use crate::objects::api_error;

const NODE_IDS: &str = "csi.volume.kubernetes.io/nodeid";
/// In-tree plugins whose volumes are served by CSI drivers everywhere.
const MIGRATED: &str = "storage.alpha.kubernetes.io/migrated-plugins";
const MIGRATED_PLUGINS: &str = "kubernetes.io/aws-ebs,kubernetes.io/azure-disk,kubernetes.io/azure-file,\
    kubernetes.io/cinder,kubernetes.io/gce-pd,kubernetes.io/portworx-volume,kubernetes.io/vsphere-volume";
/// Attempts at one change, and the first pause between them.
const ATTEMPTS: u32 = 4;
const PAUSE: Duration = Duration::from_millis(10);

#[derive(Debug, thiserror::Error)]
pub enum NodeInfoError {
    #[error("error adding CSI driver node info: driverNodeID must not be empty")]
    NoNodeId,
    #[error("error updating Node object with CSI driver node info: {}", api_error(.0))]
    Node(#[source] kube::Error),
    #[error("error updating CSINode object with CSI driver node info: {}", api_error(.0))]
    CsiNode(#[source] kube::Error),
    #[error("failed to parse node's {NODE_IDS:?} annotation value ({text:?})")]
    Annotation { text: String, source: serde_json::Error },
    #[error(
        "detected topology value collision: driver reported {key:?}:{reported:?} but existing label is {key:?}:{existing:?}"
    )]
    Topology { key: String, reported: String, existing: String },
    #[error("CSINode {0:?} was owned by different node, deleted it")]
    NotOurs(String),
}

pub struct NodeInfo {
    nodes: Api<Node>,
    csi_nodes: Api<CSINode>,
    name: String,
    /// One change at a time: each is read, changed and written.
    turn: Mutex<()>,
}

impl NodeInfo {
    pub fn new(client: Client, node_name: &str) -> Self {
        Self {
            nodes: Api::all(client.clone()),
            csi_nodes: Api::all(client),
            name: node_name.to_owned(),
            turn: Mutex::default(),
        }
    }

    /// Makes sure that the node's CSINode is there, is the present node's and names the migrated plugins.
    pub async fn initialize(&self) -> Result<(), NodeInfoError> {
        self.change_csi_node(|_| {}).await
    }

    pub async fn install(&self, driver: &str, info: &api::NodeInfo) -> Result<(), NodeInfoError> {
        if info.node_id.is_empty() {
            return Err(NodeInfoError::NoNodeId);
        }
        let topology: BTreeMap<String, String> =
            info.accessible_topology.iter().flat_map(|topology| topology.segments.clone()).collect();
        let id = info.node_id.clone();
        self.change_node(driver, Some(&id), &topology).await?;
        let entry = csi_node_driver(driver, info, &topology);
        self.change_csi_node(|drivers| {
            if !drivers.contains(&entry) {
                drivers.retain(|other| other.name != entry.name);
                drivers.push(entry.clone());
            }
        })
        .await
    }

    pub async fn uninstall(&self, driver: &str) -> Result<(), NodeInfoError> {
        self.change_csi_node(|drivers| drivers.retain(|other| other.name != driver)).await?;
        self.change_node(driver, None, &BTreeMap::new()).await
    }

    /// Repeats a change that lost a race, a few times.
    async fn attempt<F: Future<Output = Result<(), NodeInfoError>>>(
        &self,
        once: impl Fn() -> F,
    ) -> Result<(), NodeInfoError> {
        let _turn = self.turn.lock().await;
        let mut pause = PAUSE;
        for _ in 1..ATTEMPTS {
            match once().await {
                Ok(()) => return Ok(()),
                Err(error) => tracing::debug!(error = %error, "another attempt to show a CSI driver follows"),
            }
            tokio::time::sleep(pause).await;
            pause *= 5;
        }
        once().await
    }

    async fn change_node(
        &self,
        driver: &str,
        id: Option<&str>,
        topology: &BTreeMap<String, String>,
    ) -> Result<(), NodeInfoError> {
        self.attempt(|| async {
            let node = self.nodes.get(&self.name).await.map_err(NodeInfoError::Node)?;
            let labels = node.metadata.labels.unwrap_or_default();
            check_topology(&labels, topology)?;
            let known = node.metadata.annotations.unwrap_or_default().remove(NODE_IDS);
            let ids = node_ids(known.as_deref(), driver, id)?;
            if ids == known && topology.iter().all(|(key, value)| labels.get(key) == Some(value)) {
                return Ok(());
            }
            let patch = json!({"metadata": {"annotations": {NODE_IDS: ids}, "labels": topology}});
            let sent = self.nodes.patch(&self.name, &PatchParams::default(), &Patch::Merge(patch)).await;
            sent.map(drop).map_err(NodeInfoError::Node)
        })
        .await
    }

    async fn change_csi_node(
        &self,
        change: impl Fn(&mut Vec<CSINodeDriver>) + Send + Sync,
    ) -> Result<(), NodeInfoError> {
        self.attempt(|| async {
            let node = self.nodes.get(&self.name).await.map_err(NodeInfoError::Node)?;
            let uid = node.metadata.uid.unwrap_or_default();
            let found = self.csi_nodes.get_opt(&self.name).await.map_err(NodeInfoError::CsiNode)?;
            let Some(mut found) = found else {
                let mut new = self.new_csi_node(uid);
                change(&mut new.spec.drivers);
                let made = self.csi_nodes.create(&PostParams::default(), &new).await;
                return made.map(drop).map_err(NodeInfoError::CsiNode);
            };
            if !is_owned(&found, &self.name, &uid) {
                // Of an earlier node of this name.
                let gone = self.csi_nodes.delete(&self.name, &DeleteParams::default()).await;
                gone.map_err(NodeInfoError::CsiNode)?;
                return Err(NodeInfoError::NotOurs(self.name.clone()));
            }
            let before = found.clone();
            change(&mut found.spec.drivers);
            let notes = found.metadata.annotations.get_or_insert_default();
            notes.insert(MIGRATED.to_owned(), MIGRATED_PLUGINS.to_owned());
            if found == before {
                return Ok(());
            }
            let sent = self.csi_nodes.replace(&self.name, &PostParams::default(), &found).await;
            sent.map(drop).map_err(NodeInfoError::CsiNode)
        })
        .await
    }

    fn new_csi_node(&self, node_uid: String) -> CSINode {
        let owner = OwnerReference {
            api_version: "v1".to_owned(),
            kind: "Node".to_owned(),
            name: self.name.clone(),
            uid: node_uid,
            ..OwnerReference::default()
        };
        CSINode {
            metadata: ObjectMeta {
                name: Some(self.name.clone()),
                owner_references: Some(vec![owner]),
                annotations: Some(BTreeMap::from([(MIGRATED.to_owned(), MIGRATED_PLUGINS.to_owned())])),
                ..ObjectMeta::default()
            },
            spec: CSINodeSpec::default(),
            ..CSINode::default()
        }
    }
}

fn is_owned(found: &CSINode, name: &str, uid: &str) -> bool {
    let mut owners = found.metadata.owner_references.iter().flatten();
    owners.any(|owner| owner.kind == "Node" && owner.name == name && owner.uid == uid)
}

fn check_topology(labels: &BTreeMap<String, String>, topology: &BTreeMap<String, String>) -> Result<(), NodeInfoError> {
    match topology.iter().find(|(key, value)| labels.get(*key).is_some_and(|existing| existing != *value)) {
        None => Ok(()),
        Some((key, reported)) => {
            Err(NodeInfoError::Topology { key: key.clone(), reported: reported.clone(), existing: labels[key].clone() })
        }
    }
}

/// The annotation with another driver's name for the node, or without the driver; none when no driver is left.
fn node_ids(known: Option<&str>, driver: &str, id: Option<&str>) -> Result<Option<String>, NodeInfoError> {
    let text = known.filter(|text| !text.is_empty()).unwrap_or("{}");
    let failed = |source| NodeInfoError::Annotation { text: text.to_owned(), source };
    let mut ids: BTreeMap<String, String> = serde_json::from_str(text).map_err(failed)?;
    match id {
        Some(id) => drop(ids.insert(driver.to_owned(), id.to_owned())),
        None => drop(ids.remove(driver)),
    }
    if ids.is_empty() {
        return Ok(None);
    }
    serde_json::to_string(&ids).map(Some).map_err(failed)
}

fn csi_node_driver(driver: &str, info: &api::NodeInfo, topology: &BTreeMap<String, String>) -> CSINodeDriver {
    let limit = info.max_volumes_per_node;
    if limit < 0 {
        tracing::warn!(driver, limit, "a CSI driver's limit of volumes is negative and ignored");
    }
    let count = (limit > 0).then(|| i32::try_from(limit).unwrap_or(i32::MAX));
    CSINodeDriver {
        name: driver.to_owned(),
        node_id: info.node_id.clone(),
        topology_keys: Some(topology.keys().cloned().collect()).filter(|keys: &Vec<_>| !keys.is_empty()),
        allocatable: count.map(|count| VolumeNodeResources { count: Some(count) }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_annotation_holds_every_driver() {
        let one = node_ids(None, "b", Some("n1")).unwrap();
        assert_eq!(one.as_deref(), Some(r#"{"b":"n1"}"#));
        let two = node_ids(one.as_deref(), "a", Some("n2")).unwrap();
        assert_eq!(two.as_deref(), Some(r#"{"a":"n2","b":"n1"}"#));
        assert_eq!(node_ids(two.as_deref(), "a", None).unwrap(), one);
        assert_eq!(node_ids(one.as_deref(), "b", None).unwrap(), None);
        assert!(matches!(node_ids(Some("x"), "b", None), Err(NodeInfoError::Annotation { .. })));
    }

    #[test]
    fn labels_that_say_otherwise_are_a_collision() {
        let map = |value: &str| BTreeMap::from([("zone".to_owned(), value.to_owned())]);
        assert!(check_topology(&map("a"), &map("a")).is_ok());
        assert!(check_topology(&BTreeMap::new(), &map("a")).is_ok());
        let error = check_topology(&map("b"), &map("a")).unwrap_err().to_string();
        assert!(error.contains(r#"driver reported "zone":"a" but existing label is "zone":"b""#), "{error}");
    }

    #[test]
    fn limits() {
        let limit = |max_volumes_per_node| {
            let info = api::NodeInfo { node_id: "n".into(), max_volumes_per_node, accessible_topology: None };
            csi_node_driver("d", &info, &BTreeMap::new()).allocatable.and_then(|resources| resources.count)
        };
        assert_eq!((limit(0), limit(5), limit(-1), limit(1 << 40)), (None, Some(5), None, Some(i32::MAX)));
    }
}
