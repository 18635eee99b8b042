//! Cluster addresses: the `IPAddress` object named like the address belongs to the service that it points to.

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use apimachinery::meta::GroupVersionResource;
use apimachinery::status::{FieldError, Result, Status};
use ipnet::IpNet;
use serde_json::{Value, json};

use super::band::{lower, pick};
use super::families::{V4, V6};
use super::invalid;
use crate::auth::UserInfo;
use crate::registry::object::ObjectExt;
use crate::registry::strategy::{Cx, Undo};
use crate::registry::validation::service::is_headless;
use crate::server::Server;

/// Lost races for a free address before the user is told to try again.
const TRIES: usize = 16;

pub fn resource() -> GroupVersionResource {
    GroupVersionResource::new("networking.k8s.io", "v1", "ipaddresses")
}

/// The usable part of a range: for IPv4 without network and broadcast address, for IPv6 without the anycast address.
pub struct Range {
    first: u128,
    size: u128,
    net: IpNet,
}

impl Range {
    pub fn of(net: IpNet) -> Self {
        let net = net.trunc();
        let (base, bits, reserved) = match net {
            IpNet::V4(v4) => (u128::from(u32::from(v4.network())), 32 - u32::from(v4.prefix_len()), 2),
            IpNet::V6(v6) => (u128::from(v6.network()), 128 - u32::from(v6.prefix_len()), 1),
        };
        // Upstream looks at no more than 2^64 addresses of a range.
        let total = 1_u128 << bits.min(64);
        Self { first: base + 1, size: total.saturating_sub(reserved), net }
    }

    pub fn family(&self) -> &'static str {
        if matches!(self.net, IpNet::V6(_)) { V6 } else { V4 }
    }

    pub fn contains(&self, ip: IpAddr) -> bool {
        let number = number(ip);
        self.net.contains(&ip) && number >= self.first && number - self.first < self.size
    }

    fn at(&self, offset: u128) -> IpAddr {
        match self.net {
            // The offset is within an IPv4 range, so the sum fits.
            IpNet::V4(_) => Ipv4Addr::from((self.first + offset) as u32).into(),
            IpNet::V6(_) => Ipv6Addr::from(self.first + offset).into(),
        }
    }

    /// A free address.
    fn pick(&self, taken: &HashSet<IpAddr>, random: u128) -> Option<IpAddr> {
        let band = lower(self.size, 16, 256, 16);
        pick(self.size, band, random, |offset| taken.contains(&self.at(offset))).map(|offset| self.at(offset))
    }
}

fn number(ip: IpAddr) -> u128 {
    match ip {
        IpAddr::V4(v4) => u32::from(v4).into(),
        IpAddr::V6(v6) => v6.into(),
    }
}

/// The ranges of the flags, and of `ServiceCIDR` objects that are ready and stay.
pub fn ranges(server: &Server) -> Vec<Range> {
    let mut nets: Vec<IpNet> = server.config.service_cluster_ip_range.iter().map(IpNet::trunc).collect();
    let stored =
        server.caches.get("networking.k8s.io", "servicecidrs").map(|cache| cache.list(None)).unwrap_or_default();
    for cidr in stored.iter().map(|stored| stored.value()).filter(|cidr| !cidr.is_being_deleted()) {
        nets.extend(cidr.list_at(&["spec", "cidrs"]).iter().filter_map(|net| net.as_str()?.parse::<IpNet>().ok()));
    }
    nets.sort();
    nets.dedup();
    nets.into_iter().map(Range::of).collect()
}

/// The addresses a service has.
pub fn of(service: &Value) -> Vec<IpAddr> {
    service.list_at(&["spec", "clusterIPs"]).iter().filter_map(|ip| ip.as_str()?.parse().ok()).collect()
}

/// The object by which a service has an address.
pub fn object(ip: IpAddr, namespace: &str, name: &str) -> Value {
    let family = if ip.is_ipv6() { V6 } else { V4 };
    json!({
        "apiVersion": "networking.k8s.io/v1",
        "kind": "IPAddress",
        "metadata": {
            "name": ip.to_string(),
            "labels": {"ipaddress.kubernetes.io/ip-family": family, "ipaddress.kubernetes.io/managed-by": "ipallocator.k8s.io"},
        },
        "spec": {"parentRef": {"resource": "services", "namespace": namespace, "name": name}},
    })
}

/// Takes an address for every family of the service, those that it names or free ones.
pub async fn allocate(cx: &Cx<'_>, service: &mut Value, old: Option<&Value>) -> Result<Undo> {
    if service["spec"]["type"] == "ExternalName" || is_headless(&service["spec"]) {
        return Ok(Undo::none());
    }
    let has: Vec<IpAddr> = old.map(of).unwrap_or_default();
    let families: Vec<String> =
        service.list_at(&["spec", "ipFamilies"]).iter().filter_map(Value::as_str).map(str::to_owned).collect();
    let mut ips = of(service);
    let mut undo = Undo::none();
    for (index, family) in families.iter().enumerate() {
        let taken = match ips.get(index) {
            Some(ip) if has.contains(ip) => continue,
            Some(ip) => take(cx, service, *ip).await.map(|()| *ip),
            None => take_free(cx, service, family, index).await,
        };
        match taken {
            Ok(ip) => {
                undo = give_back(cx, ip).and(undo);
                if index >= ips.len() {
                    ips.push(ip);
                }
            }
            Err(status) => {
                undo.run().await;
                return Err(status);
            }
        }
    }
    if let Some(first) = ips.first() {
        service.set(&["spec", "clusterIP"], first.to_string());
        service.set(&["spec", "clusterIPs"], ips.iter().map(ToString::to_string).collect::<Vec<_>>());
    }
    Ok(undo)
}

/// Takes the address that the user asks for.
async fn take(cx: &Cx<'_>, service: &Value, ip: IpAddr) -> Result<()> {
    let refuse = |why: String| {
        let detail = format!("failed to allocate IP {ip}: {why}");
        invalid(service, &[FieldError::invalid("spec.clusterIPs", service["spec"]["clusterIPs"].clone(), detail)])
    };
    let ranges = ranges(cx.server);
    if !ranges.iter().any(|range| range.contains(ip)) {
        return Err(refuse("the provided network does not match the current range".into()));
    }
    if cx.dry_run {
        return Ok(());
    }
    match cx.server.create(&UserInfo::server(), &resource(), "", object(ip, cx.namespace, service.name())).await {
        Ok(_) => Ok(()),
        Err(status) if status.reason == "AlreadyExists" => Err(refuse("provided IP is already allocated".into())),
        Err(status) => Err(status),
    }
}

/// Takes a free address of the family.
async fn take_free(cx: &Cx<'_>, service: &Value, family: &str, index: usize) -> Result<IpAddr> {
    let ranges: Vec<Range> = ranges(cx.server).into_iter().filter(|range| range.family() == family).collect();
    let cache = cx.server.caches.get("networking.k8s.io", "ipaddresses");
    let mut lost = HashSet::new();
    for _ in 0..TRIES {
        let stored = cache.as_ref().map(|cache| cache.list(None)).unwrap_or_default();
        let mut taken: HashSet<IpAddr> = stored.iter().filter_map(|ip| ip.name().parse().ok()).collect();
        taken.extend(&lost);
        let Some(ip) = ranges.iter().find_map(|range| range.pick(&taken, rand::random())) else {
            let why = "failed to allocate a serviceIP: range is full";
            return Err(Status::internal(why));
        };
        if cx.dry_run {
            return Ok(ip);
        }
        match cx.server.create(&UserInfo::server(), &resource(), "", object(ip, cx.namespace, service.name())).await {
            Ok(_) => return Ok(ip),
            Err(status) if status.reason == "AlreadyExists" => lost.insert(ip),
            Err(status) => return Err(status),
        };
    }
    tracing::warn!(service = service.name(), index, "every free address was taken by somebody else first");
    Err(Status::internal("failed to allocate a serviceIP: too many concurrent allocations"))
}

fn give_back(cx: &Cx<'_>, ip: IpAddr) -> Undo {
    if cx.dry_run {
        return Undo::none();
    }
    let server = cx.server.clone();
    Undo::new(async move { delete(&server, ip).await })
}

/// Gives addresses back.
pub async fn release(server: &Arc<Server>, ips: Vec<IpAddr>) {
    for ip in ips {
        delete(server, ip).await;
    }
}

pub async fn delete(server: &Arc<Server>, ip: IpAddr) {
    match server.delete(&UserInfo::server(), &resource(), "", &ip.to_string()).await {
        Ok(_) => {}
        Err(status) if status.reason == "NotFound" => {}
        Err(error) => tracing::warn!(%error, %ip, "an address stays taken until the next repair"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_leave_out_what_no_service_can_have() {
        let range = Range::of("10.0.0.0/24".parse().unwrap());
        let within = |ip: &str| range.contains(ip.parse().unwrap());
        assert!(within("10.0.0.1") && within("10.0.0.254"));
        assert!(!within("10.0.0.0") && !within("10.0.0.255") && !within("10.0.1.1"));
    }

    #[test]
    fn free_addresses_come_from_the_upper_band_first() {
        let range = Range::of("10.0.0.0/24".parse().unwrap());
        assert_eq!(range.pick(&HashSet::new(), 0), Some("10.0.0.17".parse().unwrap()));
        let upper: HashSet<IpAddr> = (17..255).map(|n| Ipv4Addr::new(10, 0, 0, n).into()).collect();
        assert_eq!(range.pick(&upper, 5), Some("10.0.0.1".parse().unwrap()));
        let v6 = Range::of("fd00::/112".parse().unwrap());
        assert_eq!(v6.pick(&HashSet::new(), 0), Some("fd00::101".parse().unwrap()));
    }
}
