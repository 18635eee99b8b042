//! Two normalized answers, and the places where they differ.

use std::fmt;

use serde_json::Value;

use super::client::Answer;
use super::normalize::Normalizer;

/// Headers that clients act on.
const HEADERS: [&str; 6] = ["allow", "cache-control", "content-type", "retry-after", "warning", "www-authenticate"];

/// One place where the answers to one request differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// The script and the step.
    pub case: String,
    /// `status`, `header warning`, `body` or a JSON pointer into it.
    pub at: String,
    pub ours: String,
    pub upstream: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}\n  at {}\n    ours:     {}\n    upstream: {}", self.case, self.at, self.ours, self.upstream)
    }
}

/// An answer, free of what must differ.
#[derive(Clone, Debug)]
pub struct Plain {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Body,
}

#[derive(Clone, Debug)]
enum Body {
    Json(Value),
    /// One for each line of a watch.
    Lines(Vec<Value>),
    Text(String),
    Bytes,
}

impl Plain {
    pub fn new(answer: &Answer, normalizer: &Normalizer<'_>) -> Self {
        let headers = HEADERS.map(|name| (name, normalizer.text(&answer.header(name)))).into();
        Self { status: answer.status, headers, body: Body::new(answer, normalizer) }
    }
}

impl Body {
    fn new(answer: &Answer, normalizer: &Normalizer<'_>) -> Self {
        let tree = |mut value: Value| {
            normalizer.tree(&mut value);
            value
        };
        let Ok(text) = std::str::from_utf8(&answer.body) else { return Self::Bytes };
        if answer.body.starts_with(b"k8s\0") {
            return Self::Bytes;
        }
        if let Ok(value) = serde_json::from_str(text) {
            return Self::Json(tree(value));
        }
        let lines: Result<Vec<Value>, _> = text.lines().map(serde_json::from_str).collect();
        if let Ok(lines) = lines {
            return Self::Lines(lines.into_iter().map(tree).collect());
        }
        if answer.header("content-type").contains("yaml")
            && let Ok(value) = serde_saphyr::from_str(text)
        {
            return Self::Json(tree(value));
        }
        Self::Text(text.lines().map(|line| normalizer.text(line)).collect::<Vec<_>>().join("\n"))
    }
}

/// Where two values differ.
pub fn trees(case: &str, ours: &Value, upstream: &Value) -> Vec<Difference> {
    let mut found = Found { case, list: Vec::new() };
    found.trees("", ours, upstream);
    found.list
}

/// What differs, at most one entry for each place.
pub fn differences(case: &str, ours: &Plain, upstream: &Plain) -> Vec<Difference> {
    let mut found = Found { case, list: Vec::new() };
    if ours.status != upstream.status {
        found.push("status", &describe(ours), &describe(upstream));
        return found.list;
    }
    for ((name, ours), (_, upstream)) in ours.headers.iter().zip(&upstream.headers) {
        if ours != upstream {
            found.push(&format!("header {name}"), ours, upstream);
        }
    }
    match (&ours.body, &upstream.body) {
        (Body::Json(ours), Body::Json(upstream)) => found.trees("", ours, upstream),
        (Body::Lines(ours), Body::Lines(upstream)) => {
            if ours.len() != upstream.len() {
                found.push("events", &events(ours), &events(upstream));
            }
            for (index, (ours, upstream)) in ours.iter().zip(upstream).enumerate() {
                found.trees(&format!("/{index}"), ours, upstream);
            }
        }
        (Body::Text(ours), Body::Text(upstream)) if ours != upstream => {
            let differing = ours.lines().zip(upstream.lines()).find(|(ours, upstream)| ours != upstream);
            let (ours, upstream) = differing.unwrap_or((ours, upstream));
            found.push("body", ours, upstream);
        }
        (Body::Text(_), Body::Text(_)) | (Body::Bytes, Body::Bytes) => {}
        (one, other) => found.push("body", &format!("{one:?}"), &format!("{other:?}")),
    }
    found.list
}

/// A status with the message, where there is one.
fn describe(answer: &Plain) -> String {
    let text = match &answer.body {
        Body::Json(value) => value["message"].as_str().map(str::to_owned).unwrap_or_default(),
        Body::Lines(lines) => events(lines),
        Body::Text(text) => text.clone(),
        Body::Bytes => String::new(),
    };
    format!("{} {text}", answer.status).trim_end().to_owned()
}

fn events(lines: &[Value]) -> String {
    let name = |line: &Value| {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        format!("{} {}", text(&line["type"]), text(&line["object"]["metadata"]["name"]))
    };
    format!("[{}]", lines.iter().map(name).collect::<Vec<_>>().join(", "))
}

struct Found<'a> {
    case: &'a str,
    list: Vec<Difference>,
}

impl Found<'_> {
    fn push(&mut self, at: &str, ours: &str, upstream: &str) {
        let cut = |text: &str| text.chars().take(700).collect();
        self.list.push(Difference { case: self.case.into(), at: at.into(), ours: cut(ours), upstream: cut(upstream) });
    }

    fn trees(&mut self, at: &str, ours: &Value, upstream: &Value) {
        match (ours, upstream) {
            (Value::Object(ours), Value::Object(upstream)) => {
                // A message repeats its causes; they say the same in smaller pieces.
                let causes = |status: &serde_json::Map<String, Value>| {
                    status.get("details").and_then(|details| details["causes"].as_array()).map(Vec::len)
                };
                let repeats = causes(ours).max(causes(upstream)) > Some(1);
                for (name, theirs) in upstream {
                    if !(repeats && name == "message") {
                        self.trees(&format!("{at}/{name}"), ours.get(name).unwrap_or(&Value::Null), theirs);
                    }
                }
                for (name, extra) in ours.iter().filter(|(name, _)| !upstream.contains_key(*name)) {
                    self.push(&format!("{at}/{name}"), &extra.to_string(), "(absent)");
                }
            }
            (Value::Array(ours), Value::Array(upstream)) if ours.len() == upstream.len() => {
                for (index, (ours, upstream)) in ours.iter().zip(upstream).enumerate() {
                    self.trees(&format!("{at}/{index}"), ours, upstream);
                }
            }
            (ours, upstream) if ours != upstream => {
                let show = |value: &Value| if value.is_null() { "(absent)".to_owned() } else { value.to_string() };
                self.push(if at.is_empty() { "body" } else { at }, &show(ours), &show(upstream));
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn plain(status: u16, body: &str) -> Plain {
        let saved = BTreeMap::new();
        let answer = Answer { status, headers: BTreeMap::new(), body: body.to_owned().into() };
        Plain::new(&answer, &Normalizer { saved: &saved, now: jiff::Timestamp::UNIX_EPOCH })
    }

    #[test]
    fn differences_are_named_by_their_place() {
        let cases = [
            (plain(200, r#"{"a": 1}"#), plain(200, r#"{"a": 1}"#), vec![]),
            (plain(200, r#"{"a": 1}"#), plain(404, "{}"), vec!["status"]),
            (plain(200, r#"{"a": 1, "b": [1, 2]}"#), plain(200, r#"{"a": 2, "b": [1, 3]}"#), vec!["/a", "/b/1"]),
            (plain(200, r#"{"a": 1}"#), plain(200, r#"{"b": 1}"#), vec!["/b", "/a"]),
            (plain(200, "{\"a\": 1}\n{\"a\": 2}\n"), plain(200, "{\"a\": 1}\n{\"a\": 3}\n"), vec!["/1/a"]),
            (plain(200, "ok\nfine"), plain(200, "ok\nbad"), vec!["body"]),
        ];
        for (ours, upstream, expected) in cases {
            let found = differences("case", &ours, &upstream);
            assert_eq!(found.iter().map(|d| d.at.as_str()).collect::<Vec<_>>(), expected, "{ours:?} {upstream:?}");
        }
    }
}
