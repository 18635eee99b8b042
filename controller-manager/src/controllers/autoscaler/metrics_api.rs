//! The three APIs that metrics come from: `metrics.k8s.io` for what pods use, `custom.metrics.k8s.io` for what objects of
//! the cluster have, `external.metrics.k8s.io` for everything else. Each is usually served by an extension server.

use std::collections::BTreeMap;
use std::time::Duration;

use apimachinery::controller::{Rest, parse_duration};
use apimachinery::meta::{LabelSelector as Selector, Quantity};
use jiff::Timestamp;
use k8s_openapi::api::autoscaling::v2::{MetricSpec, ObjectMetricSource};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::metric::Samples;
use super::replicas::{PodMetric, PodMetrics};
use super::targets::{Targets, explain};

const CUSTOM: &str = "custom.metrics.k8s.io";
/// Both have the same shape as far as it is read here.
const CUSTOM_VERSIONS: [&str; 2] = ["v1beta2", "v1beta1"];
/// The window of figures that name none.
const DEFAULT_WINDOW: Duration = Duration::from_secs(60);

/// All but what no part of a URL gives a meaning to.
const ENCODED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

pub struct MetricsApi {
    pub rest: Rest,
}

#[derive(Deserialize)]
struct List<T> {
    #[serde(default = "Vec::new")]
    items: Vec<T>,
}

#[derive(Deserialize)]
struct PodFigures {
    metadata: Named,
    timestamp: Option<Timestamp>,
    window: String,
    #[serde(default)]
    containers: Vec<ContainerFigures>,
}

#[derive(Deserialize)]
struct ContainerFigures {
    name: String,
    usage: BTreeMap<String, Quantity>,
}

#[derive(Deserialize)]
struct Named {
    name: String,
}

/// One value of the custom or the external API.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Figure {
    described_object: Option<Named>,
    timestamp: Option<Timestamp>,
    /// The older version calls it `window`.
    #[serde(alias = "window")]
    window_seconds: Option<u64>,
    value: Quantity,
}

impl MetricsApi {
    /// The figures of one metric; `selector` selects the autoscaler's pods.
    pub async fn samples(
        &self,
        targets: &Targets,
        namespace: &str,
        spec: &MetricSpec,
        selector: &str,
    ) -> Result<Samples, String> {
        match spec.type_.as_str() {
            "Resource" => {
                let name = spec.resource.as_ref().map_or("", |source| source.name.as_str());
                self.resource(namespace, selector, name, "").await
            }
            "ContainerResource" => {
                let source = spec.container_resource.as_ref();
                let (name, container) =
                    source.map_or(("", ""), |source| (source.name.as_str(), source.container.as_str()));
                self.resource(namespace, selector, name, container).await
            }
            "Pods" => {
                let metric = spec.pods.as_ref().map(|source| &source.metric);
                let (name, own) = metric.map_or(("", None), |metric| (metric.name.as_str(), metric.selector.as_ref()));
                let query = [("labelSelector", selector.to_owned()), ("metricLabelSelector", text(own)?)];
                let path = format!("namespaces/{namespace}/pods/*/{}", encode(name));
                self.custom(&path, &query, "pods").await.and_then(|figures| of_pods(&figures))
            }
            "Object" => match &spec.object {
                Some(source) => self.object(targets, namespace, source).await,
                None => Err("the metric names no object".to_owned()),
            },
            "External" => {
                let metric = spec.external.as_ref().map(|source| &source.metric);
                let (name, own) = metric.map_or(("", None), |metric| (metric.name.as_str(), metric.selector.as_ref()));
                let path = format!("/apis/external.metrics.k8s.io/v1beta1/namespaces/{namespace}/{}", encode(name));
                let query = [("labelSelector", text(own)?)];
                let list = self.list::<Figure>(&path, &query, &format!("{name}.external.metrics.k8s.io")).await;
                let figures =
                    list.map_err(|error| format!("unable to fetch metrics from external metrics API: {error}"))?;
                if figures.is_empty() {
                    return Err("no metrics returned from external metrics API".to_owned());
                }
                Ok(Samples::Values(figures.iter().map(|figure| figure.value.milli_value()).collect()))
            }
            // The pure side refuses it.
            _ => Ok(Samples::Values(Vec::new())),
        }
    }

    async fn resource(
        &self,
        namespace: &str,
        selector: &str,
        resource: &str,
        container: &str,
    ) -> Result<Samples, String> {
        let path = format!("/apis/metrics.k8s.io/v1beta1/namespaces/{namespace}/pods");
        let query = [("labelSelector", selector.to_owned())];
        let list = self.list::<PodFigures>(&path, &query, "pods.metrics.k8s.io").await;
        let pods = list.map_err(|error| format!("unable to fetch metrics from resource metrics API: {error}"))?;
        if pods.is_empty() {
            return Err("no metrics returned from resource metrics API".to_owned());
        }
        let metric = |pod: &PodFigures| {
            let value = pod.value(resource, container)?;
            let window = parse_duration(&pod.window).unwrap_or(DEFAULT_WINDOW);
            let timestamp = pod.timestamp.unwrap_or(Timestamp::MIN);
            Some((pod.metadata.name.clone(), PodMetric { value, timestamp, window }))
        };
        Ok(Samples::Pods(pods.iter().filter_map(metric).collect()))
    }

    async fn object(&self, targets: &Targets, namespace: &str, source: &ObjectMetricSource) -> Result<Samples, String> {
        let (object, metric) = (&source.described_object, &source.metric);
        let api_version = object.api_version.as_deref().unwrap_or("");
        let group = api_version.rsplit_once('/').map_or("", |(group, _)| group);
        let (path, resource) = if group.is_empty() && object.kind == "Namespace" {
            // Whatever name the reference has: an autoscaler does not look into other namespaces.
            (format!("namespaces/{namespace}/metrics/{}", encode(&metric.name)), "namespaces".to_owned())
        } else {
            let id = targets.find(group, &object.kind).await;
            let id = id.map_err(|error| unable(&format!("unable to map kind {} to resource: {error}", object.kind)))?;
            let resource = if group.is_empty() { id.plural.to_string() } else { format!("{}.{group}", id.plural) };
            let path = format!("namespaces/{namespace}/{resource}/{}/{}", encode(&object.name), encode(&metric.name));
            (path, resource)
        };
        let query = [("metricLabelSelector", text(metric.selector.as_ref())?)];
        let figures = self.custom(&path, &query, &resource).await?;
        match figures.as_slice() {
            [figure] => Ok(Samples::Values(vec![figure.value.milli_value()])),
            other => {
                let count = other.len();
                Err(unable(&format!(
                    "the custom metrics API server returned {count} results when we asked for exactly one"
                )))
            }
        }
    }

    async fn custom(&self, path: &str, query: &[(&str, String)], resource: &str) -> Result<Vec<Figure>, String> {
        let version = self.custom_version().await.map_err(|error| unable(&error))?;
        let path = format!("/apis/{CUSTOM}/{version}/{path}");
        self.list(&path, query, &format!("{resource}.{CUSTOM}")).await.map_err(|error| unable(&error))
    }

    async fn custom_version(&self) -> Result<&'static str, String> {
        let group = match self.rest.get(&format!("/apis/{CUSTOM}")).await {
            Err(kube::Error::Api(status)) if status.code == 404 => {
                return Err(format!("no custom metrics API ({CUSTOM}) registered"));
            }
            other => other.map_err(|error| explain(&error, CUSTOM))?,
        };
        let preferred = [&group["preferredVersion"]["version"]].into_iter();
        let served = group["versions"].as_array().into_iter().flatten().map(|version| &version["version"]);
        let known = |version: &Value| CUSTOM_VERSIONS.into_iter().find(|known| version == known);
        preferred.chain(served).find_map(known).ok_or_else(|| "no known available metric versions found".to_owned())
    }

    async fn list<T: DeserializeOwned>(
        &self,
        path: &str,
        query: &[(&str, String)],
        what: &str,
    ) -> Result<Vec<T>, String> {
        let given = query.iter().filter(|(_, value)| !value.is_empty());
        let query = given.map(|(name, value)| format!("{name}={}", encode(value))).collect::<Vec<_>>().join("&");
        let uri = if query.is_empty() { path.to_owned() } else { format!("{path}?{query}") };
        let answer = self.rest.get(&uri).await.map_err(|error| explain(&error, what))?;
        let list: List<T> =
            serde_json::from_value(answer).map_err(|error| format!("the answer for {what} cannot be read: {error}"))?;
        Ok(list.items)
    }
}

impl PodFigures {
    /// What the container, or if its name is empty the whole pod uses; none unless all figures for it are there.
    fn value(&self, resource: &str, container: &str) -> Option<i64> {
        let milli = |container: &ContainerFigures| container.usage.get(resource).map(Quantity::milli_value);
        if !container.is_empty() {
            return self.containers.iter().find(|figures| figures.name == container).and_then(milli);
        }
        let figures: Option<Vec<i64>> = self.containers.iter().map(milli).collect();
        figures.filter(|figures| !figures.is_empty()).map(|figures| figures.into_iter().fold(0, i64::saturating_add))
    }
}

fn of_pods(figures: &[Figure]) -> Result<Samples, String> {
    if figures.is_empty() {
        return Err("no metrics returned from custom metrics API".to_owned());
    }
    let metric = |figure: &Figure| {
        let window = figure.window_seconds.map_or(DEFAULT_WINDOW, Duration::from_secs);
        let timestamp = figure.timestamp.unwrap_or(Timestamp::MIN);
        let metric = PodMetric { value: figure.value.milli_value(), timestamp, window };
        figure.described_object.as_ref().map(|object| (object.name.clone(), metric))
    };
    Ok(Samples::Pods(figures.iter().filter_map(metric).collect::<PodMetrics>()))
}

fn unable(error: &str) -> String {
    format!("unable to fetch metrics from custom metrics API: {error}")
}

/// The selector as a query has it; empty when there is none.
fn text(selector: Option<&LabelSelector>) -> Result<String, String> {
    let Some(selector) = selector else { return Ok(String::new()) };
    Selector::from_json(&json!(selector)).map(|selector| selector.to_string()).map_err(|error| error.to_string())
}

fn encode(text: &str) -> String {
    utf8_percent_encode(text, ENCODED).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_of_a_pod_are_complete_or_none() {
        let pod: PodFigures = serde_json::from_value(json!({
            "metadata": {"name": "p"}, "timestamp": "2026-01-01T00:00:00Z", "window": "30s",
            "containers": [{"name": "a", "usage": {"cpu": "100m", "memory": "1Ki"}}, {"name": "b", "usage": {"cpu": "250000u"}}],
        }))
        .unwrap();
        for (resource, container, expected) in [
            ("cpu", "", Some(350)),
            ("cpu", "b", Some(250)),
            ("memory", "a", Some(1_024_000)),
            ("memory", "", None),
            ("cpu", "c", None),
        ] {
            assert_eq!(pod.value(resource, container), expected, "{resource} {container}");
        }
    }

    #[test]
    fn both_versions_of_custom_metrics_are_read() {
        let figures: Vec<Figure> = serde_json::from_value(json!([
            {"describedObject": {"kind": "Pod", "name": "a"}, "metricName": "m", "timestamp": "2026-01-01T00:00:00Z",
             "window": 30, "value": "5", "selector": null},
            {"describedObject": {"kind": "Pod", "name": "b"}, "metric": {"name": "m"}, "timestamp": "2026-01-01T00:00:00Z",
             "windowSeconds": 30, "value": "1500m"},
        ]))
        .unwrap();
        let Ok(Samples::Pods(metrics)) = of_pods(&figures) else { panic!("figures of pods") };
        assert_eq!((metrics["a"].value, metrics["b"].value), (5000, 1500));
        assert!(metrics.values().all(|metric| metric.window == Duration::from_secs(30)));
        assert_eq!(of_pods(&[]), Err("no metrics returned from custom metrics API".to_owned()));
    }
}
