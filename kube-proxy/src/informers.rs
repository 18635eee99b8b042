//! Follows services, endpoint slices and this node in the API, and keeps the [`Model`] of them. One task for each;
//! every change wakes the proxy, which looks at the model when it is its time.

use std::sync::Arc;

use apimachinery::process::error_chain;
use futures::StreamExt;
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, ResourceExt};
use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::model::{Model, Node, Service, ServiceName, Slice};

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
    /// Complete listings seen of: services, slices, node.
    synced: [bool; 3],
}

impl Informers {
    /// Starts following in the background of the current runtime.
    pub fn start(client: &Client, node_name: &str) -> Self {
        let model = Model {
            node_name: node_name.to_owned(),
            node: Node { eligible: true, ..Node::default() },
            ..Model::default()
        };
        let informers =
            Self { state: Arc::new(Mutex::new(State { model, synced: [false; 3] })), changed: Arc::new(Notify::new()) };
        tokio::spawn(informers.clone().follow_services(Api::all(client.clone())));
        tokio::spawn(informers.clone().follow_slices(Api::all(client.clone())));
        tokio::spawn(informers.clone().follow_node(Api::all(client.clone()), node_name.to_owned()));
        informers
    }

    /// Waits for the next change; changes in the meantime are not lost.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// The model, once everything was listed.
    pub fn snapshot(&self) -> Option<Model> {
        let state = self.state.lock();
        state.synced.iter().all(|&synced| synced).then(|| state.model.clone())
    }

    /// Whether load balancers may send traffic to this node.
    pub fn node_eligible(&self) -> bool {
        self.state.lock().model.node.eligible
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
        let mut listed = std::collections::BTreeMap::new();
        while let Some(event) = events.next().await {
            match event {
                Ok(watcher::Event::Init) => listed.clear(),
                Ok(watcher::Event::InitApply(service)) => {
                    listed.extend(Service::read(&service).map(|read| (service_name(&service), read)));
                }
                Ok(watcher::Event::InitDone) => {
                    let all = std::mem::take(&mut listed);
                    self.update(|state| {
                        replace(&mut state.model.services, all) | !std::mem::replace(&mut state.synced[0], true)
                    });
                }
                Ok(watcher::Event::Apply(service)) => {
                    let (name, read) = (service_name(&service), Service::read(&service));
                    self.update(|state| put(&mut state.model.services, name, read));
                }
                Ok(watcher::Event::Delete(service)) => {
                    self.update(|state| put(&mut state.model.services, service_name(&service), None));
                }
                Err(error) => tracing::warn!(error = error_chain(&error), "the watch of services broke"),
            }
        }
    }

    async fn follow_slices(self, api: Api<EndpointSlice>) {
        let config = watcher::Config::default().labels(SELECTOR);
        let mut events = watcher(api, config).default_backoff().boxed();
        let mut listed = std::collections::BTreeMap::new();
        let key = |slice: &EndpointSlice| (slice.namespace().unwrap_or_default(), slice.name_any());
        while let Some(event) = events.next().await {
            match event {
                Ok(watcher::Event::Init) => listed.clear(),
                Ok(watcher::Event::InitApply(slice)) => {
                    listed.extend(Slice::read(&slice).map(|read| (key(&slice), read)));
                }
                Ok(watcher::Event::InitDone) => {
                    let all = std::mem::take(&mut listed);
                    self.update(|state| {
                        replace(&mut state.model.slices, all) | !std::mem::replace(&mut state.synced[1], true)
                    });
                }
                Ok(watcher::Event::Apply(slice)) => {
                    let read = Slice::read(&slice);
                    self.update(|state| put(&mut state.model.slices, key(&slice), read));
                }
                Ok(watcher::Event::Delete(slice)) => {
                    self.update(|state| put(&mut state.model.slices, key(&slice), None));
                }
                Err(error) => tracing::warn!(error = error_chain(&error), "the watch of endpoint slices broke"),
            }
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
                    self.update(|state| replace(&mut state.model.node, read));
                }
                Ok(watcher::Event::InitDone) => {
                    self.update(|state| !std::mem::replace(&mut state.synced[2], true));
                }
                Ok(watcher::Event::Delete(_)) => self.update(|state| {
                    state.model.node.eligible = false;
                    true
                }),
                Ok(watcher::Event::Init) => {}
                Err(error) => tracing::warn!(error = error_chain(&error), "the watch of this node broke"),
            }
        }
    }
}

fn service_name(service: &core::Service) -> ServiceName {
    ServiceName { namespace: service.namespace().unwrap_or_default(), name: service.name_any() }
}

fn replace<T: PartialEq>(current: &mut T, new: T) -> bool {
    let changed = *current != new;
    if changed {
        *current = new;
    }
    changed
}

fn put<K: Ord, V: PartialEq>(map: &mut std::collections::BTreeMap<K, V>, key: K, value: Option<V>) -> bool {
    match value {
        None => map.remove(&key).is_some(),
        Some(value) if map.get(&key) == Some(&value) => false,
        Some(value) => {
            map.insert(key, value);
            true
        }
    }
}
