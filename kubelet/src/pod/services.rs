//! Service variables for containers: a small index of the cluster's services (name, address, ports), kept by a watch.

use std::collections::{BTreeMap, HashMap};

use futures::TryStreamExt;
use k8s_openapi::api::core::v1::Service;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client};
use parking_lot::RwLock;
use tokio::sync::watch;

/// The only parts of a service that variables need.
#[derive(Clone, Debug, PartialEq)]
struct Entry {
    address: String,
    /// Name (may be empty), protocol, number.
    ports: Vec<(String, String, i32)>,
}

#[derive(Debug)]
pub struct ServiceEnv {
    /// By namespace and name.
    entries: RwLock<HashMap<(String, String), Entry>>,
    synced: watch::Sender<bool>,
}

impl Default for ServiceEnv {
    fn default() -> Self {
        Self { entries: RwLock::default(), synced: watch::Sender::new(false) }
    }
}

impl ServiceEnv {
    /// Follows the cluster's services until the process ends.
    pub async fn follow(&self, client: Client) {
        let stream = watcher(Api::<Service>::all(client), watcher::Config::default().page_size(100)).default_backoff();
        let mut stream = std::pin::pin!(stream);
        let mut fresh: Option<HashMap<(String, String), Entry>> = None;
        loop {
            match stream.try_next().await {
                Ok(Some(watcher::Event::Init)) => fresh = Some(HashMap::new()),
                Ok(Some(watcher::Event::InitApply(service))) => {
                    if let (Some((key, Some(entry))), Some(fresh)) = (entry(service), fresh.as_mut()) {
                        fresh.insert(key, entry);
                    }
                }
                Ok(Some(watcher::Event::InitDone)) => {
                    if let Some(fresh) = fresh.take() {
                        *self.entries.write() = fresh;
                    }
                    self.synced.send_replace(true);
                }
                Ok(Some(watcher::Event::Apply(service))) => match entry(service) {
                    Some((key, Some(entry))) => drop(self.entries.write().insert(key, entry)),
                    Some((key, None)) => drop(self.entries.write().remove(&key)),
                    None => {}
                },
                Ok(Some(watcher::Event::Delete(service))) => {
                    if let Some((key, _)) = entry(service) {
                        self.entries.write().remove(&key);
                    }
                }
                Ok(None) => return,
                Err(error) => tracing::debug!(%error, "service watch interrupted"),
            }
        }
    }

    /// Waits until the first complete list has arrived: a container must not start with half of its variables.
    pub async fn synced(&self) {
        // The sender lives as long as self, so waiting cannot fail.
        let _ = self.synced.subscribe().wait_for(|synced| *synced).await;
    }

    /// Variables for a pod in this namespace; without `links` only those of the API server itself.
    pub fn variables(&self, namespace: &str, links: bool) -> BTreeMap<String, String> {
        let mut variables = BTreeMap::new();
        for ((of, name), entry) in self.entries.read().iter() {
            let is_api = of == "default" && name == "kubernetes";
            if is_api || (links && of == namespace) {
                of_service(name, entry, &mut variables);
            }
        }
        variables
    }
}

fn entry(service: Service) -> Option<((String, String), Option<Entry>)> {
    let key = (service.metadata.namespace?, service.metadata.name?);
    let spec = service.spec.unwrap_or_default();
    let address = spec.cluster_ip.filter(|ip| !ip.is_empty() && ip != "None");
    let entry = address.map(|address| Entry {
        address,
        ports: spec
            .ports
            .into_iter()
            .flatten()
            .map(|port| (port.name.unwrap_or_default(), port.protocol.unwrap_or_else(|| "TCP".to_owned()), port.port))
            .collect(),
    });
    Some((key, entry))
}

fn of_service(name: &str, entry: &Entry, variables: &mut BTreeMap<String, String>) {
    let upper = |text: &str| text.to_uppercase().replace('-', "_");
    let prefix = upper(name);
    let Entry { address, ports } = entry;
    variables.insert(format!("{prefix}_SERVICE_HOST"), address.clone());
    let bracketed = if address.contains(':') { format!("[{address}]") } else { address.clone() };
    for (index, (port_name, protocol, port)) in ports.iter().enumerate() {
        let url = format!("{}://{bracketed}:{port}", protocol.to_lowercase());
        if index == 0 {
            variables.insert(format!("{prefix}_SERVICE_PORT"), port.to_string());
            variables.insert(format!("{prefix}_PORT"), url.clone());
        }
        if !port_name.is_empty() {
            variables.insert(format!("{prefix}_SERVICE_PORT_{}", upper(port_name)), port.to_string());
        }
        let link = format!("{prefix}_PORT_{port}_{}", protocol.to_uppercase());
        variables.insert(format!("{link}_PROTO"), protocol.to_lowercase());
        variables.insert(format!("{link}_PORT"), port.to_string());
        variables.insert(format!("{link}_ADDR"), address.clone());
        variables.insert(link, url);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn services() -> ServiceEnv {
        let env = ServiceEnv::default();
        for (namespace, name, address) in
            [("default", "kubernetes", "10.96.0.1"), ("x", "my-db", "10.96.0.2"), ("y", "other", "10.96.0.3")]
        {
            let ports = vec![("https".to_owned(), "TCP".to_owned(), 443)];
            env.entries
                .write()
                .insert((namespace.to_owned(), name.to_owned()), Entry { address: address.to_owned(), ports });
        }
        env
    }

    #[test]
    fn variables_of_the_namespace_and_the_api() {
        let variables = services().variables("x", true);
        assert_eq!(variables["KUBERNETES_SERVICE_HOST"], "10.96.0.1");
        assert_eq!(variables["MY_DB_SERVICE_PORT_HTTPS"], "443");
        assert_eq!(variables["MY_DB_PORT"], "tcp://10.96.0.2:443");
        assert_eq!(variables["MY_DB_PORT_443_TCP_ADDR"], "10.96.0.2");
        assert!(!variables.contains_key("OTHER_SERVICE_HOST"));
        assert!(!services().variables("x", false).contains_key("MY_DB_PORT"));
    }
}
