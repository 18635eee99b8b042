//! `authorizer`: whether the user of the request may do something else, asked of this server's authorizers. A check is
//! put together step by step: `authorizer.group("apps").resource("deployments").namespace("a").check("create").allowed()`.

use std::fmt;
use std::sync::Arc;

use apimachinery::meta::validation::{is_dns1123_label, is_dns1123_subdomain};
use cel::common::types::{CelBool, CelString};
use cel::{DeclarationError, Env, ExecutionError};

use super::{failure, value_type};
use crate::auth::{Attributes, Decision as Answer, UserInfo, service_account};

/// Whoever decides.
pub type Ask = Arc<dyn Fn(&Attributes<'_>) -> Answer + Send + Sync>;

/// A user, and whom to ask about it.
#[derive(Clone)]
pub struct Authorizer {
    user: Arc<UserInfo>,
    ask: Ask,
}

value_type!(Authorizer, "kubernetes.authorization.Authorizer");

impl fmt::Debug for Authorizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authorizer").field("user", &self.user.name).finish_non_exhaustive()
    }
}

impl PartialEq for Authorizer {
    fn eq(&self, other: &Self) -> bool {
        self.user == other.user
    }
}

impl Authorizer {
    pub fn new(user: Arc<UserInfo>, ask: Ask) -> Self {
        Self { user, ask }
    }

    /// A check of one resource: `authorizer.requestResource`.
    pub fn resource(&self, resource: [&str; 5]) -> ResourceCheck {
        let [group, resource, subresource, namespace, name] = resource.map(str::to_owned);
        ResourceCheck { by: self.clone(), group, resource, subresource, namespace, name, fields: String::new() }
    }
}

#[derive(Clone, Debug, PartialEq)]
struct PathCheck {
    by: Authorizer,
    path: String,
}

value_type!(PathCheck, "kubernetes.authorization.PathCheck");

#[derive(Clone, Debug, PartialEq)]
struct GroupCheck {
    by: Authorizer,
    group: String,
}

value_type!(GroupCheck, "kubernetes.authorization.GroupCheck");

#[derive(Clone, Debug, PartialEq)]
pub struct ResourceCheck {
    by: Authorizer,
    group: String,
    resource: String,
    subresource: String,
    namespace: String,
    name: String,
    fields: String,
}

value_type!(ResourceCheck, "kubernetes.authorization.ResourceCheck");

#[derive(Clone, Debug, PartialEq)]
struct Decision {
    allowed: bool,
    reason: String,
}

value_type!(Decision, "kubernetes.authorization.Decision");

pub fn extension(env: &mut Env) -> Result<(), DeclarationError> {
    cel::add_member_overload!(env, fn path: (Authorizer, CelString) -> Result<PathCheck>)?;
    cel::add_member_overload!(env, fn group: (Authorizer, CelString) -> GroupCheck)?;
    cel::add_member_overload!(env, fn service_account: (Authorizer, CelString, CelString) -> Result<Authorizer>)?;
    cel::add_member_overload!(env, fn resource: (GroupCheck, CelString) -> Result<ResourceCheck>)?;
    cel::add_member_overload!(env, fn subresource: (ResourceCheck, CelString) -> ResourceCheck)?;
    cel::add_member_overload!(env, fn namespace: (ResourceCheck, CelString) -> ResourceCheck)?;
    cel::add_member_overload!(env, fn name: (ResourceCheck, CelString) -> ResourceCheck)?;
    cel::add_member_overload!(env, fn field_selector: (ResourceCheck, CelString) -> ResourceCheck)?;
    cel::add_member_overload!(env, fn label_selector: (ResourceCheck, CelString) -> ResourceCheck)?;
    cel::add_member_overload!(env, fn check_path: (PathCheck, CelString) -> Decision, name = "check")?;
    cel::add_member_overload!(env, fn check_resource: (ResourceCheck, CelString) -> Decision, name = "check")?;
    cel::add_member_overload!(env, fn errored: (Decision) -> CelBool)?;
    cel::add_member_overload!(env, fn error: (Decision) -> CelString)?;
    cel::add_member_overload!(env, fn allowed: (Decision) -> CelBool)?;
    cel::add_member_overload!(env, fn reason: (Decision) -> CelString)
}

fn path(by: &Authorizer, path: &CelString<'_>) -> Result<PathCheck, ExecutionError> {
    match path.inner().trim() {
        "" => Err(failure("path", "path must not be empty")),
        _ => Ok(PathCheck { by: by.clone(), path: path.inner().to_owned() }),
    }
}

fn group(by: &Authorizer, group: &CelString<'_>) -> GroupCheck {
    GroupCheck { by: by.clone(), group: group.inner().to_owned() }
}

fn service_account(
    by: &Authorizer,
    namespace: &CelString<'_>,
    name: &CelString<'_>,
) -> Result<Authorizer, ExecutionError> {
    if !is_dns1123_subdomain(name.inner()).is_empty() {
        return Err(failure("serviceAccount", "Invalid service account name"));
    }
    if !is_dns1123_label(namespace.inner()).is_empty() {
        return Err(failure("serviceAccount", "Invalid service account namespace"));
    }
    let user = service_account::user_info(namespace.inner(), name.inner(), "");
    Ok(Authorizer { user: Arc::new(user), ask: by.ask.clone() })
}

fn resource(of: &GroupCheck, resource: &CelString<'_>) -> Result<ResourceCheck, ExecutionError> {
    match resource.inner().trim() {
        "" => Err(failure("resource", "resource must not be empty")),
        _ => Ok(of.by.resource([&of.group, resource.inner(), "", "", ""])),
    }
}

fn subresource(check: &ResourceCheck, name: &CelString<'_>) -> ResourceCheck {
    ResourceCheck { subresource: name.inner().to_owned(), ..check.clone() }
}

fn namespace(check: &ResourceCheck, name: &CelString<'_>) -> ResourceCheck {
    ResourceCheck { namespace: name.inner().to_owned(), ..check.clone() }
}

fn name(check: &ResourceCheck, name: &CelString<'_>) -> ResourceCheck {
    ResourceCheck { name: name.inner().to_owned(), ..check.clone() }
}

fn field_selector(check: &ResourceCheck, selector: &CelString<'_>) -> ResourceCheck {
    ResourceCheck { fields: selector.inner().to_owned(), ..check.clone() }
}

/// None of this server's authorizers looks at labels.
fn label_selector(check: &ResourceCheck, _: &CelString<'_>) -> ResourceCheck {
    check.clone()
}

fn decide(by: &Authorizer, attributes: &Attributes<'_>) -> Decision {
    match (by.ask)(attributes) {
        Answer::Allow(reason) => Decision { allowed: true, reason },
        Answer::Deny(reason) | Answer::NoOpinion(reason) => Decision { allowed: false, reason },
    }
}

fn check_path(check: &PathCheck, verb: &CelString<'_>) -> Decision {
    decide(&check.by, &Attributes::path(&check.by.user, verb.inner(), &check.path))
}

fn check_resource(check: &ResourceCheck, verb: &CelString<'_>) -> Decision {
    let attributes = Attributes {
        api_version: "*",
        subresource: &check.subresource,
        namespace: &check.namespace,
        name: &check.name,
        field_selector: &check.fields,
        ..Attributes::resource(&check.by.user, verb.inner(), &check.group, &check.resource)
    };
    decide(&check.by, &attributes)
}

/// An authorizer that cannot be asked has no opinion, and says so in the reason.
fn errored(_: &Decision) -> CelBool {
    false.into()
}

fn error(_: &Decision) -> CelString<'static> {
    String::new().into()
}

fn allowed(decision: &Decision) -> CelBool {
    decision.allowed.into()
}

fn reason(decision: &Decision) -> CelString<'static> {
    decision.reason.clone().into()
}
