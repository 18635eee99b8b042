//! Volumes of CSI drivers: published for a pod before its containers start, taken back when it has ended.
//!
//! What is staged and published is read from the disk ([`layout`]), so that a restarted kubelet takes over, and takes
//! back what pods left behind that are gone. In memory are only the registered drivers, what need not be asked for
//! again, and one lock for each volume: whoever publishes or takes back a volume has it to himself.

mod api;
mod attachment;
mod drivers;
mod expand;
mod in_use;
mod layout;
mod node_info;
mod ownership;
mod publish;
mod release;
mod request;
mod stats;

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::Notify;

pub use attachment::AttachError;
pub use drivers::{Drivers, Registration};
pub use in_use::{Names, VolumesInUse};
pub use layout::{DiskError, VolumeId};
pub use node_info::{NodeInfo, NodeInfoError};
pub use publish::Published;
pub use release::take_back_unused;
pub use request::{PolicyError, Source, Wanted};
pub use stats::{Figures, VolumeStats};

use crate::grpc::CallError;
use crate::locks::Locks;
use crate::objects::{ObjectError, Objects};
use crate::volumes::tokens::TokenError;

/// Why a volume could not be published or taken back.
#[derive(Debug, thiserror::Error)]
pub enum CsiError {
    #[error("driver name {0} not found in the list of registered CSI drivers")]
    NoDriver(String),
    #[error(transparent)]
    Call(#[from] CallError),
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error(transparent)]
    Fetch(#[from] ObjectError),
    #[error("failed to get service account token attributes: {0}")]
    Token(#[from] TokenError),
    #[error("failed to get service account token attributes: {0}")]
    TokenText(#[from] serde_json::Error),
    #[error("fetching {field} {namespace}/{name} failed: {source}")]
    Secret { field: &'static str, namespace: String, name: String, source: Box<ObjectError> },
    #[error(transparent)]
    Policy(#[from] PolicyError),
    #[error(transparent)]
    Attach(#[from] AttachError),
    #[error("applyFSGroup failed for vol {volume}: {source}")]
    Group { volume: String, source: std::io::Error },
}

pub struct Csi {
    root: PathBuf,
    node: String,
    objects: Objects,
    pub drivers: Arc<Drivers>,
    pub in_use: Arc<VolumesInUse>,
    locks: Locks<VolumeId>,
    /// Pods' volumes (by the pod's uid and the volume's name) that this process has published, and their names in the
    /// pods.
    published: Mutex<HashMap<(String, String), String>>,
    /// Volumes that this process has staged.
    staged: Mutex<HashSet<VolumeId>>,
    /// Something was taken back: staged volumes may be unused now.
    released: Notify,
}

impl Csi {
    pub fn new(root: PathBuf, node: &str, objects: Objects, drivers: Arc<Drivers>) -> Self {
        Self {
            root,
            node: node.to_owned(),
            objects,
            drivers,
            in_use: Arc::default(),
            locks: Locks::default(),
            published: Mutex::default(),
            staged: Mutex::default(),
            released: Notify::new(),
        }
    }

    fn driver(&self, name: &str) -> Result<api::Driver, CsiError> {
        self.drivers.get(name).ok_or_else(|| CsiError::NoDriver(name.to_owned()))
    }
}

#[cfg(test)]
mod tests;
