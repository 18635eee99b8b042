//! Makes there be what the plan wants: observes, compares, applies, and looks again. The kernel's part, the udp
//! backend's tunnel and the extension backend's commands meet here; none of them decides.

use std::net::{Ipv4Addr, SocketAddrV4};

use ipnet::IpNet;

use crate::backend::{Change, DataPlane, Device, DeviceKind, Observed, changes};
use crate::commands::{CommandError, Runner};
use crate::kernel::{Interfaces, Kernel, KernelError};
use crate::tunnel::{Tunnel, TunnelError};

#[derive(Debug, thiserror::Error)]
pub enum ReconcileError {
    #[error("the kernel's routing is not right")]
    Kernel(#[from] KernelError),
    #[error("the tunnel does not work")]
    Tunnel(#[from] TunnelError),
    #[error("a command of the extension backend failed")]
    Command(#[from] CommandError),
    #[error("the kernel's state does not settle: {0} changes were still needed after several rounds")]
    Unsettled(usize),
}

/// Looks and applies so often before it gives up for this time.
const ROUNDS: usize = 4;

pub struct Reconciler {
    kernel: Kernel,
    /// The networks whose routes are looked at.
    networks: Vec<IpNet>,
    tunnel: Option<Tunnel>,
    runner: Runner,
}

/// What there is, and the numbers of our devices.
struct Sight {
    observed: Observed,
    indices: Vec<Option<u32>>,
}

impl Reconciler {
    pub fn new(kernel: Kernel, networks: Vec<IpNet>) -> Self {
        Self { kernel, networks, tunnel: None, runner: Runner::default() }
    }

    /// Makes there be the wanted data plane; returns how many changes were needed.
    ///
    /// A change that fails does not stop the others: one unreachable node must not cost the rest of the network.
    pub async fn reconcile(&mut self, wanted: &DataPlane, underlay: u32) -> Result<usize, ReconcileError> {
        let mut applied = 0;
        let mut remaining = 0;
        for _ in 0..ROUNDS {
            let sight = self.observe(wanted, underlay).await?;
            let steps = changes(wanted, &sight.observed);
            remaining = steps.len();
            if steps.is_empty() {
                self.runner.reconcile(&wanted.commands).await?;
                return Ok(applied);
            }
            let mut failure = None;
            for step in steps {
                tracing::info!(change = ?step, "changing the data plane");
                let interfaces = Interfaces { devices: &sight.indices, underlay };
                match self.apply(&step, wanted, &interfaces).await {
                    Ok(()) => applied += 1,
                    Err(error) => failure = Some(error),
                }
            }
            if let Some(error) = failure {
                return Err(error);
            }
        }
        Err(ReconcileError::Unsettled(remaining))
    }

    /// The first pass, when the other nodes are not known yet: makes what is missing and removes nothing.
    pub async fn adopt(&mut self, wanted: &DataPlane, underlay: u32) -> Result<(), ReconcileError> {
        for _ in 0..ROUNDS {
            let sight = self.observe(wanted, underlay).await?;
            let steps: Vec<Change> =
                changes(wanted, &sight.observed).into_iter().filter(|step| !step.removes()).collect();
            if steps.is_empty() {
                return Ok(());
            }
            let interfaces = Interfaces { devices: &sight.indices, underlay };
            for step in &steps {
                tracing::info!(change = ?step, "changing the data plane");
                self.apply(step, wanted, &interfaces).await?;
            }
        }
        Ok(())
    }

    /// Removes the devices of a plan that is given up for another.
    pub async fn retire(&mut self, old: &DataPlane, new: &DataPlane) -> Result<(), ReconcileError> {
        let kept = |name: &str| new.devices.iter().any(|plane| plane.device.name == name);
        for plane in old.devices.iter().filter(|plane| !kept(&plane.device.name)) {
            tracing::info!(device = plane.device.name, "removing a device that the new configuration does not have");
            if let DeviceKind::Tun { .. } = plane.device.kind {
                self.tunnel = None;
            }
            self.kernel.remove_device(&plane.device).await?;
        }
        Ok(())
    }

    async fn observe(&self, wanted: &DataPlane, underlay: u32) -> Result<Sight, ReconcileError> {
        let mut sight = Sight { observed: Observed::default(), indices: Vec::new() };
        for plane in &wanted.devices {
            let state = self.kernel.device_state(&plane.device).await?;
            sight.indices.push(state.as_ref().map(|state| state.index));
            let right = state.filter(|state| state.problem.is_none() && self.serves(&plane.device));
            let tables = match right {
                None => None,
                Some(state) => Some(match (&plane.device.kind, &self.tunnel) {
                    (DeviceKind::Vxlan(_), _) => self.kernel.neighbour_tables(state.index).await?,
                    (DeviceKind::Wireguard { .. }, _) => {
                        self.kernel.wireguard_tables(&plane.device.name).await.map_err(KernelError::from)?
                    }
                    (DeviceKind::Tun { .. }, Some(tunnel)) => {
                        crate::backend::Tables { tunnel: tunnel.table(), ..Default::default() }
                    }
                    (DeviceKind::Tun { .. } | DeviceKind::Ipip { .. }, _) => Default::default(),
                }),
            };
            sight.observed.devices.push(tables);
        }
        let interfaces = Interfaces { devices: &sight.indices, underlay };
        sight.observed.routes = self.kernel.flannel_routes(&self.networks, &interfaces).await?;
        Ok(sight)
    }

    /// Whether this process is behind the device, if it has to be.
    fn serves(&self, device: &Device) -> bool {
        match &device.kind {
            DeviceKind::Tun { local, address } => {
                self.tunnel.as_ref().is_some_and(|tunnel| tunnel.serves(device.mtu, *local, *address))
            }
            _ => true,
        }
    }

    async fn apply(
        &mut self,
        change: &Change,
        wanted: &DataPlane,
        interfaces: &Interfaces<'_>,
    ) -> Result<(), ReconcileError> {
        let plane = |number: usize| {
            let name = || wanted.devices.get(number).map(|plane| plane.device.name.clone()).unwrap_or_default();
            wanted.devices.get(number).ok_or_else(|| KernelError::DeviceGone(name()))
        };
        let index = |number: usize| -> Result<u32, KernelError> {
            let name = &plane(number)?.device.name;
            interfaces.devices.get(number).copied().flatten().ok_or_else(|| KernelError::DeviceGone(name.clone()))
        };
        let kernel = &self.kernel;
        let result = match *change {
            Change::EnsureDevice(number) => return self.ensure_device(&plane(number)?.device).await,
            Change::SetTunnel(number) => {
                if let Some(tunnel) = &self.tunnel {
                    tunnel.set_table(plane(number)?.tables.tunnel.clone());
                }
                return Ok(());
            }
            Change::SetPeer(number, key) => {
                let plane = plane(number)?;
                if let Some(peer) = plane.tables.peers.get(&key) {
                    kernel.set_peer(&plane.device.name, key, peer).await.map_err(KernelError::from)?;
                }
                return Ok(());
            }
            Change::DeletePeer(number, key) => {
                return Ok(kernel.delete_peer(&plane(number)?.device.name, key).await.map_err(KernelError::from)?);
            }
            Change::DeleteRoute(subnet, route) => kernel.delete_route(subnet, route, interfaces).await?,
            Change::SetRoute(subnet, route) => kernel.set_route(subnet, route, interfaces).await?,
            Change::SetNeighbour(number, address, mac) => kernel.set_neighbour(index(number)?, address, mac).await,
            Change::SetForwarding(number, mac, node) => kernel.set_forwarding(index(number)?, mac, node).await,
            Change::DeleteNeighbour(number, address, mac) => {
                kernel.delete_neighbour(index(number)?, address, mac).await
            }
            Change::DeleteForwarding(number, mac, node) => kernel.delete_forwarding(index(number)?, mac, node).await,
        };
        Ok(kernel.settle(change, result)?)
    }

    async fn ensure_device(&mut self, device: &Device) -> Result<(), ReconcileError> {
        if let DeviceKind::Tun { local, address } = device.kind
            && !self.serves(device)
        {
            self.open_tunnel(device, local, address).await?;
        }
        Ok(self.kernel.ensure_device(device).await?)
    }

    /// The old tunnel is closed first, since both need the same name and port. One that another program has left
    /// behind under the name would not end in this process.
    async fn open_tunnel(
        &mut self,
        device: &Device,
        local: SocketAddrV4,
        address: Ipv4Addr,
    ) -> Result<(), ReconcileError> {
        self.tunnel = None;
        self.kernel.remove_device(device).await?;
        self.tunnel = Some(Tunnel::open(&device.name, device.mtu, local, address)?);
        Ok(())
    }
}
