//! What makes a kind a kind: its `Strategy`. A kind declares defaults, rules, table columns and subresources here and
//! nothing else; reading, writing, conflicts, watches and patches are the same code for all of them (`verbs/`).
//!
//! Order of the calls on a create: `default` → mutating admission → `default` again → `prepare_for_create` → generic
//! metadata rules → `validate_create` → validating admission → `begin_create` → write. On an update, once per try:
//! the new object is built on the stored one → `default` → admission → `prepare_for_update` → generic metadata rules
//! → `validate_update` → validating admission → `begin_update` → write. Only `default`, `prepare_*` and `begin_*`
//! may change the object. No method may block; only the `async` ones may wait.

use std::sync::Arc;
use std::time::Duration;

use apimachinery::status::{FieldError, Result, Status};
use async_trait::async_trait;
use futures::future::BoxFuture;
use serde_json::Value;

use crate::admission::Warnings;
use crate::auth::UserInfo;
use crate::cache::stored::Aliases;
use crate::registry::object::ObjectExt;
use crate::server::Server;

/// What a strategy may know about the request.
#[derive(Clone, Copy)]
pub struct Cx<'a> {
    pub server: &'a Arc<Server>,
    pub user: &'a UserInfo,
    pub now: jiff::Timestamp,
    /// Empty for cluster-scoped resources.
    pub namespace: &'a str,
    pub dry_run: bool,
    /// Empty for the resource itself.
    pub subresource: &'a str,
    /// The write came as a patch.
    pub is_patch: bool,
    /// What the answer warns of.
    pub warnings: &'a Warnings,
}

/// What undoes a side effect (an allocated address) when the write that it was made for fails. Dropping it keeps the
/// effect.
#[derive(Default)]
pub struct Undo(Option<BoxFuture<'static, ()>>);

impl Undo {
    /// Nothing to undo.
    pub fn none() -> Self {
        Self(None)
    }

    /// `undo` is polled only when the write fails.
    pub fn new(undo: impl Future<Output = ()> + Send + 'static) -> Self {
        Self(Some(Box::pin(undo)))
    }

    /// Undoes `self`, then `earlier`.
    pub fn and(self, earlier: Undo) -> Self {
        match (self.0, earlier.0) {
            (Some(last), Some(first)) => Self::new(async move {
                last.await;
                first.await;
            }),
            (one, other) => Self(one.or(other)),
        }
    }

    pub async fn run(self) {
        if let Some(undo) = self.0 {
            undo.await;
        }
    }
}

/// One column of `kubectl get`.
#[derive(Clone, Copy, Debug)]
pub struct Column {
    pub name: &'static str,
    /// `string`, `integer`, `number`, `boolean` or `date`.
    pub kind: &'static str,
    /// `name` for the column of names, else mostly empty.
    pub format: &'static str,
    /// 0 is always shown, 1 only with `-o wide`.
    pub priority: u8,
    pub description: &'static str,
}

impl Column {
    pub const fn new(name: &'static str, kind: &'static str) -> Self {
        Self { name, kind, format: "", priority: 0, description: "" }
    }

    /// The first column of nearly every kind.
    pub const fn name() -> Self {
        Self {
            name: "Name",
            kind: "string",
            format: "name",
            priority: 0,
            description: "Name must be unique within a namespace.",
        }
    }

    /// The `Age` column: a `string` cell with `registry::table::age`.
    pub const fn age() -> Self {
        Self::new("Age", "string")
    }

    /// Only with `-o wide`.
    pub const fn wide(mut self) -> Self {
        self.priority = 1;
        self
    }
}

/// Which names an object may have; the messages are upstream's.
#[derive(Clone, Copy)]
pub enum NameRule {
    Dns1123Subdomain,
    Dns1123Label,
    Dns1035Label,
    /// Anything that can be one segment of a path: RBAC kinds.
    PathSegment,
    /// `(name, is_prefix)`: `is_prefix` when `generateName` is being checked.
    Custom(fn(&str, bool) -> Vec<String>),
}

impl NameRule {
    pub fn check(self, name: &str, is_prefix: bool) -> Vec<String> {
        use apimachinery::meta::validation;
        // A generated name ends with random letters, so a prefix may end in a dash.
        let masked;
        let subject = if is_prefix && name.len() > 1 && name.ends_with('-') {
            masked = format!("{}a", &name[..name.len() - 1]);
            masked.as_str()
        } else {
            name
        };
        match self {
            Self::Dns1123Subdomain => validation::is_dns1123_subdomain(subject),
            Self::Dns1123Label => validation::is_dns1123_label(subject),
            Self::Dns1035Label => validation::is_dns1035_label(subject),
            Self::PathSegment => path_segment(name, is_prefix),
            Self::Custom(rule) => rule(name, is_prefix),
        }
    }
}

fn path_segment(name: &str, is_prefix: bool) -> Vec<String> {
    let mut errors = Vec::new();
    if !is_prefix && (name == "." || name == "..") {
        errors.push(format!("may not be '{name}'"));
    }
    errors.extend(["/", "%"].iter().filter(|c| name.contains(**c)).map(|c| format!("may not contain '{c}'")));
    errors
}

/// The options of a delete request that a strategy may look at.
#[derive(Clone, Debug, Default)]
pub struct DeleteOptions {
    /// Seconds; `None` leaves it to the kind.
    pub grace_period: Option<i64>,
    pub propagation: Option<Propagation>,
    pub uid: Option<String>,
    pub resource_version: Option<String>,
    pub dry_run: bool,
    pub ignore_store_read_error: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Propagation {
    Background,
    Foreground,
    Orphan,
}

/// Where the two replica counts and the selector of a scalable kind are.
#[derive(Clone, Copy, Debug)]
pub struct ScalePaths<'a> {
    pub spec_replicas: &'a [&'a str],
    pub status_replicas: &'a [&'a str],
    pub selector: ScaleSelector<'a>,
}

/// The same, read from the definition of a custom resource; the selector is text.
#[derive(Clone, Debug)]
pub struct CustomScale {
    pub spec_replicas: Vec<String>,
    pub status_replicas: Vec<String>,
    pub selector: Vec<String>,
}

#[derive(Clone, Copy, Debug)]
pub enum ScaleSelector<'a> {
    /// A plain map of labels (replication controllers).
    Labels(&'a [&'a str]),
    /// A `LabelSelector` object.
    Selector(&'a [&'a str]),
    /// A string that already is a selector.
    Text(&'a [&'a str]),
}

/// What `/<name>/<subresource>` does.
#[derive(Clone)]
pub enum Subresource {
    /// Get, update and patch of the object itself under this strategy, whose `prepare_for_update` keeps what the
    /// subresource may not change: `status` of most kinds, `finalize`, `approval`, `ephemeralcontainers`, `resize`.
    Update(&'static dyn Strategy),
    /// `autoscaling/v1 Scale`.
    Scale(ScalePaths<'static>),
    CustomScale(Arc<CustomScale>),
    /// Anything else: `binding`, `eviction`, `token`.
    Custom(&'static dyn SubresourceHandler),
}

/// A subresource that is not a view of the object.
#[async_trait]
pub trait SubresourceHandler: Send + Sync + 'static {
    /// `verb` is that of the request info (`create`, `get`, `update`). `body` is the decoded and defaulted request
    /// object, `Null` when there is none. The answer carries `kind` and `apiVersion`.
    async fn handle(&self, cx: &Cx<'_>, name: &str, verb: &str, body: Value) -> Result<Value>;
}

/// The rules of one kind. Objects are trees with `kind` and `apiVersion` in the storage version of the kind.
#[async_trait]
pub trait Strategy: Send + Sync + 'static {
    /// Fills in what the client left out. Idempotent; runs on every object that comes from outside.
    fn default(&self, _obj: &mut Value) {}

    /// Drops what a client may not set at creation.
    fn prepare_for_create(&self, _cx: &Cx<'_>, obj: &mut Value) {
        generic_prepare_for_create(obj);
    }

    /// Rules of the kind; those of `metadata` are already checked.
    fn validate_create(&self, _cx: &Cx<'_>, _obj: &Value) -> Vec<FieldError> {
        vec![]
    }

    /// Takes over from `old` what this way of updating may not change, and bumps `metadata.generation`.
    fn prepare_for_update(&self, _cx: &Cx<'_>, obj: &mut Value, old: &Value) {
        generic_prepare_for_update(obj, old);
    }

    fn validate_update(&self, _cx: &Cx<'_>, _obj: &Value, _old: &Value) -> Vec<FieldError> {
        vec![]
    }

    /// Side effects before the write, e.g. an address is allocated. May fill in the object.
    async fn begin_create(&self, _cx: &Cx<'_>, _obj: &mut Value) -> Result<Undo> {
        Ok(Undo::none())
    }

    async fn begin_update(&self, _cx: &Cx<'_>, _obj: &mut Value, _old: &Value) -> Result<Undo> {
        Ok(Undo::none())
    }

    /// After an update is stored: gives back what `old` had and the object has no longer.
    async fn after_update(&self, _cx: &Cx<'_>, _obj: &Value, _old: &Value) {}

    /// After the object is gone from the store; `obj` is its last state.
    async fn after_delete(&self, _cx: &Cx<'_>, _obj: &Value) {}

    fn name_rule(&self) -> NameRule {
        NameRule::Dns1123Subdomain
    }

    /// Whether a PUT to a name that does not exist creates it.
    fn allow_create_on_update(&self) -> bool {
        false
    }

    /// Whether an update may leave out `metadata.resourceVersion`.
    fn allow_unconditional_update(&self) -> bool {
        true
    }

    /// What happens to dependents when the client does not say.
    fn default_propagation(&self) -> Propagation {
        Propagation::Background
    }

    /// `Some(seconds)` for kinds that are deleted gracefully; `Some(0)` deletes at once.
    fn graceful_deletion(&self, _obj: &Value, _options: &DeleteOptions) -> Option<i64> {
        None
    }

    /// Whether a deletion with other finalizers than the garbage collector's must still run here, e.g. namespaces
    /// (`spec.finalizers`): `true` keeps the object.
    fn keeps_on_delete(&self, _obj: &Value) -> bool {
        false
    }

    /// Kinds whose objects upstream marks as being deleted by hand: with a time and nothing else.
    fn marked_by_time_alone(&self, _old: &Value) -> bool {
        false
    }

    /// Changes an object that has just been marked as being deleted (namespaces: `status.phase`).
    fn on_marked_deleted(&self, _obj: &mut Value) {}

    /// Dotted paths that field selectors may use beside `metadata.name` and `metadata.namespace`.
    fn selectable_fields(&self) -> &'static [&'static str] {
        &[]
    }

    /// The value of a selectable field where it is not simply the scalar at its path (e.g. `spec.unschedulable`
    /// is `false` when absent).
    fn selectable_default(&self, _field: &str) -> &'static str {
        ""
    }

    /// Selectable fields whose names are not their paths in the stored object, each with the paths to look at.
    fn selectable_aliases(&self) -> Aliases {
        &[]
    }

    /// The name that the stored form has for a selectable field of the served one; `None` when it has none.
    fn stored_field<'f>(&self, field: &'f str) -> Option<&'f str> {
        Some(field)
    }

    /// Paths of selectable fields whose watchers are indexed, e.g. `spec.nodeName` of pods.
    fn indexed_field(&self) -> Option<&'static str> {
        None
    }

    fn columns(&self) -> &'static [Column] {
        const COLUMNS: &[Column] = &[Column::name(), Column::new("Created At", "date")];
        COLUMNS
    }

    /// The columns as a `Table` declares them, where they are not known to the program: custom resources.
    fn custom_columns(&self, _api_version: &str) -> Option<Vec<Value>> {
        None
    }

    /// The cells of one object, as many as `columns()`.
    fn row(&self, obj: &Value, _now: jiff::Timestamp) -> Vec<Value> {
        vec![obj.name().into(), obj.str_at(&["metadata", "creationTimestamp"]).into()]
    }

    /// What every client of the resource is told, whatever it asks.
    fn deprecation(&self) -> Option<&'static str> {
        None
    }

    /// Texts for `Warning` headers.
    fn warnings(&self, _cx: &Cx<'_>, _obj: &Value, _old: Option<&Value>) -> Vec<String> {
        vec![]
    }

    /// Texts for `Warning` headers of a deletion.
    fn delete_warnings(&self, _options: &DeleteOptions) -> Vec<String> {
        vec![]
    }

    /// `None`: the kind has no such subresource beyond what the discovery facts say (there `status` is generic).
    fn subresource(&self, name: &str) -> Option<Subresource> {
        (name == "status").then_some(Subresource::Update(&GENERIC_STATUS))
    }

    /// Paths that server-side apply and managed fields leave out for this way of writing, in dotted form.
    fn reset_fields(&self) -> &'static [&'static [&'static str]] {
        &[&["status"]]
    }

    /// From the version of the request to the version of the storage, for groups with several versions.
    fn to_storage(&self, _version: &str, obj: Value) -> Result<Value> {
        Ok(obj)
    }

    /// From the version of the storage to `version`.
    #[allow(clippy::wrong_self_convention, reason = "the opposite of to_storage, of the object, not of self")]
    fn from_storage(&self, _version: &str, obj: Value) -> Result<Value> {
        Ok(obj)
    }

    /// The same for many objects.
    fn all_from_storage(&self, version: &str, objects: Vec<Value>) -> Result<Vec<Value>> {
        objects.into_iter().map(|obj| self.from_storage(version, obj)).collect()
    }

    /// How long the store keeps the object.
    fn ttl(&self, _server: &Server, _obj: &Value) -> Option<Duration> {
        None
    }

    /// Kinds whose objects are made when somebody reads them (component statuses): `handle` with the verb `list`
    /// answers `{"items": […]}`.
    fn answers_read(&self) -> Option<&'static dyn SubresourceHandler> {
        None
    }

    /// Kinds that exist only as an answer to a create (access reviews): they are never stored.
    fn answers_create(&self) -> Option<&'static dyn SubresourceHandler> {
        None
    }
}

/// Spec and status apart, generation counted: right for a kind that has no rules of its own.
pub struct Generic;

#[async_trait]
impl Strategy for Generic {}

pub static GENERIC: Generic = Generic;

/// Writes of `status`: everything else stays as it is stored, but for managed fields.
pub struct GenericStatus;

pub static GENERIC_STATUS: GenericStatus = GenericStatus;

#[async_trait]
impl Strategy for GenericStatus {
    fn prepare_for_update(&self, _cx: &Cx<'_>, obj: &mut Value, old: &Value) {
        prepare_for_status_update(obj, old);
    }

    fn reset_fields(&self) -> &'static [&'static [&'static str]] {
        &[&["spec"]]
    }
}

/// No status from clients; the first generation, where the kind has a spec.
pub fn generic_prepare_for_create(obj: &mut Value) {
    if let Some(map) = obj.as_object_mut() {
        map.remove("status");
        if map.contains_key("spec") {
            obj.metadata_mut().insert("generation".into(), 1.into());
        }
    }
}

/// Status stays; a changed spec is a new generation.
pub fn generic_prepare_for_update(obj: &mut Value, old: &Value) {
    keep(obj, old, "status");
    if obj.get("spec") != old.get("spec") {
        let generation = old.i64_at(&["metadata", "generation"]).unwrap_or(0) + 1;
        obj.metadata_mut().insert("generation".into(), generation.into());
    }
}

/// Keeps all of `old` but `status` and the managed fields of `obj`.
pub fn prepare_for_status_update(obj: &mut Value, old: &Value) {
    let status = obj.get("status").cloned();
    let managed = obj.at(&["metadata", "managedFields"]).cloned();
    let version = obj.at(&["metadata", "resourceVersion"]).cloned();
    *obj = old.clone();
    if let Some(map) = obj.as_object_mut() {
        match status {
            Some(status) => map.insert("status".into(), status),
            None => map.remove("status"),
        };
    }
    for (name, value) in [("managedFields", managed), ("resourceVersion", version)] {
        match value {
            Some(value) => obj.metadata_mut().insert(name.into(), value),
            None => obj.metadata_mut().remove(name),
        };
    }
}

/// Makes the top-level `field` of `obj` what it is in `old`.
pub fn keep(obj: &mut Value, old: &Value, field: &str) {
    if let Some(map) = obj.as_object_mut() {
        match old.get(field) {
            Some(value) => map.insert(field.to_owned(), value.clone()),
            None => map.remove(field),
        };
    }
}

/// For `Custom` subresources: the verb is not one that the subresource has.
pub fn unsupported_verb(resource: &apimachinery::meta::GroupResource, verb: &str) -> Status {
    Status::method_not_supported(resource, verb)
}
