//! How plugins of devices register: by a call to the kubelet's socket in their directory, or by a socket in the
//! directory of all plugins.

use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::sync::Arc;

use apimachinery::process::CancellationToken;
use async_trait::async_trait;
use parking_lot::Mutex;
use tonic::Status;

use super::api::{self, Client, Register, methods};
use super::{Devices, api::Empty};
use crate::grpc::{ServeError, Service};
use crate::plugins::{Handler, Plugin, Refusal};

const SOCKET: &str = "kubelet.sock";

/// An extended resource: qualified by a domain that is not one of Kubernetes' own.
fn is_extended(name: &str) -> bool {
    let Some((domain, rest)) = name.split_once('/') else { return false };
    let word = |text: &str, dots: &str| {
        let inner = |c: char| c.is_ascii_alphanumeric() || dots.contains(c);
        let ends = [text.chars().next(), text.chars().next_back()];
        text.chars().all(inner) && ends.iter().all(|end| end.is_some_and(|c| c.is_ascii_alphanumeric()))
    };
    let native = domain == "kubernetes.io" || domain.ends_with(".kubernetes.io");
    // With the prefix that quotas put before it, it must still be a qualified name.
    let domain_fits = domain.len() + "requests.".len() <= 253 && word(domain, "-.") && !domain.contains("..");
    let lower = !domain.chars().any(|c| c.is_ascii_uppercase());
    !native && !name.starts_with("requests.") && domain_fits && lower && rest.len() <= 63 && word(rest, "-_.")
}

fn check(resource: &str, versions: &[String]) -> Result<(), String> {
    if !versions.iter().any(|version| version == api::VERSION) {
        let requested = versions.join(" ");
        let (supported, what) = (api::VERSION, "requested API version");
        return Err(format!("{what} {requested:?} is not supported by kubelet. Supported version is [{supported:?}]"));
    }
    if !is_extended(resource) {
        return Err(format!("the ResourceName {resource:?} is invalid"));
    }
    Ok(())
}

/// Serves the kubelet's socket. Sockets of plugins that are there belong to registrations of an earlier process; their
/// going tells the plugins to register again.
pub fn serve(devices: &Arc<Devices>, end: CancellationToken) -> Result<(), ServeError> {
    remove_sockets(&devices.directory);
    let socket = devices.directory.join(SOCKET);
    let devices = devices.clone();
    let register = move |request: Register| {
        let devices = devices.clone();
        async move {
            if let Err(why) = check(&request.resource_name, std::slice::from_ref(&request.version)) {
                tracing::warn!(resource = request.resource_name, why, "a device plugin is refused");
                return Err(Status::unknown(why));
            }
            if Path::new(&request.endpoint).components().count() != 1 {
                let why = format!("the endpoint {:?} is not the name of a socket", request.endpoint);
                return Err(Status::invalid_argument(why));
            }
            let socket = devices.directory.join(&request.endpoint);
            if let Err(error) = tokio::net::UnixStream::connect(&socket).await {
                let why = format!("failed to dial device plugin with socketPath {}: {error}", socket.display());
                return Err(Status::unknown(why));
            }
            let client = Client::at(&socket);
            tracing::info!(resource = request.resource_name, endpoint = request.endpoint, "a device plugin registers");
            devices.connect(request.resource_name, client, request.options.unwrap_or_default());
            Ok(Empty {})
        }
    };
    Service::default().unary(methods::REGISTER, register).start(&socket, end)
}

fn remove_sockets(directory: &Path) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let is_socket = entry.file_type().is_ok_and(|kind| kind.is_socket());
        if is_socket && let Err(error) = fs::remove_file(entry.path()) {
            tracing::warn!(path = %entry.path().display(), %error, "cannot remove the socket of a device plugin");
        }
    }
}

/// Plugins in the directory of all plugins.
pub struct Registration {
    pub devices: Arc<Devices>,
    /// Of the plugins that are registered, by their endpoint, what ends their actor.
    connected: Mutex<Vec<(Plugin, CancellationToken)>>,
}

impl Registration {
    pub fn new(devices: Arc<Devices>) -> Self {
        Self { devices, connected: Mutex::default() }
    }
}

#[async_trait]
impl Handler for Registration {
    fn validate(&self, plugin: &Plugin) -> Result<(), Refusal> {
        check(&plugin.name, &plugin.versions).map_err(Refusal)
    }

    async fn register(&self, plugin: &Plugin) -> Result<(), Refusal> {
        let client = Client::at(&plugin.endpoint);
        let options = client.options().await.map_err(|error| Refusal(error.to_string()))?;
        let gone = CancellationToken::new();
        self.connected.lock().push((plugin.clone(), gone.clone()));
        self.devices.clone().connect_until(plugin.name.clone(), client, options, gone);
        Ok(())
    }

    async fn deregister(&self, plugin: &Plugin) {
        self.connected.lock().retain(|(known, gone)| {
            if known == plugin {
                gone.cancel();
            }
            known != plugin
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resources_are_extended() {
        for (name, want) in [
            ("example.com/gpu", true),
            ("example.com/gpu_0.a-b", true),
            ("gpu", false),
            ("kubernetes.io/gpu", false),
            ("x.kubernetes.io/gpu", false),
            ("requests.example.com/gpu", false),
            ("example.com/", false),
            ("example.com/-gpu", false),
            ("Example.com/gpu", false),
            ("/gpu", false),
            ("a/b/c", false),
        ] {
            assert_eq!(is_extended(name), want, "{name}");
        }
    }
}
