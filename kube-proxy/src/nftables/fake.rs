//! nftables in memory, for tests: it refuses what the kernel refuses.

use std::collections::{BTreeMap, HashMap};

use nix::errno::Errno;

use super::backend::Kernel;
use super::chains::Chain;
use super::installed::{Installed, InstalledChain, InstalledElement};
use super::rule::{Rule, Step};
use super::schema::{Data, Element, SetName};
use super::table::Op;
use super::wire::{KernelError, fingerprint, shape};
use crate::model::Family;

#[derive(Clone, Debug, Default, PartialEq)]
pub struct FakeTable {
    pub chains: BTreeMap<String, Chain>,
    pub sets: BTreeMap<SetName, BTreeMap<Vec<u8>, InstalledElement>>,
}

#[derive(Default)]
pub struct FakeKernel {
    pub tables: BTreeMap<Family, FakeTable>,
    pub generation: u32,
    /// The transactions so far, by their number of operations.
    pub transactions: Vec<usize>,
    /// An element that is always refused.
    pub poison: Option<Element>,
}

fn refuse(what: impl std::fmt::Debug, errno: Errno) -> Result<(), KernelError> {
    Err(KernelError::Refused { what: format!("{what:?}"), errno })
}

impl Kernel for FakeKernel {
    fn apply(&mut self, family: Family, ops: &[Op]) -> Result<(), KernelError> {
        let mut table = self.tables.get(&family).cloned();
        for op in ops {
            if let (Op::Add(element), Some(poison)) = (op, &self.poison)
                && element == poison
            {
                return refuse(op, Errno::EINVAL);
            }
            match op {
                Op::RemoveTable if table.is_none() => return refuse(op, Errno::ENOENT),
                Op::RemoveTable => table = None,
                Op::AddTable => table = table.or_else(|| Some(FakeTable::default())),
                op => match &mut table {
                    Some(table) => table.apply(op, family)?,
                    None => return refuse(op, Errno::ENOENT),
                },
            }
        }
        match table {
            Some(table) => self.tables.insert(family, table),
            None => self.tables.remove(&family),
        };
        self.transactions.push(ops.len());
        self.generation += 1;
        Ok(())
    }

    fn read(&mut self, family: Family) -> Result<Option<Installed>, KernelError> {
        Ok(self.tables.get(&family).map(|table| Installed {
            chains: table.chains.iter().map(|(name, chain)| (name.clone(), installed_chain(chain, family))).collect(),
            sets: table.sets.keys().map(|set| (set.as_str().to_owned(), shape(*set, family))).collect(),
            elements: table.sets.iter().map(|(set, all)| (*set, all.clone().into_iter().collect())).collect(),
        }))
    }

    fn elements(&mut self, family: Family, set: SetName) -> Result<HashMap<Vec<u8>, InstalledElement>, KernelError> {
        let table = self.tables.get(&family);
        Ok(table
            .and_then(|table| table.sets.get(&set))
            .into_iter()
            .flatten()
            .map(|(k, e)| (k.clone(), e.clone()))
            .collect())
    }

    fn generation(&mut self) -> Result<u32, KernelError> {
        Ok(self.generation)
    }
}

fn installed_chain(chain: &Chain, family: Family) -> InstalledChain {
    InstalledChain {
        hook: chain.hook.map(|hook| (hook.point as u32, hook.priority)),
        rules: chain.rules.iter().map(|rule| fingerprint(rule, family)).collect(),
    }
}

impl FakeTable {
    fn apply(&mut self, op: &Op, family: Family) -> Result<(), KernelError> {
        match op {
            Op::RemoveTable | Op::AddTable => {}
            Op::AddSet(set) => {
                self.sets.entry(*set).or_default();
            }
            Op::AddChain { name, hook } => {
                let new = || Chain { name: name.clone(), hook: *hook, rules: Vec::new() };
                if self.chains.entry(name.clone()).or_insert_with(new).hook != *hook {
                    return refuse(op, Errno::EEXIST);
                }
            }
            Op::FlushChain(name) => match self.chains.get_mut(name) {
                Some(chain) => chain.rules.clear(),
                None => return refuse(op, Errno::ENOENT),
            },
            Op::AddRule { chain, rule } => {
                self.check(rule)?;
                match self.chains.get_mut(chain) {
                    Some(chain) => chain.rules.push(rule.clone()),
                    None => return refuse(op, Errno::ENOENT),
                }
            }
            Op::RemoveChain(name) => {
                if self.leads_to(name) {
                    return refuse(op, Errno::EBUSY);
                }
                if self.chains.remove(name).is_none() {
                    return refuse(op, Errno::ENOENT);
                }
            }
            Op::Add(element) => return self.add(element, family),
            Op::Remove(element) => return self.remove(element.set(), &element.key(), op),
            Op::RemoveKey { set, key, .. } => return self.remove(*set, key, op),
        }
        Ok(())
    }

    fn add(&mut self, element: &Element, family: Family) -> Result<(), KernelError> {
        let set = element.set();
        let (_, key_length, data_length) = shape(set, family);
        let (key, data) = (element.key().to_vec(), element.data().to_vec());
        let verdict = set.data() == Data::Verdict;
        if key.len() != key_length as usize || (!verdict && data.len() != data_length as usize) {
            return refuse(element, Errno::EINVAL);
        }
        if verdict && !self.chains.contains_key(std::str::from_utf8(&data).unwrap()) {
            return refuse(element, Errno::ENOENT);
        }
        let new = InstalledElement { data, key_end: element.key_end().map(|end| end.to_vec()) };
        let Some(elements) = self.sets.get_mut(&set) else { return refuse(element, Errno::ENOENT) };
        if *elements.entry(key).or_insert_with(|| new.clone()) == new { Ok(()) } else { refuse(element, Errno::EEXIST) }
    }

    fn remove(&mut self, set: SetName, key: &[u8], op: &Op) -> Result<(), KernelError> {
        match self.sets.get_mut(&set).and_then(|elements| elements.remove(key)) {
            Some(_) => Ok(()),
            None => refuse(op, Errno::ENOENT),
        }
    }

    fn check(&self, rule: &Rule) -> Result<(), KernelError> {
        for step in &rule.0 {
            let found = match step {
                Step::InSet { set, .. } => self.sets.contains_key(set) && set.data() == Data::None,
                Step::LookUp { map, .. } | Step::Remember { map, .. } => {
                    self.sets.contains_key(map) && matches!(map.data(), Data::Fields(_))
                }
                Step::Dispatch { map, .. } => self.sets.contains_key(map) && map.data() == Data::Verdict,
                Step::Jump(chain) => self.chains.contains_key(*chain),
                _ => true,
            };
            if !found {
                return refuse(step, Errno::ENOENT);
            }
        }
        Ok(())
    }

    fn leads_to(&self, name: &str) -> bool {
        let jumps = |rule: &Rule| rule.0.iter().any(|step| matches!(step, Step::Jump(chain) if *chain == name));
        let by_rule = self.chains.values().flat_map(|chain| &chain.rules).any(jumps);
        let by_element = [SetName::Services, SetName::NodePorts].into_iter().filter_map(|set| self.sets.get(&set));
        by_rule || by_element.flat_map(BTreeMap::values).any(|element| element.data == name.as_bytes())
    }
}
