//! When the node is short of something: the configured thresholds against what was observed. Pure, but for the memory
//! of when a threshold was first met and when a shortage was last seen.

use std::collections::BTreeMap;
use std::time::Duration;

use apimachinery::meta::Quantity;
use jiff::Timestamp;

use crate::config::KubeletConfiguration;
use crate::node::status::{Pressure, threshold as amount};

/// What can run short, in the order in which shortages are met: memory first, it kills fastest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Signal {
    Memory,
    NodeFs,
    NodeFsInodes,
    ImageFs,
    ImageFsInodes,
    Pids,
}

impl Signal {
    const ALL: [Self; 6] =
        [Self::Memory, Self::NodeFs, Self::NodeFsInodes, Self::ImageFs, Self::ImageFsInodes, Self::Pids];

    /// As the configuration names it.
    fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory.available",
            Self::NodeFs => "nodefs.available",
            Self::NodeFsInodes => "nodefs.inodesFree",
            Self::ImageFs => "imagefs.available",
            Self::ImageFsInodes => "imagefs.inodesFree",
            Self::Pids => "pid.available",
        }
    }

    /// As users read it in messages.
    pub fn resource(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::NodeFs | Self::ImageFs => "ephemeral-storage",
            Self::NodeFsInodes | Self::ImageFsInodes => "inodes",
            Self::Pids => "pids",
        }
    }

    pub fn is_disk(self) -> bool {
        !matches!(self, Self::Memory | Self::Pids)
    }

    fn pressure(self) -> Pressure {
        Pressure { memory: self == Self::Memory, disk: self.is_disk(), pids: self == Self::Pids }
    }
}

/// Known to upstream: of a disk that this kubelet takes for one with another, or another way to count memory.
const NOT_OBSERVED: [&str; 3] = ["allocatableMemory.available", "containerfs.available", "containerfs.inodesFree"];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Observation {
    pub available: i64,
    pub capacity: i64,
}

pub type Observations = BTreeMap<Signal, Observation>;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Threshold {
    pub signal: Signal,
    /// A quantity, or a percentage of the capacity.
    pub value: String,
    /// How long it must be met before pods are evicted; none for a hard one.
    pub grace: Option<Duration>,
    /// Once met, so much more must be available than the threshold asks for.
    reclaim: Option<String>,
}

#[derive(Debug, thiserror::Error)]
pub enum ThresholdError {
    #[error("{field} names {signal:?}, which is no signal of this kubelet")]
    Signal { field: &'static str, signal: String },
    #[error("{field}.{signal}: {value:?} is neither a quantity nor a percentage")]
    Value { field: &'static str, signal: String, value: String },
    #[error("evictionSoft.{0} needs a grace period in evictionSoftGracePeriod")]
    NoGrace(&'static str),
}

/// All thresholds of the configuration in the order in which they are acted upon.
pub fn configured(config: &KubeletConfiguration) -> Result<Vec<Threshold>, ThresholdError> {
    let check = |field, map: &BTreeMap<String, String>| {
        for (signal, value) in map {
            if NOT_OBSERVED.contains(&signal.as_str()) {
                tracing::warn!(field, signal, "a threshold that has no effect in this kubelet");
                continue;
            }
            if !Signal::ALL.iter().any(|known| known.name() == signal) {
                return Err(ThresholdError::Signal { field, signal: signal.clone() });
            }
            let percent = value.strip_suffix('%').map(|number| number.parse::<f64>().is_ok());
            if !percent.unwrap_or_else(|| value.parse::<Quantity>().is_ok()) {
                return Err(ThresholdError::Value { field, signal: signal.clone(), value: value.clone() });
            }
        }
        Ok(())
    };
    check("evictionHard", &config.eviction_hard)?;
    check("evictionSoft", &config.eviction_soft)?;
    check("evictionMinimumReclaim", &config.eviction_minimum_reclaim)?;
    let mut found = Vec::new();
    for signal in Signal::ALL {
        let threshold = |value: &String, grace| Threshold {
            signal,
            value: value.clone(),
            grace,
            reclaim: config.eviction_minimum_reclaim.get(signal.name()).cloned(),
        };
        // Zero switches a threshold off.
        let of = |map: &BTreeMap<String, String>| map.get(signal.name()).filter(|v| amount(v, 1 << 40) > 0).cloned();
        found.extend(of(&config.eviction_hard).map(|value| threshold(&value, None)));
        if let Some(value) = of(&config.eviction_soft) {
            let grace = config.eviction_soft_grace_period.get(signal.name());
            let grace = grace.ok_or(ThresholdError::NoGrace(signal.name()))?;
            found.push(threshold(&value, Some(grace.0)));
        }
    }
    Ok(found)
}

impl Threshold {
    fn is_met(&self, observations: &Observations, was_met: bool) -> bool {
        let Some(seen) = observations.get(&self.signal) else { return false };
        let more = self.reclaim.as_ref().filter(|_| was_met).map_or(0, |text| amount(text, seen.capacity));
        seen.available < amount(&self.value, seen.capacity).saturating_add(more)
    }

    /// The value in bytes or pieces, as messages show it.
    pub fn amount(&self, observations: &Observations) -> i64 {
        amount(&self.value, observations.get(&self.signal).map_or(0, |seen| seen.capacity))
    }
}

/// What was seen before.
#[derive(Debug, Default)]
pub struct History {
    /// Since when each threshold has been met, by its place in the list.
    met_since: BTreeMap<usize, Timestamp>,
    /// When each kind of shortage was last seen.
    last_seen: [Option<Timestamp>; 3],
}

/// What follows from one look.
#[derive(Debug, PartialEq, Eq)]
pub struct Finding<'a> {
    pub pressure: Pressure,
    /// Thresholds that ask for evictions now.
    pub due: Vec<&'a Threshold>,
}

impl History {
    /// `transition` is how long a shortage is still reported after it was last seen.
    pub fn look<'a>(
        &mut self,
        thresholds: &'a [Threshold],
        observations: &Observations,
        transition: Duration,
        now: Timestamp,
    ) -> Finding<'a> {
        let mut due = Vec::new();
        let mut seen = Pressure::default();
        for (index, threshold) in thresholds.iter().enumerate() {
            if !threshold.is_met(observations, self.met_since.contains_key(&index)) {
                self.met_since.remove(&index);
                continue;
            }
            let since = *self.met_since.entry(index).or_insert(now);
            let pressure = threshold.signal.pressure();
            seen.memory |= pressure.memory;
            seen.disk |= pressure.disk;
            seen.pids |= pressure.pids;
            let age = Duration::try_from(now.duration_since(since)).unwrap_or_default();
            if threshold.grace.is_none_or(|grace| age >= grace) {
                due.push(threshold);
            }
        }
        let [memory, disk, pids] = &mut self.last_seen;
        let lasting = |last: &mut Option<Timestamp>, seen: bool| {
            if seen {
                *last = Some(now);
            }
            let age = last.map(|last| Duration::try_from(now.duration_since(last)).unwrap_or_default());
            age.is_some_and(|age| age == Duration::ZERO || age < transition)
        };
        let pressure = Pressure {
            memory: lasting(memory, seen.memory),
            disk: lasting(disk, seen.disk),
            pids: lasting(pids, seen.pids),
        };
        Finding { pressure, due }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::GoDuration;

    fn config() -> KubeletConfiguration {
        let map = |pairs: &[(&str, &str)]| pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        KubeletConfiguration {
            eviction_hard: map(&[("memory.available", "100"), ("nodefs.available", "10%")]),
            eviction_soft: map(&[("memory.available", "200")]),
            eviction_soft_grace_period: [("memory.available".to_owned(), GoDuration::seconds(30))].into(),
            eviction_minimum_reclaim: map(&[("nodefs.available", "50")]),
            ..KubeletConfiguration::default()
        }
    }

    #[test]
    fn shortages_come_and_linger() {
        let thresholds = configured(&config()).unwrap();
        let mut history = History::default();
        let mut look = |second: i64, memory: i64, disk: i64| {
            let observations = Observations::from([
                (Signal::Memory, Observation { available: memory, capacity: 1000 }),
                (Signal::NodeFs, Observation { available: disk, capacity: 1000 }),
            ]);
            let now = Timestamp::from_second(second).unwrap();
            let finding = history.look(&thresholds, &observations, Duration::from_secs(60), now);
            let due: Vec<_> = finding.due.iter().map(|t| (t.signal, t.grace.is_some())).collect();
            (finding.pressure.memory, finding.pressure.disk, due)
        };
        assert_eq!(look(0, 500, 500), (false, false, vec![]));
        assert_eq!(look(10, 150, 500), (true, false, vec![]), "soft: not yet");
        assert_eq!(look(40, 150, 500), (true, false, vec![(Signal::Memory, true)]));
        assert_eq!(look(50, 50, 500), (true, false, vec![(Signal::Memory, false), (Signal::Memory, true)]));
        assert_eq!(look(60, 500, 99), (true, true, vec![(Signal::NodeFs, false)]));
        assert_eq!(look(70, 500, 120), (true, true, vec![(Signal::NodeFs, false)]), "50 more are to be reclaimed");
        assert_eq!(look(80, 500, 150), (true, true, vec![]));
        assert_eq!(look(140, 500, 500), (false, false, vec![]));
    }

    #[test]
    fn mistakes_are_named() {
        let mut wrong = config();
        wrong.eviction_hard.insert("memory.availble".into(), "1".into());
        assert!(matches!(configured(&wrong), Err(ThresholdError::Signal { .. })));
        let mut wrong = config();
        wrong.eviction_soft_grace_period.clear();
        assert!(matches!(configured(&wrong), Err(ThresholdError::NoGrace("memory.available"))));
        let mut wrong = config();
        wrong.eviction_hard.insert("pid.available".into(), "ten".into());
        assert!(matches!(configured(&wrong), Err(ThresholdError::Value { .. })));
    }
}
