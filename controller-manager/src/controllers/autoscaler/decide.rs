//! One round of an autoscaler: from the target's scale and the metrics to the number of replicas to set and the status
//! that tells about it. Pure: it asks for the metrics only if they decide anything.

use std::sync::Arc;

use apimachinery::controller::{EventRecord, EventType, object_reference};
use apimachinery::meta::Quantity;
use jiff::Timestamp;
use k8s_openapi::api::autoscaling::v2::{
    HPAScalingRules, HorizontalPodAutoscaler, HorizontalPodAutoscalerCondition, HorizontalPodAutoscalerStatus,
    MetricStatus,
};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::Settings;
use super::limits::{History, Range};
use super::metric::{Measured, Measurer, Samples, Unmeasured};
use super::replicas::{Scaled, Tolerances};

const ABLE: &str = "AbleToScale";
const ACTIVE: &str = "ScalingActive";
const LIMITED: &str = "ScalingLimited";
const ZERO: &str = "ScaledToZero";

/// What the target says about its replicas.
#[derive(Clone, Debug, Default)]
pub struct Replicas {
    pub wanted: i32,
    pub there: i32,
}

/// What the number of replicas alone says.
#[derive(Debug, PartialEq)]
pub enum Glance {
    /// The metrics decide.
    Measure,
    /// The number is out of bounds.
    Set(Change),
    /// Somebody has set it to zero, and it stays there.
    Disabled,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    pub replicas: i32,
    pub reason: String,
}

/// An autoscaler being looked at, with the status that it is to have.
pub struct Round<'a> {
    hpa: &'a HorizontalPodAutoscaler,
    settings: &'a Settings,
    now: Timestamp,
    pub status: HorizontalPodAutoscalerStatus,
    pub events: Vec<EventRecord>,
}

impl<'a> Round<'a> {
    pub fn new(hpa: &'a HorizontalPodAutoscaler, settings: &'a Settings, now: Timestamp) -> Self {
        Self { hpa, settings, now, status: hpa.status.clone().unwrap_or_default(), events: Vec::new() }
    }

    /// The target's scale cannot be read.
    pub fn no_scale(&mut self, error: &str) {
        self.warn("FailedGetScale", error.to_owned());
        let message = format!("the HPA controller was unable to get the target's current scale: {error}");
        self.condition(ABLE, false, "FailedGetScale", &message);
    }

    /// The scale has been read: whether its number decides already.
    pub fn glance(&mut self, current: i32) -> Glance {
        let message = "the HPA controller was able to get the target's current scale";
        self.condition(ABLE, true, "SucceededGetScale", message);
        // Metrics that are not looked at are told no longer.
        self.status.current_metrics = None;
        let (min, max) = self.bounds();
        let set = |replicas, reason: &str| Glance::Set(Change { replicas, reason: reason.to_owned() });
        if current == 0 {
            let scaled_here = self.was_scaled_to_zero();
            if scaled_here && (min != 0 || self.may_be_zero()) {
                return Glance::Measure;
            }
            let message = "scaling is disabled since the replica count of the target is zero";
            self.condition(ACTIVE, false, "ScalingDisabled", message);
            Glance::Disabled
        } else if current > max {
            set(max, "Current number of replicas above Spec.MaxReplicas")
        } else if current < min {
            set(min, "Current number of replicas below Spec.MinReplicas")
        } else {
            Glance::Measure
        }
    }

    /// The target's selector cannot be used.
    pub fn bad_selector(&mut self, event: &str, reason: &str, message: &str, error: &str) {
        self.warn(event, error.to_owned());
        self.condition(ACTIVE, false, reason, message);
    }

    /// The change that the metrics ask for, if any; `samples` go with the metrics of the spec.
    pub fn measured(
        &mut self,
        replicas: &Replicas,
        pods: &[Arc<Pod>],
        samples: Vec<Result<Samples, String>>,
        history: &mut History,
    ) -> Result<Option<Change>, String> {
        let current = replicas.wanted;
        let results = self.measure(replicas, pods, samples);
        let (statuses, outcome) = combine(results, current);
        self.status.current_metrics = (!statuses.is_empty()).then_some(statuses);
        let (proposed, metric) = match outcome {
            Ok((proposed, metric)) => (proposed, metric),
            Err((failure, account)) => {
                if let Some(failure) = failure {
                    let message = format!("the HPA was unable to compute the replica count: {}", failure.cause);
                    self.condition(ACTIVE, false, failure.reason, &message);
                }
                return Err(account);
            }
        };
        let message = format!("the HPA was able to successfully calculate a replica count from {metric}");
        self.condition(ACTIVE, true, "ValidMetricFound", &message);
        let mut reason = match proposed {
            _ if proposed > current => format!("{metric} above target"),
            _ if proposed < current => "All metrics below target".to_owned(),
            _ => String::new(),
        };
        let (min, max) = self.bounds();
        let behavior = self.hpa.spec.behavior.as_ref();
        let range = Range { current, proposed, min, max };
        let limited = history.limit(behavior, self.settings.downscale_stabilization, &range, self.now);
        self.condition(ABLE, true, limited.able.0, limited.able.1);
        self.condition(LIMITED, limited.limited, limited.limit.0, limited.limit.1);
        let mut desired = limited.replicas;
        if current == 0 && desired < min && self.was_scaled_to_zero() {
            desired = min;
            if reason.is_empty() {
                "Current number of replicas below Spec.MinReplicas".clone_into(&mut reason);
            }
        }
        Ok((desired != current).then_some(Change { replicas: desired, reason }))
    }

    fn measure(
        &mut self,
        replicas: &Replicas,
        pods: &[Arc<Pod>],
        samples: Vec<Result<Samples, String>>,
    ) -> Vec<Result<Measured, Unmeasured>> {
        let measurer = Measurer {
            scaled: Scaled {
                pods,
                current: replicas.wanted,
                tolerances: self.tolerances(),
                cpu_initialization: self.settings.cpu_initialization_period,
                initial_readiness: self.settings.initial_readiness_delay,
                now: self.now,
            },
            namespace: self.hpa.metadata.namespace.as_deref().unwrap_or(""),
            status_replicas: replicas.there,
        };
        let specs = self.hpa.spec.metrics.iter().flatten();
        let results: Vec<_> = specs.zip(samples).map(|(spec, samples)| measurer.measure(spec, samples)).collect();
        for failure in results.iter().filter_map(|result| result.as_ref().err()) {
            // An unknown type of metric is the one failure that upstream has no event for.
            if failure.reason != "InvalidMetricSourceType" {
                self.warn(failure.reason, failure.cause.clone());
            }
        }
        results
    }

    /// Nothing could be computed: the replicas are told as they are.
    pub fn uncomputed(&mut self, current: i32, account: &str) {
        self.warn("FailedComputeMetricsReplicas", account.to_owned());
        let desired = self.status.desired_replicas;
        self.tell(current, desired);
    }

    /// The change could not be written.
    pub fn unchanged(&mut self, current: i32, change: &Change, error: &str) {
        let Change { replicas, reason } = change;
        self.warn("FailedRescale", format!("New size: {replicas}; reason: {reason}; error: {error}"));
        let message = format!("the HPA controller was unable to update the target scale: {error}");
        self.condition(ABLE, false, "FailedUpdateScale", &message);
        let desired = self.status.desired_replicas;
        self.tell(current, desired);
    }

    /// The change has been written.
    pub fn changed(&mut self, current: i32, change: &Change) {
        let Change { replicas, reason } = change;
        let message = format!("the HPA controller was able to update the target scale to {replicas}");
        self.condition(ABLE, true, "SucceededRescale", &message);
        self.event(EventType::Normal, "SuccessfulRescale", format!("New size: {replicas}; reason: {reason}"));
        if current > 0 && *replicas == 0 && self.bounds().0 == 0 && self.may_be_zero() {
            self.condition(ZERO, true, "ScaledToZero", "the HPA controller scaled the workload to zero");
        } else {
            self.condition(ZERO, false, "NotScaledToZero", "the HPA controller did not scale the workload to zero");
        }
        self.tell(current, *replicas);
        self.status.last_scale_time = Some(Time(self.now));
    }

    /// The numbers of the status.
    pub fn tell(&mut self, current: i32, desired: i32) {
        self.status.current_replicas = Some(current);
        self.status.desired_replicas = desired;
        self.status.observed_generation = self.hpa.metadata.generation;
    }

    /// The bounds of the spec.
    fn bounds(&self) -> (i32, i32) {
        (self.hpa.spec.min_replicas.unwrap_or(1), self.hpa.spec.max_replicas)
    }

    /// Only metrics that do not come from the pods can tell when the first one is needed.
    fn may_be_zero(&self) -> bool {
        let mut specs = self.hpa.spec.metrics.iter().flatten();
        specs.any(|metric| metric.type_ == "Object" || metric.type_ == "External")
    }

    fn was_scaled_to_zero(&self) -> bool {
        let mut conditions = self.status.conditions.iter().flatten();
        conditions.any(|condition| condition.type_ == ZERO && condition.status == "True")
    }

    fn tolerances(&self) -> Tolerances {
        let behavior = self.hpa.spec.behavior.as_ref();
        let own = |rules: Option<&HPAScalingRules>| {
            let own = rules.and_then(|rules| rules.tolerance.as_ref()?.0.parse::<Quantity>().ok());
            own.map_or(self.settings.tolerance, |tolerance| tolerance.as_f64())
        };
        Tolerances {
            down: own(behavior.and_then(|behavior| behavior.scale_down.as_ref())),
            up: own(behavior.and_then(|behavior| behavior.scale_up.as_ref())),
        }
    }

    fn warn(&mut self, reason: &str, message: String) {
        self.event(EventType::Warning, reason, message);
    }

    fn event(&mut self, type_: EventType, reason: &str, message: String) {
        self.events.push(EventRecord::new(object_reference(self.hpa), type_, reason, message));
    }

    fn condition(&mut self, type_: &str, status: bool, reason: &str, message: &str) {
        let status = if status { "True" } else { "False" };
        let conditions = self.status.conditions.get_or_insert_default();
        let index = conditions.iter().position(|condition| condition.type_ == type_).unwrap_or_else(|| {
            let new = HorizontalPodAutoscalerCondition { type_: type_.to_owned(), ..Default::default() };
            conditions.push(new);
            conditions.len() - 1
        });
        let condition = &mut conditions[index];
        if condition.status != status {
            condition.last_transition_time = Some(Time(self.now));
        }
        status.clone_into(&mut condition.status);
        condition.reason = Some(reason.to_owned());
        condition.message = Some(message.to_owned());
    }
}

type Outcome = Result<(i32, String), (Option<Unmeasured>, String)>;

/// The largest proposal. Metrics without figures stand in the way of fewer replicas: they might ask for more.
fn combine(results: Vec<Result<Measured, Unmeasured>>, current: i32) -> (Vec<MetricStatus>, Outcome) {
    let count = results.len();
    let mut statuses = Vec::with_capacity(count);
    let mut best: Option<(i32, String)> = None;
    let mut failures = Vec::new();
    for result in results {
        match result {
            Ok(measured) => {
                statuses.push(measured.status);
                if best.as_ref().is_none_or(|(most, _)| *most == 0 || measured.replicas > *most) {
                    best = Some((measured.replicas, measured.name));
                }
            }
            Err(failure) => {
                statuses.push(MetricStatus::default());
                failures.push(failure);
            }
        }
    }
    let failed = failures.len();
    let account = |failure: &Unmeasured| {
        format!("invalid metrics ({failed} invalid out of {count}), first error is: {}", failure.account)
    };
    let outcome = match (best, failures.into_iter().next()) {
        (Some(best), None) => Ok(best),
        (Some(best), Some(_)) if best.0 >= current => Ok(best),
        (_, Some(failure)) => {
            let account = account(&failure);
            Err((Some(failure), account))
        }
        (None, None) => Err((None, "the autoscaler has no metrics".to_owned())),
    };
    (statuses, outcome)
}
