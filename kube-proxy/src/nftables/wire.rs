//! Steps of a transaction as netlink messages, and the kernel behind them. The numbers are those of
//! `linux/netfilter/nf_tables.h`; names beside them say which.

use std::collections::HashMap;
use std::fmt::Write as _;

use nix::errno::Errno;
use sha2::{Digest, Sha256};

use super::backend::Kernel;
use super::chains::Hook;
use super::installed::{Installed, InstalledElement};
use super::rule::{Fact, Register, Rule, Step};
use super::schema::{Data, Field, SetName};
use super::table::Op;
use super::{TABLE, installed};
use crate::model::Family;
use crate::netlink::{Builder, NetlinkError, Refusal, Socket, Subsystem, flag};

// NFT_MSG_*
pub const NEW_TABLE: u8 = 0;
pub const DEL_TABLE: u8 = 2;
pub const NEW_CHAIN: u8 = 3;
pub const GET_CHAIN: u8 = 4;
const DEL_CHAIN: u8 = 5;
pub const NEW_RULE: u8 = 6;
pub const GET_RULE: u8 = 7;
const DEL_RULE: u8 = 8;
pub const NEW_SET: u8 = 9;
pub const GET_SET: u8 = 10;
pub const NEW_ELEMENTS: u8 = 12;
pub const GET_ELEMENTS: u8 = 13;
const DEL_ELEMENTS: u8 = 14;
pub const NEW_GENERATION: u8 = 15;
pub const GET_GENERATION: u8 = 16;

// NFNL_MSG_BATCH_*
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;

/// `NFTA_*_TABLE` is 1 in every message, and lists consist of attributes of type 1.
pub const OF_TABLE: u16 = 1;
pub const LIST_ITEM: u16 = 1;

// NFT_SET_*
pub const FLAG_INTERVAL: u32 = 0x4;
pub const FLAG_MAP: u32 = 0x8;
pub const FLAG_TIMEOUT: u32 = 0x10;
pub const FLAG_EVAL: u32 = 0x20;
pub const FLAG_CONCAT: u32 = 0x80;
const VERDICT_TYPE: u32 = 0xffff_ff00;
/// Clients that are remembered for all services together; more stay with no endpoint.
const AFFINITY_SIZE: u32 = 1 << 16;

const GOTO: i32 = -4;
const JUMP: i32 = -3;
const DROP: i32 = 0;
const FIRST_REGISTER: u32 = 8;
/// An attribute's length has sixteen bits; a list of elements must end well before.
const LONGEST_LIST: usize = 48 * 1024;

#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    #[error("cannot talk to nftables")]
    Netlink(#[from] NetlinkError),
    #[error("the kernel refuses {what}: {errno}")]
    Refused { what: String, errno: Errno },
}

/// nftables of the network namespace in which this was made.
pub struct NetlinkKernel {
    socket: Socket,
    batch: Builder,
}

impl NetlinkKernel {
    pub fn open() -> Result<Self, KernelError> {
        Ok(Self { socket: Socket::open()?, batch: Builder::default() })
    }
}

impl Kernel for NetlinkKernel {
    fn apply(&mut self, family: Family, ops: &[Op]) -> Result<(), KernelError> {
        if ops.is_empty() {
            return Ok(());
        }
        let operations = encode(&mut self.batch, family, ops);
        let refusal = self.socket.transact(&self.batch)?;
        if self.batch.bytes().len() > LONGEST_LIST {
            // A large batch is rare; its memory is not kept.
            self.batch = Builder::default();
        }
        match refusal {
            None => Ok(()),
            Some(Refusal { sequence, errno }) => {
                let what = match (sequence as usize).checked_sub(1).and_then(|n| operations.get(n)) {
                    Some(&first) => describe(&ops[first]),
                    None => "the transaction".to_owned(),
                };
                Err(KernelError::Refused { what, errno })
            }
        }
    }

    fn read(&mut self, family: Family) -> Result<Option<Installed>, KernelError> {
        installed::read(&mut self.socket, family)
    }

    fn elements(&mut self, family: Family, set: SetName) -> Result<HashMap<Vec<u8>, InstalledElement>, KernelError> {
        installed::elements(&mut self.socket, family, set)
    }

    fn generation(&mut self) -> Result<u32, KernelError> {
        installed::generation(&mut self.socket)
    }
}

/// `NFPROTO_*`.
pub fn family_number(family: Family) -> u8 {
    match family {
        Family::Ipv4 => 2,
        Family::Ipv6 => 10,
    }
}

/// Writes a batch. Answers which operation each message begins with; sequence numbers count messages from 1.
fn encode(batch: &mut Builder, family: Family, ops: &[Op]) -> Vec<usize> {
    batch.clear();
    batch.raw(BATCH_BEGIN, flag::REQUEST, 0, 0, Subsystem::Nftables as u16, |_| {});
    let mut starts = Vec::new();
    let mut at = 0;
    while at < ops.len() {
        starts.push(at);
        at += message(batch, family, starts.len() as u32, &ops[at..]);
    }
    batch.acknowledge_last();
    batch.raw(BATCH_END, flag::REQUEST, 0, 0, Subsystem::Nftables as u16, |_| {});
    starts
}

/// Writes one message for the first operation, and for those after it that fit. Answers for how many.
fn message(batch: &mut Builder, family: Family, sequence: u32, ops: &[Op]) -> usize {
    let number = family_number(family);
    let mut send = |kind, flags, fill: &mut dyn FnMut(&mut Builder)| {
        batch.message(Subsystem::Nftables, kind, flag::REQUEST | flags, sequence, number, |m| {
            m.text(OF_TABLE, TABLE);
            fill(m);
        });
    };
    match &ops[0] {
        Op::RemoveTable => send(DEL_TABLE, 0, &mut |_| {}),
        Op::AddTable => send(NEW_TABLE, flag::CREATE, &mut |_| {}),
        Op::AddSet(set) => send(NEW_SET, flag::CREATE, &mut |m| add_set(m, *set, family, sequence)),
        Op::AddChain { name, hook } => send(NEW_CHAIN, flag::CREATE, &mut |m| add_chain(m, name, *hook)),
        Op::RemoveChain(name) => send(DEL_CHAIN, 0, &mut |m| m.text(3, name)),
        Op::FlushChain(name) => send(DEL_RULE, 0, &mut |m| m.text(2, name)),
        Op::AddRule { chain, rule } => send(NEW_RULE, flag::CREATE | flag::APPEND, &mut |m| {
            m.text(2, chain);
            m.nested(4, |list| steps(list, rule, family));
            let fingerprint = fingerprint(rule, family);
            // A comment in the form that nft prints.
            let mut comment = vec![0, fingerprint.len() as u8 + 1];
            comment.extend_from_slice(fingerprint.as_bytes());
            comment.push(0);
            m.attribute(7, &comment);
        }),
        Op::Add(first) => return elements(batch, family, sequence, NEW_ELEMENTS, first.set(), ops),
        Op::Remove(first) => return elements(batch, family, sequence, DEL_ELEMENTS, first.set(), ops),
        Op::RemoveKey { set, .. } => return elements(batch, family, sequence, DEL_ELEMENTS, *set, ops),
    }
    1
}

/// One message for as many operations as belong to the same set and direction.
fn elements(batch: &mut Builder, family: Family, sequence: u32, kind: u8, set: SetName, ops: &[Op]) -> usize {
    let flags = flag::REQUEST | if kind == NEW_ELEMENTS { flag::CREATE } else { 0 };
    let mut count = 0;
    batch.message(Subsystem::Nftables, kind, flags, sequence, family_number(family), |m| {
        m.text(OF_TABLE, TABLE);
        m.text(2, set.as_str());
        m.nested(3, |list| {
            for op in ops {
                let (key, key_end, data) = match op {
                    Op::Add(e) if kind == NEW_ELEMENTS && e.set() == set => (e.key(), e.key_end(), Some(e.data())),
                    Op::Remove(e) if kind == DEL_ELEMENTS && e.set() == set => (e.key(), e.key_end(), None),
                    Op::RemoveKey { set: other, key, key_end } if kind == DEL_ELEMENTS && *other == set => {
                        element(list, set, key, key_end.as_deref(), None);
                        count += 1;
                        continue;
                    }
                    _ => break,
                };
                if list.message_length() > LONGEST_LIST {
                    break;
                }
                element(list, set, &key, key_end.as_deref(), data.as_deref());
                count += 1;
            }
        });
    });
    count
}

fn element(list: &mut Builder, set: SetName, key: &[u8], key_end: Option<&[u8]>, data: Option<&[u8]>) {
    list.nested(LIST_ITEM, |e| {
        value(e, 1, key);
        match (set.data(), data) {
            (Data::None, _) | (_, None) => {}
            (Data::Fields(_), Some(data)) => value(e, 2, data),
            (Data::Verdict, Some(chain)) => e.nested(2, |d| verdict(d, GOTO, std::str::from_utf8(chain).ok())),
        }
        if let Some(end) = key_end {
            value(e, 10, end);
        }
    });
}

fn value(to: &mut Builder, kind: u16, bytes: &[u8]) {
    to.nested(kind, |data| data.attribute(1, bytes));
}

fn verdict(data: &mut Builder, code: i32, chain: Option<&str>) {
    data.nested(2, |verdict| {
        verdict.number(1, code as u32);
        if let Some(chain) = chain {
            verdict.text(2, chain);
        }
    });
}

/// Flags, key length, data length: by these, too, an existing set is compared with what it should be.
pub fn shape(set: SetName, family: Family) -> (u32, u32, u32) {
    let length = |fields: &[Field]| fields.iter().map(|field| field.length(family) as u32).sum();
    let mut flags = 0;
    let data = match set.data() {
        Data::None => 0,
        Data::Fields(fields) => length(fields),
        Data::Verdict => 16,
    };
    if set.data() != Data::None {
        flags |= FLAG_MAP;
    }
    if set.is_dynamic() {
        flags |= FLAG_TIMEOUT | FLAG_EVAL;
    }
    if set.is_interval() {
        flags |= FLAG_INTERVAL | FLAG_CONCAT;
    }
    (flags, length(set.key()), data)
}

/// The types of several fields in one number, as nft understands it.
fn nft_type(fields: &[Field], family: Family) -> u32 {
    fields.iter().fold(0, |all, field| all << 6 | field.nft_type(family))
}

fn add_set(m: &mut Builder, set: SetName, family: Family, id: u32) {
    let (flags, key, data) = shape(set, family);
    m.text(2, set.as_str());
    m.number(3, flags);
    m.number(4, nft_type(set.key(), family));
    m.number(5, key);
    match set.data() {
        Data::None => {}
        Data::Fields(fields) => {
            m.number(6, nft_type(fields, family));
            m.number(7, data);
        }
        Data::Verdict => m.number(6, VERDICT_TYPE),
    }
    if set.is_dynamic() {
        m.nested(9, |description| description.number(1, AFFINITY_SIZE));
    }
    if set.is_interval() {
        m.nested(9, |description| {
            description.nested(2, |concatenation| {
                for field in set.key() {
                    let length = field.exact_length(family) as u32;
                    concatenation.nested(LIST_ITEM, |f| f.number(1, length));
                }
            });
        });
    }
    m.number(10, id);
}

fn add_chain(m: &mut Builder, name: &str, hook: Option<Hook>) {
    m.text(3, name);
    if let Some(hook) = hook {
        m.nested(4, |h| {
            h.number(1, hook.point as u32);
            h.number(2, hook.priority as u32);
        });
        m.text(7, hook.kind);
    }
}

/// Tells whether an installed rule is the wanted one, without understanding it.
pub fn fingerprint(rule: &Rule, family: Family) -> String {
    let mut bytes = Builder::default();
    steps(&mut bytes, rule, family);
    let mut text = String::with_capacity(16);
    for byte in &Sha256::digest(bytes.bytes())[..8] {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

fn steps(list: &mut Builder, rule: &Rule, family: Family) {
    for step in &rule.0 {
        list.nested(LIST_ITEM, |e| {
            e.text(1, step_name(step));
            e.nested(2, |data| step_data(data, step, family));
        });
    }
}

fn step_name(step: &Step) -> &'static str {
    match step {
        Step::Payload { .. } => "payload",
        Step::Load { fact: Fact::Protocol | Fact::Mark | Fact::InputInterface, .. } | Step::SetMark { .. } => "meta",
        Step::Load { fact: Fact::ConnectionState | Fact::ConnectionStatus, .. } => "ct",
        Step::Load { fact: Fact::SourceType | Fact::DestinationType, .. } => "fib",
        Step::Bits { .. } => "bitwise",
        Step::Compare { .. } => "cmp",
        Step::InSet { .. } | Step::LookUp { .. } | Step::Dispatch { .. } => "lookup",
        Step::Random { .. } => "numgen",
        Step::Remember { .. } => "dynset",
        Step::Dnat { .. } => "nat",
        Step::Masquerade => "masq",
        Step::Reject => "reject",
        Step::Drop | Step::Jump(_) => "immediate",
    }
}

fn register(number: Register) -> u32 {
    FIRST_REGISTER + u32::from(number)
}

fn step_data(d: &mut Builder, step: &Step, family: Family) {
    match step {
        Step::Payload { base, offset, length, to } => {
            d.number(1, register(*to));
            d.number(2, *base as u32);
            d.number(3, *offset);
            d.number(4, *length);
        }
        Step::Load { fact, to } => load(d, *fact, register(*to)),
        Step::SetMark { from } => {
            d.number(2, META_MARK);
            d.number(3, register(*from));
        }
        Step::Bits { register: at, mask, xor } => {
            d.number(1, register(*at));
            d.number(2, register(*at));
            d.number(3, mask.len() as u32);
            value(d, 4, mask);
            value(d, 5, xor);
        }
        Step::Compare { register: at, equal, value: expected } => {
            d.number(1, register(*at));
            d.number(2, u32::from(!equal));
            value(d, 3, expected);
        }
        Step::InSet { set, key, expected } => {
            d.text(1, set.as_str());
            d.number(2, register(*key));
            d.number(5, u32::from(!expected));
        }
        Step::LookUp { map, key, to } => look_up(d, *map, *key, register(*to)),
        Step::Dispatch { map, key } => look_up(d, *map, *key, 0),
        Step::Random { below, to } => {
            d.number(1, register(*to));
            d.number(2, *below);
            d.number(3, 1);
        }
        Step::Remember { map, key, data, seconds } => {
            // NFT_DYNSET_OP_UPDATE
            d.text(1, map.as_str());
            d.number(3, 1);
            d.number(4, register(*key));
            d.number(5, register(*data));
            d.long(6, u64::from(*seconds) * 1000);
        }
        Step::Dnat { address, port } => {
            d.number(1, 1);
            d.number(2, u32::from(family_number(family)));
            d.number(3, register(*address));
            d.number(5, register(*port));
        }
        // NF_NAT_RANGE_PROTO_RANDOM_FULLY
        Step::Masquerade => d.number(1, 0x10),
        Step::Reject => {
            // Port unreachable.
            d.number(1, 0);
            d.attribute(2, &[if family == Family::Ipv4 { 3 } else { 4 }]);
        }
        Step::Drop => immediate(d, DROP, None),
        Step::Jump(chain) => immediate(d, JUMP, Some(chain)),
    }
}

// NFT_META_*
const META_MARK: u32 = 3;
const META_INPUT_INTERFACE: u32 = 6;
const META_PROTOCOL: u32 = 16;

fn load(d: &mut Builder, fact: Fact, to: u32) {
    d.number(1, to);
    match fact {
        Fact::Mark => d.number(2, META_MARK),
        Fact::InputInterface => d.number(2, META_INPUT_INTERFACE),
        Fact::Protocol => d.number(2, META_PROTOCOL),
        Fact::ConnectionState => d.number(2, 0),
        Fact::ConnectionStatus => d.number(2, 2),
        Fact::SourceType | Fact::DestinationType => {
            // NFT_FIB_RESULT_ADDRTYPE, and which address.
            d.number(2, 3);
            d.number(3, if fact == Fact::SourceType { 1 } else { 2 });
        }
    }
}

fn look_up(d: &mut Builder, map: SetName, key: Register, to: u32) {
    d.text(1, map.as_str());
    d.number(2, register(key));
    d.number(3, to);
}

fn immediate(d: &mut Builder, code: i32, chain: Option<&str>) {
    d.number(1, 0);
    d.nested(2, |data| verdict(data, code, chain));
}

/// For people.
fn describe(op: &Op) -> String {
    match op {
        Op::RemoveTable => "to remove the table".to_owned(),
        Op::AddTable => "the table".to_owned(),
        Op::AddSet(set) => format!("the set {}", set.as_str()),
        Op::AddChain { name, .. } => format!("the chain {name}"),
        Op::FlushChain(name) => format!("to empty the chain {name}"),
        Op::AddRule { chain, .. } => format!("a rule of the chain {chain}"),
        Op::RemoveChain(name) => format!("to remove the chain {name}"),
        Op::Add(element) => format!("one of a few elements of {} from {element:?} on", element.set().as_str()),
        Op::Remove(element) => {
            format!("to remove one of a few elements of {} from {element:?} on", element.set().as_str())
        }
        Op::RemoveKey { set, .. } => format!("to remove old elements of {}", set.as_str()),
    }
}
