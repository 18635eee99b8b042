//! The server-wide handle: what strategies, admission plugins, authorizers and routes reach everything through, and
//! the internal client, which takes the same way as HTTP requests without the network.

use std::sync::Arc;
use std::time::Duration;

use apimachinery::meta::GroupVersionResource;
use apimachinery::process::CancellationToken;
use apimachinery::status::{Result, Status};
use serde_json::Value;

use crate::admission::Admission;
use crate::audit::{AuditError, Auditor};
use crate::auth::{AuthSetupError, Chain, UserInfo};
use crate::cache::{Caches, Freshness, feed};
use crate::config::Config;
use crate::extensions::aggregation::{self, Aggregator};
use crate::flow::Flow;
use crate::http::filters::InFlight;
use crate::http::listener::{ListenError, Listener};
use crate::http::outbound::OutboundError;
use crate::http::proxy::Proxies;
use crate::registry::Registry;
use crate::registry::object::ObjectExt;
use crate::registry::strategy::{DeleteOptions, Subresource};
use crate::storage::encryption::{Encrypted, EncryptionConfig, EncryptionConfigError};
use crate::storage::{Store, StoreError};
use crate::verbs::update::Made;
use crate::verbs::{self, Call, WriteOptions};

/// Everything that lives as long as the process.
pub struct Server {
    pub config: Config,
    pub store: Arc<dyn Store>,
    pub caches: Arc<Caches>,
    pub freshness: Freshness,
    pub registry: Registry,
    pub auth: Chain,
    /// `None`: nothing is audited.
    pub audit: Option<Arc<Auditor>>,
    pub admission: Admission,
    pub aggregator: Aggregator,
    pub proxies: Proxies,
    pub in_flight: InFlight,
    /// `None`: requests are only counted.
    pub flow: Option<Arc<Flow>>,
    pub shutdown: CancellationToken,
}

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("--etcd-servers must be given")]
    NoEtcd,
    #[error("cannot use etcd")]
    Store(#[source] StoreError),
    #[error("cannot set up encryption at rest")]
    Encryption(#[source] EncryptionConfigError),
    #[error("cannot set up authentication and authorization")]
    Auth(#[source] AuthSetupError),
    #[error("cannot set up auditing")]
    Audit(#[source] AuditError),
    #[error("cannot set up connections to kubelets and pods")]
    Outbound(#[source] OutboundError),
    #[error("cannot serve")]
    Listen(#[source] ListenError),
}

impl Server {
    /// Connects to the store, starts to fill the caches, and puts everything together. Must run inside the runtime.
    pub fn start(config: Config, store: Arc<dyn Store>, shutdown: CancellationToken) -> Result<Arc<Self>, StartError> {
        let store: Arc<dyn Store> = match &config.encryption_provider_config {
            Some(path) => {
                let encryption = EncryptionConfig::read(path, &config.etcd_prefix).map_err(StartError::Encryption)?;
                Arc::new(Encrypted::new(store, encryption))
            }
            None => store,
        };
        let caches = Arc::new(Caches::default());
        let enabled =
            |api: &apimachinery::schema::ApiResource| is_enabled(&config.runtime_config, api.group, api.version);
        let registry = Registry::builtin(&caches, &config.etcd_prefix, enabled);
        let freshness = Freshness::start(store.clone(), config.etcd_prefix.clone(), caches.clone(), shutdown.clone());
        tokio::spawn(feed::run(store.clone(), config.etcd_prefix.clone(), caches.clone(), shutdown.clone()));
        tokio::spawn(compact(store.clone(), caches.clone(), config.etcd_compaction_interval, shutdown.clone()));
        let flow = config.enable_priority_and_fairness.then(|| {
            let total = config.max_requests_inflight + config.max_mutating_requests_inflight;
            Arc::new(Flow::new(&caches, total, config.request_timeout))
        });
        if let Some(flow) = &flow {
            tokio::spawn(flow.clone().lend(shutdown.clone()));
        }
        Ok(Arc::new(Self {
            auth: Chain::build(&config).map_err(StartError::Auth)?,
            audit: Auditor::build(&config).map_err(StartError::Audit)?,
            admission: Admission::build(&config),
            aggregator: Aggregator::default(),
            proxies: Proxies::build(&config).map_err(StartError::Outbound)?,
            in_flight: InFlight::new(config.max_requests_inflight, config.max_mutating_requests_inflight),
            flow,
            config,
            store,
            caches,
            freshness,
            registry,
            shutdown,
        }))
    }

    /// Runs a whole server on etcd until shutdown.
    pub async fn run(config: Config, shutdown: CancellationToken) -> Result<(), StartError> {
        if config.etcd_servers.is_empty() {
            return Err(StartError::NoEtcd);
        }
        let listener = Listener::bind(&config).await.map_err(StartError::Listen)?;
        let etcd = crate::storage::etcd::Etcd::connect(&config).await.map_err(StartError::Store)?;
        let server = Self::start(config, Arc::new(etcd), shutdown)?;
        tokio::spawn(crate::extensions::run(server.clone()));
        tokio::spawn(aggregation::run(server.clone()));
        tokio::spawn(crate::admission::policy::types::run(server.clone()));
        tokio::spawn(crate::bootstrap::flow_control::watch_over(server.clone()));
        let bootstrap = tokio::spawn(crate::bootstrap::run(server.clone()));
        listener.serve(server).await;
        if let Err(error) = bootstrap.await {
            tracing::error!(%error, "bootstrap did not end well");
        }
        Ok(())
    }

    /// The object as it is now.
    pub async fn get(self: &Arc<Self>, gvr: &GroupVersionResource, namespace: &str, name: &str) -> Result<Value> {
        let user = UserInfo::server();
        let call = self.call(&user, gvr, namespace, name, "")?;
        let stored = verbs::get::get(&call, None).await?;
        call.resource.present(&call.served, stored.value())
    }

    /// Creates the object; the answer is what is stored.
    pub async fn create(
        self: &Arc<Self>,
        user: &UserInfo,
        gvr: &GroupVersionResource,
        namespace: &str,
        object: Value,
    ) -> Result<Value> {
        let call = self.call(user, gvr, namespace, object.name(), "")?;
        let written = verbs::create::create(&call, object).await?;
        call.resource.present(&call.served, written.object)
    }

    /// Creates the object as one of the server's parts that own their fields apart.
    pub async fn create_managed(
        self: &Arc<Self>,
        user: &UserInfo,
        gvr: &GroupVersionResource,
        namespace: &str,
        object: Value,
        manager: &str,
    ) -> Result<Value> {
        let mut call = self.call(user, gvr, namespace, object.name(), "")?;
        manager.clone_into(&mut call.options.field_manager);
        let written = verbs::create::create(&call, object).await?;
        call.resource.present(&call.served, written.object)
    }

    /// Applies a status, whoever had it before.
    pub async fn apply_status(
        self: &Arc<Self>,
        user: &UserInfo,
        gvr: &GroupVersionResource,
        namespace: &str,
        config: Value,
        manager: &str,
    ) -> Result<Value> {
        let mut call = self.call(user, gvr, namespace, config.name(), "status")?;
        manager.clone_into(&mut call.options.field_manager);
        call.options.force = true;
        let written = verbs::patch::patch(&call, &verbs::patch::Patch::Apply(config)).await?;
        call.resource.present(&call.served, written.object)
    }

    pub async fn update(
        self: &Arc<Self>,
        user: &UserInfo,
        gvr: &GroupVersionResource,
        namespace: &str,
        object: Value,
    ) -> Result<Value> {
        self.update_as(user, gvr, namespace, object, "").await
    }

    pub async fn update_status(
        self: &Arc<Self>,
        user: &UserInfo,
        gvr: &GroupVersionResource,
        namespace: &str,
        object: Value,
    ) -> Result<Value> {
        self.update_as(user, gvr, namespace, object, "status").await
    }

    async fn update_as(
        self: &Arc<Self>,
        user: &UserInfo,
        gvr: &GroupVersionResource,
        namespace: &str,
        object: Value,
        subresource: &str,
    ) -> Result<Value> {
        let call = self.call(user, gvr, namespace, object.name(), subresource)?;
        let written = verbs::update::update(&call, object).await?;
        call.resource.present(&call.served, written.object)
    }

    /// Deletes the object with the kind's defaults.
    pub async fn delete(
        self: &Arc<Self>,
        user: &UserInfo,
        gvr: &GroupVersionResource,
        namespace: &str,
        name: &str,
    ) -> Result<Value> {
        self.delete_with(user, gvr, namespace, name, &DeleteOptions::default()).await
    }

    pub async fn delete_with(
        self: &Arc<Self>,
        user: &UserInfo,
        gvr: &GroupVersionResource,
        namespace: &str,
        name: &str,
        options: &DeleteOptions,
    ) -> Result<Value> {
        let call = self.call(user, gvr, namespace, name, "")?;
        let deleted = verbs::delete::delete(&call, options).await?;
        verbs::delete::answer(&call, &deleted)
    }

    /// Changes the object as `change` says, again and again until nobody else was faster. `change` sees and returns
    /// the storage version; with a `subresource` (`status`) only that part is written.
    pub async fn guaranteed_update(
        self: &Arc<Self>,
        user: &UserInfo,
        gvr: &GroupVersionResource,
        namespace: &str,
        name: &str,
        subresource: &str,
        mut change: impl FnMut(Value) -> Result<Value> + Send,
    ) -> Result<Value> {
        let call = self.call(user, gvr, namespace, name, subresource)?;
        let written = verbs::update::change(&call, &mut |old| {
            let old = old.ok_or_else(|| call.not_found(name))?;
            let object = change(old.clone())?;
            Ok(Made { object, managed: false })
        })
        .await?;
        call.resource.present(&call.served, written.object)
    }

    fn call<'a>(
        self: &'a Arc<Self>,
        user: &'a UserInfo,
        gvr: &GroupVersionResource,
        namespace: &str,
        name: &str,
        subresource: &str,
    ) -> Result<Call<'a>> {
        let resource = self.registry.get(&gvr.group, &gvr.resource).ok_or_else(Status::path_not_found)?;
        let served = resource.version(&gvr.version).ok_or_else(Status::path_not_found)?.clone();
        let mut call = Call::new(self, user, resource, served);
        if let Some(Subresource::Custom(_)) = call.resource.strategy.subresource(subresource) {
            return Err(Status::bad_request(format!("{subresource} is not a part of the object")));
        }
        if call.resource.namespaced {
            namespace.clone_into(&mut call.namespace);
        }
        name.clone_into(&mut call.name);
        subresource.clone_into(&mut call.subresource);
        call.options = WriteOptions { field_manager: "kube-apiserver".into(), ..WriteOptions::default() };
        Ok(call)
    }
}

/// Stable versions are served unless --runtime-config says otherwise; others only when it says so.
fn is_enabled(runtime_config: &[String], group: &str, version: &str) -> bool {
    let is_stable = !version.contains("alpha") && !version.contains("beta");
    let full = if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") };
    let mut enabled = is_stable;
    for entry in runtime_config {
        let (name, value) = entry.split_once('=').unwrap_or((entry, "true"));
        let applies = match name {
            "api/all" => true,
            "api/ga" => is_stable,
            "api/beta" => version.contains("beta"),
            "api/alpha" => version.contains("alpha"),
            name => name == full,
        };
        if applies {
            enabled = value == "true";
        }
    }
    enabled
}

/// Every interval, history older than one interval is forgotten, in the store and of what lists were begun then;
/// several servers do no harm to each other.
async fn compact(store: Arc<dyn Store>, caches: Arc<Caches>, interval: Duration, shutdown: CancellationToken) {
    if interval.is_zero() {
        return;
    }
    let mut last = 0;
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(interval) => {}
        }
        if last > 0 {
            forget_before(&*store, &caches, last).await;
        }
        last = caches.revision();
    }
}

/// What was before this revision cannot be read any more.
pub async fn forget_before(store: &dyn Store, caches: &Caches, revision: u64) {
    if let Err(error) = store.compact(revision).await {
        tracing::warn!(error = %apimachinery::process::error_chain(&error), "cannot compact the store's history");
    }
    caches.all().iter().for_each(|cache| cache.forget_before(revision));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runtime_config_switches_versions() {
        let config = |text: &str| text.split(',').map(str::to_owned).collect::<Vec<_>>();
        assert!(is_enabled(&[], "apps", "v1"));
        assert!(!is_enabled(&[], "apps", "v1beta1"));
        assert!(is_enabled(&config("api/beta=true"), "apps", "v1beta1"));
        assert!(!is_enabled(&config("apps/v1=false"), "apps", "v1"));
        assert!(is_enabled(&config("api/all=false,v1=true"), "", "v1"));
    }
}
