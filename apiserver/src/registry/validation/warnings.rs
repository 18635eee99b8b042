//! What the server tells users without refusing their object.

use apimachinery::meta::validation::is_dns1123_label;
use serde_json::Value;

use crate::registry::common::same;
use crate::registry::object::ObjectExt;

/// Node labels that have newer names.
const OLD_NODE_LABELS: [(&str, &str); 4] = [
    ("beta.kubernetes.io/arch", "deprecated since v1.14; use \"kubernetes.io/arch\" instead"),
    ("beta.kubernetes.io/os", "deprecated since v1.14; use \"kubernetes.io/os\" instead"),
    (
        "failure-domain.beta.kubernetes.io/region",
        "deprecated since v1.17; use \"topology.kubernetes.io/region\" instead",
    ),
    ("failure-domain.beta.kubernetes.io/zone", "deprecated since v1.17; use \"topology.kubernetes.io/zone\" instead"),
];

/// A new pod.
pub fn pod(obj: &Value) -> Vec<String> {
    let mut warnings = Vec::new();
    let messages = is_dns1123_label(obj.name());
    if !messages.is_empty() && !obj.name().is_empty() {
        warnings.push(format!(
            "metadata.name: this is used in the Pod's hostname, which can result in surprising behavior; a DNS label is recommended: [{}]",
            messages.join(" ")
        ));
    }
    warnings.extend(pod_spec(&obj["spec"], "spec"));
    warnings
}

/// A workload with a pod template at this path; its name is part of its pods' names.
pub fn workload(obj: &Value, old: Option<&Value>, template: &[&str], names_pods: bool) -> Vec<String> {
    let mut warnings = Vec::new();
    let messages = is_dns1123_label(obj.name());
    if names_pods && old.is_none() && !messages.is_empty() && !obj.name().is_empty() {
        warnings.push(format!(
            "metadata.name: this is used in Pod names and hostnames, which can result in surprising behavior; a DNS label is recommended: [{}]",
            messages.join(" ")
        ));
    }
    let at = |obj: &Value| obj.at(template).cloned().unwrap_or_default();
    if old.is_none_or(|old| !same(&at(obj), &at(old))) {
        warnings.extend(pod_spec(&at(obj)["spec"], &format!("{}.spec", template.join("."))));
    }
    warnings
}

fn pod_spec(spec: &Value, path: &str) -> Vec<String> {
    let mut warnings = Vec::new();
    for (label, text) in OLD_NODE_LABELS {
        if !spec["nodeSelector"][label].is_null() {
            warnings.push(format!("{path}.nodeSelector[{label}]: {text}"));
        }
    }
    for list in ["containers", "initContainers"] {
        for (index, container) in spec.list_at(&[list]).iter().enumerate() {
            repeated_env(container, &format!("{path}.{list}[{index}]"), &mut warnings);
        }
    }
    if spec["terminationGracePeriodSeconds"].as_i64().is_some_and(|seconds| seconds < 0) {
        warnings.push(format!(
            "{path}.terminationGracePeriodSeconds: must be >= 0; negative values are invalid and will be treated as 1"
        ));
    }
    warnings
}

fn repeated_env(container: &Value, path: &str, warnings: &mut Vec<String>) {
    let mut seen: Vec<&str> = Vec::new();
    for (index, variable) in container.list_at(&["env"]).iter().enumerate() {
        let name = variable.str_at(&["name"]);
        if seen.contains(&name) {
            warnings.push(format!(
                "{path}.env[{index}]: hides previous definition of {name:?}, which may be dropped when using apply"
            ));
        }
        seen.push(name);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn names_and_repetitions_are_pointed_out() {
        let env = json!([{"name": "A"}, {"name": "A"}]);
        let obj = json!({"metadata": {"name": "a.b"}, "spec": {"containers": [{"env": env}]}});
        let warnings = pod(&obj);
        assert!(warnings[0].starts_with("metadata.name: this is used in the Pod's hostname"));
        assert_eq!(
            warnings[1],
            "spec.containers[0].env[1]: hides previous definition of \"A\", which may be dropped when using apply"
        );
    }
}
