//! Rules for the volumes of a pod.

use apimachinery::meta::validation::is_dns1123_label;
use apimachinery::status::FieldError;
use serde_json::Value;

use super::env::{VOLUME_FIELDS, divisor, field_ref, resource_field_ref};
use super::mounts::{local_path, no_back_steps};
use super::{Errors, Path, complain, each, one_of_given, projected, required, required_one_of, storage};
use crate::registry::core::pod_prepare::quantity;
use crate::registry::object::ObjectExt;

/// The names of the volumes that are in order; what is wrong with the others is complained about.
pub fn volumes<'v>(spec: &'v Value, path: Path<'_>, errors: &mut Errors) -> Vec<&'v str> {
    let path = path.field("volumes");
    let mut names: Vec<&str> = Vec::new();
    for (index, volume) in spec.list_at(&["volumes"]).iter().enumerate() {
        let path = path.index(index);
        let before = errors.len();
        source(volume, path, errors);
        let name = volume.str_at(&["name"]);
        if required(volume, "name", path, errors).is_some() {
            complain(is_dns1123_label(name), name, path.field("name"), errors);
        }
        if names.contains(&name) {
            errors.push(FieldError::duplicate(path.field("name"), name));
        }
        if errors.len() == before {
            names.push(name);
        }
    }
    names
}

fn source(volume: &Value, path: Path<'_>, errors: &mut Errors) {
    let sources = volume.as_object().into_iter().flatten().filter(|(key, value)| *key != "name" && !value.is_null());
    let mut found = 0;
    for (kind, source) in sources {
        let field = path.field(kind);
        found += 1;
        if found > 1 {
            errors.push(FieldError::forbidden(field, "may not specify more than 1 volume type"));
            continue;
        }
        // Upstream's path is not the field's.
        let field = if kind == "gcePersistentDisk" { path.field("persistentDisk") } else { field };
        one(kind, source, field, errors);
    }
    if found == 0 {
        errors.push(FieldError::required(path, "must specify a volume type"));
    }
}

fn one(kind: &str, source: &Value, path: Path<'_>, errors: &mut Errors) {
    match kind {
        "emptyDir" if quantity(&source["sizeLimit"]).is_some_and(|limit| limit.signum() < 0) => {
            let detail = "SizeLimit field must be a valid resource quantity";
            errors.push(FieldError::forbidden(path.field("sizeLimit"), detail));
        }
        "hostPath" => host_path(source, path, errors),
        "secret" => {
            required(source, "secretName", path, errors);
            mode(source, "defaultMode", path, errors);
            each(source, "items", path, errors, key_to_path);
        }
        "configMap" => {
            required(source, "name", path, errors);
            mode(source, "defaultMode", path, errors);
            each(source, "items", path, errors, key_to_path);
        }
        "downwardAPI" => {
            mode(source, "defaultMode", path, errors);
            // The complaint is about the source as a whole, not about one of its items.
            source.list_at(&["items"]).iter().for_each(|item| downward_file(item, path, errors));
        }
        "projected" => {
            mode(source, "defaultMode", path, errors);
            projected::sources(source, path, errors);
        }
        "persistentVolumeClaim" => {
            required(source, "claimName", path, errors);
        }
        "ephemeral" => {
            let template = &source["volumeClaimTemplate"];
            let path = path.field("volumeClaimTemplate");
            if template.is_null() {
                errors.push(FieldError::required(path, ""));
            } else {
                storage::claim_template(template, path, errors);
            }
        }
        "image" => {
            required(source, "reference", path, errors);
            required_one_of(source, "pullPolicy", &["Always", "IfNotPresent", "Never"], path, errors);
        }
        "gitRepo" => {
            required(source, "repository", path, errors);
            local_path(source.str_at(&["directory"]), path.field("directory"), errors);
        }
        kind => super::volume_sources::check(kind, source, super::volume_sources::Owner::Pod, path, errors),
    }
}

pub fn host_path(source: &Value, path: Path<'_>, errors: &mut Errors) {
    const TYPES: [&str; 8] =
        ["", "BlockDevice", "CharDevice", "Directory", "DirectoryOrCreate", "File", "FileOrCreate", "Socket"];
    if let Some(text) = required(source, "path", path, errors) {
        no_back_steps(text, path.field("path"), errors);
        one_of_given(source, "type", &TYPES, path, errors);
    }
}

/// Permission bits, as an optional octal number.
pub fn mode(obj: &Value, field: &str, path: Path<'_>, errors: &mut Errors) {
    if let Some(bits) = obj[field].as_i64().filter(|bits| !(0..=0o777).contains(bits)) {
        let detail = "must be a number between 0 and 0777 (octal), both inclusive";
        errors.push(FieldError::invalid(path.field(field), bits, detail));
    }
}

pub fn key_to_path(item: &Value, path: Path<'_>, errors: &mut Errors) {
    required(item, "key", path, errors);
    if let Some(text) = required(item, "path", path, errors) {
        file_path(text, path.field("path"), errors);
    }
    mode(item, "mode", path, errors);
}

/// A relative path that does not begin with two dots.
pub fn file_path(text: &str, path: Path<'_>, errors: &mut Errors) {
    local_path(text, path, errors);
    if text.starts_with("..") && !text.starts_with("../") {
        errors.push(FieldError::invalid(path, text, "must not start with '..'"));
    }
}

pub fn downward_file(item: &Value, path: Path<'_>, errors: &mut Errors) {
    if let Some(text) = required(item, "path", path, errors) {
        file_path(text, path.field("path"), errors);
    }
    match (&item["fieldRef"], &item["resourceFieldRef"]) {
        (Value::Null, Value::Null) => {
            errors.push(FieldError::required(path, "one of fieldRef and resourceFieldRef is required"));
        }
        (Value::Null, resource) => {
            let path = path.field("resourceFieldRef");
            match required(resource, "containerName", path, errors) {
                Some(_) => resource_field_ref(resource, path, errors),
                None => divisor(resource, path, errors),
            }
        }
        (field, Value::Null) => field_ref(field, VOLUME_FIELDS, path.field("fieldRef"), errors),
        (field, _) => {
            field_ref(field, VOLUME_FIELDS, path.field("fieldRef"), errors);
            let detail = "fieldRef and resourceFieldRef can not be specified simultaneously";
            errors.push(FieldError::invalid(path, "resource", detail));
        }
    }
    mode(item, "mode", path, errors);
}

/// A claim that is made for a volume of the pod is not one that another volume can name.
pub fn made_claims(obj: &Value, errors: &mut Errors) {
    let volumes = obj.list_at(&["spec", "volumes"]);
    let made: Vec<String> = volumes
        .iter()
        .filter(|volume| volume["ephemeral"].is_object() && !obj.name().is_empty())
        .map(|volume| format!("{}-{}", obj.name(), volume.str_at(&["name"])))
        .collect();
    each(&obj["spec"], "volumes", Path::SPEC, errors, |volume, path, errors| {
        let name = volume.str_at(&["persistentVolumeClaim", "claimName"]);
        if made.iter().any(|made| made == name) {
            let path = path.field("persistentVolumeClaim");
            let detail = "must not reference a PVC that gets created for an ephemeral volume";
            errors.push(FieldError::invalid(path.field("claimName"), name, detail));
        }
    });
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::tests::texts;
    use super::*;

    #[test]
    fn claims_of_ephemeral_volumes_are_the_pods_own() {
        let obj = json!({"metadata": {"name": "p"}, "spec": {"volumes": [
            {"name": "v", "ephemeral": {}}, {"name": "w", "persistentVolumeClaim": {"claimName": "p-v"}}]}});
        let mut errors = Errors::new();
        made_claims(&obj, &mut errors);
        let expected = [
            r#"spec.volumes[1].persistentVolumeClaim.claimName: Invalid value: "p-v": must not reference a PVC that gets created for an ephemeral volume"#,
        ];
        assert_eq!(texts(&errors), expected);
    }

    #[test]
    fn host_paths_have_types_that_are_known() {
        let mut errors = Errors::new();
        host_path(&json!({"path": "/a", "type": "Zzz"}), Path::Root("h"), &mut errors);
        assert!(
            texts(&errors)[0].starts_with(r#"h.type: Unsupported value: "Zzz": supported values: "", "BlockDevice""#)
        );
    }
}
