//! The `Targets` cell of a horizontal pod autoscaler: each metric as current value and target.

use serde_json::Value;

use super::{NONE, UNKNOWN, scalar};
use crate::registry::object::ObjectExt;

/// How many metrics are shown before the rest is only counted.
const SHOWN: usize = 2;

pub fn targets(obj: &Value) -> String {
    let specs = obj.list_at(&["spec", "metrics"]);
    let statuses = obj.list_at(&["status", "currentMetrics"]);
    if specs.is_empty() {
        return NONE.into();
    }
    let cells: Vec<String> = specs.iter().enumerate().map(|(i, spec)| metric(spec, statuses.get(i))).collect();
    let shown = cells[..cells.len().min(SHOWN)].join(", ");
    if cells.len() > SHOWN { format!("{shown} + {} more...", cells.len() - SHOWN) } else { shown }
}

fn metric(spec: &Value, status: Option<&Value>) -> String {
    let (field, resource) = match spec.str_at(&["type"]) {
        "External" => ("external", false),
        "Pods" => ("pods", false),
        "Object" => ("object", false),
        "Resource" => ("resource", true),
        "ContainerResource" => ("containerResource", true),
        _ => return "<unknown type>".into(),
    };
    let target = &spec[field]["target"];
    let current = |value: &str| status.map(|s| scalar(&s[field]["current"][value])).filter(|text| !text.is_empty());
    let or_unknown = |text: Option<String>| text.unwrap_or_else(|| UNKNOWN.to_owned());
    if resource {
        let name = spec.str_at(&[field, "name"]);
        if !target["averageValue"].is_null() {
            return format!("{name}: {}/{}", or_unknown(current("averageValue")), scalar(&target["averageValue"]));
        }
        let percent = |text: String| format!("{text}%");
        let wanted = if target["averageUtilization"].is_null() {
            "<auto>".into()
        } else {
            percent(scalar(&target["averageUtilization"]))
        };
        return format!("{name}: {}/{wanted}", or_unknown(current("averageUtilization").map(percent)));
    }
    if field == "pods" {
        return format!("{}/{}", or_unknown(current("averageValue")), scalar(&target["averageValue"]));
    }
    if target["averageValue"].is_null() {
        format!("{}/{}", or_unknown(current("value")), scalar(&target["value"]))
    } else {
        format!("{}/{} (avg)", or_unknown(current("averageValue")), scalar(&target["averageValue"]))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn metrics_show_current_and_target() {
        let cpu = json!({"type": "Resource", "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 80}}});
        let pods = json!({"type": "Pods", "pods": {"metric": {"name": "qps"}, "target": {"averageValue": "10"}}});
        let status = json!([{"type": "Resource", "resource": {"name": "cpu", "current": {"averageUtilization": 35}}}]);
        let cases = [
            (json!({"spec": {}}), "<none>"),
            (json!({"spec": {"metrics": [cpu]}}), "cpu: <unknown>/80%"),
            (json!({"spec": {"metrics": [cpu]}, "status": {"currentMetrics": status}}), "cpu: 35%/80%"),
            (json!({"spec": {"metrics": [cpu, pods, pods]}}), "cpu: <unknown>/80%, <unknown>/10 + 1 more..."),
        ];
        for (obj, expected) in cases {
            assert_eq!(targets(&obj), expected);
        }
    }
}
