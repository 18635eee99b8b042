//! The difference between two rule sets as a script for `nft -f -`, which the kernel applies whole or not at all.
//!
//! Chains and sets that are no longer needed are removed by a second script: some kernels refuse to delete a chain in
//! the transaction that removes the last map element which leads to it.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use super::{Chain, Map, Ruleset, Set, TABLE};

/// Two scripts to be run one after the other; either can be empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Transaction {
    pub apply: String,
    pub clean_up: String,
}

/// Names of what an earlier process left in our table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Installed {
    pub chains: BTreeSet<String>,
    pub maps: BTreeSet<String>,
    pub sets: BTreeSet<String>,
}

/// From what this process installed last to what is wanted now.
pub fn diff(old: &Ruleset, new: &Ruleset) -> Transaction {
    let mut script = Script::default();
    for (name, set) in &new.sets {
        if !old.sets.contains_key(name) {
            script.add_set(name, set);
        }
    }
    for (name, map) in &new.maps {
        if !old.maps.contains_key(name) {
            script.add_map(name, map);
        }
    }
    for (name, chain) in &new.chains {
        if !old.chains.contains_key(name) {
            script.add_chain(name, chain);
        }
    }
    for (name, chain) in &new.chains {
        let before = old.chains.get(name);
        if before != Some(chain) {
            script.fill_chain(name, chain, before.is_some());
        }
    }
    for (name, set) in &new.sets {
        script.change_set(name, old.sets.get(name), set);
    }
    for (name, map) in &new.maps {
        script.change_map(name, old.maps.get(name).unwrap_or(&Map::default()), map);
    }
    let gone = |old: Vec<&String>, kept: &dyn Fn(&String) -> bool| -> BTreeSet<String> {
        old.into_iter().filter(|name| !kept(name)).cloned().collect()
    };
    let clean_up = removal(&Installed {
        chains: gone(old.chains.keys().collect(), &|name| new.chains.contains_key(name)),
        maps: gone(old.maps.keys().collect(), &|name| new.maps.contains_key(name)),
        sets: gone(old.sets.keys().collect(), &|name| new.sets.contains_key(name)),
    });
    Transaction { apply: script.0, clean_up }
}

/// From whatever an earlier process left to what is wanted, in one step: no packet sees a table without rules, and
/// clients keep their endpoints, because the sets that the kernel fills stay as they are.
pub fn adopt(installed: &Installed, new: &Ruleset) -> Transaction {
    let mut script = Script::default();
    script.line(format_args!("add table ip {TABLE} {{ comment \"rules for kube-proxy\"; }}"));
    for (name, set) in &new.sets {
        script.add_set(name, set);
    }
    for (name, map) in &new.maps {
        script.add_map(name, map);
    }
    for (name, chain) in &new.chains {
        script.add_chain(name, chain);
    }
    for name in installed.maps.iter().filter(|name| new.maps.contains_key(*name)) {
        script.line(format_args!("flush map ip {TABLE} {name}"));
    }
    for name in
        installed.sets.iter().filter(|name| matches!(new.sets.get(*name), Some(Set::Addresses(_) | Set::Hairpins(_))))
    {
        script.line(format_args!("flush set ip {TABLE} {name}"));
    }
    for (name, chain) in &new.chains {
        script.fill_chain(name, chain, installed.chains.contains(name));
    }
    for (name, set) in &new.sets {
        script.change_set(name, None, set);
    }
    for (name, map) in &new.maps {
        script.change_map(name, &Map::default(), map);
    }
    let stale =
        |all: &BTreeSet<String>, kept: &dyn Fn(&String) -> bool| all.iter().filter(|n| !kept(n)).cloned().collect();
    let clean_up = removal(&Installed {
        chains: stale(&installed.chains, &|name| new.chains.contains_key(name)),
        maps: stale(&installed.maps, &|name| new.maps.contains_key(name)),
        sets: stale(&installed.sets, &|name| new.sets.contains_key(name)),
    });
    Transaction { apply: script.0, clean_up }
}

/// In place of a table that cannot be adopted because another program made it differently. One transaction as well,
/// but clients lose their endpoints.
pub fn replace(new: &Ruleset) -> Transaction {
    let fresh = adopt(&Installed::default(), new);
    Transaction { apply: format!("add table ip {TABLE}\ndelete table ip {TABLE}\n{}", fresh.apply), ..fresh }
}

fn removal(stale: &Installed) -> String {
    let mut script = Script::default();
    // First nothing may refer to anything that goes, then the order is free.
    for name in &stale.chains {
        script.line(format_args!("flush chain ip {TABLE} {name}"));
    }
    for name in &stale.maps {
        script.line(format_args!("delete map ip {TABLE} {name}"));
    }
    for name in &stale.chains {
        script.line(format_args!("delete chain ip {TABLE} {name}"));
    }
    for name in &stale.sets {
        script.line(format_args!("delete set ip {TABLE} {name}"));
    }
    script.0
}

#[derive(Default)]
struct Script(String);

impl Script {
    fn line(&mut self, line: std::fmt::Arguments<'_>) {
        // Writing to a string cannot fail.
        let _ = self.0.write_fmt(line);
        self.0.push('\n');
    }

    fn add_chain(&mut self, name: &str, chain: &Chain) {
        match chain.hook {
            Some(hook) => self.line(format_args!(
                "add chain ip {TABLE} {name} {{ type {} hook {} priority {}; }}",
                hook.kind, hook.hook, hook.priority
            )),
            None => self.line(format_args!("add chain ip {TABLE} {name}")),
        }
    }

    fn fill_chain(&mut self, name: &str, chain: &Chain, flush: bool) {
        if flush {
            self.line(format_args!("flush chain ip {TABLE} {name}"));
        }
        for rule in &chain.rules {
            self.line(format_args!("add rule ip {TABLE} {name} {rule}"));
        }
    }

    fn add_map(&mut self, name: &str, map: &Map) {
        let address = if map.with_address { "ipv4_addr . " } else { "" };
        self.line(format_args!("add map ip {TABLE} {name} {{ type {address}inet_proto . inet_service : verdict; }}"));
    }

    fn add_set(&mut self, name: &str, set: &Set) {
        match set {
            Set::Addresses(_) => self.line(format_args!("add set ip {TABLE} {name} {{ type ipv4_addr; }}")),
            Set::Hairpins(_) => self.line(format_args!(
                "add set ip {TABLE} {name} {{ type ipv4_addr . ipv4_addr . inet_proto . inet_service; }}"
            )),
            Set::Affinity { seconds } => self.line(format_args!(
                "add set ip {TABLE} {name} {{ type ipv4_addr; flags dynamic,timeout; timeout {seconds}s; }}"
            )),
        }
    }

    fn change_map(&mut self, name: &str, old: &Map, new: &Map) {
        let gone = old.elements.iter().filter(|(key, verdict)| new.elements.get(key) != Some(verdict));
        self.elements("delete", name, gone.map(|(key, _)| key.to_string()));
        let added = new.elements.iter().filter(|(key, verdict)| old.elements.get(key) != Some(verdict));
        self.elements("add", name, added.map(|(key, verdict)| format!("{key} : {verdict}")));
    }

    fn change_set(&mut self, name: &str, old: Option<&Set>, new: &Set) {
        let (old, new) = (old.map(members).unwrap_or_default(), members(new));
        self.elements("delete", name, old.difference(&new).cloned());
        self.elements("add", name, new.difference(&old).cloned());
    }

    fn elements(&mut self, verb: &str, name: &str, elements: impl Iterator<Item = String>) {
        let list: Vec<String> = elements.collect();
        if !list.is_empty() {
            self.line(format_args!("{verb} element ip {TABLE} {name} {{ {} }}", list.join(", ")));
        }
    }
}

fn members(set: &Set) -> BTreeSet<String> {
    match set {
        Set::Addresses(addresses) => addresses.iter().map(ToString::to_string).collect(),
        Set::Hairpins(hairpins) => hairpins
            .iter()
            .map(|(address, protocol, port)| format!("{address} . {address} . {protocol} . {port}"))
            .collect(),
        Set::Affinity { .. } => BTreeSet::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::compile;
    use super::super::trace::testing::settings;
    use super::*;
    use crate::model::{Endpoint, Protocol};
    use crate::plan::plan;
    use crate::plan::testing::{endpoint, model, service};

    fn ruleset(endpoints: Vec<Endpoint>) -> Ruleset {
        let svc = service("10.96.0.1", &[("", Protocol::Tcp, 80, Some(30080))]);
        compile(&plan(&model(svc, endpoints)), &settings())
    }

    #[test]
    fn nothing_changed_is_nothing_to_do() {
        let one = ruleset(vec![endpoint("10.244.1.2", "node1")]);
        assert_eq!(diff(&one, &one), Transaction::default());
    }

    #[test]
    fn one_more_endpoint_touches_one_chain_only() {
        let (one, two) = (
            ruleset(vec![endpoint("10.244.2.2", "node2")]),
            ruleset(vec![endpoint("10.244.2.2", "node2"), endpoint("10.244.2.3", "node2")]),
        );
        let transaction = diff(&one, &two);
        let lines: Vec<&str> = transaction.apply.lines().collect();
        assert_eq!(lines.len(), 2, "{lines:?}");
        assert!(lines[0].starts_with("flush chain ip kube-proxy service-"));
        assert!(lines[1].ends_with("numgen random mod 2 map { 0 : 10.244.2.2 . 8080, 1 : 10.244.2.3 . 8080 }"));
        assert_eq!(transaction.clean_up, "");
    }

    #[test]
    fn the_last_endpoint_moves_the_service_to_the_refusals() {
        let transaction = diff(&ruleset(vec![endpoint("10.244.1.2", "node1")]), &ruleset(vec![]));
        assert!(transaction.apply.contains("delete element ip kube-proxy service-ips { 10.96.0.1 . tcp . 80 }"));
        assert!(
            transaction.apply.contains(
                "add element ip kube-proxy no-endpoint-services { 10.96.0.1 . tcp . 80 : goto reject-chain }"
            )
        );
        assert_eq!(transaction.clean_up.matches("delete chain").count(), 2);
    }

    #[test]
    fn adopting_flushes_what_is_known_and_removes_what_is_not() {
        let new = ruleset(vec![endpoint("10.244.1.2", "node1")]);
        let mut installed = Installed {
            chains: new.chains.keys().cloned().collect(),
            maps: new.maps.keys().cloned().collect(),
            sets: new.sets.keys().cloned().collect(),
        };
        installed.chains.insert("service-old".to_owned());
        let transaction = adopt(&installed, &new);
        assert!(transaction.apply.contains("flush map ip kube-proxy service-ips\n"));
        assert!(!transaction.apply.contains("delete table"));
        assert_eq!(
            transaction.clean_up,
            "flush chain ip kube-proxy service-old\ndelete chain ip kube-proxy service-old\n"
        );
    }
}
