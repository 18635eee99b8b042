//! Classes of devices.

use apimachinery::meta::validation::is_qualified_name;
use apimachinery::status::FieldError;
use serde_json::Value;

use super::{Errors, Path, complain, limited, opaque, selectors};
use crate::registry::common::same;

const CONFIG_MAX: usize = 32;

pub fn class(obj: &Value) -> Errors {
    rules(obj, None)
}

/// Expressions that are as they were are not looked at again: they were right when they were stored.
pub fn class_update(obj: &Value, old: &Value) -> Errors {
    rules(obj, Some(old))
}

fn rules(obj: &Value, old: Option<&Value>) -> Errors {
    let mut errors = Errors::new();
    let (spec, path) = (&obj["spec"], Path::SPEC);
    if old.is_none_or(|old| !same(&spec["selectors"], &old["spec"]["selectors"])) {
        selectors(spec, path, &mut errors);
    }
    limited(spec, "config", CONFIG_MAX, path, &mut errors, opaque);
    if let Some(name) = spec["extendedResourceName"].as_str() {
        extended_resource(name, path.field("extendedResourceName"), &mut errors);
    }
    errors
}

/// The name under which containers may ask for devices as for any other resource.
fn extended_resource(name: &str, path: Path<'_>, errors: &mut Errors) {
    let mut invalid = |detail: &str| errors.push(FieldError::invalid(path, name, detail));
    if !name.contains('/') {
        invalid("a name must be a domain-prefixed path, such as 'example.com/my-prop'");
    } else if name.contains("kubernetes.io/") {
        invalid("must not have \"kubernetes.io/\" domain");
    }
    if name.starts_with("requests.") {
        invalid("must not have \"requests.\" prefix");
    }
    // Quotas count it under this name.
    complain(is_qualified_name(&format!("requests.{name}")), name, path, errors);
}
