//! A rule is a list of steps for the kernel's small machine: sixteen registers of four bytes, which a step reads or
//! writes; a step that does not match ends the rule. Values of up to sixteen bytes take several registers, and a key of
//! several fields is several registers one after another.

use super::schema::SetName;
use crate::model::Family;

/// The number of a register, 0–15.
pub type Register = u8;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Part of the packet.
    Payload {
        base: Base,
        offset: u32,
        length: u32,
        to: Register,
    },
    /// A fact about the packet.
    Load {
        fact: Fact,
        to: Register,
    },
    SetMark {
        from: Register,
    },
    /// `register = register & mask ^ xor`.
    Bits {
        register: Register,
        mask: Vec<u8>,
        xor: Vec<u8>,
    },
    Compare {
        register: Register,
        equal: bool,
        value: Vec<u8>,
    },
    /// Goes on if the key is in the set, or if it is not.
    InSet {
        set: SetName,
        key: Register,
        expected: bool,
    },
    /// Goes on with the data if the key is in the map. The data may take the place of the key.
    LookUp {
        map: SetName,
        key: Register,
        to: Register,
    },
    /// Goes to the chain that the map has for the key.
    Dispatch {
        map: SetName,
        key: Register,
    },
    Random {
        below: u32,
        to: Register,
    },
    /// Puts an element into a map that the kernel fills, or refreshes it if it is there; its data stays then.
    Remember {
        map: SetName,
        key: Register,
        data: Register,
        seconds: u32,
    },
    Dnat {
        address: Register,
        port: Register,
    },
    Masquerade,
    Reject,
    Drop,
    Jump(&'static str),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Base {
    Network = 1,
    Transport = 2,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fact {
    Protocol,
    Mark,
    /// The name of the interface by which the packet came, in sixteen bytes.
    InputInterface,
    ConnectionState,
    ConnectionStatus,
    /// Whether addresses are the node's own: `LOCAL` if so.
    SourceType,
    DestinationType,
}

/// `RTN_LOCAL`.
pub const LOCAL: u32 = 2;
/// The bit of connections whose first packet this is.
pub const STATE_NEW: u32 = 1 << 3;
/// `IPS_DST_NAT`.
pub const STATUS_DNAT: u32 = 1 << 5;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rule(pub Vec<Step>);

impl Rule {
    pub fn of(steps: impl IntoIterator<Item = Step>) -> Self {
        Self(steps.into_iter().collect())
    }
}

/// Where addresses are in a packet of the family.
pub fn source(family: Family, to: Register) -> Step {
    let (offset, length) = match family {
        Family::Ipv4 => (12, 4),
        Family::Ipv6 => (8, 16),
    };
    Step::Payload { base: Base::Network, offset, length, to }
}

pub fn destination(family: Family, to: Register) -> Step {
    let (offset, length) = match family {
        Family::Ipv4 => (16, 4),
        Family::Ipv6 => (24, 16),
    };
    Step::Payload { base: Base::Network, offset, length, to }
}

/// The same place in TCP, UDP and SCTP.
pub fn destination_port(to: Register) -> Step {
    Step::Payload { base: Base::Transport, offset: 2, length: 2, to }
}

/// For comparisons that need a register only for themselves.
const SCRATCH: Register = 8;

pub fn compare(equal: bool, value: &[u8]) -> Step {
    Step::Compare { register: SCRATCH, equal, value: value.to_vec() }
}

/// `fact & bits != 0`.
pub fn has_bit(fact: Fact, bits: u32) -> [Step; 3] {
    let mask = bits.to_ne_bytes().to_vec();
    [Step::Load { fact, to: SCRATCH }, Step::Bits { register: SCRATCH, mask, xor: vec![0; 4] }, compare(false, &[0; 4])]
}

/// `mark = mark & keep ^ flip`.
pub fn change_mark(keep: u32, flip: u32) -> [Step; 3] {
    let (mask, xor) = (keep.to_ne_bytes().to_vec(), flip.to_ne_bytes().to_vec());
    [
        Step::Load { fact: Fact::Mark, to: SCRATCH },
        Step::Bits { register: SCRATCH, mask, xor },
        Step::SetMark { from: SCRATCH },
    ]
}

pub fn is_local(fact: Fact) -> [Step; 2] {
    [Step::Load { fact, to: SCRATCH }, compare(true, &LOCAL.to_ne_bytes())]
}

/// Whether an address of the packet is in the network.
pub fn in_network(load: impl FnOnce(Register) -> Step, net: ipnet::IpNet, inside: bool) -> [Step; 3] {
    let octets = |address: std::net::IpAddr| match address {
        std::net::IpAddr::V4(address) => address.octets().to_vec(),
        std::net::IpAddr::V6(address) => address.octets().to_vec(),
    };
    let mask = octets(net.netmask());
    let xor = vec![0; mask.len()];
    [load(SCRATCH), Step::Bits { register: SCRATCH, mask, xor }, compare(inside, &octets(net.network()))]
}

pub fn in_set(load: Step, set: SetName) -> [Step; 2] {
    let key = match load {
        Step::Payload { to, .. } | Step::Load { to, .. } => to,
        _ => SCRATCH,
    };
    [load, Step::InSet { set, key, expected: true }]
}

pub fn scratch() -> Register {
    SCRATCH
}
