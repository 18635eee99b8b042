//! Rules for pods and pod templates.

use apimachinery::meta::validation::{
    is_dns1123_label, is_dns1123_subdomain, is_dns1123_subdomain_with_underscores, is_valid_ip,
};
use apimachinery::status::FieldError;
use serde_json::Value;

use super::container::{self, PodFacts, subdomain};
use super::{
    Errors, Path, annotations, complain, dns_label, each, env, labels, non_negative, placement, required,
    required_one_of, requirements, security, volume, windows,
};
use crate::registry::defaults::pod::CONTAINER_LISTS;
use crate::registry::object::ObjectExt;

const MIRROR: &str = "kubernetes.io/config.mirror";

/// A pod that is to be created.
pub fn create(obj: &Value) -> Errors {
    let mut errors = Errors::new();
    metadata_and_spec(obj, &mut errors);
    let spec = &obj["spec"];
    if !spec.list_at(&["ephemeralContainers"]).is_empty() {
        errors.push(FieldError::forbidden("spec.ephemeralContainers", "cannot be set on create"));
    }
    if !spec.str_at(&["nodeName"]).is_empty() && !spec.list_at(&["schedulingGates"]).is_empty() {
        let detail = "cannot be set until all schedulingGates have been cleared";
        errors.push(FieldError::forbidden("spec.nodeName", detail));
    }
    security::app_armor_annotations_match(obj, &mut errors);
    errors
}

/// What holds for pods, whenever they are written, beyond what holds for templates.
pub fn metadata_and_spec(obj: &Value, errors: &mut Errors) {
    let spec = &obj["spec"];
    pod_annotations(obj, Path::METADATA.field("annotations"), errors);
    pod_spec(spec, Path::SPEC, errors);
    volume::made_claims(obj, errors);
    if obj.annotation(MIRROR).is_none() {
        resource_claims(spec, Path::SPEC, errors);
    } else {
        let claims = spec.list_at(&["resourceClaims"]).iter();
        errors.extend(claims.map(|_| FieldError::forbidden("", "static pods do not support resource claims")));
    }
    if spec.str_at(&["serviceAccountName"]).is_empty() {
        tokens_without_account(spec, errors);
    }
    non_negative(spec, "terminationGracePeriodSeconds", Path::SPEC, errors);
    for list in ["containers", "initContainers"] {
        each(spec, list, Path::SPEC, errors, trimmed_image);
    }
}

pub fn trimmed_image(container: &Value, path: Path<'_>, errors: &mut Errors) {
    let image = container.str_at(&["image"]);
    if image.trim().len() != image.len() {
        errors.push(FieldError::invalid(path.field("image"), image, "must not have leading or trailing whitespace"));
    }
}

fn tokens_without_account(spec: &Value, errors: &mut Errors) {
    each(spec, "volumes", Path::SPEC, errors, |volume, path, errors| {
        each(&volume["projected"], "sources", path.field("projected"), errors, |source, path, errors| {
            if !source["serviceAccountToken"].is_null() {
                let detail = "must not be specified when serviceAccountName is not set";
                errors.push(FieldError::forbidden(path.field("serviceAccountToken"), detail));
            }
        });
    });
}

/// A template on its own, under this name.
pub fn template(template: &Value, name: &str) -> Errors {
    let mut errors = Errors::new();
    template_at(template, Path::Root(name), &mut errors);
    errors
}

pub fn template_at(template: &Value, path: Path<'_>, errors: &mut Errors) {
    labels(&template["metadata"]["labels"], path.field("labels"), errors);
    annotations(&template["metadata"]["annotations"], path.field("annotations"), errors);
    pod_annotations(template, path.field("annotations"), errors);
    let spec_path = path.field("spec");
    pod_spec(&template["spec"], spec_path, errors);
    resource_claims(&template["spec"], spec_path, errors);
    if !template["spec"].list_at(&["ephemeralContainers"]).is_empty() {
        let detail = "ephemeral containers not allowed in pod template";
        errors.push(FieldError::forbidden(spec_path.field("ephemeralContainers"), detail));
    }
}

pub fn pod_spec(spec: &Value, path: Path<'_>, errors: &mut Errors) {
    if spec["terminationGracePeriodSeconds"].is_null() {
        errors.push(FieldError::required(path.field("terminationGracePeriodSeconds"), ""));
    }
    let volumes = volume::volumes(spec, path, errors);
    let facts = PodFacts { spec, volumes: &volumes };
    containers(spec, facts, path, errors);
    init_containers(spec, facts, path, errors);
    ephemeral_containers(spec, facts, path, errors);
    requirements::of_pod(spec, path, errors);
    host_network(spec, path, errors);
    required_one_of(spec, "restartPolicy", &["Always", "OnFailure", "Never"], path, errors);
    required_one_of(spec, "dnsPolicy", &["ClusterFirstWithHostNet", "ClusterFirst", "Default", "None"], path, errors);
    labels(&spec["nodeSelector"], path.field("nodeSelector"), errors);
    security::pod(spec, path, errors);
    dns_config(spec, path, errors);
    placement::placement(spec, path, errors);
    windows::host_process(spec, path, errors);
    names(spec, path, errors);
    host_users(spec, path, errors);
    hostname_override(spec, path, errors);
    if let Some(seconds) = spec["activeDeadlineSeconds"].as_i64().filter(|s| !(1..=i64::from(i32::MAX)).contains(s)) {
        let detail = "must be between 1 and 2147483647, inclusive";
        errors.push(FieldError::invalid(path.field("activeDeadlineSeconds"), seconds, detail));
    }
    each(spec, "hostAliases", path, errors, |alias, path, errors| {
        let ip = alias.str_at(&["ip"]);
        complain(is_valid_ip(ip), ip, path.field("ip"), errors);
        let list = path.field("hostnames");
        for (index, name) in alias.list_at(&["hostnames"]).iter().enumerate() {
            let name = name.as_str().unwrap_or_default();
            complain(is_dns1123_subdomain(name), name, list.index(index), errors);
        }
    });
    if !spec["overhead"].is_null() {
        let limits = serde_json::json!({"limits": spec["overhead"]});
        requirements::resources(&limits, &[], path.field("overhead"), errors);
    }
    operating_system(spec, path, errors);
    for list in CONTAINER_LISTS {
        each(spec, list, path, errors, |container, path, errors| {
            env::file_key_volumes(container, spec, path, errors);
        });
    }
}

/// The system that the pod is for, and nothing that belongs to the other.
fn operating_system(spec: &Value, path: Path<'_>, errors: &mut Errors) {
    if spec["os"].is_null() {
        return;
    }
    match spec.str_at(&["os", "name"]) {
        "linux" => windows::none(spec, path, errors),
        "windows" => windows::only(spec, path, errors),
        "" => errors.push(FieldError::required(path.field("os").field("name"), "")),
        other => errors.push(FieldError::not_supported(path.field("os"), other, &["linux", "windows"])),
    }
}

/// Annotations that mean something to pods.
fn pod_annotations(obj: &Value, path: Path<'_>, errors: &mut Errors) {
    const DELETION_COST: &str = "controller.kubernetes.io/pod-deletion-cost";
    if let Some(value) = obj.annotation(MIRROR).filter(|_| obj.str_at(&["spec", "nodeName"]).is_empty()) {
        let detail = "must set spec.nodeName if mirror pod annotation is set";
        errors.push(FieldError::invalid(path.key(MIRROR), value, detail));
    }
    if let Some(value) = obj.annotation(DELETION_COST) {
        let plain =
            value.parse::<i32>().is_ok() && !value.starts_with('+') && (value == "0" || !value.starts_with('0'));
        if !plain {
            errors.push(FieldError::invalid(path.key(DELETION_COST), value, "must be a 32bit integer"));
        }
    }
    security::annotations(obj, path, errors);
}

/// The claims of devices of a pod: made for it from a template, or there already.
fn resource_claims(spec: &Value, path: Path<'_>, errors: &mut Errors) {
    const SOURCES: [&str; 2] = ["resourceClaimName", "resourceClaimTemplateName"];
    let mut names: Vec<&str> = Vec::new();
    let list = path.field("resourceClaims");
    for (index, claim) in spec.list_at(&["resourceClaims"]).iter().enumerate() {
        let path = list.index(index);
        if let Some(name) = required(claim, "name", path, errors) {
            if names.contains(&name) {
                errors.push(FieldError::duplicate(path.field("name"), name));
            } else {
                complain(is_dns1123_label(name), name, path.field("name"), errors);
                names.push(name);
            }
        }
        let detail = match SOURCES.iter().filter(|source| !claim[**source].is_null()).count() {
            0 => "must specify one of: `resourceClaimName`, `resourceClaimTemplateName`",
            1 => "",
            _ => "at most one of `resourceClaimName` or `resourceClaimTemplateName` may be specified",
        };
        if !detail.is_empty() {
            errors.push(FieldError::invalid(path, claim.clone(), detail));
        }
        for source in SOURCES {
            if let Some(name) = claim[source].as_str() {
                complain(is_dns1123_subdomain(name), name, path.field(source), errors);
            }
        }
    }
}

fn containers(spec: &Value, facts: PodFacts<'_>, path: Path<'_>, errors: &mut Errors) {
    let list = spec.list_at(&["containers"]);
    let path = path.field("containers");
    if list.is_empty() {
        errors.push(FieldError::required(path, ""));
    }
    let mut names = Vec::new();
    for (index, container) in list.iter().enumerate() {
        let path = path.index(index);
        container::common(container, facts, path, errors);
        super::unique(&mut names, container.str_at(&["name"]), path.field("name"), errors);
        container::lifecycle(container, facts, path, errors);
        container::restarts(container, path, errors);
    }
    container::host_port_conflicts(list, path, errors);
}

fn init_containers(spec: &Value, facts: PodFacts<'_>, path: Path<'_>, errors: &mut Errors) {
    let mut names: Vec<&str> = spec.list_at(&["containers"]).iter().map(|c| c.str_at(&["name"])).collect();
    let list = path.field("initContainers");
    for (index, container) in spec.list_at(&["initContainers"]).iter().enumerate() {
        let path = list.index(index);
        container::common(container, facts, path, errors);
        super::unique(&mut names, container.str_at(&["name"]), path.field("name"), errors);
        container::restarts(container, path, errors);
        // They run one by one, and each is looked at as if it were the only one.
        container::host_port_conflicts(std::slice::from_ref(container), list, errors);
        if container["restartPolicy"] == "Always" {
            container::lifecycle(container, facts, path, errors);
            continue;
        }
        for field in ["lifecycle", "livenessProbe", "readinessProbe", "startupProbe"] {
            if !container[field].is_null() {
                let detail = "may not be set for init containers without restartPolicy=Always";
                errors.push(FieldError::forbidden(path.field(field), detail));
            }
        }
        each(container, "resizePolicy", path, errors, |item, path, errors| {
            if item["restartPolicy"] == "RestartContainer" {
                let detail = "must not be set to 'RestartContainer' for non-sidecar initContainers";
                errors.push(FieldError::invalid(path.field("restartPolicy"), "RestartContainer", detail));
            }
        });
    }
}

fn ephemeral_containers(spec: &Value, facts: PodFacts<'_>, path: Path<'_>, errors: &mut Errors) {
    const FORBIDDEN: [&str; 7] =
        ["ports", "livenessProbe", "readinessProbe", "startupProbe", "lifecycle", "resizePolicy", "restartPolicy"];
    let others = ["containers", "initContainers"];
    let mut names: Vec<&str> =
        others.iter().flat_map(|list| spec.list_at(&[list])).map(|c| c.str_at(&["name"])).collect();
    let others = names.clone();
    let path = path.field("ephemeralContainers");
    for (index, container) in spec.list_at(&["ephemeralContainers"]).iter().enumerate() {
        let path = path.index(index);
        container::common(container, facts, path, errors);
        super::unique(&mut names, container.str_at(&["name"]), path.field("name"), errors);
        let target = container.str_at(&["targetContainerName"]);
        if !target.is_empty() && !others.contains(&target) {
            errors.push(FieldError::not_found(path.field("targetContainerName"), target));
        }
        let has_resources = ["limits", "requests"].iter().any(|list| !container["resources"][list].is_null());
        let given = FORBIDDEN.into_iter().filter(|field| !container[*field].is_null());
        for field in given.chain(has_resources.then_some("resources")) {
            errors.push(FieldError::forbidden(path.field(field), "cannot be set for an Ephemeral Container"));
        }
        for (mount, value) in container.list_at(&["volumeMounts"]).iter().enumerate() {
            for field in ["subPath", "subPathExpr"] {
                if !value.str_at(&[field]).is_empty() {
                    let list = path.field("volumeMounts");
                    let path = list.index(mount);
                    errors.push(FieldError::forbidden(path.field(field), "cannot be set for an Ephemeral Container"));
                }
            }
        }
    }
}

/// With the node's network, ports of containers are ports of the node.
fn host_network(spec: &Value, path: Path<'_>, errors: &mut Errors) {
    if spec["hostNetwork"] != true {
        return;
    }
    each(spec, "containers", path, errors, |container, path, errors| {
        each(container, "ports", path, errors, |port, path, errors| {
            let number = |field: &str| port[field].as_i64().unwrap_or(0);
            if number("hostPort") != 0 && number("hostPort") != number("containerPort") {
                let detail = "must match `containerPort` when `hostNetwork` is true";
                errors.push(FieldError::invalid(path.field("hostPort"), number("hostPort"), detail));
            }
        });
    });
}

fn dns_config(spec: &Value, path: Path<'_>, errors: &mut Errors) {
    const SERVERS: usize = 3;
    const SEARCHES: usize = 32;
    const SEARCH_LETTERS: usize = 2048;
    let (config, path) = (&spec["dnsConfig"], path.field("dnsConfig"));
    let servers = config.list_at(&["nameservers"]);
    let servers_path = path.field("nameservers");
    if spec["dnsPolicy"] == "None" {
        if config.is_null() {
            errors.push(FieldError::required(path, "must provide `dnsConfig` when `dnsPolicy` is None"));
            return;
        }
        if servers.is_empty() {
            let detail = "must provide at least one DNS nameserver when `dnsPolicy` is None";
            errors.push(FieldError::required(servers_path, detail));
            return;
        }
    }
    if servers.len() > SERVERS {
        let detail = format!("must not have more than {SERVERS} nameservers");
        errors.push(FieldError::invalid(servers_path, config["nameservers"].clone(), detail));
    }
    for (index, server) in servers.iter().enumerate() {
        let text = server.as_str().unwrap_or_default();
        complain(is_valid_ip(text), text, servers_path.index(index), errors);
    }
    let searches: Vec<&str> = config.list_at(&["searches"]).iter().filter_map(Value::as_str).collect();
    let list = path.field("searches");
    let too_much = [
        (searches.len() > SEARCHES, format!("must not have more than {SEARCHES} search paths")),
        (
            searches.join(" ").len() > SEARCH_LETTERS,
            format!("must not have more than {SEARCH_LETTERS} characters (including spaces) in the search list"),
        ),
    ];
    for (_, detail) in too_much.into_iter().filter(|(is, _)| *is) {
        errors.push(FieldError::invalid(list, config["searches"].clone(), detail));
    }
    for (index, search) in searches.into_iter().enumerate().filter(|(_, search)| *search != ".") {
        let search = search.strip_suffix('.').unwrap_or(search);
        complain(is_dns1123_subdomain_with_underscores(search), search, list.index(index), errors);
    }
    each(config, "options", path, errors, |option, path, errors| {
        if option.str_at(&["name"]).is_empty() {
            errors.push(FieldError::required(path, "must not be empty"));
        }
    });
}

/// Names of other things.
fn names(spec: &Value, path: Path<'_>, errors: &mut Errors) {
    for field in ["serviceAccountName", "nodeName", "priorityClassName"] {
        subdomain(spec.str_at(&[field]), path.field(field), errors);
    }
    if let Some(class) = spec["runtimeClassName"].as_str() {
        complain(is_dns1123_subdomain(class), class, path.field("runtimeClassName"), errors);
    }
    // The older name of the field, which goes on to be filled in.
    let (account, older) = (spec.str_at(&["serviceAccountName"]), spec.str_at(&["serviceAccount"]));
    if older != account {
        let detail = format!("must be the same as serviceAccountName: {account:?}");
        errors.push(FieldError::invalid(path.field("deprecatedServiceAccount"), older, detail));
    }
    dns_label(spec, "hostname", path, errors);
    dns_label(spec, "subdomain", path, errors);
    if !spec["preemptionPolicy"].is_null() {
        required_one_of(spec, "preemptionPolicy", &["PreemptLowerPriority", "Never"], path, errors);
    }
}

/// Users of their own are for pods that share little with the node.
fn host_users(spec: &Value, path: Path<'_>, errors: &mut Errors) {
    const DETAIL: &str = "when `hostUsers` is false";
    if spec["hostUsers"] != false {
        return;
    }
    if spec["hostNetwork"] == true {
        errors.push(FieldError::forbidden(path.field("hostNetwork"), DETAIL));
    }
    for (field, shown) in [("hostPID", "HostPID"), ("hostIPC", "HostIPC")] {
        if spec[field] == true {
            errors.push(FieldError::forbidden(path.field(shown), DETAIL));
        }
    }
    for list in CONTAINER_LISTS {
        each(spec, list, path, errors, |container, path, errors| {
            if !container.list_at(&["volumeDevices"]).is_empty() {
                errors.push(FieldError::forbidden(path.field("volumeDevices"), DETAIL));
            }
        });
    }
}

fn hostname_override(spec: &Value, path: Path<'_>, errors: &mut Errors) {
    const LONGEST: usize = 64;
    let Some(name) = spec["hostnameOverride"].as_str() else { return };
    let path = path.field("hostnameOverride");
    for field in ["setHostnameAsFQDN", "hostNetwork"] {
        if spec[field] == true {
            errors.push(FieldError::forbidden(path, format!("may not be specified when {field} is true")));
        }
    }
    if name.len() > LONGEST {
        errors.push(FieldError::too_long(path, LONGEST));
    }
    complain(is_dns1123_subdomain(name), name, path, errors);
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::tests::texts;
    use super::*;
    use crate::registry::defaults;

    fn problems(change: impl FnOnce(&mut Value)) -> Vec<String> {
        let mut obj = json!({"metadata": {"name": "a"}, "spec": {"containers": [{"name": "c", "image": "i"}]}});
        change(&mut obj);
        defaults::pod::pod(&mut obj);
        texts(&create(&obj))
    }

    #[test]
    fn a_minimal_pod_is_in_order() {
        assert_eq!(problems(|_| {}), Vec::<String>::new());
    }

    #[test]
    fn mistakes_are_named_as_upstream_names_them() {
        type Change = fn(&mut Value);
        let cases: &[(Change, &str)] = &[
            (|p| p["spec"]["containers"] = json!([]), "spec.containers: Required value"),
            (|p| p["spec"]["containers"][0]["image"] = "".into(), "spec.containers[0].image: Required value"),
            (
                |p| p["spec"]["containers"] = json!([{"name": "c", "image": "i"}, {"name": "c", "image": "i"}]),
                r#"spec.containers[1].name: Duplicate value: "c""#,
            ),
            (
                |p| p["spec"]["restartPolicy"] = "Sometimes".into(),
                r#"spec.restartPolicy: Unsupported value: "Sometimes": supported values: "Always", "OnFailure", "Never""#,
            ),
            (
                |p| p["spec"]["containers"][0]["volumeMounts"] = json!([{"name": "v", "mountPath": "/x"}]),
                r#"spec.containers[0].volumeMounts[0].name: Not found: "v""#,
            ),
            (
                |p| p["spec"]["containers"][0]["resources"] = json!({"requests": {"cpu": "2"}, "limits": {"cpu": "1"}}),
                r#"spec.containers[0].resources.requests: Invalid value: "2": must be less than or equal to cpu limit of 1"#,
            ),
            (
                |p| {
                    p["spec"]["containers"][0]["env"] =
                        json!([{"name": "A", "value": "b", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}])
                },
                r#"spec.containers[0].env[0].valueFrom: Invalid value: "": may not be specified when `value` is not empty"#,
            ),
            (
                |p| p["spec"]["containers"][0]["livenessProbe"] = json!({"periodSeconds": 1}),
                "spec.containers[0].livenessProbe: Required value: must specify a handler type",
            ),
            (
                |p| p["spec"]["activeDeadlineSeconds"] = 0.into(),
                "spec.activeDeadlineSeconds: Invalid value: 0: must be between 1 and 2147483647, inclusive",
            ),
            (
                |p| p["spec"]["tolerations"] = json!([{"operator": "Equal", "value": "x"}]),
                "spec.tolerations[0].operator: Invalid value: \"Equal\": operator must be Exists when `key` is empty, which means \\\"match all values and all keys\\\"",
            ),
            (
                |p| p["spec"]["volumes"] = json!([{"name": "v", "hostPath": {"path": "/a/../b"}}]),
                r#"spec.volumes[0].hostPath.path: Invalid value: "/a/../b": must not contain '..'"#,
            ),
            (
                |p| {
                    p["spec"]["initContainers"] =
                        json!([{"name": "i", "image": "i", "readinessProbe": {"tcpSocket": {"port": 1}}}])
                },
                "spec.initContainers[0].readinessProbe: Forbidden: may not be set for init containers without restartPolicy=Always",
            ),
        ];
        for (change, expected) in cases {
            let expected = expected.replace("\\\"", "\"");
            assert_eq!(problems(change), [expected]);
        }
    }
}
