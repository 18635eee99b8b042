//! The nftables backend: a [`Ruleset`] is the whole content of our one table as a value. It is compiled from the plan,
//! compared with the one that is installed, and the difference is text for `nft -f -`.
//!
//! A packet meets, in this order: `firewall-check` (source ranges of load balancers), `services` (two map look-ups, so
//! the cost does not grow with the number of services), the service's own chain, which picks an endpoint; then in the
//! filter hooks `service-endpoints-check`/`nodeport-endpoints-check` for services that nobody serves; and on the way
//! out `masquerading`.

mod compile;
mod diff;
mod trace;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Write as _};
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

pub use compile::{Settings, compile};
pub use diff::{Installed, Transaction, adopt, diff, replace};
pub use trace::{Outcome, Packet, trace};

use crate::model::Protocol;

pub const TABLE: &str = "kube-proxy";

/// The content of our table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ruleset {
    pub chains: BTreeMap<String, Chain>,
    pub maps: BTreeMap<String, Map>,
    pub sets: BTreeMap<String, Set>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chain {
    /// Where the kernel calls the chain; `None` for chains that only others jump to.
    pub hook: Option<Hook>,
    pub rules: Vec<Rule>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hook {
    pub kind: &'static str,
    pub hook: &'static str,
    pub priority: i32,
}

/// A verdict map. All elements have the same kind of key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Map {
    /// The key has an address in front of protocol and port.
    pub with_address: bool,
    pub elements: BTreeMap<Key, Verdict>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    pub address: Option<Ipv4Addr>,
    pub protocol: Protocol,
    pub port: u16,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Set {
    Addresses(BTreeSet<Ipv4Addr>),
    /// Source, destination, protocol and port of connections from an endpoint to itself.
    Hairpins(BTreeSet<(Ipv4Addr, Protocol, u16)>),
    /// Filled by the kernel: the clients of one endpoint, for so many seconds after their last connection.
    Affinity {
        seconds: u32,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    Goto(String),
    Drop,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    pub matches: Vec<Match>,
    pub action: Action,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Match {
    /// The first packet of a connection.
    CtNew,
    CtDnat,
    SourceIn(Ipv4Net),
    SourceNotIn(Vec<Ipv4Net>),
    DestinationNotIn(Ipv4Net),
    /// The address belongs to this node.
    SourceLocal,
    DestinationLocal,
    DestinationInSet(&'static str),
    SourceInAffinity(String),
    MarkSet(u32),
    Hairpin(&'static str),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    Jump(String),
    Goto(String),
    /// Looks the packet up in the map and does what it says; goes on if it is not there.
    LookUp {
        map: &'static str,
        with_address: bool,
    },
    Mark(u32),
    /// Clears the mark first, so that the packet is not masqueraded again in another place.
    Masquerade {
        clear: Option<u32>,
    },
    Dnat {
        protocol: Protocol,
        targets: Vec<(Ipv4Addr, u16)>,
    },
    /// Goes to one of the chains at random.
    GotoAny(Vec<String>),
    Remember(String),
    Drop,
    Reject,
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(address) = self.address {
            write!(f, "{address} . ")?;
        }
        write!(f, "{} . {}", self.protocol, self.port)
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Goto(chain) => write!(f, "goto {chain}"),
            Self::Drop => f.write_str("drop"),
        }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for condition in &self.matches {
            write!(f, "{condition} ")?;
        }
        write!(f, "{}", self.action)
    }
}

impl fmt::Display for Match {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::CtNew => f.write_str("ct state new"),
            Self::CtDnat => f.write_str("ct status dnat"),
            Self::SourceIn(net) => write!(f, "ip saddr {net}"),
            Self::SourceNotIn(nets) => write!(f, "ip saddr != {{ {} }}", joined(nets)),
            Self::DestinationNotIn(net) => write!(f, "ip daddr != {net}"),
            Self::SourceLocal => f.write_str("fib saddr type local"),
            Self::DestinationLocal => f.write_str("fib daddr type local"),
            Self::DestinationInSet(set) => write!(f, "ip daddr @{set}"),
            Self::SourceInAffinity(set) => write!(f, "ip saddr @{set}"),
            Self::MarkSet(mark) => write!(f, "meta mark & {mark:#x} != 0"),
            Self::Hairpin(set) => write!(f, "ip saddr . ip daddr . meta l4proto . th dport @{set}"),
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Jump(chain) => write!(f, "jump {chain}"),
            Self::Goto(chain) => write!(f, "goto {chain}"),
            Self::LookUp { map, with_address: true } => {
                write!(f, "ip daddr . meta l4proto . th dport vmap @{map}")
            }
            Self::LookUp { map, with_address: false } => write!(f, "meta l4proto . th dport vmap @{map}"),
            Self::Mark(mark) => write!(f, "meta mark set meta mark | {mark:#x}"),
            Self::Masquerade { clear: Some(mark) } => {
                write!(f, "meta mark set meta mark ^ {mark:#x} masquerade fully-random")
            }
            Self::Masquerade { clear: None } => f.write_str("masquerade fully-random"),
            Self::Dnat { protocol, targets } => write_dnat(f, *protocol, targets),
            Self::GotoAny(chains) => {
                let choices: Vec<String> =
                    chains.iter().enumerate().map(|(index, chain)| format!("{index} : goto {chain}")).collect();
                write!(f, "numgen random mod {} vmap {{ {} }}", chains.len(), choices.join(", "))
            }
            Self::Remember(set) => write!(f, "update @{set} {{ ip saddr }}"),
            Self::Drop => f.write_str("drop"),
            Self::Reject => f.write_str("reject"),
        }
    }
}

fn write_dnat(f: &mut fmt::Formatter<'_>, protocol: Protocol, targets: &[(Ipv4Addr, u16)]) -> fmt::Result {
    if let [(address, port)] = targets {
        return write!(f, "meta l4proto {protocol} dnat to {address}:{port}");
    }
    let mut choices = String::new();
    for (index, (address, port)) in targets.iter().enumerate() {
        let comma = if index == 0 { "" } else { ", " };
        write!(choices, "{comma}{index} : {address} . {port}")?;
    }
    write!(f, "meta l4proto {protocol} dnat ip addr . port to numgen random mod {} map {{ {choices} }}", targets.len())
}

fn joined<T: fmt::Display>(items: &[T]) -> String {
    items.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}
