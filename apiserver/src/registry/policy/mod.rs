//! The `policy` group: `PodDisruptionBudget`, how many pods of a kind may be missing at once.

use serde_json::Value;

use super::common::StatusOf;
use super::declared::{Declared, Shape};
use super::strategy::{Column, NameRule};
use super::tables::{age, name, number, scalar};
use super::{object::ObjectExt, validation};

static STATUS: StatusOf = StatusOf::new().validated(validation::policy::pod_disruption_budget_status);

pub static POD_DISRUPTION_BUDGET: Declared = Declared::new(Shape::CountedWithStatus)
    .defaults(status_counts)
    .named(NameRule::PathSegment)
    .updated_by_version()
    .rules(validation::policy::pod_disruption_budget)
    .status(&STATUS)
    .table(
        &[
            Column::name(),
            Column::new("Min Available", "string"),
            Column::new("Max Unavailable", "string"),
            Column::new("Allowed Disruptions", "integer"),
            Column::age(),
        ],
        |obj, now| {
            let limit = |field: &str| match &obj["spec"][field] {
                Value::Null => "N/A".into(),
                value => scalar(value).into(),
            };
            vec![
                name(obj),
                limit("minAvailable"),
                limit("maxUnavailable"),
                number(obj, &["status", "disruptionsAllowed"]),
                age(obj, now),
            ]
        },
    );

/// Counts that the status always carries.
fn status_counts(obj: &mut Value) {
    if obj["status"].is_object() {
        for count in ["disruptionsAllowed", "currentHealthy", "desiredHealthy", "expectedPods"] {
            obj.set_default(&["status", count], 0);
        }
    }
}
