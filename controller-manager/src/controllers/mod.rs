//! One controller per file. Each says what it watches in `start` and decides in `reconcile`; the table below is the
//! list that `--controllers` selects from.

mod attach_detach;
pub mod autoscaler;
mod bootstrap;
mod certificates;
mod cluster_role_aggregation;
mod cron_job;
mod daemon_set;
mod deployment;
mod disruption;
mod endpoint_slice_mirroring;
mod endpoint_slices;
mod endpoints;
mod ephemeral_volume;
mod job;
mod legacy_tokens;
mod namespace;
mod node_ipam;
mod node_lifecycle;
mod pod_gc;
mod replicas;
mod resource_claims;
mod resource_quota;
mod root_ca;
mod service_account;
mod service_account_tokens;
mod service_cidr;
mod service_endpoints;
mod stateful_set;
mod taint_eviction;
mod trust_bundle;
mod ttl;
mod ttl_after_finished;
mod volume_binder;
mod volume_expander;
mod volume_protection;

use crate::app::Context;

/// A controller's canonical name, its older alias, and how it is started.
pub struct Descriptor {
    pub name: &'static str,
    pub alias: &'static str,
    /// Runs only when named in `--controllers`, not by `*`.
    pub off_by_default: bool,
    /// The service account of `kube-system` that it acts as under `--use-service-account-credentials`, to which the
    /// API server binds its role; none for what acts as the process itself.
    pub service_account: Option<&'static str>,
    pub start: fn(&Context),
}

const fn on(name: &'static str, alias: &'static str, service_account: &'static str, start: fn(&Context)) -> Descriptor {
    Descriptor { name, alias, off_by_default: false, service_account: Some(service_account), start }
}

/// One that runs only when it is named.
const fn off(
    name: &'static str,
    alias: &'static str,
    service_account: &'static str,
    start: fn(&Context),
) -> Descriptor {
    Descriptor { off_by_default: true, ..on(name, alias, service_account, start) }
}

/// In the order of starting: what others wait for comes first.
pub const ALL: &[Descriptor] = &[
    on("serviceaccount-controller", "serviceaccount", "service-account-controller", service_account::start),
    on("root-ca-certificate-publisher-controller", "root-ca-cert-publisher", "root-ca-cert-publisher", root_ca::start),
    Descriptor {
        service_account: None,
        ..on("serviceaccount-token-controller", "serviceaccount-token", "", service_account_tokens::start)
    },
    on(
        "legacy-serviceaccount-token-cleaner-controller",
        "legacy-service-account-token-cleaner",
        "legacy-service-account-token-cleaner",
        legacy_tokens::start,
    ),
    on("node-ipam-controller", "nodeipam", "node-controller", node_ipam::start),
    on("node-lifecycle-controller", "nodelifecycle", "node-controller", node_lifecycle::start),
    on("ttl-controller", "ttl", "ttl-controller", ttl::start),
    on("taint-eviction-controller", "taint-eviction-controller", "node-controller", taint_eviction::start),
    on("replicaset-controller", "replicaset", "replicaset-controller", replicas::start_replica_sets),
    on(
        "replicationcontroller-controller",
        "replicationcontroller",
        "replication-controller",
        replicas::start_replication_controllers,
    ),
    on("deployment-controller", "deployment", "deployment-controller", deployment::start),
    on("endpoints-controller", "endpoint", "endpoint-controller", endpoints::start),
    on("endpointslice-controller", "endpointslice", "endpointslice-controller", endpoint_slices::start),
    on("daemonset-controller", "daemonset", "daemon-set-controller", daemon_set::start),
    on("statefulset-controller", "statefulset", "statefulset-controller", stateful_set::start),
    on("job-controller", "job", "job-controller", job::start),
    on("cronjob-controller", "cronjob", "cronjob-controller", cron_job::start),
    on(
        "ttl-after-finished-controller",
        "ttl-after-finished",
        "ttl-after-finished-controller",
        ttl_after_finished::start,
    ),
    on(
        "endpointslice-mirroring-controller",
        "endpointslicemirroring",
        "endpointslicemirroring-controller",
        endpoint_slice_mirroring::start,
    ),
    on(
        "horizontal-pod-autoscaler-controller",
        "horizontalpodautoscaling",
        "horizontal-pod-autoscaler",
        autoscaler::start,
    ),
    on("disruption-controller", "disruption", "disruption-controller", disruption::start),
    on("resourceclaim-controller", "resource-claim-controller", "resource-claim-controller", resource_claims::start),
    on("resourcequota-controller", "resourcequota", "resourcequota-controller", resource_quota::start),
    on(
        "clusterrole-aggregation-controller",
        "clusterrole-aggregation",
        "clusterrole-aggregation-controller",
        cluster_role_aggregation::start,
    ),
    on(
        "certificatesigningrequest-approving-controller",
        "csrapproving",
        "certificate-controller",
        certificates::start_approver,
    ),
    on(
        "certificatesigningrequest-signing-controller",
        "csrsigning",
        "certificate-controller",
        certificates::start_signer,
    ),
    on(
        "certificatesigningrequest-cleaner-controller",
        "csrcleaner",
        "certificate-controller",
        certificates::start_cleaner,
    ),
    on(
        "podcertificaterequest-cleaner-controller",
        "podcertificaterequest-cleaner-controller",
        "podcertificaterequestcleaner",
        certificates::start_pod_cleaner,
    ),
    on(
        "kube-apiserver-serving-clustertrustbundle-publisher-controller",
        "kube-apiserver-serving-clustertrustbundle-publisher-controller",
        "kube-apiserver-serving-clustertrustbundle-publisher",
        trust_bundle::start,
    ),
    off("bootstrap-signer-controller", "bootstrapsigner", "bootstrap-signer", bootstrap::start_signer),
    off("token-cleaner-controller", "tokencleaner", "token-cleaner", bootstrap::start_cleaner),
    on(
        "persistentvolume-binder-controller",
        "persistentvolume-binder",
        "persistent-volume-binder",
        volume_binder::start,
    ),
    on("persistentvolume-attach-detach-controller", "attachdetach", "attachdetach-controller", attach_detach::start),
    on(
        "persistentvolume-expander-controller",
        "persistentvolume-expander",
        "expand-controller",
        volume_expander::start,
    ),
    on("ephemeral-volume-controller", "ephemeral-volume", "ephemeral-volume-controller", ephemeral_volume::start),
    on(
        "persistentvolumeclaim-protection-controller",
        "pvc-protection",
        "pvc-protection-controller",
        volume_protection::start_claims,
    ),
    on(
        "persistentvolume-protection-controller",
        "pv-protection",
        "pv-protection-controller",
        volume_protection::start_volumes,
    ),
    on(
        "volumeattributesclass-protection-controller",
        "volumeattributesclass-protection",
        "volumeattributesclass-protection-controller",
        volume_protection::start_classes,
    ),
    // Upstream's newer controllers have no older alias: theirs is their name.
    on("service-cidr-controller", "service-cidr-controller", "service-cidrs-controller", service_cidr::start),
    on("namespace-controller", "namespace", "namespace-controller", namespace::start),
    on("pod-garbage-collector-controller", "podgc", "pod-garbage-collector", pod_gc::start),
    on("garbage-collector-controller", "garbagecollector", "generic-garbage-collector", crate::gc::start),
];

/// The config maps whose contents some controller reads.
pub const READ_CONFIG_MAPS: &[&str] = &[root_ca::CONFIG_MAP, "cluster-info", legacy_tokens::TRACKING];

/// The types of secrets whose contents some controller reads.
pub const READ_SECRET_TYPES: &[&str] = &["kubernetes.io/service-account-token", bootstrap::SECRET_TYPE];
