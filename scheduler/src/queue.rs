//! Pods that wait for a node.
//!
//! - *active*: to be tried next, highest priority first, then longest waiting;
//! - *backoff*: tried and rejected, but something changed since: active again when the back-off (1 s, doubling to 10 s)
//!   is over;
//! - *unschedulable*: rejected, with the plugins that did it. An event moves those pods on that it could help;
//! - *gated*: held by a pre-enqueue plugin until they change.
//!
//! Events that arrive while a pod is being tried are remembered, so that none falls between the snapshot and the verdict.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::framework::{ClusterEvent, Plugin};
use crate::pod_info::PodInfo;

const FIRST_BACKOFF: Duration = Duration::from_secs(1);
const LAST_BACKOFF: Duration = Duration::from_secs(10);
/// A pod that no event woke for so long is tried again all the same.
const LONGEST_WAIT: Duration = Duration::from_secs(300);

/// A pod in the queue.
#[derive(Clone, Debug)]
pub struct Waiting {
    pub pod: Arc<PodInfo>,
    pub attempts: u32,
    since: Instant,
    rejected_at: Instant,
    rejected_by: HashSet<&'static str>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Active,
    Backoff,
    Unschedulable,
    Gated,
    /// Handed out by `pop`, verdict outstanding.
    InFlight,
}

/// A ticket in the heap; only valid while the entry's sequence is the same.
#[derive(PartialEq, Eq)]
struct Ticket {
    priority: i32,
    since: Instant,
    sequence: u64,
    uid: String,
}

impl Ord for Ticket {
    fn cmp(&self, other: &Self) -> Ordering {
        self.priority
            .cmp(&other.priority)
            .then_with(|| other.since.cmp(&self.since))
            .then_with(|| other.sequence.cmp(&self.sequence))
            .then_with(|| other.uid.cmp(&self.uid))
    }
}

impl PartialOrd for Ticket {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

struct Entry {
    waiting: Waiting,
    place: Place,
    sequence: u64,
    /// Events since the pod was handed out.
    missed: Vec<ClusterEvent>,
}

pub struct Queue {
    plugins: Vec<Arc<dyn Plugin>>,
    entries: HashMap<String, Entry>,
    active: BinaryHeap<Ticket>,
    sequence: u64,
}

impl Queue {
    pub fn new(plugins: Vec<Arc<dyn Plugin>>) -> Self {
        Self { plugins, entries: HashMap::new(), active: BinaryHeap::new(), sequence: 0 }
    }

    /// A pod without a node appeared or changed.
    pub fn put(&mut self, pod: Arc<PodInfo>, now: Instant) {
        let gated = self.plugins.iter().any(|plugin| plugin.pre_enqueue(&pod).is_err());
        let uid = pod.uid.clone();
        match self.entries.get_mut(&uid) {
            None => {
                let waiting = Waiting { pod, attempts: 0, since: now, rejected_at: now, rejected_by: HashSet::new() };
                let place = if gated { Place::Gated } else { Place::Active };
                self.entries.insert(uid.clone(), Entry { waiting, place, sequence: 0, missed: vec![] });
                if !gated {
                    self.activate(&uid);
                }
            }
            Some(entry) => {
                let spec_changed = entry.waiting.pod.pod.spec != pod.pod.spec || entry.waiting.pod.labels != pod.labels;
                entry.waiting.pod = pod;
                match entry.place {
                    Place::Gated if !gated => self.activate(&uid),
                    Place::InFlight if spec_changed => entry.missed.push(ClusterEvent::PodItself),
                    Place::Unschedulable if spec_changed => self.wake(&uid, ClusterEvent::PodItself, now),
                    _ => {}
                }
            }
        }
    }

    /// The pod is gone, or it has a node now.
    pub fn remove(&mut self, uid: &str) {
        self.entries.remove(uid);
    }

    /// Hands out the next pod to try.
    pub fn pop(&mut self) -> Option<Waiting> {
        while let Some(ticket) = self.active.pop() {
            let Some(entry) = self.entries.get_mut(&ticket.uid) else { continue };
            if entry.place == Place::Active && entry.sequence == ticket.sequence {
                entry.place = Place::InFlight;
                entry.missed.clear();
                entry.waiting.attempts += 1;
                return Some(entry.waiting.clone());
            }
        }
        None
    }

    /// The verdict on a pod that was handed out: it waits until an event helps one of the plugins that rejected it.
    /// Without plugins (an error, not a rejection) it is tried again after its back-off.
    pub fn reject(&mut self, uid: &str, rejected_by: HashSet<&'static str>, now: Instant) {
        let Some(entry) = self.entries.get_mut(uid) else { return };
        entry.waiting.rejected_at = now;
        entry.waiting.rejected_by = rejected_by;
        entry.place = Place::Unschedulable;
        let missed = std::mem::take(&mut entry.missed);
        if entry.waiting.rejected_by.is_empty() {
            entry.place = Place::Backoff;
            return;
        }
        for event in missed {
            self.wake(uid, event, now);
        }
    }

    /// Something happened in the cluster.
    pub fn on_event(&mut self, event: ClusterEvent, now: Instant) {
        let affected: Vec<String> = self
            .entries
            .iter_mut()
            .filter_map(|(uid, entry)| match entry.place {
                Place::Unschedulable => Some(uid.clone()),
                Place::InFlight => {
                    if !entry.missed.contains(&event) {
                        entry.missed.push(event);
                    }
                    None
                }
                _ => None,
            })
            .collect();
        for uid in affected {
            self.wake(&uid, event, now);
        }
    }

    /// Activates the pods whose back-off is over and those that waited too long. Answers when to look again.
    pub fn tick(&mut self, now: Instant) -> Option<Instant> {
        let mut due = Vec::new();
        let mut next: Option<Instant> = None;
        for (uid, entry) in &self.entries {
            let at = match entry.place {
                Place::Backoff => entry.waiting.rejected_at + backoff(entry.waiting.attempts),
                Place::Unschedulable => entry.waiting.rejected_at + LONGEST_WAIT,
                _ => continue,
            };
            if at <= now {
                due.push(uid.clone());
            } else if next.is_none_or(|next| at < next) {
                next = Some(at);
            }
        }
        for uid in due {
            self.activate(&uid);
        }
        next
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Pods nominated to a node: room was made for them there, which pods of lower priority must not take.
    pub fn nominated(&self) -> impl Iterator<Item = &Arc<PodInfo>> {
        self.entries.values().map(|entry| &entry.waiting.pod).filter(|pod| pod.nominated_node().is_some())
    }

    fn wake(&mut self, uid: &str, event: ClusterEvent, now: Instant) {
        let Some(entry) = self.entries.get_mut(uid) else { return };
        if entry.place != Place::Unschedulable {
            return;
        }
        let helps = event == ClusterEvent::Timeout
            || self.plugins.iter().any(|p| entry.waiting.rejected_by.contains(p.name()) && p.events().contains(&event));
        if !helps {
            return;
        }
        if entry.waiting.rejected_at + backoff(entry.waiting.attempts) > now {
            entry.place = Place::Backoff;
        } else {
            self.activate(uid);
        }
    }

    fn activate(&mut self, uid: &str) {
        let Some(entry) = self.entries.get_mut(uid) else { return };
        self.sequence += 1;
        entry.place = Place::Active;
        entry.sequence = self.sequence;
        self.active.push(Ticket {
            priority: entry.waiting.pod.priority,
            since: entry.waiting.since,
            sequence: self.sequence,
            uid: uid.to_owned(),
        });
    }
}

fn backoff(attempts: u32) -> Duration {
    let doublings = attempts.saturating_sub(1).min(10);
    FIRST_BACKOFF.saturating_mul(1 << doublings).min(LAST_BACKOFF)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plugins::default_plugins;
    use crate::testing::pod;

    fn queue() -> (Queue, Instant) {
        (Queue::new(default_plugins()), Instant::now())
    }

    #[test]
    fn priority_first_then_age() {
        let (mut queue, now) = queue();
        queue.put(pod("old").info(), now);
        queue.put(pod("young").info(), now + Duration::from_secs(1));
        queue.put(pod("high").priority(10).info(), now + Duration::from_secs(2));
        let order: Vec<String> = std::iter::from_fn(|| queue.pop()).map(|w| w.pod.uid.clone()).collect();
        assert_eq!(order, ["high", "old", "young"]);
    }

    #[test]
    fn only_events_that_could_help_wake_a_pod() {
        let (mut queue, now) = queue();
        queue.put(pod("p").info(), now);
        queue.pop().unwrap();
        queue.reject("p", HashSet::from(["NodeResourcesFit"]), now);
        let later = now + Duration::from_secs(20);
        queue.on_event(ClusterEvent::NodeLabelsChanged, later);
        assert!(queue.pop().is_none());
        queue.on_event(ClusterEvent::AssignedPodGone, later);
        assert_eq!(queue.pop().unwrap().attempts, 2);
    }

    #[test]
    fn an_event_during_the_attempt_is_not_lost() {
        let (mut queue, now) = queue();
        queue.put(pod("p").info(), now);
        queue.pop().unwrap();
        queue.on_event(ClusterEvent::NodeAdded, now);
        queue.reject("p", HashSet::from(["NodeResourcesFit"]), now);
        assert!(queue.pop().is_none(), "the back-off is respected");
        let next = queue.tick(now).unwrap();
        assert_eq!(next, now + FIRST_BACKOFF);
        queue.tick(next);
        assert!(queue.pop().is_some());
    }

    #[test]
    fn gates_hold_a_pod() {
        let (mut queue, now) = queue();
        queue.put(pod("p").gate("wait").info(), now);
        assert!(queue.pop().is_none());
        queue.put(pod("p").info(), now);
        assert!(queue.pop().is_some());
    }

    #[test]
    fn backoff_doubles_to_its_limit() {
        let seconds: Vec<u64> = (1..=6).map(|n| backoff(n).as_secs()).collect();
        assert_eq!(seconds, [1, 2, 4, 8, 10, 10]);
    }
}
