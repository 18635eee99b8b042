//! Version 2 definitions in the protobuf form that client-go reads (`openapi.v2` of gnostic).

use serde_json::{Map, Value};

use crate::codec::proto::wire::{bytes_field, nested, varint_field};

/// Field numbers of gnostic's messages.
mod number {
    pub mod document {
        pub const SWAGGER: u16 = 1;
        pub const INFO: u16 = 2;
        pub const PATHS: u16 = 8;
        pub const DEFINITIONS: u16 = 9;
    }
    pub mod schema {
        pub const REF: u16 = 1;
        pub const FORMAT: u16 = 2;
        pub const DESCRIPTION: u16 = 4;
        pub const REQUIRED: u16 = 19;
        pub const ADDITIONAL_PROPERTIES: u16 = 21;
        pub const TYPE: u16 = 22;
        pub const ITEMS: u16 = 23;
        pub const PROPERTIES: u16 = 25;
        pub const VENDOR_EXTENSION: u16 = 31;
    }
}

/// A `Document` with these definitions. Everything in them that clients read has a place; nothing else is written.
pub fn document(definitions: impl Iterator<Item = (String, Value)>) -> Vec<u8> {
    let mut out = Vec::new();
    bytes_field(&mut out, number::document::SWAGGER, b"2.0");
    message(&mut out, number::document::INFO, |out| {
        bytes_field(out, 1, b"Kubernetes");
        bytes_field(out, 2, super::RELEASE.as_bytes());
    });
    bytes_field(&mut out, number::document::PATHS, b"");
    message(&mut out, number::document::DEFINITIONS, |out| {
        for (name, definition) in definitions {
            named_schema(out, &name, &definition);
        }
    });
    out
}

fn message(out: &mut Vec<u8>, number: u16, write: impl FnOnce(&mut Vec<u8>)) {
    let result: Result<(), std::convert::Infallible> = nested(out, number, |out| {
        write(out);
        Ok(())
    });
    let Ok(()) = result;
}

fn named_schema(out: &mut Vec<u8>, name: &str, value: &Value) {
    message(out, 1, |out| {
        bytes_field(out, 1, name.as_bytes());
        message(out, 2, |out| schema(out, value));
    });
}

fn schema(out: &mut Vec<u8>, value: &Value) {
    let Some(map) = value.as_object() else { return };
    let text = |out: &mut Vec<u8>, key: &str, number: u16| {
        if let Some(text) = map.get(key).and_then(Value::as_str) {
            bytes_field(out, number, text.as_bytes());
        }
    };
    text(out, "$ref", number::schema::REF);
    text(out, "format", number::schema::FORMAT);
    text(out, "description", number::schema::DESCRIPTION);
    for name in map.get("required").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str) {
        bytes_field(out, number::schema::REQUIRED, name.as_bytes());
    }
    match map.get("additionalProperties") {
        Some(Value::Bool(allowed)) => message(out, number::schema::ADDITIONAL_PROPERTIES, |out| {
            varint_field(out, 2, i64::from(*allowed));
        }),
        Some(inner) => message(out, number::schema::ADDITIONAL_PROPERTIES, |out| {
            message(out, 1, |out| schema(out, inner));
        }),
        None => {}
    }
    if let Some(kind) = map.get("type").and_then(Value::as_str) {
        message(out, number::schema::TYPE, |out| bytes_field(out, 1, kind.as_bytes()));
    }
    if let Some(items) = map.get("items") {
        message(out, number::schema::ITEMS, |out| message(out, 1, |out| schema(out, items)));
    }
    if let Some(Value::Object(properties)) = map.get("properties") {
        message(out, number::schema::PROPERTIES, |out| {
            properties.iter().for_each(|(name, value)| named_schema(out, name, value));
        });
    }
    extensions(out, map);
}

/// Extensions travel as YAML text, of which JSON is a part.
fn extensions(out: &mut Vec<u8>, map: &Map<String, Value>) {
    for (name, value) in map.iter().filter(|(name, _)| name.starts_with("x-")) {
        message(out, number::schema::VENDOR_EXTENSION, |out| {
            bytes_field(out, 1, name.as_bytes());
            message(out, 2, |out| bytes_field(out, 2, format!("{value}\n").as_bytes()));
        });
    }
}
