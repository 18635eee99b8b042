//! How a pod's worker is spoken to: a mailbox that keeps only the newest desired state, and a nudge.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use k8s_openapi::api::core::v1::Pod;
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};

use super::plan;

/// What the pod should be.
#[derive(Clone, Debug)]
pub struct Desired {
    /// The specification that runs: the API's object, or the static pod's file.
    pub pod: Arc<Pod>,
    /// The API's object that shows the pod: the same one, or the mirror of a static pod.
    pub object: Option<Arc<Pod>>,
    /// The source has no such pod any more.
    pub removed: bool,
    pub verdict: Option<plan::Verdict>,
}

/// The manager's end of a worker.
pub struct Handle {
    pub desired: watch::Sender<Desired>,
    wake: Arc<Wake>,
}

/// What wakes a worker beside its mailbox.
#[derive(Default)]
pub(super) struct Wake {
    pub notify: Notify,
    /// Containers that containerd says have ended.
    pub exited: Mutex<HashSet<String>>,
    /// Something that a volume shows has changed.
    pub volumes_stale: AtomicBool,
}

impl Handle {
    pub(super) fn new(desired: watch::Sender<Desired>, wake: Arc<Wake>) -> Self {
        Self { desired, wake }
    }

    /// Something happened in the runtime; with an id: this container or sandbox has ended.
    pub fn wake(&self, exited: Option<String>) {
        if let Some(id) = exited {
            self.wake.exited.lock().insert(id);
        }
        self.wake.notify.notify_one();
    }
}
