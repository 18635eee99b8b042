//! Strategic merge patch: a merge patch that merges lists by the keys the schema names, steered by directives.
//!
//! `$patch: replace|delete|merge` on maps and list items, `$retainKeys`, `$deleteFromPrimitiveList/<field>` and
//! `$setElementOrder/<field>`.

use serde_json::{Map, Value};

use super::PatchError;
use crate::schema::{ANY, Field, PatchStrategy, Schema, Shape};

type Result<T = ()> = std::result::Result<T, PatchError>;

const PATCH: &str = "$patch";
const RETAIN_KEYS: &str = "$retainKeys";
const DELETE_FROM: &str = "$deleteFromPrimitiveList/";
const SET_ORDER: &str = "$setElementOrder/";

/// Applies the patch to an object of the given kind; on an error the object may be half patched.
pub fn strategic(schema: &Schema, doc: &mut Value, patch: &Value) -> Result {
    let Value::Object(patch) = patch else { return Err(shape("", "an object")) };
    let Value::Object(original) = doc else { return Err(shape("", "an object to patch")) };
    merge_map(schema, original, patch.clone())
}

fn shape(path: &str, expected: &'static str) -> PatchError {
    PatchError::Shape { path: path.to_owned(), expected }
}

fn directive(text: impl Into<String>) -> PatchError {
    PatchError::Directive(text.into())
}

/// What is known about a field: its type, how its lists merge and by which key.
struct Known<'s> {
    schema: &'s Schema,
    patch: PatchStrategy,
    merge_key: Option<&'s str>,
}

fn known<'s>(schema: &'s Schema, name: &str) -> Known<'s> {
    match schema.as_object().and_then(|o| o.field(name)) {
        Some(Field { schema, patch, merge_key, .. }) => {
            Known { schema, patch: *patch, merge_key: merge_key.as_deref() }
        }
        None => Known { schema: schema.child(name).unwrap_or(&ANY), patch: PatchStrategy::default(), merge_key: None },
    }
}

fn merge_map(schema: &Schema, original: &mut Map<String, Value>, mut patch: Map<String, Value>) -> Result {
    match patch.remove(PATCH).as_ref().map(Value::as_str) {
        None | Some(Some("merge")) => {}
        Some(Some("replace")) => {
            *original = patch;
            return Ok(());
        }
        Some(Some("delete")) => {
            original.clear();
            return Ok(());
        }
        Some(other) => return Err(directive(format!("Unknown patch type found: {}", other.unwrap_or_default()))),
    }
    retain_keys(original, &mut patch)?;
    delete_from_primitive_lists(original, &mut patch)?;
    let orders: Vec<(String, Value)> = take_prefixed(&mut patch, SET_ORDER);
    let mut servers: Vec<Vec<String>> = Vec::new();
    for (name, _) in &orders {
        let items = original.get(name).and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
        servers.push(ids(items, known(schema, name).merge_key));
    }
    for (name, value) in patch {
        merge_field(schema, original, &name, value)?;
    }
    for ((name, order), server) in orders.into_iter().zip(servers) {
        let Value::Array(order) = order else { return Err(shape(&name, "a list of elements in order")) };
        if let Some(Value::Array(items)) = original.get_mut(&name) {
            let key = known(schema, &name).merge_key;
            set_order(items, &ids(&order, key), &server, key);
        }
    }
    Ok(())
}

/// What identifies the items of a list: the value of the merge key, or the item itself.
fn ids(items: &[Value], merge_key: Option<&str>) -> Vec<String> {
    items.iter().map(|item| id(item, merge_key)).collect()
}

fn id(item: &Value, merge_key: Option<&str>) -> String {
    match (merge_key, item) {
        (Some(key), Value::Object(map)) => map.get(key).map(key_text).unwrap_or_default(),
        _ => key_text(item),
    }
}

/// Removes the directives with this prefix; the rest of their names is the field they are about.
fn take_prefixed(patch: &mut Map<String, Value>, prefix: &str) -> Vec<(String, Value)> {
    let names: Vec<String> = patch.keys().filter(|k| k.starts_with(prefix)).cloned().collect();
    let taken = names.into_iter().filter_map(|name| {
        let value = patch.remove(&name)?;
        Some((name[prefix.len()..].to_owned(), value))
    });
    taken.collect()
}

fn retain_keys(original: &mut Map<String, Value>, patch: &mut Map<String, Value>) -> Result {
    let Some(directive_value) = patch.remove(RETAIN_KEYS) else { return Ok(()) };
    let Value::Array(keys) = directive_value else { return Err(shape(RETAIN_KEYS, "a list of field names")) };
    let retained = |name: &str| keys.iter().any(|k| k == name);
    let is_value = |name: &str| !name.starts_with('$');
    if let Some(name) = patch.iter().find(|(k, v)| is_value(k) && !v.is_null() && !retained(k)).map(|(k, _)| k) {
        return Err(directive(format!("patch contains field {name:?} that is not in its {RETAIN_KEYS} list")));
    }
    original.retain(|name, _| retained(name));
    Ok(())
}

fn delete_from_primitive_lists(original: &mut Map<String, Value>, patch: &mut Map<String, Value>) -> Result {
    for (name, gone) in take_prefixed(patch, DELETE_FROM) {
        let Value::Array(gone) = gone else { return Err(shape(&name, "a list of elements to delete")) };
        if let Some(Value::Array(items)) = original.get_mut(&name) {
            items.retain(|item| !gone.contains(item));
        }
    }
    Ok(())
}

fn merge_field(schema: &Schema, original: &mut Map<String, Value>, name: &str, value: Value) -> Result {
    if value.is_null() {
        original.remove(name);
        return Ok(());
    }
    let known = known(schema, name);
    match (original.get_mut(name), value) {
        (Some(Value::Object(old)), Value::Object(new)) if !known.patch.replace => merge_map(known.schema, old, new),
        (Some(Value::Array(old)), Value::Array(new)) if known.patch.merge => merge_list(&known, name, old, new),
        (_, value) => {
            original.insert(name.to_owned(), without_directives(&known, value)?);
            Ok(())
        }
    }
}

/// A value that meets nothing to merge with: directives take effect on nothing and disappear, nulls remove nothing.
fn without_directives(known: &Known<'_>, value: Value) -> Result<Value> {
    Ok(match value {
        Value::Object(new) => {
            let mut fresh = Map::new();
            merge_map(known.schema, &mut fresh, new)?;
            Value::Object(fresh)
        }
        Value::Array(items) => {
            let item = known.schema.item().unwrap_or(&ANY);
            let about_item = Known { schema: item, patch: PatchStrategy::default(), merge_key: None };
            let is_dropped = |i: &Value| i.get(PATCH).is_some_and(|p| p == "delete" || p == "replace");
            let kept = items.into_iter().filter(|i| !is_dropped(i));
            Value::Array(kept.map(|i| without_directives(&about_item, i)).collect::<Result<_>>()?)
        }
        scalar => scalar,
    })
}

fn merge_list(known: &Known<'_>, name: &str, old: &mut Vec<Value>, new: Vec<Value>) -> Result {
    let server = ids(old, known.merge_key);
    let is_special = |i: &Value| i.get(PATCH).is_some_and(|p| p != "merge");
    let order: Vec<String> = new.iter().filter(|i| !is_special(i)).map(|i| id(i, known.merge_key)).collect();
    let has_objects = new.iter().chain(old.iter()).any(Value::is_object);
    if !has_objects {
        for item in new {
            if !old.contains(&item) {
                old.push(item);
            }
        }
        set_order(old, &order, &server, None);
        return Ok(());
    }
    let Some(key) = known.merge_key else {
        return Err(directive(format!("cannot merge lists without merge key for {name}")));
    };
    let item_schema = known.schema.item().unwrap_or(&ANY);
    let is_replace = |i: &Value| i.get(PATCH).is_some_and(|p| p == "replace");
    if new.iter().any(is_replace) {
        let plain = new.into_iter().filter(|i| i.get(PATCH).is_none()).collect();
        let about = Known { schema: known.schema, patch: PatchStrategy::default(), merge_key: None };
        if let Value::Array(items) = without_directives(&about, Value::Array(plain))? {
            *old = items;
        }
        return Ok(());
    }
    for item in new {
        merge_item(item_schema, key, old, item)?;
    }
    set_order(old, &order, &server, Some(key));
    Ok(())
}

fn merge_item(schema: &Schema, key: &str, old: &mut Vec<Value>, item: Value) -> Result {
    let Value::Object(mut item) = item else { return Err(shape(key, "objects in the list")) };
    let id = item.get(key).filter(|v| !v.is_null()).cloned();
    let Some(id) = id else {
        let element = Value::Object(item).to_string();
        return Err(PatchError::MissingMergeKey { element, key: key.to_owned() });
    };
    let same = |other: &Value| other.get(key).is_some_and(|k| same_key(k, &id));
    match item.get(PATCH).map(Value::as_str) {
        Some(Some("delete")) => {
            old.retain(|other| !same(other));
            return Ok(());
        }
        None | Some(Some("merge")) => {
            item.remove(PATCH);
        }
        Some(other) => return Err(directive(format!("Unknown patch type found: {}", other.unwrap_or_default()))),
    }
    if let Some(Value::Object(existing)) = old.iter_mut().find(|other| same(other)) {
        return merge_map(schema, existing, item);
    }
    let mut fresh = Map::new();
    merge_map(schema, &mut fresh, item)?;
    old.push(Value::Object(fresh));
    Ok(())
}

/// Keys are compared as text: `80` and `"80"` are the same port.
fn same_key(a: &Value, b: &Value) -> bool {
    a == b || key_text(a) == key_text(b)
}

fn key_text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// Brings the elements that the patch lists into its order. The others, which only the server has, keep their place
/// before the elements that they preceded in the server's list; elements new to the server come as early as they can.
fn set_order(items: &mut Vec<Value>, order: &[String], server: &[String], merge_key: Option<&str>) {
    let position = |item: &Value, list: &[String]| {
        let id = id(item, merge_key);
        list.iter().position(|other| *other == id)
    };
    let (mut listed, unlisted): (Vec<Value>, Vec<Value>) =
        std::mem::take(items).into_iter().partition(|item| position(item, order).is_some());
    listed.sort_by_key(|item| position(item, order));
    let (mut listed, mut unlisted) = (listed.into_iter().peekable(), unlisted.into_iter().peekable());
    loop {
        let take_unlisted = match (unlisted.peek(), listed.peek()) {
            (Some(left), Some(right)) => match (position(left, server), position(right, server)) {
                (Some(left), Some(right)) => left < right,
                _ => false,
            },
            (Some(_), None) => true,
            (None, Some(_)) => false,
            (None, None) => return,
        };
        items.extend(if take_unlisted { unlisted.next() } else { listed.next() });
    }
}

/// Whether strategic merge patches make sense for the kind: custom resources have no merge keys.
pub fn supports(schema: &Schema) -> bool {
    matches!(schema.shape, Shape::Object(_)) && !schema.custom
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::schema::builtin;

    fn patched(kind: (&str, &str, &str), mut doc: Value, patch: &Value) -> Result<Value> {
        let schema = builtin().kind_of(kind.0, kind.1, kind.2).expect("known");
        strategic(schema, &mut doc, patch)?;
        Ok(doc)
    }

    const POD: (&str, &str, &str) = ("", "v1", "Pod");

    #[test]
    fn merges_by_key_and_directive() {
        let cases = [
            (
                "merge by name, new items first",
                json!({"spec": {"containers": [{"name": "a", "image": "1", "env": [{"name": "x", "value": "1"}]}]}}),
                json!({"spec": {"containers": [{"name": "a", "env": [{"name": "y", "value": "2"}]}, {"name": "b"}]}}),
                json!({"spec": {"containers": [{"name": "a", "image": "1", "env": [{"name": "y", "value": "2"},
                    {"name": "x", "value": "1"}]}, {"name": "b"}]}}),
            ),
            (
                "the patch's items keep its order",
                json!({"spec": {"containers": [{"name": "a"}]}, "metadata": {"finalizers": ["x", "y"]}}),
                json!({"spec": {"containers": [{"name": "b"}]}, "metadata": {"finalizers": ["z", "x"]}}),
                json!({"spec": {"containers": [{"name": "b"}, {"name": "a"}]}, "metadata": {"finalizers": ["z", "x", "y"]}}),
            ),
            (
                "delete an item",
                json!({"spec": {"containers": [{"name": "a"}, {"name": "b"}]}}),
                json!({"spec": {"containers": [{"name": "a", "$patch": "delete"}]}}),
                json!({"spec": {"containers": [{"name": "b"}]}}),
            ),
            (
                "replace a list",
                json!({"spec": {"containers": [{"name": "a"}, {"name": "b"}]}}),
                json!({"spec": {"containers": [{"$patch": "replace"}, {"name": "c"}]}}),
                json!({"spec": {"containers": [{"name": "c"}]}}),
            ),
            (
                "atomic lists are replaced",
                json!({"spec": {"containers": [{"name": "a", "args": ["1"]}], "tolerations": [{"key": "a"}]}}),
                json!({"spec": {"containers": [{"name": "a", "args": ["2"]}], "tolerations": [{"key": "b"}]}}),
                json!({"spec": {"containers": [{"name": "a", "args": ["2"]}], "tolerations": [{"key": "b"}]}}),
            ),
            (
                "retain keys",
                json!({"spec": {"volumes": [{"name": "v", "emptyDir": {}}]}}),
                json!({"spec": {"volumes": [{"name": "v", "$retainKeys": ["name", "configMap"], "configMap": {"name": "c"}}]}}),
                json!({"spec": {"volumes": [{"name": "v", "configMap": {"name": "c"}}]}}),
            ),
            (
                "primitive lists",
                json!({"metadata": {"finalizers": ["a", "b"]}}),
                json!({"metadata": {"$deleteFromPrimitiveList/finalizers": ["a"], "finalizers": ["c", "b"]}}),
                json!({"metadata": {"finalizers": ["c", "b"]}}),
            ),
            (
                "order",
                json!({"spec": {"containers": [{"name": "a"}, {"name": "s"}, {"name": "b"}]}}),
                json!({"spec": {"$setElementOrder/containers": [{"name": "c"}, {"name": "b"}, {"name": "a"}],
                    "containers": [{"name": "c"}]}}),
                json!({"spec": {"containers": [{"name": "c"}, {"name": "s"}, {"name": "b"}, {"name": "a"}]}}),
            ),
            (
                "maps",
                json!({"metadata": {"labels": {"a": "1", "b": "2"}, "annotations": {"x": "y"}}}),
                json!({"metadata": {"labels": {"a": null, "c": "3"}, "annotations": {"$patch": "replace", "z": "w"}}}),
                json!({"metadata": {"labels": {"b": "2", "c": "3"}, "annotations": {"z": "w"}}}),
            ),
            (
                "nothing to merge with",
                json!({}),
                json!({"spec": {"nodeName": null, "containers": [{"name": "a", "$patch": "delete"}, {"name": "b", "image": null}]}}),
                json!({"spec": {"containers": [{"name": "b"}]}}),
            ),
        ];
        for (what, doc, patch, expected) in cases {
            assert_eq!(patched(POD, doc, &patch).expect(what), expected, "{what}");
        }
    }

    #[test]
    fn refuses_bad_patches() {
        let doc = json!({"spec": {"containers": [{"name": "a"}]}});
        for patch in [
            json!([]),
            json!({"spec": {"$patch": "nonsense"}}),
            json!({"spec": {"containers": [{"image": "x"}]}}),
            json!({"spec": {"$retainKeys": ["a"], "nodeName": "b"}}),
        ] {
            assert!(patched(POD, doc.clone(), &patch).is_err(), "{patch}");
        }
    }
}
