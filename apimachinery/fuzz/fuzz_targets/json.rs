//! No bytes make strict decoding of a Pod panic, and decoding is idempotent.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| apimachinery_fuzz::decode_json(bytes));
