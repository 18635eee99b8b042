//! Cluster addresses and node ports of services, without races between requests or servers: an address is taken by
//! creating its `IPAddress` object, a node port by a compare-and-write on the one range that upstream keeps in etcd.
//! What a failed write took is given back at once; what crashes leave behind is put right by `repair`.

mod addresses;
mod band;
mod families;
mod node_ports;
pub mod repair;

use apimachinery::meta::GroupKind;
use apimachinery::status::{FieldError, Result, Status};
use serde_json::Value;

use super::object::ObjectExt;
use super::strategy::{Cx, Undo};

/// Fills in what the service needs and does not have. `old` is the stored service on an update.
pub async fn allocate(cx: &Cx<'_>, service: &mut Value, old: Option<&Value>) -> Result<Undo> {
    let cluster = families::of_cluster(&cx.server.config.service_cluster_ip_range);
    let errors = families::complete(service, old, &cluster);
    if !errors.is_empty() {
        return Err(invalid(service, &errors));
    }
    let undo = addresses::allocate(cx, service, old).await?;
    match node_ports::allocate(cx, service, old).await {
        Ok(ports) => Ok(ports.and(undo)),
        Err(status) => {
            undo.run().await;
            Err(status)
        }
    }
}

/// Gives back what a deleted service had.
pub async fn release(cx: &Cx<'_>, service: &Value) {
    addresses::release(cx.server, addresses::of(service)).await;
    release_ports(cx, service, node_ports::of(service)).await;
}

/// Gives back what a service had before an update and has no longer.
pub async fn release_difference(cx: &Cx<'_>, service: &Value, old: &Value) {
    let (ips, ports) = (addresses::of(service), node_ports::of(service));
    let gone = addresses::of(old).into_iter().filter(|ip| !ips.contains(ip)).collect();
    addresses::release(cx.server, gone).await;
    let gone = node_ports::of(old).into_iter().filter(|port| !ports.contains(port)).collect();
    release_ports(cx, service, gone).await;
}

async fn release_ports(cx: &Cx<'_>, service: &Value, ports: Vec<u16>) {
    if let Err(error) = node_ports::release(cx.server, ports).await {
        tracing::warn!(%error, service = service.name(), "node ports stay taken until the next repair");
    }
}

fn invalid(service: &Value, errors: &[FieldError]) -> Status {
    Status::invalid(&GroupKind::new("", "Service"), service.name(), errors)
}
