//! The `fieldPath` of a rule: fields and keys of maps that the schema knows, as `.spec.map['key']`.

use serde_json::Value;

/// The path as complaints print it: `spec.map[key]`. `Err`: what is wrong with it.
pub fn normalize(path: &str, schema: &Value) -> Result<String, String> {
    let mut printed = String::new();
    let mut schema = schema;
    let mut rest = path;
    while !rest.is_empty() {
        let name;
        if let Some(after) = rest.strip_prefix("['") {
            let (quoted, after) = quoted(after)?;
            (name, rest) = (quoted, after.strip_prefix(']').ok_or("expected ]")?);
        } else if let Some(after) = rest.strip_prefix('.') {
            let end = after.find(['.', '[', ']']).unwrap_or(after.len());
            if end == 0 {
                return Err("unexpected end of JSON path".into());
            }
            (name, rest) = (after[..end].to_owned(), &after[end..]);
        } else {
            return Err(format!("expected [ or . but got: {rest}"));
        }
        let unknown = "does not refer to a valid field";
        if schema["properties"].is_object() {
            schema = schema["properties"].get(&name).ok_or(unknown)?;
            if !printed.is_empty() {
                printed.push('.');
            }
            printed.push_str(&name);
        } else if schema["additionalProperties"].is_object() {
            schema = &schema["additionalProperties"];
            printed.push_str(&format!("[{name}]"));
        } else {
            return Err(unknown.into());
        }
    }
    Ok(printed)
}

/// What is in single quotes, and what comes after them.
fn quoted(text: &str) -> Result<(String, &str), String> {
    let mut name = String::new();
    let mut letters = text.char_indices();
    while let Some((at, letter)) = letters.next() {
        match letter {
            '\'' => return Ok((name, &text[at + 1..])),
            '\\' => name.push(match letters.next().map(|(_, letter)| letter) {
                Some('a') => '\u{7}',
                Some('b') => '\u{8}',
                Some('f') => '\u{c}',
                Some('n') => '\n',
                Some('r') => '\r',
                Some('t') => '\t',
                Some('v') => '\u{b}',
                Some(same @ ('\'' | '\\')) => same,
                other => return Err(format!("invalid escape char \\{}", other.map_or(String::new(), String::from))),
            }),
            letter => name.push(letter),
        }
    }
    Err("unexpected end of JSON path".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn paths_are_checked_against_the_schema() {
        let schema = json!({"properties": {
            "spec": {"properties": {"a.b": {"type": "string"}, "map": {"additionalProperties": {"type": "string"}}}},
        }});
        let cases = [
            (".spec", Ok("spec")),
            (".spec['a.b']", Ok("spec.a.b")),
            (".spec.map['it\\'s']", Ok("spec.map[it's]")),
            (".spec.map.key", Ok("spec.map[key]")),
            (".spec.none", Err("does not refer to a valid field")),
            (".spec['a.b'].c", Err("does not refer to a valid field")),
            ("spec", Err("expected [ or . but got: spec")),
            (".spec['a", Err("unexpected end of JSON path")),
        ];
        for (path, expected) in cases {
            assert_eq!(normalize(path, &schema), expected.map(str::to_owned).map_err(str::to_owned), "{path}");
        }
    }
}
