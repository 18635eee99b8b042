//! Defaults of the workload controllers: deployments, replica sets, daemon sets, stateful sets and replication controllers.

use apimachinery::meta::GroupVersionKind;
use serde_json::{Value, json};

use super::{core, default, default_zero, each, existing, is_zero, pod, within};
use crate::registry::object::ObjectExt;

pub fn deployment(obj: &mut Value) {
    within(obj, "spec", |spec| {
        default(spec, "replicas", 1);
        within(spec, "strategy", |strategy| {
            default_zero(strategy, "type", "RollingUpdate");
            if strategy["type"] == "RollingUpdate" {
                within(strategy, "rollingUpdate", |rolling| {
                    default(rolling, "maxUnavailable", "25%");
                    default(rolling, "maxSurge", "25%");
                });
            }
        });
        default(spec, "revisionHistoryLimit", 10);
        default(spec, "progressDeadlineSeconds", 600);
        pod::template_of(spec);
    });
}

pub fn replica_set(obj: &mut Value) {
    within(obj, "spec", |spec| {
        default(spec, "replicas", 1);
        pod::template_of(spec);
    });
}

pub fn daemon_set(obj: &mut Value) {
    within(obj, "spec", |spec| {
        within(spec, "updateStrategy", |strategy| {
            default_zero(strategy, "type", "RollingUpdate");
            if strategy["type"] == "RollingUpdate" {
                within(strategy, "rollingUpdate", |rolling| {
                    default(rolling, "maxUnavailable", 1);
                    default(rolling, "maxSurge", 0);
                });
            }
        });
        default(spec, "revisionHistoryLimit", 10);
        pod::template_of(spec);
    });
}

pub fn stateful_set(obj: &mut Value) {
    within(obj, "spec", |spec| {
        default_zero(spec, "podManagementPolicy", "OrderedReady");
        within(spec, "updateStrategy", |strategy| {
            if is_zero(&strategy["type"]) {
                default_zero(strategy, "type", "RollingUpdate");
                within(strategy, "rollingUpdate", |_| {});
            }
            if strategy["type"] == "RollingUpdate" {
                existing(strategy, "rollingUpdate", |rolling| {
                    default(rolling, "partition", 0);
                    default(rolling, "maxUnavailable", 1);
                });
            }
        });
        within(spec, "persistentVolumeClaimRetentionPolicy", |policy| {
            default_zero(policy, "whenDeleted", "Retain");
            default_zero(policy, "whenScaled", "Retain");
        });
        default(spec, "replicas", 1);
        default(spec, "revisionHistoryLimit", 10);
        pod::template_of(spec);
        each(spec, "volumeClaimTemplates", |claim| {
            // Upstream's types write these out, whatever the client said; the controller compares claims as they are
            // stored.
            claim.set_gvk(&GroupVersionKind::new("", "v1", "PersistentVolumeClaim"));
            core::claim(claim);
        });
    });
}

pub fn replication_controller(obj: &mut Value) {
    let labels = obj["spec"]["template"]["metadata"]["labels"].clone();
    within(obj, "spec", |spec| {
        default(spec, "replicas", 1);
        if !is_zero(&labels) {
            default_zero(spec, "selector", labels.clone());
        }
        pod::template_of(spec);
    });
    labels_from_template(obj, labels);
}

/// An object without labels of its own takes those of its pods.
pub fn labels_from_template(obj: &mut Value, labels: Value) {
    if !is_zero(&labels) {
        within(obj, "metadata", |metadata| default_zero(metadata, "labels", labels));
    }
}

/// A status field that is always present, as upstream's types write it.
pub fn empty_status(obj: &mut Value) {
    default(obj, "status", json!({}));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn without_template(mut obj: Value, f: fn(&mut Value)) -> Value {
        f(&mut obj);
        let once = obj.clone();
        f(&mut obj);
        assert_eq!(obj, once, "defaulting is idempotent");
        obj["spec"].as_object_mut().unwrap().remove("template");
        obj["spec"].take()
    }

    #[test]
    fn deployments_roll_a_quarter_at_a_time() {
        let rolling = without_template(json!({}), deployment);
        let expected = json!({
            "replicas": 1, "revisionHistoryLimit": 10, "progressDeadlineSeconds": 600,
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": "25%", "maxSurge": "25%"}},
        });
        assert_eq!(rolling, expected);
        let recreate = without_template(json!({"spec": {"strategy": {"type": "Recreate"}}}), deployment);
        assert_eq!(recreate["strategy"], json!({"type": "Recreate"}));
    }

    #[test]
    fn daemon_sets_replace_one_pod_at_a_time() {
        let expected = json!({
            "revisionHistoryLimit": 10,
            "updateStrategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 1, "maxSurge": 0}},
        });
        assert_eq!(without_template(json!({}), daemon_set), expected);
    }

    #[test]
    fn stateful_sets_keep_claims_and_order() {
        let expected = json!({
            "replicas": 1, "revisionHistoryLimit": 10, "podManagementPolicy": "OrderedReady",
            "persistentVolumeClaimRetentionPolicy": {"whenDeleted": "Retain", "whenScaled": "Retain"},
            "updateStrategy": {"type": "RollingUpdate", "rollingUpdate": {"partition": 0, "maxUnavailable": 1}},
        });
        assert_eq!(without_template(json!({}), stateful_set), expected);
        let explicit = without_template(json!({"spec": {"updateStrategy": {"type": "RollingUpdate"}}}), stateful_set);
        assert_eq!(explicit["updateStrategy"], json!({"type": "RollingUpdate"}));
    }

    #[test]
    fn replication_controllers_select_their_templates_labels() {
        let mut obj = json!({"spec": {"template": {"metadata": {"labels": {"app": "web"}}}}});
        replication_controller(&mut obj);
        assert_eq!(obj["spec"]["selector"], json!({"app": "web"}));
        assert_eq!(obj["metadata"]["labels"], json!({"app": "web"}));
        assert_eq!(obj["spec"]["replicas"], 1);
    }
}
