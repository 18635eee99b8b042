//! What pod workers ask of the API server.

use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, Patch, PatchParams, Preconditions};
use kube::{Api, Client};
use serde_json::Value;

/// Sends a status patch and returns the object as it is then.
pub async fn report(client: Client, object: &Pod, patch: Value) -> Result<Pod, kube::Error> {
    let api = Api::<Pod>::namespaced(client, object.metadata.namespace.as_deref().unwrap_or_default());
    let name = object.metadata.name.as_deref().unwrap_or_default();
    api.patch_status(name, &PatchParams::default(), &Patch::Strategic(patch)).await
}

/// The resource version as a number, for comparing two versions of one object.
pub fn version_number(pod: &Pod) -> u64 {
    pod.metadata.resource_version.as_deref().and_then(|version| version.parse().ok()).unwrap_or(0)
}

/// `namespace/name`, for logs.
pub fn name_of(pod: &Pod) -> String {
    let text = |text: &Option<String>| text.clone().unwrap_or_default();
    format!("{}/{}", text(&pod.metadata.namespace), text(&pod.metadata.name))
}

/// Deletes exactly this object, now; it being gone already is what was wanted.
pub async fn delete(client: Client, object: Option<&Pod>) -> Result<(), kube::Error> {
    let Some(object) = object else { return Ok(()) };
    let namespace = object.metadata.namespace.as_deref().unwrap_or_default();
    let api = Api::<Pod>::namespaced(client, namespace);
    let preconditions = Preconditions { uid: object.metadata.uid.clone(), resource_version: None };
    let params =
        DeleteParams { grace_period_seconds: Some(0), preconditions: Some(preconditions), ..DeleteParams::default() };
    match api.delete(object.metadata.name.as_deref().unwrap_or_default(), &params).await {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(answer)) if answer.code == 404 || answer.code == 409 => Ok(()),
        Err(error) => Err(error),
    }
}
