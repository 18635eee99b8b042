//! `pods/binding`: the scheduler's word on which node a pod runs.

use apimachinery::meta::validation::is_dns1123_subdomain;
use apimachinery::meta::{GroupResource, GroupVersionResource};
use apimachinery::status::{FieldError, Result, Status};
use async_trait::async_trait;
use serde_json::{Value, json};

use crate::registry::object::ObjectExt;
use crate::registry::strategy::{Cx, Strategy, SubresourceHandler, unsupported_verb};

pub struct Binding;

pub static BINDING: Binding = Binding;

/// The resource `bindings`: the same, by the name in the object.
pub struct Bindings;

pub static BINDINGS: Bindings = Bindings;

impl Strategy for Bindings {
    fn answers_create(&self) -> Option<&'static dyn SubresourceHandler> {
        Some(&BINDING)
    }
}

/// Where a binding may lead to.
fn rules(binding: &Value) -> Vec<FieldError> {
    let mut errors = Vec::new();
    let kind = binding.str_at(&["target", "kind"]);
    if !matches!(kind, "" | "Node") {
        errors.push(FieldError::not_supported("target.kind", kind, &["Node", "<empty>"]));
    }
    match binding.str_at(&["target", "name"]) {
        "" => errors.push(FieldError::required("target.name", "")),
        name => {
            errors.extend(is_dns1123_subdomain(name).into_iter().map(|m| FieldError::invalid("target.name", name, m)))
        }
    }
    errors
}

/// The pod as the binding makes it; a text says why it cannot be bound.
fn bind(mut pod: Value, binding: &Value, now: &str) -> std::result::Result<Value, String> {
    let name = pod.name().to_owned();
    if pod.is_being_deleted() {
        return Err(format!("pod {name} is being deleted, cannot be assigned to a host"));
    }
    let node = pod.str_at(&["spec", "nodeName"]);
    if !node.is_empty() {
        return Err(format!("pod {name} is already assigned to node {node:?}"));
    }
    if !pod.list_at(&["spec", "schedulingGates"]).is_empty() {
        return Err(format!("pod {name} has non-empty .spec.schedulingGates"));
    }
    pod.set(&["spec", "nodeName"], binding.str_at(&["target", "name"]));
    pod.remove_at(&["status", "nominatedNodeName"]);
    for field in ["annotations", "labels"] {
        for (key, value) in binding.map_at(&["metadata", field]).into_iter().flatten() {
            pod.set(&["metadata", field, key], value.clone());
        }
    }
    set_condition(
        &mut pod,
        json!({"type": "PodScheduled", "status": "True", "lastProbeTime": null, "lastTransitionTime": now}),
    );
    Ok(pod)
}

/// Puts a condition in the place of the one of its type. The time of the transition stays while the status does.
pub fn set_condition(pod: &mut Value, mut condition: Value) {
    let mut conditions = pod.list_at(&["status", "conditions"]).to_vec();
    match conditions.iter_mut().find(|known| known["type"] == condition["type"]) {
        Some(known) => {
            if known["status"] == condition["status"] {
                condition["lastTransitionTime"] = known["lastTransitionTime"].clone();
            }
            *known = condition;
        }
        None => conditions.push(condition),
    }
    pod.set(&["status", "conditions"], conditions);
}

#[async_trait]
impl SubresourceHandler for Binding {
    async fn handle(&self, cx: &Cx<'_>, name: &str, verb: &str, body: Value) -> Result<Value> {
        let resource = GroupResource::new("", "pods/binding");
        if verb != "create" {
            return Err(unsupported_verb(&resource, verb));
        }
        if !name.is_empty() && !body.name().is_empty() && body.name() != name {
            return Err(Status::bad_request("name in URL does not match name in Binding object"));
        }
        let name = if name.is_empty() { body.name() } else { name };
        let errors: Vec<String> = rules(&body).iter().map(ToString::to_string).collect();
        // Upstream has no status for this.
        match errors.as_slice() {
            [] => {}
            [one] => return Err(Status::failure(500, "", one)),
            many => return Err(Status::failure(500, "", format!("[{}]", many.join(", ")))),
        }
        let now = cx.now.strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        let conflict = |why: String| Status::conflict(&resource, name, why);
        let change = |pod: Value| {
            for (field, wanted, actual) in
                [("UID", body.uid(), pod.uid()), ("ResourceVersion", body.resource_version(), pod.resource_version())]
            {
                if !wanted.is_empty() && wanted != actual {
                    let why = format!(
                        "Precondition failed: {field} in precondition: {wanted}, {field} in object meta: {actual}"
                    );
                    return Err(conflict(why));
                }
            }
            bind(pod, &body, &now).map_err(conflict)
        };
        let pods = GroupVersionResource::new("", "v1", "pods");
        if cx.dry_run {
            change(cx.server.get(&pods, cx.namespace, name).await?)?;
        } else {
            cx.server.guaranteed_update(cx.user, &pods, cx.namespace, name, super::pod::INTERNAL, change).await?;
        }
        Ok(json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201}))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_is_bound_once() {
        let binding = json!({"metadata": {"annotations": {"a": "b"}}, "target": {"kind": "Node", "name": "n1"}});
        let pod =
            json!({"metadata": {"name": "p"}, "spec": {}, "status": {"phase": "Pending", "nominatedNodeName": "x"}});
        let bound = bind(pod, &binding, "2026-01-01T00:00:00Z").unwrap();
        assert_eq!(bound["spec"]["nodeName"], "n1");
        assert_eq!(bound["metadata"]["annotations"], json!({"a": "b"}));
        assert_eq!(bound["status"]["conditions"][0]["type"], "PodScheduled");
        assert!(bound["status"].get("nominatedNodeName").is_none());
        assert_eq!(bind(bound, &binding, ""), Err(r#"pod p is already assigned to node "n1""#.into()));
    }

    #[test]
    fn bindings_lead_to_nodes() {
        let errors = rules(&json!({"target": {"kind": "Pod"}}));
        let texts: Vec<String> = errors.iter().map(ToString::to_string).collect();
        assert_eq!(
            texts,
            [
                r#"target.kind: Unsupported value: "Pod": supported values: "Node", "<empty>""#,
                "target.name: Required value"
            ]
        );
    }
}
