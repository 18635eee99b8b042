//! `Event`: something that happened, kept for an hour. The core form is stored; `events.k8s.io` is a view of it with
//! other names for some fields.

use std::time::Duration;

use apimachinery::status::{FieldError, Result};
use jiff::Timestamp;
use serde_json::{Map, Value};

use crate::cache::stored::Aliases;
use crate::registry::object::ObjectExt;
use crate::registry::strategy::{Column, Cx, NameRule, Strategy};
use crate::registry::tables::{UNKNOWN, name, scalar, since, text};
use crate::registry::validation;
use crate::server::Server;

/// As the core group serves it, and as it is stored.
pub struct Event;

/// As `events.k8s.io` serves it.
pub struct NewerEvent;

const COLUMNS: &[Column] = &[
    Column::new("Last Seen", "string"),
    Column::new("Type", "string"),
    Column::new("Reason", "string"),
    Column::new("Object", "string"),
    Column::new("Subobject", "string").wide(),
    Column::new("Source", "string").wide(),
    Column::new("Message", "string"),
    Column::new("First Seen", "string").wide(),
    Column::new("Count", "string").wide(),
    Column { priority: 1, ..Column::name() },
];

/// The names of the same fields in the core group and in `events.k8s.io`.
const RENAMED: [(&str, &str); 7] = [
    ("involvedObject", "regarding"),
    ("message", "note"),
    ("reportingComponent", "reportingController"),
    ("source", "deprecatedSource"),
    ("firstTimestamp", "deprecatedFirstTimestamp"),
    ("lastTimestamp", "deprecatedLastTimestamp"),
    ("count", "deprecatedCount"),
];

/// Who reported an event, to field selectors of the core group.
const ALIASES: Aliases = &[("source", &["source.component", "reportingComponent"])];

/// What field selectors of `events.k8s.io` say, and the name of the same field in the core group.
const NEWER_FIELDS: [(&str, &str); 10] = [
    ("regarding.kind", "involvedObject.kind"),
    ("regarding.namespace", "involvedObject.namespace"),
    ("regarding.name", "involvedObject.name"),
    ("regarding.uid", "involvedObject.uid"),
    ("regarding.apiVersion", "involvedObject.apiVersion"),
    ("regarding.resourceVersion", "involvedObject.resourceVersion"),
    ("regarding.fieldPath", "involvedObject.fieldPath"),
    ("reportingController", "reportingComponent"),
    ("reason", "reason"),
    ("type", "type"),
];

const GROUP_VERSION: &str = "events.k8s.io/v1";

fn rename(obj: Value, from_to: impl Fn(&str) -> Option<&'static str>, api_version: &str) -> Value {
    let Value::Object(fields) = obj else { return obj };
    let renamed = fields.into_iter().map(|(key, value)| match from_to(&key) {
        Some(new) => (new.to_owned(), value),
        None if key == "apiVersion" => (key, api_version.into()),
        None => (key, value),
    });
    Value::Object(renamed.collect::<Map<_, _>>())
}

/// From `events.k8s.io` to the core form; the core form passes.
pub fn to_core(obj: Value) -> Value {
    if obj["apiVersion"] != GROUP_VERSION {
        return obj;
    }
    rename(obj, |key| RENAMED.iter().find(|(_, new)| *new == key).map(|(old, _)| *old), "v1")
}

/// From the core form to `events.k8s.io`.
pub fn from_core(obj: Value) -> Value {
    if obj["apiVersion"] == GROUP_VERSION {
        return obj;
    }
    rename(obj, |key| RENAMED.iter().find(|(old, _)| *old == key).map(|(_, new)| *new), GROUP_VERSION)
}

fn source(event: &Value) -> String {
    let first = |a: &[&str], b: &[&str]| match event.str_at(a) {
        "" => event.str_at(b).to_owned(),
        text => text.to_owned(),
    };
    let component = first(&["source", "component"], &["reportingComponent"]);
    match first(&["source", "host"], &["reportingInstance"]) {
        host if host.is_empty() => component,
        host => format!("{component}, {host}"),
    }
}

impl Strategy for Event {
    fn prepare_for_create(&self, _cx: &Cx<'_>, _obj: &mut Value) {}

    fn prepare_for_update(&self, _cx: &Cx<'_>, _obj: &mut Value, _old: &Value) {}

    fn validate_create(&self, _cx: &Cx<'_>, obj: &Value) -> Vec<FieldError> {
        validation::event::event(obj)
    }

    fn validate_update(&self, _cx: &Cx<'_>, obj: &Value, _old: &Value) -> Vec<FieldError> {
        validation::event::event(obj)
    }

    /// What was good enough once is good enough still.
    fn name_rule(&self) -> NameRule {
        NameRule::PathSegment
    }

    fn allow_create_on_update(&self) -> bool {
        true
    }

    fn selectable_fields(&self) -> &'static [&'static str] {
        &[
            "involvedObject.kind",
            "involvedObject.namespace",
            "involvedObject.name",
            "involvedObject.uid",
            "involvedObject.apiVersion",
            "involvedObject.resourceVersion",
            "involvedObject.fieldPath",
            "reason",
            "reportingComponent",
            "source",
            "type",
        ]
    }

    fn selectable_aliases(&self) -> Aliases {
        ALIASES
    }

    fn columns(&self) -> &'static [Column] {
        COLUMNS
    }

    fn row(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        let first = match since(&obj["firstTimestamp"], now) {
            none if none == UNKNOWN => since(&obj["eventTime"], now),
            first => first,
        };
        let mut last = match since(&obj["lastTimestamp"], now) {
            none if none == UNKNOWN => first.clone(),
            last => last,
        };
        // An event of the newer form counts its repetitions in a series, and is one when it has none.
        let mut count = obj["count"].as_i64().filter(|n| *n != 0).unwrap_or(1);
        if obj["series"].is_object() {
            last = since(&obj["series"]["lastObservedTime"], now);
            count = obj["series"]["count"].as_i64().unwrap_or(0);
        }
        let kind = obj.str_at(&["involvedObject", "kind"]).to_lowercase();
        let object = match scalar(&obj["involvedObject"]["name"]) {
            name if name.is_empty() => kind,
            name => format!("{kind}/{name}"),
        };
        vec![
            last.into(),
            text(obj, &["type"]),
            text(obj, &["reason"]),
            object.into(),
            text(obj, &["involvedObject", "fieldPath"]),
            source(obj).into(),
            obj.str_at(&["message"]).trim().into(),
            first.into(),
            count.into(),
            name(obj),
        ]
    }

    fn reset_fields(&self) -> &'static [&'static [&'static str]] {
        &[]
    }

    fn ttl(&self, server: &Server, _obj: &Value) -> Option<Duration> {
        Some(server.config.event_ttl)
    }
}

impl Strategy for NewerEvent {
    fn prepare_for_create(&self, _cx: &Cx<'_>, _obj: &mut Value) {}

    fn prepare_for_update(&self, _cx: &Cx<'_>, _obj: &mut Value, _old: &Value) {}

    fn validate_create(&self, _cx: &Cx<'_>, obj: &Value) -> Vec<FieldError> {
        validation::event::newer_event(obj)
    }

    fn validate_update(&self, _cx: &Cx<'_>, obj: &Value, old: &Value) -> Vec<FieldError> {
        validation::event::newer_event_update(obj, old)
    }

    fn allow_create_on_update(&self) -> bool {
        true
    }

    fn selectable_fields(&self) -> &'static [&'static str] {
        Event.selectable_fields()
    }

    fn selectable_aliases(&self) -> Aliases {
        Event.selectable_aliases()
    }

    fn stored_field<'f>(&self, field: &'f str) -> Option<&'f str> {
        NEWER_FIELDS.iter().find(|(newer, _)| *newer == field).map(|(_, core)| *core)
    }

    fn columns(&self) -> &'static [Column] {
        COLUMNS
    }

    fn row(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        Event.row(&to_core(obj.clone()), now)
    }

    fn reset_fields(&self) -> &'static [&'static [&'static str]] {
        &[]
    }

    fn to_storage(&self, _version: &str, obj: Value) -> Result<Value> {
        Ok(to_core(obj))
    }

    fn from_storage(&self, _version: &str, obj: Value) -> Result<Value> {
        Ok(from_core(obj))
    }

    fn ttl(&self, server: &Server, obj: &Value) -> Option<Duration> {
        Event.ttl(server, obj)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn both_groups_say_the_same() {
        let newer = json!({"apiVersion": "events.k8s.io/v1", "kind": "Event", "note": "hi", "regarding": {"name": "a"},
            "reportingController": "c", "reason": "r"});
        let core = json!({"apiVersion": "v1", "kind": "Event", "message": "hi", "involvedObject": {"name": "a"},
            "reportingComponent": "c", "reason": "r"});
        assert_eq!(to_core(newer.clone()), core);
        assert_eq!(to_core(core.clone()), core);
        assert_eq!(from_core(core), newer);
    }

    #[test]
    fn selectors_of_both_groups_name_stored_fields() {
        for (_, core) in NEWER_FIELDS {
            assert!(Event.selectable_fields().contains(&core), "{core}");
        }
        assert_eq!(NewerEvent.stored_field("reportingController"), Some("reportingComponent"));
        assert_eq!(NewerEvent.stored_field("source"), None);
        assert_eq!(Event.stored_field("source"), Some("source"));
    }

    #[test]
    fn repetitions_and_sources_are_shown() {
        let now: Timestamp = "2026-01-01T00:10:00Z".parse().unwrap();
        let event = json!({"metadata": {"name": "e"}, "type": "Warning", "reason": "BackOff", "message": " no \n",
            "involvedObject": {"kind": "Pod", "name": "web", "fieldPath": "spec"}, "source": {"component": "kubelet", "host": "n1"},
            "firstTimestamp": "2026-01-01T00:00:00Z", "lastTimestamp": "2026-01-01T00:09:30Z", "count": 4});
        let expected = json!(["30s", "Warning", "BackOff", "pod/web", "spec", "kubelet, n1", "no", "10m", 4, "e"]);
        assert_eq!(json!(Event.row(&event, now)), expected);
    }
}
