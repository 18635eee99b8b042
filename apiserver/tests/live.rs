//! A whole server over TLS, on a real etcd: what clients rely on, verb by verb. Needs `etcd` in PATH; says so and
//! passes when there is none.

mod support;

use http::StatusCode;
use kube_apiserver::testing::{TestEtcd, TestServer};
use serde_json::{Value, json};
use support::Api;

const MAPS: &str = "/api/v1/namespaces/default/configmaps";
const MERGE: &str = "application/merge-patch+json";

async fn start() -> Option<(TestEtcd, TestServer, Api)> {
    let etcd = TestEtcd::start().expect("etcd starts")?;
    let server = TestServer::start(etcd.store().await.expect("etcd answers")).await.expect("the server starts");
    let api = Api::new(&server);
    let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "default"}});
    assert_eq!(api.post("/api/v1/namespaces", &namespace).await.0, StatusCode::CREATED);
    Some((etcd, server, api))
}

fn map(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"a": "1"}})
}

fn version(object: &Value) -> String {
    object["metadata"]["resourceVersion"].as_str().unwrap_or_default().to_owned()
}

fn names(list: &Value) -> Vec<&str> {
    list["items"].as_array().into_iter().flatten().filter_map(|item| item["metadata"]["name"].as_str()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn objects_live_and_die() {
    let Some((_etcd, _server, api)) = start().await else { return };
    let path = format!("{MAPS}/a");
    assert_eq!(api.get(&path).await.1["message"], r#"configmaps "a" not found"#);

    let (status, made) = api.post(MAPS, &map("a")).await;
    assert_eq!(status, StatusCode::CREATED, "{made}");
    assert_eq!(made["metadata"]["managedFields"][0]["manager"], "tests");
    let (status, again) = api.post(MAPS, &map("a")).await;
    assert_eq!((status, &again["reason"]), (StatusCode::CONFLICT, &json!("AlreadyExists")));
    assert_eq!(api.get(&path).await.1["metadata"], made["metadata"]);

    let mut changed = made.clone();
    changed["data"]["b"] = json!("2");
    let (status, updated) = api.put(&path, &changed).await;
    assert_eq!(status, StatusCode::OK, "{updated}");
    assert_ne!(version(&made), version(&updated));
    let (status, stale) = api.put(&path, &changed).await;
    assert_eq!(status, StatusCode::CONFLICT);
    assert_eq!(
        stale["message"],
        "Operation cannot be fulfilled on configmaps \"a\": the object has been modified; please apply your changes to the latest version and try again"
    );
    let (_, same) = api.put(&path, &updated).await;
    assert_eq!(version(&updated), version(&same), "an update without a change writes nothing");

    let held = json!({"metadata": {"finalizers": ["example.com/hold"]}});
    assert_eq!(api.patch(&path, MERGE, &held).await.0, StatusCode::OK);
    let (status, marked) = api.delete(&path, &json!({})).await;
    assert_eq!(status, StatusCode::OK);
    assert!(marked["metadata"]["deletionTimestamp"].is_string(), "{marked}");
    let (_, gone) = api.patch(&path, MERGE, &json!({"metadata": {"finalizers": null}})).await;
    assert_eq!(gone["kind"], "ConfigMap");
    assert_eq!(api.get(&path).await.0, StatusCode::NOT_FOUND);
    assert_eq!(api.delete(&path, &json!({})).await.0, StatusCode::NOT_FOUND);
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_come_in_pages_of_one_snapshot() {
    let Some((_etcd, _server, api)) = start().await else { return };
    for name in ["a", "b", "c", "d", "e"] {
        assert_eq!(api.post(MAPS, &map(name)).await.0, StatusCode::CREATED);
    }
    let (_, first) = api.get(&format!("{MAPS}?limit=2")).await;
    assert_eq!((names(&first), &first["metadata"]["remainingItemCount"]), (vec!["a", "b"], &json!(3)));
    api.delete(&format!("{MAPS}/d"), &json!({})).await;
    let token = first["metadata"]["continue"].as_str().expect("more to come");
    let (_, rest) = api.get(&format!("{MAPS}?limit=10&continue={token}")).await;
    assert_eq!(names(&rest), ["c", "d", "e"]);
    assert_eq!(version(&first), version(&rest));
    assert_eq!(names(&api.get(MAPS).await.1), ["a", "b", "c", "e"]);
    assert_eq!(names(&api.get(&format!("{MAPS}?fieldSelector=metadata.name%3Db")).await.1), ["b"]);
    let (status, _) = api.get(&format!("{MAPS}?resourceVersion=99999999")).await;
    assert_eq!(status, StatusCode::GATEWAY_TIMEOUT);
    let (status, deleted) = api.delete(MAPS, &json!({})).await;
    assert_eq!((status, names(&deleted).len()), (StatusCode::OK, 4));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_whose_history_is_gone_goes_on_in_the_present() {
    let Some((_etcd, server, api)) = start().await else { return };
    for name in ["a", "b", "c"] {
        assert_eq!(api.post(MAPS, &map(name)).await.0, StatusCode::CREATED);
    }
    let (_, first) = api.get(&format!("{MAPS}?limit=1")).await;
    let token = first["metadata"]["continue"].as_str().expect("more to come");
    // Nothing of the list changes: that the token expires must not depend on it.
    let (_, other) = api.post("/api/v1/namespaces/default/secrets", &json!({"metadata": {"name": "s"}})).await;
    let revision = version(&other).parse().expect("a revision");
    let state = &server.server;
    kube_apiserver::server::forget_before(&*state.store, &state.caches, revision).await;
    let (status, gone) = api.get(&format!("{MAPS}?limit=1&continue={token}")).await;
    assert_eq!((status, &gone["reason"]), (StatusCode::GONE, &json!("Expired")), "{gone}");
    let token = gone["metadata"]["continue"].as_str().expect("a token for the present");
    let (_, rest) = api.get(&format!("{MAPS}?limit=5&continue={token}")).await;
    assert_eq!(names(&rest), ["b", "c"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn watches_tell_every_change_once() {
    let Some((_etcd, _server, api)) = start().await else { return };
    let (_, made) = api.post(MAPS, &map("a")).await;
    let mut live = api.watch(&format!("{MAPS}?watch=true")).await;
    assert_eq!(live.seen().await, ("ADDED".into(), "a".into()));
    let mut labelled =
        api.watch(&format!("{MAPS}?watch=true&labelSelector=x%3Dy&resourceVersion={}", version(&made))).await;
    api.patch(&format!("{MAPS}/a"), MERGE, &json!({"metadata": {"labels": {"x": "y"}}})).await;
    api.patch(&format!("{MAPS}/a"), MERGE, &json!({"metadata": {"labels": {"x": "z"}}})).await;
    api.delete(&format!("{MAPS}/a"), &json!({})).await;
    for expected in ["MODIFIED", "MODIFIED", "DELETED"] {
        assert_eq!(live.seen().await, (expected.into(), "a".into()));
    }
    assert_eq!(labelled.seen().await, ("ADDED".into(), "a".into()));
    assert_eq!(labelled.seen().await, ("DELETED".into(), "a".into()));
    let mut replayed =
        api.watch(&format!("{MAPS}?watch=true&timeoutSeconds=1&resourceVersion={}", version(&made))).await;
    for expected in ["MODIFIED", "MODIFIED", "DELETED"] {
        assert_eq!(replayed.seen().await.0, expected);
    }
    assert_eq!(replayed.next().await, None, "the watch ends when its time is over");
    let mut old = api.watch(&format!("{MAPS}?watch=true&resourceVersion=1")).await;
    let event = old.next().await.expect("an answer");
    assert!(event["type"] == "ADDED" || event["object"]["code"] == 410, "{event}");
}

#[tokio::test(flavor = "multi_thread")]
async fn initial_events_end_with_a_bookmark() {
    let Some((_etcd, _server, api)) = start().await else { return };
    api.post(MAPS, &map("a")).await;
    let query = "watch=true&sendInitialEvents=true&allowWatchBookmarks=true&resourceVersionMatch=NotOlderThan";
    let mut watch = api.watch(&format!("{MAPS}?{query}")).await;
    assert_eq!(watch.seen().await, ("ADDED".into(), "a".into()));
    let bookmark = watch.next().await.expect("a bookmark");
    assert_eq!(bookmark["type"], "BOOKMARK");
    assert_eq!(bookmark["object"]["metadata"]["annotations"]["k8s.io/initial-events-end"], "true");
}

#[tokio::test(flavor = "multi_thread")]
async fn apply_owns_fields_and_conflicts() {
    let Some((_etcd, _server, api)) = start().await else { return };
    let path = format!("{MAPS}/a");
    let apply = "application/apply-patch+yaml";
    let (status, made) = api.patch(&format!("{path}?fieldManager=one"), apply, &map("a")).await;
    assert_eq!(status, StatusCode::CREATED, "{made}");
    let mut other = map("a");
    other["data"] = json!({"a": "2"});
    let (status, conflict) = api.patch(&format!("{path}?fieldManager=two"), apply, &other).await;
    assert_eq!(status, StatusCode::CONFLICT);
    assert_eq!(conflict["details"]["causes"][0]["field"], ".data.a", "{conflict}");
    let (status, forced) = api.patch(&format!("{path}?fieldManager=two&force=true"), apply, &other).await;
    assert_eq!((status, &forced["data"]["a"]), (StatusCode::OK, &json!("2")));
}

#[tokio::test(flavor = "multi_thread")]
async fn dry_runs_and_strict_fields() {
    let Some((_etcd, _server, api)) = start().await else { return };
    assert_eq!(api.post(&format!("{MAPS}?dryRun=All"), &map("a")).await.0, StatusCode::CREATED);
    assert_eq!(api.get(&format!("{MAPS}/a")).await.0, StatusCode::NOT_FOUND);
    let mut odd = map("a");
    odd["nonsense"] = json!(1);
    let (status, refused) = api.post(&format!("{MAPS}?fieldValidation=Strict"), &odd).await;
    let why = "ConfigMap in version \"v1\" cannot be handled as a ConfigMap: strict decoding error: unknown field \"nonsense\"";
    assert_eq!((status, &refused["message"]), (StatusCode::BAD_REQUEST, &json!(why)));
    let response = api.send(http::Method::POST, MAPS, "application/json", &odd.to_string()).await;
    assert_eq!(response.status(), StatusCode::CREATED);
    assert_eq!(response.headers()["warning"], "299 - \"unknown field \\\"nonsense\\\"\"");
    let generated = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"generateName": "g-"}});
    let (status, made) = api.post(MAPS, &generated).await;
    assert_eq!(status, StatusCode::CREATED);
    assert_eq!(made["metadata"]["name"].as_str().map(str::len), Some(7));
}

fn widgets() -> Value {
    json!({
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": "widgets.example.com"},
        "spec": {
            "group": "example.com", "scope": "Namespaced",
            "names": {"plural": "widgets", "singular": "widget", "kind": "Widget", "listKind": "WidgetList", "shortNames": ["wd"]},
            "versions": [{
                "name": "v1", "served": true, "storage": true,
                "subresources": {"status": {}, "scale": {"specReplicasPath": ".spec.size", "statusReplicasPath": ".status.size"}},
                "additionalPrinterColumns": [{"name": "Size", "type": "integer", "jsonPath": ".spec.size"}],
                "schema": {"openAPIV3Schema": {"type": "object", "properties": {
                    "spec": {"type": "object", "properties": {
                        "size": {"type": "integer", "minimum": 1, "default": 3}, "color": {"type": "string"},
                    }},
                    "status": {"type": "object", "properties": {"size": {"type": "integer"}}},
                }}},
            }],
        },
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn custom_resources_are_served_while_defined() {
    let Some((_etcd, _server, api)) = start().await else { return };
    let definitions = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";
    let (status, made) = api.post(definitions, &widgets()).await;
    assert_eq!(status, StatusCode::CREATED, "{made}");
    let mut watch =
        api.watch(&format!("{definitions}?watch=true&fieldSelector=metadata.name%3Dwidgets.example.com")).await;
    while !watch.next().await.expect("an event").to_string().contains("\"Established\"") {}

    let path = "/apis/example.com/v1/namespaces/default/widgets";
    let widget =
        json!({"apiVersion": "example.com/v1", "kind": "Widget", "metadata": {"name": "w"}, "spec": {"odd": 1}});
    let (status, made) = api.post(path, &widget).await;
    assert_eq!((status, &made["spec"]), (StatusCode::CREATED, &json!({"size": 3})), "pruned and defaulted: {made}");
    let mut small = widget.clone();
    small["metadata"]["name"] = json!("small");
    small["spec"] = json!({"size": 0});
    assert_eq!(
        api.post(path, &small).await.1["message"],
        "Widget.example.com \"small\" is invalid: spec.size: Invalid value: 0: spec.size in body should be greater than or equal to 1"
    );
    let (_, scale) = api.patch(&format!("{path}/w/scale"), MERGE, &json!({"spec": {"replicas": 5}})).await;
    assert_eq!(scale["spec"]["replicas"], 5, "{scale}");
    let (_, list) = api.get(path).await;
    assert_eq!((&list["kind"], &list["items"][0]["kind"]), (&json!("WidgetList"), &json!("Widget")));

    assert_eq!(api.delete(&format!("{definitions}/widgets.example.com"), &json!({})).await.0, StatusCode::OK);
    while watch.next().await.expect("an event")["type"] != "DELETED" {}
    let (_, again) = api.post(definitions, &widgets()).await;
    assert_eq!(again["kind"], "CustomResourceDefinition", "{again}");
}
