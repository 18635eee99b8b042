//! Which objects of a resource a list or watch is about.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use apimachinery::meta::{FieldSelector, LabelSelector};
use apimachinery::status::{Result, Status};
use parking_lot::Mutex;
use serde_json::Value;

use super::resource::Slot;
use super::stored::{Stored, label_marks};
use super::watchers::Event;

/// Namespace, name, labels and fields: all must match.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    pub namespace: Option<String>,
    pub name: Option<String>,
    pub labels: Option<LabelSelector>,
    pub fields: Option<FieldSelector>,
    /// Instead of `fields`, where what they are in depends on a conversion.
    pub converted: Option<Arc<ConvertedFields>>,
}

/// Turns stored objects, as trees, into the version that is looked at.
type Convert = dyn Fn(Vec<Value>) -> Result<Vec<Value>> + Send + Sync;

/// Fields of another version than the stored one: the objects are converted, all of a list at once, and the answers
/// are remembered. A conversion that fails matches nothing and is kept, for the list or watch to end with.
pub struct ConvertedFields {
    selector: FieldSelector,
    convert: Box<Convert>,
    known: Mutex<HashMap<(Arc<str>, u64), bool>>,
    failure: OnceLock<Status>,
}

/// How many answers a watch remembers.
const KNOWN_MAX: usize = 4096;

impl ConvertedFields {
    pub fn new(
        selector: FieldSelector,
        convert: impl Fn(Vec<Value>) -> Result<Vec<Value>> + Send + Sync + 'static,
    ) -> Arc<Self> {
        let (known, failure) = Default::default();
        Arc::new(Self { selector, convert: Box::new(convert), known, failure })
    }

    fn matches(&self, object: &Stored) -> bool {
        let key = (object.key.clone(), object.revision);
        if let Some(known) = self.known.lock().get(&key) {
            return *known;
        }
        let matched = match (self.convert)(vec![object.value()]) {
            Ok(converted) => converted.first().is_some_and(|tree| self.selects(object, tree)),
            Err(status) => {
                tracing::warn!(key = %object.key, error = %status.message, "cannot tell whether an object is selected");
                drop(self.failure.set(status));
                return false;
            }
        };
        let mut known = self.known.lock();
        if known.len() >= KNOWN_MAX {
            known.clear();
        }
        known.insert(key, matched);
        matched
    }

    fn learn(&self, objects: &[&Arc<Stored>]) -> Result<()> {
        let converted = (self.convert)(objects.iter().map(|object| object.value()).collect())?;
        let answers = objects.iter().zip(&converted).map(|(object, tree)| {
            let key = (object.key.clone(), object.revision);
            (key, self.selects(object, tree))
        });
        self.known.lock().extend(answers);
        Ok(())
    }

    fn selects(&self, object: &Stored, tree: &Value) -> bool {
        self.selector.matches(|name| match name {
            "metadata.name" | "metadata.namespace" => object.field(name).map(Cow::from),
            path => Some(scalar_at(tree, path)),
        })
    }
}

impl std::fmt::Debug for ConvertedFields {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ConvertedFields").field("selector", &self.selector).finish_non_exhaustive()
    }
}

fn scalar_at<'t>(tree: &'t Value, path: &str) -> Cow<'t, str> {
    match path.split('.').try_fold(tree, |value, part| value.get(part)) {
        Some(Value::String(text)) => text.into(),
        Some(value @ (Value::Bool(_) | Value::Number(_))) => value.to_string().into(),
        _ => "".into(),
    }
}

/// A selection made ready for many objects.
pub struct Filter<'s> {
    selection: &'s Selection,
    /// Marks that every selected object's labels have.
    marks: u64,
}

impl Filter<'_> {
    pub fn matches(&self, slot: &Slot) -> bool {
        // One number tells of most objects that they are not meant, without a look at them.
        slot.marks & self.marks == self.marks && self.selection.matches(&slot.object)
    }
}

/// What an event is to someone who only sees what he selected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    Added,
    Modified,
    /// The object is gone, or does not match any more.
    Deleted,
}

impl Seen {
    pub fn name(self) -> &'static str {
        match self {
            Self::Added => "ADDED",
            Self::Modified => "MODIFIED",
            Self::Deleted => "DELETED",
        }
    }
}

impl Selection {
    pub fn filter(&self) -> Filter<'_> {
        let pairs = self.labels.iter().flat_map(LabelSelector::pairs);
        Filter { selection: self, marks: label_marks(pairs) }
    }

    pub fn matches(&self, object: &Stored) -> bool {
        self.namespace.as_deref().is_none_or(|namespace| namespace == object.namespace())
            && self.name.as_deref().is_none_or(|name| name == object.name())
            && self.labels.as_ref().is_none_or(|labels| labels.matches(|name| object.label(name)))
            && self.fields.as_ref().is_none_or(|fields| fields.matches(|name| object.field(name)))
            && self.converted.as_ref().is_none_or(|converted| converted.matches(object))
    }

    /// To be called with the objects that many calls of `matches` will be about: what has to be converted to be
    /// looked at is converted together, and the error is known before anything is answered.
    pub fn prepare<'o>(&self, slots: impl Iterator<Item = &'o Slot>) -> Result<()> {
        let Some(converted) = &self.converted else { return Ok(()) };
        let apart = Self { converted: None, ..self.clone() };
        let objects: Vec<_> = slots.map(|slot| &slot.object).filter(|object| apart.matches(object)).collect();
        converted.learn(&objects)
    }

    /// Why it cannot be told any more what is selected.
    pub fn failure(&self) -> Option<&Status> {
        self.converted.as_ref()?.failure.get()
    }

    /// Whether labels or fields narrow the answer, so that it cannot be counted without looking.
    pub fn is_filtered(&self) -> bool {
        self.labels.is_some() || self.fields.is_some() || self.converted.is_some()
    }

    /// How the selection sees an event; `None`: not at all.
    pub fn see(&self, event: &Event) -> Option<Seen> {
        let before = event.previous.as_ref().is_some_and(|object| self.matches(object));
        let now = !event.deleted && self.matches(&event.object);
        match (before, now) {
            (false, true) => Some(Seen::Added),
            (true, true) => Some(Seen::Modified),
            (true, false) => Some(Seen::Deleted),
            (false, false) => None,
        }
    }

    /// The value that the indexed field must have, if the selection says so.
    pub(super) fn index_value(&self, indexed: &str) -> Option<&str> {
        self.fields.as_ref()?.exact(indexed)
    }
}

#[cfg(test)]
mod tests {
    use super::super::stored::KindInfo;
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn stored(index: usize, port: &str) -> Arc<Stored> {
        let text = format!("{{\"metadata\":{{\"name\":\"o{index}\"}},\"hostPort\":\"host{index}:{port}\"}}");
        let key = format!("/o{index}");
        Arc::new(Stored::decode(&Arc::new(KindInfo::default()), &key, text.as_bytes(), 1).expect("an object"))
    }

    fn split(mut tree: Value) -> Value {
        let (host, port) = tree["hostPort"].as_str().and_then(|text| text.split_once(':')).expect("host and port");
        let (host, port) = (Value::from(host), Value::from(port));
        tree["host"] = host;
        tree["port"] = port;
        tree
    }

    #[test]
    fn converted_fields_select_and_each_object_is_converted_once() {
        let calls = Arc::new(AtomicUsize::new(0));
        let counted = calls.clone();
        let fields = FieldSelector::parse("port=80,metadata.name!=o0").expect("a selector");
        let converted = ConvertedFields::new(fields, move |trees| {
            counted.fetch_add(1, Ordering::Relaxed);
            Ok(trees.into_iter().map(split).collect())
        });
        let selection = Selection { converted: Some(converted), ..Selection::default() };
        let objects: Vec<_> = (0..4).map(|index| stored(index, if index == 3 { "81" } else { "80" }).into()).collect();
        selection.prepare(objects.iter()).expect("converts");
        let selected = objects.iter().map(|slot| &slot.object).filter(|object| selection.matches(object));
        let selected: Vec<_> = selected.map(|object| object.name().to_owned()).collect();
        assert_eq!((selected, calls.load(Ordering::Relaxed)), (vec!["o1".to_owned(), "o2".to_owned()], 1));
        assert!(selection.matches(&stored(7, "80")) && selection.matches(&stored(7, "80")));
        assert_eq!(calls.load(Ordering::Relaxed), 2, "a later object is converted alone, once");
    }

    #[test]
    fn a_conversion_that_fails_selects_nothing_and_says_so() {
        let fields = FieldSelector::parse("port=80").expect("a selector");
        let converted = ConvertedFields::new(fields, |_| Err(Status::internal("no webhook")));
        let selection = Selection { converted: Some(converted), ..Selection::default() };
        assert!(selection.prepare([stored(1, "80").into()].iter()).is_err());
        assert!(selection.failure().is_none());
        assert!(!selection.matches(&stored(1, "80")));
        assert!(selection.failure().is_some());
    }

    #[test]
    fn a_filter_and_its_selection_agree() {
        let kind = Arc::new(KindInfo::default());
        let object = |index: usize| {
            let labels = format!("{{\"app\":\"a{}\",\"tier\":\"t{}\",\"n\":\"{index}\"}}", index % 7, index % 3);
            let text = format!("{{\"metadata\":{{\"name\":\"o{index}\",\"labels\":{labels}}}}}");
            Stored::decode(&kind, "/k", text.as_bytes(), 1).expect("an object")
        };
        let objects: Vec<Slot> = (0..210).map(|index| Arc::new(object(index)).into()).collect();
        for (text, expected) in [
            ("app=a3", 30),
            ("app=a3,tier=t1", 10),
            ("app in (a1,a2)", 60),
            ("app!=a0", 180),
            ("tier", 210),
            ("app=none", 0),
        ] {
            let labels = Some(LabelSelector::parse(text).expect(text));
            let selection = Selection { labels, ..Selection::default() };
            let filter = selection.filter();
            let filtered = objects.iter().filter(|object| filter.matches(object)).count();
            let selected = objects.iter().filter(|slot| selection.matches(&slot.object)).count();
            assert_eq!((filtered, selected), (expected, expected), "{text}");
        }
    }
}
