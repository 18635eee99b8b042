//! The flow schemas and priority levels of every cluster, and the `Dangling` condition of flow schemas: whether the
//! priority level that one names is there. What requests wait for is in `flow`.

use std::sync::Arc;
use std::time::Duration;

use apimachinery::meta::GroupVersionResource;
use apimachinery::status::Result;
use serde_json::{Value, json};

use super::cluster::now;
use super::ensure::cached;
use crate::auth::UserInfo;
use crate::cache::{Selection, Start, Stored};
use crate::registry::common::same;
use crate::registry::flowcontrol::presets;
use crate::registry::object::ObjectExt;
use crate::registry::tables::condition;
use crate::server::Server;

const GROUP: &str = "flowcontrol.apiserver.k8s.io";
const SCHEMAS: &str = "flowschemas";
const LEVELS: &str = "prioritylevelconfigurations";
const PRODUCER: &str = "api-priority-and-fairness-config-producer-v1";
const CONSUMER: &str = "api-priority-and-fairness-config-consumer-v1";
const RETRY: Duration = Duration::from_secs(1);
/// Everything is looked at again this often: another writer may hold the condition, and must not be fought at once.
const RESYNC: Duration = Duration::from_secs(45);
/// How often one flow schema is written within [`RESYNC`], at most.
const WRITES: usize = 6;

fn resource(name: &'static str) -> GroupVersionResource {
    GroupVersionResource::new(GROUP, "v1", name)
}

/// Creates what is missing, and brings up to date what nobody has taken for their own.
pub async fn ensure(server: &Arc<Server>) -> Result<()> {
    for (kind, objects) in [(LEVELS, presets::priority_levels()), (SCHEMAS, presets::flow_schemas())] {
        for object in objects {
            ensure_one(server, kind, object).await?;
        }
    }
    Ok(())
}

async fn ensure_one(server: &Arc<Server>, kind: &'static str, object: Value) -> Result<()> {
    let user = UserInfo::server();
    let name = object.name().to_owned();
    let Some(found) = cached(server, GROUP, kind, "", &name) else {
        return match server.create_managed(&user, &resource(kind), "", object, PRODUCER).await {
            Err(error) if error.reason != "AlreadyExists" => Err(error),
            _ => Ok(()),
        };
    };
    match outdated(&found, &object) {
        Some(changed) => server.update(&user, &resource(kind), "", changed).await.map(drop),
        None => Ok(()),
    }
}

/// What an existing object becomes; nothing: it is right, or somebody's own. One without the annotation is ours as long
/// as nobody ever changed it.
fn outdated(found: &Value, wanted: &Value) -> Option<Value> {
    let is_ours = match found.annotation(presets::AUTO_UPDATE) {
        Some(given) => given == "true",
        None => found.i64_at(&["metadata", "generation"]) == Some(1),
    };
    let mut changed = found.clone();
    if is_ours && !same(&found["spec"], &wanted["spec"]) {
        changed["spec"] = wanted["spec"].clone();
    }
    let annotations = changed.ensure_object(&["metadata", "annotations"]);
    annotations.entry(presets::AUTO_UPDATE).or_insert_with(|| is_ours.to_string().into());
    (changed != *found).then_some(changed)
}

/// Keeps the `Dangling` condition right until shutdown.
pub async fn watch_over(server: Arc<Server>) {
    let (Some(schemas), Some(levels)) = (server.caches.get(GROUP, SCHEMAS), server.caches.get(GROUP, LEVELS)) else {
        return tracing::debug!("flow control is not served");
    };
    server.caches.wait_for(1).await;
    let mut writes = Writes::default();
    while !server.shutdown.is_cancelled() {
        let started = schemas.watch(Selection::default(), Start::Snapshot);
        let also = levels.watch(Selection::default(), Start::Snapshot);
        let (Ok((mut schema_events, _)), Ok((mut level_events, _))) = (started, also) else {
            tokio::time::sleep(RETRY).await;
            continue;
        };
        loop {
            check_all(&server, &schemas.list(None), &mut writes).await;
            let more = tokio::select! {
                () = server.shutdown.cancelled() => return,
                () = tokio::time::sleep(RESYNC) => {
                    writes = Writes::default();
                    true
                }
                event = schema_events.next() => event.is_some(),
                event = level_events.next() => event.is_some(),
            };
            if !more {
                break;
            }
        }
    }
}

/// How often each flow schema was written lately.
#[derive(Default)]
struct Writes(std::collections::HashMap<String, usize>);

impl Writes {
    /// Whether it may be written once more.
    fn allow(&mut self, name: &str) -> bool {
        let count = self.0.entry(name.to_owned()).or_default();
        *count += 1;
        *count <= WRITES
    }
}

async fn check_all(server: &Arc<Server>, schemas: &[Arc<Stored>], writes: &mut Writes) {
    for schema in schemas {
        let schema = schema.value();
        let level = schema.str_at(&["spec", "priorityLevelConfiguration", "name"]);
        let exists = presets::is_mandatory(level) || cached(server, GROUP, LEVELS, "", level).is_some();
        let Some(wanted) = dangling(&schema, level, exists) else { continue };
        if !writes.allow(schema.name()) {
            continue;
        }
        let config = json!({
            "apiVersion": "flowcontrol.apiserver.k8s.io/v1",
            "kind": "FlowSchema",
            "metadata": {"name": schema.name()},
            "status": {"conditions": [wanted]},
        });
        let applied = server.apply_status(&UserInfo::server(), &resource(SCHEMAS), "", config, CONSUMER).await;
        if let Err(error) = applied
            && error.code != 404
        {
            tracing::warn!(name = schema.name(), %error, "cannot write the status of a flow schema");
        }
    }
}

/// The condition that the schema should have, when it has another one.
fn dangling(schema: &Value, level: &str, exists: bool) -> Option<Value> {
    let (status, reason, end) = match exists {
        true => ("False", "Found", "and it exists"),
        false => ("True", "NotFound", "but there is no such object"),
    };
    let message = format!("This FlowSchema references the PriorityLevelConfiguration object named {level:?} {end}");
    let is_right = condition(schema, "Dangling").is_some_and(|found| {
        found["status"] == status && found["reason"] == reason && found["message"] == message.as_str()
    });
    (!is_right).then(|| {
        json!({
            "type": "Dangling", "status": status, "reason": reason, "message": message, "lastTransitionTime": now(),
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dangling_references_are_told() {
        let mut schema = json!({"metadata": {"name": "a"}});
        let found = dangling(&schema, "b", false).unwrap_or_default();
        assert_eq!((&found["status"], &found["reason"]), (&json!("True"), &json!("NotFound")));
        schema["status"]["conditions"] = json!([found]);
        assert_eq!(dangling(&schema, "b", false), None);
        assert_eq!(dangling(&schema, "b", true).unwrap_or_default()["reason"], "Found");
    }

    #[test]
    fn what_somebody_took_for_their_own_stays() {
        let wanted = presets::flow_schemas().into_iter().find(|schema| schema.name() == "probes").unwrap_or_default();
        let mut found = wanted.clone();
        assert_eq!(outdated(&found, &wanted), None);
        found["spec"]["matchingPrecedence"] = 3.into();
        assert_eq!(outdated(&found, &wanted), Some(wanted.clone()));
        found["metadata"]["annotations"][presets::AUTO_UPDATE] = "false".into();
        assert_eq!(outdated(&found, &wanted), None);
    }
}
