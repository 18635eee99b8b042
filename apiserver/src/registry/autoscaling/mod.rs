//! The `autoscaling` group.

pub mod conversion;
pub mod horizontal_pod_autoscaler;
mod metrics;
