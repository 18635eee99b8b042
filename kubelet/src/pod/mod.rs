//! Pods on this node: what they should be, what the runtime says they are, and the actor per pod that brings the two
//! together. All policy is in [`plan`] and [`status`], which are pure.

pub mod admission;
mod api;
mod conditions;
pub mod config;
pub mod context;
pub mod downward;
pub mod env;
mod hooks;
mod log_files;
mod mailbox;
pub mod manager;
pub mod observed;
pub mod plan;
pub mod qos;
mod reporter;
pub mod run;
pub mod services;
mod static_pods;
pub mod status;
pub mod status_patch;
mod termination;
pub mod worker;

use k8s_openapi::api::core::v1::Pod;

/// Annotations between static pods, their mirror objects and other sources of pods.
pub mod annotations {
    pub const MIRROR: &str = "kubernetes.io/config.mirror";
    pub const HASH: &str = "kubernetes.io/config.hash";
    pub const SOURCE: &str = "kubernetes.io/config.source";
    pub const SEEN: &str = "kubernetes.io/config.seen";
}

pub fn annotation<'a>(pod: &'a Pod, key: &str) -> Option<&'a str> {
    pod.metadata.annotations.as_ref()?.get(key).map(String::as_str)
}

/// The uid that names the pod on this node: of the static pod for a mirror pod, of the object otherwise.
pub fn runtime_uid(pod: &Pod) -> &str {
    annotation(pod, annotations::MIRROR).or(pod.metadata.uid.as_deref()).unwrap_or_default()
}

/// A pod that came from a file on this node (or the API's mirror of one).
pub fn is_static(pod: &Pod) -> bool {
    annotation(pod, annotations::SOURCE).is_some_and(|source| source != "api")
}
