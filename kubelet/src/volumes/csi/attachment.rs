//! Waiting until a volume is attached to this node. Attaching is the business of the attach/detach controller and the
//! driver's own attacher; the kubelet says that it uses the volume and then reads what has become of it.

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::api::core::v1::Node;
use k8s_openapi::api::storage::v1::VolumeAttachment;
use tokio::time::Instant;

use super::in_use::VolumesInUse;
use super::layout::VolumeId;
use crate::objects::{ObjectError, Objects};

/// How long one attempt waits; the pod's next attempt goes on waiting.
const PATIENCE: Duration = Duration::from_secs(120);
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(7);

#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    #[error("Volume has not been added to the list of VolumesInUse in the node's volume status")]
    NotShown,
    #[error("Volume not attached according to node status")]
    NotInStatus,
    #[error("volume {handle} is not attached for volume attachment {attachment}")]
    NotAttached { handle: String, attachment: String },
    #[error("volume attachment is being deleted")]
    BeingDeleted,
    #[error("{0}")]
    Driver(String),
    #[error(transparent)]
    Fetch(#[from] ObjectError),
}

impl AttachError {
    /// Time may mend it.
    fn is_early(&self) -> bool {
        match self {
            Self::NotInStatus | Self::NotAttached { .. } => true,
            Self::Fetch(error) => error.is_not_found() || error.is_forbidden(),
            Self::NotShown | Self::BeingDeleted | Self::Driver(_) => false,
        }
    }
}

pub struct Attachments<'a> {
    pub objects: &'a Objects,
    pub node: &'a str,
    pub in_use: &'a VolumesInUse,
}

impl Attachments<'_> {
    /// Waits for the volume; returns what the attacher says about it, for the driver.
    pub async fn wait(&self, id: &VolumeId) -> Result<BTreeMap<String, String>, AttachError> {
        let name = id.unique_name();
        self.in_use.claim(&name);
        if !self.in_use.is_shown(&name, PATIENCE).await {
            return Err(AttachError::NotShown);
        }
        let (deadline, mut pause) = (Instant::now() + PATIENCE, FIRST_PAUSE);
        loop {
            match self.look(id, &name).await {
                Err(error) if error.is_early() && Instant::now() + pause < deadline => {
                    tokio::time::sleep(pause).await;
                    pause = (pause * 3 / 2).min(LONGEST_PAUSE);
                }
                other => return other,
            }
        }
    }

    async fn look(&self, id: &VolumeId, name: &str) -> Result<BTreeMap<String, String>, AttachError> {
        let attachment = self.objects.volume_attachment(&id.attachment(self.node)).await?;
        let context = context(&attachment, id)?;
        let node = self.objects.node(self.node).await?;
        if is_attached(&node, name) { Ok(context) } else { Err(AttachError::NotInStatus) }
    }
}

/// What the attachment says, if it says that the volume is attached.
fn context(attachment: &VolumeAttachment, id: &VolumeId) -> Result<BTreeMap<String, String>, AttachError> {
    if attachment.metadata.deletion_timestamp.is_some() {
        return Err(AttachError::BeingDeleted);
    }
    let status = attachment.status.clone().unwrap_or_default();
    if status.attached {
        return Ok(status.attachment_metadata.unwrap_or_default());
    }
    Err(match status.attach_error {
        Some(error) => AttachError::Driver(error.message.unwrap_or_default()),
        None => AttachError::NotAttached {
            handle: id.handle.clone(),
            attachment: attachment.metadata.name.clone().unwrap_or_default(),
        },
    })
}

fn is_attached(node: &Node, name: &str) -> bool {
    let status = node.status.as_ref();
    let attached = status.and_then(|status| status.volumes_attached.as_ref());
    attached.is_some_and(|volumes| volumes.iter().any(|volume| volume.name == name))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_attachments_say() {
        let id = VolumeId { driver: "d".into(), handle: "h".into() };
        let say = |status: serde_json::Value| {
            let text = json!({"metadata": {"name": "a"}, "spec": {"attacher": "d", "nodeName": "n", "source": {}},
                "status": status});
            context(&serde_json::from_value(text).unwrap(), &id).map_err(|error| error.to_string())
        };
        let metadata = BTreeMap::from([("dev".to_owned(), "sdb".to_owned())]);
        assert_eq!(say(json!({"attached": true, "attachmentMetadata": {"dev": "sdb"}})), Ok(metadata));
        let late = "volume h is not attached for volume attachment a";
        assert_eq!(say(json!({"attached": false})), Err(late.to_owned()));
        let failed = json!({"attached": false, "attachError": {"message": "no such disk"}});
        assert_eq!(say(failed), Err("no such disk".to_owned()));
    }

    #[test]
    fn what_the_node_says() {
        let node = json!({"metadata": {}, "status": {"volumesAttached": [{"name": "v", "devicePath": ""}]}});
        let node: Node = serde_json::from_value(node).unwrap();
        assert!(is_attached(&node, "v") && !is_attached(&node, "w"));
    }
}
