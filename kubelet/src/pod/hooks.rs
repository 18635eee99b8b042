//! Lifecycle hooks: a command in the container, an HTTP request to it, or a pause.

use std::time::Duration;

use k8s_openapi::api::core::v1::{Container as Spec, LifecycleHandler};

use super::context::NodeContext;
use crate::probes::{self, ProbeError};

#[derive(Debug, thiserror::Error)]
pub enum HookError {
    #[error(transparent)]
    Runtime(#[from] crate::cri::RuntimeError),
    #[error("command {command:?} exited with {code}: {output}")]
    Exit { command: String, code: i32, output: String },
    #[error(transparent)]
    Request(#[from] ProbeError),
    #[error("HTTP hook answered {0}")]
    Status(http::StatusCode),
}

/// Runs one hook to its end.
pub async fn run(
    node: &NodeContext,
    spec: &Spec,
    container_id: &str,
    pod_ip: Option<&str>,
    hook: &LifecycleHandler,
) -> Result<(), HookError> {
    if let Some(exec) = &hook.exec {
        let command = exec.command.clone().unwrap_or_default();
        let answer = node.state.runtime.exec_sync(container_id, &command, None).await?;
        if answer.exit_code != 0 {
            let output = String::from_utf8_lossy(&[answer.stdout, answer.stderr].concat()).into_owned();
            return Err(HookError::Exit { command: command.join(" "), code: answer.exit_code, output });
        }
    } else if let Some(request) = &hook.http_get {
        let answer = probes::http_get(request, spec, pod_ip.unwrap_or("127.0.0.1"), "kube-lifecycle").await?;
        if !answer.status.is_success() && !answer.status.is_redirection() {
            return Err(HookError::Status(answer.status));
        }
    } else if let Some(sleep) = &hook.sleep {
        tokio::time::sleep(Duration::from_secs(u64::try_from(sleep.seconds).unwrap_or(0))).await;
    }
    Ok(())
}
