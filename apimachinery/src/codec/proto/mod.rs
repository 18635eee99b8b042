//! Kubernetes' protobuf, driven by the schema: no generated structs. An object travels as the four bytes `k8s\0`
//! followed by a `runtime.Unknown` message that names its kind and carries its bytes.
//!
//! Custom resources have no protobuf form; asking for one is [`ProtoError::UnknownKind`].

mod decode;
mod encode;
mod transcode;
pub(crate) mod wire;

use serde_json::{Map, Value};

use crate::meta::GroupVersionKind;
use crate::schema::{Schema, builtin};

/// What every protobuf object starts with.
pub const MAGIC: &[u8; 4] = b"k8s\0";

/// Why an object cannot be read from or written as protobuf.
#[derive(Debug, thiserror::Error)]
pub enum ProtoError {
    #[error("provided data does not appear to be a protobuf message, expected prefix [107 56 115 0]")]
    NoMagic,
    #[error("the message ends in the middle of a field")]
    Truncated,
    #[error("field {0} has wire type {1}, which does not fit")]
    WireType(u32, u8),
    #[error("the message nests deeper than {} levels", wire::MAX_DEPTH)]
    TooDeep,
    #[error("a string is not UTF-8")]
    NotUtf8,
    #[error(transparent)]
    Text(#[from] super::scan::ScanError),
    #[error("embedded JSON: {0}")]
    Json(#[source] serde_json::Error),
    #[error("no protobuf form of kind {kind:?} in {api_version:?}")]
    UnknownKind { api_version: String, kind: String },
    #[error("{0:?} has a value that does not fit its type")]
    Value(String),
    #[error("content encoding {0:?} is not supported")]
    ContentEncoding(String),
}

/// Decodes an object with its envelope; the value has `apiVersion` and `kind`.
pub fn decode_object(bytes: &[u8]) -> Result<Value, ProtoError> {
    decode_enveloped(bytes, 0)
}

fn decode_enveloped(bytes: &[u8], depth: usize) -> Result<Value, ProtoError> {
    let body = bytes.strip_prefix(MAGIC).ok_or(ProtoError::NoMagic)?;
    let unknown = decode::unknown(body)?;
    if !unknown.content_encoding.is_empty() {
        return Err(ProtoError::ContentEncoding(unknown.content_encoding));
    }
    let mut map = if unknown.content_type == "application/json" {
        match serde_json::from_slice(unknown.raw).map_err(ProtoError::Json)? {
            Value::Object(map) => map,
            other => return Ok(other),
        }
    } else {
        let schema = builtin().kind_of_object(&unknown.api_version, &unknown.kind);
        let schema = schema.ok_or_else(|| unknown_kind(&unknown.api_version, &unknown.kind))?;
        let mut map = decode::message(unknown.raw, schema, depth)?;
        // A list always has items, even when there are none.
        if unknown.kind.ends_with("List") && schema.child("items").is_some_and(|items| items.item().is_some()) {
            map.entry("items").or_insert_with(|| Value::Array(Vec::new()));
        }
        map
    };
    if !unknown.api_version.is_empty() {
        map.insert("apiVersion".into(), Value::String(unknown.api_version));
        map.insert("kind".into(), Value::String(unknown.kind));
    }
    Ok(Value::Object(map))
}

/// The kind named by the envelope, without decoding the object.
pub fn kind_of(bytes: &[u8]) -> Result<(String, String), ProtoError> {
    let unknown = decode::unknown(bytes.strip_prefix(MAGIC).ok_or(ProtoError::NoMagic)?)?;
    Ok((unknown.api_version, unknown.kind))
}

fn unknown_kind(api_version: &str, kind: &str) -> ProtoError {
    ProtoError::UnknownKind { api_version: api_version.to_owned(), kind: kind.to_owned() }
}

/// Encodes an object, which must have `apiVersion` and `kind` of a built-in kind, with its envelope.
pub fn encode_object(value: &Value) -> Result<Vec<u8>, ProtoError> {
    let text = |name: &str| value.get(name).and_then(Value::as_str).unwrap_or_default();
    let (api_version, kind) = (text("apiVersion"), text("kind"));
    let schema = builtin().kind_of_object(api_version, kind).ok_or_else(|| unknown_kind(api_version, kind))?;
    Ok(encode::envelope(api_version, kind, &encode_message(schema, value)?))
}

/// Encodes an object's message without the envelope, as lists embed it.
pub fn encode_message(schema: &Schema, value: &Value) -> Result<Vec<u8>, ProtoError> {
    encode::message(schema, value)
}

/// The message of an object that is JSON text, which is never a tree: several times as fast as by way of one.
pub fn transcode_message(schema: &Schema, text: &[u8]) -> Result<Vec<u8>, ProtoError> {
    transcode::message(schema, text)
}

/// Puts a message that [`encode_message`] made into its envelope.
pub fn envelope(api_version: &str, kind: &str, message: &[u8]) -> Vec<u8> {
    encode::envelope(api_version, kind, message)
}

/// Encodes a list with its envelope. `list_meta` is the list's `metadata`.
pub fn encode_list(gvk: &GroupVersionKind, list_meta: &Value, items: &[&Value]) -> Result<Vec<u8>, ProtoError> {
    let api_version = gvk.api_version();
    let schema = builtin().kind(gvk).ok_or_else(|| unknown_kind(&api_version, &gvk.kind))?;
    let item = schema.child("items").and_then(Schema::item).ok_or_else(|| unknown_kind(&api_version, &gvk.kind))?;
    let messages = items.iter().map(|value| encode::message(item, value)).collect::<Result<Vec<_>, _>>()?;
    let (mut out, end) = list_frame(gvk, list_meta, messages.iter().map(Vec::len))?;
    for message in &messages {
        wire::bytes_field(&mut out, 2, message);
    }
    out.extend_from_slice(end);
    Ok(out)
}

/// What comes before and after the items of a list in its envelope, so that the items need not be gathered: each goes
/// between the two behind its [`item_prefix`]. `lengths` are those of the items' messages.
pub fn list_frame(
    gvk: &GroupVersionKind,
    list_meta: &Value,
    lengths: impl Iterator<Item = usize>,
) -> Result<(Vec<u8>, &'static [u8]), ProtoError> {
    let api_version = gvk.api_version();
    let schema = builtin().kind(gvk).ok_or_else(|| unknown_kind(&api_version, &gvk.kind))?;
    let mut head = Map::new();
    head.insert("metadata".into(), list_meta.clone());
    let metadata = encode::message(schema, &Value::Object(head))?;
    let items: usize = lengths.map(wire::field_length).sum();
    let mut out = encode::envelope_start(&encode::type_meta(&api_version, &gvk.kind), metadata.len() + items);
    out.extend_from_slice(&metadata);
    Ok((out, encode::ENVELOPE_END))
}

/// What comes before an item's message in a list.
pub fn item_prefix(length: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(6);
    wire::bytes_start(&mut out, 2, length);
    out
}

/// Encodes a `WatchEvent` without an envelope and without the four length bytes that frame it in a stream; the object
/// inside has an envelope.
pub fn encode_watch_event(event: &str, object: &Value) -> Result<Vec<u8>, ProtoError> {
    let text = |name: &str| object.get(name).and_then(Value::as_str).unwrap_or_default();
    let (api_version, kind) = (text("apiVersion"), text("kind"));
    let schema = builtin().kind_of_object(api_version, kind).ok_or_else(|| unknown_kind(api_version, kind))?;
    Ok(encode_watch_event_of(event, api_version, kind, &encode_message(schema, object)?))
}

/// The same from a message that [`encode_message`] made earlier, which is copied once.
pub fn encode_watch_event_of(event: &str, api_version: &str, kind: &str, message: &[u8]) -> Vec<u8> {
    let start = encode::envelope_start(&encode::type_meta(api_version, kind), message.len());
    let object = start.len() + message.len() + encode::ENVELOPE_END.len();
    let raw = wire::field_length(object);
    let mut out = Vec::with_capacity(wire::field_length(event.len()) + wire::field_length(raw));
    wire::bytes_field(&mut out, 1, event.as_bytes());
    wire::bytes_start(&mut out, 2, raw);
    wire::bytes_start(&mut out, 1, object);
    out.extend_from_slice(&start);
    out.extend_from_slice(message);
    out.extend_from_slice(encode::ENVELOPE_END);
    out
}

#[cfg(test)]
mod tests;
