//! Defaults of what calls out of the server: webhooks, admission policies, aggregated APIs and custom resource definitions.

use serde_json::{Value, json};

use super::{default, default_zero, each, existing, is_zero, within};

pub fn validating_webhooks(obj: &mut Value) {
    each(obj, "webhooks", webhook);
}

pub fn mutating_webhooks(obj: &mut Value) {
    each(obj, "webhooks", |hook| {
        webhook(hook);
        default(hook, "reinvocationPolicy", "Never");
    });
}

fn webhook(hook: &mut Value) {
    default(hook, "failurePolicy", "Fail");
    default(hook, "matchPolicy", "Equivalent");
    within(hook, "namespaceSelector", |_| {});
    within(hook, "objectSelector", |_| {});
    default(hook, "timeoutSeconds", 10);
    existing(hook, "clientConfig", |config| existing(config, "service", service_reference));
    each(hook, "rules", rule);
}

fn rule(rule: &mut Value) {
    default(rule, "scope", "*");
}

fn service_reference(service: &mut Value) {
    default(service, "port", 443);
}

/// Validating and mutating admission policies.
pub fn policy(obj: &mut Value) {
    within(obj, "spec", |spec| {
        default(spec, "failurePolicy", "Fail");
        existing(spec, "matchConstraints", match_resources);
    });
}

pub fn policy_binding(obj: &mut Value) {
    existing(obj, "spec", |spec| existing(spec, "matchResources", match_resources));
}

fn match_resources(resources: &mut Value) {
    default(resources, "matchPolicy", "Equivalent");
    within(resources, "namespaceSelector", |_| {});
    within(resources, "objectSelector", |_| {});
    each(resources, "resourceRules", rule);
    each(resources, "excludeResourceRules", rule);
}

/// A new API that this server answers itself is available from the start.
pub fn api_service(obj: &mut Value) {
    existing(obj, "spec", |spec| existing(spec, "service", service_reference));
    if obj["status"] == json!({}) && obj["spec"]["service"].is_null() {
        let condition = json!({
            "type": "Available",
            "status": "True",
            "reason": "Local",
            "message": "Local APIServices are always available",
            "lastTransitionTime": crate::verbs::timestamp(jiff::Timestamp::now()),
        });
        obj["status"] = json!({"conditions": [condition]});
    }
}

pub fn custom_resource_definition(obj: &mut Value) {
    existing(obj, "spec", |spec| {
        existing(spec, "names", |names| {
            let kind = names["kind"].as_str().unwrap_or_default().to_owned();
            default_zero(names, "singular", kind.to_lowercase());
            if !kind.is_empty() {
                default_zero(names, "listKind", format!("{kind}List"));
            }
        });
        default(spec, "conversion", json!({"strategy": "None"}));
        existing(spec, "conversion", |conversion| {
            existing(conversion, "webhook", |hook| {
                existing(hook, "clientConfig", |config| existing(config, "service", service_reference));
            });
        });
    });
    if is_zero(&obj["status"]["storedVersions"]) {
        let stored =
            obj["spec"]["versions"].as_array().and_then(|versions| versions.iter().find(|v| v["storage"] == true));
        if let Some(name) = stored.map(|version| version["name"].clone()) {
            within(obj, "status", |status| status["storedVersions"] = json!([name]));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn definitions_get_names_and_stored_versions() {
        let mut obj = json!({"spec": {"names": {"kind": "CronTab"}, "versions": [{"name": "v1", "storage": true}]}});
        custom_resource_definition(&mut obj);
        assert_eq!(obj["spec"]["names"], json!({"kind": "CronTab", "singular": "crontab", "listKind": "CronTabList"}));
        assert_eq!(obj["status"]["storedVersions"], json!(["v1"]));
        assert_eq!(obj["spec"]["conversion"], json!({"strategy": "None"}));
    }

    #[test]
    fn webhooks_fail_closed_within_ten_seconds() {
        let mut obj =
            json!({"webhooks": [{"name": "a.b.c", "clientConfig": {"service": {"name": "s"}}, "rules": [{}]}]});
        mutating_webhooks(&mut obj);
        let expected = json!([{"name": "a.b.c", "clientConfig": {"service": {"name": "s", "port": 443}},
            "rules": [{"scope": "*"}], "failurePolicy": "Fail", "matchPolicy": "Equivalent", "namespaceSelector": {},
            "objectSelector": {}, "timeoutSeconds": 10, "reinvocationPolicy": "Never"}]);
        assert_eq!(obj["webhooks"], expected);
    }
}
