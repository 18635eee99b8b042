//! Writes container images as an OCI archive, which containerd imports. Only what the project's own images need:
//! one platform, gzip layers, no base images from outside. Equal input gives equal bytes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

const MEDIA: &str = "application/vnd.oci.image";

pub struct Image<'a> {
    /// The full name with its tag.
    pub reference: &'a str,
    pub layers: Vec<Layer>,
    pub entrypoint: Vec<&'a str>,
    pub command: Vec<&'a str>,
    /// `uid:gid`, or empty for root.
    pub user: &'a str,
}

#[derive(Clone)]
pub struct Layer {
    entries: Vec<Entry>,
}

#[derive(Clone)]
pub struct Entry {
    path: String,
    mode: u32,
    content: Content,
}

#[derive(Clone)]
enum Content {
    File(Vec<u8>),
    Dir,
    Link(String),
}

impl Entry {
    pub fn file(path: &str, bytes: Vec<u8>, mode: u32) -> Self {
        Self { path: path.into(), mode, content: Content::File(bytes) }
    }

    pub fn dir(path: &str, mode: u32) -> Self {
        Self { path: path.into(), mode, content: Content::Dir }
    }

    pub fn path(&self) -> &str {
        &self.path
    }

    pub fn link(path: &str, target: &str) -> Self {
        Self { path: path.into(), mode: 0o777, content: Content::Link(target.into()) }
    }
}

impl Layer {
    pub fn new(entries: Vec<Entry>) -> Self {
        Self { entries }
    }

    fn tar(&self) -> Result<Vec<u8>> {
        let mut builder = tar::Builder::new(Vec::new());
        for entry in &self.entries {
            let mut header = tar::Header::new_gnu();
            header.set_mode(entry.mode);
            header.set_uid(0);
            header.set_gid(0);
            header.set_mtime(0);
            match &entry.content {
                Content::File(bytes) => {
                    header.set_entry_type(tar::EntryType::Regular);
                    header.set_size(bytes.len() as u64);
                    builder.append_data(&mut header, &entry.path, bytes.as_slice())
                }
                Content::Dir => {
                    header.set_entry_type(tar::EntryType::Directory);
                    header.set_size(0);
                    builder.append_data(&mut header, format!("{}/", entry.path), std::io::empty())
                }
                Content::Link(target) => {
                    header.set_entry_type(tar::EntryType::Symlink);
                    header.set_size(0);
                    builder.append_link(&mut header, &entry.path, target)
                }
            }
            .with_context(|| format!("cannot add {} to a layer", entry.path))?;
        }
        builder.into_inner().context("cannot finish a layer")
    }
}

/// Where blobs go while an image is put together. Storing one answers its descriptor.
trait BlobStore {
    fn put(&mut self, digest: &str, bytes: &[u8]) -> Result<()>;

    fn blob(&mut self, media_type: &str, bytes: &[u8]) -> Result<Value> {
        let digest = sha256(bytes);
        self.put(&digest, bytes)?;
        Ok(json!({"mediaType": media_type, "digest": format!("sha256:{digest}"), "size": bytes.len()}))
    }

    /// Stores an image's layers, configuration and manifest; answers the manifest's descriptor.
    fn image(&mut self, image: &Image<'_>) -> Result<Value> {
        let mut layers = Vec::new();
        let mut diff_ids = Vec::new();
        for layer in &image.layers {
            let tar = layer.tar()?;
            diff_ids.push(format!("sha256:{}", sha256(&tar)));
            let mut gzip = GzEncoder::new(Vec::new(), Compression::fast());
            gzip.write_all(&tar).context("cannot compress a layer")?;
            let bytes = gzip.finish().context("cannot compress a layer")?;
            layers.push(self.blob(&format!("{MEDIA}.layer.v1.tar+gzip"), &bytes)?);
        }
        let config =
            self.blob(&format!("{MEDIA}.config.v1+json"), configuration(image, &diff_ids).to_string().as_bytes())?;
        let manifest_type = format!("{MEDIA}.manifest.v1+json");
        let manifest = json!({"schemaVersion": 2, "mediaType": manifest_type, "config": config, "layers": layers});
        let mut descriptor = self.blob(&manifest_type, manifest.to_string().as_bytes())?;
        descriptor["platform"] = json!({"architecture": architecture(), "os": "linux"});
        Ok(descriptor)
    }
}

/// What a container of the image runs with.
fn configuration(image: &Image<'_>, diff_ids: &[String]) -> Value {
    let mut config = json!({"Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]});
    for (key, value) in [("Entrypoint", &image.entrypoint), ("Cmd", &image.command)] {
        if !value.is_empty() {
            config[key] = json!(value);
        }
    }
    if !image.user.is_empty() {
        config["User"] = json!(image.user);
    }
    json!({
        "architecture": architecture(),
        "os": "linux",
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    })
}

/// An archive under construction: each blob is written once.
struct Archive {
    tar: tar::Builder<File>,
    blobs: BTreeSet<String>,
}

impl BlobStore for Archive {
    fn put(&mut self, digest: &str, bytes: &[u8]) -> Result<()> {
        if self.blobs.insert(digest.to_owned()) {
            self.file(&format!("blobs/sha256/{digest}"), bytes)?;
        }
        Ok(())
    }
}

/// An image's parts as a registry serves them.
pub struct Served {
    /// Layers and configuration by digest, with the `sha256:` before it.
    pub blobs: BTreeMap<String, Vec<u8>>,
    pub manifest: (String, Vec<u8>),
    pub index: (String, Vec<u8>),
}

impl BlobStore for BTreeMap<String, Vec<u8>> {
    fn put(&mut self, digest: &str, bytes: &[u8]) -> Result<()> {
        self.insert(format!("sha256:{digest}"), bytes.to_vec());
        Ok(())
    }
}

/// Puts an image together in memory.
pub fn blobs(image: &Image<'_>) -> Result<Served> {
    let mut blobs = BTreeMap::new();
    let descriptor = blobs.image(image)?;
    let digest = descriptor["digest"].as_str().context("the manifest has no digest")?.to_owned();
    let manifest = blobs.remove(&digest).context("the manifest was not stored")?;
    let index = json!({"schemaVersion": 2, "mediaType": format!("{MEDIA}.index.v1+json"), "manifests": [descriptor]});
    let index = index.to_string().into_bytes();
    Ok(Served { blobs, manifest: (digest, manifest), index: (format!("sha256:{}", sha256(&index)), index) })
}

impl Archive {
    fn file(&mut self, path: &str, bytes: &[u8]) -> Result<()> {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_mtime(0);
        header.set_size(bytes.len() as u64);
        self.tar.append_data(&mut header, path, bytes).with_context(|| format!("cannot write {path}"))
    }
}

/// Writes the images into one archive.
pub fn write_archive(path: &Path, images: &[Image<'_>]) -> Result<()> {
    let file = File::create(path).with_context(|| format!("cannot create {}", path.display()))?;
    let mut archive = Archive { tar: tar::Builder::new(file), blobs: BTreeSet::new() };
    archive.file("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    let mut manifests = Vec::new();
    for image in images {
        let mut descriptor = archive.image(image).with_context(|| format!("cannot build {}", image.reference))?;
        descriptor["annotations"] = json!({"io.containerd.image.name": image.reference});
        manifests.push(descriptor);
    }
    let index = json!({"schemaVersion": 2, "manifests": manifests});
    archive.file("index.json", index.to_string().as_bytes())?;
    archive.tar.finish().with_context(|| format!("cannot finish {}", path.display()))
}

fn sha256(bytes: &[u8]) -> String {
    use std::fmt::Write;
    Sha256::digest(bytes).iter().fold(String::with_capacity(64), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// The platform's name in Go's words.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_input_gives_equal_archives_and_shared_layers_are_stored_once() {
        let layer = Layer::new(vec![
            Entry::dir("bin", 0o755),
            Entry::file("bin/a", b"a".to_vec(), 0o755),
            Entry::link("bin/b", "a"),
        ]);
        let image = |reference| Image {
            reference,
            layers: vec![layer.clone()],
            entrypoint: vec!["/bin/a"],
            command: vec![],
            user: "",
        };
        let dir = tempfile::tempdir().unwrap();
        let (first, second) = (dir.path().join("1.tar"), dir.path().join("2.tar"));
        for path in [&first, &second] {
            write_archive(path, &[image("x/a:1"), image("x/b:1")]).unwrap();
        }
        let bytes = std::fs::read(&first).unwrap();
        assert_eq!(bytes, std::fs::read(&second).unwrap());
        let mut names: Vec<String> = tar::Archive::new(bytes.as_slice())
            .entries()
            .unwrap()
            .map(|e| e.unwrap().path().unwrap().display().to_string())
            .collect();
        names.sort();
        // One layer, one config and one manifest are shared by both names.
        assert_eq!(names.iter().filter(|n| n.starts_with("blobs/")).count(), 3, "{names:?}");
    }
}
