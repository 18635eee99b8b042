//! What a kubelet may write is its own: its node, its lease, the status of its pods, tokens for its pods. The Node
//! authorizer has already said which objects; this looks at their content. Also here: new nodes start tainted.

use std::sync::Arc;

use apimachinery::meta::GroupResource;
use apimachinery::status::{Result, Status};
use async_trait::async_trait;
use serde_json::{Value, json};

use super::{AdmissionRequest, Operation, Plugin, cached};
use crate::auth::node::node_identity;
use crate::registry::object::ObjectExt;
use crate::server::Server;

const MIRROR: &str = "kubernetes.io/config.mirror";
const NOT_READY: &str = "node.kubernetes.io/not-ready";
const RESTRICTED: &str = "node-restriction.kubernetes.io";

/// Labels with a Kubernetes prefix that kubelets may set on their node; `PREFIXES` are whole namespaces.
const KUBELET_LABELS: [&str; 14] = [
    "kubernetes.io/hostname",
    "topology.kubernetes.io/zone",
    "topology.kubernetes.io/region",
    "failure-domain.beta.kubernetes.io/zone",
    "failure-domain.beta.kubernetes.io/region",
    "node.kubernetes.io/instance-type",
    "beta.kubernetes.io/instance-type",
    "kubernetes.io/os",
    "kubernetes.io/arch",
    "beta.kubernetes.io/os",
    "beta.kubernetes.io/arch",
    "node.kubernetes.io/windows-build",
    "node.kubernetes.io/exclude-from-external-load-balancers",
    "feature.node.kubernetes.io",
];
const KUBELET_LABEL_NAMESPACES: [&str; 2] = ["kubelet.kubernetes.io", "node.kubernetes.io"];

pub struct NodeRestriction;

#[async_trait]
impl Plugin for NodeRestriction {
    fn name(&self) -> &'static str {
        "NodeRestriction"
    }

    fn handles(&self, operation: Operation) -> bool {
        operation != Operation::Connect
    }

    async fn admit(&self, server: &Arc<Server>, request: &mut AdmissionRequest<'_>) -> Result<()> {
        let Some(node) = node_identity(request.user) else { return Ok(()) };
        if node.is_empty() {
            return Err(request.forbidden(format!("could not determine node from user {:?}", request.user.name)));
        }
        match (&*request.gvr.group, &*request.gvr.resource, request.subresource) {
            ("", "pods", "") => pod(server, request, node),
            ("", "pods", "status") => pod_status(request, node),
            ("", "pods", "eviction") => own_pod(server, request, node, "evict"),
            ("", "pods", other) => Err(request
                .forbidden(format!("unexpected pod subresource {other:?}, only 'status' and 'eviction' are allowed"))),
            ("", "nodes", _) => own_node(request, node),
            ("", "persistentvolumeclaims", "status") => claim_status(request, node),
            ("", "persistentvolumeclaims", _) => Err(request.forbidden("may only update PVC status")),
            ("", "serviceaccounts", "token") => token(server, request, node),
            ("coordination.k8s.io", "leases", _) => lease(request, node),
            ("storage.k8s.io", "csinodes", _) => same_name(request, node, "CSINode"),
            ("resource.k8s.io", "resourceslices", _) => resource_slice(request, node),
            ("certificates.k8s.io", "certificatesigningrequests", "") => csr(request, node),
            _ => Ok(()),
        }
    }
}

fn find_pod(server: &Server, request: &AdmissionRequest<'_>, name: &str) -> Result<Value> {
    cached(server, "", "pods", request.namespace, name)
        .ok_or_else(|| Status::not_found(&GroupResource::new("", "pods"), name))
}

fn own_pod(server: &Server, request: &AdmissionRequest<'_>, node: &str, action: &str) -> Result<()> {
    let name = if request.name.is_empty() { request.object.name() } else { request.name };
    let pod = find_pod(server, request, name)?;
    if pod.str_at(&["spec", "nodeName"]) != node {
        let node = if action == "evict" { node.to_owned() } else { format!("{node:?}") };
        return Err(request.forbidden(format!("node {node} can only {action} pods with spec.nodeName set to itself")));
    }
    Ok(())
}

fn pod(server: &Server, request: &AdmissionRequest<'_>, node: &str) -> Result<()> {
    match request.operation {
        Operation::Delete => own_pod(server, request, node, "delete"),
        Operation::Create => mirror_pod(server, request, node),
        _ => {
            let why = format!("unexpected operation \"UPDATE\", node {node:?} can only create and delete mirror pods");
            Err(request.forbidden(why))
        }
    }
}

fn mirror_pod(server: &Server, request: &AdmissionRequest<'_>, node: &str) -> Result<()> {
    let pod = &*request.object;
    let refuse = |why: String| Err(request.forbidden(why));
    if pod.annotation(MIRROR).is_none() {
        return refuse(format!("pod does not have {MIRROR:?} annotation, node {node:?} can only create mirror pods"));
    }
    if pod.str_at(&["spec", "nodeName"]) != node {
        return refuse(format!("node {node:?} can only create pods with spec.nodeName set to itself"));
    }
    let owner = match pod.list_at(&["metadata", "ownerReferences"]) {
        [owner] => owner,
        [] => return refuse(format!("node {node:?} can only create pods with an owner reference set to itself")),
        _ => return refuse(format!("node {node:?} can only create pods with a single owner reference set to itself")),
    };
    if owner["apiVersion"] != "v1" || owner["kind"] != "Node" || owner["name"] != node {
        return refuse(format!("node {node:?} can only create pods with an owner reference set to itself"));
    }
    if owner["controller"] != true {
        return refuse(format!("node {node:?} can only create pods with a controller owner reference set to itself"));
    }
    if owner["blockOwnerDeletion"] == true {
        return refuse(format!("node {node:?} must not set blockOwnerDeletion on an owner reference"));
    }
    let object = cached(server, "", "nodes", "", node)
        .ok_or_else(|| Status::not_found(&GroupResource::new("", "nodes"), node))?;
    let (given, known) = (owner.str_at(&["uid"]), object.uid());
    if given != known {
        return refuse(format!("node {node} UID mismatch: expected {given} got {known}"));
    }
    match api_reference(pod) {
        Some(resource) => refuse(format!("node {node:?} can not create pods that reference {resource}")),
        None => Ok(()),
    }
}

/// The first sort of API object that a pod needs; a static pod must need none.
fn api_reference(pod: &Value) -> Option<&'static str> {
    const VOLUMES: [(&str, &str); 4] = [
        ("secret", "secrets"),
        ("configMap", "configmaps"),
        ("persistentVolumeClaim", "persistentvolumeclaims"),
        ("ephemeral", "persistentvolumeclaims"),
    ];
    const PROJECTIONS: [(&str, &str); 4] = [
        ("secret", "secrets"),
        ("configMap", "configmaps"),
        ("serviceAccountToken", "serviceaccounts"),
        ("clusterTrustBundle", "clustertrustbundles"),
    ];
    if !pod.str_at(&["spec", "serviceAccountName"]).is_empty() {
        return Some("serviceaccounts");
    }
    for volume in pod.list_at(&["spec", "volumes"]) {
        let sources = volume.list_at(&["projected", "sources"]).iter().flat_map(|source| {
            PROJECTIONS.iter().filter(|(field, _)| source.get(*field).is_some()).map(|(_, resource)| *resource)
        });
        let direct = VOLUMES.iter().filter(|(field, _)| volume.get(*field).is_some()).map(|(_, resource)| *resource);
        if let Some(resource) = direct.chain(sources).next() {
            return Some(resource);
        }
    }
    for container in ["initContainers", "containers"].iter().flat_map(|list| pod.list_at(&["spec", list])) {
        for env in
            container.list_at(&["env"]).iter().map(|env| &env["valueFrom"]).chain(container.list_at(&["envFrom"]))
        {
            let names = |fields: [&str; 2]| fields.iter().any(|field| env.get(*field).is_some());
            if names(["secretKeyRef", "secretRef"]) {
                return Some("secrets");
            }
            if names(["configMapKeyRef", "configMapRef"]) {
                return Some("configmaps");
            }
        }
    }
    (!pod.list_at(&["spec", "resourceClaims"]).is_empty()).then_some("resourceclaims")
}

fn pod_status(request: &AdmissionRequest<'_>, node: &str) -> Result<()> {
    let (Operation::Update, Some(old)) = (request.operation, request.old) else {
        return Err(request.forbidden("unexpected operation"));
    };
    if old.str_at(&["spec", "nodeName"]) != node {
        return Err(request
            .forbidden(format!("node {node:?} can only update pod status for pods with spec.nodeName set to itself")));
    }
    let same = |path: &[&str]| {
        let plain = |value: Option<&Value>| value.filter(|v| !v.is_null()).cloned().unwrap_or_else(|| json!({}));
        plain(old.at(path)) == plain(request.object.at(path))
    };
    if !same(&["metadata", "labels"]) {
        return Err(request.forbidden(format!("node {node:?} cannot update labels through pod status")));
    }
    for (field, what) in [
        ("resourceClaimStatuses", "resource claim statues"),
        ("extendedResourceClaimStatus", "extended resource claim status"),
    ] {
        if !same(&["status", field]) {
            return Err(request.forbidden(format!("node {node:?} cannot update {what}")));
        }
    }
    Ok(())
}

fn own_node(request: &AdmissionRequest<'_>, node: &str) -> Result<()> {
    let name = if request.name.is_empty() { request.object.name() } else { request.name };
    if name != node {
        return Err(request.forbidden(format!("node {node:?} is not allowed to modify node {name:?}")));
    }
    let object = &*request.object;
    let nothing = Value::Null;
    let old = request.old.unwrap_or(&nothing);
    let labels = forbidden_labels(object, old);
    match request.operation {
        Operation::Create if !labels.is_empty() => Err(request
            .forbidden(format!("node {node:?} is not allowed to set the following labels: {}", labels.join(", ")))),
        Operation::Update if object.list_at(&["spec", "taints"]) != old.list_at(&["spec", "taints"]) => {
            Err(request.forbidden(format!("node {node:?} is not allowed to modify taints")))
        }
        Operation::Update
            if object.list_at(&["metadata", "ownerReferences"]) != old.list_at(&["metadata", "ownerReferences"]) =>
        {
            Err(request.forbidden(format!("node {node:?} is not allowed to modify ownerReferences")))
        }
        Operation::Update if !labels.is_empty() => {
            Err(request.forbidden(format!("is not allowed to modify labels: {}", labels.join(", "))))
        }
        _ => Ok(()),
    }
}

/// Labels that differ and that a kubelet must not touch, sorted.
fn forbidden_labels(object: &Value, old: &Value) -> Vec<String> {
    let keys =
        |value: &Value| value.labels().map(|labels| labels.keys().cloned().collect::<Vec<_>>()).unwrap_or_default();
    let mut changed: Vec<String> = [keys(object), keys(old)].concat();
    changed.retain(|key| object.label(key) != old.label(key) && !may_set_label(key));
    changed.sort();
    changed.dedup();
    changed
}

fn may_set_label(key: &str) -> bool {
    let Some((namespace, _)) = key.split_once('/') else { return true };
    let within = |root: &str| namespace == root || namespace.strip_suffix(root).is_some_and(|rest| rest.ends_with('.'));
    if within(RESTRICTED) {
        return false;
    }
    let is_kubernetes = within("kubernetes.io") || within("k8s.io");
    !is_kubernetes || KUBELET_LABELS.contains(&key) || KUBELET_LABEL_NAMESPACES.iter().any(|root| within(root))
}

fn claim_status(request: &AdmissionRequest<'_>, node: &str) -> Result<()> {
    let (Operation::Update, Some(old)) = (request.operation, request.old) else {
        return Err(request.forbidden("unexpected operation"));
    };
    let reduced = |object: &Value| {
        let mut object = object.clone();
        for path in [
            ["metadata", "resourceVersion"],
            ["metadata", "managedFields"],
            ["status", "capacity"],
            ["status", "conditions"],
            ["status", "allocatedResources"],
            ["status", "allocatedResourceStatuses"],
        ] {
            object.remove_at(&path);
        }
        object
    };
    if reduced(old) != reduced(request.object) {
        return Err(request.forbidden(format!(
            "node {node:?} is not allowed to update fields other than status.quantity and status.conditions"
        )));
    }
    Ok(())
}

fn token(server: &Server, request: &AdmissionRequest<'_>, node: &str) -> Result<()> {
    if request.operation != Operation::Create {
        return Ok(());
    }
    let bound = &request.object["spec"]["boundObjectRef"];
    let (name, uid) = (bound.str_at(&["name"]), bound.str_at(&["uid"]));
    if bound["kind"] != "Pod" || bound["apiVersion"] != "v1" || name.is_empty() {
        return Err(request.forbidden("node requested token not bound to a pod"));
    }
    if uid.is_empty() {
        return Err(request.forbidden("node requested token with a pod binding without a uid"));
    }
    let pod = find_pod(server, request, name)?;
    if pod.uid() != uid {
        return Err(request.forbidden(format!(
            "the UID in the bound object reference ({uid}) does not match the UID in record. The object might have been deleted and then recreated"
        )));
    }
    if pod.str_at(&["spec", "nodeName"]) != node {
        return Err(request.forbidden("node requested token bound to a pod scheduled on a different node"));
    }
    audience(server, request, &pod)
}

/// The audience must be one that a volume of the pod asks for, or one that the node is specially granted.
fn audience(server: &Server, request: &AdmissionRequest<'_>, pod: &Value) -> Result<()> {
    let wanted = match request.object.list_at(&["spec", "audiences"]) {
        [] => "",
        [one] => one.as_str().unwrap_or_default(),
        _ => return Err(request.forbidden("node may only request 0 or 1 audiences")),
    };
    let volumes = pod.list_at(&["spec", "volumes"]);
    let sources = volumes.iter().flat_map(|volume| volume.list_at(&["projected", "sources"]));
    let mut tokens = sources.filter_map(|source| source.get("serviceAccountToken"));
    let is_own = |audience: &str| server.auth.service_accounts().audiences().iter().any(|own| own == audience);
    // The server fills in its own audience when none is asked for, before admission sees the request.
    if tokens.any(|token| {
        token.str_at(&["audience"]) == wanted || (token.str_at(&["audience"]).is_empty() && is_own(wanted))
    }) {
        return Ok(());
    }
    let drivers = volumes.iter().filter_map(|volume| csi_driver(server, pod, volume));
    let mut drivers = drivers.filter_map(|name| cached(server, "storage.k8s.io", "csidrivers", "", &name));
    let asks =
        |driver: &Value| driver.list_at(&["spec", "tokenRequests"]).iter().any(|r| r.str_at(&["audience"]) == wanted);
    if drivers.any(|driver| asks(&driver)) {
        return Ok(());
    }
    let user = &request.user.name;
    Err(request.forbidden(format!("{user} is not authorized to request tokens for audience {wanted:?}")))
}

fn csi_driver(server: &Server, pod: &Value, volume: &Value) -> Option<String> {
    let inline = volume.str_at(&["csi", "driver"]);
    if !inline.is_empty() {
        return Some(inline.to_owned());
    }
    let claim = match volume.get("ephemeral") {
        Some(_) => format!("{}-{}", pod.name(), volume.str_at(&["name"])),
        None => volume.at(&["persistentVolumeClaim", "claimName"])?.as_str()?.to_owned(),
    };
    let claim = cached(server, "", "persistentvolumeclaims", pod.namespace(), &claim)?;
    let volume = cached(server, "", "persistentvolumes", "", claim.str_at(&["spec", "volumeName"]))?;
    volume.at(&["spec", "csi", "driver"])?.as_str().map(str::to_owned)
}

fn lease(request: &AdmissionRequest<'_>, node: &str) -> Result<()> {
    let name = if request.name.is_empty() { request.object.name() } else { request.name };
    if name != node {
        return Err(
            request.forbidden(format!("can only access node lease with the same name as the requesting node: {node}"))
        );
    }
    Ok(())
}

fn same_name(request: &AdmissionRequest<'_>, node: &str, kind: &str) -> Result<()> {
    let name = if request.name.is_empty() { request.object.name() } else { request.name };
    if name != node {
        return Err(request.forbidden(format!("can only access {kind} with the same name as the requesting node")));
    }
    Ok(())
}

fn resource_slice(request: &AdmissionRequest<'_>, node: &str) -> Result<()> {
    let object = if request.operation == Operation::Delete { request.old } else { Some(&*request.object) };
    if object.is_some_and(|slice| slice.str_at(&["spec", "nodeName"]) != node) {
        return Err(
            request.forbidden("can only create/delete ResourceSlices with NodeName matching the requesting node")
        );
    }
    Ok(())
}

fn csr(request: &AdmissionRequest<'_>, node: &str) -> Result<()> {
    if request.operation != Operation::Create {
        return Ok(());
    }
    let signer = request.object.str_at(&["spec", "signerName"]);
    if !matches!(signer, "kubernetes.io/kube-apiserver-client-kubelet" | "kubernetes.io/kubelet-serving") {
        return Ok(());
    }
    let wanted = format!("system:node:{node}");
    match super::certificates::subject(request.object) {
        Some(subject) if subject.common_name == wanted => Ok(()),
        Some(_) => Err(request.forbidden(
            "can only create a node CSR with CN=\"system:node:<nodeName>\" matching the requesting node's name",
        )),
        None => Err(request.forbidden("unable to parse csr")),
    }
}

/// New nodes get the not-ready taint, so that no pod lands on them before the node controller has looked.
pub struct TaintNodesByCondition;

#[async_trait]
impl Plugin for TaintNodesByCondition {
    fn name(&self) -> &'static str {
        "TaintNodesByCondition"
    }

    fn handles(&self, operation: Operation) -> bool {
        operation == Operation::Create
    }

    async fn admit(&self, _server: &Arc<Server>, request: &mut AdmissionRequest<'_>) -> Result<()> {
        if request.creates("", "nodes") {
            let mut taints = request.object.list_at(&["spec", "taints"]).to_vec();
            if !taints.iter().any(|taint| taint["key"] == NOT_READY && taint["effect"] == "NoSchedule") {
                taints.push(json!({"key": NOT_READY, "effect": "NoSchedule"}));
                request.object.set(&["spec", "taints"], taints);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_of_kubernetes_are_mostly_not_a_kubelets() {
        for (key, allowed) in [
            ("app", true),
            ("example.com/x", true),
            ("kubernetes.io/hostname", true),
            ("node.kubernetes.io/x", true),
            ("kubelet.kubernetes.io/x", true),
            ("node-role.kubernetes.io/master", false),
            ("node-restriction.kubernetes.io/x", false),
            ("x.node-restriction.kubernetes.io/x", false),
            ("kubernetes.io/x", false),
            ("evilkubernetes.io/x", true),
        ] {
            assert_eq!(may_set_label(key), allowed, "{key}");
        }
    }

    #[test]
    fn static_pods_need_nothing_from_the_api() {
        assert_eq!(api_reference(&json!({"spec": {"volumes": [{"hostPath": {"path": "/x"}}]}})), None);
        assert_eq!(api_reference(&json!({"spec": {"volumes": [{"secret": {"secretName": "x"}}]}})), Some("secrets"));
        let env = json!({"spec": {"containers": [{"envFrom": [{"configMapRef": {"name": "x"}}]}]}});
        assert_eq!(api_reference(&env), Some("configmaps"));
    }
}
