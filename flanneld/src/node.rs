//! This node with its place in one network: its lease, its data plane and its packet filter rules.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use apimachinery::process::error_chain;
use ipnet::IpNet;
use tokio::sync::watch;

use crate::backend::{self, Backend, DataPlane, Prepared, Route, Via};
use crate::daemon::{DaemonError, patiently};
use crate::family::Family;
use crate::interface::{ExternalInterface, Selection};
use crate::kernel::{Events, Kernel};
use crate::lease::{Lease, LeaseSet, Subnets, Unusable, usable_peers};
use crate::masquerade::{self, Firewall, Rules};
use crate::network::NetworkConfig;
use crate::options::Options;
use crate::reconcile::{ReconcileError, Reconciler};
use crate::subnet::{Assignment, Leases, SubnetFile, SubnetManager};

/// How often everything is compared with the kernel even if nothing was reported.
const RESYNC: Duration = Duration::from_secs(60);
/// Kernel events come in bursts.
const SETTLE: Duration = Duration::from_millis(100);
const FIRST_RETRY: Duration = Duration::from_millis(500);

pub struct Node {
    kernel: Kernel,
    manager: Arc<dyn SubnetManager>,
    network: NetworkConfig,
    selection: Selection,
    interface: ExternalInterface,
    prepared: Prepared,
    backend: Box<dyn Backend>,
    lease: Lease,
    /// Refuse what no pod of this node wants.
    blackhole: bool,
    reconciler: Reconciler,
    /// What was wanted last.
    plane: DataPlane,
    unusable: BTreeMap<Subnets, Unusable>,
}

impl Node {
    /// Takes a place in the network. What a previous network had on this node and the new one has not is removed.
    pub async fn join(
        options: &Options,
        kernel: Kernel,
        manager: Arc<dyn SubnetManager>,
        network: NetworkConfig,
        previous: Option<Self>,
    ) -> Result<Self, DaemonError> {
        let mut selection = options.selection()?;
        let stored = patiently("read the stored public addresses", || manager.stored_public()).await?;
        selection.public_ip = stored.ipv4.or(selection.public_ip);
        selection.public_ipv6 = stored.ipv6.or(selection.public_ipv6);
        let families: Vec<Family> = network.families().collect();
        let interface = selection.find(&kernel, &families).await?;
        let owner = interface.ipv4.or(interface.ipv6).map(|endpoint| endpoint.public);
        let macs = match owner {
            Some(owner) => patiently("read the stored hardware addresses", || manager.stored_macs(owner)).await?,
            None => BTreeMap::new(),
        };
        let prepared = Prepared::gather(&network, &kernel, &macs, &wireguard_key_file()).await?;
        let backend = backend::new(&network, &interface, &prepared)?;
        let attributes = backend.attributes();
        let lease = patiently("lease a subnet", || manager.acquire(&network, &attributes)).await?;
        tracing::info!(subnets = %lease.subnets, interface = interface.name, owner = %lease.attributes.owner(), "this node has its subnet");
        let networks: Vec<IpNet> = network.pools().map(|pool| pool.network).collect();
        let mut node = Self {
            reconciler: Reconciler::new(kernel.clone(), networks),
            blackhole: options.ip_blackhole_route,
            plane: DataPlane::default(),
            unusable: BTreeMap::new(),
            kernel,
            manager,
            network,
            selection,
            interface,
            prepared,
            backend,
            lease,
        };
        if let Some(previous) = previous {
            node.take_over(previous).await?;
        }
        Ok(node)
    }

    async fn take_over(&mut self, mut previous: Self) -> Result<(), DaemonError> {
        let new = self.plan(&LeaseSet::new());
        let old = std::mem::take(&mut previous.plane);
        let bare = DataPlane { devices: old.devices.clone(), routed: old.routed, ..DataPlane::default() };
        if previous.network.pools().ne(self.network.pools()) || !new.routed {
            previous.reconciler.reconcile(&bare, previous.interface.index).await?;
        }
        previous.reconciler.retire(&old, &new).await?;
        Ok(())
    }

    /// Makes everything that does not depend on other nodes, and tells the CNI plugin.
    pub async fn start(&mut self, options: &Options) -> Result<(), DaemonError> {
        self.plane = self.plan(&LeaseSet::new());
        self.adopt_routes().await?;
        if let Some((firewall, rules)) = self.firewall(options) {
            firewall.clean_up_other().await;
            firewall.apply(&rules).await?;
        }
        self.subnet_file(options).write(&options.subnet_file)?;
        Ok(())
    }

    /// The first pass happens before the other nodes' leases are known: the routes to them that an earlier daemon has
    /// left are kept until then, so that a restart loses no packet.
    async fn adopt_routes(&mut self) -> Result<(), DaemonError> {
        Ok(self.reconciler.adopt(&self.plane, self.interface.index).await?)
    }

    /// Follows the other nodes until the network configuration changes.
    pub async fn follow(&mut self, options: &Options) -> Result<NetworkConfig, DaemonError> {
        let (sender, leases) = watch::channel(None);
        let manager = self.manager.clone();
        let (lease, network) = (self.lease.clone(), self.network.clone());
        let firewall = self.firewall(options);
        let resync = options.iptables_resync.map(Duration::from_secs);
        tokio::select! {
            () = manager.watch(sender) => std::future::pending().await,
            lost = manager.keep(&lease, leases.clone()) => Err(lost.into()),
            changed = manager.network_changed(&network) => Ok(changed),
            error = self.keep_data_plane(leases.clone()) => Err(error),
            () = keep_firewall(firewall, resync) => std::future::pending().await,
        }
    }

    fn subnet_file(&self, options: &Options) -> SubnetFile {
        let ipv4 = match (self.network.ipv4.map(|pool| pool.network), self.lease.subnets.ipv4) {
            (Some(IpNet::V4(network)), Some(subnet)) => Some(Assignment { network, subnet }),
            _ => None,
        };
        let ipv6 = match (self.network.ipv6.map(|pool| pool.network), self.lease.subnets.ipv6) {
            (Some(IpNet::V6(network)), Some(subnet)) => Some(Assignment { network, subnet }),
            _ => None,
        };
        SubnetFile { ipv4, ipv6, mtu: self.backend.mtu(), ip_masq: options.ip_masq }
    }

    fn firewall(&self, options: &Options) -> Option<(Firewall, Rules)> {
        let pair = |family| Some((self.network.pool(family)?.network, self.lease.subnets.get(family)?));
        let rules = Rules {
            subnets: Family::BOTH.into_iter().filter_map(pair).collect(),
            masquerade: options.ip_masq,
            random_fully: !options.ip_masq_fully_random_disable,
            forward: options.iptables_forward_rules,
        };
        let tool = if self.network.nftables { Firewall::Nftables } else { Firewall::Iptables };
        (rules.masquerade || rules.forward).then_some((tool, rules))
    }

    fn plan(&self, peers: &LeaseSet) -> DataPlane {
        let mut plane = self.backend.plan(&self.lease, peers);
        if self.blackhole {
            let routes = self.lease.subnets.iter().map(|net| (net, Route { gateway: None, via: Via::Blackhole }));
            plane.routes.extend(routes);
        }
        plane
    }

    async fn reconcile(&mut self, leases: &LeaseSet) -> Result<(), ReconcileError> {
        let (peers, unusable) = usable_peers(&self.lease.subnets, leases, &self.network);
        for (subnets, reason) in &unusable {
            if self.unusable.get(subnets) != Some(reason) {
                tracing::error!(lease = %subnets, owner = %leases[subnets].owner(), %reason, "a lease is not followed; delete one of the two");
            }
        }
        self.unusable = unusable;
        self.plane = self.plan(&peers);
        self.reconciler.reconcile(&self.plane, self.interface.index).await.map(|_| ())
    }

    /// Compares and repairs whenever the leases change, the kernel reports something, or a minute passed.
    async fn keep_data_plane(&mut self, mut leases: Leases) -> DaemonError {
        let mut events = self.subscribe().await;
        let mut retry = FIRST_RETRY;
        loop {
            let known = leases.borrow_and_update().clone();
            let mut wait = RESYNC;
            if let Some(known) = known {
                match self.refresh_interface().await {
                    Ok(true) => events = self.subscribe().await,
                    Ok(false) => {}
                    Err(error) => return error,
                }
                match self.reconcile(&known).await {
                    Ok(()) => retry = FIRST_RETRY,
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
                    tokio::time::sleep(SETTLE).await;
                    match (event, &mut events) {
                        (Some(()), Some(events)) => events.drain(),
                        _ => events = self.subscribe().await,
                    }
                }
            }
        }
    }

    async fn subscribe(&self) -> Option<Events> {
        let devices = self.plane.devices.iter().map(|plane| plane.device.name.clone());
        let interfaces = devices.chain([self.interface.name.clone()]).collect();
        let networks = self.network.pools().map(|pool| pool.network).collect();
        match Events::subscribe(&self.kernel, networks, interfaces, self.interface.index).await {
            Ok(events) => Some(events),
            Err(error) => {
                tracing::warn!(error = error_chain(&error), "no kernel events; comparing once a minute only");
                None
            }
        }
    }

    /// The interface may have been replaced by another of the same name and address; true when it was. While it is
    /// missing the old description stays: the reconciliation fails, is reported and tried again.
    async fn refresh_interface(&mut self) -> Result<bool, DaemonError> {
        let families: Vec<Family> = self.network.families().collect();
        let found = match self.selection.find(&self.kernel, &families).await {
            Ok(found) => found,
            Err(error) => {
                tracing::warn!(error = error_chain(&error), "the external interface is not usable now");
                return Ok(false);
            }
        };
        if found == self.interface {
            return Ok(false);
        }
        if !found.same_public(&self.interface) {
            return Err(DaemonError::AddressChanged(found.name));
        }
        tracing::info!(interface = ?found, "the external interface changed");
        self.backend = backend::new(&self.network, &found, &self.prepared)?;
        self.interface = found;
        Ok(true)
    }
}

async fn next_event(events: &mut Option<Events>) -> Option<()> {
    match events {
        Some(events) => events.next().await,
        None => std::future::pending().await,
    }
}

async fn keep_firewall(firewall: Option<(Firewall, Rules)>, every: Option<Duration>) {
    match firewall {
        Some((firewall, rules)) => masquerade::keep(firewall, rules, every).await,
        None => std::future::pending().await,
    }
}

/// Where this node's key is kept; upstream's variable moves it.
fn wireguard_key_file() -> PathBuf {
    std::env::var_os("WIREGUARD_KEY_FILE").map_or_else(|| PathBuf::from("/run/flannel/wgkey"), PathBuf::from)
}
