//! Claims of devices, and templates of claims.

use apimachinery::meta::validation::{in_bytes, is_dns1123_subdomain};
use apimachinery::status::FieldError;
use ipnet::IpNet;
use serde_json::Value;

use super::super::storage::template_metadata;
use super::super::{conditions, placement, required, required_one_of};
use super::{
    Errors, IMMUTABLE, Path, binding_conditions, complain, declared_driver_name, declared_pool_name, driver_name,
    full_attribute_name, label, limited, limited_set, opaque, pool_name, raw_object, selectors, toleration,
};
use crate::registry::common::same;
use crate::registry::object::ObjectExt;

const REQUESTS_MAX: usize = 32;
const ALTERNATIVES_MAX: usize = 8;
const CONSTRAINTS_MAX: usize = 32;
const CONFIG_MAX: usize = 32;
/// Of the class and of the claim.
const ALLOCATED_CONFIG_MAX: usize = 2 * CONFIG_MAX;
const RESERVATIONS_MAX: usize = 256;
const CONDITIONS_MAX: usize = 8;
const DATA_MAX: usize = 10 * 1024;
const INTERFACE_NAME_MAX: usize = 256;
const HARDWARE_ADDRESS_MAX: usize = 128;
const ADDRESSES_MAX: usize = 16;

pub fn claim(obj: &Value) -> Errors {
    let mut errors = Errors::new();
    spec(&obj["spec"], Path::SPEC, &mut errors);
    errors
}

/// The spec never changes; nothing else is said of it.
pub fn claim_update(obj: &Value, old: &Value) -> Errors {
    let mut errors = Errors::new();
    if !same(&obj["spec"], &old["spec"]) {
        errors.push(FieldError::invalid_null("spec", IMMUTABLE));
    }
    errors
}

pub fn template(obj: &Value) -> Errors {
    let mut errors = Errors::new();
    template_metadata(&obj["spec"]["metadata"], Path::SPEC.field("metadata"), &mut errors);
    spec(&obj["spec"]["spec"], Path::SPEC.field("spec"), &mut errors);
    errors
}

pub fn template_update(obj: &Value, old: &Value) -> Errors {
    let mut errors = Errors::new();
    if !same(&obj["spec"], &old["spec"]) {
        errors.push(FieldError::invalid("spec", obj["spec"].clone(), IMMUTABLE));
    }
    errors
}

fn spec(spec: &Value, path: Path<'_>, errors: &mut Errors) {
    let (devices, path) = (&spec["devices"], path.field("devices"));
    let names = RequestNames(devices);
    let name = |item: &Value| item.str_at(&["name"]).to_owned();
    limited_set(devices, "requests", REQUESTS_MAX, path, errors, name, request);
    limited(devices, "constraints", CONSTRAINTS_MAX, path, errors, |item, path, errors| {
        constraint(item, names, path, errors);
    });
    limited(devices, "config", CONFIG_MAX, path, errors, |item, path, errors| {
        request_references(item, names, path, errors);
        opaque(item, path, errors);
    });
}

/// The names of the requests of a claim, and of their alternatives.
#[derive(Clone, Copy)]
struct RequestNames<'v>(&'v Value);

impl RequestNames<'_> {
    /// Whether `request` or `request/alternative` is there.
    fn has(self, name: &str) -> bool {
        let (request, alternative) = match name.split_once('/') {
            Some((request, alternative)) => (request, Some(alternative)),
            None => (name, None),
        };
        let named = |item: &&Value, name: &str| item.str_at(&["name"]) == name;
        // Of requests with the same name the last one counts.
        let found = self.0.list_at(&["requests"]).iter().rfind(|item| named(item, request));
        found.is_some_and(|found| {
            alternative.is_none_or(|name| found.list_at(&["firstAvailable"]).iter().any(|item| named(&item, name)))
        })
    }
}

fn request_reference(name: &str, names: RequestNames<'_>, path: Path<'_>, errors: &mut Errors) {
    let detail =
        "must be the name of a request in the claim or the name of a request and a subrequest separated by '/'";
    let parts: Vec<&str> = name.split('/').collect();
    if parts.len() > 2 {
        errors.push(FieldError::invalid(path, name, detail));
        return;
    }
    parts.into_iter().for_each(|part| label(part, path, errors));
    if !names.has(name) {
        errors.push(FieldError::invalid(path, name, detail));
    }
}

fn request_references(holder: &Value, names: RequestNames<'_>, path: Path<'_>, errors: &mut Errors) {
    let key = |item: &Value| item.clone();
    limited_set(holder, "requests", REQUESTS_MAX, path, errors, key, |item, path, errors| {
        request_reference(item.as_str().unwrap_or_default(), names, path, errors);
    });
}

/// Devices of one class, or the first of several alternatives.
fn request(item: &Value, path: Path<'_>, errors: &mut Errors) {
    label(item.str_at(&["name"]), path.field("name"), errors);
    let exactly = item["exactly"].is_object();
    match (exactly, !item.list_at(&["firstAvailable"]).is_empty()) {
        (false, false) => {
            errors.push(FieldError::required(path, "exactly one of `exactly` or `firstAvailable` is required"));
        }
        (true, true) => {
            let detail = "exactly one of `exactly` or `firstAvailable` is required, but multiple fields are set";
            errors.push(FieldError::invalid_null(path, detail));
        }
        (true, false) => {
            let (exactly, path) = (&item["exactly"], path.field("exactly"));
            if let Some(class) = required(exactly, "deviceClassName", path, errors) {
                complain(is_dns1123_subdomain(class), class, path.field("deviceClassName"), errors);
            }
            devices_of_class(exactly, path, errors);
        }
        (false, true) => {
            let name = |item: &Value| item.str_at(&["name"]).to_owned();
            limited_set(item, "firstAvailable", ALTERNATIVES_MAX, path, errors, name, |item, path, errors| {
                label(item.str_at(&["name"]), path.field("name"), errors);
                if let Some(class) = required(item, "deviceClassName", path, errors) {
                    complain(in_bytes(is_dns1123_subdomain(class)), class, path.field("deviceClassName"), errors);
                }
                devices_of_class(item, path, errors);
            });
        }
    }
}

fn devices_of_class(request: &Value, path: Path<'_>, errors: &mut Errors) {
    selectors(request, path, errors);
    let count = request["count"].as_i64().unwrap_or(0);
    match request.str_at(&["allocationMode"]) {
        "All" if count != 0 => {
            let detail = "must not be specified when allocationMode is 'All'";
            errors.push(FieldError::invalid(path.field("count"), count, detail));
        }
        "ExactCount" if count <= 0 => {
            errors.push(FieldError::invalid(path.field("count"), count, "must be greater than zero"));
        }
        "All" | "ExactCount" => {}
        other => {
            errors.push(FieldError::not_supported(path.field("allocationMode"), other, &["All", "ExactCount"]));
        }
    }
    super::each(request, "tolerations", path, errors, toleration);
}

/// An attribute that all devices of some requests share, or none of them share.
fn constraint(item: &Value, names: RequestNames<'_>, path: Path<'_>, errors: &mut Errors) {
    request_references(item, names, path, errors);
    for field in ["matchAttribute", "distinctAttribute"] {
        if let Some(name) = item[field].as_str() {
            full_attribute_name(name, path.field(field), errors);
        }
    }
    if item["matchAttribute"].is_null() && item["distinctAttribute"].is_null() {
        // The words of the opposite mistake are upstream's.
        let detail =
            r#"exactly one of "matchAttribute" or "distinctAttribute" is required, but multiple fields are set"#;
        errors.push(FieldError::required(path, detail));
    }
}

/// What the scheduler and the drivers write.
pub fn claim_status(obj: &Value, old: &Value) -> Errors {
    let mut errors = Errors::new();
    let (status, stored, path) = (&obj["status"], &old["status"], Path::STATUS);
    let names = RequestNames(&obj["spec"]["devices"]);
    let uid = |item: &Value| item.str_at(&["uid"]).to_owned();
    limited_set(status, "reservedFor", RESERVATIONS_MAX, path, &mut errors, uid, |user, path, errors| {
        for field in ["resource", "name", "uid"] {
            required(user, field, path, errors);
        }
    });
    limited_set(status, "devices", usize::MAX, path, &mut errors, device_id, |device, path, errors| {
        device_status(device, &status["allocation"], path, errors);
    });
    reservations(status, stored, obj.is_being_deleted(), path.field("reservedFor"), &mut errors);
    match (status["allocation"].is_object(), stored["allocation"].is_object()) {
        (true, true) if !same(&status["allocation"], &stored["allocation"]) => {
            errors.push(FieldError::invalid_null(path.field("allocation"), "field cannot be modified once set"));
        }
        (true, false) => allocation(&status["allocation"], names, path.field("allocation"), &mut errors),
        _ => {}
    }
    errors
}

fn reservations(status: &Value, stored: &Value, deleted: bool, path: Path<'_>, errors: &mut Errors) {
    let users = status.list_at(&["reservedFor"]);
    if users.is_empty() {
        return;
    }
    if !status["allocation"].is_object() {
        errors.push(FieldError::forbidden(path, "may not be specified when `allocated` is not set"));
    } else if deleted && users.iter().any(|user| !stored.list_at(&["reservedFor"]).contains(user)) {
        let detail = "new entries may not be added while `deallocationRequested` or `deletionTimestamp` are set";
        errors.push(FieldError::forbidden(path, detail));
    }
}

/// Driver, pool, device and share.
fn device_id(device: &Value) -> [String; 4] {
    ["driver", "pool", "device", "shareID"].map(|field| device.str_at(&[field]).to_owned())
}

/// Devices of the status that the claim no longer has: what a driver says of them goes with them.
pub fn is_deallocated(device: &Value, status: &Value, stored: &Value) -> bool {
    let has = |status: &Value| {
        let results = status.list_at(&["allocation", "devices", "results"]);
        results.iter().any(|result| device_id(result) == device_id(device))
    };
    has(stored) && !has(status)
}

fn device_status(device: &Value, allocation: &Value, path: Path<'_>, errors: &mut Errors) {
    driver_name(device.str_at(&["driver"]), path.field("driver"), errors);
    pool_name(device.str_at(&["pool"]), path.field("pool"), errors);
    label(device.str_at(&["device"]), path.field("device"), errors);
    share_id(device, path, errors);
    let allocated = allocation.list_at(&["devices", "results"]);
    if !allocated.iter().any(|result| device_id(result) == device_id(device)) {
        let detail = "must be an allocated device in the claim";
        let part = |field| Value::from(device.str_at(&[field]));
        let (driver, pool, name, share) = (part("driver"), part("pool"), part("device"), part("shareID"));
        let shown = format!(r#"{{"Driver":{driver},"Pool":{pool},"Device":{name},"ShareID":{share}}}"#);
        errors.push(FieldError::invalid_shown(path, &shown, detail));
    }
    let given = device.list_at(&["conditions"]).len();
    if given > CONDITIONS_MAX {
        errors.push(FieldError::too_many(path.field("conditions"), given, CONDITIONS_MAX));
    }
    conditions::conditions(device, path, errors);
    if !device["data"].is_null() {
        raw_object(&device["data"], DATA_MAX, path.field("data"), errors);
    }
    network_data(&device["networkData"], path.field("networkData"), errors);
}

fn network_data(data: &Value, path: Path<'_>, errors: &mut Errors) {
    for (field, max) in [("interfaceName", INTERFACE_NAME_MAX), ("hardwareAddress", HARDWARE_ADDRESS_MAX)] {
        if data.str_at(&[field]).len() > max {
            errors.push(FieldError::too_long(path.field(field), max));
        }
    }
    let key = |item: &Value| item.clone();
    limited_set(data, "ips", ADDRESSES_MAX, path, errors, key, |address, path, errors| {
        interface_address(address.as_str().unwrap_or_default(), path, errors);
    });
}

/// An address of an interface with the length of its network's prefix, in the one form that it is written in.
fn interface_address(text: &str, path: Path<'_>, errors: &mut Errors) {
    match text.parse::<IpNet>() {
        Err(_) => {
            let detail = "must be a valid address in CIDR form, (e.g. 10.9.8.7/24 or 2001:db8::1/64)";
            errors.push(FieldError::invalid(path, text, detail));
        }
        Ok(address) if address.to_string() != text => {
            let detail = format!("must be in canonical form (\"{address}\")");
            errors.push(FieldError::invalid(path, text, detail));
        }
        Ok(_) => {}
    }
}

fn share_id(holder: &Value, path: Path<'_>, errors: &mut Errors) {
    let Some(id) = holder["shareID"].as_str() else { return };
    let fits = |(index, byte): (usize, u8)| match index {
        8 | 13 | 18 | 23 => byte == b'-',
        _ => matches!(byte, b'0'..=b'9' | b'a'..=b'f'),
    };
    if id.len() != 36 || !id.bytes().enumerate().all(fits) {
        let detail = "must be a lowercase UUID in 8-4-4-4-12 format";
        errors.push(FieldError::invalid(path.field("shareID"), id, detail));
    }
}

/// What the scheduler chose.
fn allocation(allocation: &Value, names: RequestNames<'_>, path: Path<'_>, errors: &mut Errors) {
    let (devices, devices_path) = (&allocation["devices"], path.field("devices"));
    limited(devices, "results", REQUESTS_MAX, devices_path, errors, |result, path, errors| {
        request_reference(result.str_at(&["request"]), names, path.field("request"), errors);
        declared_driver_name(result.str_at(&["driver"]), path.field("driver"), errors);
        declared_pool_name(result.str_at(&["pool"]), path.field("pool"), errors);
        label(result.str_at(&["device"]), path.field("device"), errors);
        binding_conditions(result, path, errors);
        super::each(result, "tolerations", path, errors, toleration);
        share_id(result, path, errors);
    });
    limited(devices, "config", ALLOCATED_CONFIG_MAX, devices_path, errors, |config, path, errors| {
        required_one_of(config, "source", &["FromClaim", "FromClass"], path, errors);
        request_references(config, names, path, errors);
        opaque(config, path, errors);
    });
    if allocation["nodeSelector"].is_object() {
        placement::node_selector(&allocation["nodeSelector"], path.field("nodeSelector"), errors);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::super::tests::texts;
    use super::*;

    fn claim_of(devices: Value) -> Value {
        json!({"spec": {"devices": devices}})
    }

    fn exactly(name: &str, more: Value) -> Value {
        let mut request = json!({"deviceClassName": "c.example.com", "allocationMode": "ExactCount", "count": 1});
        request.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        json!({"name": name, "exactly": request})
    }

    #[test]
    fn requests_are_what_upstream_accepts() {
        let selector = |text: &str| json!({"selectors": [{"cel": {"expression": text}}]});
        let at = "spec.devices.requests[0]";
        let cases = [
            (exactly("a", json!({})), vec![]),
            (exactly("a", selector("device.attributes['d'].fast && device.driver == 'd'")), vec![]),
            (
                exactly("a", selector("device.driver")),
                vec![format!(
                    r#"{at}.exactly.selectors[0].cel.expression: Invalid value: "device.driver": must evaluate to bool or the unknown type, not string"#
                )],
            ),
            (
                exactly("a", json!({"allocationMode": "All"})),
                vec![format!(
                    "{at}.exactly.count: Invalid value: 1: must not be specified when allocationMode is 'All'"
                )],
            ),
            (
                json!({"name": "a"}),
                vec![format!("{at}: Required value: exactly one of `exactly` or `firstAvailable` is required")],
            ),
        ];
        for (request, expected) in cases {
            assert_eq!(texts(&claim(&claim_of(json!({"requests": [request]})))), expected, "{request}");
        }
    }

    #[test]
    fn references_lead_to_requests_and_their_alternatives() {
        let alternative = json!({"name": "x", "deviceClassName": "c", "allocationMode": "All"});
        let requests = json!([exactly("a", json!({})), {"name": "b", "firstAvailable": [alternative]}]);
        let devices = claim_of(json!({"requests": requests}));
        let names = RequestNames(&devices["spec"]["devices"]);
        let found = ["a", "b", "b/x", "a/x", "b/y", "c", "b/x/y"].map(|name| names.has(name));
        assert_eq!(found, [true, true, true, false, false, false, false]);
    }

    #[test]
    fn reservations_need_an_allocation_that_stays() {
        let allocated = |device: &str| {
            let results = json!([{"request": "a", "driver": "d.example.com", "pool": "p", "device": device}]);
            let mut obj = claim_of(json!({"requests": [exactly("a", json!({}))]}));
            obj["status"] = json!({"allocation": {"devices": {"results": results}}});
            obj
        };
        assert!(claim_status(&allocated("d"), &json!({})).is_empty());
        let expected = ["status.allocation: Invalid value: null: field cannot be modified once set"];
        assert_eq!(texts(&claim_status(&allocated("d"), &allocated("e"))), expected);
        let reserved = json!({"status": {"reservedFor": [{"resource": "pods", "name": "p", "uid": "u"}]}});
        let expected = ["status.reservedFor: Forbidden: may not be specified when `allocated` is not set"];
        assert_eq!(texts(&claim_status(&reserved, &json!({}))), expected);
    }
}
