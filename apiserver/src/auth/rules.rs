//! RBAC policy rules: what one rule allows, and whether a set of rules covers another (nobody may grant what they do
//! not hold). Pure; where rules come from is `rbac.rs`'s business.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Attributes;

/// `rbac.authorization.k8s.io/v1` PolicyRule.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PolicyRule {
    pub verbs: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub api_groups: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub resources: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub resource_names: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty", rename = "nonResourceURLs")]
    pub non_resource_urls: Vec<String>,
}

const ALL: &str = "*";

fn has(list: &[String], wanted: &str) -> bool {
    list.iter().any(|item| item == ALL || item == wanted)
}

impl PolicyRule {
    /// Whether this rule alone allows the request.
    pub fn allows(&self, attributes: &Attributes<'_>) -> bool {
        if !has(&self.verbs, attributes.verb) {
            return false;
        }
        if !attributes.is_resource {
            return self.non_resource_urls.iter().any(|url| url_matches(url, attributes.path));
        }
        has(&self.api_groups, attributes.api_group)
            && self.names_resource(attributes)
            && self.names_object(attributes.name)
    }

    fn names_resource(&self, attributes: &Attributes<'_>) -> bool {
        let Attributes { resource, subresource, .. } = *attributes;
        self.resources.iter().any(|rule| match rule.split_once('/') {
            _ if rule == ALL => true,
            None => subresource.is_empty() && rule == resource,
            Some((ALL, sub)) => !subresource.is_empty() && sub == subresource,
            Some((parent, sub)) => parent == resource && sub == subresource && !subresource.is_empty(),
        })
    }

    fn names_object(&self, name: &str) -> bool {
        self.resource_names.is_empty() || self.resource_names.iter().any(|allowed| allowed == name)
    }

    /// One rule per verb, group, resource and name: the atoms that `covers` compares.
    fn atoms(&self) -> Vec<PolicyRule> {
        let one = |s: &String| vec![s.clone()];
        let mut atoms = Vec::new();
        for verb in &self.verbs {
            for group in &self.api_groups {
                for resource in &self.resources {
                    let atom = PolicyRule {
                        verbs: one(verb),
                        api_groups: one(group),
                        resources: one(resource),
                        ..PolicyRule::default()
                    };
                    if self.resource_names.is_empty() {
                        atoms.push(atom);
                    } else {
                        let named = |name| PolicyRule { resource_names: one(name), ..atom.clone() };
                        atoms.extend(self.resource_names.iter().map(named));
                    }
                }
            }
            let path = |url| PolicyRule { verbs: one(verb), non_resource_urls: one(url), ..PolicyRule::default() };
            atoms.extend(self.non_resource_urls.iter().map(path));
        }
        atoms
    }

    /// Whether this rule grants everything the atom does.
    fn covers_atom(&self, atom: &PolicyRule) -> bool {
        let all = |owned: &[String], asked: &[String]| asked.iter().all(|item| has(owned, item));
        let resources = || {
            atom.resources.iter().all(|asked| {
                has(&self.resources, asked)
                    || asked
                        .split_once('/')
                        .is_some_and(|(_, sub)| self.resources.iter().any(|r| *r == format!("*/{sub}")))
            })
        };
        let names = self.resource_names.is_empty()
            || (!atom.resource_names.is_empty() && atom.resource_names.iter().all(|n| self.resource_names.contains(n)));
        let urls =
            || atom.non_resource_urls.iter().all(|asked| self.non_resource_urls.iter().any(|u| url_covers(u, asked)));
        all(&self.verbs, &atom.verbs) && all(&self.api_groups, &atom.api_groups) && resources() && names && urls()
    }
}

fn url_matches(rule: &str, path: &str) -> bool {
    rule == ALL || rule == path || rule.strip_suffix(ALL).is_some_and(|prefix| path.starts_with(prefix))
}

fn url_covers(owned: &str, asked: &str) -> bool {
    owned == ALL
        || owned == asked
        || owned.strip_suffix(ALL).is_some_and(|prefix| asked.strip_suffix(ALL).unwrap_or(asked).starts_with(prefix))
}

/// The atoms of `asked` that no rule of `owned` covers; empty when all is covered.
pub fn uncovered(owned: &[PolicyRule], asked: &[PolicyRule]) -> Vec<PolicyRule> {
    let atoms = asked.iter().flat_map(PolicyRule::atoms);
    atoms.filter(|atom| !owned.iter().any(|rule| rule.covers_atom(atom))).collect()
}

/// Rules in the short form that upstream's escalation message uses.
pub fn describe(rules: &[PolicyRule]) -> Vec<String> {
    let mut texts: Vec<String> = Vec::new();
    let quote = |list: &[String]| list.iter().map(|s| format!("{s:?}")).collect::<Vec<_>>().join(" ");
    for rule in rules {
        let mut parts = Vec::new();
        let fields = [
            ("APIGroups", &rule.api_groups),
            ("Resources", &rule.resources),
            ("NonResourceURLs", &rule.non_resource_urls),
            ("ResourceNames", &rule.resource_names),
            ("Verbs", &rule.verbs),
        ];
        for (name, list) in fields.into_iter().filter(|(_, list)| !list.is_empty()) {
            parts.push(format!("{name}:[{}]", quote(list)));
        }
        texts.push(format!("{{{}}}", parts.join(", ")));
    }
    texts.sort();
    texts.dedup();
    texts
}

/// The `rules` of a Role or ClusterRole; rules that do not parse are left out, as validation never let them in.
pub fn rules_of(role: &Value) -> Vec<PolicyRule> {
    let rules = role.get("rules").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    rules.iter().filter_map(|rule| PolicyRule::deserialize(rule).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::super::UserInfo;
    use super::*;

    fn rule(verbs: &[&str], groups: &[&str], resources: &[&str], names: &[&str]) -> PolicyRule {
        let own = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect();
        PolicyRule {
            verbs: own(verbs),
            api_groups: own(groups),
            resources: own(resources),
            resource_names: own(names),
            ..PolicyRule::default()
        }
    }

    #[test]
    fn resource_rules() {
        let user = UserInfo::default();
        let get = |resource, subresource, name| Attributes {
            subresource,
            name,
            ..Attributes::resource(&user, "get", "", resource)
        };
        for (rule, attributes, allowed) in [
            (rule(&["get"], &[""], &["pods"], &[]), get("pods", "", "a"), true),
            (rule(&["get"], &[""], &["pods"], &[]), get("pods", "log", "a"), false),
            (rule(&["get"], &[""], &["pods/log"], &[]), get("pods", "log", "a"), true),
            (rule(&["get"], &[""], &["*/log"], &[]), get("pods", "log", "a"), true),
            (rule(&["get"], &[""], &["*/log"], &[]), get("pods", "", "a"), false),
            (rule(&["*"], &["*"], &["*"], &[]), get("pods", "log", "a"), true),
            (rule(&["get"], &[""], &["pods"], &["a"]), get("pods", "", "a"), true),
            (rule(&["get"], &[""], &["pods"], &["a"]), get("pods", "", "b"), false),
            (rule(&["get"], &[""], &["pods"], &["a"]), get("pods", "", ""), false),
            (rule(&["get"], &["apps"], &["pods"], &[]), get("pods", "", "a"), false),
            (rule(&["list"], &[""], &["pods"], &[]), get("pods", "", "a"), false),
        ] {
            assert_eq!(rule.allows(&attributes), allowed, "{rule:?} on {attributes:?}");
        }
    }

    #[test]
    fn path_rules() {
        let user = UserInfo::default();
        for (url, path, allowed) in [
            ("/healthz", "/healthz", true),
            ("/healthz", "/healthz/ping", false),
            ("/healthz/*", "/healthz/ping", true),
            ("*", "/x", true),
        ] {
            let rule =
                PolicyRule { verbs: vec!["get".into()], non_resource_urls: vec![url.into()], ..PolicyRule::default() };
            assert_eq!(rule.allows(&Attributes::path(&user, "get", path)), allowed, "{url} on {path}");
        }
    }

    #[test]
    fn coverage_is_by_atoms() {
        let owned = [rule(&["get"], &[""], &["pods"], &[]), rule(&["list"], &[""], &["pods", "secrets"], &[])];
        assert!(uncovered(&owned, &[rule(&["get", "list"], &[""], &["pods"], &[])]).is_empty());
        let missing = uncovered(&owned, &[rule(&["get", "list"], &[""], &["pods", "secrets"], &[])]);
        assert_eq!(describe(&missing), [r#"{APIGroups:[""], Resources:["secrets"], Verbs:["get"]}"#]);
        assert!(uncovered(&owned, &[rule(&["get"], &[""], &["pods"], &["a"])]).is_empty());
        assert_eq!(
            uncovered(&[rule(&["get"], &[""], &["pods"], &["a"])], &[rule(&["get"], &[""], &["pods"], &[])]).len(),
            1
        );
    }
}
