//! Rules for volumes, claims, storage classes and CSI objects.

use apimachinery::status::FieldError;
use serde_json::Value;

use super::container::quantity_value;
use super::volume::host_path;
use super::{Errors, Path, label_selector, one_of_given, pod, required, required_one_of};
use crate::registry::common::{is_nothing, same};
use crate::registry::core::pod_prepare::quantity;
use crate::registry::object::ObjectExt;

const ACCESS_MODES: [&str; 4] = ["ReadOnlyMany", "ReadWriteMany", "ReadWriteOnce", "ReadWriteOncePod"];
/// Fields of a volume's spec that are no source of storage.
const NO_SOURCE: [&str; 9] = [
    "accessModes",
    "capacity",
    "claimRef",
    "mountOptions",
    "nodeAffinity",
    "persistentVolumeReclaimPolicy",
    "storageClassName",
    "volumeMode",
    "volumeAttributesClassName",
];

fn access_modes(spec: &Value, missing: &str, path: Path<'_>, errors: &mut Errors) {
    let list = path.field("accessModes");
    let modes = spec.list_at(&["accessModes"]);
    if modes.is_empty() {
        errors.push(FieldError::required(list, missing));
    }
    for mode in modes {
        let text = mode.as_str().unwrap_or_default();
        if !ACCESS_MODES.contains(&text) {
            errors.push(FieldError::not_supported(list, text, &ACCESS_MODES));
        }
    }
    if modes.len() > 1 && modes.iter().any(|mode| mode == "ReadWriteOncePod") {
        let detail = "may not use ReadWriteOncePod with other access modes";
        errors.push(FieldError::forbidden(list, detail));
    }
}

pub fn persistent_volume(obj: &Value) -> Errors {
    let mut errors = Errors::new();
    let spec = &obj["spec"];
    access_modes(spec, "", Path::SPEC, &mut errors);
    let capacity = Path::SPEC.field("capacity");
    let amounts = spec["capacity"].as_object();
    if amounts.is_none_or(serde_json::Map::is_empty) {
        errors.push(FieldError::required(capacity, ""));
    }
    if spec["capacity"]["storage"].is_null() || amounts.is_some_and(|a| a.len() > 1) {
        let given = amounts.cloned().map_or(Value::Null, Value::Object);
        errors.push(FieldError::not_supported(capacity, given, &["storage"]));
    }
    for (name, amount) in amounts.into_iter().flatten() {
        quantity_value(name, amount, capacity.key(name), &mut errors);
        if quantity(amount).is_some_and(|q| q.signum() <= 0) {
            let path = capacity.key(name);
            errors.push(FieldError::invalid(path, amount.clone(), "must be greater than zero"));
        }
    }
    required_one_of(spec, "persistentVolumeReclaimPolicy", &["Delete", "Recycle", "Retain"], Path::SPEC, &mut errors);
    one_of_given(spec, "volumeMode", &["Block", "Filesystem"], Path::SPEC, &mut errors);
    super::container::subdomain(spec.str_at(&["storageClassName"]), Path::SPEC.field("storageClassName"), &mut errors);
    let affinity = Path::SPEC.field("nodeAffinity");
    if spec["nodeAffinity"].is_object() && spec["nodeAffinity"]["required"].is_null() {
        let detail = "must specify required node constraints";
        errors.push(FieldError::required(affinity.field("required"), detail));
    }
    if spec["nodeAffinity"]["required"].is_object() {
        pod::node_selector(&spec["nodeAffinity"]["required"], affinity.field("required"), &mut errors);
    }
    volume_source(spec, &mut errors);
    errors
}

fn volume_source(spec: &Value, errors: &mut Errors) {
    let fields = spec.as_object().into_iter().flatten();
    let sources: Vec<&String> = fields
        .filter(|(key, value)| !NO_SOURCE.contains(&key.as_str()) && !value.is_null())
        .map(|(key, _)| key)
        .collect();
    for extra in sources.iter().skip(1) {
        errors.push(FieldError::forbidden(Path::SPEC.field(extra), "may not specify more than 1 volume type"));
    }
    match sources.first().map(|source| source.as_str()) {
        None => errors.push(FieldError::required("spec", "must specify a volume type")),
        Some("hostPath") => {
            host_path(&spec["hostPath"], Path::SPEC.field("hostPath"), errors);
            if spec["hostPath"]["path"] == "/" && spec["persistentVolumeReclaimPolicy"] == "Recycle" {
                let detail = "may not be 'recycle' for a hostPath mount of '/'";
                errors.push(FieldError::forbidden("spec.persistentVolumeReclaimPolicy", detail));
            }
        }
        Some("local") => {
            required(&spec["local"], "path", Path::SPEC.field("local"), errors);
            if spec["nodeAffinity"].is_null() {
                let detail = "Local volume requires node affinity";
                errors.push(FieldError::required(Path::SPEC.field("nodeAffinity"), detail));
            }
        }
        Some(kind) => {
            let owner = super::volume_sources::Owner::PersistentVolume;
            super::volume_sources::check(kind, &spec[kind], owner, Path::SPEC.field(kind), errors);
        }
    }
}

pub fn persistent_volume_update(obj: &Value, old: &Value) -> Errors {
    let mut errors = persistent_volume(obj);
    let source = |spec: &Value| {
        let mut fields = spec.as_object().cloned().unwrap_or_default();
        fields.retain(|key, _| !NO_SOURCE.contains(&key.as_str()));
        Value::Object(fields)
    };
    if !same(&source(&obj["spec"]), &source(&old["spec"])) {
        let detail = "spec.persistentvolumesource is immutable after creation";
        errors.push(FieldError::forbidden("spec.persistentvolumesource", detail));
    }
    super::immutable(&obj["spec"], &old["spec"], "volumeMode", Path::SPEC, &mut errors);
    if !is_nothing(&old["spec"]["nodeAffinity"]) {
        super::immutable(&obj["spec"], &old["spec"], "nodeAffinity", Path::SPEC, &mut errors);
    }
    errors
}

pub fn claim(obj: &Value) -> Errors {
    let mut errors = Errors::new();
    claim_spec(&obj["spec"], Path::SPEC, &mut errors);
    errors
}

pub fn claim_spec(spec: &Value, path: Path<'_>, errors: &mut Errors) {
    access_modes(spec, "at least 1 access mode is required", path, errors);
    label_selector(&spec["selector"], path.field("selector"), errors);
    let requests = path.field("resources");
    let storage = &spec["resources"]["requests"]["storage"];
    match quantity(storage) {
        None => errors.push(FieldError::required(requests.key("storage"), "")),
        Some(amount) if amount.signum() <= 0 => {
            errors.push(FieldError::invalid(requests.key("storage"), storage.clone(), "must be greater than zero"));
        }
        Some(_) => {}
    }
    super::container::subdomain(spec.str_at(&["storageClassName"]), path.field("storageClassName"), errors);
    one_of_given(spec, "volumeMode", &["Block", "Filesystem"], path, errors);
    for field in ["dataSource", "dataSourceRef"] {
        if spec[field].is_object() {
            data_source(&spec[field], path.field(field), errors);
        }
    }
    if spec["dataSource"].is_object()
        && spec["dataSourceRef"].is_object()
        && spec["dataSourceRef"]["namespace"].is_null()
    {
        let same_field = |field: &str| spec["dataSource"].str_at(&[field]) == spec["dataSourceRef"].str_at(&[field]);
        if !["apiGroup", "kind", "name"].into_iter().all(same_field) {
            errors.push(FieldError::invalid(path, Value::Object(serde_json::Map::new()), "must match dataSourceRef"));
        }
    }
    super::container::subdomain(
        spec.str_at(&["volumeAttributesClassName"]),
        path.field("volumeAttributesClassName"),
        errors,
    );
}

/// What a new volume is filled from.
fn data_source(source: &Value, path: Path<'_>, errors: &mut Errors) {
    required(source, "name", path, errors);
    required(source, "kind", path, errors);
    match source.str_at(&["apiGroup"]) {
        "" if source["kind"] != "PersistentVolumeClaim" => {
            let detail = "must be 'PersistentVolumeClaim' when referencing the default apiGroup";
            errors.push(FieldError::invalid(path, source["kind"].clone(), detail));
        }
        "" => {}
        group => super::container::subdomain(group, path.field("apiGroup"), errors),
    }
}

pub fn claim_update(obj: &Value, old: &Value) -> Errors {
    let mut errors = claim(obj);
    let (spec, stored) = (&obj["spec"], &old["spec"]);
    let mut munged = spec.clone();
    // The controller binds an unbound claim and may give it a class.
    if stored.str_at(&["volumeName"]).is_empty() {
        crate::registry::strategy::keep(&mut munged, stored, "volumeName");
    }
    if stored["storageClassName"].is_null() {
        crate::registry::strategy::keep(&mut munged, stored, "storageClassName");
    }
    let bound = old["status"]["phase"] == "Bound";
    if bound {
        crate::registry::strategy::keep(&mut munged, stored, "resources");
    }
    crate::registry::strategy::keep(&mut munged, stored, "volumeAttributesClassName");
    if !same(&munged, stored) {
        let detail =
            "spec is immutable after creation except resources.requests and volumeAttributesClassName for bound claims";
        errors.push(FieldError::forbidden("spec", detail));
    }
    let size = |claim: &Value| quantity(&claim["spec"]["resources"]["requests"]["storage"]);
    if let (Some(new), Some(before)) = (size(obj), size(old))
        && new < before
        && new <= quantity(&old["status"]["capacity"]["storage"]).unwrap_or(before)
    {
        let detail = "field can not be less than status.capacity";
        errors.push(FieldError::forbidden("spec.resources.requests.storage", detail));
    }
    super::immutable(spec, stored, "volumeMode", Path::SPEC, &mut errors);
    errors
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
    fn volumes_have_one_source_that_stays() {
        let volume = |source: Value| {
            let mut spec = json!({"accessModes": ["ReadWriteOnce"], "capacity": {"storage": "1Gi"}, "persistentVolumeReclaimPolicy": "Retain"});
            spec.as_object_mut().unwrap().extend(source.as_object().unwrap().clone());
            json!({"spec": spec})
        };
        assert_eq!(texts(&persistent_volume(&volume(json!({})))), ["spec: Required value: must specify a volume type"]);
        let (a, b) = (volume(json!({"hostPath": {"path": "/a"}})), volume(json!({"hostPath": {"path": "/b"}})));
        assert!(persistent_volume(&a).is_empty());
        let expected =
            ["spec.persistentvolumesource: Forbidden: spec.persistentvolumesource is immutable after creation"];
        assert_eq!(texts(&persistent_volume_update(&b, &a)), expected);
    }
}
