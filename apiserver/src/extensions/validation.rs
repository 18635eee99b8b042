//! Checks an object against the `openAPIV3Schema` of its definition, with upstream's complaints. The schema has been
//! read once, patterns compiled; a check allocates only for what is wrong.

use std::collections::HashMap;

use apimachinery::status::FieldError;
use regex::Regex;
use serde_json::{Map, Value};

use super::rules::correlation::{Pair, same_item};

/// A schema, ready to check objects.
pub struct Validator {
    schema: Value,
    patterns: HashMap<String, Regex>,
    /// A whole resource, whose metadata are checked elsewhere and whose lists have keys.
    is_resource: bool,
}

#[derive(Debug, thiserror::Error)]
#[error("the pattern {pattern:?} is not a regular expression")]
pub struct PatternError {
    pattern: String,
    source: regex::Error,
}

impl Validator {
    pub fn new(schema: Value) -> Result<Self, PatternError> {
        let mut patterns = HashMap::new();
        compile(&schema, &mut patterns)?;
        Ok(Self { schema, patterns, is_resource: true })
    }

    /// Checks the default of a schema, which is a part of a resource.
    pub fn of_default(schema: Value) -> Result<Self, PatternError> {
        Self::new(schema).map(|validator| Self { is_resource: false, ..validator })
    }

    /// Everything that is wrong with the object; `metadata`, `kind` and `apiVersion` are checked elsewhere.
    pub fn validate(&self, object: &Value) -> Vec<FieldError> {
        let mut errors = Vec::new();
        self.check("", object, None, &self.schema, &mut errors);
        errors
    }

    /// The same for a new version of an object. Parts that did not change may stay wrong.
    pub fn validate_update(&self, object: &Value, old: &Value) -> Vec<FieldError> {
        let mut errors = Vec::new();
        self.check("", object, Some(old), &self.schema, &mut errors);
        errors
    }

    /// The same for a value that is somewhere; the details of complaints know nothing of that.
    pub fn validate_at(&self, place: &str, value: &Value) -> Vec<FieldError> {
        let mut errors = self.validate(value);
        for error in &mut errors {
            error.field = if error.field == NOWHERE { place.to_owned() } else { format!("{place}.{}", error.field) };
        }
        errors
    }

    /// As upstream, one check does not keep another from complaining, too.
    fn check(&self, path: &str, value: &Value, old: Option<&Value>, schema: &Value, errors: &mut Vec<FieldError>) {
        if value.is_null() && schema["nullable"] == true {
            return;
        }
        if old.is_some_and(|old| Pair::new(value, old, schema).is_unchanged()) {
            return;
        }
        check_type(path, value, schema, errors);
        check_enum(path, value, schema, errors);
        match value {
            Value::String(text) => self.check_string(path, text, schema, errors),
            Value::Number(_) => check_number(path, value, schema, errors),
            Value::Array(items) => self.check_list(path, items, old, schema, errors),
            Value::Object(map) => self.check_object(path, map, old, schema, errors),
            Value::Null | Value::Bool(_) => {}
        }
        if !value.is_null() {
            self.check_combined(path, value, schema, errors);
        }
    }

    fn check_string(&self, path: &str, text: &str, schema: &Value, errors: &mut Vec<FieldError>) {
        let length = text.chars().count() as u64;
        // Only the first of these is told.
        if let Some(max) = schema["maxLength"].as_u64().filter(|max| length > *max) {
            errors.push(FieldError::too_long(name(path), usize::try_from(max).unwrap_or(usize::MAX)));
        } else if let Some(min) = schema["minLength"].as_u64().filter(|min| length < *min) {
            errors.push(invalid(path, text, format!("should be at least {min} chars long")));
        } else if let Some(pattern) = schema["pattern"].as_str()
            && self.patterns.get(pattern).is_some_and(|regex| !regex.is_match(text))
        {
            errors.push(invalid(path, text, format!("should match '{pattern}'")));
        }
        if let Some(format) = schema["format"].as_str()
            && !has_format(text, format)
        {
            let detail = format!("{path} in body must be of type {format}: {text:?}");
            errors.push(FieldError::type_invalid(name(path), text, detail));
        }
    }

    fn check_list(
        &self,
        path: &str,
        items: &[Value],
        old: Option<&Value>,
        schema: &Value,
        errors: &mut Vec<FieldError>,
    ) {
        let count = items.len() as u64;
        if let Some(max) = schema["maxItems"].as_u64().filter(|max| count > *max) {
            errors.push(FieldError::too_many(name(path), items.len(), usize::try_from(max).unwrap_or(usize::MAX)));
        }
        if let Some(min) = schema["minItems"].as_u64().filter(|min| count < *min) {
            errors.push(invalid(path, Value::from(count), format!("should have at least {min} items")));
        }
        if schema["uniqueItems"] == true && items.iter().enumerate().any(|(i, item)| items[..i].contains(item)) {
            errors.push(invalid(path, Value::Array(items.to_vec()), "shouldn't contain duplicates".into()));
        }
        if self.is_resource {
            check_list_keys(path, items, schema, errors);
        }
        let item_schema = &schema["items"];
        if item_schema.is_object() {
            let old = old.and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
            for (index, item) in items.iter().enumerate() {
                let before = same_item(schema, item, old);
                self.check(&format!("{path}[{index}]"), item, before, item_schema, errors);
            }
        }
    }

    fn check_object(
        &self,
        path: &str,
        map: &Map<String, Value>,
        old: Option<&Value>,
        schema: &Value,
        errors: &mut Vec<FieldError>,
    ) {
        let count = map.len() as u64;
        if let Some(max) = schema["maxProperties"].as_u64().filter(|max| count > *max) {
            errors.push(FieldError::too_many(name(path), map.len(), usize::try_from(max).unwrap_or(usize::MAX)));
        }
        if let Some(min) = schema["minProperties"].as_u64().filter(|min| count < *min) {
            errors.push(invalid(path, Value::from(count), format!("should have at least {min} properties")));
        }
        for required in schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str) {
            if !map.contains_key(required) {
                errors.push(FieldError::required(join(path, required), ""));
            }
        }
        let (properties, additional) = (&schema["properties"], &schema["additionalProperties"]);
        for (key, value) in map {
            if self.is_resource && path.is_empty() && matches!(key.as_str(), "kind" | "apiVersion" | "metadata") {
                continue;
            }
            let inner = match properties.get(key) {
                Some(inner) => inner,
                None if additional.is_object() => additional,
                None => continue,
            };
            let before = old.and_then(|old| old.get(key));
            self.check(&join(path, key), value, before, inner, errors);
        }
    }

    /// What is combined of other schemas. Where none fits, the complaints of one of them are told, too.
    fn check_combined(&self, path: &str, value: &Value, schema: &Value, errors: &mut Vec<FieldError>) {
        let problems = |inner: &Value| {
            let mut found = Vec::new();
            self.check(path, value, None, inner, &mut found);
            found
        };
        let attempts = |name: &str| -> Vec<Vec<FieldError>> {
            schema[name].as_array().into_iter().flatten().map(problems).collect()
        };
        let fitting = |attempts: &[Vec<FieldError>]| attempts.iter().filter(|problems| problems.is_empty()).count();
        let closest = |attempts: Vec<Vec<FieldError>>| attempts.into_iter().min_by_key(Vec::len).unwrap_or_default();
        let any = attempts("anyOf");
        if !any.is_empty() && fitting(&any) == 0 {
            errors.push(combined(path, "must validate at least one schema (anyOf)"));
            errors.extend(closest(any));
        }
        let one = attempts("oneOf");
        match fitting(&one) {
            _ if one.is_empty() => {}
            1 => {}
            0 => {
                errors.push(combined(path, "must validate one and only one schema (oneOf). Found none valid"));
                errors.extend(closest(one));
            }
            many => {
                let detail = format!("must validate one and only one schema (oneOf). Found {many} valid alternatives");
                errors.push(combined(path, &detail));
            }
        }
        let all = attempts("allOf");
        let (count, fitting) = (all.len(), fitting(&all));
        errors.extend(all.into_iter().flatten());
        if fitting < count {
            let none = if fitting == 0 { ". None validated" } else { "" };
            errors.push(combined(path, &format!("must validate all the schemas (allOf){none}")));
        }
        if schema["not"].is_object() && problems(&schema["not"]).is_empty() {
            errors.push(combined(path, "must not validate the schema (not)"));
        }
    }
}

fn check_type(path: &str, value: &Value, schema: &Value, errors: &mut Vec<FieldError>) {
    if schema["x-kubernetes-int-or-string"] == true {
        if !(value.is_string() || value.is_i64() || value.is_u64()) {
            errors.push(wrong_type(path, value, "integer,string"));
        }
        return;
    }
    let fits = match schema["type"].as_str() {
        Some("string") => value.is_string(),
        Some("integer") => value.is_i64() || value.is_u64() || value.as_f64().is_some_and(|n| n.fract() == 0.0),
        Some("number") => value.is_number(),
        Some("boolean") => value.is_boolean(),
        Some("array") => value.is_array(),
        Some("object") => value.is_object(),
        None | Some("") => true,
        Some(_) => false,
    };
    if !fits {
        errors.push(wrong_type(path, value, schema["type"].as_str().unwrap_or_default()));
    }
}

fn compile(schema: &Value, patterns: &mut HashMap<String, Regex>) -> Result<(), PatternError> {
    match schema {
        Value::Object(map) => {
            if let Some(Value::String(pattern)) = map.get("pattern")
                && !patterns.contains_key(pattern)
            {
                let regex = Regex::new(pattern).map_err(|source| PatternError { pattern: pattern.clone(), source })?;
                patterns.insert(pattern.clone(), regex);
            }
            map.values().try_for_each(|inner| compile(inner, patterns))
        }
        Value::Array(list) => list.iter().try_for_each(|inner| compile(inner, patterns)),
        _ => Ok(()),
    }
}

fn check_enum(path: &str, value: &Value, schema: &Value, errors: &mut Vec<FieldError>) {
    let Some(allowed) = schema["enum"].as_array() else { return };
    if !allowed.contains(value) {
        let texts: Vec<String> =
            allowed.iter().map(|v| v.as_str().map_or_else(|| v.to_string(), str::to_owned)).collect();
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        errors.push(FieldError::not_supported(name(path), value.clone(), &texts));
    }
}

fn check_number(path: &str, value: &Value, schema: &Value, errors: &mut Vec<FieldError>) {
    let Some(number) = value.as_f64() else { return };
    let bound = |limit: &str, exclusive: &str| Some((schema[limit].as_f64()?, schema[exclusive] == true));
    match bound("maximum", "exclusiveMaximum") {
        Some((max, true)) if number >= max => {
            errors.push(invalid(path, value.clone(), format!("should be less than {max}")))
        }
        Some((max, false)) if number > max => {
            errors.push(invalid(path, value.clone(), format!("should be less than or equal to {max}")));
        }
        _ => {}
    }
    match bound("minimum", "exclusiveMinimum") {
        Some((min, true)) if number <= min => {
            errors.push(invalid(path, value.clone(), format!("should be greater than {min}")));
        }
        Some((min, false)) if number < min => {
            errors.push(invalid(path, value.clone(), format!("should be greater than or equal to {min}")));
        }
        _ => {}
    }
    if let Some(factor) = schema["multipleOf"].as_f64() {
        check_factor(path, value, factor, errors);
    }
}

/// Like upstream, whole numbers are divided by the whole part of the factor.
fn check_factor(path: &str, value: &Value, factor: f64, errors: &mut Vec<FieldError>) {
    #[allow(clippy::cast_possible_truncation, reason = "that is what upstream does")]
    let whole = factor as i64;
    let (is_multiple, factor) = match (value.as_i64(), value.as_f64()) {
        (Some(_), _) if whole <= 0 => {
            let detail = format!("factor MultipleOf declared for {path} must be positive: {whole}");
            return errors.push(FieldError::invalid(name(path), whole, detail));
        }
        (Some(number), _) => (number % whole == 0, whole.to_string()),
        (None, Some(number)) => (factor > 0.0 && (number / factor).fract() == 0.0, factor.to_string()),
        (None, None) => return,
    };
    if !is_multiple {
        errors.push(invalid(path, value.clone(), format!("should be a multiple of {factor}")));
    }
}

/// Sets and maps have no two items that are the same or have the same keys.
fn check_list_keys(path: &str, items: &[Value], schema: &Value, errors: &mut Vec<FieldError>) {
    let keys: Vec<&str> =
        schema["x-kubernetes-list-map-keys"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let key_of = |item: &Value| match schema["x-kubernetes-list-type"].as_str() {
        Some("set") => Some(item.clone()),
        Some("map") => Some(Value::Object(
            keys.iter().filter_map(|key| Some(((*key).to_owned(), item.get(*key)?.clone()))).collect(),
        )),
        _ => None,
    };
    let mut seen = std::collections::HashSet::new();
    for (index, item) in items.iter().enumerate() {
        if let Some(key) = key_of(item)
            && !seen.insert(key.to_string())
        {
            errors.push(FieldError::duplicate(format!("{path}[{index}]"), key));
        }
    }
}

fn has_format(text: &str, format: &str) -> bool {
    match format {
        "date-time" => text.parse::<jiff::Timestamp>().is_ok(),
        "date" => text.parse::<jiff::civil::Date>().is_ok(),
        "ipv4" => text.parse::<std::net::Ipv4Addr>().is_ok(),
        "ipv6" => text.parse::<std::net::Ipv6Addr>().is_ok(),
        "cidr" => text.parse::<ipnet::IpNet>().is_ok(),
        "uuid" => uuid::Uuid::parse_str(text).is_ok(),
        "byte" => {
            use base64::Engine;
            base64::engine::general_purpose::STANDARD.decode(text).is_ok()
        }
        _ => true,
    }
}

fn wrong_type(path: &str, value: &Value, expected: &str) -> FieldError {
    let actual = match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(n) if n.is_f64() => "number",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    };
    let detail = format!("{path} in body must be of type {expected}: {actual:?}");
    FieldError::type_invalid(name(path), actual, detail)
}

fn invalid(path: &str, value: impl Into<Value>, detail: String) -> FieldError {
    FieldError::invalid(name(path), value, format!("{path} in body {detail}"))
}

/// These are upstream's about the whole, and say themselves which part they mean.
fn combined(path: &str, detail: &str) -> FieldError {
    FieldError::invalid(NOWHERE, "", format!("{path:?} {detail}"))
}

/// The field of a complaint that is about no field in particular.
pub const NOWHERE: &str = "<nil>";

pub fn name(path: &str) -> &str {
    if path.is_empty() { NOWHERE } else { path }
}

pub fn join(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn complaints_are_upstreams() {
        let schema = json!({"type": "object", "properties": {"spec": {
            "type": "object", "required": ["size"],
            "properties": {
                "size": {"type": "integer", "minimum": 1, "maximum": 5},
                "color": {"type": "string", "enum": ["red", "green"]},
                "name": {"type": "string", "pattern": "^[a-z]+$", "maxLength": 3},
                "ports": {"type": "array", "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["port"],
                          "items": {"type": "object"}},
                "either": {"x-kubernetes-int-or-string": true},
            },
        }}});
        let validator = Validator::new(schema).expect("a schema");
        let cases = [
            (json!({"size": 1, "either": "a"}), vec![]),
            (json!({}), vec!["spec.size: Required value"]),
            (
                json!({"size": "x"}),
                vec![r#"spec.size: Invalid value: "string": spec.size in body must be of type integer: "string""#],
            ),
            (
                json!({"size": 9}),
                vec!["spec.size: Invalid value: 9: spec.size in body should be less than or equal to 5"],
            ),
            (
                json!({"size": 1, "color": "x"}),
                vec![r#"spec.color: Unsupported value: "x": supported values: "red", "green""#],
            ),
            (
                json!({"size": 1, "name": "a1"}),
                vec![r#"spec.name: Invalid value: "a1": spec.name in body should match '^[a-z]+$'"#],
            ),
            (
                json!({"size": 1, "ports": [{"port": 1}, {"port": 1}]}),
                vec![r#"spec.ports[1]: Duplicate value: {"port":1}"#],
            ),
        ];
        for (spec, expected) in cases {
            let errors: Vec<String> =
                validator.validate(&json!({"spec": spec})).iter().map(ToString::to_string).collect();
            assert_eq!(errors, expected);
        }
    }
}
