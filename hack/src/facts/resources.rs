//! The served groups, versions and resources, from upstream's discovery documents.

use std::fmt::Write;

use anyhow::{Context, Result};
use serde_json::Value;

use super::{Upstream, read_json};

/// One `group` line per group in upstream's order, each followed by its versions' `res` lines, each followed by its
/// `sub` lines.
pub fn write(upstream: &Upstream<'_>, out: &mut String) -> Result<()> {
    let discovery = upstream.api().join("discovery");
    write_group(out, "", &["v1"], "v1");
    write_version(out, "", "v1", &read_json(&discovery.join("api__v1.json"))?)?;
    let groups = read_json(&discovery.join("apis.json"))?;
    for group in array(&groups, "groups") {
        let name = text(group, "name");
        let versions: Vec<&str> = array(group, "versions").map(|v| text(v, "version")).collect();
        write_group(out, name, &versions, text(&group["preferredVersion"], "version"));
        for version in versions {
            let document = read_json(&discovery.join(format!("apis__{name}__{version}.json")))?;
            write_version(out, name, version, &document)?;
        }
    }
    Ok(())
}

fn write_group(out: &mut String, name: &str, versions: &[&str], preferred: &str) {
    let _ = writeln!(out, "group {} {} {preferred}", dash(name), versions.join(","));
}

fn write_version(out: &mut String, group: &str, version: &str, document: &Value) -> Result<()> {
    let resources: Vec<&Value> = array(document, "resources").collect();
    for resource in resources.iter().filter(|r| !text(r, "name").contains('/')) {
        let name = text(resource, "name");
        let scope = if resource["namespaced"] == true { "ns" } else { "cluster" };
        let _ = writeln!(
            out,
            "res {version} {name} {} {} {scope} {} {} {} {}",
            dash(text(resource, "singularName")),
            gvk(resource, group, version),
            list(resource, "verbs"),
            list(resource, "shortNames"),
            list(resource, "categories"),
            dash(text(resource, "storageVersionHash")),
        );
        for sub in &resources {
            let Some(sub_name) = text(sub, "name").strip_prefix(name).and_then(|s| s.strip_prefix('/')) else {
                continue;
            };
            let _ = writeln!(out, "sub {sub_name} {} {}", gvk(sub, group, version), list(sub, "verbs"));
        }
    }
    resources.first().map(|_| ()).context("a version without resources")
}

fn gvk(resource: &Value, group: &str, version: &str) -> String {
    // A resource's own group and version are only written when they differ from those it is served under.
    let version_given = resource["version"].as_str();
    let group = if version_given.is_some() { text(resource, "group") } else { group };
    format!("{group}/{}/{}", version_given.unwrap_or(version), text(resource, "kind"))
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

fn array<'a>(value: &'a Value, key: &str) -> impl Iterator<Item = &'a Value> {
    value[key].as_array().into_iter().flatten()
}

fn list(value: &Value, key: &str) -> String {
    let items: Vec<&str> = array(value, key).filter_map(Value::as_str).collect();
    dash(&items.join(",")).to_owned()
}

fn dash(text: &str) -> &str {
    if text.is_empty() { "-" } else { text }
}
