//! Prints objects in the order of their schema's fields, as Go prints structs, or as Go's internal types where
//! complaints show those. Only messages need it: the order of fields in answers is nobody's business.

use std::fmt::Write;

use serde_json::Value;

use super::internal;
use crate::schema::{Scalar, Schema, Shape};
use crate::status::{FieldError, FieldErrorKind};

/// Makes an error show its value in the order of the schema that its path leads to, from `root` on.
pub fn show_in_order(error: &mut FieldError, root: &Schema) {
    if error.value.is_null() && error.kind == FieldErrorKind::Invalid && !error.omitted && error.shown.is_empty() {
        error.shown = zero_at(root, &error.field).unwrap_or_default().into();
        return;
    }
    if !(error.value.is_object() || error.value.is_array()) {
        return;
    }
    // Upstream complains about the taints of nodes as if they were metadata.
    let taints = || at(root, &error.field.strip_prefix("metadata.taints").map(|rest| format!("spec.taints{rest}"))?);
    // Some complaints about a spec leave it out of their path.
    let in_spec = || at(root, &format!("spec.{}", error.field));
    if let Some(schema) = at(root, &error.field).or_else(taints).or_else(in_spec) {
        // Some complaints about an item name the list.
        let schema = if error.value.is_object() { schema.item().unwrap_or(schema) } else { schema };
        let mut text = String::new();
        print(&error.value, Some(schema), &mut text);
        error.shown = text;
    }
}

/// The schema at a path such as `spec.containers[0].env[3]`.
fn at<'s>(root: &'s Schema, path: &str) -> Option<&'s Schema> {
    path.split('.').try_fold(root, |schema, segment| {
        let (name, indices) =
            segment.split_once('[').map_or((segment, 0), |(name, rest)| (name, 1 + rest.matches('[').count()));
        let field = schema.child(name)?;
        (0..indices).try_fold(field, |schema, _| schema.item())
    })
}

/// How Go prints a field that is not there: a text without a pointer cannot be null.
fn zero_at(root: &Schema, path: &str) -> Option<&'static str> {
    let (holder, last) = path.rsplit_once('.').map_or((Some(root), path), |(parent, last)| (at(root, parent), last));
    let field = holder?.as_object()?.field(last).filter(|field| !field.pointer)?;
    match &field.schema.shape {
        Shape::Scalar(Scalar::String) => Some("\"\""),
        Shape::Scalar(Scalar::Int32 | Scalar::Int64) => Some("0"),
        Shape::Scalar(Scalar::Bool) => Some("false"),
        _ => None,
    }
}

pub(super) fn print(value: &Value, schema: Option<&Schema>, out: &mut String) {
    if value.is_object()
        && let Some(fields) = schema.and_then(internal::fields_of)
    {
        return internal::print_object(value, schema, fields, out);
    }
    match value {
        Value::Array(items) => {
            out.push('[');
            for (index, item) in items.iter().enumerate() {
                if index > 0 {
                    out.push(',');
                }
                print(item, schema.and_then(Schema::item), out);
            }
            out.push(']');
        }
        Value::Object(fields) => {
            let known: Vec<&str> = match schema.map(|schema| &schema.shape) {
                Some(Shape::Object(object)) => object.wire_fields().map(|field| &*field.name).collect(),
                _ => Vec::new(),
            };
            let others = fields.keys().map(String::as_str).filter(|name| !known.contains(name));
            let names = known.iter().copied().filter(|name| fields.contains_key(*name)).chain(others);
            out.push('{');
            for (index, name) in names.enumerate() {
                if index > 0 {
                    out.push(',');
                }
                // Writing to a string cannot fail.
                let _ = write!(out, "{}:", Value::from(name));
                print(&fields[name], schema.and_then(|schema| schema.child(name)), out);
            }
            out.push('}');
        }
        scalar => {
            let _ = write!(out, "{scalar}");
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::meta::GroupVersionKind;

    #[test]
    fn values_are_shown_as_go_orders_them() {
        let gvk = GroupVersionKind::new("apps", "v1", "Deployment");
        let schema = crate::schema::builtin().kind(&gvk).expect("a built-in kind");
        let selector = json!({"matchExpressions": [{"operator": "In", "key": "a"}], "matchLabels": {"b": "c"}});
        let mut error = FieldError::invalid("spec.selector", selector, "invalid label selector");
        show_in_order(&mut error, schema);
        let expected = r#"{"matchLabels":{"b":"c"},"matchExpressions":[{"key":"a","operator":"In"}]}"#;
        assert_eq!(error.shown, expected);
        let mut container = FieldError::invalid(
            "spec.template.spec.containers[0].ports[1]",
            json!({"protocol": "TCP", "name": "x"}),
            "",
        );
        show_in_order(&mut container, schema);
        let expected = r#"{"Name":"x","HostPort":0,"ContainerPort":0,"Protocol":"TCP","HostIP":""}"#;
        assert_eq!(container.shown, expected, "an internal type");
        for (path, expected) in [("spec.template.spec.hostname", "\"\""), ("spec.replicas", ""), ("spec.selector", "")]
        {
            let mut absent = FieldError::invalid(path, Value::Null, "");
            show_in_order(&mut absent, schema);
            assert_eq!(absent.shown, expected, "{path}");
        }
    }
}
