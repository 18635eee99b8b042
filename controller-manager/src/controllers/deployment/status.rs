//! What a deployment reports: counts, availability, progress, and when to look again because progress may be overdue.

use k8s_openapi::api::apps::v1::{DeploymentStatus, ReplicaSet};

use super::Rollout;
use super::conditions::{self, AVAILABLE, PROGRESSING, Progress, REPLICA_FAILURE};
use super::replica_sets::available;
use crate::common::{after, elapsed, name, seconds};

fn non_zero(n: i32) -> Option<i32> {
    (n != 0).then_some(n)
}

impl Rollout<'_> {
    pub fn has_deadline(&self) -> bool {
        self.spec.progress_deadline_seconds.is_some_and(|deadline| deadline != i32::MAX)
    }

    pub fn set_progress(&mut self, progress: Progress, message: String) {
        conditions::set_progress(&mut self.next, progress, message, self.now);
    }

    /// Pausing stops the clock of the progress deadline, resuming starts it anew.
    pub fn note_pause(&mut self) {
        if !self.has_deadline() {
            return;
        }
        let reason = conditions::find(&self.next, PROGRESSING).and_then(|c| c.reason.clone());
        if reason.as_deref() == Some(Progress::DeadlineExceeded.reason()) {
            return;
        }
        let was_paused = reason.as_deref() == Some(Progress::DeploymentPaused.reason());
        let paused = self.spec.paused == Some(true);
        if paused && !was_paused {
            self.set_progress(Progress::DeploymentPaused, "Deployment is paused".to_owned());
        } else if !paused && was_paused {
            self.set_progress(Progress::DeploymentResumed, "Deployment is resumed".to_owned());
        }
    }

    fn sum(&self, count: impl Fn(&ReplicaSet) -> Option<i32>) -> i32 {
        self.sets.all().map(|set| count(set).unwrap_or(0)).sum()
    }

    fn counts(&self) -> DeploymentStatus {
        let available = self.sum(|set| Some(available(set)));
        let new = self.sets.new.as_ref().and_then(|new| new.status.as_ref());
        let kept = self.next.status.as_ref();
        let terminating =
            self.sets.all().filter_map(|set| set.status.as_ref()?.terminating_replicas).reduce(|a, b| a + b);
        DeploymentStatus {
            observed_generation: self.deployment.metadata.generation,
            replicas: non_zero(self.sum(|set| Some(set.status.as_ref()?.replicas))),
            updated_replicas: non_zero(new.map_or(0, |status| status.replicas)),
            ready_replicas: non_zero(self.sum(|set| set.status.as_ref()?.ready_replicas)),
            available_replicas: non_zero(available),
            unavailable_replicas: non_zero((self.sets.total() - available).max(0)),
            terminating_replicas: terminating,
            collision_count: kept.and_then(|status| status.collision_count),
            conditions: kept.and_then(|status| status.conditions.clone()),
        }
    }

    /// All replicas are of the new template, available, and nothing else is left.
    pub fn is_complete(&self) -> bool {
        let status = self.counts();
        let wanted = non_zero(self.wanted());
        status.updated_replicas == wanted
            && status.replicas == wanted
            && status.available_replicas == wanted
            && self.sets.sizes.is_empty()
    }

    /// Writes counts and conditions into the next status.
    pub fn report(&mut self) {
        let mut status = self.counts();
        // A list that was never there stays away.
        status.conditions.take_if(|conditions| conditions.is_empty());
        self.next.status = Some(status);
        self.report_availability();
        self.report_progress();
        self.report_failure();
    }

    fn report_availability(&mut self) {
        let available = self.next.status.as_ref().and_then(|status| status.available_replicas).unwrap_or(0);
        let (status, reason, message) = if available >= self.wanted() - self.max_unavailable() {
            ("True", "MinimumReplicasAvailable", "Deployment has minimum availability.")
        } else {
            ("False", "MinimumReplicasUnavailable", "Deployment does not have minimum availability.")
        };
        conditions::set(&mut self.next, AVAILABLE, status, reason, message.to_owned(), self.now);
    }

    fn report_progress(&mut self) {
        if !self.has_deadline() {
            conditions::remove(&mut self.next, PROGRESSING);
            return;
        }
        let status = self.next.status.clone().unwrap_or_default();
        let reason = conditions::find(&self.next, PROGRESSING).and_then(|c| c.reason.clone());
        let was_complete = reason.as_deref() == Some(Progress::NewReplicaSetAvailable.reason());
        if status.replicas == status.updated_replicas && was_complete {
            return;
        }
        let subject = match &self.sets.new {
            Some(new) => format!("ReplicaSet \"{}\"", name(&new.metadata)),
            None => format!("Deployment \"{}\"", name(&self.deployment.metadata)),
        };
        if self.is_complete() {
            self.set_progress(Progress::NewReplicaSetAvailable, format!("{subject} has successfully progressed."));
        } else if self.has_moved(&status) {
            let message = format!("{subject} is progressing.");
            conditions::renew_progress(&mut self.next, Progress::ReplicaSetUpdated, message, self.now);
        } else if self.is_overdue() {
            self.set_progress(Progress::DeadlineExceeded, format!("{subject} has timed out progressing."));
        }
    }

    /// Whether the counts are nearer to the goal than those last reported.
    fn has_moved(&self, status: &DeploymentStatus) -> bool {
        let old = self.deployment.status.clone().unwrap_or_default();
        let of = |count: Option<i32>| count.unwrap_or(0);
        let outdated = |status: &DeploymentStatus| of(status.replicas) - of(status.updated_replicas);
        of(status.updated_replicas) > of(old.updated_replicas)
            || outdated(status) < outdated(&old)
            || of(status.ready_replicas) > of(old.ready_replicas)
            || of(status.available_replicas) > of(old.available_replicas)
    }

    /// Whether nothing has moved for the deadline; if it is not that late yet, asks to look again in time.
    fn is_overdue(&mut self) -> bool {
        let Some(condition) = conditions::find(&self.next, PROGRESSING) else { return false };
        let reason = condition.reason.as_deref().unwrap_or("");
        if reason == Progress::DeadlineExceeded.reason() {
            return true;
        }
        let idle = [Progress::NewReplicaSetAvailable, Progress::DeploymentPaused].iter().any(|p| p.reason() == reason);
        let Some(updated) = condition.last_update_time.as_ref().filter(|_| !idle) else { return false };
        let due = after(updated.0, seconds(self.spec.progress_deadline_seconds.unwrap_or(0)));
        if due < self.now {
            return true;
        }
        // One second more, as the API's times have whole seconds.
        self.plan.again_after(elapsed(self.now, due) + seconds(1));
        false
    }

    fn report_failure(&mut self) {
        let newest_first = self.sets.new.iter().chain(self.sets.old.iter().rev());
        let failure = newest_first
            .filter_map(|set| {
                set.status.as_ref()?.conditions.as_ref()?.iter().find(|c| c.type_.as_deref() == Some(REPLICA_FAILURE))
            })
            .next()
            .cloned();
        match failure {
            Some(failure) => conditions::set(
                &mut self.next,
                REPLICA_FAILURE,
                failure.status.as_deref().unwrap_or("True"),
                &failure.reason.unwrap_or_default(),
                failure.message.unwrap_or_default(),
                self.now,
            ),
            None => conditions::remove(&mut self.next, REPLICA_FAILURE),
        }
    }
}
