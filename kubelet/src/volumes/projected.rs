//! The content of volumes that the API fills: config maps, secrets, the downward API, service account tokens, and any
//! mix of them. Only reads; writing is the payload's business.

use std::collections::HashMap;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{
    ConfigMap, DownwardAPIVolumeFile, KeyToPath, Pod, Secret, ServiceAccount, ServiceAccountTokenProjection, Volume,
    VolumeProjection,
};
use kube::api::PostParams;
use kube::{Api, Client};
use parking_lot::Mutex;

use super::payload::{File, Payload};
use super::{VolumeContext, VolumeError};
use crate::objects::ObjectError;
use crate::pod::downward::{Downward, DownwardError};

#[derive(Debug, thiserror::Error)]
pub enum ProjectedError {
    #[error("references non-existent {kind} key: {key}")]
    NoKey { kind: &'static str, key: String },
    #[error(transparent)]
    Downward(#[from] DownwardError),
    #[error("failed to fetch token: {0}")]
    Token(#[source] Box<kube::Error>),
    #[error("failed to fetch token: the API server's answer holds none")]
    EmptyToken,
}

/// What a volume should hold.
pub struct Content {
    /// The directory name of the volume's plugin.
    pub plugin: &'static str,
    /// Secrets never touch the disk.
    pub in_memory: bool,
    pub files: Payload,
}

/// The content of an API-filled volume; `None` for volumes of other types.
pub async fn content(pod: &Pod, volume: &Volume, cx: &VolumeContext<'_>) -> Result<Option<Content>, VolumeError> {
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    let mut files = Payload::new();
    let (plugin, in_memory) = if let Some(source) = &volume.config_map {
        let optional = source.optional.unwrap_or(false);
        let map = or_empty(cx.objects.config_map(namespace, &source.name).await, optional)?;
        select(config_map_data(map), &source.items, mode(source.default_mode), optional, "config", &mut files)?;
        ("kubernetes.io~configmap", false)
    } else if let Some(source) = &volume.secret {
        let optional = source.optional.unwrap_or(false);
        let name = source.secret_name.as_deref().unwrap_or_default();
        let secret = or_empty(cx.objects.secret(namespace, name).await, optional)?;
        select(secret_data(secret), &source.items, mode(source.default_mode), optional, "secret", &mut files)?;
        ("kubernetes.io~secret", true)
    } else if let Some(source) = &volume.downward_api {
        downward(source.items.as_deref(), mode(source.default_mode), cx.downward, &mut files)?;
        ("kubernetes.io~downward-api", true)
    } else if let Some(source) = &volume.projected {
        for part in source.sources.iter().flatten() {
            project(pod, &volume.name, part, mode(source.default_mode), cx, &mut files).await?;
        }
        ("kubernetes.io~projected", true)
    } else {
        return Ok(None);
    };
    Ok(Some(Content { plugin, in_memory, files }))
}

async fn project(
    pod: &Pod,
    volume: &str,
    part: &VolumeProjection,
    mode: u32,
    cx: &VolumeContext<'_>,
    files: &mut Payload,
) -> Result<(), VolumeError> {
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    if let Some(source) = &part.config_map {
        let optional = source.optional.unwrap_or(false);
        let map = or_empty(cx.objects.config_map(namespace, &source.name).await, optional)?;
        select(config_map_data(map), &source.items, mode, optional, "config", files)?;
    }
    if let Some(source) = &part.secret {
        let optional = source.optional.unwrap_or(false);
        let secret = or_empty(cx.objects.secret(namespace, &source.name).await, optional)?;
        select(secret_data(secret), &source.items, mode, optional, "secret", files)?;
    }
    if let Some(source) = &part.downward_api {
        downward(source.items.as_deref(), mode, cx.downward, files)?;
    }
    if let Some(source) = &part.service_account_token {
        let token = cx.tokens.get(pod, volume, source).await?;
        let (mode, uid) = token_owner(pod, mode);
        files.insert(source.path.clone(), File { bytes: token.into_bytes(), mode, uid });
    }
    Ok(())
}

fn mode(mode: Option<i32>) -> u32 {
    mode.and_then(|mode| u32::try_from(mode).ok()).unwrap_or(0o644)
}

fn or_empty<T: Default>(result: Result<T, ObjectError>, optional: bool) -> Result<T, ObjectError> {
    match result {
        Err(error) if optional && error.is_not_found() => Ok(T::default()),
        other => other,
    }
}

type Data = HashMap<String, Vec<u8>>;

fn config_map_data(map: ConfigMap) -> Data {
    let text = map.data.into_iter().flatten().map(|(key, text)| (key, text.into_bytes()));
    text.chain(map.binary_data.into_iter().flatten().map(|(key, bytes)| (key, bytes.0))).collect()
}

fn secret_data(secret: Secret) -> Data {
    secret.data.into_iter().flatten().map(|(key, bytes)| (key, bytes.0)).collect()
}

/// All keys under their own names, or only those listed under the paths given.
fn select(
    mut data: Data,
    items: &Option<Vec<KeyToPath>>,
    mode: u32,
    optional: bool,
    kind: &'static str,
    files: &mut Payload,
) -> Result<(), ProjectedError> {
    let Some(items) = items.as_ref().filter(|items| !items.is_empty()) else {
        files.extend(data.into_iter().map(|(key, bytes)| (key, File { bytes, mode, uid: None })));
        return Ok(());
    };
    for item in items {
        let Some(bytes) = data.remove(&item.key) else {
            if optional {
                continue;
            }
            return Err(ProjectedError::NoKey { kind, key: item.key.clone() });
        };
        let mode = item.mode.and_then(|mode| u32::try_from(mode).ok()).unwrap_or(mode);
        files.insert(item.path.clone(), File { bytes, mode, uid: None });
    }
    Ok(())
}

fn downward(
    items: Option<&[DownwardAPIVolumeFile]>,
    mode: u32,
    source: &Downward<'_>,
    files: &mut Payload,
) -> Result<(), ProjectedError> {
    for item in items.unwrap_or_default() {
        let text = match (&item.field_ref, &item.resource_field_ref) {
            (Some(field), _) => source.field(&field.field_path)?,
            (None, Some(resource)) => source.resource(resource, None)?,
            (None, None) => continue,
        };
        let mode = item.mode.and_then(|mode| u32::try_from(mode).ok()).unwrap_or(mode);
        files.insert(item.path.clone(), File { bytes: text.into_bytes(), mode, uid: None });
    }
    Ok(())
}

/// A token is readable only by the pod's user when there is exactly one, or by the pod's group.
fn token_owner(pod: &Pod, mode: u32) -> (u32, Option<u32>) {
    let spec = pod.spec.clone().unwrap_or_default();
    let of_pod = spec.security_context.unwrap_or_default();
    if of_pod.fs_group.is_some() {
        return (0o600, None);
    }
    let containers = spec.init_containers.into_iter().flatten().chain(spec.containers);
    let users: Vec<Option<i64>> =
        containers.map(|spec| spec.security_context.and_then(|own| own.run_as_user).or(of_pod.run_as_user)).collect();
    match users.first().copied().flatten().filter(|first| users.iter().all(|user| *user == Some(*first))) {
        Some(user) => (0o600, u32::try_from(user).ok()),
        None => (mode, None),
    }
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct TokenKey {
    pod_uid: String,
    volume: String,
    path: String,
}

struct Token {
    text: String,
    refresh_at: Timestamp,
    expires_at: Timestamp,
}

/// Service account tokens of pods, asked for again when four fifths of their life (or a day) have passed.
pub struct Tokens {
    client: Client,
    known: Mutex<HashMap<TokenKey, Token>>,
}

impl Tokens {
    pub fn new(client: Client) -> Self {
        Self { client, known: Mutex::default() }
    }

    pub fn forget(&self, pod_uid: &str) {
        self.known.lock().retain(|key, _| key.pod_uid != pod_uid);
    }

    async fn get(
        &self,
        pod: &Pod,
        volume: &str,
        source: &ServiceAccountTokenProjection,
    ) -> Result<String, ProjectedError> {
        let pod_uid = pod.metadata.uid.clone().unwrap_or_default();
        let key = TokenKey { pod_uid, volume: volume.to_owned(), path: source.path.clone() };
        let now = Timestamp::now();
        if let Some(token) = self.known.lock().get(&key).filter(|token| now < token.refresh_at) {
            return Ok(token.text.clone());
        }
        match self.request(pod, source).await {
            Ok(token) => {
                let text = token.text.clone();
                self.known.lock().insert(key, token);
                Ok(text)
            }
            // An old token is good until it expires.
            Err(error) => match self.known.lock().get(&key).filter(|token| now < token.expires_at) {
                Some(token) => Ok(token.text.clone()),
                None => Err(error),
            },
        }
    }

    async fn request(&self, pod: &Pod, source: &ServiceAccountTokenProjection) -> Result<Token, ProjectedError> {
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
            .map_err(|error| ProjectedError::Token(Box::new(error)))?;
        let status = answer.status.unwrap_or_default();
        let text = status.token.filter(|token| !token.is_empty()).ok_or(ProjectedError::EmptyToken)?;
        let now = Timestamp::now();
        let expires_at = status.expiration_timestamp.map_or(now, |time| time.0);
        let life = Duration::try_from(expires_at.duration_since(now)).unwrap_or_default();
        let refresh_in = (life * 4 / 5).min(Duration::from_secs(24 * 3600));
        Ok(Token { text, refresh_at: now.checked_add(refresh_in).unwrap_or(now), expires_at })
    }
}
