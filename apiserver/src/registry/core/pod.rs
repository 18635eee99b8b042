//! `Pod`: containers that run together on one node.

use apimachinery::status::FieldError;
use jiff::Timestamp;
use serde_json::{Value, json};

use super::pod_binding::BINDING;
use super::pod_eviction::EVICTION;
use super::pod_prepare::{label_keys, pod_level_requests, qos_class, scheduling_gated};
use crate::registry::common::{self, ALL_METADATA, is_nothing, keep_metadata};
use crate::registry::object::ObjectExt;
use crate::registry::strategy::{Column, Cx, DeleteOptions, Strategy, Subresource, keep};
use crate::registry::{defaults, tables, validation};

pub struct Pod;

/// What kubelets write.
struct Status;

/// Debug containers, added to a running pod.
struct EphemeralContainers;

/// Resources of a running pod's containers.
struct Resize;

/// What the server itself changes in a pod: binding it, marking it for eviction. Nobody else can write this way.
struct Internal;

/// The name that `Internal` has beside the subresources; as discovery does not know it, no request leads there.
pub const INTERNAL: &str = "internal";

const COLUMNS: &[Column] = &[
    Column::name(),
    Column::new("Ready", "string"),
    Column::new("Status", "string"),
    Column::new("Restarts", "string"),
    Column::age(),
    Column::new("IP", "string").wide(),
    Column::new("Node", "string").wide(),
    Column::new("Nominated Node", "string").wide(),
    Column::new("Readiness Gates", "string").wide(),
];

static STATUS: Status = Status;
static EPHEMERAL_CONTAINERS: EphemeralContainers = EphemeralContainers;
static RESIZE: Resize = Resize;
static INTERNAL_WRITES: Internal = Internal;

impl Strategy for Pod {
    fn default(&self, obj: &mut Value) {
        defaults::pod::pod(obj);
    }

    fn prepare_for_create(&self, cx: &Cx<'_>, obj: &mut Value) {
        common::set_generation(obj, 1);
        obj.set(&["status"], json!({"phase": "Pending"}));
        scheduling_gated(obj, &cx.now.strftime("%Y-%m-%dT%H:%M:%SZ").to_string());
        label_keys(obj);
        pod_level_requests(obj);
        obj.set(&["status", "qosClass"], qos_class(obj));
    }

    fn prepare_for_update(&self, _cx: &Cx<'_>, obj: &mut Value, old: &Value) {
        // Clients that do not know the field must not lose it.
        if obj["spec"]["resources"].is_null() && !old["spec"]["resources"].is_null() {
            obj.set(&["spec", "resources"], old["spec"]["resources"].clone());
        }
        common::update(obj, old);
    }

    fn validate_create(&self, cx: &Cx<'_>, obj: &Value) -> Vec<FieldError> {
        let mut errors = validation::pod::create(obj);
        if !cx.server.config.allow_privileged {
            validation::security::privileged(&obj["spec"], &mut errors);
        }
        errors
    }

    fn validate_update(&self, _cx: &Cx<'_>, obj: &Value, old: &Value) -> Vec<FieldError> {
        validation::pod_update::update(obj, old)
    }

    fn warnings(&self, _cx: &Cx<'_>, obj: &Value, old: Option<&Value>) -> Vec<String> {
        if old.is_some() { Vec::new() } else { validation::warnings::pod(obj) }
    }

    /// The grace that was asked for, or the pod's own; nothing is waited for where nothing runs.
    fn graceful_deletion(&self, obj: &Value, options: &DeleteOptions) -> Option<i64> {
        let own = || obj.i64_at(&["spec", "terminationGracePeriodSeconds"]).unwrap_or(0);
        let seconds = options.grace_period.unwrap_or_else(own);
        let nothing_runs = obj.str_at(&["spec", "nodeName"]).is_empty()
            || matches!(obj.str_at(&["status", "phase"]), "Failed" | "Succeeded");
        match seconds {
            _ if nothing_runs => Some(0),
            negative if negative < 0 => Some(1),
            _ => Some(seconds),
        }
    }

    fn selectable_fields(&self) -> &'static [&'static str] {
        &[
            "spec.nodeName",
            "spec.restartPolicy",
            "spec.schedulerName",
            "spec.serviceAccountName",
            "spec.hostNetwork",
            "status.phase",
            "status.podIP",
            "status.nominatedNodeName",
        ]
    }

    fn selectable_default(&self, field: &str) -> &'static str {
        if field == "spec.hostNetwork" { "false" } else { "" }
    }

    fn indexed_field(&self) -> Option<&'static str> {
        Some("spec.nodeName")
    }

    fn columns(&self) -> &'static [Column] {
        COLUMNS
    }

    fn row(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        tables::pod::row(obj, now)
    }

    fn subresource(&self, name: &str) -> Option<Subresource> {
        match name {
            "status" => Some(Subresource::Update(&STATUS)),
            "ephemeralcontainers" => Some(Subresource::Update(&EPHEMERAL_CONTAINERS)),
            "resize" => Some(Subresource::Update(&RESIZE)),
            INTERNAL => Some(Subresource::Update(&INTERNAL_WRITES)),
            "binding" => Some(Subresource::Custom(&BINDING)),
            "eviction" => Some(Subresource::Custom(&EVICTION)),
            _ => None,
        }
    }
}

impl Strategy for Status {
    fn prepare_for_update(&self, _cx: &Cx<'_>, obj: &mut Value, old: &Value) {
        keep(obj, old, "spec");
        keep_metadata(obj, old, &["generation", "deletionTimestamp", "ownerReferences"]);
        let kept = ["qosClass", "resourceClaimStatuses", "extendedResourceClaimStatus", "observedGeneration"];
        for field in kept {
            if is_nothing(&obj["status"][field]) && !is_nothing(&old["status"][field]) {
                obj.set(&["status", field], old["status"][field].clone());
            }
        }
        keep_observed_generations(obj, old);
    }

    fn validate_update(&self, _cx: &Cx<'_>, obj: &Value, old: &Value) -> Vec<FieldError> {
        validation::pod_status::status(obj, old)
    }

    fn reset_fields(&self) -> &'static [&'static [&'static str]] {
        &[&["spec"], &["metadata", "deletionTimestamp"], &["metadata", "ownerReferences"]]
    }

    fn graceful_deletion(&self, obj: &Value, options: &DeleteOptions) -> Option<i64> {
        Pod.graceful_deletion(obj, options)
    }
}

/// A writer that does not know `observedGeneration` of conditions must not clear it.
fn keep_observed_generations(obj: &mut Value, old: &Value) {
    let Some(conditions) = obj.list_at_mut(&["status", "conditions"]) else { return };
    for condition in conditions {
        let known = old.list_at(&["status", "conditions"]).iter().find(|c| c["type"] == condition["type"]);
        let generation = known.and_then(|c| c.i64_at(&["observedGeneration"])).unwrap_or(0);
        if generation != 0 && condition.i64_at(&["observedGeneration"]).unwrap_or(0) == 0 {
            condition.set(&["observedGeneration"], generation);
        }
    }
}

impl Strategy for Internal {
    /// Neither the binding nor the mark is a change that its user made: the generation stays.
    fn prepare_for_update(&self, _cx: &Cx<'_>, obj: &mut Value, old: &Value) {
        keep_metadata(obj, old, &["generation"]);
    }

    fn reset_fields(&self) -> &'static [&'static [&'static str]] {
        &[]
    }
}

impl Strategy for EphemeralContainers {
    fn prepare_for_update(&self, _cx: &Cx<'_>, obj: &mut Value, old: &Value) {
        let containers = obj.remove_at(&["spec", "ephemeralContainers"]);
        keep(obj, old, "spec");
        if let Some(containers) = containers {
            obj.set(&["spec", "ephemeralContainers"], containers);
        } else {
            obj.remove_at(&["spec", "ephemeralContainers"]);
        }
        keep_metadata(obj, old, ALL_METADATA);
        common::update(obj, old);
    }

    fn validate_update(&self, _cx: &Cx<'_>, obj: &Value, old: &Value) -> Vec<FieldError> {
        validation::pod_update::ephemeral_containers(obj, old)
    }
}

impl Strategy for Resize {
    /// Only resources and resize policies of containers that are there already may change; an attempt to change the
    /// list of containers is left in place for validation to name.
    fn prepare_for_update(&self, _cx: &Cx<'_>, obj: &mut Value, old: &Value) {
        let merged = ["containers", "initContainers"].map(|list| merge_resources(obj, old, list));
        if let [Some(containers), Some(init_containers)] = merged {
            let resources = obj.remove_at(&["spec", "resources"]);
            keep(obj, old, "spec");
            obj.set(&["spec", "containers"], containers);
            if !init_containers.is_empty() {
                obj.set(&["spec", "initContainers"], init_containers);
            }
            if let Some(resources) = resources {
                obj.set(&["spec", "resources"], resources);
            }
            keep_metadata(obj, old, ALL_METADATA);
        }
        common::update(obj, old);
    }

    fn validate_update(&self, _cx: &Cx<'_>, obj: &Value, old: &Value) -> Vec<FieldError> {
        validation::pod_update::resize(obj, old)
    }
}

/// The stored containers with the new resources; `None` when the lists differ in more than that.
fn merge_resources(obj: &Value, old: &Value, list: &str) -> Option<Vec<Value>> {
    let (new, stored) = (obj.list_at(&["spec", list]), old.list_at(&["spec", list]));
    if new.len() != stored.len() {
        return None;
    }
    new.iter()
        .zip(stored)
        .map(|(new, stored)| {
            let mut merged = stored.clone();
            for field in ["resources", "resizePolicy"] {
                keep(&mut merged, new, field);
            }
            (new["name"] == stored["name"]).then_some(merged)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_that_do_not_run_go_at_once() {
        let running =
            json!({"spec": {"nodeName": "n", "terminationGracePeriodSeconds": 30}, "status": {"phase": "Running"}});
        let unscheduled = json!({"spec": {"terminationGracePeriodSeconds": 30}});
        let failed =
            json!({"spec": {"nodeName": "n", "terminationGracePeriodSeconds": 30}, "status": {"phase": "Failed"}});
        let asked = |seconds| DeleteOptions { grace_period: seconds, ..DeleteOptions::default() };
        let cases = [
            (&running, None, 30),
            (&running, Some(5), 5),
            (&running, Some(-1), 1),
            (&unscheduled, None, 0),
            (&failed, Some(60), 0),
        ];
        for (pod, seconds, expected) in cases {
            assert_eq!(Pod.graceful_deletion(pod, &asked(seconds)), Some(expected), "{pod}");
        }
    }

    #[test]
    fn resizing_changes_nothing_but_resources() {
        let old = json!({"spec": {"containers": [{"name": "a", "image": "x", "resources": {"limits": {"cpu": "1"}}}]}});
        let new = json!({"spec": {"containers": [{"name": "a", "image": "y", "resources": {"limits": {"cpu": "2"}}}]}});
        let merged = merge_resources(&new, &old, "containers").unwrap();
        assert_eq!(merged, [json!({"name": "a", "image": "x", "resources": {"limits": {"cpu": "2"}}})]);
        let renamed = json!({"spec": {"containers": [{"name": "b"}]}});
        assert!(merge_resources(&renamed, &old, "containers").is_none());
    }
}
