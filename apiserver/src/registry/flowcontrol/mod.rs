//! The `flowcontrol.apiserver.k8s.io` group: which requests wait in which queues.

pub mod presets;

use serde_json::Value;

use super::common::{ALL_METADATA, StatusOf};
use super::declared::{Declared, Shape};
use super::object::ObjectExt;
use super::strategy::Column;
use super::tables::{NONE, age, condition, name, number, text, text_or};
use super::{defaults, validation};

static STATUS: StatusOf = StatusOf::new()
    .keeping(ALL_METADATA)
    .resetting(&[&["metadata"], &["spec"]])
    .validated(validation::flowcontrol::status);

pub static FLOW_SCHEMA: Declared = Declared::new(Shape::CountedWithStatus)
    .defaults(defaults::flowcontrol::flow_schema)
    .status(&STATUS)
    .rules(validation::flowcontrol::flow_schema)
    .table(
        &[
            Column::name(),
            Column::new("PriorityLevel", "string"),
            Column::new("MatchingPrecedence", "string"),
            Column::new("DistinguisherMethod", "string"),
            Column::age(),
            Column::new("MissingPL", "string"),
        ],
        |obj, now| {
            vec![
                name(obj),
                text(obj, &["spec", "priorityLevelConfiguration", "name"]),
                number(obj, &["spec", "matchingPrecedence"]),
                text_or(obj, &["spec", "distinguisherMethod", "type"], NONE),
                age(obj, now),
                condition(obj, "Dangling").map_or("?", |c| c.str_at(&["status"])).into(),
            ]
        },
    );

pub static PRIORITY_LEVEL_CONFIGURATION: Declared = Declared::new(Shape::CountedWithStatus)
    .defaults(defaults::flowcontrol::priority_level)
    .status(&STATUS)
    .rules(validation::flowcontrol::priority_level)
    .table(
        &[
            Column::name(),
            Column::new("Type", "string"),
            Column::new("NominalConcurrencyShares", "string"),
            Column::new("Queues", "string"),
            Column::new("HandSize", "string"),
            Column::new("QueueLengthLimit", "string"),
            Column::age(),
        ],
        |obj, now| {
            let or_none = |value: &Value| if value.is_null() { NONE.into() } else { value.clone() };
            let limited = &obj["spec"]["limited"];
            let queuing = &limited["limitResponse"]["queuing"];
            vec![
                name(obj),
                text(obj, &["spec", "type"]),
                or_none(&limited["nominalConcurrencyShares"]),
                or_none(&queuing["queues"]),
                or_none(&queuing["handSize"]),
                or_none(&queuing["queueLengthLimit"]),
                age(obj, now),
            ]
        },
    );
