//! JSON patch and JSON merge patch, bounded as upstream bounds them.

use serde_json::Value;

/// Upstream's limit of operations in one JSON patch.
pub const MAX_OPERATIONS: usize = 10_000;
/// `copy` operations could double a document again and again; this bounds what they may produce, in bytes.
const MAX_COPIED: usize = 3 * 1024 * 1024;

/// Why a patch could not be applied.
#[derive(Debug, thiserror::Error)]
pub enum PatchError {
    #[error("error decoding patch: {0}")]
    Decode(#[source] serde_json::Error),
    #[error("The allowed maximum operations in a JSON patch is {MAX_OPERATIONS}, got {0}")]
    TooManyOperations(usize),
    #[error("Unable to copy, accumulated copy size increases document beyond the limit of {MAX_COPIED} bytes")]
    TooMuchCopied,
    #[error("the server rejected our request due to an error in our request: {0}")]
    Apply(#[source] json_patch::PatchError),
    #[error("expected {expected} at {path:?}")]
    Shape { path: String, expected: &'static str },
    #[error("{0}")]
    Directive(String),
    #[error("map: {element} does not contain declared merge key: {key}")]
    MissingMergeKey { element: String, key: String },
    #[error("the patch is nested too deeply")]
    TooDeep,
}

impl PatchError {
    /// Whether the patch was well-formed but did not fit the object (HTTP 422 rather than 400).
    pub fn is_unprocessable(&self) -> bool {
        !matches!(self, Self::Decode(_))
    }
}

/// Applies an RFC 6902 patch; on an error the document is as it was.
pub fn json_patch(doc: &mut Value, patch: &[u8]) -> Result<(), PatchError> {
    let patch: json_patch::Patch = serde_json::from_slice(patch).map_err(PatchError::Decode)?;
    if patch.0.len() > MAX_OPERATIONS {
        return Err(PatchError::TooManyOperations(patch.0.len()));
    }
    let mut copies = patch.0.iter().filter(|op| matches!(op, json_patch::PatchOperation::Copy(_))).peekable();
    if copies.peek().is_none() {
        return json_patch::patch(doc, &patch.0).map_err(PatchError::Apply);
    }
    // One operation at a time on a copy of the document, measuring what each copy adds.
    let mut changed = doc.clone();
    let mut copied = 0;
    for operation in patch.0 {
        if let json_patch::PatchOperation::Copy(copy) = &operation {
            copied += changed.pointer(copy.from.as_str()).map_or(0, size);
            if copied > MAX_COPIED {
                return Err(PatchError::TooMuchCopied);
            }
        }
        json_patch::patch(&mut changed, &[operation]).map_err(PatchError::Apply)?;
    }
    *doc = changed;
    Ok(())
}

/// Roughly the bytes of the value as JSON.
fn size(value: &Value) -> usize {
    match value {
        Value::Null | Value::Bool(_) | Value::Number(_) => 8,
        Value::String(s) => s.len() + 2,
        Value::Array(items) => items.iter().map(size).sum::<usize>() + 2,
        Value::Object(map) => map.iter().map(|(k, v)| k.len() + 4 + size(v)).sum::<usize>() + 2,
    }
}

/// Applies an RFC 7396 patch: null removes, objects merge, all else replaces.
pub fn merge_patch(doc: &mut Value, patch: &Value) {
    json_patch::merge(doc, patch);
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn json_patches() {
        let mut doc = json!({"a": [1, 2], "b": {"c": 1}});
        let patch = br#"[{"op":"test","path":"/a/0","value":1},{"op":"add","path":"/a/-","value":3},
            {"op":"remove","path":"/b/c"},{"op":"copy","from":"/a","path":"/b/d"}]"#;
        json_patch(&mut doc, patch).expect("applies");
        assert_eq!(doc, json!({"a": [1, 2, 3], "b": {"d": [1, 2, 3]}}));
        let before = doc.clone();
        let failing = br#"[{"op":"remove","path":"/a"},{"op":"test","path":"/b","value":1}]"#;
        assert!(json_patch(&mut doc, failing).is_err());
        assert_eq!(doc, before, "a failed patch changes nothing");
    }

    #[test]
    fn copies_cannot_explode() {
        let mut doc = json!({"a": "x".repeat(1000)});
        let operations: Vec<String> = (0..30).map(|i| format!(r#"{{"op":"copy","from":"","path":"/n{i}"}}"#)).collect();
        let result = json_patch(&mut doc, format!("[{}]", operations.join(",")).as_bytes());
        assert!(matches!(result, Err(PatchError::TooMuchCopied)));
    }

    #[test]
    fn merge_patches() {
        let mut doc = json!({"a": {"b": 1, "c": 2}, "l": [1]});
        merge_patch(&mut doc, &json!({"a": {"b": null, "d": {"e": null}}, "l": [2]}));
        assert_eq!(doc, json!({"a": {"c": 2, "d": {}}, "l": [2]}));
    }
}
