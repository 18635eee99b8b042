//! Starting and stopping the pods of a job: how many, which indexes, and how long to wait after failures.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{EnvVar, EnvVarSource, ObjectFieldSelector, Pod};

use super::Look;
use super::tally::{
    FINALIZER, INDEX, INDEX_FAILURES, earlier_failures, index_of, is_failed, is_indexed, remove_finalizer,
};
use crate::common::template::{create_pod, delete_pod, pod_from_template};
use crate::common::{after, elapsed, name, pods};

const BACKOFF: Duration = Duration::from_secs(10);
const MAX_BACKOFF: Duration = Duration::from_secs(600);
/// The most pods created at one look.
const BURST: usize = 500;
const INDEX_VARIABLE: &str = "JOB_COMPLETION_INDEX";

impl Look<'_> {
    /// The job is over: running pods go and count as failed.
    pub fn delete_active(&mut self) {
        let active = self.tally.active.clone();
        self.work.extend(active.iter().map(|pod| delete_pod(self.job, pod)));
    }

    /// Running pods go without counting.
    pub fn stop_active(&mut self) {
        let active = self.tally.active.clone();
        self.stop(&active);
    }

    fn stop(&mut self, victims: &[Arc<Pod>]) {
        for pod in victims {
            self.work.push(remove_finalizer(pod));
            self.work.push(delete_pod(self.job, pod));
        }
    }

    /// Brings the number of running pods to what is wanted.
    pub fn adjust_pods(&mut self) {
        let parallelism = self.spec.parallelism.unwrap_or(1).max(0);
        let active = i32::try_from(self.tally.active.len()).unwrap_or(i32::MAX);
        let wanted = match self.spec.completions {
            Some(completions) => {
                parallelism.min((completions - self.tally.succeeded - self.tally.failed_indexes.len()).max(0))
            }
            None if self.tally.succeeded > 0 => active.min(parallelism),
            None => parallelism,
        };
        if active > wanted {
            let surplus = usize::try_from(active - wanted).unwrap_or(0);
            let victims = pods::choose_victims(self.tally.active.clone(), &[], surplus, self.now);
            return self.stop(&victims);
        }
        // Where only ended pods may be replaced, those on their way out hold their places.
        let waits =
            self.spec.pod_failure_policy.is_some() || self.spec.pod_replacement_policy.as_deref() == Some("Failed");
        let held = if waits { self.tally.terminating } else { 0 };
        let missing = usize::try_from(wanted - active - held).unwrap_or(0).min(BURST);
        if missing > 0 {
            if is_indexed(self.spec) { self.start_indexes(missing) } else { self.start(missing) }
        }
    }

    fn start(&mut self, count: usize) {
        if let Some(wait) = self.backoff(|_| true) {
            self.plan.again_after(wait);
            return;
        }
        let pod = self.pod();
        self.work.extend(std::iter::repeat_with(|| create_pod(self.job, &pod)).take(count));
    }

    fn start_indexes(&mut self, mut count: usize) {
        let waits =
            self.spec.pod_failure_policy.is_some() || self.spec.pod_replacement_policy.as_deref() == Some("Failed");
        let occupied: BTreeSet<i32> = self
            .pods
            .iter()
            .filter(|pod| if waits { !pods::is_finished(pod) } else { pods::is_active(pod) })
            .filter_map(|pod| index_of(pod))
            .collect();
        for index in 0..self.spec.completions.unwrap_or(0) {
            if count == 0 {
                break;
            }
            let decided = self.tally.completed.contains(index) || self.tally.failed_indexes.contains(index);
            if decided || occupied.contains(&index) {
                continue;
            }
            count -= 1;
            let of_index = |pod: &Pod| self.spec.backoff_limit_per_index.is_none() || index_of(pod) == Some(index);
            if let Some(wait) = self.backoff(of_index) {
                self.plan.again_after(wait);
                continue;
            }
            let pod = self.indexed_pod(index);
            self.work.push(create_pod(self.job, &pod));
        }
    }

    /// How long to wait before pods replace failed ones, by the failures since the last success.
    fn backoff(&self, concerns: impl Fn(&Pod) -> bool) -> Option<Duration> {
        let concerned = || self.pods.iter().filter(|pod| concerns(pod));
        let success = concerned().filter(|pod| pods::phase(pod) == "Succeeded").filter_map(|pod| ended_at(pod)).max();
        let failures: Vec<_> = concerned()
            .filter(|pod| is_failed(self.spec, pod))
            .filter_map(|pod| ended_at(pod))
            .filter(|end| success.is_none_or(|success| *end > success))
            .collect();
        let last = failures.iter().max()?;
        let exponent = u32::try_from(failures.len() - 1).unwrap_or(u32::MAX).min(16);
        let due = after(*last, BACKOFF.saturating_mul(1 << exponent).min(MAX_BACKOFF));
        (due > self.now).then(|| elapsed(self.now, due))
    }

    fn pod(&self) -> Pod {
        let mut pod = pod_from_template(self.job, &self.spec.template);
        pod.metadata.finalizers.get_or_insert_default().push(FINALIZER.to_owned());
        pod
    }

    fn indexed_pod(&self, index: i32) -> Pod {
        let mut pod = self.pod();
        let job_name = name(&self.job.metadata);
        pod.metadata.generate_name = Some(format!("{job_name}-{index}-"));
        pod.metadata.labels.get_or_insert_default().insert(INDEX.to_owned(), index.to_string());
        let annotations = pod.metadata.annotations.get_or_insert_default();
        annotations.insert(INDEX.to_owned(), index.to_string());
        if self.spec.backoff_limit_per_index.is_some() {
            let of_index = self.pods.iter().filter(|pod| index_of(pod) == Some(index) && is_failed(self.spec, pod));
            let failures = of_index.map(|pod| earlier_failures(pod) + 1).max().unwrap_or(0);
            annotations.insert(INDEX_FAILURES.to_owned(), failures.to_string());
        }
        if let Some(spec) = &mut pod.spec {
            spec.hostname = Some(format!("{job_name}-{index}"));
            for container in spec.init_containers.iter_mut().flatten().chain(&mut spec.containers) {
                let env = container.env.get_or_insert_default();
                if !env.iter().any(|variable| variable.name == INDEX_VARIABLE) {
                    env.push(index_variable());
                }
            }
        }
        pod
    }
}

fn index_variable() -> EnvVar {
    let field_path = format!("metadata.labels['{INDEX}']");
    let field = ObjectFieldSelector { field_path, api_version: None };
    EnvVar {
        name: INDEX_VARIABLE.to_owned(),
        value: None,
        value_from: Some(EnvVarSource { field_ref: Some(field), ..EnvVarSource::default() }),
    }
}

/// When the pod's last container ended, or else when it was deleted or last heard of.
fn ended_at(pod: &Pod) -> Option<Timestamp> {
    let statuses = pod.status.iter().flat_map(|status| status.container_statuses.iter().flatten());
    let finished = statuses.filter_map(|status| status.state.as_ref()?.terminated.as_ref()?.finished_at.as_ref());
    let deleted = pod.metadata.deletion_timestamp.as_ref();
    let changed = || pods::condition(pod, "Ready").and_then(|ready| ready.last_transition_time.as_ref());
    finished.max().or(deleted).or_else(changed).or(pod.metadata.creation_timestamp.as_ref()).map(|time| time.0)
}
