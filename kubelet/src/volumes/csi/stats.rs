//! How full the volumes of a pod are, as their drivers say.

use std::time::Duration;

use super::api::{Capability, GetStats, Stats, Usage};
use super::layout::{self, Place};
use super::{Csi, CsiError};

/// Whoever asks for figures does not wait for long.
const WITHIN: Duration = Duration::from_secs(5);

/// Figures of one volume; absent what the driver does not say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VolumeStats {
    /// The volume's name in the pod.
    pub name: String,
    pub bytes: Option<Figures>,
    pub inodes: Option<Figures>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    pub available: u64,
    pub total: u64,
    pub used: u64,
}

impl Csi {
    /// Volumes whose driver cannot tell, or not soon, are left out.
    pub async fn stats(&self, pod_uid: &str) -> Vec<VolumeStats> {
        let mut stats = Vec::new();
        for place in layout::published_of(&self.root, pod_uid) {
            let asked = tokio::time::timeout(WITHIN, self.stats_of(pod_uid, &place)).await;
            match asked {
                Ok(Ok(found)) => stats.extend(found),
                Ok(Err(error)) => {
                    let path = place.directory().display();
                    tracing::debug!(%path, %error, "a volume's figures are not known");
                }
                Err(_) => tracing::debug!(path = %place.directory().display(), "a driver is slow to tell figures"),
            }
        }
        stats
    }

    async fn stats_of(&self, pod_uid: &str, place: &Place) -> Result<Option<VolumeStats>, CsiError> {
        let Some(data) = place.load()? else { return Ok(None) };
        let key = (pod_uid.to_owned(), data.spec_volume_id);
        // Of one that an earlier process has published the name is known when the pod next looks after its volumes.
        let Some(name) = self.published.lock().get(&key).cloned() else { return Ok(None) };
        let driver = self.driver(&data.driver_name)?;
        if !driver.capabilities().await?.has(Capability::VolumeStats) {
            return Ok(None);
        }
        let volume_path = place.mount_point().display().to_string();
        let answer = driver.stats(GetStats { volume_id: data.volume_handle, volume_path }).await?;
        Ok(Some(figures(name, &answer)))
    }
}

fn figures(name: String, stats: &Stats) -> VolumeStats {
    let of = |unit: i32| {
        let usage = stats.usage.iter().find(|usage| usage.unit == unit)?;
        let number = |value: i64| u64::try_from(value).unwrap_or(0);
        let Usage { available, total, used, .. } = usage;
        Some(Figures { available: number(*available), total: number(*total), used: number(*used) })
    };
    VolumeStats { name, bytes: of(Usage::BYTES), inodes: of(Usage::INODES) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_told_apart() {
        let usage = |unit, total| Usage { total, used: -1, available: 1, unit };
        let stats = figures("pv".into(), &Stats { usage: vec![usage(Usage::BYTES, 10), usage(7, 3)] });
        assert_eq!(stats.bytes, Some(Figures { available: 1, total: 10, used: 0 }));
        assert_eq!(stats.inodes, None);
    }
}
