//! Rules for events. The core group only checks what it always has; `events.k8s.io` wants events that say all that
//! newer events say, and lets nobody change what happened.

use apimachinery::meta::validation::is_qualified_name;
use apimachinery::status::FieldError;
use serde_json::{Value, json};

use super::{Errors, IMMUTABLE, Path, complain};
use crate::registry::common::same;
use crate::registry::object::ObjectExt;

/// Fields that stay as they are, in the order and under the names of the stored form; the name that complaints use
/// follows where it is another.
const FROZEN: [(&str, &str); 13] = [
    ("involvedObject", "involvedObject"),
    ("reason", "reason"),
    ("message", "message"),
    ("source", "source"),
    ("firstTimestamp", "firstTimestamp"),
    ("lastTimestamp", "lastTimestamp"),
    ("count", "count"),
    ("type", "type"),
    ("eventTime", "eventTime"),
    ("action", "action"),
    ("related", "related"),
    ("reportingComponent", "reportingController"),
    ("reportingInstance", "reportingInstance"),
];

/// Texts, which are `""` rather than `null` when they are not there.
const TEXTS: [&str; 6] = ["reason", "message", "type", "action", "reportingComponent", "reportingInstance"];

/// Rules of the core group.
pub fn event(obj: &Value) -> Errors {
    legacy(obj, "reportingComponent")
}

/// Rules of `events.k8s.io` for a new event.
pub fn newer_event(obj: &Value) -> Errors {
    let mut errors = legacy(obj, "reportingController");
    series(&obj["series"], &mut errors);
    if obj["eventTime"].is_null() {
        errors.push(FieldError::required("eventTime", ""));
    }
    let kind = obj.str_at(&["type"]);
    if !matches!(kind, "Normal" | "Warning") {
        errors.push(FieldError::invalid("type", "", format!("has invalid value: {kind}")));
    }
    let source = &obj["source"];
    let old_fields = [
        ("firstTimestamp", !obj["firstTimestamp"].is_null()),
        ("lastTimestamp", !obj["lastTimestamp"].is_null()),
        ("count", obj["count"].as_i64().unwrap_or(0) != 0),
        ("source", !source.str_at(&["component"]).is_empty() || !source.str_at(&["host"]).is_empty()),
    ];
    errors.extend(
        old_fields.iter().filter(|(_, set)| *set).map(|(field, _)| FieldError::invalid(field, "", "needs to be unset")),
    );
    errors
}

/// Rules of `events.k8s.io` for a changed event: only its series may go on.
pub fn newer_event_update(obj: &Value, old: &Value) -> Errors {
    let mut errors = legacy(obj, "reportingController");
    if !same(&obj["series"], &old["series"]) {
        series(&obj["series"], &mut errors);
    }
    for (field, shown) in FROZEN {
        if same(&obj[field], &old[field]) {
            continue;
        }
        let value = match &obj[field] {
            Value::Null if TEXTS.contains(&field) => "".into(),
            Value::Null if field == "count" => 0.into(),
            Value::Null if matches!(field, "involvedObject" | "source") => json!({}),
            value => value.clone(),
        };
        errors.push(FieldError::invalid(shown, value, IMMUTABLE));
    }
    errors
}

fn series(series: &Value, errors: &mut Errors) {
    if series.is_null() {
        return;
    }
    if series["count"].as_i64().unwrap_or(0) < 2 {
        errors.push(FieldError::invalid("series.count", "", "should be at least 2"));
    }
    if series["lastObservedTime"].is_null() {
        errors.push(FieldError::required("series.lastObservedTime", ""));
    }
}

fn legacy(obj: &Value, controller: &str) -> Errors {
    const DETAIL: &str = "does not match event.namespace";
    let mut errors = Errors::new();
    let (namespace, involved) = (obj.namespace(), obj.str_at(&["involvedObject", "namespace"]));
    let is_old = obj["eventTime"].is_null();
    let agree = match (is_old, involved) {
        (true, "") => matches!(namespace, "" | "default"),
        (true, involved) => namespace == involved,
        (false, "") => matches!(namespace, "default" | "kube-system"),
        (false, _) => true,
    };
    if !agree {
        errors.push(FieldError::invalid("involvedObject.namespace", involved, DETAIL));
    }
    if !is_old {
        reporter(obj, controller, &mut errors);
    }
    errors
}

/// Events with a time of their own say who reports what.
fn reporter(obj: &Value, controller: &str, errors: &mut Errors) {
    let reporter = obj.str_at(&["reportingComponent"]);
    let path = Path::Root(controller);
    if reporter.is_empty() {
        errors.push(FieldError::required(path, ""));
    }
    complain(is_qualified_name(reporter), reporter, path, errors);
    let limits =
        [("reportingInstance", 128, true), ("action", 128, true), ("reason", 128, true), ("message", 1024, false)];
    for (field, limit, needed) in limits {
        let text = obj.str_at(&[field]);
        if needed && text.is_empty() {
            errors.push(FieldError::required(field, ""));
        }
        if text.len() > limit {
            errors.push(FieldError::invalid(field, "", format!("can have at most {limit} characters")));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::texts;
    use super::*;

    #[test]
    fn events_live_beside_their_object() {
        let event_in = |namespace: &str, involved: &str| {
            event(&json!({"metadata": {"namespace": namespace}, "involvedObject": {"namespace": involved}}))
        };
        assert!(event_in("a", "a").is_empty() && event_in("default", "").is_empty());
        let expected = [r#"involvedObject.namespace: Invalid value: "b": does not match event.namespace"#];
        assert_eq!(texts(&event_in("a", "b")), expected);
    }

    #[test]
    fn what_happened_does_not_change() {
        let old = json!({"metadata": {"namespace": "a"}, "eventTime": "2020-01-01T00:00:00.000000Z", "type": "Warning",
            "reportingComponent": "a/b", "reportingInstance": "i", "action": "A", "reason": "R", "message": "m",
            "involvedObject": {"namespace": "a", "name": "p"}});
        let with = |change: fn(&mut Value)| {
            let mut event = old.clone();
            change(&mut event);
            event
        };
        let cases = [
            (with(|_| {}), vec![]),
            (with(|e| e["message"] = Value::Null), vec![r#"message: Invalid value: "": field is immutable"#]),
            (
                with(|e| e["series"] = json!({"count": 1})),
                vec![
                    r#"series.count: Invalid value: "": should be at least 2"#,
                    "series.lastObservedTime: Required value",
                ],
            ),
            (
                with(|e| e["reportingComponent"] = "c".into()),
                vec![r#"reportingController: Invalid value: "c": field is immutable"#],
            ),
        ];
        for (event, expected) in cases {
            assert_eq!(texts(&newer_event_update(&event, &old)), expected);
        }
        assert_eq!(texts(&newer_event(&old)), Vec::<String>::new());
        let expected = [r#"type: Invalid value: "": has invalid value: X"#];
        assert_eq!(texts(&newer_event(&with(|e| e["type"] = "X".into()))), expected);
    }
}
