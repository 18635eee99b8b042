//! The kubelet's own certificates, when it gets them from the cluster: the first one with a bootstrap kubeconfig, later
//! ones before the last expires; the same for the certificate of its server. On disk they lie where upstream keeps
//! them, so that either kubelet can go on with the other's.

mod client;
mod live;
mod request;
mod store;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use apimachinery::process::{ClientError, client_from_kubeconfig};
use jiff::Timestamp;
use kube::Client;
use kube::config::Kubeconfig;

pub use client::client;
pub use live::Live;
pub use request::{RequestError, Wanted};
pub use store::{Pair, Store, StoreError};

/// After a request that failed.
const RETRY: Duration = Duration::from_secs(60);

#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    #[error("cannot use the bootstrap kubeconfig")]
    Bootstrap(#[from] ClientError),
    #[error("cannot get a client certificate with the bootstrap kubeconfig")]
    Request(#[from] RequestError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("cannot read kubeconfig {path}")]
    ReadKubeconfig { path: PathBuf, source: kube::config::KubeconfigError },
    #[error("cannot build the API client")]
    Client(#[source] kube::Error),
    #[error("cannot encode the kubeconfig")]
    Encode(#[source] serde_json::Error),
    #[error("cannot write kubeconfig {path}")]
    WriteKubeconfig { path: PathBuf, source: std::io::Error },
}

/// Makes `kubeconfig` usable: if it is missing, or its certificate in `store` has expired, the bootstrap credentials
/// are used to get a certificate, and the kubeconfig is written to point to it.
pub async fn bootstrap(
    bootstrap_kubeconfig: &Path,
    kubeconfig: &Path,
    store: &Store,
    wanted: &Wanted,
    user_agent: &str,
) -> Result<(), CertificateError> {
    let is_good = store.current().is_ok_and(|pair| pair.is_some_and(|pair| pair.not_after > Timestamp::now()));
    // One that is not ours may hold any other credentials: it is the user's.
    let is_foreign = kubeconfig.exists() && store.current().is_ok_and(|pair| pair.is_none());
    if kubeconfig.exists() && (is_good || is_foreign) {
        return Ok(());
    }
    tracing::info!(kubeconfig = %bootstrap_kubeconfig.display(), "getting a client certificate");
    let client = client_from_kubeconfig(bootstrap_kubeconfig, user_agent).await?;
    let pair = request::issue(&client, wanted).await?;
    store.keep(&pair)?;
    write_kubeconfig(bootstrap_kubeconfig, kubeconfig, &store.current_path())
}

/// The bootstrap kubeconfig's cluster with the certificate as the user.
fn write_kubeconfig(source: &Path, target: &Path, certificate: &Path) -> Result<(), CertificateError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| CertificateError::ReadKubeconfig { path, source }
    };
    let known = Kubeconfig::read_from(source).map_err(failed(source))?;
    let context = known.current_context.as_deref().unwrap_or_default();
    let named = known.contexts.iter().find(|named| named.name == context);
    let cluster = named.and_then(|named| named.context.as_ref()).map(|context| context.cluster.clone());
    let cluster = known.clusters.iter().find(|named| cluster.as_ref().is_none_or(|name| *name == named.name));
    let document = serde_json::json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "default-cluster", "cluster": cluster.and_then(|named| named.cluster.as_ref())}],
        "users": [{"name": "default-auth", "user": {"client-certificate": certificate, "client-key": certificate}}],
        "contexts": [{"name": "default-context", "context": {"cluster": "default-cluster", "user": "default-auth"}}],
        "current-context": "default-context",
    });
    let text = serde_json::to_string_pretty(&document).map_err(CertificateError::Encode)?;
    store::write_private(target, &text)
        .map_err(|source| CertificateError::WriteKubeconfig { path: target.to_owned(), source })
}

/// Keeps a certificate fresh until the process ends: `live` shows the stored one, and each new one once it is issued.
/// `wanted` is asked each time, as the node's addresses may change; while it has no answer nothing is requested.
pub async fn rotate(client: Client, store: Store, live: Arc<Live>, wanted: impl Fn() -> Option<Wanted>) {
    loop {
        let current = store.current().unwrap_or_else(|error| {
            tracing::warn!(%error, "the stored certificate cannot be used");
            None
        });
        let due = current.as_ref().map_or(Timestamp::UNIX_EPOCH, Pair::renew_at);
        if let Some(pair) = &current
            && let Err(error) = live.show(pair)
        {
            tracing::warn!(%error, "the stored certificate cannot be shown");
        }
        let wait = Duration::try_from(due.duration_since(Timestamp::now())).unwrap_or_default();
        tokio::time::sleep(wait).await;
        let Some(wanted) = wanted() else {
            tokio::time::sleep(RETRY / 30).await;
            continue;
        };
        tracing::info!(signer = wanted.signer, "asking for a certificate");
        let renewed = match request::issue(&client, &wanted).await {
            Ok(pair) => store.keep(&pair).map_err(|error| error.to_string()),
            Err(error) => Err(apimachinery::process::error_chain(&error)),
        };
        if let Err(error) = renewed {
            tracing::warn!(error, signer = wanted.signer, "cannot renew a certificate");
            tokio::time::sleep(RETRY).await;
        }
    }
}

/// What the node's client certificate is asked for with.
pub fn client_wanted(node: &str) -> Wanted {
    Wanted {
        signer: "kubernetes.io/kube-apiserver-client-kubelet",
        usages: &["digital signature", "client auth"],
        common_name: format!("system:node:{node}"),
        names: Vec::new(),
    }
}

/// What the certificate of the node's server is asked for with: the names and addresses under which it is reached.
pub fn server_wanted(node: &str, names: Vec<String>) -> Wanted {
    Wanted {
        signer: "kubernetes.io/kubelet-serving",
        usages: &["digital signature", "server auth"],
        common_name: format!("system:node:{node}"),
        names,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kubeconfig_points_to_the_certificate() {
        let dir = tempfile::tempdir().unwrap();
        let (source, target) = (dir.path().join("bootstrap"), dir.path().join("kubeconfig"));
        let text = "apiVersion: v1\nkind: Config\nclusters: [{name: a, cluster: {server: 'https://other:1'}}, \
            {name: b, cluster: {server: 'https://api:6443', certificate-authority-data: QQ==}}]\n\
            contexts: [{name: x, context: {cluster: b, user: u}}]\ncurrent-context: x\nusers: [{name: u, user: {token: t}}]\n";
        std::fs::write(&source, text).unwrap();
        write_kubeconfig(&source, &target, Path::new("/pki/current.pem")).unwrap();
        let written = Kubeconfig::read_from(&target).unwrap();
        let cluster = written.clusters[0].cluster.as_ref().unwrap();
        assert_eq!(cluster.server.as_deref(), Some("https://api:6443"));
        assert_eq!(cluster.certificate_authority_data.as_deref(), Some("QQ=="));
        let user = written.auth_infos[0].auth_info.as_ref().unwrap();
        assert_eq!(user.client_certificate.as_deref(), Some("/pki/current.pem"));
        assert!(user.token.is_none());
    }
}
