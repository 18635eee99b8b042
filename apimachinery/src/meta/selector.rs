//! Label selectors (from a query string or an object) and field selectors: parsing with upstream's grammar, matching.

use std::fmt;

use serde_json::Value;

use super::validation;

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SelectorError {
    #[error("unable to parse requirement: {0}")]
    Requirement(String),
    #[error("found '{found}', expected: {expected}")]
    Unexpected { found: String, expected: &'static str },
    #[error("{0:?} is not a valid label selector operator")]
    Operator(String),
    #[error("invalid selector: '{selector}'; can't understand '{part}'")]
    Field { selector: String, part: String },
}

/// How a label's value has to relate to the requirement's values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operator {
    In,
    NotIn,
    Exists,
    DoesNotExist,
    GreaterThan,
    LessThan,
}

/// One condition on one label.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Requirement {
    pub key: String,
    pub operator: Operator,
    /// Sorted; empty for the existence operators, one integer for the comparing ones.
    pub values: Vec<String>,
}

/// A conjunction of requirements. Without any it matches everything; [`LabelSelector::nothing`] matches nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LabelSelector {
    requirements: Vec<Requirement>,
    nothing: bool,
}

impl Requirement {
    /// Checks the key, the number of values and the values.
    pub fn new(key: &str, operator: Operator, mut values: Vec<String>) -> Result<Self, SelectorError> {
        let bad = |why: String| Err(SelectorError::Requirement(why));
        if let Some(why) = validation::is_qualified_name(key).first() {
            return bad(format!("<nil>: Invalid value: {key:?}: {why}"));
        }
        match operator {
            Operator::In | Operator::NotIn if values.is_empty() => {
                return bad("values: Invalid value: []: for 'in', 'notin' operators, values set can't be empty".into());
            }
            Operator::GreaterThan | Operator::LessThan if values.len() != 1 || values[0].parse::<i64>().is_err() => {
                return bad("values: for 'Gt', 'Lt' operators, exactly one integer value is required".into());
            }
            Operator::Exists | Operator::DoesNotExist if !values.is_empty() => {
                return bad("values: values set must be empty for exists and does not exist".into());
            }
            _ => {}
        }
        for value in &values {
            if let Some(why) = validation::is_valid_label_value(value).first() {
                return bad(format!("values[0][{key}]: Invalid value: {value:?}: {why}"));
            }
        }
        values.sort();
        values.dedup();
        Ok(Self { key: key.to_owned(), operator, values })
    }

    pub fn matches(&self, value: Option<&str>) -> bool {
        let listed = |v: &str| self.values.iter().any(|x| x == v);
        let compare = |greater: bool| {
            let wanted = self.values.first().and_then(|v| v.parse::<i64>().ok());
            match (value.and_then(|v| v.parse::<i64>().ok()), wanted) {
                (Some(have), Some(want)) => {
                    if greater {
                        have > want
                    } else {
                        have < want
                    }
                }
                _ => false,
            }
        };
        match self.operator {
            Operator::In => value.is_some_and(listed),
            Operator::NotIn => !value.is_some_and(listed),
            Operator::Exists => value.is_some(),
            Operator::DoesNotExist => value.is_none(),
            Operator::GreaterThan => compare(true),
            Operator::LessThan => compare(false),
        }
    }
}

impl fmt::Display for Requirement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let values = self.values.join(",");
        match (self.operator, self.values.len()) {
            (Operator::In, 1) => write!(f, "{}={values}", self.key),
            (Operator::In, _) => write!(f, "{} in ({values})", self.key),
            (Operator::NotIn, 1) => write!(f, "{}!={values}", self.key),
            (Operator::NotIn, _) => write!(f, "{} notin ({values})", self.key),
            (Operator::Exists, _) => f.write_str(&self.key),
            (Operator::DoesNotExist, _) => write!(f, "!{}", self.key),
            (Operator::GreaterThan, _) => write!(f, "{}>{values}", self.key),
            (Operator::LessThan, _) => write!(f, "{}<{values}", self.key),
        }
    }
}

impl LabelSelector {
    pub fn everything() -> Self {
        Self::default()
    }

    pub fn nothing() -> Self {
        Self { requirements: Vec::new(), nothing: true }
    }

    /// The labels that everything selected has.
    pub fn pairs(&self) -> impl Iterator<Item = (&str, &str)> {
        self.requirements.iter().filter_map(|requirement| match (requirement.operator, &requirement.values[..]) {
            (Operator::In, [value]) => Some((requirement.key.as_str(), value.as_str())),
            _ => None,
        })
    }

    /// Reads the query-string form: `a=b,c!=d,e in (x,y),!f,g>5`.
    pub fn parse(text: &str) -> Result<Self, SelectorError> {
        let requirements = Parser::new(text).requirements()?;
        Ok(Self { requirements, nothing: false })
    }

    /// Reads a `metav1.LabelSelector` object. An absent (null) one matches nothing, an empty one everything.
    pub fn from_json(selector: &Value) -> Result<Self, SelectorError> {
        let Some(selector) = selector.as_object() else { return Ok(Self::nothing()) };
        let mut requirements = Vec::new();
        for (key, value) in selector.get("matchLabels").and_then(Value::as_object).into_iter().flatten() {
            let value = value.as_str().unwrap_or_default().to_owned();
            requirements.push(Requirement::new(key, Operator::In, vec![value])?);
        }
        for item in selector.get("matchExpressions").and_then(Value::as_array).into_iter().flatten() {
            let text = |name| item.get(name).and_then(Value::as_str).unwrap_or_default();
            let operator = match text("operator") {
                "In" => Operator::In,
                "NotIn" => Operator::NotIn,
                "Exists" => Operator::Exists,
                "DoesNotExist" => Operator::DoesNotExist,
                other => return Err(SelectorError::Operator(other.to_owned())),
            };
            let values = item.get("values").and_then(Value::as_array);
            let values = values.into_iter().flatten().filter_map(|v| v.as_str().map(str::to_owned)).collect();
            requirements.push(Requirement::new(text("key"), operator, values)?);
        }
        Ok(Self { requirements, nothing: false })
    }

    /// Reads a plain map (`spec.selector` of a Service or ReplicationController): every pair has to match.
    pub fn from_map(labels: &Value) -> Self {
        let requirement = |(key, value): (&String, &Value)| Requirement {
            key: key.clone(),
            operator: Operator::In,
            values: vec![value.as_str().unwrap_or_default().to_owned()],
        };
        let requirements = labels.as_object().into_iter().flatten().map(requirement).collect();
        Self { requirements, nothing: false }
    }

    pub fn matches<'a>(&self, get: impl Fn(&str) -> Option<&'a str>) -> bool {
        !self.nothing && self.requirements.iter().all(|r| r.matches(get(&r.key)))
    }

    /// Whether the labels (an object's `metadata.labels`, possibly null) match.
    pub fn matches_value(&self, labels: &Value) -> bool {
        self.matches(|key| labels.get(key).and_then(Value::as_str))
    }

    pub fn requirements(&self) -> &[Requirement] {
        &self.requirements
    }

    /// Whether it matches everything.
    pub fn is_empty(&self) -> bool {
        !self.nothing && self.requirements.is_empty()
    }
}

impl fmt::Display for LabelSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.nothing {
            return f.write_str("<null>");
        }
        for (index, requirement) in self.requirements.iter().enumerate() {
            write!(f, "{}{requirement}", if index == 0 { "" } else { "," })?;
        }
        Ok(())
    }
}

struct Parser<'a> {
    rest: &'a str,
}

const SPECIAL: [char; 7] = ['=', '!', '(', ')', ',', '>', '<'];

impl<'a> Parser<'a> {
    fn new(text: &'a str) -> Self {
        Self { rest: text }
    }

    fn peek(&mut self) -> Option<char> {
        self.rest = self.rest.trim_start();
        self.rest.chars().next()
    }

    /// Consumes `symbol` when it comes next.
    fn eat(&mut self, symbol: &str) -> bool {
        self.peek();
        let Some(rest) = self.rest.strip_prefix(symbol) else { return false };
        self.rest = rest;
        true
    }

    /// The next identifier; empty when a symbol comes next.
    fn word(&mut self) -> &'a str {
        self.peek();
        let end = self.rest.find(|c: char| SPECIAL.contains(&c) || c.is_whitespace()).unwrap_or(self.rest.len());
        let (word, rest) = self.rest.split_at(end);
        self.rest = rest;
        word
    }

    fn unexpected<T>(&mut self, expected: &'static str) -> Result<T, SelectorError> {
        let found = self.peek().map(String::from).unwrap_or_default();
        Err(SelectorError::Unexpected { found, expected })
    }

    fn requirements(&mut self) -> Result<Vec<Requirement>, SelectorError> {
        let mut requirements = Vec::new();
        if self.peek().is_none() {
            return Ok(requirements);
        }
        loop {
            requirements.push(self.requirement()?);
            match self.peek() {
                None => break,
                Some(',') => self.rest = &self.rest[1..],
                Some(_) => return self.unexpected("',' or 'end of string'"),
            }
            if matches!(self.peek(), None | Some(',')) {
                return self.unexpected("identifier after ','");
            }
        }
        requirements.sort_by(|a, b| a.key.cmp(&b.key));
        Ok(requirements)
    }

    fn requirement(&mut self) -> Result<Requirement, SelectorError> {
        let absent = self.eat("!");
        let key = self.word();
        if key.is_empty() {
            return self.unexpected("!, identifier, or 'end of string'");
        }
        if absent {
            return Requirement::new(key, Operator::DoesNotExist, Vec::new());
        }
        if matches!(self.peek(), None | Some(',')) {
            return Requirement::new(key, Operator::Exists, Vec::new());
        }
        for (symbol, operator) in [
            ("==", Operator::In),
            ("=", Operator::In),
            ("!=", Operator::NotIn),
            (">", Operator::GreaterThan),
            ("<", Operator::LessThan),
        ] {
            if self.eat(symbol) {
                let value = self.word().to_owned();
                return Requirement::new(key, operator, vec![value]);
            }
        }
        let operator = match self.word() {
            "in" => Operator::In,
            "notin" => Operator::NotIn,
            other => {
                let expected = "in, notin, =, ==, !=, gt, lt";
                return Err(SelectorError::Requirement(format!("found '{other}', expected: {expected}")));
            }
        };
        let values = self.values()?;
        Requirement::new(key, operator, values)
    }

    fn values(&mut self) -> Result<Vec<String>, SelectorError> {
        if !self.eat("(") {
            return self.unexpected("'('");
        }
        let mut values = Vec::new();
        loop {
            values.push(self.word().to_owned());
            if self.eat(")") {
                return Ok(values);
            }
            if !self.eat(",") {
                return self.unexpected("',' or ')'");
            }
        }
    }
}

/// One condition on one field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldRequirement {
    /// A dotted path, e.g. `spec.nodeName`.
    pub field: String,
    pub equal: bool,
    pub value: String,
}

/// A conjunction of (in)equalities on fields.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FieldSelector {
    requirements: Vec<FieldRequirement>,
}

impl FieldSelector {
    /// Reads `a=b,c!=d,e==f`; in values `\`, `,` and `=` are escaped by `\`.
    pub fn parse(text: &str) -> Result<Self, SelectorError> {
        let mut requirements = Vec::new();
        for part in split_escaped(text).into_iter().filter(|part| !part.is_empty()) {
            let bad = || SelectorError::Field { selector: text.to_owned(), part: part.to_owned() };
            let (field, equal, value) = split_operator(part).ok_or_else(bad)?;
            let value = unescape(value).ok_or_else(bad)?;
            requirements.push(FieldRequirement { field: field.to_owned(), equal, value });
        }
        Ok(Self { requirements })
    }

    pub fn requirements(&self) -> &[FieldRequirement] {
        &self.requirements
    }

    /// For who serves fields under other names than it stores them.
    pub fn requirements_mut(&mut self) -> &mut [FieldRequirement] {
        &mut self.requirements
    }

    pub fn is_empty(&self) -> bool {
        self.requirements.is_empty()
    }

    /// The one value the field may have, if the selector says so.
    pub fn exact(&self, field: &str) -> Option<&str> {
        self.requirements.iter().find(|r| r.equal && r.field == field).map(|r| r.value.as_str())
    }

    /// An absent field counts as empty.
    pub fn matches<T: AsRef<str>>(&self, get: impl Fn(&str) -> Option<T>) -> bool {
        let is = |value: Option<T>, wanted: &str| value.as_ref().map_or("", AsRef::as_ref) == wanted;
        self.requirements.iter().all(|r| is(get(&r.field), &r.value) == r.equal)
    }
}

impl fmt::Display for FieldSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, r) in self.requirements.iter().enumerate() {
            let value = r.value.replace('\\', "\\\\").replace(',', "\\,").replace('=', "\\=");
            let comma = if index == 0 { "" } else { "," };
            write!(f, "{comma}{}{}{value}", r.field, if r.equal { "=" } else { "!=" })?;
        }
        Ok(())
    }
}

/// Splits at commas that no backslash precedes.
fn split_escaped(text: &str) -> Vec<&str> {
    let mut parts = Vec::new();
    let (mut start, mut escaped) = (0, false);
    for (index, c) in text.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            ',' => {
                parts.push(&text[start..index]);
                start = index + 1;
            }
            _ => {}
        }
    }
    parts.push(&text[start..]);
    parts
}

fn split_operator(part: &str) -> Option<(&str, bool, &str)> {
    let index = part.find(['=', '!'])?;
    let (field, rest) = part.split_at(index);
    if let Some(value) = rest.strip_prefix("!=") {
        return Some((field, false, value));
    }
    let value = rest.strip_prefix("==").or_else(|| rest.strip_prefix('='))?;
    Some((field, true, value))
}

fn unescape(value: &str) -> Option<String> {
    let mut out = String::with_capacity(value.len());
    let mut chars = value.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => match chars.next()? {
                c @ ('\\' | ',' | '=') => out.push(c),
                _ => return None,
            },
            ',' | '=' => return None,
            c => out.push(c),
        }
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn matches(selector: &str, labels: &[(&str, &str)]) -> bool {
        let selector = LabelSelector::parse(selector).unwrap_or_else(|e| panic!("{selector}: {e}"));
        selector.matches(|key| labels.iter().find(|(k, _)| *k == key).map(|(_, v)| *v))
    }

    #[test]
    fn label_selectors_match_as_documented() {
        let labels = [("app", "web"), ("tier", "front"), ("n", "7")];
        for (selector, expected) in [
            ("", true),
            ("app=web", true),
            ("app == web,tier=front", true),
            ("app!=web", false),
            ("other!=x", true),
            ("app in (a, web)", true),
            ("app notin (web)", false),
            ("tier", true),
            ("!tier", false),
            ("!none", true),
            ("n>6", true),
            ("n<7", false),
            ("app in (,web)", true),
            ("x in ()", false),
            ("app=", false),
        ] {
            assert_eq!(matches(selector, &labels), expected, "{selector}");
        }
    }

    #[test]
    fn label_selectors_refuse_nonsense() {
        for text in ["a=b,", ",a", "a b", "a in x", "a in (x", "=x", "a>x", "a!b", "-a=b", "a=b c", "a in (x))"] {
            assert!(LabelSelector::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn selector_objects() {
        assert!(!LabelSelector::from_json(&Value::Null).expect("null").matches(|_| None));
        assert!(LabelSelector::from_json(&json!({})).expect("empty").matches(|_| None));
        let selector = LabelSelector::from_json(&json!({"matchLabels": {"a": "b"},
            "matchExpressions": [{"key": "c", "operator": "NotIn", "values": ["y", "x"]}]}));
        let selector = selector.expect("valid");
        assert_eq!(selector.to_string(), "a=b,c notin (x,y)");
        assert!(selector.matches_value(&json!({"a": "b"})));
        assert!(LabelSelector::from_json(&json!({"matchExpressions": [{"key": "c", "operator": "Nope"}]})).is_err());
    }

    #[test]
    fn field_selectors() {
        let selector =
            FieldSelector::parse(r"spec.nodeName=a\,b,status.phase!=Running,metadata.name==x").expect("valid");
        assert_eq!(selector.exact("spec.nodeName"), Some("a,b"));
        assert_eq!(selector.to_string(), r"spec.nodeName=a\,b,status.phase!=Running,metadata.name=x");
        assert!(selector.matches(|f| match f {
            "spec.nodeName" => Some("a,b"),
            "metadata.name" => Some("x"),
            _ => None,
        }));
        assert!(FieldSelector::parse("a").is_err() && FieldSelector::parse(r"a=\x").is_err());
    }

    proptest! {
        #[test]
        fn any_text_is_handled(text in "[a-z=!(), <>\\\\]{0,30}") {
            if let Ok(selector) = LabelSelector::parse(&text) {
                prop_assert_eq!(LabelSelector::parse(&selector.to_string()), Ok(selector));
            }
            if let Ok(selector) = FieldSelector::parse(&text) {
                prop_assert_eq!(FieldSelector::parse(&selector.to_string()), Ok(selector));
            }
        }
    }
}
