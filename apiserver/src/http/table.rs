//! `Table` and `PartialObjectMetadata`: what `kubectl get` and metadata-only clients see of an object.

use serde_json::{Value, json};

use crate::cache::Stored;
use crate::registry::apps::daemon_set::TEMPLATE_GENERATION;
use crate::registry::object::ObjectExt;
use crate::registry::strategy::{Column, Strategy};

/// What of the object goes with each row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IncludeObject {
    None,
    #[default]
    Metadata,
    Object,
}

impl IncludeObject {
    /// The query parameter `includeObject`; `None`: no such value.
    pub fn parse(text: Option<&str>) -> Option<Self> {
        match text {
            None | Some("" | "Metadata") => Some(Self::Metadata),
            Some("None") => Some(Self::None),
            Some("Object") => Some(Self::Object),
            Some(_) => None,
        }
    }
}

/// A table of `objects`, which are in the version of the request. `columns`: the `apiVersion` of the request, to have
/// the definitions of the columns in it, which only the first event of a watch carries.
pub fn table(
    strategy: &dyn Strategy,
    version: &str,
    metadata: Value,
    objects: impl Iterator<Item = Value>,
    include: IncludeObject,
    columns: Option<&str>,
) -> Value {
    let now = jiff::Timestamp::now();
    let rows: Vec<Value> = objects
        .map(|object| {
            let cells = strategy.row(&object, now);
            json!({"cells": cells, "object": row_object(object, version, include)})
        })
        .collect();
    json!({
        "kind": "Table",
        "apiVersion": format!("meta.k8s.io/{version}"),
        "metadata": metadata,
        "columnDefinitions": columns.map(|api_version| definitions(strategy, api_version)),
        "rows": rows,
    })
}

fn definitions(strategy: &dyn Strategy, api_version: &str) -> Vec<Value> {
    let declared = |c: &Column| json!({"name": c.name, "type": c.kind, "format": c.format, "description": c.description, "priority": c.priority});
    strategy.custom_columns(api_version).unwrap_or_else(|| strategy.columns().iter().map(declared).collect())
}

fn row_object(object: Value, version: &str, include: IncludeObject) -> Value {
    match include {
        IncludeObject::None => Value::Null,
        IncludeObject::Metadata => partial(&object, version),
        IncludeObject::Object => object,
    }
}

/// The metadata of an object, as an object of its own.
pub fn partial(object: &Value, version: &str) -> Value {
    let metadata = object.at(&["metadata"]).cloned();
    partial_with(metadata, object.kind(), version)
}

fn partial_with(metadata: Option<Value>, kind: &str, version: &str) -> Value {
    let mut metadata = metadata.unwrap_or_else(|| json!({}));
    if kind == "DaemonSet" {
        // Upstream has the count of templates in a field, and makes metadata of what it has.
        metadata.remove_at(&["annotations", TEMPLATE_GENERATION]);
        if metadata.at(&["annotations"]).and_then(Value::as_object).is_some_and(serde_json::Map::is_empty) {
            metadata.remove_at(&["annotations"]);
        }
    }
    json!({
        "kind": "PartialObjectMetadata",
        "apiVersion": format!("meta.k8s.io/{version}"),
        "metadata": metadata,
    })
}

/// The metadata of a stored object, read out of its bytes.
pub fn partial_of(stored: &Stored, version: &str) -> Value {
    let text = [b"{", &stored.body[..], b"}"].concat();
    let metadata =
        apimachinery::codec::scan::find(&text, ["metadata"]).and_then(|text| serde_json::from_slice(text).ok());
    partial_with(metadata, &stored.kind.kind, version)
}
