//! Neighbours and forwarding entries of a VXLAN device.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures::TryStreamExt;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::route::RouteType;

use super::{Kernel, KernelError, address_family, list};
use crate::backend::Tables;
use crate::family::Family;
use crate::mac::Mac;

impl Kernel {
    /// The permanent entries of the device.
    pub async fn neighbour_tables(&self, index: u32) -> Result<Tables, KernelError> {
        let mut tables = Tables::default();
        for family in [AddressFamily::Inet, AddressFamily::Inet6, AddressFamily::Bridge] {
            let mut entries = self.handle.neighbours().get().set_address_family(family).execute();
            while let Some(entry) = entries.try_next().await.map_err(list("neighbours"))? {
                if entry.header.ifindex != index || entry.header.state != NeighbourState::Permanent {
                    continue;
                }
                let Some((mac, address)) = neighbour(&entry) else { continue };
                if family == AddressFamily::Bridge {
                    tables.forwarding.insert(mac, address);
                } else {
                    tables.neighbours.insert(address, mac);
                }
            }
        }
        Ok(tables)
    }

    pub async fn set_neighbour(&self, index: u32, address: IpAddr, mac: Mac) -> Result<(), rtnetlink::Error> {
        let request = self.handle.neighbours().add(index, address);
        request.kind(RouteType::Unicast).link_layer_address(&mac.0).replace().execute().await
    }

    pub async fn set_forwarding(&self, index: u32, mac: Mac, node: IpAddr) -> Result<(), rtnetlink::Error> {
        let request = self.handle.neighbours().add_bridge(index, &mac.0).destination(node);
        request.flags(NeighbourFlags::Own).replace().execute().await
    }

    pub async fn delete_neighbour(&self, index: u32, address: IpAddr, mac: Mac) -> Result<(), rtnetlink::Error> {
        let message = neighbour_message(address_family(Family::of(address)), index, mac, address);
        self.handle.neighbours().del(message).execute().await
    }

    pub async fn delete_forwarding(&self, index: u32, mac: Mac, node: IpAddr) -> Result<(), rtnetlink::Error> {
        let message = neighbour_message(AddressFamily::Bridge, index, mac, node);
        self.handle.neighbours().del(message).execute().await
    }
}

fn neighbour(entry: &NeighbourMessage) -> Option<(Mac, IpAddr)> {
    let mut mac = None;
    let mut address = None;
    for attribute in &entry.attributes {
        match attribute {
            NeighbourAttribute::LinkLayerAddress(bytes) => mac = bytes.as_slice().try_into().ok().map(Mac),
            NeighbourAttribute::Destination(destination) => address = ip(destination),
            _ => {}
        }
    }
    mac.zip(address)
}

/// The parser reads addresses by the family of the entry, and AF_BRIDGE is none that it knows.
fn ip(address: &NeighbourAddress) -> Option<IpAddr> {
    match address {
        NeighbourAddress::Inet(ip) => Some(IpAddr::V4(*ip)),
        NeighbourAddress::Inet6(ip) => Some(IpAddr::V6(*ip)),
        NeighbourAddress::Other(bytes) => {
            let ipv4 = <[u8; 4]>::try_from(bytes.as_slice()).map(|bytes| IpAddr::V4(Ipv4Addr::from(bytes)));
            ipv4.or_else(|_| <[u8; 16]>::try_from(bytes.as_slice()).map(|bytes| IpAddr::V6(Ipv6Addr::from(bytes)))).ok()
        }
        _ => None,
    }
}

fn neighbour_message(family: AddressFamily, index: u32, mac: Mac, address: IpAddr) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family;
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    if family == AddressFamily::Bridge {
        message.header.flags = NeighbourFlags::Own;
    }
    let destination = match address {
        IpAddr::V4(ip) => NeighbourAddress::Inet(ip),
        IpAddr::V6(ip) => NeighbourAddress::Inet6(ip),
    };
    message.attributes =
        vec![NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()), NeighbourAttribute::Destination(destination)];
    message
}
