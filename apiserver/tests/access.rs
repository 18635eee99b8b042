//! Who may do what, on a whole server with an etcd of its own: roles and bindings, impersonation, reviews, tokens of
//! service accounts, and the documents of discovery.

#[allow(dead_code, reason = "each file of tests uses its part of the client")]
mod support;

use http::{Method, StatusCode};
use kube_apiserver::testing::{TestEtcd, TestServer};
use serde_json::json;
use support::Api;

const LIMIT: std::time::Duration = std::time::Duration::from_secs(5);

async fn with_server<F: Future<Output = ()>>(test: impl FnOnce(Api) -> F) {
    let Some(etcd) = TestEtcd::start().expect("etcd starts") else { return };
    let store = etcd.store().await.expect("etcd answers");
    let server = TestServer::start(store).await.expect("the server starts");
    test(Api::new(&server)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rights_follow_roles_and_bindings() {
    with_server(|api| async move {
        let review = json!({
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SubjectAccessReview",
            "spec": {"user": "jane", "resourceAttributes": {"verb": "list", "resource": "pods", "namespace": "default"}},
        });
        let reviews = "/apis/authorization.k8s.io/v1/subjectaccessreviews";
        let (code, answer) = api.post(reviews, &review).await;
        assert_eq!((code, &answer["status"]["allowed"]), (StatusCode::CREATED, &json!(false)), "{answer}");
        let rbac = "/apis/rbac.authorization.k8s.io/v1";
        let role = json!({
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRole",
            "metadata": {"name": "read-pods"},
            "rules": [{"verbs": ["list"], "apiGroups": [""], "resources": ["pods"]}],
        });
        let binding = json!({
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": "jane"},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "read-pods"},
            "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "jane"}],
        });
        assert_eq!(api.post(&format!("{rbac}/clusterroles"), &role).await.0, StatusCode::CREATED);
        assert_eq!(api.post(&format!("{rbac}/clusterrolebindings"), &binding).await.0, StatusCode::CREATED);
        let granted = apimachinery::testing::eventually("jane may list pods", LIMIT, || async {
            let (_, answer) = api.post(reviews, &review).await;
            if answer["status"]["allowed"] == true { Ok(answer) } else { Err(answer.to_string()) }
        });
        let reason = granted.await["status"]["reason"].clone();
        assert_eq!(reason, r#"RBAC: allowed by ClusterRoleBinding "jane" of ClusterRole "read-pods" to User "jane""#);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn discovery_lists_what_is_served() {
    with_server(|api| async move {
        let (_, groups) = api.get("/apis").await;
        assert_eq!(groups["groups"][0]["name"], "apiregistration.k8s.io");
        let (_, apps) = api.get("/apis/apps/v1").await;
        let names: Vec<&str> =
            apps["resources"].as_array().expect("a list").iter().filter_map(|r| r["name"].as_str()).collect();
        assert!(names.contains(&"deployments") && names.contains(&"deployments/scale"), "{names:?}");
        assert_eq!(api.get("/apis/nothing/v1").await.0, StatusCode::NOT_FOUND);
        let (_, version) = api.get("/version").await;
        assert_eq!(version["gitVersion"], "v1.37.2");
        let (code, _) = api.call(Method::GET, "/readyz/etcd", "application/json", "").await;
        assert_eq!(code, StatusCode::OK);
    })
    .await;
}
