//! Port-forward: the client opens a pair of SPDY streams per connection, `error` and `data`, joined by a request id;
//! we connect to the port inside the pod and copy. The SPDY bytes come on the upgraded connection itself or inside
//! WebSocket messages (what kubectl prefers). The oldest form, numbered WebSocket channels, is passed through.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use apimachinery::process::error_chain;
use apimachinery::spdy::{
    Connection, Incoming as SpdyIncoming, Role, STREAM_TYPE, SpdyError, Stream, StreamReader, StreamWriter,
};
use bytes::{Bytes, BytesMut};
use http::header::{CONNECTION, UPGRADE};
use http::{HeaderValue, Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use k8s_cri::v1::PortForwardRequest;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::Instant;

use super::netns::{self, Namespace};
use super::{StreamError, Upgrade, offered, passthrough, upgrade_of, websocket};
use crate::server::body::{self, Body};
use crate::server::query_pairs;
use crate::state::{NodeState, PodView};

const PROTOCOL: &str = "portforward.k8s.io";
const TUNNEL: &str = "SPDY/3.1+portforward.k8s.io";
/// How long the second stream of a pair may come after the first.
const PAIR_LIMIT: Duration = Duration::from_secs(30);

pub async fn serve(
    state: &Arc<NodeState>,
    mut request: Request<Incoming>,
    view: &PodView,
    sandbox: &str,
) -> Result<Response<Body>, StreamError> {
    let upgrade = upgrade_of(&request)?;
    if upgrade == Upgrade::WebSocket && !offered(&request, "sec-websocket-protocol").iter().any(|p| p == TUNNEL) {
        return channels(state, request, sandbox).await;
    }
    let pod = Pod {
        name: format!("{}_{}", view.name(), view.namespace()),
        uid: view.uid().to_owned(),
        namespace: netns::of_sandbox(state, sandbox).await?,
    };
    let (response, upgraded) = match upgrade {
        Upgrade::WebSocket => websocket::accept(&mut request, TUNNEL)?,
        Upgrade::Spdy => (spdy_answer(&request)?, hyper::upgrade::on(&mut request)),
    };
    tokio::spawn(async move {
        let (_connection, incoming) = match upgraded.await {
            Ok(io) if upgrade == Upgrade::WebSocket => Connection::start(websocket::tunnel(io).await, Role::Server),
            Ok(io) => Connection::start(TokioIo::new(io), Role::Server),
            Err(error) => return tracing::debug!(%error, "session was not upgraded"),
        };
        forward_all(incoming, Arc::new(pod)).await;
    });
    Ok(response)
}

/// WebSocket channels: ports are in the query, and the runtime knows the protocol.
async fn channels(state: &NodeState, request: Request<Incoming>, sandbox: &str) -> Result<Response<Body>, StreamError> {
    let ports = query_pairs(request.uri().query().unwrap_or_default())
        .filter(|(name, _)| matches!(name.as_str(), "port" | "ports"));
    let port = ports.flat_map(|(_, value)| value.split(',').map(str::to_owned).collect::<Vec<_>>());
    let port = port.filter_map(|value| value.parse().ok()).collect();
    let url = state.runtime.port_forward(PortForwardRequest { pod_sandbox_id: sandbox.to_owned(), port }).await?;
    passthrough::serve(request, &url).await
}

fn spdy_answer(request: &Request<Incoming>) -> Result<Response<Body>, StreamError> {
    let versions = offered(request, "x-stream-protocol-version");
    if !versions.iter().any(|version| version == PROTOCOL) {
        return Err(StreamError::NoProtocol(versions.join(", ")));
    }
    let mut response = Response::new(body::full(Bytes::new()));
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    response.headers_mut().insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    response.headers_mut().insert(UPGRADE, HeaderValue::from_static("SPDY/3.1"));
    response.headers_mut().insert("x-stream-protocol-version", HeaderValue::from_static(PROTOCOL));
    Ok(response)
}

struct Pod {
    /// As upstream writes it in messages: `name_namespace`.
    name: String,
    uid: String,
    namespace: Namespace,
}

/// The first stream of a pair, waiting for the second.
struct Half {
    stream: Stream,
    since: Instant,
}

async fn forward_all(mut incoming: SpdyIncoming, pod: Arc<Pod>) {
    let mut halves: HashMap<String, Half> = HashMap::new();
    loop {
        let expiry = halves.values().map(|half| half.since + PAIR_LIMIT).min();
        let stream = tokio::select! {
            stream = incoming.next() => stream,
            () = expire(expiry) => {
                halves.retain(|_, half| half.since.elapsed() < PAIR_LIMIT);
                continue;
            }
        };
        let Some(stream) = stream else { return };
        let Some(id) = request_id(&stream) else { continue };
        if stream.accept().await.is_err() {
            return;
        }
        let Some(half) = halves.remove(&id) else {
            halves.insert(id, Half { stream, since: Instant::now() });
            continue;
        };
        let is_data = |stream: &Stream| stream.headers().get(STREAM_TYPE) == Some("data");
        let (data, error) = match (is_data(&half.stream), is_data(&stream)) {
            (true, false) => (half.stream, stream),
            (false, true) => (stream, half.stream),
            // Twice the same: neither can be served, and dropping resets both.
            _ => continue,
        };
        tokio::spawn(forward(data, error, pod.clone()));
    }
}

async fn expire(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// What joins the two streams; very old clients leave it out and use one pair per connection.
fn request_id(stream: &Stream) -> Option<String> {
    let known = matches!(stream.headers().get(STREAM_TYPE), Some("data" | "error"));
    known.then(|| stream.headers().get("requestid").unwrap_or_default().to_owned())
}

async fn forward(data: Stream, error: Stream, pod: Arc<Pod>) {
    let port = data.headers().get("port").unwrap_or_default().to_owned();
    let Stream { mut writer, .. } = error;
    let result = match port.parse::<u16>() {
        Ok(number) if number > 0 => connect_and_copy(data, &pod.namespace, number).await,
        _ => Err(ForwardError::Port(port.clone())),
    };
    let reported = async {
        if let Err(error) = &result {
            let Pod { name, uid, .. } = &*pod;
            let why = error_chain(error);
            let message = format!("error forwarding port {port} to pod {name}, uid {uid}: {why}");
            writer.write(Bytes::from(message)).await?;
        }
        writer.finish().await
    };
    if let Err(error) = reported.await {
        tracing::debug!(%error, "client left before its connection ended");
    }
}

#[derive(Debug, thiserror::Error)]
enum ForwardError {
    #[error("{0:?} is not a port")]
    Port(String),
    #[error("no connection to the pod")]
    Connect(#[from] netns::NamespaceError),
    #[error("the pod's connection failed")]
    Pod(#[from] std::io::Error),
    #[error("the client's stream failed")]
    Client(#[from] SpdyError),
}

async fn connect_and_copy(data: Stream, namespace: &Namespace, port: u16) -> Result<(), ForwardError> {
    let (from_pod, to_pod) = netns::connect(namespace, port).await?.into_split();
    let Stream { reader, writer, .. } = data;
    tokio::try_join!(inward(reader, to_pod), outward(from_pod, writer)).map(drop)
}

async fn inward(mut from: StreamReader, mut to: OwnedWriteHalf) -> Result<(), ForwardError> {
    while let Some(data) = from.read().await? {
        to.write_all(&data).await?;
    }
    Ok(to.shutdown().await?)
}

async fn outward(mut from: OwnedReadHalf, mut to: StreamWriter) -> Result<(), ForwardError> {
    let mut buffer = BytesMut::new();
    loop {
        buffer.reserve(16 * 1024);
        if from.read_buf(&mut buffer).await? == 0 {
            break;
        }
        to.write(buffer.split().freeze()).await?;
    }
    Ok(to.finish().await?)
}
