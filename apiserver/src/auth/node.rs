//! The Node authorizer: a kubelet may read what the pods on its node refer to, and write only what is its own.
//!
//! Relations are read from the pod cache at the moment of the question, so there is no graph to keep in step.
//! Writes that need the object's content are checked further by the NodeRestriction admission plugin.

use apimachinery::meta::FieldSelector;
use serde_json::Value;

use super::objects::Objects;
use super::rules::PolicyRule;
use super::{Attributes, Authorizer, Decision, UserInfo};

const NODES_GROUP: &str = "system:nodes";
const NODE_PREFIX: &str = "system:node:";
const MIRROR: &str = "kubernetes.io/config.mirror";

/// The node that a user is: `Some("")` for a member of `system:nodes` whose name says no node.
pub fn node_identity(user: &UserInfo) -> Option<&str> {
    if !user.groups.iter().any(|group| group == NODES_GROUP) {
        return None;
    }
    user.name.strip_prefix(NODE_PREFIX)
}

/// Answers for members of `system:nodes`; has no opinion on anybody else.
pub struct NodeAuthorizer {
    /// What every node may do, whatever its name: the rules of the `system:node` role.
    rules: Vec<PolicyRule>,
}

fn refuse(reason: impl Into<String>) -> Decision {
    Decision::NoOpinion(reason.into())
}

fn allow() -> Decision {
    Decision::Allow(String::new())
}

impl Authorizer for NodeAuthorizer {
    fn authorize(&self, objects: &dyn Objects, attributes: &Attributes<'_>) -> Decision {
        let Some(node) = node_identity(attributes.user) else { return Decision::none() };
        if node.is_empty() {
            return refuse(format!("unknown node for user {:?}", attributes.user.name));
        }
        if attributes.is_resource
            && let Some(decision) = (Question { objects, node, a: attributes }).authorize_resource()
        {
            return decision;
        }
        match self.rules.iter().any(|rule| rule.allows(attributes)) {
            true => allow(),
            false => Decision::none(),
        }
    }
}

impl NodeAuthorizer {
    pub fn new(rules: Vec<PolicyRule>) -> Self {
        Self { rules }
    }
}

/// One node's question about one resource.
struct Question<'a> {
    objects: &'a dyn Objects,
    node: &'a str,
    a: &'a Attributes<'a>,
}

impl Question<'_> {
    /// `None` for resources without a rule of their own.
    fn authorize_resource(&self) -> Option<Decision> {
        let Self { node, a, .. } = *self;
        Some(match (a.api_group, a.resource) {
            ("", "secrets" | "configmaps") => self.read_related(),
            ("", "persistentvolumeclaims") if a.subresource == "status" => match a.verb {
                "update" | "patch" => self.related(),
                _ => refuse("can only get/update/patch this type"),
            },
            ("", "persistentvolumeclaims" | "persistentvolumes")
            | ("resource.k8s.io", "resourceclaims")
            | ("storage.k8s.io", "volumeattachments") => self.get_related(),
            ("", "serviceaccounts") => self.service_account(),
            ("coordination.k8s.io", "leases") => lease(node, a),
            ("storage.k8s.io", "csinodes") => csi_node(node, a),
            ("resource.k8s.io", "resourceslices") => self.resource_slice(),
            ("", "nodes") => own_node(node, a),
            ("", "pods") => self.pod(),
            ("certificates.k8s.io", "podcertificaterequests") => self.pod_certificate_request(),
            _ => return None,
        })
    }

    fn get_related(&self) -> Decision {
        let a = self.a;
        match (a.verb, a.subresource) {
            ("get", "") => self.related(),
            ("get", _) => refuse("cannot get subresource"),
            _ => refuse("can only get individual resources of this type"),
        }
    }

    fn read_related(&self) -> Decision {
        let a = self.a;
        if !matches!(a.verb, "get" | "list" | "watch") {
            return refuse("can only read resources of this type");
        }
        if !a.subresource.is_empty() {
            return refuse("cannot read subresource");
        }
        if a.namespace.is_empty() {
            return refuse("can only read namespaced object of this type");
        }
        self.related()
    }

    fn service_account(&self) -> Decision {
        let a = self.a;
        match (a.verb, a.subresource) {
            ("get", "") => self.read_related(),
            ("create", "token") if !a.name.is_empty() => self.related(),
            ("create", _) if !a.name.is_empty() => refuse("can only create token subresource of serviceaccount"),
            _ => refuse("can only create tokens for individual service accounts"),
        }
    }

    fn resource_slice(&self) -> Decision {
        let Self { node, a, .. } = *self;
        if !a.subresource.is_empty() {
            return refuse("cannot authorize ResourceSlice subresources");
        }
        match a.verb {
            "create" => allow(),
            "get" | "update" | "patch" | "delete" => self.related(),
            "watch" | "list" | "deletecollection" if selects(a, "spec.nodeName", node) => allow(),
            "watch" | "list" | "deletecollection" => {
                refuse("can only list/watch/deletecollection resourceslices with nodeName field selector")
            }
            _ => refuse(
                "only the following verbs are allowed for a ResourceSlice: get, watch, list, create, update, patch, delete, deletecollection",
            ),
        }
    }

    fn pod_certificate_request(&self) -> Decision {
        let Self { node, a, .. } = *self;
        if !a.subresource.is_empty() {
            return refuse("nodes may not access the status subresource of PodCertificateRequests");
        }
        match a.verb {
            "create" => allow(),
            "get" => self.related(),
            "list" | "watch" if selects(a, "spec.nodeName", node) => allow(),
            "list" | "watch" => refuse("can only list/watch podcertificaterequests with nodeName field selector"),
            verb => refuse(format!("nodes may not {verb} podcertificaterequests")),
        }
    }

    fn pod(&self) -> Decision {
        let Self { node, a, .. } = *self;
        match (a.subresource, a.verb) {
            ("", "get") => self.related(),
            ("", "list" | "watch") if selects(a, "spec.nodeName", node) => allow(),
            ("", "list" | "watch") if !a.name.is_empty() => self.related(),
            ("", "list" | "watch") => refuse("can only list/watch pods with spec.nodeName field selector"),
            ("", "create" | "delete") | ("status", "update" | "patch") | ("eviction", "create") => allow(),
            _ => Decision::none(),
        }
    }

    fn related(&self) -> Decision {
        let Self { node, a, .. } = *self;
        if a.name.is_empty() {
            return refuse("No Object name found");
        }
        match self.has_path() {
            true => allow(),
            false => refuse(format!("no relationship found between node '{node}' and this object")),
        }
    }

    /// Whether the object is used by a pod on the node, or names the node itself.
    fn has_path(&self) -> bool {
        let Self { node, a, .. } = *self;
        let names_node = |path: &str| {
            let object = self.objects.get(a.api_group, a.resource, a.namespace, a.name);
            object.is_some_and(|object| object.pointer(path).and_then(Value::as_str) == Some(node))
        };
        match a.resource {
            "pods" | "volumeattachments" | "resourceslices" | "podcertificaterequests" => names_node("/spec/nodeName"),
            "persistentvolumes" => self.uses_volume(a.name),
            "configmaps" if self.is_node_config() => true,
            kind => {
                let pods = self.objects.pods_on(node, Some(a.namespace));
                let uses = pods.iter().filter(|pod| !is_mirror(pod)).any(|pod| pod_uses(pod, kind, a.name));
                uses || (kind == "secrets" && self.volume_secret(a.namespace, a.name))
            }
        }
    }

    fn is_node_config(&self) -> bool {
        let Self { node, a, .. } = *self;
        let Some(object) = self.objects.get("", "nodes", "", node) else { return false };
        let source = &object["spec"]["configSource"]["configMap"];
        source["namespace"] == a.namespace && source["name"] == a.name
    }

    fn uses_volume(&self, volume: &str) -> bool {
        self.objects.get("", "persistentvolumes", "", volume).is_some_and(|pv| self.claimed_here(&pv))
    }

    fn claimed_here(&self, pv: &Value) -> bool {
        let claim = &pv["spec"]["claimRef"];
        let (Some(namespace), Some(name)) = (claim["namespace"].as_str(), claim["name"].as_str()) else { return false };
        let pods = self.objects.pods_on(self.node, Some(namespace));
        pods.iter().filter(|pod| !is_mirror(pod)).any(|pod| pod_uses(pod, "persistentvolumeclaims", name))
    }

    /// Secrets that a persistent volume used on the node refers to.
    fn volume_secret(&self, namespace: &str, secret: &str) -> bool {
        let volumes = self.objects.list("", "persistentvolumes", None);
        let refers = |pv: &Value| {
            let claim_namespace = pv["spec"]["claimRef"]["namespace"].as_str().unwrap_or_default();
            references(&pv["spec"], &|key, value| {
                let names_secret = key == "secretRef" || key.ends_with("SecretRef");
                (names_secret
                    && value["name"] == secret
                    && value["namespace"].as_str().unwrap_or(claim_namespace) == namespace)
                    || (key == "azureFile"
                        && value["secretName"] == secret
                        && value["secretNamespace"].as_str().unwrap_or(claim_namespace) == namespace)
            })
        };
        volumes.iter().map(|entry| entry.value()).any(|pv| refers(&pv) && self.claimed_here(&pv))
    }
}

fn is_mirror(pod: &Value) -> bool {
    pod["metadata"]["annotations"].get(MIRROR).is_some()
}

/// Whether any member of the tree, at any depth, satisfies `test(key, value)`.
fn references(tree: &Value, test: &dyn Fn(&str, &Value) -> bool) -> bool {
    match tree {
        Value::Object(map) => map.iter().any(|(key, value)| test(key, value) || references(value, test)),
        Value::Array(items) => items.iter().any(|item| references(item, test)),
        _ => false,
    }
}

/// Whether the pod's spec refers to the object. The references of every kind have telling field names, wherever in
/// the spec they are: in volumes, projections, environments or image pull secrets.
fn pod_uses(pod: &Value, resource: &str, name: &str) -> bool {
    let spec = &pod["spec"];
    match resource {
        "serviceaccounts" => spec["serviceAccountName"] == name,
        "configmaps" => references(spec, &|key, value| {
            matches!(key, "configMap" | "configMapRef" | "configMapKeyRef") && value["name"] == name
        }),
        "secrets" => references(spec, &|key, value| match key {
            "imagePullSecrets" => value.as_array().is_some_and(|list| list.iter().any(|secret| secret["name"] == name)),
            "secret" => value["secretName"] == name || value["name"] == name,
            "azureFile" => value["secretName"] == name,
            _ => matches!(key, "secretRef" | "secretKeyRef" | "nodePublishSecretRef") && value["name"] == name,
        }),
        "persistentvolumeclaims" => uses_claim(pod, name),
        "resourceclaims" => {
            let direct =
                spec["resourceClaims"].as_array().is_some_and(|c| c.iter().any(|c| c["resourceClaimName"] == name));
            let generated = &pod["status"]["resourceClaimStatuses"];
            let extended = &pod["status"]["extendedResourceClaimStatus"]["resourceClaimName"];
            direct
                || extended == name
                || generated.as_array().is_some_and(|c| c.iter().any(|c| c["resourceClaimName"] == name))
        }
        _ => false,
    }
}

fn uses_claim(pod: &Value, name: &str) -> bool {
    let pod_name = pod["metadata"]["name"].as_str().unwrap_or_default();
    pod["spec"]["volumes"].as_array().is_some_and(|volumes| {
        volumes.iter().any(|volume| {
            let ephemeral = || volume["name"].as_str().map(|volume| format!("{pod_name}-{volume}"));
            volume["persistentVolumeClaim"]["claimName"] == name
                || (volume.get("ephemeral").is_some() && ephemeral().as_deref() == Some(name))
        })
    })
}

/// Whether the request's field selector demands `field=value`.
fn selects(a: &Attributes<'_>, field: &str, value: &str) -> bool {
    let Ok(selector) = FieldSelector::parse(a.field_selector) else { return false };
    selector.requirements().iter().any(|r| r.equal && r.field == field && r.value == value)
}

fn lease(node: &str, a: &Attributes<'_>) -> Decision {
    if !matches!(a.verb, "get" | "create" | "update" | "patch" | "delete") {
        return refuse("can only get, create, update, patch, or delete a node lease");
    }
    if a.namespace != "kube-node-lease" {
        return refuse("can only access leases in the \"kube-node-lease\" system namespace");
    }
    if a.verb != "create" && a.name != node {
        return refuse("can only access node lease with the same name as the requesting node");
    }
    allow()
}

fn csi_node(node: &str, a: &Attributes<'_>) -> Decision {
    if !a.subresource.is_empty() {
        return refuse("cannot authorize CSINode subresources");
    }
    if !matches!(a.verb, "get" | "create" | "update" | "patch" | "delete") {
        return refuse("can only get, create, update, patch, or delete a CSINode");
    }
    if a.verb != "create" && a.name != node {
        return refuse("can only access CSINode with the same name as the requesting node");
    }
    allow()
}

fn own_node(node: &str, a: &Attributes<'_>) -> Decision {
    match (a.subresource, a.verb) {
        ("", "create" | "update" | "patch") | ("status", "update" | "patch") => allow(),
        ("", "get" | "list" | "watch") => match a.name {
            name if name == node => allow(),
            "" => refuse(format!("node '{node}' cannot read all nodes, only its own Node object")),
            other => refuse(format!("node '{node}' cannot read '{other}', only its own Node object")),
        },
        _ => Decision::none(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::objects::Fake;
    use super::*;

    fn cluster() -> Fake {
        let pod = json!({
            "metadata": {"namespace": "a", "name": "p"},
            "spec": {
                "nodeName": "n1",
                "serviceAccountName": "sa",
                "imagePullSecrets": [{"name": "pull"}],
                "volumes": [
                    {"name": "v", "projected": {"sources": [{"configMap": {"name": "kube-root-ca.crt"}}]}},
                    {"name": "w", "secret": {"secretName": "mounted"}},
                    {"name": "c", "persistentVolumeClaim": {"claimName": "claim"}},
                ],
                "containers": [{"env": [{"valueFrom": {"secretKeyRef": {"name": "env"}}}]}],
            },
        });
        let pv = json!({"metadata": {"name": "pv"}, "spec": {"claimRef": {"namespace": "a", "name": "claim"},
            "csi": {"nodeStageSecretRef": {"namespace": "s", "name": "stage"}}}});
        Fake(vec![("", "pods", pod), ("", "persistentvolumes", pv)])
    }

    #[test]
    fn a_node_reads_what_its_pods_use() {
        let (cluster, authorizer) = (cluster(), NodeAuthorizer::new(Vec::new()));
        let node = |name: &str| UserInfo {
            name: format!("system:node:{name}"),
            groups: vec![NODES_GROUP.into()],
            ..UserInfo::default()
        };
        let (n1, n2) = (node("n1"), node("n2"));
        for (user, resource, namespace, name, allowed) in [
            (&n1, "secrets", "a", "pull", true),
            (&n1, "secrets", "a", "mounted", true),
            (&n1, "secrets", "a", "env", true),
            (&n1, "secrets", "s", "stage", true),
            (&n1, "secrets", "a", "other", false),
            (&n1, "secrets", "b", "pull", false),
            (&n2, "secrets", "a", "pull", false),
            (&n1, "configmaps", "a", "kube-root-ca.crt", true),
            (&n1, "persistentvolumeclaims", "a", "claim", true),
            (&n1, "persistentvolumes", "", "pv", true),
            (&n2, "persistentvolumes", "", "pv", false),
            (&n1, "nodes", "", "n1", true),
            (&n1, "nodes", "", "n2", false),
            (&n1, "pods", "a", "p", true),
            (&n2, "pods", "a", "p", false),
        ] {
            let attributes = Attributes { namespace, name, ..Attributes::resource(user, "get", "", resource) };
            let decision = authorizer.authorize(&cluster, &attributes);
            assert_eq!(decision.is_allowed(), allowed, "{} {resource} {namespace}/{name}: {decision:?}", user.name);
        }
    }

    #[test]
    fn a_node_lists_only_its_own_pods() {
        let (cluster, authorizer) = (cluster(), NodeAuthorizer::new(Vec::new()));
        let user = UserInfo { name: "system:node:n1".into(), groups: vec![NODES_GROUP.into()], ..UserInfo::default() };
        for (field_selector, allowed) in [("spec.nodeName=n1", true), ("spec.nodeName=n2", false), ("", false)] {
            let attributes = Attributes { field_selector, ..Attributes::resource(&user, "watch", "", "pods") };
            assert_eq!(authorizer.authorize(&cluster, &attributes).is_allowed(), allowed, "{field_selector}");
        }
    }

    #[test]
    fn others_are_not_its_business() {
        let user = UserInfo { name: "system:node:n1".into(), ..UserInfo::default() };
        let attributes = Attributes::resource(&user, "get", "", "secrets");
        assert_eq!(NodeAuthorizer::new(Vec::new()).authorize(&cluster(), &attributes), Decision::none());
    }
}
