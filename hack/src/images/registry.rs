//! A read-only image registry over archives in the OCI layout, so that nodes can pull what they were given: with it
//! `imagePullPolicy: Always` and image volumes behave as they do with a registry on the network. It answers for
//! whatever registry an image's name says; nodes use it as a mirror of all.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Query, State};
use axum::http::{Method, Response, StatusCode, Uri, header};
use futures::stream;
use serde::Deserialize;
use serde_json::{Value, json};

const CHUNK: u64 = 256 << 10;
/// Indexes and manifests are read as a whole; none of a sane image is larger.
const MAX_DOCUMENT: u64 = 4 << 20;

/// Where a blob's bytes are.
#[derive(Clone)]
struct Blob {
    archive: Arc<PathBuf>,
    offset: u64,
    size: u64,
}

/// The images of all archives: which blob is the manifest of a name, and where each blob is.
#[derive(Default)]
struct Catalogue {
    /// `host/repository:tag` to digest.
    names: HashMap<String, String>,
    blobs: HashMap<String, Blob>,
}

/// Serves until killed.
pub fn main(listen: SocketAddr, archives: &[PathBuf]) -> Result<()> {
    let mut catalogue = Catalogue::default();
    for archive in archives {
        catalogue.add(archive).with_context(|| format!("cannot read {}", archive.display()))?;
    }
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start the runtime")?;
    runtime.block_on(async {
        let listener =
            tokio::net::TcpListener::bind(listen).await.with_context(|| format!("cannot listen on {listen}"))?;
        let router = Router::new().fallback(answer).with_state(Arc::new(catalogue));
        axum::serve(listener, router).await.context("cannot serve")
    })
}

impl Catalogue {
    fn add(&mut self, path: &Path) -> Result<()> {
        let archive = Arc::new(path.to_owned());
        let mut index = None;
        let mut tar = tar::Archive::new(File::open(path)?);
        for entry in tar.entries_with_seek()? {
            let entry = entry?;
            let blob =
                Blob { archive: archive.clone(), offset: entry.raw_file_position(), size: entry.header().size()? };
            let name = entry.path()?.to_string_lossy().trim_start_matches("./").to_owned();
            if name == "index.json" {
                index = Some(blob);
            } else if let Some(hex) = name.strip_prefix("blobs/sha256/") {
                self.blobs.insert(format!("sha256:{hex}"), blob);
            }
        }
        // An archive in docker's own layout has none: its images are loaded into nodes, but not served.
        let Some(index) = index else { return Ok(()) };
        let index: Value = serde_json::from_slice(&index.read_all()?)?;
        for manifest in index["manifests"].as_array().into_iter().flatten() {
            let name = manifest["annotations"]["io.containerd.image.name"].as_str();
            if let (Some(name), Some(digest)) = (name, manifest["digest"].as_str()) {
                self.names.insert(name.to_owned(), digest.to_owned());
            }
        }
        Ok(())
    }

    /// The digest of an image by tag or digest; `host` is the registry that the client believes to talk to.
    fn resolve(&self, host: Option<&str>, repository: &str, reference: &str) -> Option<String> {
        if reference.starts_with("sha256:") {
            return Some(reference.to_owned());
        }
        let path = format!("{repository}:{reference}");
        match host {
            Some(host) => self.names.get(&format!("{host}/{path}")).cloned(),
            None => {
                let suffix = format!("/{path}");
                self.names.iter().find(|(name, _)| name.ends_with(&suffix)).map(|(_, digest)| digest.clone())
            }
        }
    }
}

impl Blob {
    fn read(&self, from: u64, most: u64) -> std::io::Result<Vec<u8>> {
        let mut file = File::open(&*self.archive)?;
        file.seek(SeekFrom::Start(self.offset + from))?;
        let mut bytes = Vec::new();
        file.take(most.min(self.size - from)).read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    fn read_all(&self) -> Result<Vec<u8>> {
        ensure!(self.size <= MAX_DOCUMENT, "a document of {} bytes is too large", self.size);
        Ok(self.read(0, self.size)?)
    }

    fn stream(self) -> Body {
        Body::from_stream(stream::try_unfold(0, move |from| {
            let blob = self.clone();
            async move {
                if from >= blob.size {
                    return Ok::<_, std::io::Error>(None);
                }
                let bytes = Bytes::from(blob.read(from, CHUNK)?);
                if bytes.is_empty() {
                    return Err(std::io::ErrorKind::UnexpectedEof.into());
                }
                let next = from + bytes.len() as u64;
                Ok(Some((bytes, next)))
            }
        }))
    }
}

#[derive(Deserialize)]
struct Params {
    ns: Option<String>,
}

async fn answer(
    State(catalogue): State<Arc<Catalogue>>,
    method: Method,
    uri: Uri,
    Query(params): Query<Params>,
) -> Response<Body> {
    let path = uri.path();
    if matches!(path, "/v2" | "/v2/") {
        return document(StatusCode::OK, "application/json", b"{}".to_vec());
    }
    let found = find(&catalogue, params.ns.as_deref(), path);
    let Some((digest, blob, is_manifest)) = found else {
        let errors = json!({"errors": [{"code": "MANIFEST_UNKNOWN", "message": "no image of this cluster"}]});
        return document(StatusCode::NOT_FOUND, "application/json", errors.to_string().into_bytes());
    };
    let media_type = if is_manifest { media_type(&blob) } else { "application/octet-stream".to_owned() };
    let size = blob.size;
    let body = if method == Method::HEAD { Body::empty() } else { blob.stream() };
    Response::builder()
        .header(header::CONTENT_TYPE, media_type)
        .header(header::CONTENT_LENGTH, size)
        .header("Docker-Content-Digest", digest)
        .body(body)
        .unwrap_or_default()
}

/// `/v2/REPOSITORY/manifests/TAG-OR-DIGEST` or `/v2/REPOSITORY/blobs/DIGEST`.
fn find(catalogue: &Catalogue, host: Option<&str>, path: &str) -> Option<(String, Blob, bool)> {
    let (rest, reference) = path.strip_prefix("/v2/")?.rsplit_once('/')?;
    let (repository, kind) = rest.rsplit_once('/')?;
    let digest = match kind {
        "manifests" => catalogue.resolve(host, repository, reference)?,
        "blobs" => reference.to_owned(),
        _ => return None,
    };
    let blob = catalogue.blobs.get(&digest)?.clone();
    Some((digest, blob, kind == "manifests"))
}

fn media_type(manifest: &Blob) -> String {
    let document: Option<Value> = manifest.read_all().ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
    let named = document.as_ref().and_then(|document| document["mediaType"].as_str());
    named.unwrap_or("application/vnd.oci.image.manifest.v1+json").to_owned()
}

fn document(status: StatusCode, media_type: &str, bytes: Vec<u8>) -> Response<Body> {
    let response = Response::builder().status(status).header(header::CONTENT_TYPE, media_type);
    response.body(Body::from(bytes)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::images::oci::{Entry, Image, Layer, write_archive};

    #[test]
    fn images_of_an_archive_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let archive = dir.path().join("a.tar");
        let layer = Layer::new(vec![Entry::file("etc/a", b"content".to_vec(), 0o644)]);
        let image = Image {
            reference: "example.com/some/thing:1",
            layers: vec![layer],
            entrypoint: vec![],
            command: vec!["/x"],
            user: "",
        };
        write_archive(&archive, &[image]).unwrap();
        let mut catalogue = Catalogue::default();
        catalogue.add(&archive).unwrap();
        let manifest = |host, path: &str| find(&catalogue, host, path);
        let (digest, blob, is_manifest) = manifest(Some("example.com"), "/v2/some/thing/manifests/1").unwrap();
        assert!(is_manifest && media_type(&blob).ends_with("+json"));
        assert!(manifest(Some("other.com"), "/v2/some/thing/manifests/1").is_none());
        assert!(manifest(None, "/v2/some/thing/manifests/2").is_none());
        assert_eq!(manifest(None, "/v2/some/thing/manifests/1").unwrap().0, digest);
        assert_eq!(manifest(None, &format!("/v2/any/manifests/{digest}")).unwrap().0, digest);
        let document: Value = serde_json::from_slice(&blob.read_all().unwrap()).unwrap();
        let layer = document["layers"][0]["digest"].as_str().unwrap();
        let (_, blob, _) = manifest(None, &format!("/v2/some/thing/blobs/{layer}")).unwrap();
        assert_eq!(blob.read(0, u64::MAX).unwrap().len() as u64, document["layers"][0]["size"].as_u64().unwrap());
    }
}
