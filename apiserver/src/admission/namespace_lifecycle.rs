//! Nothing is created in a namespace that does not exist or is going away, and the system namespaces stay.

use std::sync::Arc;
use std::time::Duration;

use apimachinery::meta::{GroupResource, GroupVersionResource};
use apimachinery::status::{Cause, Result, Status};
use async_trait::async_trait;
use serde_json::Value;

use super::{AdmissionRequest, Operation, Plugin, cached};
use crate::registry::object::ObjectExt;
use crate::server::Server;

/// A namespace that was created a moment ago may not be in the caches yet.
const WAIT: Duration = Duration::from_millis(50);

pub struct NamespaceLifecycle;

#[async_trait]
impl Plugin for NamespaceLifecycle {
    fn name(&self) -> &'static str {
        "NamespaceLifecycle"
    }

    fn handles(&self, operation: Operation) -> bool {
        matches!(operation, Operation::Create | Operation::Delete)
    }

    async fn admit(&self, server: &Arc<Server>, request: &mut AdmissionRequest<'_>) -> Result<()> {
        if request.is_any("", "namespaces") {
            let is_immortal = matches!(request.name, "default" | "kube-system" | "kube-public");
            return match request.operation == Operation::Delete && request.subresource.is_empty() && is_immortal {
                true => Err(request.forbidden("this namespace may not be deleted")),
                false => Ok(()),
            };
        }
        let is_review = request.is_any("authorization.k8s.io", "localsubjectaccessreviews");
        if request.operation != Operation::Create || request.namespace.is_empty() || is_review {
            return Ok(());
        }
        let namespace = find(server, request.namespace).await?;
        if namespace.str_at(&["status", "phase"]) == "Terminating" || namespace.is_being_deleted() {
            return Err(terminating(request));
        }
        Ok(())
    }
}

/// From the caches, after a moment again, and at last from the store.
async fn find(server: &Arc<Server>, name: &str) -> Result<Value> {
    if let Some(found) = cached(server, "", "namespaces", "", name) {
        return Ok(found);
    }
    tokio::time::sleep(WAIT).await;
    if let Some(found) = cached(server, "", "namespaces", "", name) {
        return Ok(found);
    }
    server.get(&GroupVersionResource::new("", "v1", "namespaces"), "", name).await.map_err(|error| {
        match error.reason.as_str() {
            "NotFound" => Status::not_found(&GroupResource::new("", "namespaces"), name),
            _ => error,
        }
    })
}

fn terminating(request: &AdmissionRequest<'_>) -> Status {
    let namespace = request.namespace;
    let why = format!("unable to create new content in namespace {namespace} because it is being terminated");
    let mut status = request.forbidden(why);
    if let Some(details) = &mut status.details {
        details.causes.push(Cause {
            reason: "NamespaceTerminating".into(),
            message: format!("namespace {namespace} is being terminated"),
            field: "metadata.namespace".into(),
        });
    }
    status
}
