//! What may change in a pod that exists: images, deadlines, tolerations, gates; by its subresources also debug
//! containers and resources. The status has a file of its own.

use apimachinery::status::FieldError;
use serde_json::Value;

use super::{Errors, Path, each, pod, required};
use crate::registry::common::same;
use crate::registry::core::pod_prepare::qos_class;
use crate::registry::object::ObjectExt;
use crate::registry::strategy::keep;

const UPDATABLE: &str = "`spec.containers[*].image`,`spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,\
                         `spec.tolerations` (only additions to existing tolerations),`spec.terminationGracePeriodSeconds` \
                         (allow it to be set to 1 if it was previously negative)";

pub fn update(obj: &Value, old: &Value) -> Errors {
    let mut errors = Errors::new();
    pod::metadata_and_spec(obj, &mut errors);
    annotations(obj, old, &mut errors);
    let (spec, stored) = (&obj["spec"], &old["spec"]);
    for list in ["containers", "initContainers"] {
        if spec.list_at(&[list]).len() != stored.list_at(&[list]).len() {
            let detail = "pod updates may not add or remove containers";
            errors.push(FieldError::forbidden(Path::SPEC.field(list), detail));
            return errors;
        }
        // Images are looked at once more, since they are what may change.
        each(spec, list, Path::SPEC, &mut errors, |container, path, errors| {
            required(container, "image", path, errors);
            pod::trimmed_image(container, path, errors);
        });
    }
    if !deadline(spec, stored, &mut errors) {
        return errors;
    }
    tolerations_only_added(spec, stored, &mut errors);
    gates_only_removed(spec, stored, &mut errors);
    let munged = with_what_may_change(spec, stored, &mut errors);
    if !same(&munged, stored) {
        let detail =
            format!("pod updates may not change fields other than {UPDATABLE}\n{}", difference(stored, &munged));
        errors.push(FieldError::forbidden("spec", detail));
    }
    errors
}

/// Annotations that say what runs where stay as they are.
pub fn annotations(obj: &Value, old: &Value, errors: &mut Errors) {
    const APP_ARMOR: &str = "container.apparmor.security.beta.kubernetes.io/";
    const MIRROR: &str = "kubernetes.io/config.mirror";
    let path = Path::METADATA.field("annotations");
    let keys = |obj: &Value| obj.annotations().into_iter().flatten().map(|(key, _)| key.clone()).collect::<Vec<_>>();
    let what = |key: &str| match key {
        MIRROR => Some("mirror pod annotation"),
        key if key.starts_with(APP_ARMOR) => Some("AppArmor annotations"),
        _ => None,
    };
    for key in keys(old).iter().filter(|key| obj.annotation(key) != old.annotation(key)) {
        let told =
            what(key).map(|what| FieldError::forbidden(path.key(key), format!("may not remove or update {what}")));
        errors.extend(told);
    }
    for key in keys(obj).iter().filter(|key| old.annotation(key).is_none()) {
        errors.extend(what(key).map(|what| FieldError::forbidden(path.key(key), format!("may not add {what}"))));
    }
}

/// The spec with everything put back that may change.
fn with_what_may_change(spec: &Value, stored: &Value, errors: &mut Errors) -> Value {
    let mut munged = spec.clone();
    for list in ["containers", "initContainers"] {
        let images: Vec<Value> = stored.list_at(&[list]).iter().map(|c| c["image"].clone()).collect();
        for (container, image) in munged.list_at_mut(&[list]).into_iter().flatten().zip(images) {
            container.set(&["image"], image);
        }
    }
    for field in ["activeDeadlineSeconds", "schedulingGates", "tolerations"] {
        keep(&mut munged, stored, field);
    }
    let grace = |spec: &Value| spec["terminationGracePeriodSeconds"].as_i64();
    if grace(stored).is_some_and(|seconds| seconds < 0) && grace(spec) == Some(1) {
        keep(&mut munged, stored, "terminationGracePeriodSeconds");
    }
    if !stored.list_at(&["schedulingGates"]).is_empty() {
        gated(spec, stored, errors);
        keep(&mut munged, stored, "nodeSelector");
        let affinity = stored["affinity"]["nodeAffinity"].clone();
        match (&affinity, munged["affinity"].is_object()) {
            (Value::Null, true) => {
                munged.remove_at(&["affinity", "nodeAffinity"]);
            }
            (Value::Null, false) => {}
            _ => munged.set(&["affinity", "nodeAffinity"], affinity),
        }
    }
    munged
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

/// Whether the other rules still matter.
fn deadline(spec: &Value, stored: &Value, errors: &mut Errors) -> bool {
    const PATH: &str = "spec.activeDeadlineSeconds";
    match (spec["activeDeadlineSeconds"].as_i64(), stored["activeDeadlineSeconds"].as_i64()) {
        (Some(new), _) if !(0..=i64::from(i32::MAX)).contains(&new) => {
            errors.push(FieldError::invalid(PATH, new, "must be between 0 and 2147483647, inclusive"));
            return false;
        }
        (Some(new), Some(old)) if old < new => {
            errors.push(FieldError::invalid(PATH, new, "must be less than or equal to previous value"));
            return false;
        }
        (None, Some(_)) => {
            errors.push(FieldError::invalid_null(PATH, "must not update from a positive integer to nil value"));
        }
        _ => {}
    }
    true
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
    each(spec, "schedulingGates", Path::SPEC, errors, |gate, path, errors| {
        if !known.contains(gate) {
            let detail =
                format!("only deletion is allowed, but found new scheduling gate '{}'", gate.str_at(&["name"]));
            errors.push(FieldError::forbidden(path.field("name"), detail));
        }
    });
}

/// While gates hold a pod back its placement may be narrowed.
fn gated(spec: &Value, stored: &Value, errors: &mut Errors) {
    const REQUIRED: &str = "requiredDuringSchedulingIgnoredDuringExecution";
    let changed = stored["nodeSelector"].as_object().into_iter().flatten().any(|(k, v)| spec["nodeSelector"][k] != *v);
    if changed {
        let detail = "only additions to spec.nodeSelector are allowed (no mutations or deletions)";
        errors.push(FieldError::invalid("spec.nodeSelector", spec["nodeSelector"].clone(), detail));
    }
    let terms = |spec: &Value| spec["affinity"]["nodeAffinity"][REQUIRED]["nodeSelectorTerms"].clone();
    let (new, old) = (terms(spec), terms(stored));
    let path = Path::SPEC.field("affinity");
    let (path, old) = (path.field("nodeAffinity"), old.as_array().cloned().unwrap_or_default());
    let path = path.field(REQUIRED);
    let path = path.field("nodeSelectorTerms");
    let given = new.as_array().cloned().unwrap_or_default();
    if !old.is_empty() && old.len() != given.len() {
        let detail = "no additions/deletions to non-empty NodeSelectorTerms list are allowed";
        errors.push(FieldError::invalid(path, new, detail));
        return;
    }
    for (index, (new, _)) in given.iter().zip(&old).enumerate().filter(|(_, (new, old))| !only_adds(new, old)) {
        let detail = "only additions are allowed (no mutations or deletions)";
        errors.push(FieldError::invalid(path.index(index), new.clone(), detail));
    }
}

/// Whether a term asks for what the old one asked for, and perhaps for more; one that asked for nothing goes on so.
fn only_adds(new: &Value, old: &Value) -> bool {
    const LISTS: [&str; 2] = ["matchExpressions", "matchFields"];
    let asks = |term: &Value| LISTS.iter().any(|list| !term.list_at(&[list]).is_empty());
    if !asks(old) {
        return !asks(new);
    }
    LISTS.iter().all(|list| {
        let (new, old) = (new.list_at(&[list]), old.list_at(&[list]));
        new.len() >= old.len() && new.iter().zip(old).all(|(new, old)| same(new, old))
    })
}

pub fn ephemeral_containers(obj: &Value, old: &Value) -> Errors {
    if old.annotation("kubernetes.io/config.mirror").is_some() {
        return vec![FieldError::forbidden("", "static pods do not support ephemeral containers")];
    }
    let mut errors = Errors::new();
    pod::metadata_and_spec(obj, &mut errors);
    annotations(obj, old, &mut errors);
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
