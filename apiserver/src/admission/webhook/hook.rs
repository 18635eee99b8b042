//! One webhook of a configuration, compiled: whether it wants to be asked about a request, and as which version.

use std::sync::Arc;
use std::time::Duration;

use apimachinery::meta::GroupVersionResource;
use apimachinery::status::{Result, Status};
use serde_json::Value;

use super::super::matching::{Rule, Selectors};
use super::super::{AdmissionRequest, conditions};
use crate::http::webhook::Target;
use crate::registry::object::ObjectExt;
use crate::registry::{Resource, Served};
use crate::server::Server;

pub struct Hook {
    pub name: String,
    /// Of the configuration and the webhook in it.
    pub key: String,
    pub target: Target,
    pub timeout: Duration,
    pub ignores_failure: bool,
    /// Of a mutating one: to be asked again when others changed the object.
    pub wants_again: bool,
    pub has_side_effects: bool,
    /// The newest that both sides speak: `v1` or `v1beta1`.
    pub review_version: &'static str,
    is_exact: bool,
    rules: Vec<Rule>,
    selectors: Selectors,
    conditions: conditions::Conditions,
}

/// The version in which a webhook wants to see a request.
pub struct Matched {
    pub resource: Arc<Resource>,
    pub served: Arc<Served>,
}

/// Nobody may lock the cluster's administrators out of the configurations themselves.
pub fn is_exempt(gvr: &GroupVersionResource) -> bool {
    gvr.group == super::GROUP
        && matches!(
            &*gvr.resource,
            "mutatingwebhookconfigurations"
                | "validatingwebhookconfigurations"
                | "validatingadmissionpolicies"
                | "validatingadmissionpolicybindings"
                | "mutatingadmissionpolicies"
                | "mutatingadmissionpolicybindings"
        )
}

impl Hook {
    /// The webhooks of a configuration.
    pub fn read_all(configuration: &Value) -> Vec<Self> {
        let hooks = configuration.list_at(&["webhooks"]).iter().enumerate();
        hooks.map(|(index, hook)| Self::read(configuration.name(), index, hook)).collect()
    }

    fn read(configuration: &str, index: usize, hook: &Value) -> Self {
        let seconds = hook.i64_at(&["timeoutSeconds"]).unwrap_or(10).clamp(1, 30);
        let name = hook.str_at(&["name"]).to_owned();
        let versions = hook.list_at(&["admissionReviewVersions"]);
        let first = versions.iter().filter_map(Value::as_str).find(|version| matches!(*version, "v1" | "v1beta1"));
        Self {
            key: format!("{configuration}/{name}/{index}"),
            target: Target::read(&hook["clientConfig"]),
            timeout: Duration::from_secs(seconds.unsigned_abs()),
            ignores_failure: hook["failurePolicy"] == "Ignore",
            wants_again: hook["reinvocationPolicy"] == "IfNeeded",
            has_side_effects: !matches!(hook.str_at(&["sideEffects"]), "None" | "NoneOnDryRun"),
            review_version: if first == Some("v1beta1") { "v1beta1" } else { "v1" },
            is_exact: hook["matchPolicy"] == "Exact",
            rules: hook.list_at(&["rules"]).iter().map(Rule::read).collect(),
            selectors: Selectors::read(&hook["namespaceSelector"], &hook["objectSelector"]),
            conditions: conditions::Conditions::read(hook.list_at(&["matchConditions"])),
            name,
        }
    }

    /// `None`: it does not want to be asked.
    pub fn matches(&self, server: &Arc<Server>, request: &AdmissionRequest<'_>) -> Result<Option<Matched>> {
        let Some(served) = super::super::matching::version_of(server, &self.rules, self.is_exact, request) else {
            return Ok(None);
        };
        let matched = Matched { resource: served.0, served: served.1 };
        if !self.selectors.match_request(server, request)? {
            return Ok(None);
        }
        match self.conditions.hold(server, request, &matched.resource, &matched.served) {
            Ok(true) => Ok(Some(matched)),
            Ok(false) => Ok(None),
            Err(error) if self.ignores_failure => {
                tracing::warn!(webhook = self.name, error, "match conditions failed; the webhook is not asked");
                Ok(None)
            }
            Err(error) => Err(Status::forbidden(&request.group_resource(), request.shown_name(), error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn defaults_are_upstreams() {
        let hook = Hook::read("c", 0, &json!({"name": "a.b.c", "admissionReviewVersions": ["v2", "v1beta1", "v1"]}));
        assert_eq!((hook.timeout.as_secs(), hook.review_version, hook.ignores_failure), (10, "v1beta1", false));
    }
}
