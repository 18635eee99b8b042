//! Events for users: posted in the background, the same one counted instead of repeated. Bounded: when the API server
//! is slow, events are dropped, never pods.

use std::collections::HashMap;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client};
use serde_json::json;
use tokio::sync::mpsc;

use crate::objects::api_error;

const QUEUE: usize = 256;
/// Distinct events that are remembered for counting.
const REMEMBERED: usize = 512;
const COMPONENT: &str = "kubelet";

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Level {
    Normal,
    Warning,
}

impl Level {
    fn as_str(self) -> &'static str {
        match self {
            Self::Normal => "Normal",
            Self::Warning => "Warning",
        }
    }
}

struct Entry {
    object: ObjectReference,
    level: Level,
    reason: &'static str,
    message: String,
    time: Timestamp,
}

/// Hands events over without waiting.
#[derive(Clone)]
pub struct Recorder {
    queue: mpsc::Sender<Entry>,
}

impl Recorder {
    /// Starts posting as this node's kubelet.
    pub fn start(client: Client, node_name: &str) -> Self {
        let (queue, entries) = mpsc::channel(QUEUE);
        tokio::spawn(post_all(client, node_name.to_owned(), entries));
        Self { queue }
    }

    pub fn event(&self, object: ObjectReference, level: Level, reason: &'static str, message: impl Into<String>) {
        let entry = Entry { object, level, reason, message: message.into(), time: Timestamp::now() };
        if let Err(error) = self.queue.try_send(entry) {
            tracing::debug!(%error, "event dropped");
        }
    }

    pub fn pod(&self, pod: &Pod, level: Level, reason: &'static str, message: impl Into<String>) {
        self.event(pod_reference(pod, None), level, reason, message);
    }

    /// An event about one container of the pod.
    pub fn container(&self, pod: &Pod, name: &str, level: Level, reason: &'static str, message: impl Into<String>) {
        self.event(pod_reference(pod, Some(name)), level, reason, message);
    }
}

fn pod_reference(pod: &Pod, container: Option<&str>) -> ObjectReference {
    let named = |list: &[k8s_openapi::api::core::v1::Container]| {
        container.is_some_and(|name| list.iter().any(|spec| spec.name == name))
    };
    let list = match &pod.spec {
        Some(spec) if named(&spec.containers) => "containers",
        Some(spec) if named(spec.init_containers.as_deref().unwrap_or_default()) => "initContainers",
        _ => "ephemeralContainers",
    };
    ObjectReference {
        api_version: Some("v1".to_owned()),
        kind: Some("Pod".to_owned()),
        namespace: pod.metadata.namespace.clone(),
        name: pod.metadata.name.clone(),
        uid: pod.metadata.uid.clone(),
        resource_version: pod.metadata.resource_version.clone(),
        field_path: container.map(|name| format!("spec.{list}{{{name}}}")),
    }
}

#[derive(PartialEq, Eq, Hash)]
struct Key {
    uid: Option<String>,
    field_path: Option<String>,
    level: Level,
    reason: &'static str,
    message: String,
}

struct Posted {
    name: String,
    count: i32,
}

async fn post_all(client: Client, node_name: String, mut entries: mpsc::Receiver<Entry>) {
    let mut posted: HashMap<Key, Posted> = HashMap::new();
    while let Some(entry) = entries.recv().await {
        if posted.len() >= REMEMBERED {
            posted.clear();
        }
        if let Err(error) = post(&client, &node_name, entry, &mut posted).await {
            tracing::debug!(error = api_error(&error), "event not recorded");
        }
    }
}

async fn post(
    client: &Client,
    node_name: &str,
    entry: Entry,
    posted: &mut HashMap<Key, Posted>,
) -> Result<(), kube::Error> {
    let namespace = entry.object.namespace.clone().unwrap_or_else(|| "default".to_owned());
    let api = Api::<Event>::namespaced(client.clone(), &namespace);
    let key = Key {
        uid: entry.object.uid.clone(),
        field_path: entry.object.field_path.clone(),
        level: entry.level,
        reason: entry.reason,
        message: entry.message.clone(),
    };
    if let Some(known) = posted.get_mut(&key) {
        known.count += 1;
        let patch = json!({"count": known.count, "lastTimestamp": Time(seconds(entry.time))});
        match api.patch(&known.name, &PatchParams::default(), &Patch::Merge(patch)).await {
            Err(kube::Error::Api(status)) if status.code == 404 => drop(posted.remove(&key)),
            other => return other.map(drop),
        }
    }
    let event = new_event(node_name, &namespace, &entry);
    let name = event.metadata.name.clone().unwrap_or_default();
    api.create(&PostParams::default(), &event).await?;
    posted.insert(key, Posted { name, count: 1 });
    Ok(())
}

fn seconds(time: Timestamp) -> Timestamp {
    crate::pod::status::whole_seconds(time)
}

fn new_event(node_name: &str, namespace: &str, entry: &Entry) -> Event {
    let object = &entry.object;
    let name = format!("{}.{:x}", object.name.as_deref().unwrap_or_default(), entry.time.as_nanosecond());
    Event {
        metadata: ObjectMeta { name: Some(name), namespace: Some(namespace.to_owned()), ..ObjectMeta::default() },
        involved_object: object.clone(),
        reason: Some(entry.reason.to_owned()),
        message: Some(entry.message.clone()),
        source: Some(EventSource { component: Some(COMPONENT.to_owned()), host: Some(node_name.to_owned()) }),
        first_timestamp: Some(Time(seconds(entry.time))),
        last_timestamp: Some(Time(seconds(entry.time))),
        count: Some(1),
        type_: Some(entry.level.as_str().to_owned()),
        reporting_component: Some(COMPONENT.to_owned()),
        reporting_instance: Some(node_name.to_owned()),
        ..Event::default()
    }
}
