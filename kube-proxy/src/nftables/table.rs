//! From plans to changes of the table. A service port contributes elements; the difference between what its old and
//! its new plan contribute is what changes. Only what services share is kept here: who owns an address and port that
//! two services claim, how many need an element that several add, and how many use a class.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;

use ipnet::IpNet;

use super::chains::{Chain, Hook, Settings, class_chain, skeleton};
use super::rule::Rule;
use super::schema::{Backend, Class, Element, Front, Route, Scope, SetName};
use crate::model::ServiceName;
use crate::plan::{Disposition, PlannedPort, Target};

/// One step of a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    RemoveTable,
    AddTable,
    AddSet(SetName),
    AddChain {
        name: String,
        hook: Option<Hook>,
    },
    FlushChain(String),
    AddRule {
        chain: String,
        rule: Rule,
    },
    RemoveChain(String),
    Add(Element),
    Remove(Element),
    /// Of an element of another time, whose meaning does not matter.
    RemoveKey {
        set: SetName,
        key: Vec<u8>,
        key_end: Option<Vec<u8>>,
    },
}

/// What is to be done, without an order among equals.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    pub chains: Vec<Chain>,
    pub removed: Vec<Element>,
    pub added: Vec<Element>,
    /// The kernel may remember clients of endpoints that left.
    pub clients_left_behind: bool,
}

impl Changes {
    /// In an order that the kernel accepts: what is referred to comes first, and keys are free before they are taken.
    pub fn into_ops(mut self) -> Vec<Op> {
        let mut ops: Vec<Op> = self.chains.into_iter().flat_map(add_chain).collect();
        // Neighbours of one set share a message.
        self.removed.sort_by_key(Element::set);
        self.added.sort_by_key(Element::set);
        ops.extend(self.removed.into_iter().map(Op::Remove));
        ops.extend(self.added.into_iter().map(Op::Add));
        ops
    }
}

pub fn add_chain(chain: Chain) -> impl Iterator<Item = Op> {
    let Chain { name, hook, rules } = chain;
    let add = Op::AddChain { name: name.clone(), hook };
    std::iter::once(add).chain(rules.into_iter().map(move |rule| Op::AddRule { chain: name.clone(), rule }))
}

/// What the table holds beside what single services contribute to it.
pub struct Table {
    settings: Settings,
    owners: HashMap<Front, Backend>,
    /// Services that want a front which another has. They get it when that one goes.
    losers: BTreeMap<Front, BTreeSet<ServiceName>>,
    /// How many service ports contribute an element that can be shared.
    shared: HashMap<Element, u32>,
    /// How many fronts are treated so. Unused ones stay for a while: services are scaled up and down.
    classes: BTreeMap<Class, u32>,
}

impl Table {
    pub fn new(settings: Settings) -> Self {
        Self {
            settings,
            owners: HashMap::new(),
            losers: BTreeMap::new(),
            shared: HashMap::new(),
            classes: BTreeMap::new(),
        }
    }

    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// What is there without any service.
    pub fn foundation(&self) -> Changes {
        let own = self.settings.node_port_addresses.iter().flatten().filter(|address| !address.is_loopback());
        let added: BTreeSet<Element> = own.map(|address| Element::NodePortIp(*address)).collect();
        Changes { chains: skeleton(&self.settings), added: added.into_iter().collect(), ..Changes::default() }
    }

    /// The change of one service. `again` gets the services that may now have what this one gave up: for them, this
    /// is to be called once more, with the same plan as old and new.
    pub fn change(
        &mut self,
        name: &ServiceName,
        old: &[PlannedPort],
        new: &[PlannedPort],
        again: &mut BTreeSet<ServiceName>,
    ) -> Changes {
        let family = self.settings.family;
        let contributions = |ports: &[PlannedPort]| -> BTreeMap<Backend, Contribution> {
            let own = ports.iter().filter(|port| port.family() == family);
            own.map(|port| (backend(port), Contribution::of(port))).collect()
        };
        let (old, new) = (contributions(old), contributions(new));
        let nothing = Contribution::default();
        let mut changes = Changes::default();
        let mut used = ClassUse::default();
        for backend in old.keys().chain(new.keys().filter(|backend| !old.contains_key(backend))) {
            let (before, after) = (old.get(backend).unwrap_or(&nothing), new.get(backend).unwrap_or(&nothing));
            changes.clients_left_behind |= !before.clients.is_subset(&after.clients);
            self.change_fronts(name, *backend, before, after, &mut changes, again);
            for element in after.shared.difference(&before.shared) {
                self.share(element, &mut changes);
            }
            for element in before.shared.difference(&after.shared) {
                self.unshare(element, &mut changes);
            }
        }
        used.count(&changes);
        self.use_classes(used, &mut changes);
        changes
    }

    fn change_fronts(
        &mut self,
        name: &ServiceName,
        backend: Backend,
        before: &Contribution,
        after: &Contribution,
        changes: &mut Changes,
        again: &mut BTreeSet<ServiceName>,
    ) {
        for (front, elements) in &before.fronts {
            let owned = self.owners.get(front) == Some(&backend);
            let wanted = after.fronts.get(front);
            if owned {
                difference(elements, wanted.unwrap_or(&Vec::new()), changes);
            }
            if owned && wanted.is_none() {
                self.owners.remove(front);
                again.extend(self.losers.remove(front).unwrap_or_default());
            }
            if !owned
                && wanted.is_none()
                && let Some(losers) = self.losers.get_mut(front)
            {
                losers.remove(name);
            }
        }
        for (front, elements) in &after.fronts {
            match self.owners.get(front) {
                None => {
                    self.owners.insert(*front, backend);
                    changes.added.extend(elements.iter().cloned());
                }
                // Changed above.
                Some(owner) if *owner == backend => {}
                Some(_) => {
                    self.losers.entry(*front).or_default().insert(name.clone());
                }
            }
        }
    }

    fn share(&mut self, element: &Element, changes: &mut Changes) {
        let count = self.shared.entry(element.clone()).or_default();
        *count += 1;
        if *count == 1 {
            changes.added.push(element.clone());
        }
    }

    fn unshare(&mut self, element: &Element, changes: &mut Changes) {
        if let Some(count) = self.shared.get_mut(element) {
            *count -= 1;
            if *count == 0 {
                self.shared.remove(element);
                changes.removed.push(element.clone());
            }
        }
    }

    fn use_classes(&mut self, used: ClassUse, changes: &mut Changes) {
        for (class, difference) in used.0 {
            if !self.classes.contains_key(&class) {
                changes.chains.push(class_chain(class, &self.settings));
            }
            let count = self.classes.entry(class).or_default();
            *count = count.saturating_add_signed(difference);
        }
    }

    /// Classes that nobody uses any more; they are forgotten.
    pub fn take_unused_classes(&mut self) -> Vec<Class> {
        let unused: Vec<Class> =
            self.classes.iter().filter(|(_, count)| **count == 0).map(|(class, _)| *class).collect();
        self.classes.retain(|_, count| *count > 0);
        unused
    }
}

/// How many more fronts use each class.
#[derive(Default)]
struct ClassUse(BTreeMap<Class, i32>);

impl ClassUse {
    fn count(&mut self, changes: &Changes) {
        for (elements, step) in [(&changes.added, 1), (&changes.removed, -1)] {
            for element in elements {
                if let Element::Served(_, class) = element {
                    *self.0.entry(*class).or_default() += step;
                }
            }
        }
    }
}

fn difference(before: &[Element], after: &[Element], changes: &mut Changes) {
    if before.is_empty() || after.is_empty() {
        changes.removed.extend(before.iter().cloned());
        changes.added.extend(after.iter().cloned());
        return;
    }
    let (old, new): (HashSet<&Element>, HashSet<&Element>) = (before.iter().collect(), after.iter().collect());
    changes.removed.extend(before.iter().filter(|element| !new.contains(element)).cloned());
    changes.added.extend(after.iter().filter(|element| !old.contains(element)).cloned());
}

pub fn backend(port: &PlannedPort) -> Backend {
    Backend { cluster_ip: port.cluster_ip, protocol: port.protocol, port: port.port }
}

/// The addresses and ports under which a service port is reached.
pub fn fronts(port: &PlannedPort) -> impl Iterator<Item = Front> + '_ {
    let addresses = std::iter::once(port.cluster_ip).chain(port.external_addresses());
    let addresses = addresses.map(|address| Front::Address(address, port.protocol, port.port));
    addresses.chain(port.node_port.map(|number| Front::NodePort(port.protocol, number)))
}

/// What one service port adds to the table.
#[derive(Default)]
struct Contribution {
    /// Each front belongs to one service port only.
    fronts: BTreeMap<Front, Vec<Element>>,
    /// Others may add the same.
    shared: BTreeSet<Element>,
    /// The endpoints to which clients of a front may stay.
    clients: BTreeSet<(Front, IpAddr, u16)>,
}

impl Contribution {
    fn of(port: &PlannedPort) -> Self {
        let mut contribution = Self::default();
        contribution.shared.insert(Element::ClusterIp(port.cluster_ip));
        let local = port.cluster.iter().chain(&port.local).filter(|target| target.local);
        contribution.shared.extend(local.map(|target| Element::Hairpin(target.address)));
        contribution.internal(port);
        if port.externally_accessible() {
            contribution.external(port);
        }
        if port.affinity.is_some() {
            let targets = port.targets();
            let stay = |front| targets.iter().map(move |target| (front, target.address, target.port));
            contribution.clients = fronts(port).flat_map(stay).collect();
        }
        contribution
    }

    fn internal(&mut self, port: &PlannedPort) {
        let front = Front::Address(port.cluster_ip, port.protocol, port.port);
        let route = if port.internal_local { Route::Local } else { Route::Cluster };
        let served = port.internal == Disposition::Forward;
        let class = class(port, route, false, false);
        self.front(port, front, served.then_some(class), port.internal);
    }

    fn external(&mut self, port: &PlannedPort) {
        let route = if port.external_local { Route::ExternalLocal } else { Route::Cluster };
        for front in fronts(port).skip(1) {
            let node_port = matches!(front, Front::NodePort(..));
            let class = class(port, route, node_port, !port.external_local);
            self.front(port, front, port.served.then_some(class), port.external);
        }
        if let Some(ranges) = &port.source_ranges {
            for address in &port.load_balancer_ips {
                self.guard(Front::Address(*address, port.protocol, port.port), *address, ranges);
            }
        }
    }

    fn front(&mut self, port: &PlannedPort, front: Front, class: Option<Class>, disposition: Disposition) {
        if self.fronts.contains_key(&front) {
            return;
        }
        let mut elements = Vec::new();
        elements.extend(class.map(|class| Element::Served(front, class)));
        elements.extend(match disposition {
            Disposition::Forward => None,
            Disposition::Drop => Some(Element::Silent(front)),
            Disposition::Reject => Some(Element::Refused(front)),
        });
        if let Some(class) = class {
            let lists = [(Scope::Cluster, &port.cluster, class.cluster), (Scope::Local, &port.local, class.local)];
            for (scope, targets, count) in lists {
                let places = (0..count).zip(targets);
                elements.extend(places.map(|(place, t)| Element::Endpoint(scope, front, place, (t.address, t.port))));
            }
        }
        self.fronts.insert(front, elements);
    }

    /// A node that talks to the address of its own load balancer may have that address as its source.
    fn guard(&mut self, front: Front, address: IpAddr, ranges: &[IpNet]) {
        let allowed: Vec<IpNet> = ranges.iter().copied().chain([IpNet::from(address)]).collect();
        let allowed = IpNet::aggregate(&allowed).into_iter().map(|net| Element::Allowed(front, net));
        let guards = std::iter::once(Element::Guarded(front)).chain(allowed);
        self.fronts.entry(front).or_default().extend(guards);
    }
}

/// Counts that the route does not use stay out, so that fewer classes are needed.
fn class(port: &PlannedPort, route: Route, node_port: bool, masquerade: bool) -> Class {
    let count = |targets: &[Target], used: bool| {
        if used { u32::try_from(targets.len()).unwrap_or(u32::MAX).min(Class::MOST_ENDPOINTS) } else { 0 }
    };
    Class {
        node_port,
        masquerade,
        route,
        cluster: count(&port.cluster, route != Route::Local),
        local: count(&port.local, route != Route::Cluster),
        affinity: port.affinity.unwrap_or(0).min(Class::LONGEST_AFFINITY),
    }
}
