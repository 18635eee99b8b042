//! Watches: everything as a stream of initial events, and one event delivered to many watchers.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bytes::{Buf, Bytes, BytesMut};
use http::{Method, StatusCode};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use serde_json::json;
use tokio::time::{Instant, timeout};

use super::answers::{self, Event};
use super::client::{Connection, JSON, MERGE, Request};
use super::load::{Cost, quiet};
use super::side::Side;
use super::writes::pods;

/// The content type of protobuf watches.
pub const PROTOBUF_STREAM: &str = "application/vnd.kubernetes.protobuf;stream=watch";
const INITIAL_EVENTS_END: &str = "k8s.io/initial-events-end";
/// Nothing that is measured here takes longer.
const LIMIT: Duration = Duration::from_secs(120);
/// No event is longer: a server that never ends a line must not fill the memory.
const EVENT_MAX: usize = 16 << 20;

pub const WATCHERS: usize = 500;
/// Connections that the watchers are spread over.
const WATCHER_CONNECTIONS: usize = 50;
const WRITERS: usize = 4;

/// The events of a watch, as they come.
struct Events {
    body: Incoming,
    buffer: BytesMut,
    is_protobuf: bool,
}

impl Events {
    async fn open(connection: &Connection, request: &Request) -> Result<Self> {
        let response = connection.open(request).await?;
        ensure!(response.status() == StatusCode::OK, "the watch is answered with {}", response.status());
        let is_protobuf = request.accept == PROTOBUF_STREAM;
        Ok(Self { body: response.into_body(), buffer: BytesMut::new(), is_protobuf })
    }

    async fn next(&mut self) -> Result<Event> {
        loop {
            if let Some(event) = self.cut() {
                return answers::event(self.is_protobuf, &event);
            }
            ensure!(self.buffer.len() < EVENT_MAX, "an event of more than {EVENT_MAX} bytes");
            let frame = self.body.frame().await.context("the server ended the watch")?.context("the watch broke")?;
            if let Ok(data) = frame.into_data() {
                self.buffer.extend_from_slice(&data);
            }
        }
    }

    /// The next event if it is there whole: a line, or a message behind its length.
    fn cut(&mut self) -> Option<Bytes> {
        if self.is_protobuf {
            let length = u32::from_be_bytes(self.buffer.get(..4)?.try_into().ok()?) as usize;
            self.buffer.get(..4 + length)?;
            self.buffer.advance(4);
            return Some(self.buffer.split_to(length).freeze());
        }
        let end = self.buffer.iter().position(|byte| *byte == b'\n')?;
        Some(self.buffer.split_to(end + 1).freeze())
    }
}

/// Streams everything once: one turn of so many watch lists, one after the other.
pub async fn watch_list(side: &Side, accept: &'static str, times: usize) -> Result<Cost> {
    quiet().await;
    let before = side.counters()?;
    let mut latencies = Vec::new();
    for _ in 0..times {
        let start = Instant::now();
        match timeout(LIMIT, one_watch_list(side, accept)).await {
            Ok(result) => result?,
            Err(_) => bail!("the initial events did not end in {LIMIT:?}"),
        }
        latencies.push(start.elapsed());
    }
    Ok(Cost::between(before, side.counters()?, times, latencies))
}

async fn one_watch_list(side: &Side, accept: &'static str) -> Result<()> {
    let path = format!(
        "{}?watch=1&sendInitialEvents=true&resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true&timeoutSeconds=120",
        pods()
    );
    let floor = side.floor();
    let mut events = Events::open(&side.connections[0], &Request::get(path).accept(accept)).await?;
    let mut seen = BTreeSet::new();
    loop {
        let event = events.next().await?;
        match event.kind.as_str() {
            "ADDED" => ensure!(seen.insert(event.item.name.clone()), "pod {} came twice", event.item.name),
            "BOOKMARK" if event.item.annotations.contains_key(INITIAL_EVENTS_END) => {
                let version = event.item.version;
                ensure!(version >= floor, "the initial events are of {version}, but {floor} was answered before");
                ensure!(seen.iter().eq(side.pods.iter().map(|pod| &pod.name)), "{} pods came", seen.len());
                return Ok(());
            }
            "BOOKMARK" => {}
            other => bail!("an event of type {other} among the initial ones"),
        }
    }
}

/// What one watcher has seen.
struct Delivered {
    at: Vec<(usize, Instant)>,
}

/// Updates pods while many watch all of them. The cost is per delivered event, updates included.
pub async fn fan_out(side: &Side, updates: usize) -> Result<Cost> {
    let mut connections = Vec::new();
    for _ in 0..WATCHER_CONNECTIONS {
        connections.push(side.endpoint()?.connect().await?);
    }
    let start = side.floor();
    let mut watchers = tokio::task::JoinSet::new();
    let path = format!("{}?watch=1&allowWatchBookmarks=true&timeoutSeconds=300&resourceVersion={start}", pods());
    for index in 0..WATCHERS {
        let connection = &connections[index % connections.len()];
        let events = Events::open(connection, &Request::get(path.clone())).await?;
        watchers.spawn(watcher(events, start, updates));
    }
    quiet().await;
    let before = side.counters()?;
    let sent = update(side, start, updates).await?;
    let mut latencies = Vec::with_capacity(WATCHERS * updates);
    while let Some(delivered) = timeout(LIMIT, watchers.join_next()).await.context("events do not arrive")? {
        let delivered = delivered.context("a watcher panicked")??;
        latencies.extend(delivered.at.into_iter().map(|(update, at)| at - sent[update]));
    }
    Ok(Cost::between(before, side.counters()?, WATCHERS * updates, latencies))
}

/// Sends the updates from a few writers; when each was sent. `run` tells them from those of other turns.
async fn update(side: &Side, run: u64, updates: usize) -> Result<Vec<Instant>> {
    let mut sent = vec![Instant::now(); updates];
    let writers = sent.chunks_mut(updates.div_ceil(WRITERS)).enumerate().map(|(writer, sent)| async move {
        let first = writer * updates.div_ceil(WRITERS);
        for (offset, sent) in sent.iter_mut().enumerate() {
            let update = first + offset;
            let pod = &side.pods[update * 13 % side.pods.len()];
            let patch = json!({"metadata": {"annotations": {"bench-update": format!("{run}-{update}")}}});
            let path = format!("{}/{}", pods(), pod.name);
            let request = Request::write(Method::PATCH, path, MERGE, patch.to_string().into());
            let floor = side.floor();
            *sent = Instant::now();
            let answer = side.connections[writer % side.connections.len()].ask(&request).await?;
            answer.expect(StatusCode::OK)?;
            side.check_written(floor, answers::item(JSON, &answer.body)?.version)?;
        }
        anyhow::Ok(())
    });
    futures::future::try_join_all(writers).await?;
    Ok(sent)
}

/// Every update exactly once, in the order of versions.
async fn watcher(mut events: Events, start: u64, updates: usize) -> Result<Delivered> {
    let mut at = Vec::with_capacity(updates);
    let mut seen = vec![false; updates];
    let mut last = start;
    while at.len() < updates {
        let event = events.next().await?;
        if event.kind == "BOOKMARK" {
            continue;
        }
        let now = Instant::now();
        ensure!(event.kind == "MODIFIED", "an event of type {}", event.kind);
        ensure!(event.item.version > last, "version {} came after {last}", event.item.version);
        last = event.item.version;
        let mark = event.item.annotations.get("bench-update").context("a pod was changed that nobody updated")?;
        let number = mark.strip_prefix(&format!("{start}-")).and_then(|text| text.parse::<usize>().ok());
        let update = number.filter(|update| *update < updates).with_context(|| format!("{mark} is no update"))?;
        ensure!(!std::mem::replace(&mut seen[update], true), "update {update} came twice");
        at.push((update, now));
    }
    Ok(Delivered { at })
}
