//! The daemon's life: find the configuration and the interface, take subnets, write the subnet file, and then keep
//! lease, data plane and packet filter right until asked to stop. Stopping takes nothing down.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use apimachinery::process::{
    CancellationToken, ClientError, HealthChecks, KubeconfigArgs, StatusServer, StatusServerError, error_chain,
};

use crate::backend::{BackendError, PrepareError};
use crate::interface::InterfaceError;
use crate::kernel::{Kernel, KernelError};
use crate::masquerade::FirewallError;
use crate::node::Node;
use crate::options::Options;
use crate::reconcile::ReconcileError;
use crate::subnet::{EtcdSubnetManager, KubeSubnetManager, SubnetError, SubnetFile, SubnetFileError, SubnetManager};

#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    #[error("cannot use the Kubernetes API")]
    Client(#[from] ClientError),
    #[error("cannot serve health checks")]
    Health(#[from] StatusServerError),
    #[error("cannot choose the interface")]
    Interface(#[from] InterfaceError),
    #[error("cannot prepare the backend")]
    Prepare(#[from] PrepareError),
    #[error("cannot set up the backend")]
    Backend(#[from] BackendError),
    #[error("cannot read the kernel's state")]
    Kernel(#[from] KernelError),
    #[error("cannot make the data plane")]
    DataPlane(#[from] ReconcileError),
    #[error("cannot lease a subnet")]
    Subnet(#[from] SubnetError),
    #[error("cannot set the packet filter rules")]
    Firewall(#[from] FirewallError),
    #[error("cannot write the subnet file")]
    SubnetFile(#[from] SubnetFileError),
    #[error("the address of interface {0} changed; starting again takes a lease for the new one")]
    AddressChanged(String),
}

/// Runs until the token is cancelled or the lease is lost.
pub async fn run(options: Options, shutdown: CancellationToken) -> Result<(), DaemonError> {
    let stop = shutdown.clone();
    tokio::select! {
        () = stop.cancelled() => Ok(()),
        result = serve(options, shutdown) => result,
    }
}

/// One round for each network configuration: when it changes, the node joins the new network, and what the old one
/// had and the new one has not is taken away.
async fn serve(options: Options, shutdown: CancellationToken) -> Result<(), DaemonError> {
    let ready = start_health(&options, shutdown).await?;
    let kernel = Kernel::open()?;
    let manager = subnet_manager(&options).await?;
    let mut network = patiently("read the network configuration", || manager.network()).await?;
    let mut previous: Option<Node> = None;
    loop {
        let mut node = Node::join(&options, kernel.clone(), manager.clone(), network, previous.take()).await?;
        node.start(&options).await?;
        ready.store(true, Ordering::Relaxed);
        tracing::info!(path = %options.subnet_file.display(), "wrote the subnet file; following the other nodes");
        network = node.follow(&options).await?;
        tracing::info!("the network configuration changed; joining the network again");
        ready.store(false, Ordering::Relaxed);
        previous = Some(node);
    }
}

/// Tries until it works; gives up only on errors that waiting cannot mend.
pub async fn patiently<T, F>(step: &str, mut attempt: impl FnMut() -> F) -> Result<T, SubnetError>
where
    F: Future<Output = Result<T, SubnetError>>,
{
    let mut wait = Duration::from_millis(250);
    loop {
        match attempt().await {
            Err(error) if error.is_temporary() => {
                tracing::warn!(error = error_chain(&error), ?wait, "cannot {step} yet");
                tokio::time::sleep(wait).await;
                wait = (wait * 2).min(Duration::from_secs(5));
            }
            result => return result,
        }
    }
}

async fn subnet_manager(options: &Options) -> Result<Arc<dyn SubnetManager>, DaemonError> {
    if options.kube_subnet_mgr {
        let access =
            KubeconfigArgs { kubeconfig: options.kubeconfig_file.clone(), master: options.kube_api_url.clone() };
        let client = access.client("flanneld").await?;
        let manager =
            patiently("find out which node this is", || KubeSubnetManager::new(client.clone(), options.kube()));
        return Ok(Arc::new(manager.await?));
    }
    let mut etcd = options.etcd();
    // No file on the first start; a broken one must not keep the node from getting a new subnet.
    match SubnetFile::read(&options.subnet_file) {
        Ok(file) => etcd.previous = file.subnets(),
        Err(error) => tracing::debug!(error = error_chain(&error), "no previous subnet"),
    }
    Ok(Arc::new(patiently("connect to etcd", || EtcdSubnetManager::connect(etcd.clone())).await?))
}

async fn start_health(options: &Options, shutdown: CancellationToken) -> Result<Arc<AtomicBool>, DaemonError> {
    let ready = Arc::new(AtomicBool::new(false));
    if options.healthz_port != 0 {
        let checks = HealthChecks::default();
        let is_ready = ready.clone();
        checks.register_readiness("subnet", move || match is_ready.load(Ordering::Relaxed) {
            true => Ok(()),
            false => Err("the subnet file is not written yet".to_owned()),
        });
        let server = StatusServer {
            address: (options.healthz_ip, options.healthz_port).into(),
            checks,
            metrics: Arc::default(),
            tls: None,
        };
        server.start(shutdown).await?;
    }
    Ok(ready)
}
