//! Which objects of a resource a list or watch is about.

use apimachinery::meta::{FieldSelector, LabelSelector};

use super::stored::{Stored, label_marks};
use super::watchers::Event;

/// Namespace, name, labels and fields: all must match.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    pub namespace: Option<String>,
    pub name: Option<String>,
    pub labels: Option<LabelSelector>,
    pub fields: Option<FieldSelector>,
}

/// A selection made ready for many objects.
pub struct Filter<'s> {
    selection: &'s Selection,
    /// Marks that every selected object's labels have.
    marks: u64,
}

impl Filter<'_> {
    pub fn matches(&self, object: &Stored) -> bool {
        // One number tells of most objects that they are not meant, without a look at their labels.
        object.meta.label_marks & self.marks == self.marks && self.selection.matches(object)
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
    }

    /// Whether labels or fields narrow the answer, so that it cannot be counted without looking.
    pub fn is_filtered(&self) -> bool {
        self.labels.is_some() || self.fields.is_some()
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
    use std::sync::Arc;

    #[test]
    fn a_filter_and_its_selection_agree() {
        let kind = Arc::new(KindInfo::default());
        let object = |index: usize| {
            let labels = format!("{{\"app\":\"a{}\",\"tier\":\"t{}\",\"n\":\"{index}\"}}", index % 7, index % 3);
            let text = format!("{{\"metadata\":{{\"name\":\"o{index}\",\"labels\":{labels}}}}}");
            Stored::decode(&kind, "/k", text.as_bytes(), 1).expect("an object")
        };
        let objects: Vec<Stored> = (0..210).map(object).collect();
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
            let selected = objects.iter().filter(|object| selection.matches(object)).count();
            assert_eq!((filtered, selected), (expected, expected), "{text}");
        }
    }
}
