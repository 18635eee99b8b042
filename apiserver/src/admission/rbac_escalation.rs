//! Nobody hands out rights that they do not hold: roles may hold only rules that their author holds, and bindings may
//! grant only such roles — unless the author may `escalate` roles or `bind` the role. Not a plugin that can be turned
//! off: upstream has it in the storage of these kinds.

use std::sync::Arc;

use apimachinery::meta::GroupResource;
use apimachinery::status::{Result, Status};
use async_trait::async_trait;

use super::{AdmissionRequest, Operation, Plugin};
use crate::auth::rbac::{GROUP, Rbac, role_rules};
use crate::auth::rules::{PolicyRule, describe, rules_of, uncovered};
use crate::auth::{Attributes, MASTERS};
use crate::registry::object::ObjectExt;
use crate::server::Server;

#[derive(Default)]
pub struct RbacEscalation {
    /// Holds rights also when RBAC is not one of the authorization modes.
    rbac: Rbac,
}

#[async_trait]
impl Plugin for RbacEscalation {
    fn name(&self) -> &'static str {
        "RBACEscalation"
    }

    async fn validate(&self, server: &Arc<Server>, request: &AdmissionRequest<'_>) -> Result<()> {
        if request.gvr.group != GROUP || request.user.is_in(MASTERS) {
            return Ok(());
        }
        match &*request.gvr.resource {
            "roles" | "clusterroles" => self.role(server, request),
            "rolebindings" | "clusterrolebindings" => self.binding(server, request),
            _ => Ok(()),
        }
    }
}

impl RbacEscalation {
    fn role(&self, server: &Arc<Server>, request: &AdmissionRequest<'_>) -> Result<()> {
        let rules = rules_of(request.object);
        let unchanged = request.old.is_some_and(|old| {
            rules_of(old) == rules && old.get("aggregationRule") == request.object.get("aggregationRule")
        });
        let aggregates = request.object.get("aggregationRule").is_some_and(|rule| !rule.is_null());
        if (request.operation == Operation::Update && unchanged)
            || may(server, request, "escalate", request.shown_name())
        {
            return Ok(());
        }
        let everything = || {
            let all = || vec!["*".to_owned()];
            let resources = PolicyRule { verbs: all(), api_groups: all(), resources: all(), ..PolicyRule::default() };
            vec![resources, PolicyRule { verbs: all(), non_resource_urls: all(), ..PolicyRule::default() }]
        };
        let aggregation_changed =
            request.old.is_none_or(|old| old.get("aggregationRule") != request.object.get("aggregationRule"));
        if aggregates && aggregation_changed && !self.missing(server, request, &everything()).is_empty() {
            return Err(request.forbidden("must have cluster-admin privileges to use the aggregationRule"));
        }
        self.check(server, request, &rules)
    }

    fn binding(&self, server: &Arc<Server>, request: &AdmissionRequest<'_>) -> Result<()> {
        let object = &*request.object;
        let same = |field: &str| request.old.is_some_and(|old| old.get(field) == object.get(field));
        if request.operation == Operation::Update && same("roleRef") && same("subjects") {
            return Ok(());
        }
        let (kind, name) = (object.str_at(&["roleRef", "kind"]), object.str_at(&["roleRef", "name"]));
        if may_bind(server, request, kind, name) {
            return Ok(());
        }
        let rules = role_rules(&*server.caches, request.namespace, kind, name).ok_or_else(|| {
            let resource = if kind == "ClusterRole" { "clusterroles" } else { "roles" };
            Status::not_found(&GroupResource::new(GROUP, resource), name)
        })?;
        self.check(server, request, &rules)
    }

    fn missing(&self, server: &Arc<Server>, request: &AdmissionRequest<'_>, wanted: &[PolicyRule]) -> Vec<PolicyRule> {
        let (held, _) = self.rbac.rules_for(&*server.caches, request.user, request.namespace);
        uncovered(&held, wanted)
    }

    fn check(&self, server: &Arc<Server>, request: &AdmissionRequest<'_>, wanted: &[PolicyRule]) -> Result<()> {
        let missing = self.missing(server, request, wanted);
        if missing.is_empty() {
            return Ok(());
        }
        let groups: Vec<String> = request.user.groups.iter().map(|group| format!("{group:?}")).collect();
        Err(request.forbidden(format!(
            "user {:?} (groups=[{}]) is attempting to grant RBAC permissions not currently held:\n{}",
            request.user.name,
            groups.join(" "),
            describe(&missing).join("\n")
        )))
    }
}

fn may(server: &Arc<Server>, request: &AdmissionRequest<'_>, verb: &str, name: &str) -> bool {
    let attributes = Attributes {
        api_version: "*",
        namespace: request.namespace,
        name,
        ..Attributes::resource(request.user, verb, GROUP, &request.gvr.resource)
    };
    server.auth.authorize(server, &attributes).is_allowed()
}

fn may_bind(server: &Arc<Server>, request: &AdmissionRequest<'_>, kind: &str, name: &str) -> bool {
    let resource = if kind == "ClusterRole" { "clusterroles" } else { "roles" };
    let attributes = Attributes {
        api_version: "*",
        namespace: request.namespace,
        name,
        ..Attributes::resource(request.user, "bind", GROUP, resource)
    };
    server.auth.authorize(server, &attributes).is_allowed()
}
