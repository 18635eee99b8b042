//! No text makes YAML decoding panic or expand without bound.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| apimachinery_fuzz::decode_yaml(bytes));
