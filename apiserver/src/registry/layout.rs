//! Where built-in resources are in the store, and in which version: upstream's layout, so that upstream's server can
//! be started on the same etcd and the other way round.

use apimachinery::meta::GroupVersionKind;
use apimachinery::schema::ApiResource;

/// Resources whose keys are not simply under their plural name.
const PREFIXES: &[(&str, &str, &str)] = &[
    ("", "services", "services/specs"),
    ("", "endpoints", "services/endpoints"),
    ("", "nodes", "minions"),
    ("", "replicationcontrollers", "controllers"),
    ("networking.k8s.io", "ingresses", "ingress"),
    ("apiregistration.k8s.io", "apiservices", "apiregistration.k8s.io/apiservices"),
    ("apiextensions.k8s.io", "customresourcedefinitions", "apiextensions.k8s.io/customresourcedefinitions"),
];

/// Resources that are stored in another group or version than their newest stable one.
const STORAGE: &[(&str, &str, &str, &str)] =
    &[("events.k8s.io", "events", "", "v1"), ("autoscaling", "horizontalpodautoscalers", "autoscaling", "v2")];

/// The path below the store's prefix, without slashes at its ends.
pub fn resource_prefix(group: &str, resource: &str) -> String {
    PREFIXES
        .iter()
        .find(|(g, r, _)| (*g, *r) == (group, resource))
        .map_or_else(|| resource.to_owned(), |(_, _, prefix)| (*prefix).to_owned())
}

/// The path of a custom resource.
pub fn custom_prefix(group: &str, resource: &str) -> String {
    format!("{group}/{resource}")
}

/// The version that a resource is stored in, of those it is served in.
pub fn storage_kind(apis: &[&ApiResource]) -> GroupVersionKind {
    let first = apis[0];
    if let Some((_, _, group, version)) = STORAGE.iter().find(|(g, r, ..)| *g == first.group && *r == first.resource) {
        return GroupVersionKind::new(*group, *version, first.kind.to_string());
    }
    let newest = apis.iter().max_by_key(|api| stability(api.version)).unwrap_or(&first);
    GroupVersionKind::new(newest.group.to_string(), newest.version.to_string(), newest.kind.to_string())
}

/// Orders versions: stable before beta before alpha, then by number.
pub fn stability(version: &str) -> (u8, u32, u32) {
    let digits = |text: &str| text.chars().take_while(char::is_ascii_digit).collect::<String>().parse().unwrap_or(0);
    let rest = version.strip_prefix('v').unwrap_or(version);
    let major = digits(rest);
    match (rest.split_once("beta"), rest.split_once("alpha")) {
        (Some((_, minor)), _) => (1, major, digits(minor)),
        (None, Some((_, minor))) => (0, major, digits(minor)),
        (None, None) => (2, major, 0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_ordered_by_stability() {
        let mut versions = ["v1alpha1", "v2", "v1beta1", "v1", "v1beta2"];
        versions.sort_by_key(|version| stability(version));
        assert_eq!(versions, ["v1alpha1", "v1beta1", "v1beta2", "v1", "v2"]);
    }

    #[test]
    fn old_names_live_on_in_the_store() {
        assert_eq!(resource_prefix("", "nodes"), "minions");
        assert_eq!(resource_prefix("apps", "deployments"), "deployments");
    }
}
