//! Defaults of the remaining kinds of the core group. Services have a file of their own.

use serde_json::{Value, json};

use super::{default, default_entries, default_zero, each, existing, is_zero, pod, volume, within};

pub fn namespace(obj: &mut Value) {
    let name = obj["metadata"]["name"].clone();
    if !is_zero(&name) {
        within(obj, "metadata", |metadata| {
            within(metadata, "labels", |labels| labels["kubernetes.io/metadata.name"] = name);
        });
    }
    within(obj, "status", |status| default_zero(status, "phase", "Active"));
}

pub fn node(obj: &mut Value) {
    existing(obj, "spec", |spec| {
        // The singular field and the first of the list are the same thing; the singular one wins.
        let (one, first) = (spec["podCIDR"].clone(), spec["podCIDRs"][0].clone());
        match (is_zero(&one), is_zero(&first)) {
            (false, _) if one != first => spec["podCIDRs"] = json!([one]),
            (true, false) => spec["podCIDR"] = first,
            _ => {}
        }
    });
    existing(obj, "status", |status| {
        pod::resource_list(status, "capacity");
        pod::resource_list(status, "allocatable");
        if status["allocatable"].is_null() && !is_zero(&status["capacity"]) {
            status["allocatable"] = status["capacity"].clone();
        }
    });
}

pub fn secret(obj: &mut Value) {
    default_zero(obj, "type", "Opaque");
}

pub fn endpoints(obj: &mut Value) {
    each(obj, "subsets", |subset| each(subset, "ports", |port| default_zero(port, "protocol", "TCP")));
}

pub fn persistent_volume(obj: &mut Value) {
    within(obj, "status", |status| default_zero(status, "phase", "Pending"));
    within(obj, "spec", |spec| {
        default_zero(spec, "persistentVolumeReclaimPolicy", "Retain");
        default(spec, "volumeMode", "Filesystem");
        pod::resource_list(spec, "capacity");
        volume::source(spec);
    });
}

pub fn claim(obj: &mut Value) {
    within(obj, "spec", claim_spec);
    within(obj, "status", |status| default_zero(status, "phase", "Pending"));
}

pub fn claim_spec(spec: &mut Value) {
    default(spec, "volumeMode", "Filesystem");
    within(spec, "resources", pod::resource_requirements);
}

pub fn resource_quota(obj: &mut Value) {
    within(obj, "spec", |spec| pod::resource_list(spec, "hard"));
    within(obj, "status", |status| {
        pod::resource_list(status, "hard");
        pod::resource_list(status, "used");
    });
}

pub fn limit_range(obj: &mut Value) {
    existing(obj, "spec", |spec| {
        each(spec, "limits", |limit| {
            if limit["type"] == "Container" {
                default_entries(limit, "default", "max");
                default_entries(limit, "defaultRequest", "default");
                default_entries(limit, "defaultRequest", "min");
            }
            for list in ["max", "min", "default", "defaultRequest", "maxLimitRequestRatio"] {
                pod::resource_list(limit, list);
            }
        });
    });
}

/// `TokenRequest` bodies: an hour, for the API server itself.
pub fn token_request(obj: &mut Value) {
    within(obj, "spec", |spec| {
        default(spec, "expirationSeconds", 3600);
        default(spec, "audiences", json!([]));
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn namespaces_carry_their_name_as_a_label() {
        let mut obj = json!({"metadata": {"name": "shop", "labels": {"a": "b"}}});
        namespace(&mut obj);
        assert_eq!(obj["metadata"]["labels"], json!({"a": "b", "kubernetes.io/metadata.name": "shop"}));
        let mut generated = json!({"metadata": {"generateName": "shop-"}});
        namespace(&mut generated);
        assert!(generated["metadata"].get("labels").is_none());
    }

    #[test]
    fn container_limits_default_from_each_other() {
        let mut obj = json!({"spec": {"limits": [{
            "type": "Container", "max": {"cpu": "2"}, "min": {"cpu": "1", "memory": "1Mi"}, "default": {"memory": "2Mi"}}]}});
        limit_range(&mut obj);
        let limit = &obj["spec"]["limits"][0];
        assert_eq!(limit["default"], json!({"memory": "2Mi", "cpu": "2"}));
        assert_eq!(limit["defaultRequest"], json!({"memory": "2Mi", "cpu": "2"}));
    }

    #[test]
    fn allocatable_follows_capacity() {
        let mut obj = json!({"status": {"capacity": {"cpu": "2"}}});
        node(&mut obj);
        assert_eq!(obj["status"]["allocatable"], json!({"cpu": "2"}));
    }

    #[test]
    fn volumes_and_claims_start_pending() {
        let (mut volume, mut claims) = (json!({"spec": {}}), json!({"spec": {}}));
        persistent_volume(&mut volume);
        claim(&mut claims);
        assert_eq!(volume["spec"], json!({"persistentVolumeReclaimPolicy": "Retain", "volumeMode": "Filesystem"}));
        assert_eq!(
            claims,
            json!({"spec": {"volumeMode": "Filesystem", "resources": {}}, "status": {"phase": "Pending"}})
        );
    }
}
