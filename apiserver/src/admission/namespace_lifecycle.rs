//! Nothing is created in a namespace that does not exist or is going away, and the system namespaces stay.

use std::sync::Arc;

use apimachinery::meta::GroupResource;
use apimachinery::status::{Cause, Result, Status};
use async_trait::async_trait;
use serde_json::Value;

use super::{AdmissionRequest, Operation, Plugin, present};
use crate::registry::object::ObjectExt;
use crate::server::Server;

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

async fn find(server: &Arc<Server>, name: &str) -> Result<Value> {
    let found = present(server, "", "namespaces", "", name).await?;
    found.ok_or_else(|| Status::not_found(&GroupResource::new("", "namespaces"), name))
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
