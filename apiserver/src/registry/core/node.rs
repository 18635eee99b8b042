//! `Node`: a machine that runs pods. Its kubelet writes the status.

use apimachinery::status::FieldError;
use jiff::Timestamp;
use serde_json::Value;

use crate::registry::common::{self, StatusOf};
use crate::registry::object::ObjectExt;
use crate::registry::strategy::{Column, Cx, Strategy, Subresource};
use crate::registry::tables::{NONE, UNKNOWN, age, condition, name, text, text_or};
use crate::registry::{defaults, validation};

pub struct Node;

const COLUMNS: &[Column] = &[
    Column::name(),
    Column::new("Status", "string"),
    Column::new("Roles", "string"),
    Column::age(),
    Column::new("Version", "string"),
    Column::new("Internal-IP", "string").wide(),
    Column::new("External-IP", "string").wide(),
    Column::new("OS-Image", "string").wide(),
    Column::new("Kernel-Version", "string").wide(),
    Column::new("Container-Runtime", "string").wide(),
];

static STATUS: StatusOf = StatusOf::new();

fn status(node: &Value) -> String {
    let mut text = match condition(node, "Ready") {
        Some(ready) if ready["status"] == "True" => "Ready".to_owned(),
        Some(_) => "NotReady".to_owned(),
        None => "Unknown".to_owned(),
    };
    if node["spec"]["unschedulable"] == true {
        text.push_str(",SchedulingDisabled");
    }
    text
}

/// From labels `node-role.kubernetes.io/<role>` and `kubernetes.io/role=<role>`.
fn roles(node: &Value) -> String {
    let labels = node.labels().into_iter().flatten();
    let mut roles: Vec<&str> = labels
        .filter_map(|(key, value)| match key.strip_prefix("node-role.kubernetes.io/") {
            Some(role) => Some(role),
            None => value.as_str().filter(|_| key == "kubernetes.io/role"),
        })
        .filter(|role| !role.is_empty())
        .collect();
    roles.sort_unstable();
    roles.dedup();
    if roles.is_empty() { NONE.into() } else { roles.join(",") }
}

fn address(node: &Value, kind: &str) -> Value {
    let found = node.list_at(&["status", "addresses"]).iter().find(|a| a["type"] == kind);
    found.map_or(NONE, |a| a.str_at(&["address"])).into()
}

fn kernel(node: &Value) -> String {
    let version = node.str_at(&["status", "nodeInfo", "kernelVersion"]);
    let version = if version.is_empty() { UNKNOWN } else { version };
    match node.str_at(&["status", "nodeInfo", "architecture"]) {
        "" => version.to_owned(),
        architecture => format!("{version} ({architecture})"),
    }
}

impl Strategy for Node {
    fn default(&self, obj: &mut Value) {
        defaults::core::node(obj);
    }

    /// A kubelet registers with its status.
    fn prepare_for_create(&self, _cx: &Cx<'_>, _obj: &mut Value) {}

    fn prepare_for_update(&self, _cx: &Cx<'_>, obj: &mut Value, old: &Value) {
        common::update_uncounted(obj, old);
    }

    fn validate_create(&self, _cx: &Cx<'_>, obj: &Value) -> Vec<FieldError> {
        validation::core::node(obj)
    }

    fn validate_update(&self, _cx: &Cx<'_>, obj: &Value, old: &Value) -> Vec<FieldError> {
        validation::core::node_update(obj, old)
    }

    fn selectable_fields(&self) -> &'static [&'static str] {
        &["spec.unschedulable"]
    }

    fn selectable_default(&self, _field: &str) -> &'static str {
        "false"
    }

    fn columns(&self) -> &'static [Column] {
        COLUMNS
    }

    fn row(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        vec![
            name(obj),
            status(obj).into(),
            roles(obj).into(),
            age(obj, now),
            text(obj, &["status", "nodeInfo", "kubeletVersion"]),
            address(obj, "InternalIP"),
            address(obj, "ExternalIP"),
            text_or(obj, &["status", "nodeInfo", "osImage"], UNKNOWN),
            kernel(obj).into(),
            text_or(obj, &["status", "nodeInfo", "containerRuntimeVersion"], UNKNOWN),
        ]
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
    fn a_cordoned_worker() {
        let obj = json!({
            "metadata": {"name": "n", "labels": {"node-role.kubernetes.io/worker": "", "kubernetes.io/role": "db"}},
            "spec": {"unschedulable": true},
            "status": {"conditions": [{"type": "Ready", "status": "Unknown"}], "addresses": [{"type": "InternalIP", "address": "10.0.0.2"}],
                "nodeInfo": {"kernelVersion": "6.1", "architecture": "amd64", "kubeletVersion": "v1.37.2"}}});
        assert_eq!(status(&obj), "NotReady,SchedulingDisabled");
        assert_eq!(roles(&obj), "db,worker");
        let cells = Node.row(&obj, Timestamp::UNIX_EPOCH);
        assert_eq!(
            &cells[4..],
            ["v1.37.2", "10.0.0.2", "<none>", "<unknown>", "6.1 (amd64)", "<unknown>"].map(Value::from)
        );
    }
}
