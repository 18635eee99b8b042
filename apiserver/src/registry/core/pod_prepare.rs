//! What the server itself writes into a new pod: its quality of service, the gate of its scheduling, selectors that
//! depend on the pod's own labels, and requests for the pod as a whole.

use std::collections::{BTreeMap, BTreeSet};

use apimachinery::meta::Quantity;
use serde_json::{Map, Value, json};

use crate::registry::object::ObjectExt;

/// The resources that quality of service looks at.
const COMPUTE: [&str; 2] = ["cpu", "memory"];

/// `Guaranteed`, `Burstable` or `BestEffort`.
pub fn qos_class(pod: &Value) -> &'static str {
    let whole = &pod["spec"]["resources"];
    if ["limits", "requests"].iter().any(|list| COMPUTE.iter().any(|name| !whole[list][name].is_null())) {
        return class_of(whole);
    }
    let mut classes = ["initContainers", "containers"]
        .iter()
        .flat_map(|list| pod.list_at(&["spec", list]))
        .map(|container| class_of(&container["resources"]));
    let Some(first) = classes.next() else { return "BestEffort" };
    if classes.all(|class| class == first) { first } else { "Burstable" }
}

fn class_of(resources: &Value) -> &'static str {
    let amount = |list: &str, name: &str| quantity(&resources[list][name]).filter(|q| q.signum() > 0);
    let pairs = COMPUTE.map(|name| (amount("requests", name), amount("limits", name)));
    if pairs.iter().all(|(request, limit)| request.is_none() && limit.is_none()) {
        "BestEffort"
    } else if pairs.iter().all(|(request, limit)| limit.is_some() && request == limit) {
        "Guaranteed"
    } else {
        "Burstable"
    }
}

pub fn quantity(value: &Value) -> Option<Quantity> {
    value.as_str()?.parse().ok()
}

/// A pod with scheduling gates says at once that it waits for them.
pub fn scheduling_gated(pod: &mut Value, now: &str) {
    if !pod.list_at(&["spec", "schedulingGates"]).is_empty() {
        let condition = json!([{"type": "PodScheduled", "status": "False", "reason": "SchedulingGated",
            "message": "Scheduling is blocked due to non-empty scheduling gates", "lastTransitionTime": now}]);
        pod.set(&["status", "conditions"], condition);
    }
}

/// `matchLabelKeys` and `mismatchLabelKeys` become ordinary terms with the pod's own label values.
pub fn label_keys(pod: &mut Value) {
    let labels = pod.labels().cloned().unwrap_or_default();
    let Some(spec) = pod.get_mut("spec") else { return };
    for side in ["podAffinity", "podAntiAffinity"] {
        for list in
            ["requiredDuringSchedulingIgnoredDuringExecution", "preferredDuringSchedulingIgnoredDuringExecution"]
        {
            let Some(terms) = spec.list_at_mut(&["affinity", side, list]) else { continue };
            for term in terms {
                let term = if list.starts_with("preferred") { term.get_mut("podAffinityTerm") } else { Some(term) };
                if let Some(term) = term {
                    add_terms(term, "matchLabelKeys", "In", &labels);
                    add_terms(term, "mismatchLabelKeys", "NotIn", &labels);
                }
            }
        }
    }
    if let Some(constraints) = spec.list_at_mut(&["topologySpreadConstraints"]) {
        constraints.iter_mut().for_each(|constraint| add_terms(constraint, "matchLabelKeys", "In", &labels));
    }
}

fn add_terms(holder: &mut Value, keys: &str, operator: &str, labels: &Map<String, Value>) {
    let found: Vec<Value> = holder
        .list_at(&[keys])
        .iter()
        .filter_map(|key| {
            labels.get(key.as_str()?).map(|value| json!({"key": key, "operator": operator, "values": [value]}))
        })
        .collect();
    // Without a selector the term matches nothing, and goes on to do so.
    if found.is_empty() || !holder["labelSelector"].is_object() {
        return;
    }
    let mut expressions = holder.list_at(&["labelSelector", "matchExpressions"]).to_vec();
    expressions.extend(found);
    holder.set(&["labelSelector", "matchExpressions"], expressions);
}

/// A pod with limits of its own, but no requests, requests what its containers do, or else the limits.
pub fn pod_level_requests(pod: &mut Value) {
    let Some(limits) = pod.map_at(&["spec", "resources", "limits"]).filter(|limits| !limits.is_empty()).cloned() else {
        return;
    };
    let mut defaults = container_requests(pod);
    for (name, limit) in limits {
        if supported(&name) {
            defaults.entry(name).or_insert(limit);
        }
    }
    for (name, amount) in defaults {
        pod.set_default(&["spec", "resources", "requests", &name], amount);
    }
}

fn supported(name: &str) -> bool {
    COMPUTE.contains(&name) || name.starts_with("hugepages-")
}

/// What all containers together request, of what pods can request as a whole.
fn container_requests(pod: &Value) -> BTreeMap<String, Value> {
    let all = aggregate(&pod["spec"], "requests").into_iter();
    all.filter(|(name, _)| COMPUTE.contains(&name.as_str())).map(|(name, sum)| (name, sum.to_string().into())).collect()
}

/// The `requests` or `limits` of all containers: the sum of those that run side by side, or the largest that runs alone.
pub fn aggregate(spec: &Value, list: &str) -> BTreeMap<String, Quantity> {
    let containers = ["initContainers", "containers"].iter().flat_map(|kind| spec.list_at(&[kind]));
    let names = containers.filter_map(|container| container["resources"][list].as_object()).flat_map(Map::keys);
    let names: BTreeSet<&String> = names.collect();
    names.into_iter().filter_map(|name| Some((name.clone(), aggregate_of(spec, list, name)?))).collect()
}

fn aggregate_of(spec: &Value, list: &str, name: &str) -> Option<Quantity> {
    let amount = |container: &Value| quantity(&container["resources"][list][name]);
    let sum = |a: Option<Quantity>, b: Option<Quantity>| match (a, b) {
        (Some(a), Some(b)) => Some(a.add(b)),
        (one, other) => one.or(other),
    };
    let mut running = None;
    let mut largest: Option<Quantity> = None;
    for container in spec.list_at(&["initContainers"]) {
        if container["restartPolicy"] == "Always" {
            running = sum(running, amount(container));
            largest = largest.max(running);
        } else {
            largest = largest.max(sum(running, amount(container)));
        }
    }
    for container in spec.list_at(&["containers"]) {
        running = sum(running, amount(container));
    }
    largest.max(running)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quality_of_service_follows_requests_and_limits() {
        let full = json!({"limits": {"cpu": "1", "memory": "1Gi"}, "requests": {"cpu": "1000m", "memory": "1024Mi"}});
        let cases = [
            (json!({"containers": [{}]}), "BestEffort"),
            (json!({"containers": [{"resources": full}]}), "Guaranteed"),
            (json!({"containers": [{"resources": full}, {}]}), "Burstable"),
            (json!({"containers": [{"resources": full}], "initContainers": [{}]}), "Burstable"),
            (json!({"containers": [{"resources": {"requests": {"cpu": "1"}}}]}), "Burstable"),
            (json!({"containers": [{"resources": {"limits": {"cpu": "1"}, "requests": {"cpu": "1"}}}]}), "Burstable"),
            (json!({"containers": [{"resources": {"requests": {"example.com/gpu": "1"}}}]}), "BestEffort"),
            (json!({"containers": [{}], "resources": full}), "Guaranteed"),
        ];
        for (spec, expected) in cases {
            assert_eq!(qos_class(&json!({"spec": spec})), expected, "{spec}");
        }
    }

    #[test]
    fn label_keys_become_terms() {
        let mut pod = json!({"metadata": {"labels": {"hash": "x"}}, "spec": {"topologySpreadConstraints": [
            {"matchLabelKeys": ["hash", "absent"], "labelSelector": {}}, {"matchLabelKeys": ["hash"]}]}});
        label_keys(&mut pod);
        let constraints = &pod["spec"]["topologySpreadConstraints"];
        let expected = json!([{"key": "hash", "operator": "In", "values": ["x"]}]);
        assert_eq!(constraints[0]["labelSelector"]["matchExpressions"], expected);
        assert!(constraints[1].get("labelSelector").is_none());
    }

    #[test]
    fn pods_with_limits_of_their_own_request_what_their_containers_do() {
        let mut pod = json!({"spec": {"resources": {"limits": {"cpu": "4", "memory": "1Gi"}},
            "containers": [{"resources": {"requests": {"cpu": "1"}}}, {"resources": {"requests": {"cpu": "500m"}}}],
            "initContainers": [{"resources": {"requests": {"cpu": "2"}}}]}});
        pod_level_requests(&mut pod);
        assert_eq!(pod["spec"]["resources"]["requests"], json!({"cpu": "2", "memory": "1Gi"}));
    }
}
