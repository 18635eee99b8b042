//! Object metadata: names of kinds and resources, quantities, label and field selectors, validation of names.

mod names;
mod quantity;
mod selector;
pub mod validation;

pub use names::{GroupKind, GroupResource, GroupVersion, GroupVersionKind, GroupVersionResource, Name};
pub use quantity::{Format as QuantityFormat, Quantity, QuantityError};
pub use selector::{FieldRequirement, FieldSelector, LabelSelector, Operator, Requirement, SelectorError};
