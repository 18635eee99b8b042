//! An API server for tests: objects by their path, in memory. Knows the verbs that the kubelet uses and nothing about
//! kinds.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::Arc;

use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use kube::client::Body;
use parking_lot::Mutex;
use serde_json::{Value, json};

type Objects = BTreeMap<String, Value>;

#[derive(Clone, Default)]
pub struct FakeApi {
    objects: Arc<Mutex<Objects>>,
}

impl FakeApi {
    /// `path` as in a request for the object, `/api/v1/nodes/n`.
    pub fn put(&self, path: &str, object: Value) {
        self.objects.lock().insert(path.to_owned(), object);
    }

    pub fn get(&self, path: &str) -> Option<Value> {
        self.objects.lock().get(path).cloned()
    }

    pub fn client(&self) -> kube::Client {
        let objects = self.objects.clone();
        let service = tower::service_fn(move |request: Request<Body>| {
            let objects = objects.clone();
            async move {
                let (head, body) = request.into_parts();
                let bytes = body.collect().await.expect("a whole body").to_bytes();
                let body = serde_json::from_slice(&bytes).unwrap_or(Value::Null);
                let (status, answer) = answer(&mut objects.lock(), &head.method, head.uri.path(), body);
                let text = Full::new(bytes::Bytes::from(answer.to_string()));
                Ok::<_, Infallible>(Response::builder().status(status).body(text).expect("a response"))
            }
        });
        kube::Client::new(service, "default")
    }
}

fn answer(objects: &mut Objects, method: &Method, path: &str, body: Value) -> (StatusCode, Value) {
    let object = path.strip_suffix("/status").unwrap_or(path);
    let found = match *method {
        Method::POST if path.ends_with("/token") => {
            let status = json!({"token": "secret", "expirationTimestamp": "2100-01-01T00:00:00Z"});
            Some(json!({"metadata": {}, "spec": body["spec"], "status": status}))
        }
        Method::POST => {
            let name = body["metadata"]["name"].as_str().unwrap_or_default();
            objects.insert(format!("{path}/{name}"), body.clone());
            Some(body)
        }
        Method::PUT => {
            objects.insert(object.to_owned(), body.clone());
            Some(body)
        }
        Method::PATCH => objects.get_mut(object).map(|known| {
            merge(known, body);
            known.clone()
        }),
        Method::DELETE => objects.remove(object),
        _ => objects.get(object).cloned(),
    };
    match found {
        Some(found) => (StatusCode::OK, found),
        None => {
            let name = object.rsplit('/').next().unwrap_or_default();
            let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
                "message": format!("{name:?} not found"), "reason": "NotFound", "code": 404});
            (StatusCode::NOT_FOUND, status)
        }
    }
}

/// RFC 7386.
fn merge(known: &mut Value, patch: Value) {
    let Value::Object(fields) = patch else {
        *known = patch;
        return;
    };
    if !known.is_object() {
        *known = json!({});
    }
    for (key, value) in fields {
        match value {
            Value::Null => drop(known.as_object_mut().and_then(|known| known.remove(&key))),
            value => merge(&mut known[key], value),
        }
    }
}
