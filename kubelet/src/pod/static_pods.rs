//! Static pods: manifests in a directory of the node. Reads the files whenever one changes, and at least from time to
//! time; a file that is not a pod is named in the log and otherwise ignored.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, Toleration};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;

use super::annotations;
use crate::config::KubeletConfiguration;
use crate::directory_watch::DirectoryWatch;

/// No manifest is larger than an object in the API may be.
const MAX_SIZE: u64 = 3 << 20;

pub struct Source {
    directory: PathBuf,
    node_name: String,
    period: Duration,
}

/// Listing a directory that does not exist: that is no static pods, not an error.
fn is_missing(error: &std::io::Error) -> bool {
    error.kind() == std::io::ErrorKind::NotFound
}

#[derive(Debug, thiserror::Error)]
enum ManifestError {
    #[error("cannot read it")]
    Read(#[from] std::io::Error),
    #[error("it is larger than {MAX_SIZE} bytes")]
    TooLarge,
    #[error("it is not YAML")]
    Yaml(#[source] Box<serde_saphyr::Error>),
    #[error("it is not a pod")]
    NotAPod(#[source] serde_json::Error),
    #[error("it is of kind {0:?}, not Pod")]
    Kind(String),
    #[error("it has no name or no containers")]
    Incomplete,
}

impl Source {
    pub fn new(config: &KubeletConfiguration, node_name: &str) -> Self {
        Self {
            directory: PathBuf::from(&config.static_pod_path),
            node_name: node_name.to_owned(),
            period: config.file_check_frequency.0.max(Duration::from_secs(1)),
        }
    }

    /// Sends the complete set whenever it has changed.
    pub async fn follow(self, updates: mpsc::Sender<Vec<Pod>>) {
        let mut last: Option<Vec<String>> = None;
        let mut watch = watch(&self.directory);
        loop {
            let pods = self.read_all();
            let uids: Vec<String> = pods.iter().filter_map(|pod| pod.metadata.uid.clone()).collect();
            if last.as_ref() != Some(&uids) {
                last = Some(uids);
                if updates.send(pods).await.is_err() {
                    return;
                }
            }
            watch.changed(self.period).await;
        }
    }

    fn read_all(&self) -> Vec<Pod> {
        let entries = match fs::read_dir(&self.directory) {
            Ok(entries) => entries,
            // Said once, when the watch was set up.
            Err(error) if is_missing(&error) => return Vec::new(),
            Err(error) => {
                tracing::warn!(path = %self.directory.display(), %error, "cannot list static pods");
                return Vec::new();
            }
        };
        let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
        paths.sort();
        let visible = |path: &PathBuf| {
            path.is_file() && path.file_name().is_some_and(|name| !name.to_string_lossy().starts_with('.'))
        };
        let mut pods = Vec::new();
        for path in paths.into_iter().filter(visible) {
            match read(&path).and_then(|pod| complete(pod, &path, &self.node_name)) {
                Ok(pod) => pods.push(pod),
                Err(error) => {
                    let error = apimachinery::process::error_chain(&error);
                    tracing::warn!(path = %path.display(), error, "ignoring a static pod's manifest");
                }
            }
        }
        pods
    }
}

fn read(path: &Path) -> Result<Pod, ManifestError> {
    if fs::metadata(path)?.len() > MAX_SIZE {
        return Err(ManifestError::TooLarge);
    }
    parse(&fs::read_to_string(path)?)
}

fn parse(text: &str) -> Result<Pod, ManifestError> {
    let value: serde_json::Value =
        serde_saphyr::from_str(text).map_err(|source| ManifestError::Yaml(Box::new(source)))?;
    match value.get("kind").and_then(serde_json::Value::as_str) {
        Some("Pod") => serde_json::from_value(value).map_err(ManifestError::NotAPod),
        other => Err(ManifestError::Kind(other.unwrap_or_default().to_owned())),
    }
}

/// Gives the pod what the API server would: an identity that changes with its content, a namespace, this node.
fn complete(mut pod: Pod, path: &Path, node_name: &str) -> Result<Pod, ManifestError> {
    let name = pod.metadata.name.clone().filter(|name| !name.is_empty()).ok_or(ManifestError::Incomplete)?;
    let spec = pod.spec.as_mut().filter(|spec| !spec.containers.is_empty()).ok_or(ManifestError::Incomplete)?;
    spec.node_name = Some(node_name.to_owned());
    // Node failures are no reason to evict a pod that is bound to the node by a file.
    spec.tolerations.get_or_insert_default().push(Toleration {
        operator: Some("Exists".to_owned()),
        effect: Some("NoExecute".to_owned()),
        ..Toleration::default()
    });
    pod.metadata.namespace.get_or_insert_with(|| "default".to_owned());
    pod.metadata.name = Some(format!("{name}-{}", node_name.to_lowercase()));
    let mut digest = Sha256::new();
    digest.update(node_name);
    digest.update(path.as_os_str().as_encoded_bytes());
    digest.update(serde_json::to_vec(&pod).map_err(ManifestError::NotAPod)?);
    let uid: String = digest.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect();
    let notes = pod.metadata.annotations.get_or_insert_default();
    notes.insert(annotations::HASH.to_owned(), uid.clone());
    notes.insert(annotations::SOURCE.to_owned(), "file".to_owned());
    notes.insert(annotations::SEEN.to_owned(), Timestamp::now().to_string());
    pod.metadata.uid = Some(uid);
    Ok(pod)
}

/// The object that shows a static pod in the API.
pub fn mirror(pod: &Pod, node_name: &str, node_uid: &str) -> Pod {
    let mut mirror = pod.clone();
    let hash = mirror.metadata.uid.take().unwrap_or_default();
    mirror.metadata.annotations.get_or_insert_default().insert(annotations::MIRROR.to_owned(), hash);
    mirror.metadata.owner_references = Some(vec![OwnerReference {
        api_version: "v1".to_owned(),
        kind: "Node".to_owned(),
        name: node_name.to_owned(),
        uid: node_uid.to_owned(),
        controller: Some(true),
        block_owner_deletion: None,
    }]);
    mirror.status = None;
    mirror
}

/// Wakes when a manifest changes, if the directory can be watched.
fn watch(directory: &Path) -> DirectoryWatch {
    let opened = DirectoryWatch::new().and_then(|watch| watch.add(directory).map(|()| watch));
    opened.unwrap_or_else(|error| {
        let path = directory.display();
        if is_missing(&error) {
            tracing::debug!(%path, "no directory of static pods, looking from time to time");
        } else {
            tracing::warn!(%path, %error, "cannot watch for static pods, looking from time to time");
        }
        DirectoryWatch::blind()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manifest_becomes_a_pod_of_this_node() {
        let text = "apiVersion: v1\nkind: Pod\nmetadata: {name: web}\nspec: {containers: [{name: c, image: i}]}\n";
        let pod = |text: &str| complete(parse(text).unwrap(), Path::new("/m/web.yaml"), "Node1").unwrap();
        let first = pod(text);
        assert_eq!(first.metadata.name.as_deref(), Some("web-node1"));
        assert_eq!(first.metadata.namespace.as_deref(), Some("default"));
        assert!(super::super::is_static(&first));
        assert_eq!(first.metadata.uid, pod(text).metadata.uid);
        assert_ne!(first.metadata.uid, pod(&text.replace("image: i", "image: j")).metadata.uid);
        let mirror = mirror(&first, "node1", "uid");
        assert_eq!(super::super::runtime_uid(&mirror), first.metadata.uid.as_deref().unwrap());
    }

    #[test]
    fn a_directory_may_be_missing_and_come_later() {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("manifests");
        let source = Source { directory: directory.clone(), node_name: "n".to_owned(), period: Duration::from_secs(1) };
        assert!(source.read_all().is_empty());
        fs::create_dir(&directory).unwrap();
        let text = "kind: Pod\nmetadata: {name: x}\nspec: {containers: [{name: c}]}\n";
        fs::write(directory.join("x.yaml"), text).unwrap();
        assert_eq!(source.read_all().len(), 1);
    }

    #[test]
    fn other_files_are_refused() {
        for text in ["kind: Service\n", "a: [", "kind: Pod\nspec: 1\n"] {
            assert!(parse(text).is_err(), "{text}");
        }
        let empty = parse("kind: Pod\nmetadata: {name: x}\nspec: {containers: []}\n").unwrap();
        assert!(matches!(complete(empty, Path::new("/x"), "n"), Err(ManifestError::Incomplete)));
    }
}
