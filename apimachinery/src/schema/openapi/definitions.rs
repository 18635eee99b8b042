//! The model as OpenAPI schemas.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use super::Describe;
use crate::meta::GroupVersion;
use crate::schema::builtin::Definition;
use crate::schema::{Field, ListKind, Opaque, PropsOr, Scalar, Schema, SchemaRef, Shape, builtin};

/// The two dialects, which differ in how they refer to definitions and in whether they know defaults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flavor {
    V2,
    V3,
}

impl Flavor {
    pub fn reference(self, name: &str) -> Value {
        let prefix = match self {
            Self::V2 => "#/definitions/",
            Self::V3 => "#/components/schemas/",
        };
        json!({ "$ref": format!("{prefix}{name}") })
    }
}

const META: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.";
const EXTENSIONS: &str = "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.";
pub const QUANTITY: &str = "io.k8s.apimachinery.pkg.api.resource.Quantity";
pub const INT_OR_STRING: &str = "io.k8s.apimachinery.pkg.util.intstr.IntOrString";
pub const RAW: &str = "io.k8s.apimachinery.pkg.runtime.RawExtension";

/// The schema of a definition that is no struct.
fn special(name: &str, flavor: Flavor) -> Option<Value> {
    let object = || json!({"type": "object"});
    Some(match name {
        QUANTITY if flavor == Flavor::V3 => json!({"oneOf": [{"type": "string"}, {"type": "number"}]}),
        QUANTITY => json!({"type": "string"}),
        INT_OR_STRING if flavor == Flavor::V3 => {
            json!({"format": "int-or-string", "oneOf": [{"type": "integer"}, {"type": "string"}]})
        }
        INT_OR_STRING => json!({"format": "int-or-string", "type": "string"}),
        RAW => object(),
        _ => match name.strip_prefix(META).or_else(|| name.strip_prefix(EXTENSIONS))? {
            "Time" | "MicroTime" => json!({"format": "date-time", "type": "string"}),
            "Duration" => json!({"type": "string"}),
            "FieldsV1" | "Patch" => object(),
            "JSON" | "JSONSchemaPropsOrArray" | "JSONSchemaPropsOrBool" | "JSONSchemaPropsOrStringArray" => json!({}),
            _ => return None,
        },
    })
}

/// The definitions of the kinds of these groups and versions.
pub fn kinds_of(versions: &[GroupVersion]) -> impl Iterator<Item = String> {
    let is_served =
        |(group, version, _): (&str, &str, &str)| versions.iter().any(|v| v.group == group && v.version == version);
    let with_kinds = builtin().definitions().iter().filter(move |definition| definition.kinds().any(is_served));
    with_kinds.map(|d| published(d.name))
}

pub fn published(name: &str) -> String {
    format!("io.k8s.{name}")
}

fn find(name: &str) -> Option<(u16, &'static Definition)> {
    let index = builtin().index_of(name.strip_prefix("io.k8s.")?)?;
    Some((index, &builtin().definitions()[usize::from(index)]))
}

/// The given definitions and all that they refer to.
pub fn closure(roots: impl IntoIterator<Item = String>) -> BTreeSet<String> {
    let mut done = BTreeSet::new();
    let mut todo: Vec<String> = roots.into_iter().collect();
    while let Some(name) = todo.pop() {
        if !done.insert(name.clone()) {
            continue;
        }
        let Some((index, _)) = find(&name) else { continue };
        for field in builtin().definition(index).as_object().into_iter().flat_map(|o| o.fields()) {
            let mut refer = |target: &str| todo.push(target.to_owned());
            visit(&field.schema, &mut refer);
        }
    }
    done
}

fn visit(schema: &SchemaRef, refer: &mut dyn FnMut(&str)) {
    match (name_of(schema), &schema.shape) {
        (Some(name), _) => refer(&name),
        (None, Shape::List(list)) => visit(&list.item, refer),
        (None, Shape::Map(map)) => visit(&map.value, refer),
        _ => {}
    }
}

/// The definition that a type refers to, if it is not spelled out in place.
fn name_of(schema: &SchemaRef) -> Option<String> {
    if let SchemaRef::Definition(index) = schema {
        return Some(published(builtin().definitions()[usize::from(*index)].name));
    }
    let meta = |name: &str| Some(format!("{META}{name}"));
    let extension = |name: &str| Some(format!("{EXTENSIONS}{name}"));
    match &schema.shape {
        // A reference whose definition is overridden in place (a granular claimRef).
        Shape::Object(object) => {
            let suffix = format!(".{}", object.name);
            builtin().definitions().iter().find(|d| d.name.ends_with(&suffix)).map(|d| published(d.name))
        }
        Shape::Scalar(Scalar::Time) => meta("Time"),
        Shape::Scalar(Scalar::MicroTime) => meta("MicroTime"),
        Shape::Scalar(Scalar::Duration) => meta("Duration"),
        Shape::Scalar(Scalar::Quantity) => Some(QUANTITY.to_owned()),
        Shape::Scalar(Scalar::IntOrString) => Some(INT_OR_STRING.to_owned()),
        Shape::Opaque(Opaque::Raw) => Some(RAW.to_owned()),
        Shape::Opaque(Opaque::Fields) => meta("FieldsV1"),
        Shape::Opaque(Opaque::Json) => extension("JSON"),
        Shape::PropsOr(PropsOr::Array) => extension("JSONSchemaPropsOrArray"),
        Shape::PropsOr(PropsOr::Bool) => extension("JSONSchemaPropsOrBool"),
        Shape::PropsOr(PropsOr::Strings) => extension("JSONSchemaPropsOrStringArray"),
        _ => None,
    }
}

/// The schema of a definition.
pub fn publish(name: &str, flavor: Flavor, describe: Describe<'_>) -> Value {
    let prose = describe(name).unwrap_or_default();
    let mut out = match special(name, flavor) {
        Some(Value::Object(special)) => special,
        _ => Map::new(),
    };
    if !prose.text.is_empty() {
        out.insert("description".into(), json!(prose.text));
    }
    let Some((index, definition)) = find(name) else { return Value::Object(out) };
    let schema = builtin().definition(index);
    let fields = schema.as_object().map_or(&[][..], |o| o.fields());
    let mut properties = Map::new();
    for (field, line) in fields.iter().zip(definition.lines.lines()) {
        properties.insert(field.name.to_string(), property(field, line, flavor, prose.fields.get(&*field.name)));
    }
    out.insert("type".into(), json!("object"));
    if !properties.is_empty() {
        out.insert("properties".into(), Value::Object(properties));
    }
    let stated = definition.attributes.split(' ').find_map(|attribute| attribute.strip_prefix("required="));
    let required: Vec<&str> = match stated {
        Some(names) => names.split(',').collect(),
        None => fields.iter().filter(|f| f.required).map(|f| &*f.name).collect(),
    };
    if !required.is_empty() {
        out.insert("required".into(), json!(required));
    }
    attributes(&mut out, definition, schema);
    Value::Object(out)
}

fn attributes(out: &mut Map<String, Value>, definition: &Definition, schema: &Schema) {
    let kinds: Vec<Value> = definition
        .kinds()
        .map(|(group, version, kind)| json!({"group": group, "kind": kind, "version": version}))
        .collect();
    if !kinds.is_empty() {
        out.insert("x-kubernetes-group-version-kind".into(), Value::Array(kinds));
    }
    if schema.as_object().is_some_and(|o| o.atomic) {
        out.insert("x-kubernetes-map-type".into(), json!("atomic"));
    }
    if let Some((_, unions)) = definition.attributes.split_once("unions=")
        && let Ok(unions) = serde_json::from_str(unions)
    {
        out.insert("x-kubernetes-unions".into(), unions);
    }
}

/// `line` is the field's in the table of facts.
fn property(field: &Field, line: &str, flavor: Flavor, prose: Option<&String>) -> Value {
    let mut out = type_of(&field.schema, flavor);
    let attributes = line.split(" d=").next().unwrap_or(line);
    let values = attributes.split(' ').find_map(|word| word.strip_prefix("e=")).map(|values| values.replace('~', " "));
    let values: Option<Vec<&str>> = values.as_ref().map(|values| values.split(',').collect());
    if let Some(values) = &values {
        put_enumeration(&mut out, values);
    }
    // Version 3 allows nothing beside a plain reference.
    if flavor == Flavor::V3
        && let Some(reference) = out.remove("$ref")
    {
        out.insert("allOf".into(), json!([{ "$ref": reference }]));
    }
    if let Some(prose) = prose {
        let listed = values.map(|values| {
            let lines: String = values.iter().map(|value| format!("\n - `{value:?}`")).collect();
            format!("\n\nPossible enum values:{lines}")
        });
        out.insert("description".into(), json!(format!("{prose}{}", listed.unwrap_or_default())));
    }
    if let (Flavor::V3, Some(default)) = (flavor, &field.default) {
        out.insert("default".into(), (**default).clone());
    }
    if let (SchemaRef::Owned(_), Shape::Object(_)) = (&field.schema, &field.schema.shape) {
        out.insert("x-kubernetes-map-type".into(), json!("granular"));
    }
    if let Some(key) = &field.merge_key {
        out.insert("x-kubernetes-patch-merge-key".into(), json!(key));
    }
    let strategies =
        [(field.patch.merge, "merge"), (field.patch.replace, "replace"), (field.patch.retain_keys, "retainKeys")];
    let strategies: Vec<&str> = strategies.iter().filter(|(set, _)| *set).map(|(_, name)| *name).collect();
    if !strategies.is_empty() {
        out.insert("x-kubernetes-patch-strategy".into(), json!(strategies.join(",")));
    }
    Value::Object(out)
}

/// The values are those of the items of a list, or of the members of a map.
fn put_enumeration(out: &mut Map<String, Value>, values: &[&str]) {
    for inner in ["items", "additionalProperties"] {
        if let Some(Value::Object(inner)) = out.get_mut(inner) {
            return put_enumeration(inner, values);
        }
    }
    out.insert("enum".into(), json!(values));
}

fn type_of(schema: &SchemaRef, flavor: Flavor) -> Map<String, Value> {
    if let Some(name) = name_of(schema) {
        return match flavor.reference(&name) {
            Value::Object(reference) => reference,
            _ => Map::new(),
        };
    }
    let value = match &schema.shape {
        Shape::Scalar(scalar) => match scalar {
            Scalar::Int32 => json!({"type": "integer", "format": "int32"}),
            Scalar::Int64 => json!({"type": "integer", "format": "int64"}),
            Scalar::Bool => json!({"type": "boolean"}),
            Scalar::Double => json!({"type": "number", "format": "double"}),
            Scalar::Bytes => json!({"type": "string", "format": "byte"}),
            _ => json!({"type": "string"}),
        },
        Shape::Map(map) => {
            let mut out = json!({"type": "object", "additionalProperties": type_of(&map.value, flavor)});
            if map.atomic {
                out["x-kubernetes-map-type"] = json!("atomic");
            }
            out
        }
        Shape::List(list) => {
            let mut out = json!({"type": "array", "items": type_of(&list.item, flavor)});
            match &list.kind {
                ListKind::Atomic if list.declared => out["x-kubernetes-list-type"] = json!("atomic"),
                ListKind::Atomic => {}
                ListKind::Set => out["x-kubernetes-list-type"] = json!("set"),
                ListKind::Map(keys) => {
                    out["x-kubernetes-list-type"] = json!("map");
                    out["x-kubernetes-list-map-keys"] = json!(keys);
                }
            }
            out
        }
        Shape::Opaque(_) | Shape::PropsOr(_) | Shape::Object(_) => json!({"type": "object"}),
    };
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}
