//! Short names for contents: FNV-1a in the alphabet that cannot spell words.

use serde::Serialize;

/// Letters and digits that make no words, as they end up in names of objects.
const ALPHABET: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";

pub fn fnv32a(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193))
}

/// Replaces each character of the text by one of the safe alphabet.
pub fn safe_encode(text: &str) -> String {
    text.bytes().map(|byte| char::from(ALPHABET[usize::from(byte) % ALPHABET.len()])).collect()
}

/// The hash of a template, as the `pod-template-hash` and revision labels carry it; `collisions` makes another one of
/// the same template. It is stable across restarts and versions of this program as the JSON form of the template is.
/// (It is not the number that another implementation computes, so controllers find existing children by comparing
/// templates, never by this hash.)
pub fn template_hash(template: &impl Serialize, collisions: Option<i32>) -> String {
    let mut bytes = serde_json::to_vec(template).expect("API types serialize to JSON: their maps have string keys");
    if let Some(count) = collisions {
        bytes.extend_from_slice(&count.to_le_bytes());
    }
    safe_encode(&fnv32a(&bytes).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_values() {
        assert_eq!(fnv32a(b""), 0x811c_9dc5);
        assert_eq!(fnv32a(b"foobar"), 0xbf9c_f968);
        assert!(safe_encode("0123456789").bytes().all(|byte| ALPHABET.contains(&byte)));
        assert_ne!(template_hash(&"t", None), template_hash(&"t", Some(1)));
    }
}
