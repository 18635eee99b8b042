//! The question an authorizer answers, its possible answers, and the words of a refusal. Nothing here decides.

use apimachinery::meta::GroupResource;
use apimachinery::status::Status;

use super::UserInfo;
use super::objects::Objects;
use crate::http::RequestInfo;

/// One question: may `user` do `verb` on this? Empty strings mean "not given", as in upstream's attributes.
#[derive(Clone, Copy, Debug)]
pub struct Attributes<'a> {
    pub user: &'a UserInfo,
    pub verb: &'a str,
    /// False for plain paths such as `/healthz`; then only `verb` and `path` matter.
    pub is_resource: bool,
    pub api_group: &'a str,
    pub api_version: &'a str,
    pub resource: &'a str,
    pub subresource: &'a str,
    pub namespace: &'a str,
    pub name: &'a str,
    pub path: &'a str,
    /// The raw `fieldSelector` of a list or watch; nodes may list only their own pods.
    pub field_selector: &'a str,
}

impl<'a> Attributes<'a> {
    /// A question about a cluster-scoped or (after setting `namespace`) namespaced resource.
    pub fn resource(user: &'a UserInfo, verb: &'a str, api_group: &'a str, resource: &'a str) -> Self {
        Self {
            user,
            verb,
            is_resource: true,
            api_group,
            api_version: "",
            resource,
            subresource: "",
            namespace: "",
            name: "",
            path: "",
            field_selector: "",
        }
    }

    /// A question about a path that is no resource.
    pub fn path(user: &'a UserInfo, verb: &'a str, path: &'a str) -> Self {
        Self { is_resource: false, path, ..Self::resource(user, verb, "", "") }
    }

    /// What a request asks.
    pub fn of_request(user: &'a UserInfo, info: &'a RequestInfo) -> Self {
        Self {
            user,
            verb: &info.verb,
            is_resource: info.is_resource,
            api_group: &info.api_group,
            api_version: &info.api_version,
            resource: &info.resource,
            subresource: &info.subresource,
            namespace: &info.namespace,
            name: &info.name,
            path: &info.path,
            field_selector: &info.field_selector,
        }
    }

    /// `pods/log` for a subresource, else `pods`.
    pub fn combined_resource(&self) -> String {
        if self.subresource.is_empty() {
            self.resource.to_owned()
        } else {
            format!("{}/{}", self.resource, self.subresource)
        }
    }

    /// The 403 answer, worded as upstream words it.
    pub fn forbidden(&self, reason: &str) -> Status {
        let mut message = self.refusal();
        if !reason.is_empty() {
            message.push_str(": ");
            message.push_str(reason);
        }
        let resource = GroupResource::new(self.api_group.to_owned(), self.resource.to_owned());
        Status::forbidden(&resource, self.name, message)
    }

    fn refusal(&self) -> String {
        let Self { user, verb, path, api_group, namespace, .. } = self;
        if !self.is_resource {
            return format!("User {:?} cannot {verb} path {path:?}", user.name);
        }
        let resource = self.combined_resource();
        let scope = match namespace.is_empty() {
            true => "at the cluster scope".to_owned(),
            false => format!("in the namespace {namespace:?}"),
        };
        format!("User {:?} cannot {verb} resource {resource:?} in API group {api_group:?} {scope}", user.name)
    }
}

/// An authorizer's answer; the first that is not `NoOpinion` counts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    Allow(String),
    /// Ends the chain: no later authorizer may allow it.
    Deny(String),
    NoOpinion(String),
}

impl Decision {
    /// A refusal without a reason.
    pub fn none() -> Self {
        Self::NoOpinion(String::new())
    }

    pub fn is_allowed(&self) -> bool {
        matches!(self, Self::Allow(_))
    }

    pub fn reason(&self) -> &str {
        match self {
            Self::Allow(reason) | Self::Deny(reason) | Self::NoOpinion(reason) => reason,
        }
    }
}

/// Decides whether a request may go on. Called on every request, so it must not block or do I/O.
pub trait Authorizer: Send + Sync + 'static {
    /// `objects` is the cluster as the caches know it now.
    fn authorize(&self, objects: &dyn Objects, attributes: &Attributes<'_>) -> Decision;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_read_as_upstreams() {
        let user = UserInfo { name: "x".into(), ..UserInfo::default() };
        let list = Attributes { namespace: "default", ..Attributes::resource(&user, "list", "", "pods") };
        assert_eq!(
            list.forbidden("").message,
            r#"pods is forbidden: User "x" cannot list resource "pods" in API group "" in the namespace "default""#
        );
        let scale =
            Attributes { subresource: "scale", name: "d", ..Attributes::resource(&user, "get", "apps", "deployments") };
        assert_eq!(
            scale.forbidden("why").message,
            r#"deployments.apps "d" is forbidden: User "x" cannot get resource "deployments/scale" in API group "apps" at the cluster scope: why"#
        );
        let path = Attributes::path(&user, "get", "/metrics");
        assert_eq!(path.forbidden("").message, r#"forbidden: User "x" cannot get path "/metrics""#);
    }
}
