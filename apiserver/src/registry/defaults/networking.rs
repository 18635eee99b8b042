//! Defaults of network policies, ingress classes, endpoint slices and role bindings' references.

use serde_json::{Value, json};

use super::{default, default_zero, each, existing, is_zero, within};

pub fn network_policy(obj: &mut Value) {
    within(obj, "spec", |spec| {
        within(spec, "podSelector", |_| {});
        for direction in ["ingress", "egress"] {
            each(spec, direction, |rule| each(rule, "ports", |port| default(port, "protocol", "TCP")));
        }
        let types = if is_zero(&spec["egress"]) { json!(["Ingress"]) } else { json!(["Ingress", "Egress"]) };
        default_zero(spec, "policyTypes", types);
    });
}

pub fn ingress_class(obj: &mut Value) {
    existing(obj, "spec", |spec| existing(spec, "parameters", |p| default(p, "scope", "Cluster")));
}

pub fn endpoint_slice(obj: &mut Value) {
    each(obj, "ports", |port| {
        default(port, "name", "");
        default(port, "protocol", "TCP");
    });
}

/// Role bindings of both scopes.
pub fn role_binding(obj: &mut Value) {
    const GROUP: &str = "rbac.authorization.k8s.io";
    within(obj, "roleRef", |role| default_zero(role, "apiGroup", GROUP));
    each(obj, "subjects", |subject| {
        if matches!(subject["kind"].as_str(), Some("User" | "Group")) {
            default_zero(subject, "apiGroup", GROUP);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies_apply_to_what_they_have_rules_for() {
        let cases = [
            (json!({}), json!(["Ingress"])),
            (json!({"egress": [{}]}), json!(["Ingress", "Egress"])),
            (json!({"policyTypes": ["Egress"]}), json!(["Egress"])),
        ];
        for (spec, expected) in cases {
            let mut obj = json!({"spec": spec});
            network_policy(&mut obj);
            assert_eq!(obj["spec"]["policyTypes"], expected);
        }
    }

    #[test]
    fn subjects_learn_their_group() {
        let mut obj = json!({"roleRef": {"kind": "Role", "name": "r"}, "subjects": [{"kind": "User"}, {"kind": "ServiceAccount"}]});
        role_binding(&mut obj);
        assert_eq!(obj["roleRef"]["apiGroup"], "rbac.authorization.k8s.io");
        assert_eq!(
            obj["subjects"],
            json!([{"kind": "User", "apiGroup": "rbac.authorization.k8s.io"}, {"kind": "ServiceAccount"}])
        );
    }
}
