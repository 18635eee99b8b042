//! flanneld: gives every node a subnet of the pod network and connects the subnets.
//!
//! Two traits carry the design. A [`subnet::SubnetManager`] owns the leases (which node has which subnets) in etcd or
//! in the Kubernetes API; a [`backend::Backend`] turns the set of leases into the data plane that this node should
//! have. [`backend::DataPlane`] is a plain value: what is wanted is compared with what there is, and only [`kernel`]
//! (and, for the udp backend, [`tunnel`]) changes it. Nothing is taken down when the daemon stops, so pods keep talking
//! through a restart.
//!
//! The way of a change: lease event → [`lease::LeaseSet`] → `Backend::plan` → `DataPlane` → `changes` → [`reconcile`].

pub mod backend;
pub mod cni;
pub mod commands;
pub mod daemon;
pub mod family;
pub mod interface;
pub mod kernel;
pub mod keys;
pub mod lease;
pub mod mac;
pub mod masquerade;
pub mod network;
mod node;
pub mod options;
pub mod reconcile;
pub mod subnet;
pub mod tunnel;
