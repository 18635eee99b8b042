//! flanneld: gives every node a subnet of the pod network and connects the subnets.
//!
//! Two traits carry the design. A [`subnet::SubnetManager`] owns the leases (which node has which subnet) in etcd or
//! in the Kubernetes API; a [`backend::Backend`] turns the set of leases into the data plane that this node should
//! have. [`backend::DataPlane`] is a plain value: what is wanted is compared with what the kernel has, and only
//! [`netlink`] changes the kernel. Nothing is taken down when the daemon stops, so pods keep talking through a restart.
//!
//! The way of a change: lease event → [`lease::LeaseSet`] → `Backend::plan` → `DataPlane` → `changes` → kernel.

pub mod backend;
pub mod cni;
pub mod daemon;
pub mod interface;
pub mod lease;
pub mod masquerade;
pub mod netlink;
pub mod network;
pub mod options;
pub mod subnet;
