//! Fills cluster roles that are made of others (`aggregationRule`) with the rules of all that match.

use std::sync::Arc;

use apimachinery::controller::{Controller, Informer, ObjectKey, Plan, Write};
use jiff::Timestamp;
use k8s_openapi::api::rbac::v1::{ClusterRole, PolicyRule};
use serde_json::json;

use crate::app::Context;
use crate::common::selector::Selector;
use crate::common::{is_deleted, labels, name};

struct AggregationController {
    roles: Arc<Informer<ClusterRole>>,
}

pub fn start(context: &Context) {
    let controller = AggregationController { roles: context.driver.informers().of() };
    context.driver.run(controller, 2, |controller, wiring| {
        let roles = controller.roles.clone();
        // Any role may be a part of any aggregated one; there are few of those.
        wiring.map(&controller.roles, move |change| {
            let changed = change.versions().take(1).map(|role| ObjectKey::cluster(name(&role.metadata)));
            let aggregated = roles.list().into_iter().filter(|role| role.aggregation_rule.is_some());
            changed.chain(aggregated.map(|role| ObjectKey::cluster(name(&role.metadata)))).collect()
        });
    });
}

impl Controller for AggregationController {
    fn name(&self) -> &'static str {
        "clusterrole-aggregation"
    }

    fn component(&self) -> &'static str {
        "clusterrole-aggregation-controller"
    }

    fn reconcile(&self, key: &ObjectKey, _: Timestamp) -> Plan {
        let Some(role) = self.roles.get(key).filter(|role| !is_deleted(&role.metadata)) else { return Plan::nothing() };
        let Some(rule) = &role.aggregation_rule else { return Plan::nothing() };
        let mut rules: Vec<PolicyRule> = Vec::new();
        for selector in rule.cluster_role_selectors.iter().flatten().map(|selector| Selector::of(Some(selector))) {
            for part in self.roles.list().iter().filter(|part| name(&part.metadata) != key.name) {
                if selector.matches(labels(&part.metadata)) {
                    let new =
                        part.rules.iter().flatten().filter(|rule| !rules.contains(rule)).cloned().collect::<Vec<_>>();
                    rules.extend(new);
                }
            }
        }
        if role.rules.as_deref().unwrap_or_default() == rules {
            return Plan::nothing();
        }
        let patch = json!({"metadata": {"uid": role.metadata.uid}, "rules": rules});
        Plan::write(Write::merge_patch::<ClusterRole>(key.clone(), patch))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_of_matching_roles_are_united_once() {
        let role = |name: &str, part: bool, verb: &str| -> ClusterRole {
            let labels = if part { json!({"to": "view"}) } else { json!({}) };
            serde_json::from_value(json!({"metadata": {"name": name, "labels": labels}, "rules": [{"verbs": [verb], "resources": ["pods"], "apiGroups": [""]}]})).unwrap()
        };
        let mut view = role("view", false, "get");
        view.aggregation_rule =
            serde_json::from_value(json!({"clusterRoleSelectors": [{"matchLabels": {"to": "view"}}]})).unwrap();
        let roles = [
            view,
            role("a", true, "list"),
            role("b", true, "list"),
            role("c", true, "watch"),
            role("d", false, "delete"),
        ];
        let controller = AggregationController { roles: Informer::fixed(roles) };
        let plan = controller.reconcile(&ObjectKey::cluster("view"), Timestamp::UNIX_EPOCH);
        let verbs: Vec<_> =
            plan.writes[0].body["rules"].as_array().unwrap().iter().map(|rule| rule["verbs"][0].clone()).collect();
        assert_eq!(verbs, ["list", "watch"]);
    }
}
