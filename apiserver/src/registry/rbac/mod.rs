//! The `rbac.authorization.k8s.io` group: roles and who has them. That nobody hands out more than he has is checked
//! by the authorizer's escalation rules before a write gets here.

use serde_json::{Value, json};

use super::declared::{Declared, Shape};
use super::object::ObjectExt;
use super::strategy::{Column, NameRule};
use super::tables::{age, name};
use super::{defaults, validation};

const ROLE_COLUMNS: &[Column] = &[Column::name(), Column::new("Created At", "date")];

fn role_row(obj: &Value, _now: jiff::Timestamp) -> Vec<Value> {
    vec![name(obj), obj["metadata"]["creationTimestamp"].clone()]
}

pub static ROLE: Declared = Declared::new(Shape::Plain)
    .defaults(role)
    .named(NameRule::PathSegment)
    .created_by_update()
    .rules(validation::rbac::role)
    .table(ROLE_COLUMNS, role_row);

pub static CLUSTER_ROLE: Declared = Declared::new(Shape::Plain)
    .defaults(role)
    .named(NameRule::PathSegment)
    .created_by_update()
    .rules(validation::rbac::cluster_role)
    .table(ROLE_COLUMNS, role_row);

const BINDING_COLUMNS: &[Column] = &[
    Column::name(),
    Column::new("Role", "string"),
    Column::age(),
    Column::new("Users", "string").wide(),
    Column::new("Groups", "string").wide(),
    Column::new("ServiceAccounts", "string").wide(),
];

pub static ROLE_BINDING: Declared = Declared::new(Shape::Plain)
    .defaults(defaults::networking::role_binding)
    .named(NameRule::PathSegment)
    .created_by_update()
    .rules(validation::rbac::role_binding)
    .update_rules(validation::rbac::binding_update)
    .table(BINDING_COLUMNS, binding_row);

pub static CLUSTER_ROLE_BINDING: Declared = Declared::new(Shape::Plain)
    .defaults(defaults::networking::role_binding)
    .named(NameRule::PathSegment)
    .created_by_update()
    .rules(validation::rbac::cluster_role_binding)
    .update_rules(validation::rbac::binding_update)
    .table(BINDING_COLUMNS, binding_row);

/// Upstream's types always write the rules, as `null` when there are none.
fn role(obj: &mut Value) {
    if let Some(map) = obj.as_object_mut() {
        map.entry("rules").or_insert(json!(null));
    }
}

fn binding_row(obj: &Value, now: jiff::Timestamp) -> Vec<Value> {
    let subjects = |kind: &str| {
        let of_kind = obj.list_at(&["subjects"]).iter().filter(|subject| subject["kind"] == kind);
        let names: Vec<String> = of_kind
            .map(|subject| match (kind, subject.str_at(&["namespace"])) {
                ("ServiceAccount", namespace) if !namespace.is_empty() => {
                    format!("{namespace}/{}", subject.str_at(&["name"]))
                }
                _ => subject.str_at(&["name"]).to_owned(),
            })
            .collect();
        Value::from(names.join(", "))
    };
    let role = format!("{}/{}", obj.str_at(&["roleRef", "kind"]), obj.str_at(&["roleRef", "name"]));
    vec![name(obj), role.into(), age(obj, now), subjects("User"), subjects("Group"), subjects("ServiceAccount")]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subjects_are_listed_by_kind() {
        let obj = json!({"metadata": {"name": "b"}, "roleRef": {"kind": "Role", "name": "r"}, "subjects": [
            {"kind": "User", "name": "ann"}, {"kind": "User", "name": "bob"},
            {"kind": "ServiceAccount", "namespace": "ns", "name": "sa"}]});
        let expected = json!(["b", "Role/r", "<unknown>", "ann, bob", "", "ns/sa"]);
        assert_eq!(json!(binding_row(&obj, jiff::Timestamp::UNIX_EPOCH)), expected);
    }
}
