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

/// Sources of volumes that have no driver any more, or soon none.
const OLD_VOLUMES: [(&str, &str); 9] = [
    ("photonPersistentDisk", "deprecated in v1.11, non-functional in v1.16+"),
    ("gitRepo", "deprecated in v1.11, and disabled by default in v1.33+"),
    ("scaleIO", "deprecated in v1.16, non-functional in v1.22+"),
    ("flocker", "deprecated in v1.22, non-functional in v1.25+"),
    ("storageos", "deprecated in v1.22, non-functional in v1.25+"),
    ("quobyte", "deprecated in v1.22, non-functional in v1.25+"),
    ("glusterfs", "deprecated in v1.25, non-functional in v1.26+"),
    ("cephfs", "deprecated in v1.28, non-functional in v1.31+"),
    ("rbd", "deprecated in v1.28, non-functional in v1.31+"),
];

fn old_volume(source: &Value, path: &str, warnings: &mut Vec<String>) {
    for (kind, text) in OLD_VOLUMES.iter().filter(|(kind, _)| !source[*kind].is_null()) {
        // Upstream writes this one as Go does.
        let kind = if *kind == "storageos" { "storageOS" } else { kind };
        warnings.push(format!("{path}.{kind}: {text}"));
    }
}

fn pod_spec(spec: &Value, path: &str) -> Vec<String> {
    let mut warnings = Vec::new();
    for (label, text) in OLD_NODE_LABELS {
        if !spec["nodeSelector"][label].is_null() {
            warnings.push(format!("{path}.nodeSelector[{label}]: {text}"));
        }
    }
    for (index, constraint) in spec.list_at(&["topologySpreadConstraints"]).iter().enumerate() {
        if constraint["labelSelector"].is_null() {
            warnings.push(format!(
                "{path}.topologySpreadConstraints[{index}].labelSelector: a null labelSelector results in matching no pod"
            ));
        }
    }
    affinity_selectors(&spec["affinity"], &format!("{path}.affinity"), &mut warnings);
    for (index, volume) in spec.list_at(&["volumes"]).iter().enumerate() {
        old_volume(volume, &format!("{path}.volumes[{index}]"), &mut warnings);
    }
    repeated(spec, "hostAliases", "ip", path, &mut warnings);
    repeated(spec, "imagePullSecrets", "name", path, &mut warnings);
    for (index, secret) in spec.list_at(&["imagePullSecrets"]).iter().enumerate() {
        if secret.str_at(&["name"]).is_empty() {
            warnings.push(format!("{path}.imagePullSecrets[{index}].name: invalid empty name \"\""));
        }
    }
    let containers = containers(spec, path);
    for (container, path) in &containers {
        repeated_env(container, path, &mut warnings);
    }
    ports(&containers, &mut warnings);
    port_names(&containers, &mut warnings);
    if spec["terminationGracePeriodSeconds"].as_i64().is_some_and(|seconds| seconds < 0) {
        warnings.push(format!(
            "{path}.terminationGracePeriodSeconds: must be >= 0; negative values are invalid and will be treated as 1"
        ));
    }
    warnings
}

/// Terms that match no pod for want of a selector.
fn affinity_selectors(affinity: &Value, path: &str, warnings: &mut Vec<String>) {
    const REQUIRED: &str = "requiredDuringSchedulingIgnoredDuringExecution";
    const PREFERRED: &str = "preferredDuringSchedulingIgnoredDuringExecution";
    for side in ["podAffinity", "podAntiAffinity"] {
        let mut check = |term: &Value, path: String| {
            if term["labelSelector"].is_null() {
                warnings.push(format!("{path}.labelSelector: a null labelSelector results in matching no pod"));
            }
        };
        for (index, term) in affinity[side].list_at(&[REQUIRED]).iter().enumerate() {
            check(term, format!("{path}.{side}.{REQUIRED}[{index}]"));
        }
        for (index, preferred) in affinity[side].list_at(&[PREFERRED]).iter().enumerate() {
            check(&preferred["podAffinityTerm"], format!("{path}.{side}.{PREFERRED}[{index}].podAffinityTerm"));
        }
    }
}

/// Every container with its path, those that run first first.
fn containers<'s>(spec: &'s Value, path: &str) -> Vec<(&'s Value, String)> {
    let lists = ["initContainers", "containers", "ephemeralContainers"];
    let of = |list: &'static str| {
        let items = spec.list_at(&[list]).iter().enumerate();
        items.map(move |(index, container)| (container, format!("{path}.{list}[{index}]")))
    };
    lists.into_iter().flat_map(of).collect()
}

/// Items of a list with the same `field`.
fn repeated(spec: &Value, list: &str, field: &str, path: &str, warnings: &mut Vec<String>) {
    let mut seen: Vec<&str> = Vec::new();
    for (index, item) in spec.list_at(&[list]).iter().enumerate() {
        let text = item.str_at(&[field]);
        if seen.contains(&text) {
            warnings.push(format!("{path}.{list}[{index}].{field}: duplicate {field} {text:?}"));
        }
        seen.push(text);
    }
}

/// A variable that hides another one, unless it builds on it.
fn repeated_env(container: &Value, path: &str, warnings: &mut Vec<String>) {
    let mut seen: Vec<&str> = Vec::new();
    for (index, variable) in container.list_at(&["env"]).iter().enumerate() {
        let (name, value) = (variable.str_at(&["name"]), variable.str_at(&["value"]));
        let itself = format!("$({name})");
        let hides = !variable["valueFrom"].is_null() || value == itself || !value.contains(&itself);
        if seen.contains(&name) {
            if hides {
                warnings.push(format!(
                    "{path}.env[{index}]: hides previous definition of {name:?}, which may be dropped when using apply"
                ));
            }
            continue;
        }
        seen.push(name);
    }
}

/// Ports of any containers of the pod that are the same, or might be.
fn ports(containers: &[(&Value, String)], warnings: &mut Vec<String>) {
    let mut known: Vec<(&Value, String)> = Vec::new();
    for (container, path) in containers {
        for (index, port) in container.list_at(&["ports"]).iter().enumerate() {
            let path = format!("{path}.ports[{index}]");
            let host = |port: &Value| port.i64_at(&["hostPort"]).unwrap_or(0);
            let address = |port: &Value| port.str_at(&["hostIP"]).to_owned();
            let same = |other: &&(&Value, String)| {
                ["containerPort", "protocol"].iter().all(|field| other.0[*field] == port[*field])
            };
            for (other, at) in known.iter().filter(same) {
                let likeness = if address(port) == address(other) && host(port) == host(other) {
                    "duplicate"
                } else if host(port) == 0 || host(other) == 0 {
                    "overlapping"
                } else if host(port) == host(other) && address(port).is_empty() != address(other).is_empty() {
                    "dangerously ambiguous"
                } else {
                    continue;
                };
                warnings.push(format!("{path}: {likeness} port definition with {at}"));
            }
            known.push((port, path));
        }
    }
}

fn port_names(containers: &[(&Value, String)], warnings: &mut Vec<String>) {
    let mut known: Vec<(&str, String)> = Vec::new();
    for (container, path) in containers {
        for (index, port) in container.list_at(&["ports"]).iter().enumerate() {
            let (name, path) = (port.str_at(&["name"]), format!("{path}.ports[{index}]"));
            match known.iter().find(|(other, _)| *other == name) {
                _ if name.is_empty() => {}
                Some((_, at)) => warnings.push(format!(
                    "{path}: duplicate port name {name:?} with {at}, services and probes that select ports by name will use {at}"
                )),
                None => known.push((name, path)),
            }
        }
    }
}

/// A persistent volume.
pub fn persistent_volume(obj: &Value) -> Vec<String> {
    const CLASS: &str = "volume.beta.kubernetes.io/storage-class";
    let mut warnings = Vec::new();
    if obj.annotation(CLASS).is_some() {
        warnings.push(format!(
            "metadata.annotations[{CLASS}]: deprecated since v1.8; use \"storageClassName\" attribute instead"
        ));
    }
    if obj["spec"]["persistentVolumeReclaimPolicy"] == "Recycle" {
        warnings.push(
            "spec.persistentVolumeReclaimPolicy: The Recycle reclaim policy is deprecated. Instead, the recommended approach is to use dynamic provisioning."
                .into(),
        );
    }
    old_volume(&obj["spec"], "spec", &mut warnings);
    warnings
}

/// A claim.
pub fn claim(obj: &Value) -> Vec<String> {
    const CLASS: &str = "volume.beta.kubernetes.io/storage-class";
    let old = obj.annotation(CLASS).map(|_| {
        format!("metadata.annotations[{CLASS}]: deprecated since v1.8; use \"storageClassName\" attribute instead")
    });
    old.into_iter().collect()
}

/// A service.
pub fn service(obj: &Value) -> Vec<String> {
    const HINTS: &str = "service.kubernetes.io/topology-aware-hints";
    let spec = &obj["spec"];
    let external = spec["type"] == "ExternalName";
    let headless = super::service::is_headless(spec);
    let has_ips = !spec.list_at(&["externalIPs"]).is_empty();
    let mut warnings = Vec::new();
    let mut warn = |holds: bool, text: &str| {
        if holds {
            warnings.push(text.to_owned());
        }
    };
    let hints = format!("annotation {HINTS} is deprecated, please use service.kubernetes.io/topology-mode instead");
    warn(obj.annotation(HINTS).is_some(), &hints);
    if headless {
        warn(!spec.str_at(&["loadBalancerIP"]).is_empty(), "spec.loadBalancerIP is ignored for headless services");
        warn(has_ips, "spec.externalIPs is ignored for headless services");
        warn(spec["sessionAffinity"] != "None", "spec.SessionAffinity is ignored for headless services");
    }
    let old = "spec.externalIPs is deprecated and may no longer be implemented in some clusters";
    warn(has_ips && !headless && !external, old);
    warn(external && has_ips, "spec.externalIPs is ignored when spec.type is \"ExternalName\"");
    let unused = !external && !spec.str_at(&["externalName"]).is_empty();
    warn(unused, "spec.externalName is ignored when spec.type is not \"ExternalName\"");
    let close = "spec.trafficDistribution: \"PreferClose\" is deprecated; use \"PreferSameZone\"";
    warn(spec["trafficDistribution"] == "PreferClose", close);
    warnings
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
