//! Which address families a service has: what the user says, completed from what the cluster has.

use std::net::IpAddr;

use apimachinery::status::FieldError;
use ipnet::IpNet;
use serde_json::{Value, json};

use crate::registry::common::same;
use crate::registry::object::ObjectExt;
use crate::registry::validation::service::{cluster_ips, is_headless};

pub const V4: &str = "IPv4";
pub const V6: &str = "IPv6";

/// The families of the cluster, its default first.
pub fn of_cluster(ranges: &[IpNet]) -> Vec<&'static str> {
    let mut families: Vec<&'static str> = Vec::new();
    for range in ranges {
        let family = if matches!(range, IpNet::V6(_)) { V6 } else { V4 };
        if !families.contains(&family) {
            families.push(family);
        }
    }
    if families.is_empty() { vec![V4] } else { families }
}

fn family_of(ip: &str) -> Option<&'static str> {
    ip.parse::<IpAddr>().ok().map(|ip| if ip.is_ipv6() { V6 } else { V4 })
}

fn other(family: &str) -> &'static str {
    if family == V4 { V6 } else { V4 }
}

/// Fills in `ipFamilyPolicy` and `ipFamilies`, or says what does not fit.
pub fn complete(service: &mut Value, old: Option<&Value>, cluster: &[&'static str]) -> Vec<FieldError> {
    if service["spec"]["type"] == "ExternalName" || !service["spec"].is_object() || keeps_preferred(service, old) {
        return Vec::new();
    }
    let selectorless =
        is_headless(&service["spec"]) && crate::registry::common::is_nothing(&service["spec"]["selector"]);
    if service["spec"]["ipFamilyPolicy"].is_null() {
        let inherited = old.map(|old| old["spec"]["ipFamilyPolicy"].clone()).filter(|policy| !policy.is_null());
        let policy = inherited.unwrap_or_else(|| if selectorless { "RequireDualStack" } else { "SingleStack" }.into());
        service.set(&["spec", "ipFamilyPolicy"], policy);
    }
    let mut errors = Vec::new();
    cluster_ips(&service["spec"], &mut errors);
    if !errors.is_empty() {
        return errors;
    }
    if let Some(old) = old {
        shrink(service, old, &mut errors);
    }
    fits_policy(&service["spec"], &mut errors);
    infer_from_addresses(service, cluster, &mut errors);
    if !errors.is_empty() {
        return errors;
    }
    let single = service["spec"]["ipFamilyPolicy"] == "SingleStack";
    if selectorless {
        // Without backends to choose, every family may be named, whatever the cluster has.
        let mut families = families(service, cluster[0]);
        if families.len() < 2 && !single {
            families.push(other(&families[0]).to_owned());
        }
        service.set(&["spec", "ipFamilies"], families);
        return errors;
    }
    fits_cluster(&service["spec"], cluster, &mut errors);
    if errors.is_empty() {
        let mut families = families(service, cluster[0]);
        if !single && families.len() == 1 && cluster.len() == 2 {
            families.push(other(&families[0]).to_owned());
        }
        service.set(&["spec", "ipFamilies"], families);
    }
    errors
}

/// A service that prefers two families is left as it is unless its user changes these fields.
fn keeps_preferred(service: &Value, old: Option<&Value>) -> bool {
    let fields = ["ipFamilyPolicy", "ipFamilies", "clusterIPs"];
    old.is_some_and(|old| {
        service["spec"]["ipFamilyPolicy"] == "PreferDualStack"
            && old["spec"]["type"] != "ExternalName"
            && fields.iter().all(|field| same(&service["spec"][*field], &old["spec"][*field]))
    })
}

fn families(service: &Value, default: &str) -> Vec<String> {
    let named: Vec<String> =
        service.list_at(&["spec", "ipFamilies"]).iter().filter_map(Value::as_str).map(str::to_owned).collect();
    if named.is_empty() { vec![default.to_owned()] } else { named }
}

/// Asking for one family is enough to give up the second address.
fn shrink(service: &mut Value, old: &Value, errors: &mut Vec<FieldError>) {
    let single = service["spec"]["ipFamilyPolicy"] == "SingleStack";
    for (field, what) in [("clusterIPs", "cluster IP"), ("ipFamilies", "IP family")] {
        let unchanged = same(&service["spec"][field], &old["spec"][field]);
        let (now, before) = (service.list_at(&["spec", field]).len(), old.list_at(&["spec", field]).len());
        if single && unchanged && now > 1 {
            let first = service["spec"][field][0].clone();
            service.set(&["spec", field], json!([first]));
        } else if !single && now > 0 && now < before {
            let detail = format!("must be 'SingleStack' to release the secondary {what}");
            errors.push(FieldError::invalid("spec.ipFamilyPolicy", service["spec"]["ipFamilyPolicy"].clone(), detail));
        }
    }
}

fn fits_policy(spec: &Value, errors: &mut Vec<FieldError>) {
    if spec["ipFamilyPolicy"] != "SingleStack" {
        return;
    }
    for (field, what) in [("clusterIPs", "cluster IPs"), ("ipFamilies", "IP families")] {
        if spec.list_at(&[field]).len() == 2 {
            let detail = format!("must be 'RequireDualStack' or 'PreferDualStack' when multiple {what} are specified");
            errors.push(FieldError::invalid("spec.ipFamilyPolicy", spec["ipFamilyPolicy"].clone(), detail));
        }
    }
}

fn infer_from_addresses(service: &mut Value, cluster: &[&str], errors: &mut Vec<FieldError>) {
    let mut families: Vec<Value> = service.list_at(&["spec", "ipFamilies"]).to_vec();
    for (index, ip) in service.list_at(&["spec", "clusterIPs"]).iter().enumerate().skip(families.len()) {
        let Some(family) = ip.as_str().and_then(family_of) else { continue };
        if cluster.contains(&family) {
            families.push(family.into());
        } else {
            let detail = format!("{family} is not configured on this cluster");
            let value = service["spec"]["clusterIPs"].clone();
            errors.push(FieldError::invalid(format!("spec.clusterIPs[{index}]"), value, detail));
        }
    }
    if !families.is_empty() {
        service.set(&["spec", "ipFamilies"], families);
    }
}

fn fits_cluster(spec: &Value, cluster: &[&str], errors: &mut Vec<FieldError>) {
    if spec["ipFamilyPolicy"] == "RequireDualStack" && cluster.len() < 2 {
        let detail = "this cluster is not configured for dual-stack services";
        errors.push(FieldError::invalid("spec.ipFamilyPolicy", spec["ipFamilyPolicy"].clone(), detail));
    }
    for (index, family) in spec.list_at(&["ipFamilies"]).iter().enumerate() {
        if !cluster.iter().any(|known| family == known) {
            let field = format!("spec.ipFamilies[{index}]");
            errors.push(FieldError::invalid(field, family.clone(), "not configured on this cluster"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn completed(spec: &Value, cluster: &[&'static str]) -> (Value, Vec<String>) {
        let mut service = json!({"metadata": {"name": "s"}, "spec": spec});
        let errors = complete(&mut service, None, cluster).iter().map(ToString::to_string).collect();
        (json!([service["spec"]["ipFamilyPolicy"], service["spec"]["ipFamilies"]]), errors)
    }

    #[test]
    fn families_follow_user_and_cluster() {
        let (single, dual) = (&[V4][..], &[V4, V6][..]);
        let cases = [
            (json!({"type": "ClusterIP"}), single, json!(["SingleStack", ["IPv4"]])),
            (json!({"type": "ClusterIP"}), dual, json!(["SingleStack", ["IPv4"]])),
            (
                json!({"type": "ClusterIP", "ipFamilyPolicy": "PreferDualStack"}),
                dual,
                json!(["PreferDualStack", ["IPv4", "IPv6"]]),
            ),
            (
                json!({"type": "ClusterIP", "ipFamilyPolicy": "PreferDualStack"}),
                single,
                json!(["PreferDualStack", ["IPv4"]]),
            ),
            (
                json!({"type": "ClusterIP", "clusterIP": "None", "clusterIPs": ["None"]}),
                single,
                json!(["RequireDualStack", ["IPv4", "IPv6"]]),
            ),
            (
                json!({"type": "ClusterIP", "clusterIP": "None", "clusterIPs": ["None"], "selector": {"a": "b"}}),
                single,
                json!(["SingleStack", ["IPv4"]]),
            ),
            (
                json!({"type": "ClusterIP", "clusterIP": "fd00::1", "clusterIPs": ["fd00::1"]}),
                dual,
                json!(["SingleStack", ["IPv6"]]),
            ),
        ];
        for (spec, cluster, expected) in cases {
            assert_eq!(completed(&spec, cluster), (expected, vec![]), "{spec}");
        }
    }

    #[test]
    fn what_the_cluster_does_not_have_is_refused() {
        let (_, errors) = completed(&json!({"type": "ClusterIP", "ipFamilyPolicy": "RequireDualStack"}), &[V4]);
        assert_eq!(
            errors,
            [
                r#"spec.ipFamilyPolicy: Invalid value: "RequireDualStack": this cluster is not configured for dual-stack services"#
            ]
        );
        let (_, errors) = completed(&json!({"type": "ClusterIP", "ipFamilies": ["IPv6"]}), &[V4]);
        assert_eq!(errors, [r#"spec.ipFamilies[0]: Invalid value: "IPv6": not configured on this cluster"#]);
    }
}
