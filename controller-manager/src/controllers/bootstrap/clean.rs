//! Deletes bootstrap tokens at the end of their lives.

use std::sync::Arc;

use apimachinery::controller::{Controller, Informer, ObjectKey, Plan, Write};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Secret;

use super::{Life, is_token, life};
use crate::app::Context;

struct TokenCleaner {
    secrets: Arc<Informer<Secret>>,
}

pub fn start(context: &Context) {
    let controller = TokenCleaner { secrets: context.driver.informers().of() };
    context.driver.run(controller, 1, |controller, wiring| {
        wiring.map(&controller.secrets, |change| {
            let token = change.new.iter().filter(|secret| is_token(secret));
            token.map(|secret| ObjectKey::of(&secret.metadata)).collect()
        });
    });
}

impl Controller for TokenCleaner {
    fn name(&self) -> &'static str {
        "token-cleaner"
    }

    fn component(&self) -> &'static str {
        "token-cleaner"
    }

    fn reconcile(&self, key: &ObjectKey, now: Timestamp) -> Plan {
        let mut plan = Plan::nothing();
        let Some(token) = self.secrets.get(key).filter(|secret| is_token(secret)) else { return plan };
        match life(&token, now) {
            Life::Forever => {}
            Life::For(left) => {
                plan.again_after(left);
            }
            Life::Over => {
                plan.push(Write::delete(token.as_ref()));
            }
        }
        plan
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::token;
    use super::*;
    use std::time::Duration;

    #[test]
    fn tokens_go_when_their_time_is_over() {
        let controller = TokenCleaner {
            secrets: Informer::fixed([
                token("lasting", &[]),
                token("ending", &[("expiration", "1970-01-01T00:02:00Z")]),
                token("ended", &[("expiration", "1970-01-01T00:01:00Z")]),
            ]),
        };
        let plan =
            |name| controller.reconcile(&ObjectKey::new("kube-system", name), Timestamp::from_second(100).unwrap());
        assert!(plan("lasting").is_empty());
        assert_eq!(plan("ending").again_after, Some(Duration::from_secs(20)));
        assert_eq!(plan("ended").writes[0].path(), "/api/v1/namespaces/kube-system/secrets/ended");
    }
}
