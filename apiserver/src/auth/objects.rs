//! What authentication and authorization read of the cluster: a view of the watch caches that a test can fake.
//! Read-only, never waits, never asks the store.

use std::sync::Arc;

use serde_json::Value;

use crate::cache::{Caches, Stored};

/// The cluster's objects as the caches know them now.
pub trait Objects: Send + Sync {
    /// One object, with kind and apiVersion. `namespace` is empty for cluster-scoped resources.
    fn get(&self, group: &str, resource: &str, namespace: &str, name: &str) -> Option<Value>;

    /// Every object of a resource, of one namespace or of all.
    fn list(&self, group: &str, resource: &str, namespace: Option<&str>) -> Vec<Entry>;

    /// A number that changes whenever an object of the resource does; an index built at one number is good until then.
    fn revision(&self, group: &str, resource: &str) -> u64;

    /// The pods bound to `node` in `namespace` (`None`: in all).
    fn pods_on(&self, node: &str, namespace: Option<&str>) -> Vec<Value> {
        let bound = |pod: &Value| pod.pointer("/spec/nodeName").and_then(Value::as_str) == Some(node);
        self.list("", "pods", namespace).iter().map(Entry::value).filter(bound).collect()
    }
}

/// One listed object, parsed only when somebody looks.
pub enum Entry {
    Cached(Arc<Stored>),
    Plain(Value),
}

impl Entry {
    /// Where and at which revision: equal identities are equal objects.
    pub fn identity(&self) -> (String, u64) {
        match self {
            Self::Cached(stored) => (stored.key.to_string(), stored.revision),
            Self::Plain(value) => (value.to_string(), 0),
        }
    }

    pub fn value(&self) -> Value {
        match self {
            Self::Cached(stored) => stored.value(),
            Self::Plain(value) => value.clone(),
        }
    }
}

impl Objects for Caches {
    fn get(&self, group: &str, resource: &str, namespace: &str, name: &str) -> Option<Value> {
        Caches::get(self, group, resource)?.get(namespace, name).map(|stored| stored.value())
    }

    fn list(&self, group: &str, resource: &str, namespace: Option<&str>) -> Vec<Entry> {
        match Caches::get(self, group, resource) {
            Some(cache) => cache.list(namespace).into_iter().map(Entry::Cached).collect(),
            None => Vec::new(),
        }
    }

    fn revision(&self, group: &str, resource: &str) -> u64 {
        Caches::get(self, group, resource).map_or(0, |cache| cache.changed())
    }

    /// Looks at the selectable fields first, so that only the node's pods are parsed.
    fn pods_on(&self, node: &str, namespace: Option<&str>) -> Vec<Value> {
        let Some(cache) = Caches::get(self, "", "pods") else { return Vec::new() };
        let field = cache.kind().fields.iter().position(|(name, _)| *name == "spec.nodeName");
        let bound = |stored: &Arc<Stored>| match field.and_then(|index| stored.meta.fields.get(index)) {
            Some(value) => &**value == node,
            None => stored.value().pointer("/spec/nodeName").and_then(Value::as_str) == Some(node),
        };
        cache.list(namespace).iter().filter(|stored| bound(stored)).map(|stored| stored.value()).collect()
    }
}

/// Objects from a list of manifests, for tests.
#[cfg(test)]
#[derive(Default)]
pub struct Fake(pub Vec<(&'static str, &'static str, Value)>);

#[cfg(test)]
impl Objects for Fake {
    fn get(&self, group: &str, resource: &str, namespace: &str, name: &str) -> Option<Value> {
        let meta = |object: &Value, field: &str| object["metadata"][field].as_str().unwrap_or_default().to_owned();
        let wanted = |(g, r, object): &&(&str, &str, Value)| {
            *g == group && *r == resource && meta(object, "namespace") == namespace && meta(object, "name") == name
        };
        self.0.iter().find(wanted).map(|(_, _, object)| object.clone())
    }

    fn list(&self, group: &str, resource: &str, namespace: Option<&str>) -> Vec<Entry> {
        let wanted = |(g, r, object): &&(&str, &str, Value)| {
            *g == group
                && *r == resource
                && namespace.is_none_or(|wanted| object["metadata"]["namespace"].as_str() == Some(wanted))
        };
        self.0.iter().filter(wanted).map(|(_, _, object)| Entry::Plain(object.clone())).collect()
    }

    fn revision(&self, _: &str, _: &str) -> u64 {
        self.0.len() as u64
    }
}
