//! Response bodies: a text, a JSON document, or bytes that a task sends while the client takes them.

use std::future::Future;

use bytes::Bytes;
use futures::StreamExt;
use http::{HeaderValue, Response, StatusCode, header};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::Frame;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

pub type Body = UnsyncBoxBody<Bytes, hyper::Error>;
/// Where a streaming task puts its chunks; waits while the client is slow.
pub type Sender = mpsc::Sender<Bytes>;

/// Chunks that wait for a slow client.
const QUEUE: usize = 2;

pub fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync()
}

/// A body that `task` fills; the task sees `sender.closed()` when the client is gone.
pub fn stream<F, Fut>(task: F) -> Body
where
    F: FnOnce(Sender) -> Fut,
    Fut: Future<Output = ()> + Send + 'static,
{
    let (sender, receiver) = mpsc::channel(QUEUE);
    tokio::spawn(task(sender));
    StreamBody::new(ReceiverStream::new(receiver).map(|chunk| Ok(Frame::data(chunk)))).boxed_unsync()
}

pub fn text(status: StatusCode, message: impl Into<String>) -> Response<Body> {
    typed(status, "text/plain; charset=utf-8", message.into())
}

pub fn json(value: &impl serde::Serialize) -> Response<Body> {
    match serde_json::to_vec(value) {
        Ok(bytes) => typed(StatusCode::OK, "application/json", bytes),
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
    }
}

pub fn typed(status: StatusCode, content_type: &'static str, content: impl Into<Bytes>) -> Response<Body> {
    let mut response = Response::new(full(content));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}
