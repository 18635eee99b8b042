//! Create-if-missing and change-if-different on top of the server's internal client. The caches answer the first look,
//! so that a start on a finished cluster writes nothing.

use std::sync::Arc;

use apimachinery::meta::{GroupVersion, GroupVersionResource};
use apimachinery::status::{Result, Status};
use serde_json::Value;

use crate::auth::UserInfo;
use crate::registry::object::ObjectExt;
use crate::server::Server;

/// The resource of an object as bootstrap writes it.
fn resource_of(object: &Value, resource: &'static str) -> Result<GroupVersionResource> {
    let version = GroupVersion::parse(object.api_version());
    let version = version.ok_or_else(|| Status::internal(format!("{resource} without an apiVersion")))?;
    Ok(GroupVersionResource::new(version.group, version.version, resource))
}

/// The object as the caches know it.
pub fn cached(server: &Server, group: &str, resource: &str, namespace: &str, name: &str) -> Option<Value> {
    server.caches.get(group, resource)?.get(namespace, name).map(|stored| stored.value())
}

/// Creates the object if it does not exist; who loses a race against another server has what it wanted.
pub async fn present(server: &Arc<Server>, resource: &'static str, object: Value) -> Result<()> {
    merged(server, resource, object, |_| None).await
}

/// Creates the object, or replaces it by what `change` makes of the existing one; `None` leaves it as it is. The
/// change is made again on the newest state when somebody else was faster.
pub async fn merged(
    server: &Arc<Server>,
    resource: &'static str,
    object: Value,
    change: impl Fn(&Value) -> Option<Value>,
) -> Result<()> {
    let gvr = resource_of(&object, resource)?;
    let (namespace, name) = (object.namespace().to_owned(), object.name().to_owned());
    let user = UserInfo::server();
    let mut existing = cached(server, &gvr.group, resource, &namespace, &name);
    for _ in 0..5 {
        let outcome = match &existing {
            None => server.create(&user, &gvr, &namespace, object.clone()).await.map(|_| ()),
            Some(found) => match change(found) {
                Some(changed) => server.update(&user, &gvr, &namespace, changed).await.map(|_| ()),
                None => return Ok(()),
            },
        };
        match outcome {
            Err(error) if matches!(error.reason.as_str(), "AlreadyExists" | "Conflict" | "NotFound") => {
                existing = match server.get(&gvr, &namespace, &name).await {
                    Ok(found) => Some(found),
                    Err(error) if error.reason == "NotFound" => None,
                    Err(error) => return Err(error),
                };
            }
            outcome => return outcome,
        }
    }
    Err(Status::internal(format!("{resource} {name:?} changes faster than it can be brought in order")))
}
