//! Admission: what may change or refuse a write after it is authorized. One plugin, one file.

use std::sync::Arc;

use apimachinery::meta::{GroupVersionKind, GroupVersionResource};
use apimachinery::status::Result;
use async_trait::async_trait;
use serde_json::Value;

use crate::auth::UserInfo;
use crate::config::Config;
use crate::server::Server;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    Create,
    Update,
    Delete,
    Connect,
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
    /// `CreateOptions`, `UpdateOptions` or `DeleteOptions`; `Null` when none were given.
    pub options: &'a Value,
}

#[async_trait]
pub trait Plugin: Send + Sync + 'static {
    /// As in `--enable-admission-plugins`.
    fn name(&self) -> &'static str;
    fn handles(&self, operation: Operation) -> bool;
    async fn admit(&self, _server: &Arc<Server>, _request: &mut AdmissionRequest<'_>) -> Result<()> {
        Ok(())
    }
    async fn validate(&self, _server: &Arc<Server>, _request: &AdmissionRequest<'_>) -> Result<()> {
        Ok(())
    }
}

/// The enabled plugins in upstream's order.
pub struct Admission {
    plugins: Vec<Box<dyn Plugin>>,
}

impl Admission {
    pub fn build(_config: &Config) -> Self {
        Self { plugins: vec![] }
    }

    pub async fn admit(&self, server: &Arc<Server>, request: &mut AdmissionRequest<'_>) -> Result<()> {
        let operation = request.operation;
        for plugin in self.plugins.iter().filter(|p| p.handles(operation)) {
            plugin.admit(server, request).await?;
        }
        Ok(())
    }

    pub async fn validate(&self, server: &Arc<Server>, request: &AdmissionRequest<'_>) -> Result<()> {
        for plugin in self.plugins.iter().filter(|p| p.handles(request.operation)) {
            plugin.validate(server, request).await?;
        }
        Ok(())
    }
}
