//! Metrics as the annotations of `autoscaling/v1` have them: flatter than in `v2`, and under older names. What is written
//! there has its fields in upstream's order, since the annotations are texts that clients compare.

use serde_json::{Value, json};

use crate::registry::object::ObjectExt;

/// The field that holds a metric of this type.
fn field_of(kind: &str) -> Option<&'static str> {
    let fields = [
        ("Object", "object"),
        ("Pods", "pods"),
        ("Resource", "resource"),
        ("ContainerResource", "containerResource"),
        ("External", "external"),
    ];
    fields.iter().find(|(name, _)| *name == kind).map(|(_, field)| *field)
}

/// JSON of an object with its fields in this order; what is null is left out.
fn ordered(fields: &[(String, Value)]) -> String {
    let fields = fields.iter().filter(|(_, value)| !value.is_null());
    let texts: Vec<String> = fields.map(|(name, value)| format!("{}:{value}", Value::from(name.as_str()))).collect();
    format!("{{{}}}", texts.join(","))
}

/// Amounts that are always written.
fn or_zero(amount: &Value) -> Value {
    if amount.is_null() { "0".into() } else { amount.clone() }
}

/// A metric of `v2` as `v1` writes it; `side` is `target` in the spec and `current` in the status.
pub fn to_old(metric: &Value, side: &str) -> String {
    let kind = metric.str_at(&["type"]);
    let Some(field) = field_of(kind) else { return ordered(&[("type".into(), kind.into())]) };
    let source = &metric[field];
    let (amounts, about) = (&source[side], &source["metric"]);
    let is_current = side == "current";
    let needed = |amount: &Value| if is_current { or_zero(amount) } else { amount.clone() };
    let own = |name: &str, value: Value| (name.to_owned(), value);
    let sided = |name: &str, value: Value| (format!("{side}{name}"), value);
    let (name, selector) = (about["name"].clone(), about["selector"].clone());
    let fields = match field {
        "object" => vec![
            own("target", source["describedObject"].clone()),
            own("metricName", name),
            sided("Value", or_zero(&amounts["value"])),
            own("selector", selector),
            own("averageValue", amounts["averageValue"].clone()),
        ],
        "pods" => vec![
            own("metricName", name),
            sided("AverageValue", or_zero(&amounts["averageValue"])),
            own("selector", selector),
        ],
        "external" => vec![
            own("metricName", name),
            own("metricSelector", selector),
            sided("Value", needed(&amounts["value"])),
            sided("AverageValue", amounts["averageValue"].clone()),
        ],
        _ => vec![
            own("name", source["name"].clone()),
            sided("AverageUtilization", amounts["averageUtilization"].clone()),
            sided("AverageValue", needed(&amounts["averageValue"])),
            own("container", source["container"].clone()),
        ],
    };
    format!("{{\"type\":{},\"{field}\":{}}}", Value::from(kind), ordered(&fields))
}

/// A metric of `v1` as `v2` has it.
pub fn from_old(metric: &Value, side: &str) -> Value {
    let kind = metric.str_at(&["type"]);
    let Some(field) = field_of(kind) else { return json!({"type": kind}) };
    let source = &metric[field];
    let sided = |name: &str| source[format!("{side}{name}")].clone();
    let mut amounts = json!({
        "value": sided("Value"),
        "averageValue": if field == "object" { source["averageValue"].clone() } else { sided("AverageValue") },
        "averageUtilization": sided("AverageUtilization"),
    });
    if side == "target" {
        let given = |name: &str| !amounts[name].is_null();
        let kind = match () {
            () if given("averageUtilization") => "Utilization",
            () if given("averageValue") => "AverageValue",
            () => "Value",
        };
        amounts["type"] = kind.into();
    }
    let selector = if field == "external" { &source["metricSelector"] } else { &source["selector"] };
    let mut converted = json!({
        "describedObject": source["target"],
        "metric": {"name": source["metricName"], "selector": selector},
        "name": source["name"],
        "container": source["container"],
    });
    converted[side] = amounts;
    let mut newer = json!({"type": kind});
    newer[field] = converted;
    without_nulls(&mut newer);
    newer
}

fn without_nulls(value: &mut Value) {
    if let Value::Object(fields) = value {
        fields.values_mut().for_each(without_nulls);
        fields.retain(|_, value| !value.is_null() && !value.as_object().is_some_and(serde_json::Map::is_empty));
    }
}

/// A condition as JSON.
pub fn condition(condition: &Value) -> String {
    let names = ["type", "status", "lastTransitionTime", "reason", "message", "observedGeneration"];
    ordered(&names.map(|name| (name.to_owned(), condition[name].clone())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_go_there_and_back() {
        let cases = [
            (
                "target",
                json!({"type": "Pods", "pods": {"metric": {"name": "m"}, "target": {"type": "AverageValue", "averageValue": "1"}}}),
                r#"{"type":"Pods","pods":{"metricName":"m","targetAverageValue":"1"}}"#,
            ),
            (
                "current",
                json!({"type": "Resource", "resource": {"name": "cpu", "current": {"averageUtilization": 5, "averageValue": "0"}}}),
                r#"{"type":"Resource","resource":{"name":"cpu","currentAverageUtilization":5,"currentAverageValue":"0"}}"#,
            ),
            (
                "target",
                json!({"type": "Object", "object": {"describedObject": {"kind": "K", "name": "n"}, "metric": {"name": "m"},
                    "target": {"type": "Value", "value": "2"}}}),
                r#"{"type":"Object","object":{"target":{"kind":"K","name":"n"},"metricName":"m","targetValue":"2"}}"#,
            ),
        ];
        for (side, newer, older) in cases {
            assert_eq!(to_old(&newer, side), older);
            assert_eq!(from_old(&serde_json::from_str(older).unwrap(), side), newer);
        }
    }
}
