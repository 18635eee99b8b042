//! What may be written into the status of a pod.

use std::net::IpAddr;

use apimachinery::meta::validation::{is_dns1123_subdomain, is_qualified_name, is_valid_ip};
use apimachinery::status::FieldError;
use serde_json::Value;

use super::pod_update::annotations;
use super::{Errors, IMMUTABLE, Path, complain, each};
use crate::registry::object::ObjectExt;

/// Conditions of the system itself, whose names need no check.
const SYSTEM_CONDITIONS: [&str; 3] = ["Initialized", "PodScheduled", "Ready"];
/// Users of containers may be any that Linux has, unlike those that a spec asks for.
const USER_MAX: i64 = u32::MAX as i64;
const GROUP_MAX: i64 = i32::MAX as i64;
const NO_COUNT: &str = "must be a non-negative integer";

pub fn status(obj: &Value, old: &Value) -> Errors {
    let mut errors = Errors::new();
    let (new, stored) = (&obj["status"], &old["status"]);
    annotations(obj, old, &mut errors);
    conditions(new, &mut errors);
    let nominated = new.str_at(&["nominatedNodeName"]);
    if !nominated.is_empty() && nominated != stored.str_at(&["nominatedNodeName"]) {
        let path = Path::STATUS.field("nominatedNodeName");
        complain(is_dns1123_subdomain(nominated), nominated, path, &mut errors);
        if !old.str_at(&["spec", "nodeName"]).is_empty() {
            errors.push(FieldError::forbidden(path, "may not be set on pods that are already bound to a node"));
        }
    }
    if let Some(generation) = new["observedGeneration"].as_i64().filter(|generation| *generation < 0) {
        errors.push(FieldError::invalid("status.observedGeneration", generation, NO_COUNT));
    }
    if new.str_at(&["qosClass"]) != stored.str_at(&["qosClass"]) {
        errors.push(FieldError::invalid("status.qosClass", new.str_at(&["qosClass"]), IMMUTABLE));
    }
    for (list, containers) in [
        ("containerStatuses", "containers"),
        ("initContainerStatuses", "initContainers"),
        ("ephemeralContainerStatuses", ""),
    ] {
        restarts(obj, old, list, containers, &mut errors);
    }
    claim_statuses(obj, &mut errors);
    addresses(new, stored, &mut errors);
    users(obj, &mut errors);
    errors
}

fn conditions(status: &Value, errors: &mut Errors) {
    each(status, "conditions", Path::STATUS, errors, |condition, path, errors| {
        if let Some(generation) = condition["observedGeneration"].as_i64().filter(|generation| *generation < 0) {
            errors.push(FieldError::invalid(path.field("observedGeneration"), generation, NO_COUNT));
        }
        let kind = condition.str_at(&["type"]);
        if !SYSTEM_CONDITIONS.contains(&kind) {
            complain(is_qualified_name(kind), kind, path.field("Type"), errors);
        }
    });
}

/// A container that ended and must not restart does not come back to life. `containers` is empty for containers that
/// never restart.
fn restarts(obj: &Value, old: &Value, list: &str, containers: &str, errors: &mut Errors) {
    let spec = &old["spec"];
    if !containers.is_empty() && all_may_restart(spec) {
        return;
    }
    let path = Path::STATUS.field(list);
    for (index, before) in old.list_at(&["status", list]).iter().enumerate() {
        let ended = &before["state"]["terminated"];
        let now = obj.list_at(&["status", list]).iter().find(|status| status["name"] == before["name"]);
        let alive = now.is_some_and(|status| !status["state"]["terminated"].is_object());
        if !ended.is_object() || !alive {
            continue;
        }
        let container = spec.list_at(&[containers]).iter().find(|container| container["name"] == before["name"]);
        let code = ended["exitCode"].as_i64().unwrap_or(0);
        if !container.is_some_and(|container| may_restart(container, spec, code)) {
            let path = path.index(index);
            errors.push(FieldError::forbidden(path.field("state"), "may not be transitioned to non-terminated state"));
        }
    }
}

/// Whether the end of one container can start all of them again.
fn all_may_restart(spec: &Value) -> bool {
    let containers = ["containers", "initContainers"].iter().flat_map(|list| spec.list_at(&[list]));
    let mut rules = containers.flat_map(|container| container.list_at(&["restartPolicyRules"]));
    rules.any(|rule| rule["action"] == "RestartAllContainers")
}

fn may_restart(container: &Value, spec: &Value, code: i64) -> bool {
    let own = container.str_at(&["restartPolicy"]);
    let applies = |rule: &Value| {
        let listed = rule.list_at(&["exitCodes", "values"]).iter().any(|value| value.as_i64() == Some(code));
        match rule.str_at(&["exitCodes", "operator"]) {
            "In" => listed,
            "NotIn" => !listed,
            _ => false,
        }
    };
    let rules = container.list_at(&["restartPolicyRules"]);
    if !own.is_empty() && rules.iter().any(|rule| rule["action"] == "Restart" && applies(rule)) {
        return true;
    }
    match if own.is_empty() { spec.str_at(&["restartPolicy"]) } else { own } {
        "Always" => true,
        "OnFailure" => code != 0,
        _ => false,
    }
}

/// The claims that were made for the pod are those that it asks for.
fn claim_statuses(obj: &Value, errors: &mut Errors) {
    let asked = obj.list_at(&["spec", "resourceClaims"]);
    let mut seen: Vec<String> = Vec::new();
    each(&obj["status"], "resourceClaimStatuses", Path::STATUS, errors, |status, path, errors| {
        let name = status.str_at(&["name"]);
        if !asked.iter().any(|claim| claim["name"] == name) {
            let detail = "must match the name of an entry in `spec.resourceClaims`";
            errors.push(FieldError::invalid(path.field("name"), name, detail));
        }
        if seen.iter().any(|known| known == name) {
            errors.push(FieldError::duplicate(path.field("name"), name));
        }
        seen.push(name.to_owned());
        if let Some(claim) = status["resourceClaimName"].as_str() {
            complain(is_dns1123_subdomain(claim), claim, path.field("resourceClaimName"), errors);
        }
    });
}

/// The addresses of the pod and of its node: one of each family, the first of them also by itself.
fn addresses(new: &Value, stored: &Value, errors: &mut Errors) {
    let pod_ips = Path::STATUS.field("podIPs");
    let (first, all) = (new.str_at(&["podIP"]), new.list_at(&["podIPs"]));
    list_of_addresses(all, stored.list_at(&["podIPs"]), pod_ips, errors);
    match all.first() {
        None if !first.is_empty() => {
            let detail = "podIP and podIPs must either both be set or both be unset";
            errors.push(FieldError::invalid_null(pod_ips, detail));
        }
        Some(_) if first.is_empty() => {
            let detail = "podIP and podIPs must either both be set or both be unset";
            errors.push(FieldError::invalid(pod_ips, new["podIPs"].clone(), detail));
        }
        Some(one) if one.str_at(&["ip"]) != first => {
            let path = pod_ips.index(0);
            errors.push(FieldError::invalid(path.field("ip"), one.str_at(&["ip"]), "must be equal to `podIP`"));
        }
        _ => {}
    }
    let host_ips = Path::STATUS.field("hostIPs");
    let all = new.list_at(&["hostIPs"]);
    if let Some(one) = all.first().filter(|one| one.str_at(&["ip"]) != new.str_at(&["hostIP"])) {
        let path = host_ips.index(0);
        errors.push(FieldError::invalid(path.field("ip"), one.str_at(&["ip"]), "must be equal to `hostIP`"));
    }
    list_of_addresses(all, stored.list_at(&["hostIPs"]), host_ips, errors);
}

/// Addresses that are stored may stay, whatever they are.
fn list_of_addresses(all: &[Value], stored: &[Value], path: Path<'_>, errors: &mut Errors) {
    for (index, ip) in all.iter().enumerate().filter(|(_, ip)| !stored.contains(ip)) {
        let text = ip.str_at(&["ip"]);
        complain(is_valid_ip(text), text, path.index(index), errors);
    }
    if all.len() > 1 {
        let parsed: Vec<Option<IpAddr>> = all.iter().map(|ip| ip.str_at(&["ip"]).parse().ok()).collect();
        let dual = matches!(parsed[..], [Some(a), Some(b)] if a.is_ipv6() != b.is_ipv6());
        if !dual {
            let detail = "may specify no more than one IP for each IP family";
            errors.push(FieldError::invalid(path, all.to_vec(), detail));
        }
    }
}

/// As whom containers run.
fn users(obj: &Value, errors: &mut Errors) {
    let windows = obj["spec"]["os"]["name"] == "windows";
    let between = |number: i64, max: i64, path: Path<'_>, errors: &mut Errors| {
        if !(0..=max).contains(&number) {
            errors.push(FieldError::invalid(path, number, format!("must be between 0 and {max}, inclusive")));
        }
    };
    for list in ["containerStatuses", "initContainerStatuses", "ephemeralContainerStatuses"] {
        each(&obj["status"], list, Path::STATUS, errors, |status, path, errors| {
            let (user, path) = (&status["user"]["linux"], path.field("user"));
            let path = path.field("linux");
            if !user.is_object() {
                return;
            }
            if windows {
                errors.push(FieldError::forbidden(path, "cannot be set for a windows pod"));
                return;
            }
            between(user["uid"].as_i64().unwrap_or(0), USER_MAX, path.field("uid"), errors);
            between(user["gid"].as_i64().unwrap_or(0), GROUP_MAX, path.field("gid"), errors);
            each(user, "supplementalGroups", path, errors, |group, path, errors| {
                between(group.as_i64().unwrap_or(0), GROUP_MAX, path, errors);
            });
        });
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::tests::texts;
    use super::*;

    #[test]
    fn containers_that_must_not_restart_stay_ended() {
        let pod = |policy: &str, state: Value| {
            json!({"spec": {"restartPolicy": policy, "containers": [{"name": "c"}]},
                "status": {"containerStatuses": [{"name": "c", "state": state}]}})
        };
        for (policy, code, allowed) in
            [("Always", 0, true), ("OnFailure", 0, false), ("OnFailure", 1, true), ("Never", 1, false)]
        {
            let old = pod(policy, json!({"terminated": {"exitCode": code}}));
            let told = status(&pod(policy, json!({"running": {}})), &old);
            assert_eq!(told.is_empty(), allowed, "{policy} {code}: {:?}", texts(&told));
        }
    }

    #[test]
    fn addresses_agree() {
        let told = |status: Value| texts(&super::status(&json!({"status": status}), &json!({})));
        assert!(told(json!({"podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}]})).is_empty());
        let expected = [r#"status.podIPs[0].ip: Invalid value: "10.0.0.1": must be equal to `podIP`"#];
        assert_eq!(told(json!({"podIP": "10.0.0.2", "podIPs": [{"ip": "10.0.0.1"}]})), expected);
    }
}
