//! Kinds that are data: what to fill in, which columns to show, which rules to check. A kind that does more has a
//! strategy of its own.

use apimachinery::status::FieldError;
use jiff::Timestamp;
use serde_json::Value;

use super::common::{self, StatusOf};
use super::object::ObjectExt;
use super::strategy::{Column, Cx, NameRule, Strategy, Subresource};
use super::tables;

/// What of an object the server keeps count of.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// No status, no generation: config, roles, leases.
    Plain,
    /// The generation counts changes of everything but `metadata`.
    Counted,
    /// The same, but for new objects, which have none.
    CountedLater,
    /// The generation is 1 and stays so.
    Numbered,
    /// A status that only its subresource writes.
    WithStatus,
    /// Both.
    CountedWithStatus,
}

/// A kind without code of its own.
pub struct Declared {
    pub shape: Shape,
    pub default: fn(&mut Value),
    pub columns: &'static [Column],
    pub row: fn(&Value, Timestamp) -> Vec<Value>,
    pub rules: fn(&Value) -> Vec<FieldError>,
    pub create_rules: fn(&Value) -> Vec<FieldError>,
    pub update_rules: fn(&Value, &Value) -> Vec<FieldError>,
    /// Fields of features that are off: dropped unless the stored object has them.
    pub gated: &'static [&'static [&'static str]],
    pub whole_update_rules: Option<fn(&Value, &Value) -> Vec<FieldError>>,
    /// Changes a new object, or a changed one, before it is checked.
    pub prepare: fn(&mut Value, Option<&Value>),
    pub name_rule: NameRule,
    pub create_on_update: bool,
    pub unconditional_update: bool,
    pub status: Option<&'static StatusOf>,
    pub selectable: &'static [&'static str],
    pub warn: fn(&Value) -> Vec<String>,
    /// The same, for new objects only.
    pub warn_new: fn(&Value) -> Vec<String>,
}

const NAME_AND_AGE: &[Column] = &[Column::name(), Column::age()];

impl Declared {
    pub const fn new(shape: Shape) -> Self {
        Self {
            shape,
            default: |_| {},
            columns: NAME_AND_AGE,
            row: |obj, now| vec![tables::name(obj), tables::age(obj, now)],
            rules: |_| Vec::new(),
            create_rules: |_| Vec::new(),
            update_rules: |_, _| Vec::new(),
            gated: &[],
            whole_update_rules: None,
            prepare: |_, _| {},
            name_rule: NameRule::Dns1123Subdomain,
            create_on_update: false,
            unconditional_update: true,
            status: None,
            selectable: &[],
            warn: |_| Vec::new(),
            warn_new: |_| Vec::new(),
        }
    }

    pub const fn defaults(mut self, default: fn(&mut Value)) -> Self {
        self.default = default;
        self
    }

    pub const fn table(mut self, columns: &'static [Column], row: fn(&Value, Timestamp) -> Vec<Value>) -> Self {
        self.columns = columns;
        self.row = row;
        self
    }

    /// Rules for every write.
    pub const fn rules(mut self, rules: fn(&Value) -> Vec<FieldError>) -> Self {
        self.rules = rules;
        self
    }

    /// Rules for new objects, beside those for every write.
    pub const fn create_rules(mut self, rules: fn(&Value) -> Vec<FieldError>) -> Self {
        self.create_rules = rules;
        self
    }

    pub const fn gated(mut self, fields: &'static [&'static [&'static str]]) -> Self {
        self.gated = fields;
        self
    }

    pub const fn prepared(mut self, prepare: fn(&mut Value, Option<&Value>)) -> Self {
        self.prepare = prepare;
        self
    }

    /// Rules for updates, beside those for every write: what may not change.
    pub const fn update_rules(mut self, rules: fn(&Value, &Value) -> Vec<FieldError>) -> Self {
        self.update_rules = rules;
        self
    }

    pub const fn named(mut self, rule: NameRule) -> Self {
        self.name_rule = rule;
        self
    }

    pub const fn created_by_update(mut self) -> Self {
        self.create_on_update = true;
        self
    }

    /// An update must say which version it is based on.
    pub const fn updated_by_version(mut self) -> Self {
        self.unconditional_update = false;
        self
    }

    pub const fn status(mut self, status: &'static StatusOf) -> Self {
        self.status = Some(status);
        self
    }

    /// What users are told about an object that is accepted.
    pub const fn warned(mut self, warn: fn(&Value) -> Vec<String>) -> Self {
        self.warn = warn;
        self
    }

    pub const fn warned_when_new(mut self, warn: fn(&Value) -> Vec<String>) -> Self {
        self.warn_new = warn;
        self
    }

    /// Rules for updates, instead of those for every write: what was wrong before may stay.
    pub const fn rules_of_updates(mut self, rules: fn(&Value, &Value) -> Vec<FieldError>) -> Self {
        self.whole_update_rules = Some(rules);
        self
    }

    pub const fn selectable(mut self, fields: &'static [&'static str]) -> Self {
        self.selectable = fields;
        self
    }
}

impl Shape {
    fn has_status(self) -> bool {
        matches!(self, Self::WithStatus | Self::CountedWithStatus)
    }

    fn is_counted(self) -> bool {
        matches!(self, Self::Counted | Self::CountedWithStatus)
    }
}

/// Whether all but `metadata`, `status` and the type are the same.
fn same_content(obj: &Value, old: &Value) -> bool {
    let content = |value: &Value| {
        let mut fields = value.as_object().cloned().unwrap_or_default();
        fields.retain(|key, _| !matches!(key.as_str(), "metadata" | "status" | "kind" | "apiVersion"));
        Value::Object(fields)
    };
    common::same(&content(obj), &content(old))
}

impl Strategy for Declared {
    fn default(&self, obj: &mut Value) {
        (self.default)(obj);
    }

    fn prepare_for_create(&self, _cx: &Cx<'_>, obj: &mut Value) {
        (self.prepare)(obj, None);
        if self.shape.has_status() {
            common::empty_status(obj);
            (self.default)(obj);
        }
        if self.shape.is_counted() || self.shape == Shape::Numbered {
            common::set_generation(obj, 1);
        }
        for field in self.gated {
            obj.remove_at(field);
        }
    }

    fn prepare_for_update(&self, _cx: &Cx<'_>, obj: &mut Value, old: &Value) {
        (self.prepare)(obj, Some(old));
        if self.shape.has_status() {
            common::update_uncounted(obj, old);
        }
        if self.shape.is_counted() || self.shape == Shape::CountedLater {
            common::count_change(obj, old, same_content(obj, old));
        }
        for field in self.gated.iter().filter(|field| old.at(field).is_none()) {
            obj.remove_at(field);
        }
    }

    fn validate_create(&self, _cx: &Cx<'_>, obj: &Value) -> Vec<FieldError> {
        let mut errors = (self.rules)(obj);
        errors.extend((self.create_rules)(obj));
        errors
    }

    fn validate_update(&self, _cx: &Cx<'_>, obj: &Value, old: &Value) -> Vec<FieldError> {
        let mut errors = match self.whole_update_rules {
            Some(rules) => rules(obj, old),
            None => (self.rules)(obj),
        };
        errors.extend((self.update_rules)(obj, old));
        errors
    }

    fn name_rule(&self) -> NameRule {
        self.name_rule
    }

    fn allow_create_on_update(&self) -> bool {
        self.create_on_update
    }

    fn allow_unconditional_update(&self) -> bool {
        self.unconditional_update
    }

    fn selectable_fields(&self) -> &'static [&'static str] {
        self.selectable
    }

    fn warnings(&self, _cx: &Cx<'_>, obj: &Value, old: Option<&Value>) -> Vec<String> {
        let mut warnings = (self.warn)(obj);
        if old.is_none() {
            warnings.extend((self.warn_new)(obj));
        }
        warnings
    }

    fn columns(&self) -> &'static [Column] {
        self.columns
    }

    fn row(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        (self.row)(obj, now)
    }

    fn subresource(&self, name: &str) -> Option<Subresource> {
        match self.status {
            Some(status) if name == "status" => Some(Subresource::Update(status)),
            _ => None,
        }
    }

    fn reset_fields(&self) -> &'static [&'static [&'static str]] {
        if self.shape.has_status() { &[&["status"]] } else { &[] }
    }
}
