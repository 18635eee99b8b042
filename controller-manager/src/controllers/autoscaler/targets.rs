//! What autoscalers scale: kinds of objects, found by discovery, and their scale subresource.

use std::sync::Arc;
use std::time::{Duration, Instant};

use apimachinery::controller::{ResourceId, Rest};
use apimachinery::process::error_chain;
use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet, StatefulSet};
use k8s_openapi::api::core::v1::ReplicationController;
use parking_lot::Mutex;
use serde_json::{Value, json};

use super::decide::Replicas;
use crate::discovery::{ServedResource, discover};

/// Upstream looks for new kinds as often.
const REMEMBERED: Duration = Duration::from_secs(30);
/// Attempts to write a scale that others change at the same time.
const TRIES: usize = 5;
const PAUSE: Duration = Duration::from_millis(10);

pub struct Targets {
    rest: Rest,
    discovered: Mutex<Option<(Instant, Arc<Vec<ServedResource>>)>>,
}

/// The scale of one object.
pub struct Scale {
    path: String,
    what: String,
    body: Value,
}

impl Targets {
    pub fn new(rest: Rest) -> Self {
        Self { rest, discovered: Mutex::default() }
    }

    /// Where objects of the kind are served, in the preferred version.
    pub async fn find(&self, group: &str, kind: &str) -> Result<ResourceId, String> {
        let usual = [
            ResourceId::of::<Deployment>(),
            ResourceId::of::<StatefulSet>(),
            ResourceId::of::<ReplicaSet>(),
            ResourceId::of::<ReplicationController>(),
        ];
        if let Some(id) = usual.into_iter().find(|id| id.group == group && id.kind == kind) {
            return Ok(id);
        }
        let resources = self.discovered().await?;
        let found = resources.iter().find(|resource| resource.id.group == group && resource.id.kind == kind);
        found
            .map(|resource| resource.id.clone())
            .ok_or_else(|| format!("no matches for kind \"{kind}\" in group \"{group}\""))
    }

    async fn discovered(&self) -> Result<Arc<Vec<ServedResource>>, String> {
        let known = self.discovered.lock().clone();
        if let Some((_, resources)) = known.filter(|(since, _)| since.elapsed() < REMEMBERED) {
            return Ok(resources);
        }
        let found = discover(self.rest.client()).await.map_err(|error| explain(&error, "the API's resources"))?;
        let resources = Arc::new(found.resources);
        *self.discovered.lock() = Some((Instant::now(), resources.clone()));
        Ok(resources)
    }

    /// Reads the scale of the object that a reference names.
    pub async fn scale(&self, namespace: &str, api_version: &str, kind: &str, name: &str) -> Result<Scale, String> {
        let group = match api_version.split('/').collect::<Vec<_>>().as_slice() {
            [_] => "",
            [group, _] => group,
            _ => return Err(format!("unexpected GroupVersion string: {api_version}")),
        };
        let id = self.find(group, kind).await?;
        let what = if group.is_empty() { id.plural.to_string() } else { format!("{}.{group}", id.plural) };
        let path = id.path(namespace, name, "scale");
        let body = self.rest.get(&path).await.map_err(|error| explain(&error, &what))?;
        Ok(Scale { path, what, body })
    }

    /// Sets the number of replicas, on whatever the scale has become meanwhile.
    pub async fn set(&self, mut scale: Scale, replicas: i32) -> Result<(), String> {
        let mut tries = 0;
        loop {
            tries += 1;
            scale.body["spec"]["replicas"] = json!(replicas);
            match self.rest.replace(&scale.path, &scale.body).await {
                Ok(_) => return Ok(()),
                Err(kube::Error::Api(status)) if status.code == 409 && tries < TRIES => {
                    tokio::time::sleep(PAUSE).await;
                    scale.body = self.rest.get(&scale.path).await.map_err(|error| explain(&error, &scale.what))?;
                }
                Err(error) => return Err(explain(&error, &scale.what)),
            }
        }
    }
}

impl Scale {
    pub fn replicas(&self) -> Replicas {
        let number = |value: &Value| value.as_i64().and_then(|number| i32::try_from(number).ok()).unwrap_or(0);
        Replicas { wanted: number(&self.body["spec"]["replicas"]), there: number(&self.body["status"]["replicas"]) }
    }

    pub fn selector(&self) -> &str {
        self.body["status"]["selector"].as_str().unwrap_or("")
    }
}

/// The server's words; for answers that have none, such as those of a missing API, what upstream's clients say.
pub fn explain(error: &kube::Error, what: &str) -> String {
    match error {
        kube::Error::Api(status) if status.details.is_none() && status.code == 404 => {
            format!("the server could not find the requested resource (get {what})")
        }
        kube::Error::Api(status) if status.details.is_none() && status.code == 503 => {
            format!("the server is currently unable to handle the request (get {what})")
        }
        kube::Error::Api(status) => status.message.clone(),
        other => error_chain(other),
    }
}
