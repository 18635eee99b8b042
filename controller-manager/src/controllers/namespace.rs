//! Empties and finishes namespaces that are being deleted: everything in them goes, pods first, then the `kubernetes`
//! finalizer is taken off. What stands in the way is told in the namespace's conditions.
//!
//! It works on discovered kinds, so it talks to the API server itself.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use apimachinery::controller::{Executor, Informer, ObjectKey, Plan, ReconcileError, Reconciler, Rest, Write};
use async_trait::async_trait;
use futures::stream::{self, StreamExt, TryStreamExt};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Namespace, NamespaceCondition, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use serde_json::{Value, json};

use crate::app::Context;
use crate::common::{is_deleted, namespace};
use crate::discovery::{Discovered, ServedResource, discover};

const FINALIZER: &str = "kubernetes";
/// When to look again at content that is slow to go and tells nobody about it.
const RECHECK: Duration = Duration::from_secs(3);
/// Requests in flight for one namespace.
const PARALLEL: usize = 4;

struct NamespaceController {
    rest: Rest,
    executor: Executor,
    namespaces: Arc<Informer<Namespace>>,
}

pub fn start(context: &Context) {
    let driver = &context.driver;
    let pods = driver.informers().of::<Pod>();
    let controller = NamespaceController {
        rest: driver.rest().clone(),
        executor: driver.executor("namespace-controller"),
        namespaces: driver.informers().of(),
    };
    driver.run_reconciler(controller, 4, |controller, wiring| {
        wiring.primary(&controller.namespaces);
        let namespaces = controller.namespaces.clone();
        wiring.map(&pods, move |change| {
            let (Some(gone), None) = (&change.old, &change.new) else { return Vec::new() };
            let key = ObjectKey::cluster(namespace(&gone.metadata));
            let waits = namespaces.get(&key).is_some_and(|namespace| is_deleted(&namespace.metadata));
            if waits { vec![key] } else { Vec::new() }
        });
    });
}

/// What is left of one kind.
struct Remaining {
    resource: String,
    count: usize,
    /// Finalizers by name, with the number of objects that have them.
    finalizers: BTreeMap<String, usize>,
}

/// What one pass over the namespace's content found.
#[derive(Default)]
struct Pass {
    remaining: Vec<Remaining>,
    errors: Vec<String>,
    stale: Vec<String>,
}

#[async_trait]
impl Reconciler for NamespaceController {
    fn name(&self) -> &'static str {
        "namespace"
    }

    async fn reconcile(&self, key: &ObjectKey) -> Result<Option<Duration>, ReconcileError> {
        let Some(namespace) = self.namespaces.get(key) else { return Ok(None) };
        let finalizers = namespace.spec.iter().flat_map(|spec| spec.finalizers.iter().flatten());
        if !is_deleted(&namespace.metadata) || !finalizers.into_iter().any(|f| f == FINALIZER) {
            return Ok(None);
        }
        let pass = self.empty(&key.name).await?;
        if let Some(write) = Write::status(namespace.as_ref(), &with_conditions(&namespace, &pass, Timestamp::now())) {
            self.executor.run(Plan::write(write)).await?;
        }
        if !pass.errors.is_empty() {
            return Err(pass.errors.join("; ").into());
        }
        if pass.remaining.is_empty() && pass.stale.is_empty() {
            self.finish(&key.name).await?;
            return Ok(None);
        }
        Ok(Some(RECHECK))
    }
}

impl NamespaceController {
    /// Deletes what there is and says what is left. Pods go before everything else, so that their programs find what
    /// they need until the end.
    async fn empty(&self, namespace: &str) -> kube::Result<Pass> {
        let Discovered { resources, stale } = discover(self.rest.client()).await?;
        let mut pass = Pass { stale, ..Pass::default() };
        let deletable = resources.into_iter().filter(|r| r.namespaced && r.can("delete") && r.can("list"));
        let (pods, others): (Vec<_>, Vec<_>) =
            deletable.partition(|resource| resource.id.group.is_empty() && resource.id.plural == "pods");
        for resources in [pods, others] {
            let found: Vec<_> = stream::iter(resources)
                .map(|resource| async move { self.empty_kind(namespace, &resource).await })
                .buffer_unordered(PARALLEL)
                .collect()
                .await;
            for result in found {
                match result {
                    Ok(remaining) => pass.remaining.extend(remaining),
                    Err(error) => pass.errors.push(error),
                }
            }
            if !pass.remaining.is_empty() || !pass.errors.is_empty() {
                break;
            }
        }
        pass.remaining.sort_by(|a, b| a.resource.cmp(&b.resource));
        Ok(pass)
    }

    async fn empty_kind(&self, namespace: &str, resource: &ServedResource) -> Result<Option<Remaining>, String> {
        let path = resource.id.path(namespace, "", "");
        let failed = |error: kube::Error| format!("{path}: {}", apimachinery::process::error_chain(&error));
        let items = self.list(&path).await.map_err(failed)?;
        if items.is_empty() {
            return Ok(None);
        }
        let options = json!({"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": "Background"});
        if resource.can("deletecollection") {
            self.rest.delete(&path, &options).await.or_else(ignore_missing).map_err(failed)?;
        } else {
            stream::iter(&items)
                .map(Ok)
                .try_for_each_concurrent(PARALLEL, |item| {
                    let path = format!("{path}/{}", item["metadata"]["name"].as_str().unwrap_or(""));
                    let options = &options;
                    async move { self.rest.delete(&path, options).await.or_else(ignore_missing).map(drop) }
                })
                .await
                .map_err(failed)?;
        }
        Ok(remaining(resource, &self.list(&path).await.map_err(failed)?))
    }

    /// The metadata of all objects at the path; none when the kind is gone or cannot be listed.
    async fn list(&self, path: &str) -> kube::Result<Vec<Value>> {
        let mut list = match self.rest.get_metadata(path).await {
            Err(kube::Error::Api(status)) if status.code == 404 || status.code == 405 => return Ok(Vec::new()),
            other => other?,
        };
        Ok(match list["items"].take() {
            Value::Array(items) => items,
            _ => Vec::new(),
        })
    }

    async fn finish(&self, name: &str) -> kube::Result<()> {
        let path = format!("/api/v1/namespaces/{name}");
        let result = async {
            let mut namespace = self.rest.get(&path).await?;
            if let Some(finalizers) = namespace["spec"]["finalizers"].as_array_mut() {
                finalizers.retain(|finalizer| finalizer != FINALIZER);
            }
            self.rest.replace(&format!("{path}/finalize"), &namespace).await
        };
        result.await.or_else(ignore_missing).map(drop)
    }
}

fn ignore_missing(error: kube::Error) -> kube::Result<Value> {
    match error {
        kube::Error::Api(status) if status.code == 404 || status.code == 405 => Ok(Value::Null),
        other => Err(other),
    }
}

fn remaining(resource: &ServedResource, items: &[Value]) -> Option<Remaining> {
    if items.is_empty() {
        return None;
    }
    let mut finalizers = BTreeMap::new();
    for finalizer in items.iter().flat_map(|item| item["metadata"]["finalizers"].as_array().into_iter().flatten()) {
        *finalizers.entry(finalizer.as_str().unwrap_or("").to_owned()).or_default() += 1;
    }
    let resource = format!("{}.{}", resource.id.plural, resource.id.group);
    Some(Remaining { resource, count: items.len(), finalizers })
}

/// The namespace with conditions that tell what the pass found.
fn with_conditions(namespace: &Namespace, pass: &Pass, now: Timestamp) -> Namespace {
    let counts: Vec<_> =
        pass.remaining.iter().map(|left| format!("{} has {} resource instances", left.resource, left.count)).collect();
    let mut by_finalizer = BTreeMap::<&str, usize>::new();
    for (name, count) in pass.remaining.iter().flat_map(|left| &left.finalizers) {
        *by_finalizer.entry(name).or_default() += count;
    }
    let held: Vec<_> = by_finalizer.iter().map(|(name, n)| format!("{name} in {n} resource instances")).collect();
    let conditions = [
        condition(
            "NamespaceDeletionDiscoveryFailure",
            (!pass.stale.is_empty())
                .then(|| ("DiscoveryFailed", format!("Discovery failed for some groups: {}", pass.stale.join(", ")))),
            ("ResourcesDiscovered", "All resources successfully discovered"),
        ),
        condition(
            "NamespaceDeletionGroupVersionParsingFailure",
            None,
            ("ParsedGroupVersions", "All legacy kube types successfully parsed"),
        ),
        condition(
            "NamespaceDeletionContentFailure",
            (!pass.errors.is_empty()).then(|| {
                (
                    "ContentDeletionFailed",
                    format!(
                        "Failed to delete all resource types, {} remaining: {}",
                        pass.errors.len(),
                        pass.errors.join(", ")
                    ),
                )
            }),
            ("ContentDeleted", "All content successfully deleted, may be waiting on finalization"),
        ),
        condition(
            "NamespaceContentRemaining",
            (!counts.is_empty())
                .then(|| ("SomeResourcesRemain", format!("Some resources are remaining: {}", counts.join(", ")))),
            ("ContentRemoved", "All content successfully removed"),
        ),
        condition(
            "NamespaceFinalizersRemaining",
            (!held.is_empty()).then(|| {
                (
                    "SomeFinalizersRemain",
                    format!("Some content in the namespace has finalizers remaining: {}", held.join(", ")),
                )
            }),
            ("ContentHasNoFinalizers", "All content-preserving finalizers finished"),
        ),
    ];
    let mut updated = namespace.clone();
    let status = updated.status.get_or_insert_default();
    let list = status.conditions.get_or_insert_default();
    for mut condition in conditions {
        match list.iter_mut().find(|have| have.type_ == condition.type_) {
            Some(have) if have.status == condition.status && have.message == condition.message => {}
            Some(have) => {
                condition.last_transition_time =
                    if have.status == condition.status { have.last_transition_time.clone() } else { Some(Time(now)) };
                *have = condition;
            }
            None => {
                condition.last_transition_time = Some(Time(now));
                list.push(condition);
            }
        }
    }
    updated
}

fn condition(type_: &str, problem: Option<(&str, String)>, fine: (&str, &str)) -> NamespaceCondition {
    let status = if problem.is_some() { "True" } else { "False" };
    let (reason, message) = problem.unwrap_or_else(|| (fine.0, fine.1.to_owned()));
    NamespaceCondition {
        type_: type_.to_owned(),
        status: status.to_owned(),
        reason: Some(reason.to_owned()),
        message: Some(message),
        last_transition_time: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conditions_tell_what_remains() {
        let namespace: Namespace = serde_json::from_value(json!({"metadata": {"name": "a"}})).unwrap();
        let pass = Pass {
            remaining: vec![Remaining {
                resource: "pods.".to_owned(),
                count: 2,
                finalizers: BTreeMap::from([("x/y".to_owned(), 1)]),
            }],
            ..Pass::default()
        };
        let updated = with_conditions(&namespace, &pass, Timestamp::UNIX_EPOCH);
        let told: Vec<_> = updated
            .status
            .as_ref()
            .unwrap()
            .conditions
            .as_ref()
            .unwrap()
            .iter()
            .map(|c| (c.type_.as_str(), c.status.as_str(), c.message.as_deref().unwrap()))
            .collect();
        assert!(told.contains(&(
            "NamespaceContentRemaining",
            "True",
            "Some resources are remaining: pods. has 2 resource instances"
        )));
        assert!(told.contains(&(
            "NamespaceFinalizersRemaining",
            "True",
            "Some content in the namespace has finalizers remaining: x/y in 1 resource instances"
        )));
        assert!(told.contains(&(
            "NamespaceDeletionContentFailure",
            "False",
            "All content successfully deleted, may be waiting on finalization"
        )));
        assert!(
            Write::status(&updated, &with_conditions(&updated, &pass, Timestamp::MAX)).is_none(),
            "the same again changes nothing"
        );
    }
}
