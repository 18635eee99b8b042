//! Who watches a resource, indexed by what they select on, so that one object's change wakes only those who may care.
//! A watcher is a bounded queue: one that does not keep up is ended, and never holds the others.

use std::collections::HashMap;
use std::sync::Arc;

use tokio::sync::mpsc;
use tokio::time::Instant;

use super::selection::Selection;
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
    queue: mpsc::Sender<Arc<Event>>,
}

#[derive(Default)]
pub(super) struct Watchers {
    by_key: HashMap<Key, Vec<Watcher>>,
    next_id: u64,
}

impl Watchers {
    /// Registers a watcher; it gets every event from now on that its selection may be about, and some that it is not.
    pub(super) fn add(&mut self, kind: &KindInfo, selection: &Selection) -> (u64, mpsc::Receiver<Arc<Event>>) {
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
        for key in keys {
            if let Some(watchers) = self.by_key.get_mut(&key) {
                watchers.retain(|watcher| watcher.queue.try_send(event.clone()).is_ok());
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
