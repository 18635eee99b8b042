//! Slices: the devices that a driver has in one place.

use apimachinery::meta::validation::is_dns1123_subdomain;
use apimachinery::status::FieldError;
use serde_json::{Map, Value};

use super::super::{immutable, placement, required};
use super::device::device;
use super::{Errors, Path, complain, declared_label, driver_name, limited_set, pool_name};
use crate::registry::object::ObjectExt;

const DEVICES_MAX: usize = 128;
/// Where devices are tainted or share counters, which costs the scheduler more.
const COSTLY_DEVICES_MAX: usize = 64;
const COUNTER_SETS_MAX: usize = 8;
const COUNTERS_MAX: usize = 32;

pub fn slice(obj: &Value) -> Errors {
    rules(obj, None)
}

pub fn slice_update(obj: &Value, old: &Value) -> Errors {
    rules(obj, Some(old))
}

fn rules(obj: &Value, old: Option<&Value>) -> Errors {
    let mut errors = Errors::new();
    let (spec, path) = (&obj["spec"], Path::SPEC);
    driver_name(spec.str_at(&["driver"]), path.field("driver"), &mut errors);
    pool(&spec["pool"], path.field("pool"), &mut errors);
    if let Some(old) = old {
        immutable(&spec["pool"], &old["spec"]["pool"], "name", path.field("pool"), &mut errors);
        for field in ["driver", "nodeName"] {
            immutable(spec, &old["spec"], field, path, &mut errors);
        }
    }
    place(spec, path, &mut errors);
    if !spec["sharedCounters"].is_null() && !spec["devices"].is_null() {
        errors.push(FieldError::invalid(path, "", "only one of `sharedCounters` or `devices` is allowed"));
    }
    let devices = spec.list_at(&["devices"]);
    let is_costly =
        |device: &Value| ["taints", "consumesCounters"].iter().any(|list| !device.list_at(&[list]).is_empty());
    let max = if devices.iter().any(is_costly) { COSTLY_DEVICES_MAX } else { DEVICES_MAX };
    if devices.len() > max {
        errors.push(FieldError::too_many(path.field("devices"), devices.len(), max));
    } else {
        let stored = old.map_or(&[][..], |old| old.list_at(&["spec", "devices"]));
        each_device(spec, stored, path, &mut errors);
    }
    let name = |set: &Value| set.str_at(&["name"]).to_owned();
    limited_set(spec, "sharedCounters", COUNTER_SETS_MAX, path, &mut errors, name, |set, path, errors| {
        if let Some(name) = required(set, "name", path, errors) {
            declared_label(name, path.field("name"), errors);
        }
        counters(set, path, errors);
    });
    errors
}

/// Every device, with the stored one of the same name.
fn each_device(spec: &Value, stored: &[Value], path: Path<'_>, errors: &mut Errors) {
    let in_slice = spec["perDeviceNodeSelection"] != true;
    let list = path.field("devices");
    let mut names: Vec<&str> = Vec::new();
    for (index, item) in spec.list_at(&["devices"]).iter().enumerate() {
        let name = item.str_at(&["name"]);
        let old = stored.iter().find(|old| old.str_at(&["name"]) == name);
        device(item, old, in_slice, list.index(index), errors);
        if names.contains(&name) {
            errors.push(FieldError::duplicate(list.index(index), name));
        }
        names.push(name);
    }
}

fn pool(pool: &Value, path: Path<'_>, errors: &mut Errors) {
    pool_name(pool.str_at(&["name"]), path.field("name"), errors);
    let count = pool["resourceSliceCount"].as_i64().unwrap_or(0);
    if count <= 0 {
        errors.push(FieldError::invalid(path.field("resourceSliceCount"), count, "must be greater than zero"));
    }
    let generation = pool["generation"].as_i64().unwrap_or(0);
    if generation < 0 {
        let detail = "must be greater than or equal to zero";
        errors.push(FieldError::invalid(path.field("generation"), generation, detail));
    }
}

/// Exactly one way to say which nodes have the devices.
fn place(spec: &Value, path: Path<'_>, errors: &mut Errors) {
    let mut given = Vec::new();
    match spec["nodeName"].as_str() {
        None => {}
        Some("") => {
            let detail = "must be either unset or set to a non-empty string";
            errors.push(FieldError::invalid(path.field("nodeName"), "", detail));
        }
        Some(name) => {
            given.push("`nodeName`");
            complain(is_dns1123_subdomain(name), name, path.field("nodeName"), errors);
        }
    }
    if spec["nodeSelector"].is_object() {
        given.push("`nodeSelector`");
        let path = path.field("nodeSelector");
        placement::node_selector(&spec["nodeSelector"], path, errors);
        let terms = &spec["nodeSelector"]["nodeSelectorTerms"];
        if terms.as_array().map_or(0, Vec::len) != 1 {
            let detail = "must have exactly one node selector term";
            errors.push(FieldError::invalid(path.field("nodeSelectorTerms"), terms.clone(), detail));
        }
    }
    for (field, shown) in [("allNodes", "`allNodes`"), ("perDeviceNodeSelection", "`perDeviceNodeSelection`")] {
        match spec[field].as_bool() {
            Some(true) => given.push(shown),
            Some(false) => {
                errors.push(FieldError::invalid(path.field(field), false, "must be either unset or set to true"));
            }
            None => {}
        }
    }
    let one_of = "exactly one of `nodeName`, `nodeSelector`, `allNodes`, `perDeviceNodeSelection` is required";
    match given.as_slice() {
        [] => errors.push(FieldError::required(path, one_of)),
        [_] => {}
        several => {
            let detail = format!("{one_of}, but multiple fields are set");
            errors.push(FieldError::invalid(path, format!("{{{}}}", several.join(", ")), detail));
        }
    }
}

/// Amounts that devices share.
pub(super) fn counters(holder: &Value, path: Path<'_>, errors: &mut Errors) {
    let path = path.field("counters");
    let given = holder["counters"].as_object().map_or(0, Map::len);
    if given == 0 {
        errors.push(FieldError::required(path, ""));
    } else if given > COUNTERS_MAX {
        errors.push(FieldError::too_many(path, given, COUNTERS_MAX));
    }
    for (name, _) in holder["counters"].as_object().into_iter().flatten() {
        declared_label(name, path, errors);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::super::tests::texts;
    use super::*;

    fn slice_with(more: Value) -> Value {
        let mut spec =
            json!({"driver": "d.example.com", "pool": {"name": "p", "generation": 1, "resourceSliceCount": 1}});
        spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        json!({"spec": spec})
    }

    #[test]
    fn devices_are_in_one_place() {
        let one_of = "exactly one of `nodeName`, `nodeSelector`, `allNodes`, `perDeviceNodeSelection` is required";
        let cases = [
            (json!({"nodeName": "n"}), vec![]),
            (json!({}), vec![format!("spec: Required value: {one_of}")]),
            (
                json!({"nodeName": "n", "allNodes": true}),
                vec![format!(
                    r#"spec: Invalid value: "{{`nodeName`, `allNodes`}}": {one_of}, but multiple fields are set"#
                )],
            ),
            (
                json!({"nodeName": "n", "perDeviceNodeSelection": false}),
                vec![
                    "spec.perDeviceNodeSelection: Invalid value: false: must be either unset or set to true".to_owned(),
                ],
            ),
        ];
        for (more, expected) in cases {
            assert_eq!(texts(&slice(&slice_with(more.clone()))), expected, "{more}");
        }
    }

    #[test]
    fn the_driver_and_its_pool_stay() {
        let old = slice_with(json!({"nodeName": "n"}));
        let new = slice_with(json!({"nodeName": "m", "driver": "e.example.com"}));
        let expected = [
            r#"spec.driver: Invalid value: "e.example.com": field is immutable"#,
            r#"spec.nodeName: Invalid value: "m": field is immutable"#,
        ];
        assert_eq!(texts(&slice_update(&new, &old)), expected);
    }
}
