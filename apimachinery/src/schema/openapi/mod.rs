//! The published OpenAPI documents, made from the model on request: version 3 per group and version, version 2 for
//! everything at once.
//!
//! How the server uses it: `GET /openapi/v3` answers [`v3_index`], `GET /openapi/v3/<path of the index>` answers [`v3`]
//! or [`v3_custom`] as `application/json`, and `GET /openapi/v2` answers
//! [`v2`] as JSON or, when `application/com.github.proto-openapi.spec.v2@v1.0+protobuf` is accepted, [`v2_protobuf`].
//! The documents are big and asked for rarely, so they are best not kept; the hash in the index lets clients keep them.
//! `describe` gives the prose of a definition by its published name (`io.k8s.api.core.v1.Pod`): pass
//! `descriptions::of(&gv)` (cargo feature `descriptions`), or `&|_| None` for documents without prose.

mod custom;
mod definitions;
#[cfg(feature = "descriptions")]
pub mod descriptions;
mod gnostic;
mod operations;
mod paths;

use std::collections::{BTreeMap, BTreeSet, HashMap};

use serde_json::{Map, Value, json};

pub use custom::CustomKind;
pub use definitions::Flavor;

use super::{ApiResource, ResourceFacts};
use crate::meta::GroupVersion;

/// What a definition and its fields are for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Description {
    pub text: String,
    pub fields: HashMap<String, String>,
}

/// Looks up a definition's prose by its published name.
pub type Describe<'a> = &'a dyn Fn(&str) -> Option<Description>;

/// The release whose API is published.
pub const RELEASE: &str = "v1.37.2";

/// `api/v1`, `apis/apps/v1`: where a group and version are served, without the leading slash.
fn root_of(gv: &GroupVersion) -> String {
    if gv.group.is_empty() { format!("api/{}", gv.version) } else { format!("apis/{}/{}", gv.group, gv.version) }
}

/// The built-in resources that a server offers.
pub type Served<'s> = &'s [&'static ApiResource];

/// The groups and versions of the resources, in their order.
fn versions_of(served: Served<'_>) -> Vec<GroupVersion> {
    let mut versions: Vec<GroupVersion> = Vec::new();
    for resource in served {
        let version = GroupVersion::new(resource.group, resource.version);
        if !versions.contains(&version) {
            versions.push(version);
        }
    }
    versions
}

/// The list of version 3 documents: of the built-in groups, and of others, given by path and hash.
pub fn v3_index(served: Served<'_>, others: &[(String, String)]) -> Value {
    let mut paths = Map::new();
    let entry = |root: &str, hash: &str| json!({"serverRelativeURL": format!("/openapi/v3/{root}?hash={hash}")});
    for (root, hash) in others {
        paths.insert(root.clone(), entry(root, hash));
    }
    for version in versions_of(served) {
        let root = root_of(&version);
        let entry = entry(&root, &hash(&root));
        paths.insert(root, entry);
    }
    json!({ "paths": paths })
}

/// Changes when the document may have: with the table of facts, with this crate's version, and with `root`, to which
/// the callers add what else their document depends on. It is what the `hash` parameter and the `ETag` carry.
pub fn hash(root: &str) -> String {
    // FNV-1a, twice with different bases for 128 bits; nothing here is secret.
    let fold = |basis: u64| {
        let text = [super::facts::TABLE, env!("CARGO_PKG_VERSION"), root];
        let bytes = text.iter().flat_map(|t| t.bytes());
        bytes.fold(basis, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
    };
    format!("{:016X}{:016X}", fold(0xcbf2_9ce4_8422_2325), fold(0x6c62_272e_07bb_0142))
}

/// The version 3 document of a group and version, as JSON; `None` when it is not built in, or not served.
pub fn v3(gv: &GroupVersion, served: Served<'_>, describe: Describe<'_>) -> Option<Vec<u8>> {
    let resources = of_version(gv, served);
    if resources.is_empty() {
        return None;
    }
    Some(v3_document(gv, &resources, &[], describe))
}

fn of_version(gv: &GroupVersion, served: Served<'_>) -> Vec<&'static ApiResource> {
    served.iter().filter(|r| r.group == gv.group && r.version == gv.version).copied().collect()
}

/// The version 3 document of a group and version of custom resources.
pub fn v3_custom(gv: &GroupVersion, kinds: &[CustomKind<'_>], describe: Describe<'_>) -> Vec<u8> {
    let facts: Vec<ResourceFacts<'_>> = kinds.iter().map(CustomKind::facts).collect();
    v3_document(gv, &facts.iter().collect::<Vec<_>>(), kinds, describe)
}

fn v3_document<'r>(
    gv: &GroupVersion,
    resources: &[&'r ResourceFacts<'r>],
    custom: &[CustomKind<'_>],
    describe: Describe<'_>,
) -> Vec<u8> {
    let mut out = Document::new();
    out.member("openapi", &json!("3.0.0"));
    out.member(
        "info",
        &match custom {
            [] => json!({"title": "Kubernetes", "version": RELEASE}),
            _ => json!({"title": "Kubernetes CRD Swagger", "version": "v0.1.0"}),
        },
    );
    let mut needed = BTreeSet::new();
    out.open("paths");
    for (path, operations) in paths::of(gv, resources) {
        operations.iter().for_each(|o| needed.extend(o.definitions()));
        out.member(&path, &operations::path_item(&operations, &path, Flavor::V3));
    }
    out.close();
    out.open("components");
    out.open("schemas");
    write_definitions(&mut out, &needed, custom, Flavor::V3, describe);
    out.close();
    if custom.is_empty() {
        out.member("securitySchemes", &json!({ "BearerToken": bearer_token() }));
    }
    out.close();
    out.finish()
}

/// The version 2 document of all groups and of the custom resources, as JSON. It has several megabytes.
pub fn v2(served: Served<'_>, custom: &[CustomKind<'_>], describe: Describe<'_>) -> Vec<u8> {
    let mut out = Document::new();
    out.member("swagger", &json!("2.0"));
    out.member("info", &json!({"title": "Kubernetes", "version": RELEASE}));
    out.open("paths");
    let mut needed = BTreeSet::new();
    let facts: Vec<ResourceFacts<'_>> = custom.iter().map(CustomKind::facts).collect();
    let mut documents: BTreeMap<String, (GroupVersion, Vec<&ResourceFacts<'_>>)> = BTreeMap::new();
    for resource in served.iter().copied().chain(&facts) {
        let gv = GroupVersion::new(resource.group.to_owned(), resource.version.to_owned());
        documents.entry(root_of(&gv)).or_insert_with(|| (gv, Vec::new())).1.push(resource);
    }
    for (gv, resources) in documents.values() {
        for (path, operations) in paths::of(gv, resources) {
            operations.iter().for_each(|o| needed.extend(o.definitions()));
            out.member(&path, &operations::path_item(&operations, &path, Flavor::V2));
        }
    }
    out.close();
    out.open("definitions");
    write_definitions(&mut out, &needed, custom, Flavor::V2, describe);
    out.close();
    out.member("securityDefinitions", &json!({ "BearerToken": bearer_token() }));
    out.member("security", &json!([{ "BearerToken": [] }]));
    out.finish()
}

/// The definitions of the version 2 document in the protobuf form that older clients read; such clients look at
/// nothing else in it.
pub fn v2_protobuf(served: Served<'_>, custom: &[CustomKind<'_>], describe: Describe<'_>) -> Vec<u8> {
    let versions = versions_of(served);
    let all = definitions::closure(definitions::kinds_of(&versions));
    let builtin = all.into_iter().map(|name| {
        let definition = definitions::publish(&name, Flavor::V2, describe);
        (name, definition)
    });
    gnostic::document(builtin.chain(custom.iter().flat_map(|kind| kind.definitions(Flavor::V2))))
}

fn bearer_token() -> Value {
    json!({"description": "Bearer Token authentication", "in": "header", "name": "authorization", "type": "apiKey"})
}

fn write_definitions(
    out: &mut Document,
    needed: &BTreeSet<String>,
    custom: &[CustomKind<'_>],
    flavor: Flavor,
    describe: Describe<'_>,
) {
    let of_custom: Vec<(String, Value)> = custom.iter().flat_map(|kind| kind.definitions(flavor)).collect();
    let mut roots: BTreeSet<String> = needed.clone();
    if !custom.is_empty() {
        roots.extend(["ListMeta", "ObjectMeta"].map(|name| format!("io.k8s.apimachinery.pkg.apis.meta.v1.{name}")));
    }
    roots.retain(|name| !of_custom.iter().any(|(custom, _)| custom == name));
    for name in definitions::closure(roots) {
        out.member(&name, &definitions::publish(&name, flavor, describe));
    }
    for (name, definition) in of_custom {
        out.member(&name, &definition);
    }
}

/// Writes a JSON object member by member, so that only one member exists as a tree at any time.
struct Document {
    bytes: Vec<u8>,
}

impl Document {
    fn new() -> Self {
        Self { bytes: vec![b'{'] }
    }

    fn key(&mut self, name: &str) {
        if self.bytes.last() != Some(&b'{') {
            self.bytes.push(b',');
        }
        self.bytes.extend_from_slice(Value::from(name).to_string().as_bytes());
        self.bytes.push(b':');
    }

    fn member(&mut self, name: &str, value: &Value) {
        self.key(name);
        self.bytes.extend_from_slice(value.to_string().as_bytes());
    }

    fn open(&mut self, name: &str) {
        self.key(name);
        self.bytes.push(b'{');
    }

    fn close(&mut self) {
        self.bytes.push(b'}');
    }

    fn finish(mut self) -> Vec<u8> {
        self.close();
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema::builtin;

    fn everything() -> Vec<&'static ApiResource> {
        builtin().resources().iter().collect()
    }

    fn document(group: &'static str, version: &'static str) -> Value {
        let bytes = v3(&GroupVersion::new(group, version), &everything(), &|_| None).expect("built in");
        serde_json::from_slice(&bytes).expect("JSON")
    }

    /// Every `$ref` in the document, without its prefix.
    fn references(value: &Value, out: &mut BTreeSet<String>) {
        match value {
            Value::Object(map) => {
                for (key, value) in map {
                    match value.as_str().filter(|_| key == "$ref") {
                        Some(target) => {
                            out.insert(target.rsplit('/').next().unwrap_or_default().to_owned());
                        }
                        None => references(value, out),
                    }
                }
            }
            Value::Array(items) => items.iter().for_each(|v| references(v, out)),
            _ => {}
        }
    }

    #[test]
    fn every_reference_resolves() {
        for group in builtin().groups() {
            for version in &group.versions {
                let document = document(group.name, version);
                let mut targets = BTreeSet::new();
                references(&document, &mut targets);
                for target in targets {
                    assert!(document["components"]["schemas"].get(&target).is_some(), "{}: {target}", group.name);
                }
            }
        }
        let v2: Value = serde_json::from_slice(&v2(&everything(), &[], &|_| None)).expect("JSON");
        let mut targets = BTreeSet::new();
        references(&v2, &mut targets);
        targets.iter().for_each(|t| assert!(v2["definitions"].get(t).is_some(), "{t}"));
    }

    #[test]
    fn what_is_not_served_is_not_published() {
        let served: Vec<_> = everything().into_iter().filter(|resource| resource.version == "v1").collect();
        let index = v3_index(&served, &[]);
        assert!(index["paths"].get("apis/apps/v1").is_some() && index["paths"].get("apis/autoscaling/v2").is_none());
        assert!(v3(&GroupVersion::new("autoscaling", "v2"), &served, &|_| None).is_none());
        let document: Value = serde_json::from_slice(&v2(&served, &[], &|_| None)).expect("JSON");
        assert!(document["paths"].get("/apis/autoscaling/v2/").is_none());
    }

    #[test]
    fn clients_find_what_they_look_for() {
        let apps = document("apps", "v1");
        let item = &apps["paths"]["/apis/apps/v1/namespaces/{namespace}/deployments/{name}"];
        assert_eq!(item["patch"]["operationId"], "patchAppsV1NamespacedDeployment");
        assert_eq!(
            item["patch"]["x-kubernetes-group-version-kind"],
            json!({"group": "apps", "version": "v1", "kind": "Deployment"})
        );
        let parameters = item["patch"]["parameters"].as_array().expect("parameters");
        assert!(parameters.iter().any(|p| p["name"] == "fieldValidation"));
        let shared = item["parameters"].as_array().expect("parameters of all operations");
        let shared: Vec<&str> = shared.iter().filter_map(|parameter| parameter["name"].as_str()).collect();
        assert_eq!(shared, ["name", "namespace", "pretty"]);
        assert_eq!(apps["paths"]["/apis/apps/v1/"]["get"]["operationId"], "getAppsV1APIResources");
        let watch = &apps["paths"]["/apis/apps/v1/watch/deployments"]["get"];
        assert_eq!(watch["operationId"], "watchAppsV1DeploymentListForAllNamespaces");
        let policy = &apps["components"]["schemas"]["io.k8s.api.core.v1.PodSpec"]["properties"]["restartPolicy"];
        assert_eq!(policy["enum"], json!(["Always", "Never", "OnFailure"]));
        let schema = &apps["components"]["schemas"]["io.k8s.api.core.v1.Container"]["properties"]["ports"];
        assert_eq!(schema["x-kubernetes-list-map-keys"], json!(["containerPort", "protocol"]));
        assert_eq!(schema["items"], json!({"$ref": "#/components/schemas/io.k8s.api.core.v1.ContainerPort"}));
    }
}
