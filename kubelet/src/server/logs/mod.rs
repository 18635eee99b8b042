//! `GET /containerLogs/{namespace}/{pod}/{container}`: what `kubectl logs` shows.
//!
//! [`options`] reads the query, [`line`] parses and formats the runtime's log lines (pure), [`reader`] finds where to
//! begin and follows the file. A log is never held in memory: at most one chunk per request is.

pub mod line;
pub mod options;
pub mod reader;

use http::{HeaderValue, Response, StatusCode, header};
use k8s_openapi::api::core::v1::{ContainerStatus, Pod};

use super::body::{self, Body};
use crate::state::NodeState;
use options::LogOptions;

/// Why there is no log to show. The texts are upstream's: users and tests know them.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum LogError {
    #[error("pod {0:?} does not exist")]
    NoPod(String),
    #[error("container {container:?} not found in pod {pod:?}")]
    NoContainer { container: String, pod: String },
    #[error("container {container:?} in pod {pod:?} is not available")]
    NoStatus { container: String, pod: String },
    #[error("previous terminated container {container:?} in pod {pod:?} not found")]
    NoPrevious { container: String, pod: String },
    #[error("container {container:?} in pod {pod:?} is terminated")]
    Terminated { container: String, pod: String },
    #[error("container {container:?} in pod {pod:?} is waiting to start: {why}")]
    Waiting { container: String, pod: String, why: String },
    #[error("container {container:?} in pod {pod:?} is waiting to start - no logs yet")]
    Unstarted { container: String, pod: String },
    #[error("failed to open log file {path:?}: {error}")]
    Open { path: String, error: String },
    #[error("failed to read log file {path:?}: {error}")]
    Read { path: String, error: String },
}

impl LogError {
    fn code(&self) -> StatusCode {
        match self {
            Self::NoPod(_) | Self::NoContainer { .. } => StatusCode::NOT_FOUND,
            _ => StatusCode::BAD_REQUEST,
        }
    }
}

/// Answers a log request; the log itself is streamed by a task that ends with the client's connection.
pub async fn serve(
    state: &std::sync::Arc<NodeState>,
    namespace: &str,
    pod: &str,
    container: &str,
    query: &str,
) -> Response<Body> {
    let options = match LogOptions::parse(query) {
        Ok(options) => options,
        Err(error) => return body::text(error.code(), error.to_string()),
    };
    match open(state, namespace, pod, container, &options).await {
        Ok(reader) => {
            let mut response = Response::new(body::stream(|sender| reader.run(options, sender)));
            response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
            response
        }
        Err(error) => body::text(error.code(), error.to_string()),
    }
}

async fn open(
    state: &std::sync::Arc<NodeState>,
    namespace: &str,
    name: &str,
    container: &str,
    options: &LogOptions,
) -> Result<reader::LogReader, LogError> {
    let view = state.pod(namespace, name).ok_or_else(|| LogError::NoPod(name.to_owned()))?;
    if !declares(&view.pod, container) {
        return Err(LogError::NoContainer { container: container.to_owned(), pod: name.to_owned() });
    }
    let id = container_id(&view.pod, name, container, options.previous)?;
    let path = match view.observed.by_id(&id) {
        Some(observed) => observed.log_path.clone(),
        // The runtime has dropped the container since; the file may still be there.
        None => {
            let attempt = restart_count(&view.pod, container) - i32::from(options.previous);
            state.log_dir(&view).join(container).join(format!("{attempt}.log")).display().to_string()
        }
    };
    reader::LogReader::open(state.clone(), id, path.into(), options).await
}

fn declares(pod: &Pod, container: &str) -> bool {
    let Some(spec) = &pod.spec else { return false };
    let inits = spec.init_containers.iter().flatten();
    let ephemeral = spec.ephemeral_containers.iter().flatten();
    spec.containers.iter().chain(inits).any(|c| c.name == container)
        || ephemeral.into_iter().any(|c| c.name == container)
}

fn status_of<'a>(pod: &'a Pod, container: &str) -> Option<&'a ContainerStatus> {
    let status = pod.status.as_ref()?;
    [&status.container_statuses, &status.init_container_statuses, &status.ephemeral_container_statuses]
        .into_iter()
        .flatten()
        .flatten()
        .find(|s| s.name == container)
}

fn restart_count(pod: &Pod, container: &str) -> i32 {
    status_of(pod, container).map_or(0, |status| status.restart_count)
}

/// The runtime's id of the container whose log is meant, without the `containerd://`.
fn container_id(pod: &Pod, pod_name: &str, container: &str, previous: bool) -> Result<String, LogError> {
    let (container_name, pod_name) = (container.to_owned(), pod_name.to_owned());
    let Some(status) = status_of(pod, container) else {
        return Err(LogError::NoStatus { container: container_name, pod: pod_name });
    };
    let named = |id: &Option<String>| id.clone().filter(|id| !id.is_empty());
    let last = status.last_state.as_ref().and_then(|s| s.terminated.as_ref());
    let last_id = last.and_then(|t| named(&t.container_id));
    let state = status.state.as_ref();
    let id = if previous {
        last_id.ok_or(LogError::NoPrevious { container: container_name, pod: pod_name })?
    } else if state.is_some_and(|s| s.running.is_some()) {
        named(&status.container_id).ok_or(LogError::NoStatus { container: container_name, pod: pod_name })?
    } else if let Some(terminated) = state.and_then(|s| s.terminated.as_ref()) {
        // Without an id the container after the last one never started.
        named(&terminated.container_id)
            .or(last_id)
            .ok_or(LogError::Terminated { container: container_name, pod: pod_name })?
    } else if last.is_some() {
        last_id.ok_or(LogError::Terminated { container: container_name, pod: pod_name })?
    } else if let Some(waiting) = state.and_then(|s| s.waiting.as_ref()) {
        let why = match waiting.reason.as_deref().unwrap_or_default() {
            "ErrImagePull" => "image can't be pulled",
            "ImagePullBackOff" => "trying and failing to pull image",
            reason => reason,
        };
        return Err(LogError::Waiting { container: container_name, pod: pod_name, why: why.to_owned() });
    } else {
        return Err(LogError::Unstarted { container: container_name, pod: pod_name });
    };
    Ok(id.split_once("://").map_or(id.clone(), |(_, bare)| bare.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn pod(status: Value) -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": "p"},
            "spec": {"containers": [{"name": "c"}]},
            "status": {"containerStatuses": [status]},
        }))
        .expect("a pod")
    }

    #[test]
    fn the_container_meant_or_upstreams_reason_why_there_is_none() {
        let base = |state: Value, last: Value| {
            json!({"name": "c", "image": "", "imageID": "", "ready": false, "restartCount": 0,
                "containerID": "containerd://now", "state": state, "lastState": last})
        };
        let ended = |id: &str| json!({"terminated": {"exitCode": 0, "containerID": id}});
        let waiting = |reason: &str| json!({"waiting": {"reason": reason}});
        let cases = [
            (base(json!({"running": {}}), json!({})), false, Ok("now")),
            (
                base(json!({"running": {}}), json!({})),
                true,
                Err(r#"previous terminated container "c" in pod "p" not found"#),
            ),
            (base(json!({"running": {}}), ended("containerd://old")), true, Ok("old")),
            (base(ended("containerd://done"), json!({})), false, Ok("done")),
            (base(ended(""), ended("containerd://old")), false, Ok("old")),
            (base(ended(""), json!({})), false, Err(r#"container "c" in pod "p" is terminated"#)),
            (base(waiting("CrashLoopBackOff"), ended("containerd://old")), false, Ok("old")),
            (
                base(waiting("ContainerCreating"), json!({})),
                false,
                Err(r#"container "c" in pod "p" is waiting to start: ContainerCreating"#),
            ),
            (
                base(waiting("ImagePullBackOff"), json!({})),
                false,
                Err(r#"container "c" in pod "p" is waiting to start: trying and failing to pull image"#),
            ),
            (base(json!({}), json!({})), false, Err(r#"container "c" in pod "p" is waiting to start - no logs yet"#)),
        ];
        for (status, previous, expected) in cases {
            let found = container_id(&pod(status.clone()), "p", "c", previous).map_err(|e| e.to_string());
            assert_eq!(found, expected.map(str::to_owned).map_err(str::to_owned), "{status}");
        }
    }
}
