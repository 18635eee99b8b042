//! How many replicas a metric asks for: upstream's published algorithm, with its rules for pods that are not ready or
//! have no figures. Pure.
//!
//! Amounts are in thousandths of the metric's unit.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;

use super::requests::requests;
use crate::common::{after, is_deleted, name, pods};

/// One pod's figure: the mean over the window that ends at the timestamp.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PodMetric {
    pub value: i64,
    pub timestamp: Timestamp,
    pub window: Duration,
}

/// By the pods' names.
pub type PodMetrics = BTreeMap<String, PodMetric>;

/// How far the ratio of use to target may be from 1 before anything is done.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tolerances {
    pub down: f64,
    pub up: f64,
}

impl Tolerances {
    fn cover(self, ratio: f64) -> bool {
        (1.0 - self.down..=1.0 + self.up).contains(&ratio)
    }
}

/// What is known of the pods besides their figures.
pub struct Scaled<'a> {
    pub pods: &'a [Arc<Pod>],
    pub current: i32,
    pub tolerances: Tolerances,
    /// For so long after its start a pod's CPU figures count only if it is ready and was so all the time.
    pub cpu_initialization: Duration,
    /// A pod that became unready within this time after its start has never been ready.
    pub initial_readiness: Duration,
    pub now: Timestamp,
}

/// What each pod shall use of a metric.
pub enum Goal<'a> {
    /// This amount.
    Amount(i64),
    /// This percentage of what the pod (or the container, unless it is empty) requests of the resource.
    Utilization { percent: i32, resource: &'a str, container: &'a str },
}

#[derive(Clone, Debug, PartialEq)]
pub struct Proposal {
    pub replicas: i32,
    /// In percent of the requests.
    pub utilization: Option<i32>,
    /// What a pod uses in the mean, or for a value of the whole the value.
    pub usage: i64,
}

/// Why no number of replicas can be told.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum Missing {
    #[error("no pods returned by selector while calculating replica count")]
    Pods,
    #[error("did not receive metrics for targeted pods (pods might be unready)")]
    Metrics,
    #[error("no metrics returned matched known pods")]
    Match,
    #[error("missing request for {resource} in container {container} of Pod {pod}")]
    Request { resource: String, container: String, pod: String },
    #[error("missing pod-level request for {resource} in Pod {pod}")]
    PodRequest { resource: String, pod: String },
    #[error("container {container} not found in Pod {pod}")]
    Container { container: String, pod: String },
}

/// A goal with what is needed to compare figures with it.
enum Measure {
    Amount(i64),
    Utilization { percent: i32, requests: BTreeMap<String, i64> },
}

struct Usage {
    /// Of use to goal.
    ratio: f64,
    utilization: Option<i32>,
    mean: i64,
}

impl Measure {
    fn usage(&self, metrics: &PodMetrics) -> Result<Usage, Missing> {
        match self {
            Self::Amount(goal) => {
                let total: i128 = metrics.values().map(|metric| i128::from(metric.value)).sum();
                let mean = mean(total, metrics.len());
                Ok(Usage { ratio: mean as f64 / *goal as f64, utilization: None, mean })
            }
            Self::Utilization { percent, requests } => {
                let known = metrics.iter().filter_map(|(pod, metric)| Some((metric.value, *requests.get(pod)?)));
                let add = |(used, requested, count): (i128, i128, usize), (value, request): (i64, i64)| {
                    (used + i128::from(value), requested + i128::from(request), count + 1)
                };
                let (used, requested, count) = known.fold((0, 0, 0), add);
                if requested == 0 {
                    return Err(Missing::Match);
                }
                let utilization = saturate(used * 100 / requested);
                let ratio = f64::from(utilization) / f64::from(*percent);
                Ok(Usage { ratio, utilization: Some(utilization), mean: mean(used, count) })
            }
        }
    }

    /// What a pod without figures is taken to use when fewer pods would do: all that it may, so that none goes for want
    /// of figures.
    fn assumed(&self, pod: &str) -> i64 {
        match self {
            Self::Amount(goal) => *goal,
            Self::Utilization { percent, requests } => {
                let request = i128::from(requests.get(pod).copied().unwrap_or(0));
                let amount = request * i128::from((*percent).max(100)) / 100;
                i64::try_from(amount).unwrap_or(i64::MAX)
            }
        }
    }
}

fn mean(total: i128, count: usize) -> i64 {
    // There are far fewer pods than 2^64.
    let mean = total / (count.max(1) as i128);
    i64::try_from(mean).unwrap_or(if mean < 0 { i64::MIN } else { i64::MAX })
}

fn saturate(number: i128) -> i32 {
    i32::try_from(number).unwrap_or(if number < 0 { i32::MIN } else { i32::MAX })
}

/// The replicas for figures of single pods.
pub fn by_pods(
    scaled: &Scaled<'_>,
    resource: Option<&str>,
    goal: &Goal<'_>,
    mut metrics: PodMetrics,
) -> Result<Proposal, Missing> {
    if scaled.pods.is_empty() {
        return Err(Missing::Pods);
    }
    let groups = Groups::of(scaled, resource, &metrics);
    metrics.retain(|pod, _| !groups.ignored.contains(pod) && !groups.unready.contains(pod));
    if metrics.is_empty() {
        return Err(Missing::Metrics);
    }
    let measure = match *goal {
        Goal::Amount(goal) => Measure::Amount(goal),
        Goal::Utilization { percent, resource, container } => {
            Measure::Utilization { percent, requests: requests(scaled.pods, resource, container)? }
        }
    };
    let usage = measure.usage(&metrics)?;
    let propose = |replicas| Proposal { replicas, utilization: usage.utilization, usage: usage.mean };
    let up_with_unready = usage.ratio > 1.0 && !groups.unready.is_empty();
    if !up_with_unready && groups.missing.is_empty() {
        let enough = scaled.tolerances.cover(usage.ratio);
        return Ok(propose(if enough { scaled.current } else { ceil(usage.ratio * groups.ready as f64) }));
    }

    // Pods whose figures are not known dampen the change: for a smaller number they count fully, for a larger not at all.
    let assume = |value| PodMetric { value, timestamp: scaled.now, window: Duration::ZERO };
    if usage.ratio < 1.0 {
        metrics.extend(groups.missing.iter().map(|pod| (pod.clone(), assume(measure.assumed(pod)))));
    } else if usage.ratio > 1.0 {
        metrics.extend(groups.missing.iter().chain(&groups.unready).map(|pod| (pod.clone(), assume(0))));
    }
    let ratio = measure.usage(&metrics)?.ratio;
    let replicas = ceil(ratio * metrics.len() as f64);
    let turns = (usage.ratio < 1.0 && ratio > 1.0) || (usage.ratio > 1.0 && ratio < 1.0);
    let contradicts = (ratio < 1.0 && replicas > scaled.current) || (ratio > 1.0 && replicas < scaled.current);
    let stays = scaled.tolerances.cover(ratio) || turns || contradicts;
    Ok(propose(if stays { scaled.current } else { replicas }))
}

/// The replicas for one value that all pods together shall bring to the goal.
pub fn by_value(scaled: &Scaled<'_>, goal: i64, usage: i64) -> Result<Proposal, Missing> {
    let ratio = usage as f64 / goal as f64;
    let replicas = if scaled.current == 0 {
        ceil(ratio)
    } else if scaled.tolerances.cover(ratio) {
        scaled.current
    } else if scaled.pods.is_empty() {
        return Err(Missing::Pods);
    } else {
        let ready = scaled.pods.iter().filter(|pod| pods::phase(pod) == "Running" && pods::is_ready(pod)).count();
        ceil(ratio * ready as f64)
    };
    Ok(Proposal { replicas, utilization: None, usage })
}

/// The replicas among which the value is to be shared so that each has the goal. `have` is how many there are.
pub fn by_share(have: i32, tolerances: Tolerances, goal: i64, usage: i64) -> Proposal {
    let ratio = usage as f64 / (goal as f64 * f64::from(have));
    let replicas = if tolerances.cover(ratio) { have } else { ceil(usage as f64 / goal as f64) };
    // Without any replica nobody has a share; the whole is told then.
    Proposal { replicas, utilization: None, usage: (usage as f64 / f64::from(have.max(1))).ceil() as i64 }
}

/// Saturating, as conversions of floats are.
fn ceil(replicas: f64) -> i32 {
    replicas.ceil() as i32
}

/// The pods by what their figures are worth.
#[derive(Default)]
struct Groups {
    ready: usize,
    unready: BTreeSet<String>,
    missing: BTreeSet<String>,
    ignored: BTreeSet<String>,
}

impl Groups {
    fn of(scaled: &Scaled<'_>, resource: Option<&str>, metrics: &PodMetrics) -> Self {
        let mut groups = Self::default();
        for pod in scaled.pods {
            let name = name(&pod.metadata).to_owned();
            if is_deleted(&pod.metadata) || pods::phase(pod) == "Failed" {
                groups.ignored.insert(name);
            } else if pods::phase(pod) == "Pending" {
                groups.unready.insert(name);
            } else {
                match metrics.get(&name) {
                    None => {
                        groups.missing.insert(name);
                    }
                    Some(metric) if resource == Some("cpu") && scaled.is_warming_up(pod, metric) => {
                        groups.unready.insert(name);
                    }
                    Some(_) => groups.ready += 1,
                }
            }
        }
        groups
    }
}

impl Scaled<'_> {
    /// Starting takes CPU that serving does not: whether the pod's figure may come from that.
    fn is_warming_up(&self, pod: &Pod, metric: &PodMetric) -> bool {
        let started = pod.status.as_ref().and_then(|status| status.start_time.as_ref()).map(|time| time.0);
        let (Some(ready), Some(started)) = (pods::condition(pod, "Ready"), started) else { return true };
        let unready = ready.status == "False";
        let changed = ready.last_transition_time.as_ref().map_or(Timestamp::MIN, |time| time.0);
        if after(started, self.cpu_initialization) > self.now {
            unready || metric.timestamp < after(changed, metric.window)
        } else {
            unready && after(started, self.initial_readiness) > changed
        }
    }
}
