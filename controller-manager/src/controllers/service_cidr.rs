//! Says which ranges of service addresses are ready, and keeps a deleted range until none of its addresses would be
//! left without one.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use apimachinery::controller::{Controller, Informer, ObjectKey, Plan, Write};
use ipnet::IpNet;
use jiff::Timestamp;
use k8s_openapi::api::networking::v1::{IPAddress, ServiceCIDR};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use serde_json::json;

use crate::app::Context;
use crate::common::{elapsed, is_deleted, labels, name};

const FINALIZER: &str = "networking.k8s.io/service-cidr-finalizer";
const MANAGED_BY: &str = "ipaddress.kubernetes.io/managed-by";
/// Who takes addresses for services: the API server. Addresses of others keep no range.
const ALLOCATOR: &str = "ipallocator.k8s.io";
const READY: &str = "Ready";
/// API servers may still give out addresses of the range until they have heard of its deletion.
const SETTLING: Duration = Duration::from_secs(10);

struct ServiceCidrController {
    ranges: Arc<Informer<ServiceCIDR>>,
    addresses: Arc<Informer<IPAddress>>,
}

pub fn start(context: &Context) {
    let informers = context.driver.informers();
    let controller = ServiceCidrController { ranges: informers.of(), addresses: informers.of() };
    context.driver.run(controller, 5, |controller, wiring| {
        // A range that comes, goes or changes may free another one that overlaps it.
        let ranges = controller.ranges.clone();
        wiring.map(&controller.ranges, move |change| {
            let changed: Vec<_> = change.versions().cloned().collect();
            let own = changed.iter().take(1).map(|range| ObjectKey::of(&range.metadata));
            let overlap = |range: &Arc<ServiceCIDR>| {
                changed
                    .iter()
                    .flat_map(|changed| nets(changed))
                    .any(|net| nets(range).any(|other| overlaps(net, other)))
            };
            let others = ranges.list().into_iter().filter(|range| is_deleted(&range.metadata) && overlap(range));
            own.chain(others.map(|range| ObjectKey::of(&range.metadata))).collect()
        });
        let ranges = controller.ranges.clone();
        wiring.map(&controller.addresses, move |change| {
            let (Some(address), None) = (change.versions().next(), change.old.as_ref().zip(change.new.as_ref())) else {
                return Vec::new();
            };
            let Some(ip) = allocated(address) else { return Vec::new() };
            let waiting = ranges.list().into_iter().filter(|range| is_deleted(&range.metadata) && serves(range, ip));
            waiting.map(|range| ObjectKey::of(&range.metadata)).collect()
        });
    });
}

impl Controller for ServiceCidrController {
    fn name(&self) -> &'static str {
        "service-cidr"
    }

    fn component(&self) -> &'static str {
        "service-cidr-controller"
    }

    fn reconcile(&self, key: &ObjectKey, now: Timestamp) -> Plan {
        let Some(range) = self.ranges.get(key) else { return Plan::nothing() };
        let has_finalizer = range.metadata.finalizers.iter().flatten().any(|have| have == FINALIZER);
        let Some(deleted) = &range.metadata.deletion_timestamp else {
            let mut plan = Plan::nothing();
            if !has_finalizer {
                plan.push(patch_finalizers(&range, "finalizers"));
            }
            plan.writes.extend(set_ready(&range, "True", "", "Kubernetes Service CIDR is ready", now));
            return plan;
        };
        if self.is_needed(&range) {
            let message = "There are still IPAddresses referencing the ServiceCIDR, please remove them or create a new ServiceCIDR";
            let status = set_ready(&range, "False", "Terminating", message, now);
            return status.map_or_else(Plan::nothing, Plan::write);
        }
        let mut plan = Plan::nothing();
        match SETTLING.checked_sub(elapsed(deleted.0, now)) {
            Some(left) if !left.is_zero() => {
                plan.again_after(left);
            }
            _ if has_finalizer => {
                plan.push(patch_finalizers(&range, "$deleteFromPrimitiveList/finalizers"));
            }
            _ => {}
        }
        plan
    }
}

impl ServiceCidrController {
    /// Whether an address in use would belong to no range without this one.
    fn is_needed(&self, range: &ServiceCIDR) -> bool {
        let ranges = self.ranges.list();
        let others: Vec<_> = ranges.iter().filter(|other| name(&other.metadata) != name(&range.metadata)).collect();
        let covered = |net: IpNet| others.iter().any(|other| nets(other).any(|larger| larger.contains(&net)));
        if nets(range).all(covered) {
            return false;
        }
        let addresses = self.addresses.list();
        let mut own = addresses.iter().filter_map(|address| allocated(address)).filter(|ip| serves(range, *ip));
        own.any(|ip| !others.iter().any(|other| serves(other, ip)))
    }
}

fn nets(range: &ServiceCIDR) -> impl Iterator<Item = IpNet> {
    range.spec.iter().flat_map(|spec| spec.cidrs.iter().flatten()).filter_map(|cidr| cidr.parse().ok())
}

fn overlaps(a: IpNet, b: IpNet) -> bool {
    a.contains(&b) || b.contains(&a)
}

/// The address, if it was taken for a service.
fn allocated(address: &IPAddress) -> Option<IpAddr> {
    let ours = labels(&address.metadata).get(MANAGED_BY).is_some_and(|by| by == ALLOCATOR);
    name(&address.metadata).parse().ok().filter(|_| ours)
}

/// Whether the range could have given the address: the first of a network is never given, and of IPv4 not the last.
fn serves(range: &ServiceCIDR, ip: IpAddr) -> bool {
    nets(range).any(|net| net.contains(&ip) && ip != net.network() && (ip.is_ipv6() || ip != net.broadcast()))
}

fn patch_finalizers(range: &ServiceCIDR, field: &str) -> Write {
    let patch = json!({"metadata": {"uid": range.metadata.uid, field: [FINALIZER]}});
    Write::strategic_patch::<ServiceCIDR>(ObjectKey::of(&range.metadata), patch)
}

fn set_ready(range: &ServiceCIDR, status: &str, reason: &str, message: &str, now: Timestamp) -> Option<Write> {
    let mut next = range.clone();
    let conditions = next.status.get_or_insert_default().conditions.get_or_insert_default();
    let says_so = |c: &Condition| c.status == status && c.reason == reason && c.message == message;
    if conditions.iter().find(|condition| condition.type_ == READY).is_some_and(says_so) {
        return None;
    }
    conditions.retain(|condition| condition.type_ != READY);
    conditions.push(Condition {
        type_: READY.to_owned(),
        status: status.to_owned(),
        reason: reason.to_owned(),
        message: message.to_owned(),
        last_transition_time: Time(now),
        observed_generation: None,
    });
    Write::status(range, &next)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    fn range(name: &str, cidrs: &[&str], deleted: bool) -> ServiceCIDR {
        serde_json::from_value(json!({
            "metadata": {"name": name, "finalizers": [FINALIZER],
                "deletionTimestamp": deleted.then_some("1970-01-01T00:00:00Z")},
            "spec": {"cidrs": cidrs},
        }))
        .unwrap()
    }

    fn address(ip: &str, managed_by: &str) -> IPAddress {
        serde_json::from_value(json!({"metadata": {"name": ip, "labels": {MANAGED_BY: managed_by}},
            "spec": {"parentRef": {"resource": "services", "name": "s", "namespace": "n"}}}))
        .unwrap()
    }

    fn plan(ranges: Vec<ServiceCIDR>, ips: &[&str], second: i64) -> Plan {
        let addresses = Informer::fixed(ips.iter().map(|ip| address(ip, ALLOCATOR)));
        let controller = ServiceCidrController { ranges: Informer::fixed(ranges), addresses };
        controller.reconcile(&ObjectKey::cluster("r"), Timestamp::from_second(second).unwrap())
    }

    #[test]
    fn a_new_range_gets_its_finalizer_and_is_ready_once() {
        let mut new = range("r", &["10.0.0.0/24"], false);
        new.metadata.finalizers = None;
        let writes = plan(vec![new], &[], 0).writes;
        assert_eq!(writes[0].body["metadata"]["finalizers"], json!([FINALIZER]));
        let condition = &writes[1].body["status"]["conditions"][0];
        assert_eq!((&condition["type"], &condition["status"]), (&json!("Ready"), &json!("True")));
        let mut ready = range("r", &["10.0.0.0/24"], false);
        ready.status = serde_json::from_value(writes[1].body["status"].clone()).unwrap();
        assert!(plan(vec![ready], &[], 5).is_empty());
    }

    #[test]
    fn a_deleted_range_stays_while_an_address_needs_it() {
        let deleted = || range("r", &["10.0.0.0/24"], true);
        let with = |other: &[&str]| vec![deleted(), range("other", other, false)];
        for (ranges, ips, stays) in [
            (vec![deleted()], &["10.0.0.5"][..], true),
            (vec![deleted()], &[], false),
            (vec![deleted()], &["10.0.1.5"], false),
            // The network's and the broadcast address are not given by the range.
            (vec![deleted()], &["10.0.0.0", "10.0.0.255"], false),
            (with(&["10.0.0.0/16"]), &["10.0.0.5"], false),
            (with(&["10.0.0.0/24"]), &["10.0.0.5"], false),
            (with(&["10.0.0.0/28"]), &["10.0.0.5"], false),
            (with(&["10.0.0.0/28"]), &["10.0.0.5", "10.0.0.20"], true),
            // The last address of the smaller range belongs to the larger one alone.
            (with(&["10.0.0.0/28"]), &["10.0.0.15"], true),
            (with(&["fd00::/64"]), &["10.0.0.5"], true),
        ] {
            let plan = plan(ranges, ips, 60);
            let released = plan.writes[0].body["metadata"].get("$deleteFromPrimitiveList/finalizers").is_some();
            let reason = plan.writes[0].body["status"]["conditions"][0].get("reason").and_then(Value::as_str);
            assert_eq!((released, reason), (!stays, stays.then_some("Terminating")), "{ips:?}");
        }
    }

    #[test]
    fn allocators_have_time_to_hear_of_the_deletion() {
        let plan = plan(vec![range("r", &["10.0.0.0/24"], true)], &[], 4);
        assert_eq!((plan.writes.len(), plan.again_after), (0, Some(Duration::from_secs(6))));
    }

    #[test]
    fn addresses_of_others_keep_no_range() {
        let controller = ServiceCidrController {
            ranges: Informer::fixed([range("r", &["10.0.0.0/24"], true)]),
            addresses: Informer::fixed([address("10.0.0.5", "somebody")]),
        };
        let plan = controller.reconcile(&ObjectKey::cluster("r"), Timestamp::from_second(60).unwrap());
        assert!(plan.writes[0].body["status"].is_null());
    }
}
