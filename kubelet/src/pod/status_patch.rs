//! From one status of a pod to the next: the patch that says only what has changed. Pure.

use k8s_openapi::api::core::v1::PodStatus;
use serde_json::{Map, Value, json};

use super::conditions::{BY_KUBELET, RESIZING, is_own};

/// The strategic merge patch that turns `old` into `new`; `None` when they are the same. Conditions that are not the
/// kubelet's are never mentioned, so that no one else's write is lost.
pub fn patch(uid: &str, old: &PodStatus, new: &PodStatus) -> Result<Option<Value>, serde_json::Error> {
    let (Value::Object(old), Value::Object(new)) = (serde_json::to_value(old)?, serde_json::to_value(new)?) else {
        return Ok(None);
    };
    let mut changes = Map::new();
    for (key, value) in &new {
        let before = old.get(key);
        if canonical(before.unwrap_or(&Value::Null)) == canonical(value) {
            continue;
        }
        let change = match key.as_str() {
            "conditions" => changed_conditions(before, value),
            "podIPs" | "hostIPs" => {
                let mut entries = value.as_array().cloned().unwrap_or_default();
                entries.insert(0, json!({"$patch": "replace"}));
                Some(Value::Array(entries))
            }
            _ => Some(value.clone()),
        };
        changes.extend(change.map(|change| (key.clone(), change)));
    }
    // Fields that are another component's are left alone even if this version does not produce them.
    for key in ["podIP", "podIPs", "reason", "message", "initContainerStatuses"] {
        if old.get(key).is_some_and(|old| !canonical(old).is_null()) && !new.contains_key(key) {
            changes.insert(key.to_owned(), Value::Null);
        }
    }
    if changes.is_empty() {
        return Ok(None);
    }
    Ok(Some(json!({"metadata": {"uid": uid}, "status": changes})))
}

/// The value without the parts that say nothing: the server writes `lastState: {}` where others write nothing.
fn canonical(value: &Value) -> Value {
    match value {
        Value::Object(fields) => {
            let full = fields.iter().map(|(key, value)| (key.clone(), canonical(value)));
            let full: Map<String, Value> = full.filter(|(_, value)| !value.is_null()).collect();
            if full.is_empty() { Value::Null } else { Value::Object(full) }
        }
        Value::Array(list) if list.is_empty() => Value::Null,
        Value::Array(list) => Value::Array(list.iter().map(canonical).collect()),
        Value::String(text) if text.is_empty() => Value::Null,
        other => other.clone(),
    }
}

fn is_ours(condition: &Value) -> bool {
    condition["type"].as_str().is_some_and(is_own) || condition["reason"] == BY_KUBELET
}

fn changed_conditions(old: Option<&Value>, new: &Value) -> Option<Value> {
    let old: Vec<Value> = old.and_then(Value::as_array).into_iter().flatten().map(canonical).collect();
    let new = new.as_array()?;
    let is_resizing = |list: &[Value]| list.iter().any(|condition| condition["type"] == RESIZING);
    let mut changed: Vec<Value> = new
        .iter()
        .filter(|condition| is_ours(condition) && !old.contains(&canonical(condition)))
        .map(|condition| {
            let mut condition = condition.clone();
            // A merge keeps what it does not name.
            for key in ["reason", "message"] {
                if condition.get(key).is_none() {
                    condition[key] = Value::Null;
                }
            }
            condition
        })
        .collect();
    if is_resizing(&old) && !is_resizing(new) {
        changed.push(json!({"$patch": "delete", "type": RESIZING}));
    }
    (!changed.is_empty()).then_some(Value::Array(changed))
}
