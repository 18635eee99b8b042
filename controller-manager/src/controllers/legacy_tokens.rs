//! Removes tokens of service accounts that were made automatically, as clusters of old did, and that nobody has used for
//! long (`--legacy-service-account-token-clean-up-period`): first such a token is marked as invalid, and when nobody
//! has missed it for as long again, it goes. Without the API server's record of when it began to track their use nothing
//! is known, and nothing goes.

use std::sync::Arc;
use std::time::Duration;

use apimachinery::controller::{Controller, Informer, ObjectKey, Plan, Write};
use jiff::Timestamp;
use jiff::civil::Date;
use jiff::tz::TimeZone;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Secret, ServiceAccount};
use serde_json::{Value, json};

use crate::app::Context;
use crate::common::{annotation, is_deleted, labels, name, namespace, uid};

/// Since when the API server has been tracking the use of tokens.
pub const TRACKING: &str = "kube-apiserver-legacy-service-account-token-tracking";
const SECRET_TYPE: &str = "kubernetes.io/service-account-token";
const ACCOUNT: &str = "kubernetes.io/service-account.name";
const ACCOUNT_UID: &str = "kubernetes.io/service-account.uid";
const LAST_USED: &str = "kubernetes.io/legacy-token-last-used";
const INVALID_SINCE: &str = "kubernetes.io/legacy-token-invalid-since";
const DAY: Duration = Duration::from_secs(24 * 3600);

struct LegacyTokenCleaner {
    period: Duration,
    secrets: Arc<Informer<Secret>>,
    accounts: Arc<Informer<ServiceAccount>>,
    pods: Arc<Informer<Pod>>,
    maps: Arc<Informer<ConfigMap>>,
}

pub fn start(context: &Context) {
    let informers = context.driver.informers();
    let controller = LegacyTokenCleaner {
        period: context.options.legacy_service_account_token_clean_up_period,
        secrets: informers.of(),
        accounts: informers.of(),
        pods: informers.of(),
        maps: informers.of(),
    };
    // Days are counted here: a look at each token when it is first seen and one a day is enough.
    context.driver.run(controller, 1, |controller, wiring| {
        wiring.map(&controller.secrets, |change| {
            let new = change.new.iter().filter(|secret| change.old.is_none() && is_token(secret));
            new.map(|secret| ObjectKey::of(&secret.metadata)).collect()
        });
    });
}

fn is_token(secret: &Secret) -> bool {
    secret.type_.as_deref() == Some(SECRET_TYPE)
}

impl Controller for LegacyTokenCleaner {
    fn name(&self) -> &'static str {
        "legacy-serviceaccount-token-cleaner"
    }

    fn component(&self) -> &'static str {
        "legacy-service-account-token-cleaner"
    }

    fn reconcile(&self, key: &ObjectKey, now: Timestamp) -> Plan {
        let Some(secret) = self.secrets.get(key).filter(|secret| is_token(secret)) else { return Plan::nothing() };
        let mut plan = Plan { again_after: Some(DAY), ..Plan::default() };
        let Ok(since) = now.checked_sub(self.period) else { return plan };
        if is_deleted(&secret.metadata) || !self.is_idle(&secret, since) || self.is_mounted(&secret) {
            return plan;
        }
        let oldest = date(since);
        match labels(&secret.metadata).get(INVALID_SINCE).and_then(|text| text.parse::<Date>().ok()) {
            None => {
                let patch =
                    json!({"metadata": {"uid": secret.metadata.uid, "labels": {INVALID_SINCE: date(now).to_string()}}});
                plan.push(Write::merge_patch::<Secret>(key.clone(), patch));
            }
            Some(invalid) if invalid < oldest => {
                let delete = Write::delete(secret.as_ref()).at_version(secret.metadata.resource_version.as_deref());
                plan.push(delete);
            }
            Some(_) => {}
        }
        plan
    }
}

impl LegacyTokenCleaner {
    /// Whether the token was made for its account by the cluster, and has not been used since then.
    fn is_idle(&self, secret: &Secret, since: Timestamp) -> bool {
        let created = secret.metadata.creation_timestamp.as_ref().is_some_and(|time| time.0 < since);
        let tracked = self.tracked_since().and_then(|day| day.tomorrow().ok()).is_some_and(|day| day <= date(since));
        let used = labels(&secret.metadata).get(LAST_USED);
        // A date that cannot be read says nothing, so it does not say that the token is idle.
        let idle = used.is_none_or(|text| text.parse::<Date>().is_ok_and(|day| day < date(since)));
        created && tracked && idle && self.is_generated(secret)
    }

    /// Tokens that somebody asked for are not listed in their account.
    fn is_generated(&self, secret: &Secret) -> bool {
        let account = annotation(&secret.metadata, ACCOUNT).unwrap_or("");
        let account = self.accounts.get(&ObjectKey::new(namespace(&secret.metadata), account));
        let account_uid = annotation(&secret.metadata, ACCOUNT_UID).unwrap_or("");
        account.is_some_and(|account| {
            let listed = account.secrets.iter().flatten().filter_map(|reference| reference.name.as_deref());
            let is_listed = listed.into_iter().any(|listed| listed == name(&secret.metadata));
            is_listed && (account_uid.is_empty() || account_uid == uid(&account.metadata))
        })
    }

    /// Pods refer to secrets in many places; whatever in a pod has the secret's name may be such a reference.
    fn is_mounted(&self, secret: &Secret) -> bool {
        let pods = self.pods.in_namespace(namespace(&secret.metadata));
        pods.iter().any(|pod| mentions(&json!(pod.spec), name(&secret.metadata)))
    }

    fn tracked_since(&self) -> Option<Date> {
        let map = self.maps.get(&ObjectKey::new("kube-system", TRACKING))?;
        map.data.as_ref()?.get("since")?.parse().ok()
    }
}

fn mentions(value: &Value, name: &str) -> bool {
    match value {
        Value::String(text) => text == name,
        Value::Array(items) => items.iter().any(|item| mentions(item, name)),
        Value::Object(fields) => fields.values().any(|field| mentions(field, name)),
        _ => false,
    }
}

/// The day in Greenwich.
fn date(time: Timestamp) -> Date {
    time.to_zoned(TimeZone::UTC).date()
}

#[cfg(test)]
mod tests {
    use super::*;
    use apimachinery::controller::Verb;

    fn parse<T: serde::de::DeserializeOwned>(value: Value) -> T {
        serde_json::from_value(value).unwrap()
    }

    fn secret(labels: Value) -> Value {
        json!({"type": SECRET_TYPE, "metadata": {"name": "t", "namespace": "ns", "uid": "t", "resourceVersion": "7",
            "creationTimestamp": "2026-01-01T00:00:00Z", "labels": labels, "annotations": {ACCOUNT: "a", ACCOUNT_UID: "u"}}})
    }

    fn plan(secret: Value, since: &str, listed: &str, pod: Value) -> Plan {
        let account = json!({"metadata": {"name": "a", "namespace": "ns", "uid": "u"}, "secrets": [{"name": listed}]});
        let map = json!({"metadata": {"name": TRACKING, "namespace": "kube-system"}, "data": {"since": since}});
        let controller = LegacyTokenCleaner {
            period: 30 * DAY,
            secrets: Informer::fixed([parse(secret)]),
            accounts: Informer::fixed([parse(account)]),
            pods: Informer::fixed([parse(json!({"metadata": {"name": "p", "namespace": "ns"}, "spec": pod}))]),
            maps: Informer::fixed([parse(map)]),
        };
        controller.reconcile(&ObjectKey::new("ns", "t"), "2026-06-30T12:00:00Z".parse().unwrap())
    }

    #[test]
    fn an_idle_token_is_marked_and_then_removed() {
        let verb = |labels: Value| {
            let plan = plan(secret(labels), "2026-05-01", "t", json!({"containers": []}));
            plan.writes.first().map(|write| (write.verb.clone(), write.body.clone()))
        };
        let (verb_of_mark, patch) = verb(json!({})).unwrap();
        assert_eq!(verb_of_mark, Verb::MergePatch);
        assert_eq!(patch["metadata"]["labels"], json!({INVALID_SINCE: "2026-06-30"}));
        assert_eq!(verb(json!({INVALID_SINCE: "2026-05-31"})), None);
        let (gone, options) = verb(json!({INVALID_SINCE: "2026-05-30"})).unwrap();
        assert_eq!((gone, &options["preconditions"]["resourceVersion"]), (Verb::Delete, &json!("7")));
    }

    #[test]
    fn what_may_be_in_use_stays() {
        let idle = || secret(json!({}));
        let mounting = json!({"containers": [], "volumes": [{"name": "v", "secret": {"secretName": "t"}}]});
        let none = || json!({"containers": []});
        for (secret, since, listed, pod) in [
            (secret(json!({LAST_USED: "2026-06-01"})), "2026-05-01", "t", none()),
            (secret(json!({LAST_USED: "once"})), "2026-05-01", "t", none()),
            (idle(), "2026-05-31", "t", none()),
            (idle(), "", "t", none()),
            (idle(), "2026-05-01", "another", none()),
            (idle(), "2026-05-01", "t", mounting),
        ] {
            let plan = plan(secret.clone(), since, listed, pod);
            assert!(plan.writes.is_empty(), "{secret} {since} {listed}");
            assert_eq!(plan.again_after, Some(DAY));
        }
    }
}
