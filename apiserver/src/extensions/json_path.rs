//! The little of JSONPath that printer columns use: `.a.b`, `['a']`, `[0]`, `[*]`, `[?(@.type=="Ready")]`.

use serde_json::Value;

#[derive(Clone, Debug, PartialEq)]
enum Step {
    Field(String),
    Index(i64),
    All,
    /// Items whose value at the path is this text.
    Where(Vec<String>, String),
}

/// A parsed path; one that cannot be parsed finds nothing.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct JsonPath(Option<Vec<Step>>);

impl JsonPath {
    pub fn parse(text: &str) -> Self {
        Self(steps(text))
    }

    /// The first value at the path.
    pub fn first<'a>(&self, value: &'a Value) -> Option<&'a Value> {
        let steps = self.0.as_ref()?;
        let mut found = vec![value];
        for step in steps {
            found = found.into_iter().flat_map(|value| step.of(value)).collect();
        }
        found.into_iter().next()
    }
}

impl Step {
    fn of<'a>(&self, value: &'a Value) -> Vec<&'a Value> {
        match self {
            Self::Field(name) => value.get(name).into_iter().collect(),
            Self::Index(index) => {
                let list = value.as_array().map_or(&[][..], Vec::as_slice);
                let at = if *index < 0 { list.len() as i64 + index } else { *index };
                usize::try_from(at).ok().and_then(|at| list.get(at)).into_iter().collect()
            }
            Self::All => match value {
                Value::Array(list) => list.iter().collect(),
                Value::Object(map) => map.values().collect(),
                _ => vec![],
            },
            Self::Where(path, text) => {
                let is_it = |item: &&Value| {
                    path.iter().try_fold(*item, |value, key| value.get(key)).is_some_and(|value| match value {
                        Value::String(found) => found == text,
                        other => {
                            let shown = other.to_string();
                            shown == *text
                        }
                    })
                };
                value.as_array().into_iter().flatten().filter(is_it).collect()
            }
        }
    }
}

fn steps(text: &str) -> Option<Vec<Step>> {
    let mut rest = text.trim().strip_prefix('$').unwrap_or(text.trim());
    let mut steps = Vec::new();
    while !rest.is_empty() {
        if let Some(inner) = rest.strip_prefix('[') {
            let end = if inner.starts_with("?(") { inner.find(")]")? + 1 } else { inner.find(']')? };
            steps.push(bracket(&inner[..end])?);
            rest = &inner[end + 1..];
            continue;
        }
        rest = rest.strip_prefix('.').unwrap_or(rest);
        let mut name = String::new();
        let mut characters = rest.char_indices();
        let mut end = rest.len();
        while let Some((at, c)) = characters.next() {
            match c {
                '\\' => name.extend(characters.next().map(|(_, escaped)| escaped)),
                '.' | '[' => {
                    end = at;
                    break;
                }
                c => name.push(c),
            }
        }
        rest = &rest[end..];
        match name.as_str() {
            "" if rest.is_empty() || rest.starts_with('[') => {}
            "" => return None,
            "*" => steps.push(Step::All),
            _ => steps.push(Step::Field(name)),
        }
    }
    Some(steps)
}

fn bracket(text: &str) -> Option<Step> {
    if let Some(filter) = text.strip_prefix("?(").and_then(|filter| filter.strip_suffix(')')) {
        let (path, value) = filter.split_once("==")?;
        let path = path.trim().strip_prefix("@.")?;
        let value = value.trim().trim_matches(['"', '\'']);
        return Some(Step::Where(path.split('.').map(str::to_owned).collect(), value.to_owned()));
    }
    match text {
        "*" => Some(Step::All),
        _ => match text.parse() {
            Ok(index) => Some(Step::Index(index)),
            Err(_) => Some(Step::Field(text.trim_matches(['"', '\'']).to_owned())),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_paths_that_columns_use() {
        let value = json!({
            "spec": {"replicas": 2, "a.b": "dotted", "list": [{"x": 1}, {"x": 2}]},
            "status": {"conditions": [{"type": "A", "status": "False"}, {"type": "Ready", "status": "True"}]},
        });
        let cases = [
            (".spec.replicas", json!(2)),
            ("$.spec.replicas", json!(2)),
            (r".spec.a\.b", json!("dotted")),
            (".spec['a.b']", json!("dotted")),
            (".spec.list[1].x", json!(2)),
            (".spec.list[-1].x", json!(2)),
            (".spec.list[*].x", json!(1)),
            (r#".status.conditions[?(@.type=="Ready")].status"#, json!("True")),
            (".nothing", Value::Null),
            (".spec..x", Value::Null),
            (".spec[", Value::Null),
        ];
        for (path, expected) in cases {
            assert_eq!(JsonPath::parse(path).first(&value).unwrap_or(&Value::Null), &expected, "{path}");
        }
    }
}
