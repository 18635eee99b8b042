//! Horizontal pod autoscaling: sets the replicas of anything that has a scale by what its pods use, by metrics of objects
//! or by metrics from outside. Looks at each autoscaler when its spec changes and every `--horizontal-pod-autoscaler-
//! sync-period`: metrics cannot be watched.
//!
//! The decision is pure (`decide`, and `metric`, `replicas`, `limits` below it); here the scale and the metrics are read
//! and the outcome is written.

mod decide;
mod limits;
mod metric;
mod metrics_api;
mod replicas;
mod requests;
mod targets;

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use apimachinery::controller::{
    EventRecord, EventType, Executor, Informer, ObjectKey, Plan, ReconcileError, Reconciler, Write, object_reference,
    parse_duration,
};
use apimachinery::meta::LabelSelector;
use async_trait::async_trait;
use jiff::Timestamp;
use k8s_openapi::api::autoscaling::v2::HorizontalPodAutoscaler;
use k8s_openapi::api::core::v1::Pod;
use parking_lot::Mutex;

use self::decide::{Change, Glance, Round};
use self::limits::History;
use self::metrics_api::MetricsApi;
use self::targets::{Scale, Targets};
use crate::app::Context;
use crate::common::labels;

/// Upstream's flags and their defaults.
#[derive(clap::Args, Clone, Debug)]
pub struct Settings {
    /// How often autoscalers look at their metrics.
    #[arg(long = "horizontal-pod-autoscaler-sync-period", default_value = "15s", value_parser = parse_duration)]
    pub sync_period: Duration,
    /// For so long an autoscaler does not go below what it has proposed.
    #[arg(long = "horizontal-pod-autoscaler-downscale-stabilization", default_value = "5m", value_parser = parse_duration)]
    pub downscale_stabilization: Duration,
    /// The least deviation of a metric from its target that leads to scaling, as a fraction of the target.
    #[arg(long = "horizontal-pod-autoscaler-tolerance", default_value_t = 0.1)]
    pub tolerance: f64,
    /// For so long after a pod's start its CPU figures count only if it was ready all the time.
    #[arg(long = "horizontal-pod-autoscaler-cpu-initialization-period", default_value = "5m", value_parser = parse_duration)]
    pub cpu_initialization_period: Duration,
    /// A pod that becomes unready within this time after its start has not been ready yet.
    #[arg(long = "horizontal-pod-autoscaler-initial-readiness-delay", default_value = "30s", value_parser = parse_duration)]
    pub initial_readiness_delay: Duration,
    /// How many autoscalers are looked at in parallel.
    #[arg(long = "concurrent-horizontal-pod-autoscaler-syncs", default_value_t = 5)]
    pub concurrent_syncs: usize,
}

struct Autoscaler {
    settings: Settings,
    targets: Targets,
    metrics: MetricsApi,
    executor: Executor,
    autoscalers: Arc<Informer<HorizontalPodAutoscaler>>,
    pods: Arc<Informer<Pod>>,
    memory: Mutex<HashMap<ObjectKey, Memory>>,
}

/// What an autoscaler's own object does not tell.
#[derive(Clone, Default)]
struct Memory {
    history: History,
    /// The selector of the target's pods, once it is known: no other autoscaler may have pods in it.
    selector: Option<LabelSelector>,
}

pub fn start(context: &Context) {
    let driver = &context.driver;
    let settings = context.options.autoscaler.clone();
    let workers = settings.concurrent_syncs.max(1);
    let controller = Autoscaler {
        settings,
        targets: Targets::new(driver.rest().clone()),
        metrics: MetricsApi { rest: driver.rest().clone() },
        executor: driver.executor("horizontal-pod-autoscaler"),
        autoscalers: driver.informers().of(),
        pods: driver.informers().of(),
        memory: Mutex::default(),
    };
    driver.run_reconciler(controller, workers, |controller, wiring| {
        // Its own status is no reason to look again before the period is over.
        wiring.map(&controller.autoscalers, |change| {
            let both = change.old.as_ref().zip(change.new.as_ref());
            let same = both.is_some_and(|(old, new)| old.metadata.generation == new.metadata.generation);
            change.versions().take(usize::from(!same)).map(|hpa| ObjectKey::of(&hpa.metadata)).collect()
        });
    });
}

#[async_trait]
impl Reconciler for Autoscaler {
    fn name(&self) -> &'static str {
        "horizontal-pod-autoscaler"
    }

    async fn reconcile(&self, key: &ObjectKey) -> Result<Option<Duration>, ReconcileError> {
        let Some(hpa) = self.autoscalers.get(key) else {
            self.memory.lock().remove(key);
            return Ok(None);
        };
        let mut memory = self.memory.lock().entry(key.clone()).or_default().clone();
        let mut round = Round::new(&hpa, &self.settings, Timestamp::now());
        self.look(key, &hpa, &mut round, &mut memory).await;
        self.memory.lock().insert(key.clone(), memory);
        let mut next = hpa.as_ref().clone();
        next.status = Some(round.status);
        let writes = Write::status(hpa.as_ref(), &next).into_iter().collect();
        let plan = Plan { writes, events: round.events, ..Plan::default() };
        if let Err(error) = self.executor.run(plan).await {
            let event = EventRecord::new(
                object_reference(hpa.as_ref()),
                EventType::Warning,
                "FailedUpdateStatus",
                error.message(),
            );
            self.executor.run(Plan { events: vec![event], ..Plan::default() }).await?;
            tracing::debug!(%key, error = error.message(), "an autoscaler's status could not be written");
        }
        // What failed is told in the status; it is tried again in the same rhythm.
        Ok(Some(self.settings.sync_period))
    }
}

impl Autoscaler {
    /// One round, up to the status to be written.
    async fn look(&self, key: &ObjectKey, hpa: &HorizontalPodAutoscaler, round: &mut Round<'_>, memory: &mut Memory) {
        let spec = &hpa.spec;
        let target = &spec.scale_target_ref;
        let api_version = target.api_version.as_deref().unwrap_or("");
        let scale = match self.targets.scale(&key.namespace, api_version, &target.kind, &target.name).await {
            Ok(scale) => scale,
            Err(error) => return round.no_scale(&error),
        };
        let current = scale.replicas().wanted;
        memory.history.begin(current, Timestamp::now());
        let change = match round.glance(current) {
            Glance::Disabled => None,
            Glance::Set(change) => Some(change),
            Glance::Measure => match self.measure(key, hpa, &scale, round, memory).await {
                Ok(change) => change,
                Err(account) => return round.uncomputed(current, &account),
            },
        };
        let Some(change) = change else { return round.tell(current, current) };
        match self.targets.set(scale, change.replicas).await {
            Ok(()) => {
                memory.history.changed(spec.behavior.as_ref(), current, change.replicas, Timestamp::now());
                round.changed(current, &change);
            }
            Err(error) => round.unchanged(current, &change, &error),
        }
    }

    async fn measure(
        &self,
        key: &ObjectKey,
        hpa: &HorizontalPodAutoscaler,
        scale: &Scale,
        round: &mut Round<'_>,
        memory: &mut Memory,
    ) -> Result<Option<Change>, String> {
        let selector = self.selector(key, scale.selector(), round, memory)?;
        let pods = self.selected(key, &selector);
        let specs = hpa.spec.metrics.as_deref().unwrap_or_default();
        let mut samples = Vec::with_capacity(specs.len());
        for metric in specs {
            samples.push(self.metrics.samples(&self.targets, &key.namespace, metric, scale.selector()).await);
        }
        round.measured(&scale.replicas(), &pods, samples, &mut memory.history)
    }

    /// The selector of the target's pods, which must be nobody else's.
    fn selector(
        &self,
        key: &ObjectKey,
        text: &str,
        round: &mut Round<'_>,
        memory: &mut Memory,
    ) -> Result<LabelSelector, String> {
        if text.is_empty() {
            let error = "selector is required".to_owned();
            round.bad_selector(
                "SelectorRequired",
                "InvalidSelector",
                "the HPA target's scale is missing a selector",
                &error,
            );
            return Err(error);
        }
        let selector = LabelSelector::parse(text).map_err(|error| {
            let error = format!("couldn't convert selector into a corresponding internal selector object: {error}");
            round.bad_selector("InvalidSelector", "InvalidSelector", &error, &error);
            error
        })?;
        memory.selector = Some(selector.clone());
        let pods = self.selected(key, &selector);
        if let Some(other) = self.other_with(key, &pods) {
            let ns = &key.namespace;
            let error = format!(
                "pods by selector {text} are controlled by more than one HPA (e.g. [{{{} {ns}}} {{{} {ns}}}])",
                key.name, other.name
            );
            round.bad_selector("AmbiguousSelector", "AmbiguousSelector", &error, &error);
            return Err(error);
        }
        Ok(selector)
    }

    fn selected(&self, key: &ObjectKey, selector: &LabelSelector) -> Vec<Arc<Pod>> {
        let mut pods = self.pods.in_namespace(&key.namespace);
        pods.retain(|pod| matches(selector, pod));
        pods
    }

    /// Another autoscaler that has one of the pods.
    fn other_with(&self, key: &ObjectKey, pods: &[Arc<Pod>]) -> Option<ObjectKey> {
        let memory = self.memory.lock();
        let others = memory.iter().filter(|(other, _)| other.namespace == key.namespace && *other != key);
        let mut has = others.filter_map(|(other, memory)| Some((other, memory.selector.as_ref()?)));
        has.find(|(_, selector)| pods.iter().any(|pod| matches(selector, pod))).map(|(other, _)| other.clone())
    }
}

fn matches(selector: &LabelSelector, pod: &Pod) -> bool {
    let labels = labels(&pod.metadata);
    selector.matches(|key| labels.get(key).map(String::as_str))
}
