//! Images for containers: pull policies, credentials from pull secrets, back-off after failures. One pull at a time
//! unless the configuration allows more.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use base64::Engine;
use jiff::Timestamp;
use k8s_cri::v1 as cri;
use k8s_openapi::api::core::v1::Pod;
use parking_lot::Mutex;
use serde::Deserialize;
use tokio::sync::Semaphore;

use crate::cri::{Runtime, RuntimeError};
use crate::events::{Level, Recorder};
use crate::objects::Objects;
use crate::pod::plan::{BACKOFF_MAX, BACKOFF_START, Problem};

/// Images whose last pull failed; older entries are of no use.
const MAX_FAILED: usize = 1000;

struct Failed {
    delay: Duration,
    until: Timestamp,
    message: String,
}

/// An image that a pod needs.
pub struct Wanted<'a> {
    /// As the user wrote it.
    pub image: &'a str,
    pub policy: Option<&'a str>,
    /// The container that runs it; none for the image of a volume.
    pub container: Option<&'a str>,
}

pub struct Images {
    runtime: Runtime,
    objects: Objects,
    recorder: Recorder,
    pulls: Semaphore,
    failed: Mutex<HashMap<(String, String), Failed>>,
}

impl Images {
    pub fn new(runtime: Runtime, objects: Objects, recorder: Recorder, parallel: usize) -> Self {
        let pulls = Semaphore::new(parallel.clamp(1, Semaphore::MAX_PERMITS));
        Self { runtime, objects, recorder, pulls, failed: Mutex::default() }
    }

    fn tell(&self, pod: &Pod, wanted: &Wanted<'_>, level: Level, reason: &'static str, message: impl Into<String>) {
        match wanted.container {
            Some(name) => self.recorder.container(pod, name, level, reason, message),
            None => self.recorder.pod(pod, level, reason, message),
        }
    }

    /// The image, pulled if the policy says so.
    pub async fn ensure(
        &self,
        pod: &Pod,
        wanted: &Wanted<'_>,
        sandbox: &cri::PodSandboxConfig,
    ) -> Result<cri::Image, Problem> {
        let requested = wanted.image;
        let Some(reference) = normalize(requested) else {
            let message = format!(
                "Failed to apply default image tag {requested:?}: couldn't parse image name {requested:?}: invalid reference format"
            );
            self.tell(pod, wanted, Level::Warning, "InspectFailed", message.clone());
            return Err(problem("InvalidImageName", message, BACKOFF_START));
        };
        let present = self.runtime.image(&reference).await.map_err(|error| {
            let message = format!("Failed to inspect image {reference:?}: {error}");
            self.tell(pod, wanted, Level::Warning, "InspectFailed", message.clone());
            problem("ImageInspectError", message, BACKOFF_START)
        })?;
        let policy = wanted.policy.unwrap_or_else(|| default_policy(&reference));
        match (policy, present) {
            ("Never", None) => {
                let message = format!("Container image {requested:?} is not present with pull policy of Never");
                self.tell(pod, wanted, Level::Warning, "ErrImageNeverPull", message.clone());
                Err(problem("ErrImageNeverPull", message, BACKOFF_START))
            }
            ("Never" | "IfNotPresent", Some(image)) => {
                let message =
                    format!("Container image {requested:?} already present on machine and can be accessed by the pod");
                self.tell(pod, wanted, Level::Normal, "Pulled", message);
                Ok(image)
            }
            _ => self.pull(pod, wanted, &reference, sandbox).await,
        }
    }

    async fn pull(
        &self,
        pod: &Pod,
        wanted: &Wanted<'_>,
        reference: &str,
        sandbox: &cri::PodSandboxConfig,
    ) -> Result<cri::Image, Problem> {
        let requested = wanted.image;
        let key = (crate::pod::runtime_uid(pod).to_owned(), reference.to_owned());
        let now = Timestamp::now();
        let waiting = self.failed.lock().get(&key).filter(|failed| failed.until > now).map(|failed| {
            let message = format!("Back-off pulling image {requested:?}: ErrImagePull: {}", failed.message);
            Problem { reason: "ImagePullBackOff", message, retry_at: failed.until }
        });
        if let Some(waiting) = waiting {
            let event = format!("Back-off pulling image {requested:?}");
            self.tell(pod, wanted, Level::Normal, "BackOff", event);
            self.tell(pod, wanted, Level::Warning, "Failed", "Error: ImagePullBackOff");
            return Err(waiting);
        }
        self.tell(pod, wanted, Level::Normal, "Pulling", format!("Pulling image {requested:?}"));
        let begun = Instant::now();
        // The semaphore is never closed.
        let _permit = self.pulls.acquire().await.ok();
        let pulling = Instant::now();
        match self.pull_with_credentials(pod, reference, sandbox).await {
            Ok(image) => {
                self.failed.lock().remove(&key);
                let message = format!(
                    "Successfully pulled image {requested:?} in {} ({} including waiting). Image size: {} bytes.",
                    short(pulling.elapsed()),
                    short(begun.elapsed()),
                    image.size
                );
                self.tell(pod, wanted, Level::Normal, "Pulled", message);
                Ok(image)
            }
            Err(error) => {
                let message = format!("failed to pull image {requested:?}: {error}");
                let event = format!("Failed to pull image {requested:?}: {error}");
                self.tell(pod, wanted, Level::Warning, "Failed", event);
                self.tell(pod, wanted, Level::Warning, "Failed", "Error: ErrImagePull");
                self.note_failure(key, &message);
                // The next look finds the back-off and says so.
                Err(problem("ErrImagePull", message, Duration::from_secs(1)))
            }
        }
    }

    fn note_failure(&self, key: (String, String), message: &str) {
        let mut failed = self.failed.lock();
        if failed.len() >= MAX_FAILED {
            let now = Timestamp::now();
            failed.retain(|_, entry| entry.until > now);
        }
        let delay = failed.get(&key).map_or(BACKOFF_START, |entry| (entry.delay * 2).min(BACKOFF_MAX));
        let until = Timestamp::now().checked_add(delay).unwrap_or(Timestamp::MAX);
        failed.insert(key, Failed { delay, until, message: message.to_owned() });
    }

    async fn pull_with_credentials(
        &self,
        pod: &Pod,
        reference: &str,
        sandbox: &cri::PodSandboxConfig,
    ) -> Result<cri::Image, RuntimeError> {
        let mut last = None;
        for auth in self.credentials(pod, reference).await.into_iter().map(Some).chain([None]) {
            match self.runtime.pull_image(reference, auth, sandbox.clone()).await {
                Ok(id) => {
                    let image = self.runtime.image(&id).await?;
                    return image.ok_or(RuntimeError::Incomplete { call: "image_status", what: "the pulled image" });
                }
                Err(error) => last = last.or(Some(error)),
            }
        }
        Err(last.unwrap_or(RuntimeError::Incomplete { call: "pull_image", what: "an attempt" }))
    }

    /// Credentials for the image's registry in the pod's pull secrets; unreadable ones are reported and left out.
    async fn credentials(&self, pod: &Pod, reference: &str) -> Vec<cri::AuthConfig> {
        let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
        let mut found = Vec::new();
        let mut missing = Vec::new();
        for secret in pod.spec.iter().flat_map(|spec| spec.image_pull_secrets.iter().flatten()) {
            match self.objects.secret(namespace, &secret.name).await {
                Ok(object) => {
                    found.extend(object.data.iter().flatten().flat_map(|(key, bytes)| auths(key, &bytes.0, reference)))
                }
                Err(_) => missing.push(secret.name.clone()),
            }
        }
        if !missing.is_empty() {
            let message = format!(
                "Unable to retrieve some image pull secrets ({}); attempting to pull the image may not succeed.",
                missing.join(", ")
            );
            self.recorder.pod(pod, Level::Warning, "FailedToRetrieveImagePullSecret", message);
        }
        found
    }
}

fn problem(reason: &'static str, message: String, after: Duration) -> Problem {
    Problem { reason, message, retry_at: Timestamp::now().checked_add(after).unwrap_or(Timestamp::MAX) }
}

/// Milliseconds below a second, seconds with fractions above.
fn short(duration: Duration) -> String {
    match duration.as_millis() {
        millis @ 0..1000 => format!("{millis}ms"),
        millis => format!("{}.{:03}s", millis / 1000, millis % 1000),
    }
}

/// `Always` for images whose content may change under the same name.
fn default_policy(reference: &str) -> &'static str {
    if reference.ends_with(":latest") { "Always" } else { "IfNotPresent" }
}

/// The reference with `:latest` where it names neither tag nor digest; `None` if it is not a reference.
fn normalize(image: &str) -> Option<String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-/:@+".contains(c);
    if image.is_empty() || !image.chars().all(plain) || image.starts_with('/') || image.ends_with(['/', ':', '@']) {
        return None;
    }
    let (host, path) = image.split_once('/').unwrap_or(("", image));
    let is_host = host.contains(['.', ':']) || host == "localhost";
    let name = if is_host || host.is_empty() { path } else { image };
    if name.split('@').next()?.split(':').next()?.chars().any(|c| c.is_ascii_uppercase()) {
        return None;
    }
    if image.contains('@') || path.contains(':') {
        return Some(image.to_owned());
    }
    Some(format!("{image}:latest"))
}

#[derive(Deserialize)]
struct DockerConfig {
    #[serde(default)]
    auths: HashMap<String, DockerAuth>,
}

#[derive(Deserialize)]
struct DockerAuth {
    #[serde(default)]
    username: String,
    #[serde(default)]
    password: String,
    #[serde(default)]
    auth: String,
    #[serde(default)]
    identitytoken: String,
}

fn auths(key: &str, bytes: &[u8], reference: &str) -> Vec<cri::AuthConfig> {
    let entries = match key {
        ".dockerconfigjson" => serde_json::from_slice::<DockerConfig>(bytes).map(|config| config.auths),
        ".dockercfg" => serde_json::from_slice(bytes),
        _ => return Vec::new(),
    };
    let entries = entries.unwrap_or_else(|error| {
        tracing::warn!(%error, key, "a pull secret cannot be read");
        HashMap::new()
    });
    entries
        .into_iter()
        .filter(|(registry, _)| is_for(registry, reference))
        .map(|(_, auth)| auth.into_config())
        .collect()
}

fn is_for(registry: &str, reference: &str) -> bool {
    let registry = registry.trim_start_matches("https://").trim_start_matches("http://");
    let registry = registry.trim_end_matches('/').trim_end_matches("/v1").trim_end_matches("/v2");
    let host = reference.split_once('/').map(|(host, _)| host).filter(|host| host.contains(['.', ':']));
    match host {
        Some(_) => reference == registry || reference.starts_with(&format!("{registry}/")),
        None => matches!(registry, "index.docker.io" | "docker.io"),
    }
}

impl DockerAuth {
    fn into_config(self) -> cri::AuthConfig {
        let decoded = base64::engine::general_purpose::STANDARD.decode(&self.auth).ok();
        let decoded = decoded.and_then(|bytes| String::from_utf8(bytes).ok()).unwrap_or_default();
        let (user, password) = decoded.split_once(':').unwrap_or_default();
        let or = |own: String, other: &str| if own.is_empty() { other.to_owned() } else { own };
        cri::AuthConfig {
            username: or(self.username, user),
            password: or(self.password, password),
            identity_token: self.identitytoken,
            ..Default::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references() {
        for (image, want) in [
            ("busybox", Some("busybox:latest")),
            ("busybox:1", Some("busybox:1")),
            ("registry.k8s.io/pause:3.10", Some("registry.k8s.io/pause:3.10")),
            ("localhost:5000/a", Some("localhost:5000/a:latest")),
            ("a@sha256:00", Some("a@sha256:00")),
            ("", None),
            ("Invalid", None),
            ("a b", None),
        ] {
            assert_eq!(normalize(image).as_deref(), want, "{image}");
        }
    }

    #[test]
    fn credentials_by_registry() {
        let secret =
            br#"{"auths": {"https://r.example.com": {"auth": "dTpw"}, "other.example.com": {"username": "x"}}}"#;
        let found = auths(".dockerconfigjson", secret, "r.example.com/a/b:1");
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].username.as_str(), found[0].password.as_str()), ("u", "p"));
        assert!(auths(".dockerconfigjson", b"{", "r/x").is_empty());
        assert!(is_for("https://index.docker.io/v1/", "busybox:latest"));
    }
}
