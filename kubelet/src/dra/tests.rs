//! Claims of pods, with a driver in this process.

use std::path::Path;

use apimachinery::process::CancellationToken;
use serde_json::json;
use tempfile::TempDir;

use super::api::{Claims as Asked, Prepared, PreparedClaim, Unprepared, UnpreparedClaim, Version};
use super::*;
use crate::grpc::Service;
use crate::plugins::{Handler, Plugin};
use crate::testing::FakeApi;

const CLAIM: &str = "/apis/resource.k8s.io/v1/namespaces/n/resourceclaims/c";

struct World {
    root: TempDir,
    api: FakeApi,
    claims: Claims,
    calls: Arc<Mutex<Vec<String>>>,
    /// What the driver says is wrong; empty for nothing.
    trouble: Arc<Mutex<String>>,
    _end: tokio_util::sync::DropGuard,
}

fn serve(socket: &Path, calls: &Arc<Mutex<Vec<String>>>, trouble: &Arc<Mutex<String>>, end: CancellationToken) {
    let (prepared, unprepared, error) = (calls.clone(), calls.clone(), trouble.clone());
    Service::default()
        .unary(Version::V1.prepare(), move |asked: Asked| {
            let error = error.lock().clone();
            let device = |request: &str| api::Device {
                request_names: vec![request.to_owned()],
                pool_name: "p".into(),
                device_name: request.to_owned(),
                cdi_device_ids: vec![format!("v.example/gpu={request}")],
                share_id: None,
            };
            let mut answer = Prepared::default();
            for claim in asked.claims {
                prepared.lock().push(format!("prepare {}", claim.uid));
                let devices = vec![device("r"), device("s")];
                answer.claims.insert(claim.uid, PreparedClaim { devices, error: error.clone() });
            }
            std::future::ready(Ok(answer))
        })
        .unary(Version::V1.unprepare(), move |asked: Asked| {
            let mut answer = Unprepared::default();
            for claim in asked.claims {
                unprepared.lock().push(format!("unprepare {}", claim.uid));
                answer.claims.insert(claim.uid, UnpreparedClaim::default());
            }
            std::future::ready(Ok(answer))
        })
        .start(socket, end)
        .unwrap();
}

async fn open(root: &Path, api: &FakeApi) -> Claims {
    let drivers: Arc<Drivers> = Arc::default();
    let registration = Registration { drivers: drivers.clone(), client: api.client(), node: "node".into() };
    let endpoint = root.join("d.sock");
    let plugin = Plugin { name: "d.example".into(), endpoint, versions: vec!["v1.DRAPlugin".into()] };
    registration.validate(&plugin).unwrap();
    registration.register(&plugin).await.unwrap();
    Claims::open(api.client(), root.join("dra_manager_state"), drivers)
}

impl World {
    async fn new(users: &[&str]) -> Self {
        let (root, api) = (tempfile::tempdir().unwrap(), FakeApi::default());
        let (calls, trouble, end) = (Arc::default(), Arc::default(), CancellationToken::new());
        serve(&root.path().join("d.sock"), &calls, &trouble, end.clone());
        put_claim(&api, "1", users);
        let claims = open(root.path(), &api).await;
        Self { root, api, claims, calls, trouble, _end: end.drop_guard() }
    }

    fn calls(&self) -> Vec<String> {
        std::mem::take(&mut self.calls.lock())
    }
}

fn put_claim(api: &FakeApi, uid: &str, users: &[&str]) {
    let users: Vec<_> = users.iter().map(|uid| json!({"resource": "pods", "name": uid, "uid": uid})).collect();
    let result = json!({"driver": "d.example", "pool": "p", "device": "r", "request": "r"});
    let status = json!({"reservedFor": users, "allocation": {"devices": {"results": [result]}}});
    api.put(CLAIM, json!({"metadata": {"name": "c", "uid": uid}, "spec": {}, "status": status}));
}

fn pod(uid: &str) -> Pod {
    let container = json!({"name": "c", "resources": {"claims": [{"name": "x", "request": "s"}]}});
    let spec = json!({"containers": [container], "resourceClaims": [{"name": "x", "resourceClaimName": "c"}]});
    let metadata = json!({"name": uid, "namespace": "n", "uid": uid});
    serde_json::from_value(json!({"metadata": metadata, "spec": spec})).unwrap()
}

fn container(pod: &Pod) -> &Container {
    &pod.spec.as_ref().unwrap().containers[0]
}

#[tokio::test]
async fn a_claim_is_prepared_once_and_given_back_by_the_last() {
    let world = World::new(&["a", "b"]).await;
    let (a, b) = (pod("a"), pod("b"));
    assert!(matches!(world.claims.cdi_devices(&a, container(&a)), Err(DraError::NotPrepared { .. })));
    world.claims.prepare(&a).await.unwrap();
    world.claims.prepare(&b).await.unwrap();
    assert_eq!(world.calls(), ["prepare 1"]);
    assert_eq!(world.claims.cdi_devices(&a, container(&a)).unwrap(), ["v.example/gpu=s"]);
    let in_use = world.claims.in_use(&b, container(&b));
    assert_eq!((in_use[0].claim.as_str(), in_use[0].devices.len()), ("c", 2));
    world.claims.release("a").await.unwrap();
    assert!(world.calls().is_empty(), "the other pod uses it");
    world.claims.release("b").await.unwrap();
    world.claims.release("b").await.unwrap();
    assert_eq!(world.calls(), ["unprepare 1"]);
}

#[tokio::test]
async fn another_process_gives_back_what_pods_left() {
    let world = World::new(&["a"]).await;
    world.claims.prepare(&pod("a")).await.unwrap();
    world.calls();
    let later = open(world.root.path(), &world.api).await;
    assert_eq!(later.users(), BTreeSet::from(["a".to_owned()]));
    // Devices are known at once; a pod that starts again has them prepared again.
    assert_eq!(later.cdi_devices(&pod("a"), container(&pod("a"))).unwrap().len(), 1);
    later.prepare(&pod("a")).await.unwrap();
    later.release("a").await.unwrap();
    assert_eq!(world.calls(), ["prepare 1", "unprepare 1"]);
    assert!(open(world.root.path(), &world.api).await.users().is_empty());
}

#[tokio::test]
async fn pods_that_may_not_use_a_claim_leave_no_trace() {
    let world = World::new(&["b"]).await;
    let error = world.claims.prepare(&pod("a")).await.unwrap_err().to_string();
    assert_eq!(error, "pod a (a) is not allowed to use ResourceClaim c (1)");
    assert!(world.claims.users().is_empty());

    *world.trouble.lock() = "no device".to_owned();
    let error = world.claims.prepare(&pod("b")).await.unwrap_err().to_string();
    assert_eq!(error, "NodePrepareResources failed for ResourceClaim c: no device");
    // It may be half prepared: it is given back with its pod.
    world.trouble.lock().clear();
    put_claim(&world.api, "2", &["b"]);
    let error = world.claims.prepare(&pod("b")).await.unwrap_err().to_string();
    assert!(error.starts_with("old ResourceClaim with same name c and different UID 1 still exists"), "{error}");
    world.claims.release("b").await.unwrap();
    world.claims.prepare(&pod("b")).await.unwrap();
    assert_eq!(world.calls(), ["prepare 1", "unprepare 1", "prepare 2"]);
}
