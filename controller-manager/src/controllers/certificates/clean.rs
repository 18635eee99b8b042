//! Removes certificate requests that are old: decided ones after an hour, open ones after a day, and those whose
//! certificate has expired.

use std::sync::Arc;
use std::time::Duration;

use apimachinery::controller::{Controller, Informer, ObjectKey, Plan};
use jiff::Timestamp;
use k8s_openapi::api::certificates::v1::CertificateSigningRequest;

use super::{delete_at, has, is_issued};
use crate::app::Context;
use crate::common::after;

const DECIDED: Duration = Duration::from_secs(3600);
const OPEN: Duration = Duration::from_secs(24 * 3600);

struct CleaningController {
    requests: Arc<Informer<CertificateSigningRequest>>,
}

pub fn start(context: &Context) {
    let controller = CleaningController { requests: context.driver.informers().of() };
    context.driver.run(controller, 1, |controller, wiring| wiring.primary(&controller.requests));
}

impl Controller for CleaningController {
    fn name(&self) -> &'static str {
        "certificatesigningrequest-cleaner"
    }

    fn component(&self) -> &'static str {
        "csrcleaner"
    }

    fn reconcile(&self, key: &ObjectKey, now: Timestamp) -> Plan {
        let Some(request) = self.requests.get(key) else { return Plan::nothing() };
        let created = request.metadata.creation_timestamp.as_ref().map_or(now, |time| time.0);
        let decided = is_issued(&request) || has(&request, "Denied") || has(&request, "Failed");
        let due = after(created, if decided { DECIDED } else { OPEN });
        delete_at(request.as_ref(), due, now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn old_requests_go() {
        let request = |conditions: serde_json::Value| -> CertificateSigningRequest {
            serde_json::from_value(
                json!({"metadata": {"name": "r", "uid": "r", "creationTimestamp": "1970-01-01T00:00:00Z"},
                "spec": {"request": "", "signerName": "x"}, "status": {"conditions": conditions}}),
            )
            .unwrap()
        };
        for (conditions, second, gone) in [
            (json!([]), 7200, false),
            (json!([]), 86_400, true),
            (json!([{"type": "Denied", "status": "True"}]), 3599, false),
            (json!([{"type": "Denied", "status": "True"}]), 3600, true),
        ] {
            let controller = CleaningController { requests: Informer::fixed([request(conditions)]) };
            let plan = controller.reconcile(&ObjectKey::cluster("r"), Timestamp::from_second(second).unwrap());
            assert_eq!((plan.writes.len() == 1, plan.again_after.is_some()), (gone, !gone));
        }
    }
}
