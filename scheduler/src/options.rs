//! Flags and the `KubeSchedulerConfiguration` file, in upstream's names. What the file says wins over the defaults of
//! flags; settings that this scheduler does not have are named in the log.

use std::path::{Path, PathBuf};

use apimachinery::controller::LeaderElectionArgs;
use apimachinery::process::{KubeconfigArgs, LogArgs, SecureServingArgs};
use clap::Parser;
use serde::Deserialize;

#[derive(Parser, Clone, Debug)]
#[command(name = "kube-scheduler", version = apimachinery::process::KUBERNETES_VERSION)]
pub struct Options {
    #[command(flatten)]
    pub kubeconfig: KubeconfigArgs,
    /// A KubeSchedulerConfiguration file.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    #[command(flatten)]
    pub serving: SecureServingArgs,
    #[command(flatten)]
    pub leader_election: LeaderElectionArgs,
    /// Accepted for compatibility: health and metrics need no authentication here.
    #[arg(long, value_name = "FILE")]
    pub authentication_kubeconfig: Option<PathBuf>,
    /// Accepted for compatibility: health and metrics need no authorization here.
    #[arg(long, value_name = "FILE")]
    pub authorization_kubeconfig: Option<PathBuf>,
    #[command(flatten)]
    pub logs: LogArgs,
}

/// The parts of KubeSchedulerConfiguration that are used.
/// <https://kubernetes.io/docs/reference/config-api/kube-scheduler-config.v1/>
#[derive(Deserialize, Clone, Debug, Default)]
#[serde(rename_all = "camelCase", default)]
pub struct Configuration {
    pub api_version: String,
    pub kind: String,
    pub client_connection: ClientConnection,
    pub leader_election: LeaderElectionConfiguration,
    pub profiles: Vec<Profile>,
}

#[derive(Deserialize, Clone, Debug, Default)]
#[serde(rename_all = "camelCase", default)]
pub struct ClientConnection {
    pub kubeconfig: String,
}

#[derive(Deserialize, Clone, Debug, Default)]
#[serde(rename_all = "camelCase", default)]
pub struct LeaderElectionConfiguration {
    pub leader_elect: Option<bool>,
    pub resource_name: Option<String>,
    pub resource_namespace: Option<String>,
}

#[derive(Deserialize, Clone, Debug, Default)]
#[serde(rename_all = "camelCase", default)]
pub struct Profile {
    pub scheduler_name: Option<String>,
    pub plugins: Option<serde_json::Value>,
    pub plugin_config: Option<serde_json::Value>,
}

#[derive(Debug, thiserror::Error)]
pub enum ConfigurationError {
    #[error("cannot read {path}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{path} is not a KubeSchedulerConfiguration")]
    Parse { path: PathBuf, source: Box<serde_saphyr::Error> },
    #[error(
        "{path}: expected kind KubeSchedulerConfiguration of kubescheduler.config.k8s.io/v1, found {kind} of {api_version}"
    )]
    Kind { path: PathBuf, kind: String, api_version: String },
}

impl Options {
    /// Reads the configuration file and lets it overrule the flags. Answers the names of the profiles to serve.
    pub fn complete(&mut self) -> Result<Vec<String>, ConfigurationError> {
        let configuration = match self.config.clone() {
            Some(path) => Configuration::read(&path)?,
            None => Configuration::default(),
        };
        if !configuration.client_connection.kubeconfig.is_empty() {
            self.kubeconfig.kubeconfig = Some(configuration.client_connection.kubeconfig.into());
        }
        let election = configuration.leader_election;
        if let Some(elect) = election.leader_elect {
            self.leader_election.leader_elect = elect;
        }
        if election.resource_name.is_some() {
            self.leader_election.leader_elect_resource_name = election.resource_name;
        }
        if let Some(namespace) = election.resource_namespace {
            self.leader_election.leader_elect_resource_namespace = namespace;
        }
        let mut names = Vec::new();
        for profile in configuration.profiles {
            let name = profile.scheduler_name.unwrap_or_else(|| DEFAULT_PROFILE.to_owned());
            if profile.plugins.is_some() || profile.plugin_config.is_some() {
                tracing::warn!(
                    profile = name,
                    "plugins and pluginConfig are not used: every profile has the default plugins"
                );
            }
            names.push(name);
        }
        if names.is_empty() {
            names.push(DEFAULT_PROFILE.to_owned());
        }
        Ok(names)
    }
}

pub const DEFAULT_PROFILE: &str = "default-scheduler";

impl Configuration {
    fn read(path: &Path) -> Result<Self, ConfigurationError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigurationError::Read { path: path.to_owned(), source })?;
        let configuration: Self = serde_saphyr::from_str(&text)
            .map_err(|source| ConfigurationError::Parse { path: path.to_owned(), source: Box::new(source) })?;
        if configuration.kind != "KubeSchedulerConfiguration"
            || !configuration.api_version.starts_with("kubescheduler.config.k8s.io/")
        {
            let Self { kind, api_version, .. } = configuration;
            return Err(ConfigurationError::Kind { path: path.to_owned(), kind, api_version });
        }
        Ok(configuration)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_overrules_flags() {
        let dir = std::env::temp_dir().join(format!("scheduler-options-{}", std::process::id()));
        std::fs::write(
            &dir,
            "apiVersion: kubescheduler.config.k8s.io/v1\nkind: KubeSchedulerConfiguration\n\
             leaderElection: {leaderElect: false}\nprofiles: [{schedulerName: a}, {schedulerName: b}]\n",
        )
        .unwrap();
        let mut options = Options::parse_from(["kube-scheduler", "--config", dir.to_str().unwrap()]);
        assert_eq!(options.complete().unwrap(), ["a", "b"]);
        assert!(!options.leader_election.leader_elect);
        std::fs::write(&dir, "apiVersion: v1\nkind: Pod\n").unwrap();
        assert!(matches!(options.complete(), Err(ConfigurationError::Kind { .. })));
        std::fs::remove_file(&dir).unwrap();
    }
}
