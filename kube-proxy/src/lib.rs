//! kube-proxy: makes the addresses of services lead to their endpoints.
//!
//! It is a compiler. [`informers`] keeps a small [`model`] of services, endpoint slices and this node, and which services
//! changed; [`plan`] decides which endpoints each service port uses here (traffic policies, topology, terminating
//! endpoints); a backend turns the plans into what the kernel should have and applies the difference in one transaction
//! ([`nftables`]: elements of maps, over netlink; [`iptables`]: chains, by `iptables-restore`); [`conntrack`] makes the
//! kernel forget UDP connections to endpoints that left. [`proxy`] puts them together.
//!
//! It never carries packets itself, never touches tables of others, and takes nothing down when it stops.

pub mod config;
pub mod conntrack;
pub mod health;
pub mod host;
pub mod http_server;
pub mod informers;
pub mod iptables;
pub mod metrics;
pub mod model;
pub mod netlink;
pub mod nftables;
pub mod plan;
pub mod proxy;
