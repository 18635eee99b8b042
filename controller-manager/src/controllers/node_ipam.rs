//! Gives each node its part of the pods' address range (`--allocate-node-cidrs`). What is taken is read from the nodes
//! themselves, so there is nothing to lose or to leak.

use std::collections::HashSet;
use std::sync::Arc;

use apimachinery::controller::{Controller, EventType, Informer, ObjectKey, Plan, Write, object_reference};
use ipnet::IpNet;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Node;
use serde_json::json;

use crate::app::Context;
use crate::common::is_deleted;

struct NodeIpamController {
    /// Each range with the prefix length of a node's part.
    ranges: Vec<(IpNet, u8)>,
    nodes: Arc<Informer<Node>>,
}

pub fn start(context: &Context) {
    let options = &context.options;
    if !options.allocate_node_cidrs {
        return;
    }
    let ranges: Vec<_> = options
        .cluster_cidr
        .iter()
        .map(|range| {
            let size = match range {
                IpNet::V4(_) => options.node_cidr_mask_size_ipv4.or(options.node_cidr_mask_size).unwrap_or(24),
                IpNet::V6(_) => options.node_cidr_mask_size_ipv6.or(options.node_cidr_mask_size).unwrap_or(64),
            };
            (range.trunc(), size.clamp(range.prefix_len(), range.max_prefix_len()))
        })
        .collect();
    if ranges.is_empty() {
        return tracing::error!("--allocate-node-cidrs needs --cluster-cidr: nodes get no pod addresses");
    }
    let controller = NodeIpamController { ranges, nodes: context.driver.informers().of() };
    // One at a time: each decision must see the one before it.
    context.driver.run(controller, 1, |controller, wiring| wiring.primary(&controller.nodes));
}

impl Controller for NodeIpamController {
    fn name(&self) -> &'static str {
        "node-ipam"
    }

    fn component(&self) -> &'static str {
        "cidrAllocator"
    }

    fn reconcile(&self, key: &ObjectKey, _: Timestamp) -> Plan {
        let Some(node) = self.nodes.get(key) else { return Plan::nothing() };
        let has_cidr =
            node.spec.as_ref().is_some_and(|spec| spec.pod_cidr.as_deref().is_some_and(|cidr| !cidr.is_empty()));
        if has_cidr || is_deleted(&node.metadata) {
            return Plan::nothing();
        }
        let taken: HashSet<IpNet> = self.nodes.list().iter().flat_map(|node| cidrs(node)).collect();
        let free: Option<Vec<IpNet>> = self.ranges.iter().map(|range| first_free(*range, &taken)).collect();
        let Some(free) = free else {
            let mut plan = Plan::nothing();
            let message = format!("Node {key} status is now: CIDRNotAvailable");
            plan.event(object_reference(node.as_ref()), EventType::Normal, "CIDRNotAvailable", message);
            return plan;
        };
        let patch = json!({
            "metadata": {"uid": node.metadata.uid},
            "spec": {"podCIDR": free[0], "podCIDRs": free},
        });
        Plan::write(Write::strategic_patch::<Node>(key.clone(), patch))
    }
}

fn cidrs(node: &Node) -> Vec<IpNet> {
    let spec = node.spec.iter();
    spec.flat_map(|spec| spec.pod_cidrs.iter().flatten().chain(&spec.pod_cidr))
        .filter_map(|cidr| cidr.parse().ok())
        .collect()
}

/// The lowest part of the range that overlaps nothing taken.
fn first_free((range, size): (IpNet, u8), taken: &HashSet<IpNet>) -> Option<IpNet> {
    let mut parts = range.subnets(size).ok()?;
    // Usually all taken parts have the same size, so that a look-up per candidate is enough.
    let odd: Vec<_> = taken.iter().filter(|cidr| cidr.prefix_len() != size).collect();
    parts.find(|part| !taken.contains(part) && !odd.iter().any(|cidr| cidr.contains(part) || part.contains(*cidr)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str, cidr: Option<&str>) -> Node {
        serde_json::from_value(json!({"metadata": {"name": name}, "spec": {"podCIDR": cidr, "podCIDRs": cidr.into_iter().collect::<Vec<_>>()}})).unwrap()
    }

    fn plan(nodes: Vec<Node>, range: &str, size: u8) -> Plan {
        let controller =
            NodeIpamController { ranges: vec![(range.parse().unwrap(), size)], nodes: Informer::fixed(nodes) };
        controller.reconcile(&ObjectKey::cluster("new"), Timestamp::UNIX_EPOCH)
    }

    #[test]
    fn the_lowest_free_part_is_given() {
        let cases = [
            (vec![], Some("10.244.0.0/24")),
            (vec![node("a", Some("10.244.0.0/24")), node("b", Some("10.244.2.0/24"))], Some("10.244.1.0/24")),
            (vec![node("a", Some("10.244.0.0/23"))], Some("10.244.2.0/24")),
            (vec![node("a", Some("10.244.0.128/25"))], Some("10.244.1.0/24")),
            (vec![node("a", Some("10.244.0.0/22"))], None),
        ];
        for (mut nodes, expected) in cases {
            nodes.push(node("new", None));
            let plan = plan(nodes, "10.244.0.0/22", 24);
            let given = plan.writes.first().map(|write| write.body["spec"]["podCIDR"].clone());
            assert_eq!(given, expected.map(|cidr| json!(cidr)));
            assert_eq!(plan.events.len(), usize::from(expected.is_none()));
        }
        assert!(plan(vec![node("new", Some("10.244.0.0/24"))], "10.244.0.0/22", 24).is_empty());
    }
}
