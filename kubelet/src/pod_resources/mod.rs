//! What containers of this node have been given, for agents on the node (metrics of devices, network plugins): the
//! `PodResourcesLister` service on a socket of its own. Only reads.

mod api;

use std::sync::Arc;

use apimachinery::process::CancellationToken;
use k8s_openapi::api::core::v1::{Container, Pod};
use tonic::Status;

use crate::devices::{Devices, NO_NODE};
use crate::dra::{self, Claims, InUse};
use crate::grpc::{ServeError, Service};
use crate::pod::context::NodeContext;
use crate::pod::plan::{is_sidecar, is_terminal};
use crate::pod::runtime_uid;
use crate::state::NodeState;
use api::{
    Allocatable, CdiDevice, ClaimResource, ContainerDevices, ContainerResources, DynamicResource, Empty, Found, GetPod,
    List, PodResources, methods,
};

/// Serves `<root>/pod-resources/kubelet.sock` until told to end.
pub fn serve(state: &Arc<NodeState>, node: &NodeContext, end: CancellationToken) -> Result<(), ServeError> {
    let socket = state.root_dir.join("pod-resources/kubelet.sock");
    let given = Given { devices: node.devices.clone(), claims: node.claims.clone() };
    let lister = Arc::new(Lister { state: state.clone(), given });
    lister.service().start(&socket, end)
}

struct Lister {
    state: Arc<NodeState>,
    given: Given,
}

/// What knows what has been given to containers.
struct Given {
    devices: Arc<Devices>,
    claims: Arc<Claims>,
}

impl Lister {
    fn service(self: Arc<Self>) -> Service {
        let (lister, old) = (self.clone(), self.clone());
        let (finder, all) = (self.clone(), self);
        Service::default()
            .unary(methods::LIST, move |_: Empty| std::future::ready(Ok(lister.list())))
            // The older version's messages have some of the fields of this one's, under the same numbers.
            .unary(methods::LIST_V1ALPHA1, move |_: Empty| std::future::ready(Ok(old.list())))
            .unary(methods::GET, move |request: GetPod| std::future::ready(finder.get(&request)))
            .unary(methods::ALLOCATABLE, move |_: Empty| std::future::ready(Ok(allocatable(&all.given.devices))))
    }

    fn list(&self) -> List {
        let views = self.state.pods();
        let active = views.iter().filter(|view| !is_terminal(&view.pod));
        List { pod_resources: active.map(|view| of_pod(&view.pod, &self.given)).collect() }
    }

    fn get(&self, request: &GetPod) -> Result<Found, Status> {
        let (namespace, name) = (&request.pod_namespace, &request.pod_name);
        match self.state.pod(namespace, name) {
            Some(view) => Ok(Found { pod_resources: Some(of_pod(&view.pod, &self.given)) }),
            None => Err(Status::unknown(format!("pod {name} in namespace {namespace} not found"))),
        }
    }
}

/// Containers that run as long as the pod does.
fn of_pod(pod: &Pod, given: &Given) -> PodResources {
    let text = |text: &Option<String>| text.clone().unwrap_or_default();
    let spec = pod.spec.iter();
    let containers = spec
        .flat_map(|spec| spec.init_containers.iter().flatten().filter(|spec| is_sidecar(spec)).chain(&spec.containers));
    PodResources {
        name: text(&pod.metadata.name),
        namespace: text(&pod.metadata.namespace),
        containers: containers.map(|spec| of_container(pod, spec, given)).collect(),
    }
}

fn of_container(pod: &Pod, spec: &Container, given: &Given) -> ContainerResources {
    let shares = given.devices.of_container(runtime_uid(pod), &spec.name);
    let each = shares.into_iter().flat_map(|(resource, nodes)| {
        nodes.into_iter().flat_map(move |(node, ids)| {
            let resource = resource.clone();
            ids.into_iter().map(move |id| device(&resource, id, Some(node)))
        })
    });
    let claims = given.claims.in_use(pod, spec).into_iter().map(dynamic);
    ContainerResources { name: spec.name.clone(), devices: each.collect(), dynamic_resources: claims.collect() }
}

fn dynamic(claim: InUse) -> DynamicResource {
    let resource = |(driver_name, device): (String, dra::Device)| ClaimResource {
        cdi_devices: device.cdi_ids.into_iter().flatten().map(|name| CdiDevice { name }).collect(),
        driver_name,
        pool_name: device.pool_name,
        device_name: device.device_name,
        share_id: device.share_id,
    };
    DynamicResource {
        claim_name: claim.claim,
        claim_namespace: claim.namespace,
        claim_resources: claim.devices.into_iter().map(resource).collect(),
    }
}

fn allocatable(devices: &Devices) -> Allocatable {
    let each = devices.usable().into_iter().flat_map(|(resource, id, nodes)| {
        let nodes = if nodes.is_empty() { vec![NO_NODE] } else { nodes };
        nodes.into_iter().map(move |node| device(&resource, id.clone(), Some(node)))
    });
    Allocatable { devices: each.collect() }
}

/// One device at one NUMA node.
fn device(resource: &str, id: String, node: Option<i64>) -> ContainerDevices {
    let node = node.filter(|node| *node != NO_NODE);
    ContainerDevices {
        resource_name: resource.to_owned(),
        device_ids: vec![id],
        topology: node.map(|id| api::Topology { nodes: vec![api::NumaNode { id }] }),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::testing::FakeApi;

    #[tokio::test]
    async fn containers_that_stay_are_listed() {
        let directory = tempfile::tempdir().unwrap();
        let client = FakeApi::default().client();
        let claims = Claims::open(client, directory.path().join("claims"), Arc::default());
        let given = Given { devices: Devices::open(directory.path().to_owned()), claims: Arc::new(claims) };
        let init = json!([{"name": "init"}, {"name": "side", "restartPolicy": "Always"}]);
        let spec = json!({"initContainers": init, "containers": [{"name": "app"}]});
        let pod = json!({"metadata": {"name": "p", "namespace": "n", "uid": "u"}, "spec": spec});
        let pod: Pod = serde_json::from_value(pod).unwrap();
        let found = of_pod(&pod, &given);
        let names: Vec<_> = found.containers.iter().map(|container| container.name.as_str()).collect();
        assert_eq!((found.name.as_str(), found.namespace.as_str(), names), ("p", "n", vec!["side", "app"]));
    }

    #[test]
    fn devices_name_their_node() {
        let near = device("r/x", "a".into(), Some(1));
        assert_eq!(near.topology.unwrap().nodes[0].id, 1);
        assert_eq!(device("r/x", "a".into(), Some(NO_NODE)).topology, None);
    }
}
