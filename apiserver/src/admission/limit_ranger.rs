//! Limit ranges of a namespace: defaults for containers that say nothing, and bounds for containers, pods and claims.

use std::sync::Arc;

use apimachinery::meta::Quantity;
use apimachinery::status::Result;
use async_trait::async_trait;
use serde_json::Value;

use super::resources::{self, Resources};
use super::{AdmissionRequest, Operation, Plugin, cached_list};
use crate::registry::object::ObjectExt;
use crate::server::Server;

const ANNOTATION: &str = "kubernetes.io/limit-ranger";

pub struct LimitRanger;

#[async_trait]
impl Plugin for LimitRanger {
    fn name(&self) -> &'static str {
        "LimitRanger"
    }

    async fn admit(&self, server: &Arc<Server>, request: &mut AdmissionRequest<'_>) -> Result<()> {
        if request.is_any("", "pods") && concerns(request) {
            for range in ranges(server, request) {
                set_defaults(request.object, &range);
            }
        }
        Ok(())
    }

    async fn validate(&self, server: &Arc<Server>, request: &AdmissionRequest<'_>) -> Result<()> {
        if !concerns(request) {
            return Ok(());
        }
        for range in ranges(server, request) {
            let errors = match &*request.gvr.resource {
                "pods" => check_pod(request.object, &range),
                _ => check_claim(request.object, &range),
            };
            match errors.as_slice() {
                [] => {}
                [one] => return Err(request.forbidden(one)),
                many => return Err(request.forbidden(format!("[{}]", many.join(", ")))),
            }
        }
        Ok(())
    }
}

/// New pods, resized pods, and claims whenever they are written; nothing that is already being deleted.
fn concerns(request: &AdmissionRequest<'_>) -> bool {
    let is_deleted = request.old.is_some_and(|old| old.is_being_deleted());
    let resizes =
        request.is_any("", "pods") && request.subresource == "resize" && request.operation == Operation::Update;
    !is_deleted && (resizes || request.creates("", "pods") || request.is("", "persistentvolumeclaims"))
}

fn ranges(server: &Server, request: &AdmissionRequest<'_>) -> Vec<Value> {
    cached_list(server, "", "limitranges", Some(request.namespace))
}

fn limits_of<'a>(range: &'a Value, kind: &'a str) -> impl Iterator<Item = &'a Value> {
    range.list_at(&["spec", "limits"]).iter().filter(move |limit| limit["type"] == kind)
}

fn set_defaults(pod: &mut Value, range: &Value) {
    let defaults = |field: &str| {
        let mut all = serde_json::Map::new();
        for limit in limits_of(range, "Container") {
            all.extend(limit.map_at(&[field]).cloned().unwrap_or_default());
        }
        all
    };
    let (requests, limits) = (defaults("defaultRequest"), defaults("default"));
    let mut notes = Vec::new();
    for (list, word) in [("containers", "container"), ("initContainers", "init container")] {
        for container in pod.list_at_mut(&["spec", list]).into_iter().flatten() {
            let name = container.str_at(&["name"]).to_owned();
            for (field, given, what) in [("requests", &requests, "request"), ("limits", &limits, "limit")] {
                let mut set: Vec<&str> = Vec::new();
                for (resource, value) in given {
                    if container.at(&["resources", field, resource]).is_none() {
                        container.set(&["resources", field, resource], value.clone());
                        set.push(resource);
                    }
                }
                set.sort_unstable();
                if !set.is_empty() {
                    notes.push(format!("{} {what} for {word} {name}", set.join(", ")));
                }
            }
        }
    }
    if !notes.is_empty() {
        pod.set(&["metadata", "annotations", ANNOTATION], format!("LimitRanger plugin set: {}", notes.join("; ")));
    }
}

/// What is asked for, and for what sort of thing.
struct Asked<'a> {
    kind: &'a str,
    requests: Resources,
    limits: Resources,
}

impl Asked<'_> {
    fn below_min(&self, name: &str, min: Quantity) -> Option<String> {
        let rule = format!("minimum {name} usage per {} is {min}", self.kind);
        match (self.requests.get(name), self.limits.get(name)) {
            (None, _) => Some(format!("{rule}.  No request is specified")),
            (Some(request), _) if *request < min => Some(format!("{rule}, but request is {request}")),
            (_, Some(limit)) if *limit < min => Some(format!("{rule}, but limit is {limit}")),
            _ => None,
        }
    }

    fn above_max(&self, name: &str, max: Quantity) -> Option<String> {
        let rule = format!("maximum {name} usage per {} is {max}", self.kind);
        match (self.requests.get(name), self.limits.get(name)) {
            (_, None) => Some(format!("{rule}.  No limit is specified")),
            (_, Some(limit)) if *limit > max => Some(format!("{rule}, but limit is {limit}")),
            (Some(request), _) if *request > max => Some(format!("{rule}, but request is {request}")),
            _ => None,
        }
    }

    fn above_ratio(&self, name: &str, ratio: Quantity) -> Option<String> {
        let rule = format!("{name} max limit to request ratio per {} is {ratio}", self.kind);
        let value = |list: &Resources| list.get(name).map(|quantity| quantity.as_f64()).filter(|value| *value > 0.0);
        let Some(request) = value(&self.requests) else {
            return Some(format!("{rule}, but no request is specified or request is 0"));
        };
        let Some(limit) = value(&self.limits) else {
            return Some(format!("{rule}, but no limit is specified or limit is 0"));
        };
        let observed = limit / request;
        (observed > ratio.as_f64()).then(|| format!("{rule}, but provided ratio is {observed:.6}"))
    }

    fn check(&self, limit: &Value) -> Vec<String> {
        let bounds = |field: &str| resources::parse(limit.get(field));
        let mut errors = Vec::new();
        errors.extend(bounds("min").iter().filter_map(|(name, min)| self.below_min(name, *min)));
        errors.extend(bounds("max").iter().filter_map(|(name, max)| self.above_max(name, *max)));
        errors.extend(bounds("maxLimitRequestRatio").iter().filter_map(|(name, ratio)| self.above_ratio(name, *ratio)));
        errors
    }
}

fn check_pod(pod: &Value, range: &Value) -> Vec<String> {
    let mut errors = Vec::new();
    for limit in limits_of(range, "Container") {
        for container in ["containers", "initContainers"].iter().flat_map(|list| pod.list_at(&["spec", list])) {
            let given = |field: &str| resources::parse(container.at(&["resources", field]));
            errors
                .extend(Asked { kind: "Container", requests: given("requests"), limits: given("limits") }.check(limit));
        }
    }
    for limit in limits_of(range, "Pod") {
        let asked = Asked {
            kind: "Pod",
            requests: resources::of_pod(pod, "requests"),
            limits: resources::of_pod(pod, "limits"),
        };
        errors.extend(asked.check(limit));
    }
    errors
}

/// Claims have requests only.
fn check_claim(claim: &Value, range: &Value) -> Vec<String> {
    let requests = resources::parse(claim.at(&["spec", "resources", "requests"]));
    let asked = Asked { kind: "PersistentVolumeClaim", requests, limits: Resources::new() };
    let mut errors = Vec::new();
    for limit in limits_of(range, "PersistentVolumeClaim") {
        errors.extend(resources::parse(limit.get("min")).iter().filter_map(|(name, min)| asked.below_min(name, *min)));
        for (name, max) in resources::parse(limit.get("max")) {
            let rule = format!("maximum {name} usage per PersistentVolumeClaim is {max}");
            match asked.requests.get(&name) {
                None => errors.push(format!("{rule}.  No request is specified")),
                Some(request) if *request > max => errors.push(format!("{rule}, but request is {request}")),
                Some(_) => {}
            }
        }
    }
    errors
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn range(limit: &Value) -> Value {
        json!({"spec": {"limits": [limit]}})
    }

    #[test]
    fn defaults_fill_what_is_missing() {
        let range = range(
            &json!({"type": "Container", "default": {"cpu": "500m"}, "defaultRequest": {"cpu": "100m", "memory": "1Gi"}}),
        );
        let mut pod =
            json!({"spec": {"containers": [{"name": "a"}, {"name": "b", "resources": {"requests": {"cpu": "1"}}}]}});
        set_defaults(&mut pod, &range);
        assert_eq!(
            pod["spec"]["containers"][0]["resources"],
            json!({"requests": {"cpu": "100m", "memory": "1Gi"}, "limits": {"cpu": "500m"}})
        );
        assert_eq!(pod["spec"]["containers"][1]["resources"]["requests"]["cpu"], "1");
        assert_eq!(
            pod["metadata"]["annotations"][ANNOTATION],
            "LimitRanger plugin set: cpu, memory request for container a; cpu limit for container a; memory request for container b; cpu limit for container b"
        );
    }

    #[test]
    fn bounds_are_checked_per_container_and_pod() {
        let pod = json!({"spec": {"containers": [
            {"name": "a", "resources": {"requests": {"cpu": "200m"}, "limits": {"cpu": "2"}}},
            {"name": "b", "resources": {"requests": {"cpu": "200m"}, "limits": {"cpu": "1"}}}]}});
        for (limit, errors) in [
            (
                json!({"type": "Container", "max": {"cpu": "1"}}),
                vec!["maximum cpu usage per Container is 1, but limit is 2"],
            ),
            (
                json!({"type": "Pod", "max": {"cpu": "2500m"}}),
                vec!["maximum cpu usage per Pod is 2500m, but limit is 3"],
            ),
            (
                json!({"type": "Pod", "min": {"memory": "1"}}),
                vec!["minimum memory usage per Pod is 1.  No request is specified"],
            ),
            (
                json!({"type": "Container", "maxLimitRequestRatio": {"cpu": "8"}}),
                vec!["cpu max limit to request ratio per Container is 8, but provided ratio is 10.000000"],
            ),
        ] {
            assert_eq!(check_pod(&pod, &range(&limit)), errors);
        }
    }
}
