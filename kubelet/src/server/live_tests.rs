//! Sessions against a real container runtime, through the whole server but TLS. They need containerd with the images
//! `pause` and `busybox` and a CNI network, and say so:
//!
//! ```text
//! KUBELET_TEST_RUNTIME=/run/containerd/containerd.sock cargo test -p kubelet live -- --ignored
//! ```

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use apimachinery::spdy::headers::Headers;
use apimachinery::spdy::{Connection, Role, Stream};
use apimachinery::testing::eventually;
use bytes::Bytes;
use futures::{SinkExt, StreamExt};
use http::Request;
use http_body_util::BodyExt;
use hyper_util::rt::TokioIo;
use k8s_cri::v1 as cri;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;

use super::{Server, auth::Auth, serve_http};
use crate::config::KubeletConfiguration;
use crate::cri::Runtime;
use crate::pod::observed::keys;
use crate::state::{NodeState, PodView};
use crate::streaming::passthrough;
use crate::volumes::csi::Csi;

const LIMIT: Duration = Duration::from_secs(20);

/// A server with one pod `ns/p`, whose container `c` runs a script. The pod ends with the value.
struct Live {
    state: Arc<NodeState>,
    address: std::net::SocketAddr,
    sandbox: String,
    uid: String,
}

impl Live {
    async fn start(script: &str) -> Self {
        apimachinery::process::install_crypto_provider();
        let socket = std::env::var("KUBELET_TEST_RUNTIME").expect("KUBELET_TEST_RUNTIME names the runtime's socket");
        let runtime = Runtime::new(socket.as_ref());
        let mut config = KubeletConfiguration::default();
        config.authentication.anonymous.enabled = true;
        config.authorization.mode = "AlwaysAllow".into();
        let client =
            kube::Client::try_from(kube::Config::new("http://127.0.0.1:1".parse().expect("a URL"))).expect("a client");
        let objects = crate::objects::Objects::new(client.clone());
        let csi = Arc::new(Csi::new("/var/lib/kubelet".into(), "n", objects, Arc::default()));
        let state = Arc::new(NodeState::new("n".into(), Arc::new(config), client, runtime, "/var/lib/kubelet".into()));
        let uid = uuid::Uuid::new_v4().to_string();
        let sandbox = run_pod(&state.runtime, &uid, script).await;
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let server =
            Arc::new(Server { auth: Auth::new(&state), state: state.clone(), csi, history: Default::default() });
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve_http(stream, server.clone(), None));
            }
        });
        let live = Self { state, address, sandbox, uid };
        live.publish().await;
        live
    }

    /// What the pod's actor does whenever the runtime reports a change.
    async fn publish(&self) -> bool {
        let observed = self.state.runtime.observe(&self.uid).await.expect("observed");
        let container = observed.newest("c").expect("the container").clone();
        let id = format!("containerd://{}", container.id);
        let state = if container.is_running() {
            json!({"running": {}})
        } else {
            json!({"terminated": {"exitCode": 0, "containerID": id}})
        };
        let status = json!({"name": "c", "containerID": id, "image": "", "imageID": "", "ready": true, "restartCount": 0, "state": state});
        let pod = serde_json::from_value(json!({
            "metadata": {"name": "p", "namespace": "ns", "uid": self.uid},
            "spec": {"containers": [{"name": "c"}]},
            "status": {"containerStatuses": [status]},
        }));
        self.state.publish(&self.uid, PodView { pod: Arc::new(pod.expect("a pod")), observed: Arc::new(observed) });
        container.is_running()
    }

    async fn get(&self, path: &str) -> String {
        let stream = TcpStream::connect(self.address).await.expect("connected");
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.expect("HTTP");
        tokio::spawn(connection);
        let request =
            Request::get(path).header("host", "n").body(http_body_util::Empty::<Bytes>::new()).expect("a request");
        let response = sender.send_request(request).await.expect("an answer");
        let body = tokio::time::timeout(LIMIT, response.into_body().collect()).await.expect("in time").expect("a body");
        String::from_utf8(body.to_bytes().to_vec()).expect("text")
    }

    async fn websocket(&self, path: &str, protocol: &str) -> WebSocketStream<TcpStream> {
        let mut request = format!("ws://{}{path}", self.address).into_client_request().expect("a request");
        request.headers_mut().insert("sec-websocket-protocol", protocol.parse().expect("a header"));
        let stream = TcpStream::connect(self.address).await.expect("connected");
        tokio_tungstenite::client_async(request, stream).await.expect("a WebSocket").0
    }

    async fn spdy(&self, path: &str, protocol: &str) -> (Connection, apimachinery::spdy::Incoming) {
        let like = Request::post("/")
            .header("upgrade", "SPDY/3.1")
            .header("x-stream-protocol-version", protocol)
            .body(())
            .expect("a request");
        let answer = passthrough::request(&format!("http://{}{path}", self.address), &like).await.expect("an answer");
        assert_eq!(answer.status(), 101);
        Connection::start(TokioIo::new(hyper::upgrade::on(answer).await.expect("upgraded")), Role::Client)
    }

    async fn stop(self) {
        self.state.runtime.stop_sandbox(&self.sandbox).await.expect("stopped");
        self.state.runtime.remove_sandbox(&self.sandbox).await.expect("removed");
    }
}

async fn run_pod(runtime: &Runtime, uid: &str, script: &str) -> String {
    let mut labels = HashMap::from([(keys::POD_UID.to_owned(), uid.to_owned())]);
    let sandbox_config = cri::PodSandboxConfig {
        metadata: Some(cri::PodSandboxMetadata {
            name: "p".into(),
            uid: uid.into(),
            namespace: "ns".into(),
            attempt: 0,
        }),
        log_directory: format!("/var/log/pods/ns_p_{uid}"),
        labels: labels.clone(),
        linux: Some(cri::LinuxPodSandboxConfig { cgroup_parent: "/kubelet-live-tests".into(), ..Default::default() }),
        ..Default::default()
    };
    let sandbox = runtime.run_sandbox(sandbox_config.clone(), "").await.expect("a sandbox");
    labels.insert(keys::CONTAINER_NAME.to_owned(), "c".to_owned());
    let config = crate::cri::ContainerConfig {
        metadata: Some(cri::ContainerMetadata { name: "c".into(), attempt: 0 }),
        image: Some(cri::ImageSpec { image: "docker.io/library/busybox:latest".into(), ..Default::default() }),
        command: vec!["sh".into(), "-c".into(), script.into()],
        labels,
        log_path: "c/0.log".into(),
        linux: Some(cri::LinuxContainerConfig::default()),
        ..Default::default()
    };
    let container = runtime.create_container(&sandbox, config, sandbox_config).await.expect("a container");
    runtime.start_container(&container).await.expect("started");
    sandbox
}

/// Everything that a session says, by channel, until it closes.
async fn listen(socket: &mut WebSocketStream<TcpStream>) -> HashMap<u8, String> {
    let mut said: HashMap<u8, String> = HashMap::new();
    let all = async {
        while let Some(Ok(message)) = socket.next().await {
            if let Message::Binary(data) = message {
                said.entry(data[0]).or_default().push_str(&String::from_utf8_lossy(&data[1..]));
            }
        }
    };
    tokio::time::timeout(LIMIT, all).await.expect("the session ends");
    said
}

async fn read_all(stream: &mut Stream) -> String {
    let mut all = Vec::new();
    let read = async {
        // The runtime ends a session by resetting its streams.
        while let Ok(Some(data)) = stream.reader.read().await {
            all.extend_from_slice(&data);
        }
    };
    tokio::time::timeout(LIMIT, read).await.expect("the stream ends");
    String::from_utf8(all).expect("text")
}

fn headers(pairs: &[(&str, &str)]) -> Headers {
    pairs.iter().copied().collect()
}

fn command(words: &[&str]) -> String {
    let mut query = form_urlencoded::Serializer::new(String::new());
    query.extend_pairs(words.iter().map(|word| ("command", word)));
    query.finish()
}

#[tokio::test]
#[ignore = "needs a container runtime (KUBELET_TEST_RUNTIME)"]
async fn live_logs_follow_to_the_containers_end() {
    let live = Live::start("echo one; echo two >&2; sleep 1; printf three; sleep 1; echo ' four'").await;
    let following = live.get("/containerLogs/ns/p/c?follow=true");
    let (followed, ()) = tokio::join!(following, async {
        eventually("the container has ended", LIMIT, || async {
            if live.publish().await { Err("running") } else { Ok(()) }
        })
        .await;
    });
    assert_eq!(followed, "one\ntwo\nthree four\n");
    assert_eq!(live.get("/containerLogs/ns/p/c?tailLines=1").await, "three four\n");
    assert_eq!(live.get("/containerLogs/ns/p/c?stream=Stderr").await, "two\n");
    assert_eq!(live.get("/containerLogs/ns/p/x").await, r#"container "x" not found in pod "p""#);
    live.stop().await;
}

#[tokio::test]
#[ignore = "needs a container runtime (KUBELET_TEST_RUNTIME)"]
async fn live_exec_over_websocket_closes_stdin_and_reports_the_exit_code() {
    let live = Live::start("sleep 1000").await;
    let query = command(&["sh", "-c", "cat; echo end; echo err >&2; exit 3"]);
    let mut socket =
        live.websocket(&format!("/exec/ns/p/c?input=1&output=1&error=1&{query}"), "v5.channel.k8s.io").await;
    let big = "x".repeat(300_000);
    for piece in big.as_bytes().chunks(32_000) {
        let message = [&[0u8], piece].concat();
        socket.send(Message::Binary(message.into())).await.expect("sent");
    }
    socket.send(Message::Binary(Bytes::from_static(&[255, 0]))).await.expect("sent");
    let said = listen(&mut socket).await;
    assert_eq!(said[&1], format!("{big}end\n"));
    assert_eq!(said[&2], "err\n");
    let status: Value = serde_json::from_str(&said[&3]).expect("a status");
    assert_eq!(
        (&status["reason"], &status["details"]["causes"][0]["message"]),
        (&json!("NonZeroExitCode"), &json!("3"))
    );

    let query = command(&["sh", "-c", "read x; sleep 1; stty size"]);
    let mut socket = live.websocket(&format!("/exec/ns/p/c?input=1&output=1&tty=1&{query}"), "v5.channel.k8s.io").await;
    socket.send(Message::Binary(Bytes::from_static(b"\x04{\"Width\":101,\"Height\":33}"))).await.expect("sent");
    socket.send(Message::Binary(Bytes::from_static(b"\0go\n"))).await.expect("sent");
    let said = listen(&mut socket).await;
    assert!(said[&1].contains("33 101"), "{said:?}");
    assert!(said[&3].contains("Success"), "{said:?}");

    let query = command(&["echo", "old"]);
    let mut socket = live.websocket(&format!("/exec/ns/p/c?output=1&{query}"), "v4.channel.k8s.io").await;
    assert_eq!(listen(&mut socket).await[&1], "old\n", "passed through");
    live.stop().await;
}

#[tokio::test]
#[ignore = "needs a container runtime (KUBELET_TEST_RUNTIME)"]
async fn live_exec_over_spdy_is_passed_through() {
    let live = Live::start("sleep 1000").await;
    let path = format!("/exec/ns/p/c?input=1&output=1&{}", command(&["cat"]));
    let (connection, _incoming) = live.spdy(&path, "v4.channel.k8s.io").await;
    let mut error = connection.open(headers(&[("streamType", "error")])).await.expect("error");
    let mut stdin = connection.open(headers(&[("streamType", "stdin")])).await.expect("stdin");
    let mut stdout = connection.open(headers(&[("streamType", "stdout")])).await.expect("stdout");
    stdin.writer.write(Bytes::from_static(b"hello")).await.expect("written");
    stdin.writer.finish().await.expect("closed");
    assert_eq!(read_all(&mut stdout).await, "hello");
    assert!(read_all(&mut error).await.contains("Success"));
    live.stop().await;
}

#[tokio::test]
#[ignore = "needs a container runtime (KUBELET_TEST_RUNTIME)"]
async fn live_port_forward_closes_both_halves_apart() {
    let live = Live::start("while true; do nc -l -p 8080 -e sh -c 'cat; sleep 2; echo end'; done").await;
    let (direct, _incoming) = live.spdy("/portForward/ns/p", "portforward.k8s.io").await;
    let socket = live.websocket("/portForward/ns/p", "SPDY/3.1+portforward.k8s.io").await;
    let (tunnelled, _tunnel_incoming) = Connection::start(tunnel(socket), Role::Client);
    for connection in [&direct, &tunnelled] {
        eventually("the pod answers", LIMIT, async || {
            let id = uuid::Uuid::new_v4().to_string();
            let mut error = forwarded(connection, "error", "8080", &id).await;
            error.writer.finish().await.expect("closed");
            let mut data = forwarded(connection, "data", "8080", &id).await;
            data.writer.write(Bytes::from_static(b"hello ")).await.expect("written");
            data.writer.finish().await.expect("closed");
            let mut all = String::new();
            while let Ok(Some(data)) = data.reader.read().await {
                all.push_str(&String::from_utf8_lossy(&data));
            }
            let failure = read_all(&mut error).await;
            if all == "hello end\n" && failure.is_empty() { Ok(()) } else { Err((all, failure)) }
        })
        .await;
        let mut error = forwarded(connection, "error", "1", "9").await;
        let _data = forwarded(connection, "data", "1", "9").await;
        let failure = read_all(&mut error).await;
        assert!(
            failure.starts_with("error forwarding port 1 to pod p_ns, uid ") && failure.contains("refused"),
            "{failure}"
        );
    }
    live.stop().await;
}

async fn forwarded(connection: &Connection, kind: &str, port: &str, id: &str) -> Stream {
    let headers = headers(&[("streamType", kind), ("port", port), ("requestID", id)]);
    connection.open(headers).await.expect("accepted")
}

/// The client's end of a tunnel, as kubectl has it.
fn tunnel(socket: WebSocketStream<TcpStream>) -> tokio::io::DuplexStream {
    let (ours, theirs) = tokio::io::duplex(4096);
    let (mut read, mut write) = tokio::io::split(theirs);
    let (mut sink, mut source) = socket.split();
    tokio::spawn(async move {
        let mut buffer = bytes::BytesMut::with_capacity(4096);
        while tokio::io::AsyncReadExt::read_buf(&mut read, &mut buffer).await.is_ok_and(|n| n > 0) {
            sink.send(Message::Binary(buffer.split().freeze())).await.expect("sent");
            buffer.reserve(4096);
        }
    });
    tokio::spawn(async move {
        while let Some(Ok(Message::Binary(data))) = source.next().await {
            tokio::io::AsyncWriteExt::write_all(&mut write, &data).await.expect("written");
        }
    });
    ours
}
