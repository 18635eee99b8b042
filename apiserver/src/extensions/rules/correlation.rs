//! Which part of the stored object a part of the new one was before. Rules about changes compare the two, and what did
//! not change is let pass although newer rules forbid it.

use serde_json::Value;

use crate::registry::object::ObjectExt;

/// A value with the one that it replaces.
#[derive(Clone, Copy)]
pub struct Pair<'a> {
    new: &'a Value,
    old: &'a Value,
    schema: &'a Value,
}

impl<'a> Pair<'a> {
    pub fn new(new: &'a Value, old: &'a Value, schema: &'a Value) -> Self {
        Self { new, old, schema }
    }

    fn key(self, name: &str) -> Option<Self> {
        let (new, old) = (self.new.as_object()?.get(name)?, self.old.as_object()?.get(name)?);
        let schema = self.schema["properties"].get(name).unwrap_or(&self.schema["additionalProperties"]);
        schema.is_object().then_some(Self { new, old, schema })
    }

    fn index(self, index: usize) -> Option<Self> {
        let new = self.new.as_array()?.get(index)?;
        let old = same_item(self.schema, new, self.old.as_array()?)?;
        Some(Self { new, old, schema: &self.schema["items"] })
    }

    /// Whether nothing changed; the order of lists that are maps does not matter.
    pub fn is_unchanged(self) -> bool {
        match (self.new, self.old) {
            (Value::Array(new), Value::Array(old)) if is_map_list(self.schema) => {
                new.len() == old.len() && (0..new.len()).all(|at| self.index(at).is_some_and(Self::is_unchanged))
            }
            (Value::Object(new), Value::Object(old)) => {
                let is_same = |name: &String| match self.key(name) {
                    Some(pair) => pair.is_unchanged(),
                    None => old.get(name).is_some_and(|old| Some(old) == new.get(name)),
                };
                new.len() == old.len() && new.keys().all(is_same)
            }
            (new, old) => new == old,
        }
    }
}

fn is_map_list(schema: &Value) -> bool {
    schema.str_at(&["x-kubernetes-list-type"]) == "map"
}

/// The item that an item of a list with keys replaces.
pub fn same_item<'a>(schema: &Value, item: &Value, old: &'a [Value]) -> Option<&'a Value> {
    let keys = schema.list_at(&["x-kubernetes-list-map-keys"]);
    if !is_map_list(schema) || keys.is_empty() {
        return None;
    }
    let has_keys_of = |old: &&Value| keys.iter().filter_map(Value::as_str).all(|key| old.get(key) == item.get(key));
    old.iter().find(has_keys_of)
}

/// What is known on the way down.
#[derive(Clone, Copy, Default)]
pub struct Correlation<'a> {
    current: Option<Pair<'a>>,
    /// The nearest part around that has a counterpart.
    around: Option<Pair<'a>>,
}

impl<'a> Correlation<'a> {
    pub fn root(pair: Option<Pair<'a>>) -> Self {
        Self { current: pair, around: None }
    }

    pub fn key(self, name: &str) -> Self {
        match self.current {
            None => self,
            // Both versions of the object were converted to the same one.
            Some(_) if self.around.is_none() && matches!(name, "apiVersion" | "kind") => Self::default(),
            Some(pair) => Self { current: pair.key(name), around: Some(pair) },
        }
    }

    pub fn index(self, index: usize) -> Self {
        self.current.map_or(self, |pair| Self { current: pair.index(index), around: Some(pair) })
    }

    /// Whether this part, or one that it belongs to, did not change.
    pub fn is_unchanged(self) -> bool {
        self.current.or(self.around).is_some_and(Pair::is_unchanged)
    }
}
