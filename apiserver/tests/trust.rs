//! What a cluster's owner sets up around the API, on a whole server with an etcd of its own: rules in schemas, webhooks
//! that know tokens and rights, issuers of tokens, sealed secrets, an audit log, and watches through a WebSocket.

#[allow(dead_code, reason = "each file of tests uses its part of the client")]
mod support;

use std::path::Path;
use std::time::Duration;

use http::StatusCode;
use kube_apiserver::Config;
use kube_apiserver::testing::{JsonPeer, TestEtcd, TestServer};
use serde_json::{Value, json};
use support::Api;

const LIMIT: Duration = Duration::from_secs(5);

struct Cluster {
    api: Api,
    server: TestServer,
    etcd: TestEtcd,
}

/// `None`: there is no etcd on this machine.
async fn cluster(change: impl FnOnce(&mut Config)) -> Option<Cluster> {
    let etcd = TestEtcd::start().expect("etcd starts")?;
    let store = etcd.store().await.expect("etcd answers");
    let server = TestServer::start_with(store, change).await.expect("the server starts");
    let api = Api::new(&server);
    let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "default"}});
    assert_eq!(api.post("/api/v1/namespaces", &namespace).await.0, StatusCode::CREATED);
    Some(Cluster { api, server, etcd })
}

fn write(directory: &Path, name: &str, text: &str) -> std::path::PathBuf {
    let path = directory.join(name);
    std::fs::write(&path, text).expect("a file");
    path
}

fn definition(rule: &str) -> Value {
    json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": "things.example.com"},
        "spec": {
            "group": "example.com", "scope": "Cluster",
            "names": {"plural": "things", "singular": "thing", "kind": "Thing", "listKind": "ThingList"},
            "versions": [{"name": "v1", "served": true, "storage": true, "schema": {"openAPIV3Schema": {
                "type": "object",
                "properties": {"spec": {
                    "type": "object",
                    "properties": {"size": {"type": "integer"}, "note": {"type": "string", "maxLength": 10}},
                    "x-kubernetes-validations": [
                        {"rule": rule},
                        {"rule": "self.size >= oldSelf.size", "messageExpression": "'was ' + string(oldSelf.size)"},
                    ],
                }},
            }}}],
        },
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn custom_resources_obey_their_rules() {
    let Some(Cluster { api, server: _server, etcd: _etcd }) = cluster(|_| {}).await else { return };
    let definitions = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";
    let (code, refused) = api.post(definitions, &definition("self.nope > 1")).await;
    assert_eq!(code, StatusCode::UNPROCESSABLE_ENTITY);
    let message = refused["message"].as_str().expect("a message");
    assert!(
        message.contains("x-kubernetes-validations[0].rule") && message.contains("undefined field 'nope'"),
        "{message}"
    );
    assert_eq!(api.post(definitions, &definition("self.size > 1")).await.0, StatusCode::CREATED);

    let things = "/apis/example.com/v1/things";
    let thing = |size: i64| json!({"apiVersion": "example.com/v1", "kind": "Thing", "metadata": {"name": "a"}, "spec": {"size": size}});
    apimachinery::testing::eventually("things are served", LIMIT, || async {
        let (code, answer) = api.get(things).await;
        if code == StatusCode::OK { Ok(()) } else { Err(answer.to_string()) }
    })
    .await;
    let (code, refused) = api.post(things, &thing(1)).await;
    assert_eq!(code, StatusCode::UNPROCESSABLE_ENTITY);
    assert_eq!(
        refused["message"],
        "Thing.example.com \"a\" is invalid: spec: Invalid value: failed rule: self.size > 1"
    );
    let (code, created) = api.post(things, &thing(5)).await;
    assert_eq!(code, StatusCode::CREATED, "{created}");
    let path = format!("{things}/a");
    let (code, refused) = api.patch(&path, "application/merge-patch+json", &json!({"spec": {"size": 4}})).await;
    assert_eq!(code, StatusCode::UNPROCESSABLE_ENTITY);
    assert_eq!(refused["message"], "Thing.example.com \"a\" is invalid: spec: Invalid value: was 5");
    let (code, grown) = api.patch(&path, "application/merge-patch+json", &json!({"spec": {"size": 6}})).await;
    assert_eq!((code, &grown["spec"]["size"]), (StatusCode::OK, &json!(6)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn webhooks_know_tokens_and_rights() {
    let peer = JsonPeer::start(|_, review| {
        let status = match review["kind"].as_str() {
            Some("TokenReview") if review["spec"]["token"] == "good" => {
                json!({"authenticated": true, "user": {"username": "jane", "groups": ["devs"]}})
            }
            Some("SubjectAccessReview") => {
                let asked = &review["spec"]["resourceAttributes"]["resource"];
                json!({"allowed": asked == "configmaps", "reason": "the webhook says so"})
            }
            _ => json!({"authenticated": false}),
        };
        let mut answer = review.clone();
        answer["status"] = status;
        (200, answer)
    })
    .await
    .expect("a webhook");
    let directory = tempfile::tempdir().expect("a directory");
    let file = write(directory.path(), "hook", &peer.kubeconfig());
    let changed = |config: &mut Config| {
        config.authentication_token_webhook_config_file = Some(file.clone());
        config.authentication_token_webhook_version = "v1".into();
        config.authorization_mode = vec!["RBAC".into(), "Webhook".into()];
        config.authorization_webhook_config_file = Some(file.clone());
        config.authorization_webhook_version = "v1".into();
    };
    let Some(Cluster { server, etcd: _etcd, .. }) = cluster(changed).await else { return };
    let jane = Api::with_token(&server, "good");
    assert_eq!(jane.get("/api/v1/namespaces/default/configmaps").await.0, StatusCode::OK);
    assert_eq!(jane.get("/api/v1/namespaces/default/configmaps").await.0, StatusCode::OK);
    let (code, refused) = jane.get("/api/v1/namespaces/default/secrets").await;
    assert_eq!(code, StatusCode::FORBIDDEN);
    assert!(refused["message"].as_str().is_some_and(|m| m.ends_with("the webhook says so")), "{refused}");
    assert_eq!(Api::with_token(&server, "bad").get("/api").await.0, StatusCode::UNAUTHORIZED);
    let asked = peer.asked();
    let kinds: Vec<&str> = asked.iter().filter_map(|(_, review)| review["kind"].as_str()).collect();
    // Answers are kept: the second list asked nobody.
    assert_eq!(kinds, ["TokenReview", "SubjectAccessReview", "SubjectAccessReview", "TokenReview"]);
    assert_eq!(asked[1].1["spec"]["groups"], json!(["devs", "system:authenticated"]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn secrets_are_sealed_in_the_store() {
    let directory = tempfile::tempdir().expect("a directory");
    let config = "kind: EncryptionConfiguration\napiVersion: apiserver.config.k8s.io/v1\nresources:\n- resources: [secrets]\n  providers:\n  - secretbox: {keys: [{name: one, secret: MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=}]}\n  - identity: {}\n";
    let file = write(directory.path(), "encryption", config);
    let Some(Cluster { api, server: _server, etcd }) =
        cluster(|config| config.encryption_provider_config = Some(file.clone())).await
    else {
        return;
    };
    let secret = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}, "data": {"a": "Yg=="}});
    let secrets = "/api/v1/namespaces/default/secrets";
    assert_eq!(api.post(secrets, &secret).await.0, StatusCode::CREATED);
    let (code, read) = api.get(&format!("{secrets}/s")).await;
    assert_eq!((code, &read["data"]["a"]), (StatusCode::OK, &json!("Yg==")));
    assert_eq!(api.get(secrets).await.1["items"][0]["data"]["a"], "Yg==");
    let store = etcd.store().await.expect("etcd answers");
    let kept = store.get("/registry/secrets/default/s").await.expect("a read").expect("a secret").value;
    assert!(kept.starts_with(b"k8s:enc:secretbox:v1:one:"), "{kept:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_leave_a_trail() {
    let directory = tempfile::tempdir().expect("a directory");
    let policy = "apiVersion: audit.k8s.io/v1\nkind: Policy\nomitStages: [RequestReceived]\nrules:\n- level: RequestResponse\n  resources: [{group: '', resources: [configmaps]}]\n- level: None\n";
    let (file, log) = (write(directory.path(), "policy", policy), directory.path().join("audit.log"));
    let changed = |config: &mut Config| {
        config.audit_policy_file = Some(file.clone());
        config.audit_log_path = log.display().to_string();
    };
    let Some(Cluster { api, server: _server, etcd: _etcd }) = cluster(changed).await else { return };
    let map = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "m"}, "data": {"a": "b"}});
    assert_eq!(api.post("/api/v1/namespaces/default/configmaps", &map).await.0, StatusCode::CREATED);
    assert_eq!(api.get("/api/v1/namespaces/default/secrets").await.0, StatusCode::OK);
    let events = apimachinery::testing::eventually("one event", LIMIT, || async {
        let text = std::fs::read_to_string(&log).unwrap_or_default();
        let events: Vec<Value> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        if events.len() == 1 { Ok(events) } else { Err(text) }
    })
    .await;
    let event = &events[0];
    assert_eq!((&event["stage"], &event["verb"]), (&json!("ResponseComplete"), &json!("create")));
    assert_eq!(event["user"]["username"], "admin");
    assert_eq!(event["objectRef"]["name"], "m");
    assert_eq!(event["requestObject"]["data"], json!({"a": "b"}));
    assert!(event["responseObject"]["metadata"]["uid"].is_string(), "{event}");
    assert_eq!(event["annotations"]["authorization.k8s.io/decision"], "allow");
}
