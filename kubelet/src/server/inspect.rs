//! What the node shows of itself: health, its pods, its configuration, statistics and metrics.

use http::{Response, StatusCode};
use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};

use super::body::{self, Body};
use super::{Server, query_pairs, stats, system_logs};
use crate::cri::RuntimeError;
use crate::pod::observed::keys;
use crate::state::NodeState;

/// The content type of Prometheus' text format.
const METRICS: &str = "text/plain; version=0.0.4; charset=utf-8";

pub(super) async fn answer(server: &Server, segments: &[&str], query: &str) -> Response<Body> {
    let state = &server.state;
    match segments {
        ["healthz"] | ["healthz", "ping" | "syncloop" | "log"] => body::text(StatusCode::OK, "ok"),
        ["pods"] => body::json(&pod_list(state.pods().iter().map(|view| &*view.pod))),
        ["runningpods", ""] | ["runningpods"] => match running_pods(state).await {
            Ok(pods) => body::json(&pods),
            Err(error) => body::text(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
        },
        ["configz"] => body::json(&json!({"kubeletconfig": &*state.config})),
        ["metrics"] => body::typed(StatusCode::OK, METRICS, stats::metrics::own(state)),
        ["metrics", "resource"] => measured(server, |snapshot| metrics(stats::metrics::resource(snapshot))).await,
        ["metrics", "cadvisor"] => measured(server, |snapshot| metrics(stats::metrics::cadvisor(snapshot))).await,
        ["stats", "summary"] => {
            let brief = query_pairs(query).any(|(name, value)| name == "only_cpu_and_memory" && value == "true");
            measured(server, |snapshot| body::json(&stats::summary::summary(snapshot, brief))).await
        }
        ["logs", rest @ ..] => system_logs::serve(rest).await,
        _ => body::text(StatusCode::NOT_FOUND, "404 page not found\n"),
    }
}

fn metrics(text: String) -> Response<Body> {
    body::typed(StatusCode::OK, METRICS, text)
}

async fn measured(server: &Server, view: impl Fn(&stats::Snapshot) -> Response<Body>) -> Response<Body> {
    match stats::snapshot(&server.state, Some(&server.csi), &server.history).await {
        Ok(snapshot) => view(&snapshot),
        Err(error) => body::text(StatusCode::INTERNAL_SERVER_ERROR, format!("failed to list pod stats: {error}")),
    }
}

fn pod_list<'a>(pods: impl Iterator<Item = &'a Pod>) -> Value {
    json!({"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": pods.collect::<Vec<_>>()})
}

/// What runs according to the runtime, whether or not it should.
async fn running_pods(state: &NodeState) -> Result<Value, RuntimeError> {
    let (sandboxes, containers) =
        tokio::try_join!(state.runtime.list_sandboxes(&[]), state.runtime.list_containers(&[]))?;
    let ready = k8s_cri::v1::PodSandboxState::SandboxReady as i32;
    let running = k8s_cri::v1::ContainerState::ContainerRunning as i32;
    let items: Vec<Value> = sandboxes
        .iter()
        .filter(|sandbox| sandbox.state == ready)
        .filter_map(|sandbox| {
            let metadata = sandbox.metadata.as_ref()?;
            let inside = containers.iter().filter(|c| c.pod_sandbox_id == sandbox.id && c.state == running);
            let containers: Vec<Value> = inside
                .map(|c| json!({"name": c.labels.get(keys::CONTAINER_NAME), "image": c.image_ref, "resources": {}}))
                .collect();
            Some(json!({
                "metadata": {"name": metadata.name, "namespace": metadata.namespace, "uid": metadata.uid},
                "spec": {"containers": containers}, "status": {},
            }))
        })
        .collect();
    Ok(json!({"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": items}))
}
