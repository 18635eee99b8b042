//! NodePorts: two pods cannot have the same port of a node.

use std::sync::Arc;

use crate::cache::{NodeInfo, Snapshot};
use crate::framework::{ClusterEvent, Filter, Plugin, PreFilter, Rejection};
use crate::pod_info::PodInfo;

pub struct NodePorts;

const NAME: &str = "NodePorts";

#[derive(Clone)]
struct Check(Arc<PodInfo>);

impl Plugin for NodePorts {
    fn name(&self) -> &'static str {
        NAME
    }

    fn events(&self) -> &'static [ClusterEvent] {
        &[ClusterEvent::NodeAdded, ClusterEvent::AssignedPodGone]
    }

    fn pre_filter(&self, pod: &Arc<PodInfo>, _snapshot: &Snapshot) -> PreFilter {
        if pod.host_ports.is_empty() { PreFilter::Skip } else { PreFilter::Check(Box::new(Check(pod.clone()))) }
    }
}

impl Filter for Check {
    fn filter(&self, node: &NodeInfo) -> Result<(), Vec<Rejection>> {
        let taken = |wanted: &crate::pod_info::HostPort| node.used_ports.iter().any(|used| used.conflicts_with(wanted));
        if self.0.host_ports.iter().any(taken) {
            Err(vec![Rejection::resolvable(NAME, "node(s) didn't have free ports for the requested pod ports")])
        } else {
            Ok(())
        }
    }

    fn clone_box(&self) -> Box<dyn Filter> {
        Box::new(self.clone())
    }
}
