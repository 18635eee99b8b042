//! Which objects of a resource a list or watch is about.

use apimachinery::meta::{FieldSelector, LabelSelector};

use super::stored::Stored;
use super::watchers::Event;

/// Namespace, name, labels and fields: all must match.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    pub namespace: Option<String>,
    pub name: Option<String>,
    pub labels: Option<LabelSelector>,
    pub fields: Option<FieldSelector>,
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
