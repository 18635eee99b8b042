//! Exec, attach and port-forward sessions, for clients that speak SPDY/3.1 or WebSocket.
//!
//! Where client and container runtime speak the same protocol their bytes are passed through; WebSocket clients with
//! stdin half-close (`v5.channel.k8s.io`) are translated to SPDY, which the runtime understands. Port-forward ends
//! here: the kubelet connects from inside the pod's network namespace itself, so that both directions close apart.

pub(crate) mod netns;
pub(crate) mod passthrough;
mod port_forward;
mod remote_command;
mod websocket;

use std::sync::Arc;
use std::time::Duration;

use http::{Request, Response, StatusCode, header};
use hyper::body::Incoming;
use k8s_cri::v1 as cri;

use crate::cri::RuntimeError;
use crate::server::body::{self, Body};
use crate::server::query_pairs;
use crate::state::{NodeState, PodView};

pub use remote_command::Streams;

/// The WebSocket protocol of exec and attach in which a client can close stdin alone.
const V5: &str = "v5.channel.k8s.io";

/// Whom a session is for; the uid is given by callers that want to be sure.
#[derive(Clone, Copy, Debug)]
pub struct Target<'a> {
    pub namespace: &'a str,
    pub pod: &'a str,
    pub uid: Option<&'a str>,
    pub container: &'a str,
}

/// Why a session does not begin. After it has begun, errors travel on its error stream.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    #[error("pod does not exist")]
    NoPod,
    #[error("container not found ({0:?})")]
    NoContainer(String),
    #[error("you must specify at least 1 of stdin, stdout, stderr")]
    NoStreams,
    #[error("cannot parse value of timeout parameter")]
    Timeout,
    #[error("unable to upgrade: the request asks neither for SPDY/3.1 nor for a WebSocket")]
    NoUpgrade,
    #[error("unable to upgrade: no protocol in common; the client offered {0:?}")]
    NoProtocol(String),
    #[error("{0}")]
    Runtime(#[from] RuntimeError),
    #[error("the container runtime's streaming server cannot be reached at {address}")]
    Connect { address: String, source: std::io::Error },
    #[error("the container runtime's streaming address {0:?} cannot be used")]
    Address(String),
    #[error("the container runtime's streaming server does not answer")]
    Exchange(#[from] hyper::Error),
    #[error("the container runtime's streaming server refused the session: {0}")]
    Refused(StatusCode),
    #[error("cannot enter the pod's network namespace")]
    Namespace(#[from] netns::NamespaceError),
}

impl StreamError {
    fn code(&self) -> StatusCode {
        match self {
            Self::NoPod => StatusCode::NOT_FOUND,
            Self::NoStreams | Self::Timeout | Self::NoUpgrade => StatusCode::BAD_REQUEST,
            Self::NoProtocol(_) => StatusCode::FORBIDDEN,
            Self::Runtime(error) if error.is_not_found() => StatusCode::NOT_FOUND,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    fn response(&self) -> Response<Body> {
        body::text(self.code(), apimachinery::process::error_chain(self))
    }
}

/// How the client asks to leave HTTP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Upgrade {
    Spdy,
    WebSocket,
}

fn upgrade_of<B>(request: &Request<B>) -> Result<Upgrade, StreamError> {
    let upgrade = request.headers().get(header::UPGRADE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    if upgrade.eq_ignore_ascii_case("SPDY/3.1") {
        Ok(Upgrade::Spdy)
    } else if upgrade.eq_ignore_ascii_case("websocket") {
        Ok(Upgrade::WebSocket)
    } else {
        Err(StreamError::NoUpgrade)
    }
}

/// The values of a header that lists protocols, over all its lines.
fn offered<B>(request: &Request<B>, name: &str) -> Vec<String> {
    let lines = request.headers().get_all(name).iter().filter_map(|line| line.to_str().ok());
    lines.flat_map(|line| line.split(',')).map(|value| value.trim().to_owned()).filter(|v| !v.is_empty()).collect()
}

fn find(state: &NodeState, target: Target<'_>) -> Result<PodView, StreamError> {
    let view = state.pod(target.namespace, target.pod).ok_or(StreamError::NoPod)?;
    match target.uid {
        Some(uid) if uid != view.uid() && view.pod.metadata.uid.as_deref() != Some(uid) => Err(StreamError::NoPod),
        _ => Ok(view),
    }
}

/// The id of the running container that is meant.
fn container_id(view: &PodView, container: &str) -> Result<String, StreamError> {
    let running = view.container(container, false).filter(|container| container.is_running());
    running.map(|container| container.id.clone()).ok_or_else(|| StreamError::NoContainer(container.to_owned()))
}

pub async fn exec(state: &Arc<NodeState>, request: Request<Incoming>, target: Target<'_>) -> Response<Body> {
    let session = async {
        let query = request.uri().query().unwrap_or_default();
        let streams = Streams::parse(query)?;
        let container_id = container_id(&find(state, target)?, target.container)?;
        let cmd = query_pairs(query).filter(|(name, _)| name == "command").map(|(_, value)| value).collect();
        let Streams { stdin, stdout, stderr, tty } = streams;
        let url = state.runtime.exec(cri::ExecRequest { container_id, cmd, tty, stdin, stdout, stderr }).await?;
        remote_command::serve(request, &url, streams).await
    };
    session.await.unwrap_or_else(|error| error.response())
}

pub async fn attach(state: &Arc<NodeState>, request: Request<Incoming>, target: Target<'_>) -> Response<Body> {
    let session = async {
        let streams = Streams::parse(request.uri().query().unwrap_or_default())?;
        let view = find(state, target)?;
        let container_id = container_id(&view, target.container)?;
        // The terminal is the container's property, whatever the client believes.
        let streams = streams.with_tty(has_tty(&view, target.container));
        let Streams { stdin, stdout, stderr, tty } = streams;
        let url = state.runtime.attach(cri::AttachRequest { container_id, stdin, tty, stdout, stderr }).await?;
        remote_command::serve(request, &url, streams).await
    };
    session.await.unwrap_or_else(|error| error.response())
}

fn has_tty(view: &PodView, container: &str) -> bool {
    let Some(spec) = &view.pod.spec else { return false };
    let inits = spec.init_containers.iter().flatten();
    let mut declared = spec.containers.iter().chain(inits).map(|c| (&c.name, c.tty));
    let mut ephemeral = spec.ephemeral_containers.iter().flatten().map(|c| (&c.name, c.tty));
    let found =
        declared.find(|(name, _)| *name == container).or_else(|| ephemeral.find(|(name, _)| *name == container));
    found.and_then(|(_, tty)| tty).unwrap_or(false)
}

pub async fn port_forward(state: &Arc<NodeState>, request: Request<Incoming>, target: Target<'_>) -> Response<Body> {
    let session = async {
        let view = find(state, target)?;
        let sandbox = view.observed.sandbox().filter(|sandbox| sandbox.ready).ok_or(StreamError::NoPod)?.id.clone();
        port_forward::serve(state, request, &view, &sandbox).await
    };
    session.await.unwrap_or_else(|error| error.response())
}

/// Runs a command to its end and answers with what it printed.
pub async fn run(state: &Arc<NodeState>, query: &str, target: Target<'_>) -> Response<Body> {
    let session = async {
        let container_id = container_id(&find(state, target)?, target.container)?;
        let (mut command, mut limit) = (Vec::new(), None);
        for (name, value) in query_pairs(query) {
            match name.as_str() {
                "cmd" => command = value.split(' ').map(str::to_owned).collect(),
                "timeout" => {
                    let seconds = value.parse().map_err(|_| StreamError::Timeout)?;
                    limit = Some(Duration::from_secs(seconds)).filter(|limit| !limit.is_zero());
                }
                _ => {}
            }
        }
        let answer = state.runtime.exec_sync(&container_id, &command, limit).await?;
        let code = if answer.exit_code == 0 { StatusCode::OK } else { StatusCode::INTERNAL_SERVER_ERROR };
        let output = [answer.stdout, answer.stderr].concat();
        Ok::<_, StreamError>(body::typed(code, "text/plain; charset=utf-8", output))
    };
    session.await.unwrap_or_else(|error| error.response())
}
