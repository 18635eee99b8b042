//! Rules for classes of storage, and for drivers and what they are attached to.

use apimachinery::meta::validation::{is_dns1123_subdomain, is_qualified_name};
use apimachinery::status::FieldError;
use serde_json::Value;

use super::{Errors, IMMUTABLE, Path, complain, each, label_selector, non_negative, one_of_given, required};
use crate::registry::common::same;
use crate::registry::core::pod_prepare::quantity;
use crate::registry::object::ObjectExt;

const MAX_PARAMETERS: usize = 512;
const MAX_PARAMETER_BYTES: usize = 256 * 1024;
const MAX_DRIVER_NAME: usize = 63;
const MAX_NODE_ID: usize = 256;
const MAX_MESSAGE: usize = 1024;
const TEN_MINUTES: i64 = 600;

fn provisioner(obj: &Value, field: &str, errors: &mut Errors) {
    match obj.str_at(&[field]) {
        "" => errors.push(FieldError::required(field, "")),
        name => complain(is_qualified_name(&name.to_lowercase()), &name.to_lowercase(), Path::Root(field), errors),
    }
}

fn parameters(obj: &Value, may_be_empty: bool, errors: &mut Errors) {
    const FIELD: &str = "parameters";
    let Some(map) = obj[FIELD].as_object().filter(|map| !map.is_empty()) else {
        if !may_be_empty {
            errors.push(FieldError::required(FIELD, "must contain at least one key/value pair"));
        }
        return;
    };
    if map.len() > MAX_PARAMETERS {
        errors.push(FieldError::too_long(FIELD, MAX_PARAMETERS));
        return;
    }
    if map.contains_key("") {
        errors.push(FieldError::invalid(FIELD, "", "field can not be empty."));
    }
    let size: usize = map.iter().map(|(key, value)| key.len() + value.as_str().map_or(0, str::len)).sum();
    if size > MAX_PARAMETER_BYTES {
        errors.push(FieldError::too_long(FIELD, MAX_PARAMETER_BYTES));
    }
}

/// Fields that stay. The declared rules do not show the value.
fn unchanged(obj: &Value, old: &Value, fields: &[&str], errors: &mut Errors) {
    let changed = fields.iter().filter(|field| !same(&obj[**field], &old[**field]));
    errors.extend(changed.map(|field| FieldError::invalid_null(field, IMMUTABLE)));
}

pub fn storage_class(obj: &Value) -> Errors {
    let mut errors = Errors::new();
    provisioner(obj, "provisioner", &mut errors);
    parameters(obj, true, &mut errors);
    let policy = obj.str_at(&["reclaimPolicy"]);
    if !matches!(policy, "" | "Delete" | "Retain") {
        errors.push(FieldError::not_supported("reclaimPolicy", policy, &["Delete", "Retain"]));
    }
    match obj["volumeBindingMode"].as_str() {
        None => errors.push(FieldError::required("volumeBindingMode", "")),
        Some("Immediate" | "WaitForFirstConsumer") => {}
        Some(other) => {
            let modes = ["Immediate", "WaitForFirstConsumer"];
            errors.push(FieldError::not_supported("volumeBindingMode", other, &modes));
        }
    }
    topologies(obj, &mut errors);
    errors
}

/// Which topologies volumes may be in; none is said twice.
fn topologies(obj: &Value, errors: &mut Errors) {
    let path = Path::Root("allowedTopologies");
    let mut seen: Vec<&Value> = Vec::new();
    for (index, term) in obj.list_at(&["allowedTopologies"]).iter().enumerate() {
        let path = path.index(index);
        let mut keys: Vec<String> = Vec::new();
        each(term, "matchLabelExpressions", path, errors, |requirement, path, errors| {
            topology(requirement, &mut keys, path, errors);
        });
        // Upstream compares with as many empty terms as there are terms, too.
        let is_empty = term.list_at(&["matchLabelExpressions"]).is_empty();
        if is_empty || seen.iter().any(|known| same(known, term)) {
            errors.push(FieldError::duplicate(path.field("matchLabelExpressions"), ""));
        }
        seen.push(term);
    }
}

fn topology(requirement: &Value, keys: &mut Vec<String>, path: Path<'_>, errors: &mut Errors) {
    let values = requirement.list_at(&["values"]);
    let values_path = path.field("values");
    if values.is_empty() {
        errors.push(FieldError::required(values_path, ""));
    }
    for (index, value) in values.iter().enumerate().filter(|(index, value)| values[..*index].contains(value)) {
        errors.push(FieldError::duplicate(values_path.index(index), value.clone()));
    }
    let key = requirement.str_at(&["key"]);
    complain(is_qualified_name(key), key, path.field("key"), errors);
    if keys.iter().any(|known| known == key) {
        errors.push(FieldError::duplicate(path.field("key"), key));
    }
    keys.push(key.to_owned());
}

pub fn storage_class_update(obj: &Value, old: &Value) -> Errors {
    let mut errors = Errors::new();
    unchanged(obj, old, &["parameters", "provisioner", "reclaimPolicy", "volumeBindingMode"], &mut errors);
    errors
}

pub fn volume_attributes_class(obj: &Value) -> Errors {
    let mut errors = Errors::new();
    provisioner(obj, "driverName", &mut errors);
    parameters(obj, false, &mut errors);
    errors
}

pub fn volume_attributes_class_update(obj: &Value, old: &Value) -> Errors {
    let changed = ["driverName", "parameters"].into_iter().filter(|field| !same(&obj[*field], &old[*field]));
    changed.map(|field| FieldError::forbidden(field, format!("updates to {field} are forbidden."))).collect()
}

/// The name of a driver, as it stands in other objects.
fn driver_name(name: &str, path: Path<'_>, errors: &mut Errors) {
    if name.is_empty() {
        errors.push(FieldError::required(path, ""));
        return;
    }
    if name.len() > MAX_DRIVER_NAME {
        errors.push(FieldError::too_long(path, MAX_DRIVER_NAME));
    }
    complain(is_dns1123_subdomain(&name.to_lowercase()), name, path, errors);
}

pub fn volume_attachment(obj: &Value) -> Errors {
    let mut errors = Errors::new();
    let spec = &obj["spec"];
    driver_name(spec.str_at(&["attacher"]), Path::SPEC.field("attacher"), &mut errors);
    attached(&spec["source"], &mut errors);
    let node = spec.str_at(&["nodeName"]);
    complain(is_dns1123_subdomain(node), node, Path::SPEC.field("nodeName"), &mut errors);
    for field in ["attachError", "detachError"] {
        let path = Path::STATUS.field(field);
        if obj["status"][field].str_at(&["message"]).len() > MAX_MESSAGE {
            errors.push(FieldError::too_long(path.field("message"), MAX_MESSAGE));
        }
        if let Some(code) = obj["status"][field]["errorCode"].as_i64().filter(|code| *code < 0) {
            let detail = format!("must be between 0 and {}, inclusive", i32::MAX);
            errors.push(FieldError::invalid(path.field("errorCode"), code, detail));
        }
    }
    errors
}

fn attached(source: &Value, errors: &mut Errors) {
    const ONE: &str = "must specify exactly one of inlineVolumeSpec and persistentVolumeName";
    let path = Path::SPEC.field("source");
    match (source["persistentVolumeName"].as_str(), &source["inlineVolumeSpec"]) {
        (None, Value::Null) => errors.push(FieldError::required(path, ONE)),
        (None, inline) => inline_volume(inline, path.field("inlineVolumeSpec"), errors),
        (Some(name), inline) => {
            if !inline.is_null() {
                errors.push(FieldError::forbidden(path, ONE));
            } else if name.is_empty() {
                let detail = "must specify non empty persistentVolumeName";
                errors.push(FieldError::required(path.field("persistentVolumeName"), detail));
            }
            complain(is_dns1123_subdomain(name), name, path.field("persistentVolumeName"), errors);
        }
    }
}

/// A volume without an object of its own: a driver's, and nothing that says how it is bound or kept.
fn inline_volume(spec: &Value, path: Path<'_>, errors: &mut Errors) {
    let forbidden = ["persistentVolumeReclaimPolicy", "storageClassName", "claimRef", "capacity"];
    for field in forbidden.iter().filter(|field| !super::super::common::is_nothing(&spec[**field])) {
        let detail = "may not be specified in the context of inline volumes";
        errors.push(FieldError::forbidden(path.field(field), detail));
    }
    if spec["csi"].is_null() {
        let detail = "has to be specified in the context of inline volumes";
        errors.push(FieldError::required(path.field("csi"), detail));
    }
    if spec.list_at(&["accessModes"]).is_empty() {
        errors.push(FieldError::required(path.field("accessModes"), ""));
    }
}

pub fn volume_attachment_update(obj: &Value, old: &Value) -> Errors {
    let mut errors = Errors::new();
    unchanged(obj, old, &["spec"], &mut errors);
    errors
}

pub fn csi_node(obj: &Value) -> Errors {
    let mut errors = Errors::new();
    let mut seen: Vec<String> = Vec::new();
    each(&obj["spec"], "drivers", Path::SPEC, &mut errors, |driver, path, errors| {
        let name = driver.str_at(&["name"]);
        driver_name(name, path.field("name"), errors);
        if let Some(id) = required(driver, "nodeID", path, errors).filter(|id| id.len() > MAX_NODE_ID) {
            let detail = format!("must be {MAX_NODE_ID} characters or less");
            errors.push(FieldError::invalid(path.field("nodeID"), id, detail));
        }
        non_negative(&driver["allocatable"], "count", path.field("allocatable"), errors);
        if seen.iter().any(|known| known == name) {
            errors.push(FieldError::duplicate(path.field("name"), name));
        }
        seen.push(name.to_owned());
        topology_keys(driver.list_at(&["topologyKeys"]), path, errors);
    });
    errors
}

fn topology_keys(keys: &[Value], path: Path<'_>, errors: &mut Errors) {
    for (index, key) in keys.iter().enumerate() {
        let text = key.as_str().unwrap_or_default();
        if text.is_empty() {
            errors.push(FieldError::required(path, ""));
        }
        if keys[..index].contains(key) {
            errors.push(FieldError::duplicate(path, text));
        }
        complain(is_qualified_name(text), text, path, errors);
    }
}

/// A driver that stays may only change how many volumes it can attach.
pub fn csi_node_update(obj: &Value, old: &Value) -> Errors {
    let fixed = |driver: &Value| {
        let mut driver = driver.clone();
        driver.remove_at(&["allocatable"]);
        driver
    };
    let mut errors = Errors::new();
    for stored in old.list_at(&["spec", "drivers"]) {
        for driver in obj.list_at(&["spec", "drivers"]).iter().filter(|driver| driver["name"] == stored["name"]) {
            let driver = fixed(driver);
            if !same(&driver, &fixed(stored)) {
                errors.push(FieldError::invalid("spec.drivers", driver, IMMUTABLE));
            }
        }
    }
    errors
}

pub fn csi_driver(obj: &Value) -> Errors {
    let mut errors = Errors::new();
    let spec = &obj["spec"];
    one_of_given(spec, "fsGroupPolicy", &["File", "None", "ReadWriteOnceWithFSType"], Path::SPEC, &mut errors);
    token_requests(spec, &mut errors);
    for mode in spec.list_at(&["volumeLifecycleModes"]).iter().filter_map(Value::as_str) {
        if !matches!(mode, "Persistent" | "Ephemeral") {
            let modes = ["Persistent", "Ephemeral"];
            errors.push(FieldError::not_supported("spec.volumeLifecycleModes", mode, &modes));
        }
    }
    if let Some(period) = spec["nodeAllocatableUpdatePeriodSeconds"].as_i64().filter(|period| *period < 10) {
        let detail = "must be greater than or equal to 10 seconds";
        errors.push(FieldError::invalid("spec.nodeAllocatableUpdatePeriodSeconds", period, detail));
    }
    let in_secrets = &spec["serviceAccountTokenInSecrets"];
    if !in_secrets.is_null() && spec.list_at(&["tokenRequests"]).is_empty() {
        let detail = "serviceAccountTokenInSecrets is set but no tokenRequests are specified";
        errors.push(FieldError::invalid("spec.serviceAccountTokenInSecrets", in_secrets.clone(), detail));
    }
    errors
}

fn token_requests(spec: &Value, errors: &mut Errors) {
    let mut audiences: Vec<String> = Vec::new();
    each(spec, "tokenRequests", Path::SPEC, errors, |request, path, errors| {
        let audience = request.str_at(&["audience"]);
        if audiences.iter().any(|known| known == audience) {
            errors.push(FieldError::duplicate(path.field("audience"), audience));
            return;
        }
        audiences.push(audience.to_owned());
        let Some(seconds) = request["expirationSeconds"].as_i64() else { return };
        let detail = match seconds {
            ..TEN_MINUTES => "may not specify a duration less than 10 minutes",
            0x1_0000_0001.. => "may not specify a duration larger than 2^32 seconds",
            _ => return,
        };
        errors.push(FieldError::invalid(path.field("expirationSeconds"), seconds, detail));
    });
}

pub fn csi_driver_update(obj: &Value, old: &Value) -> Errors {
    let mut errors = Errors::new();
    // Upstream misspells the first.
    for (field, shown) in [("attachRequired", "attachedRequired"), ("volumeLifecycleModes", "volumeLifecycleModes")] {
        let value = &obj["spec"][field];
        if !same(value, &old["spec"][field]) {
            errors.push(FieldError::invalid(Path::SPEC.field(shown), value.clone(), IMMUTABLE));
        }
    }
    errors
}

pub fn csi_driver_warnings(obj: &Value) -> Vec<String> {
    const TEXT: &str = "spec.serviceAccountTokenInSecrets is unset; if supported by this CSI driver, set to true to prevent possible logging of tokens in volume attributes";
    let spec = &obj["spec"];
    let exposed = !spec.list_at(&["tokenRequests"]).is_empty() && spec["serviceAccountTokenInSecrets"].is_null();
    exposed.then(|| TEXT.to_owned()).into_iter().collect()
}

pub fn csi_storage_capacity(obj: &Value) -> Errors {
    let mut errors = Errors::new();
    label_selector(&obj["nodeTopology"], Path::Root("nodeTopology"), &mut errors);
    let class = obj.str_at(&["storageClassName"]);
    complain(is_dns1123_subdomain(class), class, Path::Root("storageClassName"), &mut errors);
    if quantity(&obj["capacity"]).is_some_and(|amount| amount.signum() < 0) {
        errors.push(FieldError::invalid("capacity", obj["capacity"].clone(), super::IS_NEGATIVE));
    }
    errors
}

pub fn csi_storage_capacity_update(obj: &Value, old: &Value) -> Errors {
    let changed = ["nodeTopology", "storageClassName"].into_iter().filter(|field| !same(&obj[*field], &old[*field]));
    changed.map(|field| FieldError::invalid(field, obj[field].clone(), IMMUTABLE)).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::tests::texts;
    use super::*;

    #[test]
    fn classes_name_topologies_once() {
        let class = |topologies: Value| json!({"provisioner": "p", "volumeBindingMode": "Immediate", "allowedTopologies": topologies});
        let zone = json!({"key": "zone", "values": ["a"]});
        let cases = [
            (class(json!([{"matchLabelExpressions": [zone]}])), vec![]),
            (
                class(json!([{"matchLabelExpressions": [zone, zone]}])),
                vec![r#"allowedTopologies[0].matchLabelExpressions[1].key: Duplicate value: "zone""#],
            ),
            (
                class(json!([{"matchLabelExpressions": [zone]}, {"matchLabelExpressions": [zone]}])),
                vec![r#"allowedTopologies[1].matchLabelExpressions: Duplicate value: """#],
            ),
        ];
        for (obj, expected) in cases {
            assert_eq!(texts(&storage_class(&obj)), expected);
        }
    }

    #[test]
    fn attachments_name_one_volume() {
        let attachment =
            |source: Value| json!({"spec": {"attacher": "d.example.com", "nodeName": "n", "source": source}});
        let cases = [
            (json!({"persistentVolumeName": "v"}), vec![]),
            (
                json!({}),
                vec![
                    "spec.source: Required value: must specify exactly one of inlineVolumeSpec and persistentVolumeName",
                ],
            ),
            (
                json!({"inlineVolumeSpec": {"csi": {}, "accessModes": ["ReadWriteOnce"], "capacity": {"storage": "1Gi"}}}),
                vec![
                    "spec.source.inlineVolumeSpec.capacity: Forbidden: may not be specified in the context of inline volumes",
                ],
            ),
        ];
        for (source, expected) in cases {
            assert_eq!(texts(&volume_attachment(&attachment(source))), expected);
        }
    }

    #[test]
    fn drivers_say_what_tokens_they_want() {
        let driver = |requests: Value| json!({"spec": {"tokenRequests": requests}});
        let cases = [
            (driver(json!([{"audience": "a", "expirationSeconds": 600}])), vec![]),
            (
                driver(json!([{"audience": "a"}, {"audience": "a"}])),
                vec![r#"spec.tokenRequests[1].audience: Duplicate value: "a""#],
            ),
            (
                driver(json!([{"audience": "a", "expirationSeconds": 1}])),
                vec![
                    "spec.tokenRequests[0].expirationSeconds: Invalid value: 1: may not specify a duration less than 10 minutes",
                ],
            ),
        ];
        for (obj, expected) in cases {
            assert_eq!(texts(&csi_driver(&obj)), expected);
        }
        assert_eq!(csi_driver_warnings(&driver(json!([{"audience": "a"}]))).len(), 1);
    }
}
