//! Publishing one volume for one pod: attached, staged for the node, published for the pod, given to its group.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{SecretReference, ServiceAccountTokenProjection};
use serde_json::{Map, Value, json};

use super::api::{self, Capabilities, Capability, Driver};
use super::attachment::Attachments;
use super::expand::Growth;
use super::layout::{self, Place, VolumeData, VolumeId};
use super::request::{Policy, Source, Wanted, map};
use super::{Csi, CsiError, ownership};
use crate::volumes::tokens::Tokens;

/// How often volumes are published again whose driver wants that; upstream's period of looking at a pod.
const REPUBLISH: Duration = Duration::from_secs(60);
/// How often persistent volumes are looked at for having grown.
const LOOK_AGAIN: Duration = Duration::from_secs(180);
const TOKENS: &str = "csi.storage.k8s.io/serviceAccount.tokens";

/// Where a volume is for its pod.
#[derive(Clone, Debug, PartialEq)]
pub struct Published {
    pub path: PathBuf,
    /// When to publish it again although nothing has changed.
    pub refresh_at: Option<Timestamp>,
}

/// One volume on its way to a pod.
pub(super) struct Job<'a> {
    pub csi: &'a Csi,
    pub wanted: &'a Wanted<'a>,
    pub id: VolumeId,
    pub driver: Driver,
    pub known: Capabilities,
    tokens: &'a Tokens,
    policy: Policy,
}

impl Csi {
    /// Makes the volume available for the pod; the second time only if the driver wants to hear of it again.
    pub async fn publish(&self, wanted: &Wanted<'_>, tokens: &Tokens) -> Result<Published, CsiError> {
        let policy = Policy::of(self.objects.csi_driver(wanted.driver()).await?);
        policy.check(wanted)?;
        let place = layout::published(&self.root, wanted.uid(), wanted.name());
        let key = (wanted.uid().to_owned(), wanted.name().to_owned());
        let is_known = self.published.lock().contains_key(&key);
        let period = match wanted.source {
            _ if policy.republishes() => Some(REPUBLISH),
            Source::Persistent(..) => Some(LOOK_AGAIN),
            Source::Inline(_) => None,
        };
        let refresh_at = period.and_then(|period| Timestamp::now().checked_add(period).ok());
        let published = Published { path: place.mount_point(), refresh_at };
        let id = wanted.id();
        let _turn = self.locks.lock(&id).await;
        if !is_known || policy.republishes() || Growth::of(wanted).is_some() {
            let driver = self.driver(&id.driver)?;
            let known = driver.capabilities().await?;
            let job = Job { csi: self, wanted, id, driver, known, tokens, policy };
            job.run(&place, is_known).await?;
            self.published.lock().insert(key, wanted.volume.to_owned());
        }
        Ok(published)
    }

    pub(super) async fn secret(
        &self,
        field: &'static str,
        reference: Option<&SecretReference>,
    ) -> Result<BTreeMap<String, String>, CsiError> {
        let Some(reference) = reference else { return Ok(BTreeMap::new()) };
        let text = |text: &Option<String>| text.clone().unwrap_or_default();
        let (namespace, name) = (text(&reference.namespace), text(&reference.name));
        let secret = self.objects.secret(&namespace, &name).await;
        let secret = secret.map_err(|source| CsiError::Secret { field, namespace, name, source: Box::new(source) })?;
        let data = secret.data.into_iter().flatten();
        Ok(data.map(|(key, bytes)| (key, String::from_utf8_lossy(&bytes.0).into_owned())).collect())
    }
}

impl Job<'_> {
    /// All steps, each of which finds again what it did before. `is_known` when the pod uses the volume already:
    /// nothing of it may be removed then.
    async fn run(&self, place: &Place, is_known: bool) -> Result<(), CsiError> {
        let context = self.publish_context().await?;
        let staging = self.stage(&context).await?;
        if !is_known || self.policy.republishes() {
            let question = self.question(place, &context, staging.clone()).await?;
            place.prepare()?;
            place.save(&self.data())?;
            if let Err(error) = self.driver.publish(question).await {
                clean_up(place, !is_known && !error.is_uncertain());
                return Err(error.into());
            }
        }
        if !is_known {
            self.give_to_group(place).await?;
        }
        self.expand(place, staging).await
    }

    /// What the attacher said about the volume, once it is attached.
    async fn publish_context(&self) -> Result<BTreeMap<String, String>, CsiError> {
        if !self.policy.attaches() || matches!(self.wanted.source, Source::Inline(_)) {
            return Ok(BTreeMap::new());
        }
        let attachments = Attachments { objects: &self.csi.objects, node: &self.csi.node, in_use: &self.csi.in_use };
        Ok(attachments.wait(&self.id).await?)
    }

    /// Stages the volume for the node, unless that was done or the driver does not; returns the staging path.
    async fn stage(&self, context: &BTreeMap<String, String>) -> Result<String, CsiError> {
        let Source::Persistent(_, source) = self.wanted.source else { return Ok(String::new()) };
        if !self.known.has(Capability::StageUnstage) {
            return Ok(String::new());
        }
        let place = layout::staged(&self.csi.root, &self.id);
        let path = place.mount_point().display().to_string();
        if self.csi.staged.lock().contains(&self.id) {
            return Ok(path);
        }
        let secrets = self.csi.secret("NodeStageSecretRef", source.node_stage_secret_ref.as_ref()).await?;
        let is_new = place.load()?.is_none();
        place.prepare_mount_point()?;
        let (driver_name, volume_handle) = (self.id.driver.clone(), self.id.handle.clone());
        place.save(&VolumeData { driver_name, volume_handle, ..VolumeData::default() })?;
        let question = api::Stage {
            volume_id: self.id.handle.clone(),
            publish_context: map(context.clone()),
            staging_target_path: path.clone(),
            volume_capability: Some(self.wanted.capability(&self.known)),
            secrets: map(secrets),
            volume_context: map(self.wanted.attributes()),
        };
        if let Err(error) = self.driver.stage(question).await {
            clean_up(&place, is_new && !error.is_uncertain());
            return Err(error.into());
        }
        self.csi.staged.lock().insert(self.id.clone());
        Ok(path)
    }

    async fn question(
        &self,
        place: &Place,
        context: &BTreeMap<String, String>,
        staging_target_path: String,
    ) -> Result<api::Publish, CsiError> {
        let mut secrets = self.csi.secret("NodePublishSecretRef", self.wanted.publish_secret().as_ref()).await?;
        let mut attributes = self.wanted.attributes();
        if self.policy.wants_pod_info() {
            attributes.extend(self.wanted.pod_info());
        }
        if let Some(tokens) = self.service_account_tokens().await? {
            let target = if self.policy.tokens_in_secrets() { &mut secrets } else { &mut attributes };
            target.insert(TOKENS.to_owned(), tokens);
        }
        Ok(api::Publish {
            volume_id: self.id.handle.clone(),
            publish_context: map(context.clone()),
            staging_target_path,
            target_path: place.mount_point().display().to_string(),
            volume_capability: Some(self.wanted.capability(&self.known)),
            readonly: self.wanted.read_only,
            secrets: map(secrets),
            volume_context: map(attributes),
        })
    }

    /// Tokens of the pod's account by audience, as the driver expects them.
    async fn service_account_tokens(&self) -> Result<Option<String>, CsiError> {
        let mut tokens = Map::new();
        for (audience, expiration_seconds) in self.policy.tokens() {
            let source = ServiceAccountTokenProjection {
                audience: Some(audience.clone()),
                expiration_seconds,
                // Tells tokens for drivers from those in files of the same volume.
                path: format!("{}/{audience}", self.id.driver),
                ..ServiceAccountTokenProjection::default()
            };
            let token = self.tokens.get(self.wanted.pod, self.wanted.volume, &source).await?;
            let expires = token.expires_at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
            tokens.insert(audience, json!({"token": token.text, "expirationTimestamp": expires}));
        }
        if tokens.is_empty() {
            return Ok(None);
        }
        Ok(Some(serde_json::to_string(&Value::Object(tokens))?))
    }

    fn data(&self) -> VolumeData {
        VolumeData {
            spec_volume_id: self.wanted.name().to_owned(),
            volume_handle: self.id.handle.clone(),
            driver_name: self.id.driver.clone(),
            node_name: self.csi.node.clone(),
            attachment_id: self.id.attachment(&self.csi.node),
            volume_lifecycle_mode: self.wanted.mode().to_owned(),
        }
    }

    async fn give_to_group(&self, place: &Place) -> Result<(), CsiError> {
        let gives = self.wanted.gives_to_group(self.policy.group_policy(), &self.known);
        let Some(group) = self.wanted.group().filter(|_| gives) else { return Ok(()) };
        let (path, only_on_mismatch) = (place.mount_point(), self.wanted.only_on_mismatch());
        let given = tokio::task::spawn_blocking(move || ownership::give(&path, group, only_on_mismatch)).await;
        let given = given.unwrap_or_else(|error| Err(std::io::Error::other(error)));
        given.map_err(|source| CsiError::Group { volume: self.id.handle.clone(), source })
    }
}

/// Leaves nothing of a volume that surely was not set up.
fn clean_up(place: &Place, surely: bool) {
    if surely && let Err(error) = place.remove() {
        tracing::warn!(error = apimachinery::process::error_chain(&error), "a volume that failed leaves something");
    }
}
