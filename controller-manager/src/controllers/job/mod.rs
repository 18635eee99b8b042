//! Runs pods until enough of them have succeeded: jobs, plain and indexed, with limits on failures and time.
//!
//! Every pod is counted exactly once (see `tally`). A job that ends first gets a condition that says so, then its last
//! pods go, then it is Complete or Failed.

mod indexes;
mod policy;
mod tally;
#[cfg(test)]
mod tests;
mod work;

use std::sync::Arc;

use apimachinery::controller::{
    Controller, EventType, Informer, ObjectKey, Plan, Write, controller_of, object_reference,
};
use jiff::Timestamp;
use k8s_openapi::api::batch::v1::{Job, JobCondition, JobSpec};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use self::tally::{Tally, has_finalizer, is_indexed, remove_finalizer, tally};
use crate::app::Context;
use crate::common::adoption::claim;
use crate::common::selector::Selector;
use crate::common::{after, elapsed, is_deleted, pods, seconds, uid};

const US: &str = "kubernetes.io/job-controller";
const COMPLETE: &str = "Complete";
const FAILED: &str = "Failed";
const SUSPENDED: &str = "Suspended";
/// Conditions that announce the end while the last pods go.
const SUCCESS_AHEAD: &str = "SuccessCriteriaMet";
const FAILURE_AHEAD: &str = "FailureTarget";

struct JobController {
    jobs: Arc<Informer<Job>>,
    pods: Arc<Informer<Pod>>,
}

pub fn start(context: &Context) {
    let informers = context.driver.informers();
    let controller = JobController { jobs: informers.of(), pods: informers.of() };
    context.driver.run(controller, 5, |controller, wiring| {
        wiring.primary(&controller.jobs);
        wiring.owned::<Pod, Job>(&controller.pods);
    });
}

/// The time of the condition that says that the job has ended.
pub fn finished_at(job: &Job) -> Option<Timestamp> {
    let ended = [COMPLETE, FAILED].iter().find_map(|type_| condition(job, type_))?;
    ended.last_transition_time.as_ref().map(|time| time.0)
}

pub fn condition<'a>(job: &'a Job, type_: &str) -> Option<&'a JobCondition> {
    let conditions = job.status.as_ref()?.conditions.as_ref()?;
    conditions.iter().find(|condition| condition.type_ == type_ && condition.status == "True")
}

/// One look at a job.
struct Look<'a> {
    job: &'a Job,
    spec: &'a JobSpec,
    tally: Tally,
    pods: Vec<Arc<Pod>>,
    now: Timestamp,
    plan: Plan,
    /// Deletions and creations, which follow the status.
    work: Vec<Write>,
}

impl Controller for JobController {
    fn name(&self) -> &'static str {
        "job"
    }

    fn component(&self) -> &'static str {
        "job-controller"
    }

    fn reconcile(&self, key: &ObjectKey, now: Timestamp) -> Plan {
        let Some(job) = self.jobs.get(key) else { return self.release_orphans(key) };
        let Some(spec) = &job.spec else { return Plan::nothing() };
        if spec.managed_by.as_deref().is_some_and(|manager| manager != US) {
            return Plan::nothing();
        }
        let mut candidates = self.pods.owned_by(uid(&job.metadata));
        let namespaced = self.pods.in_namespace(&key.namespace);
        candidates.extend(namespaced.into_iter().filter(|pod| controller_of(&pod.metadata).is_none()));
        let claim = claim(job.as_ref(), &Selector::of(spec.selector.as_ref()), candidates);
        if finished_at(&job).is_some() {
            let writes = claim.mine.iter().filter(|pod| has_finalizer(pod)).map(|pod| remove_finalizer(pod)).collect();
            return Plan { writes, ..Plan::default() };
        }
        let mut look = Look {
            job: &job,
            spec,
            tally: tally(&job, spec, &claim.mine),
            pods: claim.mine,
            now,
            plan: Plan { writes: claim.writes, ..Plan::default() },
            work: Vec::new(),
        };
        look.decide();
        look.finish()
    }
}

impl JobController {
    /// Pods of a job that is gone must not be held by its finalizer.
    fn release_orphans(&self, key: &ObjectKey) -> Plan {
        let pods = self.pods.in_namespace(&key.namespace);
        let orphans = pods.iter().filter(|pod| {
            has_finalizer(pod)
                && controller_of(&pod.metadata).is_some_and(|owner| owner.kind == "Job" && owner.name == key.name)
        });
        Plan { writes: orphans.map(|pod| remove_finalizer(pod)).collect(), ..Plan::default() }
    }
}

impl Look<'_> {
    fn decide(&mut self) {
        if is_deleted(&self.job.metadata) {
            return;
        }
        self.note_suspension();
        if self.spec.suspend != Some(true) && self.tally.status.start_time.is_none() {
            self.tally.status.start_time = Some(Time(self.now));
        }
        self.announce_end();
        if self.has(SUCCESS_AHEAD) || self.has(FAILURE_AHEAD) {
            self.delete_active();
            self.end();
        } else if self.spec.suspend == Some(true) {
            self.stop_active();
        } else {
            self.adjust_pods();
        }
    }

    fn has(&self, type_: &str) -> bool {
        self.find(type_).is_some()
    }

    fn find(&self, type_: &str) -> Option<&JobCondition> {
        let conditions = self.tally.status.conditions.as_ref()?;
        conditions.iter().find(|condition| condition.type_ == type_ && condition.status == "True")
    }

    fn set(&mut self, type_: &str, status: &str, reason: &str, message: &str) {
        let conditions = self.tally.status.conditions.get_or_insert_default();
        conditions.retain(|condition| condition.type_ != type_);
        conditions.push(JobCondition {
            type_: type_.to_owned(),
            status: status.to_owned(),
            reason: Some(reason.to_owned()),
            message: Some(message.to_owned()),
            last_probe_time: Some(Time(self.now)),
            last_transition_time: Some(Time(self.now)),
        });
    }

    fn event(&mut self, type_: EventType, reason: &str, message: &str) {
        self.plan.event(object_reference(self.job), type_, reason, message.to_owned());
    }

    fn note_suspension(&mut self) {
        let was = self.has(SUSPENDED);
        if self.spec.suspend == Some(true) && !was {
            self.set(SUSPENDED, "True", "JobSuspended", "Job suspended");
            self.tally.status.start_time = None;
            self.event(EventType::Normal, "Suspended", "Job suspended");
        } else if self.spec.suspend != Some(true) && was {
            self.set(SUSPENDED, "False", "JobResumed", "Job resumed");
            self.tally.status.start_time = Some(Time(self.now));
            self.event(EventType::Normal, "Resumed", "Job resumed");
        }
    }

    /// Says that the job is about to end, once something has decided it.
    fn announce_end(&mut self) {
        if self.has(SUCCESS_AHEAD) || self.has(FAILURE_AHEAD) {
            return;
        }
        if let Some((reason, message)) = self.failure() {
            self.set(FAILURE_AHEAD, "True", reason, &message);
        } else if let Some(message) = policy::success(self.spec, &self.tally.completed) {
            self.set(SUCCESS_AHEAD, "True", "SuccessPolicy", &message);
        } else if self.is_satisfied() {
            self.set(SUCCESS_AHEAD, "True", "CompletionsReached", "Reached expected number of succeeded pods");
        }
    }

    fn failure(&mut self) -> Option<(&'static str, String)> {
        if let Some(why) = self.tally.fail_job.clone() {
            return Some(("PodFailurePolicy", why));
        }
        if self.exceeds_backoff_limit() {
            return Some(("BackoffLimitExceeded", "Job has reached the specified backoff limit".to_owned()));
        }
        if self.is_overdue() {
            return Some(("DeadlineExceeded", "Job was active longer than specified deadline".to_owned()));
        }
        let failed_indexes = self.tally.failed_indexes.len();
        if self.spec.max_failed_indexes.is_some_and(|max| failed_indexes > max) {
            let message = "Job has exceeded the specified maximal number of failed indexes";
            return Some(("MaxFailedIndexesExceeded", message.to_owned()));
        }
        let decided = failed_indexes + self.tally.completed.len() >= self.spec.completions.unwrap_or(i32::MAX);
        (is_indexed(self.spec) && failed_indexes > 0 && decided)
            .then(|| ("FailedIndexes", "Job has failed indexes".to_owned()))
    }

    fn exceeds_backoff_limit(&self) -> bool {
        // With a limit per index, the limit for the whole job is without bound unless set.
        let default = if self.spec.backoff_limit_per_index.is_some() { i32::MAX } else { 6 };
        let limit = self.spec.backoff_limit.unwrap_or(default);
        if self.tally.failed > limit {
            return true;
        }
        let restart_policy = self.spec.template.spec.as_ref().and_then(|spec| spec.restart_policy.as_deref());
        if restart_policy != Some("OnFailure") {
            return false;
        }
        let statuses = self.tally.active.iter().filter_map(|pod| pod.status.as_ref()).flat_map(|status| {
            status.init_container_statuses.iter().flatten().chain(status.container_statuses.iter().flatten())
        });
        let restarts = statuses.fold(0i32, |sum, status| sum.saturating_add(status.restart_count));
        if limit == 0 { restarts > 0 } else { restarts >= limit }
    }

    fn is_overdue(&mut self) -> bool {
        let (Some(limit), Some(started)) = (self.spec.active_deadline_seconds, &self.tally.status.start_time) else {
            return false;
        };
        if self.spec.suspend == Some(true) {
            return false;
        }
        let due = after(started.0, seconds(limit));
        if due <= self.now {
            return true;
        }
        self.plan.again_after(elapsed(self.now, due));
        false
    }

    fn is_satisfied(&self) -> bool {
        match self.spec.completions {
            Some(completions) => self.tally.succeeded >= completions,
            // A job without a number is done when one pod has succeeded and all others have ended.
            None => self.tally.succeeded > 0 && self.tally.active.is_empty(),
        }
    }

    /// The last step, once no pod is left that could still count.
    fn end(&mut self) {
        if !self.tally.active.is_empty() || self.tally.terminating > 0 || !self.tally.is_all_counted() {
            return;
        }
        if let Some(failure) = self.find(FAILURE_AHEAD).cloned() {
            let (reason, message) = (failure.reason.unwrap_or_default(), failure.message.unwrap_or_default());
            self.set(FAILED, "True", &reason, &message);
            self.event(EventType::Warning, &reason, &message);
        } else if let Some(success) = self.find(SUCCESS_AHEAD).cloned() {
            let (reason, message) = (success.reason.unwrap_or_default(), success.message.unwrap_or_default());
            self.set(COMPLETE, "True", &reason, &message);
            self.tally.status.completion_time = Some(Time(self.now));
            self.event(EventType::Normal, "Completed", "Job completed");
        }
    }

    fn finish(mut self) -> Plan {
        let count = |n: usize| i32::try_from(n).ok().filter(|n| *n > 0);
        let ready = self.tally.active.iter().filter(|pod| pods::is_ready(pod)).count();
        let status = &mut self.tally.status;
        status.active = count(self.tally.active.len());
        status.ready = Some(i32::try_from(ready).unwrap_or(i32::MAX));
        status.terminating = Some(self.tally.terminating);
        let next = Job { status: Some(self.tally.status.clone()), ..self.job.clone() };
        self.plan.writes.extend(Write::status(self.job, &next));
        self.plan.writes.append(&mut self.tally.removals);
        self.plan.writes.append(&mut self.work);
        self.plan
    }
}
