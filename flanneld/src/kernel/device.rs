//! Flannel's own devices: whether one is as it should be, and making it so.

use std::net::{IpAddr, Ipv4Addr};

use futures::TryStreamExt;
use ipnet::IpNet;
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use rtnetlink::packet_route::link::{InfoData, InfoIpTunnel, InfoKind, InfoVxlan, LinkFlags, LinkInfo, LinkMessage};
use rtnetlink::{LinkIpIp, LinkUnspec, LinkVxlan, LinkWireguard};

use super::messages::{address, link_info, link_mac, link_mtu};
use super::{Kernel, KernelError, errno, list};
use crate::backend::{Device, DeviceKind, VxlanLink};

/// A device as the kernel has it.
pub struct DeviceState {
    pub index: u32,
    /// What is not right with it, in a word.
    pub problem: Option<&'static str>,
}

impl Kernel {
    pub async fn device_state(&self, device: &Device) -> Result<Option<DeviceState>, KernelError> {
        let Some(link) = self.link(&device.name).await? else { return Ok(None) };
        let index = link.header.index;
        let addresses = self.addresses(index).await?;
        Ok(Some(DeviceState { index, problem: problem(device, &link, &addresses) }))
    }

    /// Creates or repairs the device. One with settings that cannot be changed in place is replaced. A tun device must
    /// have been opened before: it is only set up here.
    pub async fn ensure_device(&self, device: &Device) -> Result<(), KernelError> {
        let name = &device.name;
        if let Some(link) = self.link(name).await?
            && !compatible(device, &link)
        {
            if !same_kind(device, &link) {
                return Err(KernelError::ForeignDevice { name: name.clone() });
            }
            tracing::warn!(%name, "the device has other settings; replacing it");
            self.delete_link(name, link.header.index).await?;
        }
        if self.link(name).await?.is_none() {
            self.create_device(device).await?;
        }
        let link = self.link(name).await?.ok_or_else(|| KernelError::DeviceGone(name.clone()))?;
        self.set_up_device(device, &link)
            .await
            .map_err(|source| KernelError::SetUpDevice { name: name.clone(), source })?;
        if let DeviceKind::Wireguard { key, port } = &device.kind {
            super::wireguard::configure(name, key, *port).await?;
        }
        Ok(())
    }

    /// Removes a device that is not wanted any more; one of another kind under its name is not ours to touch.
    pub async fn remove_device(&self, device: &Device) -> Result<(), KernelError> {
        match self.link(&device.name).await? {
            Some(link) if same_kind(device, &link) => self.delete_link(&device.name, link.header.index).await,
            _ => Ok(()),
        }
    }

    async fn delete_link(&self, name: &str, index: u32) -> Result<(), KernelError> {
        match self.handle.link().del(index).execute().await {
            Err(error) if errno(&error) == Some(libc::ENODEV) => Ok(()),
            other => other.map_err(|source| KernelError::DeleteDevice { name: name.to_owned(), source }),
        }
    }

    async fn create_device(&self, device: &Device) -> Result<(), KernelError> {
        let name = &device.name;
        let (driver, message) = match &device.kind {
            DeviceKind::Vxlan(link) => ("vxlan", vxlan_message(device, link)),
            DeviceKind::Ipip { local } => ("ipip", LinkIpIp::new(name).local(*local).build()),
            DeviceKind::Wireguard { .. } => ("wireguard", LinkWireguard::new(name).mtu(device.mtu).build()),
            DeviceKind::Tun { .. } => return Err(KernelError::DeviceGone(name.clone())),
        };
        match self.handle.link().add(message).execute().await {
            Err(error) if errno(&error) == Some(libc::EOPNOTSUPP) => {
                Err(KernelError::NoDriver { name: name.clone(), driver })
            }
            other => other.map_err(|source| KernelError::CreateDevice { name: name.clone(), source }),
        }
    }

    async fn set_up_device(&self, device: &Device, link: &LinkMessage) -> Result<(), rtnetlink::Error> {
        let index = link.header.index;
        let mut missing = device.addresses.clone();
        let mut present = self.handle.address().get().set_link_index_filter(index).execute();
        while let Some(message) = present.try_next().await? {
            match address(&message) {
                Some(net) if missing.remove(&net) => {}
                Some(net) if !link_local(net) => self.handle.address().del(message).execute().await?,
                _ => {}
            }
        }
        for net in missing {
            let mut request = self.handle.address().add(index, net.addr(), net.prefix_len());
            if net.addr().is_ipv6() {
                // Nobody else can have the address, and packets must not wait until that is found out.
                let flags = AddressAttribute::Flags(AddressFlags::Permanent | AddressFlags::Nodad);
                request.message_mut().attributes.push(flags);
            }
            request.execute().await?;
        }
        refuse_router_advertisements(&device.name);
        let message = LinkUnspec::new_with_index(index).mtu(device.mtu).up().build();
        self.handle.link().change(message).execute().await
    }

    async fn addresses(&self, index: u32) -> Result<Vec<IpNet>, KernelError> {
        let messages: Vec<AddressMessage> = self
            .handle
            .address()
            .get()
            .set_link_index_filter(index)
            .execute()
            .try_collect()
            .await
            .map_err(list("addresses"))?;
        Ok(messages.iter().filter_map(address).collect())
    }
}

/// The kernel gives IPv6 link-local addresses by itself.
fn link_local(net: IpNet) -> bool {
    matches!(net.addr(), IpAddr::V6(address) if address.is_unicast_link_local())
}

/// Nobody on the overlay may become this node's router. Without IPv6 in the kernel there is nothing to refuse.
fn refuse_router_advertisements(name: &str) {
    let path = format!("/proc/sys/net/ipv6/conf/{name}/accept_ra");
    if let Err(error) = std::fs::write(&path, "0") {
        tracing::debug!(path, %error, "cannot switch router advertisements off");
    }
}

fn problem(device: &Device, link: &LinkMessage, addresses: &[IpNet]) -> Option<&'static str> {
    if !compatible(device, link) {
        Some("settings")
    } else if !link.header.flags.contains(LinkFlags::Up) {
        Some("down")
    } else if link_mtu(link) != device.mtu {
        Some("mtu")
    } else if !device.addresses.iter().all(|net| addresses.contains(net)) {
        Some("address")
    } else {
        None
    }
}

/// Whether the existing link can be used as the device, after setting addresses, MTU and state.
fn compatible(device: &Device, link: &LinkMessage) -> bool {
    let data = link_info(link).iter().find_map(|info| match info {
        LinkInfo::Data(data) => Some(data),
        _ => None,
    });
    match (&device.kind, data) {
        (DeviceKind::Vxlan(wanted), Some(InfoData::Vxlan(settings))) => {
            vxlan_compatible(wanted, settings) && link_mac(link) == Some(wanted.mac)
        }
        (DeviceKind::Ipip { local }, Some(InfoData::IpTunnel(settings))) => {
            let remote = settings.iter().any(|setting| match setting {
                InfoIpTunnel::Remote(address) => *address != IpAddr::V4(Ipv4Addr::UNSPECIFIED),
                _ => false,
            });
            settings.contains(&InfoIpTunnel::Local(IpAddr::V4(*local))) && !remote
        }
        (DeviceKind::Wireguard { .. } | DeviceKind::Tun { .. }, _) => same_kind(device, link),
        _ => false,
    }
}

fn same_kind(device: &Device, link: &LinkMessage) -> bool {
    let kind = match device.kind {
        DeviceKind::Vxlan(_) => InfoKind::Vxlan,
        DeviceKind::Ipip { .. } => InfoKind::IpIp,
        DeviceKind::Wireguard { .. } => InfoKind::Wireguard,
        DeviceKind::Tun { .. } => InfoKind::Tun,
    };
    link_info(link).contains(&LinkInfo::Kind(kind))
}

fn vxlan_compatible(wanted: &VxlanLink, settings: &[InfoVxlan]) -> bool {
    let has = |wanted: InfoVxlan| settings.contains(&wanted);
    let local = match wanted.local {
        IpAddr::V4(address) => InfoVxlan::Local(address),
        IpAddr::V6(address) => InfoVxlan::Local6(address),
    };
    has(InfoVxlan::Id(wanted.vni))
        && has(InfoVxlan::Port(wanted.port))
        && has(local)
        && has(InfoVxlan::Link(wanted.link))
        && has(InfoVxlan::Learning(wanted.learning))
        && has(InfoVxlan::Gbp) == wanted.gbp
}

fn vxlan_message(device: &Device, link: &VxlanLink) -> LinkMessage {
    let builder = LinkVxlan::new(&device.name, link.vni).dev(link.link);
    let builder = match link.local {
        IpAddr::V4(address) => builder.local(address),
        IpAddr::V6(address) => builder.local6(address),
    };
    let builder = builder.port(link.port).learning(link.learning).address(link.mac.0.to_vec()).mtu(device.mtu);
    if link.gbp { builder.gbp() } else { builder }.build()
}
