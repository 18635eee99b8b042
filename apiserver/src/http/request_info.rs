//! What a request is about, read from its method, path and query the way upstream reads them. Filters, authorization,
//! audit and routing all work on this one answer; nothing parses a path twice.

use http::Method;

/// For `/apis/apps/v1/namespaces/a/deployments/b/scale`: group `apps`, version `v1`, namespace `a`, resource
/// `deployments`, name `b`, subresource `scale`, and the parts from the resource on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RequestInfo {
    pub is_resource: bool,
    pub path: String,
    /// `get list watch create update patch delete deletecollection`, or the lower-case method of non-resource requests.
    pub verb: String,
    /// `api` or `apis` of resource requests.
    pub api_prefix: String,
    pub api_group: String,
    pub api_version: String,
    pub namespace: String,
    pub resource: String,
    pub subresource: String,
    pub name: String,
    /// The resource, the name, the subresource and what follows it.
    pub parts: Vec<String>,
    pub label_selector: String,
    pub field_selector: String,
    /// Decoded query parameters in the order given.
    pub query: Vec<(String, String)>,
}

/// Subresources of namespaces; every other third part of `/namespaces/<ns>/…` is a resource inside the namespace.
const NAMESPACE_SUBRESOURCES: [&str; 2] = ["status", "finalize"];

impl RequestInfo {
    pub fn new(method: &Method, path: &str, query: Option<&str>) -> Self {
        let query: Vec<(String, String)> =
            form_urlencoded::parse(query.unwrap_or_default().as_bytes()).into_owned().collect();
        let mut info =
            Self { path: path.to_owned(), verb: method.as_str().to_ascii_lowercase(), query, ..Self::default() };
        let decoded = percent_encoding::percent_decode_str(path).decode_utf8_lossy();
        let mut parts: Vec<String> = decoded.trim_matches('/').split('/').map(str::to_owned).collect();
        if parts.len() < 3 || !matches!(parts[0].as_str(), "api" | "apis") {
            return info;
        }
        info.api_prefix = parts.remove(0);
        if info.api_prefix == "apis" {
            if parts.len() < 3 {
                return info;
            }
            info.api_group = parts.remove(0);
        }
        info.is_resource = true;
        info.api_version = parts.remove(0);
        info.verb = match *method {
            Method::POST => "create",
            Method::GET | Method::HEAD => "get",
            Method::PUT => "update",
            Method::PATCH => "patch",
            Method::DELETE => "delete",
            _ => "",
        }
        .to_owned();
        if matches!(parts[0].as_str(), "watch" | "proxy") && parts.len() > 1 {
            info.verb = parts.remove(0);
        }
        if parts[0] == "namespaces" && parts.len() > 1 {
            info.namespace = parts[1].clone();
            if parts.len() > 2 && !NAMESPACE_SUBRESOURCES.contains(&parts[2].as_str()) {
                parts.drain(..2);
            }
        }
        info.resource = parts[0].clone();
        info.name = parts.get(1).cloned().unwrap_or_default();
        info.subresource = parts.get(2).cloned().unwrap_or_default();
        info.parts = parts;
        info.label_selector = info.param("labelSelector").unwrap_or_default().to_owned();
        info.field_selector = info.param("fieldSelector").unwrap_or_default().to_owned();
        info.refine_collection_verbs();
        info
    }

    /// A GET or DELETE without a name is about the collection; `watch=true` watches; a field selector that pins
    /// `metadata.name` names the object.
    fn refine_collection_verbs(&mut self) {
        if self.name.is_empty() && self.verb == "get" {
            self.verb = if self.flag("watch") { "watch" } else { "list" }.to_owned();
        }
        if self.name.is_empty() && self.verb == "delete" {
            self.verb = "deletecollection".to_owned();
        }
        if self.name.is_empty() && matches!(self.verb.as_str(), "list" | "watch" | "deletecollection") {
            let pinned = self.field_selector.split(',').find_map(|term| {
                let value = term.strip_prefix("metadata.name=")?;
                Some(value.strip_prefix('=').unwrap_or(value))
            });
            if let Some(name) = pinned.filter(|name| !name.is_empty() && !name.contains('/')) {
                self.name = name.to_owned();
            }
        }
    }

    /// The first value of a query parameter.
    pub fn param(&self, name: &str) -> Option<&str> {
        self.query.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// All values of a query parameter.
    pub fn params<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.query.iter().filter(move |(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// A boolean query parameter, as upstream reads it: present and neither `false` nor `0`.
    pub fn flag(&self, name: &str) -> bool {
        self.param(name).is_some_and(|value| !matches!(value, "false" | "0" | "False"))
    }

    /// Requests that live as long as the client wants: no timeout, not counted as in flight.
    pub fn is_long_running(&self) -> bool {
        matches!(self.verb.as_str(), "watch" | "proxy")
            || self.is_resource
                && matches!(self.subresource.as_str(), "attach" | "exec" | "proxy" | "log" | "portforward")
    }

    pub fn is_mutating(&self) -> bool {
        !matches!(self.verb.as_str(), "get" | "list" | "watch" | "head" | "options")
    }

    pub fn group_resource(&self) -> apimachinery::meta::GroupResource {
        apimachinery::meta::GroupResource::new(self.api_group.clone(), self.resource.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_read_as_upstream_reads_them() {
        // (method, path, verb, group, version, namespace, resource, subresource, name)
        let cases = [
            ("GET", "/api/v1/namespaces", "list", "", "v1", "", "namespaces", "", ""),
            ("GET", "/api/v1/namespaces/a", "get", "", "v1", "a", "namespaces", "", "a"),
            ("PUT", "/api/v1/namespaces/a/finalize", "update", "", "v1", "a", "namespaces", "finalize", "a"),
            ("GET", "/api/v1/namespaces/a/pods", "list", "", "v1", "a", "pods", "", ""),
            ("GET", "/api/v1/namespaces/a/pods?watch=true", "watch", "", "v1", "a", "pods", "", ""),
            ("GET", "/api/v1/pods?watch=0", "list", "", "v1", "", "pods", "", ""),
            ("GET", "/api/v1/pods?fieldSelector=metadata.name%3Db", "list", "", "v1", "", "pods", "", "b"),
            ("POST", "/api/v1/namespaces/a/pods/b/binding", "create", "", "v1", "a", "pods", "binding", "b"),
            ("DELETE", "/apis/apps/v1/namespaces/a/deployments/b", "delete", "apps", "v1", "a", "deployments", "", "b"),
            (
                "DELETE",
                "/apis/apps/v1/namespaces/a/deployments",
                "deletecollection",
                "apps",
                "v1",
                "a",
                "deployments",
                "",
                "",
            ),
            ("GET", "/api/v1/watch/namespaces/a/pods/b", "watch", "", "v1", "a", "pods", "", "b"),
            (
                "GET",
                "/apis/rbac.authorization.k8s.io/v1/clusterroles/system:node",
                "get",
                "rbac.authorization.k8s.io",
                "v1",
                "",
                "clusterroles",
                "",
                "system:node",
            ),
        ];
        for (method, url, verb, group, version, namespace, resource, subresource, name) in cases {
            let (path, query) = url.split_once('?').map_or((url, None), |(p, q)| (p, Some(q)));
            let method = method.parse().expect("method");
            let info = RequestInfo::new(&method, path, query);
            let got = (
                &*info.verb,
                &*info.api_group,
                &*info.api_version,
                &*info.namespace,
                &*info.resource,
                &*info.subresource,
                &*info.name,
            );
            assert_eq!(got, (verb, group, version, namespace, resource, subresource, name), "{url}");
        }
    }

    #[test]
    fn discovery_and_health_are_no_resources() {
        for path in ["/", "/api", "/api/v1", "/apis", "/apis/apps", "/apis/apps/v1", "/healthz", "/openapi/v2"] {
            assert!(!RequestInfo::new(&Method::GET, path, None).is_resource, "{path}");
        }
    }
}
