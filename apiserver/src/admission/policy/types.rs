//! Checks the types of validating policies when they change and says in their status what cannot work. This server does
//! it because it has the schemas; it never keeps a policy from being used.

use std::sync::Arc;
use std::time::Duration;

use apimachinery::meta::GroupVersionResource;
use serde_json::{Value, json};

use super::GROUP;
use crate::auth::UserInfo;
use crate::cache::{Selection, Start, Stored};
use crate::cel::Expression;
use crate::cel::check::{Type, Variables, check};
use crate::registry::Served;
use crate::registry::object::ObjectExt;
use crate::server::Server;

const RESOURCE: &str = "validatingadmissionpolicies";
const RETRY: Duration = Duration::from_secs(1);
/// Kinds that one policy is checked against, at most.
const KINDS: usize = 10;

/// Runs until shutdown.
pub async fn run(server: Arc<Server>) {
    let Some(policies) = server.caches.get(GROUP, RESOURCE) else { return };
    server.caches.wait_for(1).await;
    while !server.shutdown.is_cancelled() {
        let (mut watch, snapshot) = match policies.watch(Selection::default(), Start::Snapshot) {
            Ok(started) => started,
            Err(error) => {
                tracing::debug!(%error, "cannot watch admission policies yet");
                tokio::time::sleep(RETRY).await;
                continue;
            }
        };
        for object in snapshot.unwrap_or_default().values() {
            sync(&server, object).await;
        }
        loop {
            let event = tokio::select! {
                () = server.shutdown.cancelled() => return,
                event = watch.next() => event,
            };
            match event {
                Some(event) if !event.deleted => sync(&server, &event.object).await,
                Some(_) => {}
                None => break,
            }
        }
    }
}

async fn sync(server: &Arc<Server>, object: &Stored) {
    let policy = object.value();
    let generation = policy.i64_at(&["metadata", "generation"]).unwrap_or(0);
    if policy.i64_at(&["status", "observedGeneration"]).unwrap_or(0) == generation || policy.is_being_deleted() {
        return;
    }
    let warnings = warnings(server, &policy["spec"]);
    let gvr = GroupVersionResource::new(GROUP, "v1", RESOURCE);
    let user = UserInfo::server();
    let written = server.guaranteed_update(&user, &gvr, "", object.name(), "status", |mut policy| {
        policy.set(&["status", "observedGeneration"], generation);
        let checked = if warnings.is_empty() { json!({}) } else { json!({"expressionWarnings": warnings}) };
        policy.set(&["status", "typeChecking"], checked);
        Ok(policy)
    });
    match written.await {
        Err(error) if error.code != 404 => {
            tracing::warn!(policy = object.name(), %error, "cannot write the status of an admission policy");
        }
        _ => {}
    }
}

/// What is wrong with the expressions of a policy, for the kinds that its rules name one by one.
fn warnings(server: &Server, spec: &Value) -> Vec<Value> {
    let kinds = kinds(server, spec);
    let mut warnings = Vec::new();
    for (index, validation) in spec.list_at(&["validations"]).iter().enumerate() {
        for field in ["expression", "messageExpression"] {
            let source = validation.str_at(&[field]);
            let Ok(expression) = Expression::compile(source) else { continue };
            let complaints = complaints(&kinds, &expression);
            if !complaints.is_empty() {
                let field = format!("spec.validations[{index}].{field}");
                warnings.push(json!({"fieldRef": field, "warning": complaints.join("\n")}));
            }
        }
    }
    warnings
}

fn complaints(kinds: &[Arc<Served>], expression: &Expression) -> Vec<String> {
    let of_kind = |served: &Arc<Served>| {
        let Some(schema) = &served.schema else { return vec![] };
        let object = Type::of_schema(schema);
        let mut variables = Variables::from([("object".to_owned(), object.clone()), ("oldObject".to_owned(), object)]);
        // A policy's variables are members of one value, whose types are not followed.
        variables.insert("variables".into(), Type::Dyn);
        let (_, complaints) = check(expression.tree(), &variables);
        let complain = |complaint: String| {
            let gvk = &served.gvk;
            format!("{}, Kind={}: ERROR: {complaint}\n | {}", gvk.api_version(), gvk.kind, expression.source())
        };
        complaints.into_iter().map(complain).collect::<Vec<_>>()
    };
    kinds.iter().flat_map(of_kind).collect()
}

/// The kinds of the rules; rules with wildcards have none.
fn kinds(server: &Server, spec: &Value) -> Vec<Arc<Served>> {
    let mut kinds = Vec::new();
    for rule in spec.list_at(&["matchConstraints", "resourceRules"]) {
        let texts = |field: &str| rule.list_at(&[field]).iter().filter_map(Value::as_str).collect::<Vec<_>>();
        for group in texts("apiGroups") {
            for resource in texts("resources") {
                let Some(resource) = server.registry.get(group, resource) else { continue };
                kinds.extend(texts("apiVersions").iter().filter_map(|version| resource.version(version).cloned()));
            }
        }
    }
    kinds.truncate(KINDS);
    kinds
}
