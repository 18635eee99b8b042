//! The node agent: runs the pods bound to its node through a CRI container runtime, reports what became of them, and
//! keeps the node object and its lease fresh.
//!
//! A pod is one small actor around a pure function: `pod::plan` compares what is desired with what the runtime
//! reports and answers with actions. Everything that the node changes is found again from the pod's uid, so a
//! restarted kubelet adopts what runs and cleans up what should not.
//!
//! Never: state of its own on disk beyond the pods' volumes, a container restarted because the kubelet was.

pub mod app;
pub mod certificates;
pub mod cgroups;
pub mod config;
pub mod cri;
pub mod devices;
pub mod directory_watch;
pub mod dns;
pub mod dra;
pub mod events;
pub mod eviction;
pub mod grpc;
pub mod housekeeping;
pub mod images;
pub mod locks;
pub mod node;
pub mod objects;
pub mod plugins;
pub mod pod;
pub mod pod_resources;
pub mod probes;
pub mod server;
pub mod shutdown;
pub mod state;
pub mod streaming;
#[cfg(test)]
mod testing;
pub mod volumes;
pub mod watches;
