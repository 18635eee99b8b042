//! The content of volumes that the API fills: config maps, secrets, the downward API, service account tokens,
//! certificates, and any mix of them. Only reads; writing is the payload's business.

use std::collections::HashMap;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{
    ConfigMap, DownwardAPIVolumeFile, KeyToPath, Pod, PodCertificateProjection, Secret, Volume, VolumeProjection,
};

use super::payload::{File, Payload};
use super::pod_certificates::{self, PodCertificateError};
use super::tokens::TokenError;
use super::trust_bundles::{self, TrustBundleError};
use super::{VolumeContext, VolumeError};
use crate::objects::ObjectError;
use crate::pod::downward::{Downward, DownwardError};

#[derive(Debug, thiserror::Error)]
pub enum ProjectedError {
    #[error("references non-existent {kind} key: {key}")]
    NoKey { kind: &'static str, key: String },
    #[error(transparent)]
    Downward(#[from] DownwardError),
    #[error(transparent)]
    Token(#[from] TokenError),
    #[error(transparent)]
    TrustBundle(#[from] TrustBundleError),
    #[error(transparent)]
    PodCertificate(#[from] PodCertificateError),
}

/// What a volume should hold.
pub struct Content {
    /// The directory name of the volume's plugin.
    pub plugin: &'static str,
    /// Secrets never touch the disk.
    pub in_memory: bool,
    pub files: Payload,
    /// When to look again although nothing has changed: something in it gets old.
    pub refresh_at: Option<Timestamp>,
}

/// The content of an API-filled volume; `None` for volumes of other types.
pub async fn content(pod: &Pod, volume: &Volume, cx: &VolumeContext<'_>) -> Result<Option<Content>, VolumeError> {
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    let mut files = Payload::new();
    let mut refresh_at = None;
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
        for (index, part) in source.sources.iter().flatten().enumerate() {
            let place = Place { volume: &volume.name, index, mode: mode(source.default_mode) };
            let due = project(pod, part, &place, cx, &mut files).await?;
            refresh_at = refresh_at.into_iter().chain(due).min();
        }
        ("kubernetes.io~projected", true)
    } else {
        return Ok(None);
    };
    Ok(Some(Content { plugin, in_memory, files, refresh_at }))
}

/// Where a part of a projected volume is, and the mode of its files.
struct Place<'a> {
    volume: &'a str,
    index: usize,
    mode: u32,
}

/// Adds the files of one source; returns when they get old, if they do.
async fn project(
    pod: &Pod,
    part: &VolumeProjection,
    place: &Place<'_>,
    cx: &VolumeContext<'_>,
    files: &mut Payload,
) -> Result<Option<Timestamp>, VolumeError> {
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    let mode = place.mode;
    let mut refresh_at = None;
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
    // What proves an identity, or whom to trust, is for the pod's user only.
    let (private, uid) = private_mode(pod, mode);
    let file = |text: String| File { bytes: text.into_bytes(), mode: private, uid };
    if let Some(source) = &part.service_account_token {
        let token = cx.tokens.get(pod, place.volume, source).await.map_err(ProjectedError::from)?;
        refresh_at = Some(token.refresh_at);
        files.insert(source.path.clone(), file(token.text));
    }
    if let Some(source) = &part.cluster_trust_bundle {
        let anchors = trust_bundles::content(cx.objects, source).await.map_err(ProjectedError::from)?;
        files.insert(source.path.clone(), file(anchors));
    }
    if let Some(source) = &part.pod_certificate {
        refresh_at = Some(pod_certificate(pod, source, place, cx, &file, files).await?);
    }
    Ok(refresh_at)
}

async fn pod_certificate(
    pod: &Pod,
    source: &PodCertificateProjection,
    place: &Place<'_>,
    cx: &VolumeContext<'_>,
    file: &impl Fn(String) -> File,
    files: &mut Payload,
) -> Result<Timestamp, ProjectedError> {
    let key = pod_certificates::Key {
        pod_uid: pod.metadata.uid.clone().unwrap_or_default(),
        volume: place.volume.to_owned(),
        source: place.index,
    };
    let pod_certificates::Credentials { key, chain, refresh_at } = cx.certificates.get(pod, key, source).await?;
    let bundle = format!("{key}{chain}");
    let shown =
        [(&source.credential_bundle_path, bundle), (&source.key_path, key), (&source.certificate_chain_path, chain)];
    for (path, text) in shown {
        if let Some(path) = path.as_ref().filter(|path| !path.is_empty()) {
            files.insert(path.clone(), file(text));
        }
    }
    Ok(refresh_at)
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

/// Readable only by the pod's user when there is exactly one, or by the pod's group.
fn private_mode(pod: &Pod, mode: u32) -> (u32, Option<u32>) {
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
