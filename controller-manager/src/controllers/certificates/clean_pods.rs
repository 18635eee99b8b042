//! Removes certificate requests of pods a quarter of an hour after they were made, whatever became of them.

use std::sync::Arc;
use std::time::Duration;

use apimachinery::controller::{Controller, Informer, ObjectKey, Plan};
use jiff::Timestamp;
use k8s_openapi::api::certificates::v1::PodCertificateRequest;

use super::delete_at;
use crate::app::Context;
use crate::common::after;

const KEPT: Duration = Duration::from_secs(15 * 60);

struct PodCleaningController {
    requests: Arc<Informer<PodCertificateRequest>>,
}

pub fn start(context: &Context) {
    let controller = PodCleaningController { requests: context.driver.informers().of() };
    context.driver.run(controller, 1, |controller, wiring| {
        wiring.map(&controller.requests, |change| {
            let new = change.new.iter().filter(|_| change.old.is_none());
            new.map(|request| ObjectKey::of(&request.metadata)).collect()
        });
    });
}

impl Controller for PodCleaningController {
    fn name(&self) -> &'static str {
        "podcertificaterequest-cleaner"
    }

    fn component(&self) -> &'static str {
        "podcertificaterequestcleaner"
    }

    fn reconcile(&self, key: &ObjectKey, now: Timestamp) -> Plan {
        let Some(request) = self.requests.get(key) else { return Plan::nothing() };
        let due = after(request.metadata.creation_timestamp.as_ref().map_or(now, |time| time.0), KEPT);
        delete_at(request.as_ref(), due, now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn requests_go_after_a_quarter_of_an_hour() {
        let request: PodCertificateRequest = serde_json::from_value(json!({
            "metadata": {"name": "r", "namespace": "ns", "uid": "r", "creationTimestamp": "1970-01-01T00:00:00Z"},
            "spec": {"nodeName": "n", "nodeUID": "n", "podName": "p", "podUID": "p", "serviceAccountName": "s",
                "serviceAccountUID": "s", "signerName": "x/y"},
        }))
        .unwrap();
        let controller = PodCleaningController { requests: Informer::fixed([request]) };
        let plan = |second| controller.reconcile(&ObjectKey::new("ns", "r"), Timestamp::from_second(second).unwrap());
        assert_eq!(plan(60).again_after, Some(Duration::from_secs(14 * 60)));
        assert_eq!(plan(900).writes.len(), 1);
    }
}
