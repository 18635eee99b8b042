//! The `apiextensions.k8s.io` group: `CustomResourceDefinition`. Serving what it defines is `extensions`' business.

use apimachinery::status::FieldError;
use jiff::Timestamp;
use serde_json::{Value, json};

use super::common::{self, StatusOf};
use super::object::ObjectExt;
use super::strategy::{Column, Cx, Strategy, Subresource, keep};
use super::tables::{has_condition, name, text};
use super::{defaults, validation};
use crate::extensions;

pub struct CustomResourceDefinition;

const COLUMNS: &[Column] = &[
    Column::name(),
    Column::new("Scope", "string"),
    Column::new("Versions", "string"),
    Column::new("Created At", "date"),
    Column::new("Group", "string").wide(),
    Column::new("Kind", "string").wide(),
    Column::new("ShortNames", "string").wide(),
    Column::new("Established", "boolean").wide(),
];

/// The served versions, the stored one marked.
fn versions(obj: &Value) -> String {
    let served = obj.list_at(&["spec", "versions"]).iter().filter(|version| version["served"] == true);
    let label = |version: &Value| {
        format!("{}{}", version.str_at(&["name"]), if version["storage"] == true { "(storage)" } else { "" })
    };
    served.map(label).collect::<Vec<_>>().join(",")
}

/// Whether two specs say the same. Unlike in other kinds, an empty object says something: a subresource is there.
fn says_the_same(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Object(a), Value::Object(b)) => {
            let is_nothing = |value: &Value| !value.is_object() && common::is_nothing(value);
            a.iter()
                .all(|(key, value)| b.get(key).map_or_else(|| is_nothing(value), |other| says_the_same(value, other)))
                && b.iter().all(|(key, value)| a.contains_key(key) || is_nothing(value))
        }
        (Value::Array(a), Value::Array(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| says_the_same(a, b)),
        _ => a == b,
    }
}

static STATUS: StatusOf = StatusOf::new().validated(validation::apiextensions::status_update);

impl Strategy for CustomResourceDefinition {
    fn default(&self, obj: &mut Value) {
        defaults::admission::custom_resource_definition(obj);
    }

    fn prepare_for_create(&self, _cx: &Cx<'_>, obj: &mut Value) {
        common::create(obj);
        // Upstream's types write these out even when they say nothing.
        obj.set(&["status"], json!({"conditions": null, "acceptedNames": {"plural": "", "kind": ""}}));
        let stored = obj.list_at(&["spec", "versions"]).iter().find(|v| v["storage"] == true);
        let names: Vec<Value> = stored.map(|version| version["name"].clone()).into_iter().collect();
        obj.set(&["status", "storedVersions"], names);
    }

    fn prepare_for_update(&self, _cx: &Cx<'_>, obj: &mut Value, old: &Value) {
        keep(obj, old, "status");
        common::count_change(obj, old, says_the_same(&obj["spec"], &old["spec"]));
        // A version that becomes the stored one joins those that objects may be stored in.
        let mut stored = obj.list_at(&["status", "storedVersions"]).to_vec();
        if let Some(version) = obj.list_at(&["spec", "versions"]).iter().find(|v| v["storage"] == true)
            && !stored.contains(&version["name"])
        {
            stored.push(version["name"].clone());
        }
        obj.set(&["status", "storedVersions"], stored);
    }

    fn validate_create(&self, _cx: &Cx<'_>, obj: &Value) -> Vec<FieldError> {
        validation::apiextensions::definition(obj)
    }

    fn validate_update(&self, _cx: &Cx<'_>, obj: &Value, old: &Value) -> Vec<FieldError> {
        validation::apiextensions::definition_update(obj, old)
    }

    fn allow_unconditional_update(&self) -> bool {
        false
    }

    fn keeps_on_delete(&self, obj: &Value) -> bool {
        !obj.is_being_deleted()
    }

    fn marked_by_time_alone(&self, old: &Value) -> bool {
        !old.is_being_deleted()
    }

    /// A definition stays until its objects are gone.
    fn on_marked_deleted(&self, obj: &mut Value) {
        let mut finalizers: Vec<String> = obj.finalizers().into_iter().map(str::to_owned).collect();
        if !finalizers.iter().any(|name| name == extensions::CLEANUP_FINALIZER) {
            finalizers.push(extensions::CLEANUP_FINALIZER.to_owned());
            obj.set(&["metadata", "finalizers"], finalizers);
        }
        if !has_condition(obj, "Terminating") {
            extensions::set_condition(obj, extensions::deletion_pending());
        }
    }

    fn columns(&self) -> &'static [Column] {
        COLUMNS
    }

    fn row(&self, obj: &Value, _now: Timestamp) -> Vec<Value> {
        let short: Vec<&str> = obj.list_at(&["spec", "names", "shortNames"]).iter().filter_map(Value::as_str).collect();
        vec![
            name(obj),
            text(obj, &["spec", "scope"]),
            versions(obj).into(),
            obj["metadata"]["creationTimestamp"].clone(),
            text(obj, &["spec", "group"]),
            text(obj, &["spec", "names", "kind"]),
            short.join(",").into(),
            has_condition(obj, "Established").into(),
        ]
    }

    fn subresource(&self, name: &str) -> Option<Subresource> {
        (name == "status").then_some(Subresource::Update(&STATUS))
    }
}
