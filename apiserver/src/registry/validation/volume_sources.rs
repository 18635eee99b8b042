//! Rules for the sources of storage that pods and persistent volumes share: disks of clouds, network file systems and
//! block devices. Many have no driver any more; their fields are still checked.

use std::sync::LazyLock;

use apimachinery::meta::validation::{is_dns1123_label, is_dns1123_subdomain};
use apimachinery::status::FieldError;
use regex::Regex;
use serde_json::Value;

use super::{Errors, Path, complain, one_of_given, required};
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
    ("quobyte", &["volume"]),
    ("rbd", &["monitors", "image"]),
    ("scaleIO", &["gateway", "system", "volumeName"]),
    ("vsphereVolume", &["volumePath"]),
];
const ONE_BYTE: &str = "must be between 0 and 255, inclusive";
/// What upstream says of partitions, of which 0 is one too.
const PARTITIONS: &str = "must be between 1 and 255, inclusive";

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
        "azureFile" if source["secretNamespace"] == "" => {
            errors.push(FieldError::required(path.field("secretNamespace"), ""));
        }
        "cinder" => secret_name(source, owner, path, errors),
        "csi" => csi(source, owner, path, errors),
        "fc" => fibre_channel(source, path, errors),
        "flexVolume" => reserved_options(source, path, errors),
        "flocker" => flocker(source, path, errors),
        "glusterfs" => endpoints_namespace(source, path, errors),
        "iscsi" => iscsi(source, owner, path, errors),
        "nfs" if !source.str_at(&["path"]).starts_with('/') => {
            errors.push(FieldError::invalid(path.field("path"), source.str_at(&["path"]), "must be an absolute path"));
        }
        "quobyte" => registry(source, path, errors),
        "storageos" => storage_os(source, owner, path, errors),
        _ => {}
    }
}

fn partition(source: &Value, path: Path<'_>, errors: &mut Errors) {
    if let Some(number) = source["partition"].as_i64().filter(|number| !(0..=255).contains(number)) {
        errors.push(FieldError::invalid(path.field("partition"), number, PARTITIONS));
    }
}

fn lun(source: &Value, path: Path<'_>, errors: &mut Errors) {
    if let Some(number) = source["lun"].as_i64().filter(|number| !(0..=255).contains(number)) {
        errors.push(FieldError::invalid(path.field("lun"), number, ONE_BYTE));
    }
}

/// A secret that is named must have a name, and a namespace where the volume has none itself.
fn secret_name(source: &Value, owner: Owner, path: Path<'_>, errors: &mut Errors) {
    if source["secretRef"].is_null() {
        return;
    }
    required(&source["secretRef"], "name", path.field("secretRef"), errors);
    if owner == Owner::PersistentVolume {
        required(&source["secretRef"], "namespace", path.field("secretRef"), errors);
    }
}

fn endpoints_namespace(source: &Value, path: Path<'_>, errors: &mut Errors) {
    let field = path.field("endpointsNamespace");
    match source["endpointsNamespace"].as_str() {
        None => {}
        Some("") => {
            let detail = "if the endpointnamespace is set, it must be a valid namespace name";
            errors.push(FieldError::invalid(field, "", detail));
        }
        Some(name) => complain(is_dns1123_label(name), name, field, errors),
    }
}

fn registry(source: &Value, path: Path<'_>, errors: &mut Errors) {
    const SHAPE: &str = "must be a host:port pair or multiple pairs separated by commas";
    let registry = source.str_at(&["registry"]);
    if registry.is_empty() {
        errors.push(FieldError::required(path.field("registry"), SHAPE));
    } else if source.str_at(&["tenant"]).len() > 64 {
        let detail = "must be a UUID and may not exceed a length of 64 characters";
        errors.push(FieldError::required(path.field("tenant"), detail));
    } else {
        for _ in registry.split(',').filter(|pair| !is_host_and_port(pair)) {
            errors.push(FieldError::invalid(path.field("registry"), registry, SHAPE));
        }
    }
}

/// `host:port`, with brackets around an address that has colons itself. Neither part need say anything.
fn is_host_and_port(text: &str) -> bool {
    match text.rsplit_once(':') {
        None => false,
        Some((host, _)) => match host.strip_prefix('[') {
            Some(inner) => inner.strip_suffix(']').is_some_and(|inner| !inner.contains(['[', ']'])),
            None => !host.contains([':', '[', ']']),
        },
    }
}

fn storage_os(source: &Value, owner: Owner, path: Path<'_>, errors: &mut Errors) {
    if let Some(name) = required(source, "volumeName", path, errors) {
        complain(is_dns1123_label(name), name, path.field("volumeName"), errors);
    }
    super::dns_label(source, "volumeNamespace", path, errors);
    secret_name(source, owner, path, errors);
}

fn azure_disk(source: &Value, path: Path<'_>, errors: &mut Errors) {
    const MANAGED: &str =
        "/subscriptions/{sub-id}/resourcegroups/{group-name}/providers/microsoft.compute/disks/{disk-id}";
    const BLOB: &str = "https://{account-name}.blob.core.windows.net/{container-name}/{disk-name}.vhd";
    one_of_given(source, "cachingMode", &["None", "ReadOnly", "ReadWrite"], path, errors);
    one_of_given(source, "kind", &["Dedicated", "Managed", "Shared"], path, errors);
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
            let secret = path.field("nodePublishSecretRef");
            // Upstream looks for the name of the secret next to the secret.
            if let Some(name) = required(&source["nodePublishSecretRef"], "name", secret, errors) {
                complain(is_dns1123_subdomain(name), name, path.field("name"), errors);
            }
        }
        return;
    }
    required(source, "volumeHandle", path, errors);
    // The secret for staging is not looked at: so does upstream.
    for field in
        ["controllerPublishSecretRef", "controllerExpandSecretRef", "nodePublishSecretRef", "nodeExpandSecretRef"]
    {
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
    if owner == Owner::PersistentVolume && !source["secretRef"].is_null() {
        required(&source["secretRef"], "name", path.field("secretRef"), errors);
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
        let secret = json!({"driver": "d", "volumeHandle": "h", "nodeExpandSecretRef": {"name": "a"}});
        assert_eq!(complaints("csi", secret), ["s.nodeExpandSecretRef.namespace: Required value"]);
        for (registry, expected) in [("a:1,[::1]:2", 0), ("a", 1), ("::1:2", 1), ("a,b", 2)] {
            assert_eq!(
                complaints("quobyte", json!({"registry": registry, "volume": "v"})).len(),
                expected,
                "{registry}"
            );
        }
    }
}
