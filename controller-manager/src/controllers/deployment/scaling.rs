//! How many replicas each replica set may have: the arithmetic of rolling updates and of scaling in their middle.

use std::cmp::Reverse;
use std::sync::Arc;

use k8s_openapi::api::apps::v1::ReplicaSet;

use super::Rollout;
use super::replica_sets::{DESIRED, MAX, available};
use crate::common::annotation;
use crate::common::rollout::resolve;

impl Rollout<'_> {
    fn is_rolling(&self) -> bool {
        self.spec.strategy.as_ref().and_then(|s| s.type_.as_deref()).unwrap_or("RollingUpdate") == "RollingUpdate"
    }

    /// The numbers of pods that may be too many and too few during a rolling update; never both zero.
    fn bounds(&self) -> (i32, i32) {
        if !self.is_rolling() {
            return (0, 0);
        }
        let rolling = self.spec.strategy.as_ref().and_then(|strategy| strategy.rolling_update.as_ref());
        let surge = resolve(rolling.and_then(|r| r.max_surge.as_ref()), self.wanted(), true);
        let unavailable = resolve(rolling.and_then(|r| r.max_unavailable.as_ref()), self.wanted(), false);
        if surge == 0 && unavailable == 0 { (0, 1) } else { (surge, unavailable) }
    }

    pub fn max_surge(&self) -> i32 {
        self.bounds().0
    }

    pub fn max_unavailable(&self) -> i32 {
        let (_, unavailable) = self.bounds();
        if self.wanted() == 0 { 0 } else { unavailable.min(self.wanted()) }
    }

    /// The size of a new replica set that has `current` replicas.
    pub fn new_size(&self, current: i32) -> i32 {
        if !self.is_rolling() {
            return self.wanted();
        }
        let room = self.wanted().saturating_add(self.max_surge()) - self.sets.total();
        if room <= 0 { current } else { current + room.min(self.wanted() - current) }
    }

    /// Brings the new set up as far as it may; true when that changed something.
    pub fn scale_up_new(&mut self) -> bool {
        let Some(new) = self.sets.new.clone() else { return false };
        let current = self.sets.size(&new);
        let size = if current > self.wanted() { self.wanted() } else { self.new_size(current) };
        size != current && self.resize(&new, size)
    }

    pub fn scale_new_to(&mut self, size: i32) -> bool {
        let new = self.sets.new.clone();
        new.is_some_and(|new| self.resize(&new, size))
    }

    pub fn scale_old_to_zero(&mut self) -> bool {
        let mut scaled = false;
        for set in self.sets.old.clone() {
            scaled |= self.sets.size(&set) > 0 && self.resize(&set, 0);
        }
        scaled
    }

    /// Takes replicas from old sets as far as enough pods stay available: unhealthy ones first.
    pub fn scale_down_old(&mut self) {
        let min_available = self.wanted() - self.max_unavailable();
        let new_unavailable = self.sets.new.as_ref().map_or(0, |new| self.sets.size(new) - available(new));
        let mut budget = self.sets.total() - min_available - new_unavailable;
        for set in self.sets.old.clone() {
            let size = self.sets.size(&set);
            let unhealthy = (size - available(&set)).min(budget);
            if unhealthy > 0 {
                self.resize(&set, size - unhealthy);
                budget -= unhealthy;
            }
        }
        if budget <= 0 {
            return;
        }
        let mut spare = self.sets.all().map(|set| available(set)).sum::<i32>() - min_available;
        for set in self.sets.old.clone() {
            let size = self.sets.size(&set);
            let surplus = size.min(spare);
            if surplus > 0 {
                self.resize(&set, size - surplus);
                spare -= surplus;
            }
        }
    }

    /// Whether the asked number has changed since the sets were last sized.
    pub fn is_scaling(&self) -> bool {
        let wanted = self.wanted();
        self.sets.active().iter().any(|set| {
            annotation(&set.metadata, DESIRED)
                .and_then(|text| text.parse::<i32>().ok())
                .is_some_and(|desired| desired != wanted)
        })
    }

    /// Scales outside of a rollout's progress: the only set takes all, several share by their sizes.
    pub fn scale_proportionally(&mut self) {
        let active = self.sets.active();
        if active.len() <= 1 {
            let only =
                active.first().cloned().or_else(|| self.sets.new.clone()).or_else(|| self.sets.old.last().cloned());
            if let Some(only) = only.filter(|set| self.sets.size(set) != self.wanted()) {
                self.resize(&only, self.wanted());
            }
            return;
        }
        if self.is_saturated() {
            self.scale_old_to_zero();
        } else if self.is_rolling() {
            self.share(active);
        }
    }

    /// The new set has everything, so that old sets need nothing.
    fn is_saturated(&self) -> bool {
        let wanted = self.wanted();
        self.sets.new.as_ref().is_some_and(|new| {
            self.sets.size(new) == wanted
                && available(new) == wanted
                && annotation(&new.metadata, DESIRED) == Some(&wanted.to_string())
        })
    }

    fn share(&mut self, mut sets: Vec<Arc<ReplicaSet>>) {
        let allowed = if self.wanted() > 0 { self.wanted().saturating_add(self.max_surge()) } else { 0 };
        let change = allowed - sets.iter().map(|set| self.sets.size(set)).sum::<i32>();
        // The largest come first and take what rounding leaves; among equals growth favours the newer, shrinking the older.
        let created = |set: &Arc<ReplicaSet>| set.metadata.creation_timestamp.as_ref().map(|time| time.0);
        if change > 0 {
            sets.sort_by_key(|set| Reverse((self.sets.size(set), created(set))));
        } else {
            sets.sort_by_key(|set| (Reverse(self.sets.size(set)), created(set)));
        }
        let mut sizes = Vec::with_capacity(sets.len());
        let mut given = 0;
        for set in &sets {
            let part = if change == 0 { 0 } else { self.part(set) };
            let rest = change - given;
            let part = if change > 0 { part.min(rest) } else { part.max(rest) };
            given += part;
            sizes.push(self.sets.size(set) + part);
        }
        if let Some(first) = sizes.first_mut() {
            *first = (*first + change - given).max(0);
        }
        for (set, size) in sets.iter().zip(sizes) {
            self.resize(set, size.max(0));
        }
    }

    /// The set's part in the change, by its part in what there was when it was last sized.
    fn part(&self, set: &ReplicaSet) -> i32 {
        let size = self.sets.size(set);
        if self.wanted() == 0 {
            return -size;
        }
        let before = annotation(&set.metadata, MAX)
            .and_then(|text| text.parse::<f64>().ok())
            .or_else(|| self.deployment.status.as_ref()?.replicas.map(f64::from))
            .filter(|max| *max > 0.0)
            .unwrap_or(1.0);
        let share = f64::from(size) * f64::from(self.wanted() + self.max_surge()) / before;
        // A share is at most i32::MAX replicas; `as` saturates.
        share.round() as i32 - size
    }
}
