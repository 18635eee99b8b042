//! Turns the priority class of a new pod into its number and preemption policy, and keeps the number of global
//! defaults at one.

use std::sync::Arc;

use apimachinery::status::Result;
use async_trait::async_trait;
use serde_json::Value;

use super::{AdmissionRequest, Operation, Plugin, cached, cached_list};
use crate::registry::object::ObjectExt;
use crate::server::Server;

const GROUP: &str = "scheduling.k8s.io";
const RESOURCE: &str = "priorityclasses";

/// Classes that the cluster's own pods have.
const SYSTEM: [&str; 2] = ["system-node-critical", "system-cluster-critical"];

pub struct Priority;

#[async_trait]
impl Plugin for Priority {
    fn name(&self) -> &'static str {
        "Priority"
    }

    fn handles(&self, operation: Operation) -> bool {
        operation != Operation::Connect
    }

    async fn admit(&self, server: &Arc<Server>, request: &mut AdmissionRequest<'_>) -> Result<()> {
        if request.operation == Operation::Delete {
            let is_system = request.is(GROUP, RESOURCE) && SYSTEM.contains(&request.name);
            return match is_system {
                true => Err(request.forbidden("this is a system priority class and cannot be deleted")),
                false => Ok(()),
            };
        }
        if !request.is("", "pods") {
            return Ok(());
        }
        if request.operation == Operation::Create {
            return set_priority(server, request);
        }
        for field in ["priority", "preemptionPolicy"] {
            let old = request.old.and_then(|old| old.at(&["spec", field])).cloned();
            if let Some(value) = old {
                request.object.set_default(&["spec", field], value);
            }
        }
        Ok(())
    }

    async fn validate(&self, server: &Arc<Server>, request: &AdmissionRequest<'_>) -> Result<()> {
        if !request.is(GROUP, RESOURCE) || request.object.bool_at(&["globalDefault"]) != Some(true) {
            return Ok(());
        }
        let other = cached_list(server, GROUP, RESOURCE, None)
            .into_iter()
            .find(|class| class.bool_at(&["globalDefault"]) == Some(true) && class.name() != request.object.name());
        match other {
            Some(class) => Err(request.forbidden(format!(
                "PriorityClass {} is already marked as default. Only one default can exist",
                class.name()
            ))),
            None => Ok(()),
        }
    }
}

/// The class that a pod gets without naming one: of the global defaults, the lowest.
fn default_class(server: &Server) -> Option<Value> {
    let classes = cached_list(server, GROUP, RESOURCE, None).into_iter();
    classes.filter(|class| class.bool_at(&["globalDefault"]) == Some(true)).min_by_key(|class| class.i64_at(&["value"]))
}

fn set_priority(server: &Server, request: &mut AdmissionRequest<'_>) -> Result<()> {
    let name = request.object.str_at(&["spec", "priorityClassName"]).to_owned();
    let class = match name.is_empty() {
        true => default_class(server),
        false => Some(
            cached(server, GROUP, RESOURCE, "", &name)
                .ok_or_else(|| request.forbidden(format!("no PriorityClass with name {name} was found")))?,
        ),
    };
    let priority = class.as_ref().and_then(|class| class.i64_at(&["value"])).unwrap_or(0);
    let policy = class.as_ref().map_or("", |class| class.str_at(&["preemptionPolicy"]));
    let policy = if policy.is_empty() { "PreemptLowerPriority" } else { policy }.to_owned();
    let given = request.object.i64_at(&["spec", "priority"]).filter(|given| *given != priority);
    if let Some(given) = given {
        return Err(request.forbidden(format!(
            "the integer value of priority ({given}) must not be provided in pod spec; priority admission controller computed {priority} from the given PriorityClass name"
        )));
    }
    let given = request.object.str_at(&["spec", "preemptionPolicy"]);
    if !given.is_empty() && given != policy {
        return Err(request.forbidden(format!(
            "the string value of PreemptionPolicy ({given}) must not be provided in pod spec; priority admission controller computed {policy} from the given PriorityClass name"
        )));
    }
    if let Some(class) = &class {
        request.object.set(&["spec", "priorityClassName"], class.name());
    }
    request.object.set(&["spec", "priority"], priority);
    request.object.set(&["spec", "preemptionPolicy"], policy);
    Ok(())
}
