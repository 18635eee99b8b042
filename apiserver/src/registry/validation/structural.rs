//! Whether a schema is structural: types are given for every value, outside of what only restricts values.

use apimachinery::status::FieldError;
use serde_json::{Value, json};

use super::{Errors, Path};
use crate::registry::object::ObjectExt;

/// Where a schema is; its own words are complained with.
#[derive(Clone, Copy, PartialEq)]
enum Level {
    Root,
    Item,
    Field,
}

impl Level {
    fn without_type(self) -> &'static str {
        match self {
            Self::Root => "must not be empty at the root",
            Self::Item => "must not be empty for specified array items",
            Self::Field => "must not be empty for specified object fields",
        }
    }
}

/// Whether a field says more than nothing: upstream does not see `""`, `false` and empty lists.
pub fn is_set(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(flag) => *flag,
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Object(map) => !map.is_empty(),
        Value::Number(_) => true,
    }
}

/// All that is not structural, in the order of the messages.
pub fn check(schema: &Value, path: Path<'_>) -> Errors {
    let mut errors = Errors::new();
    invariants(schema, Level::Root, path, &mut errors);
    completeness(schema, Some(schema), path, path, &mut errors);
    errors.sort_by_cached_key(ToString::to_string);
    errors
}

fn invariants(schema: &Value, level: Level, path: Path<'_>, errors: &mut Errors) {
    let kind = schema.str_at(&["type"]);
    let is = |extension: &str| schema[extension] == true;
    if kind == "array" && !schema["items"].is_object() {
        errors.push(FieldError::required(path.field("items"), "must be specified"));
    }
    if schema["items"].is_object() {
        invariants(&schema["items"], Level::Item, path.field("items"), errors);
    }
    let properties = path.field("properties");
    for (name, property) in schema["properties"].as_object().into_iter().flatten() {
        invariants(property, Level::Field, properties.key(name), errors);
    }
    let additional = &schema["additionalProperties"];
    if level == Level::Root && !additional.is_null() {
        errors.push(FieldError::forbidden(path.field("additionalProperties"), "must not be used at the root"));
    }
    if additional.is_object() {
        invariants(additional, Level::Field, path.field("additionalProperties"), errors);
    }
    if is("x-kubernetes-int-or-string") {
        for other in ["x-kubernetes-preserve-unknown-fields", "x-kubernetes-embedded-resource"] {
            if is(other) {
                let detail = "must be false if x-kubernetes-int-or-string is true";
                errors.push(FieldError::invalid(path.field(other), true, detail));
            }
        }
    }
    values(schema, is_int_or_string(schema), path, errors);
    type_of(schema, level, path, errors);
    embedded(schema, level, path, errors);
}

fn type_of(schema: &Value, level: Level, path: Path<'_>, errors: &mut Errors) {
    let kind = schema.str_at(&["type"]);
    let is = |extension: &str| schema[extension] == true;
    if is("x-kubernetes-embedded-resource") && kind != "object" {
        let detail = "must be object if x-kubernetes-embedded-resource is true";
        errors.push(match kind {
            "" => FieldError::required(path.field("type"), detail),
            kind => FieldError::invalid(path.field("type"), kind, detail),
        });
    } else if kind.is_empty() && !is("x-kubernetes-int-or-string") && !is("x-kubernetes-preserve-unknown-fields") {
        errors.push(FieldError::required(path.field("type"), level.without_type()));
    }
    if level == Level::Root && !kind.is_empty() && kind != "object" {
        errors.push(FieldError::invalid(path.field("type"), kind, "must be object at the root"));
    }
}

/// What holds for whole resources: the root, and those embedded in it.
fn embedded(schema: &Value, level: Level, path: Path<'_>, errors: &mut Errors) {
    let is_embedded = schema["x-kubernetes-embedded-resource"] == true;
    if is_embedded && !schema["additionalProperties"].is_null() {
        let detail = "must not be used if x-kubernetes-embedded-resource is set";
        errors.push(FieldError::forbidden(path.field("additionalProperties"), detail));
    }
    let properties = path.field("properties");
    let is_resource = level == Level::Root || is_embedded;
    for name in ["kind", "apiVersion"] {
        let property = &schema["properties"][name];
        if is_resource && property.is_object() && property["type"] != "string" {
            let path = properties.key(name);
            errors.push(FieldError::invalid(path.field("type"), property.str_at(&["type"]), "must be string"));
        }
    }
    let metadata = &schema["properties"]["metadata"];
    if metadata.is_object() {
        let path = properties.key("metadata");
        if is_resource && metadata["type"] != "object" {
            errors.push(FieldError::invalid(path.field("type"), metadata.str_at(&["type"]), "must be object"));
        }
        if level == Level::Root && says_more_than_names(metadata) {
            let detail =
                "must not specify anything other than name and generateName, but metadata is implicitly specified";
            errors.push(FieldError::forbidden(path, detail));
        }
    }
    let is_open = schema["x-kubernetes-preserve-unknown-fields"] == true;
    if is_embedded && !is_open && !is_set(&schema["properties"]) {
        let detail =
            "must not be empty if x-kubernetes-embedded-resource is true without x-kubernetes-preserve-unknown-fields";
        errors.push(FieldError::required(properties, detail));
    }
}

/// Of `metadata`, only the names can be restricted.
fn says_more_than_names(metadata: &Value) -> bool {
    metadata.as_object().into_iter().flatten().any(|(field, value)| match field.as_str() {
        "type" | "default" => false,
        "properties" => {
            value.as_object().is_some_and(|map| map.keys().any(|name| name != "name" && name != "generateName"))
        }
        _ => is_set(value),
    })
}

/// Where the two types of an `int-or-string` may be spelled out.
#[derive(Clone, Copy, PartialEq)]
enum Spelled {
    Nowhere,
    AnyOf,
    FirstAllOf,
}

fn is_int_or_string(schema: &Value) -> Spelled {
    let both = json!([{"type": "integer"}, {"type": "string"}]);
    if schema["anyOf"] == both {
        Spelled::AnyOf
    } else if schema["allOf"][0]["anyOf"] == both {
        Spelled::FirstAllOf
    } else {
        Spelled::Nowhere
    }
}

/// What only restricts values: nothing in it may say what a value is.
fn values(schema: &Value, spelled: Spelled, path: Path<'_>, errors: &mut Errors) {
    if spelled != Spelled::AnyOf {
        super::each(schema, "anyOf", path, errors, |inner, path, errors| nested(inner, Spelled::Nowhere, path, errors));
    }
    let all = path.field("allOf");
    for (index, inner) in schema.list_at(&["allOf"]).iter().enumerate() {
        let first = spelled == Spelled::FirstAllOf && index == 0;
        nested(inner, if first { Spelled::AnyOf } else { Spelled::Nowhere }, all.index(index), errors);
    }
    super::each(schema, "oneOf", path, errors, |inner, path, errors| nested(inner, Spelled::Nowhere, path, errors));
    if schema["not"].is_object() {
        nested(&schema["not"], Spelled::Nowhere, path.field("not"), errors);
    }
    let pattern = schema.str_at(&["pattern"]);
    if let Err(error) = regex::Regex::new(pattern) {
        let detail = format!("must be a valid regular expression, but isn't: {error}");
        errors.push(FieldError::invalid(path.field("pattern"), pattern, detail));
    }
}

fn nested(schema: &Value, spelled: Spelled, path: Path<'_>, errors: &mut Errors) {
    const FORBIDDEN: [(&str, &str); 13] = [
        ("type", "empty"),
        ("additionalProperties", "undefined"),
        ("default", "undefined"),
        ("title", "empty"),
        ("description", "empty"),
        ("nullable", "false"),
        ("x-kubernetes-preserve-unknown-fields", "false"),
        ("x-kubernetes-embedded-resource", "false"),
        ("x-kubernetes-int-or-string", "false"),
        ("x-kubernetes-list-map-keys", "empty"),
        ("x-kubernetes-list-type", "undefined"),
        ("x-kubernetes-map-type", "undefined"),
        ("x-kubernetes-validations", "empty"),
    ];
    values(schema, spelled, path, errors);
    if schema["items"].is_object() {
        nested(&schema["items"], Spelled::Nowhere, path.field("items"), errors);
    }
    let properties = path.field("properties");
    for (name, property) in schema["properties"].as_object().into_iter().flatten() {
        nested(property, Spelled::Nowhere, properties.key(name), errors);
    }
    for (field, must) in FORBIDDEN {
        let is_there = if must == "undefined" { !schema[field].is_null() } else { is_set(&schema[field]) };
        if is_there {
            errors.push(FieldError::forbidden(path.field(field), format!("must be {must} to be structural")));
        }
    }
    if schema["properties"]["metadata"].is_object() {
        let detail = "must not be specified in a nested context";
        errors.push(FieldError::forbidden(properties.key("metadata"), detail));
    }
}

/// Whatever is restricted must be specified, too. `at` is the schema that specifies what `schema` restricts.
fn completeness(schema: &Value, at: Option<&Value>, path: Path<'_>, from: Path<'_>, errors: &mut Errors) {
    if schema["not"].is_object() {
        nested_completeness(&schema["not"], at, path, from.field("not"), errors);
    }
    for field in ["allOf", "anyOf", "oneOf"] {
        super::each(schema, field, from, errors, |inner, from, errors| {
            nested_completeness(inner, at, path, from, errors);
        });
    }
}

fn nested_completeness(schema: &Value, at: Option<&Value>, path: Path<'_>, from: Path<'_>, errors: &mut Errors) {
    let Some(at) = at else {
        return errors.push(FieldError::required(path, format!("because it is defined in {from}")));
    };
    completeness(schema, Some(at), path, from, errors);
    if schema["items"].is_object() {
        let items = at.get("items").filter(|items| items.is_object());
        nested_completeness(&schema["items"], items, path.field("items"), from.field("items"), errors);
    }
    let (properties, from) = (path.field("properties"), from.field("properties"));
    for (name, property) in schema["properties"].as_object().into_iter().flatten() {
        let specified = at["properties"].get(name);
        nested_completeness(property, specified, properties.key(name), from.key(name), errors);
    }
}

/// Whether pruning would leave the value as it is.
pub fn is_pruned(value: &Value, schema: &Value) -> bool {
    match value {
        Value::Array(items) => items.iter().all(|item| is_pruned(item, &schema["items"])),
        Value::Object(map) => map.iter().all(|(name, value)| {
            let additional = &schema["additionalProperties"];
            let is_resource = schema["x-kubernetes-embedded-resource"] == true;
            match schema["properties"].get(name) {
                Some(property) => is_pruned(value, property),
                None if additional.is_object() => is_pruned(value, additional),
                None => {
                    *additional == true
                        || schema["x-kubernetes-preserve-unknown-fields"] == true
                        || is_resource && matches!(name.as_str(), "kind" | "apiVersion" | "metadata")
                }
            }
        }),
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::texts;
    use super::*;

    #[test]
    fn what_restricts_must_not_specify() {
        let cases = [
            (json!({"type": "object"}), vec![]),
            (
                json!({"type": "object", "properties": {"a": {"x-kubernetes-int-or-string": true,
                    "anyOf": [{"type": "integer"}, {"type": "string"}]}}}),
                vec![],
            ),
            (
                json!({"type": "object", "anyOf": [{"type": "object"}]}),
                vec!["s.anyOf[0].type: Forbidden: must be empty to be structural"],
            ),
            (
                json!({"type": "object", "oneOf": [{"properties": {"a": {"minimum": 1}}}]}),
                vec!["s.properties[a]: Required value: because it is defined in s.oneOf[0].properties[a]"],
            ),
            (
                json!({"type": "object", "properties": {"metadata": {"type": "object", "properties": {"x": {"type": "string"}}}}}),
                vec![
                    "s.properties[metadata]: Forbidden: must not specify anything other than name and generateName, but metadata is implicitly specified",
                ],
            ),
            (
                json!({"type": "array", "items": {"type": "string"}}),
                vec![r#"s.type: Invalid value: "array": must be object at the root"#],
            ),
        ];
        for (schema, expected) in cases {
            assert_eq!(texts(&check(&schema, Path::Root("s"))), expected, "{schema}");
        }
    }
}
