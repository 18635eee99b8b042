//! The files that say how to reach a webhook: kubeconfig's format, where the "cluster" is the webhook and the "user" is
//! this server. Files that it names are beside it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use apimachinery::codec::yaml;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http::HeaderValue;
use serde_json::Value;

use crate::http::json_client::JsonClient;
use crate::http::outbound::{OutboundError, Trust};
use crate::registry::object::ObjectExt;

#[derive(Debug, thiserror::Error)]
pub enum KubeconfigError {
    #[error("cannot read {path}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{path} is no YAML: {why}")]
    Yaml { path: PathBuf, why: String },
    #[error("{path}: {what}")]
    Content { path: PathBuf, what: String },
    #[error("{path}: cannot connect as it says")]
    Client { path: PathBuf, source: OutboundError },
}

/// A webhook that can be asked.
pub struct Webhook {
    pub url: String,
    pub client: JsonClient,
}

/// Reads a file of YAML or JSON.
pub fn read_yaml(path: &Path) -> Result<Value, KubeconfigError> {
    let bytes = std::fs::read(path).map_err(|source| KubeconfigError::Read { path: path.to_owned(), source })?;
    let decoded = yaml::parse(&bytes);
    decoded
        .map(|decoded| decoded.value)
        .map_err(|error| KubeconfigError::Yaml { path: path.to_owned(), why: error.to_string() })
}

impl Webhook {
    /// The webhook of the file's current context.
    pub fn read(path: &Path, timeout: Duration) -> Result<Self, KubeconfigError> {
        File { path, config: read_yaml(path)? }.webhook(timeout)
    }
}

struct File<'a> {
    path: &'a Path,
    config: Value,
}

impl File<'_> {
    fn wrong(&self, what: impl Into<String>) -> KubeconfigError {
        KubeconfigError::Content { path: self.path.to_owned(), what: what.into() }
    }

    fn named(&self, list: &str, part: &str, name: &str) -> Result<&Value, KubeconfigError> {
        let entry = self.config.list_at(&[list]).iter().find(|entry| entry.str_at(&["name"]) == name);
        entry.map(|entry| &entry[part]).ok_or_else(|| self.wrong(format!("{list} has nothing named {name:?}")))
    }

    fn beside(&self, name: &str) -> PathBuf {
        self.path.parent().unwrap_or(Path::new("")).join(name)
    }

    fn read(&self, name: &str) -> Result<Vec<u8>, KubeconfigError> {
        let path = self.beside(name);
        std::fs::read(&path).map_err(|source| KubeconfigError::Read { path, source })
    }

    fn webhook(&self, timeout: Duration) -> Result<Webhook, KubeconfigError> {
        let context = match self.config.str_at(&["current-context"]) {
            "" => return Err(self.wrong("current-context must name one of the contexts")),
            name => self.named("contexts", "context", name)?,
        };
        let cluster = self.named("clusters", "cluster", context.str_at(&["cluster"]))?;
        let nobody = Value::Null;
        let user = match context.str_at(&["user"]) {
            "" => &nobody,
            name => self.named("users", "user", name)?,
        };
        let url = cluster.str_at(&["server"]);
        if url.is_empty() {
            return Err(self.wrong("the cluster has no server"));
        }
        let authority = self.authority(cluster)?;
        let trust = match &authority {
            _ if cluster["insecure-skip-tls-verify"] == true => Trust::Anyone,
            Some(pem) => Trust::Pem(pem),
            None => Trust::System,
        };
        let certificate = self.certificate(user)?;
        let files = certificate.as_ref().map(|files| (files.certificate.as_path(), files.key.as_path()));
        let client = JsonClient::new(trust, files, timeout)
            .map_err(|source| KubeconfigError::Client { path: self.path.to_owned(), source })?;
        Ok(Webhook { url: url.to_owned(), client: client.authorized(self.authorization(user)?) })
    }

    fn authority(&self, cluster: &Value) -> Result<Option<Vec<u8>>, KubeconfigError> {
        let (data, file) =
            (cluster.str_at(&["certificate-authority-data"]), cluster.str_at(&["certificate-authority"]));
        match (data, file) {
            ("", "") => Ok(None),
            ("", file) => self.read(file).map(Some),
            (data, _) => self.decoded(data, "certificate-authority-data").map(Some),
        }
    }

    fn decoded(&self, text: &str, field: &str) -> Result<Vec<u8>, KubeconfigError> {
        STANDARD.decode(text).map_err(|_| self.wrong(format!("{field} is not base64")))
    }

    fn certificate(&self, user: &Value) -> Result<Option<CertificateFiles>, KubeconfigError> {
        let (data, file) = (user.str_at(&["client-certificate-data"]), user.str_at(&["client-certificate"]));
        let (key_data, key_file) = (user.str_at(&["client-key-data"]), user.str_at(&["client-key"]));
        if [data, file, key_data, key_file].iter().all(|text| text.is_empty()) {
            return Ok(None);
        }
        if !data.is_empty() || !key_data.is_empty() {
            return Err(self.wrong("client-certificate-data and client-key-data are not supported, only files are"));
        }
        if file.is_empty() || key_file.is_empty() {
            return Err(self.wrong("client-certificate and client-key must be given together"));
        }
        Ok(Some(CertificateFiles { certificate: self.beside(file), key: self.beside(key_file) }))
    }

    fn authorization(&self, user: &Value) -> Result<Option<HeaderValue>, KubeconfigError> {
        let (token, file, name) = (user.str_at(&["token"]), user.str_at(&["tokenFile"]), user.str_at(&["username"]));
        let text = match (token, file, name) {
            ("", "", "") => return Ok(None),
            ("", "", name) => {
                let pair = format!("{name}:{}", user.str_at(&["password"]));
                format!("Basic {}", STANDARD.encode(pair))
            }
            ("", file, _) => {
                let token = self.read(file)?;
                format!("Bearer {}", String::from_utf8_lossy(&token).trim())
            }
            (token, _, _) => format!("Bearer {token}"),
        };
        let mut value = HeaderValue::from_str(&text).map_err(|_| self.wrong("the user's token cannot be sent"))?;
        value.set_sensitive(true);
        Ok(Some(value))
    }
}

struct CertificateFiles {
    certificate: PathBuf,
    key: PathBuf,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<String, String> {
        apimachinery::process::install_crypto_provider();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("hook.yaml");
        std::fs::write(&path, text).unwrap();
        let webhook = Webhook::read(&path, Duration::from_secs(1));
        let shown = path.display().to_string();
        webhook.map(|webhook| webhook.url).map_err(|error| error.to_string().replace(&shown, "F"))
    }

    #[test]
    fn files_name_one_webhook() {
        let file = |rest: &str| {
            format!(
                "clusters: [{{name: c, cluster: {{server: 'https://x/y', insecure-skip-tls-verify: true}}}}]\nusers: [{{name: u, user: {{token: t}}}}]\n{rest}"
            )
        };
        let contexts = "contexts: [{name: k, context: {cluster: c, user: u}}]\n";
        assert_eq!(read(&file(&format!("{contexts}current-context: k"))), Ok("https://x/y".into()));
        assert_eq!(read(&file(contexts)), Err("F: current-context must name one of the contexts".into()));
        let other = format!("{contexts}current-context: other");
        assert_eq!(read(&file(&other)), Err("F: contexts has nothing named \"other\"".into()));
    }
}
