//! The nftables backend: one table for each address family, whose rules stay the same while services come and go.
//!
//! Upstream has a chain for each service and for each endpoint. Here services and endpoints are elements of maps, and
//! there is one chain for each *way of treating* a service (a class): by its number of endpoints, traffic policy and
//! affinity. A new connection to 10.96.0.1:80, which has two endpoints, meets
//!
//! ```text
//! nat-prerouting → services:
//!   ip daddr . meta l4proto . th dport                            vmap @services
//!      { 10.96.0.1 . tcp . 80 : goto address-cluster-2, … }
//! address-cluster-2, for all services that have two endpoints:
//!   dnat to ip daddr . meta l4proto . th dport . numgen random mod 2 map @cluster-endpoints
//!      { 10.96.0.1 . tcp . 80 . 0 : 10.244.1.5 . 8080, 10.96.0.1 . tcp . 80 . 1 : 10.244.2.7 . 8080, … }
//! ```
//!
//! So a change of endpoints is a few elements in the kernel, whatever the size of the table; and the kernel, which
//! checks all chains for loops whenever a jump is added, has a few dozen chains to check instead of 100,000.
//!
//! A packet meets, in this order: `firewall-check` (source ranges of load balancers), `services`, the class's chain; in
//! the filter hooks `service-endpoints-check`, `nodeport-endpoints-check` for services that nobody serves, and
//! `cluster-ips-check` for ports that do not exist; and on the way out `masquerading`.
//!
//! [`schema`] says what the sets hold, [`chains`] what the rules are, [`table`] turns plans into operations and keeps who
//! owns what, [`wire`] and [`installed`] are the netlink side, and [`backend`] puts them together behind [`Kernel`].

mod backend;
mod chains;
mod installed;
mod rule;
mod schema;
mod table;
mod wire;

#[cfg(test)]
mod fake;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod trace;

pub use backend::{Backend, BackendError, Kernel};
pub use chains::{LocalTraffic, Settings};
pub use wire::{KernelError, NetlinkKernel};

/// The name of our tables, as upstream's.
pub const TABLE: &str = "kube-proxy";

/// Removes our tables.
pub fn remove(kernel: &mut impl Kernel) -> Result<(), KernelError> {
    for family in crate::model::Family::ALL {
        if kernel.read(family)?.is_some() {
            kernel.apply(family, &[table::Op::RemoveTable])?;
        }
    }
    Ok(())
}
