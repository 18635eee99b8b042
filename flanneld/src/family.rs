//! The two address families, and what differs between them in numbers and names.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    V4,
    V6,
}

impl Family {
    pub const BOTH: [Self; 2] = [Self::V4, Self::V6];

    pub fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }

    pub fn of_net(net: IpNet) -> Self {
        Self::of(net.addr())
    }

    /// Bits of an address, which is also the prefix length of a single host.
    pub fn bits(self) -> u8 {
        match self {
            Self::V4 => 32,
            Self::V6 => 128,
        }
    }

    /// The address as a number, for arithmetic that is the same in both families.
    pub fn number(address: IpAddr) -> u128 {
        match address {
            IpAddr::V4(address) => u32::from(address).into(),
            IpAddr::V6(address) => address.into(),
        }
    }

    /// The inverse of [`Self::number`]; `None` when the number is beyond the family's space.
    pub fn address(self, number: u128) -> Option<IpAddr> {
        Some(match self {
            Self::V4 => IpAddr::V4(Ipv4Addr::from(u32::try_from(number).ok()?)),
            Self::V6 => IpAddr::V6(Ipv6Addr::from(number)),
        })
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

/// The network of exactly this address.
pub fn host(address: IpAddr) -> IpNet {
    IpNet::from(address)
}

/// Whether one of the networks lies in the other.
pub fn overlap(one: IpNet, other: IpNet) -> bool {
    one.contains(&other) || other.contains(&one)
}
