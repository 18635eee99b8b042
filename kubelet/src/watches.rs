//! Tells pods that an object which they refer to has changed: one watch of metadata for each object, shared by all
//! pods that refer to it, and only while they do. Holds no objects; whoever is told reads again.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use futures::{Stream, StreamExt};
use k8s_openapi::api::certificates::v1::ClusterTrustBundle;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Secret};
use kube::core::PartialObjectMeta;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client};
use parking_lot::Mutex;
use tokio_util::task::AbortOnDropHandle;

/// What a pod's volumes show.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reference {
    ConfigMap {
        namespace: String,
        name: String,
    },
    Secret {
        namespace: String,
        name: String,
    },
    /// Any of the cluster's trust bundles.
    TrustBundles,
}

/// Called whenever something has changed; must not block.
pub type Listener = Arc<dyn Fn() + Send + Sync>;

struct Followed {
    listeners: HashMap<String, Listener>,
    _watch: AbortOnDropHandle<()>,
}

pub struct Watches {
    client: Client,
    followed: Arc<Mutex<HashMap<Reference, Followed>>>,
}

impl Watches {
    pub fn new(client: Client) -> Self {
        Self { client, followed: Arc::default() }
    }

    /// From now on the pod hears of exactly these objects; of none to stop.
    pub fn listen(&self, pod_uid: &str, references: &BTreeSet<Reference>, listener: &Listener) {
        let mut followed = self.followed.lock();
        followed.retain(|reference, entry| {
            references.contains(reference) || {
                entry.listeners.remove(pod_uid);
                !entry.listeners.is_empty()
            }
        });
        for reference in references {
            let entry = followed
                .entry(reference.clone())
                .or_insert_with(|| Followed { listeners: HashMap::new(), _watch: self.watch(reference.clone()) });
            entry.listeners.insert(pod_uid.to_owned(), listener.clone());
        }
    }

    fn watch(&self, reference: Reference) -> AbortOnDropHandle<()> {
        let (client, followed) = (self.client.clone(), self.followed.clone());
        AbortOnDropHandle::new(tokio::spawn(async move {
            let tell = || {
                let listeners: Vec<Listener> =
                    followed.lock().get(&reference).into_iter().flat_map(|f| f.listeners.values().cloned()).collect();
                listeners.iter().for_each(|listener| listener());
            };
            let named = |name: &str| watcher::Config::default().fields(&format!("metadata.name={name}"));
            match &reference {
                Reference::ConfigMap { namespace, name } => {
                    let api = Api::<PartialObjectMeta<ConfigMap>>::namespaced(client, namespace);
                    follow(watcher(api, named(name)), tell).await;
                }
                Reference::Secret { namespace, name } => {
                    let api = Api::<PartialObjectMeta<Secret>>::namespaced(client, namespace);
                    follow(watcher(api, named(name)), tell).await;
                }
                Reference::TrustBundles => {
                    let api = Api::<PartialObjectMeta<ClusterTrustBundle>>::all(client);
                    follow(watcher(api, watcher::Config::default()), tell).await;
                }
            }
        }))
    }
}

/// Runs for ever; the listeners are also told after each list, before which anything may have happened.
async fn follow<K>(events: impl Stream<Item = watcher::Result<watcher::Event<K>>> + Send, tell: impl Fn()) {
    let mut events = std::pin::pin!(events.default_backoff());
    while let Some(event) = events.next().await {
        match event {
            Ok(watcher::Event::Init | watcher::Event::InitApply(_)) => {}
            Ok(watcher::Event::Apply(_) | watcher::Event::Delete(_) | watcher::Event::InitDone) => tell(),
            Err(error) => tracing::debug!(%error, "the watch of an object that a pod refers to was interrupted"),
        }
    }
}

/// The objects that the pod's volumes show.
pub fn references(pod: &Pod) -> BTreeSet<Reference> {
    let namespace = || pod.metadata.namespace.clone().unwrap_or_default();
    let config_map = |name: &str| Reference::ConfigMap { namespace: namespace(), name: name.to_owned() };
    let secret = |name: &str| Reference::Secret { namespace: namespace(), name: name.to_owned() };
    let mut found = BTreeSet::new();
    for volume in pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten()) {
        found.extend(volume.config_map.as_ref().map(|source| config_map(&source.name)));
        found.extend(volume.secret.as_ref().and_then(|source| source.secret_name.as_deref()).map(secret));
        for part in volume.projected.iter().flat_map(|projected| projected.sources.iter().flatten()) {
            found.extend(part.config_map.as_ref().map(|source| config_map(&source.name)));
            found.extend(part.secret.as_ref().map(|source| secret(&source.name)));
            found.extend(part.cluster_trust_bundle.as_ref().map(|_| Reference::TrustBundles));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_of_all_kinds_of_volumes() {
        let pod: Pod = serde_json::from_value(serde_json::json!({
            "metadata": {"namespace": "n"},
            "spec": {"containers": [], "volumes": [
                {"name": "a", "configMap": {"name": "c"}},
                {"name": "b", "secret": {"secretName": "s"}},
                {"name": "c", "emptyDir": {}},
                {"name": "d", "projected": {"sources": [
                    {"configMap": {"name": "c"}},
                    {"secret": {"name": "t"}},
                    {"clusterTrustBundle": {"path": "p", "name": "x"}},
                ]}},
            ]},
        }))
        .unwrap();
        let (namespace, name) = ("n".to_owned(), str::to_owned);
        let want = BTreeSet::from([
            Reference::ConfigMap { namespace: namespace.clone(), name: name("c") },
            Reference::Secret { namespace: namespace.clone(), name: name("s") },
            Reference::Secret { namespace, name: name("t") },
            Reference::TrustBundles,
        ]);
        assert_eq!(references(&pod), want);
    }
}
