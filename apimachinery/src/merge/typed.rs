//! Objects seen through their schema: which fields a configuration sets, what differs between two objects, merging a
//! configuration into an object, and removing fields. The rules are those of upstream's structured-merge-diff.

use indexmap::IndexMap;
use serde_json::{Map, Value};

use super::fields::{FieldSet, Node, field_step};
use crate::schema::{ANY, List, ListKind, Object, Opaque, Scalar, Schema, Shape};

/// Why a configuration cannot be applied.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TypedError {
    #[error("{path}: duplicate entries for key {key}")]
    Duplicate { path: String, key: String },
    #[error("{path}: element {index}: associative list with keys may not have {what} element")]
    Element { path: String, index: usize, what: &'static str },
    #[error("{path}: element {index}: associative list with keys has an element that omits all key fields")]
    NoKeys { path: String, index: usize },
    #[error("{path}: element {index}: associative list without keys has an element that's a {what} type")]
    SetElement { path: String, index: usize, what: &'static str },
    #[error("{path}: field not declared in schema")]
    Undeclared { path: String },
    #[error("{path}: expected {expected}, got {got}")]
    Type { path: String, expected: &'static str, got: String },
}

/// How a value is owned.
enum Atom<'s> {
    /// As a whole.
    Leaf,
    /// Field by field; without an object, everything below is untyped.
    Map(Option<&'s Object>, &'s Schema),
    List(&'s List),
}

fn atom<'s>(schema: &'s Schema, value: Option<&Value>) -> Atom<'s> {
    match &schema.shape {
        Shape::Object(object) if !object.atomic => Atom::Map(Some(object), schema),
        Shape::Map(map) if !map.atomic => Atom::Map(None, schema),
        Shape::List(list) if list.kind != ListKind::Atomic => Atom::List(list),
        // What has no schema is owned field by field; its lists are atomic.
        Shape::Opaque(Opaque::Any | Opaque::Json) | Shape::PropsOr(_) => match value {
            Some(Value::Object(_)) => Atom::Map(None, schema),
            _ => Atom::Leaf,
        },
        _ => Atom::Leaf,
    }
}

fn child<'s>(schema: &'s Schema, name: &str) -> &'s Schema {
    schema.child(name).unwrap_or(&ANY)
}

/// The step that identifies a list's item, or why there is none.
fn item_step(list: &List, item: &Value) -> Result<String, &'static str> {
    let ListKind::Map(keys) = &list.kind else {
        return match item {
            Value::Object(_) => Err("map"),
            Value::Array(_) => Err("list"),
            Value::Null => Err("null"),
            scalar => Ok(format!("v:{scalar}")),
        };
    };
    let fields = item.as_object().ok_or(if item.is_null() { "a null" } else { "a non-map" })?;
    let mut id = Map::new();
    for key in keys {
        let default = || list.item.as_object()?.field(key)?.default.as_deref();
        if let Some(value) = fields.get(&**key).or_else(default) {
            id.insert(key.to_string(), value.clone());
        }
    }
    if id.is_empty() { Err("keyless") } else { Ok(format!("k:{}", Value::Object(id))) }
}

fn array(value: Option<&Value>) -> Option<&Vec<Value>> {
    value.and_then(Value::as_array)
}

fn object(value: Option<&Value>) -> Option<&Map<String, Value>> {
    value.and_then(Value::as_object)
}

/// Checks that an applied configuration identifies every list item exactly once and that containers are of their type.
pub fn validate(schema: &Schema, value: &Value) -> Result<(), TypedError> {
    check(schema, value, &mut String::new())
}

fn check(schema: &Schema, value: &Value, path: &mut String) -> Result<(), TypedError> {
    let length = path.len();
    match (&schema.shape, value) {
        (_, Value::Null) => {}
        (Shape::Object(_) | Shape::Map(_), Value::Object(map)) => {
            for (name, value) in map {
                path.push('.');
                path.push_str(name);
                if schema.as_object().is_some_and(|o| !o.preserve_unknown && o.field(name).is_none()) {
                    return Err(TypedError::Undeclared { path: path.clone() });
                }
                check(child(schema, name), value, path)?;
                path.truncate(length);
            }
        }
        (Shape::List(list), Value::Array(items)) => {
            let mut seen = std::collections::BTreeSet::new();
            for (index, item) in items.iter().enumerate() {
                if list.kind != ListKind::Atomic {
                    let step = item_step(list, item).map_err(|what| bad_item(list, path, index, what))?;
                    if !seen.insert(step.clone()) {
                        let mut key = FieldSet::default();
                        key.insert(&[step]);
                        let key = key.paths().pop().unwrap_or_default();
                        return Err(TypedError::Duplicate { path: path.clone(), key });
                    }
                }
                path.push_str(&format!("[{index}]"));
                check(&list.item, item, path)?;
                path.truncate(length);
            }
        }
        (Shape::Object(_) | Shape::Map(_), other) => return Err(wrong_type(path, "map", other)),
        (Shape::List(_), other) => return Err(wrong_type(path, "list", other)),
        (Shape::Scalar(scalar), other) => {
            if let Some(expected) = misfit(*scalar, other) {
                return Err(wrong_type(path, expected, other));
            }
        }
        _ => {}
    }
    Ok(())
}

/// What was expected instead of this value.
fn misfit(scalar: Scalar, value: &Value) -> Option<&'static str> {
    let (fits, expected) = match scalar {
        Scalar::Int32 | Scalar::Int64 | Scalar::Double => (value.is_number(), "numeric (int or float)"),
        Scalar::Bool => (value.is_boolean(), "boolean"),
        Scalar::Quantity | Scalar::IntOrString => (value.is_number() || value.is_string(), "scalar"),
        _ => (value.is_string(), "string"),
    };
    (!fits).then_some(expected)
}

fn wrong_type(path: &str, expected: &'static str, got: &Value) -> TypedError {
    // Numbers are complained about by Go's name of the type that is there, everything else by value.
    let got = match got {
        Value::String(_) if expected.starts_with("numeric") => "string".into(),
        Value::Bool(_) if expected.starts_with("numeric") => "bool".into(),
        Value::Array(_) if expected.starts_with("numeric") => "[]interface {}".into(),
        Value::Object(_) if expected.starts_with("numeric") => "map[string]interface {}".into(),
        other => other.to_string(),
    };
    TypedError::Type { path: path.to_owned(), expected, got }
}

fn bad_item(list: &List, path: &str, index: usize, what: &'static str) -> TypedError {
    let path = path.to_owned();
    match list.kind {
        ListKind::Map(_) if what == "keyless" => TypedError::NoKeys { path, index },
        ListKind::Map(_) => TypedError::Element { path, index, what },
        _ => TypedError::SetElement { path, index, what },
    }
}

/// The fields that an object sets.
pub fn field_set(schema: &Schema, value: &Value) -> FieldSet {
    let mut root = Node::default();
    collect(schema, value, &mut root);
    root.below.trim();
    root.below
}

fn collect(schema: &Schema, value: &Value, node: &mut Node) {
    match atom(schema, Some(value)) {
        Atom::Leaf => node.member = true,
        Atom::Map(declared, schema) => {
            for (name, value) in value.as_object().into_iter().flatten() {
                let below = node.below.node_mut(field_step(name));
                collect(child(schema, name), value, below);
                let empty = value.is_null() || value.as_object().is_some_and(Map::is_empty);
                below.member |= empty || declared.is_none_or(|o| o.field(name).is_none());
            }
        }
        Atom::List(list) => {
            let items = value.as_array().into_iter().flatten();
            let steps: Vec<(String, &Value)> =
                items.filter_map(|item| item_step(list, item).ok().map(|step| (step, item))).collect();
            for (step, item) in &steps {
                let below = node.below.node_mut(step.clone());
                below.member = true;
                // An item that occurs twice is owned as a whole.
                if steps.iter().filter(|(other, _)| other == step).count() == 1 {
                    collect(&list.item, item, below);
                }
            }
        }
    }
}

/// What differs between two objects.
#[derive(Debug, Default)]
pub struct Comparison {
    pub added: FieldSet,
    pub modified: FieldSet,
    pub removed: FieldSet,
}

impl Comparison {
    /// Leaves these paths and what lies below them out.
    pub fn discard(&mut self, ignored: &FieldSet) {
        for set in [&mut self.added, &mut self.modified, &mut self.removed] {
            set.discard(ignored);
        }
    }
}

pub fn compare(schema: &Schema, old: &Value, new: &Value) -> Comparison {
    let mut root = Delta::default();
    diff(schema, Some(old), Some(new), &mut root);
    Comparison { added: root.added.below, modified: root.modified.below, removed: root.removed.below }
}

/// What differs at one path and below it.
#[derive(Default)]
struct Delta {
    added: Node,
    modified: Node,
    removed: Node,
}

impl Delta {
    /// Adds what differs one step further down.
    fn put(&mut self, step: &dyn Fn() -> String, below: Self) {
        for (node, below) in
            [(&mut self.added, below.added), (&mut self.modified, below.modified), (&mut self.removed, below.removed)]
        {
            if !below.is_empty() {
                node.below.put(step(), below);
            }
        }
    }
}

fn diff(schema: &Schema, old: Option<&Value>, new: Option<&Value>, out: &mut Delta) {
    if old == new {
        return; // The most frequent case: whole branches are as they were.
    }
    let is_empty = match (atom(schema, old.filter(|v| !v.is_null()).or(new)), atom(schema, new.or(old))) {
        (Atom::Map(_, schema), Atom::Map(..)) => {
            let (a, b) = (object(old), object(new));
            diff_maps(schema, a, b, out);
            a.is_none_or(Map::is_empty) && b.is_none_or(Map::is_empty)
        }
        (Atom::List(list), Atom::List(_)) => {
            let (a, b) = (array(old), array(new));
            diff_lists(list, a, b, out);
            a.is_none_or(Vec::is_empty) && b.is_none_or(Vec::is_empty)
        }
        _ => true,
    };
    match (old, new) {
        (None, Some(_)) => out.added.member = true,
        (Some(_), None) => out.removed.member = true,
        (Some(_), Some(_)) if is_empty => out.modified.member = true,
        _ => {}
    }
}

fn diff_maps(schema: &Schema, old: Option<&Map<String, Value>>, new: Option<&Map<String, Value>>, out: &mut Delta) {
    let mut visit = |name: &str, a: Option<&Value>, b: Option<&Value>| {
        let mut below = Delta::default();
        diff(child(schema, name), a, b, &mut below);
        out.put(&|| field_step(name), below);
    };
    for (name, value) in old.into_iter().flatten() {
        visit(name, Some(value), new.and_then(|m| m.get(name)));
    }
    for (name, value) in new.into_iter().flatten() {
        if old.is_none_or(|m| !m.contains_key(name)) {
            visit(name, None, Some(value));
        }
    }
}

/// The items of a list by their steps, in order; an item that occurs more than once has several values.
fn indexed<'v>(list: &List, items: Option<&'v Vec<Value>>) -> IndexMap<String, Vec<&'v Value>> {
    let mut out: IndexMap<String, Vec<&Value>> = IndexMap::new();
    for item in items.into_iter().flatten() {
        if let Ok(step) = item_step(list, item) {
            out.entry(step).or_default().push(item);
        }
    }
    out
}

fn diff_lists(list: &List, old: Option<&Vec<Value>>, new: Option<&Vec<Value>>, out: &mut Delta) {
    let (old, new) = (indexed(list, old), indexed(list, new));
    let mut visit = |step: &String, a: &[&Value], b: &[&Value]| {
        let mut below = Delta::default();
        diff_items(list, a, b, &mut below);
        out.put(&|| step.clone(), below);
    };
    for (step, a) in &old {
        visit(step, a, new.get(step).map_or(&[], Vec::as_slice));
    }
    for (step, b) in new.iter().filter(|(step, _)| !old.contains_key(*step)) {
        visit(step, &[], b);
    }
}

/// The items of one step: one on each side, unless the list is wrong.
fn diff_items(list: &List, a: &[&Value], b: &[&Value], out: &mut Delta) {
    let (first, second) = (a.first().copied(), b.first().copied());
    match (a.len(), b.len()) {
        (0 | 1, 0 | 1) => diff(&list.item, first, second, out),
        (2.., 2..) => out.modified.member |= a != b,
        (2.., _) => {
            if b.len() == 1 {
                diff(&list.item, None, second, out);
            }
            out.removed.member = true;
        }
        (_, _) => {
            if a.len() == 1 {
                diff(&list.item, first, None, out);
            }
            out.added.member = true;
        }
    }
}

/// The object with the configuration merged into it: the configuration's values win, what it does not mention stays.
pub fn merge(schema: &Schema, live: &Value, config: &Value) -> Value {
    match (atom(schema, Some(live)), atom(schema, Some(config))) {
        (Atom::Map(_, schema), Atom::Map(..)) => match (live, config) {
            (Value::Object(a), Value::Object(b)) if !a.is_empty() || !b.is_empty() => {
                let only_new = b.iter().filter(|(name, _)| !a.contains_key(*name));
                let kept = a.iter().map(|(name, old)| match b.get(name) {
                    Some(value) => (name.clone(), merge(child(schema, name), old, value)),
                    None => (name.clone(), old.clone()),
                });
                Value::Object(kept.chain(only_new.map(|(name, value)| (name.clone(), value.clone()))).collect())
            }
            (Value::Object(a), Value::Null) if !a.is_empty() => live.clone(),
            _ => config.clone(),
        },
        (Atom::List(list), Atom::List(_)) => match (live, config) {
            (Value::Array(a), Value::Array(b)) if !a.is_empty() || !b.is_empty() => {
                Value::Array(merge_lists(list, a, b))
            }
            (Value::Array(a), Value::Null) if !a.is_empty() => live.clone(),
            _ => config.clone(),
        },
        _ => config.clone(),
    }
}

/// Merges the items; the order is the configuration's, with the live object's other items kept as near as possible to
/// where they were: items only in the live list come before the next item that both have.
fn merge_lists(list: &List, live: &[Value], config: &[Value]) -> Vec<Value> {
    let steps =
        |items: &[Value]| -> Vec<String> { items.iter().map(|i| item_step(list, i).unwrap_or_default()).collect() };
    let (left, right) = (steps(live), steps(config));
    let in_right = |step: &String| right.contains(step);
    let value_at = |step: &String| {
        let mut same = left.iter().zip(live).filter(|(s, _)| *s == step).map(|(_, v)| v);
        // A duplicated item has no value to merge with.
        same.next().filter(|_| same.next().is_none())
    };
    let mut shared = right.iter().filter(|step| left.contains(step));
    let mut next_shared = shared.next();
    let mut done: Vec<&String> = Vec::new();
    let mut out = Vec::with_capacity(live.len().max(config.len()));
    let (mut l, mut r) = (0, 0);
    let merged = |step: &String, item: &Value| match value_at(step) {
        Some(old) => merge(&list.item, old, item),
        None => item.clone(),
    };
    while l < left.len() || r < right.len() {
        if l < left.len() && r < right.len() {
            if left[l] == right[r] {
                out.push(merged(&right[r], &config[r]));
                done.push(&right[r]);
                (l, r) = (l + 1, r + 1);
                next_shared = shared.next();
                continue;
            }
            if in_right(&left[l]) && next_shared.is_some_and(|shared| *shared != left[l]) {
                l += 1;
                continue;
            }
        }
        if l < left.len() {
            if !in_right(&left[l]) {
                out.push(live[l].clone());
                l += 1;
                continue;
            }
            if done.contains(&&left[l]) {
                l += 1;
            }
        }
        if r < right.len() {
            out.push(merged(&right[r], &config[r]));
            done.push(&right[r]);
            if next_shared == Some(&right[r]) {
                next_shared = shared.next();
            }
            r += 1;
        }
    }
    out
}

/// The object without these paths; `None` when nothing is left of it.
pub fn remove(schema: &Schema, value: &Value, paths: &FieldSet) -> Option<Value> {
    match (atom(schema, Some(value)), value) {
        (Atom::Map(_, schema), Value::Object(map)) => {
            let mut out = Map::new();
            for (name, value) in map {
                match paths.node(&field_step(name)) {
                    None => {
                        out.insert(name.clone(), value.clone());
                    }
                    Some(node) if node.member => {}
                    Some(node) => {
                        // What lost all its content stays as null: whoever owns it still does.
                        let rest = remove(child(schema, name), value, &node.below);
                        out.insert(name.clone(), rest.unwrap_or(Value::Null));
                    }
                }
            }
            (!out.is_empty()).then_some(Value::Object(out))
        }
        (Atom::List(list), Value::Array(items)) => {
            let mut out = Vec::new();
            for item in items {
                match item_step(list, item).ok().and_then(|step| paths.node(&step)) {
                    None => out.push(item.clone()),
                    Some(node) if node.member => {}
                    Some(node) => out.extend(remove(&list.item, item, &node.below)),
                }
            }
            (!out.is_empty()).then_some(Value::Array(out))
        }
        _ => Some(value.clone()),
    }
}
