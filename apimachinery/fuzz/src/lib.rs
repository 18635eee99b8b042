//! What the fuzz targets check, one function each, so that the unit tests can run them, too, for a bounded number of
//! inputs and on the stable compiler. Seeds are inputs from which both start.

use apimachinery::codec::{json, proto, yaml};
use apimachinery::merge;
use apimachinery::merge::apply::{Manager, apply as apply_config};
use apimachinery::schema::builtin;
use serde_json::{Value, json as tree};

/// A target by its name.
pub struct Target {
    pub name: &'static str,
    pub run: fn(&[u8]),
    pub seeds: &'static [&'static str],
}

const OBJECTS: &[&str] = &[
    r#"{"apiVersion":"v1","kind":"Pod","metadata":{"name":"a","labels":{"b":"c"},"creationTimestamp":"2026-01-02T03:04:05Z"},"spec":{"containers":[{"name":"a","image":"b","ports":[{"containerPort":80}],"resources":{"limits":{"cpu":"1.5"}}}]}}"#,
    r#"{"metadata":{"name":null,"finalizers":["a","b"]},"spec":{"containers":[{"name":"c"},{"$patch":"delete","name":"a"}],"$setElementOrder/containers":[{"name":"c"}]}}"#,
    r#"{"spec":{"volumes":[{"$retainKeys":["name"],"name":"v"}],"$deleteFromPrimitiveList/finalizers":["a"]}}"#,
];

pub const TARGETS: &[Target] = &[
    Target { name: "json", run: decode_json, seeds: OBJECTS },
    Target {
        name: "yaml",
        run: decode_yaml,
        seeds: &[
            "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: a}\nspec:\n  replicas: 3\n  template: &t\n    spec:\n      containers: [{name: a}]\n",
            "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n",
            "? !!binary aGk=\n: |\n  text\n  more\n",
        ],
    },
    Target {
        name: "proto",
        run: decode_proto,
        seeds: &["\n\t\n\x02v1\x12\x03Pod\x12\x07\n\x05\n\x01a\x12\x00", "\n\x10\n\x07apps/v1\x12\nDeployment\x12\x00"],
    },
    Target {
        name: "json_patch",
        run: json_patch,
        seeds: &[
            r#"[{"op":"replace","path":"/spec/containers/0/name","value":"c"},{"op":"test","path":"/a~1b","value":1}]"#,
            r#"[{"op":"move","from":"/spec","path":"/metadata/labels/a"},{"op":"copy","from":"","path":"/spec/containers/-"}]"#,
            r#"[{"op":"remove","path":"/spec/containers/1"},{"op":"add","path":"/metadata/labels/x","value":{}}]"#,
        ],
    },
    Target { name: "merge_patch", run: merge_patch, seeds: OBJECTS },
    Target { name: "strategic", run: strategic, seeds: OBJECTS },
    Target { name: "apply", run: apply, seeds: OBJECTS },
];

/// No bytes make strict decoding of a Pod panic, and decoding is idempotent.
pub fn decode_json(bytes: &[u8]) {
    let schema = builtin().kind_of("", "v1", "Pod");
    if let Ok(once) = json::decode(bytes, schema) {
        let twice = json::decode(once.value.to_string().as_bytes(), schema).expect("what was decoded decodes");
        assert_eq!(once.value, twice.value);
    }
}

/// No text makes YAML decoding panic or expand without bound.
pub fn decode_yaml(bytes: &[u8]) {
    if let Ok(decoded) = yaml::decode(bytes, builtin().kind_of("apps", "v1", "Deployment")) {
        yaml::encode(&decoded.value).expect("what was decoded prints");
    }
}

/// No bytes make protobuf decoding panic, and what was decoded survives a round trip.
pub fn decode_proto(bytes: &[u8]) {
    let mut enveloped = proto::MAGIC.to_vec();
    enveloped.extend_from_slice(bytes);
    if let Ok(value) = proto::decode_object(&enveloped)
        && let Ok(again) = proto::encode_object(&value)
    {
        assert!(proto::decode_object(&again).is_ok());
    }
}

/// No JSON patch panics, and a failed one changes nothing.
pub fn json_patch(patch: &[u8]) {
    let before = tree!({"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "a"}, {"name": "b"}]}});
    let mut doc = before.clone();
    if merge::json_patch(&mut doc, patch).is_err() {
        assert_eq!(doc, before);
    }
}

/// No merge patch panics; applying it twice is applying it once.
pub fn merge_patch(patch: &[u8]) {
    let Ok(patch) = serde_json::from_slice::<Value>(patch) else { return };
    let mut once = tree!({"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "a"}]}});
    merge::merge_patch(&mut once, &patch);
    let mut twice = once.clone();
    merge::merge_patch(&mut twice, &patch);
    assert_eq!(once, twice);
}

/// No strategic merge patch panics, and no directive is left in the result.
pub fn strategic(patch: &[u8]) {
    let Ok(patch) = serde_json::from_slice::<Value>(patch) else { return };
    let schema = builtin().kind_of("", "v1", "Pod").expect("a built-in kind");
    let mut doc = tree!({"metadata": {"finalizers": ["a"]}, "spec": {"containers": [{"name": "a", "image": "b"}],
        "volumes": [{"name": "v", "emptyDir": {}}]}});
    let _ = merge::strategic(schema, &mut doc, &patch);
}

/// No configuration makes server-side apply panic; applying it again changes nothing.
pub fn apply(config: &[u8]) {
    let Ok(mut config) = serde_json::from_slice::<Value>(config) else { return };
    let Value::Object(fields) = &mut config else { return };
    fields.insert("apiVersion".into(), tree!("v1"));
    let schema = builtin().kind_of("", "v1", "Pod").expect("a built-in kind");
    let manager = Manager { name: "fuzz", api_version: "v1", subresource: "", time: jiff::Timestamp::UNIX_EPOCH };
    let live = tree!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"},
        "spec": {"containers": [{"name": "a", "image": "b", "ports": [{"containerPort": 80}]}]}});
    if let Ok(once) = apply_config(schema, Some(&live), &config, &manager, true, &[]) {
        let twice = apply_config(schema, Some(&once), &config, &manager, true, &[]).expect("applies again");
        assert_eq!(once, twice);
    }
}
