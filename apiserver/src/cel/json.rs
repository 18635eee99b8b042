//! Objects as values of expressions, and back. Whole numbers are signed: the API has no others, and arithmetic of the
//! language does not mix signs.

use std::collections::HashMap;

use cel::Value;
use cel::common::types::{CelBool, CelDouble, CelInt, CelList, CelMap, CelMapKey, CelNull, CelString};
use cel::common::value::Val;

pub fn from_json(value: &serde_json::Value) -> Box<dyn Val> {
    match value {
        serde_json::Value::Null => Box::new(CelNull),
        serde_json::Value::Bool(value) => Box::new(CelBool::from(*value)),
        serde_json::Value::Number(number) => match number.as_i64() {
            Some(whole) => Box::new(CelInt::from(whole)),
            None => Box::new(CelDouble::from(number.as_f64().unwrap_or(f64::NAN))),
        },
        serde_json::Value::String(text) => Box::new(CelString::from(text.clone())),
        serde_json::Value::Array(items) => Box::new(CelList::from(items.iter().map(from_json).collect::<Vec<_>>())),
        serde_json::Value::Object(members) => map(members.iter().map(|(key, value)| (key.clone(), from_json(value)))),
    }
}

/// A map with these members.
pub fn map(members: impl Iterator<Item = (String, Box<dyn Val>)>) -> Box<dyn Val> {
    let members: HashMap<CelMapKey<'static>, Box<dyn Val>> =
        members.map(|(key, value)| (CelMapKey::from(key), value)).collect();
    Box::new(CelMap::from(members))
}

/// `None`: the value has no form in JSON, as a type or a function.
pub fn to_json(value: &dyn Val) -> Option<serde_json::Value> {
    Value::try_from(value).ok()?.json().ok()
}
