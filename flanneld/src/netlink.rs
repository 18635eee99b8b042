//! The only place that talks to the kernel's routing: reads what is there, applies single changes, and tells when
//! something of ours may have been touched. It decides nothing.

use std::net::{IpAddr, Ipv4Addr};

use futures::{StreamExt, TryStreamExt};
use ipnet::Ipv4Net;
use rtnetlink::packet_core::NetlinkPayload;
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage};
use rtnetlink::packet_route::link::{InfoData, InfoKind, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::{
    Handle, LinkUnspec, LinkVxlan, MulticastGroup, RouteMessageBuilder, new_connection, new_multicast_connection,
};

use crate::backend::{Change, DataPlane, Observed, Route, Via, VxlanDevice, changes};
use crate::lease::Mac;

#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    #[error("cannot open a netlink socket")]
    Open(#[source] std::io::Error),
    #[error("cannot list {what}")]
    List { what: &'static str, source: rtnetlink::Error },
    #[error("cannot create device {name}")]
    CreateDevice { name: String, source: rtnetlink::Error },
    #[error("cannot delete device {name}, whose settings do not fit")]
    DeleteDevice { name: String, source: rtnetlink::Error },
    #[error("cannot set up device {name}")]
    SetUpDevice { name: String, source: rtnetlink::Error },
    #[error("device {0} is gone")]
    DeviceGone(String),
    #[error("cannot apply {change}")]
    Apply { change: String, source: rtnetlink::Error },
    #[error("the kernel's state does not settle: {0} changes were still needed after several rounds")]
    Unsettled(usize),
}

/// An interface as the choice of the external interface needs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    pub name: String,
    pub index: u32,
    pub mtu: u32,
    pub addresses: Vec<Ipv4Net>,
}

/// The kernel of the network namespace that the process runs in.
#[derive(Clone)]
pub struct Kernel {
    handle: Handle,
}

impl Kernel {
    /// Opens the socket and serves it in the background of the current runtime.
    pub fn open() -> Result<Self, NetlinkError> {
        let (connection, handle, _) = new_connection().map_err(NetlinkError::Open)?;
        tokio::spawn(connection);
        Ok(Self { handle })
    }

    pub async fn interfaces(&self) -> Result<Vec<Interface>, NetlinkError> {
        let links: Vec<LinkMessage> = self.handle.link().get().execute().try_collect().await.map_err(list("links"))?;
        let addresses: Vec<AddressMessage> =
            self.handle.address().get().execute().try_collect().await.map_err(list("addresses"))?;
        let interfaces = links.iter().map(|link| Interface {
            name: link_name(link).unwrap_or_default().to_owned(),
            index: link.header.index,
            mtu: link_mtu(link),
            addresses: addresses.iter().filter(|a| a.header.index == link.header.index).filter_map(ipv4).collect(),
        });
        Ok(interfaces.collect())
    }

    /// The interface that packets to `destination` leave through, if there is a route.
    pub async fn interface_towards(&self, destination: Ipv4Addr) -> Result<Option<u32>, NetlinkError> {
        let mut message = RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(destination, 32).build();
        message.header.table = RouteHeader::RT_TABLE_UNSPEC;
        let mut answer = self.handle.route().get(message).execute();
        match answer.try_next().await {
            Ok(route) => Ok(route.and_then(|route| output_interface(&route))),
            Err(rtnetlink::Error::NetlinkError(_)) => Ok(None),
            Err(source) => Err(NetlinkError::List { what: "the route to an address", source }),
        }
    }

    /// The interface of the default route with the lowest metric.
    pub async fn default_interface(&self) -> Result<Option<u32>, NetlinkError> {
        let routes = self.ipv4_routes().await?;
        let defaults = routes.iter().filter(|route| route.header.destination_prefix_length == 0);
        let best = defaults.filter(|route| output_interface(route).is_some()).min_by_key(|route| metric(route));
        Ok(best.and_then(output_interface))
    }

    /// The hardware address of a link, if it exists and has one of six bytes.
    pub async fn mac_of(&self, name: &str) -> Result<Option<Mac>, NetlinkError> {
        Ok(self.link(name).await?.as_ref().and_then(link_mac))
    }

    /// Makes the kernel have the wanted data plane; returns how many changes were needed.
    ///
    /// A change that fails does not stop the others: one unreachable node must not cost the rest of the network.
    pub async fn reconcile(&self, wanted: &DataPlane, network: Ipv4Net, underlay: u32) -> Result<usize, NetlinkError> {
        let mut applied = 0;
        let mut remaining = 0;
        for _ in 0..3 {
            let observed = self.observe(wanted, network, underlay).await?;
            let steps = changes(wanted, &observed);
            remaining = steps.len();
            if steps.is_empty() {
                return Ok(applied);
            }
            let mut failure = None;
            for step in steps {
                tracing::info!(change = ?step, "changing the data plane");
                match self.apply(&step, wanted, underlay).await {
                    Ok(()) => applied += 1,
                    Err(error) => failure = Some(error),
                }
            }
            if let Some(error) = failure {
                return Err(error);
            }
        }
        Err(NetlinkError::Unsettled(remaining))
    }

    async fn observe(&self, wanted: &DataPlane, network: Ipv4Net, underlay: u32) -> Result<Observed, NetlinkError> {
        let mut observed = Observed::default();
        let overlay = match &wanted.device {
            Some(device) => self.link(&device.name).await?,
            None => None,
        };
        if let (Some(device), Some(link)) = (&wanted.device, &overlay) {
            let addresses = self.addresses(link.header.index).await?;
            let right = device_problem(device, link, &addresses).is_none();
            observed.device = right.then(|| device.clone());
            self.observe_neighbours(link.header.index, &mut observed).await?;
        }
        let overlay_index = overlay.map(|link| link.header.index);
        for route in self.ipv4_routes().await? {
            if let Some((subnet, route)) = flannel_route(&route, network, overlay_index, underlay) {
                observed.routes.insert(subnet, route);
            }
        }
        Ok(observed)
    }

    async fn observe_neighbours(&self, index: u32, observed: &mut Observed) -> Result<(), NetlinkError> {
        for family in [AddressFamily::Inet, AddressFamily::Bridge] {
            let mut entries = self.handle.neighbours().get().set_address_family(family).execute();
            while let Some(entry) = entries.try_next().await.map_err(list("neighbours"))? {
                if entry.header.ifindex != index || entry.header.state != NeighbourState::Permanent {
                    continue;
                }
                let Some((mac, address)) = neighbour(&entry, family) else { continue };
                if family == AddressFamily::Bridge {
                    observed.forwarding.insert(mac, address);
                } else {
                    observed.neighbours.insert(address, mac);
                }
            }
        }
        Ok(())
    }

    async fn apply(&self, change: &Change, wanted: &DataPlane, underlay: u32) -> Result<(), NetlinkError> {
        if let Change::EnsureDevice(device) = change {
            return self.ensure_device(device).await;
        }
        let overlay = match &wanted.device {
            Some(device) => {
                let link = self.link(&device.name).await?;
                link.ok_or_else(|| NetlinkError::DeviceGone(device.name.clone()))?.header.index
            }
            None => underlay,
        };
        let index = |via| if via == Via::Overlay { overlay } else { underlay };
        let result = match *change {
            Change::EnsureDevice(_) => Ok(()),
            Change::DeleteRoute(subnet, route) => {
                self.handle.route().del(route_message(subnet, route, index(route.via))).execute().await
            }
            Change::SetRoute(subnet, route) => {
                self.handle.route().add(route_message(subnet, route, index(route.via))).replace().execute().await
            }
            Change::SetNeighbour(address, mac) => {
                let request = self.handle.neighbours().add(overlay, IpAddr::V4(address));
                request.kind(RouteType::Unicast).link_layer_address(&mac.0).replace().execute().await
            }
            Change::SetForwarding(mac, node) => {
                let request = self.handle.neighbours().add_bridge(overlay, &mac.0).destination(IpAddr::V4(node));
                request.flags(NeighbourFlags::Own).replace().execute().await
            }
            Change::DeleteNeighbour(address, mac) => {
                self.handle
                    .neighbours()
                    .del(neighbour_message(AddressFamily::Inet, overlay, mac, address))
                    .execute()
                    .await
            }
            Change::DeleteForwarding(mac, node) => {
                self.handle
                    .neighbours()
                    .del(neighbour_message(AddressFamily::Bridge, overlay, mac, node))
                    .execute()
                    .await
            }
        };
        result
            .or_else(|error| already_so(change, error))
            .map_err(|source| NetlinkError::Apply { change: format!("{change:?}"), source })
    }

    /// Creates or repairs the device. One with settings that cannot be changed in place is replaced.
    async fn ensure_device(&self, device: &VxlanDevice) -> Result<(), NetlinkError> {
        let name = &device.name;
        if let Some(link) = self.link(name).await?
            && !compatible(device, &link)
        {
            tracing::warn!(%name, "the device has other settings; replacing it");
            let deleted = self.handle.link().del(link.header.index).execute().await;
            deleted.map_err(|source| NetlinkError::DeleteDevice { name: name.clone(), source })?;
        }
        if self.link(name).await?.is_none() {
            let added = self.handle.link().add(vxlan_message(device)).execute().await;
            added.map_err(|source| NetlinkError::CreateDevice { name: name.clone(), source })?;
        }
        let link = self.link(name).await?.ok_or_else(|| NetlinkError::DeviceGone(name.clone()))?;
        self.set_up_device(device, &link)
            .await
            .map_err(|source| NetlinkError::SetUpDevice { name: name.clone(), source })
    }

    async fn set_up_device(&self, device: &VxlanDevice, link: &LinkMessage) -> Result<(), rtnetlink::Error> {
        let index = link.header.index;
        let mut addresses = self.handle.address().get().set_link_index_filter(index).execute();
        let mut present = false;
        while let Some(message) = addresses.try_next().await? {
            match ipv4(&message) {
                Some(net) if net.addr() == device.address && net.prefix_len() == 32 => present = true,
                Some(_) => self.handle.address().del(message).execute().await?,
                None => {}
            }
        }
        if !present {
            self.handle.address().add(index, IpAddr::V4(device.address), 32).execute().await?;
        }
        let message = LinkUnspec::new_with_index(index).mtu(device.mtu).up().build();
        self.handle.link().change(message).execute().await
    }

    async fn link(&self, name: &str) -> Result<Option<LinkMessage>, NetlinkError> {
        match self.handle.link().get().match_name(name).execute().try_next().await {
            Ok(link) => Ok(link),
            Err(rtnetlink::Error::NetlinkError(error)) if -error.raw_code() == libc::ENODEV => Ok(None),
            Err(source) => Err(NetlinkError::List { what: "links", source }),
        }
    }

    async fn addresses(&self, index: u32) -> Result<Vec<Ipv4Net>, NetlinkError> {
        let messages: Vec<AddressMessage> = self
            .handle
            .address()
            .get()
            .set_link_index_filter(index)
            .execute()
            .try_collect()
            .await
            .map_err(list("addresses"))?;
        Ok(messages.iter().filter_map(ipv4).collect())
    }

    async fn ipv4_routes(&self) -> Result<Vec<RouteMessage>, NetlinkError> {
        let query = RouteMessageBuilder::<Ipv4Addr>::new().build();
        let routes = self.handle.route().get(query).execute();
        let main = routes.try_filter(|route| {
            let main = route.header.table == RouteHeader::RT_TABLE_MAIN;
            std::future::ready(main)
        });
        main.try_collect().await.map_err(list("routes"))
    }
}

/// Waits until the kernel reports something that may concern the data plane: the device, the external interface, or
/// a route to a subnet of the network. The changes of pods' own interfaces are not reported.
pub struct Events {
    messages: futures::channel::mpsc::UnboundedReceiver<(
        rtnetlink::packet_core::NetlinkMessage<RouteNetlinkMessage>,
        rtnetlink::sys::SocketAddr,
    )>,
    network: Ipv4Net,
    interfaces: Vec<String>,
}

impl Events {
    pub fn subscribe(network: Ipv4Net, interfaces: Vec<String>) -> Result<Self, NetlinkError> {
        let groups = [MulticastGroup::Link, MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv4Route];
        let (connection, _, messages) = new_multicast_connection(&groups).map_err(NetlinkError::Open)?;
        tokio::spawn(connection);
        Ok(Self { messages, network, interfaces })
    }

    /// The next event of interest; `None` when the subscription ended and must be made again.
    pub async fn next(&mut self) -> Option<()> {
        while let Some((message, _)) = self.messages.next().await {
            let relevant = match &message.payload {
                NetlinkPayload::InnerMessage(inner) => self.concerns_us(inner),
                NetlinkPayload::Overrun(_) => true,
                _ => false,
            };
            if relevant {
                return Some(());
            }
        }
        None
    }

    fn concerns_us(&self, message: &RouteNetlinkMessage) -> bool {
        match message {
            RouteNetlinkMessage::NewLink(link) | RouteNetlinkMessage::DelLink(link) => {
                link_name(link).is_some_and(|name| self.interfaces.iter().any(|ours| ours == name))
            }
            RouteNetlinkMessage::DelAddress(address) => ipv4(address).is_some(),
            RouteNetlinkMessage::NewRoute(route) | RouteNetlinkMessage::DelRoute(route) => {
                destination(route).is_some_and(|net| net.prefix_len() < 32 && self.network.contains(&net))
            }
            _ => false,
        }
    }
}

fn list(what: &'static str) -> impl FnOnce(rtnetlink::Error) -> NetlinkError {
    move |source| NetlinkError::List { what, source }
}

/// Deleting what is not there is success: somebody else was faster.
fn already_so(change: &Change, error: rtnetlink::Error) -> Result<(), rtnetlink::Error> {
    let deleting =
        matches!(change, Change::DeleteRoute(..) | Change::DeleteForwarding(..) | Change::DeleteNeighbour(..));
    match &error {
        rtnetlink::Error::NetlinkError(message)
            if deleting && [libc::ENOENT, libc::ESRCH].contains(&-message.raw_code()) =>
        {
            Ok(())
        }
        _ => Err(error),
    }
}

fn link_name(link: &LinkMessage) -> Option<&str> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name.as_str()),
        _ => None,
    })
}

fn link_mtu(link: &LinkMessage) -> u32 {
    let mtu = |attribute: &LinkAttribute| if let LinkAttribute::Mtu(mtu) = attribute { Some(*mtu) } else { None };
    link.attributes.iter().find_map(mtu).unwrap_or_default()
}

fn link_mac(link: &LinkMessage) -> Option<Mac> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Address(bytes) => bytes.as_slice().try_into().ok().map(Mac),
        _ => None,
    })
}

fn ipv4(message: &AddressMessage) -> Option<Ipv4Net> {
    let local = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Local(IpAddr::V4(address)) => Some(*address),
        _ => None,
    });
    let address = local.or_else(|| {
        message.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Address(IpAddr::V4(address)) => Some(*address),
            _ => None,
        })
    })?;
    Ipv4Net::new(address, message.header.prefix_len).ok()
}

/// Whether the existing link can be used as the device, after setting address, MTU and state.
fn compatible(device: &VxlanDevice, link: &LinkMessage) -> bool {
    let Some(settings) = vxlan_settings(link) else { return false };
    let has = |wanted: InfoVxlan| settings.contains(&wanted);
    has(InfoVxlan::Id(device.vni))
        && has(InfoVxlan::Port(device.port))
        && has(InfoVxlan::Local(device.local))
        && has(InfoVxlan::Link(device.link))
        && has(InfoVxlan::Learning(device.learning))
        && has(InfoVxlan::Gbp) == device.gbp
        && link_mac(link) == Some(device.mac)
}

/// What is not right with the link, in a few words.
fn device_problem(device: &VxlanDevice, link: &LinkMessage, addresses: &[Ipv4Net]) -> Option<&'static str> {
    if !compatible(device, link) {
        Some("settings")
    } else if !link.header.flags.contains(LinkFlags::Up) {
        Some("down")
    } else if link_mtu(link) != device.mtu {
        Some("mtu")
    } else if !addresses.iter().any(|net| net.addr() == device.address && net.prefix_len() == 32) {
        Some("address")
    } else {
        None
    }
}

fn vxlan_settings(link: &LinkMessage) -> Option<&[InfoVxlan]> {
    let infos = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => Some(infos),
        _ => None,
    })?;
    if !infos.contains(&LinkInfo::Kind(InfoKind::Vxlan)) {
        return None;
    }
    infos.iter().find_map(|info| match info {
        LinkInfo::Data(InfoData::Vxlan(settings)) => Some(settings.as_slice()),
        _ => None,
    })
}

fn vxlan_message(device: &VxlanDevice) -> LinkMessage {
    let mut builder = LinkVxlan::new(&device.name, device.vni)
        .dev(device.link)
        .local(device.local)
        .port(device.port)
        .learning(device.learning)
        .address(device.mac.0.to_vec())
        .mtu(device.mtu);
    if device.gbp {
        builder = builder.gbp();
    }
    builder.build()
}

fn output_interface(route: &RouteMessage) -> Option<u32> {
    route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Oif(index) => Some(*index),
        _ => None,
    })
}

fn metric(route: &RouteMessage) -> u32 {
    let priority = |attribute: &RouteAttribute| {
        if let RouteAttribute::Priority(priority) = attribute { Some(*priority) } else { None }
    };
    route.attributes.iter().find_map(priority).unwrap_or_default()
}

fn destination(route: &RouteMessage) -> Option<Ipv4Net> {
    let address = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(RouteAddress::Inet(address)) => Some(*address),
        _ => None,
    })?;
    Ipv4Net::new(address, route.header.destination_prefix_length).ok()
}

/// The route as one that flannel could have made: through a gateway, to a part of the network that is more than a host.
fn flannel_route(
    message: &RouteMessage,
    network: Ipv4Net,
    overlay: Option<u32>,
    underlay: u32,
) -> Option<(Ipv4Net, Route)> {
    let subnet = destination(message)?;
    if !network.contains(&subnet) || subnet == network || subnet.prefix_len() == 32 {
        return None;
    }
    let gateway = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Gateway(RouteAddress::Inet(address)) => Some(*address),
        _ => None,
    })?;
    let index = output_interface(message)?;
    let via = if Some(index) == overlay {
        Via::Overlay
    } else if index == underlay {
        Via::Underlay
    } else {
        return None;
    };
    Some((subnet, Route { gateway, via }))
}

fn route_message(subnet: Ipv4Net, route: Route, index: u32) -> RouteMessage {
    let mut message = RouteMessageBuilder::<Ipv4Addr>::new()
        .destination_prefix(subnet.network(), subnet.prefix_len())
        .gateway(route.gateway)
        .output_interface(index)
        .protocol(RouteProtocol::Boot)
        .scope(RouteScope::Universe)
        .build();
    if route.via == Via::Overlay {
        message.header.flags |= RouteFlags::Onlink;
    }
    message
}

fn neighbour(entry: &NeighbourMessage, family: AddressFamily) -> Option<(Mac, Ipv4Addr)> {
    let mut mac = None;
    let mut address = None;
    for attribute in &entry.attributes {
        match attribute {
            NeighbourAttribute::LinkLayerAddress(bytes) => mac = bytes.as_slice().try_into().ok().map(Mac),
            NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => address = Some(*ip),
            // The parser reads addresses by the family of the entry, and AF_BRIDGE is none that it knows.
            NeighbourAttribute::Destination(NeighbourAddress::Other(bytes)) if family == AddressFamily::Bridge => {
                address = <[u8; 4]>::try_from(bytes.as_slice()).ok().map(Ipv4Addr::from);
            }
            _ => {}
        }
    }
    mac.zip(address)
}

fn neighbour_message(family: AddressFamily, index: u32, mac: Mac, address: Ipv4Addr) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family;
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    if family == AddressFamily::Bridge {
        message.header.flags = NeighbourFlags::Own;
    }
    message.attributes = vec![
        NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()),
        NeighbourAttribute::Destination(NeighbourAddress::Inet(address)),
    ];
    message
}
