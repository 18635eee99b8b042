//! `ServiceCIDR` and `IPAddress`: the ranges of cluster addresses, and who has which.

use serde_json::Value;

use crate::registry::common::{ALL_METADATA, StatusOf};
use crate::registry::declared::{Declared, Shape};
use crate::registry::object::ObjectExt;
use crate::registry::strategy::{Column, NameRule};
use crate::registry::tables::{NONE, age, name};
use crate::registry::validation;

static CIDR_STATUS: StatusOf = StatusOf::new().keeping(ALL_METADATA).resetting(&[&["metadata"], &["spec"]]);

pub static SERVICE_CIDR: Declared = Declared::new(Shape::WithStatus)
    .create_rules(validation::networking::service_cidr)
    .update_rules(validation::networking::service_cidr_update)
    .status(&CIDR_STATUS)
    .table(&[Column::name(), Column::new("CIDRs", "string"), Column::age()], |obj, now| {
        let cidrs: Vec<&str> = obj.list_at(&["spec", "cidrs"]).iter().filter_map(Value::as_str).collect();
        vec![name(obj), cidrs.join(",").into(), age(obj, now)]
    });

/// The name is the address in its canonical form.
pub static IP_ADDRESS: Declared = Declared::new(Shape::Plain)
    .named(NameRule::Custom(|name, _| validation::networking::address_name(name)))
    .rules(validation::networking::ip_address)
    .update_rules(validation::networking::ip_address_update)
    .selectable(&["spec.parentRef.namespace", "spec.parentRef.name"])
    .table(&[Column::name(), Column::new("ParentRef", "string"), Column::age()], |obj, now| {
        vec![name(obj), parent(obj).into(), age(obj, now)]
    });

/// `services/default/kubernetes`.
fn parent(obj: &Value) -> String {
    let parent = &obj["spec"]["parentRef"];
    if parent.is_null() {
        return NONE.into();
    }
    let resource = match parent.str_at(&["group"]) {
        "" => parent.str_at(&["resource"]).to_lowercase(),
        group => format!("{}.{group}", parent.str_at(&["resource"])).to_lowercase(),
    };
    let parts = [resource.as_str(), parent.str_at(&["namespace"]), parent.str_at(&["name"])];
    parts.iter().filter(|part| !part.is_empty()).copied().collect::<Vec<_>>().join("/")
}
