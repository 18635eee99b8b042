//! The `coordination.k8s.io` group: leases, by which nodes say they live and components agree who leads.

use apimachinery::meta::validation::is_config_map_key;

use super::declared::{Declared, Shape};
use super::strategy::{Column, NameRule};
use super::tables::{age, name, text};
use super::validation;

pub static LEASE: Declared = Declared::new(Shape::Plain)
    .created_by_update()
    .updated_by_version()
    .gated(&[&["spec", "strategy"], &["spec", "preferredHolder"]])
    .rules(validation::coordination::lease)
    .table(&[Column::name(), Column::new("Holder", "string"), Column::age()], |obj, now| {
        vec![name(obj), text(obj, &["spec", "holderIdentity"]), age(obj, now)]
    });

pub static LEASE_CANDIDATE: Declared = Declared::new(Shape::Plain)
    .named(NameRule::Custom(|name, _| is_config_map_key(name)))
    .created_by_update()
    .updated_by_version()
    .table(
        &[
            Column::name(),
            Column::new("LeaseName", "string"),
            Column::new("BinaryVersion", "string"),
            Column::new("EmulationVersion", "string"),
            Column::age(),
        ],
        |obj, now| {
            vec![
                name(obj),
                text(obj, &["spec", "leaseName"]),
                text(obj, &["spec", "binaryVersion"]),
                text(obj, &["spec", "emulationVersion"]),
                age(obj, now),
            ]
        },
    );
