//! kube-proxy: makes the addresses of services lead to their endpoints.
//!
//! It is a compiler. [`informers`] keeps a small [`model`] of services, endpoint slices and this node; [`plan`] decides
//! which endpoints each service port uses here (traffic policies, topology, terminating endpoints); a backend compiles
//! the plan ([`nftables`]: a rule set of maps and chains; [`iptables`]: a restore script), compares it with what it
//! installed last, and [`kernel`] applies the difference in one transaction. Everything but `kernel` is pure.
//!
//! It never carries packets itself, never touches tables of others, and takes nothing down when it stops.

pub mod config;
pub mod conntrack;
pub mod health;
pub mod http_server;
pub mod informers;
pub mod iptables;
pub mod kernel;
pub mod model;
pub mod nftables;
pub mod plan;
pub mod proxy;
