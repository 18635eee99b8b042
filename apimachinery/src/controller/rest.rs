//! Requests on objects of any kind as JSON trees: what the plan executor, the event recorder and controllers over
//! discovered kinds share. It knows paths and verbs, and no kind.

use std::borrow::Cow;
use std::sync::Arc;

use http::{HeaderValue, Method, Request};
use kube::{Client, Resource};
use serde_json::Value;

use super::service_account::ServiceAccount;

/// Where a kind is served.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ResourceId {
    pub group: Cow<'static, str>,
    pub version: Cow<'static, str>,
    pub plural: Cow<'static, str>,
    pub kind: Cow<'static, str>,
}

impl ResourceId {
    pub fn of<K: Resource<DynamicType = ()>>() -> Self {
        Self { group: K::group(&()), version: K::version(&()), plural: K::plural(&()), kind: K::kind(&()) }
    }

    /// `v1`, `apps/v1`.
    pub fn api_version(&self) -> String {
        if self.group.is_empty() { self.version.to_string() } else { format!("{}/{}", self.group, self.version) }
    }

    /// The URL path; empty parts are left out.
    pub fn path(&self, namespace: &str, name: &str, subresource: &str) -> String {
        let mut path = if self.group.is_empty() { "/api/".to_owned() } else { format!("/apis/{}/", self.group) };
        path.push_str(&self.version);
        if !namespace.is_empty() {
            path.push_str("/namespaces/");
            path.push_str(namespace);
        }
        for part in [self.plural.as_ref(), name, subresource] {
            if !part.is_empty() {
                path.push('/');
                path.push_str(part);
            }
        }
        path
    }
}

const JSON: &str = "application/json";
const METADATA_LIST: &str = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1,application/json";

/// A thin client for JSON trees.
#[derive(Clone)]
pub struct Rest {
    client: Client,
    account: Option<Arc<ServiceAccount>>,
}

impl Rest {
    pub fn new(client: Client) -> Self {
        Self { client, account: None }
    }

    /// The same client making its requests as a service account.
    #[must_use]
    pub fn with_service_account(&self, account: Arc<ServiceAccount>) -> Self {
        Self { client: self.client.clone(), account: Some(account) }
    }

    /// The client with the process's own credentials, which watches and discovery go through in any case.
    pub fn client(&self) -> &Client {
        &self.client
    }

    pub async fn get(&self, path: &str) -> kube::Result<Value> {
        self.send(Method::GET, path, JSON, None).await
    }

    /// Like `get`, for metadata alone: a PartialObjectMetadata or a list of them, even from servers that know no such
    /// thing and send whole objects.
    pub async fn get_metadata(&self, path: &str) -> kube::Result<Value> {
        self.send(Method::GET, path, METADATA_LIST, None).await
    }

    pub async fn create(&self, path: &str, body: &Value) -> kube::Result<Value> {
        self.send(Method::POST, path, JSON, Some(body)).await
    }

    pub async fn replace(&self, path: &str, body: &Value) -> kube::Result<Value> {
        self.send(Method::PUT, path, JSON, Some(body)).await
    }

    pub async fn patch(&self, path: &str, content_type: &str, body: &Value) -> kube::Result<Value> {
        self.send(Method::PATCH, path, content_type, Some(body)).await
    }

    /// Deletes an object, or a collection when the path names no object; `options` is a DeleteOptions tree.
    pub async fn delete(&self, path: &str, options: &Value) -> kube::Result<Value> {
        self.send(Method::DELETE, path, JSON, Some(options)).await
    }

    async fn send(&self, method: Method, path: &str, media_type: &str, body: Option<&Value>) -> kube::Result<Value> {
        let bytes = match body {
            Some(body) => serde_json::to_vec(body).map_err(kube::Error::SerdeError)?,
            None => Vec::new(),
        };
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(http::header::ACCEPT, if body.is_none() { media_type } else { JSON })
            .header(http::header::CONTENT_TYPE, if body.is_none() { JSON } else { media_type })
            .body(bytes)
            .map_err(kube::Error::HttpError)?;
        match &self.account {
            None => self.client.request(request).await,
            Some(account) => send_as(account, request).await,
        }
    }
}

/// Sends under the account's token, and once more under a new one when the server no longer takes it.
async fn send_as(account: &ServiceAccount, request: Request<Vec<u8>>) -> kube::Result<Value> {
    let authorization = authorization(account).await?;
    match account.client().request(authorized(request.clone(), &authorization)).await {
        Err(kube::Error::Api(status)) if status.code == 401 => account.forget(&authorization).await,
        other => return other,
    }
    let authorization = self::authorization(account).await?;
    account.client().request(authorized(request, &authorization)).await
}

/// A failure is no answer to the request itself, and must not be taken for one.
async fn authorization(account: &ServiceAccount) -> kube::Result<HeaderValue> {
    // Tokens are asked for with requests of their own: the box ends the recursion of the futures' types.
    Box::pin(account.authorization()).await.map_err(|error| kube::Error::Service(Box::new(error)))
}

fn authorized(mut request: Request<Vec<u8>>, authorization: &HeaderValue) -> Request<Vec<u8>> {
    request.headers_mut().insert(http::header::AUTHORIZATION, authorization.clone());
    request
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::{apps::v1::Deployment, core::v1::Node};

    #[test]
    fn paths_of_kinds() {
        let deployments = ResourceId::of::<Deployment>();
        assert_eq!(deployments.path("a", "b", "status"), "/apis/apps/v1/namespaces/a/deployments/b/status");
        assert_eq!(deployments.path("a", "", ""), "/apis/apps/v1/namespaces/a/deployments");
        assert_eq!(ResourceId::of::<Node>().path("", "n", ""), "/api/v1/nodes/n");
    }
}
