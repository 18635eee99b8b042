//! The counts that a stateful set reports, and when an update counts as complete.

use apimachinery::controller::Write;
use k8s_openapi::api::apps::v1::{StatefulSet, StatefulSetStatus};

use super::Look;
use crate::common::{is_deleted, pods};

impl Look<'_> {
    pub fn report(&mut self) {
        let kept = self.set.status.clone().unwrap_or_default();
        let mut status = StatefulSetStatus {
            observed_generation: self.set.metadata.generation,
            collision_count: Some(kept.collision_count.unwrap_or(0)),
            conditions: kept.conditions,
            update_revision: Some(self.update_revision().to_owned()),
            ..StatefulSetStatus::default()
        };
        let (mut ready, mut available, mut current, mut updated) = (0, 0, 0, 0);
        let mut pauses = Vec::new();
        for pod in self.pods.values() {
            status.replicas += 1;
            if pods::phase(pod) == "Running" && pods::is_ready(pod) {
                ready += 1;
                match pods::availability(pod, self.set.spec.min_ready_seconds.unwrap_or(0), self.now) {
                    Ok(()) => available += 1,
                    Err(wait) => pauses.extend(wait),
                }
            }
            if !is_deleted(&pod.metadata) {
                current += i32::from(self.revision_of(pod) == self.current_revision);
                updated += i32::from(self.revision_of(pod) == self.update_revision());
            }
        }
        for wait in pauses {
            self.plan.again_after(wait);
        }
        let rolls = self.set.spec.update_strategy.as_ref().and_then(|s| s.type_.as_deref()) != Some("OnDelete");
        let mut current_revision = self.current_revision.clone();
        if rolls && updated == status.replicas && ready == status.replicas && status.replicas == self.replicas() {
            current_revision = self.update_revision().to_owned();
            current = updated;
        }
        let non_zero = |n: i32| (n != 0).then_some(n);
        status.current_revision = Some(current_revision);
        status.ready_replicas = non_zero(ready);
        status.available_replicas = Some(available);
        status.current_replicas = non_zero(current);
        status.updated_replicas = non_zero(updated);
        let next = StatefulSet { status: Some(status), ..self.set.clone() };
        self.plan.writes.extend(Write::status(self.set, &next));
    }
}
