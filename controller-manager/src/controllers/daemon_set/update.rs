//! Rolling updates of daemon sets: old pods go as far as few enough nodes are without an available pod; with surge the
//! new pod comes first.

use std::sync::Arc;

use k8s_openapi::api::apps::v1::RollingUpdateDaemonSet;
use k8s_openapi::api::core::v1::Pod;

use super::Look;
use crate::common::rollout::resolve;
use crate::common::{is_deleted, name, pods};

impl Look<'_> {
    fn rolling(&self) -> Option<&RollingUpdateDaemonSet> {
        self.set.spec.update_strategy.as_ref()?.rolling_update.as_ref()
    }

    pub fn wanted_nodes(&self) -> impl Iterator<Item = &str> {
        self.nodes.iter().filter(|(_, placement)| placement.may_run).map(|(node, _)| name(&node.metadata))
    }

    fn desired(&self) -> i32 {
        i32::try_from(self.wanted_nodes().count()).unwrap_or(i32::MAX)
    }

    pub fn max_surge(&self) -> i32 {
        resolve(self.rolling().and_then(|rolling| rolling.max_surge.as_ref()), self.desired(), true)
    }

    fn max_unavailable(&self) -> i32 {
        let unavailable = resolve(self.rolling().and_then(|r| r.max_unavailable.as_ref()), self.desired(), true);
        // Without either nothing could ever move.
        if self.max_surge() == 0 { unavailable.max(1) } else { unavailable }
    }

    pub fn is_available(&self, pod: &Pod) -> bool {
        !is_deleted(&pod.metadata)
            && pods::availability(pod, self.set.spec.min_ready_seconds.unwrap_or(0), self.now).is_ok()
    }

    /// Replaces old pods, as the strategy allows.
    pub fn update(&mut self) {
        let strategy = self.set.spec.update_strategy.as_ref().and_then(|strategy| strategy.type_.as_deref());
        if strategy == Some("OnDelete") {
            return;
        }
        if self.max_surge() > 0 { self.update_with_surge() } else { self.update_in_place() }
    }

    /// The old and the new living pods of a node.
    fn sorted(&self, node: &str) -> (Vec<Arc<Pod>>, Vec<Arc<Pod>>) {
        let living = self.on_node(node).iter().filter(|pod| pods::is_active(pod)).cloned();
        living.partition(|pod| !self.is_current(pod))
    }

    fn update_in_place(&mut self) {
        let mut budget = self.max_unavailable();
        let (mut broken, mut healthy) = (Vec::new(), Vec::new());
        for node in self.wanted_nodes() {
            let (old, new) = self.sorted(node);
            if new.iter().any(|pod| self.is_available(pod)) {
                continue;
            }
            match old.iter().partition::<Vec<_>, _>(|pod| self.is_available(pod)) {
                (available, _) if !available.is_empty() => healthy.extend(available.into_iter().cloned()),
                // What does not work anyway may go at once, but it uses up the budget.
                (_, unavailable) => {
                    budget -= 1;
                    broken.extend(unavailable.into_iter().cloned());
                }
            }
        }
        let room = usize::try_from(budget).unwrap_or(0);
        self.delete(&broken);
        self.delete(&healthy[..healthy.len().min(room)]);
    }

    fn update_with_surge(&mut self) {
        let mut budget = self.max_surge();
        let (mut finished, mut waiting) = (Vec::new(), Vec::new());
        for node in self.wanted_nodes() {
            let (old, new) = self.sorted(node);
            if old.is_empty() {
                continue;
            }
            if new.iter().any(|pod| self.is_available(pod)) {
                finished.extend(old);
            } else if !new.is_empty() {
                budget -= 1;
            } else if old.iter().any(|pod| self.is_available(pod)) {
                waiting.push(node.to_owned());
            } else {
                waiting.insert(0, node.to_owned());
            }
        }
        self.delete(&finished);
        for node in waiting.iter().take(usize::try_from(budget).unwrap_or(0)) {
            self.create(node);
        }
    }
}
