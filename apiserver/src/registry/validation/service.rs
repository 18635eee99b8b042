//! Rules for services.

use std::net::IpAddr;

use apimachinery::meta::validation::{is_dns1123_subdomain, is_qualified_name, is_valid_ip, is_valid_port_number};
use apimachinery::status::FieldError;
use serde_json::Value;

use super::container::port_number_or_name;
use super::{Errors, Path, complain, labels, one_of_given, required, required_one_of};
use crate::registry::common::same;
use crate::registry::object::ObjectExt;

/// A service without an address of its own.
pub fn is_headless(spec: &Value) -> bool {
    spec["clusterIP"] == "None" || spec["clusterIPs"][0] == "None"
}

/// Whether clients outside the cluster can reach the service.
pub fn is_external(spec: &Value) -> bool {
    match spec.str_at(&["type"]) {
        "NodePort" | "LoadBalancer" => true,
        "ClusterIP" => !spec.list_at(&["externalIPs"]).is_empty(),
        _ => false,
    }
}

/// Whether load balancers ask each node if it has a backend.
pub fn needs_health_check(spec: &Value) -> bool {
    spec["type"] == "LoadBalancer" && spec["externalTrafficPolicy"] == "Local"
}

pub fn create(obj: &Value) -> Errors {
    let mut errors = Errors::new();
    let spec = &obj["spec"];
    required_one_of(spec, "type", &["ClusterIP", "ExternalName", "LoadBalancer", "NodePort"], Path::SPEC, &mut errors);
    by_type(spec, &mut errors);
    labels(&spec["selector"], Path::SPEC.field("selector"), &mut errors);
    required_one_of(spec, "sessionAffinity", &["ClientIP", "None"], Path::SPEC, &mut errors);
    session_affinity(spec, &mut errors);
    cluster_ips(spec, &mut errors);
    for (index, ip) in spec.list_at(&["externalIPs"]).iter().enumerate() {
        let path = Path::SPEC.field("externalIPs");
        let text = ip.as_str().unwrap_or_default();
        complain(is_valid_ip(text), text, path.index(index), &mut errors);
        if let Ok(address) = text.parse::<IpAddr>() {
            super::discovery::endpoint_ip(address, path.index(index), &mut errors);
        }
    }
    ports(spec, &mut errors);
    traffic_policies(spec, &mut errors);
    errors
}

fn by_type(spec: &Value, errors: &mut Errors) {
    match spec.str_at(&["type"]) {
        "ExternalName" => {
            for field in ["clusterIPs", "ipFamilies", "ipFamilyPolicy", "clusterIP"] {
                if !crate::registry::common::is_nothing(&spec[field]) {
                    let detail = "may not be set for ExternalName services";
                    errors.push(FieldError::forbidden(Path::SPEC.field(field), detail));
                }
            }
            if let Some(name) = required(spec, "externalName", Path::SPEC, errors) {
                let name = name.strip_suffix('.').unwrap_or(name);
                complain(is_dns1123_subdomain(name), name, Path::SPEC.field("externalName"), errors);
            }
        }
        "NodePort" | "LoadBalancer" if is_headless(spec) => {
            let kind = spec.str_at(&["type"]);
            let detail = format!("may not be set to 'None' for {kind} services");
            errors.push(FieldError::invalid("spec.clusterIPs[0]", "None", detail));
        }
        _ => {}
    }
    if spec["type"] != "LoadBalancer" {
        if !spec["loadBalancerClass"].is_null() {
            let detail = "may only be used when `type` is 'LoadBalancer'";
            errors.push(FieldError::forbidden("spec.loadBalancerClass", detail));
        }
        if !spec["allocateLoadBalancerNodePorts"].is_null() {
            let detail = "may only be used when `type` is 'LoadBalancer'";
            errors.push(FieldError::forbidden("spec.allocateLoadBalancerNodePorts", detail));
        }
        if !spec.list_at(&["loadBalancerSourceRanges"]).is_empty() {
            let detail = "may only be used when `type` is 'LoadBalancer'";
            errors.push(FieldError::forbidden("spec.LoadBalancerSourceRanges", detail));
        }
    }
    if let Some(class) = spec["loadBalancerClass"].as_str().filter(|_| spec["type"] == "LoadBalancer") {
        complain(is_qualified_name(class), class, Path::SPEC.field("loadBalancerClass"), errors);
    }
    for (index, range) in spec.list_at(&["loadBalancerSourceRanges"]).iter().enumerate() {
        let text = range.as_str().unwrap_or_default().trim();
        if text.parse::<ipnet::IpNet>().is_err() {
            let path = Path::SPEC.field("LoadBalancerSourceRanges");
            let detail = "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)";
            errors.push(FieldError::invalid(path.index(index), text, detail));
        }
    }
}

fn session_affinity(spec: &Value, errors: &mut Errors) {
    let seconds = &spec["sessionAffinityConfig"]["clientIP"]["timeoutSeconds"];
    if spec["sessionAffinity"] == "ClientIP" {
        const DAY: i64 = 86_400;
        if !seconds.as_i64().is_some_and(|s| (1..=DAY).contains(&s)) {
            let detail = format!("must be greater than 0 and less than {DAY}");
            errors.push(FieldError::invalid(
                "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
                seconds.clone(),
                detail,
            ));
        }
    }
}

fn ports(spec: &Value, errors: &mut Errors) {
    let list = spec.list_at(&["ports"]);
    let path = Path::SPEC.field("ports");
    if list.is_empty() && !is_headless(spec) && spec["type"] != "ExternalName" {
        errors.push(FieldError::required(path, ""));
    }
    let mut names = Vec::new();
    let mut taken: Vec<(String, i64)> = Vec::new();
    let mut node_ports: Vec<(String, i64)> = Vec::new();
    for (index, port) in list.iter().enumerate() {
        let path = path.index(index);
        if list.len() > 1 {
            required(port, "name", path, errors);
        }
        super::dns_label(port, "name", path, errors);
        super::unique(&mut names, port.str_at(&["name"]), path.field("name"), errors);
        let number = port["port"].as_i64().unwrap_or(0);
        errors.extend(
            is_valid_port_number(number).into_iter().map(|m| FieldError::invalid(path.field("port"), number, m)),
        );
        required_one_of(port, "protocol", &["SCTP", "TCP", "UDP"], path, errors);
        port_number_or_name(&port["targetPort"], path.field("targetPort"), errors);
        if let Some(protocol) = port["appProtocol"].as_str() {
            complain(is_qualified_name(protocol), protocol, path.field("appProtocol"), errors);
        }
        let key = (port.str_at(&["protocol"]).to_owned(), number);
        if taken.contains(&key) {
            errors.push(FieldError::duplicate(path, serde_json::json!({"protocol": key.0, "port": key.1})));
        }
        taken.push(key);
        let Some(node_port) = port["nodePort"].as_i64().filter(|n| *n != 0) else { continue };
        if !matches!(spec.str_at(&["type"]), "NodePort" | "LoadBalancer") {
            let detail = "may not be used when `type` is 'ClusterIP'";
            errors.push(FieldError::forbidden(path.field("nodePort"), detail));
        }
        let key = (port.str_at(&["protocol"]).to_owned(), node_port);
        if node_ports.contains(&key) {
            errors.push(FieldError::duplicate(path.field("nodePort"), node_port));
        }
        node_ports.push(key);
    }
}

fn traffic_policies(spec: &Value, errors: &mut Errors) {
    let path = Path::SPEC.field("externalTrafficPolicy");
    if is_external(spec) {
        required_one_of(spec, "externalTrafficPolicy", &["Cluster", "Local"], Path::SPEC, errors);
    } else if !spec.str_at(&["externalTrafficPolicy"]).is_empty() {
        let detail = "may only be set for externally-accessible services";
        errors.push(FieldError::invalid(path, spec["externalTrafficPolicy"].clone(), detail));
    }
    let check = spec["healthCheckNodePort"].as_i64().unwrap_or(0);
    if check != 0 && !needs_health_check(spec) {
        let detail = "may only be set when `type` is 'LoadBalancer' and `externalTrafficPolicy` is 'Local'";
        errors.push(FieldError::invalid("spec.healthCheckNodePort", check, detail));
    }
    let has_policy = matches!(spec.str_at(&["type"]), "ClusterIP" | "NodePort" | "LoadBalancer");
    if spec["internalTrafficPolicy"].is_null() && has_policy {
        errors.push(FieldError::required("spec.internalTrafficPolicy", ""));
    }
    one_of_given(spec, "internalTrafficPolicy", &["Cluster", "Local"], Path::SPEC, errors);
    let distribution = ["PreferClose", "PreferSameZone", "PreferSameNode"];
    one_of_given(spec, "trafficDistribution", &distribution, Path::SPEC, errors);
}

/// Addresses, families and policy agree with each other.
pub fn cluster_ips(spec: &Value, errors: &mut Errors) {
    if spec["type"] == "ExternalName" {
        return;
    }
    let path = Path::SPEC.field("clusterIPs");
    let (first, all) = (spec.str_at(&["clusterIP"]), spec.list_at(&["clusterIPs"]));
    let whole = || spec["clusterIPs"].clone();
    match (first, all) {
        ("", []) => {}
        ("", _) => errors.push(FieldError::invalid(path, whole(), "must be empty when `clusterIP` is not specified")),
        (_, []) => errors.push(FieldError::required(path, "")),
        (first, [one, ..]) if one != first => {
            errors.push(FieldError::invalid(path, whole(), "first value must match `clusterIP`"));
        }
        _ => {}
    }
    families(spec, errors);
    if is_headless(spec) {
        if all.len() > 1 {
            errors.push(FieldError::invalid(path, whole(), "'None' must be the first and only value"));
        }
        return;
    }
    if all.len() > 2 {
        errors.push(FieldError::invalid(path, whole(), "may only hold up to 2 values"));
    }
    let mut addresses: Vec<IpAddr> = Vec::new();
    for (index, ip) in all.iter().enumerate() {
        let text = ip.as_str().unwrap_or_default();
        complain(is_valid_ip(text), text, path.index(index), errors);
        let Ok(address) = text.parse::<IpAddr>() else { continue };
        let family = if address.is_ipv6() { "IPv6" } else { "IPv4" };
        let wanted = spec["ipFamilies"][index].as_str().unwrap_or(family);
        if wanted != family && matches!(wanted, "IPv4" | "IPv6") {
            let detail = format!("expected an {wanted} value as indicated by `ipFamilies[{index}]`");
            errors.push(FieldError::invalid(path.index(index), text, detail));
        }
        addresses.push(address);
    }
    if let [a, b] = addresses.as_slice()
        && a.is_ipv6() == b.is_ipv6()
    {
        let detail = "may specify no more than one IP for each IP family";
        errors.push(FieldError::invalid(path, whole(), detail));
    }
}

fn families(spec: &Value, errors: &mut Errors) {
    let path = Path::SPEC.field("ipFamilies");
    let mut seen = Vec::new();
    for (index, family) in spec.list_at(&["ipFamilies"]).iter().enumerate() {
        let text = family.as_str().unwrap_or_default();
        if !matches!(text, "IPv4" | "IPv6") {
            errors.push(FieldError::not_supported(path.index(index), text, &["IPv4", "IPv6"]));
        }
        super::unique(&mut seen, text, path.index(index), errors);
    }
    one_of_given(spec, "ipFamilyPolicy", &["PreferDualStack", "RequireDualStack", "SingleStack"], Path::SPEC, errors);
}

/// The addresses of a load balancer are for services that have one.
pub fn status(obj: &Value) -> Errors {
    let mut errors = Errors::new();
    let points = obj.list_at(&["status", "loadBalancer", "ingress"]);
    if !points.is_empty() && obj["spec"]["type"] != "LoadBalancer" {
        let detail = "may only be used when `spec.type` is 'LoadBalancer'";
        errors.push(FieldError::forbidden("status.loadBalancer.ingress", detail));
        return errors;
    }
    let path = Path::STATUS.field("loadBalancer");
    super::each(&obj["status"]["loadBalancer"], "ingress", path, &mut errors, |point, path, errors| {
        let (ip, host) = (point.str_at(&["ip"]), point.str_at(&["hostname"]));
        if !ip.is_empty() {
            complain(is_valid_ip(ip), ip, path.field("ip"), errors);
        }
        match (ip.is_empty(), point["ipMode"].as_str()) {
            (true, Some(_)) => {
                errors.push(FieldError::forbidden(path.field("ipMode"), "may not be specified when `ip` is not set"));
            }
            (false, None) => {
                errors.push(FieldError::required(path.field("ipMode"), "must be specified when `ip` is set"));
            }
            (false, Some(mode)) if !matches!(mode, "VIP" | "Proxy") => {
                errors.push(FieldError::not_supported(path.field("ipMode"), mode, &["Proxy", "VIP"]));
            }
            _ => {}
        }
        super::container::subdomain(host, path.field("hostname"), errors);
        if host.parse::<IpAddr>().is_ok() {
            let detail = "must be a DNS name, not an IP address";
            errors.push(FieldError::invalid(path.field("hostname"), host, detail));
        }
    });
    errors
}

pub fn update(obj: &Value, old: &Value) -> Errors {
    let mut errors = addresses_stay(&obj["spec"], &old["spec"]);
    families_stay(&obj["spec"], &old["spec"], &mut errors);
    let (new, stored) = (&obj["spec"], &old["spec"]);
    if new["type"] == "LoadBalancer"
        && stored["type"] == "LoadBalancer"
        && !same(&new["loadBalancerClass"], &stored["loadBalancerClass"])
    {
        let value = new["loadBalancerClass"].clone();
        errors.push(FieldError::invalid("spec.loadBalancerClass", value, "may not change once set"));
    }
    if needs_health_check(new)
        && needs_health_check(stored)
        && new["healthCheckNodePort"] != stored["healthCheckNodePort"]
    {
        errors.push(FieldError::forbidden("spec.healthCheckNodePort", super::IMMUTABLE));
    }
    errors.extend(create(obj));
    errors
}

/// A service keeps its addresses while it has any.
fn addresses_stay(new: &Value, old: &Value) -> Errors {
    const CHANGED: &str = "may not change once set";
    let mut errors = Errors::new();
    let external = |spec: &Value| spec["type"] == "ExternalName";
    if external(new) || external(old) || is_headless(new) && is_headless(old) {
        return errors;
    }
    let (given, stored) = (new.list_at(&["clusterIPs"]), old.list_at(&["clusterIPs"]));
    let path = Path::SPEC.field("clusterIPs");
    let mut wrong = |index: usize, detail: &str| {
        errors.push(FieldError::invalid(path.index(index), new["clusterIPs"].clone(), detail));
    };
    if given.is_empty() && !stored.is_empty() {
        wrong(0, "primary clusterIP can not be unset");
    }
    for (index, (a, b)) in given.iter().zip(stored).enumerate() {
        if a != b {
            wrong(index, CHANGED);
        }
    }
    if given.len() == 1 && stored.len() > 1 && new["ipFamilyPolicy"] != "SingleStack" {
        let detail = "must be set to 'SingleStack' when releasing the secondary clusterIP";
        errors.push(FieldError::invalid("spec.ipFamilyPolicy", new["ipFamilyPolicy"].clone(), detail));
    }
    errors
}

fn families_stay(new: &Value, old: &Value, errors: &mut Errors) {
    let external = |spec: &Value| spec["type"] == "ExternalName";
    if external(new) || external(old) || is_headless(new) != is_headless(old) {
        return;
    }
    let (given, stored) = (new.list_at(&["ipFamilies"]), old.list_at(&["ipFamilies"]));
    let first_changed = matches!((given.first(), stored.first()), (Some(a), Some(b)) if a != b);
    if !is_headless(new) && (first_changed || given.len() == stored.len() && given != stored) {
        let value = new["ipFamilies"].clone();
        errors.push(FieldError::invalid("spec.ipFamilies[0]", value, "may not change once set"));
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::tests::texts;
    use super::*;
    use crate::registry::defaults;

    fn service(spec: &Value) -> Value {
        let mut obj = json!({"metadata": {"name": "a"}, "spec": spec});
        defaults::service::service(&mut obj);
        obj
    }

    #[test]
    fn mistakes_are_named_as_upstream_names_them() {
        let cases = [
            (json!({"ports": [{"port": 80}]}), vec![]),
            (json!({}), vec!["spec.ports: Required value"]),
            (json!({"clusterIP": "None", "clusterIPs": ["None"]}), vec![]),
            (json!({"ports": [{"port": 80, "name": "a"}, {"port": 81}]}), vec!["spec.ports[1].name: Required value"]),
            (
                json!({"ports": [{"port": 80, "nodePort": 30000}]}),
                vec!["spec.ports[0].nodePort: Forbidden: may not be used when `type` is 'ClusterIP'"],
            ),
            (json!({"type": "ExternalName"}), vec!["spec.externalName: Required value"]),
            (
                json!({"ports": [{"port": 80}], "clusterIP": "10.0.0.300", "clusterIPs": ["10.0.0.300"]}),
                vec![
                    r#"spec.clusterIPs[0]: Invalid value: "10.0.0.300": must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)"#,
                ],
            ),
        ];
        for (spec, expected) in cases {
            assert_eq!(texts(&create(&service(&spec))), expected, "{spec}");
        }
    }

    #[test]
    fn addresses_do_not_change() {
        let at = |ip: &str| service(&json!({"ports": [{"port": 80}], "clusterIP": ip, "clusterIPs": [ip]}));
        let expected = [r#"spec.clusterIPs[0]: Invalid value: ["10.0.0.2"]: may not change once set"#];
        assert_eq!(texts(&update(&at("10.0.0.2"), &at("10.0.0.1"))), expected);
    }
}
