//! Rules for what containers mount and for the devices they get.

use apimachinery::status::FieldError;
use serde_json::Value;

use super::container::PodFacts;
use super::{Errors, Path, one_of_given, required};
use crate::registry::object::ObjectExt;

pub fn mounts(container: &Value, pod: PodFacts<'_>, path: Path<'_>, errors: &mut Errors) {
    let (list, list_path) = (container.list_at(&["volumeMounts"]), path.field("volumeMounts"));
    let devices = container.list_at(&["volumeDevices"]);
    let is_device = |field: &str, text: &str| devices.iter().any(|device| device.str_at(&[field]) == text);
    let mut seen = Vec::new();
    for (index, mount) in list.iter().enumerate() {
        let path = list_path.index(index);
        let (name, target) = (mount.str_at(&["name"]), mount.str_at(&["mountPath"]));
        required(mount, "name", path, errors);
        if !pod.volumes.contains(&name) {
            errors.push(FieldError::not_found(path.field("name"), name));
        }
        required(mount, "mountPath", path, errors);
        let mut invalid = |field: &str, text: &str, detail: &str| {
            errors.push(FieldError::invalid(path.field(field), text, detail));
        };
        if seen.contains(&target) {
            invalid("mountPath", target, "must be unique");
        }
        seen.push(target);
        if is_device("name", name) {
            invalid("name", name, "must not already exist in volumeDevices");
        }
        if is_device("devicePath", target) {
            invalid("mountPath", target, "must not already exist as a path in volumeDevices");
        }
        let (plain, expression) = (mount.str_at(&["subPath"]), mount.str_at(&["subPathExpr"]));
        if !plain.is_empty() && !expression.is_empty() {
            invalid("subPathExpr", expression, "subPathExpr and subPath are mutually exclusive");
        }
        // These are complained about as fields of the list: so does upstream.
        local_path(plain, list_path.field("subPath"), errors);
        local_path(expression, list_path.field("subPathExpr"), errors);
        let propagation = ["Bidirectional", "HostToContainer", "None"];
        one_of_given(mount, "mountPropagation", &propagation, list_path, errors);
        recursive_read_only(mount, list_path, errors);
        if mount["mountPropagation"] == "Bidirectional" && container["securityContext"]["privileged"] != true {
            let detail = "Bidirectional mount propagation is available only to privileged containers";
            errors.push(FieldError::forbidden(list_path.field("mountPropagation"), detail));
        }
    }
}

/// Mounts can be read-only all the way down only when they are read-only and nobody looks through them.
fn recursive_read_only(mount: &Value, path: Path<'_>, errors: &mut Errors) {
    let Some(mode) = mount["recursiveReadOnly"].as_str() else { return };
    let path = path.field("recursiveReadOnly");
    match mode {
        "Disabled" => {}
        "Enabled" | "IfPossible" => {
            if mount["readOnly"] != true {
                errors.push(FieldError::forbidden(path, "may only be specified when readOnly is true"));
            }
            if !mount["mountPropagation"].is_null() && mount["mountPropagation"] != "None" {
                let detail = "may only be specified when mountPropagation is None or not specified";
                errors.push(FieldError::forbidden(path, detail));
            }
        }
        other => errors.push(FieldError::not_supported(path, other, &["Disabled", "Enabled", "IfPossible"])),
    }
}

/// Volumes that containers see as block devices: those of claims.
pub fn devices(container: &Value, pod: PodFacts<'_>, path: Path<'_>, errors: &mut Errors) {
    let list = path.field("volumeDevices");
    let mounts = container.list_at(&["volumeMounts"]);
    let is_mount = |field: &str, text: &str| mounts.iter().any(|mount| mount.str_at(&[field]) == text);
    let (mut names, mut paths) = (Vec::new(), Vec::new());
    for (index, device) in container.list_at(&["volumeDevices"]).iter().enumerate() {
        let path = list.index(index);
        let (name, target) = (device.str_at(&["name"]), device.str_at(&["devicePath"]));
        required(device, "name", path, errors);
        required(device, "devicePath", path, errors);
        if !pod.volumes.contains(&name) {
            errors.push(FieldError::not_found(path.field("name"), name));
        }
        let mut invalid = |field: &str, text: &str, detail: &str| {
            errors.push(FieldError::invalid(path.field(field), text, detail));
        };
        if names.contains(&name) {
            invalid("name", name, "must be unique");
        }
        let of_claim = |volume: &Value| volume["persistentVolumeClaim"].is_object() || volume["ephemeral"].is_object();
        let volume = pod.spec.list_at(&["volumes"]).iter().find(|volume| volume["name"] == name);
        if pod.volumes.contains(&name) && !volume.is_some_and(of_claim) {
            let detail = "can only use volume source type of PersistentVolumeClaim or Ephemeral for block mode";
            invalid("name", name, detail);
        }
        if paths.contains(&target) {
            invalid("devicePath", target, "must be unique");
        }
        if target.split('/').any(|part| part == "..") {
            invalid("devicePath", target, "can not contain backsteps ('..')");
        } else {
            paths.push(target);
        }
        if is_mount("name", name) {
            invalid("name", name, "must not already exist in volumeMounts");
        }
        if is_mount("mountPath", target) {
            invalid("devicePath", target, "must not already exist as a path in volumeMounts");
        }
        if !name.is_empty() {
            names.push(name);
        }
    }
}

/// A relative path that does not leave where it starts.
pub fn local_path(text: &str, path: Path<'_>, errors: &mut Errors) {
    if text.starts_with('/') {
        errors.push(FieldError::invalid(path, text, "must be a relative path"));
    }
    no_back_steps(text, path, errors);
}

/// A path without `..`.
pub fn no_back_steps(text: &str, path: Path<'_>, errors: &mut Errors) {
    if text.split('/').any(|part| part == "..") {
        errors.push(FieldError::invalid(path, text, "must not contain '..'"));
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::tests::texts;
    use super::*;

    #[test]
    fn only_volumes_of_claims_are_devices() {
        let spec = json!({"volumes": [{"name": "v", "emptyDir": {}}, {"name": "c", "persistentVolumeClaim": {}}]});
        let pod = PodFacts { spec: &spec, volumes: &["v", "c"] };
        let told = |list: Value| {
            let mut errors = Errors::new();
            devices(&json!({"volumeDevices": list}), pod, Path::Root("c"), &mut errors);
            texts(&errors)
        };
        assert!(told(json!([{"name": "c", "devicePath": "/dev/x"}])).is_empty());
        let expected = [
            r#"c.volumeDevices[0].name: Invalid value: "v": can only use volume source type of PersistentVolumeClaim or Ephemeral for block mode"#,
        ];
        assert_eq!(told(json!([{"name": "v", "devicePath": "/dev/x"}])), expected);
    }
}
