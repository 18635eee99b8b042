//! Prints values as upstream's hand-written rules see them. Upstream validates its internal types, which have no JSON
//! names: a complaint about a pod's spec shows every field under its Go name, absent ones as `null`, `0` or `""`.
//!
//! `internal.txt` lists those types, one a line: its name, then its fields in Go's order, each `Name=json:type`. The
//! JSON name is left out where it is the Go name with a small first letter. A type is `s` text, `i` number, `b`
//! boolean, `n` number or text, `q` quantity, `?` anything that may be null and needs no names, `L` a label selector,
//! a type of the table, `*` before one that may be null, `[` before the items of a list. A field `.` stands for the
//! metadata, whose own fields have JSON names and are printed among the others. A type with a small first letter stands
//! only inside others: by itself it is seen by declared rules, which look at what users write.

use std::fmt::Write;

use serde_json::Value;

use super::order;
use crate::schema::{Schema, Shape};

const TABLE: &str = include_str!("internal.txt");

/// The fields of the internal type that stands for this schema, if it is one of the table.
pub fn fields_of(schema: &Schema) -> Option<&'static str> {
    let Shape::Object(object) = &schema.shape else { return None };
    fields(object.name.strip_prefix("v1.")?)
}

fn fields(name: &str) -> Option<&'static str> {
    TABLE.lines().filter_map(|line| line.split_once(' ')).find(|(known, _)| *known == name).map(|(_, fields)| fields)
}

/// Prints an object whose internal type has these fields.
pub fn print_object(value: &Value, schema: Option<&Schema>, fields: &str, out: &mut String) {
    out.push('{');
    let start = out.len();
    for field in fields.split(' ') {
        if field == "." {
            print_metadata(&value["metadata"], schema, start, out);
            continue;
        }
        let Some((names, kind)) = field.split_once(':') else { continue };
        let (go, json) = match names.split_once('=') {
            Some((go, json)) => (go, json.to_owned()),
            None => (names, lower_first(names)),
        };
        separate(start, out);
        // Writing to a string cannot fail.
        let _ = write!(out, "\"{go}\":");
        print_field(&value[json.as_str()], schema.and_then(|schema| schema.child(&json)), kind, out);
    }
    out.push('}');
}

fn separate(start: usize, out: &mut String) {
    if out.len() > start {
        out.push(',');
    }
}

/// The fields of the metadata, without braces.
fn print_metadata(metadata: &Value, schema: Option<&Schema>, start: usize, out: &mut String) {
    let mut text = String::new();
    order::print(metadata, schema.and_then(|schema| schema.child("metadata")), &mut text);
    let inner = text.strip_prefix('{').and_then(|text| text.strip_suffix('}')).unwrap_or_default();
    if !inner.is_empty() {
        separate(start, out);
        out.push_str(inner);
    }
}

fn lower_first(name: &str) -> String {
    let mut letters = name.chars();
    letters.next().map(|first| first.to_lowercase().chain(letters).collect()).unwrap_or_default()
}

fn print_field(value: &Value, schema: Option<&Schema>, kind: &str, out: &mut String) {
    let absent = match kind {
        "s" => "\"\"",
        "i" | "n" => "0",
        "b" => "false",
        "q" => "\"0\"",
        "?" => "null",
        "L" => "{}",
        _ if kind.starts_with(['*', '[']) => "null",
        _ => return print_object(value, schema, fields(kind).unwrap_or_default(), out),
    };
    match (value, kind.get(..1), kind.get(1..)) {
        (Value::Null, ..) => out.push_str(absent),
        (value, Some("*"), Some(inner)) => print_field(value, schema, inner, out),
        (Value::Array(items), Some("["), Some(inner)) => {
            out.push('[');
            for (index, item) in items.iter().enumerate() {
                if index > 0 {
                    out.push(',');
                }
                print_field(item, schema.and_then(Schema::item), inner, out);
            }
            out.push(']');
        }
        (value, ..) => order::print(value, schema, out),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_table_names_only_types_that_it_has() {
        for line in TABLE.lines() {
            let (name, fields_of_it) = line.split_once(' ').expect("a name and fields");
            for field in fields_of_it.split(' ').filter(|field| *field != ".") {
                let (_, kind) = field.split_once(':').expect("a type");
                let inner = kind.trim_start_matches(['*', '[']);
                let known = matches!(inner, "s" | "i" | "b" | "n" | "q" | "?" | "L") || fields(inner).is_some();
                assert!(known, "{name}: {field}");
            }
        }
    }

    #[test]
    fn objects_are_printed_with_all_their_fields() {
        let cases = [
            ("RoleRef", json!({"kind": "Role", "name": "r"}), r#"{"APIGroup":"","Kind":"Role","Name":"r"}"#),
            (
                "PodDisruptionBudgetSpec",
                json!({"minAvailable": "50%", "selector": {"matchLabels": {"a": "b"}}}),
                r#"{"MinAvailable":"50%","Selector":{"matchLabels":{"a":"b"}},"MaxUnavailable":null,"UnhealthyPodEvictionPolicy":null}"#,
            ),
            (
                "PodFailurePolicy",
                json!({"rules": [{"action": "Ignore", "onPodConditions": [{"type": "T", "status": "True"}]}]}),
                r#"{"Rules":[{"Action":"Ignore","OnExitCodes":null,"OnPodConditions":[{"Type":"T","Status":"True"}]}]}"#,
            ),
        ];
        for (name, value, expected) in cases {
            let mut text = String::new();
            print_object(&value, None, fields(name).expect("a type of the table"), &mut text);
            assert_eq!(text, expected);
        }
    }

    #[test]
    fn metadata_stands_among_the_fields() {
        let claim = json!({"metadata": {"name": "v"}, "spec": {}, "status": {"phase": "Pending"}});
        let mut text = String::new();
        print_object(&claim, None, fields("PersistentVolumeClaim").expect("a type of the table"), &mut text);
        assert!(text.starts_with(r#"{"name":"v","Spec":{"AccessModes":null,"Selector":null,"#), "{text}");
        assert!(text.contains(r#""Status":{"Phase":"Pending","AccessModes":null"#), "{text}");
    }
}
