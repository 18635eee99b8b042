//! Which claims a pod uses, and which requests of them its containers. Pure.

use k8s_openapi::api::core::v1::{Container, Pod, PodResourceClaim};
use k8s_openapi::api::resource::v1::ResourceClaim;

/// Why a pod may not use a claim; the texts are upstream's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClaimError {
    #[error("resource claim {0:?} of the pod has not been created yet")]
    NotCreated(String),
    #[error("ResourceClaim {namespace}/{name} was not created for pod {namespace}/{pod} (pod is not owner)")]
    NotOfPod { namespace: String, name: String, pod: String },
    #[error("pod {pod} ({pod_uid}) is not allowed to use ResourceClaim {name} ({uid})")]
    NotReserved { pod: String, pod_uid: String, name: String, uid: String },
    #[error("ResourceClaim {0}: not allocated")]
    NotAllocated(String),
}

/// A claim that a pod uses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reference {
    /// The name of the object in the pod's namespace.
    pub name: String,
    /// It was made for this pod.
    pub is_own: bool,
}

fn text(text: Option<&String>) -> String {
    text.cloned().unwrap_or_default()
}

/// The object behind one of the pod's claims; `None` when none is needed.
fn resolve(pod: &Pod, claim: &PodResourceClaim) -> Result<Option<Reference>, ClaimError> {
    if let Some(name) = &claim.resource_claim_name {
        return Ok(Some(Reference { name: name.clone(), is_own: false }));
    }
    let statuses = pod.status.iter().flat_map(|status| status.resource_claim_statuses.iter().flatten());
    let status = statuses.into_iter().find(|status| status.name == claim.name);
    let status = status.ok_or_else(|| ClaimError::NotCreated(claim.name.clone()))?;
    Ok(status.resource_claim_name.clone().map(|name| Reference { name, is_own: true }))
}

/// All claims that the pod uses, that of its extended resources among them.
pub fn references(pod: &Pod) -> Result<Vec<Reference>, ClaimError> {
    let claims = pod.spec.iter().flat_map(|spec| spec.resource_claims.iter().flatten());
    let mut references = Vec::new();
    for claim in claims {
        references.extend(resolve(pod, claim)?);
    }
    let extended = pod.status.as_ref().and_then(|status| status.extended_resource_claim_status.as_ref());
    references.extend(extended.map(|status| Reference { name: status.resource_claim_name.clone(), is_own: false }));
    Ok(references)
}

/// Whether the claim is there for the pod; returns the drivers that serve it.
pub fn check(pod: &Pod, reference: &Reference, claim: &ResourceClaim) -> Result<Vec<String>, ClaimError> {
    let (namespace, name) = (text(pod.metadata.namespace.as_ref()), reference.name.clone());
    let (pod_name, pod_uid) = (text(pod.metadata.name.as_ref()), text(pod.metadata.uid.as_ref()));
    let mut owners = claim.metadata.owner_references.iter().flatten();
    if reference.is_own && !owners.any(|owner| owner.controller == Some(true) && owner.uid == pod_uid) {
        return Err(ClaimError::NotOfPod { namespace, name, pod: pod_name });
    }
    let status = claim.status.as_ref();
    let mut users = status.into_iter().flat_map(|status| status.reserved_for.iter().flatten());
    if !users.any(|user| user.resource == "pods" && user.uid == pod_uid) {
        let uid = text(claim.metadata.uid.as_ref());
        return Err(ClaimError::NotReserved { pod: pod_name, pod_uid, name, uid });
    }
    let allocation = status.and_then(|status| status.allocation.as_ref());
    let allocation = allocation.ok_or(ClaimError::NotAllocated(name))?;
    let results = allocation.devices.iter().flat_map(|devices| devices.results.iter().flatten());
    let mut drivers: Vec<String> = results.map(|result| result.driver.clone()).collect();
    drivers.sort();
    drivers.dedup();
    Ok(drivers)
}

/// Claims that the container uses, by the object's name, each with one of its requests; an empty one for all.
pub fn of_container(pod: &Pod, container: &Container) -> Result<Vec<(String, String)>, ClaimError> {
    let mut uses = Vec::new();
    let claims = container.resources.iter().flat_map(|resources| resources.claims.iter().flatten());
    for used in claims {
        let claims = pod.spec.iter().flat_map(|spec| spec.resource_claims.iter().flatten());
        let Some(claim) = claims.into_iter().find(|claim| claim.name == used.name) else { continue };
        let request = used.request.clone().unwrap_or_default();
        uses.extend(resolve(pod, claim)?.map(|reference| (reference.name, request)));
    }
    let extended = pod.status.as_ref().and_then(|status| status.extended_resource_claim_status.as_ref());
    if let Some(status) = extended {
        let mappings = status.request_mappings.iter().filter(|mapping| mapping.container_name == container.name);
        uses.extend(mappings.map(|mapping| (status.resource_claim_name.clone(), mapping.request_name.clone())));
    }
    Ok(uses)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn pod(status: Value) -> Pod {
        let claims = json!([{"name": "own", "resourceClaimTemplateName": "t"}, {"name": "shared",
            "resourceClaimName": "s"}]);
        let container = json!({"name": "c", "resources": {"claims": [{"name": "shared", "request": "r"},
            {"name": "own"}]}});
        let spec = json!({"containers": [container], "resourceClaims": claims});
        let metadata = json!({"name": "p", "namespace": "n", "uid": "u"});
        serde_json::from_value(json!({"metadata": metadata, "spec": spec, "status": status})).unwrap()
    }

    #[test]
    fn claims_of_templates_are_found_in_the_status() {
        let early = references(&pod(json!({}))).unwrap_err().to_string();
        assert_eq!(early, r#"resource claim "own" of the pod has not been created yet"#);
        let unneeded = pod(json!({"resourceClaimStatuses": [{"name": "own"}]}));
        assert_eq!(references(&unneeded).unwrap().len(), 1);
        let mapping = json!({"containerName": "c", "resourceName": "example.com/gpu", "requestName": "x"});
        let extended = json!({"resourceClaimName": "e", "requestMappings": [mapping]});
        let full = pod(json!({"resourceClaimStatuses": [{"name": "own", "resourceClaimName": "p-own-1"}],
            "extendedResourceClaimStatus": extended}));
        let names: Vec<_> = references(&full).unwrap().into_iter().map(|found| (found.name, found.is_own)).collect();
        assert_eq!(names, [("p-own-1".into(), true), ("s".into(), false), ("e".into(), false)]);
        let container = &full.spec.as_ref().unwrap().containers[0];
        let want = [("s", "r"), ("p-own-1", ""), ("e", "x")].map(|(name, request)| (name.into(), request.into()));
        assert_eq!(of_container(&full, container).unwrap(), want);
    }

    #[test]
    fn claims_are_the_pods() {
        let pod = pod(json!({}));
        let claim = |owner: &str, user: &str, allocated: bool| -> ResourceClaim {
            let owner = json!({"apiVersion": "v1", "kind": "Pod", "name": "p", "uid": owner, "controller": true});
            let result = |driver: &str| json!({"driver": driver, "pool": "p", "device": "d", "request": "r"});
            let allocation = json!({"devices": {"results": [result("b"), result("a"), result("b")]}});
            let mut status = json!({"reservedFor": [{"resource": "pods", "name": "p", "uid": user}]});
            if allocated {
                status["allocation"] = allocation;
            }
            let metadata = json!({"name": "s", "uid": "cu", "ownerReferences": [owner]});
            serde_json::from_value(json!({"metadata": metadata, "spec": {}, "status": status})).unwrap()
        };
        let own = Reference { name: "s".into(), is_own: true };
        let shared = Reference { is_own: false, ..own.clone() };
        for (reference, claim, want) in [
            (&own, claim("u", "u", true), Ok(vec!["a".to_owned(), "b".to_owned()])),
            (&own, claim("w", "u", true), Err("ResourceClaim n/s was not created for pod n/p (pod is not owner)")),
            (&shared, claim("w", "u", true), Ok(vec!["a".to_owned(), "b".to_owned()])),
            (&shared, claim("w", "w", true), Err("pod p (u) is not allowed to use ResourceClaim s (cu)")),
            (&shared, claim("w", "u", false), Err("ResourceClaim s: not allocated")),
        ] {
            let found = check(&pod, reference, &claim).map_err(|error| error.to_string());
            assert_eq!(found, want.map_err(str::to_owned));
        }
    }
}
