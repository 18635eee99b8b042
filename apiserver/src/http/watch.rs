//! The stream of a watch: events as they come, batched into few writes; bookmarks by timer and at the end.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use apimachinery::codec;
use apimachinery::process::CancellationToken;
use apimachinery::status::Status;
use bytes::{BufMut, Bytes, BytesMut};
use http::{HeaderValue, header};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use rand::Rng;
use serde_json::{Value, json};
use tokio::time::{Instant, Sleep, sleep_until};
use tokio_util::sync::WaitForCancellationFutureOwned;

use super::negotiate::{Encoding, Shape};
use super::render::Renderer;
use super::{BodyError, Response};
use crate::cache::{Delivery, FrameKind, Seen, Snapshot, Stored, Watch};

/// A write is about this large at most, if single events are not larger.
const BATCH: usize = 16 * 1024;
const BOOKMARK_EVERY: Duration = Duration::from_secs(60);
/// What ends the initial events of a watch that was asked for them.
const INITIAL_EVENTS_END: &str = "k8s.io/initial-events-end";

pub struct Options {
    pub bookmarks: bool,
    /// A bookmark shall end the initial events.
    pub mark_initial_end: bool,
    pub timeout: Duration,
    /// Ends the watch, so that the server can stop.
    pub shutdown: CancellationToken,
}

/// How long a watch lasts when the client does not say: random, so that not all come back at once.
pub fn default_timeout(min_seconds: u64) -> Duration {
    Duration::from_secs(min_seconds + rand::rng().random_range(0..min_seconds.max(1)))
}

/// The response that streams `watch`, beginning with the objects of `initial`.
pub fn respond(renderer: Renderer, watch: Watch, initial: Option<Snapshot>, options: Options) -> Response {
    let content_type = renderer.format.encoding.stream_content_type();
    let initial_revision = initial.as_ref().map(|snapshot| snapshot.revision);
    let stream = Stream {
        initial: initial.map(|snapshot| initial_objects(&snapshot, &watch)).unwrap_or_default(),
        initial_end: options.mark_initial_end.then_some(initial_revision).flatten(),
        clock: Clock::new(options.timeout, options.bookmarks),
        columns_sent: false,
        ended: false,
        shutdown: Box::pin(options.shutdown.cancelled_owned()),
        shared: shared_frames(&renderer, &watch),
        renderer,
        watch,
    };
    let body = futures::stream::unfold(stream, |mut stream| async move {
        let chunk = stream.next_chunk().await?;
        Some((Ok::<_, BodyError>(Frame::data(chunk)), stream))
    });
    let mut response = Response::new(BodyExt::boxed_unsync(StreamBody::new(body)));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache, private"));
    response
}

/// A watch that cannot start: a stream of one error.
pub fn respond_error(renderer: &Renderer, status: &Status) -> Response {
    let mut out = BytesMut::new();
    put_event(&mut out, renderer.format.encoding, "ERROR", &status.to_json());
    let mut response = Response::new(super::full(out.freeze()));
    let content_type = renderer.format.encoding.stream_content_type();
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

/// Which frames this watch has in common with others. Resources that share a cache may show its objects under names
/// of their own; only the one that goes by the objects' name shares.
fn shared_frames(renderer: &Renderer, watch: &Watch) -> Option<FrameKind> {
    let (gvk, kind) = (&renderer.served.gvk, watch.kind());
    if *gvk.kind != *kind.kind || gvk.api_version() != kind.api_version {
        return None;
    }
    if renderer.is_verbatim() {
        return Some(FrameKind::Json);
    }
    renderer.is_protobuf_verbatim().then_some(FrameKind::Protobuf)
}

fn initial_objects(snapshot: &Snapshot, watch: &Watch) -> VecDeque<Arc<Stored>> {
    let filter = watch.selection.filter();
    snapshot.objects.values().filter(|slot| filter.matches(slot)).map(|slot| slot.object.clone()).collect()
}

struct Stream {
    renderer: Renderer,
    watch: Watch,
    initial: VecDeque<Arc<Stored>>,
    initial_end: Option<u64>,
    clock: Clock,
    columns_sent: bool,
    ended: bool,
    shutdown: Pin<Box<WaitForCancellationFutureOwned>>,
    shared: Option<FrameKind>,
}

/// When something is due without an event: a bookmark, or the end. It is one timer, which stays registered while events
/// come and go.
struct Clock {
    timer: Pin<Box<Sleep>>,
    deadline: Instant,
    bookmarks: bool,
}

impl Clock {
    fn new(timeout: Duration, bookmarks: bool) -> Self {
        let deadline = Instant::now() + timeout;
        let mut clock = Self { timer: Box::pin(sleep_until(deadline)), deadline, bookmarks };
        clock.wind();
        clock
    }

    fn wind(&mut self) {
        let next = Instant::now() + BOOKMARK_EVERY;
        self.timer.as_mut().reset(if self.bookmarks { next.min(self.deadline) } else { self.deadline });
    }

    async fn due(&mut self) -> Wake {
        self.timer.as_mut().await;
        if Instant::now() >= self.deadline {
            return Wake::TimedOut;
        }
        self.wind();
        Wake::Bookmark
    }
}

enum Wake {
    Event(Arc<Delivery>),
    Bookmark,
    TimedOut,
    Ended,
}

impl Stream {
    /// The next bytes to send; `None` when the watch is over.
    async fn next_chunk(&mut self) -> Option<Bytes> {
        if !self.initial.is_empty() {
            return Some(self.initial_chunk());
        }
        let mut out = BytesMut::new();
        if let Some(revision) = self.initial_end.take() {
            self.put_bookmark(&mut out, revision, true);
        }
        if !out.is_empty() {
            return Some(out.freeze());
        }
        while out.is_empty() {
            if self.ended {
                return None;
            }
            match self.wake().await {
                Wake::Event(delivery) => match (self.shared_frame(&delivery), self.watch.try_next()) {
                    (Some(frame), None) => return Some(frame),
                    (_, more) => {
                        self.put_seen(&mut out, &delivery);
                        more.iter().for_each(|delivery| self.put_seen(&mut out, delivery));
                        self.drain(&mut out);
                    }
                },
                Wake::Bookmark => self.drain_and_bookmark(&mut out),
                Wake::TimedOut => {
                    self.ended = true;
                    if self.clock.bookmarks {
                        self.drain_and_bookmark(&mut out);
                    }
                }
                Wake::Ended => return None,
            }
        }
        Some(out.freeze())
    }

    fn initial_chunk(&mut self) -> Bytes {
        let mut out = BytesMut::with_capacity(2 * BATCH);
        while let Some(object) = self.initial.pop_front() {
            self.put(&mut out, Seen::Added.name(), &object);
            if out.len() >= BATCH {
                break;
            }
        }
        out.freeze()
    }

    async fn wake(&mut self) -> Wake {
        tokio::select! {
            biased;
            event = self.watch.next() => event.map_or(Wake::Ended, Wake::Event),
            due = self.clock.due() => due,
            () = &mut self.shutdown => Wake::TimedOut,
        }
    }

    fn drain(&mut self, out: &mut BytesMut) {
        while out.len() < BATCH
            && let Some(delivery) = self.watch.try_next()
        {
            self.put_seen(out, &delivery);
        }
    }

    /// A bookmark promises that everything up to its revision has been sent.
    fn drain_and_bookmark(&mut self, out: &mut BytesMut) {
        let revision = self.watch.revision();
        while let Some(delivery) = self.watch.try_next() {
            self.put_seen(out, &delivery);
        }
        if self.watch.selection.failure().is_some() {
            return;
        }
        self.put_bookmark(out, revision, false);
    }

    /// The event as all watchers get it who see it alike; `None` for those who want something of their own.
    fn shared_frame(&mut self, delivery: &Delivery) -> Option<Bytes> {
        let kind = self.shared?;
        let seen = self.watch.selection.see(delivery)?;
        if seen == Seen::Deleted && !delivery.deleted {
            return None;
        }
        Some(delivery.frame(kind, seen, || {
            let mut out = BytesMut::with_capacity(delivery.object.body.len() + 256);
            self.put(&mut out, seen.name(), &delivery.object);
            out.freeze()
        }))
    }

    fn put_seen(&mut self, out: &mut BytesMut, delivery: &Delivery) {
        if let Some(frame) = self.shared_frame(delivery) {
            return out.extend_from_slice(&frame);
        }
        let Some(seen) = self.watch.selection.see(delivery) else { return };
        match (seen, &delivery.previous) {
            // Gone from the selection, not from the store: the client knows the state before, as of this change.
            (Seen::Deleted, Some(previous)) if !delivery.deleted => match previous.at_revision(delivery.revision) {
                Ok(last) => self.put(out, seen.name(), &last),
                Err(error) => tracing::error!(key = %delivery.object.key, %error, "cannot write the last state"),
            },
            _ => self.put(out, seen.name(), &delivery.object),
        }
    }

    fn put(&mut self, out: &mut BytesMut, name: &str, object: &Stored) {
        if self.renderer.is_verbatim() {
            out.extend_from_slice(b"{\"type\":\"");
            out.extend_from_slice(name.as_bytes());
            out.extend_from_slice(b"\",\"object\":");
            self.renderer.put_object(out, object);
            out.extend_from_slice(b"}\n");
            return;
        }
        if self.renderer.is_protobuf_verbatim()
            && let Some(message) = object.message()
        {
            let (api_version, kind) = (&object.kind.api_version, &object.kind.kind);
            return put_frame(out, &codec::proto::encode_watch_event_of(name, api_version, kind, &message));
        }
        let value = match self.renderer.format.shape {
            Shape::Table(version) => {
                let columns = !std::mem::replace(&mut self.columns_sent, true);
                let metadata = json!({"resourceVersion": object.revision.to_string()});
                self.renderer.table(version, metadata, std::iter::once(object), columns)
            }
            _ => self.renderer.shaped(object),
        };
        match value {
            Ok(value) => put_event(out, self.renderer.format.encoding, name, &value),
            Err(status) => put_event(out, self.renderer.format.encoding, "ERROR", &status.to_json()),
        }
    }

    fn put_bookmark(&mut self, out: &mut BytesMut, revision: u64, initial_end: bool) {
        let mut metadata = json!({"resourceVersion": revision.to_string()});
        if initial_end {
            metadata["annotations"] = json!({INITIAL_EVENTS_END: "true"});
        }
        let served = &self.renderer.served;
        let mut object = json!({"kind": served.gvk.kind, "apiVersion": served.gvk.api_version(), "metadata": metadata});
        match self.renderer.format.shape {
            Shape::Object => {}
            Shape::Metadata(version) => object = super::table::partial(&object, version),
            Shape::Table(version) => {
                let list_metadata = json!({"resourceVersion": revision.to_string()});
                let row = json!({"cells": [], "object": super::table::partial(&object, version)});
                object = json!({
                    "kind": "Table",
                    "apiVersion": format!("meta.k8s.io/{version}"),
                    "metadata": list_metadata,
                    "columnDefinitions": null,
                    "rows": [row],
                });
            }
        }
        put_event(out, self.renderer.format.encoding, "BOOKMARK", &object);
    }
}

/// One event in the framing of its encoding: a line of JSON, or a length and a protobuf message.
fn put_event(out: &mut BytesMut, encoding: Encoding, name: &str, object: &Value) {
    if encoding == Encoding::Protobuf {
        match codec::proto::encode_watch_event(name, object) {
            Ok(message) => put_frame(out, &message),
            Err(error) => tracing::error!(%error, "cannot write a watch event as protobuf"),
        }
        return;
    }
    // The type comes first, as upstream writes it: some clients look no further.
    out.extend_from_slice(format!("{{\"type\":\"{name}\",\"object\":{object}}}\n").as_bytes());
}

/// A protobuf message with its length before it.
fn put_frame(out: &mut BytesMut, message: &[u8]) {
    out.put_u32(u32::try_from(message.len()).unwrap_or(u32::MAX));
    out.extend_from_slice(message);
}
