//! `x-kubernetes-validations`: rules in the schema of a custom resource, written in the expression language. They are
//! compiled once, when the definition is established; a schema without rules has none of this. Whether rules can be
//! compiled at all is checked when the definition is written (`registry/validation/schema_rules.rs`).

pub mod correlation;
pub mod declared;
pub mod escape;
pub mod estimate;
pub mod field_path;
mod keyed;

use std::collections::BTreeMap;

use apimachinery::status::FieldError;
use cel::common::types::CelOptional;
use serde_json::Value;

use super::validation::{NOWHERE, join, name};
use crate::cel::{CelError, Expression, Scope, budget};
use crate::registry::object::ObjectExt;
use correlation::{Correlation, Pair, same_item};
use declared::Declared;

const LONGEST_MESSAGE: usize = 5 * 1024;
const OUT_OF_BUDGET: &str =
    "validation failed due to running out of cost budget, no further validation rules will be run";

/// The rules of a schema.
pub struct Rules {
    schema: Value,
    root: Node,
}

/// The rules of a part of a schema, and of what is within it.
struct Node {
    own: Vec<Rule>,
    /// `None` only where there are no rules.
    declared: Option<Declared>,
    /// The schema's type, which complaints show instead of the value.
    kind: String,
    /// Some rule compares with the stored value.
    compares: bool,
    items: Option<Box<Node>>,
    properties: BTreeMap<String, Node>,
    additional: Option<Box<Node>>,
}

struct Rule {
    source: String,
    /// Or why it cannot be used.
    expression: Result<Expression, String>,
    message: String,
    message_expression: Option<Expression>,
    reason: String,
    /// Normalized; empty for the part itself.
    field_path: String,
    /// There is an `oldSelf` for new parts, too: it is an optional value.
    optional_old: bool,
    compares: bool,
}

impl Rules {
    /// `None`: the schema has no rules.
    pub fn read(schema: &Value) -> Option<Self> {
        let root = Node::read(schema, true)?;
        Some(Self { schema: schema.clone(), root })
    }

    /// What the rules complain of, and what they would complain of if it had not been so before.
    pub fn validate(&self, object: &Value, old: Option<&Value>) -> (Vec<FieldError>, Vec<FieldError>) {
        let mut run = Run { spent: 0, errors: vec![], let_pass: vec![] };
        let correlation = Correlation::root(old.map(|old| Pair::new(object, old, &self.schema)));
        // Whether the budget was enough is told by the complaints.
        let _ = self.root.validate("", object, old, &self.schema, correlation, &mut run);
        (run.errors, run.let_pass)
    }
}

/// One object being checked.
struct Run {
    spent: u64,
    errors: Vec<FieldError>,
    let_pass: Vec<FieldError>,
}

/// There is nothing left to spend, and a complaint about that.
struct Exhausted;

impl Node {
    fn read(schema: &Value, is_resource: bool) -> Option<Self> {
        if !mentions_rules(schema) {
            return None;
        }
        let read = |schema: &Value| Self::read(schema, schema["x-kubernetes-embedded-resource"] == true);
        let inner = |field: &str| Some(&schema[field]).filter(|schema| schema.is_object()).and_then(read).map(Box::new);
        let properties = schema["properties"].as_object().into_iter().flatten();
        let declared = Declared::read(schema, is_resource);
        let rules = schema.list_at(&["x-kubernetes-validations"]).iter().filter(|_| declared.is_some());
        let own: Vec<Rule> = rules.map(|rule| Rule::read(rule, schema)).collect();
        Some(Self {
            compares: own.iter().any(|rule| rule.compares),
            own,
            declared,
            kind: schema.str_at(&["type"]).to_owned(),
            items: inner("items"),
            properties: properties.filter_map(|(name, schema)| Some((name.clone(), read(schema)?))).collect(),
            additional: inner("additionalProperties"),
        })
    }

    fn validate<'a>(
        &self,
        path: &str,
        value: &'a Value,
        old: Option<&'a Value>,
        schema: &'a Value,
        correlation: Correlation<'a>,
        run: &mut Run,
    ) -> Result<(), Exhausted> {
        if value.is_null() {
            return Ok(());
        }
        self.judge(path, value, old.filter(|old| !old.is_null()), correlation, run)?;
        match value {
            Value::Array(items) => {
                let Some(node) = &self.items else { return Ok(()) };
                let old = old.and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
                for (index, item) in items.iter().enumerate() {
                    let (path, before) = (format!("{path}[{index}]"), same_item(schema, item, old));
                    node.validate(&path, item, before, &schema["items"], correlation.index(index), run)?;
                }
            }
            Value::Object(members) => {
                for (key, value) in members {
                    let before = old.and_then(|old| old.get(key));
                    let correlation = correlation.key(key);
                    if let Some(node) = &self.additional {
                        let path = format!("{path}[{key}]");
                        node.validate(&path, value, before, &schema["additionalProperties"], correlation, run)?;
                    }
                    if let Some(node) = self.properties.get(key) {
                        let inner = &schema["properties"][key];
                        node.validate(&join(path, key), value, before, inner, correlation, run)?;
                    }
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// Asks the part's own rules.
    fn judge(
        &self,
        path: &str,
        value: &Value,
        old: Option<&Value>,
        correlation: Correlation<'_>,
        run: &mut Run,
    ) -> Result<(), Exhausted> {
        let Some(declared) = self.declared.as_ref().filter(|_| !self.own.is_empty()) else { return Ok(()) };
        let complaint = |detail: String| FieldError::invalid(name(path), self.kind.as_str(), detail);
        if run.spent >= budget::PER_REQUEST {
            run.errors.push(complaint(OUT_OF_BUDGET.into()));
            return Err(Exhausted);
        }
        let mut scope = Scope::default();
        scope.set("self", declared.value(value));
        let before = old.filter(|_| self.compares).map(|old| declared.value(old));
        for rule in &self.own {
            if rule.compares && old.is_none() && !rule.optional_old {
                continue;
            }
            match (&before, rule.optional_old) {
                (Some(before), true) => scope.set("oldSelf", Box::new(CelOptional::of(before.clone()))),
                (None, true) => scope.set("oldSelf", Box::new(CelOptional::none())),
                (Some(before), false) => scope.set("oldSelf", before.clone()),
                (None, false) => {}
            }
            let expression = match &rule.expression {
                Ok(expression) => expression,
                Err(why) => {
                    run.errors.push(complaint(format!("rule compile error: {why}")));
                    continue;
                }
            };
            let spent = scope.spent();
            let answer = expression.evaluate_bool(&scope);
            run.spent += scope.spent() - spent;
            if run.spent > budget::PER_REQUEST {
                run.errors.push(complaint(OUT_OF_BUDGET.into()));
                return Err(Exhausted);
            }
            match answer {
                Ok(true) => {}
                Ok(false) => {
                    let error = rule.refusal(path, value, self, &scope, run)?;
                    let passes = !rule.compares && correlation.is_unchanged();
                    let complaints = if passes { &mut run.let_pass } else { &mut run.errors };
                    complaints.push(error);
                }
                Err(error) => {
                    run.errors.push(complaint(rule.failure(&error)));
                    if matches!(error, CelError::Cost { .. }) {
                        return Err(Exhausted);
                    }
                }
            }
        }
        Ok(())
    }
}

impl Rule {
    fn read(rule: &Value, schema: &Value) -> Self {
        let compile = |source: &str| Expression::compile(source).map_err(|error| error.to_string());
        let expression = compile(rule.str_at(&["rule"]));
        let path = rule.str_at(&["fieldPath"]);
        Self {
            source: rule.str_at(&["rule"]).trim().to_owned(),
            compares: expression.as_ref().is_ok_and(|expression| expression.uses("oldSelf")),
            expression,
            message: rule.str_at(&["message"]).trim().to_owned(),
            message_expression: Some(rule.str_at(&["messageExpression"]))
                .filter(|source| !source.is_empty())
                .and_then(|source| compile(source).ok()),
            reason: rule.str_at(&["reason"]).to_owned(),
            field_path: field_path::normalize(path, schema).unwrap_or_default(),
            optional_old: rule["optionalOldSelf"] == true,
        }
    }

    /// What a person calls the rule.
    fn title(&self) -> &str {
        if self.message.is_empty() { &self.source } else { &self.message }
    }

    /// Why the rule gave no answer.
    fn failure(&self, error: &CelError) -> String {
        let title = self.title();
        match error {
            CelError::Cost { .. } => format!(
                "'operation cancelled: actual cost limit exceeded': no further validation rules will be run due to call cost exceeds limit for rule: {title}"
            ),
            CelError::Evaluate { why, .. } if why.starts_with("no such overload") => format!(
                "'{why}': call arguments did not match a supported operator, function or macro signature for rule: {title}"
            ),
            CelError::Evaluate { why, .. } => format!("{why} evaluating rule: {title}"),
            CelError::Type { .. } | CelError::Compile(_) => format!("{error} evaluating rule: {title}"),
        }
    }

    /// The complaint about a value that does not satisfy the rule.
    fn refusal(
        &self,
        path: &str,
        value: &Value,
        node: &Node,
        scope: &Scope,
        run: &mut Run,
    ) -> Result<FieldError, Exhausted> {
        let place = match (path, self.field_path.as_str()) {
            (path, "") => name(path).to_owned(),
            (path, field) => join(path, field),
        };
        let detail = match self.computed_message(scope, run) {
            Ok(Some(message)) => message,
            Ok(None) if self.message.is_empty() => format!("failed rule: {}", self.source),
            Ok(None) => self.message.clone(),
            Err(why) => {
                run.errors.push(FieldError::invalid(place, node.kind.as_str(), why));
                return Err(Exhausted);
            }
        };
        let is_container = matches!(node.kind.as_str(), "object" | "array");
        let error = match self.reason.as_str() {
            "FieldValueForbidden" => FieldError::forbidden(place, detail),
            "FieldValueRequired" => FieldError::required(place, detail),
            "FieldValueDuplicate" => FieldError::duplicate(place, value.clone()),
            _ if is_container => FieldError::invalid_omitted(place, detail),
            _ => FieldError::invalid(place, value.clone(), detail),
        };
        Ok(FieldError { omitted: error.omitted || is_container && self.reason == "FieldValueDuplicate", ..error })
    }

    /// What the rule's message expression says, if it says something that can be shown. `Err`: it cost too much.
    fn computed_message(&self, scope: &Scope, run: &mut Run) -> Result<Option<String>, String> {
        let Some(expression) = &self.message_expression else { return Ok(None) };
        let spent = scope.spent();
        let answer = expression.evaluate_string(scope);
        run.spent += scope.spent() - spent;
        if run.spent > budget::PER_REQUEST {
            return Err(
                "messageExpression evaluation failed due to running out of cost budget, no further validation rules will be run".into(),
            );
        }
        match answer {
            Err(CelError::Cost { source_text }) => Err(format!(
                "no further validation rules will be run due to call cost exceeds limit for messageExpression: {source_text:?}"
            )),
            Err(error) => {
                tracing::debug!(%error, "a message of a rule cannot be computed");
                Ok(None)
            }
            Ok(text) => {
                let text = text.trim();
                let is_good = !text.is_empty() && text.len() <= LONGEST_MESSAGE && !text.contains('\n');
                Ok(is_good.then(|| text.to_owned()))
            }
        }
    }
}

/// Whether there are rules anywhere in a schema.
pub fn mentions_rules(schema: &Value) -> bool {
    match schema {
        Value::Object(map) => {
            map.get("x-kubernetes-validations").is_some_and(|rules| rules.as_array().is_some_and(|r| !r.is_empty()))
                || map.values().any(mentions_rules)
        }
        Value::Array(list) => list.iter().any(mentions_rules),
        _ => false,
    }
}

/// What is said where rules were not asked, because the object is wrong in ways that they rely on.
pub fn not_checked() -> FieldError {
    let detail = "some validation rules were not checked because the object was invalid; correct the existing errors to complete validation";
    FieldError::invalid_null(NOWHERE, detail)
}

#[cfg(test)]
mod tests;
