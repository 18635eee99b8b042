//! One device of a slice: what it is, how much it has, where it is and what is wrong with it.

use std::sync::LazyLock;

use apimachinery::meta::validation::is_dns1123_subdomain;
use apimachinery::status::FieldError;
use regex::Regex;
use serde_json::{Map, Value};

use super::super::{placement, required};
use super::slice::counters;
use super::{
    DOMAIN_MAX, Errors, IDENTIFIER_MAX, Path, attribute_key, binding_conditions, capacity, complain, declared_label,
    label, limited, limited_set, taint,
};
use crate::registry::common::same;
use crate::registry::object::ObjectExt;

const ATTRIBUTES_MAX: usize = 32;
const TEXT_MAX: usize = 64;
const TAINTS_MAX: usize = 16;
const CONSUMPTIONS_MAX: usize = 2;
/// The longest key of an attribute.
const KEY_MAX: usize = DOMAIN_MAX + 1 + IDENTIFIER_MAX;

/// Versions as <https://semver.org> has them.
#[allow(clippy::unwrap_used, reason = "a constant pattern, which the test below compiles")]
static VERSION: LazyLock<Regex> = LazyLock::new(|| {
    let (number, before, build) =
        (r"(0|[1-9][0-9]*)", r"(0|[1-9][0-9]*|[0-9]*[a-zA-Z-][0-9a-zA-Z-]*)", r"[0-9a-zA-Z-]+");
    Regex::new(&format!(r"^{number}\.{number}\.{number}(-{before}(\.{before})*)?(\+{build}(\.{build})*)?$")).unwrap()
});

/// A device, the stored one of the same name, and whether it is where the slice is.
pub fn device(item: &Value, old: Option<&Value>, in_slice: bool, path: Path<'_>, errors: &mut Errors) {
    label(item.str_at(&["name"]), path.field("name"), errors);
    let count = |field: &str| item[field].as_object().map_or(0, Map::len);
    let given = count("attributes") + count("capacity");
    if given > ATTRIBUTES_MAX {
        let detail = format!("the total number of attributes and capacities must not exceed {ATTRIBUTES_MAX}");
        errors.push(FieldError::invalid(path, given, detail));
    }
    keyed(item, "attributes", path, errors, attribute);
    let changed = |field: &str| old.is_none_or(|old| !same(&old[field], &item[field]));
    if changed("capacity") {
        let shared = item["allowMultipleAllocations"] == true;
        keyed(item, "capacity", path, errors, |amount, path, errors| capacity::capacity(amount, shared, path, errors));
    }
    if changed("taints") {
        limited(item, "taints", TAINTS_MAX, path, errors, |item, path, errors| taint(item, None, path, errors));
    }
    let set = |consumption: &Value| consumption.str_at(&["counterSet"]).to_owned();
    limited_set(item, "consumesCounters", CONSUMPTIONS_MAX, path, errors, set, |consumption, path, errors| {
        if let Some(name) = required(consumption, "counterSet", path, errors) {
            declared_label(name, path.field("counterSet"), errors);
        }
        counters(consumption, path, errors);
    });
    place(item, in_slice, path, errors);
    binding_conditions(item, path, errors);
}

/// Every entry of a map; complaints about keys are about the map, those about values show a long key shortened.
fn keyed(
    item: &Value,
    field: &str,
    path: Path<'_>,
    errors: &mut Errors,
    mut check: impl FnMut(&Value, Path<'_>, &mut Errors),
) {
    let path = path.field(field);
    for (key, value) in item[field].as_object().into_iter().flatten() {
        attribute_key(key, path, errors);
        check(value, path.key(&shortened(key)), errors);
    }
}

fn shortened(key: &str) -> String {
    const DOTS: &str = "...";
    let rest = KEY_MAX - DOTS.len();
    let (head, tail) = (rest.div_ceil(2), key.len().saturating_sub(rest / 2));
    match (key.len() > KEY_MAX, key.get(..head), key.get(tail..)) {
        (true, Some(head), Some(tail)) => format!("{head}{DOTS}{tail}"),
        _ => key.to_owned(),
    }
}

fn attribute(attribute: &Value, path: Path<'_>, errors: &mut Errors) {
    const KINDS: [&str; 8] = ["int", "bool", "string", "version", "ints", "bools", "strings", "versions"];
    let version = attribute["version"].as_str();
    if let Some(text) = version.filter(|text| !VERSION.is_match(text)) {
        let detail = "must be a string compatible with semver.org spec 2.0.0";
        errors.push(FieldError::invalid(path.field("version"), text, detail));
    }
    for (field, text) in [("string", attribute["string"].as_str()), ("version", version)] {
        if text.is_some_and(|text| text.len() > TEXT_MAX) {
            errors.push(FieldError::too_long(path.field(field), TEXT_MAX));
        }
    }
    let given: Vec<&str> = KINDS.into_iter().filter(|kind| !attribute[*kind].is_null()).collect();
    let kinds = KINDS.map(|kind| format!("`{kind}`")).join(", ");
    match given.as_slice() {
        [] => errors.push(FieldError::invalid(path, "", format!("must specify one of: {kinds}"))),
        [_] => {}
        several => {
            let detail = format!("must specify exactly one of: {kinds}");
            errors.push(FieldError::invalid(path, format!("{{{}}}", several.join(", ")), detail));
        }
    }
}

/// Which nodes have the device, where the slice leaves that to its devices.
fn place(item: &Value, in_slice: bool, path: Path<'_>, errors: &mut Errors) {
    const FIELDS: [&str; 3] = ["nodeName", "nodeSelector", "allNodes"];
    if in_slice {
        if FIELDS.iter().any(|field| !item[*field].is_null()) {
            let detail = "`nodeName`, `nodeSelector` and `allNodes` can only be set if `perDeviceNodeSelection` is set to true in the ResourceSlice spec";
            errors.push(FieldError::invalid_null(path, detail));
        }
        return;
    }
    let mut given = Vec::new();
    match item["nodeName"].as_str() {
        None => {}
        Some("") => errors.push(FieldError::invalid(path.field("nodeName"), "", "must not be empty")),
        Some(name) => {
            given.push("`nodeName`");
            complain(is_dns1123_subdomain(name), name, path.field("nodeName"), errors);
        }
    }
    if item["nodeSelector"].is_object() {
        given.push("`nodeSelector`");
        placement::node_selector(&item["nodeSelector"], path.field("nodeSelector"), errors);
    }
    match item["allNodes"].as_bool() {
        None => {}
        Some(true) => given.push("`allNodes`"),
        Some(false) => {
            errors.push(FieldError::invalid(path.field("allNodes"), false, "must be either unset or set to true"));
        }
    }
    let detail = "exactly one of `nodeName`, `nodeSelector`, or `allNodes` is required when `perDeviceNodeSelection` is set to true in the ResourceSlice spec";
    match given.as_slice() {
        [] => errors.push(FieldError::required(path, detail)),
        [_] => {}
        several => errors.push(FieldError::invalid(path, format!("{{{}}}", several.join(", ")), detail)),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::super::tests::texts;
    use super::*;

    #[test]
    fn versions_are_semantic() {
        let found = ["1.2.3", "1.2.3-rc.1+build.5", "1.2", "01.2.3", "v1.2.3", "1.2.3-"].map(|v| VERSION.is_match(v));
        assert_eq!(found, [true, true, false, false, false, false]);
    }

    #[test]
    fn attributes_have_one_value() {
        let told = |value: Value| {
            let mut errors = Errors::new();
            attribute(&value, Path::Root("a"), &mut errors);
            texts(&errors)
        };
        let kinds = "`int`, `bool`, `string`, `version`, `ints`, `bools`, `strings`, `versions`";
        assert!(told(json!({"int": 1})).is_empty());
        assert_eq!(told(json!({})), [format!(r#"a: Invalid value: "": must specify one of: {kinds}"#)]);
        let expected = format!(r#"a: Invalid value: "{{int, bool}}": must specify exactly one of: {kinds}"#);
        assert_eq!(told(json!({"bool": true, "int": 1})), [expected]);
    }

    #[test]
    fn long_keys_are_shortened_in_the_middle() {
        let key = "k".repeat(200);
        assert_eq!(shortened(&key).len(), KEY_MAX);
        assert_eq!(shortened("short"), "short");
        assert_eq!(shortened(&"ß".repeat(100)), "ß".repeat(100), "letters are never cut");
    }
}
