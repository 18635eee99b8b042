//! The objects that a cluster cannot do without, made and kept right by the server itself: system namespaces, the
//! default RBAC policy, priority classes, flow schemas and priority levels, the `kubernetes` Service and its endpoints,
//! the authentication config map. Everything is idempotent and additive: what an administrator added or annotated as
//! theirs stays.

mod api_services;
mod cluster;
mod endpoints;
mod ensure;
pub mod flow_control;
pub mod policy;
mod rbac;

use std::sync::Arc;
use std::time::Duration;

use apimachinery::status::Result;

pub use endpoints::advertised as advertised_address;

use crate::server::Server;

/// How often namespaces and the Service are looked at again, and the lease of this server's address renewed.
const INTERVAL: Duration = Duration::from_secs(10);
const RETRY: Duration = Duration::from_millis(200);

/// Runs until the server shuts down, then takes this server's address out of the `kubernetes` endpoints.
pub async fn run(server: Arc<Server>) {
    let work = async {
        once(&server).await;
        tokio::spawn(crate::registry::alloc::repair::run(server.clone()));
        loop {
            if let Err(error) = keep(&server).await {
                tracing::warn!(%error, "cannot keep the kubernetes Service right");
            }
            tokio::time::sleep(INTERVAL).await;
        }
    };
    tokio::select! {
        () = work => {}
        () = server.shutdown.cancelled() => endpoints::withdraw(&server).await,
    }
}

/// The steps that are done once, each until it succeeds: storage may still be starting.
async fn once(server: &Arc<Server>) {
    while !server.caches.are_ready() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    until_done("system namespaces", || cluster::namespaces(server)).await;
    until_done("default RBAC policy", || rbac::reconcile(server)).await;
    until_done("priority classes", || cluster::priority_classes(server)).await;
    until_done("flow schemas and priority levels", || flow_control::ensure(server)).await;
    until_done("default service CIDR", || cluster::service_cidr(server)).await;
    until_done("kubernetes service", || cluster::kubernetes_service(server)).await;
    until_done("authentication config map", || cluster::authentication(server)).await;
    until_done("api services", || api_services::register(server)).await;
    tracing::info!("bootstrap objects are in place");
}

async fn until_done<F: Future<Output = Result<()>>>(what: &str, step: impl Fn() -> F) {
    let mut delay = RETRY;
    while let Err(error) = step().await {
        tracing::warn!(what, %error, "bootstrap step failed, trying again");
        tokio::time::sleep(delay).await;
        delay = (delay * 2).min(INTERVAL);
    }
}

async fn keep(server: &Arc<Server>) -> Result<()> {
    cluster::namespaces(server).await?;
    cluster::kubernetes_service(server).await?;
    endpoints::renew(server).await
}
