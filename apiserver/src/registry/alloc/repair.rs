//! Puts right what crashes left behind: addresses and node ports that nobody has any more are given back, those that
//! services have without being marked are marked. Runs all the time, rarely; several servers do no harm to each other.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use apimachinery::status::Result;
use serde_json::Value;

use super::addresses;
use super::node_ports::{self, Bitmap, Range};
use crate::auth::UserInfo;
use crate::registry::object::ObjectExt;
use crate::server::Server;

/// Upstream's interval.
const INTERVAL: Duration = Duration::from_secs(180);
/// An address that is taken before its service is written is left alone for so long.
const SETTLING_SECONDS: i64 = 60;

/// Repairs until shutdown.
pub async fn run(server: Arc<Server>) {
    loop {
        tokio::select! {
            () = server.shutdown.cancelled() => return,
            () = tokio::time::sleep(INTERVAL) => {}
        }
        if let Err(error) = once(&server).await {
            tracing::warn!(%error, "cannot repair the allocations of services");
        }
    }
}

/// One round; without complete knowledge nothing is touched.
async fn once(server: &Arc<Server>) -> Result<()> {
    let (Some(services), Some(ips)) =
        (server.caches.get("", "services"), server.caches.get("networking.k8s.io", "ipaddresses"))
    else {
        return Ok(());
    };
    if !services.is_ready() || !ips.is_ready() {
        return Ok(());
    }
    let owners: HashMap<IpAddr, Value> = services
        .list(None)
        .iter()
        .map(|stored| stored.value())
        .flat_map(|service| addresses::of(&service).into_iter().map(move |ip| (ip, service.clone())))
        .collect();
    let now = jiff::Timestamp::now().as_second();
    for object in ips.list(None).iter().map(|stored| stored.value()) {
        if let Some(ip) = orphan(&object, &owners, now) {
            tracing::info!(%ip, "gives back an address without a service");
            addresses::delete(server, ip).await;
        }
    }
    for (ip, service) in &owners {
        if ips.get("", &ip.to_string()).is_none() {
            let object = addresses::object(*ip, service.namespace(), service.name());
            if let Err(error) = server.create(&UserInfo::server(), &addresses::resource(), "", object).await {
                tracing::warn!(%error, %ip, "cannot mark a service's address as taken");
            }
        }
    }
    // Taken ports are only ever added here: a service that is being created has its ports before it is stored.
    // Bits of deleted services are cleared when two rounds in a row find them unused.
    settle_ports(server).await
}

/// The address of an object whose service is gone or has another one.
fn orphan(object: &Value, owners: &HashMap<IpAddr, Value>, now: i64) -> Option<IpAddr> {
    let parent = &object["spec"]["parentRef"];
    if parent.str_at(&["resource"]) != "services" || !parent.str_at(&["group"]).is_empty() || object.is_being_deleted()
    {
        return None;
    }
    let created: jiff::Timestamp = object.str_at(&["metadata", "creationTimestamp"]).parse().ok()?;
    let ip: IpAddr = object.name().parse().ok()?;
    let owner = owners.get(&ip);
    let is_owned = owner.is_some_and(|service| {
        service.name() == parent.str_at(&["name"]) && service.namespace() == parent.str_at(&["namespace"])
    });
    (!is_owned && now - created.as_second() > SETTLING_SECONDS).then_some(ip)
}

/// The ports of all services in the cache.
pub fn taken_ports(server: &Server) -> Bitmap {
    let range = Range::parse(&server.config.service_node_port_range);
    let services = server.caches.get("", "services").map(|cache| cache.list(None)).unwrap_or_default();
    let mut bitmap = Bitmap::default();
    for port in services.iter().flat_map(|stored| node_ports::of(&stored.value())) {
        if (range.first..=range.last).contains(&port) {
            bitmap.set(usize::from(port - range.first), true);
        }
    }
    bitmap
}

async fn settle_ports(server: &Arc<Server>) -> Result<()> {
    let before = node_ports::snapshot(server).await?;
    tokio::time::sleep(Duration::from_secs(SETTLING_SECONDS as u64)).await;
    let used = taken_ports(server);
    node_ports::update(server, |bitmap| {
        bitmap.settle(&before, &used);
        Ok(())
    })
    .await
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_settled_addresses_without_a_service_are_orphans() {
        let created = |time: &str| {
            let mut object = addresses::object("10.0.0.5".parse().unwrap(), "default", "web");
            object["metadata"]["creationTimestamp"] = time.into();
            object
        };
        let now = "2026-01-01T00:05:00Z".parse::<jiff::Timestamp>().unwrap().as_second();
        let web = json!({"metadata": {"namespace": "default", "name": "web"}, "spec": {"clusterIPs": ["10.0.0.5"]}});
        let owned = HashMap::from([("10.0.0.5".parse().unwrap(), web)]);
        let nobody = HashMap::new();
        assert_eq!(orphan(&created("2026-01-01T00:00:00Z"), &owned, now), None);
        assert!(orphan(&created("2026-01-01T00:00:00Z"), &nobody, now).is_some());
        assert_eq!(orphan(&created("2026-01-01T00:04:30Z"), &nobody, now), None);
    }
}
