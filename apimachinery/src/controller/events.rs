//! Recording events: what a person reads under `kubectl describe`. Repetitions of an event raise the count of the one
//! that exists, floods of similar ones are combined, and a source that talks too much about one object is cut off.
//!
//! Recording never blocks and never fails the caller: when the API server cannot keep up, events are dropped.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::Hash;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::ObjectReference;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::rest::Rest;
use crate::process::error_chain;

/// Events that may wait to be sent.
const QUEUE: usize = 1000;
/// Series that are remembered; more than these start anew.
const REMEMBERED: usize = 4096;
/// From so many different messages of one reason within `SIMILAR_WINDOW` on, they are combined.
const SIMILAR: usize = 10;
const SIMILAR_WINDOW: Duration = Duration::from_secs(600);
/// A source may record so many events about one object at once, and one more per `SPAM_REFILL`.
const SPAM_BURST: f64 = 25.0;
const SPAM_REFILL: Duration = Duration::from_secs(300);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EventType {
    Normal,
    Warning,
}

/// Something worth telling about an object.
#[derive(Clone, Debug, PartialEq)]
pub struct EventRecord {
    pub on: ObjectReference,
    pub related: Option<ObjectReference>,
    pub type_: EventType,
    pub reason: String,
    /// What was done or tried; only the events.k8s.io API has it.
    pub action: String,
    pub message: String,
}

impl EventRecord {
    pub fn new(on: ObjectReference, type_: EventType, reason: &str, message: String) -> Self {
        Self { on, related: None, type_, reason: reason.to_owned(), action: String::new(), message }
    }
}

/// The API under which events are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventApi {
    /// core/v1, as the controllers and the kubelet do.
    Core,
    /// events.k8s.io/v1, as the scheduler does.
    Events,
}

/// Takes events from anywhere in the process; clones share one sender.
#[derive(Clone)]
pub struct Recorder {
    sender: mpsc::Sender<Recorded>,
    component: String,
    rest: Rest,
}

/// An event on its way to the sender: who saw it, and by whose credentials it is written.
struct Recorded {
    component: String,
    rest: Rest,
    event: EventRecord,
}

impl Recorder {
    /// Starts the sending task, which ends with the last recorder. `instance` names the process, usually its host.
    pub fn start(rest: Rest, api: EventApi, component: &str, instance: &str) -> Self {
        let (sender, receiver) = mpsc::channel(QUEUE);
        tokio::spawn(send_all(api, instance.to_owned(), receiver));
        Self { sender, component: component.to_owned(), rest }
    }

    /// The same recorder speaking for another component.
    #[must_use]
    pub fn with_component(&self, component: &str) -> Self {
        Self { component: component.to_owned(), ..self.clone() }
    }

    /// The same recorder writing under other credentials.
    #[must_use]
    pub fn with_rest(&self, rest: Rest) -> Self {
        Self { rest, ..self.clone() }
    }

    pub fn record(&self, event: EventRecord) {
        let recorded = Recorded { component: self.component.clone(), rest: self.rest.clone(), event };
        if self.sender.try_send(recorded).is_err() {
            tracing::debug!("too many events wait to be sent; one is dropped");
        }
    }
}

async fn send_all(api: EventApi, instance: String, mut receiver: mpsc::Receiver<Recorded>) {
    let mut correlator = Correlator::default();
    while let Some(Recorded { component, rest, event }) = receiver.recv().await {
        let now = Timestamp::now();
        match correlator.correlate(&component, event, now) {
            Decision::Drop => {}
            Decision::Create(key, event) => {
                let name = format!("{}.{:x}", event.on.name.as_deref().unwrap_or("unknown"), now.as_nanosecond());
                let body = render(api, &component, &instance, &event, &name, now);
                match rest.create(&collection(api, &event.on), &body).await {
                    Ok(_) => correlator.created(key, name, now),
                    Err(error) => report_unsent(&error, &event),
                }
            }
            Decision::Repeat { key, name, count, event } => {
                let path = format!("{}/{name}", collection(api, &event.on));
                let patch = repetition(api, count, now, &event.message);
                match rest.patch(&path, "application/merge-patch+json", &patch).await {
                    Ok(_) => {}
                    // The event has expired meanwhile: the next one starts a new series.
                    Err(kube::Error::Api(status)) if status.code == 404 => correlator.forget(&key),
                    Err(error) => report_unsent(&error, &event),
                }
            }
        }
    }
}

fn report_unsent(error: &kube::Error, event: &EventRecord) {
    // A namespace on its way out takes no more events; that is no news.
    tracing::debug!(reason = event.reason, error = error_chain(error), "an event could not be recorded");
}

fn namespace(on: &ObjectReference) -> &str {
    on.namespace.as_deref().filter(|namespace| !namespace.is_empty()).unwrap_or("default")
}

fn collection(api: EventApi, on: &ObjectReference) -> String {
    let root = match api {
        EventApi::Core => "/api/v1",
        EventApi::Events => "/apis/events.k8s.io/v1",
    };
    format!("{root}/namespaces/{}/events", namespace(on))
}

fn micro(time: Timestamp) -> String {
    jiff::fmt::strtime::format("%Y-%m-%dT%H:%M:%S.%6fZ", time).unwrap_or_else(|_| time.to_string())
}

fn seconds(time: Timestamp) -> String {
    jiff::fmt::strtime::format("%Y-%m-%dT%H:%M:%SZ", time).unwrap_or_else(|_| time.to_string())
}

fn type_name(type_: EventType) -> &'static str {
    match type_ {
        EventType::Normal => "Normal",
        EventType::Warning => "Warning",
    }
}

fn render(api: EventApi, component: &str, instance: &str, event: &EventRecord, name: &str, now: Timestamp) -> Value {
    let metadata = json!({"name": name, "namespace": namespace(&event.on)});
    match api {
        EventApi::Core => json!({
            "apiVersion": "v1", "kind": "Event", "metadata": metadata, "involvedObject": event.on,
            "type": type_name(event.type_), "reason": event.reason, "message": event.message, "count": 1,
            "firstTimestamp": seconds(now), "lastTimestamp": seconds(now),
            "source": {"component": component, "host": if component == "kubelet" { instance } else { "" }},
            "reportingComponent": component, "reportingInstance": if component == "kubelet" { instance } else { "" },
        }),
        EventApi::Events => json!({
            "apiVersion": "events.k8s.io/v1", "kind": "Event", "metadata": metadata, "regarding": event.on,
            "related": event.related, "type": type_name(event.type_), "reason": event.reason, "note": event.message,
            "action": event.action, "eventTime": micro(now), "reportingController": component,
            "reportingInstance": format!("{component}-{instance}"),
        }),
    }
}

fn repetition(api: EventApi, count: u32, now: Timestamp, message: &str) -> Value {
    match api {
        EventApi::Core => json!({"count": count, "lastTimestamp": seconds(now), "message": message}),
        EventApi::Events => json!({"series": {"count": count, "lastObservedTime": micro(now)}}),
    }
}

/// What makes two events the same.
#[derive(Clone, PartialEq, Eq, Hash)]
struct SeriesKey {
    component: String,
    uid: String,
    path: String,
    type_: EventType,
    reason: String,
    message: String,
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct SimilarKey {
    component: String,
    uid: String,
    type_: EventType,
    reason: String,
}

struct Series {
    name: String,
    count: u32,
    last: Timestamp,
}

struct Similar {
    messages: Vec<String>,
    last: Timestamp,
}

struct Bucket {
    tokens: f64,
    last: Timestamp,
}

enum Decision {
    Drop,
    Create(SeriesKey, EventRecord),
    Repeat { key: SeriesKey, name: String, count: u32, event: EventRecord },
}

/// Remembers what was recorded lately.
#[derive(Default)]
struct Correlator {
    series: HashMap<SeriesKey, Series>,
    similar: HashMap<SimilarKey, Similar>,
    buckets: HashMap<(String, String), Bucket>,
}

impl Correlator {
    fn correlate(&mut self, component: &str, mut event: EventRecord, now: Timestamp) -> Decision {
        let uid = identity(&event.on);
        if !self.may_speak(component, &uid, now) {
            return Decision::Drop;
        }
        let mut message = event.message.clone();
        if self.is_flood(component, &uid, &event, now) {
            message = "(combined from similar events)".to_owned();
            event.message = format!("(combined from similar events): {}", event.message);
        }
        let key = SeriesKey {
            component: component.to_owned(),
            uid,
            path: event.on.field_path.clone().unwrap_or_default(),
            type_: event.type_,
            reason: event.reason.clone(),
            message,
        };
        match self.series.get_mut(&key) {
            Some(series) => {
                series.count = series.count.saturating_add(1);
                series.last = now;
                Decision::Repeat { key, name: series.name.clone(), count: series.count, event }
            }
            None => Decision::Create(key, event),
        }
    }

    fn created(&mut self, key: SeriesKey, name: String, now: Timestamp) {
        bound(&mut self.series, |series| series.last);
        self.series.insert(key, Series { name, count: 1, last: now });
    }

    fn forget(&mut self, key: &SeriesKey) {
        self.series.remove(key);
    }

    fn may_speak(&mut self, component: &str, uid: &str, now: Timestamp) -> bool {
        bound(&mut self.buckets, |bucket| bucket.last);
        let bucket = self
            .buckets
            .entry((component.to_owned(), uid.to_owned()))
            .or_insert(Bucket { tokens: SPAM_BURST, last: now });
        let elapsed = now.duration_since(bucket.last).as_secs_f64().max(0.0);
        bucket.tokens = (bucket.tokens + elapsed / SPAM_REFILL.as_secs_f64()).min(SPAM_BURST);
        bucket.last = now;
        let allowed = bucket.tokens >= 1.0;
        if allowed {
            bucket.tokens -= 1.0;
        }
        allowed
    }

    fn is_flood(&mut self, component: &str, uid: &str, event: &EventRecord, now: Timestamp) -> bool {
        bound(&mut self.similar, |similar| similar.last);
        let key = SimilarKey {
            component: component.to_owned(),
            uid: uid.to_owned(),
            type_: event.type_,
            reason: event.reason.clone(),
        };
        match self.similar.entry(key) {
            Entry::Vacant(entry) => {
                entry.insert(Similar { messages: vec![event.message.clone()], last: now });
                false
            }
            Entry::Occupied(mut entry) => {
                let similar = entry.get_mut();
                if now.duration_since(similar.last).as_secs_f64() > SIMILAR_WINDOW.as_secs_f64() {
                    similar.messages.clear();
                }
                similar.last = now;
                if similar.messages.contains(&event.message) {
                    return false;
                }
                if similar.messages.len() < SIMILAR {
                    similar.messages.push(event.message.clone());
                }
                similar.messages.len() >= SIMILAR
            }
        }
    }
}

/// The object's uid, or its names when it has none (such as an event about something that does not exist).
fn identity(on: &ObjectReference) -> String {
    on.uid.clone().filter(|uid| !uid.is_empty()).unwrap_or_else(|| {
        format!("{}/{}/{}", on.kind.as_deref().unwrap_or(""), namespace(on), on.name.as_deref().unwrap_or(""))
    })
}

/// Makes room by forgetting the older half.
fn bound<K: Clone + Eq + Hash, V>(map: &mut HashMap<K, V>, last: impl Fn(&V) -> Timestamp) {
    if map.len() < REMEMBERED {
        return;
    }
    let mut times: Vec<_> = map.values().map(&last).collect();
    times.sort_unstable();
    let middle = times[times.len() / 2];
    map.retain(|_, value| last(value) > middle);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(message: &str) -> EventRecord {
        let on = ObjectReference { uid: Some("u".to_owned()), name: Some("web".to_owned()), ..Default::default() };
        EventRecord::new(on, EventType::Normal, "Created", message.to_owned())
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    /// What happens to an event, creations taking place at once.
    fn see(correlator: &mut Correlator, message: &str, second: i64) -> String {
        match correlator.correlate("c", event(message), at(second)) {
            Decision::Drop => "drop".to_owned(),
            Decision::Create(key, event) => {
                correlator.created(key, "n".to_owned(), at(second));
                event.message
            }
            Decision::Repeat { count, event, .. } => format!("{} x{count}", event.message),
        }
    }

    #[test]
    fn repetitions_are_counted() {
        let mut correlator = Correlator::default();
        assert_eq!(see(&mut correlator, "a", 0), "a");
        assert_eq!(see(&mut correlator, "a", 1), "a x2");
        assert_eq!(see(&mut correlator, "b", 2), "b");
        assert_eq!(see(&mut correlator, "a", 3), "a x3");
    }

    #[test]
    fn floods_of_similar_events_are_combined() {
        let mut correlator = Correlator::default();
        for n in 0..9 {
            assert_eq!(see(&mut correlator, &n.to_string(), 0), n.to_string());
        }
        assert_eq!(see(&mut correlator, "9", 0), "(combined from similar events): 9");
        assert_eq!(see(&mut correlator, "10", 0), "(combined from similar events): 10 x2");
        assert_eq!(see(&mut correlator, "11", 3000), "11", "the window has passed");
    }

    #[test]
    fn a_source_is_cut_off_when_it_talks_too_much() {
        let mut correlator = Correlator::default();
        for _ in 0..25 {
            assert_ne!(see(&mut correlator, "a", 0), "drop");
        }
        assert_eq!(see(&mut correlator, "a", 299), "drop");
        assert_eq!(see(&mut correlator, "a", 600), "a x26");
    }

    #[test]
    fn memory_is_bounded() {
        let mut correlator = Correlator::default();
        for n in 0..3 * REMEMBERED as i64 {
            let mut other = event("a");
            other.on.uid = Some(n.to_string());
            if let Decision::Create(key, _) = correlator.correlate("c", other, at(n)) {
                correlator.created(key, "n".to_owned(), at(n));
            }
        }
        assert!(correlator.series.len() <= REMEMBERED && correlator.buckets.len() <= REMEMBERED);
    }
}
