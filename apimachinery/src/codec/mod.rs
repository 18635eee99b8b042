//! From bytes to `serde_json::Value` trees and back: JSON, YAML and Kubernetes' protobuf.
//!
//! Decoding is strict where upstream is (types), and reports what upstream's field validation reports (unknown and
//! duplicate fields) beside the value, which never contains unknown fields of a built-in kind. Everything is bounded:
//! size, depth, aliases.

mod conform;
mod internal;
pub mod json;
mod order;
pub mod proto;
pub mod scan;
mod time;
mod tree;
pub mod yaml;

use serde_json::Value;

pub use conform::{complete, conform, forget_emptiness, is_complete};
pub use order::show_in_order;

/// No body is decoded that is larger than this, in bytes; the HTTP layer has tighter limits of its own.
pub const MAX_BYTES: usize = 16 * 1024 * 1024;
/// Upstream stops collecting after this many complaints about fields.
pub(crate) const MAX_STRICT_ERRORS: usize = 100;

/// A decoded object and what strict field validation has to say about it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Decoded {
    pub value: Value,
    /// `unknown field "spec.foo"`, `duplicate field "spec.bar"`
    pub strict_errors: Vec<String>,
}

/// Why bytes are not an object. The texts are those of upstream's decoders as far as users meet them.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    #[error("the body is larger than {MAX_BYTES} bytes")]
    TooLarge,
    #[error("{0}")]
    Json(#[source] serde_json::Error),
    #[error("yaml: {0}")]
    Yaml(#[source] Box<serde_saphyr::Error>),
    #[error("the body is not UTF-8")]
    NotUtf8,
    #[error("json: cannot unmarshal {value} into Go struct field {holder}.{path} of type {expected}")]
    FieldType { value: String, holder: String, path: String, expected: String },
    #[error("json: cannot unmarshal {value} into Go value of type {expected}")]
    ValueType { value: String, expected: String },
    #[error("{0}")]
    Quantity(#[source] crate::meta::QuantityError),
    #[error("{0}")]
    Time(String),
    #[error("illegal base64 data at input byte {0}")]
    Base64(usize),
}
