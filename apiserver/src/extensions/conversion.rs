//! Conversion of custom resources between the versions of their definition by a webhook
//! (<https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definition-versioning/>).
//!
//! Readers and writers of objects are synchronous everywhere else; here they wait for another server, each on a thread
//! that the runtime sets aside for it.

use std::sync::Arc;
use std::time::Duration;

use apimachinery::status::{Result, Status};
use serde_json::{Value, json};

use crate::cache::Caches;
use crate::http::webhook::{Clients, Target};
use crate::registry::object::ObjectExt;

const TIMEOUT: Duration = Duration::from_secs(30);
/// Of the metadata, a webhook may change these.
const FREE_METADATA: [&str; 2] = ["labels", "annotations"];

pub struct Converter {
    group: String,
    kind: String,
    target: Target,
    review_version: &'static str,
    clients: Clients,
    services: Arc<Caches>,
}

impl Converter {
    /// `None`: the versions differ in nothing but their name.
    pub fn read(spec: &Value, services: &Arc<Caches>) -> Option<Self> {
        let conversion = &spec["conversion"];
        if conversion["strategy"] != "Webhook" {
            return None;
        }
        let webhook = &conversion["webhook"];
        let versions = webhook.list_at(&["conversionReviewVersions"]);
        let first = versions.iter().filter_map(Value::as_str).find(|version| matches!(*version, "v1" | "v1beta1"));
        Some(Self {
            group: spec.str_at(&["group"]).to_owned(),
            kind: spec.str_at(&["names", "kind"]).to_owned(),
            target: Target::read(&webhook["clientConfig"]),
            review_version: if first == Some("v1beta1") { "v1beta1" } else { "v1" },
            clients: Clients::default(),
            services: services.clone(),
        })
    }

    /// The objects in another version of the group, in their order.
    pub fn convert(&self, objects: Vec<Value>, version: &str) -> Result<Vec<Value>> {
        let wanted = format!("{}/{version}", self.group);
        let (todo, at): (Vec<Value>, Vec<usize>) = objects
            .iter()
            .enumerate()
            .filter(|(_, object)| object.api_version() != wanted)
            .map(|(at, object)| (object.clone(), at))
            .unzip();
        if todo.is_empty() {
            return Ok(objects);
        }
        let asked =
            tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(self.ask(&todo, &wanted)));
        let failed = |why: String| {
            Status::internal(format!("conversion webhook for {wanted}, Kind={} failed: {why}", self.kind))
        };
        let converted = asked.and_then(|review| read(&review, &todo, &wanted)).map_err(failed)?;
        let mut objects = objects;
        for (at, object) in at.into_iter().zip(converted) {
            objects[at] = object;
        }
        Ok(objects)
    }

    async fn ask(&self, objects: &[Value], wanted: &str) -> std::result::Result<Value, String> {
        let uid = uuid::Uuid::new_v4().to_string();
        let review = json!({
            "kind": "ConversionReview",
            "apiVersion": format!("apiextensions.k8s.io/{}", self.review_version),
            "request": {"uid": uid, "desiredAPIVersion": wanted, "objects": objects},
        });
        let answer = self.clients.post(&self.services, &self.target, TIMEOUT, &review).await;
        let answer = answer.map_err(|error| apimachinery::process::error_chain(&error))?;
        match answer["response"]["uid"] == uid.as_str() {
            true => Ok(answer),
            false => Err(format!("expected response.uid={uid:?}, got {}", answer["response"]["uid"])),
        }
    }
}

/// What the webhook made of the objects, as far as it is allowed to.
fn read(review: &Value, asked: &[Value], wanted: &str) -> std::result::Result<Vec<Value>, String> {
    let response = &review["response"];
    if response["result"]["status"] != "Success" {
        let message = response.str_at(&["result", "message"]);
        return Err(if message.is_empty() { "without explanation".to_owned() } else { message.to_owned() });
    }
    let converted = response.list_at(&["convertedObjects"]);
    if converted.len() != asked.len() {
        return Err(format!("it returned {} objects, expected {}", converted.len(), asked.len()));
    }
    asked.iter().zip(converted).enumerate().map(|(index, (old, new))| checked(index, old, new, wanted)).collect()
}

fn checked(index: usize, old: &Value, new: &Value, wanted: &str) -> std::result::Result<Value, String> {
    if new.api_version() != wanted || new.kind() != old.kind() {
        return Err(format!(
            "it returned object {index} as {} {}, expected {wanted} {}",
            new.api_version(),
            new.kind(),
            old.kind()
        ));
    }
    for field in ["name", "namespace", "uid"] {
        let (before, after) = (old.str_at(&["metadata", field]), new.str_at(&["metadata", field]));
        if before != after {
            return Err(format!("it changed metadata.{field} of object {index} from {before:?} to {after:?}"));
        }
    }
    let mut object = new.clone();
    let mut metadata = old["metadata"].clone();
    for field in FREE_METADATA {
        match new["metadata"].get(field) {
            Some(value) => metadata[field] = value.clone(),
            None => drop(metadata.remove_at(&[field])),
        }
    }
    object["metadata"] = metadata;
    Ok(object)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(version: &str, labels: &Value) -> Value {
        json!({"apiVersion": version, "kind": "Foo", "metadata": {"name": "a", "resourceVersion": "7", "labels": labels}})
    }

    #[test]
    fn only_labels_and_annotations_of_the_metadata_may_change() {
        let old = object("g/v1", &json!({"a": "b"}));
        let mut new = object("g/v2", &json!({"c": "d"}));
        new["metadata"]["resourceVersion"] = "8".into();
        let review =
            |object: &Value| json!({"response": {"result": {"status": "Success"}, "convertedObjects": [object]}});
        let converted = read(&review(&new), std::slice::from_ref(&old), "g/v2").unwrap();
        assert_eq!(converted[0]["metadata"], json!({"name": "a", "resourceVersion": "7", "labels": {"c": "d"}}));
        new["metadata"]["name"] = "b".into();
        assert!(read(&review(&new), std::slice::from_ref(&old), "g/v2").is_err());
        assert!(read(&review(&old), std::slice::from_ref(&old), "g/v2").is_err());
        let failed = json!({"response": {"result": {"status": "Failed", "message": "no"}}});
        assert_eq!(read(&failed, &[old], "g/v2"), Err("no".to_owned()));
    }
}
