//! The table of kinds: which strategy a resource has.

use super::strategy::{GENERIC, Strategy};
use super::{
    admissionregistration, apiextensions, apiregistration, apps, autoscaling, batch, certificates, coordination, core,
    discovery, flowcontrol, networking, node, policy, rbac, resource, scheduling, storage, storagemigration,
};

/// One built-in resource: its group, its plural name, its strategy.
type Row = (&'static str, &'static str, &'static dyn Strategy);

const ADMISSION: &str = "admissionregistration.k8s.io";
const EXTENSIONS: &str = "apiextensions.k8s.io";
const FLOW_CONTROL: &str = "flowcontrol.apiserver.k8s.io";
const NETWORKING: &str = "networking.k8s.io";
const RBAC: &str = "rbac.authorization.k8s.io";
const STORAGE: &str = "storage.k8s.io";

const KINDS: &[Row] = &[
    ("", "bindings", &core::pod_binding::BINDINGS),
    ("", "componentstatuses", &core::component_status::ComponentStatus),
    ("", "configmaps", &core::config_map::ConfigMap),
    ("", "endpoints", &core::endpoints::Endpoints),
    ("", "events", &core::event::Event),
    ("", "limitranges", &core::limit_range::LimitRange),
    ("", "namespaces", &core::namespace::Namespace),
    ("", "nodes", &core::node::Node),
    ("", "persistentvolumeclaims", &core::persistent_volume_claim::PersistentVolumeClaim),
    ("", "persistentvolumes", &core::persistent_volume::PersistentVolume),
    ("", "pods", &core::pod::Pod),
    ("", "podtemplates", &core::pod_template::PodTemplate),
    ("", "replicationcontrollers", &core::replication_controller::ReplicationController),
    ("", "resourcequotas", &core::resource_quota::ResourceQuota),
    ("", "secrets", &core::secret::Secret),
    ("", "serviceaccounts", &core::service_account::ServiceAccount),
    ("", "services", &core::service::Service),
    (ADMISSION, "mutatingadmissionpolicies", &admissionregistration::MUTATING_ADMISSION_POLICY),
    (ADMISSION, "mutatingadmissionpolicybindings", &admissionregistration::MUTATING_ADMISSION_POLICY_BINDING),
    (ADMISSION, "mutatingwebhookconfigurations", &admissionregistration::MUTATING_WEBHOOK_CONFIGURATION),
    (ADMISSION, "validatingadmissionpolicies", &admissionregistration::VALIDATING_ADMISSION_POLICY),
    (ADMISSION, "validatingadmissionpolicybindings", &admissionregistration::VALIDATING_ADMISSION_POLICY_BINDING),
    (ADMISSION, "validatingwebhookconfigurations", &admissionregistration::VALIDATING_WEBHOOK_CONFIGURATION),
    (EXTENSIONS, "customresourcedefinitions", &apiextensions::CustomResourceDefinition),
    ("apiregistration.k8s.io", "apiservices", &apiregistration::API_SERVICE),
    ("apps", "controllerrevisions", &apps::controller_revision::ControllerRevision),
    ("apps", "daemonsets", &apps::daemon_set::DaemonSet),
    ("apps", "deployments", &apps::deployment::Deployment),
    ("apps", "replicasets", &apps::replica_set::ReplicaSet),
    ("apps", "statefulsets", &apps::stateful_set::StatefulSet),
    ("autoscaling", "horizontalpodautoscalers", &autoscaling::horizontal_pod_autoscaler::HorizontalPodAutoscaler),
    ("batch", "cronjobs", &batch::cron_job::CronJob),
    ("batch", "jobs", &batch::job::Job),
    ("certificates.k8s.io", "certificatesigningrequests", &certificates::CertificateSigningRequest),
    ("certificates.k8s.io", "clustertrustbundles", &certificates::CLUSTER_TRUST_BUNDLE),
    ("certificates.k8s.io", "podcertificaterequests", &certificates::POD_CERTIFICATE_REQUEST),
    ("coordination.k8s.io", "leasecandidates", &coordination::LEASE_CANDIDATE),
    ("coordination.k8s.io", "leases", &coordination::LEASE),
    ("discovery.k8s.io", "endpointslices", &discovery::ENDPOINT_SLICE),
    ("events.k8s.io", "events", &core::event::NewerEvent),
    (FLOW_CONTROL, "flowschemas", &flowcontrol::FLOW_SCHEMA),
    (FLOW_CONTROL, "prioritylevelconfigurations", &flowcontrol::PRIORITY_LEVEL_CONFIGURATION),
    (NETWORKING, "ingressclasses", &networking::ingress::INGRESS_CLASS),
    (NETWORKING, "ingresses", &networking::ingress::Ingress),
    (NETWORKING, "ipaddresses", &networking::address::IP_ADDRESS),
    (NETWORKING, "networkpolicies", &networking::network_policy::NETWORK_POLICY),
    (NETWORKING, "servicecidrs", &networking::address::SERVICE_CIDR),
    ("node.k8s.io", "runtimeclasses", &node::RUNTIME_CLASS),
    ("policy", "poddisruptionbudgets", &policy::POD_DISRUPTION_BUDGET),
    (RBAC, "clusterrolebindings", &rbac::CLUSTER_ROLE_BINDING),
    (RBAC, "clusterroles", &rbac::CLUSTER_ROLE),
    (RBAC, "rolebindings", &rbac::ROLE_BINDING),
    (RBAC, "roles", &rbac::ROLE),
    ("resource.k8s.io", "deviceclasses", &resource::DEVICE_CLASS),
    ("resource.k8s.io", "devicetaintrules", &resource::DeviceTaintRule),
    ("resource.k8s.io", "resourceclaims", &resource::ResourceClaim),
    ("resource.k8s.io", "resourceclaimtemplates", &resource::ResourceClaimTemplate),
    ("resource.k8s.io", "resourceslices", &resource::ResourceSlice),
    ("scheduling.k8s.io", "priorityclasses", &scheduling::PRIORITY_CLASS),
    (STORAGE, "csidrivers", &storage::CSI_DRIVER),
    (STORAGE, "csinodes", &storage::CSI_NODE),
    (STORAGE, "csistoragecapacities", &storage::CSI_STORAGE_CAPACITY),
    (STORAGE, "storageclasses", &storage::STORAGE_CLASS),
    (STORAGE, "volumeattachments", &storage::VOLUME_ATTACHMENT),
    (STORAGE, "volumeattributesclasses", &storage::VOLUME_ATTRIBUTES_CLASS),
    ("storagemigration.k8s.io", "storageversionmigrations", &storagemigration::STORAGE_VERSION_MIGRATION),
];

/// The strategy of a built-in resource; one without rules of its own gets the generic one.
pub fn strategy(group: &str, resource: &str) -> &'static dyn Strategy {
    let declared = KINDS.iter().find(|(g, r, _)| (*g, *r) == (group, resource)).map(|(_, _, strategy)| *strategy);
    declared.or_else(|| crate::auth::reviews::strategy(group, resource)).unwrap_or(&GENERIC)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// Objects that a careless or malicious client may send.
    fn odd_shapes() -> Vec<Value> {
        vec![
            json!({}),
            json!({"metadata": {"name": "a"}, "spec": {}}),
            json!({"metadata": null, "spec": null, "status": null}),
            json!({"metadata": {"labels": {}}, "spec": {"template": {}, "containers": [{}], "ports": [{}], "rules": [{}]}}),
            json!({"spec": {"template": {"spec": {"containers": [null, {"env": [{}], "ports": [{}]}], "volumes": [{}]}}}}),
            json!({"metadata": [], "spec": [1, 2], "status": "x", "data": 3}),
        ]
    }

    #[test]
    fn defaulting_is_idempotent_and_rows_have_all_columns() {
        for (group, resource, strategy) in KINDS {
            for shape in odd_shapes() {
                let mut obj = shape.clone();
                strategy.default(&mut obj);
                let once = obj.clone();
                strategy.default(&mut obj);
                assert_eq!(obj, once, "{group}/{resource}: defaults of {shape}");
                let cells = strategy.row(&obj, jiff::Timestamp::UNIX_EPOCH);
                assert_eq!(cells.len(), strategy.columns().len(), "{group}/{resource}");
            }
            let names = strategy.columns().iter().filter(|column| column.format == "name").count();
            assert!(names >= 1, "{group}/{resource} has a column of names");
        }
    }

    #[test]
    fn conversions_bring_objects_back() {
        for (group, resource, strategy) in KINDS {
            let obj = json!({"apiVersion": "v1", "metadata": {"name": "a"}, "spec": {"maxReplicas": 1}, "reason": "x", "message": "y"});
            let back = strategy.to_storage("v1", strategy.from_storage("v1", obj.clone()).unwrap()).unwrap();
            let without_type = |mut value: Value| {
                value.as_object_mut().unwrap().remove("apiVersion");
                value
            };
            assert_eq!(without_type(back), without_type(obj), "{group}/{resource}");
        }
    }

    #[test]
    fn the_table_is_sorted_and_has_no_repetitions() {
        let names: Vec<_> = KINDS.iter().map(|(group, resource, _)| (*group, *resource)).collect();
        let mut sorted = names.clone();
        sorted.sort_unstable();
        sorted.dedup();
        assert_eq!(names, sorted);
    }
}
