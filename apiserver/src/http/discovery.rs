//! Discovery: which groups, versions and resources are served, in the classic documents (`/api`, `/apis/<group>`,
//! `/apis/<group>/<version>`) and in the aggregated one that lists everything at once. Read from the registry at the
//! moment of the question, so that custom resources appear when they are served and not later.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use apimachinery::schema;
use http::header::{ACCEPT, CACHE_CONTROL, CONTENT_TYPE, ETAG, IF_NONE_MATCH, VARY};
use http::{HeaderMap, StatusCode};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::{Response, full};
use crate::bootstrap;
use crate::registry::Resource;
use crate::registry::object::ObjectExt;
use crate::server::Server;

/// A group, its priority, and the priorities of its versions.
type GroupPriority = (&'static str, u32, &'static [(&'static str, u32)]);

/// Upstream's order of groups (greater first) and of versions within a group. Groups of custom resources are not in it.
const PRIORITIES: &[GroupPriority] = &[
    ("", 18000, &[("v1", 1)]),
    ("apps", 17800, &[("v1", 15)]),
    ("events.k8s.io", 17750, &[("v1", 15)]),
    ("authentication.k8s.io", 17700, &[("v1", 15), ("v1beta1", 9), ("v1alpha1", 1)]),
    ("authorization.k8s.io", 17600, &[("v1", 15)]),
    ("autoscaling", 17500, &[("v1", 15), ("v2", 30)]),
    ("batch", 17400, &[("v1", 15)]),
    ("certificates.k8s.io", 17300, &[("v1", 15), ("v1beta1", 9), ("v1alpha1", 1)]),
    ("networking.k8s.io", 17200, &[("v1", 15), ("v1beta1", 9)]),
    ("policy", 17100, &[("v1", 15)]),
    ("rbac.authorization.k8s.io", 17000, &[("v1", 15)]),
    ("storage.k8s.io", 16800, &[("v1", 15), ("v1beta1", 9), ("v1alpha1", 1)]),
    ("apiextensions.k8s.io", 16700, &[("v1", 15)]),
    ("admissionregistration.k8s.io", 16700, &[("v1", 15), ("v1beta1", 12), ("v1alpha1", 9)]),
    ("scheduling.k8s.io", 16600, &[("v1", 15), ("v1beta1", 9), ("v1alpha3", 3)]),
    ("coordination.k8s.io", 16500, &[("v1", 15), ("v1beta1", 13), ("v1alpha2", 12)]),
    ("node.k8s.io", 16300, &[("v1", 15)]),
    ("discovery.k8s.io", 16200, &[("v1", 15)]),
    ("resource.k8s.io", 16200, &[("v1", 21), ("v1beta2", 15), ("v1beta1", 9), ("v1alpha3", 1)]),
    ("flowcontrol.apiserver.k8s.io", 16100, &[("v1", 21)]),
    ("internal.apiserver.k8s.io", 16000, &[("v1alpha1", 9)]),
    ("storagemigration.k8s.io", 15800, &[("v1", 15), ("v1beta1", 9)]),
    ("lifecycle.k8s.io", 15700, &[("v1alpha1", 1)]),
];

/// Priority of the group and of the version within it; `apiregistration.k8s.io` comes before all and registers itself.
pub fn priority(group: &str, version: &str) -> Option<(u32, u32)> {
    let (_, of_group, versions) = PRIORITIES.iter().find(|(name, ..)| *name == group)?;
    let of_version = versions.iter().find(|(name, _)| *name == version)?.1;
    Some((*of_group, of_version))
}

/// Priorities that order everything: those of the table, `apiregistration.k8s.io` above and custom groups below.
fn rank(group: &str, version: &str) -> (u32, (u32, u8, u32, u32)) {
    let (stable, major, minor) = crate::registry::layout::stability(version);
    let fallback = if group == "apiregistration.k8s.io" { (20_000, 100) } else { (1000, 100) };
    let (group, version) = priority(group, version).unwrap_or(fallback);
    (group, (version, stable, major, minor))
}

/// A resource or subresource as discovery shows it.
struct Shown {
    /// `pods`, or the name of the subresource alone.
    name: String,
    singular: String,
    namespaced: bool,
    /// Of what it speaks, where that is not of the group and version it is in.
    other_version: Option<(String, String)>,
    kind: String,
    verbs: Vec<String>,
    short_names: Vec<String>,
    categories: Vec<String>,
    storage_hash: String,
    subresources: Vec<Shown>,
}

type Versions = BTreeMap<String, Vec<Shown>>;

fn own<S: ToString>(texts: impl IntoIterator<Item = S>) -> Vec<String> {
    texts.into_iter().map(|text| text.to_string()).collect()
}

/// Everything that is served: group → version → resources by name.
fn served(server: &Server) -> BTreeMap<String, Versions> {
    let registry = &server.registry;
    let mut groups: BTreeMap<String, Versions> = BTreeMap::new();
    let mut add = |group: &str, version: &str, shown| {
        groups.entry(group.to_owned()).or_default().entry(version.to_owned()).or_default().push(shown);
    };
    for api in schema::builtin().resources() {
        let resource = registry.get(api.group, api.resource);
        if resource.is_some_and(|resource| !resource.custom && resource.version(api.version).is_some()) {
            add(api.group, api.version, builtin(api));
        }
    }
    for resource in registry.all().iter().filter(|resource| resource.custom) {
        for version in &resource.versions {
            add(&version.gvr.group, &version.gvr.version, custom(resource, version));
        }
    }
    for (group, version, list) in server.aggregator.discovered() {
        groups.entry(group).or_default().insert(version, aggregated_elsewhere(&list));
    }
    for resources in groups.values_mut().flat_map(|versions| versions.values_mut()) {
        resources.sort_by(|a, b| a.name.cmp(&b.name));
    }
    groups
}

fn builtin(api: &schema::ApiResource) -> Shown {
    let subresource = |sub: &schema::ApiSubresource| Shown {
        name: sub.name.to_owned(),
        singular: String::new(),
        namespaced: api.namespaced,
        other_version: ((sub.group, sub.version) != (api.group, api.version))
            .then(|| (sub.group.to_owned(), sub.version.to_owned())),
        kind: sub.kind.to_owned(),
        verbs: own(&sub.verbs),
        short_names: Vec::new(),
        categories: Vec::new(),
        storage_hash: String::new(),
        subresources: Vec::new(),
    };
    Shown {
        name: api.resource.to_owned(),
        singular: api.singular.to_owned(),
        namespaced: api.namespaced,
        other_version: None,
        kind: api.kind.to_owned(),
        verbs: own(&api.verbs),
        short_names: own(&api.short_names),
        categories: own(&api.categories),
        storage_hash: api.storage_version_hash.to_owned(),
        subresources: api.subresources.iter().map(subresource).collect(),
    }
}

fn custom(resource: &Resource, version: &crate::registry::Served) -> Shown {
    let subresource = |sub: &crate::registry::ServedSubresource| Shown {
        name: sub.name.clone(),
        singular: String::new(),
        namespaced: resource.namespaced,
        other_version: (sub.gvk.group_version() != version.gvk.group_version())
            .then(|| (sub.gvk.group.to_string(), sub.gvk.version.to_string())),
        kind: sub.gvk.kind.to_string(),
        verbs: sub.verbs.clone(),
        short_names: Vec::new(),
        categories: Vec::new(),
        storage_hash: String::new(),
        subresources: Vec::new(),
    };
    let names = resource.names.clone().unwrap_or_default();
    Shown {
        name: version.gvr.resource.to_string(),
        singular: names.singular,
        namespaced: resource.namespaced,
        other_version: None,
        kind: version.gvk.kind.to_string(),
        verbs: version.verbs.clone(),
        short_names: names.short_names,
        categories: names.categories,
        storage_hash: storage_hash(&resource.storage),
        subresources: version.subresources.iter().map(subresource).collect(),
    }
}

/// By which clients see whether what is stored has changed its form.
fn storage_hash(stored: &apimachinery::meta::GroupVersionKind) -> String {
    use base64::Engine;
    let digest = Sha256::digest(format!("{}/{}/{}", stored.group, stored.version, stored.kind));
    base64::engine::general_purpose::STANDARD.encode(&digest[..8])
}

/// The resources of another server's `APIResourceList`.
fn aggregated_elsewhere(list: &Value) -> Vec<Shown> {
    let texts = |entry: &Value, field: &str| own(entry.list_at(&[field]).iter().filter_map(Value::as_str));
    let shown = |entry: &Value, name: &str| Shown {
        name: name.to_owned(),
        singular: entry.str_at(&["singularName"]).to_owned(),
        namespaced: entry["namespaced"] == true,
        other_version: Some(entry.str_at(&["version"]))
            .filter(|version| !version.is_empty())
            .map(|version| (entry.str_at(&["group"]).to_owned(), version.to_owned())),
        kind: entry.str_at(&["kind"]).to_owned(),
        verbs: texts(entry, "verbs"),
        short_names: texts(entry, "shortNames"),
        categories: texts(entry, "categories"),
        storage_hash: entry.str_at(&["storageVersionHash"]).to_owned(),
        subresources: Vec::new(),
    };
    let mut found: Vec<Shown> = Vec::new();
    let entries = list.list_at(&["resources"]);
    for entry in entries.iter().filter(|entry| !entry.str_at(&["name"]).contains('/')) {
        found.push(shown(entry, entry.str_at(&["name"])));
    }
    for entry in entries {
        if let Some((parent, name)) = entry.str_at(&["name"]).split_once('/')
            && let Some(parent) = found.iter_mut().find(|resource| resource.name == parent)
        {
            parent.subresources.push(shown(entry, name));
        }
    }
    found
}

/// The group's versions, preferred one first.
fn ordered<'a>(group: &str, versions: &'a Versions) -> Vec<(&'a str, &'a [Shown])> {
    let mut list: Vec<_> = versions.iter().map(|(version, shown)| (version.as_str(), shown.as_slice())).collect();
    list.sort_by_key(|(version, _)| Reverse(rank(group, version).1));
    list
}

/// All groups but the one without a name, in upstream's order.
fn ordered_groups(groups: &BTreeMap<String, Versions>) -> Vec<(&str, &Versions)> {
    let mut list: Vec<_> = groups.iter().filter(|(name, _)| !name.is_empty()).map(|(n, v)| (n.as_str(), v)).collect();
    list.sort_by_key(|(name, versions)| {
        let highest = versions.keys().map(|version| rank(name, version).0).max();
        (Reverse(highest), *name)
    });
    list
}

fn group_version(group: &str, version: &str) -> String {
    if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") }
}

fn api_group(name: &str, versions: &Versions) -> Value {
    let versions: Vec<Value> = ordered(name, versions)
        .iter()
        .map(|(version, _)| json!({"groupVersion": group_version(name, version), "version": version}))
        .collect();
    json!({"name": name, "versions": versions, "preferredVersion": versions.first()})
}

fn resource_list(group: &str, version: &str, resources: &[Shown]) -> Value {
    let mut entries = Vec::new();
    for resource in resources {
        entries.push(entry(resource, resource.name.clone()));
        for sub in &resource.subresources {
            entries.push(entry(sub, format!("{}/{}", resource.name, sub.name)));
        }
    }
    let mut list =
        json!({"kind": "APIResourceList", "groupVersion": group_version(group, version), "resources": entries});
    if !group.is_empty() {
        list["apiVersion"] = "v1".into();
    }
    list
}

fn entry(shown: &Shown, name: String) -> Value {
    let mut entry = Map::new();
    entry.insert("name".into(), name.into());
    entry.insert("singularName".into(), shown.singular.as_str().into());
    entry.insert("namespaced".into(), shown.namespaced.into());
    if let Some((group, version)) = &shown.other_version {
        if !group.is_empty() {
            entry.insert("group".into(), group.as_str().into());
        }
        entry.insert("version".into(), version.as_str().into());
    }
    entry.insert("kind".into(), shown.kind.as_str().into());
    entry.insert("verbs".into(), shown.verbs.clone().into());
    add_names(&mut entry, shown);
    if !shown.storage_hash.is_empty() {
        entry.insert("storageVersionHash".into(), shown.storage_hash.as_str().into());
    }
    entry.into()
}

fn add_names(entry: &mut Map<String, Value>, shown: &Shown) {
    for (field, names) in [("shortNames", &shown.short_names), ("categories", &shown.categories)] {
        if !names.is_empty() {
            entry.insert(field.into(), names.clone().into());
        }
    }
}

/// The aggregated document for some groups.
fn aggregated(version: &str, groups: &[(&str, &Versions)]) -> Value {
    let items: Vec<Value> = groups
        .iter()
        .map(|(name, versions)| {
            let versions: Vec<Value> = ordered(name, versions)
                .iter()
                .map(|(version, resources)| {
                    let resources: Vec<Value> = resources.iter().map(aggregated_resource).collect();
                    json!({"version": version, "resources": resources, "freshness": "Current"})
                })
                .collect();
            json!({"metadata": {"name": name, "creationTimestamp": null}, "versions": versions})
        })
        .collect();
    json!({
        "kind": "APIGroupDiscoveryList",
        "apiVersion": format!("apidiscovery.k8s.io/{version}"),
        "metadata": {},
        "items": items,
    })
}

fn response_kind(shown: &Shown) -> Value {
    let (group, version) = shown.other_version.as_ref().map_or(("", ""), |(group, version)| (group, version));
    json!({"group": group, "version": version, "kind": shown.kind})
}

fn aggregated_resource(shown: &Shown) -> Value {
    let mut entry = Map::new();
    entry.insert("resource".into(), shown.name.as_str().into());
    entry.insert("responseKind".into(), response_kind(shown));
    entry.insert("scope".into(), if shown.namespaced { "Namespaced" } else { "Cluster" }.into());
    entry.insert("singularResource".into(), shown.singular.as_str().into());
    entry.insert("verbs".into(), shown.verbs.clone().into());
    add_names(&mut entry, shown);
    let subresource =
        |sub: &Shown| json!({"subresource": sub.name, "responseKind": response_kind(sub), "verbs": sub.verbs});
    if !shown.subresources.is_empty() {
        entry.insert("subresources".into(), shown.subresources.iter().map(subresource).collect());
    }
    entry.into()
}

/// What a client accepts, in the order it says.
enum Form {
    Classic,
    Aggregated(&'static str),
}

fn wanted(headers: &HeaderMap) -> Form {
    let accepts =
        headers.get_all(ACCEPT).iter().filter_map(|value| value.to_str().ok()).flat_map(|line| line.split(','));
    for accept in accepts {
        let mut parts = accept.split(';').map(str::trim);
        let kind = parts.next().unwrap_or_default();
        let params: Vec<&str> = parts.collect();
        let is_aggregated = params.contains(&"g=apidiscovery.k8s.io") && params.contains(&"as=APIGroupDiscoveryList");
        match kind {
            "application/json" if is_aggregated && params.contains(&"v=v2") => return Form::Aggregated("v2"),
            "application/json" if is_aggregated && params.contains(&"v=v2beta1") => return Form::Aggregated("v2beta1"),
            "application/json" | "application/*" | "*/*" if !is_aggregated => return Form::Classic,
            _ => {}
        }
    }
    Form::Classic
}

/// The answer to a discovery path; `None` for other paths and for groups and versions that are not served.
pub fn answer(server: &Server, path: &str, headers: &HeaderMap) -> Option<Response> {
    let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
    if !matches!(parts.first(), Some(&"api" | &"apis")) || parts.len() > 3 {
        return None;
    }
    let groups = served(server);
    if let (["api" | "apis"], Form::Aggregated(version)) = (parts.as_slice(), wanted(headers)) {
        let core: Vec<_> =
            groups.get_key_value("").map(|(name, versions)| (name.as_str(), versions)).into_iter().collect();
        let chosen = if parts == ["api"] { core } else { ordered_groups(&groups) };
        let content_type = format!("application/json;g=apidiscovery.k8s.io;v={version};as=APIGroupDiscoveryList");
        return Some(tagged(&aggregated(version, &chosen), &content_type, headers));
    }
    let document = match parts.as_slice() {
        ["api"] => json!({
            "kind": "APIVersions",
            "versions": ["v1"],
            "serverAddressByClientCIDRs": [{"clientCIDR": "0.0.0.0/0", "serverAddress": server_address(server)}],
        }),
        ["apis"] => {
            let list: Vec<Value> =
                ordered_groups(&groups).into_iter().map(|(name, versions)| api_group(name, versions)).collect();
            json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": list})
        }
        ["api", version] => resource_list("", version, groups.get("")?.get(*version)?),
        ["apis", group] => {
            let mut document = api_group(group, groups.get(*group).filter(|_| !group.is_empty())?);
            document["kind"] = "APIGroup".into();
            document["apiVersion"] = "v1".into();
            document
        }
        ["apis", group, version] => resource_list(group, version, groups.get(*group)?.get(*version)?),
        _ => return None,
    };
    Some(json_response(StatusCode::OK, &document))
}

fn server_address(server: &Server) -> String {
    match bootstrap::advertised_address(&server.config) {
        Some(address) => std::net::SocketAddr::new(address, server.config.secure_port).to_string(),
        None => format!(":{}", server.config.secure_port),
    }
}

/// A JSON answer.
pub fn json_response(status: StatusCode, document: &Value) -> Response {
    let mut response = Response::new(full(format!("{document}\n")));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, http::HeaderValue::from_static("application/json"));
    response
}

/// An answer that clients may keep: 304 when they have the same already.
fn tagged(document: &Value, content_type: &str, headers: &HeaderMap) -> Response {
    let body = document.to_string();
    let hash: String = Sha256::digest(&body).iter().map(|byte| format!("{byte:02X}")).collect();
    let etag = format!("\"{hash}\"");
    let known = headers.get(IF_NONE_MATCH).is_some_and(|value| value.as_bytes() == etag.as_bytes());
    let mut response = Response::new(full(if known { String::new() } else { body }));
    if known {
        *response.status_mut() = StatusCode::NOT_MODIFIED;
    }
    let mut set = |name, value: &str| {
        if let Ok(value) = http::HeaderValue::from_str(value) {
            response.headers_mut().insert(name, value);
        }
    };
    set(ETAG, &etag);
    set(VARY, "Accept");
    set(CACHE_CONTROL, "public");
    set(CONTENT_TYPE, content_type);
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_form_is_the_first_that_we_have() {
        let form = |accept: &'static str| {
            let headers = HeaderMap::from_iter([(ACCEPT, http::HeaderValue::from_static(accept))]);
            match wanted(&headers) {
                Form::Classic => "classic",
                Form::Aggregated(version) => version,
            }
        };
        let v2 = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList,application/json";
        assert_eq!(form(v2), "v2");
        assert_eq!(form("application/json;g=apidiscovery.k8s.io;v=v2beta1;as=APIGroupDiscoveryList"), "v2beta1");
        assert_eq!(form("application/json, */*"), "classic");
        assert_eq!(form("application/json;g=apidiscovery.k8s.io;v=v9;as=APIGroupDiscoveryList,*/*"), "classic");
    }

    #[test]
    fn versions_and_groups_are_in_upstreams_order() {
        let versions: Versions = ["v1", "v2"].into_iter().map(|version| (version.to_owned(), Vec::new())).collect();
        let names = |group: &str| {
            ordered(group, &versions).iter().map(|(version, _)| (*version).to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(names("autoscaling"), ["v2", "v1"]);
        let groups = ["apps", "apiregistration.k8s.io", "policy", "", "example.com"].into_iter();
        let groups = groups.map(|name| (name.to_owned(), [("v1".to_owned(), Vec::new())].into())).collect();
        let order: Vec<_> = ordered_groups(&groups).into_iter().map(|(name, _)| name).collect();
        assert_eq!(order, ["apiregistration.k8s.io", "apps", "policy", "example.com"]);
    }
}
