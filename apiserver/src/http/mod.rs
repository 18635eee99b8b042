//! Everything about HTTP: listening, the chain of filters, negotiation of formats, errors, and the routes that are not
//! resources. What an operation on a resource means is in `verbs/`.

pub mod component_status;
pub mod compress;
pub mod discovery;
pub mod error;
pub mod filters;
pub mod health;
pub mod json_client;
pub mod links;
pub mod listener;
pub mod metrics;
pub mod negotiate;
pub mod openapi;
pub mod options;
mod other_kind;
pub mod outbound;
pub mod proxy;
pub mod render;
pub mod request_info;
pub mod resources;
pub mod routes;
pub mod stream_socket;
pub mod table;
pub mod upgrade;
pub mod version;
pub mod watch;
pub mod webhook;

pub use request_info::RequestInfo;

/// The body of every request and response that passes through the server.
pub type Body = http_body_util::combinators::UnsyncBoxBody<bytes::Bytes, BodyError>;
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;
pub type Request = http::Request<Body>;
pub type Response = http::Response<Body>;

/// A body broke off.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct BodyError(BoxError);

impl BodyError {
    pub fn new(error: impl Into<BoxError>) -> Self {
        Self(error.into())
    }
}

impl From<hyper::Error> for BodyError {
    fn from(error: hyper::Error) -> Self {
        Self::new(error)
    }
}

/// A body of known bytes.
pub fn full(bytes: impl Into<bytes::Bytes>) -> Body {
    use http_body_util::BodyExt;
    http_body_util::Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync()
}
