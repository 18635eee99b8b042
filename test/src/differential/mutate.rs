//! Wrong objects made of right ones: every field in turn gets the values that rules are written against (nothing,
//! zero, a negative number, text with bad letters, a repetition, another type). Which of them are wrong is the
//! servers' business.

use serde_json::{Value, json};

/// A change of one field.
pub struct Mutant {
    /// `/spec/replicas=-1`.
    pub name: String,
    pub object: Value,
}

/// These say what kind of object it is; other values make other requests.
const LEFT_ALONE: [&str; 3] = ["/apiVersion", "/kind", "/metadata"];

pub fn mutants(object: &Value) -> Vec<Mutant> {
    let mut places = Vec::new();
    walk(object, &mut String::new(), &mut places);
    let mut mutants = Vec::new();
    for place in places {
        let Some(value) = object.pointer(&place) else { continue };
        for replacement in replacements(value) {
            let mut mutated = object.clone();
            let name = match &replacement {
                Some(replacement) => format!("{place}={}", short(replacement)),
                None => format!("{place} removed"),
            };
            match replacement {
                Some(replacement) => {
                    if let Some(slot) = mutated.pointer_mut(&place) {
                        *slot = replacement;
                    }
                }
                None => remove(&mut mutated, &place),
            }
            mutants.push(Mutant { name, object: mutated });
        }
    }
    mutants
}

fn walk(value: &Value, place: &mut String, places: &mut Vec<String>) {
    if LEFT_ALONE.contains(&place.as_str()) {
        return;
    }
    if !place.is_empty() {
        places.push(place.clone());
    }
    let len = place.len();
    let mut visit = |segment: &str, child: &Value| {
        place.push('/');
        place.push_str(&segment.replace('~', "~0").replace('/', "~1"));
        walk(child, place, places);
        place.truncate(len);
    };
    match value {
        Value::Object(fields) => fields.iter().for_each(|(name, child)| visit(name, child)),
        Value::Array(items) => items.iter().enumerate().for_each(|(index, child)| visit(&index.to_string(), child)),
        _ => {}
    }
}

/// What a value is replaced by; `None` removes it.
fn replacements(value: &Value) -> Vec<Option<Value>> {
    let mut all = vec![None];
    match value {
        Value::String(text) => {
            all.extend(["", "Bad_Value!/ x"].map(|text| Some(text.into())));
            all.push(Some("x".repeat(300).into()));
            all.push(Some(7.into()));
            // Another well-formed value: what may not change must say so.
            all.push(Some(format!("{text}x").into()));
        }
        Value::Number(_) => all.extend([json!(-1), json!(0), json!(100_000), json!("many")].map(Some)),
        Value::Bool(flag) => all.extend([json!(!flag), json!("yes")].map(Some)),
        Value::Array(items) => {
            all.push(Some(json!([])));
            if let Some(first) = items.first() {
                let mut twice = items.clone();
                twice.push(first.clone());
                all.push(Some(twice.into()));
            }
            all.push(Some(json!("no list")));
        }
        Value::Object(_) => all.extend([json!({}), json!("no object")].map(Some)),
        Value::Null => {}
    }
    all
}

fn remove(object: &mut Value, place: &str) {
    let Some((parent, last)) = place.rsplit_once('/') else { return };
    match object.pointer_mut(parent) {
        Some(Value::Object(fields)) => {
            fields.remove(&last.replace("~1", "/").replace("~0", "~"));
        }
        Some(Value::Array(items)) => {
            if let Ok(index) = last.parse::<usize>()
                && index < items.len()
            {
                items.remove(index);
            }
        }
        _ => {}
    }
}

fn short(value: &Value) -> String {
    let text = value.to_string();
    if text.len() <= 40 { text } else { format!("{}…({})", text.chars().take(24).collect::<String>(), text.len()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_below_the_metadata_is_changed_alone() {
        let object =
            json!({"kind": "A", "metadata": {"name": "a"}, "spec": {"n": 1, "list": [{"s": "x"}], "a/b": true}});
        let names: Vec<String> = mutants(&object).into_iter().map(|mutant| mutant.name).collect();
        for expected in
            ["/spec removed", "/spec/n=-1", "/spec/list/0/s=\"\"", "/spec/list/0 removed", "/spec/a~1b=false"]
        {
            assert!(names.iter().any(|name| name == expected), "{expected} in {names:?}");
        }
        assert!(!names.iter().any(|name| name.starts_with("/metadata") || name.starts_with("/kind")), "{names:?}");
        for mutant in mutants(&object) {
            assert_ne!(mutant.object, object, "{}", mutant.name);
        }
    }
}
