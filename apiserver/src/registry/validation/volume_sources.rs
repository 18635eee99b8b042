//! Rules for the sources of storage that pods and persistent volumes share: disks of clouds, network file systems and
//! block devices. Many have no driver any more; their fields are still checked.

use std::sync::LazyLock;

use apimachinery::meta::validation::{is_dns1123_label, is_dns1123_subdomain};
use apimachinery::status::FieldError;
use regex::Regex;
use serde_json::Value;

use super::{Errors, Path, complain, required};
use crate::registry::object::ObjectExt;

/// Texts and lists that may not be empty.
const NEEDED: [(&str, &[&str]); 16] = [
    ("awsElasticBlockStore", &["volumeID"]),
    ("azureDisk", &["diskName", "diskURI"]),
    ("azureFile", &["secretName", "shareName"]),
    ("cephfs", &["monitors"]),
    ("cinder", &["volumeID"]),
    ("flexVolume", &["driver"]),
    ("gcePersistentDisk", &["pdName"]),
    ("glusterfs", &["endpoints", "path"]),
    ("iscsi", &["targetPortal", "iqn"]),
    ("nfs", &["server", "path"]),
    ("photonPersistentDisk", &["pdID"]),
    ("portworxVolume", &["volumeID"]),
    ("quobyte", &["registry", "volume"]),
    ("rbd", &["monitors", "image"]),
    ("scaleIO", &["gateway", "system", "volumeName"]),
    ("vsphereVolume", &["volumePath"]),
];
const ONE_BYTE: &str = "must be between 0 and 255, inclusive";

/// Whose source it is: that of persistent volumes names the namespaces of its secrets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    Pod,
    PersistentVolume,
}

/// Checks a source; kinds that are not known here are checked by the caller.
pub fn check(kind: &str, source: &Value, owner: Owner, path: Path<'_>, errors: &mut Errors) {
    let fields = NEEDED.iter().find(|(name, _)| *name == kind).map(|(_, fields)| *fields).unwrap_or_default();
    for field in fields {
        if source.str_at(&[field]).is_empty() && source.list_at(&[field]).is_empty() {
            errors.push(FieldError::required(path.field(field), ""));
        }
    }
    match kind {
        "awsElasticBlockStore" | "gcePersistentDisk" => partition(source, path, errors),
        "azureDisk" => azure_disk(source, path, errors),
        "cinder" => secret_name(source, path, errors),
        "csi" => csi(source, owner, path, errors),
        "fc" => fibre_channel(source, path, errors),
        "flexVolume" => reserved_options(source, path, errors),
        "flocker" => flocker(source, path, errors),
        "iscsi" => iscsi(source, owner, path, errors),
        "nfs" if !source.str_at(&["path"]).starts_with('/') => {
            errors.push(FieldError::invalid(path.field("path"), source.str_at(&["path"]), "must be an absolute path"));
        }
        _ => {}
    }
}

fn partition(source: &Value, path: Path<'_>, errors: &mut Errors) {
    if let Some(number) = source["partition"].as_i64().filter(|number| !(0..=255).contains(number)) {
        errors.push(FieldError::invalid(path.field("partition"), number, ONE_BYTE));
    }
}

fn lun(source: &Value, path: Path<'_>, errors: &mut Errors) {
    if let Some(number) = source["lun"].as_i64().filter(|number| !(0..=255).contains(number)) {
        errors.push(FieldError::invalid(path.field("lun"), number, ONE_BYTE));
    }
}

/// A secret that is named must have a name.
fn secret_name(source: &Value, path: Path<'_>, errors: &mut Errors) {
    if !source["secretRef"].is_null() {
        required(&source["secretRef"], "name", path.field("secretRef"), errors);
    }
}

fn azure_disk(source: &Value, path: Path<'_>, errors: &mut Errors) {
    const MANAGED: &str =
        "/subscriptions/{sub-id}/resourcegroups/{group-name}/providers/microsoft.compute/disks/{disk-id}";
    const BLOB: &str = "https://{account-name}.blob.core.windows.net/{container-name}/{disk-name}.vhd";
    super::one_of_at(&source["cachingMode"], &["None", "ReadOnly", "ReadWrite"], path.field("cachingMode"), errors);
    super::one_of_at(&source["kind"], &["Dedicated", "Managed", "Shared"], path.field("kind"), errors);
    let uri = source.str_at(&["diskURI"]);
    let (start, form) = match source["kind"].as_str() {
        None => return,
        Some("Managed") => ("/subscriptions/", MANAGED),
        Some(_) => ("https://", BLOB),
    };
    if !uri.starts_with(start) {
        errors.push(FieldError::not_supported(path.field("diskURI"), uri, &[form]));
    }
}

fn csi(source: &Value, owner: Owner, path: Path<'_>, errors: &mut Errors) {
    const LONGEST_DRIVER: usize = 63;
    let driver = source.str_at(&["driver"]);
    if driver.len() > LONGEST_DRIVER {
        errors.push(FieldError::too_long(path.field("driver"), LONGEST_DRIVER));
    }
    if driver.is_empty() {
        errors.push(FieldError::required(path.field("driver"), ""));
    } else {
        complain(is_dns1123_subdomain(&driver.to_lowercase()), driver, path.field("driver"), errors);
    }
    if owner == Owner::Pod {
        if !source["nodePublishSecretRef"].is_null() {
            required(&source["nodePublishSecretRef"], "name", path.field("nodePublishSecretRef"), errors);
        }
        return;
    }
    required(source, "volumeHandle", path, errors);
    for field in [
        "controllerPublishSecretRef",
        "controllerExpandSecretRef",
        "nodePublishSecretRef",
        "nodeStageSecretRef",
        "nodeExpandSecretRef",
    ] {
        if !source[field].is_null() {
            secret_reference(&source[field], path.field(field), errors);
        }
    }
}

fn secret_reference(reference: &Value, path: Path<'_>, errors: &mut Errors) {
    if let Some(name) = required(reference, "name", path, errors) {
        complain(is_dns1123_subdomain(name), name, path.field("name"), errors);
    }
    if let Some(namespace) = required(reference, "namespace", path, errors) {
        complain(is_dns1123_label(namespace), namespace, path.field("namespace"), errors);
    }
}

fn fibre_channel(source: &Value, path: Path<'_>, errors: &mut Errors) {
    let has = |field: &str| !source.list_at(&[field]).is_empty();
    let names = path.field("targetWWNs");
    match (has("targetWWNs"), has("wwids")) {
        (false, false) => {
            errors.push(FieldError::required(names, "must specify either targetWWNs or wwids, but not both"));
        }
        (true, true) => {
            let detail = "targetWWNs and wwids can not be specified simultaneously";
            errors.push(FieldError::invalid(names, source["targetWWNs"].clone(), detail));
        }
        _ => {}
    }
    if has("targetWWNs") {
        if source["lun"].is_null() {
            errors.push(FieldError::required(path.field("lun"), "lun is required if targetWWNs is specified"));
        }
        lun(source, path, errors);
    }
}

fn reserved_options(source: &Value, path: Path<'_>, errors: &mut Errors) {
    let path = path.field("options");
    for key in source.map_at(&["options"]).into_iter().flat_map(serde_json::Map::keys) {
        let namespace = format!(".{}", key.split('/').next().unwrap_or(key).to_lowercase());
        if namespace.ends_with(".kubernetes.io") || namespace.ends_with(".k8s.io") {
            let detail = "kubernetes.io and k8s.io namespaces are reserved";
            errors.push(FieldError::invalid(path.key(key), key.as_str(), detail));
        }
    }
}

fn flocker(source: &Value, path: Path<'_>, errors: &mut Errors) {
    let name = source.str_at(&["datasetName"]);
    match (name.is_empty(), source.str_at(&["datasetUUID"]).is_empty()) {
        (true, true) => errors.push(FieldError::required(path, "one of datasetName and datasetUUID is required")),
        (false, false) => {
            let detail = "datasetName and datasetUUID can not be specified simultaneously";
            errors.push(FieldError::invalid(path, "resource", detail));
        }
        _ => {}
    }
    if name.contains('/') {
        errors.push(FieldError::invalid(path.field("datasetName"), name, "must not contain '/'"));
    }
}

/// Names of iSCSI initiators: `iqn.`, `eui.` and `naa.` ones.
#[allow(clippy::unwrap_used, reason = "a constant pattern, compiled by the test below")]
static INITIATOR: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r"^(iqn\.\d{4}-\d{2}\.([[:alnum:]\-.]+)(:[^,;*&$|\s]+)|eui\.[[:xdigit:]]{16}|naa\.[[:xdigit:]]{32})$")
        .unwrap()
});

fn initiator(name: &str, owner: Owner, path: Path<'_>, errors: &mut Errors) {
    if INITIATOR.is_match(name) {
        return;
    }
    let known = ["iqn", "eui", "naa"].iter().any(|prefix| name.starts_with(prefix));
    let detail = match owner {
        Owner::Pod if !known => "must be valid format starting with iqn, eui, or naa",
        _ => "must be valid format",
    };
    errors.push(FieldError::invalid(path, name, detail));
}

fn iscsi(source: &Value, owner: Owner, path: Path<'_>, errors: &mut Errors) {
    let name = source.str_at(&["iqn"]);
    if !name.is_empty() {
        initiator(name, owner, path.field("iqn"), errors);
    }
    lun(source, path, errors);
    let authenticates = source["chapAuthDiscovery"] == true || source["chapAuthSession"] == true;
    if authenticates && source["secretRef"].is_null() {
        errors.push(FieldError::required(path.field("secretRef"), ""));
    }
    if owner == Owner::PersistentVolume {
        secret_name(source, path, errors);
    }
    if let Some(name) = source["initiatorName"].as_str() {
        initiator(name, owner, path.field("initiatorname"), errors);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::tests::texts;
    use super::*;

    #[test]
    fn every_source_says_what_it_needs() {
        let complaints = |kind: &str, source: Value| {
            let mut errors = Errors::new();
            check(kind, &source, Owner::PersistentVolume, Path::Root("s"), &mut errors);
            texts(&errors)
        };
        assert_eq!(complaints("rbd", json!({"monitors": ["a"]})), ["s.image: Required value"]);
        assert_eq!(
            complaints("nfs", json!({"server": "a", "path": "b"})),
            [r#"s.path: Invalid value: "b": must be an absolute path"#]
        );
        assert_eq!(
            complaints("iscsi", json!({"targetPortal": "p", "iqn": "x", "lun": 256})),
            [
                r#"s.iqn: Invalid value: "x": must be valid format"#,
                "s.lun: Invalid value: 256: must be between 0 and 255, inclusive"
            ]
        );
        assert!(complaints("iscsi", json!({"targetPortal": "p", "iqn": "iqn.2001-04.com.example:storage"})).is_empty());
        let secret = json!({"driver": "d", "volumeHandle": "h", "nodeStageSecretRef": {"name": "a"}});
        assert_eq!(complaints("csi", secret), ["s.nodeStageSecretRef.namespace: Required value"]);
    }
}
