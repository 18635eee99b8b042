//! The versions of a definition as upstream prints them in complaints: its internal types, every field of them, under
//! their own names.

use apimachinery::status::FieldError;
use serde_json::{Map, Value, json};

/// Fields of a schema in upstream's order: its name for each, ours, and what it prints when there is none.
const SCHEMA: [(&str, &str, Zero); 43] = [
    ("ID", "id", Zero::Text),
    ("Schema", "$schema", Zero::Text),
    ("Ref", "$ref", Zero::Null),
    ("Description", "description", Zero::Text),
    ("Type", "type", Zero::Text),
    ("Nullable", "nullable", Zero::False),
    ("Format", "format", Zero::Text),
    ("Title", "title", Zero::Text),
    ("Default", "default", Zero::Null),
    ("Maximum", "maximum", Zero::Null),
    ("ExclusiveMaximum", "exclusiveMaximum", Zero::False),
    ("Minimum", "minimum", Zero::Null),
    ("ExclusiveMinimum", "exclusiveMinimum", Zero::False),
    ("MaxLength", "maxLength", Zero::Null),
    ("MinLength", "minLength", Zero::Null),
    ("Pattern", "pattern", Zero::Text),
    ("MaxItems", "maxItems", Zero::Null),
    ("MinItems", "minItems", Zero::Null),
    ("UniqueItems", "uniqueItems", Zero::False),
    ("MultipleOf", "multipleOf", Zero::Null),
    ("Enum", "enum", Zero::Null),
    ("MaxProperties", "maxProperties", Zero::Null),
    ("MinProperties", "minProperties", Zero::Null),
    ("Required", "required", Zero::Null),
    ("Items", "items", Zero::Null),
    ("AllOf", "allOf", Zero::Null),
    ("OneOf", "oneOf", Zero::Null),
    ("AnyOf", "anyOf", Zero::Null),
    ("Not", "not", Zero::Null),
    ("Properties", "properties", Zero::Null),
    ("AdditionalProperties", "additionalProperties", Zero::Null),
    ("PatternProperties", "patternProperties", Zero::Null),
    ("Dependencies", "dependencies", Zero::Null),
    ("AdditionalItems", "additionalItems", Zero::Null),
    ("Definitions", "definitions", Zero::Null),
    ("ExternalDocs", "externalDocs", Zero::Null),
    ("Example", "example", Zero::Null),
    ("XPreserveUnknownFields", "x-kubernetes-preserve-unknown-fields", Zero::Null),
    ("XEmbeddedResource", "x-kubernetes-embedded-resource", Zero::False),
    ("XIntOrString", "x-kubernetes-int-or-string", Zero::False),
    ("XListMapKeys", "x-kubernetes-list-map-keys", Zero::Null),
    ("XListType", "x-kubernetes-list-type", Zero::Null),
    ("XMapType", "x-kubernetes-map-type", Zero::Null),
];

#[derive(Clone, Copy)]
enum Zero {
    Null,
    Text,
    False,
}

impl Zero {
    fn value(self) -> Value {
        match self {
            Self::Null => Value::Null,
            Self::Text => "".into(),
            Self::False => false.into(),
        }
    }
}

/// A complaint about the versions. Fields that are looked at elsewhere (`shared`) are not printed.
pub fn invalid(path: impl std::fmt::Display, versions: &Value, shared: &[&str], detail: &str) -> FieldError {
    let mut error = FieldError::invalid(path, true, detail);
    error.shown = match versions {
        Value::Array(versions) => {
            let printed: Vec<String> = versions.iter().map(|version| print_version(version, shared)).collect();
            format!("[{}]", printed.join(","))
        }
        _ => "null".to_owned(),
    };
    error
}

/// What is there instead of the items of a list, when it is no schema.
pub fn no_items(path: impl std::fmt::Display, detail: &str) -> FieldError {
    let mut error = FieldError::invalid(path, true, detail);
    error.shown = r#"{"Schema":null,"JSONSchemas":null}"#.to_owned();
    error
}

fn object(fields: impl IntoIterator<Item = (String, String)>) -> String {
    let members: Vec<String> = fields.into_iter().map(|(name, text)| format!("{}:{text}", json!(name))).collect();
    format!("{{{}}}", members.join(","))
}

fn field(name: &str, text: impl Into<String>) -> (String, String) {
    (name.to_owned(), text.into())
}

/// The value, or what upstream prints when there is none.
fn or(value: &Value, zero: Value) -> String {
    if value.is_null() { zero.to_string() } else { value.to_string() }
}

fn print_version(version: &Value, shared: &[&str]) -> String {
    let own = |name: &str| if shared.contains(&name) { &Value::Null } else { &version[name] };
    object([
        field("Name", or(&version["name"], "".into())),
        field("Served", or(&version["served"], false.into())),
        field("Storage", or(&version["storage"], false.into())),
        field("Deprecated", or(&version["deprecated"], false.into())),
        field("DeprecationWarning", or(&version["deprecationWarning"], Value::Null)),
        field("Schema", some(own("schema"), print_container)),
        field("Subresources", some(own("subresources"), print_subresources)),
        field("AdditionalPrinterColumns", list(own("additionalPrinterColumns"), print_column)),
        field(
            "SelectableFields",
            list(own("selectableFields"), |selectable| {
                object([field("JSONPath", or(&selectable["jsonPath"], "".into()))])
            }),
        ),
    ])
}

fn some(value: &Value, print: impl Fn(&Value) -> String) -> String {
    if value.is_null() { "null".to_owned() } else { print(value) }
}

fn list(value: &Value, print: impl Fn(&Value) -> String) -> String {
    match value {
        Value::Array(items) => format!("[{}]", items.iter().map(print).collect::<Vec<_>>().join(",")),
        _ => "null".to_owned(),
    }
}

fn map(entries: &Map<String, Value>, print: impl Fn(&Value) -> String) -> String {
    let mut names: Vec<&String> = entries.keys().collect();
    names.sort();
    object(names.into_iter().map(|name| (name.clone(), print(&entries[name]))))
}

fn print_container(container: &Value) -> String {
    object([field("OpenAPIV3Schema", some(&container["openAPIV3Schema"], print_schema))])
}

fn print_subresources(subresources: &Value) -> String {
    object([
        field("Status", some(&subresources["status"], |_| "{}".to_owned())),
        field(
            "Scale",
            some(&subresources["scale"], |scale| {
                object([
                    field("SpecReplicasPath", or(&scale["specReplicasPath"], "".into())),
                    field("StatusReplicasPath", or(&scale["statusReplicasPath"], "".into())),
                    field("LabelSelectorPath", or(&scale["labelSelectorPath"], Value::Null)),
                ])
            }),
        ),
    ])
}

fn print_column(column: &Value) -> String {
    object([
        field("Name", or(&column["name"], "".into())),
        field("Type", or(&column["type"], "".into())),
        field("Format", or(&column["format"], "".into())),
        field("Description", or(&column["description"], "".into())),
        field("Priority", or(&column["priority"], 0.into())),
        field("JSONPath", or(&column["jsonPath"], "".into())),
    ])
}

fn print_schema(schema: &Value) -> String {
    let known = SCHEMA.iter().map(|(name, own, zero)| field(name, print_member(own, &schema[*own], *zero)));
    let rules = list(&schema["x-kubernetes-validations"], print_rule);
    object(known.chain([field("XValidations", rules)]))
}

/// A rule of a schema.
pub fn print_rule(rule: &Value) -> String {
    object([
        field("Rule", or(&rule["rule"], "".into())),
        field("Message", or(&rule["message"], "".into())),
        field("MessageExpression", or(&rule["messageExpression"], "".into())),
        field("Reason", or(&rule["reason"], Value::Null)),
        field("FieldPath", or(&rule["fieldPath"], "".into())),
        field("OptionalOldSelf", or(&rule["optionalOldSelf"], Value::Null)),
    ])
}

fn print_member(name: &str, value: &Value, zero: Zero) -> String {
    match (name, value) {
        ("items", Value::Object(_)) => object([field("Schema", print_schema(value)), field("JSONSchemas", "null")]),
        ("items", Value::Array(_)) => {
            object([field("Schema", "null"), field("JSONSchemas", list(value, print_schema))])
        }
        ("additionalProperties" | "additionalItems", Value::Object(_)) => {
            object([field("Allows", "true"), field("Schema", print_schema(value))])
        }
        ("additionalProperties" | "additionalItems", Value::Bool(allows)) => {
            object([field("Allows", allows.to_string()), field("Schema", "null")])
        }
        ("not", Value::Object(_)) => print_schema(value),
        ("allOf" | "oneOf" | "anyOf", Value::Array(_)) => list(value, print_schema),
        ("properties" | "patternProperties" | "definitions", Value::Object(entries)) => map(entries, print_schema),
        ("externalDocs", Value::Object(_)) => object([
            field("Description", or(&value["description"], "".into())),
            field("URL", or(&value["url"], "".into())),
        ]),
        _ => or(value, zero.value()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_printed_whole() {
        let versions = json!([{"name": "v1", "served": true, "storage": true, "schema": {"openAPIV3Schema": {"type": "object"}},
            "subresources": {"status": {}}}]);
        let error = invalid("spec.versions", &versions, &["schema"], "wrong");
        let expected = r#"spec.versions: Invalid value: [{"Name":"v1","Served":true,"Storage":true,"Deprecated":false,"DeprecationWarning":null,"Schema":null,"Subresources":{"Status":{},"Scale":null},"AdditionalPrinterColumns":null,"SelectableFields":null}]: wrong"#;
        assert_eq!(error.to_string(), expected);
        let whole = invalid("spec.versions", &versions, &[], "wrong").to_string();
        assert!(whole.contains(r#""Schema":{"OpenAPIV3Schema":{"ID":"","Schema":"","Ref":null,"Description":"","Type":"object","Nullable":false"#));
        assert!(whole.contains(r#""XMapType":null,"XValidations":null}}"#));
    }
}
