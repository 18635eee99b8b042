//! What a controller wants done: data only. Plans are compared in tests and executed by the executor; nothing here
//! talks to anybody.

use std::time::Duration;

use k8s_openapi::api::core::v1::ObjectReference;
use kube::Resource;
use serde::Serialize;
use serde_json::{Value, json};

use super::events::{EventRecord, EventType};
use super::executor::WriteError;
use super::key::ObjectKey;
use super::rest::ResourceId;

/// Further writes when one of the plan's writes has failed, such as a condition that tells the user why.
pub type OnFailure = Box<dyn FnOnce(&WriteError) -> Vec<Write> + Send>;

/// Everything that follows from one look at the state.
#[derive(Default)]
pub struct Plan {
    /// Executed in order; neighbours that create (or delete) the same kind go out together, in growing batches. The
    /// first failure ends the plan, and the key is tried again later.
    pub writes: Vec<Write>,
    pub events: Vec<EventRecord>,
    /// Look at the key again after this time even if nothing changes.
    pub again_after: Option<Duration>,
    pub on_failure: Option<OnFailure>,
}

impl Plan {
    pub fn nothing() -> Self {
        Self::default()
    }

    pub fn write(write: Write) -> Self {
        Self { writes: vec![write], ..Self::default() }
    }

    pub fn push(&mut self, write: Write) -> &mut Self {
        self.writes.push(write);
        self
    }

    /// Asks for another look at the key after the time; the earlier of two wishes counts.
    pub fn again_after(&mut self, after: Duration) -> &mut Self {
        self.again_after = Some(self.again_after.map_or(after, |earlier| earlier.min(after)));
        self
    }

    pub fn event(&mut self, on: ObjectReference, type_: EventType, reason: &str, message: String) -> &mut Self {
        self.events.push(EventRecord::new(on, type_, reason, message));
        self
    }

    pub fn is_empty(&self) -> bool {
        self.writes.is_empty() && self.events.is_empty() && self.again_after.is_none()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Propagation {
    Background,
    Foreground,
    Orphan,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Verb {
    Create,
    /// Replaces the object (or its subresource); the body's resourceVersion is the precondition.
    Update,
    /// A merge patch made by reading (unless the object it was made on is given) and replacing the object: the roles
    /// of upstream's controllers let most of them update what they look after, and not patch it.
    Amend(Option<Value>),
    MergePatch,
    JsonPatch,
    StrategicMergePatch,
    Delete,
}

/// Events about a write, recorded on the object that wanted it. `{}` in a message stands for the written object's name,
/// or for the error.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    pub on: ObjectReference,
    pub done: (&'static str, String),
    pub failed: (&'static str, String),
}

/// One request.
#[derive(Clone, Debug, PartialEq)]
pub struct Write {
    pub verb: Verb,
    pub resource: ResourceId,
    pub namespace: String,
    /// Empty when creating under a generated name.
    pub name: String,
    pub subresource: &'static str,
    /// The object, the patch or the DeleteOptions.
    pub body: Value,
    /// The uid of the object to delete, which the informer must see gone.
    pub uid: Option<String>,
    /// A creation that finds the object there already has succeeded.
    pub if_absent: bool,
    pub report: Option<Report>,
}

impl Write {
    fn new<K: Resource<DynamicType = ()>>(verb: Verb, key: ObjectKey, body: Value) -> Self {
        Self {
            verb,
            resource: ResourceId::of::<K>(),
            namespace: key.namespace,
            name: key.name,
            subresource: "",
            body,
            uid: None,
            if_absent: false,
            report: None,
        }
    }

    pub fn create<K: Resource<DynamicType = ()> + Serialize>(object: &K) -> Self {
        Self::new::<K>(Verb::Create, ObjectKey::of(object.meta()), tree(object))
    }

    pub fn update<K: Resource<DynamicType = ()> + Serialize>(object: &K) -> Self {
        Self::new::<K>(Verb::Update, ObjectKey::of(object.meta()), tree(object))
    }

    pub fn update_status<K: Resource<DynamicType = ()> + Serialize>(object: &K) -> Self {
        Self::update(object).on_subresource("status")
    }

    /// Changes exactly what differs between the two statuses of one object; nothing when nothing differs. Pods and
    /// nodes, whose statuses several write, are patched; others replaced, as long as they are still what they were.
    pub fn status<K: Resource<DynamicType = ()> + Serialize>(old: &K, new: &K) -> Option<Self> {
        let (old_tree, new_tree) = (tree(old), tree(new));
        let none = json!({});
        let status = difference(old_tree.get("status").unwrap_or(&none), new_tree.get("status").unwrap_or(&none))?;
        let patch = json!({"metadata": {"uid": old.meta().uid}, "status": status});
        let many_write_it = matches!(K::kind(&()).as_ref(), "Pod" | "Node");
        let verb = if many_write_it { Verb::MergePatch } else { Verb::Amend(Some(old_tree)) };
        Some(Self::new::<K>(verb, ObjectKey::of(old.meta()), patch).on_subresource("status"))
    }

    /// A merge patch for those who may update an object of the kind, but not patch it.
    pub fn amend<K: Resource<DynamicType = ()>>(key: ObjectKey, patch: Value) -> Self {
        Self::new::<K>(Verb::Amend(None), key, patch)
    }

    pub fn merge_patch<K: Resource<DynamicType = ()>>(key: ObjectKey, patch: Value) -> Self {
        Self::new::<K>(Verb::MergePatch, key, patch)
    }

    pub fn strategic_patch<K: Resource<DynamicType = ()>>(key: ObjectKey, patch: Value) -> Self {
        Self::new::<K>(Verb::StrategicMergePatch, key, patch)
    }

    pub fn json_patch<K: Resource<DynamicType = ()>>(key: ObjectKey, patch: Value) -> Self {
        Self::new::<K>(Verb::JsonPatch, key, patch)
    }

    /// Deletes exactly this object: another one of the same name stays.
    pub fn delete<K: Resource<DynamicType = ()>>(object: &K) -> Self {
        let meta = object.meta();
        let body = json!({"kind": "DeleteOptions", "apiVersion": "v1", "preconditions": {"uid": meta.uid}});
        let mut write = Self::new::<K>(Verb::Delete, ObjectKey::of(meta), body);
        write.uid.clone_from(&meta.uid);
        write
    }

    #[must_use]
    pub fn on_subresource(mut self, subresource: &'static str) -> Self {
        self.subresource = subresource;
        self
    }

    #[must_use]
    pub fn if_absent(mut self) -> Self {
        self.if_absent = true;
        self
    }

    /// How a deletion treats dependents.
    #[must_use]
    pub fn propagation(mut self, propagation: Propagation) -> Self {
        self.body["propagationPolicy"] = json!(match propagation {
            Propagation::Background => "Background",
            Propagation::Foreground => "Foreground",
            Propagation::Orphan => "Orphan",
        });
        self
    }

    /// How long a deleted pod may take, in seconds.
    #[must_use]
    pub fn grace_period(mut self, seconds: i64) -> Self {
        self.body["gracePeriodSeconds"] = json!(seconds);
        self
    }

    /// The deletion fails if the object has changed since.
    #[must_use]
    pub fn at_version(mut self, resource_version: Option<&str>) -> Self {
        if let Some(version) = resource_version {
            self.body["preconditions"]["resourceVersion"] = json!(version);
        }
        self
    }

    #[must_use]
    pub fn report(mut self, report: Report) -> Self {
        self.report = Some(report);
        self
    }

    pub fn path(&self) -> String {
        let name = if self.verb == Verb::Create && self.subresource.is_empty() { "" } else { &self.name };
        self.resource.path(&self.namespace, name, self.subresource)
    }
}

impl Report {
    pub(super) fn event(&self, result: Result<&str, &str>) -> EventRecord {
        let ((reason, message), type_, text) = match result {
            Ok(name) => (&self.done, EventType::Normal, name),
            Err(error) => (&self.failed, EventType::Warning, error),
        };
        EventRecord::new(self.on.clone(), type_, reason, message.replace("{}", text))
    }
}

/// The merge patch from one tree to another; none when they are equal. Lists are replaced whole.
fn difference(old: &Value, new: &Value) -> Option<Value> {
    let (Value::Object(old_map), Value::Object(new_map)) = (old, new) else {
        return (old != new).then(|| new.clone());
    };
    let mut patch = serde_json::Map::new();
    for key in old_map.keys().filter(|key| !new_map.contains_key(*key)) {
        patch.insert(key.clone(), Value::Null);
    }
    for (key, value) in new_map {
        match old_map.get(key) {
            Some(old) => patch.extend(difference(old, value).map(|change| (key.clone(), change))),
            None => {
                patch.insert(key.clone(), value.clone());
            }
        }
    }
    (!patch.is_empty()).then_some(Value::Object(patch))
}

fn tree<K: Resource<DynamicType = ()> + Serialize>(object: &K) -> Value {
    let mut value = serde_json::to_value(object).expect("API types serialize to JSON: their maps have string keys");
    value["apiVersion"] = json!(K::api_version(&()));
    value["kind"] = json!(K::kind(&()));
    value
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::Namespace;

    #[test]
    fn a_status_patch_holds_only_differences() {
        let namespace = |status: Value| -> Namespace {
            serde_json::from_value(json!({"metadata": {"name": "a", "uid": "u"}, "status": status})).unwrap()
        };
        let old = namespace(json!({"phase": "Active", "conditions": [{"type": "X", "status": "True"}]}));
        let new = namespace(json!({"phase": "Terminating"}));
        let patch = Write::status(&old, &new).unwrap();
        assert_eq!(patch.body["status"], json!({"phase": "Terminating", "conditions": null}));
        assert_eq!(patch.path(), "/api/v1/namespaces/a/status");
        assert_eq!(Write::status(&old, &old), None);
    }
}
