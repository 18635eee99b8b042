//! Keeps the kernel's tables equal to the plans: small changes one by one, and everything at the start, after a
//! failure, and when somebody else changed something. Reading the table is for the latter only.

use std::collections::{BTreeSet, HashMap, HashSet};

use nix::errno::Errno;

use super::chains::Settings;
use super::installed::{Installed, InstalledElement};
use super::schema::{Element, Front, Scope, SetName, front_key};
use super::table::{Changes, Op, Table, fronts};
use super::wire::KernelError;
use crate::model::{Family, ServiceName};
use crate::plan::{Changed, Plans, ServicePlan, keep_places};

/// Services whose changes make one transaction. The kernel keeps a transaction in memory until it is done, and so do
/// we: large ones would cost both for nothing.
const SERVICES_AT_ONCE: usize = 500;

/// nftables as far as it is needed here. Methods may be called in any order.
pub trait Kernel: Send {
    /// Does all of it, in this order, or nothing.
    fn apply(&mut self, family: Family, ops: &[Op]) -> Result<(), KernelError>;
    /// What is in our table; `None` if there is no such table.
    fn read(&mut self, family: Family) -> Result<Option<Installed>, KernelError>;
    /// The elements of one of our sets, by key.
    fn elements(&mut self, family: Family, set: SetName) -> Result<HashMap<Vec<u8>, InstalledElement>, KernelError>;
    /// A number that grows by one with every transaction, whoever makes it.
    fn generation(&mut self) -> Result<u32, KernelError>;
}

#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    #[error("cannot read the {} table", family.as_str())]
    Read { family: Family, source: KernelError },
    #[error("cannot ask for the generation of the tables")]
    Generation(#[source] KernelError),
    #[error("cannot make the {} table", family.as_str())]
    Foundation { family: Family, source: KernelError },
    #[error("cannot change the {} rules of {services}", family.as_str())]
    Services { family: Family, services: String, source: KernelError },
    #[error("cannot forget the {} clients of endpoints that left", family.as_str())]
    Clients { family: Family, source: KernelError },
    #[error("cannot remove what the {} table has too much", family.as_str())]
    Leftovers { family: Family, source: KernelError },
}

pub struct Backend<K> {
    kernel: K,
    /// By family; `None` while it is not known what the kernel has.
    tables: [Option<Table>; 2],
    /// What the generation is if nobody else changed anything since we looked.
    generation: Option<u32>,
}

impl<K: Kernel> Backend<K> {
    pub fn new(kernel: K) -> Self {
        Self { kernel, tables: [None, None], generation: None }
    }

    #[cfg(test)]
    pub fn kernel(&mut self) -> &mut K {
        &mut self.kernel
    }

    /// Installs the plans of the changed services; all plans if it is not known what is installed. The order of
    /// endpoints in the plans is made to be that in the kernel.
    pub fn sync(&mut self, settings: &Settings, plans: &mut Plans, changed: &[Changed]) -> Result<(), BackendError> {
        let known = self.tables[index(settings.family)].as_ref().is_some_and(|table| table.settings() == settings);
        let result = if known {
            self.change(settings.family, plans, changed)
        } else {
            self.reconcile(settings, plans).map(|_| ())
        };
        if result.is_err() {
            self.tables[index(settings.family)] = None;
        }
        result
    }

    /// Looks whether anybody else changed anything, and puts right what is not as it should be. Answers how many
    /// operations that took.
    pub fn verify(&mut self, settings: &[Settings], plans: &mut Plans) -> Result<usize, BackendError> {
        let generation = self.kernel.generation().map_err(BackendError::Generation)?;
        let foreign = self.generation != Some(generation);
        // What happens from now on is news again.
        self.generation = Some(generation);
        let mut repaired = 0;
        for settings in settings {
            let result = if foreign {
                self.reconcile(settings, plans)
            } else {
                self.drop_unused_classes(settings.family).map(|()| 0)
            };
            if result.is_err() {
                self.tables[index(settings.family)] = None;
            }
            repaired += result?;
        }
        Ok(repaired)
    }

    fn apply(&mut self, family: Family, ops: &[Op]) -> Result<(), KernelError> {
        if ops.is_empty() {
            return Ok(());
        }
        self.kernel.apply(family, ops)?;
        self.generation = self.generation.map(|generation| generation.wrapping_add(1));
        Ok(())
    }

    fn change(&mut self, family: Family, plans: &Plans, changed: &[Changed]) -> Result<(), BackendError> {
        let mut clients_left_behind = false;
        for chunk in changed.chunks(SERVICES_AT_ONCE) {
            let Some(table) = &mut self.tables[index(family)] else { return Ok(()) };
            let mut again = BTreeSet::new();
            let mut parts = Vec::new();
            for Changed { name, old } in chunk {
                let new = plans.get(name).map(|plan| plan.ports.as_slice()).unwrap_or_default();
                parts.push((name.clone(), table.change(name, &old.ports, new, &mut again)));
            }
            // Only services of one conflict are here, and nobody loses by winning.
            for name in std::mem::take(&mut again) {
                let ports = plans.get(&name).map(|plan| plan.ports.as_slice()).unwrap_or_default();
                let changes = table.change(&name, ports, ports, &mut again);
                parts.push((name, changes));
            }
            clients_left_behind |= parts.iter().any(|(_, changes)| changes.clients_left_behind);
            let parts = parts.into_iter().map(|(name, changes)| (name, changes.into_ops())).collect();
            self.apply_parts(family, parts)?;
        }
        if clients_left_behind {
            self.forget_clients(family, plans).map_err(|source| BackendError::Clients { family, source })?;
        }
        Ok(())
    }

    /// Makes the kernel forget the clients that it would send to endpoints which left.
    fn forget_clients(&mut self, family: Family, plans: &Plans) -> Result<(), KernelError> {
        let ports = plans.values().flat_map(|plan| &plan.ports);
        let sticky = ports.filter(|port| port.affinity.is_some() && port.family() == family);
        let mut allowed: HashSet<Vec<u8>> = HashSet::new();
        for port in sticky {
            for (front, target) in fronts(port).flat_map(|front| port.targets().into_iter().map(move |t| (front, t))) {
                let data = Element::Endpoint(Scope::Cluster, front, 0, (target.address, target.port)).data();
                allowed.insert([&*front_key(&front), &*data].concat());
            }
        }
        for set in SetName::ALL.into_iter().filter(|set| set.is_dynamic()) {
            for (key, element) in self.kernel.elements(family, set)? {
                let front = key.len() - client_length(family);
                if allowed.contains(&[&key[..front], &element.data].concat()) {
                    continue;
                }
                match self.apply(family, &[Op::RemoveKey { set, key, key_end: None }]) {
                    // It was just about to be forgotten anyway.
                    Err(KernelError::Refused { errno: Errno::ENOENT, .. }) => {}
                    result => result?,
                }
            }
        }
        Ok(())
    }

    /// In one transaction if the kernel lets us; otherwise each service alone, so that one that it refuses does not
    /// keep the others from being changed.
    fn apply_parts(&mut self, family: Family, parts: Vec<(ServiceName, Vec<Op>)>) -> Result<(), BackendError> {
        let all = parts.iter().flat_map(|(_, ops)| ops.iter().cloned());
        let Err(source) = self.apply(family, &in_order(all)) else { return Ok(()) };
        let failed = |services: String, source| BackendError::Services { family, services, source };
        if parts.len() == 1 {
            return Err(failed(parts[0].0.to_string(), source));
        }
        let mut refused: Option<BackendError> = None;
        for (name, ops) in parts {
            if let Err(source) = self.apply(family, &ops) {
                refused = refused.or(Some(failed(name.to_string(), source)));
            }
        }
        match refused {
            None => Ok(()),
            Some(error) => Err(error),
        }
    }

    /// Unused classes go when nothing else happens.
    fn drop_unused_classes(&mut self, family: Family) -> Result<(), BackendError> {
        let Some(table) = &mut self.tables[index(family)] else { return Ok(()) };
        let unused = table.take_unused_classes();
        let names = unused.iter().map(|class| class.chain());
        let chains: Vec<Op> = names.flat_map(|name| [Op::FlushChain(name.clone()), Op::RemoveChain(name)]).collect();
        self.apply(family, &chains).map_err(|source| BackendError::Leftovers { family, source })
    }

    /// Compares everything with what the kernel has, and does what is missing.
    fn reconcile(&mut self, settings: &Settings, plans: &mut Plans) -> Result<usize, BackendError> {
        let family = settings.family;
        if self.generation.is_none() {
            self.generation = Some(self.kernel.generation().map_err(BackendError::Generation)?);
        }
        let installed = self.kernel.read(family).map_err(|source| BackendError::Read { family, source })?;
        let mut table = Table::new(settings.clone());
        let foundation = table.foundation();
        let mut ops = Vec::new();
        let mut at_once = SERVICES_AT_ONCE;
        let mut installed = match installed {
            Some(installed) if installed.fits(family, &foundation.chains) => installed,
            other => {
                if other.is_some() {
                    tracing::warn!(family = family.as_str(), "the table was made by another program; replacing it");
                    ops.push(Op::RemoveTable);
                    // No packet may see it unfinished.
                    at_once = usize::MAX;
                }
                ops.push(Op::AddTable);
                ops.extend(SetName::ALL.map(Op::AddSet));
                Installed::default()
            }
        };
        ops.extend(missing(foundation, &mut installed, family));
        let mut total = 0;
        if at_once != usize::MAX {
            total += ops.len();
            self.apply(family, &ops).map_err(|source| BackendError::Foundation { family, source })?;
            ops.clear();
        }
        total += self.reconcile_services(&mut table, plans, &mut installed, ops, at_once)?;
        self.tables[index(family)] = Some(table);
        for leftovers in [installed.leftover_elements(), installed.leftover_chains()] {
            total += leftovers.len();
            self.apply(family, &leftovers).map_err(|source| BackendError::Leftovers { family, source })?;
        }
        self.forget_clients(family, plans).map_err(|source| BackendError::Clients { family, source })?;
        Ok(total)
    }

    fn reconcile_services(
        &mut self,
        table: &mut Table,
        plans: &mut Plans,
        installed: &mut Installed,
        first: Vec<Op>,
        at_once: usize,
    ) -> Result<usize, BackendError> {
        let family = table.settings().family;
        let mut total = first.len();
        let mut parts: Vec<(ServiceName, Vec<Op>)> = Vec::new();
        if !first.is_empty() {
            parts.push((ServiceName::new("all", "services"), first));
        }
        let mut refused = None;
        for (name, plan) in plans.iter_mut() {
            if !installed.elements.is_empty() {
                keep_installed_places(plan, installed, family);
            }
            let changes = table.change(name, &[], &plan.ports, &mut BTreeSet::new());
            let ops = missing(changes, installed, family);
            if ops.is_empty() {
                continue;
            }
            total += ops.len();
            parts.push((name.clone(), ops));
            if parts.len() >= at_once {
                refused = self.apply_parts(family, std::mem::take(&mut parts)).err().or(refused);
            }
        }
        refused = self.apply_parts(family, parts).err().or(refused);
        refused.map_or(Ok(total), Err)
    }
}

fn keep_installed_places(plan: &mut ServicePlan, installed: &Installed, family: Family) {
    for port in plan.ports.iter_mut().filter(|port| port.family() == family) {
        let fronts: Vec<Front> = fronts(port).collect();
        let targets = |scope| installed.targets(scope, fronts.iter().copied());
        keep_places(&targets(Scope::Cluster), &mut port.cluster);
        keep_places(&targets(Scope::Local), &mut port.local);
    }
}

/// Bytes of the client's address, by which a key ends.
fn client_length(family: Family) -> usize {
    super::schema::Field::Address.length(family)
}

/// What of the changes is not in the kernel yet.
fn missing(changes: Changes, installed: &mut Installed, family: Family) -> Vec<Op> {
    let mut ops: Vec<Op> = changes.chains.into_iter().flat_map(|chain| installed.take_chain(chain, family)).collect();
    ops.extend(changes.added.into_iter().flat_map(|element| installed.take_element(element)));
    in_order(ops)
}

/// Operations of several services in an order for one transaction: chains, then what goes, then what comes.
fn in_order(ops: impl IntoIterator<Item = Op>) -> Vec<Op> {
    let mut all: Vec<Op> = ops.into_iter().collect();
    all.sort_by_key(|op| match op {
        Op::Remove(element) => (1, Some(element.set())),
        Op::RemoveKey { set, .. } => (1, Some(*set)),
        Op::Add(element) => (2, Some(element.set())),
        _ => (0, None),
    });
    all
}

fn index(family: Family) -> usize {
    match family {
        Family::Ipv4 => 0,
        Family::Ipv6 => 1,
    }
}
