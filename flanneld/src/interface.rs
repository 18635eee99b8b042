//! Which interface carries the traffic between nodes, and under which addresses other nodes reach this one.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use regex::Regex;

use crate::family::Family;
use crate::kernel::{Interface, Kernel, KernelError};

/// The interface between the nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExternalInterface {
    pub name: String,
    pub index: u32,
    pub mtu: u32,
    pub ipv4: Option<Endpoint>,
    pub ipv6: Option<Endpoint>,
}

/// The interface in one address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// The interface's own address and the network it is in.
    pub address: IpNet,
    /// What other nodes send to; the interface's address unless given.
    pub public: IpAddr,
}

impl ExternalInterface {
    pub fn endpoint(&self, family: Family) -> Option<&Endpoint> {
        match family {
            Family::V4 => self.ipv4.as_ref(),
            Family::V6 => self.ipv6.as_ref(),
        }
    }

    /// The public address as leases have it; unspecified when the network has no IPv4.
    pub fn public_ipv4(&self) -> Ipv4Addr {
        match self.ipv4.map(|endpoint| endpoint.public) {
            Some(IpAddr::V4(address)) => address,
            _ => Ipv4Addr::UNSPECIFIED,
        }
    }

    pub fn public_ipv6(&self) -> Option<Ipv6Addr> {
        match self.ipv6.map(|endpoint| endpoint.public) {
            Some(IpAddr::V6(address)) => Some(address),
            _ => None,
        }
    }

    /// Whether the nodes know this one by the same addresses as in the other description.
    pub fn same_public(&self, other: &Self) -> bool {
        (self.public_ipv4(), self.public_ipv6()) == (other.public_ipv4(), other.public_ipv6())
    }
}

#[derive(Debug, thiserror::Error)]
pub enum InterfaceError {
    #[error("cannot look at the interfaces")]
    Kernel(#[from] KernelError),
    #[error("--iface-regex {pattern:?} is not a regular expression")]
    Regex { pattern: String, source: Box<regex::Error> },
    #[error("no interface matches {asked}; there are {present}")]
    NoMatch { asked: String, present: String },
    #[error("there is no {0} default route to find the interface by; use --iface")]
    NoDefaultRoute(Family),
    #[error("the default routes of IPv4 and IPv6 leave through different interfaces, {ipv4} and {ipv6}; use --iface")]
    DefaultRoutesDiffer { ipv4: String, ipv6: String },
    #[error("interface {interface} has no {family} address")]
    NoAddress { interface: String, family: Family },
}

/// How the interface is chosen.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    /// Names or addresses; the first that exists is taken.
    pub interfaces: Vec<String>,
    /// Tried in order when no name or address fits: on every address first, then on every name.
    pub patterns: Vec<Regex>,
    /// The interface that leads to this address.
    pub can_reach: Option<IpAddr>,
    pub public_ip: Option<Ipv4Addr>,
    pub public_ipv6: Option<Ipv6Addr>,
}

/// An interface, and the addresses of it that were asked for.
#[derive(Clone)]
struct Found<'a> {
    interface: &'a Interface,
    addresses: Vec<IpNet>,
}

impl Selection {
    /// Reads the patterns of `--iface-regex`.
    pub fn compile(patterns: &[String]) -> Result<Vec<Regex>, InterfaceError> {
        let compile = |pattern: &String| {
            Regex::new(pattern)
                .map_err(|source| InterfaceError::Regex { pattern: pattern.clone(), source: Box::new(source) })
        };
        patterns.iter().map(compile).collect()
    }

    pub async fn find(&self, kernel: &Kernel, families: &[Family]) -> Result<ExternalInterface, InterfaceError> {
        let all = kernel.interfaces().await?;
        let asked_for = !self.interfaces.is_empty() || !self.patterns.is_empty() || self.can_reach.is_some();
        let mut found = self.interfaces.iter().find_map(|wanted| named(&all, wanted));
        if found.is_none() {
            found = self.patterns.iter().find_map(|pattern| matching(&all, pattern, families));
        }
        if let (None, Some(target)) = (&found, self.can_reach) {
            let way = kernel.way_to(target).await?;
            found = way.and_then(|way| {
                let interface = all.iter().find(|interface| interface.index == way.index)?;
                let source = |net: &&IpNet| Some(net.addr()) == way.source;
                Some(Found { interface, addresses: interface.addresses.iter().filter(source).copied().collect() })
            });
        }
        if found.is_none() && !asked_for {
            found = self.own_public(&all);
        }
        match found {
            Some(found) => self.external(&found, families),
            None if asked_for => Err(InterfaceError::NoMatch { asked: self.describe(), present: describe(&all) }),
            None => self.external(&default_interface(kernel, &all, families).await?, families),
        }
    }

    /// The interface that has the public address, if it is not behind NAT.
    fn own_public<'a>(&self, all: &'a [Interface]) -> Option<Found<'a>> {
        let given = self.public_ip.map(IpAddr::V4).or(self.public_ipv6.map(IpAddr::V6))?;
        named(all, &given.to_string())
    }

    fn external(&self, found: &Found, families: &[Family]) -> Result<ExternalInterface, InterfaceError> {
        let Found { interface, addresses } = found;
        let endpoint = |family: Family| -> Result<Option<Endpoint>, InterfaceError> {
            if !families.contains(&family) {
                return Ok(None);
            }
            let public = match family {
                Family::V4 => self.public_ip.map(IpAddr::V4),
                Family::V6 => self.public_ipv6.map(IpAddr::V6),
            };
            let of_family = |net: &&IpNet| Family::of_net(**net) == family;
            let own_public = interface.addresses.iter().find(|net| Some(net.addr()) == public);
            let address = addresses.iter().find(of_family).or(own_public).copied();
            let address = address.or_else(|| preferred(interface.addresses.iter().filter(of_family)));
            let address =
                address.ok_or_else(|| InterfaceError::NoAddress { interface: interface.name.clone(), family })?;
            Ok(Some(Endpoint { address, public: public.unwrap_or(address.addr()) }))
        };
        Ok(ExternalInterface {
            name: interface.name.clone(),
            index: interface.index,
            mtu: interface.mtu,
            ipv4: endpoint(Family::V4)?,
            ipv6: endpoint(Family::V6)?,
        })
    }

    fn describe(&self) -> String {
        let names = self.interfaces.iter().map(|name| format!("--iface {name}"));
        let patterns = self.patterns.iter().map(|pattern| format!("--iface-regex {pattern}"));
        let reach = self.can_reach.iter().map(|target| format!("--iface-can-reach {target}"));
        names.chain(patterns).chain(reach).collect::<Vec<_>>().join(", ")
    }
}

async fn default_interface<'a>(
    kernel: &Kernel,
    all: &'a [Interface],
    families: &[Family],
) -> Result<Found<'a>, InterfaceError> {
    let mut found: Option<Found> = None;
    for &family in families {
        let index = kernel.default_interface(family).await?;
        let interface = all.iter().find(|interface| Some(interface.index) == index);
        let interface = interface.ok_or(InterfaceError::NoDefaultRoute(family))?;
        match &found {
            Some(first) if first.interface.index != interface.index => {
                let (ipv4, ipv6) = (first.interface.name.clone(), interface.name.clone());
                return Err(InterfaceError::DefaultRoutesDiffer { ipv4, ipv6 });
            }
            _ => found = Some(Found { interface, addresses: Vec::new() }),
        }
    }
    found.ok_or(InterfaceError::NoDefaultRoute(Family::V4))
}

/// The interface with this name or this address (which is then the one to use).
fn named<'a>(all: &'a [Interface], wanted: &str) -> Option<Found<'a>> {
    let Ok(ip) = wanted.parse::<IpAddr>() else {
        let interface = all.iter().find(|interface| interface.name == wanted)?;
        return Some(Found { interface, addresses: Vec::new() });
    };
    all.iter().find_map(|interface| {
        let address = interface.addresses.iter().find(|net| net.addr() == ip)?;
        Some(Found { interface, addresses: vec![*address] })
    })
}

/// The first interface with a fitting address in every family, or else the first with a fitting name.
fn matching<'a>(all: &'a [Interface], pattern: &Regex, families: &[Family]) -> Option<Found<'a>> {
    let by_address = all.iter().find_map(|interface| {
        let fitting = |&family: &Family| {
            let mut own = interface.addresses.iter().filter(move |net| Family::of_net(**net) == family);
            own.find(|net| pattern.is_match(&net.addr().to_string())).copied()
        };
        let addresses = families.iter().map(fitting).collect::<Option<Vec<IpNet>>>()?;
        Some(Found { interface, addresses })
    });
    by_address.or_else(|| {
        let interface = all.iter().find(|interface| pattern.is_match(&interface.name))?;
        Some(Found { interface, addresses: Vec::new() })
    })
}

/// Link-local addresses are the last choice.
fn preferred<'a>(mut addresses: impl Iterator<Item = &'a IpNet> + Clone) -> Option<IpNet> {
    let link_local = |net: &&IpNet| match net.addr() {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    };
    addresses.clone().find(|net| !link_local(net)).or_else(|| addresses.next()).copied()
}

fn describe(all: &[Interface]) -> String {
    let one = |interface: &Interface| {
        let addresses: Vec<String> = interface.addresses.iter().map(|net| net.addr().to_string()).collect();
        format!("{} ({})", interface.name, addresses.join(" "))
    };
    all.iter().map(one).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    const V4: &[Family] = &[Family::V4];

    fn interfaces() -> Vec<Interface> {
        let interface = |name: &str, index, addresses: &[&str]| Interface {
            name: name.to_owned(),
            index,
            mtu: 1500,
            addresses: addresses.iter().map(|net| net.parse().unwrap()).collect(),
        };
        vec![
            interface("lo", 1, &["127.0.0.1/8", "::1/128"]),
            interface("eth0", 2, &["169.254.0.7/16", "10.0.0.5/24", "10.0.1.5/24", "fe80::5/64", "fd01::5/64"]),
            interface("eth1", 3, &["10.9.0.5/24"]),
        ]
    }

    #[test]
    fn by_name_and_by_address() {
        let all = interfaces();
        assert_eq!(named(&all, "eth0").unwrap().interface.index, 2);
        let found = named(&all, "10.0.1.5").unwrap();
        assert_eq!((found.interface.index, found.addresses), (2, vec!["10.0.1.5/24".parse().unwrap()]));
        assert_eq!(named(&all, "fd01::5").unwrap().interface.index, 2);
        assert!(named(&all, "10.0.1.6").is_none());
        assert!(named(&all, "eth7").is_none());
    }

    #[test]
    fn by_pattern_addresses_come_before_names() {
        let all = interfaces();
        let index = |pattern: &str, families: &[Family]| {
            matching(&all, &Regex::new(pattern).unwrap(), families).map(|found| found.interface.index)
        };
        assert_eq!(index(r"^10\.9\.", V4), Some(3));
        assert_eq!(index(r"^eth", V4), Some(2));
        assert_eq!(index(r"^(10\.0\.1|fd01:)", &Family::BOTH), Some(2));
        assert_eq!(index(r"^10\.9\.", &Family::BOTH), None);
        assert!(Selection::compile(&["(".to_owned()]).is_err());
    }

    #[test]
    fn the_first_address_that_is_not_link_local() {
        let all = interfaces();
        let found = named(&all, "eth0").unwrap();
        let external = Selection::default().external(&found, &Family::BOTH).unwrap();
        assert_eq!(external.ipv4.unwrap().address, "10.0.0.5/24".parse().unwrap());
        assert_eq!(external.ipv6.unwrap().address, "fd01::5/64".parse().unwrap());
        assert_eq!(external.public_ipv4().to_string(), "10.0.0.5");
        let error = Selection::default().external(&named(&all, "eth1").unwrap(), &Family::BOTH).unwrap_err();
        assert!(error.to_string().contains("eth1 has no IPv6"), "{error}");
    }

    #[test]
    fn a_public_address_is_published_whether_the_interface_has_it_or_not() {
        let all = interfaces();
        let found = named(&all, "eth0").unwrap();
        let nat = Selection { public_ip: Some("192.0.2.9".parse().unwrap()), ..Selection::default() };
        let external = nat.external(&found, V4).unwrap();
        assert_eq!((external.public_ipv4().to_string(), external.ipv6), ("192.0.2.9".to_owned(), None));
        assert_eq!(external.ipv4.unwrap().address, "10.0.0.5/24".parse().unwrap());
        let own = Selection { public_ip: Some("10.0.1.5".parse().unwrap()), ..Selection::default() };
        assert_eq!(own.external(&found, V4).unwrap().ipv4.unwrap().address, "10.0.1.5/24".parse().unwrap());
    }
}
