//! What beside the container runtime keeps this node from being ready.

use std::collections::BTreeMap;

use tokio::sync::watch;

/// In the order in which the node's status names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Obstacle {
    /// The drivers of volumes cannot be shown to the cluster yet.
    Storage,
    Shutdown,
}

/// Obstacles with what users are told about them.
pub type Obstacles = BTreeMap<Obstacle, String>;

#[derive(Default)]
pub struct Readiness {
    obstacles: watch::Sender<Obstacles>,
}

impl Readiness {
    pub fn set(&self, obstacle: Obstacle, message: &str) {
        self.obstacles.send_if_modified(|known| known.insert(obstacle, message.to_owned()).as_deref() != Some(message));
    }

    pub fn clear(&self, obstacle: Obstacle) {
        self.obstacles.send_if_modified(|known| known.remove(&obstacle).is_some());
    }

    pub fn has(&self, obstacle: Obstacle) -> bool {
        self.obstacles.borrow().contains_key(&obstacle)
    }

    /// The obstacles, and a wake-up when they change.
    pub fn changes(&self) -> watch::Receiver<Obstacles> {
        self.obstacles.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_changes_wake() {
        let readiness = Readiness::default();
        let mut changes = readiness.changes();
        readiness.set(Obstacle::Shutdown, "going");
        readiness.set(Obstacle::Storage, "not yet");
        let told: Vec<String> = changes.borrow_and_update().values().cloned().collect();
        assert_eq!(told, ["not yet", "going"]);
        readiness.set(Obstacle::Storage, "not yet");
        assert!(!changes.has_changed().unwrap());
        readiness.clear(Obstacle::Storage);
        assert!(changes.has_changed().unwrap());
    }
}
