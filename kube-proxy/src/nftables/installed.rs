//! What the kernel has in our table, read once at the start and when somebody else changed it: elements as they are,
//! and of rules only the fingerprint that was put into their comment.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use nix::errno::Errno;

use super::TABLE;
use super::chains::Chain;
use super::schema::{Element, Front, Scope, SetName, read_target};
use super::table::{Op, add_chain};
use super::wire::{
    GET_CHAIN, GET_ELEMENTS, GET_GENERATION, GET_RULE, GET_SET, KernelError, LIST_ITEM, NEW_CHAIN, NEW_ELEMENTS,
    NEW_GENERATION, NEW_RULE, NEW_SET, OF_TABLE, family_number, fingerprint, shape,
};
use crate::model::Family;
use crate::netlink::{Attribute, Builder, Message, NetlinkError, Socket, Subsystem, flag};
use crate::plan::Target;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Installed {
    pub chains: BTreeMap<String, InstalledChain>,
    /// Flags, length of keys, length of data.
    pub sets: BTreeMap<String, (u32, u32, u32)>,
    pub elements: HashMap<SetName, HashMap<Vec<u8>, InstalledElement>>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct InstalledChain {
    /// Hook and priority.
    pub hook: Option<(u32, i32)>,
    /// Their fingerprints.
    pub rules: Vec<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct InstalledElement {
    pub data: Vec<u8>,
    pub key_end: Option<Vec<u8>>,
}

impl Installed {
    /// Whether the table has the sets and hooks of this program's tables, so that it can be brought up to date piece by
    /// piece.
    pub fn fits(&self, family: Family, wanted: &[Chain]) -> bool {
        let sets = SetName::ALL.map(|set| (set.as_str().to_owned(), shape(set, family)));
        let wanted_hook = |name: &str| wanted.iter().find(|chain| chain.name == name).and_then(|chain| chain.hook);
        self.sets == BTreeMap::from(sets)
            && self
                .chains
                .iter()
                .all(|(name, chain)| chain.hook == wanted_hook(name).map(|hook| (hook.point as u32, hook.priority)))
    }

    /// What must be done for the chain, which is wanted.
    pub fn take_chain(&mut self, chain: Chain, family: Family) -> Vec<Op> {
        let Some(present) = self.chains.remove(&chain.name) else { return add_chain(chain).collect() };
        let same = present.rules.len() == chain.rules.len()
            && present.rules.iter().zip(&chain.rules).all(|(present, rule)| *present == fingerprint(rule, family));
        if same {
            return Vec::new();
        }
        let flush = Op::FlushChain(chain.name.clone());
        std::iter::once(flush).chain(add_chain(chain).skip(1)).collect()
    }

    /// What must be done for the element, which is wanted.
    pub fn take_element(&mut self, element: Element) -> Vec<Op> {
        let set = element.set();
        let key = element.key();
        let Some((key, present)) = self.elements.get_mut(&set).and_then(|all| all.remove_entry(&*key)) else {
            return vec![Op::Add(element)];
        };
        if present.data == *element.data() && present.key_end.as_deref() == element.key_end().as_deref() {
            return Vec::new();
        }
        vec![Op::RemoveKey { set, key, key_end: present.key_end }, Op::Add(element)]
    }

    /// The elements that nobody took, but not what the kernel put there itself.
    pub fn leftover_elements(&mut self) -> Vec<Op> {
        let mut ops = Vec::new();
        for set in SetName::ALL.into_iter().filter(|set| !set.is_dynamic()) {
            let left = self.elements.remove(&set).unwrap_or_default();
            ops.extend(left.into_iter().map(|(key, element)| Op::RemoveKey { set, key, key_end: element.key_end }));
        }
        ops
    }

    /// The chains that nobody took. Nothing leads to them any more.
    pub fn leftover_chains(&mut self) -> Vec<Op> {
        let names: Vec<String> = std::mem::take(&mut self.chains).into_keys().collect();
        let flushes = names.iter().cloned().map(Op::FlushChain);
        flushes.chain(names.iter().cloned().map(Op::RemoveChain)).collect()
    }

    /// The endpoints of a service port in the order in which the kernel has them, under the first front that has any.
    pub fn targets(&self, scope: Scope, fronts: impl Iterator<Item = Front>) -> Vec<Target> {
        let list = |front| {
            let places = (0..).map_while(|place| {
                let element = Element::Endpoint(scope, front, place, (IpAddr::from([0; 4]), 0));
                let found = self.elements.get(&element.set())?.get(&*element.key())?;
                let (address, port) = read_target(&found.data)?;
                Some(Target { address, port, local: false })
            });
            places.collect::<Vec<Target>>()
        };
        fronts.map(list).find(|targets| !targets.is_empty()).unwrap_or_default()
    }
}

/// `None` if there is no table.
pub fn read(socket: &mut Socket, family: Family) -> Result<Option<Installed>, KernelError> {
    let mut installed = Installed {
        chains: list(socket, family, GET_CHAIN, |_| {}, read_chain)?,
        sets: list(socket, family, GET_SET, |_| {}, read_set)?,
        elements: HashMap::new(),
    };
    if installed.chains.is_empty() && installed.sets.is_empty() {
        return Ok(None);
    }
    let rules: Vec<(String, String)> = list(socket, family, GET_RULE, |_| {}, read_rule)?;
    for (chain, fingerprint) in rules {
        installed.chains.entry(chain).or_default().rules.push(fingerprint);
    }
    for set in SetName::ALL.into_iter().filter(|set| installed.sets.contains_key(set.as_str())) {
        installed.elements.insert(set, elements(socket, family, set)?);
    }
    Ok(Some(installed))
}

/// The elements of one set, by key.
pub fn elements(
    socket: &mut Socket,
    family: Family,
    set: SetName,
) -> Result<HashMap<Vec<u8>, InstalledElement>, KernelError> {
    list(socket, family, GET_ELEMENTS, |m| m.text(2, set.as_str()), read_elements)
}

/// A number that grows with every change of any table of the network namespace.
pub fn generation(socket: &mut Socket) -> Result<u32, KernelError> {
    let mut request = Builder::default();
    request.message(Subsystem::Nftables, GET_GENERATION, flag::REQUEST, 1, 0, |_| {});
    let read = |found: &mut u32, message: &Message<'_>| {
        if message.is(Subsystem::Nftables, NEW_GENERATION) {
            *found = message.attributes().get(1).and_then(|id| id.number()).unwrap_or_default();
        }
    };
    Ok(socket.dump(&request, u32::default, read)?)
}

/// Lists objects of our table; there are none if there is no table.
fn list<T, C: Default + Extend<T>>(
    socket: &mut Socket,
    family: Family,
    kind: u8,
    fill: impl FnOnce(&mut Builder),
    read: impl Fn(&Message<'_>) -> Vec<T>,
) -> Result<C, KernelError> {
    let mut request = Builder::default();
    let flags = flag::REQUEST | flag::DUMP;
    request.message(Subsystem::Nftables, kind, flags, 1, family_number(family), |m| {
        m.text(OF_TABLE, TABLE);
        fill(m);
    });
    let ours = |message: &Message<'_>| message.attributes().get(OF_TABLE).and_then(|a| a.text()) == Some(TABLE);
    let each = |found: &mut C, message: &Message<'_>| {
        if ours(message) && message.payload.first() == Some(&family_number(family)) {
            found.extend(read(message));
        }
    };
    match socket.dump(&request, C::default, each) {
        Err(NetlinkError::Dump(Errno::ENOENT)) => Ok(C::default()),
        result => Ok(result?),
    }
}

fn read_chain(message: &Message<'_>) -> Vec<(String, InstalledChain)> {
    let attributes = message.attributes();
    let name = attributes.get(3).and_then(|name| name.text());
    let number = |kind| attributes.path(&[4, kind]).and_then(|a| a.number());
    let hook = number(1).zip(number(2)).map(|(point, priority)| (point, priority as i32));
    let chain = InstalledChain { hook, rules: Vec::new() };
    let ours = name.filter(|_| message.is(Subsystem::Nftables, NEW_CHAIN));
    ours.map(|name| (name.to_owned(), chain)).into_iter().collect()
}

fn read_set(message: &Message<'_>) -> Vec<(String, (u32, u32, u32))> {
    let attributes = message.attributes();
    let number = |kind| attributes.get(kind).and_then(|a| a.number()).unwrap_or_default();
    let ours = attributes.get(2).and_then(|name| name.text()).filter(|_| message.is(Subsystem::Nftables, NEW_SET));
    // The kernel does not say how long verdicts are.
    let data = if number(6) >= 0xffff_ff00 { 16 } else { number(7) };
    ours.map(|name| (name.to_owned(), (number(3), number(5), data))).into_iter().collect()
}

/// Chain and fingerprint.
fn read_rule(message: &Message<'_>) -> Vec<(String, String)> {
    let attributes = message.attributes();
    let chain = attributes.get(2).and_then(|name| name.text());
    let comment = attributes.get(7).and_then(|data| data.value.get(2..)?.strip_suffix(&[0]));
    let comment = comment.and_then(|text| std::str::from_utf8(text).ok()).unwrap_or_default();
    let ours = chain.filter(|_| message.is(Subsystem::Nftables, NEW_RULE));
    ours.map(|chain| (chain.to_owned(), comment.to_owned())).into_iter().collect()
}

fn read_elements(message: &Message<'_>) -> Vec<(Vec<u8>, InstalledElement)> {
    let Some(list) = message.attributes().get(3).filter(|_| message.is(Subsystem::Nftables, NEW_ELEMENTS)) else {
        return Vec::new();
    };
    list.nested().filter(|item| item.kind == LIST_ITEM).filter_map(|item| read_element(&item)).collect()
}

fn read_element(item: &Attribute<'_>) -> Option<(Vec<u8>, InstalledElement)> {
    let value = |kind| item.nested().path(&[kind, 1]).map(|a| a.value.to_vec());
    let chain = || item.nested().path(&[2, 2, 2]).and_then(|a| a.text()).map(|name| name.as_bytes().to_vec());
    let data = value(2).or_else(chain).unwrap_or_default();
    Some((value(1)?, InstalledElement { data, key_end: value(10) }))
}
