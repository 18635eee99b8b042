//! NodeUnschedulable: a cordoned node takes only pods that tolerate its taint.

use std::sync::Arc;

use super::taint_toleration::tolerates;
use crate::cache::{NodeInfo, Snapshot};
use crate::framework::{ClusterEvent, Filter, Plugin, PreFilter, Rejection};
use crate::pod_info::PodInfo;

pub struct NodeUnschedulable;

const NAME: &str = "NodeUnschedulable";
const TAINT: &str = "node.kubernetes.io/unschedulable";

#[derive(Clone)]
struct Check;

impl Plugin for NodeUnschedulable {
    fn name(&self) -> &'static str {
        NAME
    }

    fn events(&self) -> &'static [ClusterEvent] {
        &[ClusterEvent::NodeAdded, ClusterEvent::NodeTaintsChanged, ClusterEvent::PodItself]
    }

    fn pre_filter(&self, pod: &Arc<PodInfo>, _snapshot: &Snapshot) -> PreFilter {
        let tolerated = pod.tolerations().iter().any(|t| tolerates(t, TAINT, "", "NoSchedule"));
        if tolerated { PreFilter::Skip } else { PreFilter::Check(Box::new(Check)) }
    }
}

impl Filter for Check {
    fn filter(&self, node: &NodeInfo) -> Result<(), Vec<Rejection>> {
        let cordoned = node.node().spec.as_ref().and_then(|s| s.unschedulable).unwrap_or(false);
        if cordoned { Err(vec![Rejection::unresolvable(NAME, "node(s) were unschedulable")]) } else { Ok(()) }
    }

    fn clone_box(&self) -> Box<dyn Filter> {
        Box::new(self.clone())
    }
}
