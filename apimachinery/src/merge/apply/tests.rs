//! Stories of several managers.

use serde_json::json;

use super::*;
use crate::schema::builtin;

fn at<'a>(name: &'a str, second: i64) -> Manager<'a> {
    let time = Timestamp::from_second(1_700_000_000 + second).expect("a time");
    Manager { name, api_version: "apps/v1", subresource: "", time }
}

fn schema() -> &'static Schema {
    builtin().kind_of("apps", "v1", "Deployment").expect("known")
}

#[allow(clippy::needless_pass_by_value, reason = "callers write json! in place")]
fn config(spec: Value) -> Value {
    json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "d"}, "spec": spec})
}

fn fields(object: &Value, manager: &str) -> Value {
    let entries = object.pointer("/metadata/managedFields").and_then(Value::as_array).expect("managed fields");
    entries.iter().find(|e| e["manager"] == manager).map_or(Value::Null, |e| e["fieldsV1"].clone())
}

#[test]
fn appliers_share_conflict_and_take() {
    let first = apply(schema(), None, &config(json!({"replicas": 1, "paused": true})), &at("a", 0), false, &[])
        .expect("applies");
    assert_eq!(fields(&first, "a"), json!({"f:spec": {"f:paused": {}, "f:replicas": {}}}));
    let shared =
        apply(schema(), Some(&first), &config(json!({"replicas": 1})), &at("b", 1), false, &[]).expect("same value");
    assert_eq!(fields(&shared, "b"), json!({"f:spec": {"f:replicas": {}}}));
    let conflict = apply(schema(), Some(&shared), &config(json!({"replicas": 2})), &at("b", 2), false, &[]);
    let conflict = conflict.expect_err("conflicts");
    assert_eq!(conflict.to_string(), r#"Apply failed with 1 conflict: conflict with "a": .spec.replicas"#);
    let status = Status::from(conflict);
    assert_eq!((status.code, status.reason.as_str()), (409, "Conflict"));
    let forced =
        apply(schema(), Some(&shared), &config(json!({"replicas": 2})), &at("b", 3), true, &[]).expect("forced");
    assert_eq!(fields(&forced, "a"), json!({"f:spec": {"f:paused": {}}}));
    assert_eq!(forced["spec"]["replicas"], 2);
}

#[test]
fn what_is_no_longer_applied_goes_away() {
    let before = config(json!({"replicas": 1, "template": {"spec": {"containers": [
        {"name": "x", "image": "1", "ports": [{"containerPort": 80}]}, {"name": "y", "image": "2"}]}}}));
    let live = apply(schema(), None, &before, &at("a", 0), false, &[]).expect("applies");
    assert_eq!(
        fields(&live, "a")["f:spec"]["f:template"]["f:spec"]["f:containers"],
        json!({r#"k:{"name":"x"}"#: {".": {}, "f:name": {}, "f:image": {},
            "f:ports": {r#"k:{"containerPort":80,"protocol":"TCP"}"#: {".": {}, "f:containerPort": {}}}},
            r#"k:{"name":"y"}"#: {".": {}, "f:name": {}, "f:image": {}}})
    );
    let after = config(json!({"template": {"spec": {"containers": [{"name": "x", "image": "1"}]}}}));
    let live = apply(schema(), Some(&live), &after, &at("a", 1), false, &[]).expect("applies");
    let containers = json!([{"name": "x", "image": "1", "resources": {}}]);
    assert_eq!(live["spec"]["template"]["spec"]["containers"], containers);
    assert_eq!(live["spec"].get("replicas"), None);
}

#[test]
fn updates_own_what_they_change() {
    let mut created =
        config(json!({"replicas": 1, "template": {"spec": {"containers": [{"name": "x", "image": "1"}]}}}));
    update_managed_fields(schema(), None, &mut created, &at("kubectl", 0), &[]);
    assert_eq!(
        fields(&created, "kubectl"),
        json!({"f:spec": {"f:replicas": {}, "f:template": {"f:spec": {"f:containers":
            {r#"k:{"name":"x"}"#: {".": {}, "f:image": {}, "f:name": {}, "f:resources": {}}}}}}})
    );
    let mut scaled = created.clone();
    scaled["spec"]["replicas"] = json!(3);
    update_managed_fields(
        schema(),
        Some(&created),
        &mut scaled,
        &Manager { subresource: "scale", ..at("hpa", 5) },
        &[],
    );
    assert_eq!(fields(&scaled, "hpa"), json!({"f:spec": {"f:replicas": {}}}));
    assert_eq!(fields(&scaled, "kubectl")["f:spec"].get("f:replicas"), None);
    let conflict = apply(schema(), Some(&scaled), &config(json!({"replicas": 9})), &at("a", 6), false, &[]);
    assert_eq!(
        conflict.expect_err("conflicts").to_string(),
        r#"Apply failed with 1 conflict: conflict with "hpa" with subresource "scale" using apps/v1: .spec.replicas"#
    );
    let mut unchanged = scaled.clone();
    update_managed_fields(schema(), Some(&scaled), &mut unchanged, &at("other", 9), &[]);
    assert_eq!(unchanged, scaled, "who changes nothing owns nothing");
}

#[test]
fn status_is_nobodys_when_it_is_ignored() {
    let mut object = config(json!({"replicas": 1}));
    object["status"] = json!({"replicas": 1});
    update_managed_fields(schema(), None, &mut object, &at("a", 0), &[&["status"]]);
    assert_eq!(fields(&object, "a"), json!({"f:spec": {"f:replicas": {}}}));
}

#[test]
fn managers_are_capped_and_forgotten() {
    let mut object = config(json!({"replicas": 0}));
    update_managed_fields(schema(), None, &mut object, &at("m00", 0), &[]);
    for i in 1..15 {
        let mut next = object.clone();
        next["metadata"]["labels"] = json!({});
        for j in 0..i {
            next["metadata"]["labels"][format!("l{j}")] = json!("x");
        }
        update_managed_fields(schema(), Some(&object), &mut next, &at(&format!("m{i:02}"), i), &[]);
        object = next;
    }
    let entries = object["metadata"]["managedFields"].as_array().expect("entries");
    assert_eq!(entries.len(), 10);
    assert_eq!(entries[0]["manager"], "ancient-changes");
    let mut reset = object.clone();
    reset["metadata"]["managedFields"] = json!([{}]);
    update_managed_fields(schema(), Some(&object), &mut reset, &at("x", 99), &[]);
    assert_eq!(reset.pointer("/metadata/managedFields"), None);
}

#[test]
fn unmanaged_objects_get_a_first_manager() {
    let live = config(json!({"replicas": 1}));
    let applied =
        apply(schema(), Some(&live), &config(json!({"paused": true})), &at("a", 0), false, &[]).expect("applies");
    assert_eq!(fields(&applied, "before-first-apply"), json!({"f:spec": {"f:replicas": {}}}));
    assert_eq!(
        applied["spec"],
        json!({"paused": true, "replicas": 1, "strategy": {}, "template": {"metadata": {}, "spec": {}}})
    );
}

#[test]
fn kubectl_moves_from_client_to_server_side() {
    let mut live = config(json!({"replicas": 1}));
    live["metadata"]["annotations"] = json!({LAST_APPLIED: config(json!({"replicas": 1})).to_string()});
    update_managed_fields(schema(), None, &mut live, &at("kubectl-client-side-apply", 0), &[]);
    let wanted = config(json!({"replicas": 2}));
    let applied = apply(schema(), Some(&live), &wanted, &at("kubectl", 1), false, &[]).expect("takes over");
    let annotation = applied["metadata"]["annotations"][LAST_APPLIED].as_str().expect("annotation");
    assert_eq!(serde_json::from_str::<Value>(annotation).expect("json"), wanted);
    assert!(apply(schema(), Some(&live), &wanted, &at("other", 1), false, &[]).is_err());
}

#[test]
fn bad_configurations_are_refused() {
    let twice = config(json!({"template": {"spec": {"containers": [{"name": "x"}, {"name": "x"}]}}}));
    assert!(matches!(apply(schema(), None, &twice, &at("a", 0), false, &[]), Err(ApplyError::Config { .. })));
    let mut managed = config(json!({}));
    managed["metadata"]["managedFields"] = json!([]);
    assert!(matches!(apply(schema(), None, &managed, &at("a", 0), false, &[]), Err(ApplyError::ManagedFieldsGiven)));
    let other = json!({"apiVersion": "apps/v1beta1", "kind": "Deployment"});
    let unknown = config(json!({"nonsense": 1}));
    let error = apply(schema(), None, &unknown, &at("a", 0), false, &[]).expect_err("undeclared");
    assert_eq!(
        error.to_string(),
        "failed to create typed patch object (/d; apps/v1, Kind=Deployment): .spec.nonsense: field not declared in schema"
    );
    assert!(matches!(apply(schema(), None, &other, &at("a", 0), false, &[]), Err(ApplyError::Version { .. })));
}

#[test]
fn custom_resources_apply_by_their_schema() {
    let schema = Schema::from_custom_resource(&json!({"type": "object", "properties": {"spec": {"type": "object",
        "properties": {"set": {"type": "array", "x-kubernetes-list-type": "set", "items": {"type": "string"}},
        "free": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}}}}}))
    .expect("valid");
    let make = |spec: Value| json!({"apiVersion": "x/v1", "kind": "X", "metadata": {"name": "d"}, "spec": spec});
    let manager = |name| Manager { api_version: "x/v1", ..at(name, 0) };
    let live =
        apply(&schema, None, &make(json!({"set": ["a"], "free": {"k": [1]}})), &manager("a"), false, &[]).expect("ok");
    let live = apply(&schema, Some(&live), &make(json!({"set": ["b"]})), &manager("b"), false, &[]).expect("ok");
    assert_eq!(live["spec"]["set"], json!(["a", "b"]));
    assert_eq!(fields(&live, "a"), json!({"f:spec": {"f:free": {"f:k": {}}, "f:set": {r#"v:"a""#: {}}}}));
}
