//! `Namespace`: where names live. It stays until its finalizers are gone; the controller empties it meanwhile.

use apimachinery::status::FieldError;
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::registry::common::{self, StatusOf};
use crate::registry::defaults;
use crate::registry::object::ObjectExt;
use crate::registry::strategy::{Column, Cx, NameRule, Strategy, Subresource, keep};
use crate::registry::tables::{age, name, text};

pub struct Namespace;

/// The `finalize` subresource: the only way to take finalizers out of `spec`.
struct Finalize;

/// The finalizer of every namespace, which the namespace controller removes when it is empty.
const FINALIZER: &str = "kubernetes";

const COLUMNS: &[Column] = &[Column::name(), Column::new("Status", "string"), Column::age()];

static STATUS: StatusOf = StatusOf::new().validated(|obj, _| phase(obj));
static FINALIZE: Finalize = Finalize;

/// The names of the finalizers; which path they are complained about at depends on who asks, as upstream.
fn finalizers(obj: &Value, path: impl Fn(usize) -> String) -> Vec<FieldError> {
    use apimachinery::meta::validation::is_qualified_name;
    let mut errors = Vec::new();
    for (index, finalizer) in obj.list_at(&["spec", "finalizers"]).iter().enumerate() {
        let (text, path) = (finalizer.as_str().unwrap_or_default(), path(index));
        errors.extend(is_qualified_name(text).into_iter().map(|m| FieldError::invalid(&path, text, m)));
        if !text.contains('/') && !crate::verbs::metadata::STANDARD_FINALIZERS.contains(&text) {
            let detail = "name is neither a standard finalizer name nor is it fully qualified";
            errors.push(FieldError::invalid(&path, text, detail));
        }
    }
    errors
}

/// A namespace is terminating exactly when it is being deleted.
fn phase(obj: &Value) -> Vec<FieldError> {
    let given = obj.str_at(&["status", "phase"]);
    let (wanted, detail) = if obj.is_being_deleted() {
        ("Terminating", "may only be 'Terminating' if `deletionTimestamp` is not empty")
    } else {
        ("Active", "may only be 'Active' if `deletionTimestamp` is empty")
    };
    if given == wanted { vec![] } else { vec![FieldError::invalid("status.Phase", given, detail)] }
}

impl Strategy for Namespace {
    fn default(&self, obj: &mut Value) {
        defaults::core::namespace(obj);
    }

    fn prepare_for_create(&self, _cx: &Cx<'_>, obj: &mut Value) {
        defaults::core::namespace(obj);
        obj.set(&["status"], json!({"phase": "Active"}));
        let mut finalizers = obj.list_at(&["spec", "finalizers"]).to_vec();
        if !finalizers.iter().any(|f| f == FINALIZER) {
            finalizers.push(FINALIZER.into());
        }
        obj.set(&["spec", "finalizers"], finalizers);
    }

    fn prepare_for_update(&self, _cx: &Cx<'_>, obj: &mut Value, old: &Value) {
        common::update_uncounted(obj, old);
        keep(obj, old, "spec");
    }

    fn validate_create(&self, _cx: &Cx<'_>, obj: &Value) -> Vec<FieldError> {
        finalizers(obj, |_| "spec.finalizers".into())
    }

    fn name_rule(&self) -> NameRule {
        NameRule::Dns1123Label
    }

    fn keeps_on_delete(&self, obj: &Value) -> bool {
        !obj.list_at(&["spec", "finalizers"]).is_empty()
    }

    fn marked_by_time_alone(&self, _old: &Value) -> bool {
        true
    }

    fn on_marked_deleted(&self, obj: &mut Value) {
        obj.set(&["status", "phase"], "Terminating");
    }

    fn selectable_fields(&self) -> &'static [&'static str] {
        &["status.phase"]
    }

    fn columns(&self) -> &'static [Column] {
        COLUMNS
    }

    fn row(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        vec![name(obj), text(obj, &["status", "phase"]), age(obj, now)]
    }

    fn subresource(&self, name: &str) -> Option<Subresource> {
        match name {
            "status" => Some(Subresource::Update(&STATUS)),
            "finalize" => Some(Subresource::Update(&FINALIZE)),
            _ => None,
        }
    }
}

impl Strategy for Finalize {
    fn prepare_for_update(&self, _cx: &Cx<'_>, obj: &mut Value, old: &Value) {
        common::update_uncounted(obj, old);
    }

    fn validate_update(&self, _cx: &Cx<'_>, obj: &Value, _old: &Value) -> Vec<FieldError> {
        let paths = |index: usize| format!("spec.finalizers[{index}]");
        finalizers(obj, paths)
    }

    fn keeps_on_delete(&self, obj: &Value) -> bool {
        Namespace.keeps_on_delete(obj)
    }
}
