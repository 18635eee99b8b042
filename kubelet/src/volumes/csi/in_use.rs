//! The volumes that this node uses, as its status has to say: a volume that the status names is not detached.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::sync::watch;

/// Names as in `volumesInUse`.
pub type Names = BTreeSet<String>;

#[derive(Default)]
pub struct VolumesInUse {
    wanted: watch::Sender<Names>,
    shown: watch::Sender<Names>,
}

impl VolumesInUse {
    /// Wakes when the node's status should name others.
    pub fn changes(&self) -> watch::Receiver<Names> {
        self.wanted.subscribe()
    }

    pub fn wanted(&self) -> Names {
        self.wanted.borrow().clone()
    }

    /// What the node's status names now.
    pub fn show(&self, names: Names) {
        self.shown.send_replace(names);
    }

    pub(super) fn claim(&self, name: &str) {
        self.wanted.send_if_modified(|names| names.insert(name.to_owned()));
    }

    pub(super) fn is_claimed(&self, name: &str) -> bool {
        self.wanted.borrow().contains(name)
    }

    /// From now on exactly these are used.
    pub(super) fn replace(&self, wanted: Names) {
        self.wanted.send_if_modified(|names| {
            let changed = *names != wanted;
            *names = wanted;
            changed
        });
    }

    /// Waits until the node's status names the volume. False when it does not within `at_most`.
    pub(super) async fn is_shown(&self, name: &str, at_most: Duration) -> bool {
        let mut shown = self.shown.subscribe();
        let wait = shown.wait_for(|names| names.contains(name));
        tokio::time::timeout(at_most, wait).await.is_ok_and(|waited| waited.is_ok())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn volumes_are_claimed_then_shown() {
        let volumes = VolumesInUse::default();
        let mut changes = volumes.changes();
        changes.mark_unchanged();
        volumes.claim("a");
        assert!(changes.has_changed().unwrap());
        assert!(!volumes.is_shown("a", Duration::from_secs(1)).await);
        volumes.show(changes.borrow_and_update().clone());
        assert!(volumes.is_shown("a", Duration::from_secs(1)).await);
        volumes.replace(Names::from(["a".to_owned()]));
        assert!(!changes.has_changed().unwrap(), "nothing new");
    }
}
