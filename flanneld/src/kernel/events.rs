//! Waits until the kernel reports something that may concern the data plane: our devices and the neighbours on them,
//! the external interface, or a route to a subnet of the network. The changes of pods' own interfaces are not reported.

use std::collections::BTreeSet;

use futures::StreamExt;
use ipnet::IpNet;
use rtnetlink::packet_core::{NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::{MulticastGroup, new_multicast_connection};

use super::messages::{address, destination, link_name};
use super::{Kernel, KernelError};
use crate::family::Family;

pub struct Events {
    messages:
        futures::channel::mpsc::UnboundedReceiver<(NetlinkMessage<RouteNetlinkMessage>, rtnetlink::sys::SocketAddr)>,
    networks: Vec<IpNet>,
    /// Names of the external interface and of our devices.
    interfaces: Vec<String>,
    /// The numbers that they have at the moment.
    indices: BTreeSet<u32>,
    /// The external interface, whose neighbours are not ours.
    underlay: u32,
}

impl Events {
    pub async fn subscribe(
        kernel: &Kernel,
        networks: Vec<IpNet>,
        interfaces: Vec<String>,
        underlay: u32,
    ) -> Result<Self, KernelError> {
        let groups = [
            MulticastGroup::Link,
            MulticastGroup::Neigh,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv6Route,
        ];
        let (connection, _, messages) = new_multicast_connection(&groups).map_err(KernelError::Open)?;
        tokio::spawn(connection);
        let ours = |name: &String| interfaces.contains(name);
        let indices = kernel.interfaces().await?.into_iter().filter(|i| ours(&i.name)).map(|i| i.index).collect();
        Ok(Self { messages, networks, interfaces, indices, underlay })
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

    /// Takes note of everything that has been reported already, so that one look at the kernel answers it all.
    pub fn drain(&mut self) {
        while let Ok((message, _)) = self.messages.try_recv() {
            if let NetlinkPayload::InnerMessage(inner) = &message.payload {
                self.concerns_us(inner);
            }
        }
    }

    fn concerns_us(&mut self, message: &RouteNetlinkMessage) -> bool {
        match message {
            RouteNetlinkMessage::NewLink(link) => {
                let ours = link_name(link).is_some_and(|name| self.interfaces.iter().any(|our| our == name));
                if ours {
                    self.indices.insert(link.header.index);
                }
                ours
            }
            RouteNetlinkMessage::DelLink(link) => self.indices.remove(&link.header.index),
            RouteNetlinkMessage::DelAddress(message) => {
                self.indices.contains(&message.header.index) && address(message).is_some()
            }
            RouteNetlinkMessage::NewNeighbour(entry) | RouteNetlinkMessage::DelNeighbour(entry) => {
                self.indices.contains(&entry.header.ifindex) && entry.header.ifindex != self.underlay
            }
            RouteNetlinkMessage::NewRoute(route) | RouteNetlinkMessage::DelRoute(route) => destination(route)
                .is_some_and(|net| {
                    let host = net.prefix_len() == Family::of_net(net).bits();
                    !host && self.networks.iter().any(|network| network.contains(&net))
                }),
            _ => false,
        }
    }
}
