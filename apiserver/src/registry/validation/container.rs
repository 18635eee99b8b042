//! Rules for one container: ports, environment, mounts, probes, hooks, resources.

use apimachinery::meta::Quantity;
use apimachinery::meta::validation::{
    is_config_map_key, is_dns1123_label, is_dns1123_subdomain, is_qualified_name, is_valid_port_name,
    is_valid_port_number,
};
use apimachinery::status::FieldError;
use serde_json::Value;

use super::{
    Errors, IS_NEGATIVE, Path, complain, each, non_negative, one_of_given, required, required_one_of, security, unique,
};
use crate::registry::core::pod_prepare::quantity;
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
    each(container, "env", path, errors, env);
    each(container, "envFrom", path, errors, env_from);
    mounts(container, pod, path, errors);
    required_one_of(container, "imagePullPolicy", &["Always", "IfNotPresent", "Never"], path, errors);
    resources(&container["resources"], path.field("resources"), errors);
    each(container, "resizePolicy", path, errors, |policy, path, errors| {
        required_one_of(policy, "resourceName", &["cpu", "memory"], path, errors);
        required_one_of(policy, "restartPolicy", &["NotRequired", "RestartContainer"], path, errors);
    });
    security::container(
        &container["securityContext"],
        pod.spec["hostUsers"] != false,
        path.field("securityContext"),
        errors,
    );
}

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
                required_one_of(action, "scheme", &["HTTP", "HTTPS"], path, errors);
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
    let (seconds, most) = (action["seconds"].as_i64().unwrap_or(0), grace.unwrap_or(0));
    if !(0..=most).contains(&seconds) {
        let detail = format!(
            "must be non-negative and less than terminationGracePeriodSeconds ({most}). Enable AllowPodLifecycleSleepActionZeroValue feature gate for zero sleep."
        );
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

/// A name of a variable: printable, without `=`.
fn env_name(name: &str, path: Path<'_>, errors: &mut Errors) {
    if !name.bytes().all(|b| (b' '..=b'~').contains(&b) && b != b'=') {
        let detail = "a valid environment variable name must consist only of printable ASCII characters other than '='";
        errors.push(FieldError::invalid(path, name, detail));
    }
}

fn env(var: &Value, path: Path<'_>, errors: &mut Errors) {
    if let Some(name) = required(var, "name", path, errors) {
        env_name(name, path.field("name"), errors);
    }
    let from = &var["valueFrom"];
    if from.is_null() {
        return;
    }
    let path = path.field("valueFrom");
    let mut sources = 0;
    for source in ["fieldRef", "resourceFieldRef", "configMapKeyRef", "secretKeyRef", "fileKeyRef"] {
        let (value, path) = (&from[source], path.field(source));
        if value.is_null() {
            continue;
        }
        sources += 1;
        match source {
            "fieldRef" => field_ref(value, ENV_FIELDS, path, errors),
            "resourceFieldRef" => resource_field_ref(value, path, errors),
            "fileKeyRef" => {
                required(value, "volumeName", path, errors);
                required(value, "path", path, errors);
                required(value, "key", path, errors);
            }
            _ => key_ref(value, path, errors),
        }
    }
    let detail = match sources {
        0 => "must specify one of: `fieldRef`, `resourceFieldRef`, `configMapKeyRef`, `secretKeyRef` or `fileKeyRef`",
        _ if !var.str_at(&["value"]).is_empty() => "may not be specified when `value` is not empty",
        1 => return,
        _ => "may not have more than one field specified at a time",
    };
    errors.push(FieldError::invalid(path, "", detail));
}

/// A key in a config map or secret.
fn key_ref(reference: &Value, path: Path<'_>, errors: &mut Errors) {
    if let Some(name) = required(reference, "name", path, errors) {
        complain(is_dns1123_subdomain(name), name, path.field("name"), errors);
    }
    if let Some(key) = required(reference, "key", path, errors) {
        complain(is_config_map_key(key), key, path.field("key"), errors);
    }
}

/// Fields of the pod that variables can show.
const ENV_FIELDS: &[&str] = &[
    "metadata.name",
    "metadata.namespace",
    "metadata.uid",
    "spec.nodeName",
    "spec.serviceAccountName",
    "status.hostIP",
    "status.hostIPs",
    "status.podIP",
    "status.podIPs",
];
/// Fields of the pod that files can show.
pub const VOLUME_FIELDS: &[&str] =
    &["metadata.name", "metadata.namespace", "metadata.labels", "metadata.annotations", "metadata.uid"];

/// A field of the pod, or one label or annotation by its key.
pub fn field_ref(reference: &Value, allowed: &[&str], path: Path<'_>, errors: &mut Errors) {
    required(reference, "apiVersion", path, errors);
    let Some(field) = required(reference, "fieldPath", path, errors) else { return };
    let path = path.field("fieldPath");
    if let Some((map, key)) = field.strip_suffix("']").and_then(|rest| rest.split_once("['")) {
        match map {
            "metadata.annotations" => complain(is_qualified_name(&key.to_lowercase()), key, path, errors),
            "metadata.labels" => complain(is_qualified_name(key), key, path, errors),
            _ => errors.push(FieldError::invalid(path, map, "does not support subscript")),
        }
    } else if !DOWNWARD_FIELDS.contains(&field) {
        let detail = format!("error converting fieldPath: field label not supported: {field}");
        errors.push(FieldError::invalid(path, field, detail));
    } else if !allowed.contains(&field) {
        errors.push(FieldError::not_supported(path, field, allowed));
    }
}

/// Fields of a pod that have names in the downward API at all.
const DOWNWARD_FIELDS: &[&str] = &[
    "metadata.annotations",
    "metadata.labels",
    "metadata.name",
    "metadata.namespace",
    "metadata.uid",
    "spec.nodeName",
    "spec.restartPolicy",
    "spec.schedulerName",
    "spec.serviceAccountName",
    "status.hostIP",
    "status.hostIPs",
    "status.phase",
    "status.podIP",
    "status.podIPs",
];

/// A limit or request of a container.
pub fn resource_field_ref(reference: &Value, path: Path<'_>, errors: &mut Errors) {
    const RESOURCES: &[&str] = &[
        "limits.cpu",
        "limits.ephemeral-storage",
        "limits.memory",
        "requests.cpu",
        "requests.ephemeral-storage",
        "requests.memory",
    ];
    if let Some(resource) = required(reference, "resource", path, errors) {
        let huge = resource.starts_with("limits.hugepages-") || resource.starts_with("requests.hugepages-");
        if !RESOURCES.contains(&resource) && !huge {
            errors.push(FieldError::not_supported(path.field("resource"), resource, RESOURCES));
        }
    }
}

fn env_from(source: &Value, path: Path<'_>, errors: &mut Errors) {
    let prefix = source.str_at(&["prefix"]);
    if !prefix.is_empty() {
        env_name(prefix, path.field("prefix"), errors);
    }
    let mut sources = 0;
    for kind in ["configMapRef", "secretRef"] {
        if !source[kind].is_null() {
            sources += 1;
            if let Some(name) = required(&source[kind], "name", path.field(kind), errors) {
                let path = path.field(kind);
                complain(is_dns1123_subdomain(name), name, path.field("name"), errors);
            }
        }
    }
    match sources {
        0 => errors.push(FieldError::invalid(path, "", "must specify one of: `configMapRef` or `secretRef`")),
        1 => {}
        _ => errors.push(FieldError::invalid(path, "", "may not have more than one field specified at a time")),
    }
}

/// Mounts can be read-only all the way down only when they are read-only and nobody looks through them.
fn recursive_read_only(mount: &Value, path: Path<'_>, errors: &mut Errors) {
    let Some(mode) = mount["recursiveReadOnly"].as_str() else { return };
    let path = path.field("recursiveReadOnly");
    match mode {
        "Disabled" => {}
        "Enabled" | "IfPossible" => {
            if mount["readOnly"] != true {
                errors.push(FieldError::forbidden(path, "may only be specified when readOnly is true"));
            }
            if !mount["mountPropagation"].is_null() && mount["mountPropagation"] != "None" {
                let detail = "may only be specified when mountPropagation is None or not specified";
                errors.push(FieldError::forbidden(path, detail));
            }
        }
        other => errors.push(FieldError::not_supported(path, other, &["Disabled", "Enabled", "IfPossible"])),
    }
}

fn mounts(container: &Value, pod: PodFacts<'_>, path: Path<'_>, errors: &mut Errors) {
    let (list, list_path) = (container.list_at(&["volumeMounts"]), path.field("volumeMounts"));
    let mut seen = Vec::new();
    for (index, mount) in list.iter().enumerate() {
        let path = list_path.index(index);
        let name = mount.str_at(&["name"]);
        required(mount, "name", path, errors);
        if !pod.volumes.contains(&name) {
            errors.push(FieldError::not_found(path.field("name"), name));
        }
        required(mount, "mountPath", path, errors);
        let target = mount.str_at(&["mountPath"]);
        if seen.contains(&target) {
            errors.push(FieldError::invalid(path.field("mountPath"), target, "must be unique"));
        }
        seen.push(target);
        let (plain, expression) = (mount.str_at(&["subPath"]), mount.str_at(&["subPathExpr"]));
        if !plain.is_empty() && !expression.is_empty() {
            let detail = "subPathExpr and subPath are mutually exclusive";
            errors.push(FieldError::invalid(path.field("subPathExpr"), expression, detail));
        }
        local_path(plain, list_path.field("subPath"), errors);
        local_path(expression, list_path.field("subPathExpr"), errors);
        let propagation = ["Bidirectional", "HostToContainer", "None"];
        one_of_given(mount, "mountPropagation", &propagation, list_path, errors);
        recursive_read_only(mount, list_path, errors);
        if mount["mountPropagation"] == "Bidirectional" && container["securityContext"]["privileged"] != true {
            let detail = "Bidirectional mount propagation is available only to privileged containers";
            errors.push(FieldError::forbidden(list_path.field("mountPropagation"), detail));
        }
    }
    each(container, "volumeDevices", path, errors, |device, path, errors| {
        required(device, "devicePath", path, errors);
        if let Some(name) = required(device, "name", path, errors)
            && !pod.volumes.contains(&name)
        {
            errors.push(FieldError::not_found(path.field("name"), name));
        }
    });
}

/// A relative path that does not leave where it starts.
pub fn local_path(text: &str, path: Path<'_>, errors: &mut Errors) {
    if text.starts_with('/') {
        errors.push(FieldError::invalid(path, text, "must be a relative path"));
    }
    no_back_steps(text, path, errors);
}

/// A path without `..`.
pub fn no_back_steps(text: &str, path: Path<'_>, errors: &mut Errors) {
    if text.split('/').any(|part| part == "..") {
        errors.push(FieldError::invalid(path, text, "must not contain '..'"));
    }
}

/// The resources that containers may have without a prefix.
const STANDARD: [&str; 3] = ["cpu", "memory", "ephemeral-storage"];
/// What else has a name without a prefix, but is nothing that containers use.
const STANDARD_ELSEWHERE: [&str; 17] = [
    "configmaps",
    "limits.cpu",
    "limits.ephemeral-storage",
    "limits.memory",
    "persistentvolumeclaims",
    "pods",
    "replicationcontrollers",
    "requests.cpu",
    "requests.ephemeral-storage",
    "requests.memory",
    "requests.storage",
    "resourcequotas",
    "secrets",
    "services",
    "services.loadbalancers",
    "services.nodeports",
    "storage",
];

pub fn resource_name(name: &str, path: Path<'_>, errors: &mut Errors) {
    let messages = is_qualified_name(name);
    let malformed = !messages.is_empty();
    complain(messages, name, path, errors);
    let is_standard = STANDARD.contains(&name) || name.starts_with("hugepages-");
    if !name.contains('/') {
        let is_elsewhere = STANDARD_ELSEWHERE.contains(&name) || name.starts_with("requests.hugepages-");
        if !malformed && !is_standard && !is_elsewhere {
            errors.push(FieldError::invalid(path, name, "must be a standard resource type or fully qualified"));
        }
        if !is_standard {
            errors.push(FieldError::invalid(path, name, "must be a standard resource for containers"));
        }
    } else if !name.contains("kubernetes.io/")
        && (name.starts_with("requests.") || !is_qualified_name(&format!("requests.{name}")).is_empty())
    {
        errors.push(FieldError::invalid(path, name, "doesn't follow extended resource name standard"));
    }
}

/// Whether pods may be promised more of it than there is.
fn overcommits(name: &str) -> bool {
    STANDARD.contains(&name)
}

/// Limits and requests fit each other.
pub fn resources(requirements: &Value, path: Path<'_>, errors: &mut Errors) {
    let (limits_path, requests_path) = (path.field("limits"), path.field("requests"));
    for (name, amount) in requirements["limits"].as_object().into_iter().flatten() {
        resource_name(name, limits_path.key(name), errors);
        quantity_value(name, amount, limits_path.key(name), errors);
    }
    for (name, amount) in requirements["requests"].as_object().into_iter().flatten() {
        resource_name(name, requests_path.key(name), errors);
        quantity_value(name, amount, requests_path.key(name), errors);
        let Some(request) = quantity(amount) else { continue };
        match quantity(&requirements["limits"][name]) {
            Some(limit) if request != limit && !overcommits(name) => {
                let detail = format!("must be equal to {name} limit of {limit}");
                errors.push(FieldError::invalid(requests_path, request.to_string(), detail));
            }
            Some(limit) if request > limit => {
                let detail = format!("must be less than or equal to {name} limit of {limit}");
                errors.push(FieldError::invalid(requests_path, request.to_string(), detail));
            }
            None if !overcommits(name) => {
                errors.push(FieldError::required(limits_path, "Limit must be set for non overcommitable resources"));
            }
            _ => {}
        }
    }
}

/// A quantity that is not negative, and whole where halves make no sense.
pub fn quantity_value(name: &str, value: &Value, path: Path<'_>, errors: &mut Errors) {
    let Some(amount) = quantity(value) else { return };
    if amount < Quantity::ZERO {
        errors.push(FieldError::invalid(path, amount.to_string(), IS_NEGATIVE));
    }
    let counted = [
        "pods",
        "services",
        "secrets",
        "configmaps",
        "resourcequotas",
        "replicationcontrollers",
        "persistentvolumeclaims",
    ];
    let extended = name.contains('/') && !name.starts_with("kubernetes.io/") && !name.starts_with("requests.");
    if (counted.contains(&name) || name.starts_with("count/") || extended) && amount.milli_value() % 1000 != 0 {
        errors.push(FieldError::invalid(path, value.clone(), "must be an integer"));
    }
}

/// References to secrets that images are pulled with, to nodes, to service accounts.
pub fn subdomain(text: &str, path: Path<'_>, errors: &mut Errors) {
    if !text.is_empty() {
        complain(is_dns1123_subdomain(text), text, path, errors);
    }
}
