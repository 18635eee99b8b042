//! What the node shows of itself: health, its pods, its configuration.

use std::sync::Arc;

use http::{Response, StatusCode};
use serde_json::json;

use super::body::{self, Body};
use crate::state::NodeState;

pub(super) async fn answer(state: &Arc<NodeState>, segments: &[&str], _query: &str) -> Response<Body> {
    match segments {
        ["healthz"] | ["healthz", "ping" | "syncloop"] => body::text(StatusCode::OK, "ok"),
        ["pods"] => body::json(&pod_list(state.pods().iter().map(|view| &*view.pod))),
        ["configz"] => body::json(&json!({"kubeletconfig": &*state.config})),
        _ => body::text(StatusCode::NOT_FOUND, "404 page not found\n"),
    }
}

fn pod_list<'a>(pods: impl Iterator<Item = &'a k8s_openapi::api::core::v1::Pod>) -> serde_json::Value {
    json!({"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": pods.collect::<Vec<_>>()})
}
