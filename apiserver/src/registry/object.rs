//! Reading and writing API objects as trees. Paths are slices of keys; nothing here panics on a tree of another shape:
//! readers answer with nothing, writers replace what is not an object.

use apimachinery::meta::GroupVersionKind;
use serde_json::{Map, Value};

/// What code that works on objects says over and over.
pub trait ObjectExt {
    fn at(&self, path: &[&str]) -> Option<&Value>;
    /// `""` when absent or not a string.
    fn str_at(&self, path: &[&str]) -> &str;
    fn i64_at(&self, path: &[&str]) -> Option<i64>;
    fn bool_at(&self, path: &[&str]) -> Option<bool>;
    /// Empty when absent or not a list.
    fn list_at(&self, path: &[&str]) -> &[Value];
    fn map_at(&self, path: &[&str]) -> Option<&Map<String, Value>>;
    fn at_mut(&mut self, path: &[&str]) -> Option<&mut Value>;
    fn list_at_mut(&mut self, path: &[&str]) -> Option<&mut Vec<Value>>;
    /// Makes objects of everything along the path.
    fn ensure_object(&mut self, path: &[&str]) -> &mut Map<String, Value>;
    /// Sets the value, making objects along the path.
    fn set(&mut self, path: &[&str], value: impl Into<Value>);
    /// Sets the value when it is absent or null.
    fn set_default(&mut self, path: &[&str], value: impl Into<Value>);
    /// Takes the value out.
    fn remove_at(&mut self, path: &[&str]) -> Option<Value>;

    fn metadata_mut(&mut self) -> &mut Map<String, Value> {
        self.ensure_object(&["metadata"])
    }
    fn name(&self) -> &str {
        self.str_at(&["metadata", "name"])
    }
    fn namespace(&self) -> &str {
        self.str_at(&["metadata", "namespace"])
    }
    fn uid(&self) -> &str {
        self.str_at(&["metadata", "uid"])
    }
    fn resource_version(&self) -> &str {
        self.str_at(&["metadata", "resourceVersion"])
    }
    fn kind(&self) -> &str {
        self.str_at(&["kind"])
    }
    fn api_version(&self) -> &str {
        self.str_at(&["apiVersion"])
    }
    fn labels(&self) -> Option<&Map<String, Value>> {
        self.map_at(&["metadata", "labels"])
    }
    fn annotations(&self) -> Option<&Map<String, Value>> {
        self.map_at(&["metadata", "annotations"])
    }
    fn label(&self, name: &str) -> Option<&str> {
        self.labels().and_then(|labels| labels.get(name)).and_then(Value::as_str)
    }
    fn annotation(&self, name: &str) -> Option<&str> {
        self.annotations().and_then(|annotations| annotations.get(name)).and_then(Value::as_str)
    }
    fn finalizers(&self) -> Vec<&str> {
        self.list_at(&["metadata", "finalizers"]).iter().filter_map(Value::as_str).collect()
    }
    fn is_being_deleted(&self) -> bool {
        self.at(&["metadata", "deletionTimestamp"]).is_some_and(|v| !v.is_null())
    }
    /// Writes `kind` and `apiVersion`.
    fn set_gvk(&mut self, gvk: &GroupVersionKind) {
        self.set(&["kind"], gvk.kind.as_ref());
        self.set(&["apiVersion"], gvk.api_version());
    }
}

impl ObjectExt for Value {
    fn at(&self, path: &[&str]) -> Option<&Value> {
        path.iter().try_fold(self, |value, key| value.as_object()?.get(*key))
    }

    fn str_at(&self, path: &[&str]) -> &str {
        self.at(path).and_then(Value::as_str).unwrap_or_default()
    }

    fn i64_at(&self, path: &[&str]) -> Option<i64> {
        self.at(path).and_then(Value::as_i64)
    }

    fn bool_at(&self, path: &[&str]) -> Option<bool> {
        self.at(path).and_then(Value::as_bool)
    }

    fn list_at(&self, path: &[&str]) -> &[Value] {
        self.at(path).and_then(Value::as_array).map_or(&[], Vec::as_slice)
    }

    fn map_at(&self, path: &[&str]) -> Option<&Map<String, Value>> {
        self.at(path).and_then(Value::as_object)
    }

    fn at_mut(&mut self, path: &[&str]) -> Option<&mut Value> {
        path.iter().try_fold(self, |value, key| value.as_object_mut()?.get_mut(*key))
    }

    fn list_at_mut(&mut self, path: &[&str]) -> Option<&mut Vec<Value>> {
        self.at_mut(path).and_then(Value::as_array_mut)
    }

    fn ensure_object(&mut self, path: &[&str]) -> &mut Map<String, Value> {
        let mut map = object_of(self);
        for key in path {
            map = object_of(map.entry(*key).or_insert_with(|| Value::Object(Map::new())));
        }
        map
    }

    fn set(&mut self, path: &[&str], value: impl Into<Value>) {
        match path {
            [] => *self = value.into(),
            [parents @ .., last] => {
                self.ensure_object(parents).insert((*last).to_owned(), value.into());
            }
        }
    }

    fn set_default(&mut self, path: &[&str], value: impl Into<Value>) {
        if self.at(path).is_none_or(Value::is_null) {
            self.set(path, value);
        }
    }

    fn remove_at(&mut self, path: &[&str]) -> Option<Value> {
        let (last, parents) = path.split_last()?;
        self.at_mut(parents)?.as_object_mut()?.remove(*last)
    }
}

fn object_of(value: &mut Value) -> &mut Map<String, Value> {
    if !value.is_object() {
        *value = Value::Object(Map::new());
    }
    match value {
        Value::Object(map) => map,
        _ => unreachable!("made an object just above"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn paths_read_and_write() {
        let mut obj = json!({"metadata": {"name": "a"}, "spec": null});
        assert_eq!(obj.name(), "a");
        assert_eq!(obj.str_at(&["spec", "x"]), "");
        obj.set_default(&["spec", "replicas"], 1);
        obj.set_default(&["spec", "replicas"], 2);
        assert_eq!(obj.i64_at(&["spec", "replicas"]), Some(1));
        assert_eq!(obj.remove_at(&["spec", "replicas"]), Some(json!(1)));
        obj.set(&["metadata", "name", "x"], "y");
        assert_eq!(obj.str_at(&["metadata", "name", "x"]), "y");
    }
}
