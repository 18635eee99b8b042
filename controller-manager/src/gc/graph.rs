//! The graph of owners and dependents, and what follows from it for one object. Pure: it knows objects by uid and talks
//! to nobody.
//!
//! Example: a replica set `r` (owned by deployment `d`) owns pods `p` and `q`. When `d` is removed, `removed(d)` answers
//! `[r]`; `judge(r)` says that its only owner is gone, so it is deleted; then `removed(r)` answers `[p, q]`, and so on.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::Arc;

use apimachinery::controller::ResourceId;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};

pub const FOREGROUND: &str = "foregroundDeletion";
pub const ORPHAN: &str = "orphan";
/// Uids of removed objects that are remembered, so that their dependents need not ask the server.
const REMEMBERED: usize = 4096;

pub type Uid = Arc<str>;

/// What the collector knows of an object.
#[derive(Clone, Debug)]
pub struct Node {
    pub resource: Arc<ResourceId>,
    pub namespace: String,
    pub name: String,
    pub version: Option<String>,
    pub owners: Vec<OwnerReference>,
    pub deleting: bool,
    /// Waits for its dependents to go first.
    pub foreground: bool,
    /// Lets its dependents live.
    pub orphan: bool,
}

impl Node {
    fn new(resource: &Arc<ResourceId>, meta: &ObjectMeta) -> Self {
        let has = |finalizer: &str| meta.finalizers.iter().flatten().any(|have| have == finalizer);
        Self {
            resource: resource.clone(),
            namespace: meta.namespace.clone().unwrap_or_default(),
            name: meta.name.clone().unwrap_or_default(),
            version: meta.resource_version.clone(),
            owners: meta.owner_references.clone().unwrap_or_default(),
            deleting: meta.deletion_timestamp.is_some(),
            foreground: has(FOREGROUND),
            orphan: has(ORPHAN),
        }
    }

    fn waits_for_dependents(&self) -> bool {
        self.deleting && self.foreground
    }
}

/// What is to be done about an object.
#[derive(Debug)]
pub enum Verdict {
    Nothing,
    /// Its dependents lose the reference to it, then its `orphan` finalizer goes.
    Orphan {
        dependents: Vec<Uid>,
    },
    /// All dependents that block its deletion are gone: its `foregroundDeletion` finalizer goes.
    Release,
    /// It stays or goes with its owners.
    Owned(Owners),
}

/// The owners of an object by what is known of them.
#[derive(Debug, Default)]
pub struct Owners {
    /// There, and here to stay.
    pub solid: Vec<OwnerReference>,
    /// Being deleted and waiting for this object to go first.
    pub waiting: Vec<OwnerReference>,
    pub gone: Vec<OwnerReference>,
    /// Not in the graph: the server must be asked.
    pub unknown: Vec<OwnerReference>,
    pub has_dependents: bool,
    /// A dependent waits for its own dependents: with a waiting owner, that makes a circle.
    pub dependent_waits: bool,
}

#[derive(Default)]
pub struct Graph {
    nodes: HashMap<Uid, Node>,
    dependents: HashMap<Uid, HashSet<Uid>>,
    gone: HashSet<Uid>,
    gone_order: VecDeque<Uid>,
}

impl Graph {
    pub fn get(&self, uid: &str) -> Option<&Node> {
        self.nodes.get(uid)
    }

    /// An object is there or has changed; answers the objects to look at.
    pub fn seen(&mut self, resource: &Arc<ResourceId>, meta: &ObjectMeta) -> BTreeSet<Uid> {
        let Some(uid) = meta.uid.as_deref().map(Uid::from) else { return BTreeSet::new() };
        let node = Node::new(resource, meta);
        let mut look = BTreeSet::new();
        let old = self.nodes.get(&uid);
        let owners_changed = old.is_none_or(|old| old.owners != node.owners);
        let old_owners: Vec<Uid> =
            old.iter().flat_map(|old| &old.owners).map(|owner| Uid::from(owner.uid.as_str())).collect();
        if owners_changed {
            for owner in &old_owners {
                self.unlink(owner, &uid);
                look.extend(self.waiting(owner));
            }
            for owner in &node.owners {
                self.dependents.entry(Uid::from(owner.uid.as_str())).or_default().insert(uid.clone());
            }
        }
        if owners_changed && !node.owners.is_empty() || node.deleting && (node.foreground || node.orphan) {
            look.insert(uid.clone());
        }
        if node.waits_for_dependents() {
            look.extend(self.dependents.get(&uid).into_iter().flatten().cloned());
        }
        // A dependent that goes on waiting for its own dependents no longer needs to be told.
        self.nodes.insert(uid, node);
        look
    }

    /// An object is gone; answers the objects to look at.
    pub fn removed(&mut self, uid: &str) -> BTreeSet<Uid> {
        let uid = Uid::from(uid);
        let mut look: BTreeSet<Uid> = self.dependents.get(&uid).into_iter().flatten().cloned().collect();
        if let Some(node) = self.nodes.remove(&uid) {
            for owner in node.owners {
                let owner = Uid::from(owner.uid);
                self.unlink(&owner, &uid);
                look.extend(self.waiting(&owner));
            }
        }
        if self.gone.insert(uid.clone()) {
            self.gone_order.push_back(uid);
            if self.gone_order.len() > REMEMBERED
                && let Some(oldest) = self.gone_order.pop_front()
            {
                self.gone.remove(&oldest);
            }
        }
        look
    }

    pub fn judge(&self, uid: &str) -> Verdict {
        let Some(node) = self.nodes.get(uid) else { return Verdict::Nothing };
        let dependents = || self.dependents.get(uid).into_iter().flatten();
        if node.deleting && node.orphan {
            return Verdict::Orphan { dependents: dependents().cloned().collect() };
        }
        if node.waits_for_dependents() {
            let blocked = dependents().filter_map(|dependent| self.nodes.get(dependent)).any(|dependent| {
                dependent.owners.iter().any(|owner| owner.uid == uid && owner.block_owner_deletion == Some(true))
            });
            return if blocked { Verdict::Nothing } else { Verdict::Release };
        }
        if node.deleting || node.owners.is_empty() {
            return Verdict::Nothing;
        }
        let waits = |dependent: &Uid| self.nodes.get(dependent).is_some_and(Node::waits_for_dependents);
        let mut owners = Owners {
            has_dependents: dependents().next().is_some(),
            dependent_waits: dependents().any(waits),
            ..Owners::default()
        };
        for reference in &node.owners {
            let list = match self.nodes.get(reference.uid.as_str()) {
                Some(owner) if node.namespace.is_empty() && !owner.namespace.is_empty() => &mut owners.solid,
                Some(owner) if !owner.namespace.is_empty() && owner.namespace != node.namespace => &mut owners.unknown,
                Some(owner) if owner.waits_for_dependents() => &mut owners.waiting,
                Some(_) => &mut owners.solid,
                None if self.gone.contains(reference.uid.as_str()) => &mut owners.gone,
                None => &mut owners.unknown,
            };
            list.push(reference.clone());
        }
        Verdict::Owned(owners)
    }

    fn unlink(&mut self, owner: &Uid, dependent: &Uid) {
        if let Some(set) = self.dependents.get_mut(owner) {
            set.remove(dependent);
            if set.is_empty() {
                self.dependents.remove(owner);
            }
        }
    }

    /// The owner, if it waits for its dependents.
    fn waiting(&self, owner: &Uid) -> Option<Uid> {
        self.nodes.get(owner).filter(|node| node.waits_for_dependents()).map(|_| owner.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::Pod;
    use serde_json::json;

    fn see(graph: &mut Graph, uid: &str, owners: &[(&str, bool)], finalizers: &[&str], deleting: bool) -> Vec<String> {
        let owners: Vec<_> = owners
            .iter()
            .map(|(uid, block)| json!({"apiVersion": "v1", "kind": "Pod", "name": uid, "uid": uid, "blockOwnerDeletion": block}))
            .collect();
        let meta =
            serde_json::from_value(json!({"uid": uid, "name": uid, "namespace": "ns", "ownerReferences": owners,
            "finalizers": finalizers, "deletionTimestamp": deleting.then_some("2026-01-01T00:00:00Z")}))
            .unwrap();
        graph.seen(&Arc::new(ResourceId::of::<Pod>()), &meta).iter().map(|uid| uid.to_string()).collect()
    }

    fn owned(graph: &Graph, uid: &str) -> Owners {
        match graph.judge(uid) {
            Verdict::Owned(owners) => owners,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn dependents_of_a_removed_owner_are_looked_at() {
        let mut graph = Graph::default();
        see(&mut graph, "owner", &[], &[], false);
        assert_eq!(see(&mut graph, "child", &[("owner", true)], &[], false), ["child"]);
        assert_eq!(owned(&graph, "child").solid.len(), 1);
        assert_eq!(graph.removed("owner").len(), 1);
        let owners = owned(&graph, "child");
        assert_eq!((owners.gone.len(), owners.has_dependents), (1, false));
    }

    #[test]
    fn a_foreground_deletion_goes_from_the_leaves_up() {
        let mut graph = Graph::default();
        see(&mut graph, "owner", &[], &[], false);
        see(&mut graph, "blocking", &[("owner", true)], &[], false);
        see(&mut graph, "other", &[("owner", false)], &[], false);
        let look = see(&mut graph, "owner", &[], &[FOREGROUND], true);
        assert_eq!(look, ["blocking", "other", "owner"]);
        assert!(matches!(graph.judge("owner"), Verdict::Nothing), "blocked");
        assert_eq!(owned(&graph, "blocking").waiting.len(), 1);
        assert_eq!(graph.removed("blocking").into_iter().collect::<Vec<_>>(), ["owner".into()]);
        assert!(matches!(graph.judge("owner"), Verdict::Release));
    }

    #[test]
    fn orphaning_names_the_dependents() {
        let mut graph = Graph::default();
        see(&mut graph, "child", &[("owner", true)], &[], false);
        see(&mut graph, "owner", &[], &[ORPHAN], true);
        match graph.judge("owner") {
            Verdict::Orphan { dependents } => assert_eq!(dependents, ["child".into()]),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn unknown_owners_must_be_asked_for_and_memory_is_bounded() {
        let mut graph = Graph::default();
        see(&mut graph, "child", &[("stranger", false)], &[], false);
        assert_eq!(owned(&graph, "child").unknown.len(), 1);
        for n in 0..2 * REMEMBERED {
            graph.removed(&n.to_string());
        }
        assert_eq!(graph.gone.len(), REMEMBERED);
    }

    #[test]
    fn an_owner_that_lost_its_last_blocker_is_looked_at() {
        let mut graph = Graph::default();
        see(&mut graph, "child", &[("owner", true)], &[], false);
        see(&mut graph, "owner", &[], &[FOREGROUND], true);
        assert_eq!(see(&mut graph, "child", &[], &[], false), ["owner"]);
        assert!(matches!(graph.judge("owner"), Verdict::Release));
    }
}
