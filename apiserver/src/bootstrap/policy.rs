//! The default RBAC policy, read from `policy.txt`. Pure data: who writes it to the cluster is `rbac.rs`.

use serde_json::{Map, Value, json};

use crate::auth::rules::PolicyRule;

const TABLE: &str = include_str!("policy.txt");
const API_VERSION: &str = "rbac.authorization.k8s.io/v1";
const AGGREGATE_TO: &str = "rbac.authorization.k8s.io/aggregate-to-";

/// Every default role and binding, roles before the bindings that refer to them, as API objects.
pub fn objects() -> Vec<Value> {
    let mut objects: Vec<Value> = Vec::new();
    for line in TABLE.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        match (line.strip_prefix("  "), objects.last_mut()) {
            (Some(rule), Some(role)) => {
                let rules =
                    role.get_mut("rules").and_then(Value::as_array_mut).expect("policy.txt: rules follow a role");
                rules.push(json!(parse_rule(rule)));
            }
            _ => objects.push(parse_object(line)),
        }
    }
    objects
}

/// The rules of `system:node`: what the Node authorizer lets every node do.
pub fn node_rules() -> Vec<PolicyRule> {
    let lines = TABLE.lines().skip_while(|line| *line != "ClusterRole system:node").skip(1);
    lines.map_while(|line| line.strip_prefix("  ")).map(parse_rule).collect()
}

fn parse_rule(text: &str) -> PolicyRule {
    let list = |field: Option<&str>| -> Vec<String> {
        let items = field.into_iter().flat_map(|field| field.split(','));
        items.map(|item| if item == "core" { String::new() } else { item.to_owned() }).collect()
    };
    let mut fields = text.split_whitespace();
    let verbs = list(fields.next());
    let mut rest = fields.clone();
    if rest.next().is_some_and(|field| field.starts_with('/') || field.starts_with("url:")) {
        let urls = fields.map(|url| url.strip_prefix("url:").unwrap_or(url).to_owned()).collect();
        return PolicyRule { verbs, non_resource_urls: urls, ..PolicyRule::default() };
    }
    PolicyRule {
        verbs,
        api_groups: list(fields.next()),
        resources: list(fields.next()),
        resource_names: list(fields.next()),
        ..PolicyRule::default()
    }
}

fn parse_object(line: &str) -> Value {
    let mut words = line.split_whitespace();
    let (kind, full_name) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let (namespace, name) = match kind {
        "Role" | "RoleBinding" => full_name.split_once('/').unwrap_or_default(),
        _ => ("", full_name),
    };
    let mut labels = json!({"kubernetes.io/bootstrapping": "rbac-defaults"});
    let mut object = json!({
        "apiVersion": API_VERSION,
        "kind": kind,
        "metadata": {"name": name, "annotations": {"rbac.authorization.kubernetes.io/autoupdate": "true"}},
    });
    if kind.ends_with("Binding") {
        words.next(); // the arrow
        object["roleRef"] = role_ref(kind, words.next().unwrap_or_default());
        object["subjects"] = words.map(subject).collect();
    } else {
        object["rules"] = json!([]);
        for word in words {
            match word.split_once('=') {
                Some(("into", suffix)) => labels[format!("{AGGREGATE_TO}{suffix}")] = "true".into(),
                Some(("aggregates", suffix)) => {
                    let label: Map<String, Value> =
                        [(format!("{AGGREGATE_TO}{suffix}"), "true".into())].into_iter().collect();
                    object["aggregationRule"] = json!({"clusterRoleSelectors": [{"matchLabels": label}]});
                }
                _ => {}
            }
        }
    }
    object["metadata"]["labels"] = labels;
    if !namespace.is_empty() {
        object["metadata"]["namespace"] = namespace.into();
    }
    object
}

fn role_ref(kind: &str, role: &str) -> Value {
    let (role_kind, name) = match kind {
        "RoleBinding" => role.split_once('/').unwrap_or_default(),
        _ => ("ClusterRole", role),
    };
    json!({"apiGroup": "rbac.authorization.k8s.io", "kind": role_kind, "name": name})
}

fn subject(word: &str) -> Value {
    let (kind, name) = word.split_once(':').unwrap_or_default();
    match (kind, name.split_once('/')) {
        ("ServiceAccount", Some((namespace, name))) => json!({"kind": kind, "name": name, "namespace": namespace}),
        _ => json!({"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": name}),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(kind: &str, name: &str) -> Value {
        let found = objects().into_iter().find(|o| o["kind"] == kind && o["metadata"]["name"] == name);
        found.unwrap_or_else(|| panic!("no {kind} {name}"))
    }

    #[test]
    fn the_table_is_whole() {
        let objects = objects();
        let count = |kind: &str| objects.iter().filter(|object| object["kind"] == kind).count();
        assert_eq!(
            (count("ClusterRole"), count("ClusterRoleBinding"), count("Role"), count("RoleBinding")),
            (73, 54, 7, 7)
        );
        for object in &objects {
            let name = object["metadata"]["name"].as_str().unwrap();
            assert!(!name.is_empty(), "{object}");
            let is_binding = object["kind"].as_str().unwrap().ends_with("Binding");
            assert_eq!(is_binding, object.get("roleRef").is_some(), "{name}");
        }
    }

    #[test]
    fn objects_are_as_upstream_has_them() {
        let admin = named("ClusterRole", "cluster-admin");
        assert_eq!(admin["rules"][0], json!({"apiGroups": ["*"], "resources": ["*"], "verbs": ["*"]}));
        assert_eq!(admin["rules"][1], json!({"nonResourceURLs": ["*"], "verbs": ["*"]}));
        let edit = named("ClusterRole", "edit");
        assert_eq!(edit["metadata"]["labels"]["rbac.authorization.k8s.io/aggregate-to-admin"], "true");
        assert_eq!(
            edit["aggregationRule"]["clusterRoleSelectors"][0]["matchLabels"],
            json!({"rbac.authorization.k8s.io/aggregate-to-edit": "true"})
        );
        let dns = named("ClusterRoleBinding", "system:kube-dns");
        assert_eq!(
            dns["subjects"],
            json!([{"kind": "ServiceAccount", "name": "kube-dns", "namespace": "kube-system"}])
        );
        let lock = named("Role", "system::leader-locking-kube-scheduler");
        assert_eq!(lock["metadata"]["namespace"], "kube-system");
        assert!(node_rules().len() > 20);
    }
}
