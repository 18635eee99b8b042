//! `Policy` (`audit.k8s.io/v1`): the first rule that fits a request says how much of it is kept.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{Level, Stage};
use crate::auth::UserInfo;
use crate::auth::kubeconfig::{KubeconfigError, read_yaml};
use crate::http::RequestInfo;
use crate::registry::object::ObjectExt;

#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    #[error(transparent)]
    File(#[from] KubeconfigError),
    #[error("audit policy {path}: {field}: {what}")]
    Field { path: PathBuf, field: String, what: String },
}

/// What is kept of a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    pub level: Level,
    omitted: u8,
    pub omits_managed_fields: bool,
}

impl Wanted {
    pub fn wants(&self, stage: Stage) -> bool {
        self.omitted & stage.bit() == 0
    }
}

#[derive(Debug)]
pub struct Policy {
    rules: Vec<Rule>,
}

#[derive(Debug)]
struct Rule {
    wanted: Wanted,
    users: Vec<String>,
    groups: Vec<String>,
    verbs: Vec<String>,
    namespaces: Vec<String>,
    resources: Vec<Resources>,
    paths: Vec<String>,
}

#[derive(Debug)]
struct Resources {
    group: String,
    resources: Vec<String>,
    names: Vec<String>,
}

fn texts(value: &Value, field: &str) -> Vec<String> {
    value.list_at(&[field]).iter().filter_map(Value::as_str).map(str::to_owned).collect()
}

impl Policy {
    pub fn read(path: &Path) -> Result<Self, PolicyError> {
        let policy = read_yaml(path)?;
        Self::from_value(&policy).map_err(|(field, what)| PolicyError::Field { path: path.to_owned(), field, what })
    }

    /// `Err`: the field that is wrong, and why.
    pub fn from_value(policy: &Value) -> Result<Self, (String, String)> {
        if policy["kind"] != "Policy" || policy.api_version() != "audit.k8s.io/v1" {
            return Err(("kind".into(), "must be Policy of audit.k8s.io/v1".into()));
        }
        let everywhere = stages(policy, "omitStages")?;
        let omits_fields = policy["omitManagedFields"] == true;
        let mut rules = Vec::new();
        for (index, rule) in policy.list_at(&["rules"]).iter().enumerate() {
            let read = Rule::read(rule, everywhere, omits_fields);
            rules.push(read.map_err(|(field, what)| (format!("rules[{index}].{field}"), what))?);
        }
        match rules.is_empty() {
            true => Err(("rules".into(), "loaded illegal policy with 0 rules".into())),
            false => Ok(Self { rules }),
        }
    }

    pub fn of_request(&self, user: &UserInfo, info: &RequestInfo) -> Wanted {
        let rule = self.rules.iter().find(|rule| rule.fits(user, info));
        rule.map(|rule| rule.wanted).unwrap_or_default()
    }
}

/// The stages of a list, as bits.
fn stages(value: &Value, field: &str) -> Result<u8, (String, String)> {
    texts(value, field).iter().try_fold(0, |bits, name| match Stage::parse(name) {
        Some(stage) => Ok(bits | stage.bit()),
        None => Err((field.to_owned(), format!("{name:?} is no stage"))),
    })
}

impl Rule {
    fn read(rule: &Value, omitted: u8, omits_fields: bool) -> Result<Self, (String, String)> {
        let level = match rule.str_at(&["level"]) {
            "None" => Level::None,
            "Metadata" => Level::Metadata,
            "Request" => Level::Request,
            "RequestResponse" => Level::RequestResponse,
            other => return Err(("level".into(), format!("{other:?} is no level"))),
        };
        let resources: Vec<Resources> = rule
            .list_at(&["resources"])
            .iter()
            .map(|given| Resources {
                group: given.str_at(&["group"]).to_owned(),
                resources: texts(given, "resources"),
                names: texts(given, "resourceNames"),
            })
            .collect();
        let (namespaces, paths) = (texts(rule, "namespaces"), texts(rule, "nonResourceURLs"));
        if !(paths.is_empty() || resources.is_empty() && namespaces.is_empty()) {
            let what = "rules cannot apply to both regular resources and non-resource URLs";
            return Err(("nonResourceURLs".into(), what.into()));
        }
        let omits_managed_fields = rule["omitManagedFields"].as_bool().unwrap_or(omits_fields);
        Ok(Self {
            wanted: Wanted { level, omitted: omitted | stages(rule, "omitStages")?, omits_managed_fields },
            users: texts(rule, "users"),
            groups: texts(rule, "userGroups"),
            verbs: texts(rule, "verbs"),
            namespaces,
            resources,
            paths,
        })
    }

    fn fits(&self, user: &UserInfo, info: &RequestInfo) -> bool {
        let is_one = |given: &[String], wanted: &str| given.is_empty() || given.iter().any(|given| given == wanted);
        let in_group = self.groups.is_empty() || self.groups.iter().any(|group| user.is_in(group));
        if !is_one(&self.users, &user.name) || !in_group || !is_one(&self.verbs, &info.verb) {
            return false;
        }
        if !self.namespaces.is_empty() || !self.resources.is_empty() {
            return info.is_resource
                && is_one(&self.namespaces, &info.namespace)
                && (self.resources.is_empty() || self.resources.iter().any(|resources| resources.fit(info)));
        }
        self.paths.is_empty() || !info.is_resource && self.paths.iter().any(|path| path_fits(path, &info.path))
    }
}

impl Resources {
    fn fit(&self, info: &RequestInfo) -> bool {
        if self.group != info.api_group {
            return false;
        }
        if self.resources.is_empty() {
            return true;
        }
        let is_named = self.names.is_empty() || self.names.contains(&info.name);
        is_named && self.resources.iter().any(|wanted| resource_fits(wanted, info))
    }
}

/// `pods`, `pods/log`, `pods/*`, `*/log`, `*`
fn resource_fits(wanted: &str, info: &RequestInfo) -> bool {
    match wanted.split_once('/') {
        _ if wanted == "*" => true,
        None => wanted == info.resource && info.subresource.is_empty(),
        Some((resource, subresource)) => {
            let fits = |wanted: &str, given: &str| wanted == "*" || wanted == given;
            !info.subresource.is_empty() && fits(resource, &info.resource) && fits(subresource, &info.subresource)
        }
    }
}

fn path_fits(wanted: &str, path: &str) -> bool {
    match wanted.strip_suffix('*') {
        Some(start) => path.starts_with(start),
        None => wanted == path,
    }
}

#[cfg(test)]
mod tests {
    use http::Method;
    use serde_json::json;

    use super::*;

    #[test]
    fn the_first_rule_that_fits_counts() {
        let policy = Policy::from_value(&json!({
            "apiVersion": "audit.k8s.io/v1", "kind": "Policy", "omitStages": ["RequestReceived"],
            "rules": [
                {"level": "None", "users": ["system:kube-proxy"], "verbs": ["watch"]},
                {"level": "None", "nonResourceURLs": ["/healthz*", "/version"]},
                {"level": "Request", "namespaces": ["kube-system"], "resources": [{"group": "", "resources": ["configmaps"]}]},
                {"level": "Metadata", "resources": [{"group": "", "resources": ["secrets", "pods/*"]}]},
                {"level": "RequestResponse", "resources": [{"group": "apps"}]},
                {"level": "Metadata", "userGroups": ["devs"]},
            ],
        }))
        .unwrap();
        let level = |user: &str, path: &str| {
            let user = UserInfo { name: user.into(), groups: vec![user.into()], ..UserInfo::default() };
            let (path, query) = path.split_once('?').unwrap_or((path, ""));
            policy.of_request(&user, &RequestInfo::new(&Method::GET, path, Some(query))).level
        };
        let cases = [
            ("system:kube-proxy", "/api/v1/services?watch=1", Level::None),
            ("jane", "/healthz/etcd", Level::None),
            ("jane", "/api/v1/namespaces/kube-system/configmaps/a", Level::Request),
            ("jane", "/api/v1/namespaces/a/configmaps/a", Level::None),
            ("jane", "/api/v1/namespaces/a/secrets/a", Level::Metadata),
            ("jane", "/api/v1/namespaces/a/pods/p/log", Level::Metadata),
            ("jane", "/api/v1/namespaces/a/pods/p", Level::None),
            ("jane", "/apis/apps/v1/deployments", Level::RequestResponse),
            ("devs", "/api/v1/namespaces/a/pods/p", Level::Metadata),
        ];
        for (user, path, expected) in cases {
            assert_eq!(level(user, path), expected, "{user} {path}");
        }
        let wanted = policy.rules[0].wanted;
        assert!(!wanted.wants(Stage::RequestReceived) && wanted.wants(Stage::ResponseComplete));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let policy = |rules: Value| {
            let policy = json!({"apiVersion": "audit.k8s.io/v1", "kind": "Policy", "rules": rules});
            Policy::from_value(&policy).map(|_| ()).unwrap_err()
        };
        assert_eq!(policy(json!([])).1, "loaded illegal policy with 0 rules");
        assert_eq!(policy(json!([{"level": "All"}])), ("rules[0].level".into(), "\"All\" is no level".into()));
        let stage = policy(json!([{"level": "None", "omitStages": ["X"]}]));
        assert_eq!(stage, ("rules[0].omitStages".into(), "\"X\" is no stage".into()));
    }
}
