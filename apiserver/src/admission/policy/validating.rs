//! Judging by `ValidatingAdmissionPolicy`: every validation must hold; what a binding says decides whether one that
//! does not refuses the request or only warns (<https://kubernetes.io/docs/reference/access-authn-authz/validating-admission-policy/>).

use std::sync::Arc;

use apimachinery::status::{Cause, Result, Status};
use async_trait::async_trait;
use serde_json::Value;

use super::super::webhook::hook;
use super::super::{AdmissionRequest, Operation, Plugin};
use super::{Binding, Bound, Compiled, Policies, compile};
use crate::cel::{Scope, budget};
use crate::registry::object::ObjectExt;
use crate::server::Server;

struct Validation {
    source: String,
    expression: Compiled,
    message: String,
    message_expression: Option<Compiled>,
    reason: String,
}

fn read(spec: &Value) -> Vec<Validation> {
    let read = |validation: &Value| Validation {
        source: validation.str_at(&["expression"]).trim().to_owned(),
        expression: compile(validation.str_at(&["expression"])),
        message: validation.str_at(&["message"]).to_owned(),
        message_expression: Some(validation.str_at(&["messageExpression"])).filter(|s| !s.is_empty()).map(compile),
        reason: validation.str_at(&["reason"]).to_owned(),
    };
    spec.list_at(&["validations"]).iter().map(read).collect()
}

pub struct ValidatingAdmissionPolicy(Policies<Vec<Validation>>);

impl Default for ValidatingAdmissionPolicy {
    fn default() -> Self {
        Self(Policies::new("validatingadmissionpolicies", "validatingadmissionpolicybindings", read))
    }
}

/// Why a validation does not hold.
struct Denial {
    message: String,
    reason: String,
}

#[async_trait]
impl Plugin for ValidatingAdmissionPolicy {
    fn name(&self) -> &'static str {
        "ValidatingAdmissionPolicy"
    }

    fn handles(&self, _: Operation) -> bool {
        true
    }

    async fn validate(&self, server: &Arc<Server>, request: &AdmissionRequest<'_>) -> Result<()> {
        if hook::is_exempt(request.gvr) {
            return Ok(());
        }
        for bound in &self.0.current(server).bound {
            judge(server, bound, request)?;
        }
        Ok(())
    }
}

fn judge(server: &Arc<Server>, bound: &Bound<Vec<Validation>>, request: &AdmissionRequest<'_>) -> Result<()> {
    let policy = &bound.policy;
    let Some((resource, served)) = policy.matches.version(server, request)? else { return Ok(()) };
    let mut scope = policy.scope(server, request, &resource, &served).map_err(Status::internal)?;
    for binding in &bound.bindings {
        if let Some(constraints) = &binding.matches
            && constraints.version(server, request)?.is_none()
        {
            continue;
        }
        let denials = match policy.params(server, binding, request) {
            Ok(params) => {
                let judged = params.iter().flat_map(|params| judge_with(bound, &mut scope, params));
                judged.collect()
            }
            Err(why) if policy.ignores_failure => {
                tracing::warn!(policy = policy.name, why, "a policy is ignored, as its failurePolicy says");
                vec![]
            }
            Err(why) => {
                let message = format!("failed to configure binding: {why}");
                vec![Denial { message, reason: String::new() }]
            }
        };
        enforce(&policy.name, binding, request, denials)?;
    }
    Ok(())
}

/// What does not hold with these parameters.
fn judge_with(bound: &Bound<Vec<Validation>>, scope: &mut Scope, params: &Value) -> Vec<Denial> {
    let policy = &bound.policy;
    scope.set_json("params", params);
    policy.set_variables(scope);
    match policy.conditions.hold_in(scope) {
        Ok(true) => {}
        Ok(false) => return vec![],
        Err(_) if policy.ignores_failure => return vec![],
        Err(message) => return vec![Denial { message, reason: String::new() }],
    }
    let mut denials = Vec::new();
    for validation in &policy.body {
        denials.extend(validation.denial(scope, policy.ignores_failure));
        if scope.spent() > budget::PER_REQUEST {
            let message =
                "validation failed due to running out of cost budget, no further validation rules will be run";
            denials.push(Denial { message: message.into(), reason: String::new() });
            break;
        }
    }
    denials
}

impl Validation {
    fn denial(&self, scope: &Scope, ignores_failure: bool) -> Option<Denial> {
        let holds = self.expression.as_ref().map_err(String::clone);
        match holds.and_then(|expression| expression.evaluate_bool(scope).map_err(|error| error.to_string())) {
            Ok(true) => None,
            Ok(false) => Some(Denial { message: self.complaint(scope), reason: self.reason.clone() }),
            Err(_) if ignores_failure => None,
            Err(message) => Some(Denial { message, reason: String::new() }),
        }
    }

    /// The message that the policy computes, or has, or one made of the expression.
    fn complaint(&self, scope: &Scope) -> String {
        let computed = self.message_expression.as_ref().and_then(|expression| expression.as_ref().ok());
        let computed = computed.and_then(|expression| expression.evaluate_string(scope).ok());
        let computed = computed.filter(|text| !text.trim().is_empty() && !text.contains('\n'));
        match (computed, self.message.as_str()) {
            (Some(text), _) => text,
            (None, "") => format!("failed expression: {}", self.source),
            (None, message) => message.to_owned(),
        }
    }
}

fn enforce(policy: &str, binding: &Binding, request: &AdmissionRequest<'_>, denials: Vec<Denial>) -> Result<()> {
    let does = |action: &str| binding.actions.iter().any(|given| given == action);
    if does("Warn") {
        for denial in &denials {
            let (binding, message) = (&binding.name, &denial.message);
            request.warnings.add(&format!(
                "Validation failed for ValidatingAdmissionPolicy '{policy}' with binding '{binding}': {message}"
            ));
        }
    }
    match denials.into_iter().next() {
        Some(denial) if does("Deny") => Err(refusal(policy, &binding.name, request, denial)),
        _ => Ok(()),
    }
}

fn refusal(policy: &str, binding: &str, request: &AdmissionRequest<'_>, denial: Denial) -> Status {
    let why = denial.message;
    let message = format!("ValidatingAdmissionPolicy '{policy}' with binding '{binding}' denied request: {why}");
    let mut status = request.forbidden(&message);
    status.reason = if denial.reason.is_empty() { "Invalid".into() } else { denial.reason };
    status.code = match status.reason.as_str() {
        "Unauthorized" => 401,
        "Forbidden" => 403,
        "RequestEntityTooLarge" => 413,
        _ => 422,
    };
    let mut details = status.details.take().unwrap_or_default();
    details.causes.push(Cause { message, ..Cause::default() });
    status.details = Some(details);
    status
}
