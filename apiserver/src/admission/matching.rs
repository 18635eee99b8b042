//! Which requests a webhook or a policy is about: its rules, its selectors, and the version it wants to see. Shared by
//! all of `admissionregistration.k8s.io`; nothing here decides about a request.

use std::sync::Arc;

use apimachinery::meta::{GroupResource, LabelSelector};
use apimachinery::status::{Result, Status};
use serde_json::Value;

use super::{AdmissionRequest, Operation, cached};
use crate::registry::object::ObjectExt;
use crate::registry::{Resource, Served};
use crate::server::Server;

/// An entry of `rules` or `resourceRules`.
pub struct Rule {
    operations: Vec<String>,
    groups: Vec<String>,
    versions: Vec<String>,
    resources: Vec<String>,
    scope: String,
    /// Only of policies; empty: any.
    names: Vec<String>,
}

impl Rule {
    pub fn read(rule: &Value) -> Self {
        let texts = |field: &str| rule.list_at(&[field]).iter().filter_map(Value::as_str).map(str::to_owned).collect();
        Self {
            operations: texts("operations"),
            groups: texts("apiGroups"),
            versions: texts("apiVersions"),
            resources: texts("resources"),
            scope: rule.str_at(&["scope"]).to_owned(),
            names: texts("resourceNames"),
        }
    }

    /// Whether it is about the request, if that were about this version.
    fn matches(&self, request: &AdmissionRequest<'_>, version: &str, namespaced: bool) -> bool {
        let one_of = |list: &[String], value: &str| list.iter().any(|given| given == "*" || given == value);
        let scope = match self.scope.as_str() {
            "Cluster" => !namespaced,
            "Namespaced" => namespaced,
            _ => true,
        };
        scope
            && one_of(&self.operations, request.operation.name())
            && one_of(&self.groups, &request.gvr.group)
            && one_of(&self.versions, version)
            && (self.names.is_empty() || self.names.iter().any(|name| name == request.name))
            && self.resources.iter().any(|pattern| names_resource(pattern, &request.gvr.resource, request.subresource))
    }
}

/// `pods`, `pods/status`, `pods/*`, `*`, `*/status`, `*/*`.
fn names_resource(pattern: &str, resource: &str, subresource: &str) -> bool {
    let (wanted, wanted_sub) = pattern.split_once('/').unwrap_or((pattern, ""));
    (wanted == "*" || wanted == resource) && (wanted_sub == "*" || wanted_sub == subresource)
}

/// The version in which one of the rules is about the request: its own when that matches, else, unless the match
/// policy is `Exact`, another that the same objects can be had in.
pub fn version_of(
    server: &Server,
    rules: &[Rule],
    is_exact: bool,
    request: &AdmissionRequest<'_>,
) -> Option<(Arc<Resource>, Arc<Served>)> {
    let resource = server.registry.get(&request.gvr.group, &request.gvr.resource)?;
    let own = resource.version(&request.gvr.version)?.clone();
    // A namespace lives in itself, as far as rules are concerned, but is cluster-scoped.
    let namespaced = resource.namespaced;
    if rules.iter().any(|rule| rule.matches(request, &own.gvr.version, namespaced)) {
        return Some((resource, own));
    }
    if is_exact {
        return None;
    }
    let other = resource
        .versions
        .iter()
        .find(|served| rules.iter().any(|rule| rule.matches(request, &served.gvr.version, namespaced)))
        .cloned()?;
    Some((resource, other))
}

/// `namespaceSelector` and `objectSelector`.
pub struct Selectors {
    namespace: LabelSelector,
    object: LabelSelector,
}

impl Selectors {
    /// A selector that cannot be read selects nothing: validation keeps such from being stored.
    pub fn read(namespace: &Value, object: &Value) -> Self {
        let read = |selector: &Value| match selector {
            Value::Null => LabelSelector::everything(),
            selector => LabelSelector::from_json(selector).unwrap_or_else(|_| LabelSelector::nothing()),
        };
        Self { namespace: read(namespace), object: read(object) }
    }

    pub fn match_request(&self, server: &Server, request: &AdmissionRequest<'_>) -> Result<bool> {
        let labels = |object: &Value| object["metadata"]["labels"].clone();
        let matches_object = self.object.is_empty()
            || self.object.matches_value(&labels(request.object))
            || request.old.is_some_and(|old| self.object.matches_value(&labels(old)));
        if !matches_object {
            return Ok(false);
        }
        if self.namespace.is_empty() {
            return Ok(true);
        }
        if request.is("", "namespaces") {
            let object = if request.operation == Operation::Delete { request.old } else { Some(&*request.object) };
            return Ok(object.is_some_and(|object| self.namespace.matches_value(&labels(object))));
        }
        if request.namespace.is_empty() {
            return Ok(true);
        }
        match cached(server, "", "namespaces", "", request.namespace) {
            Some(namespace) => Ok(self.namespace.matches_value(&labels(&namespace))),
            None => Err(Status::not_found(&GroupResource::new("", "namespaces"), request.namespace)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::names_resource;

    #[test]
    fn patterns_name_resources() {
        let cases = [
            ("pods", "pods", "", true),
            ("pods", "pods", "status", false),
            ("pods/*", "pods", "status", true),
            ("*", "pods", "", true),
            ("*", "pods", "exec", false),
            ("*/*", "pods", "exec", true),
            ("*/scale", "deployments", "scale", true),
            ("pods/exec", "pods", "attach", false),
        ];
        for (pattern, resource, subresource, expected) in cases {
            assert_eq!(names_resource(pattern, resource, subresource), expected, "{pattern} {resource}/{subresource}");
        }
    }
}
