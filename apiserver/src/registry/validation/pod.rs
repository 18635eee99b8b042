//! Rules for pods and pod templates.

use apimachinery::meta::validation::{is_dns1123_label, is_qualified_name, is_valid_ip, is_valid_label_value};
use apimachinery::status::FieldError;
use serde_json::Value;

use super::container::{self, PodFacts, quantity_value, subdomain};
use super::{
    Errors, Path, annotations, complain, dns_label, each, label_selector, labels, non_negative, one_of, one_of_at,
    one_of_given, positive, required_one_of, security, volume,
};
use crate::registry::object::ObjectExt;

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
    errors
}

/// What holds for pods, whenever they are written, beyond what holds for templates.
pub fn metadata_and_spec(obj: &Value, errors: &mut Errors) {
    let spec = &obj["spec"];
    pod_spec(spec, Path::SPEC, errors);
    if spec.str_at(&["serviceAccountName"]).is_empty() {
        tokens_without_account(spec, errors);
    }
    non_negative(spec, "terminationGracePeriodSeconds", Path::SPEC, errors);
    for list in ["containers", "initContainers"] {
        each(spec, list, Path::SPEC, errors, |container, path, errors| {
            let image = container.str_at(&["image"]);
            if image.trim().len() != image.len() {
                let detail = "must not have leading or trailing whitespace";
                errors.push(FieldError::invalid(path.field("image"), image, detail));
            }
        });
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
    let spec_path = path.field("spec");
    pod_spec(&template["spec"], spec_path, errors);
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
    if spec["resources"].is_object() {
        container::resources(&spec["resources"], path.field("resources"), errors);
    }
    host_network(spec, path, errors);
    required_one_of(spec, "restartPolicy", &["Always", "OnFailure", "Never"], path, errors);
    required_one_of(spec, "dnsPolicy", &["ClusterFirstWithHostNet", "ClusterFirst", "Default", "None"], path, errors);
    labels(&spec["nodeSelector"], path.field("nodeSelector"), errors);
    security::pod(spec, path, errors);
    dns_config(spec, path, errors);
    scheduling(spec, path, errors);
    names(spec, path, errors);
    if let Some(seconds) = spec["activeDeadlineSeconds"].as_i64().filter(|s| !(1..=i64::from(i32::MAX)).contains(s)) {
        let detail = "must be between 1 and 2147483647, inclusive";
        errors.push(FieldError::invalid(path.field("activeDeadlineSeconds"), seconds, detail));
    }
    each(spec, "hostAliases", path, errors, |alias, path, errors| {
        let ip = alias.str_at(&["ip"]);
        complain(is_valid_ip(ip), ip, path.field("ip"), errors);
        let list = path.field("hostnames");
        for (index, name) in alias.list_at(&["hostnames"]).iter().enumerate() {
            subdomain(name.as_str().unwrap_or_default(), list.index(index), errors);
        }
    });
    let overhead = path.field("overhead");
    for (name, amount) in spec["overhead"].as_object().into_iter().flatten() {
        quantity_value(name, amount, overhead.key(name), errors);
    }
    one_of_at(&spec["os"]["name"], &["linux", "windows"], path.field("os"), errors);
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
        one_of(container, "restartPolicy", &["Always", "Never", "OnFailure"], path, errors);
    }
    container::host_port_conflicts(list, path, errors);
}

fn init_containers(spec: &Value, facts: PodFacts<'_>, path: Path<'_>, errors: &mut Errors) {
    let mut names: Vec<&str> = spec.list_at(&["containers"]).iter().map(|c| c.str_at(&["name"])).collect();
    let path = path.field("initContainers");
    for (index, container) in spec.list_at(&["initContainers"]).iter().enumerate() {
        let path = path.index(index);
        container::common(container, facts, path, errors);
        super::unique(&mut names, container.str_at(&["name"]), path.field("name"), errors);
        one_of(container, "restartPolicy", &["Always", "Never", "OnFailure"], path, errors);
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
    for list in ["containers", "initContainers"] {
        let path = path.field(list);
        for (index, container) in spec.list_at(&[list]).iter().enumerate() {
            let path = path.index(index);
            each(container, "ports", path, errors, |port, path, errors| {
                if port["hostPort"]
                    .as_i64()
                    .is_some_and(|host| host != 0 && Some(host) != port["containerPort"].as_i64())
                {
                    let detail = "must match `containerPort` when `hostNetwork` is true";
                    errors.push(FieldError::invalid(path.field("hostPort"), port["hostPort"].clone(), detail));
                }
            });
        }
    }
}

fn dns_config(spec: &Value, path: Path<'_>, errors: &mut Errors) {
    const SERVERS: usize = 3;
    const SEARCHES: usize = 32;
    let (config, path) = (&spec["dnsConfig"], path.field("dnsConfig"));
    let servers = config.list_at(&["nameservers"]);
    if spec["dnsPolicy"] == "None" {
        if config.is_null() {
            errors.push(FieldError::required(path, "must provide `dnsConfig` when `dnsPolicy` is None"));
        } else if servers.is_empty() {
            let detail = "must provide at least one DNS nameserver when `dnsPolicy` is None";
            errors.push(FieldError::required(path.field("nameservers"), detail));
        }
    }
    if servers.len() > SERVERS {
        let detail = format!("must not have more than {SERVERS} nameservers");
        errors.push(FieldError::invalid(path.field("nameservers"), config["nameservers"].clone(), detail));
    }
    for (index, server) in servers.iter().enumerate() {
        let list = path.field("nameservers");
        let text = server.as_str().unwrap_or_default();
        complain(is_valid_ip(text), text, list.index(index), errors);
    }
    if config.list_at(&["searches"]).len() > SEARCHES {
        let detail = format!("must not have more than {SEARCHES} search paths");
        errors.push(FieldError::invalid(path.field("searches"), config["searches"].clone(), detail));
    }
    each(config, "options", path, errors, |option, path, errors| {
        if option.str_at(&["name"]).is_empty() {
            errors.push(FieldError::required(path, "must not be empty"));
        }
    });
}

/// Everything that decides where a pod goes.
fn scheduling(spec: &Value, path: Path<'_>, errors: &mut Errors) {
    affinity(&spec["affinity"], path.field("affinity"), errors);
    each(spec, "readinessGates", path, errors, |gate, path, errors| {
        let kind = gate.str_at(&["conditionType"]);
        complain(is_qualified_name(kind), kind, path.field("conditionType"), errors);
    });
    let gates = path.field("schedulingGates");
    let mut seen = Vec::new();
    for (index, gate) in spec.list_at(&["schedulingGates"]).iter().enumerate() {
        let name = gate.str_at(&["name"]);
        complain(is_qualified_name(name), name, gates.index(index), errors);
        super::unique(&mut seen, name, gates.index(index), errors);
    }
    each(spec, "topologySpreadConstraints", path, errors, |constraint, path, errors| {
        if constraint["maxSkew"].as_i64().unwrap_or(0) <= 0 {
            let skew = constraint["maxSkew"].clone();
            errors.push(FieldError::invalid(path.field("maxSkew"), skew, "must be greater than zero"));
        }
        if constraint.str_at(&["topologyKey"]).is_empty() {
            errors.push(FieldError::required(path.field("topologyKey"), "can not be empty"));
        }
        let choices = ["DoNotSchedule", "ScheduleAnyway"];
        let choice = constraint.str_at(&["whenUnsatisfiable"]);
        if !choices.contains(&choice) {
            errors.push(FieldError::not_supported(path.field("whenUnsatisfiable"), choice, &choices));
        }
        positive(constraint, "minDomains", path, errors);
        one_of_given(constraint, "nodeAffinityPolicy", &["Honor", "Ignore"], path, errors);
        one_of_given(constraint, "nodeTaintsPolicy", &["Honor", "Ignore"], path, errors);
        match_label_keys(constraint, path, errors);
        label_selector(&constraint["labelSelector"], path.field("labelSelector"), errors);
    });
    each(spec, "tolerations", path, errors, toleration);
}

/// Labels whose values are the pod's own: only beside a selector, and not of a label that it names already.
fn match_label_keys(constraint: &Value, path: Path<'_>, errors: &mut Errors) {
    let list = path.field("matchLabelKeys");
    let keys = constraint.list_at(&["matchLabelKeys"]);
    if !keys.is_empty() && constraint["labelSelector"].is_null() {
        errors.push(FieldError::forbidden(list, "must not be specified when labelSelector is not set"));
    }
    for (index, key) in keys.iter().enumerate() {
        let key = key.as_str().unwrap_or_default();
        complain(is_qualified_name(key), key, list.index(index), errors);
        if !constraint["labelSelector"]["matchLabels"][key].is_null() {
            let detail = "exists in both matchLabelKeys and labelSelector";
            errors.push(FieldError::invalid(path.index(index), key, detail));
        }
    }
}

pub fn toleration(toleration: &Value, path: Path<'_>, errors: &mut Errors) {
    let (key, operator, value) =
        (toleration.str_at(&["key"]), toleration.str_at(&["operator"]), toleration.str_at(&["value"]));
    if !key.is_empty() {
        complain(is_qualified_name(key), key, path.field("key"), errors);
    } else if operator != "Exists" {
        let detail = "operator must be Exists when `key` is empty, which means \"match all values and all keys\"";
        errors.push(FieldError::invalid(path.field("operator"), operator, detail));
    }
    if !toleration["tolerationSeconds"].is_null() && toleration["effect"] != "NoExecute" {
        let detail = "effect must be 'NoExecute' when `tolerationSeconds` is set";
        errors.push(FieldError::invalid(path.field("effect"), toleration.str_at(&["effect"]), detail));
    }
    match operator {
        "Equal" | "" => {
            let messages = is_valid_label_value(value);
            if !messages.is_empty() {
                errors.push(FieldError::invalid(path.field("operator"), value, messages.join(";")));
            }
        }
        "Exists" if !value.is_empty() => {
            errors.push(FieldError::invalid(
                path.field("operator"),
                value,
                "value must be empty when `operator` is 'Exists'",
            ));
        }
        "Exists" => {}
        other => errors.push(FieldError::not_supported(path.field("operator"), other, &["Equal", "Exists"])),
    }
    one_of(toleration, "effect", &["NoSchedule", "PreferNoSchedule", "NoExecute"], path, errors);
}

fn affinity(affinity: &Value, path: Path<'_>, errors: &mut Errors) {
    const REQUIRED: &str = "requiredDuringSchedulingIgnoredDuringExecution";
    const PREFERRED: &str = "preferredDuringSchedulingIgnoredDuringExecution";
    let node = &affinity["nodeAffinity"];
    let node_path = path.field("nodeAffinity");
    if node[REQUIRED].is_object() {
        node_selector(&node[REQUIRED], node_path.field(REQUIRED), errors);
    }
    each(node, PREFERRED, node_path, errors, |preferred, path, errors| {
        weight(preferred, path, errors);
        node_selector_term(&preferred["preference"], path.field("preference"), errors);
    });
    for side in ["podAffinity", "podAntiAffinity"] {
        let (value, path) = (&affinity[side], path.field(side));
        each(value, REQUIRED, path, errors, pod_affinity_term);
        each(value, PREFERRED, path, errors, |preferred, path, errors| {
            weight(preferred, path, errors);
            pod_affinity_term(&preferred["podAffinityTerm"], path.field("podAffinityTerm"), errors);
        });
    }
}

fn weight(preferred: &Value, path: Path<'_>, errors: &mut Errors) {
    let weight = preferred["weight"].as_i64().unwrap_or(0);
    if !(1..=100).contains(&weight) {
        errors.push(FieldError::invalid(path.field("weight"), weight, "must be in the range 1-100"));
    }
}

fn pod_affinity_term(term: &Value, path: Path<'_>, errors: &mut Errors) {
    label_selector(&term["labelSelector"], path.field("labelSelector"), errors);
    label_selector(&term["namespaceSelector"], path.field("namespaceSelector"), errors);
    // The path without its last letter is upstream's.
    let list = path.field("namespace");
    for name in term.list_at(&["namespaces"]) {
        let text = name.as_str().unwrap_or_default();
        complain(is_dns1123_label(text), text, list, errors);
    }
    let key = term.str_at(&["topologyKey"]);
    if key.is_empty() {
        errors.push(FieldError::required(path.field("topologyKey"), "can not be empty"));
    }
    complain(is_qualified_name(key), key, path.field("topologyKey"), errors);
}

/// A `NodeSelector` object.
pub fn node_selector(selector: &Value, path: Path<'_>, errors: &mut Errors) {
    let terms = path.field("nodeSelectorTerms");
    if selector.list_at(&["nodeSelectorTerms"]).is_empty() {
        errors.push(FieldError::required(terms, "must have at least one node selector term"));
    }
    each(selector, "nodeSelectorTerms", path, errors, node_selector_term);
}

fn node_selector_term(term: &Value, path: Path<'_>, errors: &mut Errors) {
    each(term, "matchExpressions", path, errors, |requirement, path, errors| {
        let values = requirement.list_at(&["values"]);
        let operator = requirement.str_at(&["operator"]);
        match operator {
            "In" | "NotIn" if values.is_empty() => {
                let detail = "must be specified when `operator` is 'In' or 'NotIn'";
                errors.push(FieldError::required(path.field("values"), detail));
            }
            "Exists" | "DoesNotExist" if !values.is_empty() => {
                let detail = "may not be specified when `operator` is 'Exists' or 'DoesNotExist'";
                errors.push(FieldError::forbidden(path.field("values"), detail));
            }
            "Gt" | "Lt" if values.len() != 1 => {
                let detail = "must be specified single value when `operator` is 'Lt' or 'Gt'";
                errors.push(FieldError::required(path.field("values"), detail));
            }
            "In" | "NotIn" | "Exists" | "DoesNotExist" | "Gt" | "Lt" => {}
            other => errors.push(FieldError::invalid(path.field("operator"), other, "not a valid selector operator")),
        }
        let key = requirement.str_at(&["key"]);
        complain(is_qualified_name(key), key, path.field("key"), errors);
        let list = path.field("values");
        for (index, value) in values.iter().enumerate() {
            let text = value.as_str().unwrap_or_default();
            complain(is_valid_label_value(text), text, list.index(index), errors);
        }
    });
    each(term, "matchFields", path, errors, |requirement, path, errors| {
        let (key, operator) = (requirement.str_at(&["key"]), requirement.str_at(&["operator"]));
        if !matches!(operator, "In" | "NotIn") {
            errors.push(FieldError::invalid(path.field("operator"), operator, "not a valid selector operator"));
        } else if requirement.list_at(&["values"]).len() != 1 {
            let detail = "must be only one value when `operator` is 'In' or 'NotIn' for node field selector";
            errors.push(FieldError::required(path.field("values"), detail));
        }
        if key != "metadata.name" {
            errors.push(FieldError::invalid(path.field("key"), key, "not a valid field selector key"));
        }
    });
}

/// Names of other things.
fn names(spec: &Value, path: Path<'_>, errors: &mut Errors) {
    for field in ["serviceAccountName", "nodeName", "priorityClassName", "runtimeClassName"] {
        subdomain(spec.str_at(&[field]), path.field(field), errors);
    }
    dns_label(spec, "hostname", path, errors);
    dns_label(spec, "subdomain", path, errors);
    one_of(spec, "preemptionPolicy", &["PreemptLowerPriority", "Never"], path, errors);
    if spec["hostUsers"] == false {
        for (field, shown) in [("hostPID", "HostPID"), ("hostIPC", "HostIPC")] {
            if spec[field] == true {
                errors.push(FieldError::forbidden(path.field(shown), "when `hostUsers` is false"));
            }
        }
    }
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
