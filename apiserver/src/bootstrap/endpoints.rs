//! The endpoints of the `kubernetes` Service: one address per running server. Each server keeps a key under
//! `masterleases` that goes away when the server does; whoever comes by writes the addresses of the living.

use std::net::{IpAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use apimachinery::status::{Result, Status};
use bytes::Bytes;
use serde_json::{Value, json};

use super::ensure;
use crate::config::Config;
use crate::registry::object::ObjectExt;
use crate::server::Server;
use crate::storage::{Expect, Outcome, StoreError};

const LEASE: Duration = Duration::from_secs(15);
const SKIP_MIRROR: &str = "endpointslice.kubernetes.io/skip-mirror";

/// The address under which others reach this server: the flag, the one we listen on, or the one that packets to the
/// world would leave from.
pub fn advertised(config: &Config) -> Option<IpAddr> {
    let listening = Some(config.bind_address).filter(|address| !address.is_unspecified());
    config.advertise_address.or(listening).or_else(|| {
        // Connecting a datagram socket sends nothing; it only asks the routing table.
        let socket = UdpSocket::bind("0.0.0.0:0").ok()?;
        socket.connect("192.0.2.1:9").ok()?;
        socket.local_addr().ok().map(|address| address.ip())
    })
}

fn leases(config: &Config) -> String {
    format!("{}/masterleases/", config.etcd_prefix)
}

#[allow(clippy::needless_pass_by_value, reason = "for map_err")]
fn stored(error: StoreError) -> Status {
    Status::internal(apimachinery::process::error_chain(&error))
}

/// Renews this server's lease and writes the addresses of all.
pub async fn renew(server: &Arc<Server>) -> Result<()> {
    let Some(own) = advertised(&server.config) else { return Ok(()) };
    let key = format!("{}{own}", leases(&server.config));
    let value =
        json!({"kind": "Endpoints", "apiVersion": "v1", "metadata": {}, "subsets": [{"addresses": [{"ip": own}]}]});
    let value = Bytes::from(value.to_string());
    let mut expect = Expect::Absent;
    for _ in 0..3 {
        match server.store.put(&key, value.clone(), expect, Some(LEASE)).await.map_err(stored)? {
            Outcome::Done(_) => return publish(server).await,
            Outcome::Mismatch(Some(found)) => expect = Expect::Revision(found.revision),
            Outcome::Mismatch(None) => expect = Expect::Absent,
        }
    }
    Err(Status::internal("the lease of this server's address changes faster than it can be renewed"))
}

/// Takes this server's address out, so that clients do not wait for it.
pub async fn withdraw(server: &Arc<Server>) {
    let Some(own) = advertised(&server.config) else { return };
    let key = format!("{}{own}", leases(&server.config));
    let outcome = async {
        if let Some(entry) = server.store.get(&key).await.map_err(stored)? {
            server.store.delete(&key, entry.revision).await.map_err(stored)?;
        }
        publish(server).await
    };
    if let Err(error) = outcome.await {
        tracing::warn!(%error, "cannot take this server out of the kubernetes endpoints");
    }
}

async fn publish(server: &Arc<Server>) -> Result<()> {
    let prefix = leases(&server.config);
    let page = server.store.range(&prefix, None, 0, None).await.map_err(stored)?;
    let mut addresses: Vec<IpAddr> =
        page.entries.iter().filter_map(|entry| entry.key.strip_prefix(&prefix)?.parse().ok()).collect();
    addresses.sort();
    let port = server.config.secure_port;
    let endpoints = endpoints(&addresses, port);
    ensure::merged(server, "endpoints", endpoints.clone(), |found| {
        let same =
            found.list_at(&["subsets"]) == endpoints.list_at(&["subsets"]) && found.label(SKIP_MIRROR) == Some("true");
        (!same).then(|| replaced(found, &endpoints, "subsets"))
    })
    .await?;
    let slice = slice(&addresses, port);
    ensure::merged(server, "endpointslices", slice.clone(), |found| {
        let same = found["endpoints"] == slice["endpoints"] && found["ports"] == slice["ports"];
        (!same).then(|| {
            let mut changed = replaced(found, &slice, "endpoints");
            changed["ports"] = slice["ports"].clone();
            changed
        })
    })
    .await
}

/// `found` with `field` and labels of `wanted`.
fn replaced(found: &Value, wanted: &Value, field: &str) -> Value {
    let mut changed = found.clone();
    changed[field] = wanted[field].clone();
    let labels = wanted.labels().cloned().unwrap_or_default();
    changed.ensure_object(&["metadata", "labels"]).extend(labels);
    changed
}

fn endpoints(addresses: &[IpAddr], port: u16) -> Value {
    let ips: Vec<Value> = addresses.iter().map(|ip| json!({"ip": ip})).collect();
    let subsets = match ips.is_empty() {
        true => json!([]),
        false => json!([{"addresses": ips, "ports": [{"name": "https", "port": port, "protocol": "TCP"}]}]),
    };
    json!({
        "apiVersion": "v1",
        "kind": "Endpoints",
        "metadata": {"name": "kubernetes", "namespace": "default", "labels": {SKIP_MIRROR: "true"}},
        "subsets": subsets,
    })
}

fn slice(addresses: &[IpAddr], port: u16) -> Value {
    let v6 = addresses.first().is_some_and(IpAddr::is_ipv6);
    let family = addresses.iter().filter(|address| address.is_ipv6() == v6);
    let endpoints: Vec<Value> = family.map(|ip| json!({"addresses": [ip], "conditions": {"ready": true}})).collect();
    json!({
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": "kubernetes", "namespace": "default", "labels": {"kubernetes.io/service-name": "kubernetes"}},
        "addressType": if v6 { "IPv6" } else { "IPv4" },
        "endpoints": endpoints,
        "ports": [{"name": "https", "port": port, "protocol": "TCP"}],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_list_every_server() {
        let addresses = ["10.0.0.2".parse().unwrap(), "10.0.0.3".parse().unwrap()];
        let endpoints = endpoints(&addresses, 6443);
        assert_eq!(endpoints["subsets"][0]["addresses"], json!([{"ip": "10.0.0.2"}, {"ip": "10.0.0.3"}]));
        assert_eq!(slice(&addresses, 6443)["endpoints"].as_array().map(Vec::len), Some(2));
        assert_eq!(super::endpoints(&[], 6443)["subsets"], json!([]));
    }
}
