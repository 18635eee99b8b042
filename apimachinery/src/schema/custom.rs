//! From a CustomResourceDefinition's structural schema (`openAPIV3Schema`) to the model, and defaulting by it.

use serde_json::{Map as JsonMap, Value};

use super::{ANY, Field, List, ListKind, Map, Object, Scalar, Schema, SchemaRef, Shape, builtin, scalar};
use crate::meta::Name;

/// How deep a definition may nest; upstream's validation of structural schemas is stricter in practice.
const MAX_DEPTH: usize = 64;

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SchemaError {
    #[error("a schema must be an object")]
    NotAnObject,
    #[error("unknown type {0:?}")]
    UnknownType(String),
    #[error("a list of type map needs x-kubernetes-list-map-keys")]
    NoMapKeys,
    #[error("the schema nests deeper than {MAX_DEPTH} levels")]
    TooDeep,
}

impl Schema {
    /// The schema of a custom resource's objects: the given structural schema with `apiVersion`, `kind` and `metadata`.
    pub fn from_custom_resource(schema: &Value) -> Result<Self, SchemaError> {
        convert(schema, 0, true)
    }

    /// Any structural schema.
    pub fn from_openapi(schema: &Value) -> Result<Self, SchemaError> {
        convert(schema, 0, false)
    }
}

fn custom(shape: Shape) -> Schema {
    Schema { shape, nullable: false, custom: true }
}

fn convert(schema: &Value, depth: usize, embedded: bool) -> Result<Schema, SchemaError> {
    if depth > MAX_DEPTH {
        return Err(SchemaError::TooDeep);
    }
    let schema = schema.as_object().ok_or(SchemaError::NotAnObject)?;
    let flag = |name: &str| schema.get(name) == Some(&Value::Bool(true));
    let text = |name: &str| schema.get(name).and_then(Value::as_str).unwrap_or_default();
    let embedded = embedded || flag("x-kubernetes-embedded-resource");
    let kind = text("type");
    let is_scalar = |s| Ok(custom(Shape::Scalar(s)));
    let mut converted = match (kind, text("format")) {
        _ if flag("x-kubernetes-int-or-string") => is_scalar(Scalar::IntOrString),
        ("string", _) => is_scalar(Scalar::String),
        ("boolean", _) => is_scalar(Scalar::Bool),
        ("integer", "int32") => is_scalar(Scalar::Int32),
        ("integer", _) => is_scalar(Scalar::Int64),
        ("number", _) => is_scalar(Scalar::Double),
        ("array", _) => list(schema, depth),
        ("object", _) => object(schema, depth, embedded),
        ("", _) if embedded || schema.contains_key("properties") => object(schema, depth, embedded),
        ("", _) => Ok(custom(ANY.shape.clone())),
        (other, _) => Err(SchemaError::UnknownType(other.to_owned())),
    }?;
    converted.nullable = flag("nullable");
    Ok(converted)
}

fn list(schema: &JsonMap<String, Value>, depth: usize) -> Result<Schema, SchemaError> {
    let item = schema.get("items").map_or(Ok(ANY.clone()), |items| convert(items, depth + 1, false))?;
    let declared = schema.contains_key("x-kubernetes-list-type");
    let kind = match schema.get("x-kubernetes-list-type").and_then(Value::as_str) {
        Some("set") => ListKind::Set,
        Some("map") => {
            let keys = schema.get("x-kubernetes-list-map-keys").and_then(Value::as_array);
            let keys = keys.ok_or(SchemaError::NoMapKeys)?;
            ListKind::Map(keys.iter().filter_map(|k| k.as_str().map(|k| Name::Owned(k.to_owned()))).collect())
        }
        _ => ListKind::Atomic,
    };
    Ok(custom(Shape::List(List { item: item.into(), kind, declared, wrapped: false })))
}

fn object(schema: &JsonMap<String, Value>, depth: usize, embedded: bool) -> Result<Schema, SchemaError> {
    let atomic = schema.get("x-kubernetes-map-type").and_then(Value::as_str) == Some("atomic");
    let properties = schema.get("properties").and_then(Value::as_object);
    let preserve = schema.get("x-kubernetes-preserve-unknown-fields") == Some(&Value::Bool(true));
    if properties.is_none() && !embedded {
        match schema.get("additionalProperties") {
            Some(value @ Value::Object(_)) => {
                let value = convert(value, depth + 1, false)?.into();
                return Ok(custom(Shape::Map(Map { value, atomic })));
            }
            Some(Value::Bool(true)) => {
                return Ok(custom(Shape::Map(Map { value: SchemaRef::Static(&ANY), atomic })));
            }
            _ => {}
        }
    }
    let required: Vec<&str> =
        schema.get("required").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str).collect();
    let mut fields = Vec::new();
    for (name, property) in properties.into_iter().flatten() {
        if embedded && matches!(name.as_str(), "apiVersion" | "kind" | "metadata") {
            continue;
        }
        let mut field = Field::new(Name::Owned(name.clone()), convert(property, depth + 1, false)?.into());
        field.required = required.contains(&name.as_str());
        field.default = property.get("default").cloned().map(Box::new);
        fields.push(field);
    }
    if embedded {
        fields.push(Field::new("apiVersion".into(), SchemaRef::Static(scalar(Scalar::String))));
        fields.push(Field::new("kind".into(), SchemaRef::Static(scalar(Scalar::String))));
        let meta = builtin().named("io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta").unwrap_or(&ANY);
        fields.push(Field::new("metadata".into(), SchemaRef::Static(meta)));
    }
    let mut object = Object::new(Name::Borrowed(""), fields, atomic);
    object.preserve_unknown = preserve;
    Ok(custom(Shape::Object(object)))
}

/// Fills in defaults, outermost first, so that a default object gets its fields' defaults too.
pub(super) fn apply_defaults(schema: &Schema, value: &mut Value) {
    match (&schema.shape, value) {
        (Shape::Object(object), Value::Object(map)) => {
            for field in object.fields() {
                let null = map.get(&*field.name) == Some(&Value::Null) && !field.schema.nullable;
                if let Some(default) = &field.default
                    && (null || !map.contains_key(&*field.name))
                {
                    map.insert(field.name.to_string(), (**default).clone());
                }
                if let Some(value) = map.get_mut(&*field.name) {
                    apply_defaults(&field.schema, value);
                }
            }
        }
        (Shape::Map(inner), Value::Object(map)) => map.values_mut().for_each(|v| apply_defaults(&inner.value, v)),
        (Shape::List(list), Value::Array(items)) => items.iter_mut().for_each(|v| apply_defaults(&list.item, v)),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn defaults_reach_into_defaults() {
        let schema = Schema::from_custom_resource(&json!({"type": "object", "properties": {"spec": {"type": "object",
            "default": {}, "properties": {"n": {"type": "integer", "default": 3},
            "l": {"type": "array", "items": {"type": "object", "properties": {"a": {"type": "string", "default": "x"}}}}}}}}));
        let schema = schema.expect("valid");
        let mut value = json!({});
        schema.apply_defaults(&mut value);
        assert_eq!(value, json!({"spec": {"n": 3}}));
        let mut value = json!({"spec": {"n": null, "l": [{}]}});
        schema.apply_defaults(&mut value);
        assert_eq!(value, json!({"spec": {"n": 3, "l": [{"a": "x"}]}}));
        assert!(schema.child("metadata").and_then(|m| m.child("labels")).is_some());
    }

    #[test]
    fn refuses_endless_nesting() {
        let mut schema = json!({"type": "string"});
        for _ in 0..100 {
            schema = json!({"type": "array", "items": schema});
        }
        assert_eq!(Schema::from_openapi(&schema).err(), Some(SchemaError::TooDeep));
    }
}
