//! Facts about pods that controllers decide by: phase, readiness, availability, and which of them to delete first.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, PodCondition};

use super::{after, annotation, elapsed, is_deleted, name};

const DELETION_COST: &str = "controller.kubernetes.io/pod-deletion-cost";

pub fn phase(pod: &Pod) -> &str {
    pod.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or("Pending")
}

/// Succeeded or failed: it will never run again.
pub fn is_finished(pod: &Pod) -> bool {
    matches!(phase(pod), "Succeeded" | "Failed")
}

/// Neither finished nor on its way out.
pub fn is_active(pod: &Pod) -> bool {
    !is_finished(pod) && !is_deleted(&pod.metadata)
}

pub fn condition<'a>(pod: &'a Pod, type_: &str) -> Option<&'a PodCondition> {
    pod.status.as_ref()?.conditions.as_ref()?.iter().find(|condition| condition.type_ == type_)
}

pub fn is_ready(pod: &Pod) -> bool {
    condition(pod, "Ready").is_some_and(|ready| ready.status == "True")
}

fn ready_since(pod: &Pod) -> Option<Timestamp> {
    condition(pod, "Ready").filter(|ready| ready.status == "True")?.last_transition_time.as_ref().map(|time| time.0)
}

pub fn node_name(pod: &Pod) -> Option<&str> {
    pod.spec.as_ref()?.node_name.as_deref().filter(|name| !name.is_empty())
}

/// Whether the pod has been ready for long enough; if it will be, `Err` says in how long.
pub fn availability(pod: &Pod, min_ready_seconds: i32, now: Timestamp) -> Result<(), Option<Duration>> {
    if !is_ready(pod) {
        return Err(None);
    }
    if min_ready_seconds <= 0 {
        return Ok(());
    }
    let since = ready_since(pod).ok_or(None)?;
    let due = after(since, super::seconds(min_ready_seconds));
    if due <= now { Ok(()) } else { Err(Some(elapsed(now, due))) }
}

/// The pods to delete when `count` of `pods` are too many: those that serve least are first. `related` are all pods of
/// the same purpose, such as those of the sibling replica sets: where many of them share a node, one of them goes.
pub fn choose_victims(mut pods: Vec<Arc<Pod>>, related: &[Arc<Pod>], count: usize, now: Timestamp) -> Vec<Arc<Pod>> {
    if count < pods.len() {
        let mut on_node: HashMap<&str, usize> = HashMap::new();
        for node in related.iter().filter(|pod| is_active(pod)).filter_map(|pod| node_name(pod)) {
            *on_node.entry(node).or_default() += 1;
        }
        pods.sort_by_cached_key(|pod| rank(pod, &on_node, now));
    }
    pods.truncate(count);
    pods
}

type Rank = (bool, u8, bool, i64, Reverse<usize>, u32, Reverse<i32>, u32, String);

/// Smaller is deleted earlier.
fn rank(pod: &Pod, on_node: &HashMap<&str, usize>, now: Timestamp) -> Rank {
    let phase_rank = match phase(pod) {
        "Pending" => 0,
        "Unknown" => 1,
        _ => 2,
    };
    let cost = annotation(&pod.metadata, DELETION_COST).and_then(|cost| cost.parse().ok()).unwrap_or(0i32);
    let crowd = node_name(pod).and_then(|node| on_node.get(node)).copied().unwrap_or(0);
    // Ages are compared by magnitude, so that among pods of about the same age chance decides, not the second.
    let magnitude = |since: Option<Timestamp>| {
        since.map_or(0, |since| elapsed(since, now).as_secs().checked_ilog2().map_or(0, |log| log + 1))
    };
    let restarts =
        pod.status.iter().flat_map(|status| status.container_statuses.iter().flatten()).map(|c| c.restart_count);
    (
        node_name(pod).is_some(),
        phase_rank,
        is_ready(pod),
        i64::from(cost),
        Reverse(crowd),
        magnitude(ready_since(pod)),
        Reverse(restarts.max().unwrap_or(0)),
        magnitude(pod.metadata.creation_timestamp.as_ref().map(|time| time.0)),
        name(&pod.metadata).to_owned(),
    )
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use serde_json::json;

    /// A pod in the given phase; ready since `ready` seconds after the epoch.
    pub fn pod(name: &str, node: Option<&str>, phase: &str, ready: Option<i64>) -> Pod {
        let since = ready.map(|second| Timestamp::from_second(second).unwrap().to_string());
        let condition = json!({"type": "Ready", "status": if ready.is_some() { "True" } else { "False" }, "lastTransitionTime": since});
        serde_json::from_value(json!({
            "metadata": {"name": name, "namespace": "ns", "uid": name, "creationTimestamp": "1970-01-01T00:00:00Z"},
            "spec": {"containers": [], "nodeName": node},
            "status": {"phase": phase, "conditions": [condition]},
        }))
        .unwrap()
    }

    #[test]
    fn availability_takes_time() {
        let now = Timestamp::from_second(100).unwrap();
        let ready = pod("a", Some("n"), "Running", Some(90));
        assert_eq!(availability(&ready, 0, now), Ok(()));
        assert_eq!(availability(&ready, 10, now), Ok(()));
        assert_eq!(availability(&ready, 15, now), Err(Some(Duration::from_secs(5))));
        assert_eq!(availability(&pod("b", None, "Pending", None), 0, now), Err(None));
    }

    #[test]
    fn those_that_serve_least_go_first() {
        let now = Timestamp::from_second(1_000_000).unwrap();
        let mut costly = pod("costly", Some("n2"), "Running", Some(0));
        costly.metadata.annotations = Some([(DELETION_COST.to_owned(), "100".to_owned())].into());
        let pods: Vec<_> = [
            costly,
            pod("old", Some("n2"), "Running", Some(0)),
            pod("young", Some("n2"), "Running", Some(999_990)),
            pod("crowded", Some("n1"), "Running", Some(0)),
            pod("unready", Some("n1"), "Running", None),
            pod("pending", Some("n1"), "Pending", None),
            pod("unscheduled", None, "Pending", None),
        ]
        .into_iter()
        .map(Arc::new)
        .collect();
        let related: Vec<_> = pods
            .iter()
            .cloned()
            .chain([
                Arc::new(pod("sibling", Some("n1"), "Running", Some(0))),
                Arc::new(pod("s2", Some("n1"), "Running", Some(0))),
            ])
            .collect();
        let victims = choose_victims(pods, &related, 6, now);
        let names: Vec<_> = victims.iter().map(|pod| name(&pod.metadata)).collect();
        assert_eq!(names, ["unscheduled", "pending", "unready", "crowded", "young", "old"]);
    }
}
