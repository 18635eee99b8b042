//! Rules for the `openAPIV3Schema` of a custom resource definition: that it is structural (every value has one known
//! type, whatever else restricts it), that its extensions fit together, and that its defaults satisfy it.
//! <https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions/#specifying-a-structural-schema>

use std::collections::HashSet;

use apimachinery::status::FieldError;
use serde_json::Value;

use super::structural::{self, is_set};
use super::{Errors, Path, go_versions, schema_rules};
use crate::extensions::rules::field_path;
use crate::extensions::validation::Validator;
use crate::registry::object::ObjectExt;

const TYPES: [&str; 6] = ["array", "boolean", "integer", "number", "object", "string"];

/// Fields that upstream has no use for, with the name that the complaint has.
const UNSUPPORTED: [(&str, &str); 7] = [
    ("id", "id"),
    ("additionalItems", "additionalItems"),
    ("patternProperties", "patternProperties"),
    ("definitions", "definitions"),
    ("dependencies", "dependencies"),
    ("$ref", "$ref"),
    ("$schema", ""),
];

/// Fields at the root that a schema may not have when there is a status subresource.
const NOT_AT_ROOT: [&str; 16] = [
    "default",
    "enum",
    "maxProperties",
    "minProperties",
    "allOf",
    "oneOf",
    "anyOf",
    "not",
    "additionalProperties",
    "x-kubernetes-embedded-resource",
    "x-kubernetes-int-or-string",
    "x-kubernetes-list-map-keys",
    "x-kubernetes-list-type",
    "x-kubernetes-map-type",
    "nullable",
    "id",
];

/// What else in the object decides how strict the rules are.
#[derive(Clone, Copy, Default)]
pub struct Options {
    pub has_status: bool,
    /// An update does not demand of a schema what it already lacked.
    pub any_type: bool,
    pub any_structure: bool,
    pub any_set: bool,
    pub any_map_keys: bool,
    /// Rules may cost too much.
    pub any_cost: bool,
}

/// `path` is that of the schema's container.
pub fn schema(container: &Value, path: Path<'_>, options: Options, errors: &mut Errors) {
    let schema = &container["openAPIV3Schema"];
    if !schema.is_object() {
        return;
    }
    let path = path.field("openAPIV3Schema");
    if options.has_status {
        root_under_status(schema, path, errors);
    }
    if schema["nullable"] == true {
        errors.push(FieldError::forbidden(path.field("nullable"), "nullable cannot be true at the root"));
    }
    if !options.any_structure && is_convertible(schema) {
        let mut found = structural::check(schema, path);
        if found.is_empty() {
            defaults(schema, path, false, &mut found);
        }
        errors.append(&mut found);
    }
    let walk = Walk { options, forbid_defaults: None, in_metadata: false };
    let before = errors.len();
    node(schema, path, true, walk, errors);
    // What a wrong schema declares cannot be relied on.
    if errors.len() == before && is_convertible(schema) && structural::check(schema, path).is_empty() {
        schema_rules::check(schema, path, options.any_cost, errors);
    }
}

/// With a status subresource, the status is cut out of the schema: what is said at the root would be lost.
fn root_under_status(schema: &Value, path: Path<'_>, errors: &mut Errors) {
    let kind = schema.str_at(&["type"]);
    if !kind.is_empty() && kind != "object" {
        let detail =
            "only \"object\" is allowed as the type at the root of the schema if the status subresource is enabled";
        errors.push(FieldError::invalid(path.field("type"), kind, detail));
    } else if NOT_AT_ROOT.iter().any(|field| is_set(&schema[*field])) {
        let detail = "only [Description Type Format Title Maximum ExclusiveMaximum Minimum ExclusiveMinimum MaxLength MinLength Pattern MaxItems MinItems UniqueItems MultipleOf Required Items Properties ExternalDocs Example XPreserveUnknownFields XValidations] fields are allowed at the root of the schema if the status subresource is enabled";
        errors.push(FieldError::invalid(path, schema.clone(), detail));
    }
}

/// Whether the schema can be looked at as a structural one at all; what prevents it is complained about elsewhere.
pub fn is_convertible(schema: &Value) -> bool {
    let own = UNSUPPORTED.iter().all(|(field, _)| !is_set(&schema[*field]))
        && schema["x-kubernetes-preserve-unknown-fields"] != false
        && !schema["items"].is_array();
    own && children(schema).all(is_convertible)
}

/// All schemas directly within one.
pub fn children(schema: &Value) -> impl Iterator<Item = &Value> {
    let single = ["items", "additionalProperties", "not", "additionalItems"].into_iter().map(|field| &schema[field]);
    let lists = ["allOf", "anyOf", "oneOf", "items"].into_iter().flat_map(|field| schema.list_at(&[field]));
    let maps = ["properties", "patternProperties", "definitions"]
        .into_iter()
        .flat_map(|field| schema[field].as_object().into_iter().flat_map(|map| map.values()));
    single.chain(lists).chain(maps).filter(|child| child.is_object())
}

/// Whether anything in the schema is so.
pub fn has(schema: &Value, is: &impl Fn(&Value) -> bool) -> bool {
    is(schema) || children(schema).any(|child| has(child, is))
}

/// Whether the schema names a type that there is not.
pub fn has_unknown_type(schema: &Value) -> bool {
    let kind = schema.str_at(&["type"]);
    !kind.is_empty() && !TYPES.contains(&kind)
}

/// Every default must satisfy the schema that it is in, and have no fields that it does not know.
fn defaults(schema: &Value, path: Path<'_>, in_metadata: bool, errors: &mut Errors) {
    if let Some(value) = schema.get("default").filter(|value| !value.is_null()) {
        let path = path.field("default");
        if !in_metadata && !structural::is_pruned(value, schema) {
            errors.push(FieldError::invalid(path, value.clone(), "must not have unknown fields"));
        }
        match Validator::of_default(schema.clone()) {
            Ok(validator) => errors.extend(validator.validate_at(&path.to_string(), value)),
            Err(error) => errors.push(FieldError::invalid(path, value.clone(), error.to_string())),
        }
    }
    if schema["items"].is_object() {
        defaults(&schema["items"], path.field("items"), in_metadata, errors);
    }
    let embedded = schema["x-kubernetes-embedded-resource"] == true;
    let properties = path.field("properties");
    for (name, property) in schema["properties"].as_object().into_iter().flatten() {
        let in_metadata = in_metadata || embedded && matches!(name.as_str(), "metadata" | "apiVersion" | "kind");
        defaults(property, properties.key(name), in_metadata, errors);
    }
}

/// What is known on the way down.
#[derive(Clone, Copy)]
struct Walk {
    options: Options,
    /// Why defaults are forbidden.
    forbid_defaults: Option<&'static str>,
    in_metadata: bool,
}

fn node(schema: &Value, path: Path<'_>, is_root: bool, walk: Walk, errors: &mut Errors) {
    supported(schema, path, walk, errors);
    if schema["uniqueItems"] == true {
        let detail = "uniqueItems cannot be set to true since the runtime complexity becomes quadratic";
        errors.push(FieldError::forbidden(path.field("uniqueItems"), detail));
    }
    nodes_within(schema, path, is_root, walk, errors);
    if schema["x-kubernetes-preserve-unknown-fields"] == false {
        let field = path.field("x-kubernetes-preserve-unknown-fields");
        errors.push(FieldError::invalid(field, false, "must be true or undefined"));
    }
    map_type(schema, path, errors);
    list_type(schema, path, walk.options, errors);
    if schema["x-kubernetes-list-type"] == "map" {
        keyed_list(schema, path, errors);
    }
    if !walk.options.any_map_keys {
        list_items(schema, path, errors);
    }
    super::each(schema, "x-kubernetes-validations", path, errors, |inner, path, errors| {
        rule(inner, schema, path, errors);
    });
}

fn supported(schema: &Value, path: Path<'_>, walk: Walk, errors: &mut Errors) {
    let kind = schema.str_at(&["type"]);
    if !walk.options.any_type && has_unknown_type(schema) {
        errors.push(FieldError::not_supported(path.field("type"), kind, &TYPES));
    }
    if let Some(why) = walk.forbid_defaults.filter(|_| !schema["default"].is_null()) {
        errors.push(FieldError::forbidden(path.field("default"), format!("must not be set {why}")));
    }
    for (field, name) in UNSUPPORTED.iter().filter(|(field, name)| !name.is_empty() && is_set(&schema[*field])) {
        errors.push(FieldError::forbidden(path.field(field), format!("{name} is not supported")));
    }
    if kind == "null" {
        let detail = "type cannot be set to null, use nullable as an alternative";
        errors.push(FieldError::forbidden(path.field("type"), detail));
    }
    if !schema.list_at(&["items"]).is_empty() {
        errors.push(FieldError::forbidden(path.field("items"), "items must be a schema object and not an array"));
    }
    if walk.in_metadata && schema["x-kubernetes-embedded-resource"] == true {
        let field = path.field("x-kubernetes-embedded-resource");
        errors.push(FieldError::forbidden(field, "must not be used inside of resource meta"));
    }
}

fn nodes_within(schema: &Value, path: Path<'_>, is_root: bool, walk: Walk, errors: &mut Errors) {
    let additional = &schema["additionalProperties"];
    if additional.is_object() || additional.is_boolean() {
        let has_properties = schema["properties"].as_object().is_some_and(|map| !map.is_empty());
        if has_properties && *additional != true {
            let detail = "additionalProperties and properties are mutual exclusive";
            errors.push(FieldError::forbidden(path.field("additionalProperties"), detail));
        }
        let mut inner = walk;
        if walk.in_metadata {
            inner.forbid_defaults = Some("inside additionalProperties applying to object metadata");
        }
        if additional.is_object() {
            node(additional, path.field("additionalProperties"), false, inner, errors);
        }
    }
    let properties = path.field("properties");
    for (name, property) in schema["properties"].as_object().into_iter().flatten() {
        let mut inner = walk;
        let of_metadata = match name.as_str() {
            "metadata" => Some("in top-level metadata"),
            "kind" => Some("in top-level kind"),
            "apiVersion" => Some("in top-level apiVersion"),
            _ => None,
        };
        if of_metadata.is_some() && (is_root || schema["x-kubernetes-embedded-resource"] == true) {
            inner.in_metadata = true;
            if is_root {
                inner.forbid_defaults = of_metadata;
            }
        }
        node(property, properties.key(name), false, inner, errors);
    }
    for field in ["not", "items"] {
        if schema[field].is_object() {
            node(&schema[field], path.field(field), false, walk, errors);
        }
    }
    for field in ["allOf", "oneOf", "anyOf", "items"] {
        super::each(schema, field, path, errors, |inner, path, errors| node(inner, path, false, walk, errors));
    }
    let definitions = path.field("definitions");
    for (name, inner) in schema["definitions"].as_object().into_iter().flatten() {
        node(inner, definitions.key(name), false, walk, errors);
    }
}

fn map_type(schema: &Value, path: Path<'_>, errors: &mut Errors) {
    let Some(given) = schema["x-kubernetes-map-type"].as_str() else { return };
    wrong_type(schema, "object", "must be object if x-kubernetes-map-type is specified", path, errors);
    if !["atomic", "granular"].contains(&given) {
        let field = path.field("x-kubernetes-map-type");
        errors.push(FieldError::not_supported(field, given, &["atomic", "granular"]));
    }
}

/// Complains when the schema's type is another one; answers whether it did.
fn wrong_type(schema: &Value, wanted: &str, detail: &str, path: Path<'_>, errors: &mut Errors) -> bool {
    match schema.str_at(&["type"]) {
        "" => errors.push(FieldError::required(path.field("type"), detail)),
        kind if kind != wanted => errors.push(FieldError::invalid(path.field("type"), kind, detail)),
        _ => return false,
    }
    true
}

fn list_type(schema: &Value, path: Path<'_>, options: Options, errors: &mut Errors) {
    let given = schema["x-kubernetes-list-type"].as_str();
    let field = path.field("x-kubernetes-list-type");
    if let Some(given) = given {
        let detail = "must be array if x-kubernetes-list-type is specified";
        if !wrong_type(schema, "array", detail, path, errors) && given == "set" && !options.any_set {
            atomic_items(&schema["items"], path.field("items"), errors);
        }
        if !["atomic", "set", "map"].contains(&given) {
            errors.push(FieldError::not_supported(field, given, &["atomic", "set", "map"]));
        }
    }
    if !schema.list_at(&["x-kubernetes-list-map-keys"]).is_empty() {
        let detail = "must be map if x-kubernetes-list-map-keys is non-empty";
        match given {
            None => errors.push(FieldError::required(field, detail)),
            Some("map") => {}
            Some(other) => errors.push(FieldError::invalid(field, other, detail)),
        }
    }
}

/// What an item of a set is compared by must be all of it.
fn atomic_items(items: &Value, path: Path<'_>, errors: &mut Errors) {
    if let Some(field) = loose_field(items) {
        let detail = "must be atomic as item of a list with x-kubernetes-list-type=set";
        errors.push(FieldError::invalid(path.field(field), items["x-kubernetes-list-type"].clone(), detail));
    }
}

/// The extension by which the items of a set are not atomic.
pub fn loose_field(items: &Value) -> Option<&'static str> {
    let is_atomic = |field: &str, unless: bool| items[field].as_str().map_or(unless, |given| given == "atomic");
    match items.str_at(&["type"]) {
        "array" if !is_atomic("x-kubernetes-list-type", true) => Some("x-kubernetes-list-type"),
        "object" if !is_atomic("x-kubernetes-map-type", false) => Some("x-kubernetes-map-type"),
        _ => None,
    }
}

fn keyed_list(schema: &Value, path: Path<'_>, errors: &mut Errors) {
    let keys = schema.list_at(&["x-kubernetes-list-map-keys"]);
    let field = path.field("x-kubernetes-list-map-keys");
    if keys.is_empty() {
        let detail = "must not be empty if x-kubernetes-list-type is map";
        errors.push(FieldError::required(field, detail));
    }
    let items = &schema["items"];
    let items_path = path.field("items");
    if items.is_null() {
        let detail = "must have a schema if x-kubernetes-list-type is map";
        return errors.push(FieldError::required(items_path, detail));
    }
    if !items.is_object() {
        let detail = "must only have a single schema if x-kubernetes-list-type is map";
        return errors.push(go_versions::no_items(items_path, detail));
    }
    if items["type"] != "object" {
        let detail = "must be object if parent array's x-kubernetes-list-type is map";
        return errors.push(FieldError::invalid(items_path.field("type"), items.str_at(&["type"]), detail));
    }
    let properties = items_path.field("properties");
    let mut seen = HashSet::new();
    for key in keys.iter().filter_map(Value::as_str) {
        match items["properties"].get(key) {
            Some(property) if matches!(property.str_at(&["type"]), "array" | "object") => {
                let property = properties.key(key);
                let detail = "must be a scalar type if parent array's x-kubernetes-list-type is map";
                errors.push(FieldError::invalid(property.field("type"), items["type"].clone(), detail));
            }
            Some(_) => {}
            None => {
                let detail = "entries must all be names of item properties";
                errors.push(FieldError::invalid(field, keys.to_vec(), detail));
            }
        }
        if !seen.insert(key) {
            errors.push(FieldError::invalid(field, keys.to_vec(), "must not contain duplicate entries"));
        }
    }
}

/// Items of sets and maps are never null, keys of maps are always there.
pub fn list_items(schema: &Value, path: Path<'_>, errors: &mut Errors) {
    let kind = schema.str_at(&["x-kubernetes-list-type"]);
    let items = &schema["items"];
    if !items.is_object() || !matches!(kind, "set" | "map") {
        return;
    }
    let items_path = path.field("items");
    if items["nullable"] == true {
        let detail = format!("cannot be nullable when x-kubernetes-list-type is {kind}");
        errors.push(FieldError::forbidden(items_path.field("nullable"), detail));
    }
    if kind != "map" {
        return;
    }
    let properties = items_path.field("properties");
    for key in schema.list_at(&["x-kubernetes-list-map-keys"]).iter().filter_map(Value::as_str) {
        let Some(property) = items["properties"].get(key) else { continue };
        let path = properties.key(key);
        if !items.list_at(&["required"]).iter().any(|name| name == key) && property["default"].is_null() {
            let detail =
                "this property is in x-kubernetes-list-map-keys, so it must have a default or be a required property";
            errors.push(FieldError::required(path.field("default"), detail));
        }
        if property["nullable"] == true {
            let detail = "this property is in x-kubernetes-list-map-keys, so it cannot be nullable";
            errors.push(FieldError::forbidden(path.field("nullable"), detail));
        }
    }
}

/// A rule in the expression language. Whether it compiles is looked at once the whole schema is right.
fn rule(rule: &Value, schema: &Value, path: Path<'_>, errors: &mut Errors) {
    const REASONS: [&str; 4] =
        ["FieldValueDuplicate", "FieldValueForbidden", "FieldValueInvalid", "FieldValueRequired"];
    let (source, message) = (rule.str_at(&["rule"]).trim(), rule.str_at(&["message"]));
    let has_newlines = |text: &str| text.contains(['\n', '\r']);
    if source.is_empty() {
        errors.push(FieldError::required(path.field("rule"), "rule is not specified"));
    } else if !message.is_empty() && message.trim().is_empty() {
        errors.push(FieldError::invalid(path.field("message"), message, "must be non-empty if specified"));
    } else if has_newlines(message.trim()) {
        errors.push(FieldError::invalid(path.field("message"), message, "must not contain line breaks"));
    } else if has_newlines(source) && message.trim().is_empty() {
        let detail = "message must be specified if rule contains line breaks";
        errors.push(FieldError::required(path.field("message"), detail));
    }
    let expression = rule.str_at(&["messageExpression"]);
    if !expression.is_empty() && expression.trim().is_empty() {
        let detail = "messageExpression must be non-empty if specified";
        errors.push(FieldError::required(path.field("messageExpression"), detail));
    }
    super::one_of_given(rule, "reason", &REASONS, path, errors);
    let field_path = rule.str_at(&["fieldPath"]);
    if !field_path.is_empty() && field_path.trim().is_empty() {
        errors.push(FieldError::invalid(path.field("fieldPath"), field_path, "must be non-empty if specified"));
    }
    if has_newlines(field_path) {
        errors.push(FieldError::invalid(path.field("fieldPath"), field_path, "must not contain line breaks"));
    }
    if field_path::normalize(field_path, schema).is_err() {
        errors.push(FieldError::invalid(path.field("fieldPath"), field_path, "must be a valid path"));
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::tests::texts;
    use super::*;

    #[test]
    fn schemas_are_checked() {
        let cases = [
            (json!({"type": "integer", "default": 3, "maximum": 5}), vec![]),
            (json!({}), vec!["s.properties[a].type: Required value: must not be empty for specified object fields"]),
            (
                json!({"type": "integer", "default": "x"}),
                vec![r#"s.properties[a].default: Invalid value: "string":  in body must be of type integer: "string""#],
            ),
            (
                json!({"type": "integer", "default": 9, "maximum": 5}),
                vec!["s.properties[a].default: Invalid value: 9:  in body should be less than or equal to 5"],
            ),
            (
                json!({"type": "object", "properties": {"b": {"type": "string"}}, "default": {"c": 1}}),
                vec![r#"s.properties[a].default: Invalid value: {"c":1}: must not have unknown fields"#],
            ),
            (
                json!({"type": "array", "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["k"],
                    "items": {"type": "object", "properties": {"k": {"type": "string"}}}}),
                vec![
                    "s.properties[a].items.properties[k].default: Required value: this property is in x-kubernetes-list-map-keys, so it must have a default or be a required property",
                ],
            ),
            (json!({"type": "array"}), vec!["s.properties[a].items: Required value: must be specified"]),
        ];
        for (property, expected) in cases {
            let container = json!({"openAPIV3Schema": {"type": "object", "properties": {"a": property}}});
            let mut errors = Errors::new();
            schema(&container, Path::Root("x"), Options::default(), &mut errors);
            let found: Vec<String> =
                texts(&errors).into_iter().map(|text| text.replace("x.openAPIV3Schema", "s")).collect();
            assert_eq!(found, expected);
        }
    }

    #[test]
    fn a_status_leaves_the_root_little() {
        let container = json!({"openAPIV3Schema": {"type": "object", "allOf": [{"required": ["a"]}]}});
        let mut errors = Errors::new();
        schema(&container, Path::Root("x"), Options { has_status: true, ..Options::default() }, &mut errors);
        assert!(texts(&errors)[0].starts_with("x.openAPIV3Schema: Invalid value: "), "{errors:?}");
    }
}
