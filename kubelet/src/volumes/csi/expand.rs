//! Volumes that the cluster has made larger: the file system on them grows on the node that uses it, and the claim says
//! so afterwards.

use apimachinery::meta::Quantity;
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim};
use serde_json::{Value, json};

use super::CsiError;
use super::api::{self, Capability};
use super::layout::Place;
use super::publish::Job;
use super::request::{Source, Wanted, map};

/// A claim's volume, both as the API has them.
#[derive(Clone, Copy)]
pub struct Growth<'a> {
    claim: &'a PersistentVolumeClaim,
    /// The volume's size: as text, and in bytes.
    text: &'a str,
    bytes: i64,
}

fn bytes(text: &str) -> Option<i64> {
    text.parse::<Quantity>().ok().map(|quantity| quantity.value())
}

/// What has to be done for a volume that is larger than its claim knows.
pub fn growth<'a>(volume: &'a PersistentVolume, claim: &'a PersistentVolumeClaim) -> Option<Growth<'a>> {
    let text = volume.spec.as_ref()?.capacity.as_ref()?.get("storage")?.0.as_str();
    let known = claim.status.as_ref()?.capacity.as_ref()?.get("storage")?.0.as_str();
    let (size, known) = (bytes(text)?, bytes(known)?);
    (size > known).then_some(Growth { claim, text, bytes: size })
}

impl<'a> Growth<'a> {
    pub fn of(wanted: &Wanted<'a>) -> Option<Self> {
        match wanted.source {
            Source::Persistent(volume, _) if !wanted.read_only => growth(volume, wanted.claim?),
            _ => None,
        }
    }

    /// The claim's status with the new size, and without what announced it.
    fn patch(&self) -> Value {
        let status = self.claim.status.clone().unwrap_or_default();
        let pending = ["FileSystemResizePending", "Resizing", "NodeResizeError"];
        let conditions = status.conditions.into_iter().flatten();
        let conditions: Vec<_> = conditions.filter(|condition| !pending.contains(&condition.type_.as_str())).collect();
        json!({"status": {
            "capacity": {"storage": self.text},
            "conditions": conditions,
            "allocatedResourceStatuses": {"storage": null},
        }})
    }
}

impl Job<'_> {
    /// Has the driver grow the volume where the pod uses it, if the cluster has made it larger.
    pub(super) async fn expand(&self, place: &Place, staging_target_path: String) -> Result<(), CsiError> {
        let Some(growth) = Growth::of(self.wanted).filter(|_| self.known.has(Capability::Expand)) else {
            return Ok(());
        };
        let Source::Persistent(_, source) = self.wanted.source else { return Ok(()) };
        let secrets = self.csi.secret("NodeExpandSecretRef", source.node_expand_secret_ref.as_ref()).await?;
        let question = api::Expand {
            volume_id: self.id.handle.clone(),
            volume_path: place.mount_point().display().to_string(),
            capacity_range: Some(api::CapacityRange { required_bytes: growth.bytes }),
            staging_target_path,
            volume_capability: Some(self.wanted.capability(&self.known)),
            secrets: map(secrets),
        };
        let answer = self.driver.expand(question).await?;
        tracing::info!(volume = self.wanted.name(), bytes = answer.capacity_bytes, "a volume was expanded");
        Ok(self.csi.objects.patch_claim_status(growth.claim, growth.patch()).await?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn claims_learn_of_larger_volumes() {
        let volume = |size: &str| -> PersistentVolume {
            serde_json::from_value(json!({"metadata": {}, "spec": {"capacity": {"storage": size}}})).unwrap()
        };
        let conditions =
            json!([{"type": "FileSystemResizePending", "status": "True"}, {"type": "Other", "status": "True"}]);
        let status = json!({"capacity": {"storage": "1Gi"}, "conditions": conditions});
        let claim: PersistentVolumeClaim =
            serde_json::from_value(json!({"metadata": {}, "spec": {}, "status": status})).unwrap();
        assert!(growth(&volume("1Gi"), &claim).is_none());
        assert!(growth(&volume("1000M"), &claim).is_none());
        let (larger, unbound) = (volume("2Gi"), PersistentVolumeClaim::default());
        let found = growth(&larger, &claim).unwrap();
        assert_eq!(found.bytes, 2 << 30);
        let want = json!({"capacity": {"storage": "2Gi"}, "conditions": [{"type": "Other", "status": "True"}],
            "allocatedResourceStatuses": {"storage": null}});
        assert_eq!(found.patch()["status"], want);
        assert!(growth(&larger, &unbound).is_none());
    }
}
