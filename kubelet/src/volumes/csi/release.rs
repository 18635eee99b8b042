//! Taking volumes back: from a pod that has ended, and from the node when no pod uses them any more. Works from what is
//! on the disk, so that it does not matter which process has put it there.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use super::api::{self, Capability};
use super::layout::{self, Place, VolumeData, VolumeId};
use super::request::Policy;
use super::{Csi, CsiError, DiskError, Names};

/// The pause after a volume could not be taken back from the node, and the longest.
const RETRY: Duration = Duration::from_secs(5);
const RETRY_MAX: Duration = Duration::from_secs(120);

impl Csi {
    /// Takes every volume back from the pod. What failed is tried again when asked again.
    pub async fn release(&self, pod_uid: &str) -> Result<(), CsiError> {
        let places = layout::published_of(&self.root, pod_uid);
        let mut failed = None;
        for place in &places {
            if let Err(error) = self.unpublish(place).await {
                failed = Some(error);
            }
        }
        self.published.lock().retain(|(uid, _), _| uid != pod_uid);
        if !places.is_empty() {
            self.released.notify_one();
        }
        failed.map_or(Ok(()), Err)
    }

    async fn unpublish(&self, place: &Place) -> Result<(), CsiError> {
        // Without data nothing was asked of a driver.
        let Some(data) = place.load()? else { return Ok(place.remove()?) };
        let id = data.id();
        let _turn = self.locks.lock(&id).await;
        let target = place.mount_point();
        let question = api::Unpublish { volume_id: id.handle.clone(), target_path: target.display().to_string() };
        self.driver(&id.driver)?.unpublish(question).await?;
        Ok(place.remove()?)
    }

    /// Takes back from the node what is staged and no pod uses. True when nothing is left to do.
    pub(super) async fn unstage_unused(&self) -> bool {
        let used = match self.used() {
            Ok(used) => used,
            Err(error) => {
                // Its volume may be any of those that are staged.
                let error = apimachinery::process::error_chain(&error);
                tracing::warn!(error, "cannot tell which volumes pods use: none is taken back from the node");
                return false;
            }
        };
        let mut done = true;
        for place in layout::all_staged(&self.root) {
            let outcome = match place.load() {
                Ok(Some(data)) if used.contains(&data.id()) => Ok(true),
                Ok(data) => self.unstage(&place, data).await,
                Err(error) => Err(error.into()),
            };
            if let Err(error) = &outcome {
                let (path, error) = (place.directory().display(), apimachinery::process::error_chain(error));
                tracing::warn!(%path, error, "cannot take a volume back from the node");
            }
            done &= outcome.unwrap_or(false);
        }
        done
    }

    /// False when the volume is busy.
    async fn unstage(&self, place: &Place, data: Option<VolumeData>) -> Result<bool, CsiError> {
        let Some(data) = data else {
            place.remove()?;
            return Ok(true);
        };
        let id = data.id();
        let Some(_turn) = self.locks.try_lock(&id) else { return Ok(false) };
        // A pod may have come while the lock was not held.
        if self.used()?.contains(&id) {
            return Ok(true);
        }
        let driver = self.driver(&id.driver)?;
        let known = driver.capabilities().await?;
        self.staged.lock().remove(&id);
        if known.has(Capability::StageUnstage) {
            let staging_target_path = place.mount_point().display().to_string();
            driver.unstage(api::Unstage { volume_id: id.handle.clone(), staging_target_path }).await?;
        }
        place.remove()?;
        Ok(true)
    }

    /// Volumes that some pod's directory names.
    fn used(&self) -> Result<BTreeSet<VolumeId>, DiskError> {
        let loaded = layout::all_published(&self.root).into_iter().map(|place| place.load());
        loaded.filter_map(Result::transpose).map(|data| data.map(|data| data.id())).collect()
    }

    /// Has the node's status name exactly the volumes that are on the node and have to be attached.
    pub(super) async fn show_in_use(&self) -> Result<(), CsiError> {
        let mut ids = BTreeSet::new();
        for place in layout::all_staged(&self.root).iter().chain(&layout::all_published(&self.root)) {
            // A place that cannot be read names no volume; it is told when it is taken back.
            if let Ok(Some(data)) = place.load()
                && data.volume_lifecycle_mode != "Ephemeral"
            {
                ids.insert(data.id());
            }
        }
        let mut names = Names::new();
        for id in ids {
            if Policy::of(self.objects.csi_driver(&id.driver).await?).attaches() {
                names.insert(id.unique_name());
            }
        }
        // Those on their way to a pod have their lock held and are claimed already.
        let busy = self.locks.busy();
        names.extend(busy.iter().map(VolumeId::unique_name).filter(|name| self.in_use.is_claimed(name)));
        self.in_use.replace(names);
        Ok(())
    }
}

/// Takes back from the node what no pod uses: now, whenever a pod has let go of volumes, and when a driver comes that
/// may know an old one. Runs until the process ends; to be started when all pods of the node are known.
pub async fn take_back_unused(csi: Arc<Csi>) {
    let mut pause = RETRY;
    loop {
        let mut done = csi.unstage_unused().await;
        if let Err(error) = csi.show_in_use().await {
            tracing::warn!(%error, "cannot tell which volumes of this node are in use");
            done = false;
        }
        pause = if done { RETRY } else { (pause * 2).min(RETRY_MAX) };
        tokio::select! {
            () = csi.released.notified() => {}
            () = csi.drivers.came.notified() => {}
            () = tokio::time::sleep(pause), if !done => {}
        }
    }
}
