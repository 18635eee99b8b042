//! How much a device has of something, and in which portions claims may take it.

use apimachinery::meta::Quantity;
use apimachinery::status::FieldError;
use serde_json::Value;

use super::super::IS_NEGATIVE;
use super::{Errors, Path};
use crate::registry::core::pod_prepare::quantity;
use crate::registry::object::ObjectExt;

const VALUES_MAX: usize = 10;
const TOO_LARGE: &str = "must not be larger than 9223372036854775807";

/// An amount of a device that can be allocated once, or `shared`.
pub fn capacity(item: &Value, shared: bool, path: Path<'_>, errors: &mut Errors) {
    let (policy, path) = (&item["requestPolicy"], path.field("requestPolicy"));
    if policy.is_null() {
        return;
    }
    if !shared {
        errors.push(FieldError::forbidden(path, "allowMultipleAllocations must be true"));
        return;
    }
    let whole = quantity(&item["value"]).unwrap_or_default();
    let default = quantity(&policy["default"]);
    let values = policy.list_at(&["validValues"]);
    let mut required = |kind: &str| {
        errors.push(FieldError::required(path.field("default"), format!("required when {kind} is defined")));
    };
    match (values.is_empty(), policy["validRange"].is_object(), default) {
        (false, true, _) => {
            let detail = r#"exactly one policy can be specified, cannot specify "validValues" and "validRange" at the same time"#;
            errors.push(FieldError::forbidden(path, detail));
        }
        (true, false, _) => {}
        (false, false, None) => required("validValues"),
        (false, false, Some(default)) => choices(values, default, whole, path.field("validValues"), errors),
        (true, true, None) => required("validRange"),
        (true, true, Some(default)) => {
            range(&policy["validRange"], default, whole, path.field("validRange"), errors);
        }
    }
}

fn choices(values: &[Value], default: Quantity, whole: Quantity, path: Path<'_>, errors: &mut Errors) {
    let values: Vec<Quantity> = values.iter().filter_map(quantity).collect();
    for (index, pair) in values.windows(2).enumerate().filter(|(_, pair)| pair[0] > pair[1]) {
        let detail = "values must be sorted in ascending order";
        errors.push(FieldError::invalid(path.index(index + 1), pair[1].to_string(), detail));
    }
    if values.len() > VALUES_MAX {
        errors.push(FieldError::too_many(path, values.len(), VALUES_MAX));
    } else {
        for (index, value) in values.iter().enumerate() {
            let path = path.index(index);
            if *value > whole {
                let detail = format!("option is larger than capacity value: {whole}");
                errors.push(FieldError::invalid(path, value.to_string(), detail));
            }
            if values[..index].iter().any(|earlier| earlier.value() == value.value()) {
                errors.push(FieldError::duplicate(path, value.value().to_string()));
            }
        }
    }
    if values.len() > VALUES_MAX || !values.contains(&default) {
        let detail = "default value is not valid according to the requestPolicy";
        errors.push(FieldError::invalid(path, default.to_string(), detail));
    }
}

fn range(range: &Value, default: Quantity, whole: Quantity, path: Path<'_>, errors: &mut Errors) {
    let Some(min) = quantity(&range["min"]) else {
        errors.push(FieldError::required(path.field("min"), "required when validRange is defined"));
        return;
    };
    let mut invalid = |field: &str, value: Quantity, detail: String| {
        errors.push(FieldError::invalid(path.field(field), value.to_string(), detail));
    };
    if min > whole {
        invalid("min", min, format!("min is larger than capacity value: {whole}"));
    }
    if default < min {
        invalid("default", default, format!("default is less than min: {min}"));
    }
    let max = quantity(&range["max"]);
    if let Some(max) = max {
        if min > max {
            invalid("max", min, format!("min is larger than max: {max}"));
        }
        if max > whole {
            invalid("max", max, format!("max is larger than capacity value: {whole}"));
        }
        if default > max {
            invalid("default", default, format!("default is more than max: {max}"));
        }
    }
    let Some(step) = quantity(&range["step"]) else { return };
    if step.signum() <= 0 {
        invalid("step", step, "must be greater than zero".into());
        return;
    }
    let added = min.add(step);
    if added > whole {
        invalid("step", step, format!("one step {added} is larger than capacity value: {whole}"));
    }
    let bounds = [("default", Some(default)), ("min", Some(min)), ("max", max), ("step", Some(step))];
    let mut calculable = true;
    for (field, bound) in bounds.into_iter().filter_map(|(field, bound)| Some((field, bound?))) {
        if bound.signum() < 0 {
            invalid(field, bound, IS_NEGATIVE.into());
        } else if bound > Quantity::from_value(i64::MAX, bound.format()) {
            invalid(field, bound, TOO_LARGE.into());
        } else {
            continue;
        }
        calculable = false;
    }
    for value in [Some(default), max].into_iter().flatten().filter(|_| calculable) {
        // A step is at least one: what is smaller counts as one.
        if (value.value() - min.value()) % step.value() != 0 {
            invalid("step", value, format!("value is not a multiple of a given step ({step}) from ({min})"));
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::super::tests::texts;
    use super::*;

    #[test]
    fn portions_fit_the_whole() {
        let told = |policy: Value, shared: bool| {
            let mut errors = Errors::new();
            capacity(&json!({"value": "10", "requestPolicy": policy}), shared, Path::Root("c"), &mut errors);
            texts(&errors)
        };
        let cases = [
            (json!({"default": "2", "validValues": ["1", "2"]}), true, vec![]),
            (json!({"default": "2"}), false, vec!["c.requestPolicy: Forbidden: allowMultipleAllocations must be true"]),
            (
                json!({"default": "2", "validValues": ["1", "20"]}),
                true,
                vec![
                    r#"c.requestPolicy.validValues[1]: Invalid value: "20": option is larger than capacity value: 10"#,
                    r#"c.requestPolicy.validValues: Invalid value: "2": default value is not valid according to the requestPolicy"#,
                ],
            ),
            (json!({"default": "3", "validRange": {"min": "1", "max": "9", "step": "2"}}), true, vec![]),
            (
                json!({"default": "4", "validRange": {"min": "1", "step": "2"}}),
                true,
                vec![
                    r#"c.requestPolicy.validRange.step: Invalid value: "4": value is not a multiple of a given step (2) from (1)"#,
                ],
            ),
            (
                json!({"validRange": {"min": "1"}}),
                true,
                vec!["c.requestPolicy.default: Required value: required when validRange is defined"],
            ),
        ];
        for (policy, shared, expected) in cases {
            assert_eq!(told(policy.clone(), shared), expected, "{policy}");
        }
    }
}
