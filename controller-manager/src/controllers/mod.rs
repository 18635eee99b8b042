//! One controller per file. Each says what it watches in `start` and decides in `reconcile`; the table below is the
//! list that `--controllers` selects from.

mod deployment;
mod endpoint_slices;
mod endpoints;
mod namespace;
mod node_ipam;
mod node_lifecycle;
mod pod_gc;
mod replicas;
mod root_ca;
mod service_account;
mod service_endpoints;
mod taint_eviction;

use crate::app::Context;

/// A controller's canonical name, its older alias, and how it is started.
pub struct Descriptor {
    pub name: &'static str,
    pub alias: &'static str,
    /// Runs only when named in `--controllers`, not by `*`.
    pub off_by_default: bool,
    pub start: fn(&Context),
}

const fn on(name: &'static str, alias: &'static str, start: fn(&Context)) -> Descriptor {
    Descriptor { name, alias, off_by_default: false, start }
}

/// In the order of starting: what others wait for comes first.
pub const ALL: &[Descriptor] = &[
    on("serviceaccount-controller", "serviceaccount", service_account::start),
    on("root-ca-certificate-publisher-controller", "root-ca-cert-publisher", root_ca::start),
    on("node-ipam-controller", "nodeipam", node_ipam::start),
    on("node-lifecycle-controller", "nodelifecycle", node_lifecycle::start),
    on("taint-eviction-controller", "taint-eviction-controller", taint_eviction::start),
    on("replicaset-controller", "replicaset", replicas::start_replica_sets),
    on("replicationcontroller-controller", "replicationcontroller", replicas::start_replication_controllers),
    on("deployment-controller", "deployment", deployment::start),
    on("endpoints-controller", "endpoint", endpoints::start),
    on("endpointslice-controller", "endpointslice", endpoint_slices::start),
    on("namespace-controller", "namespace", namespace::start),
    on("pod-garbage-collector-controller", "podgc", pod_gc::start),
    on("garbage-collector-controller", "garbagecollector", crate::gc::start),
];

/// The config maps whose contents some controller reads.
pub const READ_CONFIG_MAPS: &[&str] = &[root_ca::CONFIG_MAP, "cluster-info"];
