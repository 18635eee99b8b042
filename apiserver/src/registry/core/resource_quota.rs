//! `ResourceQuota`: how much a namespace may use, counted by a controller and enforced by admission.

use apimachinery::status::FieldError;
use jiff::Timestamp;
use serde_json::{Map, Value};

use crate::registry::common::{self, StatusOf};
use crate::registry::object::ObjectExt;
use crate::registry::strategy::{Column, Cx, Strategy, Subresource};
use crate::registry::tables::{age, name};
use crate::registry::{defaults, validation};

pub struct ResourceQuota;

const COLUMNS: &[Column] =
    &[Column::name(), Column::new("Request", "string"), Column::new("Limit", "string"), Column::age()];

static STATUS: StatusOf = StatusOf::new();

/// `cpu: 1/2` for every resource, those of limits apart.
fn usage(obj: &Value) -> [String; 2] {
    let empty = Map::new();
    let hard = obj.map_at(&["status", "hard"]).unwrap_or(&empty);
    let used = |resource: &str| obj["status"]["used"][resource].as_str().unwrap_or("0").to_owned();
    let mut names: Vec<&String> = hard.keys().collect();
    names.sort();
    let cell = |limits: bool| {
        let shown: Vec<String> = names
            .iter()
            .filter(|name| name.starts_with("limits.") == limits)
            .map(|name| format!("{name}: {}/{}", used(name), hard[*name].as_str().unwrap_or("0")))
            .collect();
        shown.join(", ")
    };
    [cell(false), cell(true)]
}

impl Strategy for ResourceQuota {
    fn default(&self, obj: &mut Value) {
        defaults::core::resource_quota(obj);
    }

    fn prepare_for_create(&self, _cx: &Cx<'_>, obj: &mut Value) {
        common::create_uncounted(obj);
    }

    fn prepare_for_update(&self, _cx: &Cx<'_>, obj: &mut Value, old: &Value) {
        common::update_uncounted(obj, old);
    }

    fn validate_create(&self, _cx: &Cx<'_>, obj: &Value) -> Vec<FieldError> {
        validation::core::resource_quota(obj)
    }

    fn validate_update(&self, _cx: &Cx<'_>, obj: &Value, _old: &Value) -> Vec<FieldError> {
        validation::core::resource_quota(obj)
    }

    fn columns(&self) -> &'static [Column] {
        COLUMNS
    }

    fn row(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        let [requests, limits] = usage(obj);
        vec![name(obj), requests.into(), limits.into(), age(obj, now)]
    }

    fn subresource(&self, name: &str) -> Option<Subresource> {
        (name == "status").then_some(Subresource::Update(&STATUS))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn limits_have_a_cell_of_their_own() {
        let obj = json!({"status": {"hard": {"pods": "5", "limits.cpu": "2", "cpu": "1"}, "used": {"pods": "1"}}});
        assert_eq!(usage(&obj), ["cpu: 0/1, pods: 1/5".to_owned(), "limits.cpu: 0/2".to_owned()]);
    }
}
