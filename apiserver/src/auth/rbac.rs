//! The RBAC authorizer: roles and bindings from the watch caches, indexed by subject.
//!
//! The index is rebuilt when one of the four resources changed; objects that did not change keep their parsed form.
//! Nothing here writes: default roles come from `bootstrap`, aggregated roles from the controller manager.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use serde_json::Value;

use super::objects::{Entry, Objects};
use super::rules::{PolicyRule, rules_of};
use super::{Attributes, Authorizer, Decision, UserInfo};

pub const GROUP: &str = "rbac.authorization.k8s.io";
const RESOURCES: [&str; 4] = ["clusterrolebindings", "clusterroles", "rolebindings", "roles"];

type Rules = Arc<Vec<PolicyRule>>;
/// Storage key and revision of an object.
type Identity = (String, u64);

/// Answers from the RBAC objects of the cluster.
#[derive(Default)]
pub struct Rbac {
    index: Mutex<Arc<Index>>,
}

/// One subject of one binding.
struct Grant {
    /// For `Allow`'s reason: `ClusterRoleBinding "a" of ClusterRole "b" to User "c"`.
    description: String,
    /// The role's rules, or the message that says it does not exist.
    rules: Result<Rules, Arc<str>>,
}

#[derive(Clone, PartialEq, Eq, Hash)]
enum Subject {
    User(String),
    Group(String),
}

#[derive(Default)]
struct Index {
    revisions: [u64; 4],
    /// By namespace of the binding; the empty name holds the cluster role bindings.
    grants: HashMap<String, HashMap<Subject, Vec<Grant>>>,
    roles: HashMap<Identity, Rules>,
    bindings: HashMap<Identity, Arc<Binding>>,
}

struct Binding {
    namespace: String,
    name: String,
    role_kind: String,
    role_name: String,
    subjects: Vec<(Subject, String)>,
}

impl Rbac {
    fn index(&self, objects: &dyn Objects) -> Arc<Index> {
        let revisions = RESOURCES.map(|resource| objects.revision(GROUP, resource));
        let mut current = self.index.lock();
        if current.revisions != revisions {
            *current = Arc::new(Index::build(objects, revisions, &current));
        }
        current.clone()
    }

    /// Every rule that `user` holds in `namespace` (empty: at cluster scope), and what was wrong on the way.
    pub fn rules_for(&self, objects: &dyn Objects, user: &UserInfo, namespace: &str) -> (Vec<PolicyRule>, Vec<String>) {
        let (mut rules, mut errors) = (Vec::new(), Vec::new());
        self.index(objects).visit(user, namespace, |grant| {
            match &grant.rules {
                Ok(granted) => rules.extend(granted.iter().cloned()),
                Err(missing) => errors.push(missing.to_string()),
            }
            false
        });
        (rules, errors)
    }
}

/// The rules of the role that a binding refers to.
pub fn role_rules(objects: &dyn Objects, namespace: &str, kind: &str, name: &str) -> Option<Vec<PolicyRule>> {
    let (resource, namespace) = match kind {
        "ClusterRole" => ("clusterroles", ""),
        _ => ("roles", namespace),
    };
    objects.get(GROUP, resource, namespace, name).map(|role| rules_of(&role))
}

impl Authorizer for Rbac {
    fn authorize(&self, objects: &dyn Objects, attributes: &Attributes<'_>) -> Decision {
        let (mut reason, mut errors) = (None, Vec::new());
        let namespace = if attributes.is_resource { attributes.namespace } else { "" };
        self.index(objects).visit(attributes.user, namespace, |grant| match &grant.rules {
            Ok(rules) if rules.iter().any(|rule| rule.allows(attributes)) => {
                reason = Some(grant.description.clone());
                true
            }
            Ok(_) => false,
            Err(missing) => {
                errors.push(missing.to_string());
                false
            }
        });
        errors.sort();
        errors.dedup();
        match (reason, errors.as_slice()) {
            (Some(reason), _) => Decision::Allow(format!("RBAC: allowed by {reason}")),
            (None, []) => Decision::none(),
            (None, [one]) => Decision::NoOpinion(format!("RBAC: {one}")),
            (None, many) => Decision::NoOpinion(format!("RBAC: [{}]", many.join(", "))),
        }
    }
}

impl Index {
    fn build(objects: &dyn Objects, revisions: [u64; 4], old: &Index) -> Self {
        let mut index = Self { revisions, ..Self::default() };
        let mut roles = HashMap::new();
        for resource in ["clusterroles", "roles"] {
            for entry in objects.list(GROUP, resource, None) {
                let (name, rules) = index.role(&entry, old);
                roles.insert(name, rules);
            }
        }
        for resource in ["clusterrolebindings", "rolebindings"] {
            for entry in objects.list(GROUP, resource, None) {
                let binding = index.binding(&entry, old);
                index.add(&binding, &roles);
            }
        }
        index
    }

    /// Namespace and name of a role, and its rules.
    fn role(&mut self, entry: &Entry, old: &Index) -> ((String, String), Rules) {
        let (identity, value) = (entry.identity(), entry.value());
        let rules = old.roles.get(&identity).cloned().unwrap_or_else(|| Arc::new(rules_of(&value)));
        self.roles.insert(identity, rules.clone());
        let meta = |field| value.pointer(field).and_then(Value::as_str).unwrap_or_default().to_owned();
        ((meta("/metadata/namespace"), meta("/metadata/name")), rules)
    }

    fn binding(&mut self, entry: &Entry, old: &Index) -> Arc<Binding> {
        let identity = entry.identity();
        let binding = old.bindings.get(&identity).cloned();
        let binding = binding.unwrap_or_else(|| Arc::new(Binding::parse(&entry.value())));
        self.bindings.insert(identity, binding.clone());
        binding
    }

    fn add(&mut self, binding: &Binding, roles: &HashMap<(String, String), Rules>) {
        let Binding { namespace, name, role_kind, role_name, subjects } = binding;
        let (role_namespace, resource) = match role_kind.as_str() {
            "ClusterRole" => (String::new(), "clusterrole"),
            _ => (namespace.clone(), "role"),
        };
        let rules = roles
            .get(&(role_namespace, role_name.clone()))
            .cloned()
            .ok_or_else(|| Arc::from(format!("{resource}.{GROUP} {role_name:?} not found")));
        let binding = match namespace.is_empty() {
            true => format!("ClusterRoleBinding {name:?}"),
            false => format!("RoleBinding {:?}", format!("{name}/{namespace}")),
        };
        let grants = self.grants.entry(namespace.clone()).or_default();
        for (subject, subject_text) in subjects {
            let description = format!("{binding} of {role_kind} {role_name:?} to {subject_text}");
            grants.entry(subject.clone()).or_default().push(Grant { description, rules: rules.clone() });
        }
    }

    /// Shows every grant that applies until `done` says to stop; cluster-wide ones first.
    fn visit(&self, user: &UserInfo, namespace: &str, mut done: impl FnMut(&Grant) -> bool) {
        let scopes = [""].into_iter().chain((!namespace.is_empty()).then_some(namespace));
        for scope in scopes {
            let Some(grants) = self.grants.get(scope) else { continue };
            let subjects = user.groups.iter().map(|group| Subject::Group(group.clone()));
            for subject in [Subject::User(user.name.clone())].into_iter().chain(subjects) {
                if grants.get(&subject).is_some_and(|grants| grants.iter().any(&mut done)) {
                    return;
                }
            }
        }
    }
}

impl Binding {
    fn parse(object: &Value) -> Self {
        let text = |path: &str| object.pointer(path).and_then(Value::as_str).unwrap_or_default().to_owned();
        let namespace = text("/metadata/namespace");
        let subjects = object.get("subjects").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        Self {
            subjects: subjects.iter().filter_map(|subject| parse_subject(subject, &namespace)).collect(),
            name: text("/metadata/name"),
            role_kind: text("/roleRef/kind"),
            role_name: text("/roleRef/name"),
            namespace,
        }
    }
}

/// A subject and how `Allow`'s reason names it.
fn parse_subject(subject: &Value, binding_namespace: &str) -> Option<(Subject, String)> {
    let text = |field: &str| subject.get(field).and_then(Value::as_str).unwrap_or_default();
    let (kind, name) = (text("kind"), text("name"));
    match kind {
        "User" => Some((Subject::User(name.into()), format!("User {name:?}"))),
        "Group" => Some((Subject::Group(name.into()), format!("Group {name:?}"))),
        "ServiceAccount" => {
            let namespace = Some(text("namespace")).filter(|ns| !ns.is_empty()).unwrap_or(binding_namespace);
            if namespace.is_empty() {
                return None;
            }
            let description = format!("ServiceAccount {:?}", format!("{name}/{namespace}"));
            Some((Subject::User(format!("system:serviceaccount:{namespace}:{name}")), description))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::objects::Fake;
    use super::*;

    fn cluster() -> Fake {
        let role = |ns: &str, name: &str, resource: &str| json!({"metadata": {"namespace": ns, "name": name}, "rules": [{"verbs": ["get"], "apiGroups": [""], "resources": [resource]}]});
        let binding = |ns: &str, name: &str, kind: &str, role: &str, subject: Value| json!({"metadata": {"namespace": ns, "name": name}, "roleRef": {"kind": kind, "name": role}, "subjects": [subject]});
        Fake(vec![
            (GROUP, "clusterroles", role("", "read", "pods")),
            (GROUP, "roles", role("a", "secrets", "secrets")),
            (
                GROUP,
                "clusterrolebindings",
                binding("", "all", "ClusterRole", "read", json!({"kind": "Group", "name": "devs"})),
            ),
            (
                GROUP,
                "clusterrolebindings",
                binding("", "lost", "ClusterRole", "gone", json!({"kind": "User", "name": "bob"})),
            ),
            (
                GROUP,
                "rolebindings",
                binding("a", "sa", "Role", "secrets", json!({"kind": "ServiceAccount", "name": "s", "namespace": "b"})),
            ),
            (
                GROUP,
                "rolebindings",
                binding("a", "jane", "ClusterRole", "read", json!({"kind": "User", "name": "jane"})),
            ),
        ])
    }

    fn user(name: &str, groups: &[&str]) -> UserInfo {
        UserInfo { name: name.into(), groups: groups.iter().map(|s| (*s).into()).collect(), ..UserInfo::default() }
    }

    #[test]
    fn bindings_grant_where_they_are() {
        let (rbac, cluster) = (Rbac::default(), cluster());
        for (user, namespace, resource, allowed) in [
            (user("ann", &["devs"]), "", "pods", true),
            (user("ann", &["devs"]), "x", "pods", true),
            (user("ann", &["devs"]), "a", "secrets", false),
            (user("jane", &[]), "a", "pods", true),
            (user("jane", &[]), "b", "pods", false),
            (user("jane", &[]), "", "pods", false),
            (user("system:serviceaccount:b:s", &[]), "a", "secrets", true),
            (user("system:serviceaccount:a:s", &[]), "a", "secrets", false),
        ] {
            let attributes = Attributes { namespace, ..Attributes::resource(&user, "get", "", resource) };
            assert_eq!(
                rbac.authorize(&cluster, &attributes).is_allowed(),
                allowed,
                "{} {namespace} {resource}",
                user.name
            );
        }
    }

    #[test]
    fn reasons_name_the_binding_or_the_missing_role() {
        let (rbac, cluster) = (Rbac::default(), cluster());
        let (ann, bob) = (user("ann", &["devs"]), user("bob", &[]));
        assert_eq!(
            rbac.authorize(&cluster, &Attributes::resource(&ann, "get", "", "pods")),
            Decision::Allow(
                r#"RBAC: allowed by ClusterRoleBinding "all" of ClusterRole "read" to Group "devs""#.into()
            )
        );
        assert_eq!(
            rbac.authorize(&cluster, &Attributes::resource(&bob, "get", "", "pods")),
            Decision::NoOpinion(r#"RBAC: clusterrole.rbac.authorization.k8s.io "gone" not found"#.into())
        );
    }
}
