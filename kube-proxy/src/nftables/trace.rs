//! Walks the first packet of a connection through a table the way the kernel would, so that tests can ask "where does
//! this go?". It runs the very steps and bytes that the kernel gets.

use std::collections::BTreeSet;
use std::net::IpAddr;

use super::fake::FakeTable;
use super::installed::InstalledElement;
use super::rule::{Base, Fact, LOCAL, STATE_NEW, STATUS_DNAT, Step};
use super::schema::SetName;
use crate::model::{Family, Protocol};

#[derive(Clone, Copy, Debug)]
pub struct Packet {
    pub source: IpAddr,
    pub destination: IpAddr,
    pub protocol: Protocol,
    pub port: u16,
    pub interface: &'static str,
    /// The source is this node.
    pub from_node: bool,
    /// The destination is an address of this node.
    pub to_node: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    Forwarded {
        to: IpAddr,
        port: u16,
        masqueraded: bool,
    },
    /// Not for a service: goes where it wanted.
    Untouched,
    Dropped,
    Rejected,
}

/// Where the packet can go, for each of a few random numbers.
pub fn outcomes(table: &FakeTable, packet: Packet) -> BTreeSet<Outcome> {
    (0..60).map(|random| trace(&mut table.clone(), packet, random)).collect()
}

/// Where the packet goes. The table remembers the client.
pub fn trace(table: &mut FakeTable, packet: Packet, random: u32) -> Outcome {
    let mut tracer = Tracer { table, packet, random, registers: [0; 64], mark: 0, dnat: None, masqueraded: false };
    let before = if packet.from_node {
        ["filter-output-pre-dnat", "nat-output"]
    } else {
        ["filter-prerouting-pre-dnat", "nat-prerouting"]
    };
    let filter = |tracer: &Tracer<'_>| match (packet.from_node, packet.to_node && tracer.dnat.is_none()) {
        (true, _) => "filter-output",
        (false, true) => "filter-input",
        (false, false) => "filter-forward",
    };
    for chain in before {
        if let Some(outcome) = tracer.chain(chain) {
            return outcome;
        }
    }
    if let Some(outcome) = tracer.chain(filter(&tracer)) {
        return outcome;
    }
    tracer.chain("nat-postrouting");
    match tracer.dnat {
        None => Outcome::Untouched,
        Some((to, port)) => Outcome::Forwarded { to, port, masqueraded: tracer.masqueraded },
    }
}

struct Tracer<'a> {
    table: &'a mut FakeTable,
    packet: Packet,
    random: u32,
    registers: [u8; 64],
    mark: u32,
    dnat: Option<(IpAddr, u16)>,
    masqueraded: bool,
}

/// What a step does to the walk.
enum Next {
    Step,
    Rule,
    /// NAT decisions end the walk through a hook, but not the packet's way.
    EndOfHook,
    Jump(String),
    Goto(String),
    Done(Outcome),
}

impl Tracer<'_> {
    /// `None` when the packet goes on.
    fn chain(&mut self, name: &str) -> Option<Outcome> {
        self.walk(name).0
    }

    /// The outcome, and whether the hook's walk ends.
    fn walk(&mut self, name: &str) -> (Option<Outcome>, bool) {
        let chain = self.table.chains.get(name).unwrap_or_else(|| panic!("no chain {name}")).clone();
        'rules: for rule in &chain.rules {
            for step in &rule.0 {
                match self.step(step) {
                    Next::Step => {}
                    Next::Rule => continue 'rules,
                    Next::EndOfHook => return (None, true),
                    Next::Done(outcome) => return (Some(outcome), true),
                    Next::Goto(chain) => return self.walk(&chain),
                    Next::Jump(chain) => match self.walk(&chain) {
                        (None, false) => {}
                        ended => return ended,
                    },
                }
            }
        }
        (None, false)
    }

    fn step(&mut self, step: &Step) -> Next {
        match step {
            Step::Payload { base, offset, length, to } => {
                let value = self.payload(*base, *offset, *length);
                self.store(*to, &value);
            }
            Step::Load { fact, to } => {
                let value = self.fact(*fact);
                self.store(*to, &value);
            }
            Step::SetMark { from } => self.mark = u32::from_ne_bytes(self.load(*from, 4).try_into().unwrap()),
            Step::Bits { register, mask, xor } => {
                let old = self.load(*register, mask.len());
                let new: Vec<u8> = old.iter().zip(mask).zip(xor).map(|((old, mask), xor)| old & mask ^ xor).collect();
                self.store(*register, &new);
            }
            Step::Compare { register, equal, value } => {
                return passes((self.load(*register, value.len()) == *value) == *equal);
            }
            Step::InSet { set, key, expected } => return passes(self.find(*set, *key).is_some() == *expected),
            Step::LookUp { map, key, to } => match self.find(*map, *key) {
                None => return Next::Rule,
                Some(data) => self.store(*to, &data),
            },
            Step::Dispatch { map, key } => match self.find(*map, *key) {
                None => return Next::Rule,
                Some(chain) => return Next::Goto(String::from_utf8(chain).unwrap()),
            },
            Step::Random { below, to } => self.store(*to, &(self.random % below).to_ne_bytes()),
            Step::Remember { map, key, data, .. } => {
                let (key, data) = (self.key(*map, *key), self.load(*data, self.words() + 4));
                let element = InstalledElement { data, key_end: None };
                self.table.sets.entry(*map).or_default().entry(key).or_insert(element);
            }
            Step::Dnat { address, port } => {
                let port = self.load(*port, 2);
                let address = self.load(*address, self.words());
                self.dnat = Some((read_address(&address), u16::from_be_bytes([port[0], port[1]])));
                return Next::EndOfHook;
            }
            Step::Masquerade => {
                self.masqueraded = true;
                return Next::EndOfHook;
            }
            Step::Reject => return Next::Done(Outcome::Rejected),
            Step::Drop => return Next::Done(Outcome::Dropped),
            Step::Jump(chain) => return Next::Jump((*chain).to_owned()),
        }
        Next::Step
    }

    fn family(&self) -> Family {
        Family::of(self.packet.source)
    }

    /// Bytes of an address.
    fn words(&self) -> usize {
        if self.packet.source.is_ipv4() { 4 } else { 16 }
    }

    fn store(&mut self, to: u8, value: &[u8]) {
        let at = usize::from(to) * 4;
        self.registers[at..(at + value.len()).next_multiple_of(4)].fill(0);
        self.registers[at..at + value.len()].copy_from_slice(value);
    }

    fn load(&self, from: u8, length: usize) -> Vec<u8> {
        self.registers[usize::from(from) * 4..][..length].to_vec()
    }

    fn key(&self, set: SetName, from: u8) -> Vec<u8> {
        self.load(from, set.key().iter().map(|field| field.length(self.family())).sum())
    }

    fn find(&self, set: SetName, from: u8) -> Option<Vec<u8>> {
        let key = self.key(set, from);
        let elements = &self.table.sets[&set];
        if !set.is_interval() {
            return elements.get(&key).map(|element| element.data.clone());
        }
        // A range of several fields contains a key if each field is in its own range.
        let contains = |start: &Vec<u8>, element: &&InstalledElement| {
            let mut at = 0;
            set.key().iter().all(|field| {
                let part = at..at + field.length(self.family());
                at = part.end;
                let end = element.key_end.as_ref().unwrap_or(start);
                start[part.clone()] <= key[part.clone()] && key[part.clone()] <= end[part]
            })
        };
        elements.iter().find(|(start, element)| contains(start, element)).map(|(_, element)| element.data.clone())
    }

    fn payload(&self, base: Base, offset: u32, length: u32) -> Vec<u8> {
        let dnat = self.dnat.map(|(address, _)| address);
        match (base, offset, length) {
            (Base::Network, 12, 4) | (Base::Network, 8, 16) => octets(self.packet.source),
            (Base::Network, 16, 4) | (Base::Network, 24, 16) => octets(dnat.unwrap_or(self.packet.destination)),
            (Base::Transport, 2, 2) => self.dnat.map_or(self.packet.port, |(_, port)| port).to_be_bytes().to_vec(),
            other => panic!("no packet has anything known at {other:?}"),
        }
    }

    fn fact(&self, fact: Fact) -> Vec<u8> {
        let number = |number: u32| number.to_ne_bytes().to_vec();
        let local = |local: bool| number(if local { LOCAL } else { 1 });
        match fact {
            Fact::Protocol => vec![self.packet.protocol.number()],
            Fact::Mark => number(self.mark),
            Fact::InputInterface => {
                let mut name = self.packet.interface.as_bytes().to_vec();
                name.resize(16, 0);
                name
            }
            Fact::ConnectionState => number(STATE_NEW),
            Fact::ConnectionStatus => number(if self.dnat.is_some() { STATUS_DNAT } else { 0 }),
            Fact::SourceType => local(self.packet.from_node),
            Fact::DestinationType => local(self.packet.to_node && self.dnat.is_none()),
        }
    }
}

fn passes(condition: bool) -> Next {
    if condition { Next::Step } else { Next::Rule }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

fn read_address(bytes: &[u8]) -> IpAddr {
    match <[u8; 4]>::try_from(bytes) {
        Ok(four) => IpAddr::from(four),
        Err(_) => IpAddr::from(<[u8; 16]>::try_from(bytes).unwrap()),
    }
}
