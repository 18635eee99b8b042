//! Which interface carries the traffic between nodes, and under which address other nodes reach this one.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

use crate::netlink::{Interface, Kernel, NetlinkError};

/// The interface between the nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExternalInterface {
    pub name: String,
    pub index: u32,
    pub mtu: u32,
    /// The interface's own address and the network it is in.
    pub address: Ipv4Net,
    /// What other nodes send to; the interface's address unless given.
    pub public_ip: Ipv4Addr,
}

#[derive(Debug, thiserror::Error)]
pub enum InterfaceError {
    #[error("cannot look at the interfaces")]
    Kernel(#[from] NetlinkError),
    #[error("no interface matches --iface {0}")]
    NoMatch(String),
    #[error("there is no route to --iface-can-reach {0}")]
    Unreachable(Ipv4Addr),
    #[error("there is no default route to find the interface by; use --iface")]
    NoDefaultRoute,
    #[error("interface {0} has no IPv4 address")]
    NoAddress(String),
}

/// How the interface is chosen.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    /// Names or addresses; the first that exists is taken.
    pub interfaces: Vec<String>,
    /// The interface that leads to this address.
    pub can_reach: Option<Ipv4Addr>,
    pub public_ip: Option<Ipv4Addr>,
}

impl Selection {
    pub async fn find(&self, kernel: &Kernel) -> Result<ExternalInterface, InterfaceError> {
        let all = kernel.interfaces().await?;
        if !self.interfaces.is_empty() {
            let found = self.interfaces.iter().find_map(|wanted| named(&all, wanted));
            let (interface, address) = found.ok_or_else(|| InterfaceError::NoMatch(self.interfaces.join(", ")))?;
            return self.external(interface, address);
        }
        if let Some(target) = self.can_reach {
            let index = kernel.interface_towards(target).await?;
            let interface = all.iter().find(|interface| Some(interface.index) == index);
            return self.external(interface.ok_or(InterfaceError::Unreachable(target))?, None);
        }
        let own = self.public_ip.and_then(|address| named(&all, &address.to_string()));
        if let Some((interface, address)) = own {
            return self.external(interface, address);
        }
        let index = kernel.default_interface().await?;
        let interface = all.iter().find(|interface| Some(interface.index) == index);
        self.external(interface.ok_or(InterfaceError::NoDefaultRoute)?, None)
    }

    fn external(&self, interface: &Interface, address: Option<Ipv4Net>) -> Result<ExternalInterface, InterfaceError> {
        let address = address
            .or_else(|| preferred(&interface.addresses))
            .ok_or_else(|| InterfaceError::NoAddress(interface.name.clone()))?;
        Ok(ExternalInterface {
            name: interface.name.clone(),
            index: interface.index,
            mtu: interface.mtu,
            address,
            public_ip: self.public_ip.unwrap_or(address.addr()),
        })
    }
}

/// The interface with this name or this address (which is then the one to use).
fn named<'a>(all: &'a [Interface], wanted: &str) -> Option<(&'a Interface, Option<Ipv4Net>)> {
    let Ok(ip) = wanted.parse::<Ipv4Addr>() else {
        return all.iter().find(|interface| interface.name == wanted).map(|interface| (interface, None));
    };
    all.iter().find_map(|interface| {
        let address = interface.addresses.iter().find(|net| net.addr() == ip)?;
        Some((interface, Some(*address)))
    })
}

/// Link-local addresses are the last choice.
fn preferred(addresses: &[Ipv4Net]) -> Option<Ipv4Net> {
    addresses.iter().find(|net| !net.addr().is_link_local()).or_else(|| addresses.first()).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interfaces() -> Vec<Interface> {
        let interface = |name: &str, index, addresses: &[&str]| Interface {
            name: name.to_owned(),
            index,
            mtu: 1500,
            addresses: addresses.iter().map(|net| net.parse().unwrap()).collect(),
        };
        vec![
            interface("lo", 1, &["127.0.0.1/8"]),
            interface("eth0", 2, &["169.254.0.7/16", "10.0.0.5/24", "10.0.1.5/24"]),
        ]
    }

    #[test]
    fn by_name_and_by_address() {
        let all = interfaces();
        assert_eq!(named(&all, "eth0").unwrap().0.index, 2);
        let (interface, address) = named(&all, "10.0.1.5").unwrap();
        assert_eq!((interface.index, address), (2, Some("10.0.1.5/24".parse().unwrap())));
        assert!(named(&all, "10.0.1.6").is_none());
        assert!(named(&all, "eth1").is_none());
    }

    #[test]
    fn the_first_address_that_is_not_link_local() {
        let selection = Selection::default();
        let external = selection.external(&interfaces()[1], None).unwrap();
        assert_eq!(external.address, "10.0.0.5/24".parse().unwrap());
        assert_eq!(external.public_ip.to_string(), "10.0.0.5");
        let nat = Selection { public_ip: Some("192.0.2.9".parse().unwrap()), ..Selection::default() };
        assert_eq!(nat.external(&interfaces()[1], None).unwrap().public_ip.to_string(), "192.0.2.9");
    }
}
