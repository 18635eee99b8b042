//! Rules for persistent volumes.

use apimachinery::status::FieldError;
use serde_json::{Map, Value};

use super::container::subdomain;
use super::mounts::no_back_steps;
use super::storage::{VOLUME_MODES, access_modes, positive_amount, whole_amount};
use super::volume::host_path;
use super::volume_sources::{self, Owner};
use super::{Errors, IMMUTABLE, Path, one_of, one_of_given, placement, required};
use crate::registry::common::same;
use crate::registry::core::pod_prepare::quantity;
use crate::registry::object::ObjectExt;

/// The sources of storage, in the order in which they are looked at: the first counts.
const SOURCES: [&str; 22] = [
    "hostPath",
    "gcePersistentDisk",
    "awsElasticBlockStore",
    "glusterfs",
    "flocker",
    "nfs",
    "rbd",
    "quobyte",
    "cephfs",
    "iscsi",
    "cinder",
    "fc",
    "flexVolume",
    "azureFile",
    "vsphereVolume",
    "photonPersistentDisk",
    "portworxVolume",
    "azureDisk",
    "scaleIO",
    "local",
    "storageos",
    "csi",
];
/// Sources whose volumes can be mounted with options that an annotation gives.
const MOUNTED_WITH_OPTIONS: [&str; 13] = [
    "awsElasticBlockStore",
    "azureDisk",
    "azureFile",
    "cephfs",
    "cinder",
    "gcePersistentDisk",
    "glusterfs",
    "iscsi",
    "nfs",
    "photonPersistentDisk",
    "quobyte",
    "rbd",
    "vsphereVolume",
];
const MOUNT_OPTIONS: &str = "volume.beta.kubernetes.io/mount-options";

pub fn volume(obj: &Value) -> Errors {
    let mut errors = rules(obj);
    mount_options(obj, &mut errors);
    errors
}

fn rules(obj: &Value) -> Errors {
    let mut errors = Errors::new();
    let (spec, path) = (&obj["spec"], Path::SPEC);
    access_modes(spec, "", path, &mut errors);
    capacity(spec, path.field("capacity"), &mut errors);
    one_of(spec, "persistentVolumeReclaimPolicy", &["Delete", "Recycle", "Retain"], path, &mut errors);
    let affinity = path.field("nodeAffinity");
    match (spec["nodeAffinity"].is_object(), &spec["nodeAffinity"]["required"]) {
        (true, Value::Null) => {
            let detail = "must specify required node constraints";
            errors.push(FieldError::required(affinity.field("required"), detail));
        }
        (true, selector) => placement::node_selector(selector, affinity.field("required"), &mut errors),
        (false, _) => {}
    }
    sources(spec, obj.name(), path, &mut errors);
    subdomain(spec.str_at(&["storageClassName"]), path.field("storageClassName"), &mut errors);
    one_of_given(spec, "volumeMode", &VOLUME_MODES, path, &mut errors);
    if let Some(class) = spec["volumeAttributesClassName"].as_str() {
        let field = path.field("volumeAttributesClassName");
        if class.is_empty() {
            errors.push(FieldError::required(field, "an empty string is disallowed"));
        }
        subdomain(class, field, &mut errors);
        if !spec["csi"].is_object() {
            let detail = "has to be specified when using volumeAttributesClassName";
            errors.push(FieldError::required(path.field("csi"), detail));
        }
    }
    errors
}

fn capacity(spec: &Value, path: Path<'_>, errors: &mut Errors) {
    let amounts = spec["capacity"].as_object();
    if amounts.is_none_or(Map::is_empty) {
        errors.push(FieldError::required(path, ""));
    }
    if spec["capacity"]["storage"].is_null() || amounts.is_some_and(|amounts| amounts.len() > 1) {
        errors.push(FieldError::not_supported(path, spec["capacity"].clone(), &["storage"]));
    }
    for (name, amount) in amounts.into_iter().flatten() {
        whole_amount(amount, path.key(name), errors);
        if let Some(amount) = quantity(amount) {
            positive_amount(amount, path.key(name), errors);
        }
    }
}

fn sources(spec: &Value, name: &str, path: Path<'_>, errors: &mut Errors) {
    let given: Vec<&str> = SOURCES.into_iter().filter(|source| spec[*source].is_object()).collect();
    for (index, kind) in given.iter().enumerate() {
        let source = &spec[*kind];
        match *kind {
            // Upstream looks at these even beside others.
            "flexVolume" => {}
            kind if index > 0 => {
                let field = if kind == "cephfs" { "cephFS" } else { kind };
                errors.push(FieldError::forbidden(path.field(field), "may not specify more than 1 volume type"));
                continue;
            }
            _ => {}
        }
        match *kind {
            "hostPath" => host_path(source, path.field(kind), errors),
            "local" => local(source, path.field(kind), errors),
            // Upstream's path is not the field's.
            "gcePersistentDisk" => {
                volume_sources::check(kind, source, Owner::PersistentVolume, path.field("persistentDisk"), errors);
            }
            kind => volume_sources::check(kind, source, Owner::PersistentVolume, path.field(kind), errors),
        }
    }
    match given.first() {
        None => errors.push(FieldError::required(path, "must specify a volume type")),
        Some(&"local") if !spec["nodeAffinity"].is_object() => {
            errors.push(FieldError::required(path.field("nodeAffinity"), "Local volume requires node affinity"));
        }
        Some(&"iscsi") => named_initiator(&spec["iscsi"], name, path.field("iscsi"), errors),
        Some(_) => {}
    }
    let recycled = spec["persistentVolumeReclaimPolicy"] == "Recycle";
    if recycled && spec["hostPath"].is_object() && is_root(spec["hostPath"].str_at(&["path"])) {
        let detail = "may not be 'recycle' for a hostPath mount of '/'";
        errors.push(FieldError::forbidden(path.field("persistentVolumeReclaimPolicy"), detail));
    }
}

fn local(source: &Value, path: Path<'_>, errors: &mut Errors) {
    if let Some(text) = required(source, "path", path, errors) {
        no_back_steps(text, path.field("path"), errors);
    }
}

/// An initiator with a name of its own gets one that begins with the volume's.
fn named_initiator(source: &Value, volume: &str, path: Path<'_>, errors: &mut Errors) {
    const LONGEST: usize = 64;
    let portal = source.str_at(&["targetPortal"]);
    if !source["initiatorName"].is_null() && volume.len() + 1 + portal.len() > LONGEST {
        let detail = "Total length of <volume name>:<iscsi.targetPortal> must be under 64 characters if iscsi.initiatorName is specified.";
        errors.push(FieldError::invalid(path.field("targetportal"), portal, detail));
    }
}

/// `/`, however it is written.
fn is_root(path: &str) -> bool {
    path.starts_with('/') && path.split('/').all(|part| matches!(part, "" | "." | ".."))
}

fn mount_options(obj: &Value, errors: &mut Errors) {
    let supported = MOUNTED_WITH_OPTIONS.iter().any(|source| obj["spec"][*source].is_object());
    if !supported && obj.annotation(MOUNT_OPTIONS).is_some() {
        let path = format!("metadata.annotations.{MOUNT_OPTIONS}");
        errors.push(FieldError::forbidden(path, "may not specify mount options for this volume type"));
    }
}

pub fn update(obj: &Value, old: &Value) -> Errors {
    let mut errors = volume(obj);
    let (spec, stored) = (&obj["spec"], &old["spec"]);
    if !same(&source_of(spec, stored), &source_of(stored, stored)) {
        let detail = "spec.persistentvolumesource is immutable after creation";
        errors.push(FieldError::forbidden("spec.persistentvolumesource", detail));
    }
    if !same(&spec["volumeMode"], &stored["volumeMode"]) {
        errors.push(FieldError::invalid("volumeMode", spec["volumeMode"].clone(), IMMUTABLE));
    }
    if stored["nodeAffinity"].is_object() && !same(&spec["nodeAffinity"], &stored["nodeAffinity"]) {
        let detail = format!("{IMMUTABLE}, except for updating from beta label to GA");
        errors.push(FieldError::invalid("nodeAffinity", spec["nodeAffinity"].clone(), detail));
    }
    let class = |spec: &Value| spec["volumeAttributesClassName"].is_null();
    if class(spec) && !class(stored) {
        let detail = "update from non-nil value to nil is forbidden";
        errors.push(FieldError::forbidden("spec.volumeAttributesClassName", detail));
    }
    errors
}

/// The source, without the one secret that may be added.
fn source_of(spec: &Value, stored: &Value) -> Value {
    let given = SOURCES.into_iter().filter(|source| !spec[*source].is_null());
    let mut source: Value = given.map(|source| (source.to_owned(), spec[source].clone())).collect::<Map<_, _>>().into();
    if stored["csi"]["controllerExpandSecretRef"].is_null() {
        source.remove_at(&["csi", "controllerExpandSecretRef"]);
    }
    source
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::tests::texts;
    use super::*;

    fn volume_of(source: Value) -> Value {
        let mut spec = json!({"accessModes": ["ReadWriteOnce"], "capacity": {"storage": "1Gi"}, "persistentVolumeReclaimPolicy": "Retain"});
        spec.as_object_mut().unwrap().extend(source.as_object().unwrap().clone());
        json!({"spec": spec})
    }

    #[test]
    fn volumes_have_one_source_that_stays() {
        assert_eq!(texts(&volume(&volume_of(json!({})))), ["spec: Required value: must specify a volume type"]);
        let two = volume_of(json!({"cephfs": {"monitors": ["m"]}, "hostPath": {"path": "/a"}}));
        assert_eq!(texts(&volume(&two)), ["spec.cephFS: Forbidden: may not specify more than 1 volume type"]);
        let (a, b) = (volume_of(json!({"hostPath": {"path": "/a"}})), volume_of(json!({"hostPath": {"path": "/b"}})));
        assert!(volume(&a).is_empty());
        let expected =
            ["spec.persistentvolumesource: Forbidden: spec.persistentvolumesource is immutable after creation"];
        assert_eq!(texts(&update(&b, &a)), expected);
    }

    #[test]
    fn a_secret_for_growing_may_be_added() {
        let csi = |more: Value| {
            let mut source = json!({"driver": "d", "volumeHandle": "h"});
            source.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            volume_of(json!({"csi": source}))
        };
        let secret = csi(json!({"controllerExpandSecretRef": {"name": "a", "namespace": "b"}}));
        assert!(update(&secret, &csi(json!({}))).is_empty());
        assert_eq!(update(&csi(json!({})), &secret).len(), 1);
    }

    #[test]
    fn the_root_is_not_recycled() {
        assert!(is_root("/") && is_root("//.") && !is_root("/a"));
    }
}
