//! The strategy of custom resources: everything that a kind of our own declares in code, read from its definition.

use std::collections::HashMap;
use std::sync::Arc;

use apimachinery::schema::Schema;
use apimachinery::status::{FieldError, FieldErrorKind, Result, Status};
use async_trait::async_trait;
use serde_json::{Value, json};

use super::conversion::Converter;
use super::json_path::JsonPath;
use super::rules::{self, Rules};
use super::validation::Validator;
use crate::registry::object::ObjectExt;
use crate::registry::strategy::{
    CustomScale, Cx, GENERIC_STATUS, Strategy, Subresource, keep, prepare_for_status_update,
};
use crate::registry::tables;

/// A printer column.
pub struct Printed {
    /// As a `Table` declares it.
    pub definition: Value,
    pub path: JsonPath,
}

/// What the versions of one definition say.
pub struct CustomResource {
    /// Of the storage version, which is the one that objects are in when they are checked.
    pub schema: Option<Arc<Schema>>,
    pub validator: Option<Arc<Validator>>,
    pub rules: Option<Rules>,
    pub has_status: bool,
    pub scale: Option<Arc<CustomScale>>,
    /// By `apiVersion`.
    pub columns: HashMap<String, Vec<Printed>>,
    pub converter: Option<Converter>,
    pub storage_version: String,
}

impl CustomResource {
    fn check(&self, cx: &Cx<'_>, object: &Value, old: Option<&Value>) -> Vec<FieldError> {
        let mut errors = match (&self.validator, old) {
            (Some(validator), Some(old)) => validator.validate_update(object, old),
            (Some(validator), None) => validator.validate(object),
            (None, _) => vec![],
        };
        if let Some(scale) = &self.scale {
            check_replicas(object, &scale.spec_replicas, &mut errors);
            check_replicas(object, &scale.status_replicas, &mut errors);
        }
        if let Some(rules) = &self.rules {
            if errors.iter().any(keeps_rules_from_being_asked) {
                errors.push(rules::not_checked());
                return errors;
            }
            let (complaints, let_pass) = rules.validate(object, old);
            errors.extend(complaints);
            let_pass.iter().for_each(|error| cx.warnings.add(&error.to_string()));
        }
        errors
    }

    fn fill(&self, object: &mut Value) {
        if let Some(schema) = &self.schema {
            schema.apply_defaults(object);
        }
    }
}

#[async_trait]
impl Strategy for CustomResource {
    fn default(&self, object: &mut Value) {
        self.fill(object);
    }

    fn prepare_for_create(&self, _cx: &Cx<'_>, object: &mut Value) {
        if self.has_status {
            object.remove_at(&["status"]);
        }
        object.metadata_mut().insert("generation".into(), 1.into());
    }

    fn validate_create(&self, cx: &Cx<'_>, object: &Value) -> Vec<FieldError> {
        self.check(cx, object, None)
    }

    fn prepare_for_update(&self, _cx: &Cx<'_>, object: &mut Value, old: &Value) {
        if self.has_status {
            keep(object, old, "status");
        }
        if content(object) != content(old) {
            let generation = old.i64_at(&["metadata", "generation"]).unwrap_or(0) + 1;
            object.metadata_mut().insert("generation".into(), generation.into());
        }
    }

    fn validate_update(&self, cx: &Cx<'_>, object: &Value, old: &Value) -> Vec<FieldError> {
        self.check(cx, object, Some(old))
    }

    fn allow_unconditional_update(&self) -> bool {
        false
    }

    fn to_storage(&self, _version: &str, obj: Value) -> Result<Value> {
        self.from_storage(&self.storage_version, obj)
    }

    fn from_storage(&self, version: &str, obj: Value) -> Result<Value> {
        let converted = self.all_from_storage(version, vec![obj])?;
        converted.into_iter().next().ok_or_else(|| Status::internal("a conversion lost its object"))
    }

    fn all_from_storage(&self, version: &str, objects: Vec<Value>) -> Result<Vec<Value>> {
        match &self.converter {
            Some(converter) => converter.convert(objects, version),
            None => Ok(objects),
        }
    }

    fn subresource(&self, name: &str) -> Option<Subresource> {
        match name {
            "status" if self.has_status => Some(Subresource::Update(&GENERIC_STATUS)),
            "scale" => self.scale.clone().map(Subresource::CustomScale),
            _ => None,
        }
    }

    fn reset_fields(&self) -> &'static [&'static [&'static str]] {
        if self.has_status { &[&["status"]] } else { &[] }
    }

    fn custom_columns(&self, api_version: &str) -> Option<Vec<Value>> {
        let mut columns = vec![json!({
            "name": "Name", "type": "string", "format": "name", "priority": 0,
            "description": "Name must be unique within a namespace.",
        })];
        columns.extend(self.columns.get(api_version).into_iter().flatten().map(|column| column.definition.clone()));
        Some(columns)
    }

    fn row(&self, object: &Value, now: jiff::Timestamp) -> Vec<Value> {
        let mut cells = vec![tables::name(object)];
        let columns = self.columns.get(object.api_version()).into_iter().flatten();
        cells.extend(columns.map(|column| cell(column, object, now)));
        cells
    }
}

/// Numbers of replicas that the scale subresource could not tell.
fn check_replicas(object: &Value, path: &[String], errors: &mut Vec<FieldError>) {
    let keys: Vec<&str> = path.iter().map(String::as_str).collect();
    let Some(value) = object.at(&keys) else { return };
    let field = format!(".{}", keys.join("."));
    let Some(number) = value.as_i64() else {
        let (shown, kind) = match value {
            Value::Null => ("<nil>".to_owned(), "<nil>"),
            Value::Bool(flag) => (flag.to_string(), "bool"),
            Value::Number(number) => (number.to_string(), "float64"),
            Value::String(text) => (text.clone(), "string"),
            Value::Array(_) => (value.to_string(), "[]interface {}"),
            Value::Object(_) => (value.to_string(), "map[string]interface {}"),
        };
        let detail = format!("{field} accessor error: {shown} is of the type {kind}, expected int64");
        return errors.push(FieldError::invalid(field, 0, detail));
    };
    if number < 0 {
        errors.push(FieldError::invalid(field, number, "should be a non-negative integer"));
    } else if number > i64::from(i32::MAX) {
        errors.push(FieldError::invalid(field, number, format!("should be less than or equal to {}", i32::MAX)));
    }
}

/// Rules rely on values being of the right types and sizes.
fn keeps_rules_from_being_asked(error: &FieldError) -> bool {
    use FieldErrorKind::{NotSupported, Required, TooLong, TooMany, TypeInvalid};
    matches!(error.kind, NotSupported | Required | TooLong | TooMany | TypeInvalid)
}

/// Everything but metadata and status.
fn content(object: &Value) -> Vec<(&String, &Value)> {
    let members = object.as_object().into_iter().flatten();
    members.filter(|(name, _)| !matches!(name.as_str(), "metadata" | "status" | "kind" | "apiVersion")).collect()
}

fn cell(column: &Printed, object: &Value, now: jiff::Timestamp) -> Value {
    let Some(value) = column.path.first(object) else { return Value::Null };
    match column.definition.str_at(&["type"]) {
        "date" => tables::since(value, now).into(),
        "string" if !value.is_string() => value.to_string().into(),
        "integer" | "number" if !value.is_number() => Value::Null,
        "boolean" if !value.is_boolean() => Value::Null,
        _ => value.clone(),
    }
}

/// Writes of `status` of a custom resource: checked like the whole.
pub struct CustomStatus(pub Arc<CustomResource>);

#[async_trait]
impl Strategy for CustomStatus {
    fn prepare_for_update(&self, _cx: &Cx<'_>, object: &mut Value, old: &Value) {
        prepare_for_status_update(object, old);
    }

    fn validate_update(&self, cx: &Cx<'_>, object: &Value, old: &Value) -> Vec<FieldError> {
        self.0.check(cx, object, Some(old))
    }

    fn reset_fields(&self) -> &'static [&'static [&'static str]] {
        // What is not status cannot be changed here, and is owned by nobody who tries.
        &[&["spec"]]
    }
}
