//! Changing by `MutatingAdmissionPolicy`: each mutation is an apply configuration that is merged, or a JSON patch, made
//! by an expression (<https://kubernetes.io/docs/reference/access-authn-authz/mutating-admission-policy/>).

use std::sync::Arc;

use apimachinery::merge;
use apimachinery::status::Result;
use async_trait::async_trait;
use serde_json::Value;

use super::super::webhook::hook::{self, Matched};
use super::super::webhook::review;
use super::super::{AdmissionRequest, Plugin};
use super::{Bound, Compiled, Policies, compile};
use crate::cel::{Scope, to_json};
use crate::registry::object::ObjectExt;
use crate::server::Server;

struct Body {
    mutations: Vec<Mutation>,
    wants_again: bool,
}

struct Mutation {
    is_json_patch: bool,
    expression: Compiled,
}

fn read(spec: &Value) -> Body {
    let read = |mutation: &Value| {
        let is_json_patch = mutation["patchType"] == "JSONPatch";
        let field = if is_json_patch { "jsonPatch" } else { "applyConfiguration" };
        Mutation { is_json_patch, expression: compile(mutation.str_at(&[field, "expression"])) }
    };
    Body {
        mutations: spec.list_at(&["mutations"]).iter().map(read).collect(),
        wants_again: spec["reinvocationPolicy"] == "IfNeeded",
    }
}

pub struct MutatingAdmissionPolicy(Policies<Body>);

impl Default for MutatingAdmissionPolicy {
    fn default() -> Self {
        Self(Policies::new("mutatingadmissionpolicies", "mutatingadmissionpolicybindings", read))
    }
}

#[async_trait]
impl Plugin for MutatingAdmissionPolicy {
    fn name(&self) -> &'static str {
        "MutatingAdmissionPolicy"
    }

    async fn admit(&self, server: &Arc<Server>, request: &mut AdmissionRequest<'_>) -> Result<()> {
        if hook::is_exempt(request.gvr) {
            return Ok(());
        }
        for bound in &self.0.current(server).bound {
            if request.reinvocation.is_again && !bound.policy.body.wants_again {
                continue;
            }
            change(server, bound, request)?;
        }
        Ok(())
    }
}

fn change(server: &Arc<Server>, bound: &Bound<Body>, request: &mut AdmissionRequest<'_>) -> Result<()> {
    let policy = &bound.policy;
    let Some((resource, served)) = policy.matches.version(server, request)? else { return Ok(()) };
    let matched = Matched { resource, served };
    for binding in &bound.bindings {
        if let Some(constraints) = &binding.matches
            && constraints.version(server, request)?.is_none()
        {
            continue;
        }
        let changed = policy
            .params(server, binding, request)
            .and_then(|all| all.iter().try_for_each(|params| change_with(server, bound, &matched, request, params)));
        match changed {
            Ok(()) => {}
            Err(why) if policy.ignores_failure => {
                tracing::warn!(policy = policy.name, why, "a policy is ignored, as its failurePolicy says");
            }
            Err(why) => {
                let (policy, binding) = (&policy.name, &binding.name);
                let mut status =
                    request.forbidden(format!("policy '{policy}' with binding '{binding}' denied request: {why}"));
                (status.code, status.reason) = (422, "Invalid".into());
                return Err(status);
            }
        }
    }
    Ok(())
}

fn change_with(
    server: &Arc<Server>,
    bound: &Bound<Body>,
    matched: &Matched,
    request: &mut AdmissionRequest<'_>,
    params: &Value,
) -> std::result::Result<(), String> {
    let policy = &bound.policy;
    for mutation in &policy.body.mutations {
        // Each mutation sees what those before it made.
        let mut scope = policy.scope(server, request, &matched.resource, &matched.served)?;
        scope.set_json("params", params);
        policy.set_variables(&mut scope);
        if !policy.conditions.hold_in(&scope)? {
            return Ok(());
        }
        let object = review::presented(&matched.resource, &matched.served, request.object);
        let object = object.map_err(|status| status.message)?;
        let changed = mutation.apply(matched, object, &scope)?;
        *request.object = review::restored(matched, changed)?;
    }
    Ok(())
}

impl Mutation {
    fn apply(&self, matched: &Matched, mut object: Value, scope: &Scope) -> std::result::Result<Value, String> {
        let expression = self.expression.as_ref().map_err(String::clone)?;
        let value = expression.evaluate(scope).map_err(|error| error.to_string())?;
        let value = to_json(value.as_ref()).ok_or("the mutation's expression does not result in an object")?;
        if self.is_json_patch {
            let patch = serde_json::to_vec(&value).map_err(|error| error.to_string())?;
            merge::json_patch(&mut object, &patch).map_err(|error| error.to_string())?;
            return Ok(object);
        }
        if value.get("kind").is_some() || value.get("apiVersion").is_some() {
            return Err("the apply configuration must not set kind or apiVersion".into());
        }
        match &matched.served.schema {
            Some(schema) => Ok(merge::merge_typed(schema, &object, &value)),
            None => {
                merge::merge_patch(&mut object, &value);
                Ok(object)
            }
        }
    }
}
