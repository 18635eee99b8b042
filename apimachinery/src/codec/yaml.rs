//! YAML in and out. Scalars resolve as users of Kubernetes expect (YAML 1.1: `yes` is a boolean, `010` is octal),
//! aliases are bounded.

use serde::de::Error as _;
use serde_json::Value;

use super::tree::Builder;
use super::{DecodeError, Decoded, MAX_BYTES, conform};
use crate::schema::Schema;

/// Decodes one document; see [`super::json::decode`].
pub fn decode(bytes: &[u8], schema: Option<&Schema>) -> Result<Decoded, DecodeError> {
    let mut decoded = read(bytes, schema)?;
    if let Some(schema) = schema {
        conform(&mut decoded, schema)?;
    }
    Ok(decoded)
}

/// Decodes without a schema. JSON, which is what clients really send as YAML, takes the short way.
pub fn parse(bytes: &[u8]) -> Result<Decoded, DecodeError> {
    read(bytes, None)
}

fn read(bytes: &[u8], schema: Option<&Schema>) -> Result<Decoded, DecodeError> {
    if bytes.len() > MAX_BYTES {
        return Err(DecodeError::TooLarge);
    }
    if bytes.iter().find(|b| !b.is_ascii_whitespace()) == Some(&b'{')
        && let Ok(decoded) = super::json::read(bytes, schema)
    {
        return Ok(decoded);
    }
    let text = std::str::from_utf8(bytes).map_err(|_| DecodeError::NotUtf8)?;
    let mut builder = Builder::default();
    let value = serde_saphyr::with_deserializer_from_str_with_options(text, options(), |deserializer| {
        builder.build(deserializer, schema)
    });
    let mut value = value.map_err(|e| DecodeError::Yaml(Box::new(e)))?;
    whole_floats_to_integers(&mut value);
    Ok(Decoded { value, strict_errors: builder.complaints })
}

/// Where the first key stands that its map has already, in the words that users of YAML in Go know:
/// `line 9: key "foo" already set in map`.
pub fn first_duplicate(bytes: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(bytes).ok()?;
    let strict = serde_saphyr::options! {
        duplicate_keys: serde_saphyr::DuplicateKeyPolicy::Error,
        with_snippet: false,
    };
    match serde_saphyr::from_str_with_options::<serde::de::IgnoredAny>(text, strict) {
        Err(serde_saphyr::Error::DuplicateMappingKey { key, location }) => {
            Some(format!("line {}: key {:?} already set in map", location.line(), key.unwrap_or_default()))
        }
        _ => None,
    }
}

fn options() -> serde_saphyr::Options {
    serde_saphyr::options! {
        duplicate_keys: serde_saphyr::DuplicateKeyPolicy::LastWins,
        legacy_octal_numbers: true,
        strict_booleans: false,
        with_snippet: false,
    }
}

/// `replicas: 1e1` is 10 once it has become JSON.
fn whole_floats_to_integers(value: &mut Value) {
    match value {
        Value::Number(n) => {
            if let Some(f) = n.as_f64()
                && !n.is_i64()
                && !n.is_u64()
                && f.fract() == 0.0
                && f.abs() < 9e15
            {
                *value = Value::from(f as i64);
            }
        }
        Value::Array(items) => items.iter_mut().for_each(whole_floats_to_integers),
        Value::Object(map) => map.values_mut().for_each(whole_floats_to_integers),
        _ => {}
    }
}

/// Prints a document.
pub fn encode(value: &Value) -> Result<String, EncodeError> {
    serde_saphyr::to_string(value).map_err(|e| EncodeError(Box::new(e)))
}

/// A value that YAML cannot express; JSON values all can be.
#[derive(Debug, thiserror::Error)]
#[error("yaml: {0}")]
pub struct EncodeError(#[source] Box<serde_saphyr::SerializeError>);

impl EncodeError {
    /// The same as an error of a serde format.
    pub fn into_json_error(self) -> serde_json::Error {
        serde_json::Error::custom(self)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    #[test]
    fn scalars_resolve_as_in_kubernetes() {
        let text = "a: yes\nb: \"yes\"\nc: 010\nd: ~\ne: 1.5\nf: 1e1\ng: on\nh: 0x10\ni: '1'\n";
        let value = parse(text.as_bytes()).expect("valid").value;
        let expected =
            json!({"a": true, "b": "yes", "c": 8, "d": null, "e": 1.5, "f": 10, "g": true, "h": 16, "i": "1"});
        assert_eq!(value, expected);
    }

    #[test]
    fn aliases_are_bounded() {
        let mut bomb = String::from("a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n");
        for i in 1..12 {
            let aliases = vec![format!("*a{}", i - 1); 10].join(",");
            bomb.push_str(&format!("a{i}: &a{i} [{aliases}]\n"));
        }
        assert!(parse(bomb.as_bytes()).is_err());
    }

    #[test]
    fn duplicates_are_reported() {
        let decoded = parse(b"a:\n  b: 1\n  b: 2\n").expect("valid");
        assert_eq!(decoded.strict_errors, [r#"duplicate field "a.b""#]);
        assert_eq!(decoded.value, json!({"a": {"b": 2}}));
        assert_eq!(first_duplicate(b"a:\n  b: 1\n  b: 2\n").as_deref(), Some(r#"line 3: key "b" already set in map"#));
        assert_eq!(first_duplicate(b"a: 1\nb: 1\n"), None);
    }

    proptest! {
        #[test]
        fn any_text_is_handled(text in "[a-z:&* \\n\\[\\]{}'\"|>-]{0,60}") {
            let _ = parse(text.as_bytes());
        }

        #[test]
        fn strings_survive(text in "\\PC{0,20}") {
            let value = json!({"k": text, "l": [text, 1, true, null]});
            let encoded = encode(&value).expect("encodes");
            prop_assert_eq!(parse(encoded.as_bytes()).expect("decodes").value, value);
        }
    }
}
