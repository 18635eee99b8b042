//! Trees to protobuf.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;
use serde_json::{Map, Value};

use super::wire::{BYTES, FIXED64, bytes_field, bytes_start, nested, tag, varint_field};
use super::{MAGIC, ProtoError};
use crate::codec::conform::PROPS;
use crate::schema::{Field, PropsOr, Scalar, Schema, Shape, builtin};

type Result<T = ()> = std::result::Result<T, ProtoError>;

/// The content encoding and the content type, both empty.
pub const ENVELOPE_END: &[u8] = &[3 << 3 | BYTES, 0, 4 << 3 | BYTES, 0];

pub fn envelope(api_version: &str, kind: &str, raw: &[u8]) -> Vec<u8> {
    let mut out = envelope_start(&type_meta(api_version, kind), raw.len());
    out.reserve(raw.len() + ENVELOPE_END.len());
    out.extend_from_slice(raw);
    out.extend_from_slice(ENVELOPE_END);
    out
}

pub fn type_meta(api_version: &str, kind: &str) -> Vec<u8> {
    let mut out = Vec::new();
    bytes_field(&mut out, 1, api_version.as_bytes());
    bytes_field(&mut out, 2, kind.as_bytes());
    out
}

/// What comes before a message of this length in its envelope.
pub fn envelope_start(type_meta: &[u8], length: usize) -> Vec<u8> {
    let mut out = MAGIC.to_vec();
    bytes_field(&mut out, 1, type_meta);
    bytes_start(&mut out, 2, length);
    out
}

pub fn message(schema: &Schema, value: &Value) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    body(&mut out, schema, value, "")?;
    Ok(out)
}

fn misfit(name: &str) -> ProtoError {
    ProtoError::Value(name.to_owned())
}

/// The content of a value that is a message.
pub(super) fn body(out: &mut Vec<u8>, schema: &Schema, value: &Value, name: &str) -> Result {
    match &schema.shape {
        Shape::Object(object) => match value {
            Value::Object(map) => {
                let fields: Vec<&Field> = object.wire_fields().filter(|f| map.contains_key(&*f.name)).collect();
                struct_fields(out, &fields, map, 0)
            }
            Value::Null => Ok(()),
            _ => Err(misfit(name)),
        },
        Shape::List(list) => {
            for item in value.as_array().into_iter().flatten() {
                single(out, 1, &list.item, item, name)?;
            }
            Ok(())
        }
        Shape::Opaque(_) => {
            if !value.is_null() {
                let raw = serde_json::to_vec(value).map_err(ProtoError::Json)?;
                bytes_field(out, 1, &raw);
            }
            Ok(())
        }
        Shape::PropsOr(kind) => props_or(out, *kind, value, name),
        Shape::Scalar(scalar) => scalar_message(out, *scalar, value, name),
        Shape::Map(_) => Err(misfit(name)),
    }
}

/// The given fields, in wire order; those of inlined structs (a longer path) are gathered into a nested message.
fn struct_fields(out: &mut Vec<u8>, fields: &[&Field], map: &Map<String, Value>, level: usize) -> Result {
    let mut rest = fields;
    while let Some(first) = rest.first() {
        let number = first.numbers[level];
        let is_inlined = |f: &&&Field| f.numbers[level] == number && f.numbers.get(level + 1).is_some_and(|n| *n > 0);
        let inlined = rest.iter().take_while(is_inlined).count();
        if inlined > 0 {
            nested(out, number, |out| struct_fields(out, &rest[..inlined], map, level + 1))?;
            rest = &rest[inlined..];
            continue;
        }
        let value = map.get(&*first.name).unwrap_or(&Value::Null);
        if !value.is_null() {
            field(out, number, &first.schema, value, &first.name)?;
        }
        rest = &rest[1..];
    }
    Ok(())
}

fn field(out: &mut Vec<u8>, number: u16, schema: &Schema, value: &Value, name: &str) -> Result {
    match &schema.shape {
        Shape::List(list) if !list.wrapped => {
            for item in value.as_array().ok_or_else(|| misfit(name))? {
                single(out, number, &list.item, item, name)?;
            }
            Ok(())
        }
        Shape::Map(map) => {
            for (key, value) in value.as_object().ok_or_else(|| misfit(name))? {
                nested(out, number, |out| {
                    bytes_field(out, 1, key.as_bytes());
                    single(out, 2, &map.value, value, name)
                })?;
            }
            Ok(())
        }
        _ => single(out, number, schema, value, name),
    }
}

fn single(out: &mut Vec<u8>, number: u16, schema: &Schema, value: &Value, name: &str) -> Result {
    match &schema.shape {
        Shape::Scalar(scalar) if !is_message(*scalar) => scalar_field(out, number, *scalar, value, name),
        _ => nested(out, number, |out| body(out, schema, value, name)),
    }
}

pub(super) fn is_message(scalar: Scalar) -> bool {
    use Scalar::{Duration, IntOrString, MicroTime, Quantity, Time};
    matches!(scalar, Time | MicroTime | Duration | Quantity | IntOrString)
}

pub(super) fn scalar_field(out: &mut Vec<u8>, number: u16, scalar: Scalar, value: &Value, name: &str) -> Result {
    match (scalar, value) {
        (Scalar::String, Value::String(s)) => bytes_field(out, number, s.as_bytes()),
        (Scalar::String | Scalar::Bytes, Value::Null) => bytes_field(out, number, b""),
        (Scalar::Int32 | Scalar::Int64, Value::Number(n)) => {
            varint_field(out, number, n.as_i64().ok_or_else(|| misfit(name))?);
        }
        (Scalar::Bool, Value::Bool(b)) => varint_field(out, number, i64::from(*b)),
        (Scalar::Double, Value::Number(n)) => {
            let bits = n.as_f64().ok_or_else(|| misfit(name))?.to_bits();
            tag(out, number, FIXED64);
            out.extend_from_slice(&bits.to_le_bytes());
        }
        (Scalar::Bytes, Value::String(s)) => {
            bytes_field(out, number, &STANDARD.decode(s).map_err(|_| misfit(name))?);
        }
        _ => return Err(misfit(name)),
    }
    Ok(())
}

fn scalar_message(out: &mut Vec<u8>, scalar: Scalar, value: &Value, name: &str) -> Result {
    match (scalar, value) {
        (_, Value::Null) => {}
        (Scalar::Time | Scalar::MicroTime, Value::String(s)) => {
            let time: Timestamp = s.parse().map_err(|_| misfit(name))?;
            // Truncates towards the past, so that the nanoseconds are never negative.
            let nanos = time.as_nanosecond().rem_euclid(1_000_000_000);
            let seconds = time.as_nanosecond().div_euclid(1_000_000_000);
            varint_field(out, 1, seconds as i64);
            let nanos = if scalar == Scalar::MicroTime { nanos / 1000 * 1000 } else { 0 };
            varint_field(out, 2, nanos as i64);
        }
        (Scalar::Quantity, Value::String(s)) => bytes_field(out, 1, s.as_bytes()),
        (Scalar::Quantity, Value::Number(n)) => bytes_field(out, 1, n.to_string().as_bytes()),
        (Scalar::IntOrString, Value::Number(n)) => {
            varint_field(out, 1, 0);
            varint_field(out, 2, n.as_i64().ok_or_else(|| misfit(name))?);
            bytes_field(out, 3, b"");
        }
        (Scalar::IntOrString, Value::String(s)) => {
            varint_field(out, 1, 1);
            varint_field(out, 2, 0);
            bytes_field(out, 3, s.as_bytes());
        }
        (Scalar::Duration, Value::String(s)) => {
            let nanos = crate::codec::conform::duration_nanos(s).ok_or_else(|| misfit(name))?;
            varint_field(out, 1, nanos);
        }
        _ => return Err(misfit(name)),
    }
    Ok(())
}

fn props_or(out: &mut Vec<u8>, kind: PropsOr, value: &Value, name: &str) -> Result {
    let props = builtin().named(PROPS).ok_or_else(|| misfit(name))?;
    match (kind, value) {
        (PropsOr::Bool, Value::Bool(b)) => varint_field(out, 1, i64::from(*b)),
        (PropsOr::Bool, Value::Object(_)) => {
            varint_field(out, 1, 1);
            single(out, 2, props, value, name)?;
        }
        (_, Value::Object(_)) => single(out, 1, props, value, name)?,
        (PropsOr::Array, Value::Array(items)) => {
            for item in items {
                single(out, 2, props, item, name)?;
            }
        }
        (PropsOr::Strings, Value::Array(items)) => {
            for item in items {
                bytes_field(out, 2, item.as_str().ok_or_else(|| misfit(name))?.as_bytes());
            }
        }
        (_, Value::Null) => {}
        _ => return Err(misfit(name)),
    }
    Ok(())
}
