//! Rules for endpoint slices.

use std::net::IpAddr;

use apimachinery::meta::validation::{
    is_dns1123_label, is_dns1123_subdomain, is_qualified_name, is_valid_ip, is_valid_label_value,
};
use apimachinery::status::FieldError;
use serde_json::Value;

use super::{Errors, IMMUTABLE, Path, complain, required_one_of};
use crate::registry::object::ObjectExt;

const MAX_ADDRESSES: usize = 100;
const MAX_PORTS: usize = 20_000;
const MAX_ENDPOINTS: usize = 1_000;
const MAX_HINTS: usize = 8;

pub fn endpoint_slice(obj: &Value) -> Errors {
    let mut errors = Errors::new();
    match obj.str_at(&["addressType"]) {
        "" => errors.push(FieldError::required("addressType", "")),
        "IPv4" | "IPv6" | "FQDN" => {}
        other => errors.push(FieldError::not_supported("addressType", other, &["FQDN", "IPv4", "IPv6"])),
    }
    ports(obj, &mut errors);
    endpoints(obj, &mut errors);
    errors
}

fn ports(obj: &Value, errors: &mut Errors) {
    let (list, path) = (obj.list_at(&["ports"]), Path::Root("ports"));
    if list.len() > MAX_PORTS {
        errors.push(FieldError::too_many(path, list.len(), MAX_PORTS));
        return;
    }
    let mut seen = Vec::new();
    for (index, port) in list.iter().enumerate() {
        let path = path.index(index);
        let name = port.str_at(&["name"]);
        if !name.is_empty() {
            complain(is_dns1123_label(name), name, path.field("name"), errors);
        }
        if seen.contains(&name) {
            errors.push(FieldError::duplicate(path.field("name"), name));
        }
        seen.push(name);
        required_one_of(port, "protocol", &["SCTP", "TCP", "UDP"], path, errors);
        if let Some(protocol) = port["appProtocol"].as_str() {
            complain(is_qualified_name(protocol), protocol, path.field("appProtocol"), errors);
        }
    }
}

fn endpoints(obj: &Value, errors: &mut Errors) {
    let (list, path) = (obj.list_at(&["endpoints"]), Path::Root("endpoints"));
    if list.len() > MAX_ENDPOINTS {
        errors.push(FieldError::too_many(path, list.len(), MAX_ENDPOINTS));
        return;
    }
    for (index, endpoint) in list.iter().enumerate() {
        let path = path.index(index);
        let addresses = endpoint.list_at(&["addresses"]);
        let field = path.field("addresses");
        if addresses.is_empty() {
            errors.push(FieldError::required(field, ""));
        } else if addresses.len() > MAX_ADDRESSES {
            errors.push(FieldError::too_many(field, addresses.len(), MAX_ADDRESSES));
        }
        for (index, address) in addresses.iter().enumerate() {
            self::address(obj.str_at(&["addressType"]), address.as_str().unwrap_or_default(), field, index, errors);
        }
        if let Some(node) = endpoint["nodeName"].as_str() {
            complain(is_dns1123_subdomain(node), node, path.field("nodeName"), errors);
        }
        if let Some(hostname) = endpoint["hostname"].as_str() {
            complain(is_dns1123_label(hostname), hostname, path.field("hostname"), errors);
        }
        hints(&endpoint["hints"], path.field("hints"), errors);
    }
}

/// What is wrong with a text.
type Check = fn(&str) -> Vec<String>;

/// For which zones and nodes an endpoint is, each named once.
fn hints(hints: &Value, path: Path<'_>, errors: &mut Errors) {
    let kinds: [(&str, Check); 2] = [("forZones", is_valid_label_value), ("forNodes", is_dns1123_subdomain)];
    for (field, check) in kinds {
        let names = hints.list_at(&[field]);
        let path = path.field(field);
        if names.len() > MAX_HINTS {
            errors.push(FieldError::too_many(path, names.len(), MAX_HINTS));
            continue;
        }
        let mut seen = Vec::new();
        for (index, hint) in names.iter().enumerate() {
            let path = path.index(index);
            let name = hint.str_at(&["name"]);
            if seen.contains(&name) {
                errors.push(FieldError::duplicate(path.field("name"), name));
            }
            seen.push(name);
            complain(check(name), name, path.field("name"), errors);
        }
    }
}

fn address(kind: &str, address: &str, list: Path<'_>, index: usize, errors: &mut Errors) {
    let path = list.index(index);
    match (kind, address.parse::<IpAddr>()) {
        ("FQDN", _) => complain(is_dns1123_subdomain(address), address, path, errors),
        ("IPv4" | "IPv6", Err(_)) => complain(is_valid_ip(address), address, path, errors),
        ("IPv4" | "IPv6", Ok(ip)) => {
            if ip.is_ipv4() != (kind == "IPv4") {
                errors.push(FieldError::invalid(list, address, format!("must be an {kind} address")));
            }
            endpoint_ip(ip, path, errors);
        }
        _ => {}
    }
}

/// Addresses that no endpoint can have.
pub fn endpoint_ip(ip: IpAddr, path: Path<'_>, errors: &mut Errors) {
    let problem = if ip.is_unspecified() {
        "may not be unspecified (0.0.0.0 or ::)"
    } else if ip.is_loopback() {
        "may not be in the loopback range (127.0.0.0/8, ::1/128)"
    } else if matches!(ip, IpAddr::V4(v4) if v4.is_link_local())
        || matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local())
    {
        "may not be in the link-local range (169.254.0.0/16, fe80::/10)"
    } else if matches!(ip, IpAddr::V4(v4) if v4.octets()[..3] == [224, 0, 0]) {
        "may not be in the link-local multicast range (224.0.0.0/24, ff02::/10)"
    } else {
        return;
    };
    errors.push(FieldError::invalid(path, ip.to_string(), problem));
}

pub fn endpoint_slice_update(obj: &Value, old: &Value) -> Errors {
    let mut errors = Errors::new();
    if obj["addressType"] != old["addressType"] {
        errors.push(FieldError::invalid("addressType", obj["addressType"].clone(), IMMUTABLE));
    }
    errors
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::tests::texts;
    use super::*;

    #[test]
    fn addresses_fit_their_type() {
        let slice = |kind: &str, address: &str| {
            texts(&endpoint_slice(&json!({"addressType": kind, "endpoints": [{"addresses": [address]}]})))
        };
        assert!(slice("IPv4", "10.0.0.1").is_empty());
        assert_eq!(
            slice("IPv6", "10.0.0.1"),
            [r#"endpoints[0].addresses: Invalid value: "10.0.0.1": must be an IPv6 address"#]
        );
        let loopback = r#"endpoints[0].addresses[0]: Invalid value: "127.0.0.1": may not be in the loopback range (127.0.0.0/8, ::1/128)"#;
        assert_eq!(slice("IPv4", "127.0.0.1"), [loopback]);
        assert_eq!(texts(&endpoint_slice(&json!({}))), ["addressType: Required value"]);
    }
}
