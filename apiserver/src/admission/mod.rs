//! Admission: what may change or refuse a write after it is authorized. One plugin, one file; this file holds their
//! order, which is upstream's, and the choice by `--enable-admission-plugins` and `--disable-admission-plugins`.
//! Plugins look at the caches and at the object; what they may write is said in their file.

mod certificates;
mod classes;
mod conditions;
mod default_tolerations;
mod limit_ranger;
mod matching;
mod namespace_lifecycle;
mod node_restriction;
mod pod_security;
pub mod policy;
mod priority;
mod rbac_escalation;
mod resource_quota;
mod resources;
mod service_account;
mod storage;
mod webhook;

use std::sync::Arc;

use apimachinery::meta::{GroupResource, GroupVersionKind, GroupVersionResource};
use apimachinery::status::{Result, Status};
use async_trait::async_trait;
use serde_json::Value;
pub use webhook::Reinvocation;

use crate::auth::UserInfo;
use crate::config::Config;
use crate::registry::object::ObjectExt;
use crate::server::Server;
use crate::verbs::WriteOptions;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    Create,
    Update,
    Delete,
    Connect,
}

impl Operation {
    /// As in rules and reviews.
    pub fn name(self) -> &'static str {
        match self {
            Self::Create => "CREATE",
            Self::Update => "UPDATE",
            Self::Delete => "DELETE",
            Self::Connect => "CONNECT",
        }
    }
}

/// Texts for `Warning` headers of the answer, whatever it will be; each is kept once.
#[derive(Debug, Default)]
pub struct Warnings(parking_lot::Mutex<Vec<String>>);

impl Warnings {
    pub fn add(&self, text: &str) {
        let mut texts = self.0.lock();
        if !texts.iter().any(|known| known == text) {
            texts.push(text.to_owned());
        }
    }

    pub fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock())
    }
}

/// One write on its way in.
pub struct AdmissionRequest<'a> {
    pub gvk: &'a GroupVersionKind,
    pub gvr: &'a GroupVersionResource,
    pub namespace: &'a str,
    pub name: &'a str,
    pub operation: Operation,
    pub subresource: &'a str,
    /// `Null` on delete.
    pub object: &'a mut Value,
    pub old: Option<&'a Value>,
    pub user: &'a UserInfo,
    pub dry_run: bool,
    pub options: &'a WriteOptions,
    pub warnings: &'a Warnings,
    pub reinvocation: Reinvocation,
}

impl AdmissionRequest<'_> {
    /// Whether it is about this resource itself, not about a subresource of it.
    pub fn is(&self, group: &str, resource: &str) -> bool {
        self.is_any(group, resource) && self.subresource.is_empty()
    }

    /// Whether it is about this resource or any subresource of it.
    pub fn is_any(&self, group: &str, resource: &str) -> bool {
        self.gvr.group == group && self.gvr.resource == resource
    }

    pub fn creates(&self, group: &str, resource: &str) -> bool {
        self.operation == Operation::Create && self.is(group, resource)
    }

    pub fn group_resource(&self) -> GroupResource {
        self.gvr.group_resource()
    }

    /// The name as messages show it: of a new object without one, what the name is generated from.
    pub fn shown_name(&self) -> &str {
        let candidates = [self.name, self.object.name(), self.object.str_at(&["metadata", "generateName"])];
        candidates.into_iter().find(|name| !name.is_empty()).unwrap_or_default()
    }

    /// The 403 of a plugin that refuses.
    pub fn forbidden(&self, why: impl std::fmt::Display) -> Status {
        Status::forbidden(&self.group_resource(), self.shown_name(), why)
    }
}

/// One plugin. `admit` runs before `validate`, and may run again on the same object when a write is tried again.
#[async_trait]
pub trait Plugin: Send + Sync + 'static {
    /// As in `--enable-admission-plugins`.
    fn name(&self) -> &'static str;

    fn handles(&self, operation: Operation) -> bool {
        matches!(operation, Operation::Create | Operation::Update)
    }

    /// May change the object, or refuse.
    async fn admit(&self, _server: &Arc<Server>, _request: &mut AdmissionRequest<'_>) -> Result<()> {
        Ok(())
    }

    /// May only refuse.
    async fn validate(&self, _server: &Arc<Server>, _request: &AdmissionRequest<'_>) -> Result<()> {
        Ok(())
    }
}

/// An object as the caches know it.
pub fn cached(server: &Server, group: &str, resource: &str, namespace: &str, name: &str) -> Option<Value> {
    server.caches.get(group, resource)?.get(namespace, name).map(|stored| stored.value())
}

/// An object that a request relies on: what the caches do not know may just have been made, so they are asked again when
/// they hold all that was written before now.
pub async fn present(
    server: &Server,
    group: &str,
    resource: &str,
    namespace: &str,
    name: &str,
) -> Result<Option<Value>> {
    if let Some(found) = cached(server, group, resource, namespace, name) {
        return Ok(Some(found));
    }
    server.freshness.reach_present(&server.caches).await.map_err(|error| crate::verbs::stale(&error))?;
    Ok(cached(server, group, resource, namespace, name))
}

/// All objects of a resource as the caches know them.
pub fn cached_list(server: &Server, group: &str, resource: &str, namespace: Option<&str>) -> Vec<Value> {
    let Some(cache) = server.caches.get(group, resource) else { return Vec::new() };
    cache.list(namespace).iter().map(|stored| stored.value()).collect()
}

/// The plugins in upstream's order, and whether each is on without being asked for.
fn all(config: &Config) -> Vec<(Box<dyn Plugin>, bool)> {
    vec![
        (Box::new(namespace_lifecycle::NamespaceLifecycle), true),
        (Box::new(limit_ranger::LimitRanger), true),
        (Box::new(service_account::ServiceAccount), true),
        (Box::new(node_restriction::NodeRestriction), false),
        (Box::new(node_restriction::TaintNodesByCondition), true),
        (Box::new(pod_security::PodSecurity), true),
        (Box::new(priority::Priority), true),
        (Box::new(default_tolerations::DefaultTolerationSeconds::new(config)), true),
        (Box::new(storage::DefaultStorageClass), true),
        (Box::new(storage::StorageObjectInUseProtection), true),
        (Box::new(storage::PersistentVolumeClaimResize), true),
        (Box::new(classes::RuntimeClass), true),
        (Box::new(certificates::CertificateApproval), true),
        (Box::new(certificates::CertificateSigning), true),
        (Box::new(certificates::CertificateSubjectRestriction), true),
        (Box::new(classes::DefaultIngressClass), true),
        (Box::<policy::MutatingAdmissionPolicy>::default(), true),
        (Box::<webhook::MutatingAdmissionWebhook>::default(), true),
        (Box::<policy::ValidatingAdmissionPolicy>::default(), true),
        (Box::<webhook::ValidatingAdmissionWebhook>::default(), true),
        (Box::<resource_quota::ResourceQuota>::default(), true),
    ]
}

/// The enabled plugins in upstream's order.
pub struct Admission {
    plugins: Vec<Box<dyn Plugin>>,
}

impl Admission {
    pub fn build(config: &Config) -> Self {
        let has = |list: &[String], name: &str| list.iter().any(|given| given == name);
        let enabled = |name: &str, default: bool| {
            (default || has(&config.enable_admission_plugins, name)) && !has(&config.disable_admission_plugins, name)
        };
        let chosen = all(config).into_iter().filter(|(plugin, default)| enabled(plugin.name(), *default));
        let mut plugins: Vec<Box<dyn Plugin>> = chosen.map(|(plugin, _)| plugin).collect();
        plugins.push(Box::<rbac_escalation::RbacEscalation>::default());
        Self { plugins }
    }

    pub async fn admit(&self, server: &Arc<Server>, request: &mut AdmissionRequest<'_>) -> Result<()> {
        self.admit_once(server, request).await?;
        if request.reinvocation.is_wanted {
            request.reinvocation.begin_again();
            self.admit_once(server, request).await?;
        }
        Ok(())
    }

    async fn admit_once(&self, server: &Arc<Server>, request: &mut AdmissionRequest<'_>) -> Result<()> {
        let operation = request.operation;
        for plugin in self.plugins.iter().filter(|plugin| plugin.handles(operation)) {
            plugin.admit(server, request).await?;
        }
        Ok(())
    }

    pub async fn validate(&self, server: &Arc<Server>, request: &AdmissionRequest<'_>) -> Result<()> {
        for plugin in self.plugins.iter().filter(|plugin| plugin.handles(request.operation)) {
            plugin.validate(server, request).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(change: impl FnOnce(&mut Config)) -> Vec<&'static str> {
        let mut config = Config::for_etcd("http://127.0.0.1:1");
        change(&mut config);
        Admission::build(&config).plugins.iter().map(|plugin| plugin.name()).collect()
    }

    #[test]
    fn flags_choose_the_plugins() {
        assert!(names(|_| {}).contains(&"ServiceAccount"));
        assert!(!names(|_| {}).contains(&"NodeRestriction"));
        assert!(
            names(|config| config.enable_admission_plugins = vec!["NodeRestriction".into()])
                .contains(&"NodeRestriction")
        );
        assert!(
            !names(|config| config.disable_admission_plugins = vec!["ServiceAccount".into()])
                .contains(&"ServiceAccount")
        );
    }
}
