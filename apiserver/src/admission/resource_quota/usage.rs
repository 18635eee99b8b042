//! What an object counts for in quotas: the names and rules are upstream's evaluators'. Pure.

use std::collections::{BTreeMap, BTreeSet};

use apimachinery::meta::{Quantity, QuantityFormat as Format};
use serde_json::Value;

use super::super::resources::{self, Resources};
use super::{AdmissionRequest, Operation};
use crate::registry::object::ObjectExt;

/// Kinds that may be counted by their bare name, too.
const COUNTED_BY_NAME: [&str; 4] = ["configmaps", "secrets", "replicationcontrollers", "resourcequotas"];
const POD_NAMES: [&str; 10] = [
    "pods",
    "cpu",
    "memory",
    "ephemeral-storage",
    "requests.cpu",
    "requests.memory",
    "requests.ephemeral-storage",
    "limits.cpu",
    "limits.memory",
    "limits.ephemeral-storage",
];
const SERVICE_NAMES: [&str; 3] = ["services", "services.nodeports", "services.loadbalancers"];
const CLASS_SUFFIX: &str = ".storageclass.storage.k8s.io/";

fn one() -> Quantity {
    Quantity::from_value(1, Format::DecimalSi)
}

/// `count/pods`, `count/deployments.apps`.
fn count_name(request: &AdmissionRequest<'_>) -> String {
    format!("count/{}", request.group_resource())
}

/// Whether this write can change what the namespace uses.
pub fn is_counted(request: &AdmissionRequest<'_>) -> bool {
    let (creates, updates) = (request.operation == Operation::Create, request.operation == Operation::Update);
    if request.gvr.group.is_empty() {
        let is_terminating_changed =
            || request.old.is_some_and(|old| is_terminating(old) != is_terminating(request.object));
        match (&*request.gvr.resource, request.subresource) {
            ("pods", "") => return creates || (updates && is_terminating_changed()),
            ("pods", "resize") => return updates,
            ("services" | "persistentvolumeclaims", "") => return creates || updates,
            ("events", _) => return false,
            _ => {}
        }
    }
    creates && request.subresource.is_empty() && request.gvr.resource != "resourcequotas"
        || (creates && request.is("", "resourcequotas"))
}

/// Whether a name in a quota is about the request's kind.
pub fn is_of_kind(request: &AdmissionRequest<'_>, name: &str) -> bool {
    if name == count_name(request) {
        return true;
    }
    if !request.gvr.group.is_empty() {
        return false;
    }
    match &*request.gvr.resource {
        "pods" => {
            let extended =
                name.strip_prefix("requests.").is_some_and(|rest| rest.contains('/') && !name.contains(CLASS_SUFFIX));
            POD_NAMES.contains(&name)
                || name.starts_with("hugepages-")
                || name.starts_with("requests.hugepages-")
                || extended
        }
        "services" => SERVICE_NAMES.contains(&name),
        "persistentvolumeclaims" => {
            matches!(name, "persistentvolumeclaims" | "requests.storage")
                || name.ends_with(&format!("{CLASS_SUFFIX}persistentvolumeclaims"))
                || name.ends_with(&format!("{CLASS_SUFFIX}requests.storage"))
        }
        resource => name == resource && COUNTED_BY_NAME.contains(&resource),
    }
}

/// What the object uses.
pub fn of(request: &AdmissionRequest<'_>, object: &Value) -> Resources {
    let mut used: Resources = [(count_name(request), one())].into();
    if !request.gvr.group.is_empty() {
        return used;
    }
    match &*request.gvr.resource {
        "pods" => used.extend(of_pod(object)),
        "services" => used.extend(of_service(object)),
        "persistentvolumeclaims" => used.extend(of_claim(object)),
        resource if COUNTED_BY_NAME.contains(&resource) => {
            used.insert(resource.to_owned(), one());
        }
        _ => {}
    }
    used
}

/// The names that requests and limits go by in quotas.
fn named(requests: &Resources, limits: &Resources) -> Resources {
    let mut used = Resources::new();
    for name in ["cpu", "memory", "ephemeral-storage"] {
        if let Some(request) = requests.get(name) {
            used.insert(name.to_owned(), *request);
            used.insert(format!("requests.{name}"), *request);
        }
        if let Some(limit) = limits.get(name) {
            used.insert(format!("limits.{name}"), *limit);
        }
    }
    for (name, request) in requests {
        if name.starts_with("hugepages-") {
            used.insert(name.clone(), *request);
        }
        if name.starts_with("hugepages-") || name.contains('/') {
            used.insert(format!("requests.{name}"), *request);
        }
    }
    used
}

fn of_pod(pod: &Value) -> Resources {
    if matches!(pod.str_at(&["status", "phase"]), "Succeeded" | "Failed") {
        return Resources::new();
    }
    let mut used = named(&resources::of_pod(pod, "requests"), &resources::of_pod(pod, "limits"));
    used.insert("pods".to_owned(), one());
    used
}

fn of_service(service: &Value) -> Resources {
    let ports = service.list_at(&["spec", "ports"]);
    let count = |number: usize| Quantity::from_value(i64::try_from(number).unwrap_or(i64::MAX), Format::DecimalSi);
    let without_allocation = service.bool_at(&["spec", "allocateLoadBalancerNodePorts"]) == Some(false);
    let explicit = ports.iter().filter(|port| port.i64_at(&["nodePort"]).unwrap_or(0) != 0).count();
    let (node_ports, balancers) = match service.str_at(&["spec", "type"]) {
        "NodePort" => (ports.len(), 0),
        "LoadBalancer" if without_allocation => (explicit, 1),
        "LoadBalancer" => (ports.len(), 1),
        _ => (0, 0),
    };
    [("services", count(1)), ("services.nodeports", count(node_ports)), ("services.loadbalancers", count(balancers))]
        .map(|(name, value)| (name.to_owned(), value))
        .into()
}

fn of_claim(claim: &Value) -> Resources {
    let size = |path: &[&str]| resources::parse(claim.at(path)).get("storage").copied();
    let requested = size(&["spec", "resources", "requests"]);
    let storage = requested.max(requested.and(size(&["status", "allocatedResources"])));
    let class = claim.annotation("volume.beta.kubernetes.io/storage-class");
    let class = class.unwrap_or_else(|| claim.str_at(&["spec", "storageClassName"]));
    let mut used: Resources = [("persistentvolumeclaims".to_owned(), one())].into();
    used.extend(storage.map(|storage| ("requests.storage".to_owned(), storage)));
    if !class.is_empty() {
        let of_class: Vec<_> =
            used.iter().map(|(name, value)| (format!("{class}{CLASS_SUFFIX}{name}"), *value)).collect();
        used.extend(of_class);
    }
    used
}

/// `cpu for: a,b; memory for: b`: what a quota demands and containers do not say.
pub fn missing(request: &AdmissionRequest<'_>, limited: &[&str]) -> String {
    const DEMANDED: [&str; 6] = ["cpu", "memory", "requests.cpu", "requests.memory", "limits.cpu", "limits.memory"];
    let pod = &*request.object;
    let for_whole_pod = ["requests", "limits"]
        .iter()
        .any(|kind| pod.map_at(&["spec", "resources", kind]).is_some_and(|m| !m.is_empty()));
    if !request.is_any("", "pods") || for_whole_pod {
        return String::new();
    }
    let mut lacking: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for container in ["containers", "initContainers"].iter().flat_map(|list| pod.list_at(&["spec", list])) {
        let given = |kind| resources::parse(container.at(&["resources", kind]));
        let said = named(&given("requests"), &given("limits"));
        for name in limited.iter().filter(|name| DEMANDED.contains(name) && !said.contains_key(**name)) {
            lacking.entry(name).or_default().insert(container.str_at(&["name"]));
        }
    }
    let texts = lacking
        .into_iter()
        .map(|(name, containers)| format!("{name} for: {}", containers.into_iter().collect::<Vec<_>>().join(",")));
    texts.collect::<Vec<_>>().join("; ")
}

fn is_terminating(pod: &Value) -> bool {
    pod.i64_at(&["spec", "activeDeadlineSeconds"]).is_some_and(|seconds| seconds >= 0)
}

/// Whether every scope of the quota applies to the object.
pub fn in_scope(quota: &Value, request: &AdmissionRequest<'_>, object: &Value) -> bool {
    let scopes = quota.list_at(&["spec", "scopes"]).iter().filter_map(Value::as_str);
    let mut simple = scopes.map(|scope| (scope, "Exists", &[] as &[Value]));
    let expressions = quota.list_at(&["spec", "scopeSelector", "matchExpressions"]).iter();
    let mut selected = expressions.map(|e| (e.str_at(&["scopeName"]), e.str_at(&["operator"]), e.list_at(&["values"])));
    let is_pod = request.is_any("", "pods");
    let applies = |(scope, operator, values): (&str, &str, &[Value])| match (is_pod, scope) {
        (true, scope) => pod_in_scope(object, scope, operator, values),
        (false, "VolumeAttributesClass") if request.is_any("", "persistentvolumeclaims") => {
            matches_values(object.str_at(&["spec", "volumeAttributesClassName"]), operator, values)
        }
        (false, _) => false,
    };
    simple.all(applies) && selected.all(applies)
}

fn pod_in_scope(pod: &Value, scope: &str, operator: &str, values: &[Value]) -> bool {
    match scope {
        "Terminating" => is_terminating(pod),
        "NotTerminating" => !is_terminating(pod),
        "BestEffort" => is_best_effort(pod),
        "NotBestEffort" => !is_best_effort(pod),
        "PriorityClass" => matches_values(pod.str_at(&["spec", "priorityClassName"]), operator, values),
        "CrossNamespacePodAffinity" => crosses_namespaces(pod),
        _ => false,
    }
}

fn matches_values(name: &str, operator: &str, values: &[Value]) -> bool {
    let listed = values.iter().any(|value| value == name);
    match operator {
        "In" => !name.is_empty() && listed,
        "NotIn" => !listed,
        "DoesNotExist" => name.is_empty(),
        _ => !name.is_empty(),
    }
}

/// No container asks for or limits processor or memory.
fn is_best_effort(pod: &Value) -> bool {
    let asks = |object: &Value| {
        let kinds = ["requests", "limits"].into_iter().map(|kind| resources::parse(object.at(&["resources", kind])));
        kinds.flatten().any(|(name, value)| matches!(name.as_str(), "cpu" | "memory") && value > Quantity::ZERO)
    };
    let containers = ["containers", "initContainers"].iter().flat_map(|list| pod.list_at(&["spec", list]));
    !asks(&pod["spec"]) && !containers.into_iter().any(asks)
}

fn crosses_namespaces(pod: &Value) -> bool {
    let crosses = |term: &Value| {
        !term.list_at(&["namespaces"]).is_empty() || term.get("namespaceSelector").is_some_and(|s| !s.is_null())
    };
    ["podAffinity", "podAntiAffinity"].iter().any(|kind| {
        let affinity = &pod["spec"]["affinity"][kind];
        affinity.list_at(&["requiredDuringSchedulingIgnoredDuringExecution"]).iter().any(crosses)
            || affinity
                .list_at(&["preferredDuringSchedulingIgnoredDuringExecution"])
                .iter()
                .any(|w| crosses(&w["podAffinityTerm"]))
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn services_and_claims() {
        let service = json!({"spec": {"type": "LoadBalancer", "ports": [{"port": 1}, {"port": 2}]}});
        assert_eq!(of_service(&service)["services.nodeports"].to_string(), "2");
        assert_eq!(of_service(&service)["services.loadbalancers"].to_string(), "1");
        let claim = json!({"spec": {"storageClassName": "fast", "resources": {"requests": {"storage": "1Gi"}}}});
        assert_eq!(of_claim(&claim)["fast.storageclass.storage.k8s.io/requests.storage"].to_string(), "1Gi");
    }

    #[test]
    fn scopes_of_pods() {
        let burstable =
            json!({"spec": {"priorityClassName": "high", "containers": [{"resources": {"requests": {"cpu": "1"}}}]}});
        for (scope, operator, values, applies) in [
            ("BestEffort", "Exists", json!([]), false),
            ("NotBestEffort", "Exists", json!([]), true),
            ("Terminating", "Exists", json!([]), false),
            ("PriorityClass", "In", json!(["high"]), true),
            ("PriorityClass", "NotIn", json!(["high"]), false),
            ("CrossNamespacePodAffinity", "Exists", json!([]), false),
        ] {
            let values = values.as_array().unwrap();
            assert_eq!(pod_in_scope(&burstable, scope, operator, values), applies, "{scope} {operator}");
        }
    }
}
