//! What the cluster's zone is made of: namespaces, services and endpoints, reduced to what answers need and indexed
//! the way questions come.
//!
//! Worked example: the pod `web-0` behind the headless service `web` of namespace `shop` is
//!
//! ```text
//! services   (shop, web)        → headless, ports [http/TCP 80]
//! endpoints  (shop, web)        → slice web-abc → [10.244.1.5, hostname web-0], ports [http/TCP 80]
//! by_address 10.244.1.5         → {(shop, web)}
//! ```

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;

use hickory_proto::rr::Name;
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1::EndpointSlice;

/// Namespace and name.
pub type Key = (Box<str>, Box<str>);

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    /// Lower case; may be empty when it is the only one.
    pub name: Box<str>,
    /// `tcp`, `udp` or `sctp`.
    pub protocol: Box<str>,
    pub port: u16,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Answers with its virtual addresses.
    Virtual(Vec<IpAddr>),
    /// Answers with its endpoints' addresses.
    Headless,
    /// Another name for something.
    External(Name),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    pub kind: Kind,
    pub ports: Vec<Port>,
}

/// The ready endpoints of one endpoint slice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slice {
    pub endpoints: Vec<Endpoint>,
    pub ports: Vec<Port>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    pub address: IpAddr,
    pub hostname: Option<Box<str>>,
}

impl Endpoint {
    /// The label below its service's name: the hostname, or the address with dashes for separators.
    pub fn label(&self) -> String {
        match &self.hostname {
            Some(hostname) => hostname.to_string(),
            None => self.address.to_string().replace(['.', ':'], "-"),
        }
    }
}

/// The objects that each watcher tells of; a relist ends by dropping what it did not mention.
#[derive(Debug, Default)]
pub struct Model {
    namespaces: HashSet<Box<str>>,
    services: HashMap<Key, Service>,
    /// By service, then by the slice's name.
    slices: HashMap<Key, BTreeMap<Box<str>, Slice>>,
    by_address: HashMap<IpAddr, BTreeSet<Key>>,
}

impl Model {
    pub fn has_namespace(&self, name: &str) -> bool {
        self.namespaces.contains(name)
    }

    pub fn service(&self, namespace: &str, name: &str) -> Option<&Service> {
        self.services.get(&key(namespace, name))
    }

    /// The slices of a service, in the order of their names.
    pub fn slices(&self, namespace: &str, service: &str) -> impl Iterator<Item = &Slice> {
        self.slices.get(&key(namespace, service)).into_iter().flat_map(BTreeMap::values)
    }

    /// Services with this address, as their own or as that of an endpoint.
    pub fn owners(&self, address: IpAddr) -> impl Iterator<Item = &Key> {
        self.by_address.get(&address).into_iter().flatten()
    }

    pub fn set_namespace(&mut self, name: &str) {
        self.namespaces.insert(name.into());
    }

    pub fn remove_namespace(&mut self, name: &str) {
        self.namespaces.remove(name);
    }

    pub fn set_service(&mut self, object: &core::Service) {
        let metadata = &object.metadata;
        let key = key(metadata.namespace.as_deref().unwrap_or_default(), metadata.name.as_deref().unwrap_or_default());
        match read_service(object) {
            Some(service) => self.replace_service(&key, Some(service)),
            None => self.replace_service(&key, None),
        }
    }

    pub fn remove_service(&mut self, namespace: &str, name: &str) {
        self.replace_service(&key(namespace, name), None);
    }

    pub fn set_slice(&mut self, object: &EndpointSlice) {
        if let Some((service, name)) = slice_names(object) {
            self.replace_slice(&service, name, read_slice(object));
        }
    }

    pub fn remove_slice(&mut self, object: &EndpointSlice) {
        if let Some((service, name)) = slice_names(object) {
            self.replace_slice(&service, name, None);
        }
    }

    pub fn retain_namespaces(&mut self, known: &HashSet<Key>) {
        self.namespaces.retain(|name| known.contains(&key("", name)));
    }

    pub fn retain_services(&mut self, known: &HashSet<Key>) {
        let gone: Vec<Key> = self.services.keys().filter(|key| !known.contains(*key)).cloned().collect();
        gone.into_iter().for_each(|key| self.replace_service(&key, None));
    }

    /// `known` holds namespaces and names of slices.
    pub fn retain_slices(&mut self, known: &HashSet<Key>) {
        let all = self.slices.iter().flat_map(|(service, slices)| slices.keys().map(move |name| (service, name)));
        let gone: Vec<(Key, Box<str>)> = all
            .filter(|(service, name)| !known.contains(&(service.0.clone(), (*name).clone())))
            .map(|(service, name)| (service.clone(), name.clone()))
            .collect();
        gone.into_iter().for_each(|(service, name)| self.replace_slice(&service, name, None));
    }

    fn replace_service(&mut self, key: &Key, service: Option<Service>) {
        let old = match service {
            Some(service) => self.services.insert(key.clone(), service),
            None => self.services.remove(key),
        };
        let old = old.map(|service| service.kind);
        let mut touched = addresses(old.as_ref());
        touched.extend(addresses(self.services.get(key).map(|service| &service.kind)));
        self.index(key, touched);
    }

    fn replace_slice(&mut self, service: &Key, name: Box<str>, slice: Option<Slice>) {
        let slices = self.slices.entry(service.clone()).or_default();
        let mut touched: Vec<IpAddr> = slice.iter().flat_map(|slice| &slice.endpoints).map(|e| e.address).collect();
        let old = match slice {
            Some(slice) => slices.insert(name, slice),
            None => slices.remove(&name),
        };
        if slices.is_empty() {
            self.slices.remove(service);
        }
        touched.extend(old.iter().flat_map(|slice| &slice.endpoints).map(|endpoint| endpoint.address));
        self.index(service, touched);
    }

    /// Brings `by_address` up to date for one service and the addresses that it has or had.
    fn index(&mut self, key: &Key, touched: Vec<IpAddr>) {
        for address in touched {
            let own = self.services.get(key).is_some_and(|service| addresses(Some(&service.kind)).contains(&address));
            let mut endpoints = self.slices.get(key).into_iter().flat_map(BTreeMap::values).flat_map(|s| &s.endpoints);
            if own || endpoints.any(|endpoint| endpoint.address == address) {
                self.by_address.entry(address).or_default().insert(key.clone());
            } else if let Some(owners) = self.by_address.get_mut(&address) {
                owners.remove(key);
                if owners.is_empty() {
                    self.by_address.remove(&address);
                }
            }
        }
    }
}

pub fn key(namespace: &str, name: &str) -> Key {
    (namespace.into(), name.into())
}

fn addresses(kind: Option<&Kind>) -> Vec<IpAddr> {
    match kind {
        Some(Kind::Virtual(addresses)) => addresses.clone(),
        _ => Vec::new(),
    }
}

/// `None` for a service that has no name to answer for yet.
fn read_service(object: &core::Service) -> Option<Service> {
    let spec = object.spec.as_ref()?;
    let ports = spec.ports.iter().flatten().filter_map(|p| port(p.name.as_deref(), p.protocol.as_deref(), p.port));
    let ports = ports.collect();
    if spec.type_.as_deref() == Some("ExternalName") {
        let mut name = Name::from_ascii(spec.external_name.as_deref()?).ok()?;
        name.set_fqdn(true);
        return Some(Service { kind: Kind::External(name), ports });
    }
    let listed = spec.cluster_ips.iter().flatten();
    let all: Vec<&String> =
        if spec.cluster_ips.is_some() { listed.collect() } else { spec.cluster_ip.iter().collect() };
    if all.iter().any(|address| *address == "None") {
        return Some(Service { kind: Kind::Headless, ports });
    }
    let addresses: Vec<IpAddr> = all.iter().filter_map(|address| address.parse().ok()).collect();
    (!addresses.is_empty()).then_some(Service { kind: Kind::Virtual(addresses), ports })
}

fn port(name: Option<&str>, protocol: Option<&str>, port: i32) -> Option<Port> {
    Some(Port {
        name: name.unwrap_or_default().to_ascii_lowercase().into(),
        protocol: protocol.unwrap_or("TCP").to_ascii_lowercase().into(),
        port: u16::try_from(port).ok()?,
    })
}

/// The service and the name of a slice; `None` for one that belongs to no service.
fn slice_names(object: &EndpointSlice) -> Option<(Key, Box<str>)> {
    let metadata = &object.metadata;
    let service = metadata.labels.as_ref()?.get("kubernetes.io/service-name")?;
    Some((key(metadata.namespace.as_deref()?, service), metadata.name.as_deref()?.into()))
}

fn read_slice(object: &EndpointSlice) -> Option<Slice> {
    if object.address_type == "FQDN" {
        return None;
    }
    let ports = object.ports.iter().flatten();
    let ports = ports.filter_map(|p| port(p.name.as_deref(), p.protocol.as_deref(), p.port?)).collect();
    // No word about readiness means ready.
    let ready =
        object.endpoints.iter().flatten().filter(|e| e.conditions.as_ref().and_then(|c| c.ready) != Some(false));
    let endpoints = ready.filter_map(|endpoint| {
        let address = endpoint.addresses.first()?.parse().ok()?;
        let hostname = endpoint.hostname.as_deref().filter(|name| !name.is_empty());
        Some(Endpoint { address, hostname: hostname.map(|name| name.to_ascii_lowercase().into()) })
    });
    Some(Slice { endpoints: endpoints.collect(), ports })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use serde_json::{Value, json};

    pub(crate) fn service(namespace: &str, name: &str, spec: Value) -> core::Service {
        let mut object = json!({"metadata": {"namespace": namespace, "name": name}});
        object["spec"] = spec;
        serde_json::from_value(object).expect("a service")
    }

    pub(crate) fn slice(namespace: &str, service: &str, name: &str, endpoints: Value, ports: Value) -> EndpointSlice {
        let mut object = json!({
            "metadata": {"namespace": namespace, "name": name, "labels": {"kubernetes.io/service-name": service}},
            "addressType": "IPv4",
        });
        object["endpoints"] = endpoints;
        object["ports"] = ports;
        serde_json::from_value(object).expect("a slice")
    }

    #[test]
    fn the_address_index_follows_every_change() {
        let mut model = Model::default();
        let ip: IpAddr = "10.0.0.1".parse().expect("an address");
        let owners = |model: &Model| model.owners(ip).map(|(ns, name)| format!("{ns}/{name}")).collect::<Vec<_>>();
        model.set_service(&service("a", "one", json!({"clusterIP": "10.0.0.1"})));
        model.set_slice(&slice("a", "two", "two-x", json!([{"addresses": ["10.0.0.1"]}]), json!([])));
        assert_eq!(owners(&model), ["a/one", "a/two"]);
        model.set_service(&service("a", "one", json!({"clusterIP": "10.0.0.2"})));
        assert_eq!(owners(&model), ["a/two"]);
        model.set_slice(&slice("a", "two", "two-y", json!([{"addresses": ["10.0.0.1"]}]), json!([])));
        model.retain_slices(&HashSet::from([key("a", "two-y")]));
        assert_eq!(owners(&model), ["a/two"], "the other slice still has it");
        model.retain_slices(&HashSet::new());
        assert!(owners(&model).is_empty() && model.slices.is_empty());
        model.retain_services(&HashSet::new());
        assert!(model.by_address.is_empty(), "{model:?}");
    }
}
