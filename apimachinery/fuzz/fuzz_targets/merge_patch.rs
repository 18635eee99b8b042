//! No merge patch panics; applying it twice is applying it once.
#![no_main]

use apimachinery::merge;
use libfuzzer_sys::fuzz_target;
use serde_json::{Value, json};

fuzz_target!(|patch: &[u8]| {
    let Ok(patch) = serde_json::from_slice::<Value>(patch) else { return };
    let mut once = json!({"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "a"}]}});
    merge::merge_patch(&mut once, &patch);
    let mut twice = once.clone();
    merge::merge_patch(&mut twice, &patch);
    assert_eq!(once, twice);
});
