//! Claims and volumes: the default storage class, the finalizers that keep storage alive while it is used, and growth
//! only where the class allows it.

use std::sync::Arc;

use apimachinery::meta::Quantity;
use apimachinery::status::Result;
use async_trait::async_trait;
use serde_json::Value;

use super::{AdmissionRequest, Operation, Plugin, cached, cached_list};
use crate::registry::object::ObjectExt;
use crate::server::Server;

const IS_DEFAULT: [&str; 2] =
    ["storageclass.kubernetes.io/is-default-class", "storageclass.beta.kubernetes.io/is-default-class"];
const CLASS_ANNOTATION: &str = "volume.beta.kubernetes.io/storage-class";

/// Claims without a class get the default one.
pub struct DefaultStorageClass;

#[async_trait]
impl Plugin for DefaultStorageClass {
    fn name(&self) -> &'static str {
        "DefaultStorageClass"
    }

    fn handles(&self, operation: Operation) -> bool {
        operation == Operation::Create
    }

    async fn admit(&self, server: &Arc<Server>, request: &mut AdmissionRequest<'_>) -> Result<()> {
        let claim = &*request.object;
        let has_class = claim.at(&["spec", "storageClassName"]).is_some_and(|class| !class.is_null());
        if !request.creates("", "persistentvolumeclaims") || has_class || claim.annotation(CLASS_ANNOTATION).is_some() {
            return Ok(());
        }
        if let Some(class) = default_class(cached_list(server, "storage.k8s.io", "storageclasses", None)) {
            request.object.set(&["spec", "storageClassName"], class);
        }
        Ok(())
    }
}

/// Of several defaults the newest counts, then the first by name.
fn default_class(classes: Vec<Value>) -> Option<String> {
    let is_default = |class: &Value| IS_DEFAULT.iter().any(|annotation| class.annotation(annotation) == Some("true"));
    let mut defaults: Vec<Value> = classes.into_iter().filter(is_default).collect();
    let created = |class: &Value| class.str_at(&["metadata", "creationTimestamp"]).to_owned();
    defaults.sort_by(|a, b| created(b).cmp(&created(a)).then_with(|| a.name().cmp(b.name())));
    defaults.first().map(|class| class.name().to_owned())
}

/// Claims and volumes are not removed while something uses them.
pub struct StorageObjectInUseProtection;

#[async_trait]
impl Plugin for StorageObjectInUseProtection {
    fn name(&self) -> &'static str {
        "StorageObjectInUseProtection"
    }

    fn handles(&self, operation: Operation) -> bool {
        operation == Operation::Create
    }

    async fn admit(&self, _server: &Arc<Server>, request: &mut AdmissionRequest<'_>) -> Result<()> {
        let finalizer = match &*request.gvr.resource {
            "persistentvolumes" if request.creates("", "persistentvolumes") => "kubernetes.io/pv-protection",
            "persistentvolumeclaims" if request.creates("", "persistentvolumeclaims") => "kubernetes.io/pvc-protection",
            "volumeattributesclasses" if request.creates("storage.k8s.io", "volumeattributesclasses") => {
                "kubernetes.io/vac-protection"
            }
            _ => return Ok(()),
        };
        let mut finalizers = request.object.list_at(&["metadata", "finalizers"]).to_vec();
        if !finalizers.iter().any(|known| known == finalizer) {
            finalizers.push(finalizer.into());
            request.object.set(&["metadata", "finalizers"], finalizers);
        }
        Ok(())
    }
}

/// A bound claim may grow when its class says so.
pub struct PersistentVolumeClaimResize;

#[async_trait]
impl Plugin for PersistentVolumeClaimResize {
    fn name(&self) -> &'static str {
        "PersistentVolumeClaimResize"
    }

    fn handles(&self, operation: Operation) -> bool {
        operation == Operation::Update
    }

    async fn validate(&self, server: &Arc<Server>, request: &AdmissionRequest<'_>) -> Result<()> {
        let (true, Some(old)) = (request.is("", "persistentvolumeclaims"), request.old) else { return Ok(()) };
        let size = |claim: &Value| claim.str_at(&["spec", "resources", "requests", "storage"]).parse::<Quantity>().ok();
        let (Some(new_size), Some(old_size)) = (size(request.object), size(old)) else { return Ok(()) };
        if new_size <= old_size {
            return Ok(());
        }
        if old.str_at(&["status", "phase"]) != "Bound" {
            return Err(request.forbidden("Only bound persistent volume claims can be expanded"));
        }
        let annotated = old.annotation(CLASS_ANNOTATION);
        let class = annotated.unwrap_or_else(|| old.str_at(&["spec", "storageClassName"]));
        let class = cached(server, "storage.k8s.io", "storageclasses", "", class);
        if class.is_some_and(|class| class.bool_at(&["allowVolumeExpansion"]) == Some(true)) {
            return Ok(());
        }
        Err(request.forbidden(
            "only dynamically provisioned pvc can be resized and the storageclass that provisions the pvc must support resize",
        ))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_newest_default_class_counts() {
        let class = |name: &str, at: &str, default: &str| json!({"metadata": {"name": name, "creationTimestamp": at, "annotations": {IS_DEFAULT[0]: default}}});
        let classes = vec![class("a", "2020-01-01T00:00:00Z", "true"), class("b", "2021-01-01T00:00:00Z", "true")];
        assert_eq!(default_class(classes).as_deref(), Some("b"));
        assert_eq!(default_class(vec![class("a", "2020-01-01T00:00:00Z", "false")]), None);
    }
}
