//! Rules for roles and bindings.

use apimachinery::meta::validation::{is_dns1123_subdomain, is_path_segment};
use apimachinery::status::FieldError;
use serde_json::Value;

use super::{Errors, Path, complain, each, label_selector, required};
use crate::registry::object::ObjectExt;

const GROUP: &str = "rbac.authorization.k8s.io";

pub fn role(obj: &Value) -> Errors {
    let mut errors = Errors::new();
    rules(obj, true, &mut errors);
    errors
}

pub fn cluster_role(obj: &Value) -> Errors {
    let mut errors = Errors::new();
    rules(obj, false, &mut errors);
    if obj["aggregationRule"].is_object() {
        let path = Path::Root("aggregationRule");
        if obj.list_at(&["aggregationRule", "clusterRoleSelectors"]).is_empty() {
            let detail = "at least one clusterRoleSelector required if aggregationRule is non-nil";
            errors.push(FieldError::required(path.field("clusterRoleSelectors"), detail));
        }
        each(&obj["aggregationRule"], "clusterRoleSelectors", path, &mut errors, |selector, path, errors| {
            let before = errors.len();
            label_selector(selector, path, errors);
            if errors.len() > before {
                errors.push(FieldError::invalid(path, Value::Null, "invalid label selector."));
            }
        });
    }
    errors
}

fn rules(obj: &Value, namespaced: bool, errors: &mut Errors) {
    let list = Path::Root("rules");
    for (index, rule) in obj.list_at(&["rules"]).iter().enumerate() {
        let path = list.index(index);
        let has = |field: &str| !rule.list_at(&[field]).is_empty();
        if !has("verbs") {
            errors.push(FieldError::required(path.field("verbs"), ""));
        }
        if has("nonResourceURLs") {
            let mut wrong = |detail| {
                let urls = rule["nonResourceURLs"].clone();
                errors.push(FieldError::invalid(path.field("nonResourceURLs"), urls, detail));
            };
            if namespaced {
                wrong("namespaced rules cannot apply to non-resource URLs");
            }
            if has("apiGroups") || has("resources") || has("resourceNames") {
                wrong("rules cannot apply to both regular resources and non-resource URLs");
            }
            continue;
        }
        if !has("apiGroups") {
            errors.push(FieldError::required(
                path.field("apiGroups"),
                "resource rules must supply at least one api group",
            ));
        }
        if !has("resources") {
            errors.push(FieldError::required(
                path.field("resources"),
                "resource rules must supply at least one resource",
            ));
        }
    }
}

pub fn role_binding(obj: &Value) -> Errors {
    binding(obj, &["Role", "ClusterRole"], true)
}

pub fn cluster_role_binding(obj: &Value) -> Errors {
    binding(obj, &["ClusterRole"], false)
}

fn binding(obj: &Value, kinds: &[&str], namespaced: bool) -> Errors {
    let mut errors = Errors::new();
    let (role, path) = (&obj["roleRef"], Path::Root("roleRef"));
    if role["apiGroup"] != GROUP {
        errors.push(FieldError::not_supported(path.field("apiGroup"), role.str_at(&["apiGroup"]), &[GROUP]));
    }
    if !kinds.contains(&role.str_at(&["kind"])) {
        errors.push(FieldError::not_supported(path.field("kind"), role.str_at(&["kind"]), kinds));
    }
    if let Some(name) = required(role, "name", path, &mut errors) {
        complain(is_path_segment(name), name, path.field("name"), &mut errors);
    }
    let list = Path::Root("subjects");
    for (index, subject) in obj.list_at(&["subjects"]).iter().enumerate() {
        self::subject(subject, namespaced, list.index(index), &mut errors);
    }
    errors
}

fn subject(subject: &Value, namespaced: bool, path: Path<'_>, errors: &mut Errors) {
    let name = required(subject, "name", path, errors);
    let group = subject.str_at(&["apiGroup"]);
    match subject.str_at(&["kind"]) {
        "ServiceAccount" => {
            if let Some(name) = name {
                complain(is_dns1123_subdomain(name), name, path.field("name"), errors);
            }
            if !group.is_empty() {
                errors.push(FieldError::not_supported(path.field("apiGroup"), group, &[""]));
            }
            if !namespaced && subject.str_at(&["namespace"]).is_empty() {
                errors.push(FieldError::required(path.field("namespace"), ""));
            }
        }
        "User" | "Group" => {
            if group != GROUP {
                errors.push(FieldError::not_supported(path.field("apiGroup"), group, &[GROUP]));
            }
        }
        other => {
            errors.push(FieldError::not_supported(path.field("kind"), other, &["ServiceAccount", "User", "Group"]))
        }
    }
}

/// A binding to another role is another binding: who may make it is checked at creation.
pub fn binding_update(obj: &Value, old: &Value) -> Errors {
    let mut errors = Errors::new();
    if !crate::registry::common::same(&obj["roleRef"], &old["roleRef"]) {
        errors.push(FieldError::invalid("roleRef", obj["roleRef"].clone(), super::IMMUTABLE));
    }
    errors
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::tests::texts;
    use super::*;

    #[test]
    fn rules_say_what_they_are_about() {
        let obj = json!({"rules": [{"verbs": ["get"], "apiGroups": [""], "resources": ["pods"]}, {}, {"verbs": ["get"], "nonResourceURLs": ["/"]}]});
        let expected = [
            "rules[1].verbs: Required value",
            "rules[1].apiGroups: Required value: resource rules must supply at least one api group",
            "rules[1].resources: Required value: resource rules must supply at least one resource",
            r#"rules[2].nonResourceURLs: Invalid value: ["/"]: namespaced rules cannot apply to non-resource URLs"#,
        ];
        assert_eq!(texts(&role(&obj)), expected);
    }

    #[test]
    fn bindings_name_roles_and_subjects() {
        let obj = json!({"roleRef": {"apiGroup": GROUP, "kind": "Role", "name": "r"}, "subjects": [{"kind": "ServiceAccount", "name": "a"}]});
        assert!(role_binding(&obj).is_empty());
        let expected = [
            r#"roleRef.kind: Unsupported value: "Role": supported values: "ClusterRole""#,
            "subjects[0].namespace: Required value",
        ];
        assert_eq!(texts(&cluster_role_binding(&obj)), expected);
        let other = json!({"roleRef": {"name": "x"}});
        assert_eq!(
            texts(&binding_update(&other, &obj)),
            [r#"roleRef: Invalid value: {"name":"x"}: field is immutable"#]
        );
    }
}
