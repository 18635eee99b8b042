//! Classes that are looked up by name: the runtime class brings overhead and scheduling rules to a pod; ingresses
//! without a class get the default one.

use std::sync::Arc;

use apimachinery::status::Result;
use async_trait::async_trait;
use serde_json::Value;

use super::{AdmissionRequest, Operation, Plugin, cached_list, present};
use crate::registry::object::ObjectExt;
use crate::server::Server;

pub struct RuntimeClass;

impl RuntimeClass {
    async fn find(server: &Server, request: &AdmissionRequest<'_>) -> Result<Option<Value>> {
        let name = request.object.str_at(&["spec", "runtimeClassName"]);
        if name.is_empty() {
            return Ok(None);
        }
        let found = present(server, "node.k8s.io", "runtimeclasses", "", name).await?;
        found.map(Some).ok_or_else(|| request.forbidden(format!("pod rejected: RuntimeClass {name:?} not found")))
    }
}

#[async_trait]
impl Plugin for RuntimeClass {
    fn name(&self) -> &'static str {
        "RuntimeClass"
    }

    fn handles(&self, operation: Operation) -> bool {
        operation == Operation::Create
    }

    async fn admit(&self, server: &Arc<Server>, request: &mut AdmissionRequest<'_>) -> Result<()> {
        if !request.creates("", "pods") {
            return Ok(());
        }
        let Some(class) = Self::find(server, request).await? else { return Ok(()) };
        if let Some(overhead) = class.at(&["overhead", "podFixed"]).filter(|map| !map.is_null()) {
            let given = request.object.at(&["spec", "overhead"]).filter(|given| !given.is_null());
            if given.is_some_and(|given| given != overhead) {
                return Err(
                    request.forbidden("pod rejected: Pod's Overhead doesn't match RuntimeClass's defined Overhead")
                );
            }
            request.object.set(&["spec", "overhead"], overhead.clone());
        }
        for (key, wanted) in class.map_at(&["scheduling", "nodeSelector"]).into_iter().flatten() {
            let given = request.object.at(&["spec", "nodeSelector", key]).cloned();
            if let Some(given) = given.filter(|given| given != wanted) {
                let name = class.name();
                return Err(request.forbidden(format!(
                    "conflict: runtimeClass.scheduling.nodeSelector[{key}] = {wanted}; pod.spec.nodeSelector[{key}] = {given}; runtimeClassName = {name}"
                )));
            }
            request.object.set(&["spec", "nodeSelector", key], wanted.clone());
        }
        let tolerations = class.list_at(&["scheduling", "tolerations"]);
        if !tolerations.is_empty() {
            let mut all = request.object.list_at(&["spec", "tolerations"]).to_vec();
            all.extend(tolerations.iter().filter(|new| !all.contains(new)).cloned().collect::<Vec<_>>());
            request.object.set(&["spec", "tolerations"], all);
        }
        Ok(())
    }

    async fn validate(&self, server: &Arc<Server>, request: &AdmissionRequest<'_>) -> Result<()> {
        if !request.creates("", "pods") {
            return Ok(());
        }
        let has_overhead = request.object.map_at(&["spec", "overhead"]).is_some_and(|map| !map.is_empty());
        match Self::find(server, request).await? {
            None if has_overhead => {
                Err(request
                    .forbidden("pod rejected: Pod Overhead set without corresponding RuntimeClass defined Overhead"))
            }
            _ => Ok(()),
        }
    }
}

pub struct DefaultIngressClass;

#[async_trait]
impl Plugin for DefaultIngressClass {
    fn name(&self) -> &'static str {
        "DefaultIngressClass"
    }

    fn handles(&self, operation: Operation) -> bool {
        operation == Operation::Create
    }

    async fn admit(&self, server: &Arc<Server>, request: &mut AdmissionRequest<'_>) -> Result<()> {
        const IS_DEFAULT: &str = "ingressclass.kubernetes.io/is-default-class";
        let has_class = request.object.at(&["spec", "ingressClassName"]).is_some_and(|class| !class.is_null())
            || request.object.annotation("kubernetes.io/ingress.class").is_some();
        if !request.creates("networking.k8s.io", "ingresses") || has_class {
            return Ok(());
        }
        let mut classes = cached_list(server, "networking.k8s.io", "ingressclasses", None);
        classes.retain(|class| class.annotation(IS_DEFAULT) == Some("true"));
        let created = |class: &Value| class.str_at(&["metadata", "creationTimestamp"]).to_owned();
        classes.sort_by(|a, b| created(b).cmp(&created(a)).then_with(|| a.name().cmp(b.name())));
        if let Some(class) = classes.first() {
            request.object.set(&["spec", "ingressClassName"], class.name());
        }
        Ok(())
    }
}
