//! The garbage collector: objects whose owners are all gone go too; owners that are deleted in the foreground wait for
//! their dependents; orphaned dependents lose the reference. It works on every kind that the API server serves.
//!
//! The graph decides, this file acts. Every deletion carries the uid and the version that the decision was made on.

mod graph;
mod monitors;

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use apimachinery::controller::{ObjectKey, ReconcileError, Reconciler, Rest};
use async_trait::async_trait;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use serde_json::{Value, json};
use tokio::time::Instant;

use self::graph::{FOREGROUND, Node, ORPHAN, Owners, Uid, Verdict};
use self::monitors::Monitors;
use crate::app::Context;

/// How long to wait at start for kinds that cannot be watched, before working without them.
const START_WITHIN: Duration = Duration::from_secs(30);
const WAIT: Duration = Duration::from_millis(200);

struct GarbageCollector {
    rest: Rest,
    monitors: OnceLock<Arc<Monitors>>,
    started: Instant,
}

#[derive(Debug, thiserror::Error)]
enum CollectError {
    #[error("cannot look up the owner {kind} {name}")]
    LookUpOwner { kind: String, name: String, source: kube::Error },
    #[error("the owner's kind {kind} of {api_version} is not served")]
    UnknownKind { api_version: String, kind: String },
    #[error("cannot delete {kind} {name}")]
    Delete { kind: String, name: String, source: kube::Error },
    #[error("cannot remove a finalizer or owner from {kind} {name}")]
    Patch { kind: String, name: String, source: kube::Error },
}

pub fn start(context: &Context) {
    let driver = &context.driver;
    let collector =
        GarbageCollector { rest: driver.rest().clone(), monitors: OnceLock::new(), started: Instant::now() };
    driver.run_reconciler(collector, 20, |collector, wiring| {
        collector.monitors.get_or_init(|| {
            let client = driver.rest().client().clone();
            Monitors::start(client, driver.informers().clone(), wiring.queue().clone(), driver.shutdown().clone())
        });
    });
}

#[async_trait]
impl Reconciler for GarbageCollector {
    fn name(&self) -> &'static str {
        "garbage-collector"
    }

    async fn reconcile(&self, key: &ObjectKey) -> Result<Option<Duration>, ReconcileError> {
        let Some(monitors) = self.monitors.get() else { return Ok(Some(WAIT)) };
        if !monitors.is_complete() && self.started.elapsed() < START_WITHIN {
            return Ok(Some(WAIT));
        }
        let (node, verdict) = {
            let graph = monitors.graph.lock();
            let Some(node) = graph.get(&key.name).cloned() else { return Ok(None) };
            (node, graph.judge(&key.name))
        };
        match verdict {
            Verdict::Nothing => {}
            Verdict::Orphan { dependents } => self.orphan(monitors, key, &node, &dependents).await?,
            Verdict::Release => self.remove_finalizer(&node, &key.name, FOREGROUND).await?,
            Verdict::Owned(owners) => self.follow_owners(monitors, key, &node, owners).await?,
        }
        Ok(None)
    }
}

impl GarbageCollector {
    async fn follow_owners(
        &self,
        monitors: &Monitors,
        key: &ObjectKey,
        node: &Node,
        mut owners: Owners,
    ) -> Result<(), CollectError> {
        for owner in std::mem::take(&mut owners.unknown) {
            let list = if self.exists(monitors, node, &owner).await? { &mut owners.solid } else { &mut owners.gone };
            list.push(owner);
        }
        if !owners.solid.is_empty() {
            let superfluous: Vec<_> =
                owners.gone.iter().chain(&owners.waiting).map(|owner| owner.uid.as_str()).collect();
            return if superfluous.is_empty() {
                Ok(())
            } else {
                self.remove_owners(node, &key.name, &superfluous).await
            };
        }
        if !owners.waiting.is_empty() && owners.dependent_waits {
            self.unblock_owners(node, &key.name).await?;
        }
        let policy = if !owners.waiting.is_empty() && owners.has_dependents || node.foreground {
            "Foreground"
        } else if node.orphan {
            "Orphan"
        } else {
            "Background"
        };
        self.delete(node, &key.name, policy).await
    }

    /// Asks the server whether the very owner exists.
    async fn exists(&self, monitors: &Monitors, node: &Node, owner: &OwnerReference) -> Result<bool, CollectError> {
        let Some(resource) = monitors.resource(&owner.api_version, &owner.kind) else {
            monitors.look_for_new_kinds();
            let (api_version, kind) = (owner.api_version.clone(), owner.kind.clone());
            return Err(CollectError::UnknownKind { api_version, kind });
        };
        if resource.namespaced && node.namespace.is_empty() {
            // A reference that cannot be right says nothing about what the user wants: the object stays.
            return Ok(true);
        }
        let namespace = if resource.namespaced { node.namespace.as_str() } else { "" };
        match self.rest.get(&resource.id.path(namespace, &owner.name, "")).await {
            Ok(object) => Ok(object["metadata"]["uid"].as_str() == Some(&owner.uid)),
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(false),
            Err(source) => {
                Err(CollectError::LookUpOwner { kind: owner.kind.clone(), name: owner.name.clone(), source })
            }
        }
    }

    async fn delete(&self, node: &Node, uid: &str, policy: &str) -> Result<(), CollectError> {
        let options = json!({
            "kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": policy,
            "preconditions": {"uid": uid, "resourceVersion": node.version},
        });
        match self.rest.delete(&path(node), &options).await {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
            Err(source) => {
                Err(CollectError::Delete { kind: node.resource.kind.to_string(), name: node.name.clone(), source })
            }
        }
    }

    async fn orphan(
        &self,
        monitors: &Monitors,
        key: &ObjectKey,
        owner: &Node,
        dependents: &[Uid],
    ) -> Result<(), CollectError> {
        for uid in dependents {
            let dependent = monitors.graph.lock().get(uid).cloned();
            if let Some(dependent) = dependent {
                self.remove_owners(&dependent, uid, &[&key.name]).await?;
            }
        }
        self.remove_finalizer(owner, &key.name, ORPHAN).await
    }

    async fn remove_owners(&self, node: &Node, uid: &str, owners: &[&str]) -> Result<(), CollectError> {
        self.edit(node, uid, |meta| {
            retain(meta, "ownerReferences", |reference| !owners.iter().any(|owner| reference["uid"] == **owner))
        })
        .await
    }

    /// Breaks a circle of objects that wait for each other: the owners no longer wait for this one.
    async fn unblock_owners(&self, node: &Node, uid: &str) -> Result<(), CollectError> {
        self.edit(node, uid, |meta| {
            let mut references = meta["ownerReferences"].as_array()?.clone();
            let blocking = references.iter_mut().filter(|reference| reference["blockOwnerDeletion"] == true);
            let changed = blocking.map(|reference| reference["blockOwnerDeletion"] = false.into()).count();
            (changed > 0).then_some(("ownerReferences", Value::Array(references)))
        })
        .await
    }

    async fn remove_finalizer(&self, node: &Node, uid: &str, finalizer: &str) -> Result<(), CollectError> {
        self.edit(node, uid, |meta| retain(meta, "finalizers", |have| have != finalizer)).await
    }

    /// Changes one list of the object's metadata by a patch on its newest version; nothing when the object is another
    /// one by now.
    async fn edit(
        &self,
        node: &Node,
        uid: &str,
        change: impl Fn(&Value) -> Option<(&'static str, Value)>,
    ) -> Result<(), CollectError> {
        let path = path(node);
        let result: kube::Result<()> = async {
            let object = self.rest.get(&path).await?;
            let meta = &object["metadata"];
            let Some((field, list)) = change(meta).filter(|_| meta["uid"] == uid) else { return Ok(()) };
            let mut patch = json!({"metadata": {"uid": uid, "resourceVersion": meta["resourceVersion"]}});
            patch["metadata"][field] = list;
            self.rest.patch(&path, "application/merge-patch+json", &patch).await.map(drop)
        }
        .await;
        match result {
            Ok(()) => Ok(()),
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
            Err(source) => {
                Err(CollectError::Patch { kind: node.resource.kind.to_string(), name: node.name.clone(), source })
            }
        }
    }
}

fn path(node: &Node) -> String {
    node.resource.path(&node.namespace, &node.name, "")
}

/// The list without what is not to be kept; none when nothing would change.
fn retain(meta: &Value, field: &'static str, keep: impl Fn(&Value) -> bool) -> Option<(&'static str, Value)> {
    let list = meta[field].as_array()?;
    let kept: Vec<_> = list.iter().filter(|item| keep(item)).cloned().collect();
    (kept.len() < list.len()).then_some((field, Value::Array(kept)))
}
