//! Follows services, endpoint slices and this node in the API, and keeps the [`Model`] of them. One task for each;
//! every change wakes the proxy, which takes the names of the services that changed when it is its time.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use apimachinery::process::error_chain;
use futures::StreamExt;
use jiff::Timestamp;
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, ResourceExt};
use parking_lot::{MappedMutexGuard, Mutex, MutexGuard};
use tokio::sync::Notify;

use crate::model::{Model, Node, Service, ServiceName, Slice, service_name};

/// Services and slices that other proxies take care of, and those without an address, are not even sent to us.
const SELECTOR: &str = "!service.kubernetes.io/service-proxy-name,!service.kubernetes.io/headless";

/// The model, and whether it is complete.
#[derive(Clone)]
pub struct Informers {
    state: Arc<Mutex<State>>,
    changed: Arc<Notify>,
}

#[derive(Default)]
struct State {
    model: Model,
    dirty: Dirty,
    /// Complete listings seen of: services, slices, node.
    synced: [bool; 3],
    counts: Counts,
}

/// What changed since it was asked last.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Dirty {
    pub services: BTreeSet<ServiceName>,
    /// A fact about this node changed that every service depends on.
    pub node: bool,
    /// When what changed slices happened, as far as they say so.
    pub triggers: Vec<Timestamp>,
}

/// So many times of changes are kept; more tell nothing new.
const MOST_TRIGGERS: usize = 1000;
const TRIGGER_ANNOTATION: &str = "endpoints.kubernetes.io/last-change-trigger-time";

/// Changes that the API told, for the metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub services: u64,
    pub slices: u64,
}

impl State {
    fn complete(&self) -> bool {
        self.synced.iter().all(|&synced| synced)
    }

    /// Changes what is known of one service, and notes it if that made a difference.
    fn put_service(&mut self, name: ServiceName, families: Vec<Service>) -> bool {
        let entry = self.model.services.entry(name.clone()).or_default();
        let changed = entry.families != families;
        entry.families = families;
        self.after(name, changed)
    }

    fn put_slice(&mut self, service: ServiceName, slice_name: &str, slice: Option<Slice>) -> bool {
        let entry = self.model.services.entry(service.clone()).or_default();
        let changed = entry.slices.get(slice_name) != slice.as_ref();
        match slice {
            Some(slice) => entry.slices.insert(slice_name.into(), slice),
            None => entry.slices.remove(slice_name),
        };
        self.after(service, changed)
    }

    fn after(&mut self, name: ServiceName, changed: bool) -> bool {
        if self.model.services.get(&name).is_some_and(crate::model::Entry::is_empty) {
            self.model.services.remove(&name);
        }
        if changed {
            self.dirty.services.insert(name);
        }
        changed
    }

    /// A complete listing: what it does not have is gone.
    fn replace_services(&mut self, listed: BTreeMap<ServiceName, Vec<Service>>) -> bool {
        let known = self.model.services.iter().filter(|(_, entry)| !entry.families.is_empty());
        let gone: Vec<ServiceName> =
            known.map(|(name, _)| name.clone()).filter(|name| !listed.contains_key(name)).collect();
        let mut changed = false;
        for (name, families) in listed.into_iter().chain(gone.into_iter().map(|name| (name, Vec::new()))) {
            changed |= self.put_service(name, families);
        }
        changed
    }

    fn replace_slices(&mut self, listed: BTreeMap<(ServiceName, Box<str>), Slice>) -> bool {
        let known = self
            .model
            .services
            .iter()
            .flat_map(|(name, entry)| entry.slices.keys().map(move |slice| (name.clone(), slice.clone())));
        let gone: Vec<(ServiceName, Box<str>)> = known.filter(|key| !listed.contains_key(key)).collect();
        let mut changed = false;
        for ((service, name), slice) in listed {
            changed |= self.put_slice(service, &name, Some(slice));
        }
        for (service, name) in gone {
            changed |= self.put_slice(service, &name, None);
        }
        changed
    }

    /// Whether anything that services depend on changed.
    fn put_node(&mut self, node: Node) -> bool {
        let (old, new) = (&self.model.node, &node);
        let matters = (&old.zone, &old.internal_ips, &old.pod_cidrs) != (&new.zone, &new.internal_ips, &new.pod_cidrs);
        let changed = *old != *new;
        self.dirty.node |= matters;
        self.model.node = node;
        changed
    }
}

impl Informers {
    /// Starts following in the background of the current runtime.
    pub fn start(client: &Client, node_name: &str) -> Self {
        let model = Model {
            node_name: node_name.to_owned(),
            node: Node { eligible: true, ..Node::default() },
            ..Model::default()
        };
        let state = State { model, ..State::default() };
        let informers = Self { state: Arc::new(Mutex::new(state)), changed: Arc::new(Notify::new()) };
        tokio::spawn(informers.clone().follow_services(Api::all(client.clone())));
        tokio::spawn(informers.clone().follow_slices(Api::all(client.clone())));
        tokio::spawn(informers.clone().follow_node(Api::all(client.clone()), node_name.to_owned()));
        informers
    }

    /// Waits for the next change; changes in the meantime are not lost.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// The model, once everything was listed. Nobody can change it while the guard lives.
    pub fn model(&self) -> Option<MappedMutexGuard<'_, Model>> {
        let state = self.state.lock();
        state.complete().then(|| MutexGuard::map(state, |state| &mut state.model))
    }

    /// What changed since the last time.
    pub fn take_dirty(&self) -> Dirty {
        std::mem::take(&mut self.state.lock().dirty)
    }

    pub fn counts(&self) -> Counts {
        self.state.lock().counts
    }

    /// Applies a change and wakes the proxy if it made a difference.
    fn update(&self, change: impl FnOnce(&mut State) -> bool) {
        if change(&mut self.state.lock()) {
            self.changed.notify_one();
        }
    }

    async fn follow_services(self, api: Api<core::Service>) {
        let config = watcher::Config::default().labels(SELECTOR);
        let mut events = watcher(api, config).default_backoff().boxed();
        let mut listed = BTreeMap::new();
        while let Some(event) = events.next().await {
            match event {
                Ok(watcher::Event::Init) => listed.clear(),
                Ok(watcher::Event::InitApply(service)) => {
                    let families = Service::read(&service);
                    if !families.is_empty() {
                        listed.insert(service_name(&service), families);
                    }
                }
                Ok(watcher::Event::InitDone) => {
                    let all = std::mem::take(&mut listed);
                    self.update(|state| {
                        state.counts.services += all.len() as u64;
                        state.replace_services(all) | !std::mem::replace(&mut state.synced[0], true)
                    });
                }
                Ok(watcher::Event::Apply(service)) => self.update(|state| {
                    state.counts.services += 1;
                    state.put_service(service_name(&service), Service::read(&service))
                }),
                Ok(watcher::Event::Delete(service)) => self.update(|state| {
                    state.counts.services += 1;
                    state.put_service(service_name(&service), Vec::new())
                }),
                Err(error) => tracing::warn!(error = error_chain(&error), "the watch of services broke"),
            }
        }
    }

    async fn follow_slices(self, api: Api<EndpointSlice>) {
        let config = watcher::Config::default().labels(SELECTOR);
        let mut events = watcher(api, config).default_backoff().boxed();
        let node_name = self.state.lock().model.node_name.clone();
        let mut listed = BTreeMap::new();
        while let Some(event) = events.next().await {
            match event {
                Ok(watcher::Event::Init) => listed.clear(),
                Ok(watcher::Event::InitApply(slice)) => {
                    let read = Slice::service(&slice).zip(Slice::read(&slice, &node_name));
                    listed.extend(read.map(|(service, read)| ((service, slice.name_any().into_boxed_str()), read)));
                }
                Ok(watcher::Event::InitDone) => {
                    let all = std::mem::take(&mut listed);
                    self.update(|state| {
                        state.counts.slices += all.len() as u64;
                        state.replace_slices(all) | !std::mem::replace(&mut state.synced[1], true)
                    });
                }
                Ok(watcher::Event::Apply(slice)) => self.put_slice(&slice, Slice::read(&slice, &node_name)),
                Ok(watcher::Event::Delete(slice)) => self.put_slice(&slice, None),
                Err(error) => tracing::warn!(error = error_chain(&error), "the watch of endpoint slices broke"),
            }
        }
    }

    /// A slice stays with its service: nothing may change that label.
    fn put_slice(&self, slice: &EndpointSlice, read: Option<Slice>) {
        if let Some(service) = Slice::service(slice) {
            let trigger: Option<Timestamp> =
                slice.annotations().get(TRIGGER_ANNOTATION).and_then(|time| time.parse().ok());
            self.update(|state| {
                state.counts.slices += 1;
                let changed = state.put_slice(service, &slice.name_any(), read);
                if changed && state.dirty.triggers.len() < MOST_TRIGGERS {
                    state.dirty.triggers.extend(trigger);
                }
                changed
            });
        }
    }

    /// A node that is not registered yet does not hold anything up: its zone and taints come later.
    async fn follow_node(self, api: Api<core::Node>, name: String) {
        let config = watcher::Config::default().fields(&format!("metadata.name={name}"));
        let mut events = watcher(api, config).default_backoff().boxed();
        while let Some(event) = events.next().await {
            match event {
                Ok(watcher::Event::InitApply(node) | watcher::Event::Apply(node)) => {
                    let read = Node::read(&node);
                    self.update(|state| state.put_node(read));
                }
                Ok(watcher::Event::InitDone) => {
                    self.update(|state| !std::mem::replace(&mut state.synced[2], true));
                }
                Ok(watcher::Event::Delete(_)) => self.update(|state| {
                    let gone = Node { eligible: false, ..state.model.node.clone() };
                    state.put_node(gone)
                }),
                Ok(watcher::Event::Init) => {}
                Err(error) => tracing::warn!(error = error_chain(&error), "the watch of this node broke"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Protocol;
    use crate::plan::testing::{endpoint, entry, service};

    #[test]
    fn only_differences_make_a_service_dirty() {
        let name = ServiceName::new("ns", "svc");
        let entry =
            entry(service("10.96.0.1", &[("", Protocol::Tcp, 80, None)]), vec![endpoint("10.244.1.2", "node1")]);
        let slice = entry.slices["svc-1"].clone();
        let mut state = State::default();
        assert!(state.put_service(name.clone(), entry.families.clone()));
        assert!(state.put_slice(name.clone(), "svc-1", Some(slice.clone())));
        assert_eq!(std::mem::take(&mut state.dirty).services.len(), 1);
        assert!(!state.put_slice(name.clone(), "svc-1", Some(slice.clone())));
        assert!(!state.replace_services([(name.clone(), entry.families)].into()));
        assert!(!state.replace_slices([((name, "svc-1".into()), slice)].into()));
        assert_eq!(state.dirty, Dirty::default());
        assert!(state.replace_slices(BTreeMap::new()) && state.replace_services(BTreeMap::new()));
        assert_eq!((state.dirty.services.len(), state.model.services.len()), (1, 0));
    }

    #[test]
    fn a_node_that_leaves_concerns_no_service() {
        let mut state = State::default();
        assert!(state.put_node(Node { eligible: true, ..Node::default() }));
        assert!(!state.dirty.node);
        assert!(state.put_node(Node { zone: "a".to_owned(), ..Node::default() }));
        assert!(state.dirty.node);
    }
}
