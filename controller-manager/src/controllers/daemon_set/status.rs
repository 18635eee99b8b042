//! The counts that a daemon set reports.

use apimachinery::controller::Write;
use k8s_openapi::api::apps::v1::{DaemonSet, DaemonSetStatus};

use super::Look;
use crate::common::{is_deleted, name, pods};

impl Look<'_> {
    pub fn report(&mut self) {
        let kept = self.set.status.clone();
        let mut status = DaemonSetStatus {
            observed_generation: self.set.metadata.generation,
            collision_count: kept.as_ref().and_then(|status| status.collision_count),
            conditions: kept.and_then(|status| status.conditions),
            ..DaemonSetStatus::default()
        };
        let (mut updated, mut available) = (0, 0);
        let min_ready = self.set.spec.min_ready_seconds.unwrap_or(0);
        for (node, placement) in &self.nodes {
            let mut living: Vec<_> =
                self.on_node(name(&node.metadata)).iter().filter(|pod| !is_deleted(&pod.metadata)).collect();
            if !placement.may_run {
                status.number_misscheduled += i32::from(!living.is_empty());
                continue;
            }
            status.desired_number_scheduled += 1;
            // Of several pods the oldest one is the node's.
            living.sort_by_key(|pod| (pod.metadata.creation_timestamp.clone(), name(&pod.metadata).to_owned()));
            let Some(pod) = living.first() else { continue };
            status.current_number_scheduled += 1;
            status.number_ready += i32::from(pods::is_ready(pod));
            updated += i32::from(self.is_current(pod));
            match pods::availability(pod, min_ready, self.now) {
                Ok(()) => available += 1,
                Err(Some(wait)) => {
                    self.plan.again_after(wait);
                }
                Err(None) => {}
            }
        }
        let non_zero = |n: i32| (n != 0).then_some(n);
        status.updated_number_scheduled = non_zero(updated);
        status.number_available = non_zero(available);
        status.number_unavailable = non_zero(status.desired_number_scheduled - available);
        let next = DaemonSet { status: Some(status), ..self.set.clone() };
        self.plan.writes.extend(Write::status(self.set, &next));
    }
}
