//! Protobuf to trees, in the form that upstream would print as JSON.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;
use serde_json::{Map, Number, Value};

use super::wire::{MAX_DEPTH, Payload, Reader, expect_bytes, expect_varint, utf8};
use super::{MAGIC, ProtoError};
use crate::codec::conform::{PROPS, format_duration, format_time, is_omitted};
use crate::schema::{Field, List, Object, PropsOr, Scalar, Schema, Shape, builtin};

type Result<T> = std::result::Result<T, ProtoError>;

/// The envelope's fields.
#[derive(Default)]
pub struct Unknown<'a> {
    pub api_version: String,
    pub kind: String,
    pub raw: &'a [u8],
    pub content_encoding: String,
    pub content_type: String,
}

pub fn unknown(bytes: &[u8]) -> Result<Unknown<'_>> {
    let mut out = Unknown::default();
    let mut reader = Reader(bytes);
    while let Some((number, payload)) = reader.field()? {
        match number {
            1 => {
                let mut meta = Reader(expect_bytes(number, payload)?);
                while let Some((number, payload)) = meta.field()? {
                    match number {
                        1 => out.api_version = utf8(expect_bytes(number, payload)?)?,
                        2 => out.kind = utf8(expect_bytes(number, payload)?)?,
                        _ => {}
                    }
                }
            }
            2 => out.raw = expect_bytes(number, payload)?,
            3 => out.content_encoding = utf8(expect_bytes(number, payload)?)?,
            4 => out.content_type = utf8(expect_bytes(number, payload)?)?,
            _ => {}
        }
    }
    Ok(out)
}

/// The fields of a message whose schema is an object's.
pub fn message(bytes: &[u8], schema: &Schema, depth: usize) -> Result<Map<String, Value>> {
    let mut map = Map::new();
    if let Shape::Object(object) = &schema.shape {
        let fields: Vec<&Field> = object.wire_fields().collect();
        struct_fields(bytes, &fields, &mut map, 0, depth)?;
        drop_omitted(&mut map, object);
    }
    Ok(map)
}

/// What gogo writes for unset fields must not appear.
fn drop_omitted(map: &mut Map<String, Value>, object: &Object) {
    map.retain(|name, value| !value.is_null() && object.field(name).is_none_or(|field| !is_omitted(field, value)));
}

fn struct_fields(
    bytes: &[u8],
    fields: &[&Field],
    map: &mut Map<String, Value>,
    level: usize,
    depth: usize,
) -> Result<()> {
    if depth > MAX_DEPTH {
        return Err(ProtoError::TooDeep);
    }
    let mut reader = Reader(bytes);
    while let Some((number, payload)) = reader.field()? {
        let key = |f: &&Field| u32::from(f.numbers[level]);
        let start = fields.partition_point(|f| key(f) < number);
        let group = &fields[start..start + fields[start..].partition_point(|f| key(f) == number)];
        let Some(first) = group.first() else { continue };
        if first.numbers.get(level + 1).is_some_and(|n| *n > 0) {
            struct_fields(expect_bytes(number, payload)?, group, map, level + 1, depth + 1)?;
        } else {
            field(number, payload, first, map, depth)?;
        }
    }
    Ok(())
}

fn field(number: u32, payload: Payload<'_>, field: &Field, map: &mut Map<String, Value>, depth: usize) -> Result<()> {
    match &field.schema.shape {
        Shape::List(list) if !list.wrapped => {
            let slot = map.entry(&*field.name).or_insert_with(|| Value::Array(Vec::new()));
            if let Value::Array(items) = slot {
                repeated(number, payload, list, items, depth)?;
            }
        }
        Shape::Map(inner) => {
            let (key, value) = entry(expect_bytes(number, payload)?, &inner.value, depth)?;
            let slot = map.entry(&*field.name).or_insert_with(|| Value::Object(Map::new()));
            if let Value::Object(entries) = slot {
                entries.insert(key, value);
            }
        }
        _ => {
            let value = single(number, payload, &field.schema, depth)?;
            map.insert(field.name.to_string(), value);
        }
    }
    Ok(())
}

/// One more item, or several packed ones.
fn repeated(number: u32, payload: Payload<'_>, list: &List, items: &mut Vec<Value>, depth: usize) -> Result<()> {
    let is_varint = matches!(list.item.shape, Shape::Scalar(Scalar::Int32 | Scalar::Int64 | Scalar::Bool));
    if let (true, Payload::Bytes(packed)) = (is_varint, payload) {
        let mut reader = Reader(packed);
        while !reader.0.is_empty() {
            let n = Payload::Varint(reader.varint()?);
            items.push(single(number, n, &list.item, depth)?);
        }
        return Ok(());
    }
    items.push(single(number, payload, &list.item, depth)?);
    Ok(())
}

fn entry(bytes: &[u8], schema: &Schema, depth: usize) -> Result<(String, Value)> {
    let (mut key, mut value) = (String::new(), None);
    let mut reader = Reader(bytes);
    while let Some((number, payload)) = reader.field()? {
        match number {
            1 => key = utf8(expect_bytes(number, payload)?)?,
            2 => value = Some(single(number, payload, schema, depth + 1)?),
            _ => {}
        }
    }
    let value = match value {
        Some(value) => value,
        None if matches!(schema.shape, Shape::Scalar(Scalar::String | Scalar::Bytes)) => Value::String(String::new()),
        None => nested(&[], schema, depth + 1)?,
    };
    Ok((key, value))
}

fn single(number: u32, payload: Payload<'_>, schema: &Schema, depth: usize) -> Result<Value> {
    let Shape::Scalar(scalar) = &schema.shape else {
        return nested(expect_bytes(number, payload)?, schema, depth + 1);
    };
    Ok(match scalar {
        Scalar::String => Value::String(utf8(expect_bytes(number, payload)?)?),
        Scalar::Bytes => Value::String(STANDARD.encode(expect_bytes(number, payload)?)),
        Scalar::Int32 => Value::from(expect_varint(number, payload)? as i32),
        Scalar::Int64 => Value::from(expect_varint(number, payload)? as i64),
        Scalar::Bool => Value::Bool(expect_varint(number, payload)? != 0),
        Scalar::Double => match payload {
            Payload::Fixed64(bytes) => Number::from_f64(f64::from_le_bytes(bytes)).map_or(Value::Null, Value::Number),
            other => return Err(ProtoError::WireType(number, other.wire_type())),
        },
        _ => scalar_message(expect_bytes(number, payload)?, *scalar)?,
    })
}

/// A value that is a message of its own.
fn nested(bytes: &[u8], schema: &Schema, depth: usize) -> Result<Value> {
    if depth > MAX_DEPTH {
        return Err(ProtoError::TooDeep);
    }
    match &schema.shape {
        Shape::Object(_) => Ok(Value::Object(message(bytes, schema, depth)?)),
        Shape::List(list) => {
            let mut items = Vec::new();
            let mut reader = Reader(bytes);
            while let Some((number, payload)) = reader.field()? {
                if number == 1 {
                    repeated(number, payload, list, &mut items, depth)?;
                }
            }
            Ok(Value::Array(items))
        }
        Shape::Opaque(_) => raw(bytes, depth),
        Shape::PropsOr(kind) => props_or(bytes, *kind, depth),
        Shape::Scalar(scalar) => scalar_message(bytes, *scalar),
        Shape::Map(_) => Err(ProtoError::WireType(0, 2)),
    }
}

/// `RawExtension`, `FieldsV1` and `JSON`: field 1 holds JSON, or an enveloped object.
fn raw(bytes: &[u8], depth: usize) -> Result<Value> {
    let mut content: &[u8] = &[];
    let mut reader = Reader(bytes);
    while let Some((number, payload)) = reader.field()? {
        if number == 1 {
            content = expect_bytes(number, payload)?;
        }
    }
    if content.is_empty() {
        return Ok(Value::Null);
    }
    if content.starts_with(MAGIC) {
        return super::decode_enveloped(content, depth + 1);
    }
    serde_json::from_slice(content).map_err(ProtoError::Json)
}

fn props_or(bytes: &[u8], kind: PropsOr, depth: usize) -> Result<Value> {
    let Some(props) = builtin().named(PROPS) else { return Ok(Value::Null) };
    let (mut schema, mut items, mut allows) = (None, Vec::new(), false);
    let mut reader = Reader(bytes);
    while let Some((number, payload)) = reader.field()? {
        match (kind, number) {
            (PropsOr::Bool, 1) => allows = expect_varint(number, payload)? != 0,
            (PropsOr::Bool, 2) | (PropsOr::Array | PropsOr::Strings, 1) => {
                schema = Some(nested(expect_bytes(number, payload)?, props, depth + 1)?);
            }
            (PropsOr::Array, 2) => items.push(nested(expect_bytes(number, payload)?, props, depth + 1)?),
            (PropsOr::Strings, 2) => items.push(Value::String(utf8(expect_bytes(number, payload)?)?)),
            _ => {}
        }
    }
    Ok(match (schema, kind) {
        (Some(schema), _) => schema,
        (None, PropsOr::Bool) => Value::Bool(allows),
        (None, _) => Value::Array(items),
    })
}

fn scalar_message(bytes: &[u8], scalar: Scalar) -> Result<Value> {
    let (mut first, mut second, mut text) = (0, 0, String::new());
    let mut reader = Reader(bytes);
    while let Some((number, payload)) = reader.field()? {
        match (number, payload) {
            (1, Payload::Varint(n)) => first = n as i64,
            (2, Payload::Varint(n)) => second = n as i32,
            (1, Payload::Bytes(b)) if scalar == Scalar::Quantity => text = utf8(b)?,
            (3, Payload::Bytes(b)) => text = utf8(b)?,
            (1..=3, other) => return Err(ProtoError::WireType(number, other.wire_type())),
            _ => {}
        }
    }
    Ok(match scalar {
        // An unset time is an empty message.
        Scalar::Time | Scalar::MicroTime if bytes.is_empty() => Value::Null,
        Scalar::Time | Scalar::MicroTime => {
            let time =
                Timestamp::new(first, second.clamp(0, 999_999_999)).map_err(|_| ProtoError::Value("time".into()))?;
            Value::String(format_time(time, scalar == Scalar::MicroTime))
        }
        Scalar::Quantity => Value::String(if text.is_empty() { "0".into() } else { text }),
        Scalar::IntOrString if first == 1 => Value::String(text),
        Scalar::IntOrString => Value::from(second),
        Scalar::Duration => Value::String(format_duration(first)),
        _ => Value::Null,
    })
}
