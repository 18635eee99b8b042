//! kube-scheduler: chooses a node for every pod that has none.
//!
//! The way of a pod: [`queue`] (waits until something could make it fit) → [`cycle`] (filters and scores every node of
//! one immutable [`cache::Snapshot`], by the [`plugins`]) → assumed in the [`cache`] → bound in the background. When no
//! node fits, [`preemption`] looks for pods of lower priority to end, and the pod goes back to the queue together with
//! the names of the plugins that rejected it, so that only events which these plugins care about wake it again.
//!
//! Plugins see the snapshot and nothing else; nobody but [`scheduler`] writes to the API server.

pub mod cache;
pub mod cycle;
pub mod framework;
pub mod options;
pub mod plugins;
pub mod pod_info;
pub mod preemption;
pub mod queue;
pub mod resources;
pub mod scheduler;
pub mod selectors;
#[cfg(test)]
mod testing;
