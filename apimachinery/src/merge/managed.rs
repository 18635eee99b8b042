//! `metadata.managedFields`: reading it, writing it in upstream's order, and keeping it short.

use std::fmt;

use jiff::Timestamp;
use serde_json::{Map, Value, json};

use super::fields::{FieldSet, FieldsError};

/// More managers of plain updates than this are folded into one.
pub const MAX_UPDATE_MANAGERS: usize = 10;
const ANCIENT: &str = "ancient-changes";

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Operation {
    Apply,
    Update,
}

impl Operation {
    fn name(self) -> &'static str {
        match self {
            Self::Apply => "Apply",
            Self::Update => "Update",
        }
    }
}

/// One manager and the fields it owns.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    pub manager: String,
    pub operation: Operation,
    pub api_version: String,
    pub subresource: String,
    pub time: Option<String>,
    pub fields: FieldSet,
}

impl Entry {
    /// Whether both are the same manager. An applier stays itself when it moves to another API version.
    pub fn is_same_manager(&self, other: &Self) -> bool {
        self.manager == other.manager
            && self.operation == other.operation
            && self.subresource == other.subresource
            && (self.operation == Operation::Apply || self.api_version == other.api_version)
    }

    fn seconds(&self) -> i64 {
        self.time.as_deref().and_then(|t| t.parse::<Timestamp>().ok()).map_or(0, |t| t.as_second())
    }

    fn from_json(mut value: Value) -> Result<Self, FieldsError> {
        let mut text = |name: &str| match value.get_mut(name).map(Value::take) {
            Some(Value::String(text)) => text,
            _ => String::new(),
        };
        let operation = match text("operation").as_str() {
            "Apply" => Operation::Apply,
            "Update" => Operation::Update,
            other => return Err(FieldsError::Step(other.to_owned())),
        };
        let time = Some(text("time")).filter(|t| !t.is_empty());
        let (manager, api_version, subresource) = (text("manager"), text("apiVersion"), text("subresource"));
        let fields = value.get_mut("fieldsV1").map(Value::take).filter(|v| !v.is_null());
        let fields = fields.map(FieldSet::from_json).transpose()?.unwrap_or_default();
        Ok(Self { manager, operation, api_version, subresource, time, fields })
    }

    fn into_json(self) -> Value {
        let mut map = Map::new();
        if !self.manager.is_empty() {
            map.insert("manager".into(), json!(self.manager));
        }
        map.insert("operation".into(), json!(self.operation.name()));
        map.insert("apiVersion".into(), json!(self.api_version));
        if let Some(time) = &self.time {
            map.insert("time".into(), json!(time));
        }
        map.insert("fieldsType".into(), json!("FieldsV1"));
        map.insert("fieldsV1".into(), self.fields.into_json());
        if !self.subresource.is_empty() {
            map.insert("subresource".into(), json!(self.subresource));
        }
        Value::Object(map)
    }
}

/// As conflict messages name a manager: `"kubectl" using apps/v1`.
impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.manager)?;
        if !self.subresource.is_empty() {
            write!(f, " with subresource {:?}", self.subresource)?;
        }
        if self.operation == Operation::Update {
            write!(f, " using {}", self.api_version)?;
        }
        Ok(())
    }
}

/// Takes the entries out of an object, as they are written.
pub fn take(object: &mut Value) -> Value {
    let metadata = object.get_mut("metadata").and_then(Value::as_object_mut);
    metadata.and_then(|metadata| metadata.remove("managedFields")).unwrap_or_default()
}

/// The entries of an object, as they are written.
pub fn of(object: &Value) -> &Value {
    object.pointer("/metadata/managedFields").unwrap_or(&Value::Null)
}

/// Reads what `take` or `of` has found.
pub fn read(entries: Value) -> Result<Vec<Entry>, FieldsError> {
    let Value::Array(entries) = entries else { return Ok(Vec::new()) };
    entries.into_iter().map(Entry::from_json).collect()
}

/// Whether a client asks to forget all managers: an empty list, or one empty entry.
pub fn is_reset(entries: &Value) -> bool {
    match entries.as_array().map(Vec::as_slice) {
        Some([]) => true,
        Some([one]) => one.as_object().is_some_and(Map::is_empty),
        _ => false,
    }
}

/// Writes the entries into an object, sorted as upstream sorts them; none removes the field.
pub fn write(object: &mut Value, mut entries: Vec<Entry>) {
    take(object);
    entries.sort_by(|a, b| {
        let order = a.operation.cmp(&b.operation).then(a.seconds().cmp(&b.seconds()));
        order
            .then_with(|| a.manager.cmp(&b.manager))
            .then_with(|| a.api_version.cmp(&b.api_version))
            .then_with(|| a.subresource.cmp(&b.subresource))
    });
    let entries: Vec<Value> = entries.into_iter().map(Entry::into_json).collect();
    if let (false, Some(Value::Object(metadata))) = (entries.is_empty(), object.get_mut("metadata")) {
        metadata.insert("managedFields".into(), Value::Array(entries));
    }
}

/// Folds the oldest managers of updates of one API version into one until few enough are left.
pub fn cap(entries: &mut Vec<Entry>) {
    let mut updates: Vec<usize> = (0..entries.len()).filter(|i| entries[*i].operation == Operation::Update).collect();
    let mut count = updates.len();
    updates.sort_by_key(|i| (entries[*i].seconds(), entries[*i].manager.clone(), entries[*i].api_version.clone()));
    let mut buckets: Vec<Entry> = Vec::new();
    let mut folded: Vec<usize> = Vec::new();
    for (position, index) in updates.iter().enumerate() {
        if count <= MAX_UPDATE_MANAGERS {
            break;
        }
        let entry = entries[*index].clone();
        if let Some(bucket) = buckets.iter_mut().find(|b| b.api_version == entry.api_version) {
            bucket.fields.union(entry.fields);
            bucket.time = entry.time;
            count -= 1;
        } else {
            // The first of its version only becomes a bucket when a second one follows.
            let follows = updates[position + 1..].iter().any(|i| entries[*i].api_version == entry.api_version);
            if !follows {
                continue;
            }
            buckets.push(Entry { manager: ANCIENT.into(), subresource: String::new(), ..entry });
        }
        folded.push(*index);
    }
    let mut index = 0;
    entries.retain(|_| {
        index += 1;
        !folded.contains(&(index - 1))
    });
    for bucket in buckets {
        match entries.iter_mut().find(|e| e.is_same_manager(&bucket)) {
            Some(existing) => existing.fields.union(bucket.fields),
            None => entries.push(bucket),
        }
    }
}
