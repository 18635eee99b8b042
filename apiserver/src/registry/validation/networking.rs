//! Rules for ingresses, network policies and the addresses of services.

use std::net::IpAddr;

use apimachinery::meta::validation::{
    is_dns1123_label, is_dns1123_subdomain, is_path_segment, is_valid_ip, is_wildcard_dns1123_subdomain,
};
use apimachinery::status::FieldError;
use ipnet::IpNet;
use serde_json::Value;

use super::container::port_number_or_name;
use super::{Errors, IMMUTABLE, Path, complain, each, label_selector, required};
use crate::registry::common::same;
use crate::registry::object::ObjectExt;

pub fn ingress(obj: &Value) -> Errors {
    let mut errors = Errors::new();
    let spec = &obj["spec"];
    let backend_path = Path::SPEC.field("defaultBackend");
    if spec.list_at(&["rules"]).is_empty() && spec["defaultBackend"].is_null() {
        errors.push(FieldError::invalid(
            "spec",
            spec["rules"].clone(),
            "either `defaultBackend` or `rules` must be specified",
        ));
    }
    if spec["defaultBackend"].is_object() {
        backend(&spec["defaultBackend"], backend_path, &mut errors);
    }
    each(spec, "rules", Path::SPEC, &mut errors, rule);
    each(spec, "tls", Path::SPEC, &mut errors, |tls, path, errors| {
        let list = path.field("hosts");
        for (index, host) in tls.list_at(&["hosts"]).iter().enumerate() {
            host_name(host.as_str().unwrap_or_default(), list.index(index), errors);
        }
        let secret = tls.str_at(&["secretName"]);
        super::container::subdomain(secret, path.field("secretName"), errors);
    });
    if let Some(class) = spec["ingressClassName"].as_str() {
        complain(is_dns1123_subdomain(class), class, Path::SPEC.field("ingressClassName"), &mut errors);
    }
    errors
}

fn rule(rule: &Value, path: Path<'_>, errors: &mut Errors) {
    let host = rule.str_at(&["host"]);
    if !host.is_empty() {
        if host.parse::<IpAddr>().is_ok() {
            errors.push(FieldError::invalid(path.field("host"), host, "must be a DNS name, not an IP address"));
        }
        host_name(host, path.field("host"), errors);
    }
    let http = &rule["http"];
    if !http.is_object() {
        return;
    }
    let path = path.field("http");
    if http.list_at(&["paths"]).is_empty() {
        errors.push(FieldError::required(path.field("paths"), ""));
    }
    each(http, "paths", path, errors, |item, path, errors| {
        let text = item.str_at(&["path"]);
        match item["pathType"].as_str() {
            None => {
                errors.push(FieldError::required(path.field("pathType"), "pathType must be specified"));
                return;
            }
            Some("Exact" | "Prefix") => {
                if !text.starts_with('/') {
                    errors.push(FieldError::invalid(path.field("path"), text, "must be an absolute path"));
                }
                for sequence in ["//", "/./", "/../", "%2f", "%2F"].into_iter().filter(|s| text.contains(s)) {
                    errors.push(FieldError::invalid(
                        path.field("path"),
                        text,
                        format!("must not contain '{sequence}'"),
                    ));
                }
            }
            Some("ImplementationSpecific") => {
                if !text.is_empty() && !text.starts_with('/') {
                    errors.push(FieldError::invalid(path.field("path"), text, "must be an absolute path"));
                }
            }
            Some(other) => {
                let allowed = ["Exact", "ImplementationSpecific", "Prefix"];
                errors.push(FieldError::not_supported(path.field("pathType"), other, &allowed));
            }
        }
        backend(&item["backend"], path.field("backend"), errors);
    });
}

fn host_name(host: &str, path: Path<'_>, errors: &mut Errors) {
    let messages = if host.contains('*') { is_wildcard_dns1123_subdomain(host) } else { is_dns1123_subdomain(host) };
    complain(messages, host, path, errors);
}

fn backend(backend: &Value, path: Path<'_>, errors: &mut Errors) {
    match (backend["resource"].is_null(), backend["service"].is_null()) {
        (false, false) => errors.push(FieldError::invalid(path, "", "cannot set both resource and service backends")),
        (true, true) => errors.push(FieldError::invalid(path, "", "resource or service backend is required")),
        (false, true) => typed_reference(&backend["resource"], path.field("resource"), errors),
        (true, false) => {
            let service = &backend["service"];
            let service_path = path.field("service");
            if let Some(name) = required(service, "name", service_path, errors) {
                complain(is_dns1123_label(name), name, service_path.field("name"), errors);
            }
            let (port, port_path) = (&service["port"], service_path.field("port"));
            match (port.str_at(&["name"]), port["number"].as_i64().unwrap_or(0)) {
                ("", 0) => errors.push(FieldError::required(path, "port name or number is required")),
                ("", number) => port_number_or_name(&number.into(), port_path.field("number"), errors),
                (name, 0) => port_number_or_name(&name.into(), port_path.field("name"), errors),
                _ => errors.push(FieldError::invalid(path, "", "cannot set both port name & port number")),
            }
        }
    }
}

/// A reference to an object of any kind in the same namespace.
fn typed_reference(reference: &Value, path: Path<'_>, errors: &mut Errors) {
    if let Some(group) = reference["apiGroup"].as_str() {
        complain(is_dns1123_subdomain(group), group, path.field("apiGroup"), errors);
    }
    for field in ["kind", "name"] {
        if let Some(text) = required(reference, field, path, errors) {
            complain(is_path_segment(text), text, path.field(field), errors);
        }
    }
}

/// The addresses under which an ingress is reached.
pub fn ingress_status(obj: &Value, old: &Value) -> Errors {
    let mut errors = Errors::new();
    let known = old.list_at(&["status", "loadBalancer", "ingress"]);
    let path = Path::STATUS.field("loadBalancer");
    each(&obj["status"]["loadBalancer"], "ingress", path, &mut errors, |point, path, errors| {
        let (ip, host) = (point.str_at(&["ip"]), point.str_at(&["hostname"]));
        if !ip.is_empty() && !known.iter().any(|point| point["ip"] == ip) {
            complain(is_valid_ip(ip), ip, path.field("ip"), errors);
        }
        super::container::subdomain(host, path.field("hostname"), errors);
        if host.parse::<IpAddr>().is_ok() {
            let detail = "must be a DNS name, not an IP address";
            errors.push(FieldError::invalid(path.field("hostname"), host, detail));
        }
    });
    errors
}

pub fn ingress_class(obj: &Value) -> Errors {
    const LONGEST_CONTROLLER: usize = 250;
    let mut errors = Errors::new();
    let spec = &obj["spec"];
    let controller = spec.str_at(&["controller"]);
    if controller.len() > LONGEST_CONTROLLER {
        errors.push(FieldError::too_long("spec.controller", LONGEST_CONTROLLER));
    }
    domain_prefixed_path(controller, Path::SPEC.field("controller"), &mut errors);
    if spec["parameters"].is_object() {
        class_parameters(&spec["parameters"], Path::SPEC.field("parameters"), &mut errors);
    }
    errors
}

/// `example.com/some/path`.
pub fn domain_prefixed_path(text: &str, path: Path<'_>, errors: &mut Errors) {
    if text.is_empty() {
        errors.push(FieldError::required(path, ""));
        return;
    }
    match text.split_once('/') {
        Some((host, rest)) if !host.is_empty() && !rest.is_empty() => {
            complain(is_dns1123_subdomain(host), host, path, errors);
            if !rest.bytes().all(|b| b.is_ascii_alphanumeric() || b"/-._~%!$&'()*+,;=:".contains(&b)) {
                const DETAIL: &str = r"Invalid path (regex used for validation is '[A-Za-z0-9/\-._~%!$&'()*+,;=:]+')";
                errors.push(FieldError::invalid(path, rest, DETAIL));
            }
        }
        _ => errors.push(FieldError::invalid(path, text, "must be a domain-prefixed path (such as \"acme.io/foo\")")),
    }
}

fn class_parameters(parameters: &Value, path: Path<'_>, errors: &mut Errors) {
    typed_reference(parameters, path, errors);
    let namespace = parameters["namespace"].as_str();
    match (parameters["scope"].as_str(), namespace) {
        (None, _) => errors.push(FieldError::required(path.field("scope"), "")),
        (Some("Namespace"), None) => {
            let detail = "`parameters.scope` is set to 'Namespace'";
            errors.push(FieldError::required(path.field("namespace"), detail));
        }
        (Some("Namespace"), Some(namespace)) => {
            complain(is_dns1123_label(namespace), namespace, path.field("namespace"), errors);
        }
        (Some("Cluster"), Some(_)) => {
            let detail = "`parameters.scope` is set to 'Cluster'";
            errors.push(FieldError::forbidden(path.field("namespace"), detail));
        }
        (Some("Cluster"), None) => {}
        (Some(other), _) => {
            errors.push(FieldError::not_supported(path.field("scope"), other, &["Cluster", "Namespace"]));
        }
    }
}

pub fn ingress_class_update(obj: &Value, old: &Value) -> Errors {
    let mut errors = Errors::new();
    super::immutable(&obj["spec"], &old["spec"], "controller", Path::SPEC, &mut errors);
    errors
}

pub fn network_policy(obj: &Value) -> Errors {
    let mut errors = Errors::new();
    let spec = &obj["spec"];
    label_selector(&spec["podSelector"], Path::SPEC.field("podSelector"), &mut errors);
    for (direction, peers) in [("ingress", "from"), ("egress", "to")] {
        each(spec, direction, Path::SPEC, &mut errors, |rule, path, errors| {
            each(rule, "ports", path, errors, policy_port);
            each(rule, peers, path, errors, policy_peer);
        });
    }
    let types = spec.list_at(&["policyTypes"]);
    if types.len() > 2 {
        errors.push(FieldError::invalid(
            "spec.policyTypes",
            spec["policyTypes"].clone(),
            "may not specify more than two policyTypes",
        ));
    } else {
        let path = Path::SPEC.field("policyTypes");
        for (index, kind) in types.iter().enumerate() {
            if kind != "Ingress" && kind != "Egress" {
                errors.push(FieldError::not_supported(path.index(index), kind.clone(), &["Ingress", "Egress"]));
            }
        }
    }
    errors
}

fn policy_port(port: &Value, path: Path<'_>, errors: &mut Errors) {
    const PROTOCOLS: [&str; 3] = ["TCP", "UDP", "SCTP"];
    if let Some(protocol) = port["protocol"].as_str().filter(|protocol| !PROTOCOLS.contains(protocol)) {
        errors.push(FieldError::not_supported(path.field("protocol"), protocol, &PROTOCOLS));
    }
    if !port["port"].is_null() {
        port_number_or_name(&port["port"], path.field("port"), errors);
    }
    if let Some(end) = port["endPort"].as_i64() {
        match port["port"].as_i64() {
            None if port["port"].is_null() => {
                let detail = "may not be specified when `port` is not specified";
                errors.push(FieldError::invalid(path.field("endPort"), end, detail));
            }
            None => errors.push(FieldError::invalid(
                path.field("port"),
                port["port"].clone(),
                "must be an integer when `endPort` is specified",
            )),
            Some(start) if end < start => {
                errors.push(FieldError::invalid(path.field("endPort"), end, "must be greater than or equal to `port`"));
            }
            Some(_) => {}
        }
    }
}

fn policy_peer(peer: &Value, path: Path<'_>, errors: &mut Errors) {
    let selectors = ["podSelector", "namespaceSelector"];
    for selector in selectors {
        label_selector(&peer[selector], path.field(selector), errors);
    }
    let has_selector = selectors.iter().any(|selector| !peer[*selector].is_null());
    if peer["ipBlock"].is_null() {
        if !has_selector {
            errors.push(FieldError::required(path, "must specify a peer"));
        }
        return;
    }
    ip_block(&peer["ipBlock"], path.field("ipBlock"), errors);
    if has_selector {
        errors.push(FieldError::forbidden(path, "may not specify both ipBlock and another peer"));
    }
}

fn ip_block(block: &Value, path: Path<'_>, errors: &mut Errors) {
    let Some(text) = required(block, "cidr", path, errors) else { return };
    let Some(whole) = cidr(text, path.field("cidr"), errors) else { return };
    let list = path.field("except");
    for (index, except) in block.list_at(&["except"]).iter().enumerate() {
        let text = except.as_str().unwrap_or_default();
        let path = list.index(index);
        if let Some(part) = cidr(text, path, errors)
            && (!whole.contains(&part.trunc()) || part.prefix_len() <= whole.prefix_len())
        {
            errors.push(FieldError::invalid(path, text, "must be a strict subset of `cidr`"));
        }
    }
}

fn cidr(text: &str, path: Path<'_>, errors: &mut Errors) -> Option<IpNet> {
    let parsed = text.parse().ok();
    if parsed.is_none() {
        let detail = "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)";
        errors.push(FieldError::invalid(path, text, detail));
    }
    parsed
}

pub fn service_cidr(obj: &Value) -> Errors {
    let mut errors = Errors::new();
    let list = obj.list_at(&["spec", "cidrs"]);
    let path = Path::SPEC.field("cidrs");
    if list.is_empty() {
        errors.push(FieldError::required(path, "at least one CIDR required"));
    }
    if list.len() > 2 {
        let detail = "may only hold up to 2 values";
        errors.push(FieldError::invalid(path, obj["spec"]["cidrs"].clone(), detail));
        return errors;
    }
    let parsed: Vec<IpNet> = list
        .iter()
        .enumerate()
        .filter_map(|(index, value)| cidr(value.as_str().unwrap_or_default(), path.index(index), &mut errors))
        .collect();
    if let [a, b] = parsed.as_slice()
        && matches!((a, b), (IpNet::V4(_), IpNet::V4(_)) | (IpNet::V6(_), IpNet::V6(_)))
    {
        let detail = "may specify no more than one IP for each IP family";
        errors.push(FieldError::invalid(path, obj["spec"]["cidrs"].clone(), detail));
    }
    errors
}

/// A range stays; one of the other family may be added to a single one.
pub fn service_cidr_update(obj: &Value, old: &Value) -> Errors {
    let mut errors = Errors::new();
    let (new, stored) = (obj.list_at(&["spec", "cidrs"]), old.list_at(&["spec", "cidrs"]));
    let path = Path::SPEC.field("cidrs");
    let grows = stored.len() == 1 && new.len() == 2;
    if new.len() != stored.len() && !grows {
        errors.push(FieldError::invalid(path, obj["spec"]["cidrs"].clone(), IMMUTABLE));
        return errors;
    }
    for (index, (value, _)) in new.iter().zip(stored).enumerate().filter(|(_, (value, kept))| value != kept) {
        errors.push(FieldError::invalid(path.index(index), value.clone(), IMMUTABLE));
    }
    if grows {
        errors.extend(service_cidr(obj));
    }
    errors
}

/// The name of an `IPAddress` is the address as it is written canonically.
pub fn address_name(name: &str) -> Vec<String> {
    match name.parse::<IpAddr>() {
        Err(_) => is_valid_ip(name),
        Ok(address) if address.to_string() != name => vec!["not a valid address in canonical format".into()],
        Ok(_) => Vec::new(),
    }
}

pub fn ip_address(obj: &Value) -> Errors {
    let mut errors = Errors::new();
    let parent = &obj["spec"]["parentRef"];
    let path = Path::SPEC.field("parentRef");
    if parent.is_null() {
        errors.push(FieldError::required(path, ""));
        return errors;
    }
    let group = parent.str_at(&["group"]);
    if !group.is_empty() {
        complain(is_dns1123_subdomain(group), group, path.field("group"), &mut errors);
    }
    for field in ["resource", "name"] {
        if let Some(text) = required(parent, field, path, &mut errors) {
            complain(is_path_segment(text), text, path.field(field), &mut errors);
        }
    }
    let namespace = parent.str_at(&["namespace"]);
    complain(is_path_segment(namespace), namespace, path.field("namespace"), &mut errors);
    errors
}

pub fn ip_address_update(obj: &Value, old: &Value) -> Errors {
    let mut errors = Errors::new();
    if !same(&obj["spec"]["parentRef"], &old["spec"]["parentRef"]) {
        errors.push(FieldError::invalid_null("spec.parentRef", IMMUTABLE));
    }
    errors
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::tests::texts;
    use super::*;

    #[test]
    fn ranges_stay_and_may_get_a_second_family() {
        let cidrs = |list: Value| json!({"spec": {"cidrs": list}});
        let old = cidrs(json!(["10.0.0.0/16"]));
        let cases = [
            (json!(["10.0.0.0/16"]), vec![]),
            (json!(["10.0.0.0/16", "fd00::/112"]), vec![]),
            (json!(["10.1.0.0/16"]), vec![r#"spec.cidrs[0]: Invalid value: "10.1.0.0/16": field is immutable"#]),
            (json!([]), vec!["spec.cidrs: Invalid value: []: field is immutable"]),
        ];
        for (list, expected) in cases {
            assert_eq!(texts(&service_cidr_update(&cidrs(list), &old)), expected);
        }
    }

    #[test]
    fn ingresses_lead_somewhere() {
        let expected = ["spec: Invalid value: null: either `defaultBackend` or `rules` must be specified"];
        assert_eq!(texts(&ingress(&json!({"spec": {}}))), expected);
        let backend = json!({"service": {"name": "s", "port": {"number": 80}}});
        let obj = json!({"spec": {"rules": [{"host": "1.2.3.4", "http": {"paths": [{"path": "x", "pathType": "Prefix", "backend": backend}]}}]}});
        let expected = [
            r#"spec.rules[0].host: Invalid value: "1.2.3.4": must be a DNS name, not an IP address"#,
            r#"spec.rules[0].http.paths[0].path: Invalid value: "x": must be an absolute path"#,
        ];
        assert_eq!(texts(&ingress(&obj)), expected);
    }

    #[test]
    fn policies_name_peers() {
        let obj = json!({"spec": {"ingress": [{"from": [{}, {"ipBlock": {"cidr": "10.0.0.0/8", "except": ["11.0.0.0/16"]}}]}]}});
        let expected = [
            "spec.ingress[0].from[0]: Required value: must specify a peer",
            r#"spec.ingress[0].from[1].ipBlock.except[0]: Invalid value: "11.0.0.0/16": must be a strict subset of `cidr`"#,
        ];
        assert_eq!(texts(&network_policy(&obj)), expected);
    }

    #[test]
    fn addresses_are_canonical() {
        assert!(address_name("10.0.0.1").is_empty());
        assert_eq!(address_name("fd00:0::1"), ["not a valid address in canonical format"]);
    }
}
