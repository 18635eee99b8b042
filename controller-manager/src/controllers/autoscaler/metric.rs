//! One metric of an autoscaler: what its figures propose, and how that (or the want of it) is told. Pure.

use apimachinery::meta::{Quantity, QuantityFormat};
use k8s_openapi::api::autoscaling::v2::{
    ContainerResourceMetricStatus, ExternalMetricSource, ExternalMetricStatus, MetricIdentifier, MetricSpec,
    MetricStatus, MetricTarget, MetricValueStatus, ObjectMetricSource, ObjectMetricStatus, PodsMetricStatus,
    ResourceMetricStatus,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity as Text;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;

use super::replicas::{Goal, PodMetrics, Proposal, Scaled, by_pods, by_share, by_value};

/// What the metrics APIs answered, in thousandths.
#[derive(Clone, Debug, PartialEq)]
pub enum Samples {
    Pods(PodMetrics),
    Values(Vec<i64>),
}

/// A metric that proposes a number.
#[derive(Debug)]
pub struct Measured {
    pub replicas: i32,
    /// What events call the metric.
    pub name: String,
    pub status: MetricStatus,
}

/// A metric that proposes nothing.
#[derive(Debug, PartialEq)]
pub struct Unmeasured {
    /// Of the event and of the condition.
    pub reason: &'static str,
    /// The cause, as the event has it.
    pub cause: String,
    /// The cause within the account of the whole autoscaler.
    pub account: String,
}

/// The autoscaler's pods and replicas, for one metric after the other.
pub struct Measurer<'a> {
    pub scaled: Scaled<'a>,
    pub namespace: &'a str,
    /// How many replicas the target says it has.
    pub status_replicas: i32,
}

impl Measurer<'_> {
    /// The metric's proposal; `samples` are its figures, or why there are none.
    pub fn measure(&self, spec: &MetricSpec, samples: Result<Samples, String>) -> Result<Measured, Unmeasured> {
        if let Some(source) = spec.resource.as_ref().filter(|_| spec.type_ == "Resource") {
            let fail = |cause| Unmeasured {
                reason: "FailedGetResourceMetric",
                account: format!("failed to get {} resource metric value: {cause}", source.name),
                cause,
            };
            let (measured, current) = self.resource(&source.name, "", &source.target, samples).map_err(fail)?;
            let status = ResourceMetricStatus { name: source.name.clone(), current };
            return Ok(measured.with(MetricStatus { resource: Some(status), ..of_type("Resource") }));
        }
        if let Some(source) = spec.container_resource.as_ref().filter(|_| spec.type_ == "ContainerResource") {
            let fail = |cause| Unmeasured {
                reason: "FailedGetContainerResourceMetric",
                account: format!("failed to get {} container metric value: {cause}", source.container),
                cause,
            };
            let resource = self.resource(&source.name, &source.container, &source.target, samples);
            let (measured, current) = resource.map_err(fail)?;
            let status = ContainerResourceMetricStatus {
                name: source.name.clone(),
                container: source.container.clone(),
                current,
            };
            return Ok(measured.with(MetricStatus { container_resource: Some(status), ..of_type("ContainerResource") }));
        }
        if let Some(source) = spec.pods.as_ref().filter(|_| spec.type_ == "Pods") {
            let fail = |cause| Unmeasured {
                reason: "FailedGetPodsMetric",
                account: format!("failed to get pods metric value: {cause}"),
                cause,
            };
            let goal = milli(source.target.average_value.as_ref());
            let amount = samples.map_err(|error| format!("unable to get metric {}: {error}", source.metric.name));
            let proposal = amount.and_then(|samples| self.amount(None, goal, samples)).map_err(fail)?;
            let current =
                MetricValueStatus { average_value: Some(decimal(proposal.usage)), ..MetricValueStatus::default() };
            let status = PodsMetricStatus { metric: source.metric.clone(), current };
            let name = format!("pods metric {}", source.metric.name);
            return Ok(Draft { replicas: proposal.replicas, name }
                .with(MetricStatus { pods: Some(status), ..of_type("Pods") }));
        }
        if let Some(source) = spec.object.as_ref().filter(|_| spec.type_ == "Object") {
            return self.object(source, samples);
        }
        if let Some(source) = spec.external.as_ref().filter(|_| spec.type_ == "External") {
            return self.external(source, samples);
        }
        let cause = format!("unknown metric source type \"{}\"", spec.type_);
        Err(Unmeasured { reason: "InvalidMetricSourceType", account: cause.clone(), cause })
    }

    fn resource(
        &self,
        resource: &str,
        container: &str,
        target: &MetricTarget,
        samples: Result<Samples, String>,
    ) -> Result<(Draft, MetricValueStatus), String> {
        let samples = samples.map_err(|error| format!("unable to get metrics for resource {resource}: {error}"));
        if target.average_value.is_some() {
            let proposal =
                samples.and_then(|samples| self.amount(Some(resource), milli(target.average_value.as_ref()), samples));
            let proposal = proposal.map_err(|cause| format!("failed to get {resource} usage: {cause}"))?;
            let status = MetricValueStatus {
                average_value: Some(of_resource(resource, proposal.usage)),
                ..MetricValueStatus::default()
            };
            return Ok((Draft { replicas: proposal.replicas, name: format!("{resource} resource") }, status));
        }
        let Some(percent) = target.average_utilization else {
            let cause = "invalid resource metric source: neither an average utilization target nor an average value \
                         (usage) target was set";
            return Err(cause.to_owned());
        };
        let goal = Goal::Utilization { percent, resource, container };
        let proposal = samples.and_then(|samples| self.by_pods(Some(resource), &goal, samples));
        let proposal = proposal.map_err(|cause| format!("failed to get {resource} utilization: {cause}"))?;
        let whose = if container.is_empty() { "" } else { "container " };
        let name = format!("{resource} {whose}resource utilization (percentage of request)");
        let status = MetricValueStatus {
            average_utilization: proposal.utilization,
            average_value: Some(of_resource(resource, proposal.usage)),
            ..MetricValueStatus::default()
        };
        Ok((Draft { replicas: proposal.replicas, name }, status))
    }

    fn amount(&self, resource: Option<&str>, goal: i64, samples: Samples) -> Result<Proposal, String> {
        self.by_pods(resource, &Goal::Amount(goal), samples)
    }

    fn by_pods(&self, resource: Option<&str>, goal: &Goal<'_>, samples: Samples) -> Result<Proposal, String> {
        let Samples::Pods(metrics) = samples else { return Err("the metric has no values of single pods".to_owned()) };
        by_pods(&self.scaled, resource, goal, metrics).map_err(|error| error.to_string())
    }

    fn object(&self, source: &ObjectMetricSource, samples: Result<Samples, String>) -> Result<Measured, Unmeasured> {
        let (object, metric) = (&source.described_object, &source.metric);
        let (namespace, target) = (self.namespace, &source.target);
        let unavailable = |error| {
            format!("unable to get metric {} on {} {namespace}/{}: {error}", metric.name, object.kind, object.name)
        };
        let total = samples.map(|samples| total(&samples)).map_err(unavailable);
        let fail = |within: String| {
            move |cause: String| Unmeasured {
                reason: "FailedGetObjectMetric",
                account: format!("failed to get object metric value: {within}{cause}"),
                cause,
            }
        };
        let (proposal, current, name) = match (target.type_.as_str(), &target.value, &target.average_value) {
            ("Value", Some(value), _) => {
                let proposal =
                    total.and_then(|total| self.value(milli(Some(value)), total)).map_err(fail(String::new()))?;
                let current =
                    MetricValueStatus { value: Some(decimal(proposal.usage)), ..MetricValueStatus::default() };
                (proposal, current, format!("{} metric {}", object.kind, metric.name))
            }
            ("AverageValue", _, Some(value)) => {
                let total = total.map_err(fail(format!("failed to get {} object metric: ", metric.name)))?;
                let proposal = self.share(milli(Some(value)), total);
                let current =
                    MetricValueStatus { average_value: Some(decimal(proposal.usage)), ..MetricValueStatus::default() };
                (proposal, current, external_name(metric))
            }
            _ => {
                let cause = "invalid object metric source: neither a value target nor an average value target was set";
                return Err(fail(String::new())(cause.to_owned()));
            }
        };
        let status = ObjectMetricStatus { current, described_object: object.clone(), metric: metric.clone() };
        let draft = Draft { replicas: proposal.replicas, name };
        Ok(draft.with(MetricStatus { object: Some(status), ..of_type("Object") }))
    }

    fn external(
        &self,
        source: &ExternalMetricSource,
        samples: Result<Samples, String>,
    ) -> Result<Measured, Unmeasured> {
        let metric = &source.metric;
        let unavailable = |error| {
            let selector = go_selector(metric.selector.as_ref());
            format!("unable to get external metric {}/{}/{selector}: {error}", self.namespace, metric.name)
        };
        let total = samples.map(|samples| total(&samples)).map_err(unavailable);
        let fail = |within: String| {
            move |cause: String| Unmeasured {
                reason: "FailedGetExternalMetric",
                account: format!("failed to get {} external metric value: {within}{cause}", metric.name),
                cause,
            }
        };
        let (proposal, current) = if let Some(value) = &source.target.average_value {
            let total = total.map_err(fail(format!("failed to get {} external metric: ", metric.name)))?;
            let proposal = self.share(milli(Some(value)), total);
            let current =
                MetricValueStatus { average_value: Some(decimal(proposal.usage)), ..MetricValueStatus::default() };
            (proposal, current)
        } else if let Some(value) = &source.target.value {
            let proposal = total.and_then(|total| self.value(milli(Some(value)), total));
            let proposal = proposal.map_err(fail(format!("failed to get external metric {}: ", metric.name)))?;
            let current = MetricValueStatus { value: Some(decimal(proposal.usage)), ..MetricValueStatus::default() };
            (proposal, current)
        } else {
            let cause = "invalid external metric source: neither a value target nor an average value target was set";
            return Err(fail(String::new())(cause.to_owned()));
        };
        let status = ExternalMetricStatus { current, metric: metric.clone() };
        let draft = Draft { replicas: proposal.replicas, name: external_name(metric) };
        Ok(draft.with(MetricStatus { external: Some(status), ..of_type("External") }))
    }

    fn value(&self, goal: i64, total: i64) -> Result<Proposal, String> {
        by_value(&self.scaled, goal, total).map_err(|error| error.to_string())
    }

    fn share(&self, goal: i64, total: i64) -> Proposal {
        by_share(self.status_replicas, self.scaled.tolerances, goal, total)
    }
}

struct Draft {
    replicas: i32,
    name: String,
}

impl Draft {
    fn with(self, status: MetricStatus) -> Measured {
        Measured { replicas: self.replicas, name: self.name, status }
    }
}

fn of_type(type_: &str) -> MetricStatus {
    MetricStatus { type_: type_.to_owned(), ..MetricStatus::default() }
}

fn total(samples: &Samples) -> i64 {
    match samples {
        Samples::Values(values) => values.iter().fold(0, |sum: i64, value| sum.saturating_add(*value)),
        Samples::Pods(metrics) => metrics.values().fold(0, |sum: i64, metric| sum.saturating_add(metric.value)),
    }
}

fn milli(quantity: Option<&Text>) -> i64 {
    quantity.and_then(|text| text.0.parse::<Quantity>().ok()).map_or(0, |quantity| quantity.milli_value())
}

fn decimal(milli: i64) -> Text {
    Text(Quantity::from_milli(milli).to_string())
}

/// Memory is told as metrics servers tell it.
fn of_resource(resource: &str, milli: i64) -> Text {
    let format = if resource == "memory" { QuantityFormat::BinarySi } else { QuantityFormat::DecimalSi };
    Text(Quantity::from_milli(milli).with_format(format).to_string())
}

fn external_name(metric: &MetricIdentifier) -> String {
    format!("external metric {}({})", metric.name, go_selector(metric.selector.as_ref()))
}

/// The selector as upstream's messages print it.
fn go_selector(selector: Option<&LabelSelector>) -> String {
    let Some(selector) = selector else { return "nil".to_owned() };
    let labels = selector.match_labels.iter().flatten().fold(String::new(), |text, (k, v)| format!("{text}{k}: {v},"));
    let expressions = selector.match_expressions.iter().flatten().fold(String::new(), |text, expression| {
        let values = expression.values.iter().flatten().map(String::as_str).collect::<Vec<_>>().join(" ");
        let (key, operator) = (&expression.key, &expression.operator);
        format!("{text}LabelSelectorRequirement{{Key:{key},Operator:{operator},Values:[{values}],}},")
    });
    format!(
        "&LabelSelector{{MatchLabels:map[string]string{{{labels}}},MatchExpressions:[]LabelSelectorRequirement{{{expressions}}},}}"
    )
}
