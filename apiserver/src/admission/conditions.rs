//! `matchConditions`: expressions that all must hold before a webhook or a policy looks at a request.

use std::sync::Arc;

use serde_json::Value;

use super::AdmissionRequest;
use super::webhook::review;
use crate::auth::Attributes;
use crate::cel::library::authorizer::Authorizer;
use crate::cel::{Expression, Scope, budget};
use crate::registry::object::ObjectExt;
use crate::registry::{Resource, Served};
use crate::server::Server;

#[derive(Default)]
pub struct Conditions(Vec<Condition>);

struct Condition {
    name: String,
    /// Or why it cannot be used.
    expression: Result<Expression, String>,
}

impl Conditions {
    pub fn read(conditions: &[Value]) -> Self {
        let read = |condition: &Value| Condition {
            name: condition.str_at(&["name"]).to_owned(),
            expression: Expression::compile(condition.str_at(&["expression"])).map_err(|error| error.to_string()),
        };
        Self(conditions.iter().map(read).collect())
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether all hold for the request in the given version. One that is false decides, also when others fail.
    pub fn hold(
        &self,
        server: &Arc<Server>,
        request: &AdmissionRequest<'_>,
        resource: &Arc<Resource>,
        served: &Arc<Served>,
    ) -> Result<bool, String> {
        if self.is_empty() {
            return Ok(true);
        }
        self.hold_in(&scope_of(server, request, resource, served)?)
    }

    pub fn hold_in(&self, scope: &Scope) -> Result<bool, String> {
        let mut failed = None;
        let before = scope.spent();
        for condition in &self.0 {
            let answer = condition.expression.as_ref().map_err(String::clone);
            match answer.and_then(|expression| expression.evaluate_bool(scope).map_err(|error| error.to_string())) {
                _ if scope.spent() - before > budget::PER_CONDITIONS => {
                    return Err(
                        "validation failed due to running out of cost budget, no further match conditions will be run"
                            .into(),
                    );
                }
                Ok(true) => {}
                Ok(false) => return Ok(false),
                Err(why) => {
                    failed.get_or_insert(format!("match condition {:?} failed: {why}", condition.name));
                }
            }
        }
        failed.map_or(Ok(true), Err)
    }
}

/// `object`, `oldObject`, `request` and `authorizer` of a request in the given version.
pub fn scope_of(
    server: &Arc<Server>,
    request: &AdmissionRequest<'_>,
    resource: &Arc<Resource>,
    served: &Arc<Served>,
) -> Result<Scope, String> {
    let shown = |object: &Value| review::presented(resource, served, object).map_err(|status| status.message);
    let mut scope = Scope::default();
    scope.set_json("object", &shown(request.object)?);
    scope.set_json("oldObject", &request.old.map(shown).transpose()?.unwrap_or_default());
    scope.set_json("request", &review::describe_without_objects(served, request));
    set_authorizer(&mut scope, server, request);
    Ok(scope)
}

fn set_authorizer(scope: &mut Scope, server: &Arc<Server>, request: &AdmissionRequest<'_>) {
    let asked = server.clone();
    let authorizer = Authorizer::new(
        Arc::new(request.user.clone()),
        Arc::new(move |attributes: &Attributes<'_>| asked.auth.authorize(&asked, attributes)),
    );
    let (group, resource) = (&request.gvr.group, &request.gvr.resource);
    let own = authorizer.resource([group, resource, request.subresource, request.namespace, request.name]);
    scope.set("authorizer", Box::new(authorizer));
    scope.set("authorizer.requestResource", Box::new(own));
}
