//! Gives every namespace its `default` service account.

use std::sync::Arc;

use apimachinery::controller::{Controller, Informer, ObjectKey, Plan, Write};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Namespace, ServiceAccount};
use kube::api::ObjectMeta;

use crate::app::Context;
use crate::common::{is_deleted, namespace};

const DEFAULT: &str = "default";

struct ServiceAccountController {
    namespaces: Arc<Informer<Namespace>>,
    accounts: Arc<Informer<ServiceAccount>>,
}

pub fn start(context: &Context) {
    let informers = context.driver.informers();
    let controller = ServiceAccountController { namespaces: informers.of(), accounts: informers.of() };
    context.driver.run(controller, 1, |controller, wiring| {
        wiring.primary(&controller.namespaces);
        wiring.map(&controller.accounts, |change| match (&change.old, &change.new) {
            (Some(gone), None) => vec![ObjectKey::cluster(namespace(&gone.metadata))],
            _ => Vec::new(),
        });
    });
}

impl Controller for ServiceAccountController {
    fn name(&self) -> &'static str {
        "serviceaccount"
    }

    fn component(&self) -> &'static str {
        "serviceaccount-controller"
    }

    fn reconcile(&self, key: &ObjectKey, _: Timestamp) -> Plan {
        let alive = self.namespaces.get(key).is_some_and(|namespace| !is_deleted(&namespace.metadata));
        if !alive || self.accounts.get(&ObjectKey::new(&key.name, DEFAULT)).is_some() {
            return Plan::nothing();
        }
        let metadata =
            ObjectMeta { name: Some(DEFAULT.to_owned()), namespace: Some(key.name.clone()), ..ObjectMeta::default() };
        Plan::write(Write::create(&ServiceAccount { metadata, ..ServiceAccount::default() }).if_absent())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_missing_account_is_created_in_living_namespaces_only() {
        let namespaces = [
            json!({"metadata": {"name": "a"}}),
            json!({"metadata": {"name": "b"}}),
            json!({"metadata": {"name": "c", "deletionTimestamp": "2026-01-01T00:00:00Z"}}),
        ];
        let controller = ServiceAccountController {
            namespaces: Informer::fixed(namespaces.map(|n| serde_json::from_value::<Namespace>(n).unwrap())),
            accounts: Informer::fixed([serde_json::from_value::<ServiceAccount>(
                json!({"metadata": {"name": "default", "namespace": "b"}}),
            )
            .unwrap()]),
        };
        for (name, writes) in [("a", 1), ("b", 0), ("c", 0), ("unknown", 0)] {
            let plan = controller.reconcile(&ObjectKey::cluster(name), Timestamp::UNIX_EPOCH);
            assert_eq!(plan.writes.len(), writes, "{name}");
        }
    }
}
