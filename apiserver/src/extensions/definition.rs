//! From a `CustomResourceDefinition` to what the registry serves.

use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use apimachinery::meta::{GroupResource, GroupVersionKind, GroupVersionResource};
use apimachinery::schema::{Schema, SchemaError};
use serde_json::{Value, json};

use super::conversion::Converter;
use super::custom_resource::{CustomResource, CustomStatus, Printed};
use super::json_path::JsonPath;
use super::rules::Rules;
use super::validation::{PatternError, Validator};
use crate::cache::stored::Defaults;
use crate::cache::{Caches, KindInfo, ResourceCache};
use crate::registry::object::ObjectExt;
use crate::registry::strategy::CustomScale;
use crate::registry::{Names, Resource, SchemaRef, Served, ServedSubresource, StrategyRef, header};

const VERBS: [&str; 8] = ["delete", "deletecollection", "get", "list", "patch", "create", "update", "watch"];
const SUBRESOURCE_VERBS: [&str; 3] = ["get", "patch", "update"];

#[derive(Debug, thiserror::Error)]
pub enum DefinitionError {
    #[error("version {version} has a schema that cannot be used")]
    Schema { version: String, source: SchemaError },
    #[error("version {version} has a pattern that cannot be used")]
    Pattern { version: String, source: PatternError },
    #[error("no version is the stored one")]
    NoStorageVersion,
}

/// What a definition says about its resource, before there is a cache for it.
pub struct Definition {
    pub group_resource: GroupResource,
    pub namespaced: bool,
    pub storage: GroupVersionKind,
    pub kind: KindInfo,
    names: Names,
    schema: Option<SchemaRef>,
    strategy: Arc<CustomResource>,
    versions: Vec<Arc<Served>>,
}

impl Definition {
    pub fn read(definition: &Value, services: &Arc<Caches>) -> Result<Self, DefinitionError> {
        let spec = &definition["spec"];
        let group = spec.str_at(&["group"]).to_owned();
        let plural = spec.str_at(&["names", "plural"]).to_owned();
        let stored = spec.list_at(&["versions"]).iter().find(|version| version["storage"] == true);
        let stored = stored.ok_or(DefinitionError::NoStorageVersion)?;
        let gvk = |version: &Value| {
            let (version, kind) = (version.str_at(&["name"]).to_owned(), spec.str_at(&["names", "kind"]).to_owned());
            GroupVersionKind::new(group.clone(), version, kind)
        };
        let mut versions = Vec::new();
        let mut columns = HashMap::new();
        for version in spec.list_at(&["versions"]).iter().filter(|version| version["served"] == true) {
            let gvk = gvk(version);
            columns.insert(gvk.api_version(), printed(version));
            versions.push(Arc::new(served(spec, version, gvk, &plural)?));
        }
        let schema = schema_of(stored)?;
        let storage = gvk(stored);
        let strategy = CustomResource {
            schema: schema.clone(),
            validator: validator_of(stored)?,
            rules: Rules::read(&stored["schema"]["openAPIV3Schema"]),
            has_status: stored["subresources"]["status"].is_object(),
            scale: scale_of(stored),
            columns,
            converter: Converter::read(spec, services),
            storage_version: storage.version.to_string(),
        };
        Ok(Self {
            group_resource: GroupResource::new(group, plural),
            namespaced: spec.str_at(&["scope"]) == "Namespaced",
            kind: KindInfo {
                kind: storage.kind.to_string(),
                api_version: storage.api_version(),
                // Where another server converts, what is stored may be in any version and says nothing.
                fields: if strategy.converter.is_some() { Vec::new() } else { all_selectable(spec) },
                aliases: &[],
                indexed: None,
                converted: strategy.converter.is_some(),
                defaults: schema
                    .clone()
                    .filter(|_| has_defaults(&stored["schema"]))
                    .map(|schema| Defaults { schema, text: stored["schema"].to_string() }),
            },
            storage,
            names: Names::read(&spec["names"]),
            schema: schema.map(SchemaRef::Custom),
            strategy: Arc::new(strategy),
            versions,
        })
    }

    /// The resource, on its cache.
    pub fn resource(self, cache: Arc<ResourceCache>) -> Resource {
        let status =
            self.strategy.has_status.then(|| StrategyRef::Custom(Arc::new(CustomStatus(self.strategy.clone()))));
        Resource {
            group_resource: self.group_resource,
            namespaced: self.namespaced,
            storage: self.storage,
            schema: self.schema,
            strategy: StrategyRef::Custom(self.strategy),
            status,
            cache,
            versions: self.versions,
            custom: true,
            names: Some(self.names),
        }
    }
}

fn served(spec: &Value, version: &Value, gvk: GroupVersionKind, plural: &str) -> Result<Served, DefinitionError> {
    let list_kind = match spec.str_at(&["names", "listKind"]) {
        "" => format!("{}List", gvk.kind),
        given => given.to_owned(),
    };
    let verbs = |verbs: &[&str]| verbs.iter().map(|verb| (*verb).to_owned()).collect::<Vec<_>>();
    let mut subresources = Vec::new();
    if version["subresources"]["status"].is_object() {
        subresources.push(ServedSubresource {
            name: "status".into(),
            gvk: gvk.clone(),
            verbs: verbs(&SUBRESOURCE_VERBS),
        });
    }
    if version["subresources"]["scale"].is_object() {
        let gvk = GroupVersionKind::new("autoscaling", "v1", "Scale");
        subresources.push(ServedSubresource { name: "scale".into(), gvk, verbs: verbs(&SUBRESOURCE_VERBS) });
    }
    Ok(Served {
        gvr: GroupVersionResource::new(gvk.group.clone(), gvk.version.clone(), plural.to_owned()),
        list_kind,
        header: header(&gvk.kind, &gvk.api_version()),
        schema: schema_of(version)?.map(SchemaRef::Custom),
        verbs: verbs(&VERBS),
        subresources,
        fields: Some(selectable(version).collect()),
        gvk,
    })
}

fn schema_of(version: &Value) -> Result<Option<Arc<Schema>>, DefinitionError> {
    let schema = &version["schema"]["openAPIV3Schema"];
    if !schema.is_object() {
        return Ok(None);
    }
    let name = || version.str_at(&["name"]).to_owned();
    let schema = Schema::from_custom_resource(schema);
    schema.map(|schema| Some(Arc::new(schema))).map_err(|source| DefinitionError::Schema { version: name(), source })
}

fn validator_of(version: &Value) -> Result<Option<Arc<Validator>>, DefinitionError> {
    let schema = &version["schema"]["openAPIV3Schema"];
    if !schema.is_object() {
        return Ok(None);
    }
    let name = || version.str_at(&["name"]).to_owned();
    let validator = Validator::new(schema.clone());
    validator.map(|v| Some(Arc::new(v))).map_err(|source| DefinitionError::Pattern { version: name(), source })
}

/// Whether anything in the schema has a default.
fn has_defaults(schema: &Value) -> bool {
    match schema {
        Value::Object(map) => map.contains_key("default") || map.values().any(has_defaults),
        Value::Array(items) => items.iter().any(has_defaults),
        _ => false,
    }
}

fn scale_of(version: &Value) -> Option<Arc<CustomScale>> {
    let scale = &version["subresources"]["scale"];
    let path = |name: &str| -> Vec<String> {
        scale.str_at(&[name]).split('.').filter(|part| !part.is_empty()).map(str::to_owned).collect()
    };
    scale.is_object().then(|| {
        Arc::new(CustomScale {
            spec_replicas: path("specReplicasPath"),
            status_replicas: path("statusReplicasPath"),
            selector: path("labelSelectorPath"),
        })
    })
}

fn selectable(version: &Value) -> impl Iterator<Item = String> {
    let fields = version.list_at(&["selectableFields"]).iter();
    fields.map(|field| field.str_at(&["jsonPath"]).trim_start_matches('.').to_owned())
}

/// What any version can be selected by, for its cache to read.
fn all_selectable(spec: &Value) -> Vec<(Cow<'static, str>, &'static str)> {
    let versions = spec.list_at(&["versions"]).iter().filter(|version| version["served"] == true);
    let paths: BTreeSet<String> = versions.flat_map(selectable).collect();
    paths.into_iter().map(|path| (path.into(), "")).collect()
}

/// The printer columns after the name; the age, when there are none.
fn printed(version: &Value) -> Vec<Printed> {
    let age = [json!({
        "name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp",
        "description": "CreationTimestamp is a timestamp representing the server time when this object was created.",
    })];
    let columns = match version.list_at(&["additionalPrinterColumns"]) {
        [] => &age[..],
        given => given,
    };
    columns
        .iter()
        .map(|column| Printed {
            path: JsonPath::parse(column.str_at(&["jsonPath"])),
            definition: json!({
                "name": column.str_at(&["name"]),
                "type": column.str_at(&["type"]),
                "format": column.str_at(&["format"]),
                "description": column.str_at(&["description"]),
                "priority": column.i64_at(&["priority"]).unwrap_or(0),
            }),
        })
        .collect()
}
