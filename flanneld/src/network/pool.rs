//! The pool that the subnets of one address family come from: a network, the length of a subnet, and the first and
//! last subnet that may be leased.

use std::net::IpAddr;

use ipnet::IpNet;

use super::NetworkError;
use crate::family::Family;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pool {
    /// The pod network of the whole cluster.
    pub network: IpNet,
    /// Prefix length of each node's subnet.
    pub subnet_len: u8,
    /// First and last subnet that may be leased.
    pub min: IpAddr,
    pub max: IpAddr,
}

/// The fields of the document that describe a pool; a zero or unspecified value means that it is not given.
pub(super) struct Asked {
    pub network: IpNet,
    pub subnet_len: u8,
    pub min: Option<IpAddr>,
    pub max: Option<IpAddr>,
}

impl Pool {
    pub(super) fn new(asked: &Asked) -> Result<Self, NetworkError> {
        let network = asked.network.trunc();
        let subnet_len = subnet_len(network, asked.subnet_len)?;
        let family = Family::of_net(network);
        let size = size(family, subnet_len);
        let given = |field, address: Option<IpAddr>| {
            let address = address.filter(|address| !address.is_unspecified());
            address.map(|address| check(field, address, network, subnet_len)).transpose()
        };
        // The first subnet is left out by default: an interface with the network's own address confuses routing.
        let first = Family::number(network.network()).saturating_add(size);
        let last = Family::number(network.broadcast()) - (size - 1);
        let (min_field, max_field) = match family {
            Family::V4 => ("SubnetMin", "SubnetMax"),
            Family::V6 => ("IPv6SubnetMin", "IPv6SubnetMax"),
        };
        let or = |given: Option<IpAddr>, number| given.or_else(|| family.address(number)).unwrap_or(network.network());
        let min = or(given(min_field, asked.min)?, first);
        let max = or(given(max_field, asked.max)?, last);
        if min > max {
            return Err(NetworkError::EmptyRange { min, max });
        }
        Ok(Self { network, subnet_len, min, max })
    }

    pub fn family(&self) -> Family {
        Family::of_net(self.network)
    }

    /// Whether the subnet is one that this pool could lease.
    pub fn allows(&self, subnet: IpNet) -> bool {
        Family::of_net(subnet) == self.family()
            && subnet.prefix_len() == self.subnet_len
            && subnet.network() == subnet.addr()
            && (self.min..=self.max).contains(&subnet.addr())
    }

    /// Every subnet that may be leased, in order.
    pub fn subnets(&self) -> impl Iterator<Item = IpNet> + use<> {
        let (family, subnet_len) = (self.family(), self.subnet_len);
        let last = Family::number(self.max);
        let mut next = Some(Family::number(self.min));
        std::iter::from_fn(move || {
            let number = next.filter(|&number| number <= last)?;
            next = number.checked_add(size(family, subnet_len));
            IpNet::new(family.address(number)?, subnet_len).ok()
        })
    }
}

fn size(family: Family, subnet_len: u8) -> u128 {
    1 << (family.bits() - subnet_len)
}

/// The length asked for, or /24 (/64) where at least four of them fit, or a quarter of a smaller network. A subnet has
/// room for a tunnel, a bridge and two hosts at least.
fn subnet_len(network: IpNet, asked: u8) -> Result<u8, NetworkError> {
    let (usual, longest) = match Family::of_net(network) {
        Family::V4 => (24, 30),
        Family::V6 => (64, 126),
    };
    let subnet_len = match asked {
        0 if network.prefix_len() + 2 <= usual => usual,
        0 => network.prefix_len() + 2,
        asked => asked,
    };
    if asked > longest {
        return Err(NetworkError::SubnetTooSmall { asked, longest });
    }
    if subnet_len > longest || subnet_len < network.prefix_len() + 2 {
        return Err(NetworkError::NetworkTooSmall { network, subnet_len });
    }
    Ok(subnet_len)
}

fn check(field: &'static str, address: IpAddr, network: IpNet, subnet_len: u8) -> Result<IpAddr, NetworkError> {
    if !network.contains(&address) {
        Err(NetworkError::OutsideNetwork { field, address, network })
    } else if !Family::number(address).is_multiple_of(size(Family::of(address), subnet_len)) {
        Err(NetworkError::Unaligned { field, address, subnet_len })
    } else {
        Ok(address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(network: &str, subnet_len: u8) -> Pool {
        Pool::new(&Asked { network: network.parse().unwrap(), subnet_len, min: None, max: None }).unwrap()
    }

    #[test]
    fn defaults_leave_out_the_first_subnet() {
        for (network, len, count, first, last) in [
            ("10.244.0.0/16", 24, 255, "10.244.1.0/24", "10.244.255.0/24"),
            ("10.3.0.0/28", 30, 3, "10.3.0.4/30", "10.3.0.12/30"),
            ("255.255.0.0/16", 24, 255, "255.255.1.0/24", "255.255.255.0/24"),
            ("2001:cafe:42::/56", 64, 255, "2001:cafe:42:1::/64", "2001:cafe:42:ff::/64"),
            ("ffff:ffff:ffff:ff00::/56", 64, 255, "ffff:ffff:ffff:ff01::/64", "ffff:ffff:ffff:ffff::/64"),
            ("fd00::/63", 65, 3, "fd00:0:0:0:8000::/65", "fd00:0:0:1:8000::/65"),
        ] {
            let pool = pool(network, 0);
            let subnets: Vec<String> = pool.subnets().map(|subnet| subnet.to_string()).collect();
            assert_eq!((pool.subnet_len, subnets.len()), (len, count), "{network}");
            assert_eq!(subnets[0].parse::<IpNet>().unwrap(), first.parse().unwrap());
            assert_eq!(subnets[count - 1].parse::<IpNet>().unwrap(), last.parse().unwrap());
        }
    }

    #[test]
    fn a_subnet_fits_by_length_place_and_family() {
        let pool = pool("10.244.0.0/16", 24);
        let allows = |net: &str| pool.allows(net.parse().unwrap());
        assert!(allows("10.244.7.0/24"));
        for bad in ["10.244.0.0/24", "10.244.7.0/25", "10.244.7.1/24", "10.245.7.0/24", "fd00::/24"] {
            assert!(!allows(bad), "{bad}");
        }
    }
}
