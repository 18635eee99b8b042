//! Brings the default RBAC policy into the cluster: missing objects are created, missing rules and subjects added.
//! Nothing is taken away, and objects annotated `rbac.authorization.kubernetes.io/autoupdate: "false"` are left alone.

use std::sync::Arc;

use apimachinery::meta::GroupVersionResource;
use apimachinery::status::Result;
use futures::{TryStreamExt, stream};
use serde_json::{Value, json};

use super::{ensure, policy};
use crate::auth::UserInfo;
use crate::auth::rbac::GROUP;
use crate::auth::rules::{rules_of, uncovered};
use crate::registry::object::ObjectExt;
use crate::server::Server;

const AUTOUPDATE: &str = "rbac.authorization.kubernetes.io/autoupdate";
/// Writes in flight; each is one round trip to the store.
const CONCURRENCY: usize = 8;

pub async fn reconcile(server: &Arc<Server>) -> Result<()> {
    let (bindings, roles): (Vec<Value>, Vec<Value>) =
        policy::objects().into_iter().partition(|object| object.kind().ends_with("Binding"));
    for objects in [roles, bindings] {
        stream::iter(objects.into_iter().map(Ok))
            .try_for_each_concurrent(CONCURRENCY, |object| reconcile_one(server, object))
            .await?;
    }
    Ok(())
}

fn resource_of(kind: &str) -> &'static str {
    match kind {
        "ClusterRole" => "clusterroles",
        "ClusterRoleBinding" => "clusterrolebindings",
        "Role" => "roles",
        _ => "rolebindings",
    }
}

async fn reconcile_one(server: &Arc<Server>, wanted: Value) -> Result<()> {
    let resource = resource_of(wanted.kind());
    if wanted.get("roleRef").is_some() {
        replace_if_other_role(server, resource, &wanted).await?;
    }
    ensure::merged(server, resource, wanted.clone(), |found| merge(found, &wanted)).await
}

/// The role of a binding cannot be changed, so a default binding that names another one is made anew.
async fn replace_if_other_role(server: &Arc<Server>, resource: &'static str, wanted: &Value) -> Result<()> {
    let (namespace, name) = (wanted.namespace(), wanted.name());
    let Some(found) = ensure::cached(server, GROUP, resource, namespace, name) else { return Ok(()) };
    if found["roleRef"] == wanted["roleRef"] || is_protected(&found) {
        return Ok(());
    }
    let gvr = GroupVersionResource::new(GROUP, "v1", resource);
    server.delete(&UserInfo::server(), &gvr, namespace, name).await.map(|_| ())
}

fn is_protected(found: &Value) -> bool {
    found.annotation(AUTOUPDATE) == Some("false")
}

/// What `found` becomes; `None` when nothing is missing.
fn merge(found: &Value, wanted: &Value) -> Option<Value> {
    if is_protected(found) {
        return None;
    }
    let mut changed = found.clone();
    for field in ["labels", "annotations"] {
        let missing = wanted.map_at(&["metadata", field]).into_iter().flatten();
        for (key, value) in missing {
            changed.ensure_object(&["metadata", field]).entry(key.clone()).or_insert_with(|| value.clone());
        }
    }
    if wanted.get("roleRef").is_some() {
        add_subjects(&mut changed, wanted);
    } else if let Some(rule) = wanted.get("aggregationRule") {
        if found.get("aggregationRule").is_none() {
            changed["aggregationRule"] = rule.clone();
        }
    } else {
        add_rules(&mut changed, wanted);
    }
    (changed != *found).then_some(changed)
}

/// Adds the wanted rules that the role does not yet cover.
fn add_rules(role: &mut Value, wanted: &Value) {
    let held = rules_of(role);
    let missing = rules_of(wanted).into_iter().filter(|rule| !uncovered(&held, std::slice::from_ref(rule)).is_empty());
    let missing: Vec<Value> = missing.map(|rule| json!(rule)).collect();
    if !missing.is_empty() {
        let mut all = role.list_at(&["rules"]).to_vec();
        all.extend(missing);
        role["rules"] = all.into();
    }
}

fn add_subjects(binding: &mut Value, wanted: &Value) {
    let identity = |subject: &Value| json!([subject["kind"], subject["name"], subject["namespace"]]);
    let mut subjects = binding.list_at(&["subjects"]).to_vec();
    for subject in wanted.list_at(&["subjects"]) {
        if !subjects.iter().any(|known| identity(known) == identity(subject)) {
            subjects.push(subject.clone());
        }
    }
    if !subjects.is_empty() {
        binding["subjects"] = subjects.into();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn role(rules: &Value) -> Value {
        json!({"kind": "ClusterRole", "metadata": {"name": "r"}, "rules": rules})
    }

    #[test]
    fn missing_rules_are_added_and_extra_ones_stay() {
        let rule = |verb: &str, resource: &str| json!({"verbs": [verb], "apiGroups": [""], "resources": [resource]});
        let wanted = role(&json!([rule("get", "pods"), rule("list", "nodes")]));
        let found = role(&json!([rule("get", "pods"), rule("get", "secrets")]));
        let merged = merge(&found, &wanted).unwrap();
        assert_eq!(merged["rules"], json!([rule("get", "pods"), rule("get", "secrets"), rule("list", "nodes")]));
        assert_eq!(merge(&merged, &wanted), None);
    }

    #[test]
    fn protected_roles_stay() {
        let mut found = role(&json!([]));
        found.set(&["metadata", "annotations", AUTOUPDATE], "false");
        assert_eq!(merge(&found, &role(&json!([{"verbs": ["*"], "nonResourceURLs": ["*"]}]))), None);
    }

    #[test]
    fn missing_subjects_are_added() {
        let binding = |subjects: Value| json!({"kind": "ClusterRoleBinding", "metadata": {"name": "b"}, "roleRef": {}, "subjects": subjects});
        let (a, b) = (json!({"kind": "User", "name": "a"}), json!({"kind": "Group", "name": "b"}));
        let merged = merge(&binding(json!([a])), &binding(json!([b]))).unwrap();
        assert_eq!(merged["subjects"], json!([a, b]));
    }
}
