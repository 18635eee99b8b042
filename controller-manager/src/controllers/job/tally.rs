//! Counting finished pods exactly once, whatever crashes in between.
//!
//! A pod carries a finalizer until it is counted. First its uid is written to `status.uncountedTerminatedPods`, then
//! the finalizer goes, and once it is seen to be gone the uid is turned into a count. (Succeeded pods of indexed jobs
//! need no such list: their index in `completedIndexes` counts once by itself.)

use std::collections::BTreeSet;
use std::sync::Arc;

use apimachinery::controller::Write;
use k8s_openapi::api::batch::v1::{Job, JobSpec, JobStatus, UncountedTerminatedPods};
use k8s_openapi::api::core::v1::Pod;
use serde_json::json;

use super::indexes::Indexes;
use super::policy::{self, Failure};
use crate::common::{annotation, is_deleted, labels, pods, uid};

pub const FINALIZER: &str = "batch.kubernetes.io/job-tracking";
pub const INDEX: &str = "batch.kubernetes.io/job-completion-index";
pub const INDEX_FAILURES: &str = "batch.kubernetes.io/job-index-failure-count";

/// The state of a job's pods.
pub struct Tally {
    pub active: Vec<Arc<Pod>>,
    /// On their way out, not finished.
    pub terminating: i32,
    pub completed: Indexes,
    pub failed_indexes: Indexes,
    /// All that have succeeded and failed, counted and not.
    pub succeeded: i32,
    pub failed: i32,
    /// Why the pod failure policy ends the job.
    pub fail_job: Option<String>,
    /// Counts and lists for the next status.
    pub status: JobStatus,
    /// To be written after the status: the pods in question are recorded there.
    pub removals: Vec<Write>,
    /// Pods that still have the finalizer, apart from active ones.
    pub pending: usize,
}

pub fn has_finalizer(pod: &Pod) -> bool {
    pod.metadata.finalizers.iter().flatten().any(|finalizer| finalizer == FINALIZER)
}

pub fn index_of(pod: &Pod) -> Option<i32> {
    let text = annotation(&pod.metadata, INDEX).or_else(|| labels(&pod.metadata).get(INDEX).map(String::as_str));
    text?.parse().ok()
}

/// How often the pod's index had failed before this pod.
pub fn earlier_failures(pod: &Pod) -> i32 {
    annotation(&pod.metadata, INDEX_FAILURES).and_then(|text| text.parse().ok()).unwrap_or(0)
}

pub fn is_indexed(spec: &JobSpec) -> bool {
    spec.completion_mode.as_deref() == Some("Indexed")
}

/// Whether the pod counts as failed. A pod that is deleted before it ends has failed too, except where only pods that
/// reached the end may be replaced.
pub fn is_failed(spec: &JobSpec, pod: &Pod) -> bool {
    let wait_for_end = spec.pod_failure_policy.is_some() || spec.pod_replacement_policy.as_deref() == Some("Failed");
    match pods::phase(pod) {
        "Failed" => true,
        "Succeeded" => false,
        _ => is_deleted(&pod.metadata) && !wait_for_end,
    }
}

pub fn remove_finalizer(pod: &Pod) -> Write {
    let kept: Vec<_> = pod.metadata.finalizers.iter().flatten().filter(|finalizer| *finalizer != FINALIZER).collect();
    let meta = json!({"uid": pod.metadata.uid, "resourceVersion": pod.metadata.resource_version, "finalizers": kept});
    Write::merge_patch::<Pod>(apimachinery::controller::ObjectKey::of(&pod.metadata), json!({"metadata": meta}))
}

pub fn tally(job: &Job, spec: &JobSpec, pods: &[Arc<Pod>]) -> Tally {
    let status = job.status.clone().unwrap_or_default();
    let completions = spec.completions.unwrap_or(0);
    let parse = |text: &Option<String>| Indexes::parse(text.as_deref().unwrap_or(""), completions);
    let mut tally = Tally {
        active: pods.iter().filter(|pod| pods::is_active(pod)).cloned().collect(),
        terminating: 0,
        completed: parse(&status.completed_indexes),
        failed_indexes: parse(&status.failed_indexes),
        succeeded: 0,
        failed: 0,
        fail_job: None,
        status,
        removals: Vec::new(),
        pending: 0,
    };
    let terminating = pods.iter().filter(|pod| is_deleted(&pod.metadata) && !pods::is_finished(pod)).count();
    tally.terminating = i32::try_from(terminating).unwrap_or(i32::MAX);
    let (mut succeeded, mut failed) = tally.count_released(pods);
    for pod in pods.iter().filter(|pod| has_finalizer(pod)) {
        tally.take(spec, pod, &mut succeeded, &mut failed);
    }
    tally.finish(spec, succeeded, failed);
    tally
}

impl Tally {
    /// Turns recorded uids whose pods have lost the finalizer into counts; answers those that still have it.
    fn count_released(&mut self, pods: &[Arc<Pod>]) -> (BTreeSet<String>, BTreeSet<String>) {
        let waiting: BTreeSet<_> = pods.iter().filter(|pod| has_finalizer(pod)).map(|pod| uid(&pod.metadata)).collect();
        let uncounted = self.status.uncounted_terminated_pods.take().unwrap_or_default();
        let sort = |uids: Option<Vec<String>>, count: &mut Option<i32>| -> BTreeSet<String> {
            let (kept, released): (BTreeSet<_>, BTreeSet<_>) =
                uids.into_iter().flatten().partition(|uid| waiting.contains(uid.as_str()));
            let released = i32::try_from(released.len()).unwrap_or(i32::MAX);
            if released > 0 {
                *count = Some(count.unwrap_or(0).saturating_add(released));
            }
            kept
        };
        let succeeded = sort(uncounted.succeeded, &mut self.status.succeeded);
        let failed = sort(uncounted.failed, &mut self.status.failed);
        (succeeded, failed)
    }

    fn take(
        &mut self,
        spec: &JobSpec,
        pod: &Arc<Pod>,
        succeeded: &mut BTreeSet<String>,
        failed: &mut BTreeSet<String>,
    ) {
        let pod_uid = uid(&pod.metadata).to_owned();
        if pods::phase(pod) == "Succeeded" && failed.contains(&pod_uid) {
            // It counted as failed when it was deleted while it ran, and stays so however it ended.
        } else if pods::phase(pod) == "Succeeded" {
            match index_of(pod).filter(|_| is_indexed(spec)) {
                Some(index) if index < spec.completions.unwrap_or(0) => {
                    self.completed.0.insert(index);
                }
                Some(_) => {}
                None => {
                    succeeded.insert(pod_uid);
                }
            }
        } else if is_failed(spec, pod) {
            match policy::judge(spec, pod) {
                Failure::Ignore => {}
                Failure::FailJob(why) => {
                    self.fail_job = Some(why);
                    failed.insert(pod_uid);
                }
                verdict => {
                    failed.insert(pod_uid);
                    self.fail_index(spec, pod, verdict == Failure::FailIndex);
                }
            }
        } else {
            return;
        }
        self.pending += 1;
        self.removals.push(remove_finalizer(pod));
    }

    fn fail_index(&mut self, spec: &JobSpec, pod: &Pod, at_once: bool) {
        let Some((limit, index)) = spec.backoff_limit_per_index.zip(index_of(pod)) else { return };
        if (at_once || earlier_failures(pod) >= limit) && !self.completed.contains(index) {
            self.failed_indexes.0.insert(index);
        }
    }

    fn finish(&mut self, spec: &JobSpec, succeeded: BTreeSet<String>, failed: BTreeSet<String>) {
        let counted = |count: Option<i32>, waiting: &BTreeSet<String>| {
            count.unwrap_or(0).saturating_add(i32::try_from(waiting.len()).unwrap_or(i32::MAX))
        };
        self.failed = counted(self.status.failed, &failed);
        self.succeeded = if is_indexed(spec) {
            self.status.completed_indexes = self.completed.to_text();
            self.status.succeeded = (self.completed.len() > 0).then(|| self.completed.len());
            if spec.backoff_limit_per_index.is_some() {
                self.status.failed_indexes = Some(self.failed_indexes.to_string());
            }
            self.completed.len()
        } else {
            counted(self.status.succeeded, &succeeded)
        };
        let list = |uids: BTreeSet<String>| (!uids.is_empty()).then(|| uids.into_iter().collect());
        self.status.uncounted_terminated_pods =
            Some(UncountedTerminatedPods { succeeded: list(succeeded), failed: list(failed) });
    }

    pub fn is_all_counted(&self) -> bool {
        self.pending == 0
            && self
                .status
                .uncounted_terminated_pods
                .as_ref()
                .is_none_or(|u| u.succeeded.is_none() && u.failed.is_none())
    }
}
