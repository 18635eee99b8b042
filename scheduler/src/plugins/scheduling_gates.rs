//! SchedulingGates: a pod with gates is not tried until all of them are removed.

use crate::framework::{ClusterEvent, Plugin};
use crate::pod_info::PodInfo;

pub struct SchedulingGates;

impl Plugin for SchedulingGates {
    fn name(&self) -> &'static str {
        "SchedulingGates"
    }

    fn events(&self) -> &'static [ClusterEvent] {
        &[ClusterEvent::PodItself]
    }

    fn pre_enqueue(&self, pod: &PodInfo) -> Result<(), String> {
        let gates = pod.pod.spec.as_ref().and_then(|s| s.scheduling_gates.as_deref()).unwrap_or_default();
        if gates.is_empty() {
            return Ok(());
        }
        let names: Vec<&str> = gates.iter().map(|gate| gate.name.as_str()).collect();
        Err(format!("waiting for scheduling gates: [{}]", names.join(" ")))
    }
}
