//! ImageLocality: nodes that have the pod's images already are better, the more so the larger the images; an image
//! counts less when only few nodes have it, so that pods do not all crowd on those.

use std::sync::Arc;

use crate::cache::{NodeInfo, Snapshot};
use crate::framework::{ClusterEvent, MAX_SCORE, Plugin, Score};
use crate::pod_info::PodInfo;

pub struct ImageLocality;

const MIB: i64 = 1024 * 1024;
/// Images below this are as good as absent, and nothing is better than the upper limit times the containers.
const MIN: i64 = 23 * MIB;
const MAX_PER_CONTAINER: i64 = 1000 * MIB;

struct Locality {
    /// Each image's name and the share of nodes that have it, as (nodes with it, all nodes).
    images: Vec<(String, i64, i64)>,
    containers: i64,
}

impl Plugin for ImageLocality {
    fn name(&self) -> &'static str {
        "ImageLocality"
    }

    fn events(&self) -> &'static [ClusterEvent] {
        &[]
    }

    fn pre_score(&self, pod: &Arc<PodInfo>, snapshot: &Snapshot, _nodes: &[Arc<NodeInfo>]) -> Option<Box<dyn Score>> {
        let spec = pod.pod.spec.as_ref()?;
        let containers = || spec.init_containers.iter().flatten().chain(&spec.containers);
        let all = i64::try_from(snapshot.nodes.len()).ok()?;
        let images: Vec<_> = containers()
            .filter_map(|container| {
                let name = normalized(container.image.as_deref()?);
                let having = snapshot.nodes.iter().filter(|node| node.images.contains_key(&name)).count();
                (having > 0).then(|| (name, i64::try_from(having).unwrap_or(i64::MAX), all))
            })
            .collect();
        let containers = i64::try_from(containers().count()).ok()?;
        (!images.is_empty()).then(|| Box::new(Locality { images, containers }) as Box<dyn Score>)
    }
}

impl Score for Locality {
    fn score(&self, node: &NodeInfo) -> i64 {
        let sum: i64 = self
            .images
            .iter()
            .filter_map(|(name, having, all)| node.images.get(name).map(|size| size * having / all))
            .sum();
        let max = MAX_PER_CONTAINER * self.containers;
        MAX_SCORE * (sum.clamp(MIN, max) - MIN) / (max - MIN)
    }
}

/// Adds the tag that an image name without one means.
fn normalized(image: &str) -> String {
    let last = image.rsplit('/').next().unwrap_or(image);
    if last.contains(':') || image.contains('@') { image.to_owned() } else { format!("{image}:latest") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_are_completed() {
        assert_eq!(normalized("localhost:5000/a"), "localhost:5000/a:latest");
        assert_eq!(normalized("a:1"), "a:1");
        assert_eq!(normalized("a@sha256:0"), "a@sha256:0");
    }
}
