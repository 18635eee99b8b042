//! Removes jobs some time after they have ended (`ttlSecondsAfterFinished`).

use std::sync::Arc;

use apimachinery::controller::{Controller, Informer, ObjectKey, Plan, Propagation, Write};
use jiff::Timestamp;
use k8s_openapi::api::batch::v1::Job;

use super::job::finished_at;
use crate::app::Context;
use crate::common::{after, elapsed, is_deleted, seconds};

struct TtlController {
    jobs: Arc<Informer<Job>>,
}

pub fn start(context: &Context) {
    let controller = TtlController { jobs: context.driver.informers().of() };
    context.driver.run(controller, 2, |controller, wiring| wiring.primary(&controller.jobs));
}

impl Controller for TtlController {
    fn name(&self) -> &'static str {
        "ttl-after-finished"
    }

    fn component(&self) -> &'static str {
        "ttl-after-finished-controller"
    }

    fn reconcile(&self, key: &ObjectKey, now: Timestamp) -> Plan {
        let Some(job) = self.jobs.get(key).filter(|job| !is_deleted(&job.metadata)) else { return Plan::nothing() };
        let limit = job.spec.as_ref().and_then(|spec| spec.ttl_seconds_after_finished);
        let (Some(limit), Some(finished)) = (limit, finished_at(&job)) else { return Plan::nothing() };
        let due = after(finished, seconds(limit));
        if due > now {
            let mut plan = Plan::nothing();
            plan.again_after(elapsed(now, due));
            return plan;
        }
        let version = job.metadata.resource_version.as_deref();
        Plan::write(Write::delete(job.as_ref()).at_version(version).propagation(Propagation::Foreground))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn ended_jobs_go_in_time() {
        let job: Job = serde_json::from_value(json!({
            "metadata": {"name": "j", "namespace": "ns", "uid": "j"}, "spec": {"ttlSecondsAfterFinished": 60, "template": {}},
            "status": {"conditions": [{"type": "Complete", "status": "True", "lastTransitionTime": "1970-01-01T00:01:40Z"}]}}))
        .unwrap();
        let controller = TtlController { jobs: Informer::fixed([job]) };
        let plan = |second| controller.reconcile(&ObjectKey::new("ns", "j"), Timestamp::from_second(second).unwrap());
        assert_eq!(plan(130).again_after, Some(std::time::Duration::from_secs(30)));
        assert_eq!(plan(160).writes[0].body["propagationPolicy"], "Foreground");
    }
}
