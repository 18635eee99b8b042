//! Rules for one container: ports, probes, hooks, restarts. Its environment, mounts and resources have files of their
//! own.

use apimachinery::meta::validation::{
    is_dns1123_label, is_dns1123_subdomain, is_valid_port_name, is_valid_port_number,
};
use apimachinery::status::FieldError;
use serde_json::Value;

use super::{
    Errors, Path, complain, env, mounts, non_negative, one_of_given, required, required_one_of, requirements, security,
    unique,
};
use crate::registry::object::ObjectExt;

/// What a container's rules need to know about its pod.
#[derive(Clone, Copy)]
pub struct PodFacts<'a> {
    pub spec: &'a Value,
    /// The names of the volumes that are in order.
    pub volumes: &'a [&'a str],
}

/// What holds for containers of all three lists.
pub fn common(container: &Value, pod: PodFacts<'_>, path: Path<'_>, errors: &mut Errors) {
    if let Some(name) = required(container, "name", path, errors) {
        complain(is_dns1123_label(name), name, path.field("name"), errors);
    }
    required(container, "image", path, errors);
    required_one_of(container, "terminationMessagePolicy", &["File", "FallbackToLogsOnError"], path, errors);
    ports(container, path, errors);
    env::environment(container, path, errors);
    mounts::mounts(container, pod, path, errors);
    mounts::devices(container, pod, path, errors);
    required_one_of(container, "imagePullPolicy", &["Always", "IfNotPresent", "Never"], path, errors);
    let claims = requirements::claim_names_of(pod.spec);
    requirements::resources(&container["resources"], &claims, path.field("resources"), errors);
    resize_policy(container, pod, path.field("resizePolicy"), errors);
    security::container(
        &container["securityContext"],
        pod.spec["hostUsers"] != false,
        path.field("securityContext"),
        errors,
    );
}

/// What happens when resources change, once for each. Complaints are about the whole list: so does upstream.
fn resize_policy(container: &Value, pod: PodFacts<'_>, path: Path<'_>, errors: &mut Errors) {
    const POLICIES: [&str; 2] = ["NotRequired", "RestartContainer"];
    let mut seen = Vec::new();
    for (index, item) in container.list_at(&["resizePolicy"]).iter().enumerate() {
        let (resource, policy) = (item.str_at(&["resourceName"]), item.str_at(&["restartPolicy"]));
        if seen.contains(&resource) {
            errors.push(FieldError::duplicate(path.index(index), resource));
        }
        seen.push(resource);
        for (text, allowed) in [(resource, ["cpu", "memory"]), (policy, POLICIES)] {
            if text.is_empty() {
                errors.push(FieldError::required(path, ""));
            } else if !allowed.contains(&text) {
                errors.push(FieldError::not_supported(path, text, &allowed));
            }
        }
        if pod.spec["restartPolicy"] == "Never" && policy != "NotRequired" {
            let detail = "must be 'NotRequired' when pod `restartPolicy` is 'Never'";
            errors.push(FieldError::invalid(path, policy, detail));
        }
    }
}

/// When the container is started again, whatever the pod says.
pub fn restarts(container: &Value, path: Path<'_>, errors: &mut Errors) {
    const RULES: usize = 20;
    const CODES: usize = 255;
    let rules = container.list_at(&["restartPolicyRules"]);
    let list = path.field("restartPolicyRules");
    if container["restartPolicy"].is_null() && !rules.is_empty() {
        let detail = "must specify restartPolicy when restart rules are used";
        errors.push(FieldError::required(path.field("restartPolicy"), detail));
    }
    one_of_given(container, "restartPolicy", &["Always", "Never", "OnFailure"], path, errors);
    if rules.len() > RULES {
        errors.push(FieldError::too_many(list, rules.len(), RULES));
    }
    for (index, rule) in rules.iter().enumerate() {
        let path = list.index(index);
        let action = rule.str_at(&["action"]);
        if !RESTART_ACTIONS.contains(&action) {
            errors.push(FieldError::not_supported(path.field("action"), action, &RESTART_ACTIONS));
        }
        let (codes, path) = (&rule["exitCodes"], path.field("exitCodes"));
        if codes.is_null() {
            errors.push(FieldError::required(path, "must be specified"));
            continue;
        }
        let operator = codes.str_at(&["operator"]);
        if !["In", "NotIn"].contains(&operator) {
            errors.push(FieldError::not_supported(path.field("operator"), operator, &["In", "NotIn"]));
        }
        let given = codes.list_at(&["values"]).len();
        if given > CODES {
            errors.push(FieldError::too_many(path.field("values"), given, CODES));
        }
    }
}

const RESTART_ACTIONS: [&str; 2] = ["Restart", "RestartAllContainers"];

/// Probes and hooks, of containers that may have them.
pub fn lifecycle(container: &Value, pod: PodFacts<'_>, path: Path<'_>, errors: &mut Errors) {
    let grace = pod.spec["terminationGracePeriodSeconds"].as_i64();
    for hook in ["postStart", "preStop"] {
        let handler_value = &container["lifecycle"][hook];
        if handler_value.is_object() {
            let path = path.field("lifecycle");
            handler(handler_value, grace, path.field(hook), errors);
        }
    }
    for name in ["livenessProbe", "readinessProbe", "startupProbe"] {
        let (value, path) = (&container[name], path.field(name));
        if !value.is_object() {
            continue;
        }
        probe(value, grace, path, errors);
        if name == "readinessProbe" {
            if !value["terminationGracePeriodSeconds"].is_null() {
                let seconds = value["terminationGracePeriodSeconds"].clone();
                let detail = "must not be set for readinessProbes";
                errors.push(FieldError::invalid(path.field("terminationGracePeriodSeconds"), seconds, detail));
            }
        } else if value["successThreshold"].as_i64().is_some_and(|threshold| threshold != 1) {
            errors.push(FieldError::invalid(
                path.field("successThreshold"),
                value["successThreshold"].clone(),
                "must be 1",
            ));
        }
    }
}

fn probe(probe: &Value, grace: Option<i64>, path: Path<'_>, errors: &mut Errors) {
    handler(probe, grace, path, errors);
    for field in ["initialDelaySeconds", "timeoutSeconds", "periodSeconds", "successThreshold", "failureThreshold"] {
        non_negative(probe, field, path, errors);
    }
    super::positive(probe, "terminationGracePeriodSeconds", path, errors);
}

/// Exactly one way to reach the container.
fn handler(handler: &Value, grace: Option<i64>, path: Path<'_>, errors: &mut Errors) {
    let mut found = 0;
    for kind in ["exec", "httpGet", "tcpSocket", "grpc", "sleep"] {
        let (action, path) = (&handler[kind], path.field(kind));
        if action.is_null() {
            continue;
        }
        found += 1;
        if found > 1 {
            errors.push(FieldError::forbidden(path, "may not specify more than 1 handler type"));
            continue;
        }
        match kind {
            "exec" if action.list_at(&["command"]).is_empty() => {
                errors.push(FieldError::required(path.field("command"), ""));
            }
            "httpGet" => {
                required(action, "path", path, errors);
                port_number_or_name(&action["port"], path.field("port"), errors);
                let scheme = action.str_at(&["scheme"]);
                if !["HTTP", "HTTPS"].contains(&scheme) {
                    errors.push(FieldError::not_supported(path.field("scheme"), scheme, &["HTTP", "HTTPS"]));
                }
                for header in action.list_at(&["httpHeaders"]) {
                    http_header(header.str_at(&["name"]), path.field("httpHeaders"), errors);
                }
            }
            "tcpSocket" => port_number_or_name(&action["port"], path.field("port"), errors),
            "grpc" => port_number_or_name(&action["port"], path.field("port"), errors),
            "sleep" => sleep(action, grace, path, errors),
            _ => {}
        }
    }
    if found == 0 {
        errors.push(FieldError::required(path, "must specify a handler type"));
    }
}

fn sleep(action: &Value, grace: Option<i64>, path: Path<'_>, errors: &mut Errors) {
    let Some(most) = grace else { return };
    let seconds = action["seconds"].as_i64().unwrap_or(0);
    if !(0..=most).contains(&seconds) {
        let detail = format!("must be non-negative and less than terminationGracePeriodSeconds ({most})");
        errors.push(FieldError::invalid(path, seconds, detail));
    }
}

fn http_header(name: &str, path: Path<'_>, errors: &mut Errors) {
    if name.is_empty() || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-') {
        let detail = "a valid HTTP header must consist of alphanumeric characters or '-' (e.g. 'X-Header-Name', regex used for validation is '[-A-Za-z0-9]+')";
        errors.push(FieldError::invalid(path, name, detail));
    }
}

pub fn port_number_or_name(port: &Value, path: Path<'_>, errors: &mut Errors) {
    match port {
        Value::String(name) => complain(is_valid_port_name(name), name, path, errors),
        other => {
            let number = other.as_i64().unwrap_or(0);
            errors.extend(is_valid_port_number(number).into_iter().map(|m| FieldError::invalid(path, number, m)));
        }
    }
}

fn ports(container: &Value, path: Path<'_>, errors: &mut Errors) {
    let (list, path) = (container.list_at(&["ports"]), path.field("ports"));
    let mut names = Vec::new();
    for (index, port) in list.iter().enumerate() {
        let path = path.index(index);
        let name = port.str_at(&["name"]);
        let messages = if name.is_empty() { Vec::new() } else { is_valid_port_name(name) };
        if messages.is_empty() {
            unique(&mut names, name, path.field("name"), errors);
        }
        complain(messages, name, path.field("name"), errors);
        match port["containerPort"].as_i64().unwrap_or(0) {
            0 => errors.push(FieldError::required(path.field("containerPort"), "")),
            number => port_number(number, path.field("containerPort"), errors),
        }
        if let Some(number) = port["hostPort"].as_i64().filter(|n| *n != 0) {
            port_number(number, path.field("hostPort"), errors);
        }
        required_one_of(port, "protocol", &["SCTP", "TCP", "UDP"], path, errors);
    }
}

fn port_number(number: i64, path: Path<'_>, errors: &mut Errors) {
    errors.extend(is_valid_port_number(number).into_iter().map(|message| FieldError::invalid(path, number, message)));
}

/// Two containers of a pod cannot have the same port of the node.
pub fn host_port_conflicts(containers: &[Value], path: Path<'_>, errors: &mut Errors) {
    let mut taken: Vec<String> = Vec::new();
    for (index, container) in containers.iter().enumerate() {
        for (port_index, port) in container.list_at(&["ports"]).iter().enumerate() {
            let Some(number) = port["hostPort"].as_i64().filter(|n| *n != 0) else { continue };
            let key = format!("{}/{}/{number}", port.str_at(&["protocol"]), port.str_at(&["hostIP"]));
            if taken.contains(&key) {
                let path = path.index(index);
                let path = path.field("ports");
                let path = path.index(port_index);
                errors.push(FieldError::duplicate(path.field("hostPort"), key.as_str()));
            } else {
                taken.push(key);
            }
        }
    }
}

/// References to secrets that images are pulled with, to nodes, to service accounts.
pub fn subdomain(text: &str, path: Path<'_>, errors: &mut Errors) {
    if !text.is_empty() {
        complain(is_dns1123_subdomain(text), text, path, errors);
    }
}
