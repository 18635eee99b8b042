//! The `scheduling.k8s.io` group: `PriorityClass`.

use super::declared::{Declared, Shape};
use super::strategy::Column;
use super::tables::{age, flag, name, number, text};
use super::{defaults, validation};

pub static PRIORITY_CLASS: Declared = Declared::new(Shape::Numbered)
    .defaults(defaults::flowcontrol::priority_class)
    .create_rules(validation::scheduling::priority_class)
    .update_rules(validation::scheduling::priority_class_update)
    .table(
        &[
            Column::name(),
            Column::new("Value", "integer"),
            Column::new("Global-Default", "boolean"),
            Column::age(),
            Column::new("PreemptionPolicy", "string"),
        ],
        |obj, now| {
            vec![
                name(obj),
                number(obj, &["value"]),
                flag(obj, &["globalDefault"]),
                age(obj, now),
                text(obj, &["preemptionPolicy"]),
            ]
        },
    );
