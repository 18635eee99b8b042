//! The `apiregistration.k8s.io` group: `APIService`, which says who serves a group and version.

use serde_json::Value;

use super::common::{ALL_METADATA, StatusOf};
use super::declared::{Declared, Shape};
use super::object::ObjectExt;
use super::strategy::{Column, NameRule};
use super::tables::{age, condition, name};
use super::{defaults, validation};

static STATUS: StatusOf = StatusOf::new()
    .keeping(ALL_METADATA)
    .resetting(&[&["metadata"], &["spec"]])
    .validated(validation::apiextensions::api_service_status);

pub static API_SERVICE: Declared = Declared::new(Shape::WithStatus)
    .defaults(defaults::admission::api_service)
    .named(NameRule::PathSegment)
    .updated_by_version()
    .status(&STATUS)
    .rules(validation::apiextensions::api_service)
    .table(
        &[Column::name(), Column::new("Service", "string"), Column::new("Available", "string"), Column::age()],
        |obj, now| vec![name(obj), service(obj).into(), available(obj).into(), age(obj, now)],
    );

fn service(obj: &Value) -> String {
    match &obj["spec"]["service"] {
        Value::Null => "Local".into(),
        service => format!("{}/{}", service.str_at(&["namespace"]), service.str_at(&["name"])),
    }
}

fn available(obj: &Value) -> String {
    match condition(obj, "Available") {
        None => "Unknown".into(),
        Some(c) if c["status"] == "True" => "True".into(),
        Some(c) => format!("{} ({})", c.str_at(&["status"]), c.str_at(&["reason"])),
    }
}
