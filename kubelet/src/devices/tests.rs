//! Devices of a plugin in this process, on their way to containers.

use std::path::Path;

use apimachinery::process::CancellationToken;
use serde_json::json;

use super::api::{
    Allocate, Allocated, ContainerAllocated, ContainerDevices, Device, DeviceFile, DeviceList, Empty, HEALTHY, Options,
    Preferred, PreferredRequest, Register, VERSION, methods,
};
use super::*;
use crate::grpc::{self, Service};
use crate::plugins::{Handler, Plugin};

const RESOURCE: &str = "example.com/gpu";
const PATIENCE: Duration = Duration::from_secs(30);

/// A plugin whose devices can be changed while it runs.
struct Fake {
    devices: watch::Sender<Vec<Device>>,
    calls: Arc<Mutex<Vec<String>>>,
    end: CancellationToken,
}

fn devices(healthy: &[&str], unhealthy: &[&str]) -> Vec<Device> {
    let device = |id: &&str, health: &str| Device { id: (*id).into(), health: health.into(), topology: None };
    let unhealthy = unhealthy.iter().map(|id| device(id, "Unhealthy"));
    healthy.iter().map(|id| device(id, HEALTHY)).chain(unhealthy).collect()
}

impl Fake {
    fn start(socket: &Path, healthy: &[&str]) -> Self {
        let calls: Arc<Mutex<Vec<String>>> = Arc::default();
        let (sender, end) = (watch::Sender::new(devices(healthy, &[])), CancellationToken::new());
        let (lists, ended) = (sender.clone(), end.clone());
        let (allocated, started) = (calls.clone(), calls.clone());
        let options = Options { pre_start_required: true, get_preferred_allocation_available: true };
        Service::default()
            .unary(methods::OPTIONS, move |_: Empty| std::future::ready(Ok(options.clone())))
            .streaming(methods::LIST_AND_WATCH, move |_: Empty| {
                let changes = tokio_stream::wrappers::WatchStream::new(lists.subscribe());
                let lists = changes.map(|devices| Ok(DeviceList { devices }));
                lists.take_until(ended.clone().cancelled_owned())
            })
            .unary(methods::PREFERRED, |request: PreferredRequest| {
                // The last ones, where upstream and this kubelet would take others.
                let answer = |request: &api::ContainerPreferredRequest| {
                    let size = usize::try_from(request.size).unwrap();
                    let ids = request.available.iter().rev().take(size).cloned().collect();
                    ContainerDevices { ids }
                };
                let container_responses = request.container_requests.iter().map(answer).collect();
                std::future::ready(Ok(Preferred { container_responses }))
            })
            .unary(methods::ALLOCATE, move |request: Allocate| {
                let ids = request.container_requests[0].ids.clone();
                allocated.lock().push(format!("allocate {}", ids.join(" ")));
                let file = |id: &String| DeviceFile {
                    container_path: format!("/dev/{id}"),
                    host_path: format!("/dev/gpu-{id}"),
                    permissions: "rw".into(),
                };
                let response = ContainerAllocated { devices: ids.iter().map(file).collect(), ..Default::default() };
                std::future::ready(Ok(Allocated { container_responses: vec![response] }))
            })
            .unary(methods::PRE_START, move |request: ContainerDevices| {
                started.lock().push(format!("start {}", request.ids.join(" ")));
                std::future::ready(Ok(Empty {}))
            })
            .start(socket, end.clone())
            .unwrap();
        Self { devices: sender, calls, end }
    }

    fn calls(&self) -> Vec<String> {
        std::mem::take(&mut self.calls.lock())
    }
}

async fn offers(devices: &Devices, capacity: i64, allocatable: i64) {
    let mut offered = devices.offered();
    let amount = |map: &BTreeMap<String, i64>| map.get(RESOURCE).copied();
    let test = |offered: &Offered| {
        (amount(&offered.capacity), amount(&offered.allocatable)) == (Some(capacity), Some(allocatable))
    };
    let seen = tokio::time::timeout(PATIENCE, offered.wait_for(test)).await.map(|seen| seen.is_ok());
    assert!(seen == Ok(true), "offered is {:?}", devices.offered().borrow());
}

async fn register(directory: &Path, resource: &str, endpoint: &str) -> Result<(), String> {
    let channel = grpc::channel(&directory.join("kubelet.sock"));
    let request = Register {
        version: VERSION.into(),
        endpoint: endpoint.into(),
        resource_name: resource.into(),
        options: Some(Options { pre_start_required: true, get_preferred_allocation_available: true }),
    };
    let answer: Result<Empty, _> = grpc::call(&channel, methods::REGISTER, request, PATIENCE).await;
    answer.map(drop).map_err(|error| error.to_string())
}

/// A pod with containers that want so many devices each; those whose name begins with `init` run before the others.
fn pod(uid: &str, wanted: &[(&str, u32)]) -> Pod {
    let container = |(name, count): &(&str, u32)| json!({"name": name, "resources": {"limits": {RESOURCE: count.to_string(), "cpu": "1"}}});
    let (init, apps): (Vec<_>, Vec<_>) = wanted.iter().partition(|(name, _)| name.starts_with("init"));
    let init: Vec<_> = init.into_iter().map(container).collect();
    let apps: Vec<_> = apps.into_iter().map(container).collect();
    let spec = json!({"initContainers": init, "containers": apps});
    serde_json::from_value(json!({"metadata": {"uid": uid}, "spec": spec})).unwrap()
}

fn spec<'a>(pod: &'a Pod, name: &str) -> &'a Container {
    let spec = pod.spec.as_ref().unwrap();
    let mut all = spec.init_containers.iter().flatten().chain(&spec.containers);
    all.find(|container| container.name == name).unwrap()
}

fn ids(devices: &Devices, pod: &str, container: &str) -> Vec<String> {
    let shares = devices.of_container(pod, container);
    shares.into_iter().flat_map(|(_, nodes)| nodes).flat_map(|(_, ids)| ids).collect()
}

#[tokio::test]
async fn a_plugins_devices_reach_containers() {
    let directory = tempfile::tempdir().unwrap();
    let manager = Devices::open(directory.path().to_owned());
    let end = CancellationToken::new();
    serve(&manager, end.clone()).unwrap();
    let error = register(directory.path(), "gpu", "a.sock").await.unwrap_err();
    assert_eq!(error, r#"rpc error: code = Unknown desc = the ResourceName "gpu" is invalid"#);
    assert!(register(directory.path(), RESOURCE, "../a.sock").await.is_err());
    let plugin = Fake::start(&directory.path().join("a.sock"), &["1", "2", "3"]);
    register(directory.path(), RESOURCE, "a.sock").await.unwrap();
    offers(&manager, 3, 3).await;

    // The app container gets what the init container leaves, and one more.
    let pod_a = pod("a", &[("init", 1), ("app", 2)]);
    manager.allocate(&pod_a).await.unwrap();
    assert_eq!(ids(&manager, "a", "init"), ["3"]);
    assert_eq!(ids(&manager, "a", "app"), ["2", "3"]);
    assert_eq!(plugin.calls(), ["allocate 3", "allocate 2 3"]);
    manager.allocate(&pod_a).await.unwrap();
    assert!(plugin.calls().is_empty(), "what is given stays given");
    let options = manager.start(&pod_a, spec(&pod_a, "app")).await.unwrap();
    assert_eq!(options.devices.len(), 2);
    assert_eq!(plugin.calls(), ["start 2 3"]);

    let error = manager.allocate(&pod("b", &[("app", 2)])).await.unwrap_err();
    let few = "requested number of devices unavailable for example.com/gpu. Requested: 2, Available: 1";
    assert_eq!(error.to_string(), few);
    manager.release("a");
    manager.allocate(&pod("b", &[("app", 2)])).await.unwrap();

    plugin.devices.send_replace(devices(&["1", "2"], &["3"]));
    offers(&manager, 3, 2).await;
    plugin.end.cancel();
    offers(&manager, 3, 0).await;
    end.cancel();
}

#[tokio::test]
async fn another_process_knows_whose_the_devices_are() {
    let directory = tempfile::tempdir().unwrap();
    let first = Devices::open(directory.path().to_owned());
    let plugin = Fake::start(&directory.path().join("p.sock"), &["1", "2"]);
    first.clone().connect(RESOURCE.into(), Client::at(&directory.path().join("p.sock")), Options::default());
    offers(&first, 2, 2).await;
    first.allocate(&pod("a", &[("app", 1)])).await.unwrap();
    drop(first);
    plugin.end.cancel();

    let second = Devices::open(directory.path().to_owned());
    offers(&second, 0, 0).await;
    assert_eq!(ids(&second, "a", "app"), ["1"]);
    // A pod whose devices are known waits for nobody; another one does.
    second.allocate(&pod("a", &[("app", 1)])).await.unwrap();
    let error = second.allocate(&pod("b", &[("app", 1)])).await.unwrap_err();
    assert_eq!(error.to_string(), "cannot allocate unregistered device example.com/gpu");
    let socket = directory.path().join("again.sock");
    let again = Fake::start(&socket, &["1", "2"]);
    let registration = Registration::new(second.clone());
    let named = Plugin { name: RESOURCE.into(), endpoint: socket, versions: vec![VERSION.into()] };
    registration.validate(&named).unwrap();
    registration.register(&named).await.unwrap();
    offers(&second, 2, 2).await;
    second.allocate(&pod("b", &[("app", 1)])).await.unwrap();
    assert_eq!(again.calls(), ["allocate 2"]);
    second.retain_pods(|uid| uid == "b");
    assert!(ids(&second, "a", "app").is_empty());
    registration.deregister(&named).await;
    offers(&second, 2, 0).await;
}

#[tokio::test(start_paused = true)]
async fn a_plugin_has_time_to_come_back() {
    let directory = tempfile::tempdir().unwrap();
    let manager = Devices::open(directory.path().to_owned());
    manager.inventory.lock().expect(RESOURCE);
    manager.publish();
    manager.clone().expire_later(RESOURCE.into());
    assert!(manager.inventory.lock().knows(RESOURCE));
    let mut offered = manager.offered();
    tokio::time::sleep(GRACE + Duration::from_secs(1)).await;
    assert!(!manager.inventory.lock().knows(RESOURCE));
    assert_eq!(offered.borrow_and_update().capacity[RESOURCE], 0);
    // Other resources are not for plugins.
    manager.allocate(&pod("a", &[("app", 1)])).await.unwrap();
}
