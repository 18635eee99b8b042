//! Object metadata: names of kinds and resources, quantities, label and field selectors, validation of names.

mod names;

pub use names::{GroupKind, GroupResource, GroupVersion, GroupVersionKind, GroupVersionResource};
