//! Custom resources in the published documents: their schema as the definition gives it, with what every object has,
//! and in version 2 without what that dialect (or kubectl reading it) cannot express.

use serde_json::{Map, Value, json};

use super::definitions::Flavor;
use crate::schema::{ResourceFacts, SubresourceFacts, builtin};

const META: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.";

/// One version of a custom resource.
pub struct CustomKind<'a> {
    pub group: &'a str,
    pub version: &'a str,
    pub kind: &'a str,
    pub list_kind: &'a str,
    /// The plural name in paths.
    pub resource: &'a str,
    pub namespaced: bool,
    /// `openAPIV3Schema`
    pub schema: Option<&'a Value>,
    pub has_status: bool,
    pub has_scale: bool,
    /// Paths of the fields that objects can be selected by, without the dot in front.
    pub selectable: Vec<&'a str>,
}

/// Whether kinds of this group are named after it: no group that is built in.
pub fn is_custom_group(group: &str) -> bool {
    builtin().groups().iter().all(|builtin| builtin.name != group)
}

/// `com.example.stable.v1.CronTab` of `stable.example.com/v1 CronTab`.
pub fn definition_name(group: &str, version: &str, kind: &str) -> String {
    let reversed: Vec<&str> = group.split('.').rev().collect();
    format!("{}.{version}.{kind}", reversed.join("."))
}

impl<'a> CustomKind<'a> {
    /// As the paths need it.
    pub fn facts(&self) -> ResourceFacts<'a> {
        let mut subresources = Vec::new();
        let verbs = || vec!["get", "patch", "update"];
        if self.has_status {
            let (group, version, kind) = (self.group, self.version, self.kind);
            subresources.push(SubresourceFacts { name: "status", group, version, kind, verbs: verbs() });
        }
        if self.has_scale {
            let (group, version, kind) = ("autoscaling", "v1", "Scale");
            subresources.push(SubresourceFacts { name: "scale", group, version, kind, verbs: verbs() });
        }
        ResourceFacts {
            group: self.group,
            version: self.version,
            resource: self.resource,
            singular: "",
            kind: self.kind,
            namespaced: self.namespaced,
            verbs: vec!["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"],
            short_names: Vec::new(),
            categories: Vec::new(),
            storage_version_hash: "",
            subresources,
        }
    }

    fn name(&self) -> String {
        definition_name(self.group, self.version, self.kind)
    }

    /// The definitions of the kind and of its list, by name.
    pub fn definitions(&self, flavor: Flavor) -> [(String, Value); 2] {
        // The paths name the list after the kind, as upstream does for kinds with a usual list.
        let list = definition_name(self.group, self.version, &format!("{}List", self.kind));
        [(self.name(), self.object(flavor)), (list, self.list(flavor))]
    }

    fn object(&self, flavor: Flavor) -> Value {
        let preserves = self.schema.is_some_and(|schema| schema["x-kubernetes-preserve-unknown-fields"] == true);
        let mut out = match self.schema {
            // kubectl would refuse all fields but those that are named, so none are.
            Some(_) if preserves && flavor == Flavor::V2 => json!({"type": "object"}),
            None => json!({"type": "object"}),
            Some(schema) => {
                let mut out = if flavor == Flavor::V2 { for_v2(schema) } else { schema.clone() };
                embed(&mut out, flavor);
                add_type_meta(&mut out, flavor);
                out
            }
        };
        if flavor == Flavor::V3 {
            spell_out_either(&mut out);
        }
        out["x-kubernetes-group-version-kind"] = json!([self.gvk(self.kind)]);
        self.add_selectable(&mut out);
        out
    }

    fn add_selectable(&self, out: &mut Value) {
        if !self.selectable.is_empty() {
            let fields: Vec<Value> = self.selectable.iter().map(|path| json!({"fieldPath": path})).collect();
            out["x-kubernetes-selectable-fields"] = fields.into();
        }
    }

    fn list(&self, flavor: Flavor) -> Value {
        let mut out = json!({
            "type": "object",
            "description": format!("{} is a list of {}", self.list_kind, self.kind),
            "required": ["items"],
            "properties": {
                "items": {"type": "array", "description": format!("List of {}.", self.resource), "items": flavor.reference(&self.name())},
            },
            "x-kubernetes-group-version-kind": [self.gvk(self.list_kind)],
        });
        add_type_meta(&mut out, flavor);
        out["properties"]["metadata"] = reference(flavor, "ListMeta", "Standard list metadata.");
        self.add_selectable(&mut out);
        out
    }

    fn gvk(&self, kind: &str) -> Value {
        json!({"group": self.group, "version": self.version, "kind": kind})
    }
}

fn reference(flavor: Flavor, name: &str, description: &str) -> Value {
    let reference = flavor.reference(&format!("{META}{name}"));
    match flavor {
        Flavor::V2 => {
            let mut out = reference;
            out["description"] = description.into();
            out
        }
        Flavor::V3 => json!({"allOf": [reference], "description": description}),
    }
}

/// `apiVersion`, `kind` and `metadata`, as every object has them.
fn add_type_meta(schema: &mut Value, flavor: Flavor) {
    if !schema["properties"].is_object() {
        schema["properties"] = json!({});
    }
    let properties = &mut schema["properties"];
    properties["apiVersion"] = json!({"type": "string", "description": "APIVersion defines the versioned schema of this representation of an object."});
    properties["kind"] = json!({"type": "string", "description": "Kind is the REST resource that this object represents, in CamelCase."});
    properties["metadata"] = reference(flavor, "ObjectMeta", "Standard object's metadata.");
}

/// Objects inside objects have what every object has, too.
fn embed(schema: &mut Value, flavor: Flavor) {
    let Some(map) = schema.as_object_mut() else { return };
    for_each_child(map, &mut |child| embed(child, flavor));
    let preserves = map.get("x-kubernetes-preserve-unknown-fields") == Some(&Value::Bool(true));
    if map.get("x-kubernetes-embedded-resource") != Some(&Value::Bool(true)) || (preserves && flavor == Flavor::V2) {
        return;
    }
    add_type_meta(schema, flavor);
    let mut required = schema["required"].as_array().cloned().unwrap_or_default();
    for field in ["kind", "apiVersion"] {
        if !required.iter().any(|known| known == field) {
            required.push(field.into());
        }
    }
    schema["required"] = required.into();
}

/// Version 3 says of a number or text that it is either.
fn spell_out_either(schema: &mut Value) {
    let Some(map) = schema.as_object_mut() else { return };
    for_each_child(map, &mut spell_out_either);
    let is_either = map.get("x-kubernetes-int-or-string") == Some(&Value::Bool(true));
    if is_either && !map.contains_key("anyOf") && !map.contains_key("allOf") {
        map.insert("anyOf".into(), json!([{"type": "integer"}, {"type": "string"}]));
    }
}

fn for_each_child(map: &mut Map<String, Value>, visit: &mut dyn FnMut(&mut Value)) {
    if let Some(Value::Object(properties)) = map.get_mut("properties") {
        properties.values_mut().for_each(&mut *visit);
    }
    for field in ["items", "additionalProperties"] {
        if let Some(child) = map.get_mut(field).filter(|child| child.is_object()) {
            visit(child);
        }
    }
}

/// The schema without what version 2 does not know, and without what kubectl misreads there.
fn for_v2(schema: &Value) -> Value {
    let mut out = schema.clone();
    if let Some(map) = out.as_object_mut() {
        strip(map);
    }
    out
}

fn strip(map: &mut Map<String, Value>) {
    for unknown in ["allOf", "anyOf", "oneOf", "not"] {
        map.remove(unknown);
    }
    let has = |map: &Map<String, Value>, field: &str| map.get(field) == Some(&Value::Bool(true));
    let nullable = has(map, "nullable");
    let preserves = has(map, "x-kubernetes-preserve-unknown-fields");
    if nullable || preserves {
        map.remove("items");
        map.remove("properties");
    }
    let kind = map.get("type").and_then(Value::as_str).unwrap_or_default();
    if nullable || (kind == "array" && !map.contains_key("items")) || (preserves && kind == "object") {
        map.remove("type");
    }
    map.remove("nullable");
    let is_nullable = |child: &Value| child["nullable"] == true;
    let nullable_fields: Vec<String> = match map.get("properties") {
        Some(Value::Object(properties)) => {
            properties.iter().filter(|(_, child)| is_nullable(child)).map(|(name, _)| name.clone()).collect()
        }
        _ => Vec::new(),
    };
    if let Some(Value::Array(required)) = map.get_mut("required") {
        required.retain(|field| !nullable_fields.iter().any(|name| field == name.as_str()));
        if required.is_empty() {
            map.remove("required");
        }
    }
    for_each_child(map, &mut |child| {
        if let Some(child) = child.as_object_mut() {
            strip(child);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_2_leaves_out_what_it_cannot_say() {
        let schema = json!({"type": "object", "required": ["a", "b"], "properties": {
            "a": {"type": "string", "nullable": true},
            "b": {"x-kubernetes-int-or-string": true, "anyOf": [{"type": "integer"}, {"type": "string"}]},
            "c": {"type": "object", "x-kubernetes-preserve-unknown-fields": true, "properties": {"d": {"type": "string"}}},
            "e": {"type": "array", "items": {"type": "string", "nullable": true}},
        }});
        let expected = json!({"type": "object", "required": ["b"], "properties": {
            "a": {},
            "b": {"x-kubernetes-int-or-string": true},
            "c": {"x-kubernetes-preserve-unknown-fields": true},
            "e": {"type": "array", "items": {}},
        }});
        assert_eq!(for_v2(&schema), expected);
    }

    #[test]
    fn names_are_the_groups_backwards() {
        assert_eq!(definition_name("stable.example.com", "v1", "CronTab"), "com.example.stable.v1.CronTab");
        assert!(is_custom_group("example.com") && !is_custom_group("apps"));
    }
}
