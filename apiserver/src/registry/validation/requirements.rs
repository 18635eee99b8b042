//! Rules for the resources that containers and pods ask for.

use apimachinery::meta::Quantity;
use apimachinery::meta::validation::{is_dns1123_label, is_qualified_name};
use apimachinery::status::FieldError;
use serde_json::Value;

use super::{Errors, IS_NEGATIVE, Path, complain};
use crate::registry::core::pod_prepare::{aggregate, quantity};
use crate::registry::object::ObjectExt;

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

fn is_huge_pages(name: &str) -> bool {
    name.starts_with("hugepages-")
}

/// Well formed, and standard where it has no prefix; whether it is.
fn any_resource_name(name: &str, path: Path<'_>, errors: &mut Errors) -> bool {
    let before = errors.len();
    complain(is_qualified_name(name), name, path, errors);
    let standard = STANDARD.contains(&name)
        || STANDARD_ELSEWHERE.contains(&name)
        || is_huge_pages(name)
        || name.starts_with("requests.hugepages-");
    if errors.len() == before && !name.contains('/') && !standard {
        errors.push(FieldError::invalid(path, name, "must be a standard resource type or fully qualified"));
    }
    errors.len() == before
}

/// A resource that containers can use.
pub fn resource_name(name: &str, path: Path<'_>, errors: &mut Errors) {
    any_resource_name(name, path, errors);
    if !name.contains('/') {
        if !STANDARD.contains(&name) && !is_huge_pages(name) {
            errors.push(FieldError::invalid(path, name, "must be a standard resource for containers"));
        }
    } else if !name.contains("kubernetes.io/")
        && (name.starts_with("requests.") || !is_qualified_name(&format!("requests.{name}")).is_empty())
    {
        errors.push(FieldError::invalid(path, name, "doesn't follow extended resource name standard"));
    }
}

/// A resource that pods as a whole can have.
fn pod_resource_name(name: &str, path: Path<'_>, errors: &mut Errors) {
    if any_resource_name(name, path, errors) && !["cpu", "memory"].contains(&name) && !is_huge_pages(name) {
        errors.push(FieldError::not_supported(path, name, &["cpu", "hugepages-", "memory"]));
    }
}

/// Whether pods may be promised more of it than there is.
fn overcommits(name: &str) -> bool {
    (!name.contains('/') || name.contains("kubernetes.io/")) && !is_huge_pages(name)
}

/// Limits and requests of a container. `claims`: the names of the pod's claims of devices.
pub fn resources(requirements: &Value, claims: &[&str], path: Path<'_>, errors: &mut Errors) {
    requirements_of(requirements, resource_name, path, errors);
    claim_names(requirements, claims, path.field("claims"), errors);
}

fn requirements_of(
    requirements: &Value,
    name_rule: fn(&str, Path<'_>, &mut Errors),
    path: Path<'_>,
    errors: &mut Errors,
) {
    let (limits_path, requests_path) = (path.field("limits"), path.field("requests"));
    let entries = |list: &str| requirements[list].as_object().into_iter().flatten();
    for (name, amount) in entries("limits") {
        let path = limits_path.key(name);
        name_rule(name, path, errors);
        quantity_value(name, amount, path, errors);
        huge_pages(name, amount, path, errors);
    }
    for (name, amount) in entries("requests") {
        let path = requests_path.key(name);
        name_rule(name, path, errors);
        quantity_value(name, amount, path, errors);
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
        huge_pages(name, amount, path, errors);
    }
    let any =
        |wanted: fn(&str) -> bool| ["limits", "requests"].iter().any(|list| entries(list).any(|(n, _)| wanted(n)));
    if any(is_huge_pages) && !any(|name| matches!(name, "cpu" | "memory")) {
        errors.push(FieldError::forbidden(path, "HugePages require cpu or memory"));
    }
}

/// Huge pages come whole.
fn huge_pages(name: &str, amount: &Value, path: Path<'_>, errors: &mut Errors) {
    let Some(size) = name.strip_prefix("hugepages-") else { return };
    let Some(amount) = quantity(amount) else { return };
    let page = size.parse::<Quantity>().ok().filter(|page| page.signum() > 0 && page.milli_value() % 1000 == 0);
    if page.is_none_or(|page| amount.value() % page.value() != 0) {
        let detail = format!("{amount} is not positive integer multiple of {name}");
        errors.push(FieldError::invalid(path, amount.to_string(), detail));
    }
}

/// References to claims of the pod: no claim twice, whole or in parts.
fn claim_names(requirements: &Value, known: &[&str], path: Path<'_>, errors: &mut Errors) {
    let mut seen: Vec<String> = Vec::new();
    for (index, claim) in requirements.list_at(&["claims"]).iter().enumerate() {
        let path = path.index(index);
        let (name, request) = (claim.str_at(&["name"]), claim.str_at(&["request"]));
        if name.is_empty() {
            errors.push(FieldError::required(path, ""));
            continue;
        }
        if seen.iter().any(|other| other == name) {
            errors.push(FieldError::duplicate(path, name));
        } else {
            let key = if request.is_empty() { name.to_owned() } else { format!("{name}/{request}") };
            if !request.is_empty() {
                complain(is_dns1123_label(request), request, path.field("request"), errors);
            }
            let parts = seen.iter().filter(|other| other.split_once('/').is_some_and(|(whole, _)| whole == name));
            let repeated = if request.is_empty() { parts.count() } else { usize::from(seen.contains(&key)) };
            errors.extend((0..repeated).map(|_| FieldError::duplicate(path, key.as_str())));
            seen.push(key);
        }
        if !known.contains(&name) {
            let mut names = known.to_vec();
            names.sort_unstable();
            let those = if names.is_empty() { " which is empty".into() } else { format!(": {}", names.join(", ")) };
            let mut error = FieldError::not_found(path, name);
            error.detail = format!("must be one of the names in pod.spec.resourceClaims{those}");
            errors.push(error);
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

/// What the pod as a whole may have: no less than its containers ask for, no more than any of them may use.
pub fn of_pod(spec: &Value, path: Path<'_>, errors: &mut Errors) {
    let whole = &spec["resources"];
    let path = path.field("resources");
    if !whole.is_object() {
        return;
    }
    if spec["os"]["name"] == "windows" {
        errors.push(FieldError::forbidden(path, "may not be set for a windows pod"));
        return;
    }
    if !whole["claims"].is_null() {
        let detail = "claims may not be set for Resources at pod-level";
        errors.push(FieldError::forbidden(path.field("claims"), detail));
    }
    requirements_of(whole, pod_resource_name, path, errors);
    claim_names(whole, &claim_names_of(spec), path.field("claims"), errors);
    let requests = path.field("requests");
    for (name, wanted) in aggregate(spec, "requests") {
        if let Some(given) = quantity(&whole["requests"][&name]).filter(|given| wanted > *given) {
            let detail = format!("must be greater than or equal to aggregate container requests of {wanted}");
            errors.push(FieldError::invalid(requests.key(&name), given.to_string(), detail));
        }
    }
    let limits = path.field("limits");
    for (name, wanted) in aggregate(spec, "limits").into_iter().filter(|(name, _)| is_huge_pages(name)) {
        if let Some(given) = quantity(&whole["limits"][&name]).filter(|given| wanted > *given) {
            let detail = format!("must be greater than or equal to aggregate container limits of {wanted}");
            errors.push(FieldError::invalid(limits.key(&name), given.to_string(), detail));
        }
    }
    let containers = path.field("containers");
    for (index, container) in spec.list_at(&["containers"]).iter().enumerate() {
        for (name, limit) in container["resources"]["limits"].as_object().into_iter().flatten() {
            let (Some(limit), Some(most)) = (quantity(limit), quantity(&whole["limits"][name])) else { continue };
            if limit > most {
                let path = containers.index(index);
                let path = path.key(name);
                let detail = format!("must be less than or equal to pod limits of {most}");
                errors.push(FieldError::invalid(path.field("limits"), limit.to_string(), detail));
            }
        }
    }
}

/// The names of the pod's claims of devices.
pub fn claim_names_of(spec: &Value) -> Vec<&str> {
    spec.list_at(&["resourceClaims"]).iter().map(|claim| claim.str_at(&["name"])).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::tests::texts;
    use super::*;

    #[test]
    fn requests_fit_limits() {
        let told = |requirements: Value| {
            let mut errors = Errors::new();
            resources(&requirements, &["c"], Path::Root("r"), &mut errors);
            texts(&errors)
        };
        let cases = [
            (json!({"requests": {"cpu": "1"}, "limits": {"cpu": "1"}}), vec![]),
            (
                json!({"requests": {"example.com/a": "1"}}),
                vec!["r.limits: Required value: Limit must be set for non overcommitable resources"],
            ),
            (json!({"limits": {"hugepages-2Mi": "2Mi"}}), vec!["r: Forbidden: HugePages require cpu or memory"]),
            (
                json!({"limits": {"cpu": "1", "hugepages-2Mi": "1Mi"}}),
                vec![
                    r#"r.limits[hugepages-2Mi]: Invalid value: "1Mi": 1Mi is not positive integer multiple of hugepages-2Mi"#,
                ],
            ),
            (json!({"claims": [{"name": "c", "request": "a"}, {"name": "c", "request": "b"}]}), vec![]),
            (
                json!({"claims": [{"name": "c", "request": "a"}, {"name": "c"}]}),
                vec![r#"r.claims[1]: Duplicate value: "c""#],
            ),
            (
                json!({"claims": [{"name": "d"}]}),
                vec![r#"r.claims[0]: Not found: "d": must be one of the names in pod.spec.resourceClaims: c"#],
            ),
        ];
        for (requirements, expected) in cases {
            assert_eq!(told(requirements.clone()), expected, "{requirements}");
        }
    }

    #[test]
    fn pods_have_room_for_their_containers() {
        let container = json!({"resources": {"requests": {"cpu": "1"}, "limits": {"cpu": "2"}}});
        let spec = json!({"resources": {"requests": {"cpu": "1500m"}, "limits": {"cpu": "1500m"}}, "containers": [container, container]});
        let mut errors = Errors::new();
        of_pod(&spec, Path::SPEC, &mut errors);
        let expected = [
            r#"spec.resources.requests[cpu]: Invalid value: "1500m": must be greater than or equal to aggregate container requests of 2"#,
            r#"spec.resources.containers[0][cpu].limits: Invalid value: "2": must be less than or equal to pod limits of 1500m"#,
            r#"spec.resources.containers[1][cpu].limits: Invalid value: "2": must be less than or equal to pod limits of 1500m"#,
        ];
        assert_eq!(texts(&errors), expected);
    }
}
