//! Rules for the volumes of a pod.

use apimachinery::meta::validation::is_dns1123_label;
use apimachinery::status::FieldError;
use serde_json::Value;

use super::container::{VOLUME_FIELDS, field_ref, local_path, no_back_steps, resource_field_ref};
use super::{Errors, Path, complain, each, one_of, required, required_one_of, storage};
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
        let path = path.field(kind);
        found += 1;
        if found > 1 {
            errors.push(FieldError::forbidden(path, "may not specify more than 1 volume type"));
            continue;
        }
        one(kind, source, path, errors);
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
            projected(source, path, errors);
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
                storage::claim_spec(&template["spec"], path.field("spec"), errors);
            }
        }
        "image" => {
            one_of(source, "pullPolicy", &["Always", "IfNotPresent", "Never"], path, errors);
        }
        kind => super::volume_sources::check(kind, source, super::volume_sources::Owner::Pod, path, errors),
    }
}

pub fn host_path(source: &Value, path: Path<'_>, errors: &mut Errors) {
    const TYPES: [&str; 7] =
        ["BlockDevice", "CharDevice", "Directory", "DirectoryOrCreate", "File", "FileOrCreate", "Socket"];
    if let Some(text) = required(source, "path", path, errors) {
        no_back_steps(text, path.field("path"), errors);
    }
    one_of(source, "type", &TYPES, path, errors);
}

/// Permission bits, as an optional octal number.
fn mode(obj: &Value, field: &str, path: Path<'_>, errors: &mut Errors) {
    if let Some(bits) = obj[field].as_i64().filter(|bits| !(0..=0o777).contains(bits)) {
        let detail = "must be a number between 0 and 0777 (octal), both inclusive";
        errors.push(FieldError::invalid(path.field(field), bits, detail));
    }
}

fn key_to_path(item: &Value, path: Path<'_>, errors: &mut Errors) {
    required(item, "key", path, errors);
    if let Some(text) = required(item, "path", path, errors) {
        file_path(text, path.field("path"), errors);
    }
    mode(item, "mode", path, errors);
}

/// A relative path that does not begin with two dots.
fn file_path(text: &str, path: Path<'_>, errors: &mut Errors) {
    local_path(text, path, errors);
    if text.starts_with("..") && !text.starts_with("../") && text != ".." {
        errors.push(FieldError::invalid(path, text, "must not start with '..'"));
    }
}

fn downward_file(item: &Value, path: Path<'_>, errors: &mut Errors) {
    if let Some(text) = required(item, "path", path, errors) {
        file_path(text, path.field("path"), errors);
    }
    match (&item["fieldRef"], &item["resourceFieldRef"]) {
        (Value::Null, Value::Null) => {
            errors.push(FieldError::required(path, "one of fieldRef and resourceFieldRef is required"));
        }
        (Value::Null, resource) => {
            required(resource, "containerName", path.field("resourceFieldRef"), errors);
            resource_field_ref(resource, path.field("resourceFieldRef"), errors);
        }
        (field, Value::Null) => field_ref(field, VOLUME_FIELDS, path.field("fieldRef"), errors),
        _ => {
            let detail = "fieldRef and resourceFieldRef can not be specified simultaneously";
            errors.push(FieldError::invalid(path, "resource", detail));
        }
    }
    mode(item, "mode", path, errors);
}

fn projected(source: &Value, path: Path<'_>, errors: &mut Errors) {
    let list = path.field("sources");
    for (index, source) in source.list_at(&["sources"]).iter().enumerate() {
        let path = list.index(index);
        let kinds =
            ["secret", "configMap", "downwardAPI", "serviceAccountToken", "clusterTrustBundle", "podCertificate"];
        let given: Vec<&str> = kinds.into_iter().filter(|kind| !source[*kind].is_null()).collect();
        for extra in given.iter().skip(1) {
            errors.push(FieldError::forbidden(path.field(extra), "may not specify more than 1 volume type per source"));
        }
        let Some(kind) = given.first() else { continue };
        let (value, path) = (&source[*kind], path.field(kind));
        match *kind {
            "secret" | "configMap" => {
                required(value, "name", path, errors);
                each(value, "items", path, errors, key_to_path);
            }
            "downwardAPI" => value.list_at(&["items"]).iter().for_each(|item| downward_file(item, path, errors)),
            "serviceAccountToken" => token(value, path, errors),
            "podCertificate" => pod_certificate(value, path, errors),
            _ => {}
        }
    }
}

const KEY_TYPES: [&str; 6] = ["RSA3072", "RSA4096", "ECDSAP256", "ECDSAP384", "ECDSAP521", "ED25519"];
const SHORTEST_CERTIFICATE: i64 = 60 * 60;
const LONGEST_CERTIFICATE: i64 = 91 * 24 * 60 * 60;
/// What the cluster's own signers give at most.
const LONGEST_KUBERNETES_CERTIFICATE: i64 = 24 * 60 * 60;

fn pod_certificate(source: &Value, path: Path<'_>, errors: &mut Errors) {
    required_one_of(source, "keyType", &KEY_TYPES, path, errors);
    let Some(seconds) = source["maxExpirationSeconds"].as_i64() else { return };
    let domain = source.str_at(&["signerName"]).split('/').next().unwrap_or_default();
    let is_kubernetes = domain == "kubernetes.io" || domain.ends_with(".kubernetes.io");
    let longest = if is_kubernetes { LONGEST_KUBERNETES_CERTIFICATE } else { LONGEST_CERTIFICATE };
    let bound = match seconds {
        ..SHORTEST_CERTIFICATE => format!(">= {SHORTEST_CERTIFICATE}"),
        seconds if seconds > longest => format!("<= {longest}"),
        _ => return,
    };
    let detail = format!("if provided, maxExpirationSeconds must be {bound}");
    errors.push(FieldError::invalid(path.field("maxExpirationSeconds"), seconds, detail));
}

fn token(source: &Value, path: Path<'_>, errors: &mut Errors) {
    let seconds = source["expirationSeconds"].as_i64().unwrap_or(3600);
    if seconds < 600 {
        let detail = "may not specify a duration less than 10 minutes";
        errors.push(FieldError::invalid(path.field("expirationSeconds"), seconds, detail));
    } else if seconds > 1 << 32 {
        let detail = "may not specify a duration larger than 2^32 seconds";
        errors.push(FieldError::invalid(path.field("expirationSeconds"), seconds, detail));
    }
    if let Some(text) = required(source, "path", path, errors) {
        file_path(text, path.field("path"), errors);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::tests::texts;
    use super::*;

    #[test]
    fn certificates_of_pods_live_for_an_hour_up_to_three_months() {
        for (signer, seconds, bound) in [
            ("example.com/s", 3599, Some(">= 3600")),
            ("example.com/s", 3600, None),
            ("example.com/s", 7_862_400, None),
            ("example.com/s", 7_862_401, Some("<= 7862400")),
            ("kubernetes.io/s", 86_401, Some("<= 86400")),
        ] {
            let source = json!({"sources": [{"podCertificate":
                {"signerName": signer, "keyType": "ED25519", "maxExpirationSeconds": seconds}}]});
            let mut errors = Errors::new();
            projected(&source, Path::Root("projected"), &mut errors);
            let expected = bound.map(|bound| {
                format!(
                    "projected.sources[0].podCertificate.maxExpirationSeconds: Invalid value: {seconds}: if provided, \
                     maxExpirationSeconds must be {bound}"
                )
            });
            assert_eq!(texts(&errors), Vec::from_iter(expected), "{signer} {seconds}");
        }
    }
}
