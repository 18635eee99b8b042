//! Who watches a resource, indexed by what they select on, so that one object's change wakes only those who may care.
//! A watcher is a bounded queue: one that does not keep up is ended, and never holds the others.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::selection::{Seen, Selection};
use super::stored::{KindInfo, Stored};

/// How many events a watcher may lag behind.
const QUEUE: usize = 1024;

/// One change of one object.
#[derive(Debug)]
pub struct Event {
    pub revision: u64,
    /// The new state, or the last one, under the deletion's revision.
    pub object: Arc<Stored>,
    pub previous: Option<Arc<Stored>>,
    pub deleted: bool,
    pub(super) at: Instant,
}

/// An event on its way to watchers, and what is sent of it. The first watcher that needs an encoded form makes it for
/// all; it goes with the last one that has sent it, so that the history holds objects and no frames.
#[derive(Debug)]
pub struct Delivery {
    event: Arc<Event>,
    frames: [[OnceLock<Bytes>; 3]; 2],
}

/// The encodings of frames that are shared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameKind {
    Json,
    Protobuf,
}

impl std::ops::Deref for Delivery {
    type Target = Event;

    fn deref(&self) -> &Event {
        &self.event
    }
}

impl Delivery {
    pub(super) fn new(event: Arc<Event>) -> Arc<Self> {
        Arc::new(Self { event, frames: Default::default() })
    }

    /// The frame of the event, as a watcher sees it who selects as `seen` says.
    pub fn frame(&self, kind: FrameKind, seen: Seen, make: impl FnOnce() -> Bytes) -> Bytes {
        self.frames[kind as usize][seen as usize].get_or_init(make).clone()
    }
}

#[derive(Debug, PartialEq, Eq, Hash)]
enum Key {
    All,
    Namespace(Box<str>),
    Name(Box<str>, Box<str>),
    /// The value of the kind's indexed field.
    Field(Box<str>),
}

struct Watcher {
    id: u64,
    queue: mpsc::Sender<Arc<Delivery>>,
}

#[derive(Default)]
pub(super) struct Watchers {
    by_key: HashMap<Key, Vec<Watcher>>,
    next_id: u64,
}

impl Watchers {
    /// Registers a watcher; it gets every event from now on that its selection may be about, and some that it is not.
    pub(super) fn add(&mut self, kind: &KindInfo, selection: &Selection) -> (u64, mpsc::Receiver<Arc<Delivery>>) {
        let (queue, receiver) = mpsc::channel(QUEUE);
        let id = self.next_id;
        self.next_id += 1;
        self.by_key.entry(Self::key(kind, selection)).or_default().push(Watcher { id, queue });
        (id, receiver)
    }

    pub(super) fn remove(&mut self, kind: &KindInfo, selection: &Selection, id: u64) {
        let key = Self::key(kind, selection);
        if let Some(watchers) = self.by_key.get_mut(&key) {
            watchers.retain(|watcher| watcher.id != id);
            if watchers.is_empty() {
                self.by_key.remove(&key);
            }
        }
    }

    pub(super) fn len(&self) -> usize {
        self.by_key.values().map(Vec::len).sum()
    }

    /// Ends every watch: their clients list anew.
    pub(super) fn clear(&mut self) {
        self.by_key.clear();
    }

    pub(super) fn send(&mut self, event: &Arc<Event>) {
        if self.by_key.is_empty() {
            return;
        }
        let object = &event.object;
        let mut keys = vec![Key::All, Key::Name(object.namespace().into(), object.name().into())];
        if !object.namespace().is_empty() {
            keys.push(Key::Namespace(object.namespace().into()));
        }
        let now = object.index_value();
        keys.extend(now.map(|value| Key::Field(value.into())));
        let before = event.previous.as_ref().and_then(|previous| previous.index_value());
        if before != now {
            keys.extend(before.map(|value| Key::Field(value.into())));
        }
        let delivery = Delivery::new(event.clone());
        for key in keys {
            if let Some(watchers) = self.by_key.get_mut(&key) {
                watchers.retain(|watcher| watcher.queue.try_send(delivery.clone()).is_ok());
                if watchers.is_empty() {
                    self.by_key.remove(&key);
                }
            }
        }
    }

    fn key(kind: &KindInfo, selection: &Selection) -> Key {
        let indexed = kind.indexed.and_then(|index| kind.fields.get(index));
        match (&selection.namespace, &selection.name) {
            (namespace, Some(name)) if namespace.is_some() => {
                Key::Name(namespace.as_deref().unwrap_or_default().into(), name.as_str().into())
            }
            _ => match (indexed.and_then(|(field, _)| selection.index_value(field)), &selection.namespace) {
                (Some(value), _) => Key::Field(value.into()),
                (None, Some(namespace)) if !namespace.is_empty() => Key::Namespace(namespace.as_str().into()),
                (None, _) => Key::All,
            },
        }
    }
}
