//! TCP connections from inside a pod's network namespace.

use std::fs::File;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::Duration;

use k8s_cri::v1::PodSandboxStatusRequest;
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use nix::sched::{CloneFlags, setns};
use serde_json::Value;
use tokio::net::TcpStream;

use crate::state::NodeState;

const CONNECT_LIMIT: Duration = Duration::from_secs(30);

#[derive(Debug, thiserror::Error)]
pub enum NamespaceError {
    #[error("the container runtime does not answer: {0}")]
    Runtime(#[from] Box<tonic::Status>),
    #[error("the container runtime does not say which one it is")]
    Unknown,
    #[error("{path} cannot be opened")]
    Open { path: PathBuf, source: std::io::Error },
    #[error("setns is refused")]
    Enter(#[from] nix::Error),
    #[error("no thread for it")]
    Thread(#[source] std::io::Error),
    #[error("failed to connect to localhost:{port} inside namespace, IPv4: {v4} IPv6: {v6}")]
    Connect { port: u16, v4: std::io::Error, v6: std::io::Error },
    #[error("the connection cannot be used")]
    Adopt(#[source] std::io::Error),
}

/// Where a pod's processes listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Namespace {
    /// A pod on the host's network: no namespace of its own.
    Host,
    Path(PathBuf),
}

/// Asks the runtime for the sandbox's network namespace.
pub async fn of_sandbox(state: &NodeState, sandbox: &str) -> Result<Namespace, NamespaceError> {
    parse(&sandbox_info(state, sandbox).await?).ok_or(NamespaceError::Unknown)
}

/// A process that sees the sandbox's network.
pub async fn process_of_sandbox(state: &NodeState, sandbox: &str) -> Option<u32> {
    let info = sandbox_info(state, sandbox).await.inspect_err(|error| tracing::debug!(%error, "no sandbox")).ok()?;
    let info: Value = serde_json::from_str(&info).ok()?;
    u32::try_from(info.get("pid")?.as_u64()?).ok().filter(|pid| *pid > 0)
}

async fn sandbox_info(state: &NodeState, sandbox: &str) -> Result<String, NamespaceError> {
    let mut client = RuntimeServiceClient::new(state.runtime.channel());
    let request = PodSandboxStatusRequest { pod_sandbox_id: sandbox.to_owned(), verbose: true };
    let mut answer = client.pod_sandbox_status(request).await.map_err(Box::new)?.into_inner();
    answer.info.remove("info").ok_or(NamespaceError::Unknown)
}

/// `info` is the runtime specification of the sandbox, as containerd reports it.
fn parse(info: &str) -> Option<Namespace> {
    let info: Value = serde_json::from_str(info).ok()?;
    let namespaces = info.pointer("/runtimeSpec/linux/namespaces")?.as_array()?;
    let network = namespaces.iter().find(|namespace| namespace["type"] == "network");
    match network.and_then(|namespace| namespace["path"].as_str()) {
        Some(path) if !path.is_empty() => Some(Namespace::Path(path.into())),
        Some(_) => None,
        None => network.is_none().then_some(Namespace::Host),
    }
}

/// Connects to `port` of the pod's loopback addresses.
pub async fn connect(namespace: &Namespace, port: u16) -> Result<TcpStream, NamespaceError> {
    let (done, connected) = tokio::sync::oneshot::channel();
    let file = match namespace {
        Namespace::Host => None,
        Namespace::Path(path) => {
            Some(File::open(path).map_err(|source| NamespaceError::Open { path: path.clone(), source })?)
        }
    };
    // A thread of its own: it changes its namespace and ends; the socket stays in the namespace.
    let thread = std::thread::Builder::new().name("port-forward".to_owned()).stack_size(64 * 1024);
    let spawned = thread.spawn(move || {
        // Nobody waits any more when the session has ended.
        let _ = done.send(dial(file, port));
    });
    spawned.map_err(NamespaceError::Thread)?;
    let stream = connected.await.map_err(|_| NamespaceError::Unknown)??;
    stream.set_nonblocking(true).map_err(NamespaceError::Adopt)?;
    stream.set_nodelay(true).map_err(NamespaceError::Adopt)?;
    TcpStream::from_std(stream).map_err(NamespaceError::Adopt)
}

fn dial(namespace: Option<File>, port: u16) -> Result<std::net::TcpStream, NamespaceError> {
    if let Some(file) = namespace {
        setns(file.as_fd(), CloneFlags::CLONE_NEWNET)?;
    }
    let connect = |address: SocketAddr| std::net::TcpStream::connect_timeout(&address, CONNECT_LIMIT);
    connect((Ipv4Addr::LOCALHOST, port).into()).or_else(|v4| {
        connect((Ipv6Addr::LOCALHOST, port).into()).map_err(|v6| NamespaceError::Connect { port, v4, v6 })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_namespace_is_read_from_the_sandboxs_specification() {
        let with = |namespaces: &str| format!(r#"{{"runtimeSpec": {{"linux": {{"namespaces": {namespaces}}}}}}}"#);
        let cases = [
            (
                with(r#"[{"type": "pid"}, {"type": "network", "path": "/run/netns/x"}]"#),
                Some(Namespace::Path("/run/netns/x".into())),
            ),
            (with(r#"[{"type": "pid"}]"#), Some(Namespace::Host)),
            (with(r#"[{"type": "network"}]"#), None),
            ("{}".to_owned(), None),
            ("no JSON".to_owned(), None),
        ];
        for (info, expected) in cases {
            assert_eq!(parse(&info), expected, "{info}");
        }
    }
}
