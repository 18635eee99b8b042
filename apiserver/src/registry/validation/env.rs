//! Rules for the environment of containers, and for what of a pod its containers can see in variables and files.

use apimachinery::meta::Quantity;
use apimachinery::meta::validation::{
    is_config_map_key, is_dns1123_label, is_dns1123_subdomain, is_env_var_name, is_qualified_name,
};
use apimachinery::status::FieldError;
use serde_json::Value;

use super::mounts::no_back_steps;
use super::{Errors, Path, complain, each, required};
use crate::registry::core::pod_prepare::quantity;
use crate::registry::object::ObjectExt;

/// All variables of a container.
pub fn environment(container: &Value, path: Path<'_>, errors: &mut Errors) {
    each(container, "env", path, errors, variable);
    let list = path.field("envFrom");
    // A complaint about the number of sources is about the list, not about one of its items.
    each(container, "envFrom", path, errors, |source, path, errors| sources(source, path, list, errors));
}

fn variable(var: &Value, path: Path<'_>, errors: &mut Errors) {
    if let Some(name) = required(var, "name", path, errors) {
        complain(is_env_var_name(name), name, path.field("name"), errors);
    }
    let from = &var["valueFrom"];
    if from.is_null() {
        return;
    }
    let path = path.field("valueFrom");
    let mut sources = 0;
    for source in ["fieldRef", "resourceFieldRef", "configMapKeyRef", "secretKeyRef", "fileKeyRef"] {
        let (value, path) = (&from[source], path.field(source));
        if value.is_null() {
            continue;
        }
        sources += 1;
        match source {
            "fieldRef" => field_ref(value, ENV_FIELDS, path, errors),
            "resourceFieldRef" => resource_field_ref(value, path, errors),
            "fileKeyRef" => file_key_ref(value, path, errors),
            _ => key_ref(value, path, errors),
        }
    }
    let detail = match sources {
        0 => "must specify one of: `fieldRef`, `resourceFieldRef`, `configMapKeyRef`, `secretKeyRef` or `fileKeyRef`",
        _ if !var.str_at(&["value"]).is_empty() => "may not be specified when `value` is not empty",
        1 => return,
        _ => "may not have more than one field specified at a time",
    };
    errors.push(FieldError::invalid(path, "", detail));
}

/// A key in a config map or secret.
fn key_ref(reference: &Value, path: Path<'_>, errors: &mut Errors) {
    let name = reference.str_at(&["name"]);
    complain(is_dns1123_subdomain(name), name, path.field("name"), errors);
    if let Some(key) = required(reference, "key", path, errors) {
        complain(is_config_map_key(key), key, path.field("key"), errors);
    }
}

/// A key in a file that another container of the pod wrote.
fn file_key_ref(reference: &Value, path: Path<'_>, errors: &mut Errors) {
    if let Some(key) = required(reference, "key", path, errors) {
        complain(is_env_var_name(key), key, path.field("key"), errors);
    }
    if let Some(volume) = required(reference, "volumeName", path, errors) {
        complain(is_dns1123_label(volume), volume, path.field("volumeName"), errors);
    }
    if let Some(file) = required(reference, "path", path, errors) {
        no_back_steps(file, path.field("path"), errors);
    }
}

/// Files with variables are in volumes of the pod that start empty.
pub fn file_key_volumes(container: &Value, spec: &Value, path: Path<'_>, errors: &mut Errors) {
    each(container, "env", path, errors, |var, path, errors| {
        let reference = &var["valueFrom"]["fileKeyRef"];
        if reference.is_null() {
            return;
        }
        let name = reference.str_at(&["volumeName"]);
        let (path, inner) = (path.field("valueFrom"), "fileKeyRef");
        let path = path.field(inner);
        let path = path.field("volumeName");
        match spec.list_at(&["volumes"]).iter().rfind(|volume| volume["name"] == name) {
            None => errors.push(FieldError::not_found(path, name)),
            Some(volume) if volume["emptyDir"].is_null() => {
                errors.push(FieldError::invalid(path, name, "referenced volume must be of type emptyDir"));
            }
            Some(_) => {}
        }
    });
}

/// Fields of the pod that variables can show.
const ENV_FIELDS: &[&str] = &[
    "metadata.name",
    "metadata.namespace",
    "metadata.uid",
    "spec.nodeName",
    "spec.serviceAccountName",
    "status.hostIP",
    "status.hostIPs",
    "status.podIP",
    "status.podIPs",
];
/// Fields of the pod that files can show.
pub const VOLUME_FIELDS: &[&str] =
    &["metadata.annotations", "metadata.labels", "metadata.name", "metadata.namespace", "metadata.uid"];
/// Fields of a pod that have names in the downward API at all.
const DOWNWARD_FIELDS: &[&str] = &[
    "metadata.annotations",
    "metadata.labels",
    "metadata.name",
    "metadata.namespace",
    "metadata.uid",
    "spec.nodeName",
    "spec.restartPolicy",
    "spec.schedulerName",
    "spec.serviceAccountName",
    "status.hostIP",
    "status.hostIPs",
    "status.phase",
    "status.podIP",
    "status.podIPs",
];

/// A field of the pod, or one label or annotation by its key.
pub fn field_ref(reference: &Value, allowed: &[&str], path: Path<'_>, errors: &mut Errors) {
    let Some(version) = required(reference, "apiVersion", path, errors) else { return };
    let Some(field) = required(reference, "fieldPath", path, errors) else { return };
    let unknown =
        |why: String| FieldError::invalid(path.field("fieldPath"), field, format!("error converting fieldPath: {why}"));
    if version != "v1" {
        errors.push(unknown(format!("unsupported pod version: {version}")));
        return;
    }
    if let Some((map, key)) = field.strip_suffix("']").and_then(|rest| rest.split_once("['")) {
        match map {
            "metadata.annotations" => {
                let key = key.to_lowercase();
                complain(is_qualified_name(&key), &key, path, errors);
            }
            "metadata.labels" => complain(is_qualified_name(key), key, path, errors),
            _ => errors.push(unknown(format!("field label does not support subscript: {field}"))),
        }
    } else if !DOWNWARD_FIELDS.contains(&field) {
        errors.push(unknown(format!("field label not supported: {field}")));
    } else if !allowed.contains(&field) {
        errors.push(FieldError::not_supported(path.field("fieldPath"), field, allowed));
    }
}

/// A limit or request of a container, in portions of `divisor`.
pub fn resource_field_ref(reference: &Value, path: Path<'_>, errors: &mut Errors) {
    const RESOURCES: &[&str] = &[
        "limits.cpu",
        "limits.ephemeral-storage",
        "limits.memory",
        "requests.cpu",
        "requests.ephemeral-storage",
        "requests.memory",
    ];
    if let Some(resource) = required(reference, "resource", path, errors) {
        let huge = resource.starts_with("limits.hugepages-") || resource.starts_with("requests.hugepages-");
        if !RESOURCES.contains(&resource) && !huge {
            errors.push(FieldError::not_supported(path.field("resource"), resource, RESOURCES));
        }
    }
    divisor(reference, path, errors);
}

pub fn divisor(reference: &Value, path: Path<'_>, errors: &mut Errors) {
    const CPU: &[&str] = &["1m", "1"];
    const BYTES: &[&str] = &["1", "1k", "1M", "1G", "1T", "1P", "1E", "1Ki", "1Mi", "1Gi", "1Ti", "1Pi", "1Ei"];
    let divisor = quantity(&reference["divisor"]).unwrap_or_default();
    let resource = reference.str_at(&["resource"]);
    let kind = resource.split_once('.').map_or("", |(_, kind)| kind);
    let (allowed, values, what) = match kind {
        "cpu" => (CPU, "1m and 1", "cpu"),
        "memory" => (BYTES, "", "memory"),
        "ephemeral-storage" => (BYTES, "", "local ephemeral storage"),
        kind if kind.starts_with("hugepages-") => (BYTES, "", "hugepages"),
        _ => return,
    };
    if divisor == Quantity::ZERO || allowed.contains(&divisor.to_string().as_str()) {
        return;
    }
    let values = if values.is_empty() { allowed.join(", ") } else { values.to_owned() };
    let detail = format!("only divisor's values {values} are supported with the {what} resource");
    errors.push(FieldError::invalid(path.field("divisor"), resource, detail));
}

fn sources(source: &Value, path: Path<'_>, list: Path<'_>, errors: &mut Errors) {
    let prefix = source.str_at(&["prefix"]);
    if !prefix.is_empty() {
        complain(is_env_var_name(prefix), prefix, path.field("prefix"), errors);
    }
    let mut sources = 0;
    for kind in ["configMapRef", "secretRef"] {
        if !source[kind].is_null() {
            sources += 1;
            let path = path.field(kind);
            if let Some(name) = required(&source[kind], "name", path, errors) {
                // Upstream takes it for the beginning of a name, which may end in a dash.
                let subject = name.strip_suffix('-').map_or_else(|| name.to_owned(), |start| format!("{start}a"));
                complain(is_dns1123_subdomain(&subject), name, path.field("name"), errors);
            }
        }
    }
    match sources {
        0 => errors.push(FieldError::invalid(list, "", "must specify one of: `configMapRef` or `secretRef`")),
        1 => {}
        _ => errors.push(FieldError::invalid(list, "", "may not have more than one field specified at a time")),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::tests::texts;
    use super::*;

    fn told(from: Value) -> Vec<String> {
        let mut errors = Errors::new();
        environment(&json!({"env": [{"name": "A", "valueFrom": from}]}), Path::Root("c"), &mut errors);
        texts(&errors)
    }

    #[test]
    fn variables_have_one_source() {
        let at = "c.env[0].valueFrom";
        let cases = [
            (json!({"resourceFieldRef": {"resource": "limits.cpu", "divisor": "1m"}}), vec![]),
            (
                json!({"resourceFieldRef": {"resource": "limits.cpu", "divisor": "2"}}),
                vec![format!(
                    r#"{at}.resourceFieldRef.divisor: Invalid value: "limits.cpu": only divisor's values 1m and 1 are supported with the cpu resource"#
                )],
            ),
            (
                json!({"fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.zzz"}}),
                vec![format!(
                    r#"{at}.fieldRef.fieldPath: Invalid value: "metadata.zzz": error converting fieldPath: field label not supported: metadata.zzz"#
                )],
            ),
            (json!({"fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.labels['a']"}}), vec![]),
        ];
        for (from, expected) in cases {
            assert_eq!(told(from.clone()), expected, "{from}");
        }
    }

    #[test]
    fn files_are_in_empty_volumes() {
        let container = json!({"env": [{"name": "A", "valueFrom": {"fileKeyRef": {"volumeName": "v"}}}]});
        for (volumes, expected) in
            [(json!([{"name": "v", "emptyDir": {}}]), 0), (json!([{"name": "v", "hostPath": {}}]), 1), (json!([]), 1)]
        {
            let mut errors = Errors::new();
            file_key_volumes(&container, &json!({"volumes": volumes}), Path::Root("c"), &mut errors);
            assert_eq!(errors.len(), expected, "{volumes}");
        }
    }
}
