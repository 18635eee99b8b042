//! Rules for claims of storage.

use apimachinery::meta::Quantity;
use apimachinery::meta::validation::{is_dns1123_label, is_qualified_name};
use apimachinery::status::FieldError;
use serde_json::Value;

use super::container::subdomain;
use super::{
    Errors, IMMUTABLE, IS_NEGATIVE, Path, annotations, complain, label_selector, labels, one_of_given, required,
};
use crate::registry::common::{is_nothing, same};
use crate::registry::core::pod_prepare::quantity;
use crate::registry::object::ObjectExt;
use crate::registry::strategy::keep;

const ACCESS_MODES: [&str; 4] = ["ReadOnlyMany", "ReadWriteMany", "ReadWriteOnce", "ReadWriteOncePod"];
pub const VOLUME_MODES: [&str; 2] = ["Block", "Filesystem"];
/// What older manifests name the storage class with.
const CLASS_ANNOTATION: &str = "volume.beta.kubernetes.io/storage-class";
const RESIZE_STATES: [&str; 5] = [
    "ControllerResizeInProgress",
    "ControllerResizeInfeasible",
    "NodeResizeInProgress",
    "NodeResizeInfeasible",
    "NodeResizePending",
];

pub fn access_modes(spec: &Value, missing: &str, path: Path<'_>, errors: &mut Errors) {
    let list = path.field("accessModes");
    let modes: Vec<&str> = spec.list_at(&["accessModes"]).iter().filter_map(Value::as_str).collect();
    if modes.is_empty() {
        errors.push(FieldError::required(list, missing));
    }
    for mode in modes.iter().filter(|mode| !ACCESS_MODES.contains(mode)) {
        errors.push(FieldError::not_supported(list, *mode, &ACCESS_MODES));
    }
    let alone = |mode: &&&str| **mode == "ReadWriteOncePod";
    let others = modes.iter().any(|mode| !alone(&mode) && ACCESS_MODES.contains(mode));
    if others && modes.iter().any(|mode| alone(&mode)) {
        errors.push(FieldError::forbidden(list, "may not use ReadWriteOncePod with other access modes"));
    }
}

/// An amount that is not negative, in whole units.
pub fn whole_amount(amount: &Value, path: Path<'_>, errors: &mut Errors) -> bool {
    let negative = quantity(amount).map(|amount| amount.value()).filter(|value| *value < 0);
    if let Some(value) = negative {
        errors.push(FieldError::invalid(path, value, "must be a valid resource quantity"));
    }
    negative.is_none()
}

/// More than nothing.
pub fn positive_amount(amount: Quantity, path: Path<'_>, errors: &mut Errors) {
    if amount.signum() <= 0 {
        errors.push(FieldError::invalid(path, amount.to_string(), "must be greater than zero"));
    }
}

pub fn claim(obj: &Value) -> Errors {
    let mut errors = Errors::new();
    claim_spec(&obj["spec"], false, Path::SPEC, &mut errors);
    errors
}

/// A template of claims, as pods and stateful sets have them.
pub fn claim_template(template: &Value, path: Path<'_>, errors: &mut Errors) {
    template_metadata(&template["metadata"], path.field("metadata"), errors);
    claim_spec(&template["spec"], false, path.field("spec"), errors);
}

/// Of the metadata of templates only labels and annotations count.
pub fn template_metadata(metadata: &Value, path: Path<'_>, errors: &mut Errors) {
    annotations(&metadata["annotations"], path.field("annotations"), errors);
    labels(&metadata["labels"], path.field("labels"), errors);
    for (name, value) in metadata.as_object().into_iter().flatten() {
        if !matches!(name.as_str(), "annotations" | "labels") && !is_nothing(value) {
            errors.push(FieldError::forbidden(path.field(name), "cannot be set"));
        }
    }
}

/// The spec of a claim, whose source of data may be of any group where the stored one is of one.
pub fn claim_spec(spec: &Value, any_group: bool, path: Path<'_>, errors: &mut Errors) {
    access_modes(spec, "at least 1 access mode is required", path, errors);
    label_selector(&spec["selector"], path.field("selector"), errors);
    let resources = path.field("resources");
    match quantity(&spec["resources"]["requests"]["storage"]) {
        None => errors.push(FieldError::required(resources.key("storage"), "")),
        Some(amount) => positive_amount(amount, resources.key("storage"), errors),
    }
    for field in ["storageClassName", "volumeAttributesClassName"] {
        subdomain(spec.str_at(&[field]), path.field(field), errors);
    }
    one_of_given(spec, "volumeMode", &VOLUME_MODES, path, errors);
    for field in DATA_SOURCES {
        if spec[field].is_object() {
            data_source(&spec[field], any_group, path.field(field), errors);
        }
    }
    if !spec["dataSource"].is_object() || !spec["dataSourceRef"].is_object() {
        return;
    }
    let same_field = |field: &&str| spec["dataSource"][*field] == spec["dataSourceRef"][*field];
    // Upstream shows the path of the field for its value.
    if !spec.str_at(&["dataSourceRef", "namespace"]).is_empty() {
        let detail = "may not be specified when dataSourceRef.namespace is specified";
        errors.push(FieldError::invalid_shown(path, "{}", detail));
    } else if !["apiGroup", "kind", "name"].iter().all(same_field) {
        errors.push(FieldError::invalid_shown(path, "{}", "must match dataSourceRef"));
    }
}

/// The fields that say what a new volume is filled from.
const DATA_SOURCES: [&str; 2] = ["dataSource", "dataSourceRef"];

fn data_source(source: &Value, any_group: bool, path: Path<'_>, errors: &mut Errors) {
    required(source, "name", path, errors);
    required(source, "kind", path, errors);
    match source.str_at(&["apiGroup"]) {
        "" if source.str_at(&["kind"]) != "PersistentVolumeClaim" => {
            let detail = "must be 'PersistentVolumeClaim' when referencing the default apiGroup";
            errors.push(FieldError::invalid(path, source.str_at(&["kind"]), detail));
        }
        group if !any_group => subdomain(group, path.field("apiGroup"), errors),
        _ => {}
    }
    let namespace = source.str_at(&["namespace"]);
    if !namespace.is_empty() {
        complain(is_dns1123_label(namespace), namespace, path.field("namespace"), errors);
    }
}

pub fn claim_update(obj: &Value, old: &Value) -> Errors {
    let (spec, stored) = (&obj["spec"], &old["spec"]);
    let grouped = |field: &&str| !stored[*field]["apiGroup"].is_null();
    let mut errors = Errors::new();
    claim_spec(spec, DATA_SOURCES.iter().any(grouped), Path::SPEC, &mut errors);
    let class = |obj: &Value| obj.annotation(CLASS_ANNOTATION).unwrap_or_default().to_owned();
    let annotated = old.annotation(CLASS_ANNOTATION);
    // A class may move from the annotation to the field, once.
    let moves = stored["storageClassName"].is_null()
        && annotated.is_some_and(|class| spec["storageClassName"] == class)
        && obj.annotation(CLASS_ANNOTATION).is_none_or(|class| Some(class) == annotated);
    if !moves && class(obj) != class(old) {
        let path = format!("metadata.annotations.{CLASS_ANNOTATION}");
        errors.push(FieldError::invalid(path, class(obj), IMMUTABLE));
    }
    if !same(&with_what_may_change(obj, old, moves), stored) {
        let detail =
            "spec is immutable after creation except resources.requests and volumeAttributesClassName for bound claims";
        errors.push(FieldError::forbidden("spec", detail));
    }
    let amount = |obj: &Value, path: [&str; 3]| obj.at(&path).and_then(quantity).unwrap_or_default();
    let size = |spec: &Value| amount(spec, ["resources", "requests", "storage"]);
    if size(spec) < size(stored) && size(spec) <= amount(old, ["status", "capacity", "storage"]) {
        let detail = "field can not be less than status.capacity";
        errors.push(FieldError::forbidden("spec.resources.requests.storage", detail));
    }
    if !same(&spec["volumeMode"], &stored["volumeMode"]) {
        errors.push(FieldError::invalid("volumeMode", spec["volumeMode"].clone(), IMMUTABLE));
    }
    errors.extend(attributes_class_removed(obj, old));
    errors
}

/// The spec with everything put back that may change: the volume and the class of a claim that had none, the size and
/// the attributes of one that is bound.
fn with_what_may_change(obj: &Value, old: &Value, class_moves: bool) -> Value {
    let (mut spec, stored) = (obj["spec"].clone(), &old["spec"]);
    if stored.str_at(&["volumeName"]).is_empty() {
        keep(&mut spec, stored, "volumeName");
    }
    let named_first = old.annotation(CLASS_ANNOTATION).is_none_or(|class| spec["storageClassName"] == class);
    if stored["storageClassName"].is_null() && (class_moves || named_first) {
        keep(&mut spec, stored, "storageClassName");
    }
    if old["status"]["phase"] == "Bound" {
        if let Some(requests) = spec.at_mut(&["resources", "requests"]).filter(|requests| requests.is_object()) {
            keep(requests, &stored["resources"]["requests"], "storage");
        }
        keep(&mut spec, stored, "volumeAttributesClassName");
    }
    spec
}

/// Once a volume has the attributes of a class it keeps having those of some class.
fn attributes_class_removed(obj: &Value, old: &Value) -> Option<FieldError> {
    let class = |obj: &Value| obj["spec"]["volumeAttributesClassName"].clone();
    if class(obj) == class(old) || old["status"]["currentVolumeAttributesClassName"].is_null() {
        return None;
    }
    let what = match class(obj).as_str() {
        None => "nil",
        Some("") => "empty string",
        Some(_) => return None,
    };
    let detail = format!("update to {what} is forbidden when status.currentVolumeAttributesClassName is not nil");
    Some(FieldError::forbidden("spec.volumeAttributesClassName", detail))
}

/// What the controllers that grow volumes write.
pub fn claim_status(obj: &Value, _old: &Value) -> Errors {
    let mut errors = Errors::new();
    let (status, path) = (&obj["status"], Path::STATUS);
    let entries = |field: &str| status[field].as_object().into_iter().flatten();
    if obj.list_at(&["spec", "accessModes"]).is_empty() {
        errors.push(FieldError::required("Spec.accessModes", ""));
    }
    for (name, amount) in entries("capacity") {
        whole_amount(amount, path.field("capacity").key(name), &mut errors);
    }
    let states = path.field("allocatedResourceStatuses");
    for (name, state) in entries("allocatedResourceStatuses") {
        resource_key(name, states, &mut errors);
        // The name stands where the state is wrong: so does upstream.
        if !state.as_str().is_some_and(|state| RESIZE_STATES.contains(&state)) {
            errors.push(FieldError::not_supported(states, name.as_str(), &RESIZE_STATES));
        }
    }
    let allocated = path.field("allocatedResources");
    for (name, amount) in entries("allocatedResources") {
        if resource_key(name, allocated, &mut errors)
            && whole_amount(amount, allocated.key(name), &mut errors)
            && let Some(negative) = quantity(amount).filter(|amount| amount.signum() < 0)
        {
            errors.push(FieldError::invalid(allocated.key(name), negative.to_string(), IS_NEGATIVE));
        }
    }
    errors
}

/// Storage, or something with a name of its own.
fn resource_key(name: &str, path: Path<'_>, errors: &mut Errors) -> bool {
    let before = errors.len();
    complain(is_qualified_name(name), name, path, errors);
    let native = !name.contains('/') || name.contains("kubernetes.io/");
    if errors.len() == before && native && name != "storage" {
        errors.push(FieldError::not_supported(path, name, &["storage"]));
    }
    errors.len() == before
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::tests::texts;
    use super::*;

    #[test]
    fn claims_ask_for_something() {
        let expected = [
            "spec.accessModes: Required value: at least 1 access mode is required",
            "spec.resources[storage]: Required value",
        ];
        assert_eq!(texts(&claim(&json!({"spec": {}}))), expected);
        let spec = json!({"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}});
        assert!(claim(&json!({"spec": spec})).is_empty());
    }

    #[test]
    fn bound_claims_may_grow_and_no_others() {
        let claim = |size: &str, phase: &str| {
            let spec = json!({"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": size}}});
            json!({"spec": spec, "status": {"phase": phase, "capacity": {"storage": "1Gi"}}})
        };
        assert!(claim_update(&claim("2Gi", "Bound"), &claim("1Gi", "Bound")).is_empty());
        let immutable = "spec: Forbidden: spec is immutable after creation except resources.requests and volumeAttributesClassName for bound claims";
        assert_eq!(texts(&claim_update(&claim("2Gi", "Pending"), &claim("1Gi", "Pending"))), [immutable]);
        let shrinks = "spec.resources.requests.storage: Forbidden: field can not be less than status.capacity";
        assert_eq!(texts(&claim_update(&claim("1Gi", "Bound"), &claim("2Gi", "Bound"))), [shrinks]);
    }

    #[test]
    fn claims_may_be_given_a_class_once() {
        let claim = |class: Value| {
            let resources = json!({"requests": {"storage": "1Gi"}});
            json!({"spec": {"accessModes": ["ReadWriteOnce"], "resources": resources, "storageClassName": class}})
        };
        assert!(claim_update(&claim(json!("a")), &claim(Value::Null)).is_empty());
        assert_eq!(claim_update(&claim(json!("a")), &claim(json!("b"))).len(), 1);
    }

    #[test]
    fn states_of_growing_are_known() {
        let obj = json!({"spec": {"accessModes": ["ReadWriteOnce"]}, "status": {
            "allocatedResourceStatuses": {"storage": "Zzz"}, "allocatedResources": {"cpu": "1", "storage": "-1"}}});
        let told = texts(&claim_status(&obj, &json!({})));
        assert!(
            told[0].starts_with(r#"status.allocatedResourceStatuses: Unsupported value: "storage": supported values:"#)
        );
        assert_eq!(
            told[1..],
            [
                r#"status.allocatedResources: Unsupported value: "cpu": supported values: "storage""#,
                "status.allocatedResources[storage]: Invalid value: -1: must be a valid resource quantity"
            ]
        );
    }
}
