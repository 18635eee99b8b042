//! The `node.k8s.io` group: `RuntimeClass`.

use super::declared::{Declared, Shape};
use super::strategy::Column;
use super::tables::{age, name, text};
use super::validation;

pub static RUNTIME_CLASS: Declared = Declared::new(Shape::Plain)
    .created_by_update()
    .updated_by_version()
    .rules(validation::scheduling::runtime_class)
    .update_rules(validation::scheduling::runtime_class_update)
    .table(&[Column::name(), Column::new("Handler", "string"), Column::age()], |obj, now| {
        vec![name(obj), text(obj, &["handler"]), age(obj, now)]
    });
