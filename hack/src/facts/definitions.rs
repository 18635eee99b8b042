//! The types behind the kinds: one `def` line per definition, followed by one line per field.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;
use std::fs;

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value};

use super::enums::Enums;
use super::go::{Field, Package};
use super::{Upstream, read_json};

/// Types that have a codec of their own; their definitions are not objects with fields.
const SPECIAL: [(&str, &str); 12] = [
    ("io.k8s.apimachinery.pkg.api.resource.Quantity", "quantity"),
    ("io.k8s.apimachinery.pkg.apis.meta.v1.Duration", "duration"),
    ("io.k8s.apimachinery.pkg.apis.meta.v1.FieldsV1", "fields"),
    ("io.k8s.apimachinery.pkg.apis.meta.v1.MicroTime", "microtime"),
    ("io.k8s.apimachinery.pkg.apis.meta.v1.Patch", "any"),
    ("io.k8s.apimachinery.pkg.apis.meta.v1.Time", "time"),
    ("io.k8s.apimachinery.pkg.runtime.RawExtension", "raw"),
    ("io.k8s.apimachinery.pkg.util.intstr.IntOrString", "intstr"),
    ("io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.JSON", "json"),
    ("io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.JSONSchemaPropsOrArray", "propsorarray"),
    ("io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.JSONSchemaPropsOrBool", "propsorbool"),
    ("io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.JSONSchemaPropsOrStringArray", "propsorstrings"),
];

/// Every definition's name starts with this; the table leaves it out.
const PREFIX: &str = "io.k8s.";

pub fn write(upstream: &Upstream<'_>, out: &mut String) -> Result<()> {
    let enums = Enums::read(&upstream.openapi_functions())?;
    let mut writer = Writer { packages: Packages { upstream, read: HashMap::new() }, enums, out };
    for (name, definition) in documents(upstream)? {
        if !SPECIAL.iter().any(|(special, _)| *special == name) {
            writer.definition(&name, &definition).with_context(|| name.clone())?;
        }
    }
    writer.metadata_only();
    Ok(())
}

/// All schemas of all OpenAPI v3 documents.
fn documents(upstream: &Upstream<'_>) -> Result<BTreeMap<String, Value>> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(upstream.api().join("openapi-spec/v3"))? {
        let mut document = read_json(&entry?.path())?;
        if let Some(Value::Object(schemas)) = document.pointer_mut("/components/schemas").map(Value::take) {
            for (name, schema) in schemas {
                // DeleteOptions and friends list in each document only the kinds of that document's group.
                merge_kinds(all.entry(name).or_insert_with(|| schema.clone()), &schema);
            }
        }
    }
    Ok(all)
}

const KINDS: &str = "x-kubernetes-group-version-kind";

fn merge_kinds(known: &mut Value, other: &Value) {
    let Some(Value::Array(kinds)) = known.get_mut(KINDS) else { return };
    for kind in other[KINDS].as_array().into_iter().flatten() {
        if !kinds.contains(kind) {
            kinds.push(kind.clone());
        }
    }
}

struct Writer<'a> {
    packages: Packages<'a>,
    enums: Enums,
    out: &'a mut String,
}

/// Where a JSON field sits on the wire and in Go.
struct Place {
    /// Protobuf numbers from the outermost message inwards; more than one for inlined structs.
    numbers: Vec<u16>,
    field: Field,
}

impl Writer<'_> {
    fn definition(&mut self, name: &str, definition: &Value) -> Result<()> {
        let (package, go_name) = package_of(name)?;
        let mut places = HashMap::new();
        self.packages.collect(&package, &go_name, &[], &mut places)?;
        let package = self.packages.get(&package)?;
        let _ = write!(self.out, "def {}", name.strip_prefix(PREFIX).context("unknown prefix")?);
        Self::kinds(self.out, definition);
        if definition["x-kubernetes-map-type"] == "atomic" {
            self.out.push_str(" atomic");
        }
        let required: Vec<&str> =
            definition["required"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        if !required.is_sorted() {
            let _ = write!(self.out, " required={}", required.join(","));
        }
        if let Some(unions) = definition.get("x-kubernetes-unions") {
            let _ = write!(self.out, " unions={unions}");
        }
        self.out.push('\n');
        let enums = self.enums.of(name);
        for (json, property) in definition["properties"].as_object().into_iter().flatten() {
            let property = property.as_object().context("property")?;
            let mut line = field_line(json, property, places.get(json), package, required.contains(&json.as_str()))
                .with_context(|| json.clone())?;
            if let Some(values) = enums.and_then(|enums| enums.get(json)) {
                let _ = write!(line, " e={}", values.join(",").replace(' ', "~"));
            }
            if let Some(default) = property.get("default") {
                let _ = write!(line, " d={default}");
            }
            let _ = writeln!(self.out, "{line}");
        }
        Ok(())
    }

    /// Appends the definition's group/version/kind triples.
    fn kinds(out: &mut String, definition: &Value) {
        let mut kinds: Vec<String> = definition[KINDS]
            .as_array()
            .into_iter()
            .flatten()
            .map(|k| {
                let part = |key| k[key].as_str().unwrap_or_default();
                format!("{}/{}/{}", part("group"), part("version"), part("kind"))
            })
            .collect();
        kinds.sort();
        if !kinds.is_empty() {
            let _ = write!(out, " kinds={}", kinds.join(","));
        }
    }

    /// The two kinds that metadata-only clients speak; upstream publishes no schema of them.
    fn metadata_only(&mut self) {
        const META: &str = "apimachinery.pkg.apis.meta.v1";
        let _ = writeln!(self.out, "def {META}.PartialObjectMetadata kinds=meta.k8s.io/v1/PartialObjectMetadata");
        let _ = writeln!(self.out, "apiVersion - string o\nkind - string o\nmetadata 1 @{META}.ObjectMeta o");
        let _ =
            writeln!(self.out, "def {META}.PartialObjectMetadataList kinds=meta.k8s.io/v1/PartialObjectMetadataList");
        let _ = writeln!(self.out, "apiVersion - string o\nitems 2 []@{META}.PartialObjectMetadata r");
        let _ = writeln!(self.out, "kind - string o\nmetadata 1 @{META}.ListMeta o");
    }
}

/// `io.k8s.api.core.v1.Pod` is type `Pod` of package `api/core/v1`.
fn package_of(name: &str) -> Result<(String, String)> {
    let (package, go_name) = name.strip_prefix(PREFIX).and_then(|n| n.rsplit_once('.')).context("definition's name")?;
    Ok((package.replace('.', "/"), go_name.to_owned()))
}

/// The Go packages read so far, by path.
struct Packages<'a> {
    upstream: &'a Upstream<'a>,
    read: HashMap<String, Package>,
}

impl Packages<'_> {
    fn get(&mut self, path: &str) -> Result<&Package> {
        if !self.read.contains_key(path) {
            self.read.insert(path.to_owned(), Package::read(&self.upstream.package(path))?);
        }
        Ok(&self.read[path])
    }

    /// The fields of a struct, or of that struct of a sibling version which the name stands for (`= v1.MatchCondition`).
    fn fields(&mut self, path: &str, name: &str) -> Result<(String, Vec<Field>)> {
        let package = self.get(path)?;
        if let Some(fields) = package.structs.get(name) {
            return Ok((path.to_owned(), fields.clone()));
        }
        let target = package.named.get(name).cloned();
        let (version, name) =
            target.as_deref().and_then(|t| t.split_once('.')).with_context(|| format!("no Go struct {name}"))?;
        let parent = path.rsplit_once('/').map_or("", |(parent, _)| parent);
        self.fields(&format!("{parent}/{version}"), name)
    }

    /// Flattens a struct and those inlined in it into JSON names.
    fn collect(&mut self, path: &str, name: &str, outer: &[u16], places: &mut HashMap<String, Place>) -> Result<()> {
        let (path, fields) = self.fields(path, name)?;
        for field in fields {
            let numbers: Vec<u16> = outer.iter().copied().chain(field.proto).collect();
            if !field.inline {
                places.insert(field.json.clone(), Place { numbers, field });
            } else if !field.go_type.ends_with("TypeMeta") {
                self.collect(&path, field.go_type.trim_start_matches('*'), &numbers, places)?;
            }
        }
        Ok(())
    }
}

/// `<json name> <protobuf path or -> <type> <attributes…>`; see `apimachinery::schema::facts` for the grammar.
fn field_line(
    json: &str,
    property: &Map<String, Value>,
    place: Option<&Place>,
    package: &Package,
    required: bool,
) -> Result<String> {
    let mut kind = type_of(property)?;
    let numbers = place.map(|p| p.numbers.iter().map(u16::to_string).collect::<Vec<_>>().join("."));
    let numbers = numbers.filter(|n| !n.is_empty()).unwrap_or_else(|| "-".into());
    let type_meta = place.is_none() && matches!(json, "kind" | "apiVersion");
    if place.is_none() && !type_meta {
        bail!("no Go field");
    }
    let mut attributes = String::new();
    if let Some(Place { field, .. }) = place {
        let bare = field.go_type.trim_start_matches('*');
        if bare.ends_with("metav1.Duration") || bare == "Duration" {
            kind = "duration".into();
        }
        if field.go_type.starts_with('*') {
            attributes.push_str(" p");
        }
        if field.omit_empty {
            attributes.push_str(" o");
        }
        if field.omit_zero {
            attributes.push_str(" z");
        }
        if let Some(name) = named_type(bare, &kind, package) {
            let _ = write!(attributes, " go={name}");
        }
    } else {
        attributes.push_str(" o");
    }
    if required {
        attributes.push_str(" r");
    }
    attributes.push_str(&list_attributes(property)?);
    Ok(format!("{json} {numbers} {kind}{attributes}"))
}

/// The name of a scalar, list or map type that is not spelled out, as error messages show it.
fn named_type(go_type: &str, kind: &str, package: &Package) -> Option<String> {
    let plain = ["string", "int32", "int64", "bool", "float64", "uint32", "[]byte"];
    let own = kind.starts_with('@') || kind.starts_with("[]@") || plain.contains(&go_type);
    if own || go_type.starts_with("[]") || go_type.starts_with("map[") || kind.starts_with("{}@") {
        return None;
    }
    let special = !matches!(kind, "string" | "int32" | "int64" | "bool" | "bytes") && !kind.contains(['[', '{']);
    (!special && (go_type.contains('.') || package.named.contains_key(go_type))).then(|| go_type.to_owned())
}

fn type_of(schema: &Map<String, Value>) -> Result<String> {
    let reference = schema.get("$ref").or_else(|| schema.get("allOf").and_then(|all| all[0].get("$ref")));
    if let Some(name) = reference.and_then(Value::as_str).and_then(|r| r.rsplit('/').next()) {
        if let Some((_, special)) = SPECIAL.iter().find(|(special, _)| *special == name) {
            return Ok((*special).to_owned());
        }
        return Ok(format!("@{}", name.strip_prefix(PREFIX).context("unknown prefix")?));
    }
    let inner = |key: &str| -> Result<String> {
        type_of(schema.get(key).and_then(Value::as_object).with_context(|| format!("no {key}"))?)
    };
    let text = |key: &str| schema.get(key).and_then(Value::as_str).unwrap_or_default();
    Ok(match (text("type"), text("format")) {
        ("string", "") => "string".into(),
        ("string", "byte") => "bytes".into(),
        ("integer", format @ ("int32" | "int64")) => format.into(),
        ("number", "double") => "double".into(),
        ("boolean", "") => "bool".into(),
        ("array", "") => format!("[]{}", inner("items")?),
        ("object", "") if schema.contains_key("additionalProperties") => {
            format!("{{}}{}", inner("additionalProperties")?)
        }
        ("object", "") | ("", "") => "any".into(),
        (kind, format) => bail!("unknown type {kind:?} format {format:?}"),
    })
}

fn list_attributes(property: &Map<String, Value>) -> Result<String> {
    let text = |key: &str| property.get(key).and_then(Value::as_str);
    let mut out = String::new();
    match text("x-kubernetes-list-type") {
        None => {}
        Some("map") => {
            let keys = property.get("x-kubernetes-list-map-keys").and_then(Value::as_array).context("map keys")?;
            let keys: Vec<&str> = keys.iter().filter_map(Value::as_str).collect();
            let _ = write!(out, " map={}", keys.join(","));
        }
        Some(kind) => {
            let _ = write!(out, " {kind}");
        }
    }
    if let Some(kind) = text("x-kubernetes-map-type") {
        let _ = write!(out, " {kind}");
    }
    if let Some(strategy) = text("x-kubernetes-patch-strategy") {
        let _ = write!(out, " ps={strategy}");
    }
    if let Some(key) = text("x-kubernetes-patch-merge-key") {
        let _ = write!(out, " pk={key}");
    }
    Ok(out)
}
