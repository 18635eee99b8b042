//! Everything about HTTP: listening, the chain of filters, negotiation of formats, errors, and the routes that are not
//! resources. What an operation on a resource means is in `verbs/`.

pub mod discovery;
pub mod health;
pub mod metrics;
pub mod openapi;
pub mod proxy;
pub mod routes;
pub mod upgrade;
pub mod version;
pub mod request_info;

pub use request_info::RequestInfo;

/// The body of every request and response that passes through the server.
pub type Body = http_body_util::combinators::UnsyncBoxBody<bytes::Bytes, BoxError>;
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;
pub type Request = http::Request<Body>;
pub type Response = http::Response<Body>;

/// A body of known bytes.
pub fn full(bytes: impl Into<bytes::Bytes>) -> Body {
    use http_body_util::BodyExt;
    http_body_util::Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync()
}
