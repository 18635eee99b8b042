//! How long pods take, as a client sees it: pods are created and deleted one after another, and a watch that is open
//! before each says when the pod was Ready and when it was gone. Nothing polls, so nothing rounds the times up.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use futures::{Stream, StreamExt};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, ListParams, PostParams, WatchEvent, WatchParams};
use kube::{Api, Client};
use serde_json::json;
use tokio::time::Instant;

use crate::images;

/// No single step of a pod may take longer.
const LIMIT: Duration = Duration::from_secs(60);

/// One sample per pod.
#[derive(Clone, Debug, Default)]
pub struct Latency {
    /// From the request that creates the pod to the event that shows it Ready; its image is on every node.
    pub ready: Vec<Duration>,
    /// From the request that deletes it, with one second of grace, to the event that says it is gone. The container
    /// ignores SIGTERM, so the second is used up.
    pub gone: Vec<Duration>,
}

/// Runs `pods` pods in the namespace `default`, one after another.
pub async fn measure(client: &Client, pods: usize) -> Result<Latency> {
    let api: Api<Pod> = Api::default_namespaced(client.clone());
    let mut latency = Latency::default();
    for index in 0..pods {
        let name = format!("bench-{}-{index}", std::process::id());
        let result = one_pod(&api, &name, &mut latency).await;
        if let Err(error) = result {
            // What is left of the pod must not disturb the next measurement; the first error is the one to tell.
            let _ = api.delete(&name, &DeleteParams::default().grace_period(0)).await;
            return Err(error).with_context(|| format!("pod {name}"));
        }
    }
    Ok(latency)
}

async fn one_pod(api: &Api<Pod>, name: &str, latency: &mut Latency) -> Result<()> {
    let selector = format!("metadata.name={name}");
    // From a list's version on: from "any" on, upstream needs a newer etcd than some distributions have.
    let list = api.list(&ListParams::default().fields(&selector)).await.context("cannot list")?;
    let version = list.metadata.resource_version.context("the list has no version")?;
    let watch = WatchParams::default().fields(&selector);
    let events = bounded("the watch to open", api.watch(&watch, &version)).await?.context("cannot watch")?;
    let mut events = std::pin::pin!(events);

    let start = Instant::now();
    api.create(&PostParams::default(), &pod(name)?).await.context("cannot create it")?;
    wait_for(&mut events, "Ready", is_ready).await?;
    latency.ready.push(start.elapsed());

    let start = Instant::now();
    api.delete(name, &DeleteParams::default()).await.context("cannot delete it")?;
    wait_for(&mut events, "gone", |event| matches!(event, WatchEvent::Deleted(_))).await?;
    latency.gone.push(start.elapsed());
    Ok(())
}

fn pod(name: &str) -> Result<Pod> {
    serde_json::from_value(json!({
        "metadata": {"name": name},
        "spec": {
            "terminationGracePeriodSeconds": 1,
            "containers": [{"name": "main", "image": images::DEMO, "command": ["sleep", "1000"]}],
        },
    }))
    .context("the pod is malformed")
}

pub(super) fn is_ready(event: &WatchEvent<Pod>) -> bool {
    let (WatchEvent::Added(pod) | WatchEvent::Modified(pod)) = event else { return false };
    let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_ref());
    conditions.is_some_and(|all| all.iter().any(|c| c.type_ == "Ready" && c.status == "True"))
}

/// Reads events until one is as wanted.
async fn wait_for(
    events: &mut (impl Stream<Item = kube::Result<WatchEvent<Pod>>> + Unpin),
    what: &str,
    wanted: impl Fn(&WatchEvent<Pod>) -> bool,
) -> Result<()> {
    let mut last = "no event".to_owned();
    let search = async {
        loop {
            match events.next().await {
                Some(Ok(event)) if wanted(&event) => return Ok(()),
                Some(Ok(event)) => last = describe(&event),
                Some(Err(error)) => return Err(error).context("the watch failed"),
                None => bail!("the server ended the watch"),
            }
        }
    };
    let result = bounded(&format!("the pod to be {what}"), search).await;
    result.and_then(|found| found).with_context(|| format!("last seen: {last}"))
}

fn describe(event: &WatchEvent<Pod>) -> String {
    match event {
        WatchEvent::Added(pod) | WatchEvent::Modified(pod) | WatchEvent::Deleted(pod) => {
            let node = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()).unwrap_or("no node");
            let status = pod.status.as_ref().map_or_else(|| "no status".into(), |s| json!(s).to_string());
            format!("on {node}: {status}")
        }
        WatchEvent::Bookmark(_) => "a bookmark".into(),
        WatchEvent::Error(status) => format!("{status:?}"),
    }
}

async fn bounded<T>(what: &str, work: impl Future<Output = T>) -> Result<T> {
    let late = || format!("waited {} s for {what}", LIMIT.as_secs());
    tokio::time::timeout(LIMIT, work).await.with_context(late)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(kind: &str, ready: &str) -> WatchEvent<Pod> {
        let conditions = json!([{"type": "Initialized", "status": "True"}, {"type": "Ready", "status": ready}]);
        let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"},
            "spec": {"containers": [], "nodeName": "node1"}, "status": {"conditions": conditions}});
        serde_json::from_value(json!({"type": kind, "object": pod})).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn waiting_ends_with_the_wanted_event() {
        let mut events = futures::stream::iter([Ok(event("ADDED", "False")), Ok(event("MODIFIED", "True"))]);
        wait_for(&mut events, "Ready", is_ready).await.unwrap();
        let error = wait_for(&mut events, "gone", |_| true).await.unwrap_err();
        assert!(format!("{error:#}").contains("ended the watch"), "{error:#}");
    }

    #[tokio::test(start_paused = true)]
    async fn waiting_is_bounded_and_says_what_was_seen() {
        let mut events = futures::stream::iter([Ok(event("ADDED", "False"))]).chain(futures::stream::pending());
        let error = format!("{:#}", wait_for(&mut events, "Ready", is_ready).await.unwrap_err());
        assert!(error.contains("waited 60 s for the pod to be Ready"), "{error}");
        assert!(error.contains("on node1"), "{error}");
    }
}
