//! What an object must satisfy to be stored, beyond its schema: upstream's rules with upstream's field paths, reasons
//! and texts, since clients and people search for them. Rules look at the object (and its stored state), never at
//! other objects; they never change anything.

pub mod admission;
pub mod apiextensions;
pub mod apps;
pub mod autoscaling;
pub mod batch;
pub mod certificates;
pub mod conditions;
pub mod container;
pub mod coordination;
pub mod core;
pub mod custom_schema;
pub mod discovery;
pub mod env;
pub mod event;
pub mod flowcontrol;
pub mod go_versions;
pub mod job_policies;
pub mod job_status;
pub mod mounts;
pub mod networking;
pub mod persistent_volume;
pub mod placement;
pub mod pod;
pub mod pod_status;
pub mod pod_update;
pub mod policy;
pub mod projected;
pub mod rbac;
pub mod requirements;
pub mod resource;
pub mod scheduling;
pub mod schema_rules;
pub mod security;
pub mod service;
pub mod storage;
pub mod storage_classes;
pub mod storagemigration;
pub mod structural;
pub mod volume;
pub mod volume_sources;
pub mod warnings;
pub mod webhooks;
pub mod windows;

use std::fmt;

use apimachinery::meta::validation::{is_dns1123_label, is_qualified_name, is_valid_label_value, is_valid_percent};
use apimachinery::status::FieldError;
use serde_json::Value;

use super::common::same;
use super::object::ObjectExt;

pub type Errors = Vec<FieldError>;

/// The way to a field, spelled out only when there is something to complain about.
#[derive(Clone, Copy)]
pub enum Path<'a> {
    Root(&'a str),
    Field(&'a Path<'a>, &'a str),
    Index(&'a Path<'a>, usize),
    Key(&'a Path<'a>, &'a str),
}

impl<'a> Path<'a> {
    pub const SPEC: Self = Self::Root("spec");
    pub const METADATA: Self = Self::Root("metadata");
    pub const STATUS: Self = Self::Root("status");

    /// `a.b`
    pub const fn field(&'a self, name: &'a str) -> Self {
        Self::Field(self, name)
    }

    /// `a[0]`
    pub const fn index(&'a self, index: usize) -> Self {
        Self::Index(self, index)
    }

    /// `a[key]`
    pub const fn key(&'a self, key: &'a str) -> Self {
        Self::Key(self, key)
    }
}

impl fmt::Display for Path<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Root(name) => f.write_str(name),
            Self::Field(parent, name) => write!(f, "{parent}.{name}"),
            Self::Index(parent, index) => write!(f, "{parent}[{index}]"),
            Self::Key(parent, key) => write!(f, "{parent}[{key}]"),
        }
    }
}

pub const IS_NEGATIVE: &str = "must be greater than or equal to 0";
pub const IS_NOT_POSITIVE: &str = "must be greater than 0";
pub const IMMUTABLE: &str = "field is immutable";

/// The number in a field, when there is one, is not negative.
pub fn non_negative(obj: &Value, field: &str, path: Path<'_>, errors: &mut Errors) {
    if let Some(number) = obj[field].as_i64().filter(|n| *n < 0) {
        errors.push(FieldError::invalid(path.field(field), number, IS_NEGATIVE));
    }
}

/// The number in a field, when there is one, is positive.
pub fn positive(obj: &Value, field: &str, path: Path<'_>, errors: &mut Errors) {
    if let Some(number) = obj[field].as_i64().filter(|n| *n <= 0) {
        errors.push(FieldError::invalid(path.field(field), number, IS_NOT_POSITIVE));
    }
}

/// A text that must be there; `None` when it is not.
pub fn required<'v>(obj: &'v Value, field: &str, path: Path<'_>, errors: &mut Errors) -> Option<&'v str> {
    let text = obj.str_at(&[field]);
    if text.is_empty() {
        errors.push(FieldError::required(path.field(field), ""));
        return None;
    }
    Some(text)
}

/// A text that, when it is there, is one of these.
pub fn one_of(obj: &Value, field: &str, allowed: &[&str], path: Path<'_>, errors: &mut Errors) {
    let text = obj.str_at(&[field]);
    if !text.is_empty() && !allowed.contains(&text) {
        errors.push(FieldError::not_supported(path.field(field), text, allowed));
    }
}

/// A text that, when it is given, be it empty, is one of these.
pub fn one_of_given(obj: &Value, field: &str, allowed: &[&str], path: Path<'_>, errors: &mut Errors) {
    if let Some(text) = obj[field].as_str().filter(|text| !allowed.contains(text)) {
        errors.push(FieldError::not_supported(path.field(field), text, allowed));
    }
}

/// A text that must be there and one of these.
pub fn required_one_of(obj: &Value, field: &str, allowed: &[&str], path: Path<'_>, errors: &mut Errors) {
    if required(obj, field, path, errors).is_some() {
        one_of(obj, field, allowed, path, errors);
    }
}

/// Every message of a check of a text, as an error of the field.
pub fn complain(messages: Vec<String>, text: &str, path: Path<'_>, errors: &mut Errors) {
    errors.extend(messages.into_iter().map(|message| FieldError::invalid(path, text, message)));
}

/// A DNS label that, when it is there, is well formed.
pub fn dns_label(obj: &Value, field: &str, path: Path<'_>, errors: &mut Errors) {
    let text = obj.str_at(&[field]);
    if !text.is_empty() {
        complain(is_dns1123_label(text), text, path.field(field), errors);
    }
}

/// A map of labels.
pub fn labels(map: &Value, path: Path<'_>, errors: &mut Errors) {
    for (key, value) in map.as_object().into_iter().flatten() {
        complain(is_qualified_name(key), key, path, errors);
        let text = value.as_str().unwrap_or_default();
        for message in is_valid_label_value(text) {
            errors.push(FieldError::invalid(path, text, message));
        }
    }
}

/// The keys of annotations, and that they are not too much altogether.
pub fn annotations(map: &Value, path: Path<'_>, errors: &mut Errors) {
    const TOTAL: usize = 256 * 1024;
    let mut total = 0;
    for (key, value) in map.as_object().into_iter().flatten() {
        complain(is_qualified_name(&key.to_lowercase()), key, path, errors);
        total += key.len() + value.as_str().map_or(0, str::len);
    }
    if total > TOTAL {
        errors.push(FieldError::too_long(path, TOTAL));
    }
}

/// A `LabelSelector` object.
pub fn label_selector(selector: &Value, path: Path<'_>, errors: &mut Errors) {
    labels(&selector["matchLabels"], path.field("matchLabels"), errors);
    for (index, expression) in selector.list_at(&["matchExpressions"]).iter().enumerate() {
        let path = path.field("matchExpressions");
        let path = path.index(index);
        let values = expression.list_at(&["values"]);
        match expression.str_at(&["operator"]) {
            "In" | "NotIn" if values.is_empty() => {
                let detail = "must be specified when `operator` is 'In' or 'NotIn'";
                errors.push(FieldError::required(path.field("values"), detail));
            }
            "Exists" | "DoesNotExist" if !values.is_empty() => {
                let detail = "may not be specified when `operator` is 'Exists' or 'DoesNotExist'";
                errors.push(FieldError::forbidden(path.field("values"), detail));
            }
            "In" | "NotIn" | "Exists" | "DoesNotExist" => {}
            other => errors.push(FieldError::invalid(path.field("operator"), other, "not a valid selector operator")),
        }
        let key = expression.str_at(&["key"]);
        complain(is_qualified_name(key), key, path.field("key"), errors);
        for (index, value) in values.iter().enumerate() {
            let text = value.as_str().unwrap_or_default();
            let path = path.field("values");
            complain(is_valid_label_value(text), text, path.index(index), errors);
        }
    }
}

/// Whether a selector selects everything, or nothing is said.
pub fn selects_all(selector: &Value) -> bool {
    let terms = |field: &str| super::tables::count(&selector[field]);
    terms("matchLabels") + terms("matchExpressions") == 0
}

/// A field that may not change.
pub fn immutable(obj: &Value, old: &Value, field: &str, path: Path<'_>, errors: &mut Errors) {
    if !same(&obj[field], &old[field]) {
        errors.push(FieldError::invalid(path.field(field), obj[field].clone(), IMMUTABLE));
    }
}

/// A count or a percentage.
pub fn int_or_percent(value: &Value, path: Path<'_>, errors: &mut Errors) {
    match value {
        Value::String(text) => complain(is_valid_percent(text), text, path, errors),
        Value::Number(number) if number.as_i64().is_some_and(|n| n < 0) => {
            errors.push(FieldError::invalid(path, value.clone(), IS_NEGATIVE));
        }
        _ => {}
    }
}

/// The number of percent, where it is one.
pub fn percent(value: &Value) -> Option<i64> {
    value.as_str()?.strip_suffix('%')?.parse().ok()
}

/// A percentage of at most all.
pub fn at_most_all(value: &Value, path: Path<'_>, errors: &mut Errors) {
    if percent(value).is_some_and(|p| p > 100) {
        errors.push(FieldError::invalid(path, value.clone(), "must not be greater than 100%"));
    }
}

/// Runs a check on every item of a list, with its path.
pub fn each(
    obj: &Value,
    field: &str,
    path: Path<'_>,
    errors: &mut Errors,
    mut check: impl FnMut(&Value, Path<'_>, &mut Errors),
) {
    let path = path.field(field);
    for (index, item) in obj.list_at(&[field]).iter().enumerate() {
        check(item, path.index(index), errors);
    }
}

/// Names that may not repeat; the first repetition is complained about.
pub fn unique<'v>(seen: &mut Vec<&'v str>, text: &'v str, path: Path<'_>, errors: &mut Errors) {
    if text.is_empty() {
        return;
    }
    if seen.contains(&text) {
        errors.push(FieldError::duplicate(path, text));
    } else {
        seen.push(text);
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use serde_json::json;

    use super::*;

    /// What a check complains about, as users read it.
    pub fn texts(errors: &[FieldError]) -> Vec<String> {
        errors.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn selectors_are_checked_term_by_term() {
        let selector = json!({"matchLabels": {"a": "b"}, "matchExpressions": [
            {"key": "a", "operator": "In"}, {"key": "a", "operator": "Exists", "values": ["x"]}, {"key": "a", "operator": "Gt"}]});
        let mut errors = Errors::new();
        label_selector(&selector, Path::SPEC.field("selector"), &mut errors);
        let expected = [
            "spec.selector.matchExpressions[0].values: Required value: must be specified when `operator` is 'In' or 'NotIn'",
            "spec.selector.matchExpressions[1].values: Forbidden: may not be specified when `operator` is 'Exists' or 'DoesNotExist'",
            r#"spec.selector.matchExpressions[2].operator: Invalid value: "Gt": not a valid selector operator"#,
        ];
        assert_eq!(texts(&errors), expected);
    }

    #[test]
    fn paths_read_as_users_know_them() {
        let list = Path::SPEC.field("containers");
        let item = list.index(2);
        assert_eq!(item.field("name").to_string(), "spec.containers[2].name");
        assert_eq!(Path::Root("data").key("a.b").to_string(), "data[a.b]");
    }
}
