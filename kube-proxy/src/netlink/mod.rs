//! The netfilter part of the netlink protocol: messages made of attributes ([`message`]), and a socket that sends
//! them to the kernel and collects what it answers ([`socket`]). It knows the framing only, neither nftables nor
//! connection tracking.

mod message;
mod socket;

pub use message::{Attribute, Attributes, Builder, Malformed, Message, messages};
pub use socket::{NetlinkError, Refusal, Socket};

/// `NFNL_SUBSYS_*`: whom a message is for; the upper half of a message's type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subsystem {
    Conntrack = 1,
    Nftables = 10,
}

/// `NLM_F_*`.
pub mod flag {
    pub const REQUEST: u16 = 0x1;
    pub const ACK: u16 = 0x4;
    pub const DUMP_INTERRUPTED: u16 = 0x10;
    pub const DUMP: u16 = 0x300;
    pub const CREATE: u16 = 0x400;
    pub const APPEND: u16 = 0x800;
}
