//! Which format a request body is in and which one the answer shall have.

use apimachinery::codec;
use apimachinery::status::{Result, Status};
use bytes::Bytes;
use http::{HeaderMap, header};
use serde_json::Value;

use crate::registry::SchemaRef;

pub const JSON: &str = "application/json";
pub const YAML: &str = "application/yaml";
pub const PROTOBUF: &str = "application/vnd.kubernetes.protobuf";

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Encoding {
    #[default]
    Json,
    Yaml,
    Protobuf,
}

/// What of an object the client wants to see.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Shape {
    #[default]
    Object,
    /// `meta.k8s.io/<version> Table`.
    Table(&'static str),
    /// `PartialObjectMetadata` or, of collections, `PartialObjectMetadataList`.
    Metadata(&'static str),
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Format {
    pub encoding: Encoding,
    pub shape: Shape,
}

impl Encoding {
    pub fn content_type(self) -> &'static str {
        match self {
            Self::Json => JSON,
            Self::Yaml => YAML,
            Self::Protobuf => PROTOBUF,
        }
    }

    /// The content type of a stream of watch events.
    pub fn stream_content_type(self) -> &'static str {
        match self {
            Self::Protobuf => "application/vnd.kubernetes.protobuf;stream=watch",
            _ => JSON,
        }
    }
}

/// The first format of the `Accept` header that this server has. Objects without `protobuf` can be had in it as tables
/// or metadata only.
pub fn accept(headers: &HeaderMap, protobuf: bool) -> Result<Format> {
    let mut clauses: Vec<(f32, &str)> = Vec::new();
    for value in headers.get_all(header::ACCEPT) {
        let text = value.to_str().unwrap_or_default();
        clauses.extend(text.split(',').map(str::trim).filter(|c| !c.is_empty()).map(|c| (quality(c), c)));
    }
    if clauses.is_empty() {
        return Ok(Format::default());
    }
    clauses.sort_by(|(a, _), (b, _)| b.total_cmp(a));
    clauses
        .iter()
        .filter_map(|(_, clause)| format_of(clause))
        .find(|format| protobuf || format.encoding != Encoding::Protobuf || format.shape != Shape::Object)
        .ok_or_else(|| {
            let all = [JSON, YAML, PROTOBUF];
            Status::not_acceptable(if protobuf { &all } else { &all[..2] })
        })
}

fn quality(clause: &str) -> f32 {
    clause.split(';').skip(1).find_map(|p| p.trim().strip_prefix("q=")?.parse().ok()).unwrap_or(1.0)
}

fn format_of(clause: &str) -> Option<Format> {
    let mut parts = clause.split(';').map(str::trim);
    let encoding = match parts.next()? {
        JSON | "*/*" | "application/*" => Encoding::Json,
        YAML => Encoding::Yaml,
        PROTOBUF => Encoding::Protobuf,
        _ => return None,
    };
    let (mut kind, mut group, mut version) = ("", "", "");
    for (name, value) in parts.filter_map(|part| part.split_once('=')) {
        match name {
            "as" => kind = value,
            "g" => group = value,
            "v" => version = value,
            _ => {}
        }
    }
    let version = match version {
        "v1beta1" => "v1beta1",
        _ => "v1",
    };
    let shape = match (kind, group) {
        ("", _) => Shape::Object,
        ("Table", "meta.k8s.io") => Shape::Table(version),
        ("PartialObjectMetadata" | "PartialObjectMetadataList", "meta.k8s.io") => Shape::Metadata(version),
        _ => return None,
    };
    Some(Format { encoding, shape })
}

/// A decoded body: the object and what a strict reading complains about.
pub struct Body {
    pub value: Value,
    pub strict_errors: Vec<String>,
}

/// Reads a request body by its `Content-Type`, checked against the schema when there is one.
pub fn decode(headers: &HeaderMap, body: &Bytes, schema: Option<&SchemaRef>) -> Result<Body> {
    let content_type = headers.get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or(JSON);
    let media_type = content_type.split(';').next().unwrap_or_default().trim();
    let schema = schema.map(|schema| &**schema);
    let unreadable = |error: &dyn std::fmt::Display| Status::bad_request(error.to_string());
    match media_type {
        "" | JSON | "*/*" => {
            let decoded = codec::json::decode(body, schema).map_err(|error| unreadable(&error))?;
            Ok(Body { value: decoded.value, strict_errors: decoded.strict_errors })
        }
        YAML | "application/x-yaml" => {
            let decoded = codec::yaml::decode(body, schema).map_err(|error| unreadable(&error))?;
            Ok(Body { value: decoded.value, strict_errors: decoded.strict_errors })
        }
        PROTOBUF => {
            let value = codec::proto::decode_object(body).map_err(|error| unreadable(&error))?;
            Ok(Body { value, strict_errors: vec![] })
        }
        other => Err(Status::unsupported_media_type(other, &[JSON, YAML, PROTOBUF])),
    }
}

/// Writes one object.
pub fn encode(encoding: Encoding, value: &Value) -> Result<Bytes> {
    match encoding {
        Encoding::Json => {
            let mut text = serde_json::to_vec(value).map_err(Status::internal)?;
            text.push(b'\n');
            Ok(text.into())
        }
        Encoding::Yaml => codec::yaml::encode(value).map(Into::into).map_err(Status::internal),
        Encoding::Protobuf => codec::proto::encode_object(value).map(Into::into).map_err(Status::internal),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accept_headers_of_real_clients() {
        let cases = [
            ("", Some((Encoding::Json, Shape::Object))),
            ("*/*", Some((Encoding::Json, Shape::Object))),
            (
                "application/json;as=Table;v=v1;g=meta.k8s.io,application/json;as=Table;v=v1beta1;g=meta.k8s.io,application/json",
                Some((Encoding::Json, Shape::Table("v1"))),
            ),
            ("application/vnd.kubernetes.protobuf, */*", Some((Encoding::Protobuf, Shape::Object))),
            (
                "application/vnd.kubernetes.protobuf;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1",
                Some((Encoding::Protobuf, Shape::Metadata("v1"))),
            ),
            ("application/cbor, application/yaml;q=0.9, application/json;q=0.1", Some((Encoding::Yaml, Shape::Object))),
            ("text/html", None),
        ];
        for (text, expected) in cases {
            let mut headers = HeaderMap::new();
            if !text.is_empty() {
                headers.insert(header::ACCEPT, text.parse().expect("header"));
            }
            let got = accept(&headers, true).ok().map(|format| (format.encoding, format.shape));
            assert_eq!(got, expected, "{text}");
        }
    }
}
