//! Serves what `CustomResourceDefinition`s define: follows them, says in their status whether their names are taken
//! and whether they are served, keeps the registry in step, and clears away the objects of one that is deleted.

pub mod aggregation;
mod conversion;
mod custom_resource;
mod definition;
mod json_path;
pub mod rules;
pub mod validation;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use apimachinery::meta::GroupVersionResource;
use apimachinery::status::{Result, Status};
use serde_json::{Value, json};

use crate::auth::UserInfo;
use crate::cache::{Selection, Start, Stored, feed};
use crate::registry::layout;
use crate::registry::object::ObjectExt;
use crate::server::Server;
use crate::verbs::timestamp;
use definition::Definition;

const GROUP: &str = "apiextensions.k8s.io";
const RESOURCE: &str = "customresourcedefinitions";
/// Keeps a definition until its objects are gone.
pub const CLEANUP_FINALIZER: &str = "customresourcecleanup.apiextensions.k8s.io";
const RETRY: Duration = Duration::from_secs(1);

/// What is served on behalf of a definition.
struct Installed {
    group: String,
    resource: String,
    /// The definition's spec, to see changes.
    spec: Value,
}

/// Runs until shutdown.
pub async fn run(server: Arc<Server>) {
    let mut installed: HashMap<String, Installed> = HashMap::new();
    let Some(definitions) = server.caches.get(GROUP, RESOURCE) else {
        return tracing::info!("custom resource definitions are not served");
    };
    server.caches.wait_for(1).await;
    while !server.shutdown.is_cancelled() {
        let (mut watch, snapshot) = match definitions.watch(Selection::default(), Start::Snapshot) {
            Ok(started) => started,
            Err(error) => {
                tracing::debug!(%error, "cannot watch custom resource definitions yet");
                tokio::time::sleep(RETRY).await;
                continue;
            }
        };
        let present = snapshot.unwrap_or_default();
        let gone: Vec<String> = installed
            .keys()
            .filter(|name| !present.values().any(|object| object.name() == name.as_str()))
            .cloned()
            .collect();
        gone.iter().for_each(|name| uninstall(&server, &mut installed, name));
        let mut failed = Vec::new();
        for object in present.values() {
            failed.extend(sync(&server, &mut installed, object).await.err().map(|_| object.name().to_owned()));
        }
        loop {
            let event = tokio::select! {
                () = server.shutdown.cancelled() => return,
                () = tokio::time::sleep(RETRY), if !failed.is_empty() => {
                    let mut still = Vec::new();
                    for name in std::mem::take(&mut failed) {
                        if let Some(object) = definitions.get("", &name) {
                            still.extend(sync(&server, &mut installed, &object).await.err().map(|_| name));
                        }
                    }
                    failed = still;
                    continue;
                }
                event = watch.next() => match event {
                    Some(event) => event,
                    None => break,
                },
            };
            if event.deleted {
                uninstall(&server, &mut installed, event.object.name());
            } else if sync(&server, &mut installed, &event.object).await.is_err() {
                failed.push(event.object.name().to_owned());
            }
        }
    }
}

/// Makes what is served agree with a definition.
async fn sync(server: &Arc<Server>, installed: &mut HashMap<String, Installed>, object: &Stored) -> Result<()> {
    let definition = object.value();
    let result = if definition.is_being_deleted() {
        clean_up(server, installed, &definition).await
    } else {
        establish(server, installed, &definition).await
    };
    if let Err(error) = &result
        && error.code != 404
        && error.code != 409
    {
        tracing::warn!(name = object.name(), %error, "cannot serve a custom resource definition");
    }
    result
}

async fn establish(server: &Arc<Server>, installed: &mut HashMap<String, Installed>, object: &Value) -> Result<()> {
    let conflict = name_conflict(server, object);
    let accepted = conflict.is_none();
    let names = if accepted { object["spec"]["names"].clone() } else { object["status"]["acceptedNames"].clone() };
    let accepted_condition = match conflict {
        None => condition("NamesAccepted", "True", "NoConflicts", "no conflicts found"),
        Some((reason, message)) => condition("NamesAccepted", "False", reason, &message),
    };
    if accepted || has_condition(object, "Established") {
        install(server, installed, object).await?;
    }
    let established = match accepted {
        true => condition("Established", "True", "InitialNamesAccepted", "the initial names have been accepted"),
        false => condition("Established", "False", "NotAccepted", "not all names are accepted"),
    };
    let was_established = has_condition(object, "Established");
    update_status(server, object.name(), |definition| {
        definition.set(&["status", "acceptedNames"], names.clone());
        set_condition(definition, accepted_condition.clone());
        if accepted || !was_established {
            set_condition(definition, established.clone());
        }
    })
    .await
}

/// Puts the resource into the registry, with a filled cache.
async fn install(server: &Arc<Server>, installed: &mut HashMap<String, Installed>, object: &Value) -> Result<()> {
    let name = object.name();
    if installed.get(name).is_some_and(|known| known.spec == object["spec"]) {
        return Ok(());
    }
    let definition = Definition::read(object, &server.caches)
        .map_err(|error| Status::internal(apimachinery::process::error_chain(&error)))?;
    let (group, resource) =
        (definition.group_resource.group.to_string(), definition.group_resource.resource.to_string());
    let old = server.caches.get(&group, &resource);
    let cache = match &old {
        Some(old) if **old.kind() == definition.kind => old.clone(),
        Some(old) => server.caches.replace(&group, &resource, old, definition.kind.clone()),
        None => {
            let prefix = format!("{}/{}/", server.config.etcd_prefix, layout::custom_prefix(&group, &resource));
            server.caches.add(&group, &resource, &prefix, definition.kind.clone())
        }
    };
    if !cache.is_ready() {
        feed::fill_new(&server.store, &cache)
            .await
            .map_err(|error| Status::internal(apimachinery::process::error_chain(&error)))?;
    }
    server.registry.insert(definition.resource(cache.clone()));
    // Their clients come back to the new cache.
    old.iter().filter(|old| !Arc::ptr_eq(old, &cache)).for_each(|old| old.end_watches());
    installed.insert(name.to_owned(), Installed { group, resource, spec: object["spec"].clone() });
    tracing::info!(name, "custom resource is served");
    Ok(())
}

fn uninstall(server: &Server, installed: &mut HashMap<String, Installed>, name: &str) {
    if let Some(gone) = installed.remove(name) {
        server.registry.remove(&gone.group, &gone.resource);
        server.caches.remove(&gone.group, &gone.resource);
        tracing::info!(name, "custom resource is served no more");
    }
}

/// Deletes the objects of a definition that is being deleted, then lets it go.
async fn clean_up(server: &Arc<Server>, installed: &mut HashMap<String, Installed>, object: &Value) -> Result<()> {
    let name = object.name();
    if !object.finalizers().contains(&CLEANUP_FINALIZER) {
        return Ok(());
    }
    install(server, installed, object).await?;
    update_status(server, name, |definition| {
        let doing = "CustomResource deletion is in progress";
        set_condition(definition, condition("Terminating", "True", "InstanceDeletionInProgress", doing));
    })
    .await?;
    let user = UserInfo::server();
    let Some(resource) =
        server.registry.get(object.str_at(&["spec", "group"]), object.str_at(&["spec", "names", "plural"]))
    else {
        return Err(Status::internal(format!("{name} is not served")));
    };
    let gvr = GroupVersionResource::new(
        resource.group_resource.group.clone(),
        resource.storage.version.clone(),
        resource.group_resource.resource.clone(),
    );
    for instance in resource.cache.list(None) {
        match server.delete(&user, &gvr, instance.namespace(), instance.name()).await {
            Err(error) if error.code != 404 => return Err(error),
            _ => {}
        }
    }
    server.freshness.reach_present(&server.caches).await.map_err(Status::internal)?;
    if !resource.cache.is_empty() {
        // Finalizers of the objects are still at work.
        return Err(Status::conflict(&resource.group_resource, name, "objects are still being deleted"));
    }
    update_status(server, name, |definition| {
        set_condition(
            definition,
            condition("Terminating", "False", "InstanceDeletionCompleted", "removed all instances"),
        );
    })
    .await?;
    let definitions = GroupVersionResource::new(GROUP, "v1", RESOURCE);
    let freed = server.guaranteed_update(&user, &definitions, "", name, "", |mut definition| {
        let rest = definition.finalizers().into_iter().filter(|f| *f != CLEANUP_FINALIZER);
        let rest: Vec<String> = rest.map(str::to_owned).collect();
        definition.set(&["metadata", "finalizers"], rest);
        Ok(definition)
    });
    freed.await.map(drop)
}

async fn update_status(server: &Arc<Server>, name: &str, change: impl Fn(&mut Value) + Send + Sync) -> Result<()> {
    let definitions = GroupVersionResource::new(GROUP, "v1", RESOURCE);
    let user = UserInfo::server();
    let updated = server.guaranteed_update(&user, &definitions, "", name, "status", |mut definition| {
        change(&mut definition);
        Ok(definition)
    });
    updated.await.map(drop)
}

/// Why the names of a definition cannot be had: another definition of the group has them.
fn name_conflict(server: &Server, object: &Value) -> Option<(&'static str, String)> {
    let (group, names) = (object.str_at(&["spec", "group"]), &object["spec"]["names"]);
    let others = server.caches.get(GROUP, RESOURCE)?.list(None);
    let others: Vec<Value> = others
        .iter()
        .filter(|other| other.name() != object.name())
        .map(|other| other.value())
        .filter(|other| other.str_at(&["spec", "group"]) == group && has_condition(other, "Established"))
        .collect();
    let taken = |field: &str, name: &str| {
        others.iter().any(|other| !name.is_empty() && other["status"]["acceptedNames"][field] == name)
    };
    let fields = [
        ("plural", "PluralConflict"),
        ("singular", "SingularConflict"),
        ("kind", "KindConflict"),
        ("listKind", "ListKindConflict"),
    ];
    fields.into_iter().find_map(|(field, reason)| {
        let name = names.str_at(&[field]);
        taken(field, name).then(|| (reason, format!("{name:?} is already in use")))
    })
}

fn condition(kind: &str, status: &str, reason: &str, message: &str) -> Value {
    json!({"type": kind, "status": status, "reason": reason, "message": message})
}

fn has_condition(object: &Value, kind: &str) -> bool {
    object.list_at(&["status", "conditions"]).iter().any(|c| c["type"] == kind && c["status"] == "True")
}

/// What a definition says of itself between the request to delete it and the deletion of its objects.
pub fn deletion_pending() -> Value {
    condition(
        "Terminating",
        "True",
        "InstanceDeletionPending",
        "CustomResourceDefinition marked for deletion; CustomResource deletion will begin soon",
    )
}

/// Replaces the condition of this type; its time only moves when its status does.
pub fn set_condition(object: &mut Value, mut condition: Value) {
    let mut conditions = object.list_at(&["status", "conditions"]).to_vec();
    let same = conditions.iter().position(|c| c["type"] == condition["type"]);
    let since = same.filter(|at| conditions[*at]["status"] == condition["status"]);
    condition["lastTransitionTime"] = match since {
        Some(at) => conditions[at]["lastTransitionTime"].clone(),
        None => timestamp(jiff::Timestamp::now()).into(),
    };
    match same {
        Some(at) => conditions[at] = condition,
        None => conditions.push(condition),
    }
    object.set(&["status", "conditions"], conditions);
}
