//! Rules for dynamic resource allocation: claims, their templates, classes, slices and taint rules. Here are the words
//! that these kinds share: names of drivers and pools, expressions, taints, configuration for drivers.

mod capacity;
mod claim;
mod class;
mod device;
mod slice;
mod taint;

use apimachinery::meta::validation::{
    in_bytes, is_dns1123_label, is_dns1123_subdomain, is_dns1123_subdomain_caseless, is_qualified_name,
    is_valid_label_value, regex_error,
};
use apimachinery::status::FieldError;
use serde_json::Value;

pub use claim::{claim, claim_status, claim_update, is_deallocated, template, template_update};
pub use class::{class, class_update};
pub use slice::{slice, slice_update};
pub use taint::{rule, rule_status};

use super::{Errors, IMMUTABLE, Path, complain, each, unique};
use crate::cel::check::{Type, Variables};
use crate::cel::verify::{Wanted, verify};
use crate::registry::object::ObjectExt;

const DRIVER_MAX: usize = 63;
const POOL_MAX: usize = 253;
const DOMAIN_MAX: usize = 63;
const IDENTIFIER_MAX: usize = 32;
const EXPRESSION_MAX: usize = 10 * 1024;
const SELECTORS_MAX: usize = 32;
const PARAMETERS_MAX: usize = 10 * 1024;
const BINDING_CONDITIONS_MAX: usize = 4;

/// A list of at most so many items, each in order; a longer one is not looked into.
fn limited(
    obj: &Value,
    field: &str,
    max: usize,
    path: Path<'_>,
    errors: &mut Errors,
    check: impl FnMut(&Value, Path<'_>, &mut Errors),
) {
    let given = obj.list_at(&[field]).len();
    if given > max {
        errors.push(FieldError::too_many(path.field(field), given, max));
    } else {
        each(obj, field, path, errors, check);
    }
}

/// The same, where no two items have the same key. What repeats is shown whole.
fn limited_set<'v, K: PartialEq>(
    obj: &'v Value,
    field: &str,
    max: usize,
    path: Path<'_>,
    errors: &mut Errors,
    key: impl Fn(&'v Value) -> K,
    check: impl FnMut(&Value, Path<'_>, &mut Errors),
) {
    limited(obj, field, max, path, errors, check);
    let items = obj.list_at(&[field]);
    if items.len() > max {
        return;
    }
    let path = path.field(field);
    let mut seen = Vec::new();
    for (index, item) in items.iter().enumerate() {
        let key = key(item);
        if seen.contains(&key) {
            errors.push(FieldError::duplicate(path.index(index), item.clone()));
        } else {
            seen.push(key);
        }
    }
}

/// The name of a driver, which is that of a CSI driver, too.
fn driver_name(name: &str, path: Path<'_>, errors: &mut Errors) {
    if name.is_empty() {
        errors.push(FieldError::required(path, ""));
        return;
    }
    if name.len() > DRIVER_MAX {
        errors.push(FieldError::too_long(path, DRIVER_MAX));
    }
    complain(is_dns1123_subdomain(&name.to_lowercase()), name, path, errors);
}

/// The same by a declared rule, which says it in other words.
fn declared_driver_name(name: &str, path: Path<'_>, errors: &mut Errors) {
    if name.is_empty() {
        errors.push(FieldError::required(path, ""));
        return;
    }
    complain(is_dns1123_subdomain_caseless(name), name, path, errors);
    if name.chars().count() > DRIVER_MAX {
        errors.push(FieldError::too_many_characters(path, DRIVER_MAX));
    }
}

/// The name of a pool: subdomains with slashes between them.
fn pool_name(name: &str, path: Path<'_>, errors: &mut Errors) {
    if name.is_empty() {
        errors.push(FieldError::required(path, ""));
        return;
    }
    if name.len() > POOL_MAX {
        errors.push(FieldError::too_long(path, POOL_MAX));
    }
    for part in name.split('/') {
        complain(is_dns1123_subdomain(part), part, path, errors);
    }
}

/// The same by a declared rule, which counts the parts.
fn declared_pool_name(name: &str, path: Path<'_>, errors: &mut Errors) {
    if name.is_empty() {
        errors.push(FieldError::required(path, ""));
        return;
    }
    if name.len() > POOL_MAX {
        errors.push(FieldError::too_long(path, POOL_MAX));
    }
    for (index, part) in name.split('/').enumerate() {
        if part.is_empty() {
            errors.push(FieldError::invalid(path, name, format!("segment {index}: must not be empty")));
            continue;
        }
        let messages = in_bytes(is_dns1123_subdomain(part));
        let messages = messages.into_iter().map(|message| format!("segment {index}: {message}"));
        complain(messages.collect(), part, path, errors);
    }
}

fn label(name: &str, path: Path<'_>, errors: &mut Errors) {
    complain(is_dns1123_label(name), name, path, errors);
}

/// The same by a declared rule.
fn declared_label(name: &str, path: Path<'_>, errors: &mut Errors) {
    complain(in_bytes(is_dns1123_label(name)), name, path, errors);
}

/// A name as languages like C have them.
fn identifier(name: &str, path: Path<'_>, errors: &mut Errors) {
    if name.len() > IDENTIFIER_MAX {
        errors.push(FieldError::too_long(path, IDENTIFIER_MAX));
    }
    let starts = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
    if !starts || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') {
        let text = "a valid C identifier must start with alphabetic character or '_', followed by a string of alphanumeric characters or '_'";
        let message = regex_error(text, "[A-Za-z_][A-Za-z0-9_]*", &["my_name", "MY_NAME", "MyName"]);
        errors.push(FieldError::invalid(path, name, message));
    }
}

/// The key of an attribute or a capacity: an identifier, with or without the domain of a driver.
fn attribute_key(name: &str, path: Path<'_>, errors: &mut Errors) {
    let parts: Vec<&str> = name.split('/').collect();
    match parts.as_slice() {
        [id] => identifier(id, path, errors),
        [domain, id] => {
            match *domain {
                "" => errors.push(FieldError::invalid(path, "", "the domain must not be empty")),
                domain => driver_name(domain, path, errors),
            }
            match *id {
                "" => errors.push(FieldError::invalid(path, "", "the name must not be empty")),
                id => identifier(id, path, errors),
            }
        }
        _ => {}
    }
}

/// An identifier with a domain, by a declared rule.
fn full_attribute_name(name: &str, path: Path<'_>, errors: &mut Errors) {
    let parts: Vec<&str> = name.split('/').collect();
    match parts.as_slice() {
        [id] => identifier(id, path, errors),
        [domain, id] => {
            if domain.is_empty() {
                errors.push(FieldError::invalid(path, "", "prefix must not be empty"));
            } else {
                if domain.len() > DOMAIN_MAX {
                    errors.push(FieldError::too_long(path, DOMAIN_MAX));
                }
                let messages = in_bytes(is_dns1123_subdomain(domain));
                let messages = messages.into_iter().map(|message| format!("prefix: {message}"));
                complain(messages.collect(), domain, path, errors);
            }
            match *id {
                "" => errors.push(FieldError::invalid(path, "", "name must not be empty")),
                id => identifier(id, path, errors),
            }
        }
        _ => {}
    }
    if !name.contains('/') {
        let detail = "a fully qualified name must be a domain and a name separated by a slash";
        errors.push(FieldError::invalid(path, name, detail));
    }
}

/// Expressions that choose devices.
fn selectors(holder: &Value, path: Path<'_>, errors: &mut Errors) {
    limited(holder, "selectors", SELECTORS_MAX, path, errors, |selector, path, errors| {
        let path = path.field("cel");
        match selector["cel"].is_object() {
            true => expression(selector.str_at(&["cel", "expression"]), path.field("expression"), errors),
            false => errors.push(FieldError::required(path, "")),
        }
    });
}

fn expression(source: &str, path: Path<'_>, errors: &mut Errors) {
    if source.len() > EXPRESSION_MAX {
        errors.push(FieldError::too_long(path, EXPRESSION_MAX));
        return;
    }
    let detail = match verify(source, &device_variables(), Wanted::Anything) {
        Ok(Type::Bool | Type::Dyn) => return,
        Ok(other) => format!("must evaluate to bool or the unknown type, not {other}"),
        Err(detail) => detail,
    };
    errors.push(FieldError::invalid(path, source, detail));
}

/// What an expression sees of a device; the values of attributes and capacities have types of their own.
fn device_variables() -> Variables<'static> {
    let by_domain = || Type::Map(Box::new(Type::Map(Box::new(Type::Dyn))));
    let device = [
        ("driver", Type::String),
        ("allowMultipleAllocations", Type::Bool),
        ("attributes", by_domain()),
        ("capacity", by_domain()),
    ];
    let device = device.into_iter().map(|(name, kind)| (name.to_owned(), kind)).collect();
    Variables::from([("device".to_owned(), Type::Record(device))])
}

/// What a driver is told: a JSON object that only the driver understands.
fn opaque(holder: &Value, path: Path<'_>, errors: &mut Errors) {
    let path = path.field("opaque");
    let config = &holder["opaque"];
    if config.is_null() {
        errors.push(FieldError::required(path, ""));
        return;
    }
    declared_driver_name(config.str_at(&["driver"]), path.field("driver"), errors);
    if config["parameters"].is_null() {
        errors.push(FieldError::required(path.field("parameters"), ""));
    } else {
        raw_object(&config["parameters"], PARAMETERS_MAX, path.field("parameters"), errors);
    }
}

/// Any JSON object of at most so many bytes.
fn raw_object(value: &Value, max: usize, path: Path<'_>, errors: &mut Errors) {
    if value.to_string().len() > max {
        errors.push(FieldError::too_long(path, max));
    } else if !value.is_object() {
        errors.push(FieldError::invalid(path, "<value omitted>", "must be a valid JSON object"));
    }
}

const EFFECTS: [&str; 3] = ["NoExecute", "NoSchedule", "None"];

/// What is tolerated of a device.
fn toleration(toleration: &Value, path: Path<'_>, errors: &mut Errors) {
    let text = |field: &str| toleration.str_at(&[field]);
    if !text("key").is_empty() {
        complain(is_qualified_name(text("key")), text("key"), path.field("key"), errors);
    }
    let value = text("value");
    match text("operator") {
        "Exists" if !value.is_empty() => {
            errors.push(FieldError::invalid(path.field("value"), value, "must be empty for operator `Exists`"));
        }
        "Exists" => {}
        "Equal" => label_value(value, path.field("value"), errors),
        "" => errors.push(FieldError::required(path.field("operator"), "")),
        other => errors.push(FieldError::not_supported(path.field("operator"), other, &["Equal", "Exists"])),
    }
    super::one_of(toleration, "effect", &EFFECTS, path, errors);
}

fn label_value(value: &str, path: Path<'_>, errors: &mut Errors) {
    complain(is_valid_label_value(value), value, path, errors);
}

/// What is wrong with a device. The effect of the stored taint may stay as it is.
fn taint(taint: &Value, old: Option<&Value>, path: Path<'_>, errors: &mut Errors) {
    let key = taint.str_at(&["key"]);
    complain(is_qualified_name(key), key, path.field("key"), errors);
    label_value(taint.str_at(&["value"]), path.field("value"), errors);
    let effect = taint.str_at(&["effect"]);
    if old.is_none_or(|old| old.str_at(&["effect"]) != effect) {
        super::required_one_of(taint, "effect", &EFFECTS, path, errors);
    }
}

/// Conditions that a device must have, and must not have, before pods that use it start. Either list needs the other.
fn binding_conditions(holder: &Value, path: Path<'_>, errors: &mut Errors) {
    const WANTED: &str = "bindingConditions";
    const FATAL: &str = "bindingFailureConditions";
    for field in [WANTED, FATAL] {
        limited(holder, field, BINDING_CONDITIONS_MAX, path, errors, |name, path, errors| {
            let name = name.as_str().unwrap_or_default();
            complain(is_qualified_name(name), name, path, errors);
        });
    }
    let (wanted, fatal) = (holder.list_at(&[WANTED]), holder.list_at(&[FATAL]));
    for (field, list) in [(WANTED, wanted), (FATAL, fatal)] {
        let path = path.field(field);
        let mut seen = Vec::new();
        for (index, name) in list.iter().enumerate() {
            unique(&mut seen, name.as_str().unwrap_or_default(), path.index(index), errors);
        }
    }
    let fatal_path = path.field(FATAL);
    for (index, name) in fatal.iter().enumerate().filter(|(_, name)| wanted.contains(name)) {
        let detail = "bindingFailureConditions must not overlap with bindingConditions";
        errors.push(FieldError::invalid(fatal_path.index(index), name.clone(), detail));
    }
    if wanted.is_empty() && !fatal.is_empty() {
        let detail = "bindingConditions are required to use bindingFailureConditions";
        errors.push(FieldError::invalid_null(path.field(WANTED), detail));
    }
    if fatal.is_empty() && !wanted.is_empty() {
        let detail = "bindingFailureConditions are required to use bindingConditions";
        errors.push(FieldError::invalid_null(fatal_path, detail));
    }
}
