//! NodeName: a pod that names its node goes nowhere else.

use std::sync::Arc;

use crate::cache::{NodeInfo, Snapshot};
use crate::framework::{ClusterEvent, Filter, Plugin, PreFilter, Rejection};
use crate::pod_info::PodInfo;

pub struct NodeName;

const NAME: &str = "NodeName";

#[derive(Clone)]
struct Check(String);

impl Plugin for NodeName {
    fn name(&self) -> &'static str {
        NAME
    }

    fn events(&self) -> &'static [ClusterEvent] {
        &[ClusterEvent::NodeAdded]
    }

    fn pre_filter(&self, pod: &Arc<PodInfo>, _snapshot: &Snapshot) -> PreFilter {
        pod.node_name().map_or(PreFilter::Skip, |name| PreFilter::Check(Box::new(Check(name.to_owned()))))
    }
}

impl Filter for Check {
    fn filter(&self, node: &NodeInfo) -> Result<(), Vec<Rejection>> {
        if node.name == self.0 {
            Ok(())
        } else {
            Err(vec![Rejection::unresolvable(NAME, "node(s) didn't match the requested node name")])
        }
    }

    fn clone_box(&self) -> Box<dyn Filter> {
        Box::new(self.clone())
    }
}
