//! Kubeconfig files with everything embedded, so that they can be copied anywhere.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::json;

/// Writes a kubeconfig for the certificate `<name>.crt` in `pki`. JSON is YAML too.
pub fn write(path: &Path, url: &str, pki: &Path, name: &str) -> Result<()> {
    let embedded = |file: String| -> Result<String> {
        let file = pki.join(file);
        Ok(STANDARD.encode(fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?))
    };
    let config = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "ketch", "cluster": {
            "server": url,
            "certificate-authority-data": embedded("ca.crt".into())?,
        }}],
        "users": [{"name": name, "user": {
            "client-certificate-data": embedded(format!("{name}.crt"))?,
            "client-key-data": embedded(format!("{name}.key"))?,
        }}],
        "contexts": [{"name": "ketch", "context": {"cluster": "ketch", "user": name}}],
        "current-context": "ketch",
    });
    let text = serde_json::to_vec_pretty(&config).context("cannot encode a kubeconfig")?;
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}
