//! Flow schemas: which requests they are about, and which of them belong together.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use http::HeaderValue;
use serde_json::Value;

use super::level::Level;
use crate::auth::UserInfo;
use crate::auth::service_account::split_username;
use crate::http::RequestInfo;
use crate::registry::object::ObjectExt;

pub struct Schema {
    pub name: String,
    pub uid: HeaderValue,
    pub precedence: i64,
    pub level: Arc<Level>,
    by: By,
    rules: Vec<Rule>,
}

/// What tells the flows of a schema apart.
enum By {
    Nothing,
    User,
    Namespace,
}

struct Rule {
    subjects: Vec<Subject>,
    resources: Vec<Resources>,
    paths: Vec<Paths>,
}

enum Subject {
    User(String),
    Group(String),
    ServiceAccount { namespace: String, name: String },
}

struct Resources {
    verbs: Vec<String>,
    groups: Vec<String>,
    resources: Vec<String>,
    namespaces: Vec<String>,
    cluster: bool,
}

struct Paths {
    verbs: Vec<String>,
    paths: Vec<String>,
}

fn texts(value: &Value, field: &str) -> Vec<String> {
    value.list_at(&[field]).iter().filter_map(Value::as_str).map(str::to_owned).collect()
}

/// Whether a list has the text, or says that everything is meant.
fn has(given: &[String], wanted: &str) -> bool {
    given.iter().any(|given| given == "*" || given == wanted)
}

impl Schema {
    /// `None`: the priority level that it names is not there.
    pub fn read(object: &Value, levels: &HashMap<String, Arc<Level>>) -> Option<Self> {
        let spec = &object["spec"];
        let level = levels.get(spec.str_at(&["priorityLevelConfiguration", "name"]))?.clone();
        Some(Self {
            name: object.name().to_owned(),
            uid: HeaderValue::from_str(object.uid()).ok()?,
            precedence: spec.i64_at(&["matchingPrecedence"]).unwrap_or(10_000),
            level,
            by: match spec.str_at(&["distinguisherMethod", "type"]) {
                "ByUser" => By::User,
                "ByNamespace" => By::Namespace,
                _ => By::Nothing,
            },
            rules: spec.list_at(&["rules"]).iter().map(Rule::read).collect(),
        })
    }

    pub fn fits(&self, user: &UserInfo, info: &RequestInfo) -> bool {
        self.rules.iter().any(|rule| rule.fits(user, info))
    }

    /// A number for the flow of a request.
    pub fn flow(&self, user: &UserInfo, info: &RequestInfo) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.name.hash(&mut hasher);
        match self.by {
            By::Nothing => {}
            By::User => user.name.hash(&mut hasher),
            By::Namespace => info.namespace.hash(&mut hasher),
        }
        hasher.finish()
    }
}

impl Rule {
    fn read(rule: &Value) -> Self {
        let resources = rule.list_at(&["resourceRules"]).iter().map(|given| Resources {
            verbs: texts(given, "verbs"),
            groups: texts(given, "apiGroups"),
            resources: texts(given, "resources"),
            namespaces: texts(given, "namespaces"),
            cluster: given["clusterScope"] == true,
        });
        let paths = rule
            .list_at(&["nonResourceRules"])
            .iter()
            .map(|given| Paths { verbs: texts(given, "verbs"), paths: texts(given, "nonResourceURLs") });
        Self {
            subjects: rule.list_at(&["subjects"]).iter().filter_map(Subject::read).collect(),
            resources: resources.collect(),
            paths: paths.collect(),
        }
    }

    fn fits(&self, user: &UserInfo, info: &RequestInfo) -> bool {
        let is_about = || match info.is_resource {
            true => self.resources.iter().any(|resources| resources.fit(info)),
            false => self.paths.iter().any(|paths| paths.fit(info)),
        };
        self.subjects.iter().any(|subject| subject.is(user)) && is_about()
    }
}

impl Subject {
    fn read(subject: &Value) -> Option<Self> {
        let text = |path: &[&str]| subject.str_at(path).to_owned();
        match subject.str_at(&["kind"]) {
            "User" => Some(Self::User(text(&["user", "name"]))),
            "Group" => Some(Self::Group(text(&["group", "name"]))),
            "ServiceAccount" => Some(Self::ServiceAccount {
                namespace: text(&["serviceAccount", "namespace"]),
                name: text(&["serviceAccount", "name"]),
            }),
            _ => None,
        }
    }

    fn is(&self, user: &UserInfo) -> bool {
        match self {
            Self::User(name) => name == "*" || *name == user.name,
            Self::Group(name) => name == "*" || user.is_in(name),
            Self::ServiceAccount { namespace, name } => split_username(&user.name)
                .is_some_and(|(of, account)| of == namespace && (name == "*" || name == account)),
        }
    }
}

impl Resources {
    fn fit(&self, info: &RequestInfo) -> bool {
        let is_named = match info.subresource.as_str() {
            "" => has(&self.resources, &info.resource),
            subresource => self.resources.iter().any(|given| {
                given == "*"
                    || given
                        .split_once('/')
                        .is_some_and(|(resource, part)| resource == info.resource && part == subresource)
            }),
        };
        let is_there = match info.namespace.is_empty() {
            true => self.cluster,
            false => has(&self.namespaces, &info.namespace),
        };
        is_named && is_there && has(&self.verbs, &info.verb) && has(&self.groups, &info.api_group)
    }
}

impl Paths {
    fn fit(&self, info: &RequestInfo) -> bool {
        let fits = |given: &String| match given.strip_suffix('*') {
            Some(start) => info.path.starts_with(start),
            None => *given == info.path,
        };
        has(&self.verbs, &info.verb) && self.paths.iter().any(fits)
    }
}
