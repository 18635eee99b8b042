//! Config maps, secrets and other objects that pods refer to, read when they are needed and never kept.

use k8s_openapi::api::certificates::v1::ClusterTrustBundle;
use k8s_openapi::api::core::v1::{ConfigMap, Node, PersistentVolume, PersistentVolumeClaim, Secret};
use k8s_openapi::api::node::v1::RuntimeClass;
use k8s_openapi::api::storage::v1::{CSIDriver, VolumeAttachment};
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use serde_json::Value;

/// Why an object could not be had; the texts are those that users see in events.
#[derive(Debug, thiserror::Error)]
pub enum ObjectError {
    #[error("{kind} \"{name}\" not found")]
    NotFound { kind: &'static str, name: String },
    #[error("failed to get {kind} \"{name}\": {}", api_error(.source))]
    Get { kind: &'static str, name: String, source: Box<kube::Error> },
}

impl ObjectError {
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::NotFound { .. })
    }

    /// Nodes may read only what belongs to them: for them an object that is not there yet is forbidden.
    pub fn is_forbidden(&self) -> bool {
        matches!(self, Self::Get { source, .. } if matches!(&**source, kube::Error::Api(status) if status.code == 403))
    }

    fn from(kind: &'static str, name: &str, error: kube::Error) -> Self {
        match error {
            kube::Error::Api(status) if status.code == 404 => Self::NotFound { kind, name: name.to_owned() },
            error => Self::Get { kind, name: name.to_owned(), source: Box::new(error) },
        }
    }
}

/// What the API server said, on one line; the library's own text repeats the whole answer.
pub fn api_error(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) if !status.message.is_empty() => status.message.clone(),
        other => apimachinery::process::error_chain(other),
    }
}

#[derive(Clone)]
pub struct Objects {
    client: Client,
}

impl Objects {
    pub fn new(client: Client) -> Self {
        Self { client }
    }

    pub fn client(&self) -> Client {
        self.client.clone()
    }

    pub async fn config_map(&self, namespace: &str, name: &str) -> Result<ConfigMap, ObjectError> {
        let api = Api::namespaced(self.client.clone(), namespace);
        api.get(name).await.map_err(|error| ObjectError::from("configmap", name, error))
    }

    pub async fn secret(&self, namespace: &str, name: &str) -> Result<Secret, ObjectError> {
        let api = Api::namespaced(self.client.clone(), namespace);
        api.get(name).await.map_err(|error| ObjectError::from("secret", name, error))
    }

    pub async fn claim(&self, namespace: &str, name: &str) -> Result<PersistentVolumeClaim, ObjectError> {
        let api = Api::namespaced(self.client.clone(), namespace);
        api.get(name).await.map_err(|error| ObjectError::from("persistentvolumeclaim", name, error))
    }

    pub async fn runtime_class(&self, name: &str) -> Result<RuntimeClass, ObjectError> {
        let api = Api::all(self.client.clone());
        api.get(name).await.map_err(|error| ObjectError::from("RuntimeClass", name, error))
    }

    pub async fn trust_bundle(&self, name: &str) -> Result<ClusterTrustBundle, ObjectError> {
        let api = Api::all(self.client.clone());
        api.get(name).await.map_err(|error| ObjectError::from("clustertrustbundle.certificates.k8s.io", name, error))
    }

    pub async fn node(&self, name: &str) -> Result<Node, ObjectError> {
        let api = Api::all(self.client.clone());
        api.get(name).await.map_err(|error| ObjectError::from("node", name, error))
    }

    /// `None` for a driver that the cluster knows nothing about, which is no error.
    pub async fn csi_driver(&self, name: &str) -> Result<Option<CSIDriver>, ObjectError> {
        let api = Api::all(self.client.clone());
        api.get_opt(name).await.map_err(|error| ObjectError::from("csidriver.storage.k8s.io", name, error))
    }

    pub async fn volume_attachment(&self, name: &str) -> Result<VolumeAttachment, ObjectError> {
        let api = Api::all(self.client.clone());
        api.get(name).await.map_err(|error| ObjectError::from("volumeattachment.storage.k8s.io", name, error))
    }

    /// Merges `patch` into the status of exactly this claim.
    pub async fn patch_claim_status(&self, claim: &PersistentVolumeClaim, patch: Value) -> Result<(), ObjectError> {
        let text = |text: &Option<String>| text.clone().unwrap_or_default();
        let (namespace, name) = (text(&claim.metadata.namespace), text(&claim.metadata.name));
        let api = Api::<PersistentVolumeClaim>::namespaced(self.client.clone(), &namespace);
        let sent = api.patch_status(&name, &PatchParams::default(), &Patch::Merge(patch)).await;
        sent.map(drop).map_err(|error| ObjectError::from("persistentvolumeclaim", &name, error))
    }

    pub async fn volume(&self, name: &str) -> Result<PersistentVolume, ObjectError> {
        let api = Api::all(self.client.clone());
        api.get(name).await.map_err(|error| ObjectError::from("persistentvolume", name, error))
    }
}
