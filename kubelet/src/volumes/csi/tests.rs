//! The whole way of a volume, against a driver in this process.

use std::fs;
use std::path::Path;
use std::time::Duration;

use apimachinery::process::CancellationToken;
use k8s_openapi::api::core::v1::{CSIVolumeSource, PersistentVolume, PersistentVolumeClaim, Pod};
use serde_json::{Value, json};
use tempfile::TempDir;
use tonic::Status;

use super::api::{
    self, Capabilities, Capability, Empty, Expand, Expanded, NodeCapability, Publish, RpcCapability, Stage, Unpublish,
    Unstage, methods,
};
use super::*;
use crate::grpc::Service;
use crate::plugins::{Handler, Plugin};
use crate::testing::FakeApi;
use crate::volumes::Tokens;

const DRIVER: &str = "/apis/storage.k8s.io/v1/csidrivers/d.example";

/// What the driver was asked, and what it answers.
#[derive(Default)]
struct Asked {
    calls: Vec<String>,
    publish: Option<Publish>,
    refuse: bool,
}

struct World {
    root: TempDir,
    api: FakeApi,
    csi: Arc<Csi>,
    tokens: Tokens,
    asked: Arc<Mutex<Asked>>,
    _end: tokio_util::sync::DropGuard,
}

fn serve(socket: &Path, capabilities: &[Capability], asked: &Arc<Mutex<Asked>>, end: CancellationToken) {
    let capability = |of: &Capability| NodeCapability { rpc: Some(RpcCapability { r#type: *of as i32 }) };
    let known = Capabilities { capabilities: capabilities.iter().map(capability).collect() };
    let topology = api::Topology { segments: HashMap::from([("zone".to_owned(), "z1".to_owned())]) };
    let info = api::NodeInfo { node_id: "n-1".into(), max_volumes_per_node: 8, accessible_topology: Some(topology) };
    let note = |asked: &Arc<Mutex<Asked>>| {
        let asked = asked.clone();
        move |call: String| asked.lock().calls.push(call)
    };
    let (staged, unstaged, unpublished, expanded) = (note(asked), note(asked), note(asked), note(asked));
    let published = asked.clone();
    Service::default()
        .unary(methods::GET_INFO, move |_: Empty| std::future::ready(Ok(info.clone())))
        .unary(methods::GET_CAPABILITIES, move |_: Empty| std::future::ready(Ok(known.clone())))
        .unary(methods::STAGE, move |question: Stage| {
            assert!(Path::new(&question.staging_target_path).is_dir(), "a directory to stage to");
            staged(format!("stage {} {:?}", question.volume_id, question.secrets.get("key")));
            std::future::ready(Ok(Empty {}))
        })
        .unary(methods::UNSTAGE, move |question: Unstage| {
            unstaged(format!("unstage {}", question.volume_id));
            std::future::ready(Ok(Empty {}))
        })
        .unary(methods::PUBLISH, move |question: Publish| {
            let mut asked = published.lock();
            asked.calls.push(format!("publish {}", question.volume_id));
            if asked.refuse {
                return std::future::ready(Err(Status::internal("no")));
            }
            fs::create_dir_all(&question.target_path).unwrap();
            asked.publish = Some(question);
            std::future::ready(Ok(Empty {}))
        })
        .unary(methods::UNPUBLISH, move |question: Unpublish| {
            unpublished(format!("unpublish {}", question.volume_id));
            fs::remove_dir(&question.target_path).unwrap();
            std::future::ready(Ok(Empty {}))
        })
        .unary(methods::EXPAND, move |question: Expand| {
            let bytes = question.capacity_range.map_or(0, |range| range.required_bytes);
            expanded(format!("expand {} {bytes}", question.volume_id));
            std::future::ready(Ok(Expanded { capacity_bytes: bytes }))
        })
        .start(socket, end)
        .unwrap();
}

impl World {
    /// A node with one registered driver, which the cluster knows by `spec`.
    async fn new(capabilities: &[Capability], spec: Value) -> Self {
        let (root, api) = (tempfile::tempdir().unwrap(), FakeApi::default());
        api.put("/api/v1/nodes/n", json!({"metadata": {"name": "n", "uid": "1"}, "spec": {}}));
        api.put(DRIVER, json!({"metadata": {"name": "d.example"}, "spec": spec}));
        api.put("/api/v1/namespaces/ns/secrets/s", json!({"metadata": {"name": "s"}, "data": {"key": "dmFsdWU="}}));
        let (asked, end) = (Arc::default(), CancellationToken::new());
        let socket = root.path().join("d.sock");
        serve(&socket, capabilities, &asked, end.clone());
        let csi = Arc::new(new_csi(root.path(), &api));
        register(&csi, &api, &socket).await;
        let tokens = Tokens::new(api.client());
        Self { root, api, csi, tokens, asked, _end: end.drop_guard() }
    }

    fn calls(&self) -> Vec<String> {
        std::mem::take(&mut self.asked.lock().calls)
    }

    async fn publish(&self, wanted: &Wanted<'_>) -> Result<Published, String> {
        self.csi.publish(wanted, &self.tokens).await.map_err(|error| error.to_string())
    }

    /// Another process on the same disk.
    async fn restarted(&self) -> Arc<Csi> {
        let csi = Arc::new(new_csi(self.root.path(), &self.api));
        register(&csi, &self.api, &self.root.path().join("d.sock")).await;
        csi
    }
}

fn new_csi(root: &Path, api: &FakeApi) -> Csi {
    Csi::new(root.to_owned(), "n", Objects::new(api.client()), Arc::default())
}

async fn register(csi: &Arc<Csi>, api: &FakeApi, socket: &Path) {
    let registration = Registration { drivers: csi.drivers.clone(), node_info: NodeInfo::new(api.client(), "n") };
    let plugin = Plugin { name: "d.example".into(), endpoint: socket.to_owned(), versions: vec!["1.0.0".into()] };
    registration.register(&plugin).await.unwrap();
}

fn pod() -> Pod {
    let spec = json!({"containers": [], "serviceAccountName": "a"});
    serde_json::from_value(json!({"metadata": {"name": "p", "namespace": "ns", "uid": "u"}, "spec": spec})).unwrap()
}

fn volume() -> PersistentVolume {
    let secret = json!({"name": "s", "namespace": "ns"});
    let csi = json!({"driver": "d.example", "volumeHandle": "h", "fsType": "ext4", "nodeStageSecretRef": secret,
        "volumeAttributes": {"colour": "red"}});
    let spec = json!({"capacity": {"storage": "2Gi"}, "accessModes": ["ReadWriteOnce"], "csi": csi});
    serde_json::from_value(json!({"metadata": {"name": "pv"}, "spec": spec})).unwrap()
}

fn claim(size: &str) -> PersistentVolumeClaim {
    let status = json!({"phase": "Bound", "capacity": {"storage": size}});
    let claim = json!({"metadata": {"name": "c", "namespace": "ns"}, "spec": {}, "status": status});
    serde_json::from_value(claim).unwrap()
}

fn persistent<'a>(pod: &'a Pod, volume: &'a PersistentVolume) -> Wanted<'a> {
    let source = volume.spec.as_ref().and_then(|spec| spec.csi.as_ref()).unwrap();
    Wanted { pod, volume: "v", source: Source::Persistent(volume, source), claim: None, read_only: false }
}

#[tokio::test]
async fn drivers_are_shown_to_the_cluster() {
    let world = World::new(&[], json!({})).await;
    let node = world.api.get("/api/v1/nodes/n").unwrap();
    assert_eq!(node["metadata"]["labels"]["zone"], "z1");
    assert_eq!(node["metadata"]["annotations"]["csi.volume.kubernetes.io/nodeid"], r#"{"d.example":"n-1"}"#);
    let csi_node = world.api.get("/apis/storage.k8s.io/v1/csinodes/n").unwrap();
    let driver = json!({"name": "d.example", "nodeID": "n-1", "topologyKeys": ["zone"], "allocatable": {"count": 8}});
    assert_eq!(csi_node["spec"]["drivers"], json!([driver]));
    assert_eq!(csi_node["metadata"]["ownerReferences"][0]["uid"], "1");

    let node_info = NodeInfo::new(world.api.client(), "n");
    node_info.uninstall("d.example").await.unwrap();
    let node = world.api.get("/api/v1/nodes/n").unwrap();
    assert!(node["metadata"]["annotations"].as_object().unwrap().is_empty());
    // A CSINode of an earlier node of the name is replaced.
    world.api.put("/api/v1/nodes/n", json!({"metadata": {"name": "n", "uid": "2"}, "spec": {}}));
    node_info.initialize().await.unwrap();
    let csi_node = world.api.get("/apis/storage.k8s.io/v1/csinodes/n").unwrap();
    assert_eq!(csi_node["metadata"]["ownerReferences"][0]["uid"], "2");
}

#[tokio::test]
async fn a_persistent_volume_comes_and_goes() {
    let spec = json!({"attachRequired": false, "podInfoOnMount": true, "tokenRequests": [{"audience": "x"}]});
    let world = World::new(&[Capability::StageUnstage], spec).await;
    let (pod, volume) = (pod(), volume());
    let wanted = persistent(&pod, &volume);
    let published = world.publish(&wanted).await.unwrap();
    assert_eq!(published.path, world.root.path().join("pods/u/volumes/kubernetes.io~csi/pv/mount"));
    assert_eq!(world.calls(), [r#"stage h Some("value")"#, "publish h"]);
    let question = world.asked.lock().publish.clone().unwrap();
    assert!(question.staging_target_path.ends_with("/globalmount"));
    assert_eq!(question.volume_context["csi.storage.k8s.io/pod.name"], "p");
    assert_eq!(question.volume_context["colour"], "red");
    let tokens: Value =
        serde_json::from_str(&question.volume_context["csi.storage.k8s.io/serviceAccount.tokens"]).unwrap();
    assert_eq!(tokens, json!({"x": {"token": "secret", "expirationTimestamp": "2100-01-01T00:00:00Z"}}));

    // Once is enough.
    world.publish(&wanted).await.unwrap();
    assert!(world.calls().is_empty());
    // While the pod uses it, it stays on the node.
    assert!(world.csi.unstage_unused().await);
    assert!(world.calls().is_empty());
    world.csi.release("u").await.unwrap();
    assert!(world.csi.unstage_unused().await);
    assert_eq!(world.calls(), ["unpublish h", "unstage h"]);
    assert!(layout::all_published(world.root.path()).is_empty());
    assert!(layout::all_staged(world.root.path()).is_empty());
}

#[tokio::test]
async fn another_process_takes_over() {
    let world = World::new(&[Capability::StageUnstage], json!({"attachRequired": false})).await;
    let (pod, volume) = (pod(), volume());
    world.publish(&persistent(&pod, &volume)).await.unwrap();
    world.calls();
    let csi = world.restarted().await;
    csi.release("u").await.unwrap();
    assert!(csi.unstage_unused().await);
    assert_eq!(world.calls(), ["unpublish h", "unstage h"]);
    // Without the driver nothing is given back, and nothing is lost.
    csi.publish(&persistent(&pod, &volume), &world.tokens).await.unwrap();
    let alone = new_csi(world.root.path(), &world.api);
    assert!(matches!(alone.release("u").await, Err(CsiError::NoDriver(name)) if name == "d.example"));
    assert_eq!(layout::published_of(world.root.path(), "u").len(), 1);
}

#[tokio::test]
async fn what_surely_failed_leaves_nothing() {
    let world = World::new(&[], json!({"attachRequired": false})).await;
    world.asked.lock().refuse = true;
    let (pod, volume) = (pod(), volume());
    let error = world.publish(&persistent(&pod, &volume)).await.unwrap_err();
    assert_eq!(error, "rpc error: code = Internal desc = no");
    assert!(layout::all_published(world.root.path()).is_empty());
}

#[tokio::test]
async fn an_inline_volume_needs_the_clusters_consent() {
    let source = CSIVolumeSource { driver: "d.example".into(), ..CSIVolumeSource::default() };
    let pod = pod();
    let wanted = Wanted { pod: &pod, volume: "v", source: Source::Inline(&source), claim: None, read_only: true };
    let world = World::new(&[Capability::StageUnstage], json!({})).await;
    let error = world.publish(&wanted).await.unwrap_err();
    assert!(error.starts_with(r#"volume mode "Ephemeral" not supported by driver d.example"#), "{error}");

    let modes = json!({"volumeLifecycleModes": ["Ephemeral"], "requiresRepublish": true});
    world.api.put(DRIVER, json!({"metadata": {}, "spec": modes}));
    let published = world.publish(&wanted).await.unwrap();
    assert!(published.refresh_at.is_some());
    world.publish(&wanted).await.unwrap();
    let handle = layout::inline_handle("u", "v");
    assert_eq!(world.calls(), [format!("publish {handle}"), format!("publish {handle}")]);
    assert!(world.asked.lock().publish.as_ref().unwrap().readonly);
}

#[tokio::test]
async fn volumes_grow_on_the_node() {
    let world = World::new(&[Capability::Expand], json!({"attachRequired": false})).await;
    let path = "/api/v1/namespaces/ns/persistentvolumeclaims/c";
    let (pod, volume, small, large) = (pod(), volume(), claim("1Gi"), claim("2Gi"));
    world.api.put(path, serde_json::to_value(&small).unwrap());
    let wanted = persistent(&pod, &volume);
    world.publish(&Wanted { claim: Some(&small), ..wanted }).await.unwrap();
    assert_eq!(world.calls(), ["publish h", "expand h 2147483648"]);
    assert_eq!(world.api.get(path).unwrap()["status"]["capacity"]["storage"], "2Gi");
    world.publish(&Wanted { claim: Some(&large), ..wanted }).await.unwrap();
    assert!(world.calls().is_empty());
}

#[tokio::test]
async fn attached_volumes_are_named_by_the_node_first() {
    let world = World::new(&[], json!({"attachRequired": true})).await;
    let id = VolumeId { driver: "d.example".into(), handle: "h".into() };
    let attachment = json!({"metadata": {"name": id.attachment("n")},
        "spec": {"attacher": "d.example", "nodeName": "n", "source": {}},
        "status": {"attached": true, "attachmentMetadata": {"device": "sdb"}}});
    world.api.put(&format!("/apis/storage.k8s.io/v1/volumeattachments/{}", id.attachment("n")), attachment);
    // The node's status, as the agent of the node would keep it, and the attach/detach controller after it.
    let (in_use, api) = (world.csi.in_use.clone(), world.api.clone());
    let agent = tokio::spawn(async move {
        let mut changes = in_use.changes();
        let names = changes.wait_for(|names| !names.is_empty()).await.unwrap().clone();
        let attached: Vec<_> = names.iter().map(|name| json!({"name": name, "devicePath": ""})).collect();
        let node = json!({"metadata": {"name": "n", "uid": "1"}, "status": {"volumesAttached": attached}});
        api.put("/api/v1/nodes/n", node);
        in_use.show(names);
    });
    let (pod, volume) = (pod(), volume());
    let wanted = persistent(&pod, &volume);
    let published = tokio::time::timeout(Duration::from_secs(30), world.csi.publish(&wanted, &world.tokens));
    published.await.expect("in time").unwrap();
    agent.await.unwrap();
    let question = world.asked.lock().publish.clone().unwrap();
    assert_eq!(question.publish_context, HashMap::from([("device".to_owned(), "sdb".to_owned())]));

    world.csi.show_in_use().await.unwrap();
    assert_eq!(world.csi.in_use.wanted(), Names::from([id.unique_name()]));
    world.csi.release("u").await.unwrap();
    world.csi.show_in_use().await.unwrap();
    assert!(world.csi.in_use.wanted().is_empty());
}
