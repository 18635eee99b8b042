//! The `admissionregistration.k8s.io` group: webhooks and policies that judge other objects.

use serde_json::Value;

use super::common::{ALL_METADATA, StatusOf};
use super::declared::{Declared, Shape};
use super::object::ObjectExt;
use super::strategy::Column;
use super::tables::{UNSET, age, count, name, selector_text, text};
use super::{defaults, validation};

const WEBHOOK_COLUMNS: &[Column] = &[Column::name(), Column::new("Webhooks", "integer"), Column::age()];

fn webhook_row(obj: &Value, now: jiff::Timestamp) -> Vec<Value> {
    vec![name(obj), count(&obj["webhooks"]).into(), age(obj, now)]
}

pub static VALIDATING_WEBHOOK_CONFIGURATION: Declared = Declared::new(Shape::Counted)
    .defaults(defaults::admission::validating_webhooks)
    .updated_by_version()
    .rules(validation::webhooks::configuration)
    .rules_of_updates(validation::webhooks::configuration_update)
    .table(WEBHOOK_COLUMNS, webhook_row);

pub static MUTATING_WEBHOOK_CONFIGURATION: Declared = Declared::new(Shape::Counted)
    .defaults(defaults::admission::mutating_webhooks)
    .updated_by_version()
    .rules(validation::webhooks::configuration)
    .rules_of_updates(validation::webhooks::configuration_update)
    .table(WEBHOOK_COLUMNS, webhook_row);

static POLICY_STATUS: StatusOf = StatusOf::new()
    .keeping(ALL_METADATA)
    .resetting(&[&["metadata"], &["spec"]])
    .validated(validation::admission::policy_status);

pub static VALIDATING_ADMISSION_POLICY: Declared = Declared::new(Shape::CountedWithStatus)
    .defaults(defaults::admission::policy)
    .updated_by_version()
    .status(&POLICY_STATUS)
    .rules(validation::admission::validating_policy)
    .rules_of_updates(validation::admission::validating_policy_update)
    .table(
        &[Column::name(), Column::new("Validations", "integer"), Column::new("ParamKind", "string"), Column::age()],
        |obj, now| vec![name(obj), count(&obj["spec"]["validations"]).into(), param_kind(obj).into(), age(obj, now)],
    );

pub static MUTATING_ADMISSION_POLICY: Declared = Declared::new(Shape::Counted)
    .defaults(defaults::admission::policy)
    .updated_by_version()
    .rules(validation::admission::mutating_policy)
    .rules_of_updates(validation::admission::mutating_policy_update)
    .table(
        &[Column::name(), Column::new("Mutations", "integer"), Column::new("ParamKind", "string"), Column::age()],
        |obj, now| vec![name(obj), count(&obj["spec"]["mutations"]).into(), param_kind(obj).into(), age(obj, now)],
    );

const BINDING_COLUMNS: &[Column] =
    &[Column::name(), Column::new("PolicyName", "string"), Column::new("ParamRef", "string"), Column::age()];

fn binding_row(obj: &Value, now: jiff::Timestamp) -> Vec<Value> {
    vec![name(obj), text(obj, &["spec", "policyName"]), param_ref(obj).into(), age(obj, now)]
}

pub static VALIDATING_ADMISSION_POLICY_BINDING: Declared = Declared::new(Shape::Counted)
    .defaults(defaults::admission::policy_binding)
    .updated_by_version()
    .rules(validation::admission::validating_binding)
    .table(BINDING_COLUMNS, binding_row);

pub static MUTATING_ADMISSION_POLICY_BINDING: Declared = Declared::new(Shape::Counted)
    .defaults(defaults::admission::policy_binding)
    .updated_by_version()
    .rules(validation::admission::mutating_binding)
    .table(BINDING_COLUMNS, binding_row);

fn param_kind(obj: &Value) -> String {
    match &obj["spec"]["paramKind"] {
        Value::Null => UNSET.into(),
        kind => format!("{}/{}", kind.str_at(&["apiVersion"]), kind.str_at(&["kind"])),
    }
}

/// Whether a parameter's kind has namespaces is not known here: `*` stands for none or any.
fn param_ref(obj: &Value) -> String {
    let reference = &obj["spec"]["paramRef"];
    match (reference.str_at(&["namespace"]), reference.str_at(&["name"])) {
        ("", "") if reference["selector"].is_object() => selector_text(&reference["selector"]),
        (_, "") => UNSET.into(),
        ("", name) => format!("*/{name}"),
        (namespace, name) => format!("{namespace}/{name}"),
    }
}
