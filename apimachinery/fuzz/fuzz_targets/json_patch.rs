//! No JSON patch panics, and a failed one changes nothing.
#![no_main]

use apimachinery::merge;
use libfuzzer_sys::fuzz_target;
use serde_json::json;

fuzz_target!(|patch: &[u8]| {
    let before = json!({"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "a"}, {"name": "b"}]}});
    let mut doc = before.clone();
    if merge::json_patch(&mut doc, patch).is_err() {
        assert_eq!(doc, before);
    }
});
