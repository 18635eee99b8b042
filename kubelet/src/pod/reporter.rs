//! What the API knows of a pod's status beside what it should know: the difference is what has to be sent. Talks to
//! nobody itself; the worker sends what comes from here and brings back the answer.

use std::time::Duration;

use k8s_openapi::api::core::v1::{Pod, PodStatus};
use serde_json::Value;
use tokio::time::Instant;

use super::api::{name_of, version_number};
use super::status_patch;
use crate::objects::api_error;

/// After an answer that says that the object is another one, or gone: the watch will tell which.
const OUTDATED: Duration = Duration::from_secs(1);
const FAILED: Duration = Duration::from_secs(2);

#[derive(Default)]
pub struct Reporter {
    /// The status that the API has, as far as known, and its version.
    known: Option<(PodStatus, Option<String>)>,
    /// What the API answered to the last report.
    echo: Option<PodStatus>,
    computed: PodStatus,
    under_way: bool,
    retry_at: Option<Instant>,
}

impl Reporter {
    /// Takes over the API's newest object of the pod; none while there is none.
    pub fn adopt(&mut self, object: Option<&Pod>) {
        let Some(object) = object else {
            self.known = None;
            return;
        };
        let newer = match &self.known {
            Some((_, Some(version))) => version_number(object) > version.parse().unwrap_or(0),
            None | Some((_, None)) => true,
        };
        if newer && !self.under_way {
            // An echo of our own write is no news, even if the server spells it differently.
            let known = self.known.take().map(|(known, _)| known);
            let echo = self.echo.is_some() && self.echo == object.status;
            let status = known.filter(|_| echo).unwrap_or_else(|| object.status.clone().unwrap_or_default());
            self.known = Some((status, object.metadata.resource_version.clone()));
        }
    }

    /// The API's status, as far as known.
    pub fn known(&self) -> Option<&PodStatus> {
        self.known.as_ref().map(|(status, _)| status)
    }

    /// The API does not know the last computed status yet.
    pub fn is_dirty(&self) -> bool {
        self.known().is_none_or(|known| !matches!(status_patch::patch("", known, &self.computed), Ok(None)))
    }

    /// Computes the status anew; `compute` gets the one before.
    pub fn compute(&mut self, compute: impl FnOnce(&PodStatus) -> PodStatus) -> &PodStatus {
        let previous = match &self.known {
            Some((known, _)) if self.computed == PodStatus::default() => known.clone(),
            _ => std::mem::take(&mut self.computed),
        };
        self.computed = compute(&previous);
        &self.computed
    }

    /// What to send now, and the status that the API has after it; from then on a report is under way.
    pub fn next(&mut self, object: &Pod) -> Option<(Value, PodStatus)> {
        if self.under_way || self.retry_at.is_some_and(|at| at > Instant::now()) {
            return None;
        }
        let known = self.known().cloned().unwrap_or_default();
        let uid = object.metadata.uid.as_deref().unwrap_or_default();
        match status_patch::patch(uid, &known, &self.computed) {
            Ok(Some(patch)) => {
                tracing::debug!(pod = name_of(object), %patch, "reporting");
                self.under_way = true;
                Some((patch, self.computed.clone()))
            }
            Ok(None) => None,
            Err(error) => {
                tracing::error!(pod = name_of(object), %error, "cannot encode the status");
                None
            }
        }
    }

    /// The answer to the report under way, which was to make the status what `status` is.
    pub fn answered(&mut self, result: Result<Pod, kube::Error>, status: PodStatus) {
        self.under_way = false;
        self.retry_at = match result {
            Ok(pod) => {
                self.known = Some((status, pod.metadata.resource_version));
                self.echo = pod.status;
                None
            }
            Err(kube::Error::Api(answer)) if answer.code == 404 || answer.code == 409 => {
                Some(Instant::now() + OUTDATED)
            }
            Err(error) => {
                tracing::warn!(error = api_error(&error), "cannot report a pod's status");
                Some(Instant::now() + FAILED)
            }
        };
    }

    /// When to try again what failed; none in the past.
    pub fn retry_at(&self) -> Option<Instant> {
        self.retry_at.filter(|at| *at > Instant::now())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(version: &str, phase: &str) -> Pod {
        serde_json::from_value(serde_json::json!({
            "metadata": {"name": "p", "namespace": "n", "uid": "u", "resourceVersion": version},
            "spec": {"containers": []}, "status": {"phase": phase},
        }))
        .unwrap()
    }

    fn phase(phase: &str) -> PodStatus {
        PodStatus { phase: Some(phase.to_owned()), ..PodStatus::default() }
    }

    #[tokio::test(start_paused = true)]
    async fn one_report_at_a_time_and_only_of_changes() {
        let mut reporter = Reporter::default();
        reporter.adopt(Some(&pod("5", "Pending")));
        reporter.compute(|previous| previous.clone());
        assert!(!reporter.is_dirty() && reporter.next(&pod("5", "Pending")).is_none());

        reporter.compute(|_| phase("Running"));
        let (patch, status) = reporter.next(&pod("5", "Pending")).unwrap();
        assert_eq!(patch["status"]["phase"], "Running");
        assert!(reporter.next(&pod("5", "Pending")).is_none(), "a report is under way");
        // An older object does not undo what the API has answered.
        reporter.answered(Ok(pod("7", "Running")), status);
        reporter.adopt(Some(&pod("6", "Pending")));
        assert!(!reporter.is_dirty());
        // A newer one does.
        reporter.adopt(Some(&pod("8", "Failed")));
        assert!(reporter.is_dirty());
    }

    #[tokio::test(start_paused = true)]
    async fn failures_are_tried_again_later() {
        let mut reporter = Reporter::default();
        reporter.adopt(Some(&pod("5", "Pending")));
        reporter.compute(|_| phase("Running"));
        let (_, status) = reporter.next(&pod("5", "Pending")).unwrap();
        reporter.answered(Err(kube::Error::LinesCodecMaxLineLengthExceeded), status);
        assert!(reporter.next(&pod("5", "Pending")).is_none());
        tokio::time::advance(FAILED).await;
        assert!(reporter.retry_at().is_none() && reporter.next(&pod("5", "Pending")).is_some());
    }
}
