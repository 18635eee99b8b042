//! No text makes YAML decoding panic or expand without bound.
#![no_main]

use apimachinery::codec::yaml;
use apimachinery::schema::builtin;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(decoded) = yaml::decode(bytes, builtin().kind_of("apps", "v1", "Deployment")) {
        yaml::encode(&decoded.value).expect("what was decoded prints");
    }
});
