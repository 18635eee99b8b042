//! The `storagemigration.k8s.io` group: that all objects of a resource be written again, in the present version.

use serde_json::Value;

use super::common::{ALL_METADATA, StatusOf};
use super::declared::{Declared, Shape};
use super::object::ObjectExt;
use super::strategy::Column;
use super::tables::name;
use super::validation::storagemigration as rules;

static STATUS: StatusOf =
    StatusOf::new().keeping(ALL_METADATA).resetting(&[&["metadata"], &["spec"]]).validated(rules::status_update);

pub static STORAGE_VERSION_MIGRATION: Declared = Declared::new(Shape::WithStatus)
    .updated_by_version()
    .status(&STATUS)
    .rules(rules::migration)
    .update_rules(rules::migration_update)
    .table(&[Column::name(), Column::new("Resource", "string"), Column::new("Status", "string")], |obj, _| {
        vec![name(obj), resource(obj).into(), state(obj).into()]
    });

/// `deployments.apps`.
fn resource(obj: &Value) -> String {
    let text = |field: &str| obj.str_at(&["spec", "resource", field]);
    match text("group") {
        "" => text("resource").to_owned(),
        group => format!("{}.{group}", text("resource")),
    }
}

/// The last of the conditions that is true.
fn state(obj: &Value) -> &str {
    let conditions = obj.list_at(&["status", "conditions"]).iter().rev();
    let mut states = conditions.filter(|condition| condition["status"] == "True").map(|c| c.str_at(&["type"]));
    states.find(|state| matches!(*state, "Running" | "Failed" | "Succeeded")).unwrap_or("Unknown")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_last_true_condition_is_the_state() {
        let condition = |kind: &str, status: &str| json!({"type": kind, "status": status});
        let of = |conditions: Value| state(&json!({"status": {"conditions": conditions}})).to_owned();
        assert_eq!(of(json!([condition("Running", "True"), condition("Succeeded", "False")])), "Running");
        assert_eq!(of(json!([condition("Running", "True"), condition("Failed", "True")])), "Failed");
        assert_eq!(of(json!([])), "Unknown");
    }
}
