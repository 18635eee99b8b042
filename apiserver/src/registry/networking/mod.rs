//! The `networking.k8s.io` group.

pub mod address;
pub mod ingress;
pub mod network_policy;
