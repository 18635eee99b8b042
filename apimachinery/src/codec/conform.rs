//! Brings a parsed tree into the form that upstream's decoder into Go structs would leave: types checked, unknown
//! fields dropped and reported, nulls and empty optional fields gone, quantities and times canonical.

use std::fmt::Write;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;
use serde_json::{Map, Value};

use super::{DecodeError, Decoded, MAX_STRICT_ERRORS};
use crate::meta::Quantity;
use crate::schema::{Field, Object, Opaque, PropsOr, Scalar, Schema, Shape, builtin, go_names};

/// Checks and prunes a parsed value in place. Trees of custom resources are only pruned: their types are a matter of
/// validation.
pub fn conform(decoded: &mut Decoded, schema: &Schema) -> Result<(), DecodeError> {
    let mut walk =
        Walk { path: String::new(), go_path: Vec::new(), errors: std::mem::take(&mut decoded.strict_errors) };
    let result = walk.value(&mut decoded.value, schema, None);
    decoded.strict_errors = walk.errors;
    result
}

struct Walk<'s> {
    /// As field validation prints it: `spec.containers[0].name`.
    path: String,
    /// The struct and the field of every step on the way.
    go_path: Vec<(&'s Object, &'s Field)>,
    errors: Vec<String>,
}

impl<'s> Walk<'s> {
    fn value(&mut self, value: &mut Value, schema: &'s Schema, field: Option<&'s Field>) -> Result<(), DecodeError> {
        match (&schema.shape, &mut *value) {
            (Shape::Opaque(_), _) => Ok(()),
            (Shape::Object(object), Value::Object(map)) => self.object(map, object),
            (Shape::Map(inner), Value::Object(map)) => {
                for (key, value) in map.iter_mut() {
                    let length = self.push(key);
                    self.element(value, &inner.value)?;
                    self.path.truncate(length);
                }
                Ok(())
            }
            (Shape::List(list), Value::Array(items)) => {
                for (index, item) in items.iter_mut().enumerate() {
                    let length = self.path.len();
                    let _ = write!(self.path, "[{index}]");
                    self.element(item, &list.item)?;
                    self.path.truncate(length);
                }
                Ok(())
            }
            _ if schema.custom => Ok(()),
            // A list of bytes or a null inside a list is fine for Go; it becomes the type's zero value.
            (Shape::PropsOr(kind), _) => self.props_or(value, *kind),
            (Shape::Scalar(scalar), _) => self.scalar(value, *scalar, field),
            _ => Err(self.mismatch(value, schema, field)),
        }
    }

    fn push(&mut self, name: &str) -> usize {
        let length = self.path.len();
        if length > 0 {
            self.path.push('.');
        }
        self.path.push_str(name);
        length
    }

    /// A list's item or a map's value, where Go turns null into the type's zero value.
    fn element(&mut self, value: &mut Value, schema: &'s Schema) -> Result<(), DecodeError> {
        if value.is_null() && !schema.custom {
            *value = zero(schema);
            return Ok(());
        }
        self.value(value, schema, None)
    }

    fn object(&mut self, map: &mut Map<String, Value>, object: &'s Object) -> Result<(), DecodeError> {
        let mut drop: Vec<String> = Vec::new();
        for (key, value) in map.iter_mut() {
            let Some(field) = object.field(key) else {
                if !object.preserve_unknown {
                    self.unknown(key);
                    drop.push(key.clone());
                }
                continue;
            };
            if value.is_null() && !field.schema.custom {
                drop.push(key.clone());
                continue;
            }
            let length = self.push(key);
            self.go_path.push((object, field));
            self.value(value, &field.schema, Some(field))?;
            self.go_path.pop();
            self.path.truncate(length);
            if is_omitted(field, value) {
                drop.push(key.clone());
            }
        }
        for key in drop {
            map.remove(&key);
        }
        Ok(())
    }

    fn unknown(&mut self, key: &str) {
        if self.errors.len() < MAX_STRICT_ERRORS {
            let length = self.push(key);
            self.errors.push(format!("unknown field {:?}", self.path));
            self.path.truncate(length);
        }
    }

    fn scalar(&self, value: &mut Value, scalar: Scalar, field: Option<&Field>) -> Result<(), DecodeError> {
        let fits = match (scalar, &*value) {
            (Scalar::String | Scalar::Duration, Value::String(_)) | (Scalar::Bool, Value::Bool(_)) => true,
            (Scalar::Int32 | Scalar::IntOrString, Value::Number(n)) => {
                n.as_i64().is_some_and(|n| i32::try_from(n).is_ok())
            }
            (Scalar::Int64, Value::Number(n)) => n.is_i64(),
            (Scalar::Double, Value::Number(_)) => true,
            (Scalar::IntOrString, Value::String(_)) => true,
            (Scalar::Bytes, Value::String(s)) => return bytes(s),
            (Scalar::Time, Value::String(s)) => return time(s, false).map(|t| replace(value, t)),
            (Scalar::MicroTime, Value::String(s)) => return time(s, true).map(|t| replace(value, t)),
            (Scalar::Quantity, _) => return quantity(value),
            _ => false,
        };
        if fits {
            return Ok(());
        }
        let named = match field {
            Some(field) => field.go_type.as_deref().map(str::to_owned),
            None => self.item_type(),
        };
        let expected = named.unwrap_or_else(|| {
            let plain = match scalar {
                Scalar::Time | Scalar::MicroTime | Scalar::Duration => "string",
                Scalar::IntOrString => "int32",
                _ => scalar_name(scalar),
            };
            plain.to_owned()
        });
        let number = matches!(scalar, Scalar::Int32 | Scalar::Int64 | Scalar::IntOrString);
        Err(self.wrong(describe(value, number), expected))
    }

    fn props_or(&mut self, value: &mut Value, kind: PropsOr) -> Result<(), DecodeError> {
        let Some(props) = builtin().named(PROPS) else { return Ok(()) };
        match (kind, &mut *value) {
            (_, Value::Object(_)) => self.value(value, props, None),
            (PropsOr::Array, Value::Array(items)) => {
                for (index, item) in items.iter_mut().enumerate() {
                    let length = self.path.len();
                    let _ = write!(self.path, "[{index}]");
                    self.element(item, props)?;
                    self.path.truncate(length);
                }
                Ok(())
            }
            (PropsOr::Bool, Value::Bool(_)) => Ok(()),
            (PropsOr::Strings, Value::Array(items)) if items.iter().all(Value::is_string) => Ok(()),
            (PropsOr::Bool, _) => Err(DecodeError::ValueType {
                value: describe(value, false),
                expected: "v1.JSONSchemaPropsOrBool".into(),
            }),
            (_, _) => {
                Err(DecodeError::ValueType { value: describe(value, false), expected: "v1.JSONSchemaProps".into() })
            }
        }
    }

    fn mismatch(&self, value: &Value, schema: &Schema, field: Option<&Field>) -> DecodeError {
        let items = || field.and_then(|_| self.item_type()).map(|item| format!("[]{item}"));
        let named = field.and_then(|f| f.go_type.as_deref()).map(str::to_owned).or_else(items);
        self.wrong(describe(value, false), named.unwrap_or_else(|| go_type(schema)))
    }

    /// Go's name for the items of the list that is being read, where they have one.
    fn item_type(&self) -> Option<String> {
        self.go_path.last().and_then(|(object, field)| go_names::item(object, field))
    }

    fn wrong(&self, value: String, expected: String) -> DecodeError {
        let Some((holder, _)) = self.go_path.last() else { return DecodeError::ValueType { value, expected } };
        let mut path: Vec<&str> = Vec::new();
        for (object, field) in &self.go_path {
            path.extend(go_names::embedded(object, field));
            path.push(&field.name);
        }
        DecodeError::FieldType {
            value,
            holder: go_names::short(&holder.name).to_owned(),
            path: path.join("."),
            expected,
        }
    }
}

pub(super) const PROPS: &str = "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.JSONSchemaProps";

fn replace(value: &mut Value, text: String) {
    *value = Value::String(text);
}

fn bytes(text: &str) -> Result<(), DecodeError> {
    // Checks without keeping the decoded bytes around.
    let position = |error| match error {
        // Go complains about what follows the padding, not about the padding.
        base64::DecodeError::InvalidByte(at, b'=') if at % 4 > 1 && text[at..].starts_with(&"=="[at % 4 - 2..]) => {
            at / 4 * 4 + 4
        }
        base64::DecodeError::InvalidByte(at, _) | base64::DecodeError::InvalidLastSymbol(at, _) => at,
        // Go names the group of four that is incomplete.
        _ => text.len() / 4 * 4,
    };
    STANDARD.decode(text).map(drop).map_err(|e| DecodeError::Base64(position(e)))
}

fn time(text: &str, micro: bool) -> Result<String, DecodeError> {
    Ok(format_time(super::time::parse(text, micro).map_err(DecodeError::Time)?, micro))
}

/// As upstream prints `Time` and `MicroTime`.
pub(super) fn format_time(time: Timestamp, micro: bool) -> String {
    let format = if micro { "%Y-%m-%dT%H:%M:%S%.6fZ" } else { "%Y-%m-%dT%H:%M:%SZ" };
    time.strftime(format).to_string()
}

/// Go's duration notation in nanoseconds.
pub(super) fn duration_nanos(text: &str) -> Option<i64> {
    let (negative, text) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    if text == "0" {
        return Some(0);
    }
    let (mut total, mut rest) = (0_f64, text);
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let number: f64 = rest[..digits].parse().ok()?;
        rest = &rest[digits..];
        let unit = rest.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(rest.len());
        let scale = match &rest[..unit] {
            "ns" => 1.0,
            "us" | "µs" | "μs" => 1e3,
            "ms" => 1e6,
            "s" => 1e9,
            "m" => 60e9,
            "h" => 3600e9,
            _ => return None,
        };
        total += number * scale;
        rest = &rest[unit..];
    }
    (total.is_finite() && !text.is_empty()).then_some(if negative { -total as i64 } else { total as i64 })
}

/// The reverse, as Go prints it (`1h2m3.5s`, `100ms`).
pub(super) fn format_duration(nanos: i64) -> String {
    let sign = if nanos < 0 { "-" } else { "" };
    let n = nanos.unsigned_abs();
    let trimmed = |value: u64, unit: u64| {
        let fraction = format!("{:0width$}", value % unit, width = unit.ilog10() as usize);
        let fraction = fraction.trim_end_matches('0');
        if unit == 1 || fraction.is_empty() {
            (value / unit).to_string()
        } else {
            format!("{}.{fraction}", value / unit)
        }
    };
    match n {
        0 => "0s".into(),
        1..1_000 => format!("{sign}{n}ns"),
        1_000..1_000_000 => format!("{sign}{}µs", trimmed(n, 1_000)),
        1_000_000..1_000_000_000 => format!("{sign}{}ms", trimmed(n, 1_000_000)),
        _ => {
            let minutes = n / 60_000_000_000;
            let seconds = trimmed(n % 60_000_000_000, 1_000_000_000);
            match (minutes / 60, minutes % 60) {
                (0, 0) => format!("{sign}{seconds}s"),
                (0, m) => format!("{sign}{m}m{seconds}s"),
                (h, m) => format!("{sign}{h}h{m}m{seconds}s"),
            }
        }
    }
}

fn quantity(value: &mut Value) -> Result<(), DecodeError> {
    let text = match &*value {
        Value::String(s) => s.clone(),
        other => other.to_string(),
    };
    let quantity: Quantity = text.trim().parse().map_err(DecodeError::Quantity)?;
    let canonical = quantity.to_string();
    if value.as_str() != Some(&canonical) {
        *value = Value::String(canonical);
    }
    Ok(())
}

fn describe(value: &Value, with_number: bool) -> String {
    match value {
        Value::Null => "null".into(),
        Value::Bool(_) => "bool".into(),
        Value::Number(n) if with_number => format!("number {n}"),
        Value::Number(_) => "number".into(),
        Value::String(_) => "string".into(),
        Value::Array(_) => "array".into(),
        Value::Object(_) => "object".into(),
    }
}

fn scalar_name(scalar: Scalar) -> &'static str {
    match scalar {
        Scalar::String => "string",
        Scalar::Int32 => "int32",
        Scalar::Int64 => "int64",
        Scalar::Bool => "bool",
        Scalar::Double => "float64",
        Scalar::Bytes => "[]uint8",
        Scalar::Time => "v1.Time",
        Scalar::MicroTime => "v1.MicroTime",
        Scalar::Duration => "v1.Duration",
        Scalar::Quantity => "resource.Quantity",
        Scalar::IntOrString => "intstr.IntOrString",
    }
}

fn go_type(schema: &Schema) -> String {
    match &schema.shape {
        Shape::Opaque(_) | Shape::PropsOr(_) => "interface {}".into(),
        Shape::Scalar(scalar) => scalar_name(*scalar).into(),
        Shape::Object(object) => object.name.to_string(),
        Shape::Map(map) => format!("map[string]{}", go_type(&map.value)),
        Shape::List(list) => format!("[]{}", go_type(&list.item)),
    }
}

/// Whether Go would not print this value of this field.
pub(super) fn is_omitted(field: &Field, value: &Value) -> bool {
    if field.schema.custom || !field.omit_empty {
        return false;
    }
    match (&field.schema.shape, value) {
        (Shape::List(_), Value::Array(items)) => items.is_empty(),
        (Shape::Map(_), Value::Object(map)) => map.is_empty(),
        _ if field.pointer => false,
        (Shape::Scalar(Scalar::Int32 | Scalar::Int64), Value::Number(n)) => n.as_i64() == Some(0),
        (Shape::Scalar(Scalar::Double), Value::Number(n)) => n.as_f64() == Some(0.0),
        (Shape::Scalar(Scalar::Bool), Value::Bool(b)) => !b,
        (Shape::Scalar(Scalar::String | Scalar::Bytes), Value::String(s)) => s.is_empty(),
        (Shape::Object(_), Value::Object(map)) => field.omit_zero && map.is_empty(),
        _ => false,
    }
}

/// What Go prints for a value that was never set.
fn zero(schema: &Schema) -> Value {
    match &schema.shape {
        Shape::Opaque(_) | Shape::PropsOr(_) | Shape::List(_) | Shape::Map(_) => Value::Null,
        Shape::Object(_) => Value::Object(Map::new()),
        Shape::Scalar(scalar) => match scalar {
            Scalar::String => Value::from(""),
            Scalar::Int32 | Scalar::Int64 | Scalar::Double | Scalar::IntOrString => Value::from(0),
            Scalar::Bool => Value::Bool(false),
            Scalar::Bytes | Scalar::Time | Scalar::MicroTime => Value::Null,
            Scalar::Duration => Value::from("0s"),
            Scalar::Quantity => Value::from("0"),
        },
    }
}

/// Adds what upstream prints even when nobody set it: required fields (`name: ""`, `containers: null`) and structs
/// (`resources: {}`, `status: {}`). Call it on objects of built-in kinds after defaulting, before they are stored, so
/// that clients see the same document from either server. Does nothing for custom resources.
pub fn complete(value: &mut Value, schema: &Schema) {
    if schema.custom {
        return;
    }
    match (&schema.shape, value) {
        (Shape::Object(object), Value::Object(map)) => {
            for field in object.fields() {
                if !map.contains_key(&*field.name) && is_always_printed(field) {
                    let value = if field.pointer { Value::Null } else { zero(&field.schema) };
                    map.insert(field.name.to_string(), value);
                }
                if let Some(value) = map.get_mut(&*field.name) {
                    complete(value, &field.schema);
                }
            }
        }
        (Shape::Map(inner), Value::Object(map)) => map.values_mut().for_each(|v| complete(v, &inner.value)),
        (Shape::List(list), Value::Array(items)) => items.iter_mut().for_each(|v| complete(v, &list.item)),
        _ => {}
    }
}

/// Lists and maps without content become null where they are always printed: the store's protobuf does not tell the
/// two apart, so upstream forgets which it was. Call it on what is about to be stored.
pub fn forget_emptiness(value: &mut Value, schema: &Schema) {
    if schema.custom {
        return;
    }
    match (&schema.shape, value) {
        (Shape::Object(object), Value::Object(map)) => {
            for (name, value) in map.iter_mut() {
                let Some(field) = object.field(name) else { continue };
                let is_empty = match (&field.schema.shape, &*value) {
                    (Shape::List(_), Value::Array(items)) => items.is_empty(),
                    (Shape::Map(_), Value::Object(entries)) => entries.is_empty(),
                    _ => false,
                };
                if is_empty {
                    *value = Value::Null;
                } else {
                    forget_emptiness(value, &field.schema);
                }
            }
        }
        (Shape::Map(inner), Value::Object(map)) => map.values_mut().for_each(|v| forget_emptiness(v, &inner.value)),
        (Shape::List(list), Value::Array(items)) => items.iter_mut().for_each(|v| forget_emptiness(v, &list.item)),
        _ => {}
    }
}

/// Whether `complete` would add nothing.
pub fn is_complete(value: &Value, schema: &Schema) -> bool {
    if schema.custom {
        return true;
    }
    match (&schema.shape, value) {
        (Shape::Object(object), Value::Object(map)) => {
            object.fields().iter().all(|field| match map.get(&*field.name) {
                Some(value) => is_complete(value, &field.schema),
                None => !is_always_printed(field),
            })
        }
        (Shape::Map(inner), Value::Object(map)) => map.values().all(|value| is_complete(value, &inner.value)),
        (Shape::List(list), Value::Array(items)) => items.iter().all(|item| is_complete(item, &list.item)),
        _ => true,
    }
}

fn is_always_printed(field: &Field) -> bool {
    if !field.omit_empty && !field.omit_zero {
        return true;
    }
    let is_struct = matches!(
        field.schema.shape,
        Shape::Object(_)
            | Shape::Opaque(Opaque::Raw)
            | Shape::Scalar(
                Scalar::Quantity | Scalar::IntOrString | Scalar::Time | Scalar::MicroTime | Scalar::Duration
            )
    );
    is_struct && !field.pointer && !field.omit_zero
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn completes_what_upstream_always_prints() {
        let schema = builtin().kind_of("apps", "v1", "Deployment").expect("known");
        let mut value =
            json!({"metadata": {"name": "a"}, "spec": {"template": {"spec": {"containers": [{"name": "c"}]}}}});
        complete(&mut value, schema);
        assert_eq!(
            value,
            json!({"metadata": {"name": "a"}, "spec": {"selector": null, "strategy": {}, "template": {"metadata": {},
                "spec": {"containers": [{"name": "c", "resources": {}}]}}}, "status": {}})
        );
    }

    #[test]
    fn base64_is_read_as_go_reads_it() {
        for (text, expected) in [("dGV4dA==", None), ("dGV4dA==x", Some(8)), ("cA==x", Some(4)), ("d=V4", Some(1))] {
            let found = bytes(text).err().map(|error| error.to_string());
            assert_eq!(found, expected.map(|at| format!("illegal base64 data at input byte {at}")), "{text}");
        }
    }

    #[test]
    fn emptiness_is_forgotten() {
        let schema = builtin().kind_of("rbac.authorization.k8s.io", "v1", "Role").expect("known");
        let mut value = json!({"metadata": {"name": "a"}, "rules": []});
        forget_emptiness(&mut value, schema);
        assert_eq!(value, json!({"metadata": {"name": "a"}, "rules": null}));
        let mut value = json!({"rules": [{"verbs": [], "resources": ["pods"]}]});
        forget_emptiness(&mut value, schema);
        assert_eq!(value, json!({"rules": [{"verbs": null, "resources": ["pods"]}]}));
    }

    #[test]
    fn custom_resources_keep_their_values() {
        let schema = Schema::from_custom_resource(&json!({"type": "object", "properties": {"spec": {"type": "object",
            "properties": {"a": {"type": "string"}, "free": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}}}}}));
        let schema = schema.expect("valid");
        let value =
            json!({"metadata": {"name": "x", "bad": 1}, "spec": {"a": 5, "b": 1, "free": {"z": null}}, "other": 1});
        let mut decoded = Decoded { value, strict_errors: Vec::new() };
        conform(&mut decoded, &schema).expect("pruning does not fail");
        assert_eq!(decoded.value, json!({"metadata": {"name": "x"}, "spec": {"a": 5, "free": {"z": null}}}));
        assert_eq!(decoded.strict_errors.len(), 3);
    }
}
