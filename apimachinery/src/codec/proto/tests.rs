//! Round trips, and bytes as upstream writes them.

use proptest::prelude::*;
use serde_json::json;

use super::*;

fn round_trip(value: &Value) {
    let bytes = encode_object(value).unwrap_or_else(|e| panic!("{e}: {value}"));
    assert_eq!(&decode_object(&bytes).expect("decodes"), value);
    let text = |name: &str| value[name].as_str().expect("text");
    let schema = builtin().kind_of_object(text("apiVersion"), text("kind")).expect("a kind");
    for json in [value.to_string(), format!("{value:#}")] {
        let message = transcode_message(schema, json.as_bytes()).unwrap_or_else(|e| panic!("{e}: {value}"));
        let transcoded = decode_object(&envelope(text("apiVersion"), text("kind"), &message)).expect("decodes");
        assert_eq!(&transcoded, value, "without a tree");
    }
}

#[test]
fn objects_survive() {
    round_trip(&json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a", "labels": {"x": "y"},
        "creationTimestamp": "2024-01-02T03:04:05Z", "managedFields": [{"manager": "m", "operation": "Update",
        "apiVersion": "v1", "time": "2024-01-02T03:04:05Z", "fieldsType": "FieldsV1",
        "fieldsV1": {"f:metadata": {"f:labels": {".": {}, "f:x": {}}}}}]},
        "spec": {"containers": [{"name": "c", "image": "i", "ports": [{"containerPort": 80, "protocol": "TCP"}],
        "resources": {"limits": {"cpu": "500m", "memory": "1Gi"}}, "livenessProbe": {"httpGet": {"port": "web", "path": "/"},
        "periodSeconds": 3}, "env": [{"name": "e", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}]}],
        "volumes": [{"name": "v", "emptyDir": {}}, {"name": "w", "configMap": {"name": "cm", "defaultMode": 420}},
        {"name": "p", "projected": {"sources": [{"serviceAccountToken": {"path": "token", "expirationSeconds": 3607}}]}}],
        "securityContext": {"runAsUser": 0, "supplementalGroups": [1, 2]}, "terminationGracePeriodSeconds": 0},
        "status": {"phase": "Running", "podIPs": [{"ip": "10.0.0.1"}]}}));
    round_trip(&json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "s"}, "spec": {"ports":
        [{"port": 80, "targetPort": "http"}, {"port": 81, "targetPort": 8080, "name": "b"}]},
        "status": {"loadBalancer": {}}}));
    round_trip(
        &json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}, "data": {"a": "aGk=", "e": ""}}),
    );
    round_trip(&json!({"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "metadata": {},
        "spec": {"extra": {"k": ["a", "b"]}, "user": "u"}, "status": {"allowed": true}}));
    round_trip(&json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "l"},
        "spec": {"renewTime": "2024-01-02T03:04:05.678901Z", "leaseDurationSeconds": 15}}));
    round_trip(&json!({"apiVersion": "apps/v1", "kind": "ControllerRevision", "metadata": {"name": "r"},
        "data": {"spec": {"x": [1, null, "a"]}}, "revision": 3}));
}

#[test]
fn inlined_structs_are_one_message_each() {
    round_trip(
        &json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "é\u{1}\"\\"},
        "spec": {"containers": [], "ephemeralContainers": [{"name": "d", "image": "i", "targetContainerName": "c",
        "env": [{"name": "a", "value": "b"}], "tty": true}]}})
        .without_empty_lists(),
    );
    let policy = json!({"apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingAdmissionPolicy",
        "metadata": {"name": "p"}, "spec": {"matchConstraints": {"resourceRules": [{"apiGroups": ["a"],
        "apiVersions": ["v1"], "operations": ["CREATE"], "resourceNames": ["n"], "resources": ["r"], "scope": "*"}]}}});
    round_trip(&policy);
}

#[test]
fn broken_text_is_no_message() {
    let schema = builtin().kind_of_object("v1", "Pod").expect("known");
    for text in [
        "",
        "[",
        "{",
        "{\"spec\":{\"containers\":{}}}",
        "{\"spec\":1}",
        "{\"metadata\":{\"name\":\"",
        "{\"spec\":{\"priority\":\"x\"}}",
    ] {
        assert!(transcode_message(schema, text.as_bytes()).is_err(), "{text}");
    }
}

#[test]
fn schemas_of_custom_resources_survive() {
    round_trip(&json!({"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": "x.y"}, "spec": {"group": "y", "names": {"plural": "x", "kind": "X"}, "scope": "Namespaced",
        "versions": [{"name": "v1", "served": true, "storage": true, "schema": {"openAPIV3Schema": {"type": "object",
        "maximum": 1.5, "default": {"a": 1}, "enum": ["x", 1], "properties": {"l": {"type": "array",
        "items": {"type": "string"}}, "m": {"additionalProperties": {"type": "integer"}},
        "f": {"additionalProperties": false, "dependencies": {"d": ["e"]}}}}}}]},
        "status": {"conditions": [], "acceptedNames": {"plural": "", "kind": ""}, "storedVersions": []}})
        .without_empty_lists());
}

trait WithoutEmptyLists {
    fn without_empty_lists(&self) -> Value;
}

impl WithoutEmptyLists for Value {
    /// Protobuf cannot tell an empty list from none.
    fn without_empty_lists(&self) -> Value {
        match self {
            Value::Object(map) => {
                let kept = map.iter().filter(|(_, v)| v.as_array().is_none_or(|a| !a.is_empty()));
                Value::Object(kept.map(|(k, v)| (k.clone(), v.without_empty_lists())).collect())
            }
            Value::Array(items) => Value::Array(items.iter().map(Self::without_empty_lists).collect()),
            other => other.clone(),
        }
    }
}

#[test]
fn the_envelope_is_upstreams() {
    let bytes =
        encode_object(&json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "ab"}})).expect("encodes");
    // Unknown{typeMeta{"v1", "Namespace"}, raw{metadata{name: "ab"}}, contentEncoding "", contentType ""}
    let expected = b"k8s\0\x0a\x0f\x0a\x02v1\x12\x09Namespace\x12\x06\x0a\x04\x0a\x02ab\x1a\x00\x22\x00";
    assert_eq!(bytes, expected);
}

#[test]
fn lists_and_watch_events() {
    let gvk = GroupVersionKind::new("", "v1", "PodList");
    let pod = json!({"metadata": {"name": "a"}});
    let bytes = encode_list(&gvk, &json!({"resourceVersion": "5"}), &[&pod, &pod]).expect("encodes");
    let list = decode_object(&bytes).expect("decodes");
    assert_eq!(list["items"], json!([pod, pod]));
    assert_eq!((&list["kind"], &list["metadata"]["resourceVersion"]), (&json!("PodList"), &json!("5")));
    let object = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}});
    let event = encode_watch_event("ADDED", &object).expect("encodes");
    let schema = builtin().kind_of("", "v1", "WatchEvent").expect("known");
    let event = Value::Object(decode::message(&event, schema, 0).expect("decodes"));
    assert_eq!(event, json!({"type": "ADDED", "object": object}));
}

#[test]
fn unset_fields_of_gogo_do_not_appear() {
    // ObjectMeta{name "a", generateName "", creationTimestamp {}} as gogo writes it.
    let meta = b"\x0a\x01a\x12\x00\x42\x00";
    let schema = builtin().named("io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta").expect("known");
    assert_eq!(Value::Object(decode::message(meta, schema, 0).expect("decodes")), json!({"name": "a"}));
}

#[test]
fn nesting_is_bounded() {
    let schema = builtin().named(crate::codec::conform::PROPS).expect("known");
    let mut bytes = Vec::new();
    for _ in 0..1000 {
        let mut outer = Vec::new();
        wire::bytes_field(&mut outer, 28, &bytes);
        bytes = outer;
    }
    assert!(matches!(decode::message(&bytes, schema, 0), Err(ProtoError::TooDeep)));
}

proptest! {
    #[test]
    fn any_bytes_are_handled(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = decode_object(&bytes);
        let pod = builtin().kind_of("", "v1", "Pod").expect("known");
        let _ = decode::message(&bytes, pod, 0);
        let _ = transcode_message(pod, &bytes);
    }

    #[test]
    fn config_maps_survive(data in proptest::collection::btree_map("\\PC{0,8}", "\\PC{0,8}", 1..5), immutable in any::<bool>()) {
        round_trip(&json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"}, "data": data, "immutable": immutable}));
    }
}

#[test]
fn a_list_in_parts_is_the_list() {
    let gvk = GroupVersionKind { group: "".into(), version: "v1".into(), kind: "ConfigMapList".into() };
    let schema = builtin().kind_of_object("v1", "ConfigMap").expect("known");
    let large = "x".repeat(300);
    for names in [&[][..], &["a"], &["a", "b", &large]] {
        let items: Vec<Value> = names.iter().map(|name| json!({"metadata": {"name": name}})).collect();
        let metadata = json!({"resourceVersion": "7"});
        let whole = encode_list(&gvk, &metadata, &items.iter().collect::<Vec<_>>()).expect("encodes");
        let messages: Vec<Vec<u8>> = items.iter().map(|item| encode_message(schema, item).expect("encodes")).collect();
        let (mut parts, tail) = list_frame(&gvk, &metadata, messages.iter().map(Vec::len)).expect("encodes");
        for message in &messages {
            parts.extend(item_prefix(message.len()));
            parts.extend_from_slice(message);
        }
        parts.extend_from_slice(tail);
        assert_eq!(parts, whole);
    }
}

#[test]
fn a_watch_event_holds_its_object_in_an_envelope() {
    let object = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "x".repeat(200)}});
    let bytes = encode_watch_event("ADDED", &object).expect("encodes");
    let enveloped = encode_object(&object).expect("encodes");
    let mut raw = Vec::new();
    wire::bytes_field(&mut raw, 1, &enveloped);
    let mut expected = Vec::new();
    wire::bytes_field(&mut expected, 1, b"ADDED");
    wire::bytes_field(&mut expected, 2, &raw);
    assert_eq!(bytes, expected);
}
