//! No bytes make strict decoding of a Pod panic, and decoding is idempotent.
#![no_main]

use apimachinery::codec::json;
use apimachinery::schema::builtin;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let schema = builtin().kind_of("", "v1", "Pod");
    if let Ok(once) = json::decode(bytes, schema) {
        let twice = json::decode(once.value.to_string().as_bytes(), schema).expect("what was decoded decodes");
        assert_eq!(once.value, twice.value);
    }
});
