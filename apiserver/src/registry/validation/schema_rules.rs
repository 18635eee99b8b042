//! Whether the rules in the schema of a custom resource (`x-kubernetes-validations`) can work: they compile, result in
//! what their places want, compare only what has a counterpart, and cannot cost too much.

use apimachinery::status::FieldError;
use serde_json::Value;

use super::{Errors, Path, go_versions};
use crate::cel::check::{Type, Variables};
use crate::cel::verify::check_types;
use crate::extensions::rules::declared::Declared;
use crate::extensions::rules::estimate::{PER_RULE, PER_SCHEMA, worst_cost};
use crate::registry::object::ObjectExt;

/// Rules that are named when all together cost too much.
const MOST_NAMED: usize = 4;

/// The schema must be a right one. `any_cost`: a rule may cost more than it should.
pub fn check(schema: &Value, path: Path<'_>, any_cost: bool, errors: &mut Errors) {
    let mut walk = Walk { any_cost, total: 0, expensive: vec![], errors: vec![] };
    walk.node(schema, path, Place { is_resource: true, most_often: Some(1), uncorrelated: None });
    errors.append(&mut walk.errors);
    if walk.total > PER_SCHEMA {
        let detail = "contributed to estimated rule cost total exceeding cost limit for entire OpenAPIv3 schema";
        errors.extend(walk.expensive.iter().map(|(_, path)| FieldError::forbidden(path, detail)));
        let what = "x-kubernetes-validations estimated rule cost total for entire OpenAPIv3 schema";
        errors.push(FieldError::forbidden(path, exceeds(what, walk.total, PER_SCHEMA)));
    }
}

/// Whether some rule of the schema can cost too much.
pub fn is_too_expensive(schema: &Value) -> bool {
    let mut walk = Walk { any_cost: false, total: 0, expensive: vec![], errors: vec![] };
    walk.node(schema, Path::Root(""), Place { is_resource: true, most_often: Some(1), uncorrelated: None });
    walk.errors.iter().any(|error| error.detail.contains("exceeds budget by factor of"))
}

/// Where in the schema a part is.
#[derive(Clone, Copy)]
struct Place<'a> {
    is_resource: bool,
    /// How often such a value can be in an object; `None` when nothing bounds it.
    most_often: Option<u64>,
    /// The list around it whose items have no counterparts.
    uncorrelated: Option<Path<'a>>,
}

struct Walk {
    any_cost: bool,
    total: u64,
    /// The rules that cost most, with their paths.
    expensive: Vec<(u64, String)>,
    errors: Errors,
}

impl Walk {
    fn node(&mut self, schema: &Value, path: Path<'_>, place: Place<'_>) {
        let most_often = most_inner(schema).and_then(|inner| Some(place.most_often?.saturating_mul(inner)));
        let is_embedded = |schema: &Value| schema["x-kubernetes-embedded-resource"] == true;
        let inner = |schema: &Value| Place { is_resource: is_embedded(schema), most_often, ..place };
        let additional = &schema["additionalProperties"];
        if additional.is_object() {
            self.node(additional, path.field("additionalProperties"), inner(additional));
        }
        let properties = path.field("properties");
        for (name, property) in schema["properties"].as_object().into_iter().flatten() {
            self.node(property, properties.key(name), inner(property));
        }
        let items = &schema["items"];
        if items.is_object() {
            let has_keys = schema["x-kubernetes-list-type"] == "map";
            let uncorrelated = if has_keys { place.uncorrelated } else { place.uncorrelated.or(Some(path)) };
            self.node(items, path.field("items"), Place { uncorrelated, ..inner(items) });
        }
        self.own_rules(schema, path, place);
    }

    fn own_rules(&mut self, schema: &Value, path: Path<'_>, place: Place<'_>) {
        let rules = schema.list_at(&["x-kubernetes-validations"]);
        if rules.is_empty() {
            return;
        }
        let path = path.field("x-kubernetes-validations");
        let Some(declared) = Declared::read(schema, place.is_resource) else {
            let detail = "internal error: failed to construct type information for x-kubernetes-validations rules: unable to convert structural schema to CEL declarations";
            return self.errors.push(FieldError::internal(path, detail));
        };
        for (index, rule) in rules.iter().enumerate() {
            self.rule(rule, &declared, path.index(index), place);
        }
    }

    fn rule(&mut self, rule: &Value, declared: &Declared, path: Path<'_>, place: Place<'_>) {
        let is_optional = rule["optionalOldSelf"] == true;
        let own = declared.type_of();
        let old = if is_optional { Type::Dyn } else { own.clone() };
        let variables = Variables::from([("self".to_owned(), own), ("oldSelf".to_owned(), old)]);
        let wrong = |field: &str, detail: String| FieldError {
            shown: go_versions::print_rule(rule),
            ..FieldError::invalid(path.field(field), rule.clone(), detail)
        };
        let tree = match check_types(rule.str_at(&["rule"]), &variables) {
            Ok((Type::Bool | Type::Dyn, tree)) => tree,
            Ok(_) => return self.errors.push(wrong("rule", "cel expression must evaluate to a bool".into())),
            Err(why) => return self.errors.push(wrong("rule", why)),
        };
        let often = place.most_often.unwrap_or_else(|| declared.most_often());
        let cost = worst_cost(&tree, declared).saturating_mul(often);
        self.cost("estimated rule cost", cost, path.field("rule"));
        let message = rule.str_at(&["messageExpression"]);
        match Some(message).filter(|message| !message.is_empty()).map(|message| check_types(message, &variables)) {
            None => {}
            Some(Ok((Type::String | Type::Dyn, tree))) => {
                let cost = worst_cost(&tree, declared);
                self.cost("estimated messageExpression cost", cost, path.field("messageExpression"));
            }
            Some(Ok(_)) => {
                self.errors.push(wrong("messageExpression", "messageExpression must evaluate to a string".into()));
            }
            Some(Err(why)) => self.errors.push(wrong("messageExpression", format!("messageExpression {why}"))),
        }
        if tree.references().has_variable("oldSelf") {
            if let Some(list) = place.uncorrelated {
                let detail =
                    format!("oldSelf cannot be used on the uncorrelatable portion of the schema within {list}");
                self.errors.push(FieldError::invalid(path.field("rule"), rule.str_at(&["rule"]), detail));
            }
        } else if let Some(given) = rule.get("optionalOldSelf").filter(|given| !given.is_null()) {
            let detail = "may not be set if oldSelf is not used in rule";
            self.errors.push(FieldError::invalid(path.field("optionalOldSelf"), given.clone(), detail));
        }
    }

    fn cost(&mut self, what: &str, cost: u64, path: Path<'_>) {
        if !self.any_cost && cost > PER_RULE {
            self.errors.push(FieldError::forbidden(path, exceeds(what, cost, PER_RULE)));
        }
        self.total = self.total.saturating_add(cost);
        if cost >= PER_SCHEMA / 100 {
            self.expensive.push((cost, path.to_string()));
            self.expensive.sort_by_key(|(cost, _)| std::cmp::Reverse(*cost));
            self.expensive.truncate(MOST_NAMED);
        }
    }
}

/// How many values can be within one; `None` when nothing bounds it.
fn most_inner(schema: &Value) -> Option<u64> {
    let bound = |field: &str| schema[field].as_i64().map(|most| u64::try_from(most).unwrap_or(0));
    match schema.str_at(&["type"]) {
        "object" if !schema["additionalProperties"].is_null() => bound("maxProperties"),
        "array" => bound("maxItems"),
        _ => Some(1),
    }
}

#[allow(clippy::cast_precision_loss, reason = "only the size of the factor is told")]
fn exceeds(what: &str, cost: u64, limit: u64) -> String {
    let factor = cost as f64 / limit as f64;
    let factor = match factor {
        factor if factor > 100.0 => "more than 100x".to_owned(),
        factor if factor < 1.5 => format!("{factor:.6}x"),
        factor => format!("{factor:.1}x"),
    };
    format!(
        "{what} exceeds budget by factor of {factor} (try simplifying the rule, or adding maxItems, maxProperties, and maxLength where arrays, maps, and strings are declared)"
    )
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::tests::texts;
    use super::*;

    fn complaints(property: Value) -> Vec<String> {
        let schema = json!({"type": "object", "properties": {"a": property}});
        let mut errors = Errors::new();
        check(&schema, Path::Root("s"), false, &mut errors);
        texts(&errors)
    }

    fn ruled(mut schema: Value, rules: Value) -> Value {
        schema["x-kubernetes-validations"] = rules;
        schema
    }

    #[test]
    fn rules_that_work_are_let_be() {
        let spec = json!({"type": "object", "properties": {
            "size": {"type": "integer"}, "a-b": {"type": "string", "maxLength": 10},
            "list": {"type": "array", "maxItems": 10, "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["k"],
                "items": ruled(json!({"type": "object", "properties": {"k": {"type": "string", "maxLength": 5}}}),
                    json!([{"rule": "self.k == oldSelf.k"}]))},
        }});
        let rules = json!([
            {"rule": "self.size > 1 && self.a__dash__b.startsWith('x')"},
            {"rule": "self.size >= oldSelf.size", "messageExpression": "'was ' + string(oldSelf.size)"},
            {"rule": "oldSelf.orValue(self).size == self.size", "optionalOldSelf": true},
            {"rule": "self.list.all(item, item.k.matches('^[a-z]+$'))"},
            {"rule": "quantity('1').isLessThan(quantity(self.a__dash__b)) || isIP(self.a__dash__b)"},
        ]);
        assert_eq!(complaints(ruled(spec, rules)), Vec::<String>::new());
    }

    #[test]
    fn complaints_are_upstreams() {
        let spec = || json!({"type": "object", "properties": {"size": {"type": "integer"}}});
        let printed = |rule: &str, message: &str| {
            format!(
                r#"{{"Rule":"{rule}","Message":"","MessageExpression":"{message}","Reason":null,"FieldPath":"","OptionalOldSelf":null}}"#
            )
        };
        let at = "s.properties[a].x-kubernetes-validations[0]";
        let cases = [
            (
                ruled(spec(), json!([{"rule": "self.nope > 1"}])),
                format!(
                    "{at}.rule: Invalid value: {}: compilation failed: ERROR: <input>:1:5: undefined field 'nope'\n | self.nope > 1\n | ....^",
                    printed("self.nope > 1", "")
                ),
            ),
            (
                ruled(spec(), json!([{"rule": "self.size"}])),
                format!(
                    "{at}.rule: Invalid value: {}: cel expression must evaluate to a bool",
                    printed("self.size", "")
                ),
            ),
            (
                ruled(spec(), json!([{"rule": "true", "messageExpression": "1"}])),
                format!(
                    "{at}.messageExpression: Invalid value: {}: messageExpression must evaluate to a string",
                    printed("true", "1")
                ),
            ),
            (
                ruled(spec(), json!([{"rule": "true", "optionalOldSelf": true}])),
                format!("{at}.optionalOldSelf: Invalid value: true: may not be set if oldSelf is not used in rule"),
            ),
            (
                json!({"type": "array", "items": ruled(json!({"type": "integer"}), json!([{"rule": "self == oldSelf"}]))}),
                "s.properties[a].items.x-kubernetes-validations[0].rule: Invalid value: \"self == oldSelf\": oldSelf cannot be used on the uncorrelatable portion of the schema within s.properties[a]".to_owned(),
            ),
            (
                ruled(json!({"type": "array", "items": {"type": "string"}}), json!([{"rule": "self.all(x, self.all(y, x == y))"}])),
                format!("{at}.rule: Forbidden: estimated rule cost exceeds budget by factor of more than 100x (try simplifying the rule, or adding maxItems, maxProperties, and maxLength where arrays, maps, and strings are declared)"),
            ),
        ];
        for (property, expected) in cases {
            assert_eq!(complaints(property).first(), Some(&expected));
        }
    }
}
