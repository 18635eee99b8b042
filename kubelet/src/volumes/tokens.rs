//! Service account tokens of pods: asked for again when four fifths of their life (or a day) have passed. Kept in
//! memory only; a restarted kubelet asks for new ones.

use std::collections::HashMap;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{Pod, ServiceAccount, ServiceAccountTokenProjection};
use kube::api::PostParams;
use kube::{Api, Client};
use parking_lot::Mutex;

const MAX_AGE: Duration = Duration::from_secs(24 * 3600);
/// How soon to ask again when a token is old and the API gave no new one.
const RETRY: Duration = Duration::from_secs(60);

#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    #[error("failed to fetch token: {0}")]
    Request(#[source] Box<kube::Error>),
    #[error("failed to fetch token: the API server's answer holds none")]
    Empty,
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct Key {
    pod_uid: String,
    volume: String,
    path: String,
}

#[derive(Clone)]
pub struct Token {
    pub text: String,
    pub refresh_at: Timestamp,
    pub(super) expires_at: Timestamp,
}

pub struct Tokens {
    client: Client,
    known: Mutex<HashMap<Key, Token>>,
}

impl Tokens {
    pub fn new(client: Client) -> Self {
        Self { client, known: Mutex::default() }
    }

    pub fn forget(&self, pod_uid: &str) {
        self.known.lock().retain(|key, _| key.pod_uid != pod_uid);
    }

    pub(super) async fn get(
        &self,
        pod: &Pod,
        volume: &str,
        source: &ServiceAccountTokenProjection,
    ) -> Result<Token, TokenError> {
        let pod_uid = pod.metadata.uid.clone().unwrap_or_default();
        let key = Key { pod_uid, volume: volume.to_owned(), path: source.path.clone() };
        let now = Timestamp::now();
        if let Some(token) = self.known.lock().get(&key).filter(|token| now < token.refresh_at) {
            return Ok(token.clone());
        }
        match self.request(pod, source).await {
            Ok(token) => {
                self.known.lock().insert(key, token.clone());
                Ok(token)
            }
            // An old token is good until it expires.
            Err(error) => match self.known.lock().get(&key).filter(|token| now < token.expires_at) {
                Some(token) => Ok(Token { refresh_at: now.checked_add(RETRY).unwrap_or(now), ..token.clone() }),
                None => Err(error),
            },
        }
    }

    async fn request(&self, pod: &Pod, source: &ServiceAccountTokenProjection) -> Result<Token, TokenError> {
        let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
        let account = pod.spec.as_ref().and_then(|spec| spec.service_account_name.as_deref()).unwrap_or("default");
        let request = TokenRequest {
            spec: Some(TokenRequestSpec {
                audiences: source.audience.clone().filter(|name| !name.is_empty()).map(|name| vec![name]),
                expiration_seconds: Some(source.expiration_seconds.unwrap_or(3600)),
                bound_object_ref: Some(BoundObjectReference {
                    api_version: Some("v1".to_owned()),
                    kind: Some("Pod".to_owned()),
                    name: pod.metadata.name.clone(),
                    uid: pod.metadata.uid.clone(),
                }),
                ..TokenRequestSpec::default()
            }),
            ..TokenRequest::default()
        };
        let api = Api::<ServiceAccount>::namespaced(self.client.clone(), namespace);
        let answer = api
            .create_token_request(account, &PostParams::default(), &request)
            .await
            .map_err(|error| TokenError::Request(Box::new(error)))?;
        let status = answer.status.unwrap_or_default();
        let text = status.token.filter(|token| !token.is_empty()).ok_or(TokenError::Empty)?;
        let now = Timestamp::now();
        let expires_at = status.expiration_timestamp.map_or(now, |time| time.0);
        let life = Duration::try_from(expires_at.duration_since(now)).unwrap_or_default();
        let refresh_in = (life * 4 / 5).min(MAX_AGE);
        Ok(Token { text, refresh_at: now.checked_add(refresh_in).unwrap_or(now), expires_at })
    }
}
