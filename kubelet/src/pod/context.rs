//! What all pod workers of a node share.

use std::sync::Arc;

use parking_lot::RwLock;

use super::downward::Downward;
use super::services::ServiceEnv;
use crate::cgroups::Cgroups;
use crate::devices::Devices;
use crate::dns::NodeDns;
use crate::dra::Claims;
use crate::events::Recorder;
use crate::images::Images;
use crate::node::readiness::Readiness;
use crate::objects::Objects;
use crate::state::NodeState;
use crate::volumes::csi::Csi;
use crate::volumes::{PodCertificates, Tokens};
use crate::watches::Watches;

pub struct NodeContext {
    pub state: Arc<NodeState>,
    pub objects: Objects,
    pub services: Arc<ServiceEnv>,
    pub tokens: Tokens,
    pub certificates: PodCertificates,
    pub csi: Arc<Csi>,
    pub devices: Arc<Devices>,
    pub claims: Arc<Claims>,
    pub readiness: Arc<Readiness>,
    pub watches: Watches,
    pub images: Images,
    pub recorder: Recorder,
    pub cgroups: Cgroups,
    pub dns: NodeDns,
    pub host_ips: Vec<String>,
    /// Allocatable CPU in thousandths and memory in bytes.
    pub cpu_milli: i64,
    pub memory: i64,
    /// All memory of the machine in bytes.
    pub machine_memory: i64,
    /// The uid of the node's object, once registered: mirror objects name it as their owner.
    pub node_uid: tokio::sync::watch::Sender<Option<String>>,
    /// Which pod each container and sandbox of the runtime belongs to, for events that name only an id.
    pub owners: RwLock<std::collections::HashMap<String, String>>,
}

impl NodeContext {
    pub fn downward<'a>(&'a self, pod: &'a k8s_openapi::api::core::v1::Pod, pod_ips: &'a [String]) -> Downward<'a> {
        Downward { pod, pod_ips, host_ips: &self.host_ips, node_cpu_milli: self.cpu_milli, node_memory: self.memory }
    }
}
