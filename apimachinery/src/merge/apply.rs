//! Server-side apply: merging an applied configuration into an object while remembering who owns which field, and the
//! same bookkeeping for plain creates, updates and patches.
//!
//! Values of managers at another API version of the kind are read as if the paths were those of this version.

use std::borrow::Cow;
use std::sync::LazyLock;

use jiff::Timestamp;
use serde_json::{Map, Value};

use super::fields::{FieldSet, FieldsError};
use super::managed::{self, Entry, Operation};
use super::typed::{self, TypedError};
use crate::codec::{DecodeError, Decoded, complete, conform, is_complete};
use crate::schema::Schema;
use crate::status::{Cause, Details, Status};

const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// Who makes a change.
#[derive(Clone, Copy, Debug)]
pub struct Manager<'a> {
    /// The field manager; empty counts as `unknown`.
    pub name: &'a str,
    /// The version the request speaks, e.g. `apps/v1`.
    pub api_version: &'a str,
    /// Empty for the object itself.
    pub subresource: &'a str,
    pub time: Timestamp,
}

impl Manager<'_> {
    fn entry(&self, operation: Operation, fields: FieldSet) -> Entry {
        Entry {
            manager: if self.name.is_empty() { "unknown".into() } else { self.name.to_owned() },
            operation,
            api_version: self.api_version.to_owned(),
            subresource: self.subresource.to_owned(),
            // Upstream translates the owners of a scale's fields to those of its object and loses the time on the way.
            time: (self.subresource != "scale").then(|| self.time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()),
            fields,
        }
    }
}

/// Why a configuration was not applied.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    #[error("{}", conflict_message(.0))]
    Conflicts(Vec<Conflict>),
    #[error("Incorrect version specified in apply patch. Specified patch version: {given}, expected: {expected}")]
    Version { given: String, expected: String },
    #[error("metadata.managedFields must be nil")]
    ManagedFieldsGiven,
    #[error("failed to create typed patch object ({object}): {error}")]
    Config {
        /// `namespace/name; group/version, Kind=kind`
        object: String,
        #[source]
        error: TypedError,
    },
    #[error("failed to decode managed fields: {0}")]
    ManagedFields(#[source] FieldsError),
    #[error("failed to convert new typed object to object: {0}")]
    Merged(#[source] DecodeError),
}

/// A field that another manager owns with another value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conflict {
    /// As messages name it: `"kubectl" using apps/v1`.
    pub manager: String,
    /// `.spec.replicas`
    pub path: String,
}

fn conflict_message(conflicts: &[Conflict]) -> String {
    if let [one] = conflicts {
        return format!("Apply failed with 1 conflict: conflict with {}: {}", one.manager, one.path);
    }
    let mut managers: Vec<&str> = conflicts.iter().map(|c| c.manager.as_str()).collect();
    managers.sort_unstable();
    managers.dedup();
    let mut lines = Vec::new();
    for manager in managers {
        lines.push(format!("conflicts with {manager}:"));
        lines.extend(conflicts.iter().filter(|c| c.manager == manager).map(|c| format!("- {}", c.path)));
    }
    format!("Apply failed with {} conflicts: {}", conflicts.len(), lines.join("\n"))
}

impl From<ApplyError> for Status {
    fn from(error: ApplyError) -> Self {
        let message = error.to_string();
        match error {
            ApplyError::Conflicts(conflicts) => {
                let mut status = Self::failure(409, "Conflict", message);
                let cause = |c: Conflict| Cause {
                    reason: "FieldManagerConflict".into(),
                    message: format!("conflict with {}", c.manager),
                    field: c.path,
                };
                let causes = conflicts.into_iter().map(cause).collect();
                status.details = Some(Box::new(Details { causes, ..Details::default() }));
                status
            }
            ApplyError::Version { .. } | ApplyError::ManagedFieldsGiven => Self::bad_request(message),
            ApplyError::Config { .. } | ApplyError::ManagedFields(_) | ApplyError::Merged(_) => {
                Self::failure(500, "", message)
            }
        }
    }
}

/// Fields that nobody owns.
static BOOKKEEPING: LazyLock<FieldSet> = LazyLock::new(|| {
    let mut set = FieldSet::default();
    for path in [&["apiVersion"][..], &["kind"], &["metadata"]] {
        set.insert_fields(path);
    }
    for name in [
        "name",
        "namespace",
        "creationTimestamp",
        "selfLink",
        "uid",
        "clusterName",
        "generation",
        "managedFields",
        "resourceVersion",
    ] {
        set.insert_fields(&["metadata", name]);
    }
    set
});

/// The set of the given dotted paths (`status`, `metadata.deletionTimestamp`), as a kind's strategy declares them.
fn ignored_set(ignored: &[&[&str]]) -> FieldSet {
    let mut set = FieldSet::default();
    for path in ignored {
        set.insert_fields(path);
    }
    set
}

/// Applies `config`, an object of the given kind as the client wrote it (`yaml::parse`, not `yaml::decode`, so that
/// `false` and `0` stay owned), to `live`, and returns the merged object with new `metadata.managedFields`. Built-in
/// kinds come back in the form that decoding gives; defaulting, `codec::complete` and validation follow. `ignored` are
/// the paths that this request cannot change (the strategy's reset fields); nobody becomes their owner.
///
/// When the configuration changes nothing, the result equals `live` but for managed fields.
pub fn apply(
    schema: &Schema,
    live: Option<&Value>,
    config: &Value,
    manager: &Manager<'_>,
    force: bool,
    ignored: &[&[&str]],
) -> Result<Value, ApplyError> {
    let given = config.get("apiVersion").and_then(Value::as_str).unwrap_or_default();
    if given != manager.api_version {
        return Err(ApplyError::Version { given: given.to_owned(), expected: manager.api_version.to_owned() });
    }
    if config.pointer("/metadata/managedFields").is_some_and(|m| !m.is_null()) {
        return Err(ApplyError::ManagedFieldsGiven);
    }
    typed::validate(schema, config).map_err(|error| ApplyError::Config { object: describe(config), error })?;
    let mut base = live.cloned().unwrap_or_else(|| Value::Object(Map::new()));
    let mut entries = managed::read(managed::take(&mut base)).map_err(ApplyError::ManagedFields)?;
    complete(&mut base, schema);
    let ignored = ignored_set(ignored);
    if entries.is_empty() && live.is_some() {
        let first = Manager { name: "before-first-apply", ..*manager };
        entries = track(schema, &base_of(schema, None), &base, entries, &first, &ignored);
    }
    let applier = Applier { schema, manager, ignored: &ignored };
    let (mut merged, entries) = match applier.apply(&base, config, entries.clone(), force) {
        Err(ApplyError::Conflicts(conflicts)) if may_take_over(schema, &base, manager, &conflicts) => {
            applier.apply(&base, config, entries, true)?
        }
        other => other?,
    };
    if manager.name == "kubectl" {
        refresh_last_applied(&mut merged, config);
    }
    managed::write(&mut merged, entries);
    if schema.custom {
        return Ok(merged);
    }
    let mut decoded = Decoded { value: merged, strict_errors: Vec::new() };
    conform(&mut decoded, schema).map_err(ApplyError::Merged)?;
    Ok(decoded.value)
}

/// The object that a change starts from, with everything that is always printed, as upstream compares it: a new
/// `spec.replicas` is owned, the `spec` around it is not. What was stored is like that already.
fn base_of<'a>(schema: &Schema, live: Option<&'a Value>) -> Cow<'a, Value> {
    match live {
        Some(live) if is_complete(live, schema) => Cow::Borrowed(live),
        live => {
            let mut base = live.cloned().unwrap_or_else(|| Value::Object(Map::new()));
            complete(&mut base, schema);
            Cow::Owned(base)
        }
    }
}

/// An object as upstream names it in messages.
fn describe(object: &Value) -> String {
    let text = |pointer: &str| object.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
    let api_version = text("/apiVersion");
    let core = if api_version.contains('/') { "" } else { "/" };
    let (namespace, name) = (text("/metadata/namespace"), text("/metadata/name"));
    format!("{namespace}/{name}; {core}{api_version}, Kind={}", text("/kind"))
}

struct Applier<'a> {
    schema: &'a Schema,
    manager: &'a Manager<'a>,
    ignored: &'a FieldSet,
}

impl Applier<'_> {
    fn apply(
        &self,
        live: &Value,
        config: &Value,
        mut entries: Vec<Entry>,
        force: bool,
    ) -> Result<(Value, Vec<Entry>), ApplyError> {
        let merged = typed::merge(self.schema, live, config);
        let mut fields = typed::field_set(self.schema, config);
        fields.discard(self.ignored);
        let mut own = self.manager.entry(Operation::Apply, fields);
        let last = entries.iter().position(|e| e.is_same_manager(&own)).map(|i| entries.remove(i));
        let merged = match &last {
            // Whoever applies all that he applied before lets nothing go.
            Some(last) if !last.fields.is_subset(&own.fields) => self.prune(&merged, &entries, &own, &last.fields),
            _ => merged,
        };
        let mut comparison = typed::compare(self.schema, live, &merged);
        comparison.discard(self.ignored);
        take_from_others(&mut entries, &comparison, force)?;
        if merged == *live {
            own.time = last.and_then(|l| l.time);
        }
        own.fields.subtract(&BOOKKEEPING);
        if !own.fields.is_empty() {
            entries.push(own);
        }
        Ok((merged, entries))
    }

    /// Removes what this manager applied before and no longer does, unless somebody else owns it.
    fn prune(&self, merged: &Value, others: &[Entry], own: &Entry, last: &FieldSet) -> Value {
        let named = |set: &FieldSet| set.with_named_fields(self.schema);
        let set_of = |value: &Value| named(&typed::field_set(self.schema, value));
        let cut =
            |paths: &FieldSet| typed::remove(self.schema, merged, paths).unwrap_or_else(|| Value::Object(Map::new()));
        let last = named(last);
        let all = set_of(merged);
        // First everything that was applied goes, then what is owned comes back, then what was never applied but went
        // along with a removed parent.
        let mut owned = own.fields.clone();
        others.iter().for_each(|e| owned.union(e.fields.clone()));
        let mut kept = set_of(&cut(&last));
        kept.union(named(&owned));
        let with_owned = cut(&all.difference(&kept));
        let dangling = all.difference(&set_of(&with_owned)).intersection(&last);
        cut(&dangling)
    }
}

/// Takes changed fields from the other managers, or says who objects.
fn take_from_others(entries: &mut Vec<Entry>, comparison: &typed::Comparison, force: bool) -> Result<(), ApplyError> {
    if !force {
        let mut changed = comparison.modified.clone();
        changed.union(comparison.added.clone());
        let mut conflicts = Vec::new();
        for entry in entries.iter() {
            let paths = entry.fields.intersection(&changed).paths();
            conflicts.extend(paths.into_iter().map(|path| Conflict { manager: entry.to_string(), path }));
        }
        if !conflicts.is_empty() {
            return Err(ApplyError::Conflicts(conflicts));
        }
    }
    for entry in entries.iter_mut() {
        for set in [&comparison.modified, &comparison.added, &comparison.removed] {
            entry.fields.subtract(set);
        }
    }
    entries.retain(|entry| !entry.fields.is_empty());
    Ok(())
}

/// Whether the conflicts are only about fields that `kubectl apply` set on the client's side and nobody changed since:
/// kubectl may then move to server-side apply without force.
fn may_take_over(schema: &Schema, live: &Value, manager: &Manager<'_>, conflicts: &[Conflict]) -> bool {
    if manager.name != "kubectl" {
        return false;
    }
    let annotation = live.pointer("/metadata/annotations").and_then(|a| a.get(LAST_APPLIED)).and_then(Value::as_str);
    let Some(last) = annotation.and_then(|text| serde_json::from_str::<Value>(text).ok()) else { return false };
    let comparison = typed::compare(schema, live, &last);
    let unchanged = typed::field_set(schema, &last)
        .difference(&comparison.modified)
        .difference(&comparison.added)
        .difference(&comparison.removed)
        .paths();
    conflicts.iter().all(|conflict| unchanged.contains(&conflict.path))
}

/// Keeps kubectl's annotation in step, so that it can go back to client-side apply.
fn refresh_last_applied(merged: &mut Value, config: &Value) {
    let Some(Value::Object(annotations)) = merged.pointer_mut("/metadata/annotations") else { return };
    let Some(Value::String(annotation)) = annotations.get_mut(LAST_APPLIED) else { return };
    if annotation.is_empty() {
        return;
    }
    let mut config = config.clone();
    if let Some(Value::Object(annotations)) = config.pointer_mut("/metadata/annotations") {
        annotations.remove(LAST_APPLIED);
    }
    *annotation = format!("{config}\n");
}

/// Records a create (`old` is `None`), update or patch in the managed fields of `new`, which is completed
/// (`codec::complete`) on the way. Managed fields that the request
/// itself carries replace the recorded ones, unless it is about a subresource; an empty list forgets them all.
///
/// A decode error of recorded managed fields forgets them, as upstream does.
pub fn update_managed_fields(
    schema: &Schema,
    old: Option<&Value>,
    new: &mut Value,
    manager: &Manager<'_>,
    ignored: &[&[&str]],
) {
    let given = managed::take(new);
    let entries = if !manager.subresource.is_empty() {
        recorded(old, given)
    } else if managed::is_reset(&given) {
        Vec::new()
    } else {
        managed::read(given).ok().filter(|entries| !entries.is_empty()).unwrap_or_else(|| recorded(old, Value::Null))
    };
    // An object that exists without managed fields is not tracked until somebody applies to it.
    if entries.is_empty() && old.is_some() {
        return;
    }
    complete(new, schema);
    let entries = track(schema, &base_of(schema, old), new, entries, manager, &ignored_set(ignored));
    managed::write(new, entries);
}

/// The entries of the present object. `copy` is what was found in the new one: mostly the same, and then it is used up
/// instead of copying them once more.
fn recorded(old: Option<&Value>, copy: Value) -> Vec<Entry> {
    let Some(entries) = old.map(managed::of) else { return Vec::new() };
    let entries = if *entries == copy { copy } else { entries.clone() };
    managed::read(entries).unwrap_or_default()
}

/// Who owns what after a change from `old` to `new`; that `new` has no managed fields at the moment says nothing.
fn track(
    schema: &Schema,
    old: &Value,
    new: &Value,
    mut entries: Vec<Entry>,
    manager: &Manager<'_>,
    ignored: &FieldSet,
) -> Vec<Entry> {
    let mut comparison = typed::compare(schema, old, new);
    comparison.discard(ignored);
    if take_from_others(&mut entries, &comparison, true).is_err() {
        // Only an unforced change can conflict.
        return entries;
    }
    let mut fields = comparison.modified;
    fields.union(comparison.added);
    fields.subtract(&BOOKKEEPING);
    let mut own = manager.entry(Operation::Update, fields);
    if !own.fields.is_empty() {
        if let Some(index) = entries.iter().position(|e| e.is_same_manager(&own)) {
            own.fields.union(entries.remove(index).fields);
        }
        entries.push(own);
    }
    managed::cap(&mut entries);
    entries
}

#[cfg(test)]
mod tests;
