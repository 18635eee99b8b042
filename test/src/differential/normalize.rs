//! Takes out of an answer what differs between two servers that behave alike: uids, revisions, times of this run,
//! generated names, allocated addresses and ports. Everything else stays.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use jiff::Timestamp;
use regex::Regex;
use serde_json::Value;

#[allow(clippy::unwrap_used, reason = "constant patterns; the test below compiles them all")]
static PATTERNS: LazyLock<Vec<(Regex, &'static str)>> = LazyLock::new(|| {
    [
        (r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", "<uid>"),
        (r"\bResourceVersion in object meta: \d+", "ResourceVersion in object meta: <revision>"),
        (r"\b10\.77\.\d+\.\d+\b", "<cluster address>"),
        (r"\b127\.0\.0\.1:\d+\b", "<server>"),
        (r"\beyJ[\w-]+\.[\w-]+\.[\w-]+", "<token>"),
        (r"\bkube-api-access-[a-z0-9]{5}\b", "<token volume>"),
        // Of OpenAPI documents, whose descriptions are each server's own.
        (r"\?hash=[0-9A-F]{16,}", "?hash=<hash>"),
        (r"\bthe ResourceVersion in record \(\d+\)", "the ResourceVersion in record (<revision>)"),
        // Upstream appends a diff of its own structs, in Go's notation, to some messages; ours is one of the JSON.
        (r"(?s)\n(@@ |\s*core\.|\s*&?v1\.|- [a-z]\w*: ).*", "<diff>"),
    ]
    .map(|(pattern, name)| (Regex::new(pattern).unwrap(), name))
    .into()
});

#[allow(clippy::unwrap_used, reason = "a constant pattern")]
static AGE: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"^(\d+s|\d+m(\d+s)?)$").unwrap());

/// How far from now a time may be to be this run's.
const RECENT_SECONDS: i64 = 2 * 3600;

/// `saved` are variables of the script: their values differ between servers and are named instead.
pub struct Normalizer<'a> {
    pub saved: &'a BTreeMap<String, String>,
    pub now: Timestamp,
}

impl Normalizer<'_> {
    pub fn tree(&self, value: &mut Value) {
        match value {
            Value::String(text) => *text = self.text(text),
            Value::Array(items) => items.iter_mut().for_each(|item| self.tree(item)),
            Value::Object(fields) => {
                for (name, field) in fields.iter_mut() {
                    self.field(name, field);
                }
            }
            _ => {}
        }
    }

    fn field(&self, name: &str, value: &mut Value) {
        match (name, &*value) {
            ("resourceVersion", Value::String(text)) if !text.is_empty() && text != "0" => *value = "<revision>".into(),
            ("continue", Value::String(text)) if !text.is_empty() => *value = "<continue>".into(),
            ("nodePort" | "healthCheckNodePort", Value::Number(number)) if number.as_i64() >= Some(30_000) => {
                *value = "<node port>".into();
            }
            // Whether a rule is checked by hand or declared decides the order, which nobody can build on.
            ("causes", Value::Array(causes)) => {
                let mut causes = causes.clone();
                causes.iter_mut().for_each(|cause| self.tree(cause));
                causes.sort_by_key(Value::to_string);
                *value = causes.into();
            }
            ("cells", Value::Array(cells)) => {
                let mut cells = cells.clone();
                for cell in &mut cells {
                    match cell.as_str() {
                        Some(text) if AGE.is_match(text) => *cell = "<age>".into(),
                        _ => self.tree(cell),
                    }
                }
                *value = cells.into();
            }
            _ => self.tree(value),
        }
    }

    pub fn text(&self, text: &str) -> String {
        if let Ok(time) = text.parse::<Timestamp>()
            && (time.as_second() - self.now.as_second()).abs() < RECENT_SECONDS
        {
            // Micro times stay apart from plain ones.
            return if text.contains('.') { "<now, exact>" } else { "<now>" }.into();
        }
        let mut text = text.to_owned();
        for (name, value) in self.saved.iter().filter(|(_, value)| value.len() > 2) {
            text = text.replace(value.as_str(), &format!("{{{name}}}"));
        }
        for (pattern, name) in PATTERNS.iter() {
            if pattern.is_match(&text) {
                text = pattern.replace_all(&text, *name).into_owned();
            }
        }
        // What is left of a message without its diff is what both say.
        text.replace("<diff>", "")
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_what_must_differ_is_taken_out() {
        let saved = BTreeMap::from([("generated".to_owned(), "web-x7k2p".to_owned())]);
        let normalizer = Normalizer { saved: &saved, now: "2026-01-01T00:00:00Z".parse().unwrap() };
        let mut answer = json!({
            "metadata": {"name": "web-x7k2p", "uid": "11111111-2222-3333-4444-555555555555", "resourceVersion": "12",
                "creationTimestamp": "2026-01-01T00:00:03Z", "generation": 3},
            "spec": {"clusterIP": "10.77.3.4", "ports": [{"port": 80, "nodePort": 30001}], "start": "2020-01-01T00:00:00Z"},
            "rows": [{"cells": ["web-x7k2p", "3s", 12]}],
        });
        normalizer.tree(&mut answer);
        let expected = json!({
            "metadata": {"name": "{generated}", "uid": "<uid>", "resourceVersion": "<revision>",
                "creationTimestamp": "<now>", "generation": 3},
            "spec": {"clusterIP": "<cluster address>", "ports": [{"port": 80, "nodePort": "<node port>"}], "start": "2020-01-01T00:00:00Z"},
            "rows": [{"cells": ["{generated}", "<age>", 12]}],
        });
        assert_eq!(answer, expected);
    }
}
