//! The default plugins, in upstream's order.

mod image_locality;
mod inter_pod_affinity;
mod node_affinity;
mod node_name;
mod node_ports;
mod node_resources;
mod node_unschedulable;
mod pod_topology_spread;
mod scheduling_gates;
mod taint_toleration;
pub mod volume_binding;

use std::sync::Arc;

use crate::framework::Plugin;

/// The plugins of the default profile. Order matters where messages and costs do: cheap filters come first.
pub fn default_plugins() -> Vec<Arc<dyn Plugin>> {
    vec![
        Arc::new(scheduling_gates::SchedulingGates),
        Arc::new(node_name::NodeName),
        Arc::new(node_unschedulable::NodeUnschedulable),
        Arc::new(taint_toleration::TaintToleration),
        Arc::new(node_affinity::NodeAffinity),
        Arc::new(node_ports::NodePorts),
        Arc::new(node_resources::NodeResourcesFit),
        Arc::new(volume_binding::VolumeBinding),
        Arc::new(pod_topology_spread::PodTopologySpread),
        Arc::new(inter_pod_affinity::InterPodAffinity),
        Arc::new(node_resources::NodeResourcesBalancedAllocation),
        Arc::new(image_locality::ImageLocality),
    ]
}
