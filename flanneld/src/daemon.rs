//! The daemon's life: find the configuration and the interface, take a subnet, write the subnet file, and then keep
//! lease, data plane and packet filter right until asked to stop. Stopping takes nothing down.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use apimachinery::process::{
    CancellationToken, ClientError, HealthChecks, KubeconfigArgs, StatusServer, StatusServerError, error_chain,
};
use tokio::sync::watch;

use crate::backend::{self, Backend, BackendError, Vxlan};
use crate::interface::{ExternalInterface, InterfaceError, Selection};
use crate::lease::{Lease, LeaseSet, Mac};
use crate::masquerade::{Firewall, FirewallError, Rules};
use crate::netlink::{Events, Kernel, NetlinkError};
use crate::network::{BackendConfig, NetworkConfig};
use crate::options::Options;
use crate::subnet::{
    EtcdSubnetManager, KubeSubnetManager, Leases, SubnetError, SubnetFile, SubnetFileError, SubnetManager,
};

#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    #[error("cannot use the Kubernetes API")]
    Client(#[from] ClientError),
    #[error("cannot serve health checks")]
    Health(#[from] StatusServerError),
    #[error("cannot choose the interface")]
    Interface(#[from] InterfaceError),
    #[error("cannot set up the backend")]
    Backend(#[from] BackendError),
    #[error("cannot read the kernel's state")]
    Kernel(#[from] NetlinkError),
    #[error("cannot lease a subnet")]
    Subnet(#[from] SubnetError),
    #[error("cannot set the packet filter rules")]
    Firewall(#[from] FirewallError),
    #[error("cannot write the subnet file")]
    SubnetFile(#[from] SubnetFileError),
    #[error("the address of interface {0} changed; starting again takes a lease for the new one")]
    AddressChanged(String),
}

/// How often everything is compared with the kernel even if nothing was reported.
const RESYNC: Duration = Duration::from_secs(60);
/// Kernel events come in bursts.
const SETTLE: Duration = Duration::from_millis(100);

/// Runs until the token is cancelled or the lease is lost.
pub async fn run(options: Options, shutdown: CancellationToken) -> Result<(), DaemonError> {
    let stop = shutdown.clone();
    tokio::select! {
        () = stop.cancelled() => Ok(()),
        result = serve(options, shutdown) => result,
    }
}

async fn serve(options: Options, shutdown: CancellationToken) -> Result<(), DaemonError> {
    let ready = start_health(&options, shutdown).await?;
    let kernel = Kernel::open()?;
    let manager = subnet_manager(&options).await?;
    let node = Node::join(&options, kernel, manager).await?;
    tracing::info!(subnet = %node.lease.subnet, interface = node.interface.name, public_ip = %node.interface.public_ip, "this node has its subnet");

    node.reconcile(&own_only(&node.lease)).await?;
    let firewall = node.firewall(&options);
    if let Some((firewall, rules)) = &firewall {
        firewall.apply(rules).await?;
    }
    node.subnet_file(&options).write(&options.subnet_file)?;
    ready.store(true, Ordering::Relaxed);
    tracing::info!(path = %options.subnet_file.display(), "wrote the subnet file; following the other nodes");
    node.follow(&options, firewall).await
}

/// This node with its place in the network.
struct Node {
    kernel: Kernel,
    manager: Arc<dyn SubnetManager>,
    network: NetworkConfig,
    selection: Selection,
    interface: ExternalInterface,
    mac: Mac,
    backend: Box<dyn Backend>,
    lease: Lease,
}

impl Node {
    async fn join(options: &Options, kernel: Kernel, manager: Arc<dyn SubnetManager>) -> Result<Self, DaemonError> {
        let network = patiently("read the network configuration", || manager.network()).await?;
        let mut selection = options.selection();
        if let Some(address) = patiently("read the stored public address", || manager.stored_public_ip()).await? {
            selection.public_ip = Some(address);
        }
        let interface = selection.find(&kernel).await?;
        let mac = device_mac(&kernel, manager.as_ref(), &network, &interface).await?;
        let backend = backend::new(&network, &interface, mac)?;
        let attributes = backend.attributes();
        let lease = patiently("lease a subnet", || manager.acquire(&network, &attributes)).await?;
        Ok(Self { kernel, manager, network, selection, interface, mac, backend, lease })
    }

    fn subnet_file(&self, options: &Options) -> SubnetFile {
        SubnetFile {
            network: self.network.network,
            subnet: self.lease.subnet,
            mtu: self.backend.mtu(),
            ip_masq: options.ip_masq,
        }
    }

    fn firewall(&self, options: &Options) -> Option<(Firewall, Rules)> {
        let rules = Rules {
            network: self.network.network,
            subnet: self.lease.subnet,
            masquerade: options.ip_masq,
            random_fully: !options.ip_masq_fully_random_disable,
            forward: options.iptables_forward_rules,
        };
        let tool = if self.network.nftables { Firewall::Nftables } else { Firewall::Iptables };
        (rules.masquerade || rules.forward).then_some((tool, rules))
    }

    async fn reconcile(&self, leases: &LeaseSet) -> Result<(), NetlinkError> {
        let wanted = self.backend.plan(&self.lease, leases);
        self.kernel.reconcile(&wanted, self.network.network, self.interface.index).await.map(|_| ())
    }

    async fn follow(mut self, options: &Options, firewall: Option<(Firewall, Rules)>) -> Result<(), DaemonError> {
        let (sender, leases) = watch::channel(None);
        let manager = self.manager.clone();
        let lease = self.lease.clone();
        tokio::select! {
            () = manager.watch(sender) => Ok(()),
            lost = manager.keep(&lease, leases.clone()) => Err(lost.into()),
            result = self.keep_data_plane(leases.clone()) => result,
            () = keep_firewall(firewall, Duration::from_secs(options.iptables_resync)) => Ok(()),
        }
    }

    /// Compares and repairs whenever the leases change, the kernel reports something, or a minute passed.
    async fn keep_data_plane(&mut self, mut leases: Leases) -> Result<(), DaemonError> {
        let mut events = self.subscribe();
        let mut retry = Duration::from_secs(1);
        loop {
            let known = leases.borrow_and_update().clone();
            let mut wait = RESYNC;
            if let Some(known) = known {
                self.refresh_interface().await?;
                match self.reconcile(&known).await {
                    Ok(()) => retry = Duration::from_secs(1),
                    Err(error) => {
                        tracing::warn!(error = error_chain(&error), ?retry, "the data plane is not right yet");
                        wait = retry;
                        retry = (retry * 2).min(RESYNC);
                    }
                }
            }
            tokio::select! {
                _ = leases.changed() => {}
                () = tokio::time::sleep(wait) => {}
                event = next_event(&mut events) => {
                    if event.is_none() {
                        events = self.subscribe();
                    }
                    tokio::time::sleep(SETTLE).await;
                }
            }
        }
    }

    fn subscribe(&self) -> Option<Events> {
        let mut interfaces = vec![self.interface.name.clone()];
        if let BackendConfig::Vxlan(config) = &self.network.backend {
            interfaces.push(Vxlan::device_name(config.vni));
        }
        match Events::subscribe(self.network.network, interfaces) {
            Ok(events) => Some(events),
            Err(error) => {
                tracing::warn!(error = error_chain(&error), "no kernel events; comparing once a minute only");
                None
            }
        }
    }

    /// The interface may have been replaced by another of the same name and address. While it is missing the old
    /// description stays: the reconciliation fails, is reported and tried again.
    async fn refresh_interface(&mut self) -> Result<(), DaemonError> {
        let found = match self.selection.find(&self.kernel).await {
            Ok(found) => found,
            Err(error) => {
                tracing::warn!(error = error_chain(&error), "the external interface is not usable now");
                return Ok(());
            }
        };
        if found == self.interface {
            return Ok(());
        }
        if found.public_ip != self.interface.public_ip {
            return Err(DaemonError::AddressChanged(found.name));
        }
        tracing::info!(interface = ?found, "the external interface changed");
        self.backend = backend::new(&self.network, &found, self.mac)?;
        self.interface = found;
        Ok(())
    }
}

async fn next_event(events: &mut Option<Events>) -> Option<()> {
    match events {
        Some(events) => events.next().await,
        None => std::future::pending().await,
    }
}

/// Other programs flush tables now and then; ours are put back.
async fn keep_firewall(firewall: Option<(Firewall, Rules)>, every: Duration) {
    let Some((firewall, rules)) = firewall else { return std::future::pending().await };
    loop {
        tokio::time::sleep(every).await;
        if let Err(error) = firewall.apply(&rules).await {
            tracing::warn!(error = error_chain(&error), "cannot make sure of the packet filter rules");
        }
    }
}

/// The address of the device that exists, or the one that peers know, or a new one.
async fn device_mac(
    kernel: &Kernel,
    manager: &dyn SubnetManager,
    network: &NetworkConfig,
    interface: &ExternalInterface,
) -> Result<Mac, DaemonError> {
    let BackendConfig::Vxlan(config) = &network.backend else { return Ok(Mac([0; 6])) };
    if let Some(mac) = kernel.mac_of(&Vxlan::device_name(config.vni)).await? {
        return Ok(mac);
    }
    let stored = patiently("read the stored hardware address", || manager.stored_mac(interface.public_ip)).await?;
    Ok(stored.unwrap_or_else(|| {
        let mut bytes: [u8; 6] = rand::random();
        // Locally administered, for one receiver.
        bytes[0] = (bytes[0] & 0xfe) | 0x02;
        Mac(bytes)
    }))
}

fn own_only(lease: &Lease) -> LeaseSet {
    LeaseSet::from([(lease.subnet, lease.attributes.clone())])
}

/// Tries until it works; gives up only on errors that waiting cannot mend.
async fn patiently<T, F>(step: &str, mut attempt: impl FnMut() -> F) -> Result<T, SubnetError>
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
        return Ok(Arc::new(KubeSubnetManager::new(client, options.kube()).await?));
    }
    let mut etcd = options.etcd();
    // No file on the first start; a broken one must not keep the node from getting a new subnet.
    etcd.previous = match SubnetFile::read(&options.subnet_file) {
        Ok(file) => Some(file.subnet),
        Err(error) => {
            tracing::debug!(error = error_chain(&error), "no previous subnet");
            None
        }
    };
    Ok(Arc::new(EtcdSubnetManager::connect(etcd).await?))
}

async fn start_health(options: &Options, shutdown: CancellationToken) -> Result<Arc<AtomicBool>, DaemonError> {
    let ready = Arc::new(AtomicBool::new(false));
    if options.healthz_port != 0 {
        let checks = HealthChecks::default();
        let is_ready = ready.clone();
        checks.register("subnet", move || match is_ready.load(Ordering::Relaxed) {
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
