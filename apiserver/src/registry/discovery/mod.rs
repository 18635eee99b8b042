//! The `discovery.k8s.io` group: `EndpointSlice`, the backends of a service in pieces.

use serde_json::Value;

use super::declared::{Declared, Shape};
use super::object::ObjectExt;
use super::strategy::Column;
use super::tables::{UNSET, age, first_few, name, scalar, text};
use super::{defaults, validation};

pub static ENDPOINT_SLICE: Declared = Declared::new(Shape::Counted)
    .defaults(defaults::networking::endpoint_slice)
    .prepared(drop_old_topology)
    .warned(|obj| {
        let old = obj["addressType"] == "FQDN";
        old.then(|| "spec.addressType: FQDN endpoints are deprecated".into()).into_iter().collect()
    })
    .rules(validation::discovery::endpoint_slice)
    .update_rules(validation::discovery::endpoint_slice_update)
    .table(
        &[
            Column::name(),
            Column::new("AddressType", "string"),
            Column::new("Ports", "string"),
            Column::new("Endpoints", "string"),
            Column::age(),
        ],
        |obj, now| {
            let ports: Vec<String> = obj.list_at(&["ports"]).iter().map(port).collect();
            let addresses: Vec<String> =
                obj.list_at(&["endpoints"]).iter().flat_map(|e| e.list_at(&["addresses"])).map(scalar).collect();
            vec![
                name(obj),
                text(obj, &["addressType"]),
                first_few(&ports, 3, UNSET).into(),
                first_few(&addresses, 3, UNSET).into(),
                age(obj, now),
            ]
        },
    );

/// Labels of nodes, which only older versions of the kind have; what is stored with them keeps them.
fn drop_old_topology(obj: &mut Value, old: Option<&Value>) {
    const FIELD: &str = "deprecatedTopology";
    let kept = |old: &Value| old.list_at(&["endpoints"]).iter().any(|endpoint| !endpoint[FIELD].is_null());
    if old.is_some_and(kept) {
        return;
    }
    for endpoint in obj.list_at_mut(&["endpoints"]).into_iter().flatten() {
        endpoint.remove_at(&[FIELD]);
    }
}

fn port(port: &Value) -> String {
    match (&port["port"], &port["name"]) {
        (Value::Null, Value::Null) => "*".into(),
        (Value::Null, name) => scalar(name),
        (number, _) => scalar(number),
    }
}
