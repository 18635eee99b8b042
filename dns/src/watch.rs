//! Keeps the model in step with the API: one watch each for namespaces, services and endpoint slices. Nothing but
//! the model is kept of them. While the API server is away the last known state is served.

use std::collections::HashSet;
use std::fmt::Debug;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use futures::StreamExt;
use k8s_openapi::api::core::v1::{Namespace, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::core::PartialObjectMeta;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event};
use kube::{Api, Client, Resource};
use parking_lot::RwLock;
use serde::de::DeserializeOwned;
use tokio_util::sync::CancellationToken;

use crate::model::{Key, Model, key};

const KINDS: usize = 3;

/// Tells when the first lists have arrived.
#[derive(Clone, Default)]
pub struct Synced(Arc<AtomicUsize>);

impl Synced {
    pub fn check(&self) -> Result<(), String> {
        match self.0.load(Ordering::Acquire) {
            KINDS.. => Ok(()),
            known => Err(format!("{known} of {KINDS} kinds of objects listed")),
        }
    }
}

/// What one kind of object does to the model.
trait Watched: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + Sync + 'static {
    fn set(&self, model: &mut Model);
    fn remove(&self, model: &mut Model);
    fn retain(model: &mut Model, known: &HashSet<Key>);
}

fn names<K: Resource>(object: &K) -> (&str, &str) {
    let meta = object.meta();
    (meta.namespace.as_deref().unwrap_or_default(), meta.name.as_deref().unwrap_or_default())
}

impl Watched for Service {
    fn set(&self, model: &mut Model) {
        model.set_service(self);
    }

    fn remove(&self, model: &mut Model) {
        let (namespace, name) = names(self);
        model.remove_service(namespace, name);
    }

    fn retain(model: &mut Model, known: &HashSet<Key>) {
        model.retain_services(known);
    }
}

impl Watched for EndpointSlice {
    fn set(&self, model: &mut Model) {
        model.set_slice(self);
    }

    fn remove(&self, model: &mut Model) {
        model.remove_slice(self);
    }

    fn retain(model: &mut Model, known: &HashSet<Key>) {
        model.retain_slices(known);
    }
}

impl Watched for PartialObjectMeta<Namespace> {
    fn set(&self, model: &mut Model) {
        model.set_namespace(names(self).1);
    }

    fn remove(&self, model: &mut Model) {
        model.remove_namespace(names(self).1);
    }

    fn retain(model: &mut Model, known: &HashSet<Key>) {
        model.retain_namespaces(known);
    }
}

/// Starts the watches; they end with `shutdown`.
pub fn start(client: Client, model: Arc<RwLock<Model>>, shutdown: &CancellationToken) -> Synced {
    let synced = Synced::default();
    let config = || watcher::Config::default().page_size(250);
    let namespaces =
        watcher::watcher(Api::<PartialObjectMeta<Namespace>>::all(client.clone()), config()).default_backoff();
    let services = watcher::watcher(Api::<Service>::all(client.clone()), config()).default_backoff();
    let slices = watcher::watcher(Api::<EndpointSlice>::all(client), config()).default_backoff();
    let until = |shutdown: &CancellationToken| shutdown.clone().cancelled_owned();
    tokio::spawn(follow(namespaces.take_until(until(shutdown)), model.clone(), synced.clone()));
    tokio::spawn(follow(services.take_until(until(shutdown)), model.clone(), synced.clone()));
    tokio::spawn(follow(slices.take_until(until(shutdown)), model, synced.clone()));
    synced
}

async fn follow<K, S>(events: S, model: Arc<RwLock<Model>>, synced: Synced)
where
    K: Watched,
    S: futures::Stream<Item = watcher::Result<Event<K>>>,
{
    let mut events = std::pin::pin!(events);
    let mut listed: HashSet<Key> = HashSet::new();
    let mut first = true;
    while let Some(event) = events.next().await {
        match event {
            Ok(Event::Init) => listed.clear(),
            Ok(Event::InitApply(object)) => {
                let (namespace, name) = names(&object);
                listed.insert(key(namespace, name));
                object.set(&mut model.write());
            }
            Ok(Event::InitDone) => {
                K::retain(&mut model.write(), &std::mem::take(&mut listed));
                if std::mem::take(&mut first) {
                    synced.0.fetch_add(1, Ordering::AcqRel);
                }
            }
            Ok(Event::Apply(object)) => object.set(&mut model.write()),
            Ok(Event::Delete(object)) => object.remove(&mut model.write()),
            Err(error) => tracing::warn!(%error, "watch was interrupted"),
        }
    }
}
