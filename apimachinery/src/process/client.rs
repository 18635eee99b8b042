//! The API client, from a kubeconfig file or from the service account of the pod that the process runs in.

use std::path::{Path, PathBuf};

use clap::Args;
use kube::config::{AuthInfo, KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};

/// Flags of every component that talks to the API server.
#[derive(Args, Clone, Debug, Default)]
pub struct KubeconfigArgs {
    /// Path to a kubeconfig file; without it the pod's service account is used.
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// The address of the API server, over what the kubeconfig says.
    #[arg(long, value_name = "URL")]
    pub master: Option<String>,
}

#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("cannot read kubeconfig {path}")]
    ReadKubeconfig { path: PathBuf, source: kube::config::KubeconfigError },
    #[error("kubeconfig {path} cannot be used")]
    UseKubeconfig { path: PathBuf, source: kube::config::KubeconfigError },
    #[error("no --kubeconfig given and not inside a cluster")]
    InCluster(#[source] kube::config::InClusterError),
    #[error("--master {url} is not a URL")]
    Master { url: String, source: http::uri::InvalidUri },
    #[error("cannot build the API client")]
    Build(#[source] kube::Error),
}

impl KubeconfigArgs {
    pub async fn client(&self, user_agent: &str) -> Result<Client, ClientError> {
        build(self.config().await?, user_agent)
    }

    /// A client of the same server that has no credentials, for requests that bring their own.
    pub async fn anonymous_client(&self, user_agent: &str) -> Result<Client, ClientError> {
        let mut config = self.config().await?;
        config.auth_info = AuthInfo::default();
        build(config, user_agent)
    }

    async fn config(&self) -> Result<Config, ClientError> {
        let mut config = load(self.kubeconfig.as_deref()).await?;
        if let Some(url) = &self.master {
            config.cluster_url = url.parse().map_err(|source| ClientError::Master { url: url.clone(), source })?;
        }
        Ok(config)
    }
}

/// A client for the given kubeconfig file.
pub async fn client_from_kubeconfig(path: &Path, user_agent: &str) -> Result<Client, ClientError> {
    build(load(Some(path)).await?, user_agent)
}

async fn load(path: Option<&Path>) -> Result<Config, ClientError> {
    let Some(path) = path else {
        return Config::incluster().map_err(ClientError::InCluster);
    };
    let kubeconfig =
        Kubeconfig::read_from(path).map_err(|source| ClientError::ReadKubeconfig { path: path.to_owned(), source })?;
    Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
        .await
        .map_err(|source| ClientError::UseKubeconfig { path: path.to_owned(), source })
}

fn build(mut config: Config, user_agent: &str) -> Result<Client, ClientError> {
    config.headers.push((
        http::header::USER_AGENT,
        http::HeaderValue::from_str(user_agent).unwrap_or_else(|_| http::HeaderValue::from_static("ketch")),
    ));
    Client::try_from(config).map_err(ClientError::Build)
}
