//! The persistent volume behind a pod's claim, if the two really belong together. The texts are upstream's.

use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim, Pod, Volume};

use crate::objects::{ObjectError, Objects};

/// Kept on claims that pods use: a claim that has it is not gone yet.
const PROTECTION: &str = "kubernetes.io/pvc-protection";

#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    #[error("failed to fetch PVC from API server: {0}")]
    Fetch(#[source] ObjectError),
    #[error("PVC is being deleted")]
    BeingDeleted,
    #[error("PVC is not bound")]
    NotBound,
    #[error("PVC has empty pvc.Spec.VolumeName")]
    NoVolume,
    #[error("was not created for pod {0} (pod is not owner)")]
    NotOfPod(String),
    #[error("failed to fetch PV {name} from API server: {source}")]
    FetchVolume { name: String, source: ObjectError },
    #[error("found PV object {0} but it has a nil pv.Spec.ClaimRef indicating it is not yet bound to the claim")]
    Unclaimed(String),
    #[error("found PV object {name} but its pv.Spec.ClaimRef.UID {of} does not point to claim.UID {wanted}")]
    OtherClaim { name: String, of: String, wanted: String },
    #[error("volume {name} has volumeMode {mode}, but is specified in {used_in}")]
    Mode { name: String, mode: String, used_in: &'static str },
}

/// A pod's reference to a claim.
pub struct Reference {
    pub claim: String,
    pub read_only: bool,
    /// The claim was made for this pod and goes with it.
    is_ephemeral: bool,
}

/// The claim that `volume` refers to, if it does.
pub fn reference(pod: &Pod, volume: &Volume) -> Option<Reference> {
    if let Some(source) = &volume.persistent_volume_claim {
        let read_only = source.read_only.unwrap_or(false);
        return Some(Reference { claim: source.claim_name.clone(), read_only, is_ephemeral: false });
    }
    let pod = pod.metadata.name.as_deref().unwrap_or_default();
    let claim = format!("{pod}-{}", volume.name);
    volume.ephemeral.as_ref().map(|_| Reference { claim, read_only: false, is_ephemeral: true })
}

/// The claim and its volume.
pub async fn resolve(
    pod: &Pod,
    volume: &Volume,
    reference: &Reference,
    objects: &Objects,
) -> Result<(PersistentVolumeClaim, PersistentVolume), ClaimError> {
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    let claim = objects.claim(namespace, &reference.claim).await.map_err(ClaimError::Fetch)?;
    let name = bound_volume(&claim)?;
    if reference.is_ephemeral && !is_owned(&claim, pod) {
        let name = pod.metadata.name.as_deref().unwrap_or_default();
        return Err(ClaimError::NotOfPod(format!("{namespace}/{name}")));
    }
    let found = objects.volume(&name).await.map_err(|source| ClaimError::FetchVolume { name: name.clone(), source })?;
    check_volume(&claim, &found, name)?;
    check_mode(pod, volume, &found)?;
    Ok((claim, found))
}

fn bound_volume(claim: &PersistentVolumeClaim) -> Result<String, ClaimError> {
    let protected = claim.metadata.finalizers.iter().flatten().any(|finalizer| finalizer == PROTECTION);
    if claim.metadata.deletion_timestamp.is_some() && !protected {
        return Err(ClaimError::BeingDeleted);
    }
    if claim.status.as_ref().and_then(|status| status.phase.as_deref()) != Some("Bound") {
        return Err(ClaimError::NotBound);
    }
    let name = claim.spec.as_ref().and_then(|spec| spec.volume_name.clone());
    name.filter(|name| !name.is_empty()).ok_or(ClaimError::NoVolume)
}

fn is_owned(claim: &PersistentVolumeClaim, pod: &Pod) -> bool {
    let mut owners = claim.metadata.owner_references.iter().flatten();
    owners.any(|owner| owner.controller == Some(true) && Some(&owner.uid) == pod.metadata.uid.as_ref())
}

fn check_volume(claim: &PersistentVolumeClaim, volume: &PersistentVolume, name: String) -> Result<(), ClaimError> {
    let text = |text: &Option<String>| text.clone().unwrap_or_default();
    let Some(reference) = volume.spec.as_ref().and_then(|spec| spec.claim_ref.as_ref()) else {
        return Err(ClaimError::Unclaimed(name));
    };
    let (of, wanted) = (text(&reference.uid), text(&claim.metadata.uid));
    if of == wanted { Ok(()) } else { Err(ClaimError::OtherClaim { name, of, wanted }) }
}

/// A file system is mounted, a block device is not.
fn check_mode(pod: &Pod, volume: &Volume, found: &PersistentVolume) -> Result<(), ClaimError> {
    let mode = found.spec.as_ref().and_then(|spec| spec.volume_mode.as_deref()).unwrap_or("Filesystem");
    let spec = pod.spec.iter();
    let containers = spec.flat_map(|spec| spec.init_containers.iter().flatten().chain(&spec.containers));
    let (mut mounted, mut mapped) = (false, false);
    for container in containers {
        mounted |= container.volume_mounts.iter().flatten().any(|mount| mount.name == volume.name);
        mapped |= container.volume_devices.iter().flatten().any(|device| device.name == volume.name);
    }
    let wrong = |used_in| ClaimError::Mode { name: volume.name.clone(), mode: mode.to_owned(), used_in };
    match mode {
        "Filesystem" if mapped => Err(wrong("volumeDevices")),
        mode if mode != "Filesystem" && mounted => Err(wrong("volumeMounts")),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn claim(metadata: Value, spec: Value, phase: &str) -> PersistentVolumeClaim {
        serde_json::from_value(json!({"metadata": metadata, "spec": spec, "status": {"phase": phase}})).unwrap()
    }

    #[test]
    fn claims_are_bound_and_stay() {
        let going = json!({"deletionTimestamp": "2026-01-01T00:00:00Z"});
        let kept = json!({"deletionTimestamp": "2026-01-01T00:00:00Z", "finalizers": [PROTECTION]});
        let named = json!({"volumeName": "pv"});
        for (claim, want) in [
            (claim(json!({}), named.clone(), "Bound"), Ok("pv")),
            (claim(kept, named.clone(), "Bound"), Ok("pv")),
            (claim(going, named.clone(), "Bound"), Err("PVC is being deleted")),
            (claim(json!({}), named, "Pending"), Err("PVC is not bound")),
            (claim(json!({}), json!({}), "Bound"), Err("PVC has empty pvc.Spec.VolumeName")),
        ] {
            let found = bound_volume(&claim).map_err(|error| error.to_string());
            assert_eq!(found, want.map(str::to_owned).map_err(str::to_owned));
        }
    }

    #[test]
    fn volumes_point_back() {
        let claim = claim(json!({"uid": "1"}), json!({}), "Bound");
        let volume = |spec: Value| serde_json::from_value(json!({"metadata": {}, "spec": spec})).unwrap();
        let check = |spec| check_volume(&claim, &volume(spec), "pv".into()).map_err(|error| error.to_string());
        assert_eq!(check(json!({"claimRef": {"uid": "1"}})), Ok(()));
        let other = "found PV object pv but its pv.Spec.ClaimRef.UID 2 does not point to claim.UID 1";
        assert_eq!(check(json!({"claimRef": {"uid": "2"}})), Err(other.to_owned()));
        assert!(check(json!({})).is_err_and(|error| error.contains("nil pv.Spec.ClaimRef")));
    }

    #[test]
    fn ephemeral_claims_are_the_pods_own() {
        let pod = json!({"metadata": {"name": "p", "uid": "u"}, "spec": {"containers": [
            {"name": "c", "volumeMounts": [{"name": "v", "mountPath": "/v"}]}]}});
        let pod: Pod = serde_json::from_value(pod).unwrap();
        let volume: Volume = serde_json::from_value(json!({"name": "v", "ephemeral": {}})).unwrap();
        let found = reference(&pod, &volume).unwrap();
        assert_eq!((found.claim.as_str(), found.is_ephemeral), ("p-v", true));
        let owner = |uid| {
            json!({"ownerReferences": [{"apiVersion": "v1", "kind": "Pod", "name": "p", "uid": uid,
            "controller": true}]})
        };
        assert!(is_owned(&claim(owner("u"), json!({}), "Bound"), &pod));
        assert!(!is_owned(&claim(owner("w"), json!({}), "Bound"), &pod));
        let block: PersistentVolume =
            serde_json::from_value(json!({"metadata": {}, "spec": {"volumeMode": "Block"}})).unwrap();
        let error = check_mode(&pod, &volume, &block).unwrap_err().to_string();
        assert_eq!(error, "volume v has volumeMode Block, but is specified in volumeMounts");
    }
}
