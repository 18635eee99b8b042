//! As much of an API server as an informer needs: lists, and watches that go on from the list. Objects of one kind
//! are replaced by name; the log of events is never cut, so its length is the resource version.

use std::sync::Arc;

use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

#[derive(Clone)]
pub struct FakeApi {
    /// Kind (as in the path) and event.
    events: Arc<Mutex<Vec<(String, Value)>>>,
    length: Arc<watch::Sender<usize>>,
}

impl FakeApi {
    pub fn new() -> Self {
        let api = Self { events: Arc::default(), length: Arc::new(watch::channel(0).0) };
        let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node1"},
            "status": {"addresses": [{"type": "InternalIP", "address": "10.78.0.2"}]}});
        api.put("nodes", node);
        api
    }

    pub fn put(&self, kind: &str, mut object: Value) {
        let mut events = self.events.lock();
        let name = object["metadata"]["name"].clone();
        let known = events.iter().any(|(k, event)| k == kind && event["object"]["metadata"]["name"] == name);
        object["metadata"]["resourceVersion"] = json!((events.len() + 1).to_string());
        object["metadata"]["uid"] = json!(format!("{kind}-{name}"));
        events.push((kind.to_owned(), json!({"type": if known { "MODIFIED" } else { "ADDED" }, "object": object})));
        self.length.send_replace(events.len());
    }

    pub async fn serve(self, listener: TcpListener) {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let api = self.clone();
            tokio::spawn(async move {
                // A client that went away is none of our business.
                let _ = api.answer(stream).await;
            });
        }
    }

    async fn answer(&self, stream: TcpStream) -> std::io::Result<()> {
        let mut stream = BufReader::new(stream);
        loop {
            let mut request = String::new();
            if stream.read_line(&mut request).await? == 0 {
                return Ok(());
            }
            let mut header = String::new();
            while stream.read_line(&mut header).await? > 2 {
                header.clear();
            }
            let target = request.split(' ').nth(1).unwrap_or_default();
            let (path, query) = target.split_once('?').unwrap_or((target, ""));
            let kind = path.rsplit('/').next().unwrap_or_default().to_owned();
            let parameter = |name: &str| query.split('&').find_map(|p| p.strip_prefix(name)?.strip_prefix('='));
            if parameter("watch").is_some() {
                let from = parameter("resourceVersion").and_then(|version| version.parse().ok()).unwrap_or(0);
                return self.watch(stream, &kind, from).await;
            }
            let body = self.list(&kind).to_string();
            let head =
                format!("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n", body.len());
            stream.write_all((head + &body).as_bytes()).await?;
        }
    }

    fn list(&self, kind: &str) -> Value {
        let events = self.events.lock();
        let mut items: Vec<Value> = Vec::new();
        for (_, event) in events.iter().filter(|(k, _)| k == kind) {
            let object = event["object"].clone();
            items.retain(|item| item["metadata"]["name"] != object["metadata"]["name"]);
            items.push(object);
        }
        json!({"kind": "List", "apiVersion": "v1", "metadata": {"resourceVersion": events.len().to_string()}, "items": items})
    }

    async fn watch(&self, mut stream: BufReader<TcpStream>, kind: &str, from: usize) -> std::io::Result<()> {
        stream
            .write_all(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n")
            .await?;
        let mut length = self.length.subscribe();
        let mut next = from;
        loop {
            let fresh: Vec<(String, Value)> = self.events.lock()[next..].to_vec();
            next += fresh.len();
            for (_, event) in fresh.iter().filter(|(k, _)| k == kind) {
                let line = format!("{event}\n");
                stream.write_all(format!("{:x}\r\n{line}\r\n", line.len()).as_bytes()).await?;
            }
            stream.flush().await?;
            if length.wait_for(|&length| length > next).await.is_err() {
                return Ok(());
            }
        }
    }
}
