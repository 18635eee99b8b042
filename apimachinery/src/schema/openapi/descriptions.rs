//! The prose of the built-in kinds, for `kubectl explain`, out of `k8s-openapi`'s JSON schemas.

use k8s_openapi::apimachinery::pkg::apis::meta::v1 as meta;
use schemars::{JsonSchema, SchemaGenerator};
use serde_json::{Map, Value};

use super::Description;
use crate::meta::GroupVersion;
use crate::schema::builtin;

/// Looks up definitions by name, for as long as one document is written.
pub struct Descriptions {
    definitions: Map<String, Value>,
}

/// The prose of the kinds of a group and version and of everything they consist of.
pub fn of(gv: &GroupVersion) -> Descriptions {
    let mut generator = SchemaGenerator::default();
    add(&mut generator, gv);
    Descriptions { definitions: generator.take_definitions(true) }
}

/// The prose of all kinds.
pub fn of_all() -> Descriptions {
    let mut generator = SchemaGenerator::default();
    for group in builtin().groups() {
        for version in &group.versions {
            add(&mut generator, &GroupVersion::new(group.name, *version));
        }
    }
    Descriptions { definitions: generator.take_definitions(true) }
}

impl Descriptions {
    pub fn get(&self, name: &str) -> Option<Description> {
        let Some(definition) = self.definitions.get(name) else { return self.list(name) };
        let text = |value: &Value| value.get("description").and_then(Value::as_str).map(str::to_owned);
        let properties = definition.get("properties").and_then(Value::as_object);
        let fields = properties.into_iter().flatten().filter_map(|(name, field)| Some((name.clone(), text(field)?)));
        Some(Description { text: text(definition).unwrap_or_default(), fields: fields.collect() })
    }

    /// Lists are generic in k8s-openapi and have no prose of their own.
    fn list(&self, name: &str) -> Option<Description> {
        let item = name.strip_suffix("List").filter(|item| self.definitions.contains_key(*item))?;
        let kind = item.rsplit('.').next().unwrap_or(item);
        let fields = [("items", format!("The objects of kind {kind}.")), ("metadata", "The list's metadata.".into())];
        let fields = fields.into_iter().map(|(name, text): (_, String)| (name.to_owned(), text));
        Some(Description { text: format!("{kind}List is a list of {kind} objects."), fields: fields.collect() })
    }
}

fn kind<T: JsonSchema>(generator: &mut SchemaGenerator) {
    generator.subschema_for::<T>();
}

fn add(generator: &mut SchemaGenerator, gv: &GroupVersion) {
    use k8s_openapi::api;
    kind::<meta::DeleteOptions>(generator);
    kind::<meta::Status>(generator);
    kind::<meta::ListMeta>(generator);
    let roots: &[fn(&mut SchemaGenerator)] = match (&*gv.group, &*gv.version) {
        ("", "v1") => &[
            kind::<api::core::v1::Binding>,
            kind::<api::core::v1::ComponentStatus>,
            kind::<api::core::v1::ConfigMap>,
            kind::<api::core::v1::Endpoints>,
            kind::<api::core::v1::Event>,
            kind::<api::core::v1::LimitRange>,
            kind::<api::core::v1::Namespace>,
            kind::<api::core::v1::Node>,
            kind::<api::core::v1::PersistentVolumeClaim>,
            kind::<api::core::v1::PersistentVolume>,
            kind::<api::core::v1::Pod>,
            kind::<api::policy::v1::Eviction>,
            kind::<api::core::v1::PodTemplate>,
            kind::<api::core::v1::ReplicationController>,
            kind::<api::autoscaling::v1::Scale>,
            kind::<api::core::v1::ResourceQuota>,
            kind::<api::core::v1::Secret>,
            kind::<api::core::v1::ServiceAccount>,
            kind::<api::authentication::v1::TokenRequest>,
            kind::<api::core::v1::Service>,
        ],
        ("apiregistration.k8s.io", "v1") => {
            &[kind::<k8s_openapi::kube_aggregator::pkg::apis::apiregistration::v1::APIService>]
        }
        ("apps", "v1") => &[
            kind::<api::apps::v1::ControllerRevision>,
            kind::<api::apps::v1::DaemonSet>,
            kind::<api::apps::v1::Deployment>,
            kind::<api::autoscaling::v1::Scale>,
            kind::<api::apps::v1::ReplicaSet>,
            kind::<api::apps::v1::StatefulSet>,
        ],
        ("events.k8s.io", "v1") => &[kind::<api::events::v1::Event>],
        ("authentication.k8s.io", "v1") => {
            &[kind::<api::authentication::v1::SelfSubjectReview>, kind::<api::authentication::v1::TokenReview>]
        }
        ("authorization.k8s.io", "v1") => &[
            kind::<api::authorization::v1::LocalSubjectAccessReview>,
            kind::<api::authorization::v1::SelfSubjectAccessReview>,
            kind::<api::authorization::v1::SelfSubjectRulesReview>,
            kind::<api::authorization::v1::SubjectAccessReview>,
        ],
        ("autoscaling", "v2") => &[kind::<api::autoscaling::v2::HorizontalPodAutoscaler>],
        ("autoscaling", "v1") => &[kind::<api::autoscaling::v1::HorizontalPodAutoscaler>],
        ("batch", "v1") => &[kind::<api::batch::v1::CronJob>, kind::<api::batch::v1::Job>],
        ("certificates.k8s.io", "v1") => &[
            kind::<api::certificates::v1::CertificateSigningRequest>,
            kind::<api::certificates::v1::ClusterTrustBundle>,
            kind::<api::certificates::v1::PodCertificateRequest>,
        ],
        ("certificates.k8s.io", "v1beta1") => &[
            kind::<api::certificates::v1beta1::ClusterTrustBundle>,
            kind::<api::certificates::v1beta1::PodCertificateRequest>,
        ],
        ("networking.k8s.io", "v1") => &[
            kind::<api::networking::v1::IngressClass>,
            kind::<api::networking::v1::Ingress>,
            kind::<api::networking::v1::IPAddress>,
            kind::<api::networking::v1::NetworkPolicy>,
            kind::<api::networking::v1::ServiceCIDR>,
        ],
        ("policy", "v1") => &[kind::<api::policy::v1::PodDisruptionBudget>],
        ("rbac.authorization.k8s.io", "v1") => &[
            kind::<api::rbac::v1::ClusterRoleBinding>,
            kind::<api::rbac::v1::ClusterRole>,
            kind::<api::rbac::v1::RoleBinding>,
            kind::<api::rbac::v1::Role>,
        ],
        ("storage.k8s.io", "v1") => &[
            kind::<api::storage::v1::CSIDriver>,
            kind::<api::storage::v1::CSINode>,
            kind::<api::storage::v1::CSIStorageCapacity>,
            kind::<api::storage::v1::StorageClass>,
            kind::<api::storage::v1::VolumeAttachment>,
            kind::<api::storage::v1::VolumeAttributesClass>,
        ],
        ("admissionregistration.k8s.io", "v1") => &[
            kind::<api::admissionregistration::v1::MutatingAdmissionPolicy>,
            kind::<api::admissionregistration::v1::MutatingAdmissionPolicyBinding>,
            kind::<api::admissionregistration::v1::MutatingWebhookConfiguration>,
            kind::<api::admissionregistration::v1::ValidatingAdmissionPolicy>,
            kind::<api::admissionregistration::v1::ValidatingAdmissionPolicyBinding>,
            kind::<api::admissionregistration::v1::ValidatingWebhookConfiguration>,
        ],
        ("admissionregistration.k8s.io", "v1beta1") => &[
            kind::<api::admissionregistration::v1beta1::MutatingAdmissionPolicy>,
            kind::<api::admissionregistration::v1beta1::MutatingAdmissionPolicyBinding>,
        ],
        ("admissionregistration.k8s.io", "v1alpha1") => &[
            kind::<api::admissionregistration::v1alpha1::MutatingAdmissionPolicy>,
            kind::<api::admissionregistration::v1alpha1::MutatingAdmissionPolicyBinding>,
        ],
        ("apiextensions.k8s.io", "v1") => {
            &[kind::<k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition>]
        }
        ("scheduling.k8s.io", "v1") => &[kind::<api::scheduling::v1::PriorityClass>],
        ("scheduling.k8s.io", "v1beta1") => {
            &[kind::<api::scheduling::v1beta1::PodGroup>, kind::<api::scheduling::v1beta1::Workload>]
        }
        ("scheduling.k8s.io", "v1alpha3") => &[
            kind::<api::scheduling::v1alpha3::CompositePodGroup>,
            kind::<api::scheduling::v1alpha3::PodGroup>,
            kind::<api::scheduling::v1alpha3::Workload>,
        ],
        ("coordination.k8s.io", "v1") => &[kind::<api::coordination::v1::Lease>],
        ("coordination.k8s.io", "v1beta1") => &[kind::<api::coordination::v1beta1::LeaseCandidate>],
        ("coordination.k8s.io", "v1alpha2") => &[kind::<api::coordination::v1alpha2::LeaseCandidate>],
        ("node.k8s.io", "v1") => &[kind::<api::node::v1::RuntimeClass>],
        ("discovery.k8s.io", "v1") => &[kind::<api::discovery::v1::EndpointSlice>],
        ("resource.k8s.io", "v1") => &[
            kind::<api::resource::v1::DeviceClass>,
            kind::<api::resource::v1::DeviceTaintRule>,
            kind::<api::resource::v1::ResourceClaim>,
            kind::<api::resource::v1::ResourceClaimTemplate>,
            kind::<api::resource::v1::ResourceSlice>,
        ],
        ("resource.k8s.io", "v1beta2") => &[
            kind::<api::resource::v1beta2::DeviceClass>,
            kind::<api::resource::v1beta2::DeviceTaintRule>,
            kind::<api::resource::v1beta2::ResourceClaim>,
            kind::<api::resource::v1beta2::ResourceClaimTemplate>,
            kind::<api::resource::v1beta2::ResourceSlice>,
        ],
        ("resource.k8s.io", "v1beta1") => &[
            kind::<api::resource::v1beta1::DeviceClass>,
            kind::<api::resource::v1beta1::ResourceClaim>,
            kind::<api::resource::v1beta1::ResourceClaimTemplate>,
            kind::<api::resource::v1beta1::ResourceSlice>,
        ],
        ("resource.k8s.io", "v1alpha3") => &[
            kind::<api::resource::v1alpha3::DeviceTaintRule>,
            kind::<api::resource::v1alpha3::ResourcePoolStatusRequest>,
        ],
        ("flowcontrol.apiserver.k8s.io", "v1") => {
            &[kind::<api::flowcontrol::v1::FlowSchema>, kind::<api::flowcontrol::v1::PriorityLevelConfiguration>]
        }
        ("internal.apiserver.k8s.io", "v1alpha1") => &[kind::<api::apiserverinternal::v1alpha1::StorageVersion>],
        ("storagemigration.k8s.io", "v1") => &[kind::<api::storagemigration::v1::StorageVersionMigration>],
        ("storagemigration.k8s.io", "v1beta1") => &[kind::<api::storagemigration::v1beta1::StorageVersionMigration>],
        ("lifecycle.k8s.io", "v1alpha1") => {
            &[kind::<api::lifecycle::v1alpha1::EvictionRequest>, kind::<api::lifecycle::v1alpha1::Eviction>]
        }
        _ => &[],
    };
    for root in roots {
        root(generator);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prose_reaches_the_fields() {
        let descriptions = of(&GroupVersion::new("apps", "v1"));
        let spec = descriptions.get("io.k8s.api.core.v1.PodSpec").expect("PodSpec");
        assert!(spec.fields["containers"].contains("containers"));
        assert!(!descriptions.get("io.k8s.api.apps.v1.DeploymentList").expect("a list").text.is_empty());
    }
}
