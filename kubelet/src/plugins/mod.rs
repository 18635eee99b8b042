//! Plugins that announce themselves by a socket in the node's `plugins_registry` directory: drivers of volumes
//! (`CSIPlugin`), of devices (`DevicePlugin`) and of dynamic resources (`DRAPlugin`).
//!
//! One actor for each socket: it asks who is there, hands the plugin to the handler of its type, tries again until that
//! succeeds, and takes the plugin back when the socket has gone or has been replaced. The registrar only compares the
//! sockets that exist with the actors that run; what a plugin is good for is its handler's business.

mod api;
mod sockets;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use apimachinery::process::CancellationToken;
use async_trait::async_trait;
use tokio::task::JoinHandle;
use tonic::transport::Channel;

use crate::directory_watch::DirectoryWatch;
use crate::grpc::{self, CallError};
use sockets::Identity;

/// First delay before another attempt to register a plugin; doubles up to [`RETRY_MAX`]. Both are upstream's.
const RETRY: Duration = Duration::from_millis(500);
const RETRY_MAX: Duration = Duration::from_secs(122);
const ASK_WITHIN: Duration = Duration::from_secs(1);
const TELL_WITHIN: Duration = Duration::from_secs(5);
/// The safety net under the directory's watch.
const LOOK_EVERY: Duration = Duration::from_secs(10);

/// A plugin as it describes itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plugin {
    pub name: String,
    /// The socket of the plugin's own service.
    pub endpoint: PathBuf,
    pub versions: Vec<String>,
}

/// Why a plugin is not taken; the plugin gets the text.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Refusal(pub String);

/// What becomes of plugins of one type. A handler may be given up in the middle of [`Handler::register`]; `deregister`
/// follows then as well.
#[async_trait]
pub trait Handler: Send + Sync {
    /// Whether the plugin could be registered at all.
    fn validate(&self, plugin: &Plugin) -> Result<(), Refusal>;
    async fn register(&self, plugin: &Plugin) -> Result<(), Refusal>;
    /// Its socket has gone.
    async fn deregister(&self, plugin: &Plugin);
}

#[derive(Debug, thiserror::Error)]
enum RegisterError {
    #[error("failed to get plugin info using RPC GetInfo at socket {socket}, err: {source}")]
    Ask { socket: PathBuf, source: CallError },
    #[error("no handler registered for plugin type: {kind} at socket {socket}")]
    NoHandler { kind: String, socket: PathBuf },
    #[error("plugin validation failed with err: {0}")]
    Invalid(Refusal),
    #[error("plugin registration failed with err: {0}")]
    Refused(Refusal),
    #[error("failed to send registration status at socket {socket}, err: {source}")]
    Tell { socket: PathBuf, source: CallError },
}

pub type Handlers = HashMap<&'static str, Arc<dyn Handler>>;

struct Entry {
    identity: Identity,
    gone: CancellationToken,
    actor: JoinHandle<()>,
}

pub struct Registrar {
    directory: PathBuf,
    handlers: Arc<Handlers>,
    known: HashMap<PathBuf, Entry>,
}

impl Registrar {
    /// `handlers` by the type that plugins give themselves.
    pub fn new(directory: PathBuf, handlers: Handlers) -> Self {
        Self { directory, handlers: Arc::new(handlers), known: HashMap::new() }
    }

    /// Runs until the process ends.
    pub async fn run(mut self) {
        let mut watch = DirectoryWatch::new().unwrap_or_else(|error| {
            tracing::warn!(%error, "cannot watch for plugins, looking from time to time");
            DirectoryWatch::blind()
        });
        loop {
            if let Err(error) = std::fs::create_dir_all(&self.directory) {
                tracing::warn!(path = %self.directory.display(), %error, "cannot create the directory of plugins");
            }
            let found = sockets::find(&self.directory, &watch);
            self.follow(found);
            watch.changed(LOOK_EVERY).await;
        }
    }

    /// Starts actors for new sockets and ends those of sockets that are not there any more.
    fn follow(&mut self, found: HashMap<PathBuf, Identity>) {
        self.known.retain(|path, entry| {
            if !found.contains_key(path) {
                entry.gone.cancel();
            }
            // One that is still busy with its end is kept, so that a successor can wait for it.
            found.contains_key(path) || !entry.actor.is_finished()
        });
        for (path, identity) in found {
            let earlier = match self.known.remove(&path) {
                Some(entry) if entry.identity == identity && !entry.gone.is_cancelled() => {
                    self.known.insert(path, entry);
                    continue;
                }
                earlier => earlier,
            };
            let gone = CancellationToken::new();
            let actor = Actor { socket: path.clone(), handlers: self.handlers.clone(), gone: gone.clone() };
            let actor = tokio::spawn(async move {
                if let Some(entry) = earlier {
                    entry.gone.cancel();
                    if let Err(error) = entry.actor.await {
                        tracing::error!(%error, "the registration of a plugin failed unexpectedly");
                    }
                }
                actor.run().await;
            });
            self.known.insert(path, Entry { identity, gone, actor });
        }
    }
}

/// The life of one socket.
struct Actor {
    socket: PathBuf,
    handlers: Arc<Handlers>,
    gone: CancellationToken,
}

impl Actor {
    async fn run(self) {
        let mut registered = None;
        let done = self.gone.run_until_cancelled(self.register_until_done(&mut registered)).await;
        if done.is_some() {
            self.gone.cancelled().await;
        }
        if let Some((handler, plugin)) = registered {
            tracing::info!(plugin = plugin.name, socket = %self.socket.display(), "a plugin has gone");
            handler.deregister(&plugin).await;
        }
    }

    /// `registered` names the plugin from the moment on from which it has to be taken back.
    async fn register_until_done(&self, registered: &mut Option<(Arc<dyn Handler>, Plugin)>) {
        let mut delay = RETRY;
        loop {
            match self.register(registered).await {
                Ok(()) => return,
                Err(error) => {
                    let retry_in = delay.as_millis();
                    tracing::warn!(%error, socket = %self.socket.display(), retry_in, "cannot register a plugin");
                }
            }
            tokio::time::sleep(delay).await;
            delay = (delay * 2).min(RETRY_MAX);
        }
    }

    async fn register(&self, registered: &mut Option<(Arc<dyn Handler>, Plugin)>) -> Result<(), RegisterError> {
        let socket = || self.socket.clone();
        let channel = grpc::channel(&self.socket);
        let info = api::get_info(&channel, ASK_WITHIN)
            .await
            .map_err(|source| RegisterError::Ask { socket: socket(), source })?;
        let endpoint = if info.endpoint.is_empty() { socket() } else { PathBuf::from(info.endpoint) };
        let plugin = Plugin { name: info.name, endpoint, versions: info.supported_versions };
        let Some(handler) = self.handlers.get(info.r#type.as_str()) else {
            let error = RegisterError::NoHandler { kind: info.r#type, socket: socket() };
            return self.refuse(&channel, error).await;
        };
        if let Err(refusal) = handler.validate(&plugin) {
            return self.refuse(&channel, RegisterError::Invalid(refusal)).await;
        }
        *registered = Some((handler.clone(), plugin.clone()));
        if let Err(refusal) = handler.register(&plugin).await {
            *registered = None;
            return self.refuse(&channel, RegisterError::Refused(refusal)).await;
        }
        if let Err(source) = api::tell(&channel, None, TELL_WITHIN).await {
            *registered = None;
            handler.deregister(&plugin).await;
            return Err(RegisterError::Tell { socket: socket(), source });
        }
        tracing::info!(plugin = plugin.name, kind = info.r#type, socket = %self.socket.display(), "plugin registered");
        Ok(())
    }

    /// Tells the plugin why it is not registered.
    async fn refuse(&self, channel: &Channel, error: RegisterError) -> Result<(), RegisterError> {
        let text = format!("RegisterPlugin error -- {error}");
        match api::tell(channel, Some(text), TELL_WITHIN).await {
            Ok(()) => Err(error),
            Err(source) => {
                tracing::warn!(%error, "cannot register a plugin");
                Err(RegisterError::Tell { socket: self.socket.clone(), source })
            }
        }
    }
}

/// Where sockets of plugins are expected, below the kubelet's own directory.
pub fn registry(root_dir: &Path) -> PathBuf {
    root_dir.join("plugins_registry")
}

#[cfg(test)]
mod tests;
