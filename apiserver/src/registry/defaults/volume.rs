//! Defaults of volumes: those inside a pod, and the sources that persistent volumes share with them.

use serde_json::{Value, json};

use super::{core, default, default_zero, each, existing, pod::pulls_always, within};

/// The permission bits that files of secrets, config maps and the like get: 0644.
const FILE_MODE: i64 = 0o644;

/// One entry of a pod's `volumes`.
pub fn volume(volume: &mut Value) {
    let has_source = volume.as_object().is_some_and(|v| v.iter().any(|(key, value)| key != "name" && !value.is_null()));
    if !has_source {
        default(volume, "emptyDir", json!({}));
    }
    for source in ["secret", "configMap"] {
        existing(volume, source, |s| default(s, "defaultMode", FILE_MODE));
    }
    existing(volume, "downwardAPI", |source| {
        default(source, "defaultMode", FILE_MODE);
        each(source, "items", downward_item);
    });
    existing(volume, "projected", |projected| {
        default(projected, "defaultMode", FILE_MODE);
        each(projected, "sources", |source| {
            existing(source, "downwardAPI", |d| each(d, "items", downward_item));
            existing(source, "serviceAccountToken", |t| default(t, "expirationSeconds", 3600));
        });
    });
    existing(volume, "ephemeral", |e| existing(e, "volumeClaimTemplate", |t| within(t, "spec", core::claim_spec)));
    existing(volume, "image", |image| {
        let policy =
            if pulls_always(image["reference"].as_str().unwrap_or_default()) { "Always" } else { "IfNotPresent" };
        default_zero(image, "pullPolicy", policy);
    });
    source(volume);
}

fn downward_item(item: &mut Value) {
    existing(item, "fieldRef", |field| default_zero(field, "apiVersion", "v1"));
    existing(item, "resourceFieldRef", |field| default_zero(field, "divisor", "0"));
}

/// The sources that pods and persistent volumes have in common.
pub fn source(volume: &mut Value) {
    existing(volume, "hostPath", |s| default(s, "type", ""));
    existing(volume, "iscsi", |s| default_zero(s, "iscsiInterface", "default"));
    existing(volume, "rbd", |s| {
        default_zero(s, "pool", "rbd");
        default_zero(s, "user", "admin");
        default_zero(s, "keyring", "/etc/ceph/keyring");
    });
    existing(volume, "azureDisk", |s| {
        default(s, "cachingMode", "ReadWrite");
        default(s, "fsType", "ext4");
        default(s, "readOnly", false);
        default(s, "kind", "Shared");
    });
    existing(volume, "scaleIO", |s| {
        default_zero(s, "storageMode", "ThinProvisioned");
        default_zero(s, "fsType", "xfs");
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_source_gets_upstreams_defaults() {
        let cases = [
            (json!({"name": "v"}), json!({"name": "v", "emptyDir": {}})),
            (json!({"secret": {"secretName": "s"}}), json!({"secret": {"secretName": "s", "defaultMode": 420}})),
            (json!({"configMap": {"defaultMode": 256}}), json!({"configMap": {"defaultMode": 256}})),
            (json!({"hostPath": {"path": "/"}}), json!({"hostPath": {"path": "/", "type": ""}})),
            (
                json!({"projected": {"sources": [{"serviceAccountToken": {"path": "token"}}]}}),
                json!({"projected": {"defaultMode": 420, "sources": [
                    {"serviceAccountToken": {"path": "token", "expirationSeconds": 3600}}]}}),
            ),
            (
                json!({"downwardAPI": {"items": [{"fieldRef": {"fieldPath": "metadata.name"}}]}}),
                json!({"downwardAPI": {"defaultMode": 420, "items": [
                    {"fieldRef": {"fieldPath": "metadata.name", "apiVersion": "v1"}}]}}),
            ),
        ];
        for (given, expected) in cases {
            let mut obj = given.clone();
            volume(&mut obj);
            assert_eq!(obj, expected, "{given}");
        }
    }
}
