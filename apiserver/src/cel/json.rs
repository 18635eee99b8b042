//! Objects as values of expressions, and back. Whole numbers are signed: the API has no others, and arithmetic of the
//! language does not mix signs.

use std::collections::HashMap;
use std::sync::Arc;

use cel::Value;
use cel::objects::{Key, Map};

pub fn from_json(value: &serde_json::Value) -> Value {
    match value {
        serde_json::Value::Null => Value::Null,
        serde_json::Value::Bool(value) => Value::Bool(*value),
        serde_json::Value::Number(number) => match number.as_i64() {
            Some(whole) => Value::Int(whole),
            None => Value::Float(number.as_f64().unwrap_or(f64::NAN)),
        },
        serde_json::Value::String(text) => Value::String(Arc::new(text.clone())),
        serde_json::Value::Array(items) => Value::List(Arc::new(items.iter().map(from_json).collect())),
        serde_json::Value::Object(members) => {
            let map: HashMap<Key, Value> =
                members.iter().map(|(key, value)| (Key::String(Arc::new(key.clone())), from_json(value))).collect();
            Value::Map(Map { map: Arc::new(map) })
        }
    }
}

/// `None`: the value has no form in JSON, as a type or a function.
pub fn to_json(value: &Value) -> Option<serde_json::Value> {
    value.json().ok()
}
