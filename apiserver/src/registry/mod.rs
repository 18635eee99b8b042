//! Which resources are served, and what each is: names, versions, storage, strategy, cache. Built-in resources come
//! from the discovery facts in `apimachinery`; custom ones are added and taken away while the server runs.

pub mod admissionregistration;
pub mod alloc;
pub mod apiextensions;
pub mod apiregistration;
pub mod apps;
pub mod autoscaling;
pub mod batch;
pub mod certificates;
pub mod common;
pub mod coordination;
pub mod core;
pub mod declared;
pub mod defaults;
pub mod discovery;
pub mod flowcontrol;
pub mod kinds;
pub mod layout;
pub mod networking;
pub mod node;
pub mod object;
pub mod policy;
pub mod rbac;
pub mod resource;
pub mod scheduling;
pub mod storage;
pub mod storagemigration;
pub mod strategy;
pub mod tables;
pub mod validation;

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::ops::Deref;
use std::sync::Arc;

use apimachinery::meta::{GroupKind, GroupResource, GroupVersionKind, GroupVersionResource};
use apimachinery::schema::{ApiResource, Schema};
use apimachinery::status::Result;
use arc_swap::ArcSwap;
use serde_json::Value;

use crate::cache::{Caches, KindInfo, ResourceCache, Stored};
use object::ObjectExt;
use strategy::Strategy;

/// The strategy of a resource: of the program, or made for a custom resource.
#[derive(Clone)]
pub enum StrategyRef {
    Builtin(&'static dyn Strategy),
    Custom(Arc<dyn Strategy>),
}

impl Deref for StrategyRef {
    type Target = dyn Strategy;

    fn deref(&self) -> &Self::Target {
        match self {
            Self::Builtin(strategy) => *strategy,
            Self::Custom(strategy) => strategy.as_ref(),
        }
    }
}

/// The schema of a kind: of the program, or made from a custom resource definition.
#[derive(Clone)]
pub enum SchemaRef {
    Builtin(&'static Schema),
    Custom(Arc<Schema>),
}

impl Deref for SchemaRef {
    type Target = Schema;

    fn deref(&self) -> &Self::Target {
        match self {
            Self::Builtin(schema) => schema,
            Self::Custom(schema) => schema,
        }
    }
}

/// One resource, in all its versions.
pub struct Resource {
    pub group_resource: GroupResource,
    pub namespaced: bool,
    /// The version that objects are stored in.
    pub storage: GroupVersionKind,
    /// The schema of the storage version.
    pub schema: Option<SchemaRef>,
    pub strategy: StrategyRef,
    /// The strategy of `status` of a custom resource; built-in kinds name theirs themselves.
    pub status: Option<StrategyRef>,
    pub cache: Arc<ResourceCache>,
    pub versions: Vec<Arc<Served>>,
    /// Items of lists carry their kind, as those of custom resources do.
    pub custom: bool,
    /// Of custom resources; those of built-in ones are among the discovery facts.
    pub names: Option<Names>,
}

/// What else a resource is called.
#[derive(Clone, Debug, Default)]
pub struct Names {
    pub singular: String,
    pub short_names: Vec<String>,
    pub categories: Vec<String>,
}

impl Names {
    /// From `spec.names` of a definition.
    pub fn read(names: &Value) -> Self {
        let list = |field: &str| names.list_at(&[field]).iter().filter_map(Value::as_str).map(str::to_owned).collect();
        Self {
            singular: names.str_at(&["singular"]).to_owned(),
            short_names: list("shortNames"),
            categories: list("categories"),
        }
    }
}

/// A resource in one version.
#[derive(Clone)]
pub struct Served {
    pub gvr: GroupVersionResource,
    pub gvk: GroupVersionKind,
    /// `PodList`.
    pub list_kind: String,
    /// The members that name the type, as JSON text: `"kind":"Pod","apiVersion":"v1"`.
    pub header: String,
    pub schema: Option<SchemaRef>,
    /// Verbs of the resource itself.
    pub verbs: Vec<String>,
    pub subresources: Vec<ServedSubresource>,
    /// What the objects of a custom resource can be selected by in this version. `None`: what its cache knows.
    pub fields: Option<Vec<String>>,
}

#[derive(Clone)]
pub struct ServedSubresource {
    pub name: String,
    /// What requests and answers of the subresource are.
    pub gvk: GroupVersionKind,
    pub verbs: Vec<String>,
}

impl Resource {
    pub fn version(&self, version: &str) -> Option<&Arc<Served>> {
        self.versions.iter().find(|served| served.gvr.version == version)
    }

    pub fn group_kind(&self) -> GroupKind {
        self.storage.group_kind()
    }

    /// From the storage version to the one asked for, header included.
    pub fn present(&self, served: &Served, obj: Value) -> Result<Value> {
        if served.gvk == self.storage && !self.cache.kind().converted {
            return Ok(obj);
        }
        let mut obj = self.strategy.from_storage(&served.gvk.version, obj)?;
        obj.set_gvk(&served.gvk);
        Ok(obj)
    }

    /// The same for many at once, which is cheaper where another server converts.
    pub fn present_all(&self, served: &Served, objects: Vec<Value>) -> Result<Vec<Value>> {
        if self.cache.kind().converted {
            return self.strategy.all_from_storage(&served.gvk.version, objects);
        }
        objects.into_iter().map(|object| self.present(served, object)).collect()
    }

    /// A stored object as a tree in the storage version.
    pub fn tree(&self, stored: &Stored) -> Result<Value> {
        match self.cache.kind().converted {
            true => self.strategy.from_storage(&self.storage.version, stored.value()),
            false => Ok(stored.value()),
        }
    }

    /// From the version of a request to the storage version, header included.
    pub fn internalize(&self, served: &Served, mut obj: Value) -> Result<Value> {
        if served.gvk != self.storage {
            // A body need not say what it is; conversions may look.
            obj.set_gvk(&served.gvk);
            obj = self.strategy.to_storage(&served.gvk.version, obj)?;
        }
        obj.set_gvk(&self.storage);
        Ok(obj)
    }
}

/// The members that name an object's type, as JSON text.
pub fn header(kind: &str, api_version: &str) -> String {
    format!("\"kind\":{},\"apiVersion\":{}", Value::from(kind), Value::from(api_version))
}

/// All resources that are served.
#[derive(Default)]
pub struct Registry {
    resources: ArcSwap<HashMap<(String, String), Arc<Resource>>>,
}

impl Registry {
    /// Everything in the discovery facts that `is_enabled`, with its caches.
    pub fn builtin(caches: &Caches, etcd_prefix: &str, is_enabled: impl Fn(&ApiResource) -> bool) -> Self {
        // In order of groups: where two share their storage (events), the core group decides how it is cached.
        let mut grouped: BTreeMap<(&str, &str), Vec<&'static ApiResource>> = BTreeMap::new();
        for api in apimachinery::schema::builtin().resources().iter().filter(|api| is_enabled(api)) {
            grouped.entry((api.group, api.resource)).or_default().push(api);
        }
        let registry = Self::default();
        for apis in grouped.into_values() {
            registry.insert(builtin_resource(caches, etcd_prefix, &apis));
        }
        registry
    }

    pub fn get(&self, group: &str, resource: &str) -> Option<Arc<Resource>> {
        self.resources.load().get(&(group.to_owned(), resource.to_owned())).cloned()
    }

    pub fn all(&self) -> Vec<Arc<Resource>> {
        self.resources.load().values().cloned().collect()
    }

    /// Whether any resource is of this group. Asked on every request, so it looks at nothing but the keys.
    pub fn has_group(&self, group: &str) -> bool {
        self.resources.load().keys().any(|(known, _)| known == group)
    }

    pub fn has_custom_group(&self, group: &str) -> bool {
        self.resources.load().values().any(|resource| resource.custom && resource.group_resource.group == group)
    }

    pub fn by_kind(&self, group: &str, kind: &str) -> Option<Arc<Resource>> {
        self.resources.load().values().find(|r| r.storage.group == group && r.storage.kind == kind).cloned()
    }

    pub fn insert(&self, resource: Resource) {
        let key = (resource.group_resource.group.to_string(), resource.group_resource.resource.to_string());
        let resource = Arc::new(resource);
        self.resources.rcu(|map| {
            let mut map = HashMap::clone(map);
            map.insert(key.clone(), resource.clone());
            map
        });
    }

    pub fn remove(&self, group: &str, resource: &str) {
        let key = (group.to_owned(), resource.to_owned());
        self.resources.rcu(|map| {
            let mut map = HashMap::clone(map);
            map.remove(&key);
            map
        });
    }
}

fn builtin_resource(caches: &Caches, etcd_prefix: &str, apis: &[&'static ApiResource]) -> Resource {
    let first = apis[0];
    let (group, resource) = (first.group.to_string(), first.resource.to_string());
    let strategy = kinds::strategy(&group, &resource);
    let storage = layout::storage_kind(apis);
    let fields: Vec<_> = strategy
        .selectable_fields()
        .iter()
        .map(|field| (Cow::Borrowed(*field), strategy.selectable_default(field)))
        .collect();
    let kind = KindInfo {
        defaults: None,
        converted: false,
        kind: storage.kind.to_string(),
        api_version: storage.api_version(),
        aliases: strategy.selectable_aliases(),
        indexed: strategy.indexed_field().and_then(|field| fields.iter().position(|(name, _)| *name == field)),
        fields,
    };
    let prefix = format!("{etcd_prefix}/{}/", layout::resource_prefix(&group, &resource));
    let cache = caches.add(&group, &resource, &prefix, kind);
    Resource {
        group_resource: GroupResource::new(group, resource),
        namespaced: first.namespaced,
        schema: apimachinery::schema::builtin().kind(&storage).map(SchemaRef::Builtin),
        storage,
        strategy: StrategyRef::Builtin(strategy),
        cache,
        versions: apis.iter().map(|api| Arc::new(served(api))).collect(),
        custom: false,
        status: None,
        names: None,
    }
}

fn served(api: &ApiResource) -> Served {
    let (group, version) = (api.group.to_string(), api.version.to_string());
    let gvk = GroupVersionKind::new(group.clone(), version.clone(), api.kind.to_string());
    Served {
        gvr: GroupVersionResource::new(group, version, api.resource.to_string()),
        list_kind: format!("{}List", api.kind),
        header: header(api.kind, &gvk.api_version()),
        schema: apimachinery::schema::builtin().kind(&gvk).map(SchemaRef::Builtin),
        verbs: api.verbs.iter().map(ToString::to_string).collect(),
        subresources: api
            .subresources
            .iter()
            .map(|sub| ServedSubresource {
                name: sub.name.to_string(),
                gvk: GroupVersionKind::new(sub.group, sub.version, sub.kind),
                verbs: sub.verbs.iter().map(ToString::to_string).collect(),
            })
            .collect(),
        fields: None,
        gvk,
    }
}
