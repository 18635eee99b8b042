//! Bodies that are watched as they pass: what is in them may be wanted, and when they end is.

use std::pin::Pin;
use std::task::{Context, Poll};

use apimachinery::codec::{json, proto, yaml};
use bytes::{Buf, Bytes};
use http::{HeaderMap, header};
use http_body::{Body as HttpBody, Frame, SizeHint};
use http_body_util::BodyExt;
use parking_lot::Mutex;
use serde_json::Value;

use crate::http::{Body, BodyError};

/// Objects larger than this are left out of events.
const LARGEST: usize = 3 << 20;

/// What passed of a body.
pub struct Captured {
    is_wanted: bool,
    content: Mutex<Content>,
}

#[derive(Default)]
struct Content {
    kind: String,
    bytes: Vec<u8>,
    is_too_large: bool,
}

impl Captured {
    pub fn new(is_wanted: bool) -> Self {
        Self { is_wanted, content: Mutex::default() }
    }

    pub fn is_wanted(&self) -> bool {
        self.is_wanted
    }

    /// What the headers say of the body.
    pub fn begin(&self, headers: &HeaderMap) {
        if self.is_wanted {
            let kind = headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
            // What is compressed is not looked into.
            let is_packed = headers.contains_key(header::CONTENT_ENCODING);
            kind.clone_into(&mut self.content.lock().kind);
            self.content.lock().is_too_large = is_packed;
        }
    }

    fn add(&self, bytes: &Bytes) {
        let mut content = self.content.lock();
        if content.is_too_large || content.bytes.len() + bytes.len() > LARGEST {
            content.is_too_large = true;
            content.bytes = Vec::new();
        } else {
            content.bytes.extend_from_slice(bytes.chunk());
        }
    }

    /// The object in the body, if it is one that can be read.
    pub fn object(&self) -> Option<Value> {
        let content = self.content.lock();
        if !self.is_wanted || content.bytes.is_empty() {
            return None;
        }
        let bytes = &content.bytes;
        if content.kind.contains("protobuf") {
            proto::decode_object(bytes).ok()
        } else if content.kind.contains("yaml") {
            yaml::parse(bytes).ok().map(|decoded| decoded.value)
        } else {
            json::parse(bytes).ok().map(|decoded| decoded.value)
        }
    }
}

/// Called when a body has ended, or was dropped before.
pub type End = Box<dyn FnOnce() + Send>;

/// A body that is watched.
pub struct Watched {
    inner: Body,
    captured: std::sync::Arc<Captured>,
    end: Option<End>,
}

impl Watched {
    pub fn new(inner: Body, captured: std::sync::Arc<Captured>, end: Option<End>) -> Self {
        Self { inner, captured, end }
    }

    pub fn boxed(self) -> Body {
        self.boxed_unsync()
    }

    fn finish(&mut self) {
        if let Some(end) = self.end.take() {
            end();
        }
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.finish();
    }
}

impl HttpBody for Watched {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let polled = Pin::new(&mut self.inner).poll_frame(cx);
        match &polled {
            Poll::Ready(Some(Ok(frame))) if self.captured.is_wanted() => {
                if let Some(bytes) = frame.data_ref() {
                    self.captured.add(bytes);
                }
            }
            Poll::Ready(None | Some(Err(_))) => self.finish(),
            _ => {}
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
