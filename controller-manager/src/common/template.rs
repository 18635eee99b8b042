//! Pods as their template says, and the events that creating and deleting them cause.

use apimachinery::controller::{Object, Report, Write, object_reference};
use k8s_openapi::api::core::v1::{Pod, PodTemplateSpec};
use kube::api::ObjectMeta;

use super::{controller_reference, name, namespace};

/// A pod of the template, owned by `owner`, whose name the server generates.
pub fn pod_from_template<O: Object>(owner: &O, template: &PodTemplateSpec) -> Pod {
    let meta = template.metadata.clone().unwrap_or_default();
    Pod {
        metadata: ObjectMeta {
            namespace: Some(namespace(owner.meta()).to_owned()),
            generate_name: Some(format!("{}-", name(owner.meta()))),
            labels: meta.labels,
            annotations: meta.annotations,
            finalizers: meta.finalizers,
            owner_references: Some(vec![controller_reference(owner)]),
            ..ObjectMeta::default()
        },
        spec: template.spec.clone(),
        status: None,
    }
}

/// Creates the pod and tells about it on the owner.
pub fn create_pod<O: Object>(owner: &O, pod: &Pod) -> Write {
    Write::create(pod).report(Report {
        on: object_reference(owner),
        done: ("SuccessfulCreate", "Created pod: {}".to_owned()),
        failed: ("FailedCreate", "Error creating: {}".to_owned()),
    })
}

/// Deletes the pod and tells about it on the owner.
pub fn delete_pod<O: Object>(owner: &O, pod: &Pod) -> Write {
    Write::delete(pod).report(Report {
        on: object_reference(owner),
        done: ("SuccessfulDelete", format!("Deleted pod: {}", name(&pod.metadata))),
        failed: ("FailedDelete", "Error deleting: {}".to_owned()),
    })
}
