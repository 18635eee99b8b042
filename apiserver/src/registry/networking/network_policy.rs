//! `NetworkPolicy`: who may talk to whom.

use crate::registry::declared::{Declared, Shape};
use crate::registry::strategy::Column;
use crate::registry::tables::{age, name, selector};
use crate::registry::{defaults, validation};

pub static NETWORK_POLICY: Declared = Declared::new(Shape::Counted)
    .defaults(defaults::networking::network_policy)
    .rules(validation::networking::network_policy)
    .table(&[Column::name(), Column::new("Pod-Selector", "string"), Column::age()], |obj, now| {
        vec![name(obj), selector(&obj["spec"]["podSelector"]), age(obj, now)]
    });
