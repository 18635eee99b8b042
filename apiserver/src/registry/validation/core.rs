//! Rules for the small kinds of the core group.

use apimachinery::meta::validation::{is_config_map_key, is_dns1123_subdomain, is_qualified_name};
use apimachinery::status::FieldError;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;

use super::{Errors, Path, complain, required};
use crate::registry::common::same;
use crate::registry::object::ObjectExt;
use crate::registry::validation::requirements::quantity_value;

/// How much data a secret or config map may hold: 1 MiB.
const MAX_DATA: usize = 1024 * 1024;

pub fn config_map(obj: &Value) -> Errors {
    let mut errors = Errors::new();
    let mut total = 0;
    for (key, value) in obj["data"].as_object().into_iter().flatten() {
        complain(is_config_map_key(key), key, Path::Root("data").key(key), &mut errors);
        if !obj["binaryData"][key].is_null() {
            let path = Path::Root("data").key(key).to_string();
            errors.push(FieldError::invalid(path, key.as_str(), "duplicate of key present in binaryData"));
        }
        total += value.as_str().map_or(0, str::len);
    }
    for (key, value) in obj["binaryData"].as_object().into_iter().flatten() {
        complain(is_config_map_key(key), key, Path::Root("binaryData").key(key), &mut errors);
        total += decoded_len(value);
    }
    if total > MAX_DATA {
        errors.push(FieldError::too_long("", MAX_DATA));
    }
    errors
}

/// The length of what a base64 text stands for.
fn decoded_len(value: &Value) -> usize {
    let text = value.as_str().unwrap_or_default();
    let padding = text.bytes().rev().take_while(|b| *b == b'=').count();
    (text.len() / 4 * 3).saturating_sub(padding)
}

pub fn config_map_update(obj: &Value, old: &Value) -> Errors {
    let mut errors = frozen_data(obj, old, &["data", "binaryData"]);
    errors.extend(config_map(obj));
    errors
}

/// What is marked as immutable stays so, and stays as it is.
fn frozen_data(obj: &Value, old: &Value, fields: &[&str]) -> Errors {
    const DETAIL: &str = "field is immutable when `immutable` is set";
    let mut errors = Errors::new();
    if old["immutable"] == true {
        if obj["immutable"] != true {
            errors.push(FieldError::forbidden("immutable", DETAIL));
        }
        for field in fields {
            if !same(&obj[*field], &old[*field]) {
                errors.push(FieldError::forbidden(field, DETAIL));
            }
        }
    }
    errors
}

pub fn secret(obj: &Value) -> Errors {
    let mut errors = Errors::new();
    let data = Path::Root("data");
    let mut total = 0;
    for (key, value) in obj["data"].as_object().into_iter().flatten() {
        complain(is_config_map_key(key), key, data.key(key), &mut errors);
        total += decoded_len(value);
    }
    if total > MAX_DATA {
        errors.push(FieldError::too_long(data, MAX_DATA));
    }
    let has = |key: &str| !obj["data"][key].is_null();
    let missing = |key: &str| FieldError::required(data.key(key), "");
    match obj.str_at(&["type"]) {
        "kubernetes.io/service-account-token" => {
            const NAME: &str = "kubernetes.io/service-account.name";
            if obj.annotation(NAME).unwrap_or_default().is_empty() {
                errors.push(FieldError::required(Path::METADATA.field("annotations").key(NAME), ""));
            }
        }
        "kubernetes.io/dockercfg" => docker_config(obj, ".dockercfg", &mut errors),
        "kubernetes.io/dockerconfigjson" => docker_config(obj, ".dockerconfigjson", &mut errors),
        "kubernetes.io/basic-auth" if !has("username") && !has("password") => {
            errors.extend([missing("username"), missing("password")]);
        }
        "kubernetes.io/ssh-auth" if obj.str_at(&["data", "ssh-privatekey"]).is_empty() => {
            errors.push(missing("ssh-privatekey"));
        }
        "kubernetes.io/tls" => errors.extend(["tls.crt", "tls.key"].into_iter().filter(|key| !has(key)).map(missing)),
        _ => {}
    }
    errors
}

fn docker_config(obj: &Value, key: &str, errors: &mut Errors) {
    let path = Path::Root("data");
    let Some(text) = obj["data"][key].as_str() else {
        errors.push(FieldError::required(path.key(key), ""));
        return;
    };
    let parsed = serde_json::from_slice::<Value>(&STANDARD.decode(text).unwrap_or_default());
    let problem = match parsed {
        Ok(Value::Object(_)) => return,
        Ok(_) => "json: cannot unmarshal into Go value of type map[string]interface {}".to_owned(),
        Err(error) => not_json(&STANDARD.decode(text).unwrap_or_default(), &error),
    };
    errors.push(FieldError::invalid(path.key(key), "<secret contents redacted>", problem));
}

/// The words that upstream's users know for text that is not JSON from its first letter on.
fn not_json(bytes: &[u8], error: &serde_json::Error) -> String {
    match std::str::from_utf8(bytes).ok().and_then(|text| text.trim_start().chars().next()) {
        None => "unexpected end of JSON input".into(),
        Some(first) if !matches!(first, '{' | '[' | '"' | '-' | 't' | 'f' | 'n' | '0'..='9') => {
            format!("invalid character {first:?} looking for beginning of value")
        }
        Some(_) => error.to_string(),
    }
}

pub fn secret_update(obj: &Value, old: &Value) -> Errors {
    let mut errors = Errors::new();
    if obj["type"] != old["type"] {
        errors.push(FieldError::invalid("type", obj["type"].clone(), super::IMMUTABLE));
    }
    errors.extend(frozen_data(obj, old, &["data"]));
    errors.extend(secret(obj));
    errors
}

pub fn resource_quota(obj: &Value) -> Errors {
    const STANDARD: [&str; 22] = [
        "cpu",
        "memory",
        "ephemeral-storage",
        "requests.cpu",
        "requests.memory",
        "requests.storage",
        "requests.ephemeral-storage",
        "limits.cpu",
        "limits.memory",
        "limits.ephemeral-storage",
        "pods",
        "resourcequotas",
        "services",
        "replicationcontrollers",
        "secrets",
        "persistentvolumeclaims",
        "configmaps",
        "services.nodeports",
        "services.loadbalancers",
        "storage",
        "count/",
        "hugepages-",
    ];
    let mut errors = Errors::new();
    let path = Path::SPEC.field("hard");
    for (name, value) in obj["spec"]["hard"].as_object().into_iter().flatten() {
        let path = path.key(name);
        complain(is_qualified_name(name), name, path, &mut errors);
        let base = name.strip_prefix("requests.").unwrap_or(name);
        if !name.contains('/') && !STANDARD.contains(&name.as_str()) && !base.starts_with("hugepages-") {
            for detail in
                ["must be a standard resource type or fully qualified", "must be a standard resource for quota"]
            {
                errors.push(FieldError::invalid(path, name.as_str(), detail));
            }
        }
        quantity_value(name, value, path, &mut errors);
    }
    quota_scopes(&obj["spec"], &mut errors);
    quota_selector(&obj["spec"], &mut errors);
    errors
}

/// Which pods are counted; only quotas of pods and what they ask for can say so.
fn quota_scopes(spec: &Value, errors: &mut Errors) {
    let scopes: Vec<&str> = spec.list_at(&["scopes"]).iter().filter_map(Value::as_str).collect();
    let mut wrong = |detail: &str| errors.push(FieldError::invalid("spec.scopes", spec["scopes"].clone(), detail));
    for scope in &scopes {
        if !SCOPES.contains(scope) {
            wrong("unsupported scope");
        } else if hard_names(spec).any(|name| !scope_fits(scope, name)) {
            wrong("unsupported scope applied to resource");
        }
    }
    for pair in [["BestEffort", "NotBestEffort"], ["Terminating", "NotTerminating"]] {
        if pair.iter().all(|scope| scopes.contains(scope)) {
            wrong("conflicting scopes");
        }
    }
}

fn quota_selector(spec: &Value, errors: &mut Errors) {
    let path = Path::SPEC.field("scopeSelector");
    let path = path.field("matchExpressions");
    for expression in spec.list_at(&["scopeSelector", "matchExpressions"]) {
        let (scope, operator) = (expression.str_at(&["scopeName"]), expression.str_at(&["operator"]));
        let has_values = !expression.list_at(&["values"]).is_empty();
        if !SCOPES.contains(&scope) {
            errors.push(FieldError::invalid(path.field("scopeName"), scope, "unsupported scope"));
        } else if hard_names(spec).any(|name| !scope_fits(scope, name)) {
            let detail = "unsupported scope applied to resource";
            errors.push(FieldError::invalid(path, spec["scopeSelector"].clone(), detail));
        }
        let flag = matches!(
            scope,
            "BestEffort" | "NotBestEffort" | "Terminating" | "NotTerminating" | "CrossNamespacePodAffinity"
        );
        if flag && operator != "Exists" {
            let detail = "must be 'Exists' when scope is any of ResourceQuotaScopeTerminating, ResourceQuotaScopeNotTerminating, ResourceQuotaScopeBestEffort, ResourceQuotaScopeNotBestEffort or ResourceQuotaScopeCrossNamespacePodAffinity";
            errors.push(FieldError::invalid(path.field("operator"), operator, detail));
        }
        match operator {
            "In" | "NotIn" if !has_values => {
                let detail = "must be at least one value when `operator` is 'In' or 'NotIn' for scope selector";
                errors.push(FieldError::required(path.field("values"), detail));
            }
            "Exists" | "DoesNotExist" if has_values => {
                let detail = "must be no value when `operator` is 'Exists' or 'DoesNotExist' for scope selector";
                errors.push(FieldError::invalid(path.field("values"), expression["values"].clone(), detail));
            }
            "In" | "NotIn" | "Exists" | "DoesNotExist" => {}
            other => errors.push(FieldError::invalid(path.field("operator"), other, "not a valid selector operator")),
        }
    }
}

fn hard_names(spec: &Value) -> impl Iterator<Item = &str> {
    spec["hard"].as_object().into_iter().flatten().map(|(name, _)| name.as_str())
}

/// Whether a scope makes sense for a resource that a quota limits.
fn scope_fits(scope: &str, resource: &str) -> bool {
    const OF_PODS: [&str; 11] = [
        "pods",
        "cpu",
        "memory",
        "ephemeral-storage",
        "requests.cpu",
        "requests.memory",
        "requests.ephemeral-storage",
        "limits.cpu",
        "limits.memory",
        "limits.ephemeral-storage",
        "count/pods",
    ];
    match scope {
        "BestEffort" => matches!(resource, "pods" | "count/pods"),
        "VolumeAttributesClass" => matches!(resource, "persistentvolumeclaims" | "requests.storage"),
        _ => OF_PODS.contains(&resource) || resource.contains("hugepages-"),
    }
}

/// Which pods a quota may count.
const SCOPES: [&str; 7] = [
    "Terminating",
    "NotTerminating",
    "BestEffort",
    "NotBestEffort",
    "PriorityClass",
    "CrossNamespacePodAffinity",
    "VolumeAttributesClass",
];

pub fn node(obj: &Value) -> Errors {
    let mut errors = Errors::new();
    taints(obj, &mut errors);
    let cidrs = obj.list_at(&["spec", "podCIDRs"]);
    let path = Path::SPEC.field("podCIDRs");
    let mut families = Vec::new();
    for (index, cidr) in cidrs.iter().enumerate() {
        let text = cidr.as_str().unwrap_or_default();
        match text.parse::<ipnet::IpNet>() {
            Ok(range) => families.push(range.addr().is_ipv6()),
            Err(_) => {
                let detail = "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)";
                errors.push(FieldError::invalid(path.index(index), text, detail));
            }
        }
    }
    if cidrs.len() > 2 || matches!(families.as_slice(), [one, other] if one == other) {
        let detail = "may specify no more than one CIDR for each IP family";
        errors.push(FieldError::invalid(Path::SPEC.field("podCIDRs"), obj["spec"]["podCIDRs"].clone(), detail));
    }
    errors
}

fn taints(obj: &Value, errors: &mut Errors) {
    let mut seen: Vec<(&str, &str)> = Vec::new();
    let list = Path::METADATA.field("taints");
    for (index, taint) in obj.list_at(&["spec", "taints"]).iter().enumerate() {
        let path = list.index(index);
        let (key, effect) = (taint.str_at(&["key"]), taint.str_at(&["effect"]));
        complain(is_qualified_name(key), key, path.field("key"), errors);
        let value = taint.str_at(&["value"]);
        complain(apimachinery::meta::validation::is_valid_label_value(value), value, path.field("value"), errors);
        super::required_one_of(taint, "effect", &["NoSchedule", "PreferNoSchedule", "NoExecute"], path, errors);
        if seen.contains(&(key, effect)) {
            let mut error = FieldError::duplicate(path, taint.clone());
            error.detail = "taints must be unique by key and effect pair".into();
            errors.push(error);
        }
        seen.push((key, effect));
    }
}

pub fn node_update(obj: &Value, old: &Value) -> Errors {
    let mut errors = node(obj);
    let cidrs = old.list_at(&["spec", "podCIDRs"]);
    if !cidrs.is_empty() && cidrs != obj.list_at(&["spec", "podCIDRs"]) {
        let detail = "node updates may not change podCIDR except from \"\" to valid";
        errors.push(FieldError::forbidden(Path::SPEC.field("podCIDRs"), detail));
    }
    let (given, stored) = (obj.str_at(&["spec", "providerID"]), old.str_at(&["spec", "providerID"]));
    if !stored.is_empty() && given != stored {
        let detail =
            if given.is_empty() { "field cannot be cleared once set" } else { "field cannot be modified once set" };
        errors.push(FieldError::invalid_null(Path::SPEC.field("providerID"), detail));
    }
    errors
}

pub fn limit_range(obj: &Value) -> Errors {
    let mut errors = Errors::new();
    let mut seen = Vec::new();
    super::each(&obj["spec"], "limits", Path::SPEC, &mut errors, |limit, path, errors| {
        let kind = limit.str_at(&["type"]);
        let malformed = is_qualified_name(kind);
        if malformed.is_empty() && !kind.contains('/') && !matches!(kind, "Pod" | "Container" | "PersistentVolumeClaim")
        {
            let detail = "must be a standard limit type or fully qualified";
            errors.push(FieldError::invalid(path.field("type"), kind, detail));
        }
        complain(malformed, kind, path.field("type"), errors);
        if seen.iter().any(|known: &String| known == kind) {
            errors.push(FieldError::duplicate(path.field("type"), kind));
        }
        seen.push(kind.to_owned());
        if kind == "PersistentVolumeClaim" && limit["min"]["storage"].is_null() && limit["max"]["storage"].is_null() {
            let detail = "either minimum or maximum storage value is required, but neither was provided";
            errors.push(FieldError::required(path.field("limits"), detail));
        }
        for (name, ratio) in limit["maxLimitRequestRatio"].as_object().into_iter().flatten() {
            use crate::registry::core::pod_prepare::quantity;
            if quantity(ratio).zip(quantity(&"1".into())).is_some_and(|(ratio, one)| ratio < one) {
                let detail = format!("ratio {} is less than 1", ratio.as_str().unwrap_or_default());
                errors.push(FieldError::invalid(path.field("maxLimitRequestRatio").key(name), ratio.clone(), detail));
            }
        }
        for list in ["max", "min", "default", "defaultRequest", "maxLimitRequestRatio"] {
            let path = path.field(list);
            for (name, value) in limit[list].as_object().into_iter().flatten() {
                quantity_value(name, value, path.key(name), errors);
            }
        }
        if limit["type"] == "Pod" {
            for list in ["default", "defaultRequest"] {
                if super::super::tables::count(&limit[list]) > 0 {
                    let detail = format!("may not be specified when `type` is '{}'", "Pod");
                    errors.push(FieldError::forbidden(path.field(list), detail));
                }
            }
        }
        limit_order(limit, path, errors);
    });
    errors
}

/// Minimum, default request, default limit and maximum do not contradict each other.
fn limit_order(limit: &Value, path: Path<'_>, errors: &mut Errors) {
    use crate::registry::core::pod_prepare::quantity;
    let pairs = [
        ("min", "max", "min", "min value {} is greater than max value {}"),
        ("min", "defaultRequest", "defaultRequest", "min value {} is greater than default request value {}"),
        ("defaultRequest", "max", "defaultRequest", "default request value {} is greater than max value {}"),
        (
            "defaultRequest",
            "default",
            "defaultRequest",
            "default request value {} is greater than default limit value {}",
        ),
        ("min", "default", "default", "min value {} is greater than default value {}"),
        ("default", "max", "default", "default value {} is greater than max value {}"),
    ];
    for (low, high, blamed, text) in pairs {
        for (name, value) in limit[low].as_object().into_iter().flatten() {
            let (Some(a), Some(b)) = (quantity(value), quantity(&limit[high][name])) else { continue };
            if a > b {
                let detail = text.replacen("{}", &a.to_string(), 1).replacen("{}", &b.to_string(), 1);
                let path = path.field(blamed);
                // Upstream shows the minimum here, not the default that it blames.
                let value = match (low, high) {
                    ("min", "default") => value.clone(),
                    ("default", "max") => limit["max"][name].clone(),
                    _ => limit[blamed][name].clone(),
                };
                errors.push(FieldError::invalid(path.key(name), value, detail));
            }
        }
    }
}

pub fn endpoints(obj: &Value) -> Errors {
    let mut errors = Errors::new();
    let list = Path::Root("subsets");
    for (index, subset) in obj.list_at(&["subsets"]).iter().enumerate() {
        let path = list.index(index);
        if subset.list_at(&["addresses"]).is_empty() && subset.list_at(&["notReadyAddresses"]).is_empty() {
            errors.push(FieldError::required(path, "must specify `addresses` or `notReadyAddresses`"));
        }
        for field in ["addresses", "notReadyAddresses"] {
            super::each(subset, field, path, &mut errors, |address, path, errors| {
                let ip = address.str_at(&["ip"]);
                if ip.parse::<std::net::IpAddr>().is_err() {
                    errors.push(FieldError::invalid(path.field("ip"), ip, "must be a valid IP address"));
                }
                super::dns_label(address, "hostname", path, errors);
                if let Some(node) = address["nodeName"].as_str() {
                    complain(is_dns1123_subdomain(node), node, path.field("nodeName"), errors);
                }
                complain(apimachinery::meta::validation::is_valid_ip(ip), ip, path.field("ip"), errors);
                if let Ok(address) = ip.parse() {
                    super::discovery::endpoint_ip(address, path.field("ip"), errors);
                }
            });
        }
        let several = subset.list_at(&["ports"]).len() > 1;
        let ports = path.field("ports");
        for (index, port) in subset.list_at(&["ports"]).iter().enumerate() {
            let path = ports.index(index);
            if several {
                required(port, "name", path, &mut errors);
            }
            super::dns_label(port, "name", path, &mut errors);
            let number = port.i64_at(&["port"]).unwrap_or(0);
            for message in apimachinery::meta::validation::is_valid_port_number(number) {
                errors.push(FieldError::invalid(path.field("port"), number, message));
            }
            super::required_one_of(port, "protocol", &["SCTP", "TCP", "UDP"], path, &mut errors);
            if let Some(protocol) = port["appProtocol"].as_str() {
                complain(is_qualified_name(protocol), protocol, path.field("appProtocol"), &mut errors);
            }
        }
    }
    errors
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::tests::texts;
    use super::*;

    #[test]
    fn data_is_checked() {
        let cases = [
            (json!({"data": {"a": "b"}}), vec![]),
            (
                json!({"data": {"a": "b"}, "binaryData": {"a": "eA=="}}),
                vec![r#"data[a]: Invalid value: "a": duplicate of key present in binaryData"#],
            ),
            (json!({"data": {"a": "x".repeat(MAX_DATA + 1)}}), vec![": Too long: may not be more than 1048576 bytes"]),
        ];
        for (obj, expected) in cases {
            assert_eq!(texts(&config_map(&obj)), expected);
        }
    }

    #[test]
    fn what_is_immutable_stays() {
        let old = json!({"immutable": true, "data": {"a": "b"}});
        let expected = [
            "immutable: Forbidden: field is immutable when `immutable` is set",
            "data: Forbidden: field is immutable when `immutable` is set",
        ];
        assert_eq!(texts(&config_map_update(&json!({"data": {"a": "c"}}), &old)), expected);
        assert!(config_map_update(&old, &old).is_empty());
    }

    #[test]
    fn secrets_have_what_their_type_needs() {
        let cases = [
            (json!({"type": "kubernetes.io/tls", "data": {"tls.crt": ""}}), vec!["data[tls.key]: Required value"]),
            (
                json!({"type": "kubernetes.io/basic-auth"}),
                vec!["data[username]: Required value", "data[password]: Required value"],
            ),
            (json!({"type": "kubernetes.io/dockerconfigjson", "data": {".dockerconfigjson": "e30="}}), vec![]),
            (
                json!({"type": "kubernetes.io/service-account-token"}),
                vec!["metadata.annotations[kubernetes.io/service-account.name]: Required value"],
            ),
        ];
        for (obj, expected) in cases {
            assert_eq!(texts(&secret(&obj)), expected);
        }
        let errors = secret_update(&json!({"type": "b"}), &json!({"type": "a"}));
        assert_eq!(texts(&errors), [r#"type: Invalid value: "b": field is immutable"#]);
    }
}
