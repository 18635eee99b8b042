//! What may change in a pod that exists: images, deadlines, tolerations, gates; by its subresources also debug
//! containers, resources and status.

use apimachinery::status::FieldError;
use serde_json::Value;

use super::{Errors, Path, complain, pod};
use crate::registry::common::same;
use crate::registry::core::pod_prepare::qos_class;
use crate::registry::object::ObjectExt;

const UPDATABLE: &str = "`spec.containers[*].image`,`spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,\
                         `spec.tolerations` (only additions to existing tolerations),`spec.terminationGracePeriodSeconds` \
                         (allow it to be set to 1 if it was previously negative)";

pub fn update(obj: &Value, old: &Value) -> Errors {
    let mut errors = Errors::new();
    pod::metadata_and_spec(obj, &mut errors);
    let (spec, stored) = (&obj["spec"], &old["spec"]);
    for list in ["containers", "initContainers"] {
        if spec.list_at(&[list]).len() != stored.list_at(&[list]).len() {
            let detail = "pod updates may not add or remove containers";
            errors.push(FieldError::forbidden(Path::SPEC.field(list), detail));
            return errors;
        }
    }
    deadline(spec, stored, &mut errors);
    tolerations_only_added(spec, stored, &mut errors);
    gates_only_removed(spec, stored, &mut errors);
    let mut munged = spec.clone();
    for list in ["containers", "initContainers"] {
        let images: Vec<Value> = stored.list_at(&[list]).iter().map(|c| c["image"].clone()).collect();
        for (container, image) in munged.list_at_mut(&[list]).into_iter().flatten().zip(images) {
            container.set(&["image"], image);
        }
    }
    let mut free = vec!["activeDeadlineSeconds", "schedulingGates", "tolerations"];
    if !stored.list_at(&["schedulingGates"]).is_empty() {
        gated(spec, stored, &mut errors);
        free.extend(["nodeSelector", "affinity"]);
    }
    for field in free {
        crate::registry::strategy::keep(&mut munged, stored, field);
    }
    if !same(&munged, stored) {
        let detail =
            format!("pod updates may not change fields other than {UPDATABLE}\n{}", difference(stored, &munged));
        errors.push(FieldError::forbidden("spec", detail));
    }
    errors
}

/// The fields that differ, in the manner of a patch.
fn difference(old: &Value, new: &Value) -> String {
    let mut lines = Vec::new();
    let empty = serde_json::Map::new();
    let (old, new) = (old.as_object().unwrap_or(&empty), new.as_object().unwrap_or(&empty));
    let keys: std::collections::BTreeSet<&String> = old.keys().chain(new.keys()).collect();
    for key in keys {
        let (before, after) = (old.get(key).unwrap_or(&Value::Null), new.get(key).unwrap_or(&Value::Null));
        if !same(before, after) {
            lines.push(format!("- {key}: {before}\n+ {key}: {after}"));
        }
    }
    lines.join("\n")
}

fn deadline(spec: &Value, stored: &Value, errors: &mut Errors) {
    const PATH: &str = "spec.activeDeadlineSeconds";
    match (spec["activeDeadlineSeconds"].as_i64(), stored["activeDeadlineSeconds"].as_i64()) {
        (Some(new), Some(old)) if old < new => {
            errors.push(FieldError::invalid(PATH, new, "must be less than or equal to previous value"));
        }
        (None, Some(_)) => {
            errors.push(FieldError::invalid(PATH, Value::Null, "must not update from a positive integer to nil value"));
        }
        _ => {}
    }
}

fn tolerations_only_added(spec: &Value, stored: &Value, errors: &mut Errors) {
    let without_seconds = |toleration: &Value| {
        let mut toleration = toleration.clone();
        toleration.remove_at(&["tolerationSeconds"]);
        toleration
    };
    let new: Vec<Value> = spec.list_at(&["tolerations"]).iter().map(without_seconds).collect();
    let kept = stored.list_at(&["tolerations"]).iter().all(|old| new.iter().any(|n| same(n, &without_seconds(old))));
    if !kept {
        let detail = "existing toleration can not be modified except its tolerationSeconds";
        errors.push(FieldError::forbidden("spec.tolerations", detail));
    }
}

fn gates_only_removed(spec: &Value, stored: &Value, errors: &mut Errors) {
    let known = stored.list_at(&["schedulingGates"]);
    let added = spec.list_at(&["schedulingGates"]).iter().filter(|gate| !known.contains(gate));
    for gate in added {
        let name = gate.str_at(&["name"]);
        let detail = format!("only deletion is allowed, but found new scheduling gate '{name}'");
        errors.push(FieldError::forbidden("spec.schedulingGates", detail));
    }
}

/// While gates hold a pod back its placement may be narrowed.
fn gated(spec: &Value, stored: &Value, errors: &mut Errors) {
    let changed = stored["nodeSelector"].as_object().into_iter().flatten().any(|(k, v)| spec["nodeSelector"][k] != *v);
    if changed {
        let detail = "only additions to spec.nodeSelector are allowed (no mutations or deletions)";
        errors.push(FieldError::invalid("spec.nodeSelector", spec["nodeSelector"].clone(), detail));
    }
}

pub fn ephemeral_containers(obj: &Value, old: &Value) -> Errors {
    if old.annotation("kubernetes.io/config.mirror").is_some() {
        return vec![FieldError::forbidden("", "static pods do not support ephemeral containers")];
    }
    let mut errors = Errors::new();
    pod::metadata_and_spec(obj, &mut errors);
    let new = obj.list_at(&["spec", "ephemeralContainers"]);
    for stored in old.list_at(&["spec", "ephemeralContainers"]) {
        let name = stored.str_at(&["name"]);
        let detail = match new.iter().find(|container| container["name"] == stored["name"]) {
            None => format!("existing ephemeral containers {name:?} may not be removed\n"),
            Some(container) if !same(container, stored) => {
                format!("existing ephemeral containers {name:?} may not be changed\n{}", difference(stored, container))
            }
            Some(_) => continue,
        };
        errors.push(FieldError::forbidden("spec.ephemeralContainers", detail));
    }
    errors
}

pub fn resize(obj: &Value, old: &Value) -> Errors {
    let mut errors = Errors::new();
    pod::metadata_and_spec(obj, &mut errors);
    if old.annotation("kubernetes.io/config.mirror").is_some() {
        return vec![FieldError::forbidden("", "static pods cannot be resized")];
    }
    for list in ["containers", "initContainers"] {
        let names =
            |pod: &Value| -> Vec<Value> { pod.list_at(&["spec", list]).iter().map(|c| c["name"].clone()).collect() };
        if names(obj) != names(old) {
            let detail = "containers may not be renamed or reordered on resize";
            errors.push(FieldError::forbidden(Path::SPEC.field(list), detail));
        }
    }
    let class = old.str_at(&["status", "qosClass"]);
    if !class.is_empty() && qos_class(obj) != class {
        errors.push(FieldError::invalid("metadata", class, "Pod QOS Class may not change as a result of resizing"));
    }
    errors
}

pub fn status(obj: &Value, old: &Value) -> Errors {
    let mut errors = Errors::new();
    let (new, stored) = (&obj["status"], &old["status"]);
    let nominated = new.str_at(&["nominatedNodeName"]);
    if !nominated.is_empty() && nominated != stored.str_at(&["nominatedNodeName"]) {
        let path = Path::STATUS.field("nominatedNodeName");
        complain(apimachinery::meta::validation::is_dns1123_subdomain(nominated), nominated, path, &mut errors);
        if !old.str_at(&["spec", "nodeName"]).is_empty() {
            errors.push(FieldError::forbidden(path, "may not be set on pods that are already bound to a node"));
        }
    }
    if !stored["qosClass"].is_null() && new["qosClass"] != stored["qosClass"] {
        errors.push(FieldError::invalid("status.qosClass", new["qosClass"].clone(), super::IMMUTABLE));
    }
    for (index, ip) in new.list_at(&["podIPs"]).iter().enumerate() {
        let path = Path::STATUS.field("podIPs");
        let path = path.index(index);
        let text = ip.str_at(&["ip"]);
        complain(apimachinery::meta::validation::is_valid_ip(text), text, path, &mut errors);
    }
    restarts(obj, old, &mut errors);
    errors
}

/// A container that ended and must not restart does not come back to life.
fn restarts(obj: &Value, old: &Value, errors: &mut Errors) {
    let policy = old.str_at(&["spec", "restartPolicy"]);
    if policy == "Always" {
        return;
    }
    let path = Path::STATUS.field("containerStatuses");
    let stored = old.list_at(&["status", "containerStatuses"]);
    for (index, status) in obj.list_at(&["status", "containerStatuses"]).iter().enumerate() {
        let Some(before) = stored.iter().find(|s| s["name"] == status["name"]) else { continue };
        let ended = &before["state"]["terminated"];
        let final_end = ended.is_object() && (policy == "Never" || ended["exitCode"] == 0);
        if final_end && !status["state"]["terminated"].is_object() {
            let path = path.index(index);
            errors.push(FieldError::forbidden(path.field("state"), "may not be transitioned to non-terminated state"));
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::tests::texts;
    use super::*;
    use crate::registry::defaults;

    fn pod_with(change: impl FnOnce(&mut Value)) -> Value {
        let mut obj = json!({"metadata": {"name": "a"}, "spec": {"containers": [{"name": "c", "image": "i"}]}});
        change(&mut obj);
        defaults::pod::pod(&mut obj);
        obj
    }

    #[test]
    fn images_and_tolerations_may_change() {
        let old = pod_with(|p| p["spec"]["tolerations"] = json!([{"key": "a", "operator": "Exists"}]));
        let new = pod_with(|p| {
            p["spec"]["containers"][0]["image"] = "j".into();
            p["spec"]["tolerations"] = json!([{"key": "a", "operator": "Exists"}, {"key": "b", "operator": "Exists"}]);
        });
        assert_eq!(texts(&update(&new, &old)), Vec::<String>::new());
    }

    #[test]
    fn other_fields_may_not() {
        let old = pod_with(|_| {});
        let new = pod_with(|p| p["spec"]["hostname"] = "h".into());
        let problems = texts(&update(&new, &old));
        assert_eq!(problems.len(), 1);
        assert!(
            problems[0].starts_with(
                "spec: Forbidden: pod updates may not change fields other than `spec.containers[*].image`"
            )
        );
        let grown =
            pod_with(|p| p["spec"]["containers"] = json!([{"name": "c", "image": "i"}, {"name": "d", "image": "i"}]));
        let expected = ["spec.containers: Forbidden: pod updates may not add or remove containers"];
        assert_eq!(texts(&update(&grown, &old)), expected);
    }

    #[test]
    fn debug_containers_are_only_added() {
        let debug = json!([{"name": "d", "image": "i", "targetContainerName": "c"}]);
        let old = pod_with(|p| p["spec"]["ephemeralContainers"] = debug);
        let errors = ephemeral_containers(&pod_with(|_| {}), &old);
        let expected = "spec.ephemeralContainers: Forbidden: existing ephemeral containers \"d\" may not be removed\n";
        assert_eq!(texts(&errors), [expected]);
    }
}
