//! Sets of field paths in the form managed fields have on the wire (`FieldsV1`), which is also how they are worked on.
//!
//! ```text
//! {"f:metadata": {"f:labels": {".": {}, "f:app": {}}}, "f:spec": {"f:ports": {"k:{\"port\":80}": {".": {}}}}}
//! ```
//!
//! A step is `f:<field>`, `k:<keys of a list item>`, `v:<value of a set's item>` or `i:<index>`; `.` says that the path
//! itself is in the set and not only paths below it.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde_json::{Map, Value};

use crate::schema::{ANY, Schema};

/// Managed fields nest no deeper than objects do.
const MAX_DEPTH: usize = 128;

/// A set of paths.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FieldSet {
    steps: BTreeMap<String, Node>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Node {
    /// Whether the path that ends here is in the set.
    pub member: bool,
    pub below: FieldSet,
}

impl Node {
    /// Neither a member nor the way to one.
    pub fn is_empty(&self) -> bool {
        !self.member && self.below.is_empty()
    }
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FieldsError {
    #[error("managed fields must be nested objects")]
    NotAnObject,
    #[error("{0:?} is no step of a field path")]
    Step(String),
    #[error("managed fields nest too deeply")]
    TooDeep,
}

pub(super) fn field_step(name: &str) -> String {
    format!("f:{name}")
}

impl FieldSet {
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    pub(super) fn node_mut(&mut self, step: String) -> &mut Node {
        self.steps.entry(step).or_default()
    }

    pub(super) fn node(&self, step: &str) -> Option<&Node> {
        self.steps.get(step)
    }

    /// Adds what lies below a step that is not there yet.
    pub(super) fn put(&mut self, step: String, node: Node) {
        self.steps.insert(step, node);
    }

    /// Drops nodes that neither are members nor lead to any.
    pub(super) fn trim(&mut self) {
        self.steps.retain(|_, node| {
            node.below.trim();
            !node.is_empty()
        });
    }

    pub fn insert(&mut self, path: &[String]) {
        let Some((last, parents)) = path.split_last() else { return };
        let mut set = self;
        for step in parents {
            set = &mut set.node_mut(step.clone()).below;
        }
        set.node_mut(last.clone()).member = true;
    }

    /// Inserts a path of plain fields, e.g. `["metadata", "name"]`.
    pub fn insert_fields(&mut self, path: &[&str]) {
        let steps: Vec<String> = path.iter().map(|name| field_step(name)).collect();
        self.insert(&steps);
    }

    /// Adds the paths of `other`.
    pub fn union(&mut self, other: Self) {
        if self.steps.is_empty() {
            *self = other;
            return;
        }
        for (step, theirs) in other.steps {
            let ours = self.node_mut(step);
            ours.member |= theirs.member;
            ours.below.union(theirs.below);
        }
    }

    /// Whether every path is one of `other`.
    pub fn is_subset(&self, other: &Self) -> bool {
        self.steps.iter().all(|(step, ours)| {
            let theirs = other.steps.get(step);
            theirs.is_some_and(|theirs| (!ours.member || theirs.member) && ours.below.is_subset(&theirs.below))
        })
    }

    /// Removes exactly the paths of `other`, as [`difference`](Self::difference) does, and looks only at those.
    pub fn subtract(&mut self, other: &Self) {
        self.retain_common(other, &mut |ours, theirs| {
            ours.member &= !theirs.member;
            ours.below.subtract(&theirs.below);
        });
    }

    /// Removes the paths of `other` and everything below them.
    pub fn discard(&mut self, other: &Self) {
        self.retain_common(other, &mut |ours, theirs| {
            if theirs.member {
                *ours = Node::default();
            } else {
                ours.below.discard(&theirs.below);
            }
        });
    }

    /// Changes the nodes that `other` has, too, and drops those that are empty then.
    fn retain_common(&mut self, other: &Self, change: &mut dyn FnMut(&mut Node, &Node)) {
        for (step, theirs) in &other.steps {
            if let Some(ours) = self.steps.get_mut(step) {
                change(ours, theirs);
                if ours.is_empty() {
                    self.steps.remove(step);
                }
            }
        }
    }

    /// Removes exactly the paths of `other`; what lies below them stays.
    #[must_use]
    pub fn difference(&self, other: &Self) -> Self {
        self.combine(other, |ours, theirs| ours && !theirs, true)
    }

    #[must_use]
    pub fn intersection(&self, other: &Self) -> Self {
        self.combine(other, |ours, theirs| ours && theirs, false)
    }

    fn combine(&self, other: &Self, keep: fn(bool, bool) -> bool, keep_alone: bool) -> Self {
        let mut steps = BTreeMap::new();
        for (step, ours) in &self.steps {
            let node = match other.steps.get(step) {
                Some(theirs) => Node {
                    member: keep(ours.member, theirs.member),
                    below: ours.below.combine(&theirs.below, keep, keep_alone),
                },
                None if keep_alone => ours.clone(),
                None => continue,
            };
            if !node.is_empty() {
                steps.insert(step.clone(), node);
            }
        }
        Self { steps }
    }

    /// The same set, in which every declared field that leads to a member is a member too.
    pub(super) fn with_named_fields(&self, schema: &Schema) -> Self {
        let mut steps = BTreeMap::new();
        for (step, node) in &self.steps {
            let (declared, child) = match step.strip_prefix("f:") {
                Some(name) => {
                    let declared = schema.as_object().is_some_and(|o| o.field(name).is_some());
                    (declared, schema.child(name).unwrap_or(&ANY))
                }
                None => (false, schema.item().unwrap_or(&ANY)),
            };
            let member = node.member || (declared && !node.below.is_empty());
            steps.insert(step.clone(), Node { member, below: node.below.with_named_fields(child) });
        }
        Self { steps }
    }

    /// Reads a `FieldsV1` value.
    pub fn from_json(value: Value) -> Result<Self, FieldsError> {
        Self::read(value, 0).map(|(_, set)| set)
    }

    fn read(value: Value, depth: usize) -> Result<(bool, Self), FieldsError> {
        if depth > MAX_DEPTH {
            return Err(FieldsError::TooDeep);
        }
        let Value::Object(map) = value else { return Err(FieldsError::NotAnObject) };
        let mut explicit = false;
        let mut steps = BTreeMap::new();
        for (key, value) in map {
            if key == "." {
                explicit = true;
                continue;
            }
            let (itself, below) = Self::read(value, depth + 1)?;
            let node = Node { member: itself || below.is_empty(), below };
            steps.insert(canonical_step(key)?, node);
        }
        Ok((explicit, Self { steps }))
    }

    pub fn into_json(self) -> Value {
        let node = |(step, node): (String, Node)| {
            let is_explicit = node.member && !node.below.is_empty();
            let mut value = node.below.into_json();
            if let (true, Value::Object(below)) = (is_explicit, &mut value) {
                below.insert(".".into(), Value::Object(Map::new()));
            }
            (step, value)
        };
        Value::Object(self.steps.into_iter().map(node).collect())
    }

    /// Every path in the set, as messages print it: `.spec.containers[name="a"].image`.
    pub fn paths(&self) -> Vec<String> {
        let mut out = Vec::new();
        self.collect_paths("", &mut out);
        out
    }

    fn collect_paths(&self, prefix: &str, out: &mut Vec<String>) {
        let order =
            |step: &&String| (["f:", "k:", "v:", "i:"].iter().position(|p| step.starts_with(p)), (*step).clone());
        let mut steps: Vec<&String> = self.steps.keys().collect();
        steps.sort_by_key(order);
        // Members of one level come before what lies below.
        for step in &steps {
            if self.steps[*step].member {
                out.push(format!("{prefix}{}", print_step(step)));
            }
        }
        for step in steps {
            self.steps[step].below.collect_paths(&format!("{prefix}{}", print_step(step)), out);
        }
    }
}

/// Keys and values are compared as text, so they must be written one way only.
fn canonical_step(step: String) -> Result<String, FieldsError> {
    let bad = || FieldsError::Step(step.clone());
    match step.split_at_checked(2).ok_or_else(bad)? {
        ("f:", _) => Ok(step),
        (kind @ ("k:" | "v:"), json) => {
            let value: Value = serde_json::from_str(json).map_err(|_| bad())?;
            Ok(format!("{kind}{value}"))
        }
        ("i:", index) if index.parse::<i64>().is_ok() => Ok(step),
        _ => Err(bad()),
    }
}

fn print_step(step: &str) -> String {
    match step.split_at_checked(2) {
        Some(("f:", name)) => format!(".{name}"),
        Some(("k:", json)) => {
            let keys: Map<String, Value> = serde_json::from_str(json).unwrap_or_default();
            let mut text = String::from("[");
            for (index, (name, value)) in keys.iter().enumerate() {
                let _ = write!(text, "{}{name}={value}", if index == 0 { "" } else { "," });
            }
            text.push(']');
            text
        }
        Some(("v:", value)) => format!("[={value}]"),
        Some((_, index)) => format!("[{index}]"),
        None => step.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn set(value: &Value) -> FieldSet {
        FieldSet::from_json(value.clone()).expect("valid")
    }

    #[test]
    fn wire_form_survives() {
        let value = json!({"f:metadata": {"f:labels": {".": {}, "f:app": {}}},
            "f:spec": {"f:ports": {"k:{\"port\":80,\"protocol\":\"TCP\"}": {".": {}, "f:port": {}}}, "f:x": {"v:\"a\"": {}}}});
        assert_eq!(set(&value).into_json(), value);
        let spaced = json!({"f:spec": {"k:{\"b\": 1, \"a\": 2}": {}}});
        assert_eq!(set(&spaced).into_json(), json!({"f:spec": {"k:{\"a\":2,\"b\":1}": {}}}));
        assert_eq!(set(&value).paths()[0], ".metadata.labels");
        assert!(set(&value).paths().contains(&r#".spec.ports[port=80,protocol="TCP"].port"#.to_owned()));
        assert!(FieldSet::from_json(json!({"x": {}})).is_err());
    }

    #[test]
    fn algebra() {
        let a = set(&json!({"f:a": {".": {}, "f:b": {}}, "f:c": {}}));
        let b = set(&json!({"f:a": {}, "f:d": {}}));
        assert_eq!(a.difference(&b).into_json(), json!({"f:a": {"f:b": {}}, "f:c": {}}));
        let mut subtracted = a.clone();
        subtracted.subtract(&b);
        assert_eq!(subtracted, a.difference(&b));
        let mut discarded = a.clone();
        discarded.discard(&b);
        assert_eq!(discarded.into_json(), json!({"f:c": {}}));
        assert_eq!(a.intersection(&b).into_json(), json!({"f:a": {}}));
        assert!(a.intersection(&b).is_subset(&a) && a.is_subset(&a));
        assert!(!a.is_subset(&b) && !b.is_subset(&a) && !a.is_subset(&a.difference(&b)));
        let mut union = a;
        union.union(b);
        assert_eq!(union.into_json(), json!({"f:a": {".": {}, "f:b": {}}, "f:c": {}, "f:d": {}}));
    }
}
