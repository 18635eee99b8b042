//! `Endpoints`: the older list of a service's backends, still kept beside endpoint slices.

use apimachinery::status::FieldError;
use jiff::Timestamp;
use serde_json::Value;

use crate::registry::object::ObjectExt;
use crate::registry::strategy::{Column, Cx, Strategy};
use crate::registry::tables::{NONE, age, first_few, name};
use crate::registry::{defaults, validation};

pub struct Endpoints;

const COLUMNS: &[Column] = &[Column::name(), Column::new("Endpoints", "string"), Column::age()];

/// Address and port of every ready backend.
fn addresses(obj: &Value) -> Vec<String> {
    let mut all = Vec::new();
    for subset in obj.list_at(&["subsets"]) {
        let ips: Vec<&str> = subset.list_at(&["addresses"]).iter().map(|a| a.str_at(&["ip"])).collect();
        let ports = subset.list_at(&["ports"]);
        if ports.is_empty() {
            all.extend(ips.iter().map(ToString::to_string));
        }
        for port in ports {
            let number = port.i64_at(&["port"]).unwrap_or(0);
            all.extend(
                ips.iter()
                    .map(|ip| if ip.contains(':') { format!("[{ip}]:{number}") } else { format!("{ip}:{number}") }),
            );
        }
    }
    all
}

impl Strategy for Endpoints {
    fn default(&self, obj: &mut Value) {
        defaults::core::endpoints(obj);
    }

    fn prepare_for_create(&self, _cx: &Cx<'_>, _obj: &mut Value) {}

    fn prepare_for_update(&self, _cx: &Cx<'_>, _obj: &mut Value, _old: &Value) {}

    fn validate_create(&self, _cx: &Cx<'_>, obj: &Value) -> Vec<FieldError> {
        validation::core::endpoints(obj)
    }

    fn validate_update(&self, _cx: &Cx<'_>, obj: &Value, _old: &Value) -> Vec<FieldError> {
        validation::core::endpoints(obj)
    }

    fn allow_create_on_update(&self) -> bool {
        true
    }

    fn columns(&self) -> &'static [Column] {
        COLUMNS
    }

    fn row(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        let cell = if obj.list_at(&["subsets"]).is_empty() { NONE.into() } else { first_few(&addresses(obj), 3, "") };
        vec![name(obj), cell.into(), age(obj, now)]
    }

    fn deprecation(&self) -> Option<&'static str> {
        Some("v1 Endpoints is deprecated in v1.33+; use discovery.k8s.io/v1 EndpointSlice")
    }

    fn reset_fields(&self) -> &'static [&'static [&'static str]] {
        &[]
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn backends_are_listed_with_their_ports() {
        let obj = json!({"subsets": [
            {"addresses": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}], "ports": [{"port": 80}]},
            {"addresses": [{"ip": "10.0.0.2"}, {"ip": "10.0.0.3"}]}]});
        assert_eq!(addresses(&obj), ["10.0.0.1:80", "[fd00::1]:80", "10.0.0.2", "10.0.0.3"]);
    }
}
